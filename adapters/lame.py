"""``lame``: answers that agree with their neighbours in the request (Boudiaf et al., CVPR 2022, arXiv 2201.05718).

No weight moves and nothing is kept: only the answers of a request change, so that rows with like features get like
classes. With ``q_i`` the source's softmax for row ``i``, ``f_i`` its features (what enters the head) at unit length,
``d`` the distances between these, ``W [N, N]`` an affinity and ``lambda`` its weight, look for the distributions ``Y``
that minimise

    J(Y) = sum_i KL(y_i || q_i) - lambda/2 sum_ij W_ij <y_i, y_j>

from ``Y = q`` on, by a step that never raises it where ``W`` is symmetric and positive semi-definite (``rbf``,
``linear``; raw ``knn`` is neither):

    a = ln(q + 1e-10) + lambda W Y,      Y <- softmax(a) by rows.

It stops when, from the third step on, the bound that the step minimises, ``-sum_i ln sum_c exp(a_ic)``, changes by no
more than 1e-8 of itself. The affinities:

    rbf       W_ij = exp(-d_ij^2 / (2 sigma^2)), sigma the mean over rows of the k-th smallest distance, the row's own
              (0) counting as the first
    knn       W_ij = 1 for the k nearest others, else 0
    linear    W_ij = <f_i, f_j>

Answered is ``ln Y``, whose softmax is ``Y``. A request of one row, or of rows too much alike to tell their scale
(``sigma < 1e-12``), is answered with ``ln q``: the source.

All of it is in float64 whatever the model's type: the matrices are small, steps that feed on themselves magnify
rounding, and a change of 1e-8 is below float32's resolution.

Fit for streams whose neighbours in time share their class, such as video. Where they do not it does harm, most of all
with ``rbf``: rows of different classes pull on one another.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from adapters.base import SOURCE_NORM, Batch, Norm, Policy, Scope, Source, State, Step, register


@register
@dataclass(frozen=True)
class Lame(Policy):
    """Makes answers within a request agree where features do. For label-correlated streams only.

    ``affinity``: ``rbf`` (the authors'), ``knn`` or ``linear``. ``neighbours``: ``k``, 5 in the paper; ``rbf`` counts
    the row itself among them and needs 2, ``linear`` does not use it. ``steps``: at most so many. ``weight``:
    ``lambda``. ``force_symmetry``: use ``(W + W^T) / 2``, which changes ``knn`` only.
    """

    name = "lame"
    scope = Scope.NONE
    ranges = {"neighbours": "[1, inf)", "steps": "[1, 10000]", "weight": "[0, inf)"}

    affinity: Literal["rbf", "knn", "linear"] = "rbf"
    neighbours: int = 5
    steps: int = 100
    weight: float = 1.0
    force_symmetry: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.affinity == "rbf" and self.neighbours < 2:
            raise ValueError("neighbours must be at least 2 with the affinity rbf, where each row is its own first")

    @property
    def norm(self) -> Norm:
        return SOURCE_NORM

    def init(self, source: Source) -> State:
        return State({}, {})

    def step(self, source: Source, state: State, batch: Batch) -> Generator[Tensor, None, Step]:
        output, sizes = batch.forward({}, batch.x), batch.segments.sizes
        parts = zip(output.logits.split(sizes), output.features.split(sizes), strict=True)
        smoothed = [self._smooth(logits, features) for logits, features in parts]
        yield torch.cat([log_y for log_y, _ in smoothed]).to(output.logits.dtype)
        iterations = [count for _, count in smoothed]
        return Step(state, {"iterations": torch.tensor(iterations, dtype=torch.float64, device=batch.x.device)})

    def _smooth(self, logits: Tensor, features: Tensor) -> tuple[Tensor, int]:
        """``ln Y [N, C]`` of one stream, and the number of steps it took."""
        log_q = logits.double().log_softmax(1)
        w = self._affinity(F.normalize(features.double(), dim=1, eps=1e-150))
        if w is None:
            return log_q, 0
        log_prior = (log_q.exp() + 1e-10).log()
        log_y, bound, count = log_prior.log_softmax(1), math.inf, 0
        while count < self.steps:
            a = log_prior + self.weight * (w @ log_y.exp())
            log_y, count = a.log_softmax(1), count + 1
            before, bound = bound, -a.logsumexp(1).sum().item()
            if count >= 3 and abs(bound - before) <= 1e-8 * abs(before):
                break
        return log_y, count

    def _affinity(self, f: Tensor) -> Tensor | None:
        """``W [N, N]`` of features ``f [N, D]`` at unit length; ``None`` where there is none to speak of."""
        rows = len(f)
        if rows == 1:
            return None
        if self.affinity == "linear":
            return f @ f.T
        # By differences: from products, rows that are the same would come out some 1e-8 apart.
        d = torch.cdist(f, f, compute_mode="donot_use_mm_for_euclid_dist")
        if self.affinity == "rbf":
            sigma = d.kthvalue(min(self.neighbours, rows), dim=1).values.mean()
            if sigma < 1e-12:
                return None
            w = (-(d / sigma).square() / 2).exp()
        else:
            d.fill_diagonal_(torch.inf)
            nearest = d.argsort(dim=1, stable=True)[:, : min(self.neighbours, rows - 1)]
            w = torch.zeros_like(d).scatter(1, nearest, 1.0)
        return (w + w.T) / 2 if self.force_symmetry else w
