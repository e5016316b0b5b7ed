"""``t3a``: the head's rows replaced by the stream's own class prototypes (Iwasawa and Matsuo, NeurIPS 2021).

No gradient: per class the stream keeps the features it was surest of, and classifies by their mean direction. With
``f`` the features of a row (what enters the head), ``z`` the source's logits for it, and ``W [C, D]``, ``b`` the head:

    init      supports are the rows w_c of W, each under the class argmax(W w_c + b), with H(softmax(W w_c + b))
    insert    f under the class argmax z, with the entropy H(softmax(z))
    filter    per class keep the M supports of least entropy, for good; of equals the older
    answer    logits = s f Omega, where column c of Omega is the sum of class c's supports, each at unit length,
              brought to unit length; inserting comes first, so a request has a say in its own answer

``s`` is the mean 2-norm of the head's rows. The authors leave it out (``s = 1``): the predicted class is the same, but
the softmax has nothing to do with the source's. With it columns are as long as the head's rows were, and the softmax is
about as sharp, a little less so as prototypes are more alike than rows: on CIFAR-10-C and a ResNet-20 the mean
confidence is 0.88 for the source, 0.79 so, and 0.38 without.

A class that no support was ever classified as takes the direction of its own row ``w_c``: left at zero, its column
would win wherever all others' scores are negative. So does one whose supports cancel out.

Supports are kept as unit vectors in float16, which is all that the answer needs of them: features of any size fit, and
M = 20 for 1000 classes of 2048 features takes 82 MB a stream. Features that are all zero have no direction and add
nothing. Prototypes of classes that stay away remain what they were; nothing ages.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from adapters import losses
from adapters.base import SOURCE_NORM, Batch, Norm, Policy, Scope, Segments, Source, State, Step, register

SUPPORTS, ENTROPIES = "t3a.supports", "t3a.entropies"
EMPTY = torch.finfo(torch.float64).max
"""Entropy of a slot without support: above all others, so that it is the first to go, and finite, as states must be."""


@register
@dataclass(frozen=True)
class T3a(Policy):
    """Classifies by prototypes made of the stream's most certain features.

    ``filter_k``: ``M``, supports kept per class; the paper chooses from 1, 5, 20, 50 and 100. A stream's memory goes
    with it: ``C M (2 D + 8)`` bytes.
    """

    name = "t3a"
    scope = Scope.NONE
    ranges = {"filter_k": "[1, 1000]"}

    filter_k: int = 20

    @property
    def norm(self) -> Norm:
        return SOURCE_NORM

    def init(self, source: Source) -> State:
        rows = _head_rows(source)
        bias = source.weights.get(f"{source.head}.bias")
        logits = rows @ rows.T if bias is None else rows @ rows.T + bias.detach().double()
        slots = (1, source.num_classes, self.filter_k)
        supports = torch.zeros(*slots, source.feature_dim, dtype=torch.float16, device=source.device)
        entropies = torch.full(slots, EMPTY, dtype=torch.float64, device=source.device)
        empty = State({}, {SUPPORTS: supports, ENTROPIES: entropies})
        return _insert(empty, rows, logits, Segments([len(rows)], source.device))[0]

    def step(self, source: Source, state: State, batch: Batch) -> Generator[Tensor, None, Step]:
        output, sizes = batch.forward({}, batch.x), batch.segments.sizes
        new, selected = _insert(state, output.features, output.logits, batch.segments)
        omega = _prototypes(source, new.memory[SUPPORTS])
        parts = zip(output.features.to(omega.dtype).split(sizes), omega, strict=True)
        yield torch.cat([f @ columns.T for f, columns in parts]).to(output.logits.dtype)
        return Step(new, {"selected": selected})


def _head_rows(source: Source) -> Tensor:
    """``W [C, D]`` of the head, in float64."""
    weight = source.weights.get(f"{source.head}.weight")
    wanted = (source.num_classes, source.feature_dim)
    if weight is None or weight.shape != wanted:
        found = "there is none" if weight is None else f"it is {list(weight.shape)}"
        raise ValueError(
            f"t3a starts from the rows of a linear head and needs {source.head}.weight as {list(wanted)}, but {found}"
        )
    return weight.detach().double()


def _insert(state: State, features: Tensor, logits: Tensor, segments: Segments) -> tuple[State, Tensor]:
    """The state with rows ``[N, D]`` and their ``logits [N, C]`` put in, each class again cut to its ``M`` best, and
    the share of each stream's rows ``[S]`` that were kept."""
    supports, entropies = state.memory[SUPPORTS], state.memory[ENTROPIES]
    streams, classes, slots = entropies.shape
    old, device = entropies.numel(), entropies.device
    groups = torch.arange(streams * classes, device=device)
    group = torch.cat([groups.repeat_interleave(slots), segments.of_row * classes + logits.argmax(1)])
    offered = torch.cat([entropies.flatten(), losses.entropy(logits.double())])
    # Sorted by group, within it by entropy, within that by age: both sorts are stable, and the old ones stand first.
    # A row whose entropy is NaN comes after the empty slots, and so never gets in.
    order = offered.argsort(stable=True)
    order = order[group[order].argsort(stable=True)]
    # Each group has the M slots it had among its candidates, so its M best are always there to take.
    first = torch.searchsorted(group[order], groups)
    kept = order[first[:, None] + torch.arange(slots, device=device)]
    # In float64, where the square of any float32 fits; what is shorter than 1e-150 counts as zero.
    unit = F.normalize(features.double(), dim=1, eps=1e-150).half()
    memory = {
        SUPPORTS: torch.cat([supports.flatten(0, 2), unit])[kept].view_as(supports),
        ENTROPIES: offered[kept].view_as(entropies),
    }
    accepted = (kept >= old).view(streams, -1).sum(1, dtype=torch.float64)
    return State({}, memory), accepted / segments.counts


def _prototypes(source: Source, supports: Tensor) -> Tensor:
    """The scaled columns ``s Omega`` as ``[S, C, D]``."""
    rows = _head_rows(source).to(torch.promote_types(source.dtype, torch.float32))
    total = supports.sum(2, dtype=rows.dtype)
    directions = F.normalize(torch.where((total != 0).any(2, keepdim=True), total, rows), dim=2)
    scale: Tensor = torch.linalg.vector_norm(rows, dim=1).mean()
    return scale * directions
