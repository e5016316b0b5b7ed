"""Row-wise quantities of logits that policies and monitors share. All in nats, all differentiable."""

from __future__ import annotations

import torch
from torch import Tensor

from adapters.base import Segments


def entropy(logits: Tensor) -> Tensor:
    """Shannon entropy of the softmax of ``logits [N, C]`` -> ``[N]``: ``H = -sum_c p_c ln p_c``, in ``[0, ln C]``.

    Through log-softmax, so saturated logits give 0 and not NaN.
    """
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def cross_entropy(target: Tensor, logits: Tensor) -> Tensor:
    """``CE(a -> b) = -sum_c a_c ln b_c`` between the softmaxes ``a`` of ``target`` and ``b`` of ``logits``, both
    ``[N, C]`` -> ``[N]``. Differentiable in both."""
    return -(target.softmax(-1) * logits.log_softmax(-1)).sum(-1)


def symmetric_cross_entropy(first: Tensor, second: Tensor) -> Tensor:
    """``SCE(a, b) = (CE(b -> a) + CE(a -> b)) / 2`` of two sets of logits ``[N, C]`` -> ``[N]``."""
    return (cross_entropy(first, second) + cross_entropy(second, first)) / 2


def entropy_of(p: Tensor) -> Tensor:
    """Shannon entropy of distributions ``p [S, C]`` -> ``[S]``, with ``0 ln 0 = 0`` and a finite gradient there."""
    return -(p * p.clamp_min(torch.finfo(p.dtype).tiny).log()).sum(-1)


def mean_of_chosen(rows: Tensor, chosen: Tensor, segments: Segments) -> Tensor:
    """Each stream's mean of ``rows [N]`` over the ``chosen`` (bool ``[N]``) ones -> ``[S]``; 0 where none is."""
    total = segments.sum(torch.where(chosen, rows, 0.0))
    return total / segments.sum(chosen.to(rows.dtype)).clamp_min(1)
