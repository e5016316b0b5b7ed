"""Per-stream gradients from one backward pass."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from adapters.base import Tensors


def leaves(weights: Mapping[str, Tensor]) -> Tensors:
    """The same values as fresh graph leaves: what a policy differentiates with respect to. No copy is made."""
    return {key: value.detach().requires_grad_() for key, value in weights.items()}


def per_stream(losses: Tensor, weights: Mapping[str, Tensor]) -> Tensors:
    """Each stream's own gradient of its own loss.

    ``losses [S]`` may each depend only on the same stream's rows of ``weights`` (leaves, ``[S, ...]``); then the
    gradient of their sum holds every stream's gradient in its row, and one backward serves all. A weight no loss
    depends on gets zeros. Frees the graph.
    """
    gradients = torch.autograd.grad(losses.sum(), list(weights.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(weights, gradients, strict=True))
