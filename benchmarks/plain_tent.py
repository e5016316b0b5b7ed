"""Plain TENT as its paper's code runs it, a model and an optimiser for each stream, with no server: for
``throughput.py`` to compare with, and for ``serve_tent_litserve.py`` to put behind a route.

    python benchmarks/plain_tent.py FOLDER [--images 1 16 64] [--streams 64] [--seconds 4] [--threads N]

``FOLDER`` is what ``example.write_config`` wrote. The streams take turns, a request each, for so many seconds with each
number of images. Prints a line of JSON for each: requests per second, median and 99th percentile of the time from one
answer of a stream to its next, which is what a client that always has the next request ready waits for, the resident
memory before and after, and the first answer of a new stream.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import time
from pathlib import Path

import torch
from torch import Tensor, nn

LEARNING_RATE = 1e-3


class PlainTent:
    """A deep copy of the network for each stream, made at its first request: batch statistics, one Adam step on the
    entropy over scale and shift of the norm layers for each request."""

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._streams: dict[str, tuple[nn.Module, torch.optim.Optimizer]] = {}

    def __call__(self, stream: str, x: Tensor) -> Tensor:
        """Logits ``[N, C]`` of ``x``, ``[N, ...]``, from before the step that they cause."""
        if stream not in self._streams:
            self._streams[stream] = self._open()
        model, optimiser = self._streams[stream]
        logits: Tensor = model(x)
        loss = -(logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        return logits.detach()

    def _open(self) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = copy.deepcopy(self._network).train().requires_grad_(False)
        adapted: list[Tensor] = []
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.track_running_stats, module.running_mean, module.running_var = False, None, None
                adapted += [module.weight.requires_grad_(), module.bias.requires_grad_()]
        return model, torch.optim.Adam(adapted, lr=LEARNING_RATE)


def images(count: int) -> Tensor:
    """Fixed images ``[N, 3, 32, 32]``, the same for everybody who is measured."""
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(count))


def main() -> None:
    """Runs the loop and prints its figures."""
    import numpy as np
    import psutil
    from serve_fastapi import load_network

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, nargs="+", default=[1, 16, 64], help="in a request")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--threads", type=int, default=None, help="of torch; its own default without it")
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    tent, process = PlainTent(load_network(options.folder)), psutil.Process()
    ids = [str(number) for number in range(options.streams)]
    before = process.memory_info().rss
    for count in options.images:
        x = images(count)
        scores = tent(f"first {count}", x)
        last, waits = dict[str, float](), list[float]()
        for stream in ids:
            tent(stream, x)
            last[stream] = started = now = time.perf_counter()
        for stream in itertools.cycle(ids):
            tent(stream, x)
            now = time.perf_counter()
            waits.append(now - last[stream])
            last[stream] = now
            if now > started + options.seconds:
                break
        p50, p99 = np.percentile(waits, [50, 99])
        figures = {
            "images": count,
            "per_second": len(waits) / (now - started),
            "p50_ms": 1e3 * p50,
            "p99_ms": 1e3 * p99,
            "ready_mb": before / 1e6,
            "memory_mb": [process.memory_info().rss / 1e6],
            "scores": scores.tolist(),
        }
        print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
