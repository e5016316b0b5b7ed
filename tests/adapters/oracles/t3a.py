"""The oracle of ``t3a``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from adapters.rng import Random
from tests.adapters.oracles.base import Oracle


class T3aOracle(Oracle):
    """A list of supports per class, each with its entropy and its age; the list is sorted and cut after each request.

    Supports are kept at unit length in half precision, as the policy's state has them.
    """

    share = 0.0

    def __init__(self, original: nn.Module, settings: Any, artefacts: Mapping[str, Tensor]) -> None:
        super().__init__(original, settings, artefacts)
        assert isinstance(original, nn.Sequential)
        assert isinstance(original[-1], nn.Linear)
        self.body, self.head = original[:-1].eval(), original[-1].eval()
        self.rows = self.head.weight.detach()
        self.supports: list[list[tuple[float, int, Tensor]]] = [[] for _ in self.rows]
        self.age = 0
        self.insert(self.rows)

    def insert(self, features: Tensor) -> None:
        with torch.no_grad():
            logits = self.head(features)
        for row, z in zip(features, logits, strict=True):
            p = z.softmax(0)
            support = (row / row.norm() if row.any() else row).half()
            self.supports[int(z.argmax())].append((float(torch.special.entr(p).sum()), self.age, support))
            self.age += 1
        for of_class in self.supports:
            of_class.sort(key=lambda one: one[:2])
            del of_class[self.settings.filter_k :]

    def step(self, x: Tensor, random: Random) -> Tensor:
        with torch.no_grad():
            features: Tensor = self.body(x)
        self.insert(features)
        columns = []
        for row, of_class in zip(self.rows, self.supports, strict=True):
            total = torch.zeros_like(row)
            for _, _, support in of_class:
                total += support
            columns.append(total / total.norm() if total.any() else row / row.norm())
        scale = sum(float(row.norm()) for row in self.rows) / len(self.rows)
        return scale * features @ torch.stack(columns, 1)

    def state(self) -> dict[str, Tensor]:
        slots = self.settings.filter_k
        supports = torch.zeros(len(self.rows), slots, self.rows.shape[1], dtype=torch.half)
        entropies = torch.full((len(self.rows), slots), torch.finfo(torch.float64).max, dtype=torch.float64)
        for c, of_class in enumerate(self.supports):
            for slot, (entropy, _, support) in enumerate(of_class):
                supports[c, slot], entropies[c, slot] = support, entropy
        return {"memory/t3a.supports": supports, "memory/t3a.entropies": entropies}


ORACLES = {"t3a": T3aOracle}
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {"t3a": {"few": {"filter_k": 2}, "many": {}}}
