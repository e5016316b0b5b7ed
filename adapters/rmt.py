"""``rmt``: Robust Mean Teacher (Doebler et al., CVPR 2023, arXiv 2211.13081).

A student learns all weights from a teacher that is its moving average; contrastive learning pulls its features towards
the source's class prototypes; replayed source images keep it from forgetting. Per request ``x`` of a stream, with
``f, z`` features and logits of the student on ``x``, ``f', z'`` on one augmentation of it, and ``t`` the teacher's
logits on ``x`` (section 3 of the paper):

    SCE(a, b) = (CE(b -> a) + CE(a -> b)) / 2
    L_st  = mean_i (SCE(z_i, t_i) + SCE(z'_i, t_i)) / 2                                  self-training
    L_con = mean over the 3n vectors v of  - 1/2 sum_{u with v} ln ( e^{v.u/T} / sum_{w != v} e^{v.w/T} )
    L_src = mean CE(label -> student(x_src))                                             replay
    L     = lambda_target L_st + lambda_contrast L_con + lambda_source L_src

The vectors of ``L_con`` are ``f_i``, ``f'_i`` and the source prototype nearest to ``f_i`` in angle, each through a
projector (two linear layers with a ReLU between) and scaled to length 1; "u with v" are the two others of the same row.
After the step on student and projector the teacher follows, ``theta' <- m theta' + (1 - m) theta``. The answer is
``z + t``, both from before the step. Every forward pass normalises by its own batch.

Streams start from a student and teacher that were warmed up together on source images (:func:`warm_up`). Replay draws
``n`` source images anew at each request, where the authors' code goes through shuffled ones in turn.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from adapters import contrast, gradient, losses, optim, teacher
from adapters.augment import augment, check
from adapters.base import Batch, Output, Scope, Source, State, Step, Tensors, register
from adapters.images import ImageStore
from adapters.teacher import TeacherPolicy


@register
@dataclass(frozen=True)
class Rmt(TeacherPolicy):
    """Student and mean teacher with source prototypes and source replay.

    ``temperature``: ``T``. ``projection``: width of the projector. ``lambda_target``, ``lambda_contrast``,
    ``lambda_source``: weights of the three losses, 1 as published; ``lambda_source`` 0 is the source-free variant,
    which needs no replay images. A loss of weight 0 is not computed, and without any nothing changes. ``warm_up``:
    start from the warmed-up weights, not from the source's.
    """

    name = "rmt"
    ranges = TeacherPolicy.ranges | {
        "temperature": "(0, inf)",
        "projection": "[1, 1024]",
        "lambda_target": "[0, inf)",
        "lambda_contrast": "[0, inf)",
        "lambda_source": "[0, inf)",
    }
    networks = 2

    temperature: float = 0.1
    projection: int = 128
    lambda_target: float = 1.0
    lambda_contrast: float = 1.0
    lambda_source: float = 1.0
    warm_up: bool = True

    @property
    def needs(self) -> frozenset[str]:
        wanted = {"prototypes": self.lambda_contrast > 0, "replay": self.lambda_source > 0, self.warmed: self.warm_up}
        return frozenset(group for group, needed in wanted.items() if needed)

    @property
    def warmed(self) -> str:
        """The group of artefacts with the state that :func:`warm_up` made for this scope."""
        return "warmup" if self.scope == Scope.ALL else "warmup_norm"

    def init(self, source: Source) -> State:
        check(source)
        state = self.cold_start(source)
        if self.warm_up:
            warm = source.artefact(self.warmed)
            if warm.keys() != as_artefact(state).keys():
                raise ValueError(
                    f"the warm-up was made with another optimiser than {self.optimiser} (momentum {self.momentum}); "
                    f"run: tta-server prepare CONFIG --data DIR --only {self.warmed} --force"
                )
            state = State(
                {key: warm[f"weights.{key}"].clone() for key in state.weights},
                {key: warm[f"memory.{key}"].clone() for key in state.memory},
            )
        if not self.lambda_contrast:
            return state
        projector = contrast.new_projector(source, self.projection)
        return State(state.weights, state.memory | projector | self._projector_descent.init(projector))

    def cold_start(self, source: Source) -> State:
        """Student and teacher as the source, and an optimiser that has not taken a step; without the projector."""
        return super().init(source)

    def step(self, source: Source, state: State, batch: Batch) -> Generator[Tensor, None, Step]:
        student = gradient.leaves(state.weights)
        output = batch.forward(student, batch.x)
        with torch.no_grad():
            target = batch.forward(teacher.weights(state.memory), batch.x).logits
        yield output.logits.detach() + target

        projector = gradient.leaves(contrast.projector(state.memory))
        terms = self._losses(source, student, projector, output, target, batch)
        if not terms:
            return Step(state)
        loss = torch.stack(list(terms.values())).sum(0)
        gradients = gradient.per_stream(loss, student | projector)
        weights, memory = self.descent.update(student, gradients, state.memory)
        memory |= teacher.follow(state.memory, weights, self.teacher_momentum)
        if projector:
            moved, moments = self._projector_descent.update(projector, gradients, state.memory)
            memory |= moved | moments
        signals = {"loss": loss} | terms
        return Step(State(weights, memory), {name: value.detach() for name, value in signals.items()})

    def _losses(
        self, source: Source, student: Tensors, projector: Tensors, output: Output, target: Tensor, batch: Batch
    ) -> Tensors:
        """The weighted parts of ``L``, ``[S]`` each; those of weight 0 are missing."""
        terms: Tensors = {}
        if self.lambda_target or self.lambda_contrast:
            view = augment(batch.x, batch.segments, source, batch.random.named("augment"))
            changed = batch.forward(student, view)
        if self.lambda_target:
            agreement = losses.symmetric_cross_entropy(output.logits, target)
            agreement = (agreement + losses.symmetric_cross_entropy(changed.logits, target)) / 2
            terms["self_training"] = self.lambda_target * batch.segments.mean(agreement)
        if self.lambda_contrast:
            nearest = contrast.nearest_prototypes(source, output.features)
            views = torch.stack([nearest, output.features, changed.features])
            terms["contrast"] = self.lambda_contrast * contrast.loss(views, projector, batch.segments, self.temperature)
        if self.lambda_source:
            terms["replay"] = self.lambda_source * _replay(source, student, batch)
        return terms

    def answer(self, state: State, batch: Batch) -> Tensor:
        student = batch.forward(state.weights, batch.x).logits
        return student + batch.forward(teacher.weights(state.memory), batch.x).logits

    @property
    def _projector_descent(self) -> optim.Optimiser:
        """As of the student, with a step counter of its own: the projector has no part in the warm-up."""
        return optim.Adam(self.lr, counter="adam.step.projector") if self.optimiser == "adam" else self.descent


def _replay(source: Source, student: Tensors, batch: Batch) -> Tensor:
    """``L_src``: as many source images as the stream sent, without repeats as long as there are enough."""
    stored = source.artefact("replay")
    count = len(stored["labels"])
    shuffled = batch.random.named("replay").uniform((count,)).argsort(dim=1, stable=True)
    chosen = torch.cat([shuffled[s, torch.arange(n) % count] for s, n in enumerate(batch.segments.sizes)])
    x = ImageStore(source).unpack(stored["images"][chosen])
    logits = batch.forward(student, x).logits
    return batch.segments.mean(F.cross_entropy(logits, stored["labels"][chosen], reduction="none"))


def as_artefact(state: State) -> Tensors:
    """A state as the warm-up is stored, under ``weights.<key>`` and ``memory.<key>``."""
    halves = {"weights": state.weights, "memory": state.memory}
    return {f"{half}.{key}": value for half, tensors in halves.items() for key, value in tensors.items()}


def warm_up(policy: Rmt, state: State, batch: Batch, progress: float) -> State:
    """One step of the warm-up on source images, without labels: ``L = mean SCE(student(x), teacher(x))``.

    ``progress``, in (0, 1], scales the learning rate. The optimiser's moments are kept for the streams.
    """
    student = gradient.leaves(state.weights)
    logits = batch.forward(student, batch.x).logits
    with torch.no_grad():
        target = batch.forward(teacher.weights(state.memory), batch.x).logits
    loss = batch.segments.mean(losses.symmetric_cross_entropy(logits, target))
    descent = replace(policy, lr=policy.lr * progress).descent
    weights, memory = descent.update(student, gradient.per_stream(loss, student), state.memory)
    return State(weights, memory | teacher.follow(state.memory, weights, policy.teacher_momentum))
