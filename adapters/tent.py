"""``tent``: entropy minimisation on the norm layers' scale and shift (Wang et al., ICLR 2021, arXiv 2006.10726).

Per request of a stream: normalise with the request's own batch statistics, answer, then one gradient step on the mean
entropy of the answer (section 3.1 of the paper),

    L(theta) = (1/N) sum_i H(softmax(z_i)),      H(p) = -sum_c p_c ln p_c,      theta = {gamma, beta}.

The answer is the one computed before the step.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from adapters import gradient, losses, optim
from adapters.base import BATCH_NORM, Batch, Norm, Policy, Scope, Source, State, Step, register


@register
@dataclass(frozen=True)
class Tent(Policy):
    """Minimises the entropy of the stream's predictions.

    ``optimiser``: ``adam`` (the authors' CIFAR-10-C setting, ``lr`` 1e-3) or ``sgd`` with ``momentum`` (their
    ImageNet-C setting: ``lr`` 2.5e-4, momentum 0.9). ``lr``: learning rate per request. ``momentum``: used by ``sgd``
    only.
    """

    name = "tent"
    scope = Scope.NORM

    optimiser: Literal["adam", "sgd"] = "adam"
    lr: float = 1e-3
    momentum: float = 0.9

    def __post_init__(self) -> None:
        if not 0.0 <= self.lr < math.inf:
            raise ValueError(f"lr must be finite and must not be negative, got {self.lr}")
        if not 0.0 <= self.momentum < 1.0:
            raise ValueError(f"momentum must lie in [0, 1), got {self.momentum}")

    @property
    def norm(self) -> Norm:
        return BATCH_NORM

    @property
    def _optimiser(self) -> optim.Optimiser:
        return optim.Adam(self.lr) if self.optimiser == "adam" else optim.Sgd(self.lr, self.momentum)

    def init(self, source: Source) -> State:
        if not source.affine:
            raise ValueError("tent adapts the scale and shift of norm layers, and this model has none")
        weights = source.stacked(source.affine)
        return State(weights, self._optimiser.init(weights))

    def step(self, source: Source, state: State, batch: Batch) -> Generator[Tensor, None, Step]:
        weights = gradient.leaves(state.weights)
        logits = batch.forward(weights, batch.x).logits
        yield logits.detach()
        entropy = batch.segments.mean(losses.entropy(logits))
        gradients = gradient.per_stream(entropy, weights)
        return Step(State(*self._optimiser.update(state.weights, gradients, state.memory)), {"loss": entropy.detach()})
