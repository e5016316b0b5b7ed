"""Layers whose numbers for a row do not depend on how many rows share the call.

A library picks its kernel by the shape of the call, and kernels round differently. For a stream that is merged with
others now and alone then, that is noise in its gradients, which an optimiser such as Adam can blow up where they are
small. On the CPU the kernels for very few rows are the exception, so linear and convolution layers run with a few rows
of padding there: next to nothing in time, and rows come out bit for bit the same in any company.

``docs/architecture.md`` has the measurement. What a model computes outside of such layers is not covered; ``tta-server
check`` measures what holds for a model on this machine.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

_STABLE_ROWS: dict[type[nn.Module], int] = {
    # Matrix products: below 12 rows, multiples of 4 agree with larger ones.
    nn.Linear: 16,
    # Convolutions: 1 small row takes torch's plain kernel instead of oneDNN's, and 3 can differ with two threads.
    nn.Conv1d: 2,
    nn.Conv2d: 2,
    nn.Conv3d: 2,
}
_SMALL = 20480
"""Values in a row up to which torch prefers its plain convolution for a single row."""


def stabilise(network: nn.Module) -> None:
    """Makes the linear and convolution layers of ``network`` row-stable. Mutates it; its results change by rounding."""
    for module in network.modules():
        rows = _STABLE_ROWS.get(type(module))
        if rows is not None:
            module.forward = partial(_padded, type(module).forward, module, rows)


def _padded(forward: Any, module: nn.Module, least: int, x: Tensor) -> Tensor:
    n = len(x)
    rows = _rows(least, n, x)
    if rows == n:
        y: Tensor = forward(module, x)
        return y
    padded: Tensor = forward(module, F.pad(x, (*[0] * (2 * (x.dim() - 1)), 0, rows - n)))
    return padded[:n]


def _rows(least: int, n: int, x: Tensor) -> int:
    """With how many rows to run ``x [n, ...]``."""
    if x.is_cuda or n > 16:
        return n
    if least == _STABLE_ROWS[nn.Linear]:
        return max(n, least) if x.dim() == 2 else n
    return n + n % 2 if n < 4 and x[0].numel() <= _SMALL else n
