"""The oracle of ``lame``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from adapters.rng import Random
from tests.adapters.oracles.base import Oracle


class LameOracle(Oracle):
    """Affinities pair by pair, and the energy as it is written down: unary part, pairwise part, entropy."""

    share = 0.0

    def __init__(self, original: nn.Module, settings: Any, artefacts: Mapping[str, Tensor]) -> None:
        super().__init__(original, settings, artefacts)
        assert isinstance(original, nn.Sequential)
        self.body, self.head = original[:-1].eval(), original[-1].eval()

    def step(self, x: Tensor, random: Random) -> Tensor:
        with torch.no_grad():
            features: Tensor = self.body(x)
            q = self.head(features).softmax(1)
        if len(x) == 1:
            return torch.as_tensor(q.log())
        unit = torch.stack([row / row.norm() for row in features])
        distance = torch.stack([torch.stack([((a - b) ** 2).sum().sqrt() for b in unit]) for a in unit])
        w = getattr(self, self.settings.affinity)(unit, distance)
        if w is None:
            return torch.as_tensor(q.log())
        if self.settings.force_symmetry:
            w = (w + w.T) / 2
        return self.iterate(q, self.settings.weight * w).log()

    def rbf(self, unit: Tensor, distance: Tensor) -> Tensor | None:
        rank = min(self.settings.neighbours, len(unit))
        sigma = sum(sorted(row.tolist())[rank - 1] for row in distance) / len(unit)
        return None if sigma < 1e-12 else torch.exp(-(distance**2) / (2 * sigma**2))

    def knn(self, unit: Tensor, distance: Tensor) -> Tensor:
        w = torch.zeros_like(distance)
        for i, row in enumerate(distance.tolist()):
            others = sorted((d, j) for j, d in enumerate(row) if j != i)
            for _, j in others[: min(self.settings.neighbours, len(unit) - 1)]:
                w[i, j] = 1
        return w

    def linear(self, unit: Tensor, distance: Tensor) -> Tensor:
        return torch.stack([torch.stack([a @ b for b in unit]) for a in unit])

    def iterate(self, q: Tensor, w: Tensor) -> Tensor:
        u = -(q + 1e-10).log()
        y = (-u).softmax(1)
        energies: list[float] = []
        while len(energies) < self.settings.steps:
            pull = w @ y
            y = (pull - u).softmax(1)
            energies.append(float((u * y - pull * y + y * y.log()).sum()))
            if len(energies) >= 3 and abs(energies[-1] - energies[-2]) <= 1e-8 * abs(energies[-2]):
                break
        return y

    def state(self) -> dict[str, Tensor]:
        return {}


ORACLES = {"lame": LameOracle}
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "lame": {
        "rbf": {},
        "knn": {"affinity": "knn", "neighbours": 2, "weight": 0.5, "force_symmetry": True},
        "linear": {"affinity": "linear", "weight": 2.0, "steps": 4},
    }
}
