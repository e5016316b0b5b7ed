"""``petal``: CoTTA as Bayesian inference, with a prior around the source and restoration of what matters least (Brahma
and Rai, CVPR 2023, arXiv 2212.09713).

The teacher's answer ``t`` and the student's loss ``L_cotta`` are those of ``cotta``. Then, per request of a stream:

    L   = L_cotta + s/2 sum_k (theta_k - mean_k)^2 / (V_k + 1e-6)
    F_k = (dL / d theta_k)^2,      q = the delta-quantile of all F_k
    one step of the optimiser on theta, and theta' <- m theta' + (1 - m) theta
    theta_k <- theta0_k where F_k < q                                          (``fim``)

or, with ``sres``, for each element with a probability, as in CoTTA. ``mean`` and ``V`` are the SWAG solution of the
source's training, the artefacts ``swag/mean/<key>`` and ``swag/variance/<key>``. Where a model has none there is no
penalty, and what is left of PETAL is its restoration. The authors serve ``mean`` itself as the source.

The answer is ``t``. The quantile is that of a stream's own elements, interpolated as ``torch.quantile`` does.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from adapters import gradient, teacher
from adapters.base import Batch, Source, State, Step, Tensors, register

_EPS = 1e-6


@register
@dataclass(frozen=True)
class Petal(teacher.AnchoredTeacher):
    """CoTTA with a prior from the source's training and Fisher-guided restoration.

    ``swag_weight``: ``s``, 1e-9 for CIFAR and 1e-11 for ImageNet; nothing without the artefact. ``restoration``:
    ``fim``, the share ``fisher_quantile`` (``delta``; 0.03 for CIFAR, 0.003 for ImageNet) of the elements with the
    least squared gradients, or ``sres``, a share ``restore`` at random.
    """

    name = "petal"
    ranges = teacher.AnchoredTeacher.ranges | {"swag_weight": "[0, inf)", "fisher_quantile": "[0, 1]"}
    presets = {"imagenet": teacher.ANCHORED_IMAGENET | {"swag_weight": 1e-11, "fisher_quantile": 0.003}}

    swag_weight: float = 1e-9
    restoration: Literal["fim", "sres"] = "fim"
    fisher_quantile: float = 0.03

    def step(self, source: Source, state: State, batch: Batch) -> Generator[Tensor, None, Step]:
        answer, unsure = self.teach(source, state, batch)
        yield answer
        student = gradient.leaves(state.weights)
        loss = self.objective(answer, batch.forward(student, batch.x).logits, batch.segments)
        gradients = gradient.per_stream(loss, student)
        penalty = self._penalise(source, state.weights, gradients)
        moved, memory = self.descent.update(state.weights, gradients, state.memory)
        memory |= teacher.follow(state.memory, moved, self.teacher_momentum)
        if self.restoration == "sres":
            restored = self.restored(source, moved, batch)
        else:
            restored = restore_least(source, moved, gradients, self.fisher_quantile)
        return Step(State(restored, memory), {"loss": loss.detach() + penalty, "augmented": unsure.to(loss.dtype)})

    def _penalise(self, source: Source, student: Tensors, gradients: Tensors) -> Tensor:
        """The SWAG penalty ``[S]``, 0 without the artefact. Adds its gradient, ``s (theta - mean) / (V + 1e-6)``, to
        the ``gradients``.

        A mean of squares less a squared mean may come out below 0 by rounding: such a variance counts as 0.
        """
        swag = source.artefact("swag")
        total = torch.zeros(len(next(iter(student.values()))), dtype=source.dtype, device=source.device)
        for key, theta in student.items():
            if self.swag_weight and f"mean/{key}" in swag and f"variance/{key}" in swag:
                distance = theta - swag[f"mean/{key}"]
                pull = distance * (self.swag_weight / (swag[f"variance/{key}"].clamp_min(0) + _EPS))
                gradients[key] = gradients[key] + pull
                total = total + (distance * pull).flatten(1).sum(1) / 2
        return total


def restore_least(source: Source, student: Tensors, gradients: Tensors, share: float) -> Tensors:
    """The weights ``[S, ...]``, put back to the source's where the squared gradient is below its ``share``-quantile."""
    if not share:
        return student
    streams = zip(*(gradients[key] for key in student), strict=True)
    bounds = torch.stack([quantile(torch.cat([one.flatten() for one in own]).square_(), share) for own in streams])
    return {
        key: torch.where(
            gradients[key].square() < bounds.view(-1, *[1] * (value.dim() - 1)), source.weights[key], value
        )
        for key, value in student.items()
    }


def quantile(values: Tensor, share: float) -> Tensor:
    """The ``share``-quantile of ``values [n]``, linearly between neighbours: ``torch.quantile``, which takes 16 million
    values at most and sorts them all."""
    below, part = divmod(share * (len(values) - 1), 1)
    low = values.kthvalue(int(below) + 1).values
    has_equals = (values <= low).sum() > below + 1
    high = torch.where(has_equals, low, torch.where(values > low, values, torch.inf).amin())
    return torch.lerp(low, high, part) if part else low
