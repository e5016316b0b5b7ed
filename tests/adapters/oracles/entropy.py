"""The oracles of the entropy policies ``tent``, ``eta`` and ``eata``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from adapters.rng import Random
from tests.adapters.oracles.base import Oracle


class EntropyOracle(Oracle):
    """Gamma and beta as ``torch.optim`` parameters, and OSTTA's filter on a second, frozen copy of the network."""

    def __init__(self, original: nn.Module, settings: Any, artefacts: Mapping[str, Tensor]) -> None:
        super().__init__(original, settings, artefacts)
        self.network.requires_grad_(False)
        self.theta: dict[str, Tensor] = {}
        for path, layer in self.norms.items():
            for name, parameter in layer.named_parameters():
                self.theta[f"{path}.{name}"] = parameter.requires_grad_()
        self.start = {key: value.detach().clone() for key, value in self.theta.items()}
        values = list(self.theta.values())
        self.optimiser: torch.optim.Optimizer = (
            torch.optim.Adam(values, lr=settings.lr)
            if settings.optimiser == "adam"
            else torch.optim.SGD(values, lr=settings.lr, momentum=settings.momentum, nesterov=settings.nesterov)
        )
        self.frozen = Copy(original, settings, artefacts).network.requires_grad_(False)

    def believed(self, x: Tensor, logits: Tensor) -> Tensor:
        """OSTTA: whether each row is believed in at least as much as by the source."""
        source = self.frozen(x).softmax(1)
        classes = source.argmax(1)
        return torch.stack([p[c] >= q[c] for p, q, c in zip(logits.softmax(1), source, classes, strict=True)])

    def marginal(self, logits: Tensor) -> Tensor:
        p: Tensor = logits.softmax(1).mean(0)
        entropy: Tensor = -(p * p.log()).sum()
        return -float(self.settings.ostta) * entropy

    def descend(self, loss: Tensor) -> None:
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()

    def state(self) -> dict[str, Tensor]:
        state = {f"weights/{key}": value.detach() for key, value in self.theta.items()}
        for key, value in self.theta.items():
            own = self.optimiser.state[value]
            zero = torch.zeros_like(value)
            if self.settings.optimiser == "adam":
                state[f"memory/adam.m.{key}"] = own.get("exp_avg", zero)
                state[f"memory/adam.v.{key}"] = own.get("exp_avg_sq", zero)
                state["memory/adam.step"] = torch.as_tensor(own.get("step", 0)).long()
            elif self.settings.momentum:
                state[f"memory/sgd.m.{key}"] = own.get("momentum_buffer", zero)
        return state


class Copy(Oracle):
    """The source network, normalising by the batch."""

    def step(self, x: Tensor, random: Random) -> Tensor:
        raise NotImplementedError

    def state(self) -> dict[str, Tensor]:
        return {}


def entropies(logits: Tensor) -> Tensor:
    p = logits.softmax(1)
    return -(p * p.log()).sum(1)


class TentOracle(EntropyOracle):
    """Answer with batch statistics, then one step of ``torch.optim`` on the mean entropy, for gamma and beta only."""

    def step(self, x: Tensor, random: Random) -> Tensor:
        logits: Tensor = self.network(x)
        entropy = entropies(logits)
        if self.settings.ostta is None:
            self.descend(entropy.mean())
            return logits.detach()
        kept = self.believed(x, logits)
        loss = self.marginal(logits) if self.settings.ostta else torch.tensor(0.0)
        if kept.any():
            loss = loss + entropy[kept].mean()
        if kept.any() or self.settings.ostta:
            self.descend(loss)
        return logits.detach()


class EataOracle(EntropyOracle):
    """Only rows that are certain and unlike the average so far; the sure ones count more; Fisher pulls back."""

    def __init__(self, original: nn.Module, settings: Any, artefacts: Mapping[str, Tensor]) -> None:
        super().__init__(original, settings, artefacts)
        self.mean: Tensor | None = None
        self.classes = [one for one in original.modules() if isinstance(one, nn.Linear)][-1].out_features

    def step(self, x: Tensor, random: Random) -> Tensor:
        logits: Tensor = self.network(x)
        limit = self.settings.entropy_margin * math.log(self.classes)
        chosen = []
        believed = self.believed(x, logits) if self.settings.ostta is not None else None
        for index, row in enumerate(logits.detach()):
            p = row.softmax(0)
            sure = -(p * p.log()).sum() < limit
            new = self.mean is None or abs(float(self.mean @ p / self.mean.norm() / p.norm())) < (
                self.settings.cosine_margin
            )
            if sure and new and (believed is None or believed[index]):
                chosen.append(index)
        if not chosen and not self.settings.ostta:
            return logits.detach()
        loss = self.marginal(logits) if self.settings.ostta else torch.tensor(0.0)
        if chosen:
            entropy = entropies(logits[chosen])
            loss = loss + (torch.exp(limit - entropy.detach()) * entropy).sum() / len(chosen)
        for key, value in self.theta.items():
            omega = self.artefacts.get(f"fisher/{key}")
            if hasattr(self.settings, "fisher_weight") and omega is not None:
                loss = loss + self.settings.fisher_weight * (omega * (value - self.start[key]) ** 2).sum()
        self.descend(loss)
        if chosen:
            accepted = logits.detach()[chosen].softmax(1).mean(0)
            self.mean = accepted if self.mean is None else 0.9 * self.mean + 0.1 * accepted
        return logits.detach()

    def state(self) -> dict[str, Tensor]:
        mean = torch.zeros(self.classes, dtype=torch.float64) if self.mean is None else self.mean
        return super().state() | {"memory/eata.mean": mean}


ORACLES = {"tent": TentOracle, "eta": EataOracle, "eata": EataOracle}
# Learning rates far above the defaults: a step must move the answers by much more than rounding does.
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "tent": {
        "adam": {"optimiser": "adam", "lr": 0.02},
        "momentum": {"optimiser": "sgd", "lr": 0.1, "momentum": 0.9},
        "sgd": {"optimiser": "sgd", "lr": 0.2, "momentum": 0.0},
        "ostta": {"optimiser": "sgd", "lr": 0.1, "nesterov": True, "ostta": 0.5},
        "window": {"optimiser": "sgd", "lr": 0.1, "window": 4},
        "reset": {"optimiser": "adam", "lr": 0.02, "reset_after": 9},
    },
    "eta": {
        "sgd": {"optimiser": "sgd", "lr": 0.1, "entropy_margin": 0.8, "cosine_margin": 0.9},
        "ostta": {"optimiser": "adam", "lr": 0.02, "entropy_margin": 0.9, "cosine_margin": 0.9, "ostta": 0.0},
        "window": {"lr": 0.02, "entropy_margin": 0.9, "window": 3, "window_images": "none", "reset_after": 20},
    },
    "eata": {
        "adam": {"optimiser": "adam", "lr": 0.02, "entropy_margin": 0.8, "cosine_margin": 0.9},
        "sgd": {"optimiser": "sgd", "lr": 0.05, "entropy_margin": 0.9, "cosine_margin": 0.8, "fisher_weight": 3.0},
    },
}
