"""The ResNet-20 behind LitServe, for ``wire.py`` to compare with, in the fastest way that LitServe offers.

    python benchmarks/serve_litserve.py FOLDER --port 8001 [--batch 8] [--wait 0.002] [--workers 1] [--fast-queue]

``FOLDER``, body and answer are as in ``serve_fastapi.py``. LitServe reads JSON or forms by itself; a FastAPI dependency
in the place of the request's type hands it the raw body instead, which saves it from parsing numbers. Needs
``pip install litserve safetensors`` beside torch.
"""

# No lazy annotations here: LitServe looks at the type of decode_request's parameter.

import argparse
from pathlib import Path
from typing import Annotated, Any

import litserve  # type: ignore[import-not-found, unused-ignore]  # in an environment of its own
import torch
from fastapi import Depends, Request, Response
from serve_fastapi import load_network, to_body, to_images
from torch import Tensor


async def raw_body(request: Request) -> bytes:
    """The body as it came."""
    return await request.body()


class Api(litserve.LitAPI):  # type: ignore[misc, unused-ignore]
    """Merges up to ``max_batch_size`` requests of the same number of images."""

    def __init__(self, folder: Path, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._folder = folder

    def setup(self, device: str) -> None:
        """Loads the network, once in each worker."""
        self._network = load_network(self._folder)

    def decode_request(self, request: Annotated[bytes, Depends(raw_body)]) -> Tensor:
        """Images ``[N, 3, 32, 32]``."""
        return to_images(request)

    def batch(self, inputs: list[Tensor]) -> Tensor:
        """Requests of equal size, ``[B, N, 3, 32, 32]``."""
        return torch.stack(inputs)

    def predict(self, x: Tensor) -> Tensor:
        """Scores ``[B, N, 10]``, or ``[N, 10]`` where requests come alone."""
        with torch.inference_mode():
            scores: Tensor = self._network(x.flatten(0, -4))
        return scores.view(*x.shape[:-3], -1)

    def unbatch(self, output: Tensor) -> list[Tensor]:
        """One ``[N, 10]`` a request."""
        return list(output)

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
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--fast-queue", action="store_true", help="ZeroMQ between the processes")
    options = parser.parse_args()
    api = Api(options.folder, max_batch_size=options.batch, batch_timeout=options.wait)
    server = litserve.LitServer(
        api, accelerator="cpu", devices=1, workers_per_device=options.workers, fast_queue=options.fast_queue
    )
    server.run(port=options.port, generate_client_file=False, log_level="warning")


if __name__ == "__main__":
    main()
