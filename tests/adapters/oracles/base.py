"""What the oracles build on: a copy of the network for each stream, with plain batch-norm layers."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from adapters.rng import Random

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm, nn.GroupNorm)


class PlainBatchNorm(nn.Module):
    """Batch norm of one stream: ``(1 - share) * own + share * batch``, the whole input belonging to the stream.

    ``pure`` takes the biased variance of the batch, as ``F.batch_norm`` does in training; a mixture the unbiased one.
    With ``running`` the mixed statistics become the layer's own, before they are used. A batch with a single value per
    channel has no variance: the layer's own statistics serve, unchanged.
    """

    def __init__(self, original: nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d, share: float, running: bool) -> None:
        super().__init__()
        assert original.running_mean is not None
        assert original.running_var is not None
        self.weight, self.bias = original.weight, original.bias
        self.own_mean, self.own_var = original.running_mean.clone(), original.running_var.clone()
        self.eps, self.share, self.running = original.eps, share, running

    def forward(self, x: Tensor) -> Tensor:
        single = x.numel() == x.shape[1]
        if self.share == 1 and not self.running and not single:
            return F.batch_norm(x, None, None, self.weight, self.bias, training=True, eps=self.eps)
        mean, var = self.own_mean, self.own_var
        if not single:
            by_channel = x.transpose(0, 1).flatten(1)
            mean = mean + self.share * (by_channel.mean(1) - mean)
            var = var + self.share * (by_channel.var(1, correction=1) - var)
        if self.running:
            self.own_mean, self.own_var = mean, var
        shape = (1, -1, *[1] * (x.dim() - 2))
        normalised = (x - mean.view(shape)) / (var.view(shape) + self.eps).sqrt()
        return normalised * self.weight.view(shape) + self.bias.view(shape)


class Oracle(ABC):
    """One stream under one policy. ``settings`` is the policy; only its fields are read. ``artefacts`` are the
    source's, by ``group/name``."""

    share: ClassVar[float] = 1.0
    """Of the batch's statistics in normalising."""

    def __init__(
        self, original: nn.Module, settings: Any, artefacts: Mapping[str, Tensor], running: bool = False
    ) -> None:
        self.settings, self.artefacts = settings, artefacts
        share = self.share
        self.network = copy.deepcopy(original)
        self.norms: dict[str, nn.Module] = {}
        for path, module in list(self.network.named_modules()):
            if isinstance(module, NORMS):
                layer: nn.Module = module
                if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
                    layer = PlainBatchNorm(module, share, running)
                    parent, _, name = path.rpartition(".")
                    setattr(self.network.get_submodule(parent), name, layer)
                self.norms[path] = layer

    @abstractmethod
    def step(self, x: Tensor, random: Random) -> Tensor:
        """Answers one request of the stream and adapts: the logits ``[N, C]``. ``random`` has the stream's draws."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """What the stream's state must hold now, by the keys of ``tests.adapters.networks.flat``, without ``S``."""
