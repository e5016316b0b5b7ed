"""The policy contract: what a test-time adaptation rule sees, and what it must give back.

Shape letters, used in every docstring of this project:

=====  ==========================================================
``N``  rows (samples) in the batch
``S``  streams in the batch
``C``  classes
``D``  penultimate feature dimensions
``K``  slots of a state pool
``W``  samples in a window
=====  ==========================================================

A policy is a pure function over explicit state. It never sees the server: it gets stacked tensors whose first
dimension is the stream, and one forward function. See ``docs/add-a-policy.md``.
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Protocol, TypeVar

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
"""Tensors under flat keys, such as ``layer1.0.bn1.weight`` or ``adam.m.layer1.0.bn1.weight``."""


@dataclass(frozen=True)
class State:
    """Everything a policy remembers of its streams. Every tensor is ``[S, *shape]``.

    ``weights`` override the source's entries of the same key in the forward pass; ``memory`` is the rest (moments,
    counters, windows). Keys, shapes and dtypes never change from one step to the next.
    """

    weights: Tensors
    memory: Tensors


@dataclass(frozen=True)
class Output:
    """What one forward pass gives: ``logits [N, C]``, ``features [N, D]``, and ``statistics``.

    ``features`` are what enters the classifier head. ``statistics`` holds, for a policy whose ``norm`` is running,
    each stream's updated normalisation statistics ``[S, channels]`` under the keys of ``Source.statistics``,
    without gradient; otherwise it is empty.
    """

    logits: Tensor
    features: Tensor
    statistics: Tensors = field(default_factory=dict)


class Segments:
    """Which rows of a batch belong to which stream.

    ``counts [S]`` (int64) holds the rows of each stream, every one at least 1, in order: stream 0 owns the first
    ``counts[0]`` rows. ``of_row [N]`` (int64) is the stream index of each row.

    A stream's rows are added one after the other, so its sum is the same number, bit for bit, in any company.
    """

    def __init__(self, sizes: list[int], device: torch.device | str = "cpu") -> None:
        if not sizes or min(sizes) < 1:
            raise ValueError(f"every stream needs at least one row, got sizes {sizes}")
        self.sizes = sizes
        self.rows = sum(sizes)
        self.streams = len(sizes)
        self.counts = torch.tensor(sizes, device=device)
        streams = torch.arange(self.streams, device=device)
        self.of_row = torch.repeat_interleave(streams, self.counts, output_size=self.rows)
        self._counts_as: dict[torch.dtype, Tensor] = {}

    def sum(self, rows: Tensor) -> Tensor:
        """Sum ``rows [N, ...]`` within each stream -> ``[S, ...]``. Differentiable."""
        return torch.segment_reduce(rows.contiguous(), "sum", lengths=self.counts, axis=0, unsafe=True)

    def mean(self, rows: Tensor) -> Tensor:
        """Average ``rows [N, ...]`` within each stream -> ``[S, ...]``. Differentiable."""
        total, counts = self.sum(rows), self.rows_per_stream(rows.dtype)
        return total / (counts if total.dim() == 2 else counts.view(-1, *[1] * (total.dim() - 1)))

    def spread(self, streams: Tensor) -> Tensor:
        """Give every row its stream's value: ``[S, ...] -> [N, ...]``. Differentiable."""
        if self.streams == 1:
            return streams.expand(self.rows, *streams.shape[1:])
        return streams.index_select(0, self.of_row)

    def rows_per_stream(self, dtype: torch.dtype) -> Tensor:
        """``counts`` as ``[S, 1]`` of a floating ``dtype``."""
        if dtype not in self._counts_as:
            self._counts_as[dtype] = self.counts.to(dtype).unsqueeze(1)
        return self._counts_as[dtype]


class Forward(Protocol):
    """The model as a function of weights. ``weights`` are ``[S, ...]``; keys that are missing come from the source."""

    def __call__(self, weights: Mapping[str, Tensor], x: Tensor) -> Output: ...


@dataclass(frozen=True)
class Source:
    """The frozen model, read-only and shared by all streams.

    ``weights`` are the model's own tensors, without a stream dimension. ``affine`` lists the keys of the norm layers'
    scales and shifts (the gamma and beta that TENT and its kin adapt), ``statistics`` those of the batch-norm running
    means and variances. ``artefacts`` are tensors computed once from source data, by the names a policy's ``needs``
    uses.
    """

    weights: Mapping[str, Tensor]
    affine: tuple[str, ...]
    statistics: tuple[str, ...]
    num_classes: int
    feature_dim: int
    artefacts: Mapping[str, Tensor] = field(default_factory=dict)

    def stacked(self, keys: tuple[str, ...]) -> Tensors:
        """A copy of these weights for one stream: each ``[1, *shape]``, contiguous, without gradient."""
        return {key: self.weights[key].detach().clone().unsqueeze(0) for key in keys}


@dataclass(frozen=True)
class Batch:
    """One engine step as a policy sees it.

    ``x [N, ...]`` inputs in the model's value range (normalisation is part of the model); ``segments`` says whose
    rows they are; ``forward`` runs the model; ``uniform(shape) -> [S, *shape]`` draws from [0, 1) with each stream's
    own random key, so that a stream's draws do not depend on who shares its batch.
    """

    x: Tensor
    segments: Segments
    forward: Forward
    uniform: Callable[[tuple[int, ...]], Tensor]


@dataclass(frozen=True)
class Step:
    """What a step leaves behind: the new state and the signals, one number per stream (``[S]`` each)."""

    state: State
    signals: Tensors = field(default_factory=dict)


class Scope(enum.Enum):
    """Which weights a policy adapts: none, those of the norm layers, or all. Decides how streams share a forward."""

    NONE = "none"
    NORM = "norm"
    ALL = "all"


@dataclass(frozen=True)
class Norm:
    """Which statistics normalise in batch-norm layers: ``(1 - weight) * reference + weight * batch``.

    ``reference`` is the source's stored mean and variance, or with ``running`` the stream's own, which then become
    the mixed ones (an exponential moving average). A pure batch normalises with the biased variance as
    ``torch.nn.BatchNorm2d`` does in training; a mixture takes the unbiased one, as the running buffers of torch do.
    A layer that sees a single value per channel in a stream uses the reference: there is no variance to speak of.
    Layer and group norms have no such statistics and are not concerned.
    """

    weight: float
    running: bool = False

    def __post_init__(self) -> None:
        if not 0.0 <= self.weight <= 1.0:
            raise ValueError(f"the weight of the batch statistics must lie in [0, 1], got {self.weight}")


SOURCE_NORM = Norm(0.0)
BATCH_NORM = Norm(1.0)


class Policy(ABC):
    """An adaptation rule with its settings: immutable, shareable, without state of its own.

    Subclasses are frozen dataclasses whose fields are the settings, registered with :func:`register`. Rules for
    authors: no data-dependent shapes (weight rows by a mask), no context manager held across the ``yield``, counters
    in float64 or int64, and an empty selection means no step and no optimiser change.
    """

    name: ClassVar[str]
    scope: ClassVar[Scope]
    needs: ClassVar[frozenset[str]] = frozenset()

    @property
    @abstractmethod
    def norm(self) -> Norm:
        """How batch-norm layers normalise under this policy."""

    @abstractmethod
    def init(self, source: Source) -> State:
        """The state of one new stream (``S = 1``). Raises ``ValueError`` where the policy cannot run on this source."""

    @abstractmethod
    def step(self, source: Source, state: State, batch: Batch) -> Generator[Tensor, None, Step]:
        """Answer and adapt: yields the logits ``[N, C]`` to serve exactly once, then returns the :class:`Step`.

        Mutates nothing it is given. Row and state order is that of ``batch.segments``. What it yields leaves for the
        client at once; what it returns is kept only if the server finds it sound.
        """


_POLICIES: dict[str, type[Policy]] = {}
P = TypeVar("P", bound=type[Policy])


def register(policy: P) -> P:
    """Class decorator: puts a policy into the table under its ``name``. Raises ``ValueError`` for a name taken."""
    if policy.name in _POLICIES:
        raise ValueError(f"policy {policy.name!r} is registered already, by {_POLICIES[policy.name].__qualname__}")
    # Read by pydantic when the server validates settings: a setting that does not exist must not pass unnoticed.
    policy.__pydantic_config__ = {"extra": "forbid"}  # type: ignore[attr-defined]
    _POLICIES[policy.name] = policy
    return policy


def policies() -> dict[str, type[Policy]]:
    """The registered policies by name, in order of registration."""
    return dict(_POLICIES)
