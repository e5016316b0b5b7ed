"""What the policies with a mean teacher have in common (CoTTA, PETAL, RMT).

The student is adapted by an optimiser; the teacher is the exponential moving average of its weights, and its answers
are what the student learns from. Both start at the source:

    teacher <- m teacher + (1 - m) student

The student's weights are a state's ``weights``, the teacher's are in its ``memory`` under ``teacher.<key>``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from adapters import losses, optim
from adapters.augment import STRONG, augment, check
from adapters.base import BATCH_NORM, Batch, Norm, Policy, Scope, Segments, Source, State, Tensors

SETTINGS = {"lr": "[0, inf)", "momentum": "[0, 1)", "teacher_momentum": "[0, 1]"}
IMAGENET = {"optimiser": "sgd", "lr": 0.01, "nesterov": True}
ANCHORED_IMAGENET = IMAGENET | {"threshold": 0.1, "loss": "symmetric", "restore": 0.001}
_PREFIX = "teacher."
_ROOM = 2**17
"""Values of a stream's inputs up to which several of its augmented views are made at once: larger ones gain nothing."""


def start(weights: Mapping[str, Tensor]) -> Tensors:
    """The memory of a teacher with these weights, ``[S, ...]`` each."""
    return {f"{_PREFIX}{key}": value for key, value in weights.items()}


def weights(memory: Mapping[str, Tensor]) -> Tensors:
    """The teacher's weights in a ``State.memory``, by the keys of the source, ``[S, ...]`` each."""
    return {key.removeprefix(_PREFIX): value for key, value in memory.items() if key.startswith(_PREFIX)}


def follow(
    memory: Mapping[str, Tensor], student: Mapping[str, Tensor], momentum: float, active: Tensor | None = None
) -> Tensors:
    """The teacher's new memory, ``m teacher + (1 - m) student``, for every stream or only where ``active [S]`` (bool).

    Exactly what it was for ``m = 1``, and exactly the student for ``m = 0``.
    """
    old = [memory[f"{_PREFIX}{key}"] for key in student]
    new = torch._foreach_lerp(old, list(student.values()), 1 - momentum)
    if active is not None:
        masks = (active.view(-1, *[1] * (one.dim() - 1)) for one in old)
        new = tuple(torch.where(*values) for values in zip(masks, new, old, strict=True))
    return start(dict(zip(student, new, strict=True)))


@dataclass(frozen=True)
class TeacherPolicy(Policy):
    """Settings of all policies with a teacher.

    ``scope``: ``all`` adapts every floating-point parameter of the network, ``norm`` the scales and shifts of its norm
    layers alone, which leaves little of a stream's cost in memory and is not as published. The authors' loops take
    tensors by the names ``weight`` and ``bias``, and so miss some of ``all`` in transformers (class tokens, position
    embeddings, joint projections, layer scales); here these are adapted, averaged and restored like all others.

    ``optimiser``: ``adam`` (published for CIFAR, ``lr`` 1e-3) or ``sgd`` with ``momentum`` (published for ImageNet:
    ``lr`` 0.01, momentum 0.9, ``nesterov``). ``lr``: learning rate per request. ``teacher_momentum``: ``m``.
    """

    ranges = SETTINGS
    presets = {"imagenet": IMAGENET}

    scope: Scope = Scope.ALL
    optimiser: Literal["adam", "sgd"] = "adam"
    lr: float = 1e-3
    momentum: float = 0.9
    nesterov: bool = False
    teacher_momentum: float = 0.999

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scope is Scope.NONE:
            raise ValueError("scope must be norm or all: there is nothing to adapt in none")

    @property
    def norm(self) -> Norm:
        return BATCH_NORM

    def keys(self, source: Source) -> tuple[str, ...]:
        """What it adapts of this source. Raises ``ValueError`` when there is nothing."""
        keys = source.affine if self.scope is Scope.NORM else source.parameters
        if not keys:
            raise ValueError(f"{self.name} has nothing to adapt in this model with scope {self.scope}")
        return keys

    def init(self, source: Source) -> State:
        student = source.stacked(self.keys(source))
        return State(student, self.descent.init(student) | start(student))

    @property
    def descent(self) -> optim.Optimiser:
        """The optimiser of the settings."""
        if self.optimiser == "adam":
            return optim.Adam(self.lr)
        return optim.Sgd(self.lr, self.momentum, self.nesterov)


@dataclass(frozen=True)
class AnchoredTeacher(TeacherPolicy):
    """Settings of CoTTA and PETAL, over those of every teacher.

    ``threshold``: the teacher's answer is averaged over augmentations when the source's mean confidence in a request is
    lower; 0.92 is for CIFAR-10, 0.72 for CIFAR-100, 0.1 for ImageNet. 0: never, above 1: always, and neither asks the
    source. ``augmentations``: how many, each a forward pass; with the authors' 32 an unsure request waits about 16
    times as long for its answer as a sure one, and 1 is reported to do nearly as well.

    ``loss``: ``paper``, the cross entropy of the student to the teacher, or ``symmetric``, both directions, as in the
    authors' ImageNet code. ``restore``: the share of the student's weights that is put back to the source's after a
    step, drawn at random; 0.01 is published for CIFAR, 0.001 in the ImageNet code.
    """

    ranges = SETTINGS | {"augmentations": "[1, 64]", "threshold": "[0, inf)", "restore": "[0, 1]"}

    augmentations: int = 32
    threshold: float = 0.92
    loss: Literal["paper", "symmetric"] = "paper"
    restore: float = 0.01

    def init(self, source: Source) -> State:
        if self.threshold > 0:
            check(source)
        return super().init(source)

    def answer(self, state: State, batch: Batch) -> Tensor:
        return batch.forward(weights(state.memory), batch.x).logits

    def teach(self, source: Source, state: State, batch: Batch) -> tuple[Tensor, Tensor]:
        """The teacher's logits ``t [N, C]``, without gradient, and which streams are unsure, ``[S]`` (bool).

        ``t_i = teacher(x)_i`` where the stream is sure, else ``1/K sum_k teacher(Aug_k(x))_i``.
        """
        teacher, x, segments = weights(state.memory), batch.x, batch.segments
        with torch.no_grad():
            unsure = self._unsure(batch)
            chosen = segments.spread(unsure)
            augmented, of_augmented = segments.select(chosen)
            plain, of_plain = segments.select(~chosen)
            logits = x.new_empty(len(x), source.num_classes)
            if of_plain.rows:
                logits[plain] = batch.forward(teacher, x[plain], of_plain).logits
            if of_augmented.rows:
                logits[augmented] = self._average(source, teacher, batch, x[augmented], of_augmented)
        return logits, unsure

    def _average(self, source: Source, teacher: Tensors, batch: Batch, x: Tensor, segments: Segments) -> Tensor:
        """``1/K sum_k teacher(Aug_k(x))_i`` for the rows ``x [N, ...]``; several views to a pass where they are small,
        each a segment of its own, so that it is normalised by itself."""
        room = _ROOM // (max(segments.sizes) * math.prod(source.input_shape))
        every = [f"augment {k}" for k in range(self.augmentations)]
        total = x.new_zeros(len(x), source.num_classes)
        for first in range(0, len(every), max(1, room)):
            names = every[first : first + max(1, room)]
            views = Segments([size for size in segments.sizes for _ in names], x.device)
            rows = torch.cat([part.repeat(len(names), 1, 1, 1) for part in x.split(segments.sizes)])
            seen = augment(rows, views, source, batch.random.named_each(names), STRONG)
            parts = batch.forward(teacher, seen, views).logits.split(views.sizes)
            for k in range(len(names)):  # in this order, so that it does not matter how many fit into a pass
                total += torch.cat(parts[k :: len(names)])
        return total / self.augmentations

    def _unsure(self, batch: Batch) -> Tensor:
        """Whether each stream's mean confidence under the source's weights is below the threshold, ``[S]``."""
        if self.threshold == 0 or self.threshold > 1:
            return torch.full((batch.segments.streams,), self.threshold > 1, device=batch.x.device)
        confidence = batch.forward({}, batch.x).logits.softmax(1).amax(1)
        return batch.segments.mean(confidence) < self.threshold

    def objective(self, teacher: Tensor, student: Tensor, segments: Segments) -> Tensor:
        """Each stream's loss ``[S]`` of the student's logits ``[N, C]``; no gradient goes to the teacher's."""
        distance = losses.symmetric_cross_entropy if self.loss == "symmetric" else losses.cross_entropy
        return segments.mean(distance(teacher, student))

    def restored(self, source: Source, student: Tensors, batch: Batch) -> Tensors:
        """The student's weights ``[S, ...]`` with a random share ``restore`` of them put back to the source's."""
        if not self.restore:
            return student
        # One draw for all tensors: many small ones would take longer than the rest of the step on a GPU.
        sizes = [value[0].numel() for value in student.values()]
        chosen = batch.random.named("restore").coins(self.restore, (sum(sizes),)).split(sizes, 1)
        return {
            key: torch.where(one.view_as(value), source.weights[key], value)
            for one, (key, value) in zip(chosen, student.items(), strict=True)
        }
