"""``source``: the model as it was trained, without adaptation. The baseline every other policy is measured against."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

from torch import Tensor

from adapters.base import SOURCE_NORM, Batch, Norm, Policy, Scope, Source, State, Step, register


@register
@dataclass(frozen=True)
class SourcePolicy(Policy):
    """Serves the source model. Keeps no state, adapts nothing."""

    name = "source"
    plain = True
    scope = Scope.NONE

    @property
    def norm(self) -> Norm:
        return SOURCE_NORM

    def init(self, source: Source) -> State:
        return State({}, {})

    def step(self, source: Source, state: State, batch: Batch) -> Generator[Tensor, None, Step]:
        yield batch.forward({}, batch.x).logits
        return Step(state)
