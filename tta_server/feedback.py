"""What clients say of the answers later: their labels, and what follows from them for streams, guarantees and sets."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tta_server.drift.signals import Scores
from tta_server.engine.source import SourceModel
from tta_server.errors import Conflict
from tta_server.settings import LabelSettings
from tta_server.trust.conformal import Adaptive, Conformal, Sets
from tta_server.trust.guard import Labels, Look, Move
from tta_server.trust.labels import (
    LEAST_LABELS,
    Accuracy,
    Audits,
    Labelled,
    LabelStatus,
    LabelTally,
    Limits,
    Prediction,
    Predictions,
    Summary,
    Wanted,
)
from tta_server.types import Answer, Comparison, Stream

CALIBRATION = "calibration"
"""Artefacts that prediction sets are made with."""


@dataclass(frozen=True)
class _Token:
    """What is kept with a prediction."""

    stream: Stream
    comparison: Comparison

    @property
    def nbytes(self) -> int:
        note = self.comparison
        held = (note.adapted, note.source, note.asked, note.sets)
        return sum(one.nbytes for one in held if one is not None)


@dataclass
class _Measured:
    """What labels say of a stream so far."""

    accuracy: Accuracy = field(default_factory=Accuracy)
    since: Accuracy = field(default_factory=Accuracy)
    """The same since the guard's last reset, of which there were so many."""
    resets: int = 0
    adaptive: Adaptive | None = None


class Feedback:
    """One tenant's answers that can be labelled, and what labels said. For the event loop's thread only."""

    def __init__(self, settings: LabelSettings, clock: Callable[[], float] = time.time) -> None:
        self.predictions = Predictions(Limits(settings.requests, settings.bytes, settings.seconds), clock)
        self._clock = clock
        self._measured: dict[str, _Measured] = {}
        self._conformal: dict[str, Conformal] = {}
        self.tallies: dict[str, LabelTally] = {}
        """By model."""
        self.rejected: dict[str, int] = {}
        """Postings that were refused, by reason."""

    @property
    def status(self) -> LabelStatus:
        """For the metrics."""
        return LabelStatus(self.tallies, self.rejected, self.predictions.audits)

    # Answers

    def served(self, stream: Stream, source: SourceModel, answer: Answer, request: str) -> None:
        """Remembers an answer, and gives it its prediction sets, where the stream wants them."""
        scores = Scores(answer.logits.numpy())
        note, rows = answer.comparison, len(answer.logits)
        note.sets = self._sets(stream, source, scores)
        unknown = np.full(rows, -1)
        own = scores.classes if answer.adapted else unknown
        plain = unknown if answer.adapted else scores.classes
        self.predictions.add(
            stream.id,
            Prediction(
                request=request,
                time=self._clock(),
                version=answer.version,
                classes=answer.logits.shape[1],
                served=scores.classes,
                adapted=own if note.adapted is None else note.adapted,
                source=plain if note.source is None else note.source,
                confidence=answer.confidence.numpy(),
                asked=np.zeros(rows, np.bool_) if note.asked is None else note.asked,
                probabilities=scores.probabilities,
                token=_Token(stream, note),
            ),
        )

    def _sets(self, stream: Stream, source: SourceModel, scores: Scores) -> Sets | None:
        if stream.guard is None or stream.guard.settings.miscoverage is None:
            return None
        if source.digest not in self._conformal:
            made = source.source.artefact(CALIBRATION)
            if not made:
                return None
            self._conformal[source.digest] = Conformal.calibrated(
                made["logits"].cpu().numpy(), made["labels"].cpu().numpy()
            )
        alpha = self._adaptive(stream).alpha
        return Sets(self._conformal[source.digest].sets(scores.probabilities, alpha), alpha)

    def _adaptive(self, stream: Stream) -> Adaptive:
        guard = stream.guard
        assert guard is not None
        assert guard.settings.miscoverage is not None
        measured = self._measured.setdefault(stream.id, _Measured())
        target, step = guard.settings.miscoverage, guard.settings.miscoverage_step
        if measured.adaptive is None or measured.adaptive.target != target:
            measured.adaptive = Adaptive(target, step)
        measured.adaptive.gamma = step
        return measured.adaptive

    # Labels

    def label(self, stream: Stream, request: str, labels: Sequence[int | None]) -> Labelled:
        """Takes in a request's labels. Raises as :meth:`labels.Predictions.answer` does."""
        try:
            done = self.predictions.answer(stream.id, request, labels)
        except Exception as error:
            reason = type(error).__name__
            self.rejected[reason] = self.rejected.get(reason, 0) + 1
            raise
        prediction, token = done.prediction, done.prediction.token
        assert isinstance(token, _Token)
        note = token.comparison
        if note.source is not None and note.adapted is not None:  # it may have come since
            prediction.source[:], prediction.adapted[:] = note.source, note.adapted
        if not len(done.rows):
            return done
        measured = self._measured.setdefault(stream.id, _Measured())
        measured.accuracy.update(done)
        self._tell_guard(stream, measured, done)
        if note.sets is not None and measured.adaptive is not None:
            measured.adaptive.learn(note.sets.inside[done.rows], done.labels)
        self.tallies.setdefault(stream.model, LabelTally()).add(done)
        return done

    @staticmethod
    def _tell_guard(stream: Stream, measured: _Measured, done: Labelled) -> None:
        guard = stream.guarded
        if guard is None:
            return
        if measured.resets != guard.resets:
            measured.since, measured.resets = Accuracy(), guard.resets
        token = done.prediction.token
        assert isinstance(token, _Token)
        if token.comparison.resets != guard.resets:
            return  # of a model that is no more
        measured.since.update(done)
        benefit = measured.since.summary().recent.benefit
        if benefit is not None and benefit.rows >= LEAST_LABELS:
            low, high = benefit.widened()
            guard.labels = Labels(low, high, token.comparison.resets, token.comparison.rows)

    def summary(self, stream: Stream) -> Summary | None:
        """What labels said of a stream; ``None`` before there were any."""
        measured = self._measured.get(stream.id)
        return None if measured is None else measured.accuracy.summary()

    def coverage(self, stream: Stream) -> dict[str, Any] | None:
        """How the stream's prediction sets do; ``None`` where it has none."""
        if stream.guard is None or stream.guard.settings.miscoverage is None:
            return None
        adaptive = self._adaptive(stream)
        return {"alpha": adaptive.alpha, "labels": adaptive.labels, "coverage": adaptive.coverage}

    def wanted(self, stream: Stream) -> list[Wanted]:
        """Labels that the stream's audits ask for, of the newest requests first."""
        return self.predictions.asked(stream.id)

    def audits(self, stream: Stream) -> Audits:
        """What became of them so far."""
        return self.predictions.audits_of(stream.id)

    def unanswered(self) -> list[tuple[Stream, Comparison, list[int]]]:
        """Rows whose label a stream's guarantee waits for, and which cannot come any more; each told once."""
        lost, self.predictions.lost = self.predictions.lost, []
        found = []
        for prediction, rows in lost:
            token = prediction.token
            assert isinstance(token, _Token)
            found.append((token.stream, token.comparison, rows))
        return found

    def forget(self, id: str) -> None:
        """The stream is gone, or another one."""
        self.predictions.forget(id)
        self._measured.pop(id, None)


def check_sets(source: SourceModel) -> None:
    """Raises ``Conflict`` where a model cannot make prediction sets."""
    if not source.source.artefact(CALIBRATION):
        raise Conflict(
            f"prediction sets need calibration scores, which model {source.name!r} does not have; run: "
            f"tta-server prepare CONFIG --data CLEAN_IMAGES --only {CALIBRATION}"
        )


def settle(stream: Stream, done: Labelled) -> list[Move]:
    """Has a stream's guarantee know the labels, on the device thread; returns the moves of its guard that follow."""
    guard, token = stream.guard, done.prediction.token
    assert isinstance(token, _Token)
    note = token.comparison
    if guard is None or guard.guarantee is None or note.count is not guard.count or token.stream is not stream:
        return []
    for row, label in zip(done.rows.tolist(), done.labels.tolist(), strict=True):
        source, adapted = int(done.prediction.source[row]), int(done.prediction.adapted[row])
        if source != adapted and min(source, adapted) >= 0:
            guard.guarantee.settle(note.first_row + row, int(source == label) - int(adapted == label))
    return guard.consider(Look(0, 0))
