"""Plain TENT behind LitServe, for ``throughput.py`` to compare with: a deep-copied model for each stream.

    python benchmarks/serve_tent_litserve.py FOLDER --port 8001 [--batch 8] [--wait 0.002] [--threads 1] [--fast-queue]

``FOLDER``, body and answer are as in ``serve_fastapi.py``, and LitServe is set up as in ``serve_litserve.py``; the
header ``X-Stream`` names the stream. There is one worker: LitServe hands a request to any worker that is free, so with
two of them each would have its own copy of a stream, and the stream's steps would be shared out between the copies.
What LitServe merges goes through the loop one by one, as the models differ; merging only saves it ways between
processes.
Needs ``pip install litserve safetensors numpy`` beside torch.
"""

# No lazy annotations here: LitServe looks at the type of decode_request's parameter.

import argparse
from pathlib import Path
from typing import Annotated, Any

import litserve  # type: ignore[import-not-found, unused-ignore]  # in an environment of its own
import torch
from fastapi import Depends, Request, Response
from plain_tent import PlainTent
from serve_fastapi import load_network, to_body, to_images
from torch import Tensor

Input = tuple[str, Tensor]
"""Stream and images."""


async def stream_and_body(request: Request) -> tuple[str, bytes]:
    """What a request brings, as it came."""
    return request.headers["x-stream"], await request.body()


class Api(litserve.LitAPI):  # type: ignore[misc, unused-ignore]
    """Each request goes through its stream's own model."""

    def __init__(self, folder: Path, threads: int | None, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._folder, self._threads = folder, threads

    def setup(self, device: str) -> None:
        """Loads the network."""
        if self._threads is not None:
            torch.set_num_threads(self._threads)
        self._tent = PlainTent(load_network(self._folder))

    def decode_request(self, request: Annotated[tuple[str, bytes], Depends(stream_and_body)]) -> Input:
        """The stream and its images ``[N, 3, 32, 32]``."""
        stream, body = request
        return stream, to_images(body)

    def batch(self, inputs: list[Input]) -> list[Input]:
        """Requests as they are: they have nothing in common that could be computed at once."""
        return inputs

    def predict(self, x: Input | list[Input]) -> Tensor | list[Tensor]:
        """Scores ``[N, 10]`` of a request, or of each, from before its step."""
        return [self._tent(*one) for one in x] if isinstance(x, list) else self._tent(*x)

    def unbatch(self, output: list[Tensor]) -> list[Tensor]:
        """One ``[N, 10]`` a request."""
        return output

    def encode_response(self, output: Tensor) -> Response:
        """The scores' bytes."""
        return Response(to_body(output), media_type="application/octet-stream")


def main() -> None:
    """Serves until told to stop."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--batch", type=int, default=1, help="most requests that are merged")
    parser.add_argument("--wait", type=float, default=0.0, help="longest wait for more of them, seconds")
    parser.add_argument("--threads", type=int, default=None, help="of torch; its own default without it")
    parser.add_argument("--fast-queue", action="store_true", help="ZeroMQ between the processes")
    options = parser.parse_args()
    api = Api(options.folder, options.threads, max_batch_size=options.batch, batch_timeout=options.wait)
    # No time limit: with 64 streams of 64 images under way an answer takes many seconds on a small machine.
    server = litserve.LitServer(api, accelerator="cpu", devices=1, timeout=False, fast_queue=options.fast_queue)
    server.run(port=options.port, generate_client_file=False, log_level="warning")


if __name__ == "__main__":
    main()
