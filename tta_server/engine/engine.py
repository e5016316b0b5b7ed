"""One engine step: lease states, answer every job, then adapt, and keep only what is sound.

Synchronous, without event loop and HTTP, run by one thread. A policy's step is a generator: it runs to its ``yield``,
the answers leave, and only then does the rest of it (loss, backward, optimiser) run. Whatever goes wrong after the
answers leaves every stream at the version it had.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from adapters import losses, rng
from adapters.base import Batch, Output, Policy, Scope, Segments, State, Step
from tta_server.drift.monitor import AGREEMENT, DRIFT, Monitor
from tta_server.engine.norm import Pass
from tta_server.engine.source import SourceModel
from tta_server.errors import StepFailed
from tta_server.state.store import Lease, StateStore
from tta_server.types import Answer, Job, JobStats, Lane, Plan, StepStats, Stream

log = logging.getLogger(__name__)

AnswerJob = Callable[[Job, Answer | StepFailed], None]


@dataclass(frozen=True)
class _Served:
    """What the first half of a step left: the answered rows."""

    segments: Segments
    x: Tensor
    logits: Tensor
    entropy: Tensor
    confidence: Tensor


class Engine:
    """Steps the policies of all models on one device."""

    def __init__(
        self, models: Mapping[str, SourceModel], store: StateStore, monitor: Monitor, shadow_ratio: float
    ) -> None:
        self.models, self.store, self.monitor, self._shadow_ratio = models, store, monitor, shadow_ratio

    def step(self, plan: Plan, answer: AnswerJob) -> StepStats:
        """Runs one plan; ``answer`` is called once per job, before any adaptation.

        When a merged batch fails before its answers, its jobs are tried one by one, so that one bad request takes no
        other with it. Raises nothing a policy or model does: such a job is answered with ``StepFailed``.
        """
        assert plan.lane is not None
        try:
            return self._step(plan.lane, plan.jobs, answer)
        except _Unanswered as failure:
            if len(plan.jobs) == 1:
                log.error("step failed", exc_info=failure.__cause__, extra={"stream": plan.jobs[0].stream.id})
                answer(plan.jobs[0], StepFailed(f"the model or policy failed on this request: {failure.__cause__}"))
                return StepStats(plan.lane, [], 0.0, 0.0, 0.0)
        parts = [self.step(Plan(plan.lane, [job]), answer) for job in plan.jobs]
        return StepStats(
            plan.lane,
            [job for part in parts for job in part.jobs],
            sum(part.forward_seconds for part in parts),
            sum(part.adapt_seconds for part in parts),
            sum(part.shadow_seconds for part in parts),
        )

    def reset(self, stream: Stream) -> None:
        """Takes the stream back to the source: state, version and signals."""
        self.store.reset(Lane(stream.model, stream.policy), stream)
        self.monitor.forget(stream)

    def drop(self, stream: Stream) -> None:
        """Forgets a stream."""
        self.store.drop(Lane(stream.model, stream.policy), stream)
        self.monitor.forget(stream)

    def _step(self, lane: Lane, jobs: list[Job], answer: AnswerJob) -> StepStats:
        model = self.models[lane.model]
        started = time.monotonic()
        lease: Lease | None = None
        try:
            try:
                segments = Segments([job.rows for job in jobs], model.network.device)
                x = torch.cat([job.x for job in jobs if job.x is not None]).to(
                    model.network.device, model.network.dtype
                )
                state = State({}, {})
                if not self.store.has_lane(lane):
                    self.store.add_lane(lane, initial_state(lane.policy, model))
                if self.store.has_state(lane):
                    lease, state = self.store.lease(lane, [job.stream for job in jobs])
                running = lane.policy.step(model.source, state, self._batch(model, lane.policy, jobs, segments, x))
                served = _serve(segments, x, next(running))
            except Exception as error:
                raise _Unanswered from error
            forward_seconds = time.monotonic() - started
            finite = self._answer(lane, jobs, served, started, forward_seconds, answer)
            adapt_started = time.monotonic()
            results, signals = self._adapt(jobs, running, lease, finite)
            adapt_seconds = time.monotonic() - adapt_started
        finally:
            if lease is not None:
                self.store.release(lease)
        shadow_seconds = self._shadow(model, lane, jobs, served, signals)
        stats = []
        for job, rows, entropy, confidence, result, own in zip(
            jobs, segments.sizes, served.entropy.split(segments.sizes), served.confidence.split(segments.sizes),
            results, signals, strict=True,
        ):  # fmt: skip
            job.stream.requests += 1
            own |= {"entropy": entropy.mean().item(), "confidence": confidence.mean().item()}
            if job.stream.id:
                self.monitor.update(job.stream, {name: value for name, value in own.items() if math.isfinite(value)})
            stats.append(JobStats(job.stream, rows, started - job.arrived, entropy, confidence, result, own))
        return StepStats(lane, stats, forward_seconds, adapt_seconds, shadow_seconds)

    def _batch(self, model: SourceModel, policy: Policy, jobs: list[Job], segments: Segments, x: Tensor) -> Batch:
        keys = torch.tensor([job.stream.random_key for job in jobs], device=x.device)
        steps = torch.tensor([job.stream.version for job in jobs], device=x.device)
        return Batch(x, segments, partial(_forward, model, segments, policy), rng.Uniform(keys, steps, x.dtype))

    def _answer(
        self, lane: Lane, jobs: list[Job], served: _Served, started: float, seconds: float, answer: AnswerJob
    ) -> list[bool]:
        """Answers every job; returns whose scores were finite."""
        finite = []
        parts = (one.split(served.segments.sizes) for one in (served.logits, served.entropy, served.confidence))
        for job, logits, entropy, confidence in zip(jobs, *parts, strict=True):
            finite.append(bool(logits.isfinite().all()))
            if not finite[-1]:
                answer(job, StepFailed("the scores for these inputs are not finite; the stream was left as it was"))
                continue
            averages = self.monitor.read(job.stream)
            answer(
                job,
                Answer(
                    logits=logits,
                    version=job.stream.version,
                    adapted=lane.policy.scope is not Scope.NONE,
                    policy=lane.policy.name,
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
        self, jobs: list[Job], running: Generator[Tensor, None, Step], lease: Lease | None, finite: list[bool]
    ) -> tuple[list[str], list[dict[str, float]]]:
        """The second half of the policy's step, and its commit: a result and the policy's signals per job."""
        signals: list[dict[str, float]] = [{} for _ in jobs]
        try:
            step = _finish(running)
            kept = [False] * len(jobs)
            if lease is not None:
                kept = self.store.commit(lease, step.state)
        except Exception:  # the answers have left; nothing was committed, the streams stay as they were
            log.exception("adaptation failed", extra={"streams": [job.stream.id for job in jobs]})
            return ["failed"] * len(jobs), signals
        for name, values in step.signals.items():
            for own, value in zip(signals, values.tolist(), strict=True):
                own[name] = value
        if lease is None:
            return ["none" if one else "rejected_nonfinite" for one in finite], signals
        return ["applied" if keep else "rejected_nonfinite" for keep in kept], signals

    def _shadow(
        self, model: SourceModel, lane: Lane, jobs: list[Job], served: _Served, signals: list[dict[str, float]]
    ) -> float:
        """Runs a share of each adapting stream's requests through the source model; returns the seconds it took.

        Adds ``bn_distance`` (see ``drift/monitor.py``) and ``agreement``, the share of rows whose served and source
        classes agree.
        """
        if lane.policy.scope is Scope.NONE:
            return 0.0
        chosen = [index for index, job in enumerate(jobs) if _is_sampled(job.stream.requests, self._shadow_ratio)]
        if not chosen:
            return 0.0
        started = time.monotonic()
        try:
            x_parts, served_parts = served.x.split(served.segments.sizes), served.logits.split(served.segments.sizes)
            segments = Segments([served.segments.sizes[index] for index in chosen], served.x.device)
            observed = Pass(segments, observe=True)
            with torch.no_grad():
                source = model.network.run(observed, torch.cat([x_parts[index] for index in chosen])).logits.cpu()
            distance = torch.stack(observed.distances).mean(0).tolist() if observed.distances else None
            for place, (index, logits) in enumerate(zip(chosen, source.split(segments.sizes), strict=True)):
                same = served_parts[index].argmax(1) == logits.argmax(1)
                signals[index][AGREEMENT] = same.double().mean().item()
                if distance is not None:
                    signals[index][DRIFT] = distance[place]
        except Exception:  # measuring must not undo a step that is answered and committed
            log.exception("source shadow failed", extra={"streams": [jobs[index].stream.id for index in chosen]})
        return time.monotonic() - started


def initial_state(policy: Policy, model: SourceModel) -> State:
    """What a new stream of this policy starts from. Raises ``ValueError`` when the policy cannot run on this model."""
    if policy.scope is Scope.ALL:
        raise ValueError(f"{policy.name} adapts all weights, which this server does not offer yet")
    missing = policy.needs - model.source.artefacts.keys()
    if missing:
        raise ValueError(
            f"{policy.name} needs {', '.join(sorted(missing))} of the source, which this model does not have"
        )
    return policy.init(model.source)


class _Unanswered(Exception):
    """A step that failed before any of its answers left; the reason is its cause."""


def _forward(
    model: SourceModel, segments: Segments, policy: Policy, weights: Mapping[str, Tensor], x: Tensor
) -> Output:
    return model.network.run(Pass(segments, weights, policy.norm), x)


def _serve(segments: Segments, x: Tensor, logits: Tensor) -> _Served:
    scores = logits.detach().to("cpu", torch.promote_types(logits.dtype, torch.float32))
    return _Served(segments, x, scores, losses.entropy(scores), scores.softmax(1).amax(1))


def _finish(running: Generator[Tensor, None, Step]) -> Step:
    try:
        next(running)
    except StopIteration as end:
        step: Step = end.value
        return step
    raise RuntimeError("the policy yielded a second time; a step yields its logits once")


def _is_sampled(request: int, ratio: float) -> bool:
    """Whether the stream's ``request``-th request (from 0) is among the evenly spread ``ratio`` of them."""
    return math.ceil((request + 1) * ratio) > math.ceil(request * ratio)
