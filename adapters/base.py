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
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from adapters.rng import Random

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

    ``counts [S]`` (int64) holds the rows of each stream, in order: stream 0 owns the first ``counts[0]`` rows.
    ``of_row [N]`` (int64) is the stream index of each row. Every stream of a request has rows; in a selection of them
    some may have none.

    A stream's rows are added one after the other, so its sum is the same number, bit for bit, in any company.
    """

    def __init__(self, sizes: list[int], device: torch.device | str = "cpu") -> None:
        if not sizes or min(sizes) < 0:
            raise ValueError(f"segments need at least one stream and no negative number of rows, got sizes {sizes}")
        self.sizes = sizes
        self.rows = sum(sizes)
        self.streams = len(sizes)
        self._device = device
        self._are_single = max(sizes) == self.rows / self.streams == 1
        self._counts_as: dict[torch.dtype, Tensor] = {}

    @cached_property
    def counts(self) -> Tensor:
        """Rows of each stream, ``[S]``."""
        return torch.tensor(self.sizes, device=self._device)

    @cached_property
    def of_row(self) -> Tensor:
        """The stream of each row, ``[N]``."""
        streams = torch.arange(self.streams, device=self._device)
        return torch.repeat_interleave(streams, self.counts, output_size=self.rows)

    def sum(self, rows: Tensor) -> Tensor:
        """Sum ``rows [N, ...]`` within each stream -> ``[S, ...]``, 0 without rows. Differentiable.

        Where every stream has one row, these are the rows themselves.
        """
        if self._are_single:
            return rows
        return torch.segment_reduce(rows.contiguous(), "sum", lengths=self.counts, axis=0, unsafe=True)

    def mean(self, rows: Tensor) -> Tensor:
        """Average ``rows [N, ...]`` within each stream -> ``[S, ...]``, 0 without rows. Differentiable."""
        if self._are_single:
            return rows
        total, counts = self.sum(rows), self.rows_per_stream(rows.dtype)
        if 0 in self.sizes:
            counts = counts.clamp_min(1)
        return total / (counts if total.dim() == 2 else counts.view(-1, *[1] * (total.dim() - 1)))

    def spread(self, streams: Tensor) -> Tensor:
        """Give every row its stream's value: ``[S, ...] -> [N, ...]``. Differentiable."""
        if self._are_single:
            return streams
        if self.streams == 1:
            return streams.expand(self.rows, *streams.shape[1:])
        return streams.index_select(0, self.of_row)

    def rows_per_stream(self, dtype: torch.dtype) -> Tensor:
        """``counts`` as ``[S, 1]`` of a floating ``dtype``."""
        if dtype not in self._counts_as:
            self._counts_as[dtype] = self.counts.to(dtype).unsqueeze(1)
        return self._counts_as[dtype]

    def select(self, mask: Tensor) -> tuple[Tensor, Segments]:
        """The rows where ``mask [N]`` (bool) is true: their indices ``[M]``, and whose they are (the same streams)."""
        chosen = torch.bincount(self.of_row[mask], minlength=self.streams)
        return mask.nonzero().squeeze(1), Segments(chosen.tolist(), self.counts.device)


Network = Callable[[Mapping[str, Tensor], Tensor, Segments, "Norm"], Output]
"""The model as a function of ``(weights, x, segments, norm)``, see :meth:`Batch.forward`."""


@dataclass(frozen=True)
class Source:
    """The frozen model, read-only and shared by all streams.

    ``weights`` are the model's own tensors, without a stream dimension. ``parameters`` lists the keys of all trained
    ones, ``affine`` those of the norm layers' scales and shifts among them (the gamma and beta that TENT and its kin
    adapt), ``statistics`` those of the batch-norm running means and variances. ``head`` is the classifier layer's name.
    ``input_shape`` is that of one row, ``input_range`` the least and greatest value of an input, if it has any.
    ``artefacts`` are tensors computed once from source data, under keys ``<group>/<name>``, where the groups are what a
    policy's ``needs`` names.
    """

    weights: Mapping[str, Tensor]
    parameters: tuple[str, ...]
    affine: tuple[str, ...]
    statistics: tuple[str, ...]
    num_classes: int
    feature_dim: int
    head: str
    input_shape: tuple[int, ...]
    input_range: tuple[float, float] | None
    artefacts: Mapping[str, Tensor] = field(default_factory=dict)

    def stacked(self, keys: tuple[str, ...]) -> Tensors:
        """A copy of these weights for one stream: each ``[1, *shape]``, contiguous, without gradient."""
        return {key: self.weights[key].detach().clone().unsqueeze(0) for key in keys}

    def spread(self, keys: tuple[str, ...], streams: int) -> Tensors:
        """Views of these weights for so many streams, ``[S, *shape]``: the source as a policy's own weights would be,
        bit for bit."""
        return {key: self.weights[key].detach().expand(streams, *self.weights[key].shape) for key in keys}

    def artefact(self, group: str) -> Tensors:
        """The artefacts of one group, by the rest of their keys; empty where there are none."""
        start = f"{group}/"
        return {key.removeprefix(start): value for key, value in self.artefacts.items() if key.startswith(start)}

    @property
    def dtype(self) -> torch.dtype:
        """Of the model's floating-point weights, and so of its inputs."""
        return next((self.weights[key].dtype for key in self.parameters), torch.float32)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next((value.device for value in self.weights.values()), torch.device("cpu"))


@dataclass(frozen=True)
class Batch:
    """One engine step as a policy sees it.

    ``x [N, ...]`` inputs in the model's value range (normalisation is part of the model); ``segments`` says whose
    rows they are; ``random`` draws with each stream's own key, so that a stream's draws do not depend on who shares
    its batch. ``network`` and ``norm`` stand behind :meth:`forward`.
    """

    x: Tensor
    segments: Segments
    network: Network
    norm: Norm
    random: Random

    def forward(
        self, weights: Mapping[str, Tensor], x: Tensor, segments: Segments | None = None, norm: Norm | None = None
    ) -> Output:
        """The model under these weights, ``[S, ...]`` each; those that are missing are the source's.

        ``segments`` says whose the rows ``x`` are where they are not the batch's own: one for each stream, or equally
        many for each, side by side, normalised each by itself (as several views of a request). ``norm`` says how batch
        norms normalise where that is not the policy's own way; it is taken as it is, whatever ``statistics`` and
        ``source_rows`` are set to. There must be at least one row.
        """
        return self.network(weights, x, segments or self.segments, norm or self.norm)

    def among(self, streams: list[int], x: Tensor, segments: Segments, name: str) -> Batch:
        """A batch of these streams alone, with other rows. Their draws are those called ``name``."""
        return Batch(x, segments, self.network, self.norm, self.random.named(name).among(streams))


@dataclass(frozen=True)
class Step:
    """What a step leaves behind: the new state and the signals, one number per stream (``[S]`` each), NaN for a stream
    that did not measure it."""

    state: State
    signals: Tensors = field(default_factory=dict)


class Scope(enum.StrEnum):
    """Which weights a policy adapts: none, those of the norm layers, or all. Decides how streams share a forward."""

    NONE = "none"
    NORM = "norm"
    ALL = "all"


@dataclass(frozen=True)
class Norm:
    """Which statistics normalise in batch-norm layers: ``(1 - weight) * reference + weight * batch``.

    ``reference`` is the stream's own stored mean and variance where its weights have any, else the source's; with
    ``running`` the mixed ones are left as the new reference (an exponential moving average). A pure batch normalises
    with the biased variance as ``torch.nn.BatchNorm2d`` does in training; a mixture takes the unbiased one, as the
    running buffers of torch do, or with ``biased`` the biased.

    With ``per_row`` the average runs over rows, not requests: ``n`` rows weigh ``a = 1 - (1 - weight)^n``, and the
    variance is that of all rows together, ``(1 - a) V + a v + a (1 - a) (M - m)^2``, so that single rows lose nothing
    (each has only its own variance, not the one between rows). Its ``v`` is the biased one.

    With ``median`` the batch's centre ``m`` is the median of its values by channel instead of their mean, and its
    variance the mean squared deviation from that, ``v = 1/n sum_i (x_i - m)^2``, as it stands in mixtures, too (MedBN,
    Park et al., CVPR 2024, arXiv 2403.19326). Of an even number of values it is the lower one of the two in the middle.

    With a ``prior`` of ``N`` rows the weight is ``n / (N + n)`` for the ``n`` rows that a stream has in the pass
    (Schneider et al., NeurIPS 2020, arXiv 2006.16971); ``weight`` must be 1.

    A layer that sees a single value per channel in a stream uses the reference: there is no variance to speak of,
    except with ``per_row``, where one value is as good as any other. Layer and group norms have no such statistics and
    are not concerned. A batch norm that has no statistics of the source uses the batch's alone.

    Raises ``ValueError`` for a weight outside of [0, 1], and where ``median`` or ``prior`` do not go with the rest.
    """

    weight: float
    running: bool = False
    biased: bool = False
    per_row: bool = False
    median: bool = False
    prior: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.weight <= 1.0:
            raise ValueError(f"the weight of the batch statistics must lie in [0, 1], got {self.weight}")
        if self.median and self.per_row:
            raise ValueError("averages per row are of means; there is no such average of medians")
        if not 0.0 <= self.prior < math.inf:
            raise ValueError(f"a prior is a number of rows, 0 or more, got {self.prior}")
        if self.prior and (self.weight != 1.0 or self.running or self.per_row):
            raise ValueError("a prior sets the weight of the batch statistics, so weight must be 1 and no average run")


SOURCE_NORM = Norm(0.0)
BATCH_NORM = Norm(1.0)


@dataclass(frozen=True, kw_only=True)
class Policy(ABC):
    """An adaptation rule with its settings: immutable, shareable, without state of its own.

    Subclasses are frozen dataclasses whose fields are the settings, registered with :func:`register`. Rules for
    authors: no context manager held across the ``yield``, counters in float64 or int64, an empty selection means no
    step and no optimiser change, and draws under a condition have a name of their own (``batch.random.named``).

    The settings here are every policy's, and ``serving.py`` sees to them: ``window``, a number of rows: small requests
    are answered by moving statistics, and a step runs on the last ``window`` rows each time so many have come (0: each
    request is a batch of its own). ``window_images``: how these rows are kept meanwhile, ``auto`` as 8-bit where inputs
    have a range, ``exact`` as they came, ``none`` not at all, so that only requests of at least ``window`` rows adapt.
    ``reset_after``: after so many rows the stream starts afresh from the source (RDumb; 0: never). ``statistics``: the
    batch's in ``norm``, about its ``mean`` or its ``median`` (``Norm.median``). ``source_rows``: as how many rows
    the source's statistics count beside the batch's (``Norm.prior``; 0: not at all).
    """

    name: ClassVar[str]
    plain: ClassVar[bool] = False
    """Whether this is the source model itself."""
    ranges: ClassVar[dict[str, str]] = {}
    """Of the settings that are numbers, as intervals such as ``[0, 1)``; checked when a policy is made."""
    presets: ClassVar[dict[str, dict[str, Any]]] = {}
    """Published settings by scale (``cifar``, ``imagenet``), where they differ from the defaults."""
    differentiates: ClassVar[bool] = True
    """Whether its step takes gradients through the model, where its scope is not ``NONE``."""
    networks: ClassVar[int] = 1
    """How many networks have a say in :meth:`answer`, each with its own activation statistics."""

    window: int = 0
    window_images: Literal["auto", "exact", "none"] = "auto"
    reset_after: int = 0
    statistics: Literal["mean", "median"] = "mean"
    source_rows: int = 0

    def __post_init__(self) -> None:
        counts = {"window": "[0, 4096]", "reset_after": "[0, inf)", "source_rows": "[0, 1000000]"}
        for setting, interval in (counts | self.ranges).items():
            value = getattr(self, setting)
            if value is not None and not _lies_in(value, interval):
                raise ValueError(f"{setting} must lie in {interval}, got {value}")

    @property
    @abstractmethod
    def scope(self) -> Scope:
        """Which weights it adapts."""

    @property
    @abstractmethod
    def norm(self) -> Norm:
        """How batch-norm layers normalise under this policy."""

    @property
    def needs(self) -> frozenset[str]:
        """Groups of ``Source.artefacts`` without which it cannot run."""
        return frozenset()

    @abstractmethod
    def init(self, source: Source) -> State:
        """The state of one new stream (``S = 1``). Raises ``ValueError`` where the policy cannot run on this source."""

    @abstractmethod
    def step(self, source: Source, state: State, batch: Batch) -> Generator[Tensor, None, Step]:
        """Answer and adapt: yields the logits ``[N, C]`` to serve exactly once, then returns the :class:`Step`.

        Mutates nothing it is given. Row and state order is that of ``batch.segments``. What it yields leaves for the
        client at once; what it returns is kept only if the server finds it sound.
        """

    def answer(self, state: State, batch: Batch) -> Tensor:
        """The logits ``[N, C]`` to serve between two steps of a ``window``. Runs under ``no_grad``.

        Calls ``batch.forward`` exactly ``networks`` times, for the same network in the same place each time.
        """
        return batch.forward(state.weights, batch.x).logits


def _lies_in(value: float, interval: str) -> bool:
    low, high = (float(bound) for bound in interval[1:-1].split(","))
    above = low <= value if interval[0] == "[" else low < value
    below = value <= high if interval[-1] == "]" else value < high
    return above and below and not math.isnan(value)


_POLICIES: dict[str, type[Policy]] = {}
P = TypeVar("P", bound=type[Policy])


def register(policy: P) -> P:
    """Class decorator: puts a policy into the table under its ``name``.

    Raises ``ValueError`` for a name taken, and ``TypeError`` where a preset or range names no setting.
    """
    if policy.name in _POLICIES:
        raise ValueError(f"policy {policy.name!r} is registered already, by {_POLICIES[policy.name].__qualname__}")
    settings = {one.name for one in fields(policy)}
    for named in (policy.ranges, *policy.presets.values()):
        if unknown := set(named) - settings:
            raise TypeError(f"policy {policy.name!r} has no setting {', '.join(sorted(unknown))}")
    # Read by pydantic when the server validates settings: a setting that does not exist must not pass unnoticed.
    policy.__pydantic_config__ = {"extra": "forbid"}  # type: ignore[attr-defined]
    _POLICIES[policy.name] = policy
    return policy


def policies() -> dict[str, type[Policy]]:
    """The registered policies by name, in order of registration."""
    return dict(_POLICIES)
