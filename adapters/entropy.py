"""What the policies that minimise the entropy of their predictions have in common (TENT and its descendants).

They adapt the scales and shifts of norm layers by one optimiser step per request, normalise by the request's own batch
statistics, and answer before the step. Any of them can be given the sample filter of OSTTA.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from adapters import losses, optim
from adapters.base import BATCH_NORM, Batch, Norm, Policy, Scope, Source, State

SETTINGS = {"lr": "[0, inf)", "momentum": "[0, 1)", "ostta": "[0, inf)"}
IMAGENET = {"optimiser": "sgd", "lr": 2.5e-4}


@dataclass(frozen=True)
class EntropyPolicy(Policy):
    """Settings of all entropy policies.

    ``optimiser``: ``adam`` (published for CIFAR, ``lr`` 1e-3) or ``sgd`` with ``momentum`` (published for ImageNet:
    ``lr`` 2.5e-4, momentum 0.9), plain or ``nesterov``. ``lr``: learning rate per request. ``momentum``, ``nesterov``:
    used by ``sgd`` only.

    ``ostta``: puts the filter of OSTTA ("wisdom of crowds", Lee et al., ICCV 2023) on the loss, at the cost of a second
    forward pass. With ``c_i`` the class that the source model gives a row, only rows count on which the adapted model
    believes in it at least as much as the source does, ``p_i[c_i] >= p0_i[c_i]``; and ``ostta`` times the entropy of
    the request's mean prediction is taken off the loss, ``- alpha H(mean_i p_i)``, over all rows. ``None``: no filter.
    """

    scope = Scope.NORM
    ranges = SETTINGS
    presets = {"imagenet": IMAGENET}

    optimiser: Literal["adam", "sgd"] = "adam"
    lr: float = 1e-3
    momentum: float = 0.9
    nesterov: bool = False
    ostta: float | None = None

    @property
    def norm(self) -> Norm:
        return BATCH_NORM

    def keys(self, source: Source) -> tuple[str, ...]:
        """What it adapts of this source. Raises ``ValueError`` when there is nothing."""
        if not source.affine:
            raise ValueError(f"{self.name} adapts the scale and shift of norm layers, and this model has none")
        return source.affine

    def init(self, source: Source) -> State:
        weights = source.stacked(self.keys(source))
        return State(weights, self.descent.init(weights))

    @property
    def descent(self) -> optim.Optimiser:
        """The optimiser of the settings."""
        if self.optimiser == "adam":
            return optim.Adam(self.lr)
        return optim.Sgd(self.lr, self.momentum, self.nesterov)

    def crowd(self, source: Source, batch: Batch, logits: Tensor) -> tuple[Tensor, Tensor]:
        """OSTTA's part in the loss: which rows may count, ``[N]`` (bool), and what is added to it, ``[S]``."""
        if self.ostta is None:
            return torch.ones_like(logits[:, 0], dtype=torch.bool), logits.new_zeros(batch.segments.streams)
        with torch.no_grad():
            weights = source.spread(self.keys(source), batch.segments.streams)
            believed, chosen = batch.forward(weights, batch.x).logits.softmax(1).max(1)
        p = logits.softmax(1)
        kept = p.detach().gather(1, chosen[:, None]).squeeze(1) >= believed
        return kept, -self.ostta * losses.entropy_of(batch.segments.mean(p))

    def counts(self, chosen: Tensor) -> Tensor:
        """Which streams take a step, ``[S]`` (bool), when so many of their rows, ``[S]``, were chosen."""
        return (chosen > 0) | bool(self.ostta)
