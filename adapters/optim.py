"""Functional optimisers over stacked weights: each stream takes its own step, with its own moments and counter.

Equal to ``torch.optim.SGD``, ``Adam`` and ``AdamW`` run once per stream. The moments live in a policy's
``State.memory`` under ``sgd.m.<key>`` or ``adam.m.<key>`` and ``adam.v.<key>``, the step counter as ``adam.step [S]``.
Nothing is changed in place.

A stream whose ``active [S]`` entry is false takes no step at all: weights, moments and counter stay, bit for bit. A
zero gradient is not the same thing, since moments would still decay and move the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from adapters.base import Tensors


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
        keys, theta, g = _lists(weights, gradients)
        if self.weight_decay:
            g = torch._foreach_add(g, theta, alpha=self.weight_decay)
        new_memory: Tensors = {}
        direction = g
        if self.momentum:
            b = torch._foreach_add(torch._foreach_mul([memory[f"sgd.m.{key}"] for key in keys], self.momentum), g)
            new_memory = {f"sgd.m.{key}": value for key, value in zip(keys, b, strict=True)}
            direction = torch._foreach_add(g, b, alpha=self.momentum) if self.nesterov else b
        moved = torch._foreach_add(theta, direction, alpha=-self.lr)
        return _where(active, dict(zip(keys, moved, strict=True)), weights), _where(active, new_memory, memory)


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
        keys, theta, g = _lists(weights, gradients)
        b1, b2 = self.betas
        if self.decoupled:
            theta = torch._foreach_mul(theta, 1 - self.lr * self.weight_decay)
        elif self.weight_decay:
            g = torch._foreach_add(g, theta, alpha=self.weight_decay)
        m = torch._foreach_lerp([memory[f"adam.m.{key}"] for key in keys], g, 1 - b1)
        v = torch._foreach_mul([memory[f"adam.v.{key}"] for key in keys], b2)
        torch._foreach_addcmul_(v, g, g, 1 - b2)
        step = memory[self.counter] + 1
        # Each stream's own bias corrections; in float64, where 1 - b2^t keeps its digits.
        size = self.lr / (1 - b1 ** step.double())
        root = (1 - b2 ** step.double()).sqrt()
        denominator = torch._foreach_div(torch._foreach_sqrt(v), _per_stream(root, v))
        torch._foreach_add_(denominator, self.eps)
        update = torch._foreach_mul(torch._foreach_div(m, denominator), _per_stream(size, m))
        moved = torch._foreach_sub(theta, update)
        new_memory = {f"adam.m.{key}": value for key, value in zip(keys, m, strict=True)}
        new_memory |= {f"adam.v.{key}": value for key, value in zip(keys, v, strict=True)} | {self.counter: step}
        return _where(active, dict(zip(keys, moved, strict=True)), weights), _where(active, new_memory, memory)


def _lists(
    weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor]
) -> tuple[list[str], tuple[Tensor, ...], tuple[Tensor, ...]]:
    keys = list(weights)
    return keys, tuple(weights[key].detach() for key in keys), tuple(gradients[key] for key in keys)


def _per_stream(values: Tensor, like: tuple[Tensor, ...]) -> list[Tensor]:
    """``values [S]`` once per tensor of ``like``, viewed so that they broadcast over ``[S, ...]``, in its dtype."""
    shaped = {dim: values.to(like[0].dtype).view(-1, *[1] * (dim - 1)) for dim in {one.dim() for one in like}}
    return [shaped[one.dim()] for one in like]


def _where(active: Tensor | None, new: Mapping[str, Tensor], old: Mapping[str, Tensor]) -> Tensors:
    if active is None:
        return dict(new)
    return {key: torch.where(active.view(-1, *[1] * (value.dim() - 1)), value, old[key]) for key, value in new.items()}
