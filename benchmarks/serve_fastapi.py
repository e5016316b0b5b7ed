"""A plain FastAPI handler around the ResNet-20, for ``wire.py`` to compare with: no checks, no batching, no metrics.

    python benchmarks/serve_fastapi.py FOLDER --port 8001 [--inline]

``FOLDER`` is what ``example.write_config`` wrote. Body and answer are bare float32 values, little-endian: images
``[N, 3, 32, 32]`` in, scores ``[N, 10]`` out.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import uvicorn
from fastapi import FastAPI, Request, Response
from starlette.concurrency import run_in_threadpool
from torch import Tensor, nn


def load_network(folder: Path) -> nn.Module:
    """The network in ``folder``, ready to answer."""
    sys.path.insert(0, str(folder))
    from resnet_cifar import resnet20

    network = resnet20()
    network.load_state_dict(safetensors.torch.load_file(folder / "weights.safetensors"))
    return network.eval()


def to_images(body: bytes) -> Tensor:
    """Images ``[N, 3, 32, 32]``; a copy, since torch wants to own what it may write to."""
    return torch.from_numpy(np.frombuffer(body, np.float32).reshape(-1, 3, 32, 32).copy())


def to_body(scores: Tensor) -> bytes:
    """The scores' float32 values."""
    return scores.numpy().tobytes()


def main() -> None:
    """Serves until told to stop."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--inline", action="store_true", help="run the network on the event loop, not in a thread")
    options = parser.parse_args()
    network = load_network(options.folder)
    app = FastAPI()

    def answer(body: bytes) -> bytes:
        with torch.inference_mode():
            return to_body(network(to_images(body)))

    @app.get("/health")
    async def health() -> Response:
        return Response()

    @app.post("/predict")
    async def predict(request: Request) -> Response:
        body = await request.body()
        scores = answer(body) if options.inline else await run_in_threadpool(answer, body)
        return Response(scores, media_type="application/octet-stream")

    uvicorn.run(app, port=options.port, log_level="warning", access_log=False)


if __name__ == "__main__":
    main()
