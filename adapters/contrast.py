"""Contrastive learning with class prototypes, as RMT has it (Doebler et al., CVPR 2023, section 3.2).

Vectors are compared behind a projector, ``g(v) = W2 relu(W1 v + b1) + b2`` scaled to length 1. A stream's own projector
is in its ``State.memory``, and learns together with the features.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from adapters.base import Segments, Source, Tensors

_PREFIX = "contrast.projector."  # a model may well have a projector of its own, whose moments are in memory too
_KEYS = tuple(f"{_PREFIX}{name}" for name in ("0.weight", "0.bias", "2.weight", "2.bias"))


def new_projector(source: Source, width: int) -> Tensors:
    """``W1 [1, P, D]``, ``b1 [1, P]``, ``W2 [1, P, P]`` and ``b2 [1, P]`` as ``torch.nn.Linear`` draws them, uniform in
    ``+- 1 / sqrt(inputs)``; always the same ones."""
    generator = torch.Generator().manual_seed(0)
    values: list[Tensor] = []
    for inputs in (source.feature_dim, width):
        drawn = torch.rand(1, width, inputs + 1, generator=generator, dtype=torch.float64) * 2 - 1
        drawn = (drawn / inputs**0.5).to(source.device, source.dtype)
        values += drawn[..., :-1].contiguous(), drawn[..., -1].contiguous()
    return dict(zip(_KEYS, values, strict=True))


def projector(memory: Mapping[str, Tensor]) -> Tensors:
    """The projector in a ``State.memory``, under its keys there; empty where there is none."""
    return {key: value for key, value in memory.items() if key.startswith(_PREFIX)}


def nearest_prototypes(source: Source, features: Tensor) -> Tensor:
    """The class prototype with the greatest cosine similarity to each row of ``features [N, D]`` -> ``[N, D]``."""
    prototypes = source.artefact("prototypes")
    similarity = F.normalize(features.detach(), dim=1) @ F.normalize(prototypes["mean"], dim=1).T
    # A class of which the source data had no image has no prototype.
    chosen = torch.where(prototypes["counts"] > 0, similarity, -torch.inf).argmax(1)
    return prototypes["mean"][chosen]


def loss(views: Tensor, projector: Tensors, segments: Segments, temperature: float) -> Tensor:
    """Each stream's contrastive loss ``[S]`` of ``V`` views of its rows, ``views [V, N, D]``.

    The mean, over the ``V n`` projected vectors ``v`` of a stream with ``n`` rows, of
    ``- 1 / (V - 1) sum_{u with v} ln ( e^{v.u / T} / sum_{w != v} e^{v.w / T} )``, where "u with v" are the other views
    of the same row.
    """
    found = []
    for stream, own in enumerate(views.split(segments.sizes, 1)):
        w1, b1, w2, b2 = (projector[key][stream] for key in _KEYS)
        v = F.normalize(F.linear(F.linear(own.flatten(0, 1), w1, b1).relu(), w2, b2), dim=1)
        itself = torch.eye(len(v), dtype=torch.bool, device=v.device)
        log_p = (v @ v.T / temperature).masked_fill(itself, -torch.inf).log_softmax(1)
        rows = torch.eye(own.shape[1], dtype=torch.bool, device=v.device)
        together = rows.repeat(len(own), len(own)) & ~itself
        found.append(-log_p.masked_fill(~together, 0.0).sum(1).mean() / (len(own) - 1))
    return torch.stack(found)
