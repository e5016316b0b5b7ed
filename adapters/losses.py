"""Row-wise quantities of logits that policies and monitors share. All in nats, all differentiable."""

from __future__ import annotations

from torch import Tensor


def entropy(logits: Tensor) -> Tensor:
    """Shannon entropy of the softmax of ``logits [N, C]`` -> ``[N]``: ``H = -sum_c p_c ln p_c``, in ``[0, ln C]``.

    Through log-softmax, so saturated logits give 0 and not NaN.
    """
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)
