"""The source model as one compiled graph, for passes in which no stream has anything of its own.

Run layer by layer, a network returns to Python, and asks for the interpreter lock, some hundred times a pass; beside an
event loop that is busy with requests it waits for that lock most of the time. A TorchScript graph runs without it.
When it is frozen, torch also folds batch norms into convolutions. (``torch.jit.optimize_for_inference`` would be faster
still, but there the bits of a row's scores depend on its place in the batch.)

A graph is used only where it is proven to be the network: tracing found nothing that depends on values, its scores are
the network's, and rows come out bit for bit the same in any company. Otherwise the network itself runs. ``benchmarks/``
has what it is worth.
"""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from adapters.base import Output
from tta_server.settings import type_and_line

log = logging.getLogger(__name__)

Run = Callable[[Tensor], Output]

TRACED_ROWS = 16
SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 15, 16, 17, 31, 32, 33, 64)
"""Batches in which rows must come out alike. Running them also warms the graph up."""


def is_tracing() -> bool:
    """Whether a graph is being made: what depends on the number of rows must not be decided then."""
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]  # torch's own words for it


def trace(run: Run, rows: Tensor) -> Run | None:
    """``run`` as a graph, or ``None`` where it is not proven to be the same.

    ``rows [64, ...]`` are inputs to try it with, all different. The weights must not be changed in place later on: the
    graph has copies of some and shares others.
    """
    try:
        with warnings.catch_warnings(record=True) as warned, torch.no_grad():
            warnings.simplefilter("always")
            traced = torch.jit.trace(_Pair(run).eval(), rows[:TRACED_ROWS], check_trace=False)
            # Deprecated, but as long as torch has it, nothing else runs a network without the lock and a compiler.
            frozen = torch.jit.freeze(traced)
            for warning in warned:
                if issubclass(warning.category, torch.jit.TracerWarning):  # type: ignore[attr-defined]  # torch's own
                    raise ValueError(f"tracing warned: {warning.message}")

            def graph(x: Tensor) -> tuple[Tensor, Tensor]:
                # One row by itself would take other kernels than two.
                logits, features = frozen(torch.cat([x, x]) if len(x) == 1 else x)
                return logits[: len(x)], features[: len(x)]

            together, expected = graph(rows), run(rows)
            if any(_gap(*pair) > 1e-5 for pair in zip(together, (expected.logits, expected.features), strict=True)):
                raise ValueError("it scores otherwise than the network")
            for size in SIZES:
                for one, other in zip(graph(rows[-size:]), together, strict=True):
                    if not torch.equal(one, other[-size:]):
                        raise ValueError(f"rows differ in a batch of {size}")
    except Exception as error:  # a model's forward may do anything that a graph cannot
        log.info("the source model runs layer by layer, it is not a graph: %s", type_and_line(error))
        return None

    most = _best_size(graph, rows)

    @torch.no_grad()
    def run_graph(x: Tensor) -> Output:
        parts = [graph(part) for part in x.tensor_split(math.ceil(len(x) / most))]
        logits, features = zip(*parts, strict=True)
        return Output(*parts[0]) if len(parts) == 1 else Output(torch.cat(logits), torch.cat(features))

    return run_graph


@torch.no_grad()
def _best_size(graph: Callable[[Tensor], tuple[Tensor, Tensor]], rows: Tensor) -> int:
    """How many rows a pass takes for the least time per row: where more do not fit into the caches, fewer go faster."""

    def seconds(size: int) -> float:
        started = time.perf_counter()
        graph(rows[:size])
        return (time.perf_counter() - started) / size

    # The best of several turns, since whatever else the machine does only ever slows.
    turns = {size: min(seconds(size) for _ in range(7)) for size in (8, 16, 32, 64)}
    return min(turns, key=turns.__getitem__)


class _Pair(nn.Module):
    """Tracing wants a module, and tensors from it."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self._run = run

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        output = self._run(x)
        return output.logits, output.features


def _gap(one: Tensor, other: Tensor) -> float:
    return ((one - other).abs().max() / other.abs().max().clamp(min=1.0)).item()
