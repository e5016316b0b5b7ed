"""``norm``: batch-norm statistics from the stream's own data; no weight changes.

Three modes, all of the form ``(1 - w) * reference + w * batch`` per batch-norm layer and stream:

``batch``
    Statistics of the current request alone (``w = 1``); "prediction-time BN", Nado et al. 2020, arXiv 2006.10963;
    Schneider et al. 2020, arXiv 2006.16971, with N = 0. Keeps nothing.
``blend``
    Source statistics mixed with the request's, ``w = alpha``; alpha-BN, You et al. 2021, arXiv 2110.04065, whose own
    alpha is the weight of the source. Keeps nothing; sound for small requests.
``running``
    An exponential moving average over the stream's requests, ``mu <- (1 - alpha) mu + alpha mu_batch`` starting at the
    source, updated and used layer by layer in one pass. Keeps the means and variances.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from adapters.base import BATCH_NORM, Batch, Norm, Policy, Scope, Source, State, Step, register


@register
@dataclass(frozen=True)
class NormPolicy(Policy):
    """Re-estimates batch-norm statistics per stream.

    ``mode``: where the statistics come from, see the module. ``alpha``: weight of the current request's statistics
    in ``blend`` and ``running``, in [0, 1]; not used by ``batch``.
    """

    name = "norm"
    scope = Scope.NORM
    differentiates = False
    ranges = {"alpha": "[0, 1]"}

    mode: Literal["batch", "blend", "running"] = "batch"
    alpha: float = 0.1

    @property
    def norm(self) -> Norm:
        return BATCH_NORM if self.mode == "batch" else Norm(self.alpha, running=self.mode == "running")

    def init(self, source: Source) -> State:
        if not source.statistics:
            raise ValueError("norm re-estimates batch-norm statistics, and this model has no batch-norm layer with any")
        return State(source.stacked(source.statistics) if self.mode == "running" else {}, {})

    def step(self, source: Source, state: State, batch: Batch) -> Generator[Tensor, None, Step]:
        output = batch.forward(state.weights, batch.x)
        yield output.logits
        return Step(State(output.statistics, {}))
