"""The oracle of ``sar``, and the skip list that ``deyo`` shares with it."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from adapters.rng import Random
from tests.adapters.oracles.entropy import EntropyOracle, entropies


class SelectiveOracle(EntropyOracle):
    """Gamma and beta of the layers whose path matches none of ``settings.skip``."""

    def __init__(self, original: nn.Module, settings: Any, artefacts: Mapping[str, Tensor]) -> None:
        super().__init__(original, settings, artefacts)
        self.theta = {}
        for path, layer in self.norms.items():
            skipped = any(fnmatch.fnmatchcase(path, pattern) for pattern in settings.skip)
            for name, parameter in layer.named_parameters():
                parameter.requires_grad_(not skipped)
                if not skipped:
                    self.theta[f"{path}.{name}"] = parameter
        self.renew()

    def renew(self) -> None:
        """A new optimiser without memory."""
        values, settings = list(self.theta.values()), self.settings
        self.optimiser = (
            torch.optim.Adam(values, lr=settings.lr)
            if settings.optimiser == "adam"
            else torch.optim.SGD(values, lr=settings.lr, momentum=settings.momentum, nesterov=settings.nesterov)
        )

    def rows_that_may_count(self, x: Tensor, logits: Tensor) -> list[int]:
        """Entropy below the margin, and believed in where OSTTA's filter is on."""
        limit = self.settings.entropy_margin * math.log(logits.shape[1])
        believed = self.believed(x, logits) if self.settings.ostta is not None else [True] * len(x)
        return [i for i, h in enumerate(entropies(logits.detach())) if h < limit and believed[i]]


class SarOracle(SelectiveOracle):
    """Climb to the sharpest point near by, take the gradient there, step from where it stood; start over when sure."""

    expected: float | None = None
    """The moving average of the second loss."""

    def step(self, x: Tensor, random: Random) -> Tensor:
        logits: Tensor = self.network(x)
        limit = self.settings.entropy_margin * math.log(logits.shape[1])
        first = self.rows_that_may_count(x, logits)
        if not first and not self.settings.ostta:
            return logits.detach()
        values = list(self.theta.values())
        slopes = torch.autograd.grad(self.loss(logits, first), values)
        steepness = math.sqrt(sum(float((slope**2).sum()) for slope in slopes))
        before = [value.detach().clone() for value in values]
        with torch.no_grad():
            for value, slope in zip(values, slopes, strict=True):
                value += self.settings.rho * slope / (steepness + 1e-12)
        again: Tensor = self.network(x)
        second = [i for i in first if entropies(again)[i] < limit]
        slopes = torch.autograd.grad(self.loss(again, second), values) if second or self.settings.ostta else ()
        with torch.no_grad():
            for value, old in zip(values, before, strict=True):
                value.copy_(old)
        if slopes:
            for value, slope in zip(values, slopes, strict=True):
                value.grad = slope
            self.optimiser.step()
        if second:
            entropy = float(entropies(again.detach())[second].mean())
            self.expected = entropy if self.expected is None else 0.9 * self.expected + 0.1 * entropy
            least = self.settings.reset_below
            if least is None:
                least = 0.2 * math.log(logits.shape[1]) / math.log(1000)
            if self.expected < least:
                self.expected = None
                with torch.no_grad():
                    for key, value in self.theta.items():
                        value.copy_(self.start[key])
                self.renew()
        return logits.detach()

    def loss(self, logits: Tensor, rows: list[int]) -> Tensor:
        loss = self.marginal(logits) if self.settings.ostta else torch.zeros(())
        return loss + entropies(logits[rows]).mean() if rows else loss

    def state(self) -> dict[str, Tensor]:
        expected = -1.0 if self.expected is None else self.expected
        return super().state() | {"memory/sar.loss": torch.tensor(expected, dtype=torch.float64)}


ORACLES = {"sar": SarOracle}
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "sar": {
        "sgd": {"lr": 0.1, "rho": 0.5, "entropy_margin": 0.8},
        "resets": {"lr": 0.1, "rho": 0.2, "entropy_margin": 0.7, "reset_below": 0.75, "skip": ["4"]},
        "ostta": {"optimiser": "adam", "lr": 0.02, "rho": 0.3, "entropy_margin": 0.6, "ostta": 0.5, "skip": ["4*"]},
    },
}
