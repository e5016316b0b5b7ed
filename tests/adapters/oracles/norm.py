"""The oracle of ``norm``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from adapters.rng import Random
from tests.adapters.oracles.base import Oracle, PlainBatchNorm


class NormOracle(Oracle):
    """``batch``: statistics of the request; ``blend``: mixed with the source's; ``running``: a moving average."""

    def __init__(self, original: nn.Module, settings: Any, artefacts: Mapping[str, Tensor]) -> None:
        super().__init__(original, settings, artefacts, running=settings.mode == "running")
        if settings.mode != "batch":
            for layer in self.batch_norms().values():
                layer.share = settings.alpha

    def step(self, x: Tensor, random: Random) -> Tensor:
        with torch.no_grad():
            return torch.as_tensor(self.network(x))

    def state(self) -> dict[str, Tensor]:
        if self.settings.mode != "running":
            return {}
        layers = self.batch_norms()
        return {f"weights/{path}.running_mean": layer.own_mean for path, layer in layers.items()} | {
            f"weights/{path}.running_var": layer.own_var for path, layer in layers.items()
        }

    def batch_norms(self) -> dict[str, PlainBatchNorm]:
        return {path: layer for path, layer in self.norms.items() if isinstance(layer, PlainBatchNorm)}


ORACLES = {"norm": NormOracle}
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "norm": {
        "batch": {"mode": "batch"},
        "blend": {"mode": "blend", "alpha": 0.3},
        "running": {"mode": "running", "alpha": 0.2},
        "standing": {"mode": "running", "alpha": 0.0},
    }
}
