"""Functional optimisers over stacked weights: each stream takes its own step, with its own moments and counter.

Equal to ``torch.optim.SGD``, ``Adam`` and ``AdamW`` run once per stream. The moments live in a policy's
``State.memory`` under ``sgd.m.<key>`` or ``adam.m.<key>`` and ``adam.v.<key>``, the step counter as ``adam.step [S]``.
Nothing that is given is changed in place.

A stream whose ``active [S]`` entry is false takes no step at all: weights, moments and counter stay, bit for bit. A
zero gradient is not the same thing, since moments would still decay and move the weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from adapters.base import Tensors

_List = tuple[Tensor, ...] | list[Tensor]
_SMALL = 4096
"""Values of all streams in a tensor, on average, below which tensors are worked on side by side, as one."""


class Optimiser(Protocol):
    def init(self, weights: Mapping[str, Tensor]) -> Tensors:
        """The memory of streams that have not taken a step yet, for these stacked weights."""

    def update(
        self,
        weights: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
        memory: Mapping[str, Tensor],
        active: Tensor | None = None,
    ) -> tuple[Tensors, Tensors]:
        """One step down ``gradients``, for every stream or only where ``active [S]`` (bool): new weights and memory."""


@dataclass(frozen=True)
class Sgd:
    """Stochastic gradient descent: ``b <- mu b + g`` from the second step on, ``b = g`` in the first, and
    ``theta <- theta - lr b``, or with Nesterov ``theta <- theta - lr (g + mu b)``, where ``g`` includes
    ``weight_decay theta``.

    Starting ``b`` at zero makes the first step equal to torch's, so no counter is kept. Without momentum there is no
    memory.
    """

    lr: float
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        if self.nesterov and self.momentum <= 0:
            raise ValueError("Nesterov's step needs a momentum above 0")

    def init(self, weights: Mapping[str, Tensor]) -> Tensors:
        return {f"sgd.m.{key}": torch.zeros_like(value) for key, value in weights.items()} if self.momentum else {}

    def update(
        self,
        weights: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
        memory: Mapping[str, Tensor],
        active: Tensor | None = None,
    ) -> tuple[Tensors, Tensors]:
        with torch.no_grad():
            shelf = _Shelf(weights)
            theta, g = shelf.put(weights), shelf.put(gradients)
            if self.weight_decay:
                g = torch._foreach_add(g, theta, alpha=self.weight_decay)
            new_memory: Tensors = {}
            direction = g
            if self.momentum:
                b = shelf.put(memory, "sgd.m.")
                direction = new_b = torch._foreach_mul(b, self.momentum)
                torch._foreach_add_(new_b, g)
                if self.nesterov:
                    direction = torch._foreach_add(g, new_b, alpha=self.momentum)
                new_memory = shelf.take(_keep(new_b, b, active), "sgd.m.")
            moved = torch._foreach_add(theta, direction, alpha=-self.lr)
            return shelf.take(_keep(moved, theta, active)), new_memory


@dataclass(frozen=True)
class Adam:
    """Adam (Kingma and Ba 2015, algorithm 1) with torch's placement of ``eps``: outside the corrected square root.

    ``m <- b1 m + (1 - b1) g``, ``v <- b2 v + (1 - b2) g^2``,
    ``theta <- theta - lr / (1 - b1^t) * m / (sqrt(v / (1 - b2^t)) + eps)``. ``weight_decay`` is added to ``g`` as in
    Adam, or with ``decoupled`` shrinks ``theta`` by ``1 - lr weight_decay`` first, as in AdamW.
    """

    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled: bool = False
    counter: str = "adam.step"
    """Key of the step counter: two optimisers in one state need two."""

    def init(self, weights: Mapping[str, Tensor]) -> Tensors:
        first = next(iter(weights.values()))
        memory = {f"adam.{moment}.{key}": torch.zeros_like(value) for moment in "mv" for key, value in weights.items()}
        return memory | {self.counter: torch.zeros(len(first), dtype=torch.int64, device=first.device)}

    def update(
        self,
        weights: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
        memory: Mapping[str, Tensor],
        active: Tensor | None = None,
    ) -> tuple[Tensors, Tensors]:
        with torch.no_grad():
            shelf = _Shelf(weights)
            theta, g = shelf.put(weights), shelf.put(gradients)
            m, v = shelf.put(memory, "adam.m."), shelf.put(memory, "adam.v.")
            b1, b2 = self.betas
            start = theta
            if self.decoupled:
                start = torch._foreach_mul(theta, 1 - self.lr * self.weight_decay)
            elif self.weight_decay:
                g = torch._foreach_add(g, theta, alpha=self.weight_decay)
            new_m = torch._foreach_lerp(m, g, 1 - b1)
            new_v = torch._foreach_mul(v, b2)
            torch._foreach_addcmul_(new_v, g, g, 1 - b2)
            step = memory[self.counter] + 1
            # Each stream's own bias corrections; in float64, where 1 - b2^t keeps its digits.
            t = step.double()
            size, root = self.lr / (1 - b1**t), (1 - b2**t).sqrt()
            denominator = torch._foreach_sqrt(new_v)
            torch._foreach_div_(denominator, _per_stream(root.to(v[0].dtype), v))
            torch._foreach_add_(denominator, self.eps)
            update = torch._foreach_div(new_m, denominator)
            torch._foreach_mul_(update, _per_stream(size.to(m[0].dtype), m))
            moved = torch._foreach_sub(start, update)
            new_memory = shelf.take(_keep(new_m, m, active), "adam.m.") | shelf.take(_keep(new_v, v, active), "adam.v.")
            (new_memory[self.counter],) = _keep([step], [memory[self.counter]], active)
            return shelf.take(_keep(moved, theta, active)), new_memory


class _Shelf:
    """How tensors ``[S, ...]`` under these keys are worked on: as they are, or, where they are small, side by side as
    one ``[S, P]``, since many small operations would take longer than the copies."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self._keys = list(weights)
        self._shapes = [value.shape for value in weights.values()]
        self._sizes = [math.prod(shape[1:]) for shape in self._shapes]
        values = sum(self._sizes) * len(next(iter(weights.values())))
        self._is_one = values <= _SMALL * len(self._keys) and len({value.dtype for value in weights.values()}) == 1

    def put(self, tensors: Mapping[str, Tensor], prefix: str = "") -> _List:
        values = [tensors[f"{prefix}{key}"] for key in self._keys]
        if not self._is_one:
            return values
        return [torch.cat([one if one.dim() == 2 else one.reshape(len(one), -1) for one in values], 1)]

    def take(self, values: _List, prefix: str = "") -> Tensors:
        if self._is_one:
            parts = values[0].split(self._sizes, 1)
            values = [
                one if len(shape) == 2 else one.view(shape) for one, shape in zip(parts, self._shapes, strict=True)
            ]
        return {f"{prefix}{key}": value for key, value in zip(self._keys, values, strict=True)}


def _per_stream(values: Tensor, like: _List) -> list[Tensor]:
    """``values [S]`` once per tensor of ``like``, viewed so that they broadcast over ``[S, ...]``."""
    shaped = {dim: values.view(-1, *[1] * (dim - 1)) for dim in {one.dim() for one in like}}
    return [shaped[one.dim()] for one in like]


def _keep(new: _List, old: _List, active: Tensor | None) -> _List:
    """``new``, but ``old`` in the rows of streams that are not ``active``."""
    if active is None or (active.is_cpu and active.all()):
        return new
    return [torch.where(*values) for values in zip(_per_stream(active, new), new, old, strict=True)]
