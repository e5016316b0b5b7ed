"""Does a stream get the same scores in company as alone? Measured on the real server, over HTTP, in float32.

    TTA_DATA=DIR python benchmarks/isolation.py examples/cifar10c/config.yaml --data DIR [--requests 50]

Eight TENT streams, each of its own corruption, send requests of 1 to 64 images: first all at once, so that the server
merges them as they come, then each stream again under a new id while the server has nothing else to do. Prints the
largest difference between the two runs' scores, by stream.
"""

from __future__ import annotations

import argparse
import asyncio
import io
from pathlib import Path

import example
import httpx
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from tta_server.data import load_domains

STREAMS = 8
MOST_ROWS = 64

Scores = NDArray[np.float32]


async def run_stream(client: httpx.AsyncClient, id: str, bodies: list[bytes], progress: Progress) -> list[Scores]:
    """One stream's requests in order; returns its scores by request."""
    task = progress.add_task(id, total=len(bodies))
    (await client.put(f"/v1/streams/{id}", json={"policy": "tent"})).raise_for_status()
    scores = []
    for body in bodies:
        answer = await client.post(f"/v1/streams/{id}/predict", params={"output": "logits"}, content=body)
        answer.raise_for_status()
        scores.append(np.array(answer.json()["logits"], dtype=np.float32))
        progress.advance(task)
    return scores


async def measure(url: str, requests: dict[str, list[bytes]]) -> tuple[list[list[Scores]], list[list[Scores]], float]:
    """All streams' scores in company and alone, and the mean number of images in an engine step in company."""
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        with Progress(console=Console(stderr=True)) as progress:
            together = await asyncio.gather(
                *(run_stream(client, f"together-{name}", bodies, progress) for name, bodies in requests.items())
            )
            metrics = (await client.get("/metrics")).text.splitlines()
            alone = [await run_stream(client, f"alone-{name}", bodies, progress) for name, bodies in requests.items()]
    rows, steps = (
        next(float(line.split()[-1]) for line in metrics if line.startswith(f"tta_batch_samples_{part}"))
        for part in ("sum", "count")
    )
    return together, alone, rows / steps


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=50)
    options = parser.parse_args()
    random = np.random.default_rng(0)
    requests = {}
    for domain in load_domains(options.data, (), 5, None)[:STREAMS]:
        sizes = random.integers(1, MOST_ROWS, size=options.requests, endpoint=True)
        requests[domain.name] = [_body(domain.images[random.integers(0, len(domain.images), size=n)]) for n in sizes]
    with example.running(options.config) as (url, _):
        together, alone, rows = asyncio.run(measure(url, requests))
    table = Table(title=f"{STREAMS} TENT streams, {options.requests} requests of 1 to {MOST_ROWS} images each")
    for column in ("stream", "largest score", "largest difference", "bit for bit"):
        table.add_column(column, justify="left" if column == "stream" else "right")
    for name, company, lonely in zip(requests, together, alone, strict=True):
        largest = max(float(np.abs(one).max()) for one in lonely)
        gap = max(float(np.abs(one - other).max()) for one, other in zip(company, lonely, strict=True))
        same = sum(np.array_equal(one, other) for one, other in zip(company, lonely, strict=True))
        table.add_row(name, f"{largest:.1f}", f"{gap:.1e}", f"{same} of {len(lonely)} requests")
    Console().print(table)
    Console().print(
        f"In company an engine step held {rows:.1f} images on average, a request {MOST_ROWS / 2 + 0.5:.1f}."
    )


def _body(images: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    return buffer.getvalue()


if __name__ == "__main__":
    main()
