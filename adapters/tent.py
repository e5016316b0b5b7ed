"""``tent``: entropy minimisation on the norm layers' scale and shift (Wang et al., ICLR 2021, arXiv 2006.10726).

Per request of a stream: normalise with the request's own batch statistics, answer, then one gradient step on the mean
entropy of the answer (section 3.1 of the paper),

    L(theta) = (1/N) sum_i H(softmax(z_i)),      H(p) = -sum_c p_c ln p_c,      theta = {gamma, beta}.

The answer is the one computed before the step.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

from torch import Tensor

from adapters import gradient, losses
from adapters.base import Batch, Source, State, Step, register
from adapters.entropy import EntropyPolicy


@register
@dataclass(frozen=True)
class Tent(EntropyPolicy):
    """Minimises the entropy of the stream's predictions."""

    name = "tent"

    def step(self, source: Source, state: State, batch: Batch) -> Generator[Tensor, None, Step]:
        weights = gradient.leaves(state.weights)
        logits = batch.forward(weights, batch.x).logits
        yield logits.detach()
        kept, crowd = self.crowd(source, batch, logits)
        loss = losses.mean_of_chosen(losses.entropy(logits), kept, batch.segments) + crowd
        gradients = gradient.per_stream(loss, weights)
        active = self.counts(batch.segments.sum(kept.to(loss.dtype)))
        return Step(
            State(*self.descent.update(state.weights, gradients, state.memory, active)), {"loss": loss.detach()}
        )
