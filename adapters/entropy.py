"""What the policies that minimise the entropy of their predictions have in common (TENT and its descendants).

They adapt the scales and shifts of norm layers by one optimiser step per request, normalise by the request's own batch
statistics, and answer before the step. Any of them can be given the sample filter of OSTTA.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import Tensor

from adapters import losses, optim
from adapters.base import BATCH_NORM, Batch, Norm, Policy, Scope, Segments, Source, State

DESCENT = {"lr": "[0, inf)", "momentum": "[0, 1)"}
SETTINGS = DESCENT | {"ostta": "[0, inf)"}
IMAGENET = {"optimiser": "sgd", "lr": 2.5e-4}


@dataclass(frozen=True)
class AffinePolicy(Policy):
    """Settings of all policies that take a step of the norm layers' scales and shifts per request.

    ``optimiser``: ``adam`` (published for CIFAR, ``lr`` 1e-3) or ``sgd`` with ``momentum`` (published for ImageNet:
    ``lr`` 2.5e-4, momentum 0.9), plain or ``nesterov``. ``lr``: learning rate per request. ``momentum``, ``nesterov``:
    used by ``sgd`` only.
    """

    scope = Scope.NORM
    ranges = DESCENT
    presets = {"imagenet": IMAGENET}

    optimiser: Literal["adam", "sgd"] = "adam"
    lr: float = 1e-3
    momentum: float = 0.9
    nesterov: bool = False

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


@dataclass(frozen=True)
class EntropyPolicy(AffinePolicy):
    """Settings of all entropy policies.

    ``ostta``: puts the filter of OSTTA ("wisdom of crowds", Lee et al., ICCV 2023) on the loss, at the cost of a second
    forward pass. With ``c_i`` the class that the source model gives a row, only rows count on which the adapted model
    believes in it at least as much as the source does, ``p_i[c_i] >= p0_i[c_i]``; and ``ostta`` times the entropy of
    the request's mean prediction is taken off the loss, ``- alpha H(mean_i p_i)``, over all rows. ``None``: no filter.
    """

    ranges = SETTINGS

    ostta: float | None = None

    def crowd(self, source: Source, batch: Batch, logits: Tensor) -> tuple[Tensor, Tensor]:
        """OSTTA's part in the loss: which rows may count, ``[N]`` (bool), and what is added to it, ``[S]``."""
        if self.ostta is None:
            return torch.ones_like(logits[:, 0], dtype=torch.bool), logits.new_zeros(batch.segments.streams)
        with torch.no_grad():
            weights = source.spread(self.keys(source), batch.segments.streams)
            believed, chosen = batch.forward(weights, batch.x).logits.softmax(1).max(1)
        kept = logits.detach().softmax(1).gather(1, chosen[:, None]).squeeze(1) >= believed
        return kept, self.marginal(batch.segments, logits)

    def marginal(self, segments: Segments, logits: Tensor) -> Tensor:
        """What OSTTA adds to the loss, ``- alpha H(mean_i p_i)`` of each stream, ``[S]``; 0 without it."""
        if not self.ostta:
            return logits.new_zeros(segments.streams)
        return -self.ostta * losses.entropy_of(segments.mean(logits.softmax(1)))

    def counts(self, chosen: Tensor) -> Tensor:
        """Which streams take a step, ``[S]`` (bool), when so many of their rows, ``[S]``, were chosen."""
        return (chosen > 0) | bool(self.ostta)


@dataclass(frozen=True)
class PartialEntropyPolicy(EntropyPolicy):
    """An entropy policy that leaves the top of the network alone.

    ``skip``: patterns of the paths of norm layers that are not adapted, with ``*``, ``?`` and ``[...]`` as in file
    names. The published list knows the last stage of ResNets and the last blocks of ViTs of 12 blocks, under the names
    of timm. It belongs to a model: others need a list of their own. Where nothing matches, all layers adapt; in a
    ViT of 24 blocks the published list would take out the middle.
    """

    skip: tuple[str, ...] = ("*layer4*", "*blocks.9*", "*blocks.10*", "*blocks.11*", "*norm.*", "norm")

    def keys(self, source: Source) -> tuple[str, ...]:
        keys = super().keys(source)
        kept = tuple(key for key in keys if not any(fnmatchcase(_layer(key), one) for one in self.skip))
        if not kept:
            raise ValueError(
                f"{self.name} has nothing to adapt: every norm layer of this model, such as {_layer(keys[0])}, "
                f"is skipped by one of {', '.join(self.skip)}; set skip to patterns for this model"
            )
        return kept


def _layer(key: str) -> str:
    return key.rpartition(".")[0]
