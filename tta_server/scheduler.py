"""Who goes next: per-stream order, batches per lane, deadlines, bounds. A pure data structure.

No torch, no asyncio, no thread, no clock of its own: callers pass ``now`` (seconds, any monotonic origin) and hold a
lock if they share it. Invariants, checked by ``tests/test_scheduler.py``:

- a stream's jobs run in the order they were submitted, and it has at most one in running plans, unless its consistency
  lets it be answered while steps are not committed yet;
- a plan holds jobs of one lane, each of another stream, at most ``max_rows`` rows together (one job may exceed it), and
  one job of a lane whose streams do not merge; several plans that run together have at most ``open_rows``;
- while plans run, another one goes before their end, unless more jobs wait for that end than could go now, or one has
  waited longer: then small plans would never be merged again, or it would starve; commands run by themselves;
- among lanes the one whose oldest ready job came first goes first, so no lane starves; a job's priority moves it by
  seconds, not to the head;
- a plan is shed (see ``types.Plan``) before its jobs come too late to be answered;
- what was cancelled or expired never runs; the expired are handed out once, by :meth:`expired`.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

from tta_server.errors import QueueFull
from tta_server.types import Job, Lane, Plan, Stream

SURE = 0.8
"""Part of the time a job may wait that it may be expected to: pace is an estimate, and steps differ."""
PATIENT = 0.5
"""Seconds of waiting that never shed adaptation, so that a client in a hurry does not decide for the others."""

AHEAD = 64
"""Most jobs that are looked at ahead of their turn."""


@dataclass(frozen=True)
class Bounds:
    """Limits of the queues. ``max_rows`` is how much is merged into one step; the others bound waiting jobs."""

    max_rows: int = 64
    max_streams: int = 256
    """Streams in one plan; no more than a lane has slots."""
    per_stream: int = 64
    in_all: int = 4096
    shed_share: float = 0.5
    """Adaptation is shed where the oldest job of a plan has waited more than this share of what it may."""
    open_rows: int | None = None
    """Rows of all plans that run together, where there are several; ``None``: ``max_rows``."""


class _Kind(NamedTuple):
    """What may share a plan."""

    lane: Lane | None
    behind: bool
    """Its streams have steps that are not over."""


class Scheduler:
    """Queues jobs and picks the next plan."""

    def __init__(self, bounds: Bounds) -> None:
        self.bounds = bounds
        self._queues: dict[Stream, deque[Job]] = {}
        self._busy: dict[Stream, int] = {}
        """Steps of each stream that are not over."""
        self._ready: dict[_Kind, list[tuple[tuple[float, int], Job]]] = {}
        """Streams' first jobs that may run now: heaps of (rank, job)."""
        self._held: dict[Stream, Job] = {}
        """Those that wait for the end of a step."""
        self._expired: list[Job] = []
        self._waiting = 0
        self._running = 0
        self._running_rows = 0
        self._answered: list[Plan] = []
        """Plans that run and have answered."""
        self._pace = 0.0

    def __len__(self) -> int:
        """Jobs that wait."""
        return self._waiting

    @property
    def idle(self) -> bool:
        """Nothing waits and nothing runs."""
        return not self._waiting and not self._busy

    @property
    def expected_wait(self) -> float:
        """Seconds until a job submitted now would run, going by the pace of late; what runs now and is not answered
        counts as waiting."""
        return (self._waiting + self._running) * self._pace

    def ran(self, plan: Plan, seconds: float) -> None:
        """Tells how long a plan took: the pace is a moving average over jobs, with a half-life of about 20."""
        each, keep = seconds / len(plan.jobs), 0.966 ** len(plan.jobs)
        self._pace = keep * self._pace + (1 - keep) * each if self._pace else each

    def check_room(self, wait: float) -> None:
        """Raises ``QueueFull``, naming the setting, where a job that may wait so many seconds would wait in vain."""
        if self._waiting >= self.bounds.in_all:
            raise QueueFull(
                f"{self._waiting} requests wait already; the limit is limits.queue = {self.bounds.in_all}",
                math.ceil(self.expected_wait / 2) or 1,
            )
        expected = self.expected_wait
        if expected > SURE * max(wait, 0.0):
            raise QueueFull(
                f"{self._waiting} requests wait and {self._running} run, which takes about {expected:.1f} s; this "
                f"one may wait {max(wait, 0.0):.3g} s (its timeout, or limits.queue_seconds)",
                math.ceil(expected - SURE * max(wait, 0.0)),
            )

    def submit(self, job: Job) -> None:
        """Queues ``job`` behind its stream's others. Raises ``QueueFull``, naming the setting; commands always fit."""
        queue = self._queues.get(job.stream)
        if job.command is None:
            self.check_room(job.deadline - job.arrived)
            if queue is not None and len(queue) >= self.bounds.per_stream:
                raise QueueFull(
                    f"{len(queue)} requests of stream {job.stream.id!r} wait already; the limit is "
                    f"limits.queue_per_stream = {self.bounds.per_stream}"
                )
        if queue is None:
            queue = self._queues[job.stream] = deque()
        queue.append(job)
        self._waiting += 1
        if len(queue) == 1:
            self._place(job)

    def cancel(self, job: Job) -> bool:
        """Removes a waiting job. False when it is not waiting (any more): it runs, or is done."""
        queue = self._queues.get(job.stream)
        if queue is None or job not in queue:
            return False
        first = queue[0] is job
        if first:
            self._displace(job)
        queue.remove(job)
        self._waiting -= 1
        if first:
            self._advance(job.stream)
        return True

    def next_batch(self, now: float, predictions: bool = False) -> Plan | None:
        """The next plan, which runs until :meth:`complete`; ``None`` when nothing is ready, or plans that run should
        end first. With ``predictions``, no commands."""
        while self._ready:
            kind = min(self._ready, key=lambda one: self._ready[one][0][0])
            if (predictions and kind.lane is None) or not self._has_way(self._ready[kind][0][1]):
                return None
            jobs = self._take(kind, now)
            if jobs:
                for job in jobs:
                    job.behind = self._busy.get(job.stream, 0)
                    self._busy[job.stream] = job.behind + 1
                    self._advance(job.stream)
                if kind.lane is not None:
                    self._running += len(jobs)
                    self._running_rows += sum(job.rows for job in jobs)
                return Plan(kind.lane, jobs, self._is_late(jobs[0], now), kind.behind)
        return None

    def _has_way(self, job: Job) -> bool:
        """Whether a plan that starts with this job goes before the end of those that run."""
        if not self._busy or job.lane is None:
            return not self._busy
        if self._held:
            ready = sum(len(heap) for heap in self._ready.values())
            if len(self._held) > ready or min(one.rank for one in self._held.values()) < job.rank:
                return False
        bounds = self.bounds
        room = (bounds.open_rows or bounds.max_rows) - self._running_rows
        return job.rows <= room and len(self._busy) < bounds.max_streams

    def upcoming(self) -> list[Job]:
        """The jobs that would likely be the next plan if nothing else came, to prepare for. Takes nothing."""
        if not self._ready:
            return []
        kind = min(self._ready, key=lambda one: self._ready[one][0][0])
        most = self.bounds.max_streams if kind.lane is not None and kind.lane.merges else 1
        # The front of a heap: nearly its smallest.
        return [job for _, job in sorted(self._ready[kind][: 2 * AHEAD])[: min(most, AHEAD)]]

    def _is_late(self, job: Job, now: float) -> bool:
        waited = now - job.arrived
        return waited > PATIENT and waited > self.bounds.shed_share * (job.deadline - job.arrived)

    def answered(self, plan: Plan) -> None:
        """The plan's answers have left, and it goes on: nobody waits for it but its own streams."""
        self._running -= len(plan.jobs)
        self._answered.append(plan)

    def complete(self, plan: Plan) -> None:
        """The plan is over: what waited for its streams becomes ready."""
        if plan.lane is not None:
            others = [one for one in self._answered if one is not plan]
            self._running -= len(plan.jobs) if len(others) == len(self._answered) else 0
            self._answered = others
            self._running_rows -= sum(job.rows for job in plan.jobs)
        for job in plan.jobs:
            self._busy[job.stream] -= 1
            if not self._busy[job.stream]:
                del self._busy[job.stream]
            queue = self._queues.get(job.stream)
            if queue:
                self._displace(queue[0])
                self._place(queue[0])

    def expired(self) -> list[Job]:
        """Jobs whose deadline passed while they waited, each handed out once; the caller tells their owners."""
        expired, self._expired = self._expired, []
        return expired

    def clear(self) -> list[Job]:
        """Removes and returns every waiting job."""
        left = [job for queue in self._queues.values() for job in queue]
        self._queues, self._ready, self._held, self._waiting = {}, {}, {}, 0
        return left

    def _take(self, kind: _Kind, now: float) -> list[Job]:
        """Jobs for a plan; none where the first one, which fits, is late."""
        jobs, rows = list[Job](), 0
        room = min(self.bounds.max_rows, (self.bounds.open_rows or self.bounds.max_rows) - self._running_rows)
        most = self.bounds.max_streams - len(self._busy) if kind.lane is not None and kind.lane.merges else 1
        while kind in self._ready and len(jobs) < most:
            job = self._ready[kind][0][1]
            late = now > job.deadline
            if jobs and not late and rows + job.rows > room:
                break
            self._pop(kind)
            if late:
                self._expired.append(job)
                self._advance(job.stream)
                if not jobs:
                    break
            else:
                jobs.append(job)
                rows += job.rows
        return jobs

    def _pop(self, kind: _Kind) -> None:
        """Takes the first job of a kind out of the queues."""
        _, job = heapq.heappop(self._ready[kind])
        if not self._ready[kind]:
            del self._ready[kind]
        self._queues[job.stream].popleft()
        self._waiting -= 1

    def _advance(self, stream: Stream) -> None:
        """The stream's first job has left."""
        queue = self._queues[stream]
        if queue:
            self._place(queue[0])
        else:
            del self._queues[stream]

    def _place(self, job: Job) -> None:
        """Puts its stream's first job where it belongs."""
        under_way = self._busy.get(job.stream, 0)
        if not under_way or (job.lane is not None and under_way <= job.stream.consistency.bound):
            heapq.heappush(self._ready.setdefault(_Kind(job.lane, under_way > 0), []), (job.rank, job))
        else:
            self._held[job.stream] = job

    def _displace(self, job: Job) -> None:
        """Takes its stream's first job from where it is."""
        if self._held.pop(job.stream, None) is not None:
            return
        kind = next(
            one
            for one in (_Kind(job.lane, True), _Kind(job.lane, False))
            if (job.rank, job) in self._ready.get(one, ())
        )
        heap = self._ready[kind]
        heap.remove((job.rank, job))
        heapq.heapify(heap)
        if not heap:
            del self._ready[kind]
