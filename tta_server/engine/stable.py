"""Layers whose numbers for a row do not depend on how many rows share the call.

A library picks its kernel by the shape of the call, and kernels round differently. For a stream that is merged with
others now and alone then, that is noise in its gradients, which an optimiser such as Adam can blow up where they are
small. On the CPU the kernels for very few rows are the exception, so linear and convolution layers run with a few rows
of padding there: next to nothing in time, and rows come out bit for bit the same in any company.

``docs/architecture.md`` has the measurement. Linear layers over tokens, ``[N, T, D]``, have enough rows as they are.
What a model computes outside of such layers is not covered; ``tta-server check`` measures what holds for a model on
this machine.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from tta_server.engine.traced import is_tracing

_SMALL = 20480
"""Values in a row up to which torch runs a single row through its own convolution instead of oneDNN's."""


def stabilise(network: nn.Module) -> None:
    """Makes the linear and convolution layers of ``network`` row-stable. Mutates it; its results change by rounding."""
    for module in network.modules():
        rows = _ROWS.get(type(module))
        if rows is not None:
            module.forward = partial(_padded, type(module).forward, module, rows)


def _linear_rows(x: Tensor) -> int:
    """Matrix products of less than 12 rows agree with larger ones only for some sizes; those of 16 do."""
    return max(len(x), 16) if x.dim() == 2 else len(x)


def _convolution_rows(x: Tensor) -> int:
    """One small row takes another kernel, and so can three, with two threads."""
    return len(x) + len(x) % 2 if len(x) < 4 and x[0].numel() <= _SMALL else len(x)


_ROWS: dict[type[nn.Module], Callable[[Tensor], int]] = {
    nn.Linear: _linear_rows,
    nn.Conv1d: _convolution_rows,
    nn.Conv2d: _convolution_rows,
    nn.Conv3d: _convolution_rows,
}
"""With how many rows to run each kind of layer."""


def _padded(forward: Callable[..., Tensor], module: nn.Module, rows: Callable[[Tensor], int], x: Tensor) -> Tensor:
    if is_tracing():  # a graph is tried with few rows and many, see ``traced.py``
        return forward(module, x)
    missing = 0 if x.is_cuda else rows(x) - len(x)
    if not missing:
        return forward(module, x)
    return forward(module, F.pad(x, (*[0] * (2 * (x.dim() - 1)), 0, missing)))[: len(x)]
