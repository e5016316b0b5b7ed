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
    # Convolutions: 1 row takes another kernel, and so can 3 with two threads.
    nn.Conv1d: 2,
    nn.Conv2d: 2,
    nn.Conv3d: 2,
}


def stabilise(network: nn.Module) -> None:
    """Makes the linear and convolution layers of ``network`` row-stable. Mutates it; its results change by rounding."""
    for module in network.modules():
        rows = _STABLE_ROWS.get(type(module))
        if rows is not None:
            module.forward = partial(_padded, type(module).forward, module, rows)


def _padded(forward: Any, module: nn.Module, least: int, x: Tensor) -> Tensor:
    n = len(x)
    rows = least if n < least else n + n % 2 if n < 4 else n
    if x.is_cuda or rows == n or (least > 2 and x.dim() > 2):
        y: Tensor = forward(module, x)
        return y
    padded: Tensor = forward(module, F.pad(x, (*[0] * (2 * (x.dim() - 1)), 0, rows - n)))
    return padded[:n]
