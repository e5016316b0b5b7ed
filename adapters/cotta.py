"""``cotta``: continual adaptation by an averaged teacher and random restoration (Wang et al., CVPR 2022, arXiv
2203.13591).

Per request ``x`` of a stream, with a student ``theta``, a teacher ``theta'`` and the source ``theta0`` as an anchor,
all normalising by the request's own batch (section 3 of the paper):

    z = student(x),      a = mean_i max_c softmax(anchor(x)_i)_c
    t = teacher(x) where a >= threshold, else 1/K sum_k teacher(Aug_k(x))      (logits; one transformation per k)
    L = 1/N sum_i CE(softmax(t_i) -> softmax(z_i))                             one step of the optimiser on theta
    theta' <- m theta' + (1 - m) theta
    theta  <- theta0 for each element with probability p

The answer is ``t``. The optimiser's moments and the teacher are not restored. Being sure or not is a property of the
whole request. Weights and moments are those of the whole network: with Adam a stream costs four copies of it, with sgd
and momentum three. At batch sizes of one or two the batch statistics are worth little, and so is the answer.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

from torch import Tensor

from adapters import gradient, teacher
from adapters.base import Batch, Source, State, Step, register


@register
@dataclass(frozen=True)
class Cotta(teacher.AnchoredTeacher):
    """Learns from a teacher that averages weights, and answers over augmentations where the source is unsure."""

    name = "cotta"
    presets = {"imagenet": teacher.ANCHORED_IMAGENET}

    def step(self, source: Source, state: State, batch: Batch) -> Generator[Tensor, None, Step]:
        answer, unsure = self.teach(source, state, batch)
        yield answer
        student = gradient.leaves(state.weights)
        loss = self.objective(answer, batch.forward(student, batch.x).logits, batch.segments)
        moved, memory = self.descent.update(state.weights, gradient.per_stream(loss, student), state.memory)
        memory |= teacher.follow(state.memory, moved, self.teacher_momentum)
        restored = self.restored(source, moved, batch)
        return Step(State(restored, memory), {"loss": loss.detach(), "augmented": unsure.to(loss.dtype)})
