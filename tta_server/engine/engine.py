"""One engine step: lease states, answer every job, then adapt, and keep only what is sound.

Synchronous, without event loop and HTTP, run by one thread. A policy's step is a generator: it runs to its ``yield``,
the answers leave, and only then does the rest of it (loss, backward, optimiser) run. Whatever goes wrong after the
answers leaves every stream at the version it had.

The two halves can be run apart: an open step waits while other streams are answered, before its second half and in the
midst of it.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from adapters import serving
from adapters.base import Policy, State, Step
from tta_server.drift.monitor import Monitor
from tta_server.drift.signals import AGREEMENT, DRIFT, Values
from tta_server.engine.guarding import Guarding, Judged
from tta_server.engine.run import PolicyRun
from tta_server.engine.source import SourceModel
from tta_server.engine.watch import Served, Sources, Watch
from tta_server.errors import StepFailed, TtaError
from tta_server.state.keeper import Done
from tta_server.state.store import Lease, StateStore
from tta_server.types import Answer, Event, Job, JobStats, Lane, Plan, Standing, StepStats, Stream

log = logging.getLogger(__name__)

FAILURES = {
    "rejected_nonfinite": "rejected",
    "rejected_update": "rejected",
    "rejected_distance": "rejected",
    "failed": "failed",
}
"""Events by the results of steps that were not kept."""

AnswerJob = Callable[[Job, Answer | TtaError], None]


@dataclass(eq=False)
class OpenStep:
    """A step whose answers have left, and what its second half needs."""

    lane: Lane
    jobs: list[Job]
    model: SourceModel
    run: PolicyRun
    served: Served
    judged: Judged
    lease: Lease | None
    sound: list[bool]
    """Whose scores are finite."""
    values: Values
    sources: Sources | None
    first: list[int]
    """Jobs that the source was asked about before they were answered."""
    sampled: list[int]
    """Jobs that the monitor looks at."""
    started: float
    forward_seconds: float
    shadow_seconds: float
    shed: bool
    behind: bool
    """Whether it answered from states that steps before it are still to change."""
    answered: float

    @property
    def learns(self) -> bool:
        """Whether there is more to do than to measure, or it has to wait for others of its streams."""
        return self.behind or (self.lease is not None and not self.shed and any(self.judged.learns))

    def let_go(self, store: StateStore) -> None:
        """Ends its lease, if it has one."""
        if self.lease is not None:
            store.release(self.lease)
            self.lease = None


class Engine:
    """Steps the policies of all models on one device."""

    def __init__(
        self,
        models: Mapping[str, SourceModel],
        store: StateStore,
        monitor: Monitor,
        shadow_ratio: float,
        frozen_ratio: float = 0.05,
        monitored: bool = True,
        estimate_every: int = 8,
    ) -> None:
        """The ratios, and ``estimate_every``, are those of ``MonitorSettings``."""
        self.models, self.store, self.monitor = dict(models), store, monitor
        self._watch = Watch(monitor, shadow_ratio, frozen_ratio, monitored, estimate_every)
        self.guarding = Guarding(store, self.reset)

    def step(self, plan: Plan, answer: AnswerJob) -> StepStats:
        """Runs one plan from its answers to its commit, see :meth:`answer` and :meth:`finish`."""
        parts = [self.finish(one) for one in self.answer(plan, answer)]
        assert plan.lane is not None
        return StepStats(
            plan.lane,
            self._classes(plan.lane),
            [job for part in parts for job in part.jobs],
            sum(part.forward_seconds for part in parts),
            sum(part.adapt_seconds for part in parts),
            sum(part.shadow_seconds for part in parts),
            sum(part.monitor_seconds for part in parts),
            time.time(),
            [event for part in parts for event in part.events],
            any(part.monitor_failed for part in parts),
            sum(part.deferred_seconds for part in parts),
        )

    def answer(self, plan: Plan, answer: AnswerJob) -> list[OpenStep]:
        """The first half of a plan: ``answer`` is called once per job. What is left to do is for :meth:`finish`, in
        this order; until then the streams are pinned.

        When a merged batch fails before its answers, its jobs are tried one by one, so that one bad request takes no
        other with it. Raises nothing a policy or model does: such a job is answered with ``StepFailed``.
        """
        assert plan.lane is not None
        jobs = plan.jobs
        try:
            return [self._open(plan.lane, jobs, answer, plan.shed, plan.behind and not plan.lane.policy.plain)]
        except _Unanswered as failure:
            if len(jobs) == 1:
                cause = failure.__cause__
                log.error("step failed", exc_info=cause, extra=_about(jobs[0]))
                failed = StepFailed(f"the model or policy failed on this request: {cause}")
                answer(jobs[0], cause if isinstance(cause, TtaError) else failed)
                return []
        opened: list[OpenStep] = []
        try:
            for job in jobs:
                opened += self.answer(replace(plan, jobs=[job]), answer)
        except BaseException:
            for one in opened:
                one.run.stop()
                one.let_go(self.store)
            raise
        return opened

    def finish(self, step: OpenStep, pause: Callable[[], None] | None = None) -> StepStats:
        """The second half: adapts, keeps what is sound, and measures. Once for each step.

        ``pause`` is called in the midst of it, between the layers of the network: whatever it does meanwhile, such as
        answering other streams, counts as none of this step's time.
        """
        began, outside, is_inside = time.monotonic(), 0.0, False

        def paused() -> None:
            nonlocal outside, is_inside
            if is_inside or pause is None:
                return
            left, is_inside = time.monotonic(), True
            try:
                with torch.enable_grad():  # a way back has it off, and so has many a way forward
                    pause()
            finally:
                is_inside = False
            outside += time.monotonic() - left

        with step.model.network.pausing(None if pause is None else paused):
            stats = self._close(step)
        adapt = stats.adapt_seconds - outside
        return replace(stats, adapt_seconds=adapt, deferred_seconds=began - step.answered + outside)

    def put(self, model: SourceModel) -> None:
        """Serves ``model`` under its name from now on. Streams without a state of their own start as it says."""
        self.models[model.name] = model
        for lane in self.store.lanes():
            if (lane.model, lane.digest) == (model.name, model.digest):
                try:
                    self.store.renew(lane, initial_state(lane.policy, model))
                except Exception:  # the model is served all the same; this policy's steps will say what is wrong
                    log.exception("new streams start as before", extra={"policy": lane.policy.name})

    def reset(self, old: Lane, new: Lane, stream: Stream) -> None:
        """Takes a stream of ``old`` back to the source, in ``new``, which may be the same: state, version, signals."""
        if old != new:
            self.store.drop(old, stream)
        self.store.reset(new, stream)
        self.forget(stream)

    def drop(self, lane: Lane, stream: Stream, done: Done = lambda error: None) -> None:
        """Forgets a stream of ``lane``; ``done`` is told when the store has, too."""
        self.store.remove(lane, stream, done)
        self.forget(stream)

    def forget(self, stream: Stream) -> None:
        """What was known of a stream is of a state that is gone."""
        self.monitor.forget(stream)
        self.guarding.forget(stream)

    def add_lane(self, lane: Lane) -> None:
        """Makes room for the states of a lane. Raises ``ValueError`` where its policy cannot run."""
        if not self.store.has_lane(lane):
            self.store.add_lane(lane, initial_state(lane.policy, self.models[lane.model]))

    def move(self, old: Lane, new: Lane, stream: Stream) -> bool:
        """Takes a stream's state over into another lane of its model, if it fits there; returns whether it did.

        It fits when the policies are of one kind and their states of one layout. Otherwise, and when this fails, the
        stream is back at the source.
        """
        moved = False
        try:
            if type(old.policy) is type(new.policy):
                self.add_lane(old)
                self.add_lane(new)
                moved = self.store.move(old, new, stream)
        finally:
            if not moved:
                self.reset(old, new, stream)
        return moved

    def _save_due(self) -> None:
        try:
            self.store.save_due()
        except Exception:  # nobody's answer or step depends on it; it is tried again at the next change
            log.exception("saving streams failed")

    def _secure(self, stream: Stream) -> None:
        try:
            self.store.secure(stream)
        except Exception:  # to be saved is not worth an answer
            log.exception("an answer does not wait for its stream to be saved", extra={"stream": stream.id})

    def _classes(self, lane: Lane) -> int:
        return len(self.models[lane.model].classes)

    def _open(self, lane: Lane, jobs: list[Job], answer: AnswerJob, shed: bool, behind: bool) -> OpenStep:
        """Scores and answers. Raises ``_Unanswered``."""
        model = self.models[lane.model]
        started = time.monotonic()
        lease: Lease | None = None
        values = Values()
        try:
            state = State({}, {})
            self.add_lane(lane)
            if self.store.has_state(lane):
                lease, state = self.store.lease(lane, [job.stream for job in jobs])
            run = PolicyRun(model, lane, jobs, state)
            served = Served.of(run, run.scores())
            sampled = [] if shed else self._watch.sample(model, lane, jobs, run.source is not None)
            sound = _finite(served.adapted, served)
            judged, first = self.guarding.begin(lane, jobs), self.guarding.first(lane, jobs, sound)
            forward_seconds = time.monotonic() - started
            shadow_seconds, sources = 0.0, None
            if first:
                observed = [one for one in sampled if one in first]
                sources = self._watch.ask(model, served, first, observed, first, values)
                self.guarding.judge(model, jobs, served, sources, first, judged, unanswered=True)
                shadow_seconds = time.monotonic() - started - forward_seconds
            shed = shed and lease is not None
        except Exception as error:
            if lease is not None:
                self.store.release(lease)
            raise _Unanswered from error
        try:
            self._answer(lane, jobs, served, judged, started, forward_seconds + shadow_seconds, answer, shed)
        except BaseException:
            if lease is not None:
                self.store.release(lease)
            raise
        step = OpenStep(
            lane, jobs, model, run, served, judged, lease, sound, values, sources, first, sampled, started,
            forward_seconds, shadow_seconds, shed, behind, time.monotonic(),
        )  # fmt: skip
        if behind:  # of states that other steps are still to change
            run.stop()
            step.let_go(self.store)
        return step

    def _close(self, step: OpenStep) -> StepStats:
        lane, jobs, model, run, served, judged = (
            step.lane, step.jobs, step.model, step.run, step.served, step.judged,
        )  # fmt: skip
        shadow_started, failed, late = time.monotonic(), False, list[int]()
        if step.behind:
            self.guarding.catch_up(jobs, judged)
        rest = [index for index in range(len(jobs)) if index not in step.first and index not in judged.outdated]
        sources, values, shadow_seconds = step.sources, step.values, step.shadow_seconds
        try:
            try:
                observed = [one for one in step.sampled if one not in step.first]
                guarded = (
                    [] if step.shed else [one for one in self._watch.compared(lane, jobs) if one not in step.first]
                )
                late = sorted({*observed, *guarded})
                if late or (sources is None and run.source is not None):
                    asked = self._watch.ask(model, served, late, observed, guarded, values)
                    sources = asked if sources is None or asked is None else sources.joined(asked)
                if not step.shed and not lane.policy.plain:
                    self.guarding.judge(model, jobs, served, sources, rest, judged, unanswered=False)
            except Exception:  # the answers have left
                log.exception("asking the source failed", extra={"jobs": [_about(job) for job in jobs]})
                failed = True
            adapt_started = time.monotonic()
            shadow_seconds += adapt_started - shadow_started if rest and late else 0.0
            if step.shed:
                run.stop()
                results, own = ["shed"] * len(jobs), Values()
            elif not any(judged.learns):
                run.stop()
                vetoed = "vetoed" if self.store.has_state(lane) else "none"
                results, own = [vetoed if one else "rejected_nonfinite" for one in step.sound], Values()
            else:
                current = self._caught_up(step) if step.behind else run
                results, own = self._learn(model, lane, jobs, current, served, step.lease, step.sound, judged.learns)
            adapt_seconds = time.monotonic() - adapt_started
        finally:
            step.let_go(self.store)
        moved = self.guarding.close(lane, jobs, results, judged)
        for job, result in zip(jobs, results, strict=True):
            self.store.meet(job.stream)
            job.stream.requests += 1
            job.stream.adapted += not lane.policy.plain
            job.stream.failures += result in FAILURES
        self._save_due()
        measured = self._watch.measure(model, lane, jobs, served, {**own, **values, **judged.values}, sources, failed)
        told = [
            Event(FAILURES[result], job.stream, {"version": job.stream.version, "reason": result}, job.origin)
            for job, result in zip(jobs, results, strict=True)
            if result in FAILURES
        ]
        parts = (one.split(served.sizes.tolist()) for one in (served.entropy, served.confidence, served.margin))
        stats = [
            JobStats(
                job.stream,
                job.rows,
                step.started - job.arrived,
                entropy,
                confidence,
                margin,
                result,
                signals,
                job.origin,
                who,
                0 if lane.policy.plain else job.behind,
            )
            for job, result, signals, who, entropy, confidence, margin in zip(
                jobs, results, measured.signals, judged.served, *parts, strict=True
            )
        ]
        return StepStats(
            lane,
            len(model.classes),
            stats,
            step.forward_seconds,
            adapt_seconds,
            shadow_seconds,
            measured.monitor_seconds,
            time.time(),
            told + moved + measured.events,
            measured.failed,
        )

    def _caught_up(self, step: OpenStep) -> PolicyRun | None:
        """The run whose second half is to come: of a step that answered from states which others then changed, a new
        one from what they are now. ``None`` where they cannot be had together."""
        try:
            state = State({}, {})
            if self.store.has_state(step.lane):
                step.lease, state = self.store.lease(step.lane, [job.stream for job in step.jobs])
            return PolicyRun(step.model, step.lane, step.jobs, state)
        except Exception:  # the answers have left
            log.exception("catching up failed", extra={"jobs": [_about(job) for job in step.jobs]})
            return None

    def _answer(
        self,
        lane: Lane,
        jobs: list[Job],
        served: Served,
        judged: Judged,
        started: float,
        seconds: float,
        answer: AnswerJob,
        shed: bool,
    ) -> None:
        """Answers every job."""
        sizes, finite = served.run.segments.sizes, _finite(served.logits, served)
        parts = (one.split(sizes) for one in (served.logits, served.entropy, served.confidence, served.margin))
        known = self.monitor.survey([job.stream for job in jobs])
        told = zip(
            known.verdicts(), known.values(DRIFT, scored=True).tolist(), known.values(AGREEMENT).tolist(), strict=True
        )
        for job, sound, who, note, (verdict, drift, agreement), logits, entropy, confidence, margin in zip(
            jobs, finite, judged.served, judged.comparisons, told, *parts, strict=True
        ):
            if not sound:
                answer(job, StepFailed("the scores for these inputs are not finite; the stream was left as it was"))
                continue
            lost = job.stream.lost
            if lost:
                self.store.told(job.stream)
            self._secure(job.stream)
            if job.request_number is not None:
                job.stream.last_number = job.request_number
            answer(
                job,
                Answer(
                    logits=logits,
                    version=job.stream.version,
                    adapted=not lane.policy.plain,
                    policy=lane.policy.name,
                    request=job.origin.request,
                    served=who,
                    guard=_standing(job, lane),
                    comparison=note,
                    shed=shed,
                    entropy=entropy,
                    confidence=confidence,
                    margin=margin,
                    drift=drift if drift == drift else None,  # NaN: not measured
                    verdict=verdict,
                    agreement=agreement if agreement == agreement else None,
                    queue_seconds=started - job.arrived,
                    inference_seconds=seconds,
                    lost=lost,
                    behind=0 if lane.policy.plain else job.behind,
                ),
            )

    def _learn(
        self,
        model: SourceModel,
        lane: Lane,
        jobs: list[Job],
        run: PolicyRun | None,
        served: Served,
        lease: Lease | None,
        sound: list[bool],
        learns: list[bool],
    ) -> tuple[list[str], Values]:
        """The step's second half, for the jobs whose scores are ``sound`` and whose guard lets them learn. Where a
        guard found outliers, all is done over without these rows."""
        kept = self.guarding.inliers(jobs, served, learns)
        if run is not None and any(rows is not None for rows in kept):
            run.stop()
            jobs = [
                job if rows is None or job.x is None else replace(job, x=job.x[torch.from_numpy(rows)])
                for job, rows in zip(jobs, kept, strict=True)
            ]
            run = PolicyRun(model, lane, jobs, State({}, {}) if lease is None else self.store.state_of(lease))
        allowed = [one and may for one, may in zip(sound, learns, strict=True)]
        results, own = self._adapt(model, lane, jobs, run, lease, allowed)
        if any(rows is not None for rows in kept):
            counts = [math.nan if rows is None else 1 - len(rows) / served.sizes[i] for i, rows in enumerate(kept)]
            own["outliers"] = np.array(counts)
        vetoed = "none" if lease is None else "vetoed"
        return [
            vetoed if result == "rejected_nonfinite" and one and not may else result
            for result, one, may in zip(results, sound, learns, strict=True)
        ], own

    def _adapt(
        self,
        model: SourceModel,
        lane: Lane,
        jobs: list[Job],
        run: PolicyRun | None,
        lease: Lease | None,
        finite: list[bool],
    ) -> tuple[list[str], Values]:
        """The second half of the policy's step, and its commit: a result per job, and the step's signals.

        When it fails for several streams, each takes its step again by itself: one stream's fault is not the others'.
        """
        if run is not None:
            try:
                return self._commit(jobs, run.finish(), lease, finite)
            except Exception:  # the answers have left; nothing was committed, the streams stay as they were
                log.exception("adaptation failed", extra={"jobs": [_about(job) for job in jobs]})
        results, signals = ["failed"] * len(jobs), Values()
        for index, job in enumerate(jobs if len(jobs) > 1 or run is None else ()):
            try:
                with self._part(lane, job, lease, index) as (part, state):
                    alone = PolicyRun(model, lane, [job], state)
                    alone.scores()
                    (results[index],), own = self._commit([job], alone.finish(), part, [finite[index]])
                for name, (value,) in own.items():
                    signals.setdefault(name, np.full(len(jobs), np.nan))[index] = value
            except Exception:  # this is the stream whose fault it was
                log.exception("adaptation failed", extra=_about(job))
        return results, signals

    @contextmanager
    def _part(self, lane: Lane, job: Job, lease: Lease | None, index: int) -> Iterator[tuple[Lease | None, State]]:
        """One stream of a lease, or a lease of its own where there is none, and its state."""
        if lease is not None:
            yield self.store.part(lease, index)
        elif self.store.has_state(lane):
            own, state = self.store.lease(lane, [job.stream])
            try:
                yield own, state
            finally:
                self.store.release(own)
        else:
            yield None, State({}, {})

    def _commit(self, jobs: list[Job], step: Step, lease: Lease | None, finite: list[bool]) -> tuple[list[str], Values]:
        for name, values in step.signals.items():
            if values.shape != (len(jobs),):
                raise ValueError(f"the signal {name} must have one value per stream, got {list(values.shape)}")
        signals: Values = {name: values.double().cpu().numpy() for name, values in step.signals.items()}
        if lease is None:
            return ["none" if one else "rejected_nonfinite" for one in finite], signals
        commit = self.store.commit(lease, step.state, finite, [_region(job) for job in jobs])
        # A step that moves nothing, of a window that is not full yet, say, is none to take the length of.
        signals["update_norm"] = np.array([norm or math.nan for norm in commit.update])
        signals["parameter_distance"] = np.array(commit.distance)
        return commit.results, signals


def initial_state(policy: Policy, model: SourceModel) -> State:
    """What a new stream of this policy starts from. Raises ``ValueError`` when the policy cannot run on this model."""
    missing = policy.needs - {key.partition("/")[0] for key in model.source.artefacts}
    if missing:
        listed = ",".join(sorted(missing))
        raise ValueError(
            f"{policy.name} needs {listed.replace(',', ' and ')} of the source, which this model does not have yet; "
            f"run: tta-server prepare CONFIG --data DIR --only {listed}"
        )
    return serving.init(policy, model.source)


def _finite(logits: Tensor, served: Served) -> list[bool]:
    """Whose scores, among ``logits [N, C]``, are all finite."""
    sound: list[bool] = np.logical_and.reduceat(logits.isfinite().all(1).numpy(), served.starts).tolist()
    return sound


def _region(job: Job) -> tuple[float, float]:
    """The longest step and distance that the guard of an answer's stream lets pass. Statistics have none."""
    guard = job.stream.guarded
    if guard is None or not job.stream.policy.differentiates:
        return math.inf, math.inf
    return guard.settings.most_update or math.inf, guard.settings.most_distance or math.inf


def _standing(job: Job, lane: Lane) -> Standing | None:
    """How the guard of an answer's stream stands."""
    guard = job.stream.guarded
    if guard is None:
        return None
    known = guard.benefit if guard.benefit == guard.benefit else None  # NaN: unknown
    return Standing("off" if lane.policy.plain and not job.stream.adapt else guard.state, guard.evidence, known)


class _Unanswered(Exception):
    """A step that failed before any of its answers left; the reason is its cause."""


def _about(job: Job) -> dict[str, str]:
    """What a log line says of a job."""
    return {"stream": job.stream.id, "request": job.origin.request}
