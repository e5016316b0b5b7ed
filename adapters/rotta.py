"""``rotta``: a slow teacher and a memory of balanced classes, for correlated streams (Yuan et al., CVPR 2023, arXiv
2303.13899).

**It keeps images of the user**: up to ``capacity`` of a stream's inputs lie in its state, 8-bit, until others take
their place or the stream is reset or deleted, and so they are in every copy and export of the state. Choosing this
policy is opting in to that.

A teacher answers, normalising by its own running statistics, so a request may have any size. Each row is offered to the
memory in order, with the teacher's class ``y`` and uncertainty ``U = -sum_c p_c ln(p_c + 1e-6)``. Of its ``N`` places
each of ``C`` classes has a quota of ``N / C``, and the item of the highest score is the least worth (the paper's CSTU),

    S = lambda_t / (1 + exp(-age / N)) + lambda_u U / ln C.

While ``y`` is below its quota the row is taken in if there is room, else it competes with the highest ``S`` among the
classes of most items; at its quota, with the highest ``S`` of its own class (of equal ones, the later item's). It takes
the place only if that ``S`` is strictly higher than its own. Then every item's age grows by one.

After every ``update_every`` rows, even within a request, the student sees the ``n`` items augmented, by one draw for
all, and the teacher sees them as they are, each normalising by its own running statistics with these items in them,
``mu <- (1 - alpha) mu + alpha mu_items`` and so the (biased) variance (its robust batch normalisation). Then

    L = 1/n sum_j w_j CE(softmax(t_j) -> softmax(s_j)),   w_j = e^(-a_j) / (1 + e^(-a_j)),   a_j = age_j / N

gives the student's scales and shifts a step of Adam, and ``teacher <- (1 - nu) teacher + nu student``. A request is
answered by the teacher that it finds; that answer gives ``y`` and ``U`` of all its rows, too.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator
from dataclasses import dataclass

import torch
from torch import Tensor

from adapters import gradient, losses, optim
from adapters.augment import STRONG, augment, check
from adapters.base import SOURCE_NORM, Batch, Norm, Policy, Scope, Segments, Source, State, Step, Tensors, register
from adapters.cstu import Memory
from adapters.images import ImageStore

_IMAGES, _LABELS, _UNCERTAINTY, _AGE, _SEEN = (
    f"rotta.{name}" for name in ("images", "labels", "uncertainty", "age", "seen")
)


@register
@dataclass(frozen=True)
class Rotta(Policy):
    """Learns from up to ``capacity`` images of the user that it keeps, not from requests as they come.

    ``capacity``: ``N``, places in the memory. ``update_every``: rows between updates. ``lr``: Adam's learning rate per
    update. ``alpha``: weight of the memory in the running statistics. ``nu``: weight of the student in the teacher.
    ``lambda_t``, ``lambda_u``: weights of age and of uncertainty in ``S``.

    The defaults are the authors' for all data sets; on long ImageNet streams the method collapses with them. A class
    holds at most ``N / C`` items, rounded up: with many classes, or requests of few, updates see few images.
    """

    name = "rotta"
    scope = Scope.NORM
    ranges = {
        "capacity": "[1, 4096]",
        "update_every": "[1, inf)",
        "lr": "[0, inf)",
        "alpha": "[0, 1]",
        "nu": "[0, 1]",
        "lambda_t": "[0, inf)",
        "lambda_u": "[0, inf)",
    }

    capacity: int = 64
    update_every: int = 64
    lr: float = 1e-3
    alpha: float = 0.05
    nu: float = 1e-3
    lambda_t: float = 1.0
    lambda_u: float = 1.0

    @property
    def norm(self) -> Norm:
        return SOURCE_NORM

    def init(self, source: Source) -> State:
        check(source)
        if not source.affine:
            raise ValueError("rotta adapts the scale and shift of norm layers, and this model has none")
        keys, device = (*source.affine, *source.statistics), source.device
        student = {f"student.{key}": value for key, value in source.stacked(keys).items()}
        items = {
            _IMAGES: ImageStore(source).empty(self.capacity),
            _LABELS: torch.full((1, self.capacity), -1, device=device),  # -1: an empty place
            _UNCERTAINTY: torch.zeros(1, self.capacity, device=device),
            _AGE: torch.zeros(1, self.capacity, dtype=torch.int64, device=device),
            _SEEN: torch.zeros(1, dtype=torch.int64, device=device),
        }
        return State(source.stacked(keys), student | self.descent.init(source.stacked(source.affine)) | items)

    @property
    def descent(self) -> optim.Adam:
        return optim.Adam(self.lr)

    def step(self, source: Source, state: State, batch: Batch) -> Generator[Tensor, None, Step]:
        with torch.no_grad():
            logits = batch.forward(state.weights, batch.x).logits
        yield logits
        # In float64, then kept in float32: rounding that depends on the place in a batch leaves no trace.
        p = logits.double().softmax(1)
        uncertainty = -(p * (p + 1e-6).log()).sum(1).float()
        offers = list(zip(p.argmax(1).tolist(), uncertainty.tolist(), strict=True))
        kept = [state.memory[key].tolist() for key in (_LABELS, _UNCERTAINTY, _AGE)]
        rules = (self.capacity, source.num_classes, self.lambda_t, self.lambda_u)
        memories = [Memory(*rules, *one) for one in zip(*kept, strict=True)]
        store, images, seen = ImageStore(source), state.memory[_IMAGES].clone(), state.memory[_SEEN].tolist()
        packed = store.pack(batch.x)
        learned = state.weights | {key: v for key, v in state.memory.items() if not key.startswith("rotta.")}
        loss, updates = logits.new_zeros(len(seen)), logits.new_zeros(len(seen))
        ends = itertools.accumulate(batch.segments.sizes)
        left = [range(end - size, end) for end, size in zip(ends, batch.segments.sizes, strict=True)]
        turn = 0
        while any(left):
            due = []
            for stream, memory in enumerate(memories):
                rows = left[stream][: self.update_every - seen[stream] % self.update_every]
                left[stream] = left[stream][len(rows) :]
                placed = {place: row for row in rows if (place := memory.offer(*offers[row])) is not None}
                if placed:
                    images[stream, list(placed)] = packed[list(placed.values())]
                seen[stream] += len(rows)
                if rows and seen[stream] % self.update_every == 0:
                    due.append(stream)
            if due:
                # A stream's k-th update in a request is in the k-th turn in any company, so its draws are the same.
                items = [store.unpack(images[stream, memories[stream].places()]) for stream in due]
                segments = Segments([len(one) for one in items], batch.x.device)
                part = batch.among(due, torch.cat(items), segments, f"update {turn}")
                w = part.x.new_tensor([one for stream in due for one in memories[stream].weights()])
                index = torch.tensor(due, device=batch.x.device)
                own = {key: value.index_select(0, index) for key, value in learned.items()}
                own, own_loss = self._update(source, own, part, w)
                learned = {key: value.index_copy(0, index, own[key]) for key, value in learned.items()}
                loss = loss.index_copy(0, index, own_loss)
                updates[index] += 1
            turn += 1
        lists = {
            _LABELS: [memory.labels for memory in memories],
            _UNCERTAINTY: [memory.uncertainty for memory in memories],
            _AGE: [memory.age for memory in memories],
            _SEEN: seen,
        }
        new = {key: torch.tensor(value).to(state.memory[key]) for key, value in lists.items()} | {_IMAGES: images}
        new |= {key: value for key, value in learned.items() if key not in state.weights}
        size = (new[_LABELS] >= 0).sum(1).to(loss.dtype)
        signals = {"loss": loss, "updates": updates, "items": size}
        return Step(State({key: learned[key] for key in state.weights}, new), signals)

    def _update(self, source: Source, own: Tensors, items: Batch, w: Tensor) -> tuple[Tensors, Tensor]:
        """What streams have learned, ``own`` (``[S, ...]``), after an update on their ``items``, which have the weights
        ``w [N]`` in the loss; and the loss, ``[S]``."""
        norm = Norm(self.alpha, running=True, biased=True)
        teacher = {key: own[key] for key in (*source.affine, *source.statistics)}
        with torch.no_grad():
            target = items.forward(teacher, items.x, norm=norm)
        student = gradient.leaves({key: own[f"student.{key}"] for key in source.affine})
        reference = {key: own[f"student.{key}"] for key in source.statistics}
        view = augment(items.x, items.segments, source, items.random, STRONG)
        answer = items.forward(student | reference, view, norm=norm)
        loss = items.segments.mean(w * losses.cross_entropy(target.logits, answer.logits))
        moved, moments = self.descent.update(student, gradient.per_stream(loss, student), own)
        followed = {key: torch.lerp(teacher[key], value, self.nu) for key, value in moved.items()}
        new = {f"student.{key}": value for key, value in (moved | answer.statistics).items()}
        return followed | target.statistics | new | moments, loss.detach()
