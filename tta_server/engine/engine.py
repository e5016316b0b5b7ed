"""One engine step: lease states, answer every job, then adapt, and keep only what is sound.

Synchronous, without event loop and HTTP, run by one thread. A policy's step is a generator: it runs to its ``yield``,
the answers leave, and only then does the rest of it (loss, backward, optimiser) run. Whatever goes wrong after the
answers leaves every stream at the version it had.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from adapters import losses, serving
from adapters.base import Policy, Segments, State, Step
from tta_server.drift.monitor import Monitor
from tta_server.engine.norm import Pass
from tta_server.engine.run import PolicyRun
from tta_server.engine.source import SourceModel
from tta_server.errors import StepFailed
from tta_server.state.store import Lease, StateStore
from tta_server.types import AGREEMENT, DRIFT, Answer, Job, JobStats, Lane, Plan, StepStats, Stream

log = logging.getLogger(__name__)

AnswerJob = Callable[[Job, Answer | StepFailed], None]


@dataclass(frozen=True)
class _Served:
    """What the first half of a step left: the answered rows, and which jobs' are compared with the source."""

    run: PolicyRun
    logits: Tensor
    entropy: Tensor
    confidence: Tensor
    sampled: list[int]

    @cached_property
    def entropies(self) -> Sequence[Tensor]:
        """By job."""
        parts: Sequence[Tensor] = self.entropy.split(self.run.segments.sizes)
        return parts

    @cached_property
    def confidences(self) -> Sequence[Tensor]:
        """By job."""
        parts: Sequence[Tensor] = self.confidence.split(self.run.segments.sizes)
        return parts


class Engine:
    """Steps the policies of all models on one device."""

    def __init__(
        self, models: Mapping[str, SourceModel], store: StateStore, monitor: Monitor, shadow_ratio: float
    ) -> None:
        self.models, self.store, self.monitor, self._shadow_ratio = dict(models), store, monitor, shadow_ratio

    def step(self, plan: Plan, answer: AnswerJob) -> StepStats:
        """Runs one plan; ``answer`` is called once per job, before any adaptation.

        When a merged batch fails before its answers, its jobs are tried one by one, so that one bad request takes no
        other with it. Raises nothing a policy or model does: such a job is answered with ``StepFailed``.
        """
        assert plan.lane is not None
        try:
            return self._step(plan.lane, plan.jobs, answer, plan.shed)
        except _Unanswered as failure:
            if len(plan.jobs) == 1:
                log.error("step failed", exc_info=failure.__cause__, extra={"stream": plan.jobs[0].stream.id})
                answer(plan.jobs[0], StepFailed(f"the model or policy failed on this request: {failure.__cause__}"))
                return StepStats(plan.lane, self._classes(plan.lane), [], 0.0, 0.0, 0.0)
        parts = [self.step(Plan(plan.lane, [job], plan.shed), answer) for job in plan.jobs]
        return StepStats(
            plan.lane,
            self._classes(plan.lane),
            [job for part in parts for job in part.jobs],
            sum(part.forward_seconds for part in parts),
            sum(part.adapt_seconds for part in parts),
            sum(part.shadow_seconds for part in parts),
        )

    def put(self, model: SourceModel) -> None:
        """Serves ``model`` under its name from now on. Streams without a state of their own start as it says."""
        self.models[model.name] = model
        for lane in self.store.lanes():
            if (lane.model, lane.digest) == (model.name, model.digest):
                try:
                    self.store.renew(lane, initial_state(lane.policy, model))
                except Exception:  # the model is served all the same; this policy's steps will say what is wrong
                    log.exception("new streams start as before", extra={"policy": lane.policy.name})

    def reset(self, lane: Lane, stream: Stream) -> None:
        """Takes a stream of ``lane`` back to the source: state, version and signals."""
        self.store.reset(lane, stream)
        self.monitor.forget(stream)

    def drop(self, lane: Lane, stream: Stream) -> None:
        """Forgets a stream of ``lane``."""
        self.store.drop(lane, stream)
        self.monitor.forget(stream)

    def leave(self, lane: Lane, stream: Stream) -> None:
        """Takes a stream out of ``lane``, as a new one."""
        self.drop(lane, stream)
        stream.version = 0

    def move(self, old: Lane, new: Lane, stream: Stream) -> bool:
        """Takes a stream's state over into another lane of its model, if it fits there; returns whether it did.

        It fits when the policies are of one kind and their states of one layout. Otherwise, and when this fails, the
        stream is back at the source.
        """
        moved = False
        try:
            if type(old.policy) is type(new.policy):
                if not self.store.has_lane(old):
                    self.store.add_lane(old, initial_state(old.policy, self.models[old.model]))
                self.store.add_lane(new, initial_state(new.policy, self.models[new.model]))
                moved = self.store.move(old, new, stream)
        finally:
            if not moved:
                self.leave(old, stream)
        return moved

    def _classes(self, lane: Lane) -> int:
        return len(self.models[lane.model].classes)

    def _step(self, lane: Lane, jobs: list[Job], answer: AnswerJob, shed: bool) -> StepStats:
        model = self.models[lane.model]
        started = time.monotonic()
        lease: Lease | None = None
        try:
            try:
                state = State({}, {})
                if not self.store.has_lane(lane):
                    self.store.add_lane(lane, initial_state(lane.policy, model))
                if self.store.has_state(lane):
                    lease, state = self.store.lease(lane, [job.stream for job in jobs])
                sampled = [] if shed else self._sample(lane, jobs)
                shed = shed and lease is not None
                run = PolicyRun(model, lane, jobs, state)
                logits = run.scores()
                served = _Served(run, logits, losses.entropy(logits), logits.softmax(1).amax(1), sampled)
            except Exception as error:
                raise _Unanswered from error
            forward_seconds = time.monotonic() - started
            finite = self._answer(lane, jobs, served, started, forward_seconds, answer, shed)
            adapt_started = time.monotonic()
            if shed:
                run.stop()
                results, signals = ["shed"] * len(jobs), list[dict[str, float]]({} for _ in jobs)
            else:
                results, signals = self._adapt(model, lane, jobs, run, lease, finite)
            adapt_seconds = time.monotonic() - adapt_started
        finally:
            if lease is not None:
                self.store.release(lease)
        shadow_seconds = self._measure(model, lane, jobs, served, signals)
        sizes = run.segments.sizes
        rows = zip(served.entropies, served.confidences, strict=True)
        means = zip(_means(served.entropy, sizes), _means(served.confidence, sizes), strict=True)
        stats = []
        for job, (entropy, confidence), mean, result, own in zip(jobs, rows, means, results, signals, strict=True):
            own["entropy"], own["confidence"] = mean
            self._count(lane, job.stream, own)
            stats.append(JobStats(job.stream, job.rows, started - job.arrived, entropy, confidence, result, own))
        return StepStats(lane, len(model.classes), stats, forward_seconds, adapt_seconds, shadow_seconds)

    def _count(self, lane: Lane, stream: Stream, signals: dict[str, float]) -> None:
        """Takes an answered request into its stream's counters and averages.

        An answer of the plain source model says nothing of how the adapted one does: of that, only drift counts.
        """
        stream.requests += 1
        stream.adapted += not lane.policy.plain
        if stream.id:
            own = lane.policy == stream.policy
            told = {name: value for name, value in signals.items() if math.isfinite(value) and (own or name == DRIFT)}
            self.monitor.update(stream, told)

    def _answer(
        self,
        lane: Lane,
        jobs: list[Job],
        served: _Served,
        started: float,
        seconds: float,
        answer: AnswerJob,
        shed: bool,
    ) -> list[bool]:
        """Answers every job; returns whose scores were finite."""
        sizes = served.run.segments.sizes
        finite = [mean == 1 for mean in _means(served.logits.isfinite().all(1), sizes)]
        parts = (served.logits.split(sizes), served.entropies, served.confidences)
        for job, sound, logits, entropy, confidence in zip(jobs, finite, *parts, strict=True):
            if not sound:
                answer(job, StepFailed("the scores for these inputs are not finite; the stream was left as it was"))
                continue
            averages = self.monitor.read(job.stream)
            answer(
                job,
                Answer(
                    logits=logits,
                    version=job.stream.version,
                    adapted=not lane.policy.plain,
                    policy=lane.policy.name,
                    shed=shed,
                    entropy=entropy,
                    confidence=confidence,
                    drift=averages.get(DRIFT),
                    agreement=averages.get(AGREEMENT),
                    queue_seconds=started - job.arrived,
                    inference_seconds=seconds,
                ),
            )
        return finite

    def _adapt(
        self, model: SourceModel, lane: Lane, jobs: list[Job], run: PolicyRun, lease: Lease | None, finite: list[bool]
    ) -> tuple[list[str], list[dict[str, float]]]:
        """The second half of the policy's step, and its commit: a result and the policy's signals per job.

        When it fails for several streams, each takes its step again by itself: one stream's fault is not the others'.
        """
        try:
            return self._commit(jobs, run.finish(), lease, finite)
        except Exception:  # the answers have left; nothing was committed, the streams stay as they were
            log.exception("adaptation failed", extra={"streams": [job.stream.id for job in jobs]})
        results, signals = ["failed"] * len(jobs), list[dict[str, float]]({} for _ in jobs)
        for index, job in enumerate(jobs if len(jobs) > 1 else ()):
            try:
                part, state = (None, State({}, {})) if lease is None else self.store.part(lease, index)
                alone = PolicyRun(model, lane, [job], state)
                alone.scores()
                (results[index],), (signals[index],) = self._commit([job], alone.finish(), part, [finite[index]])
            except Exception:  # this is the stream whose fault it was
                log.exception("adaptation failed", extra={"stream": job.stream.id})
        return results, signals

    def _commit(
        self, jobs: list[Job], step: Step, lease: Lease | None, finite: list[bool]
    ) -> tuple[list[str], list[dict[str, float]]]:
        signals: list[dict[str, float]] = [{} for _ in jobs]
        for name, values in step.signals.items():
            for own, value in zip(signals, values.tolist(), strict=True):
                own[name] = value
        if lease is None:
            return ["none" if one else "rejected_nonfinite" for one in finite], signals
        kept = self.store.commit(lease, step.state, finite)
        return ["applied" if keep else "rejected_nonfinite" for keep in kept], signals

    def _measure(
        self, model: SourceModel, lane: Lane, jobs: list[Job], served: _Served, signals: list[dict[str, float]]
    ) -> float:
        """Compares a share of each stream's requests with the source model; returns the seconds it took.

        Adds ``bn_distance`` (see ``segment_norm.py``) and, where a policy answered, ``agreement``: the share of rows
        whose served class is the source model's.
        """
        if not served.sampled:
            return 0.0
        started = time.monotonic()
        try:
            sizes = served.run.segments.sizes
            x_parts, served_parts = served.run.x.split(sizes), served.logits.split(sizes)
            segments = Segments([sizes[index] for index in served.sampled], model.network.device)
            watched = Pass(segments, observe=True)
            with torch.no_grad():
                source = model.network.run(
                    watched, torch.cat([x_parts[index] for index in served.sampled])
                ).logits.cpu()
            _add(signals, served.sampled, DRIFT, watched.distances)
            if not lane.policy.plain:
                for index, logits in zip(served.sampled, source.split(segments.sizes), strict=True):
                    same = served_parts[index].argmax(1) == logits.argmax(1)
                    signals[index][AGREEMENT] = same.double().mean().item()
        except Exception:  # measuring must not undo a step that is answered and committed
            log.exception("source shadow failed", extra={"streams": [jobs[one].stream.id for one in served.sampled]})
        return time.monotonic() - started

    def _sample(self, lane: Lane, jobs: list[Job]) -> list[int]:
        """Which jobs' requests are compared with the source: an even share of each named stream's, by who answers."""
        plain = lane.policy.plain
        chosen = []
        for index, job in enumerate(jobs):
            stream = job.stream
            past = stream.requests - stream.adapted if plain else stream.adapted
            if stream.id and math.ceil((past + 1) * self._shadow_ratio) > math.ceil(past * self._shadow_ratio):
                chosen.append(index)
        return chosen


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


def _means(values: Tensor, sizes: list[int]) -> list[float]:
    """The mean of each job's part of ``values [N]``, all at once: a call of torch for each costs more than the sums."""
    starts = np.cumsum([0, *sizes[:-1]])
    means: list[float] = (np.add.reduceat(values.numpy(), starts, dtype=np.float64) / sizes).tolist()
    return means


class _Unanswered(Exception):
    """A step that failed before any of its answers left; the reason is its cause."""


def _add(signals: list[dict[str, float]], jobs: Iterable[int], name: str, layers: list[Tensor]) -> None:
    """Adds a signal, the mean over ``layers`` of ``[jobs]`` each, to these jobs' signals; without layers none."""
    if layers:
        for job, value in zip(jobs, torch.stack(layers).mean(0).tolist(), strict=True):
            signals[job][name] = value
