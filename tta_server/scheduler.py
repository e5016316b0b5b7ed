"""Who goes next: per-stream order, batches per lane, deadlines, bounds. A pure data structure.

No torch, no asyncio, no thread, no clock of its own: callers pass ``now`` (seconds, any monotonic origin) and hold a
lock if they share it. Invariants, checked by ``tests/test_scheduler.py``:

- a stream has at most one job in running plans, and its jobs run in the order they were submitted;
- a plan holds jobs of one lane, each of another stream, at most ``max_rows`` rows together (one job may exceed it), and
  one job of a lane whose streams do not merge;
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


class Scheduler:
    """Queues jobs and picks the next plan."""

    def __init__(self, bounds: Bounds) -> None:
        self.bounds = bounds
        self._queues: dict[Stream, deque[Job]] = {}
        self._busy: set[Stream] = set()
        # Ready streams by the lane of their first job, as heaps of (rank, stream's first job).
        self._ready: dict[Lane | None, list[tuple[tuple[float, int], Job]]] = {}
        self._expired: list[Job] = []
        self._waiting = 0
        self._running = 0
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
        """Seconds until a job submitted now would run, going by the pace of late; what runs now counts as waiting."""
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
        if len(queue) == 1 and job.stream not in self._busy:
            self._make_ready(job)

    def cancel(self, job: Job) -> bool:
        """Removes a waiting job. False when it is not waiting (any more): it runs, or is done."""
        queue = self._queues.get(job.stream)
        if queue is None or job not in queue:
            return False
        first = queue[0] is job and job.stream not in self._busy
        queue.remove(job)
        self._waiting -= 1
        if first:
            heap = self._ready[job.lane]
            heap.remove((job.rank, job))
            heapq.heapify(heap)
            if not heap:
                del self._ready[job.lane]
            self._advance(job.stream)
        return True

    def next_batch(self, now: float) -> Plan | None:
        """The next plan, whose streams are then busy until :meth:`complete`; ``None`` when nothing is ready."""
        while self._ready:
            lane = min(self._ready, key=lambda one: self._ready[one][0][0])
            jobs = self._take(lane, now)
            if jobs:
                self._busy.update(job.stream for job in jobs)
                self._running += 0 if lane is None else len(jobs)
                return Plan(lane, jobs, self._is_late(jobs[0], now))
        return None

    def upcoming(self) -> list[Job]:
        """The jobs that would likely be the next plan if nothing else came, to prepare for. Takes nothing."""
        if not self._ready:
            return []
        lane = min(self._ready, key=lambda one: self._ready[one][0][0])
        most = self.bounds.max_streams if lane is not None and lane.merges else 1
        # The front of a heap: nearly its smallest.
        return [job for _, job in sorted(self._ready[lane][: 2 * AHEAD])[: min(most, AHEAD)]]

    def _is_late(self, job: Job, now: float) -> bool:
        waited = now - job.arrived
        return waited > PATIENT and waited > self.bounds.shed_share * (job.deadline - job.arrived)

    def complete(self, plan: Plan) -> None:
        """The plan is over: its streams' next jobs become ready."""
        self._running -= 0 if plan.lane is None else len(plan.jobs)
        for job in plan.jobs:
            self._busy.remove(job.stream)
            self._advance(job.stream)

    def expired(self) -> list[Job]:
        """Jobs whose deadline passed while they waited, each handed out once; the caller tells their owners."""
        expired, self._expired = self._expired, []
        return expired

    def clear(self) -> list[Job]:
        """Removes and returns every waiting job."""
        left = [job for queue in self._queues.values() for job in queue]
        self._queues = {stream: deque() for stream in self._busy}
        self._ready, self._waiting = {}, 0
        return left

    def _take(self, lane: Lane | None, now: float) -> list[Job]:
        heap, jobs, rows = self._ready[lane], list[Job](), 0
        most = self.bounds.max_streams if lane is not None and lane.merges else 1
        while heap and len(jobs) < most:
            job = heap[0][1]
            late = now > job.deadline
            if jobs and not late and rows + job.rows > self.bounds.max_rows:
                break
            heapq.heappop(heap)
            self._queues[job.stream].popleft()
            self._waiting -= 1
            if late:
                self._expired.append(job)
                self._advance(job.stream)
            else:
                jobs.append(job)
                rows += job.rows
        if not heap:
            del self._ready[lane]
        return jobs

    def _advance(self, stream: Stream) -> None:
        queue = self._queues[stream]
        if queue:
            self._make_ready(queue[0])
        else:
            del self._queues[stream]

    def _make_ready(self, job: Job) -> None:
        heapq.heappush(self._ready.setdefault(job.lane, []), (job.rank, job))
