"""The one thread that owns the device: wait for a plan, run it, hand back, again.

Everything that touches models, stream state and monitor happens here, one thing at a time, so none of it needs a lock.
Other threads only submit and cancel.

Answers go first. A step that has answered is *open* until it has adapted; that is done when nobody waits for an answer,
and interrupted, between two layers of the network, when somebody does. The scheduler says when commits go before
answers.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from tta_server.engine.engine import Engine, OpenStep
from tta_server.errors import DeadlineExceeded, StepFailed, TtaError, Unavailable
from tta_server.metrics import Recorder
from tta_server.scheduler import Scheduler
from tta_server.types import Answer, Job, Plan

log = logging.getLogger(__name__)

HANGS = 30.0
"""Seconds after which a shutdown takes a running step for one that will not end."""


LONGEST_OPEN = 1.0
"""Seconds after which an open step goes before answers: others may come for ever."""

MOST_WAIT = 3600.0
"""Seconds that the thread waits at a time when nothing is to be done."""


class _Open(NamedTuple):
    """A plan whose answers have left, the seconds they took, and when that was."""

    plan: Plan
    steps: list[OpenStep]
    seconds: float
    since: float


class Runner:
    """Runs the scheduler's plans on the engine until it is drained."""

    def __init__(
        self, engine: Engine, scheduler: Scheduler, recorder: Recorder, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.engine, self._scheduler, self.recorder, self._clock = engine, scheduler, recorder, clock
        self._changed = threading.Condition()
        self._admitting, self._stopping = True, False
        self._open: deque[_Open] = deque()
        self._ending: _Open | None = None
        self._interrupting = False
        self._interrupted = 0.0
        """Seconds that open steps were interrupted for, in all."""
        self._thread = threading.Thread(target=self._run, name="device", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Jobs in the queues."""
        return len(self._scheduler)

    def check_room(self, wait: float) -> None:
        """Raises ``Unavailable`` or ``QueueFull`` where a request that may wait so long would be refused now."""
        with self._changed:
            self._check_admitting()
            self._scheduler.check_room(wait)

    def submit(self, job: Job) -> None:
        """Queues a job. Raises ``QueueFull`` or, once draining, ``Unavailable``; then ``done`` is not called."""
        with self._changed:
            self._check_admitting()
            job.arrived = self._clock()
            self._scheduler.submit(job)
            self._changed.notify_all()

    def _check_admitting(self) -> None:
        if not self._admitting:
            raise Unavailable("the server is shutting down; try another instance, or again in a moment")

    def cancel(self, job: Job) -> bool:
        """Takes a waiting job back, whose ``done`` is then not called; False when it runs already or is done."""
        with self._changed:
            cancelled = self._scheduler.cancel(job)
            if cancelled:
                self._changed.notify_all()
            return cancelled

    def drain(self, seconds: float) -> int:
        """Stops admitting, lets what waits finish for so long, ends the thread. Returns how many jobs were given up.

        The step that runs is waited for; one that hangs no longer than ``HANGS``, its thread ends with the process.
        """
        with self._changed:
            self._admitting = False
            self._changed.wait_for(lambda: self._scheduler.idle, timeout=seconds)
            left = self._scheduler.clear()
            self._stopping = True
            self._changed.notify_all()
        for job in left:
            job.done(None, Unavailable("the server shut down before this request's turn came"))
        if self._thread.is_alive():
            self._thread.join(HANGS)
        return len(left)

    def _run(self) -> None:
        due = 0.0
        while True:
            with self._changed:
                plan, expired = (None, []) if self._is_overdue() else self._next()
                if plan is None and not expired and not self._open and not self._stopping:
                    # Not longer than until something is due, which is not done under the lock.
                    self._changed.wait(min(due, MOST_WAIT))
                    plan, expired = self._next()
                upcoming = self._scheduler.upcoming() if plan is not None else []
            self._expire(expired)
            if plan is None and not expired and not self._open and self._stopping:
                self._maintain(self.engine.store.save_all)
                return
            due = self._maintain(self.engine.store.maintain)
            if plan is not None:
                self._begin(plan, upcoming)
            elif self._open:
                self._ending = self._open.popleft()
                self._finish(self._ending)
                self._ending = None

    def _interrupt(self) -> None:
        """In the midst of a step's second half: answers what came meanwhile."""
        if self._interrupting or not len(self._scheduler) or self._is_overdue():
            return
        self._interrupting, began = True, self._clock()
        try:
            while not self._is_overdue():
                with self._changed:
                    plan, expired = self._next(predictions=True)
                self._expire(expired)
                if plan is None:
                    return
                self._begin(plan, [])
        finally:
            self._interrupting = False
            self._interrupted += self._clock() - began

    def _is_overdue(self) -> bool:
        """Whether the step that is open for longest has to end now."""
        oldest = self._ending or (self._open[0] if self._open else None)
        return oldest is not None and self._clock() - oldest.since > LONGEST_OPEN

    def _expire(self, expired: list[Job]) -> None:
        if expired:
            with self._changed:
                self._changed.notify_all()  # a drain may wait for them
        for job in expired:
            job.done(None, DeadlineExceeded("the request's time was up before its turn came"))

    def _begin(self, plan: Plan, upcoming: list[Job]) -> None:
        """Answers a plan. It stays open if there is something to adapt, else this is its end."""
        started = self._clock()
        steps = self._answer(plan, upcoming)
        opened = _Open(plan, steps, self._clock() - started, self._clock())
        if any(step.learns for step in steps):
            self._open.append(opened)
            with self._changed:
                self._scheduler.answered(plan)
        else:
            self._finish(opened)

    def _finish(self, opened: _Open) -> None:
        """The rest of a plan, and its end."""
        started, before = self._clock(), self._interrupted
        for step in opened.steps:
            try:
                self.recorder.step(self.engine.finish(step, self._interrupt))
            except Exception:  # a fault of our own: the answers have left
                log.exception("the engine failed on a plan")
        outside = self._interrupted - before
        with self._changed:
            if opened.plan.lane is not None:
                self._scheduler.ran(opened.plan, opened.seconds + self._clock() - started - outside)
            self._scheduler.complete(opened.plan)
            self._changed.notify_all()

    def _maintain(self, maintain: Callable[[], float]) -> float:
        """Runs the store's own work; nothing that fails in it ends the thread."""
        try:
            return maintain()
        except Exception:
            log.exception("the care of stream states failed")
            return 1.0

    def _answer_once_safe(self, job: Job, answer: Answer) -> None:
        """Lets an answer go when its stream's durability allows it."""
        stream, revision = job.stream, job.stream.revision
        is_stored = stream.durability.mode != "none"

        def release(refusal: TtaError | None) -> None:
            unsaved = max(0, revision - stream.saved.revision) if is_stored else None
            job.done(*((replace(answer, unsaved=unsaved), None) if refusal is None else (None, refusal)))

        self.engine.store.hold(stream, release)

    def _next(self, predictions: bool = False) -> tuple[Plan | None, list[Job]]:
        return self._scheduler.next_batch(self._clock(), predictions), self._scheduler.expired()

    def _answer(self, plan: Plan, upcoming: list[Job]) -> list[OpenStep]:
        """Runs a plan's commands, or its first half, so that every job's ``done`` is called once and nothing that fails
        ends the thread. Meanwhile the states of the ``upcoming`` jobs are read ahead. Returns what is left to do."""
        steps: list[OpenStep] = []
        open_jobs = set(plan.jobs)

        def answer(job: Job, result: Answer | TtaError) -> None:
            open_jobs.discard(job)
            if isinstance(result, Answer):
                self._answer_once_safe(job, result)
            else:
                job.done(None, result)

        try:
            self.engine.store.prefetch([job.stream for job in upcoming], [job.stream for job in plan.jobs])
            if plan.lane is None:
                for job in plan.jobs:
                    assert job.command is not None
                    job.command()
            else:
                steps = self.engine.answer(plan, answer)
        except TtaError as error:  # a command that cannot be done
            for job in list(open_jobs):
                answer(job, error)
            return []
        except Exception as error:  # a fault of our own must cost its requests, not the server
            log.exception("the engine failed on a plan")
            for job in list(open_jobs):
                answer(job, StepFailed(f"internal error: {type(error).__name__}: {error}"))
            return []
        if plan.lane is None:
            for job in plan.jobs:
                job.done(None, None)
        return steps
