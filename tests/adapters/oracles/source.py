"""The oracle of ``source``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from adapters.rng import Random
from tests.adapters.oracles.base import Oracle


class SourceOracle(Oracle):
    """The network as it was trained."""

    share = 0.0

    def __init__(self, original: nn.Module, settings: Any, artefacts: Mapping[str, Tensor]) -> None:
        super().__init__(original, settings, artefacts)
        self.original = original

    def step(self, x: Tensor, random: Random) -> Tensor:
        with torch.no_grad():
            return torch.as_tensor(self.original.eval()(x))

    def state(self) -> dict[str, Tensor]:
        return {}


ORACLES = {"source": SourceOracle}
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {"source": {"defaults": {}}}
