"""Independent re-tellings of every policy: slow, one plain torch model per stream, straight from the equations.

Nothing here is shared with ``adapters`` or ``tta_server``: each stream deep-copies the original network, its
batch-norm layers are swapped for plain ones below, and ``torch.autograd`` and ``torch.optim`` do the rest. To cover a
new policy, write a subclass of :class:`Oracle` and enter it in :data:`ORACLES` under the policy's name.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
    """One stream under one policy. ``settings`` is the policy; only its fields are read."""

    def __init__(self, original: nn.Module, settings: Any, share: float = 0.0, running: bool = False) -> None:
        self.settings = settings
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
    def step(self, x: Tensor) -> Tensor:
        """Answers one request of the stream and adapts: the logits ``[N, C]``."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """What the stream's state must hold now, by the keys of ``tests.adapters.networks.flat``, without ``S``."""


class SourceOracle(Oracle):
    """The network as it was trained."""

    def __init__(self, original: nn.Module, settings: Any) -> None:
        super().__init__(original, settings)
        self.original = original

    def step(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.as_tensor(self.original.eval()(x))

    def state(self) -> dict[str, Tensor]:
        return {}


class NormOracle(Oracle):
    """``batch``: statistics of the request; ``blend``: mixed with the source's; ``running``: a moving average."""

    def __init__(self, original: nn.Module, settings: Any) -> None:
        share = 1.0 if settings.mode == "batch" else settings.alpha
        super().__init__(original, settings, share, settings.mode == "running")

    def step(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.as_tensor(self.network(x))

    def state(self) -> dict[str, Tensor]:
        if self.settings.mode != "running":
            return {}
        layers = {path: layer for path, layer in self.norms.items() if isinstance(layer, PlainBatchNorm)}
        return {f"weights/{path}.running_mean": layer.own_mean for path, layer in layers.items()} | {
            f"weights/{path}.running_var": layer.own_var for path, layer in layers.items()
        }


class TentOracle(Oracle):
    """Answer with batch statistics, then one step of ``torch.optim`` on the mean entropy, for gamma and beta only."""

    def __init__(self, original: nn.Module, settings: Any) -> None:
        super().__init__(original, settings, share=1.0)
        self.network.requires_grad_(False)
        self.theta: dict[str, Tensor] = {}
        for path, layer in self.norms.items():
            for name, parameter in layer.named_parameters():
                self.theta[f"{path}.{name}"] = parameter.requires_grad_()
        values = list(self.theta.values())
        self.optimiser: torch.optim.Optimizer = (
            torch.optim.Adam(values, lr=settings.lr)
            if settings.optimiser == "adam"
            else torch.optim.SGD(values, lr=settings.lr, momentum=settings.momentum)
        )

    def step(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(x)
        p = logits.softmax(1)
        entropy = -(p * p.log()).sum(1).mean()
        self.optimiser.zero_grad()
        entropy.backward()
        self.optimiser.step()
        return logits.detach()

    def state(self) -> dict[str, Tensor]:
        state = {f"weights/{key}": value.detach() for key, value in self.theta.items()}
        for key, value in self.theta.items():
            own = self.optimiser.state[value]
            if self.settings.optimiser == "adam":
                state[f"memory/adam.m.{key}"], state[f"memory/adam.v.{key}"] = own["exp_avg"], own["exp_avg_sq"]
                state["memory/adam.step"] = own["step"].long()
            elif self.settings.momentum:
                state[f"memory/sgd.m.{key}"] = own["momentum_buffer"]
        return state


ORACLES: dict[str, type[Oracle]] = {"source": SourceOracle, "norm": NormOracle, "tent": TentOracle}
"""By policy name."""
