"""The guards at work in a step: what is served, whose step is kept, and what the streams' guards do next."""

from __future__ import annotations

import math
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tta_server.drift.benefit import FIGURES, Evidence, compare
from tta_server.drift.signals import Scores, Values
from tta_server.engine.source import SourceModel
from tta_server.engine.watch import Served, Sources
from tta_server.settings import GuardSettings
from tta_server.state.records import Field
from tta_server.state.store import StateStore
from tta_server.trust.guard import Action, Guard, Look, Move, Step
from tta_server.types import Comparison, Event, Job, Lane, Stream

ADAPTED, SOURCE = FIGURES.index("concentration_adapted"), FIGURES.index("concentration_source")
GOOD_BYTES = 64 * 2**20
"""Memory for the last good states of streams under audit, together."""
LEAST_ROWS = 8
"""In smaller requests no outliers are looked for."""
GOOD_STEPS = 20
"""A state is good when its stream has been active for so many steps since the last one."""

coin = secrets.SystemRandom().random
"""Nobody can foresee it."""


def make_guard(settings: GuardSettings) -> Guard:
    """A new stream's guard."""
    return Guard(settings, coin, time.monotonic)


def _note(guard: Guard | None) -> Comparison:
    return Comparison() if guard is None else Comparison(resets=guard.resets, rows=guard.rows)


def _distances(features: NDArray[Any]) -> NDArray[Any]:
    """How far each row's ``features [n, D]`` are from the request's median: the root mean square over dimensions, each
    in units of its median absolute deviation, over the median of that over the rows. So half of the rows are below 1.
    """
    gaps = np.abs(features - np.median(features, axis=0))
    spread = np.median(gaps, axis=0)
    told = spread > 0
    distances = np.sqrt(np.square(gaps[:, told] / spread[told]).mean(1)) if told.any() else np.zeros(len(features))
    return distances / max(float(np.median(distances)), 1e-12)


@dataclass
class Judged:
    """What the guards say of a step's jobs, each list ``[S]``."""

    learns: list[bool]
    """Whose step may be kept."""
    served: list[str]
    """``adapted``, ``source``, or ``mixed`` where it depends on the row."""
    comparisons: list[Comparison]
    moves: list[list[Move]]
    values: Values = field(default_factory=dict)
    """Signals: ``benefit``."""
    outdated: set[int] = field(default_factory=set)
    """Jobs that were answered from a state which was reset before their turn to learn."""


class Guarding:
    """Asks the streams' guards, and does what they say. Used by the device thread."""

    def __init__(self, store: StateStore, reset: Callable[[Lane, Lane, Stream], None]) -> None:
        """``reset`` takes a stream back to its source."""
        self._store, self._reset = store, reset
        self._evidence: dict[str, Evidence] = {}
        self._good: OrderedDict[Stream, tuple[Lane, tuple[Field, ...], bytes, int]] = OrderedDict()
        self._good_bytes = 0

    def first(self, lane: Lane, jobs: Sequence[Job], sound: Sequence[bool]) -> list[int]:
        """The jobs that the source is to be asked about before they are answered: where the guard wants to know, or the
        policy's scores are not ``sound``."""
        if lane.policy.plain:
            return []
        guards = [job.stream.guarded for job in jobs]
        return [
            index for index, guard in enumerate(guards) if guard is not None and (guard.compares or not sound[index])
        ]

    def inliers(self, jobs: Sequence[Job], served: Served, learns: Sequence[bool]) -> list[NDArray[np.int64] | None]:
        """Of each job that learns the rows to learn from, where its guard looks for outliers and found some."""
        found: list[NDArray[np.int64] | None] = []
        starts, sizes = served.starts.tolist(), served.sizes.tolist()
        for job, start, size, may in zip(jobs, starts, sizes, learns, strict=True):
            guard = job.stream.guarded if may else None
            farthest = None if guard is None else guard.settings.outliers
            if farthest is None or size < LEAST_ROWS:
                found.append(None)
            else:
                near = np.flatnonzero(_distances(served.features[start : start + size]) <= farthest)
                found.append(near if len(near) < size else None)
        return found

    def begin(self, lane: Lane, jobs: Sequence[Job]) -> Judged:
        """Before anything was looked at: as it is without a guard, or as the guard stands."""
        who = "source" if lane.policy.plain else "adapted"
        guards = [None if lane.policy.plain else job.stream.guarded for job in jobs]
        learns = [guard is None or guard.learns for guard in guards]
        return Judged(learns, [who] * len(jobs), [_note(guard) for guard in guards], [[] for _ in jobs])

    def judge(
        self,
        model: SourceModel,
        jobs: Sequence[Job],
        served: Served,
        sources: Sources | None,
        some: list[int],
        judged: Judged,
        unanswered: bool,
    ) -> None:
        """Has the guards of the jobs ``some`` look at what ``sources`` says, and decide; where they are still
        ``unanswered``, puts the source's scores in the place of those that are not to be served."""
        guarded = [index for index in some if jobs[index].stream.guarded is not None]
        if not guarded:
            return
        sizes, starts = served.sizes, served.starts
        asked = (
            {} if sources is None else {job: place for place, job in enumerate(sources.jobs) if job in sources.referee}
        )
        found = self._figures(model, jobs, served, sources, asked, guarded)
        benefits = model.judge.benefit(found)
        judged.values.setdefault("benefit", np.full(len(jobs), np.nan))[guarded] = benefits
        for place, index in enumerate(guarded):
            guard, rows = jobs[index].stream.guarded, int(sizes[index])
            assert guard is not None
            collapse = float(found[place, ADAPTED] - found[place, SOURCE])
            known = index in asked
            look = Look(rows, rows if known else 0, float(benefits[place]), collapse)
            judged.moves[index] += guard.consider(look)
            judged.learns[index] = guard.learns
            part = slice(starts[index], starts[index] + rows)
            note = judged.comparisons[index]
            if known:
                assert sources is not None
                note.source = sources.classes(asked[index]).astype(np.int32)
                note.adapted = served.classes[part].astype(np.int32)
            if unanswered and known:
                assert sources is not None
                judged.served[index] = self._serve(guard, served, part, sources.scores(asked[index]), note)

    def _figures(
        self,
        model: SourceModel,
        jobs: Sequence[Job],
        served: Served,
        sources: Sources | None,
        asked: Mapping[int, int],
        guarded: list[int],
    ) -> NDArray[Any]:
        """The figures of the guarded streams, this request of each taken in, ``[guarded, 11]``."""
        sizes = served.sizes[guarded]
        rows = np.concatenate([np.arange(start, start + size) for start, size in zip(
            served.starts[guarded].tolist(), sizes.tolist(), strict=True)])  # fmt: skip
        known = np.array([index in asked for index in guarded], np.bool_)
        classes = len(model.classes)
        source, referee = np.zeros((0, classes), np.float32), np.zeros(0, np.int64)
        if sources is not None and known.any():
            source = np.concatenate([sources.scores(asked[index]) for index in guarded if index in asked])
            referee = np.concatenate([sources.referee[index] for index in guarded if index in asked])
        compared = compare(
            Scores(served.own[rows]),
            sizes,
            Scores(source),
            referee,
            np.flatnonzero(np.repeat(known, sizes)),
        )
        if model.digest not in self._evidence:
            self._evidence[model.digest] = Evidence(classes)
        return self._evidence[model.digest].update([jobs[index].stream for index in guarded], compared)

    def _serve(self, guard: Guard, served: Served, part: slice, source: NDArray[Any], note: Comparison) -> str:
        """Puts what is to be served of one job in its place; returns who that is."""
        assert note.source is not None
        allowed = guard.serves & served.adapted[part].isfinite().all(1).numpy()
        if guard.guarantee is not None:
            note.first_row = guard.guarantee.rows
            note.count = guard.count
            decision = guard.guarantee.allow(served.classes[part] != note.source, guard.serves)
            note.asked = decision.ask if decision.ask.any() else None
            allowed &= decision.adapted
        if not allowed.all():
            served.replace(part, torch.from_numpy(source), torch.from_numpy(~allowed))
        return "adapted" if allowed.all() else "mixed" if allowed.any() else "source"

    def catch_up(self, jobs: Sequence[Job], judged: Judged) -> None:
        """Of jobs that were answered while steps before theirs were under way: what came of these counts, too. Nothing
        is made of an answer from a state that was reset since."""
        for index, job in enumerate(jobs):
            guard = job.stream.guarded
            if guard is not None and guard.resets != judged.comparisons[index].resets:
                judged.learns[index] = False
                judged.outdated.add(index)
            elif guard is not None:
                judged.learns[index] &= guard.learns

    def close(self, lane: Lane, jobs: Sequence[Job], results: list[str], judged: Judged) -> list[Event]:
        """After the step's commit: does what the guards' moves ask for, and tells of them."""
        events = []
        for index, (job, result) in enumerate(zip(jobs, results, strict=True)):
            guard = job.stream.guarded
            if guard is None or lane.policy.plain or index in judged.outdated:
                continue
            moves = judged.moves[index]
            moves += guard.took(Step(job.rows, result == "applied", result.startswith("rejected")))
            events += [replace(self.act(lane, job.stream, move), origin=job.origin) for move in moves]
            if any(move.action is not Action.NONE for move in moves) and job.stream.durability.mode != "none":
                self._store.touch(job.stream)
                self._store.save(job.stream)  # a crash must not undo it
            elif moves or (guard.guarantee is not None and result != "applied"):  # what was spent is kept, too
                self._store.touch(job.stream)
            elif guard.is_good_to_keep(GOOD_STEPS):
                self._keep(lane, job.stream)
        return events

    def act(self, lane: Lane, stream: Stream, move: Move) -> Event:
        """Does what a move asks for, and tells of it."""
        done = move.action
        version = stream.version
        if done is Action.ROLLBACK and not self._roll_back(lane, stream):
            done = Action.RESET
        if done is Action.RESET:
            self._reset(lane, lane, stream)
        after = move.after if done is move.action or stream.guard is None else stream.guard.state
        told = {"from": move.before, "to": after, "action": done, "rule": move.rule, "version": version}
        figures = {"statistic": move.statistic, "threshold": move.threshold}
        return Event("guard", stream, {**told, **{k: round(v, 6) for k, v in figures.items() if math.isfinite(v)}})

    def forget(self, stream: Stream) -> None:
        """Drops what is known of a stream, whose state is another one now or gone."""
        self._clear(stream)
        self._drop(stream)
        if stream.guard is not None:
            stream.guard.was_reset()

    def _keep(self, lane: Lane, stream: Stream) -> None:
        if not self._store.has_state(lane):
            return
        fields, data = self._store.dump(lane, stream)
        self._drop(stream)
        self._good[stream] = (lane, fields, data, stream.version)
        self._good_bytes += len(data)
        while self._good_bytes > GOOD_BYTES:
            self._drop(next(iter(self._good)))

    def _drop(self, stream: Stream) -> None:
        kept = self._good.pop(stream, None)
        if kept is not None:
            self._good_bytes -= len(kept[2])

    def _roll_back(self, lane: Lane, stream: Stream) -> bool:
        kept = self._good.get(stream)
        if kept is None or kept[0] != lane:
            return False
        _, fields, data, version = kept
        self._store.restore_dump(lane, stream, fields, data, version)
        if stream.guard is not None:
            stream.guard.resets += 1
        self._clear(stream)
        return True

    def _clear(self, stream: Stream) -> None:
        for digest, evidence in list(self._evidence.items()):
            evidence.forget(stream)
            if not len(evidence):
                del self._evidence[digest]
