"""Labels that come later: what was answered is remembered for a while, and judged when its label is posted.

``Predictions`` remembers, one a tenant; ``Accuracy`` is what the labels say, one a stream. Both predictors of a stream,
its adapted model and the frozen source, are judged on the same rows. For the event loop's thread only; the work of each
call grows with the rows it is given.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from sys import getsizeof
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tta_server.errors import BadInput, Conflict, UnknownName

Flags = NDArray[np.bool_]
Classes = NDArray[np.signedinteger[Any]]

MOST_CLASSES = 100
"""With more classes, probabilities are not kept, and so the Brier score is not measured."""
OVERHEAD = 2000
"""Bytes counted for each prediction beside the content of its arrays: the objects, and their places in the tables."""
WINDOW = 1000
"""Labelled rows in the recent figures."""
LEAST_LABELS = 30
"""Labelled rows before a guard goes by them."""
WIDER = 1.7
"""By ``benchmarks/guarantees.py``, of streams of 3,000 labelled rows without a benefit 0.5 % are ever taken for helped;
by the interval itself it would be 32 %."""
BINS = 15
"""Of the calibration error."""
CALIBRATION_ROWS = 300
"""The calibration error is measured from so many rows on: 20 a bin."""
Z = 1.959963984540054
"""Of the standard normal distribution, 95 % are within so many deviations."""


@dataclass(frozen=True, slots=True, eq=False)
class Prediction:
    """What one request was answered, and what each predictor would have said. ``N`` rows."""

    request: str
    """Its id."""
    time: float
    """When it was answered, Unix time in seconds."""
    version: int
    """Of the stream's state that answered."""
    classes: int
    """How many there are, ``C``."""
    served: Classes
    """The class answered, ``[N]``."""
    adapted: Classes
    """The adapted model's class, ``[N]``; -1 where it did not run."""
    source: Classes
    """The frozen source's class, ``[N]``; -1 where it did not run."""
    confidence: NDArray[np.floating[Any]]
    """Probability of the served class, ``[N]``."""
    asked: Flags
    """Rows whose label the server wants, ``[N]``."""
    probabilities: NDArray[np.floating[Any]] | None = None
    """Of the served answer, ``[N, C]``. Kept as float16 up to ``MOST_CLASSES`` classes, not at all beyond."""
    token: object = None
    """The caller's own; its ``nbytes`` counts where it has that."""

    def __post_init__(self) -> None:
        """Raises ``ValueError`` where the arrays do not have the same rows."""
        rows = len(self.served)
        columns = (self.adapted, self.source, self.confidence, self.asked)
        if any(column.shape != (rows,) for column in columns) or (
            self.probabilities is not None and self.probabilities.shape != (rows, self.classes)
        ):
            raise ValueError(f"the arrays of request {self.request!r} do not all have {rows} rows")

    def __len__(self) -> int:
        """Rows."""
        return len(self.served)

    def compact(self) -> Prediction:
        """A copy that shares no memory with the arrays it came from, in the smallest types that hold it."""
        kind = np.int16 if self.classes <= 2**15 else np.int32
        kept = self.probabilities if self.classes <= MOST_CLASSES else None
        return replace(
            self,
            served=np.array(self.served, kind),
            adapted=np.array(self.adapted, kind),
            source=np.array(self.source, kind),
            confidence=np.array(self.confidence, np.float32),
            asked=np.array(self.asked, np.bool_),
            probabilities=None if kept is None else np.array(kept, np.float16),
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the content."""
        arrays = (self.served, self.adapted, self.source, self.confidence, self.asked, self.probabilities, self.token)
        return getsizeof(self.request) + sum(int(getattr(array, "nbytes", 0)) for array in arrays)


@dataclass(frozen=True, slots=True, eq=False)
class Labelled:
    """What one posting of labels brought that was not known before."""

    prediction: Prediction
    rows: NDArray[np.int64]
    """The rows labelled just now."""
    labels: NDArray[np.int32]
    """Their classes."""
    asked: int
    """How many of these rows the server had asked for."""
    repeated: int
    """Rows that had this same label already."""
    missing: int
    """Rows that have no label yet."""
    delay: float
    """Seconds from the answer to these labels."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """Labels that the server asks for."""

    request: str
    time: float
    """When the request was answered, Unix time in seconds."""
    version: int
    rows: list[int]


@dataclass(slots=True)
class Audits:
    """What became of the labels that the server asked for, in rows."""

    issued: int = 0
    answered: int = 0
    expired: int = 0
    """Their predictions are not kept any more, so that labels cannot come."""

    @property
    def pending(self) -> int:
        """Still open."""
        return self.issued - self.answered - self.expired


@dataclass(frozen=True)
class Limits:
    """How much is remembered; the names are those of the settings, under ``labels``."""

    requests: int = 1000
    """Of one stream."""
    bytes: int = 64 * 2**20
    """Of one tenant."""
    seconds: float = 86_400.0


@dataclass(slots=True, eq=False)
class _Kept:
    """A prediction, and what is known of its labels."""

    prediction: Prediction
    labels: NDArray[np.int32]
    """-1 where unknown."""
    wanted: int
    """Rows asked for and not labelled."""
    nbytes: int

    def open_rows(self) -> list[int]:
        """Those that are wanted."""
        rows: list[int] = np.flatnonzero(self.prediction.asked & (self.labels < 0)).tolist()
        return rows


class Predictions:
    """One tenant's predictions that can still be labelled.

    When a limit is reached, the oldest go: of the stream, for the limit on its requests; of all, for that on bytes.
    Where a client uses a request id twice, the newer prediction replaces the older.
    """

    def __init__(self, limits: Limits | None = None, clock: Callable[[], float] = time.time) -> None:
        """``clock`` gives Unix time in seconds."""
        self._limits, self._clock = limits or Limits(), clock
        self._streams: dict[str, OrderedDict[str, _Kept]] = {}
        self._order: OrderedDict[tuple[str, str], None] = OrderedDict()
        """Of all streams, oldest first."""
        self._audits: dict[str, Audits] = {}
        self.audits = Audits()
        """Of all streams, deleted ones too."""
        self.nbytes = 0
        """What is kept now."""
        self.lost: list[tuple[Prediction, list[int]]] = []
        """Predictions that are kept no more, and their rows that were asked for and not labelled; for the caller to
        take."""

    def __len__(self) -> int:
        """Requests kept."""
        return len(self._order)

    def add(self, stream: str, prediction: Prediction) -> bool:
        """Keeps a copy of a prediction, newer than those kept. False where it alone is larger than all that may be
        kept; its labels that were asked for are then counted as expired."""
        if self._find(stream, prediction.request):
            self._drop(stream, prediction.request)
        self._expire()
        prediction = prediction.compact()
        labels = np.full(len(prediction), -1, np.int32)
        size = OVERHEAD + prediction.nbytes + labels.nbytes
        wanted = int(np.count_nonzero(prediction.asked))
        for audits in self._counted(stream, wanted):
            audits.issued += wanted
        if size > self._limits.bytes or self._limits.requests < 1:
            for audits in self._counted(stream, wanted):
                audits.expired += wanted
            return False
        while self.nbytes + size > self._limits.bytes:
            self._drop(*next(iter(self._order)))
        if len(self._streams.get(stream, ())) >= self._limits.requests:
            self._drop(stream, next(iter(self._streams[stream])))
        self._streams.setdefault(stream, OrderedDict())[prediction.request] = _Kept(prediction, labels, wanted, size)
        self._order[stream, prediction.request] = None
        self.nbytes += size
        return True

    def answer(self, stream: str, request: str, labels: Sequence[int | None]) -> Labelled:
        """Takes in the labels of a request, one a row, ``None`` where unknown; those can follow later.

        The same labels again change nothing. Raises ``UnknownName`` where no such prediction is kept, ``BadInput`` for
        labels that do not fit it, and ``Conflict`` where a row has another label already; then none is taken.
        """
        self._expire()
        kept = self._find(stream, request)
        if kept is None:
            raise UnknownName(
                f"request {request[:150]!r} was not served to stream {stream!r} (take `request`, over V2 `request_id`, "
                f"of its answer), or its prediction is no longer kept for labels: labels.requests = "
                f"{self._limits.requests} of a stream, labels.bytes = {self._limits.bytes} of the tenant, "
                f"labels.seconds = {self._limits.seconds:g}"
            )
        prediction, known = kept.prediction, kept.labels
        given = _checked(prediction, labels)
        fresh = (given >= 0) & (known < 0)
        repeated = (given >= 0) & (known == given)
        clash = np.flatnonzero((given >= 0) & ~fresh & ~repeated)
        if clash.size:
            row = clash[0]
            raise Conflict(
                f"row {row} of request {request[:150]!r} has label {known[row]} already, got {given[row]}; "
                "none of these labels was taken"
            )
        known[fresh] = given[fresh]
        answered = int(np.count_nonzero(fresh & prediction.asked))
        kept.wanted -= answered
        for audits in self._counted(stream, answered):
            audits.answered += answered
        return Labelled(
            prediction=prediction,
            rows=np.flatnonzero(fresh),
            labels=given[fresh],
            asked=answered,
            repeated=int(np.count_nonzero(repeated)),
            missing=int(np.count_nonzero(known < 0)),
            delay=max(0.0, self._clock() - prediction.time),
        )

    def asked(self, stream: str) -> list[Wanted]:
        """The labels that the server still asks for, newest request first."""
        self._expire()
        return [
            Wanted(request, one.prediction.time, one.prediction.version, one.open_rows())
            for request, one in reversed(self._streams.get(stream, OrderedDict()).items())
            if one.wanted
        ]

    def audits_of(self, stream: str) -> Audits:
        """What became of the labels asked for of one stream, since the server's start; a copy."""
        self._expire()
        return replace(self._audits.get(stream, Audits()))

    def forget(self, stream: str) -> None:
        """The stream is deleted, or starts again: its predictions and counts go."""
        for request in list(self._streams.get(stream, ())):
            self._drop(stream, request)
        self._audits.pop(stream, None)

    def _find(self, stream: str, request: str) -> _Kept | None:
        return self._streams[stream].get(request) if stream in self._streams else None

    def _counted(self, stream: str, rows: int) -> tuple[Audits, ...]:
        """Where so many rows are counted. A stream that was never asked has no counts of its own."""
        return (self.audits, self._audits.setdefault(stream, Audits())) if rows else ()

    def _expire(self) -> None:
        oldest = self._clock() - self._limits.seconds
        while self._order:
            stream, request = next(iter(self._order))
            if self._streams[stream][request].prediction.time >= oldest:
                break
            self._drop(stream, request)

    def _drop(self, stream: str, request: str) -> None:
        kept = self._streams[stream].pop(request)
        del self._order[stream, request]
        if not self._streams[stream]:
            del self._streams[stream]
        self.nbytes -= kept.nbytes
        if kept.wanted:
            self.lost.append((kept.prediction, kept.open_rows()))
        for audits in self._counted(stream, kept.wanted):
            audits.expired += kept.wanted


def _checked(prediction: Prediction, labels: Sequence[int | None]) -> NDArray[np.int32]:
    """Labels as an array, -1 for ``None``. Raises ``BadInput``."""
    name = f"request {prediction.request[:150]!r}"
    if len(labels) != len(prediction):
        raise BadInput(f"{name} has {len(prediction)} rows: expected as many labels, got {len(labels)}")
    for row, label in enumerate(labels):
        if label is not None and (type(label) is not int or not 0 <= label < prediction.classes):
            raise BadInput(
                f"label of row {row} of {name}: expected a class from 0 to {prediction.classes - 1}, or null, "
                f"got {repr(label)[:100]}"
            )
    return np.array([-1 if label is None else label for label in labels], np.int32)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A share or a difference of shares, and its 95 % interval.

    The interval is for rows drawn independently, and for one look: it is evidence, not a guarantee.
    """

    value: float
    low: float
    high: float
    rows: int
    """It rests on so many."""

    def widened(self) -> tuple[float, float]:
        """The ends of an interval ``WIDER`` times as wide about the value, which may be looked at again and again."""
        return self.value - WIDER * (self.value - self.low), self.value + WIDER * (self.high - self.value)


@dataclass(frozen=True, slots=True)
class Figures:
    """What the labels of some rows say; ``None`` where that cannot be known.

    They speak of the rows that were labelled. Where ``asked`` is most of ``rows``, these were chosen by the server,
    which asks where the predictors differ: the accuracies are then not those of the stream.
    """

    rows: int
    """With a label."""
    asked: int
    """Of these, such as the server had asked for."""
    served: Estimate | None
    """Accuracy of what was answered, over all rows."""
    adapted: Estimate | None
    """Accuracy of the adapted model, over the rows where both predictors ran."""
    source: Estimate | None
    """Accuracy of the frozen source, over the same rows."""
    benefit: Estimate | None
    """``adapted`` - ``source``, paired, see :func:`paired`."""
    disagreements: int
    """Rows where the two say different classes. Only they tell which one is better."""
    adapted_right: int
    """Of the disagreements."""
    source_right: int
    """Of the disagreements."""
    neither_right: int
    """Of the disagreements."""
    brier: float | None
    """Mean of ``sum_k (p_k - [k is the label])^2`` of what was answered, 0 to 2. Not measured with more than
    ``MOST_CLASSES`` classes."""


@dataclass(frozen=True, slots=True)
class Summary:
    """What the labels of one stream say."""

    recent: Figures
    """Of the last labelled rows, in the order their labels came."""
    total: Figures
    """Of all labelled rows."""
    calibration_error: float | None
    """Of the last labelled rows, see :func:`calibration_error`; ``None`` with less than ``CALIBRATION_ROWS``."""
    mean_delay: float | None
    """Seconds from answer to label, over all labelled rows."""
    last_delay: float | None


_ROW = np.dtype(
    [
        ("asked", "?"),
        ("served", "?"),
        ("compared", "?"),
        ("adapted", "?"),
        ("source", "?"),
        ("differ", "?"),
        ("confidence", "f4"),
        ("brier", "f4"),
    ]
)
"""One labelled row: was it asked for, who was right, did both predictors run, do they differ; nan: not measured."""


@dataclass(frozen=True, slots=True)
class _Counts:
    """Sums over labelled rows."""

    rows: int = 0
    asked: int = 0
    served: int = 0
    compared: int = 0
    adapted: int = 0
    source: int = 0
    differ: int = 0
    adapted_only: int = 0
    source_only: int = 0
    brier_rows: int = 0
    brier: float = 0.0

    @staticmethod
    def of(rows: NDArray[Any]) -> _Counts:
        adapted, source = rows["adapted"], rows["source"]
        brier = rows["brier"][np.isfinite(rows["brier"])]
        flags = (rows["asked"], rows["served"], rows["compared"], adapted, source, rows["differ"])
        asked, served, compared, adapted_right, source_right, differ, adapted_only, source_only = (
            int(np.count_nonzero(flag)) for flag in (*flags, adapted & ~source, source & ~adapted)
        )
        return _Counts(
            rows=len(rows),
            asked=asked,
            served=served,
            compared=compared,
            adapted=adapted_right,
            source=source_right,
            differ=differ,
            adapted_only=adapted_only,
            source_only=source_only,
            brier_rows=len(brier),
            brier=float(brier.sum(dtype=np.float64)),
        )

    def __add__(self, other: _Counts) -> _Counts:
        return _Counts(*(getattr(self, one.name) + getattr(other, one.name) for one in fields(self)))

    def figures(self) -> Figures:
        return Figures(
            rows=self.rows,
            asked=self.asked,
            served=wilson(self.served, self.rows),
            adapted=wilson(self.adapted, self.compared),
            source=wilson(self.source, self.compared),
            benefit=paired(self.adapted_only, self.source_only, self.compared),
            disagreements=self.differ,
            adapted_right=self.adapted_only,
            source_right=self.source_only,
            neither_right=self.differ - self.adapted_only - self.source_only,
            brier=self.brier / self.brier_rows if self.brier_rows else None,
        )


class Accuracy:
    """What the labels of one stream say, so far and recently. It holds 14 bytes for each row of the window."""

    def __init__(self, window: int = WINDOW) -> None:
        """``window``: labelled rows in the recent figures, at least 1."""
        self._window = window
        self._recent = np.zeros(0, _ROW)
        self._total = _Counts()
        self._delay = 0.0
        self._last_delay: float | None = None

    def update(self, labelled: Labelled) -> None:
        """Counts the rows that :meth:`Predictions.answer` says are new."""
        if not len(labelled.rows):
            return
        rows = _judged(labelled)
        self._total += _Counts.of(rows)
        self._recent = np.concatenate((self._recent, rows))[-self._window :].copy()
        self._delay += labelled.delay * len(rows)
        self._last_delay = labelled.delay

    def summary(self) -> Summary:
        """What is known now."""
        return Summary(
            recent=_Counts.of(self._recent).figures(),
            total=self._total.figures(),
            calibration_error=calibration_error(self._recent["confidence"], self._recent["served"]),
            mean_delay=self._delay / self._total.rows if self._total.rows else None,
            last_delay=self._last_delay,
        )


def _judged(labelled: Labelled) -> NDArray[Any]:
    """The newly labelled rows, as ``_ROW``."""
    prediction, rows, labels = labelled.prediction, labelled.rows, labelled.labels
    adapted, source = prediction.adapted[rows], prediction.source[rows]
    judged = np.zeros(len(rows), _ROW)
    compared = judged["compared"] = (adapted >= 0) & (source >= 0)
    judged["asked"] = prediction.asked[rows]
    judged["served"] = prediction.served[rows] == labels
    judged["adapted"] = compared & (adapted == labels)
    judged["source"] = compared & (source == labels)
    judged["differ"] = compared & (adapted != source)
    judged["confidence"] = prediction.confidence[rows]
    judged["brier"] = np.nan
    if prediction.probabilities is not None:
        p = prediction.probabilities[rows].astype(np.float64)
        judged["brier"] = np.square(p).sum(1) - 2 * p[np.arange(len(p)), labels] + 1
    return judged


def wilson(right: int, rows: int) -> Estimate | None:
    """A share ``p = right / n`` with the interval of Wilson (1927),

        (p + z^2/2n +- z sqrt(p (1 - p) / n + z^2/4n^2)) / (1 + z^2/n).

    ``None`` without rows.
    """
    if not rows:
        return None
    share, extra = right / rows, Z * Z / rows
    centre = (share + extra / 2) / (1 + extra)
    half = math.sqrt(share * (1 - share) * extra + extra * extra / 4) / (1 + extra)
    return Estimate(share, max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half)), rows)


def paired(adapted_only: int, source_only: int, rows: int) -> Estimate | None:
    """The difference of two accuracies on the same rows, ``(b - c) / n``, with the adjusted Wald interval of Bonett and
    Price (2012),

        d +- z sqrt((p + q - d^2) / (n + 2)),   p = (b + 1) / (n + 2),   q = (c + 1) / (n + 2),   d = p - q,

    where only the first predictor is right ``b`` times, only the second ``c`` times. Fagerland, Lydersen and Laake
    (2014) recommend it. ``None`` without rows.
    """
    if not rows:
        return None
    p, q = (adapted_only + 1) / (rows + 2), (source_only + 1) / (rows + 2)
    half = Z * math.sqrt((p + q - (p - q) ** 2) / (rows + 2))
    value = (adapted_only - source_only) / rows
    return Estimate(value, max(-1.0, p - q - half), min(1.0, p - q + half), rows)


def calibration_error(confidence: NDArray[np.floating[Any]], right: Flags) -> float | None:
    """Expected calibration error, ``sum_bins (n_bin / n) |accuracy(bin) - mean confidence(bin)|``.

    The upper edges of the ``BINS`` bins are quantiles of the confidence, so that bins have equal numbers of rows, but
    for those with the same confidence, which are always in the same bin. ``None`` with less than ``CALIBRATION_ROWS``.
    By chance a calibrated predictor has some too: with confidences spread evenly from 0.5 to 1, 0.070 on average at 300
    rows, 0.039 at 1000 (2000 draws each).
    """
    usable = np.isfinite(confidence)
    p, hit = confidence[usable].astype(np.float64), right[usable].astype(np.float64)
    if len(p) < CALIBRATION_ROWS:
        return None
    edges = np.sort(p)[len(p) * np.arange(1, BINS) // BINS - 1]
    gaps = np.bincount(np.searchsorted(edges, p), hit - p)
    return float(np.abs(gaps).sum() / len(p))


DELAYS = (1.0, 10.0, 60.0, 600.0, 3600.0, 21600.0, 86400.0, 604800.0)
"""Bounds of the buckets that label delays are counted in, seconds."""


@dataclass
class LabelTally:
    """What labels said of one model's answers, for the metrics. Written by the event loop."""

    right: dict[str, list[int]] = field(
        default_factory=lambda: {who: [0, 0] for who in ("served", "adapted", "source")}
    )
    """By predictor, rows it got wrong and right."""
    delays: list[int] = field(default_factory=lambda: [0] * (len(DELAYS) + 1))
    """Postings by delay, the last beyond all bounds."""
    delay_seconds: float = 0.0

    def add(self, done: Labelled) -> None:
        """Counts one posting's new labels."""
        for who in self.right:
            own = getattr(done.prediction, who)[done.rows]
            known = own >= 0
            right = int((own[known] == done.labels[known]).sum())
            self.right[who][0] += int(known.sum()) - right
            self.right[who][1] += right
        self.delays[bisect_left(DELAYS, done.delay)] += 1
        self.delay_seconds += done.delay


class LabelStatus(NamedTuple):
    """What labels did so far, of one tenant, for the metrics."""

    tallies: Mapping[str, LabelTally]
    """By model."""
    rejected: Mapping[str, int]
    """Postings that were refused, by reason."""
    audits: Audits
