"""Measures steps for the monitor: the source shadow of a share of the requests, and the signals of all of them."""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adapters import losses
from adapters.base import Output, Scope, Segments
from tta_server.drift.benefit import REFEREE, UNPREPARED
from tta_server.drift.estimators import Head
from tta_server.drift.monitor import Detection, Monitor
from tta_server.drift.signals import Floats, Requests, Scores, Values, bn_distances, of_both, of_served, of_source
from tta_server.engine.norm import Pass
from tta_server.engine.run import PolicyRun
from tta_server.engine.source import SourceModel
from tta_server.types import Event, Job, Lane

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Served:
    """What the first half of a step answers: ``logits [N, C]`` on the CPU, and each row's confidence family.

    ``adapted [N, C]`` is what the policy made of the rows, and stays as it is where others are served in its place.
    """

    run: PolicyRun
    adapted: Tensor
    logits: Tensor

    @staticmethod
    def of(run: PolicyRun, scores: Tensor) -> Served:
        """As the policy would have it."""
        return Served(run, scores, scores)

    @cached_property
    def sizes(self) -> NDArray[np.int64]:
        """Rows of each job, ``[S]``."""
        return np.array(self.run.segments.sizes)

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """Where each job's rows begin, ``[S]``."""
        return np.cumsum(self.sizes) - self.sizes

    @cached_property
    def classes(self) -> NDArray[np.int64]:
        """What the policy takes the rows for, ``[N]``."""
        likeliest: NDArray[np.int64] = self.adapted.numpy().argmax(1)
        return likeliest

    @cached_property
    def own(self) -> Floats:
        """Scores of the policy's network before anything is made of them, ``[N, C]``, see ``PolicyRun.own``; of a
        policy that leaves the network as it is, what it makes of them."""
        own = self.run.own
        if own is None or self.run.policy.scope is Scope.NONE:
            return self.adapted.numpy()
        scores: Floats = own.logits.float().cpu().numpy()
        return scores

    @cached_property
    def features(self) -> Floats:
        """What entered the head of that network, ``[N, D]``; the scores, where no pass over the rows was seen."""
        values: Floats = self.adapted.numpy() if self.run.own is None else self.run.own.features.float().cpu().numpy()
        return values

    def replace(self, part: slice, source: Tensor, rows: Tensor) -> None:
        """Serves ``source [n, C]`` for those ``rows [n]`` (bool) of ``part``."""
        if self.logits is self.adapted:
            object.__setattr__(self, "logits", self.adapted.clone())
        own = self.logits[part]
        own[rows] = source[rows].to(own.dtype)

    @cached_property
    def entropy(self) -> Tensor:
        """``[N]``, nats."""
        return losses.entropy(self.logits)

    @cached_property
    def confidence(self) -> Tensor:
        """``[N]``, the largest probability."""
        return self._best[0]

    @cached_property
    def margin(self) -> Tensor:
        """``[N]``, the largest less the second largest probability."""
        return self._best[0] - self._best[1] if len(self._best) > 1 else self._best[0]

    @cached_property
    def _best(self) -> Tensor:
        return self.logits.softmax(1).topk(min(2, self.logits.shape[1])).values.T.contiguous()


@dataclass(frozen=True)
class Sources:
    """The source path of some of a step's jobs: ``jobs`` in order, their rows' scores and features one after the
    other, ``sizes`` rows of each. ``referee``: by job, the classes of the benefit's referee, where it was asked."""

    jobs: list[int]
    logits: Floats
    features: Floats
    sizes: NDArray[np.int64]
    referee: dict[int, NDArray[np.int64]] = field(default_factory=dict)

    def scores(self, place: int) -> Floats:
        """Of the job at this place, ``[n, C]``."""
        end = int(self.sizes[: place + 1].sum())
        return self.logits[end - int(self.sizes[place]) : end]

    def classes(self, place: int) -> NDArray[np.int64]:
        """Of the job at this place, ``[n]``."""
        likeliest: NDArray[np.int64] = self.scores(place).argmax(1)
        return likeliest

    def joined(self, other: Sources) -> Sources:
        """With those of other jobs, in order."""
        parts: dict[int, tuple[Floats, Floats]] = {}
        for one in (self, other):
            ends = np.cumsum(one.sizes)[:-1]
            rows = zip(np.split(one.logits, ends), np.split(one.features, ends), strict=True)
            parts |= dict(zip(one.jobs, rows, strict=True))
        jobs = sorted(parts)
        logits, features = zip(*(parts[job] for job in jobs), strict=True)
        sizes = np.array([len(one) for one in logits])
        return Sources(jobs, np.concatenate(logits), np.concatenate(features), sizes, {**self.referee, **other.referee})


@dataclass
class Measured:
    """What came of it: each job's signals, the monitor's alarms, and the time it took."""

    signals: list[dict[str, float]]
    events: list[Event] = field(default_factory=list)
    monitor_seconds: float = 0.0
    failed: bool = False


class Watch:
    """Measures for one monitor."""

    def __init__(
        self, monitor: Monitor, shadow_ratio: float, frozen_ratio: float, enabled: bool, estimate_every: int
    ) -> None:
        """``shadow_ratio``: share of each adapting stream's requests that also run through the source.
        ``frozen_ratio``: of those that the source is asked for anyway, the share whose batch norms are looked at.
        ``estimate_every``: accuracy is estimated on every so many-th request of a stream, where the source is asked,
        too; 0 for none. Unless ``enabled``, nothing is measured but what the step itself tells."""
        self.monitor, self._shadow_ratio, self._frozen_ratio = monitor, shadow_ratio, frozen_ratio
        self._enabled, self._estimate_every = enabled, estimate_every

    def sample(self, model: SourceModel, lane: Lane, jobs: list[Job], asked: bool) -> list[int]:
        """Which jobs' requests run through the source, their batch norms looked at: an even share of each named
        stream's, by who answers.

        ``asked``: the step runs the source anyway, so that only its batch norms, if any, are left to be looked at.
        """
        if not self._enabled or (asked and not model.network.keeps_statistics):
            return []
        ratio = self._frozen_ratio if asked else self._shadow_ratio
        return [index for index, job in enumerate(jobs) if job.stream.id and _is_due(job, lane, ratio)]

    def compared(self, lane: Lane, jobs: list[Job]) -> list[int]:
        """Which jobs' guards are to hear of the source after the answer, if not before: an even share of each
        stream's."""
        if lane.policy.plain:
            return []
        return [
            index
            for index, job in enumerate(jobs)
            if job.stream.guarded is not None and _is_due(job, lane, max(self._shadow_ratio, LEAST_COMPARED))
        ]

    def ask(
        self,
        model: SourceModel,
        served: Served,
        some: list[int],
        observed: list[int],
        guarded: list[int],
        values: Values,
    ) -> Sources | None:
        """The source path of the jobs ``some``, and of all where the policy asked the source anyway; ``None`` for none.
        Of those ``observed``, measures the batch norms, too, into ``values``; of those ``guarded``, asks the referee.
        """
        sizes = served.sizes
        plain = [index for index in some if index not in observed] if served.run.source is None else []
        sources = None if served.run.source is None else _sources(list(range(len(sizes))), served.run.source, sizes)
        for chosen, observe in ((observed, True), (plain, False)):
            if not chosen:
                continue
            parts = served.run.x.split(served.run.segments.sizes)
            watched = Pass(Segments(sizes[chosen].tolist(), model.network.device), observe=observe)
            with torch.no_grad():
                output = model.network.run(watched, torch.cat([parts[one] for one in chosen]))
            found = model.network.observed(watched)
            if found is not None:
                for name, distance in bn_distances(*found).items():
                    column = values.setdefault(name, np.full(len(sizes), np.nan))
                    column[chosen] = distance
            if served.run.source is None:
                own = _sources(chosen, output, sizes[chosen])
                sources = own if sources is None else sources.joined(own)
        if guarded and sources is not None:
            sources.referee.update(self._referee(model, served, guarded))
        return sources

    def _referee(self, model: SourceModel, served: Served, guarded: list[int]) -> dict[int, NDArray[np.int64]]:
        """The referee's classes of these jobs' rows; of no meaning to a judge that does not look at them."""
        sizes = served.sizes[guarded]
        if model.judge is UNPREPARED:
            return {job: np.full(size, -1) for job, size in zip(guarded, sizes.tolist(), strict=True)}
        parts = served.run.x.split(served.run.segments.sizes)
        half_way = Pass(Segments(sizes.tolist(), model.network.device), {}, REFEREE)
        with torch.no_grad():
            classes = model.network.run(half_way, torch.cat([parts[one] for one in guarded])).logits.argmax(1)
        return dict(zip(guarded, np.split(classes.cpu().numpy(), np.cumsum(sizes)[:-1]), strict=True))

    def measure(
        self,
        model: SourceModel,
        lane: Lane,
        jobs: list[Job],
        served: Served,
        step: Values,
        sources: Sources | None,
        failed: bool,
    ) -> Measured:
        """Measures a step that is over, ``step`` being its own signals by name, ``[S]`` each. Raises nothing: measuring
        must not undo what is answered and committed. ``failed``: whether something went wrong already."""
        started = time.monotonic()
        values = dict(step)
        measured = Measured([{} for _ in jobs], failed=failed)
        try:
            with np.errstate(all="ignore"):
                if self._enabled:
                    self._compare(model, lane, jobs, served, sources, values)
                origins = {job.stream: job.origin for job in jobs}
                measured.events = [
                    Event(
                        found.kind, found.stream, {"signal": found.signal, "drift": found.drift}, origins[found.stream]
                    )
                    for found in self._tell(model, lane, jobs, served, values)
                ]
        except Exception:  # whatever it is: the step is over, and stands
            about = {"streams": [job.stream.id for job in jobs], "requests": [job.origin.request for job in jobs]}
            log.exception("monitoring failed", extra=about)
            measured.failed = True
        for name, column in values.items():
            for own, value in zip(measured.signals, column.tolist(), strict=True):
                if math.isfinite(value):
                    own[name] = value
        measured.monitor_seconds = time.monotonic() - started
        return measured

    def _compare(
        self,
        model: SourceModel,
        lane: Lane,
        jobs: list[Job],
        served: Served,
        sources: Sources | None,
        values: Values,
    ) -> None:
        """Adds the signals of the served path, of the source path and of both."""
        sizes = served.sizes
        answers, everybody = Scores(served.logits.numpy()), Requests(sizes)
        values |= of_served(answers, served.confidence.numpy(), served.margin.numpy(), everybody)
        if sources is None:
            return
        some = Requests(sizes[sources.jobs])
        # Where the source answered, its scores are the answers.
        scores = answers if lane.policy.plain and len(sources.jobs) == len(jobs) else Scores(sources.logits)
        clean = None if model.reference is None else model.reference.features
        found = of_source(scores, sources.features, clean, some)
        if not lane.policy.plain:
            rows = np.repeat(np.isin(np.arange(len(jobs)), sources.jobs), sizes)
            found |= of_both(Scores(served.adapted.numpy()[rows]), scores, some)
        for name, value in found.items():
            values[name] = _spread(value, sources.jobs, len(jobs))
        self._estimate(model, lane, jobs, served, sources, values)

    def _estimate(
        self, model: SourceModel, lane: Lane, jobs: list[Job], served: Served, sources: Sources, values: Values
    ) -> None:
        """Adds the accuracy, as estimated without labels, of both models on every few of the compared requests."""
        estimates, head = model.estimates, model.linear_head
        if estimates is None or not self._estimate_every:
            return
        chosen = [
            place
            for place, job in enumerate(sources.jobs)
            if jobs[job].stream.id and (jobs[job].stream.requests - 1) % self._estimate_every == 0
        ]
        if not chosen:
            return
        ends = np.cumsum(sources.sizes)
        rows = np.concatenate([np.arange(ends[one] - sources.sizes[one], ends[one]) for one in chosen])
        places, requests = [sources.jobs[one] for one in chosen], Requests(sources.sizes[chosen])
        plain = estimates.estimate(sources.logits[rows], sources.features[rows], head, requests, adapted=False)
        values["source_accuracy_atc"] = _spread(plain.atc, places, len(jobs))
        values["source_accuracy_pdd"] = _spread(plain.pdd, places, len(jobs))
        own = served.run.own
        if lane.policy.plain or own is None:
            return
        mine = np.concatenate([np.arange(served.starts[one], served.starts[one] + served.sizes[one]) for one in places])
        weight, bias = (served.run.head.get(kind) for kind in ("weight", "bias"))
        if weight is not None:
            parts = (None if one is None else one[places].float().cpu().numpy() for one in (weight, bias))
            head = Head(*parts)  # type: ignore[arg-type]  # the first is there
        adapted = estimates.estimate(served.own[mine], served.features[mine], head, requests, adapted=True)
        values["accuracy_atc"] = _spread(adapted.atc, places, len(jobs))
        values["accuracy_pdd"] = _spread(adapted.pdd, places, len(jobs))
        values["estimator_disagreement"] = _spread(adapted.disagreement, places, len(jobs))

    def _tell(self, model: SourceModel, lane: Lane, jobs: list[Job], served: Served, values: Values) -> list[Detection]:
        """Hands the named streams' signals to the monitor.

        An answer of the plain source to a stream that adapts says nothing of how the adapted one does: of that, only
        the source path counts.
        """
        named = [index for index, job in enumerate(jobs) if job.stream.id]
        streams = [jobs[index].stream for index in named]
        sizes = served.sizes
        own = np.array([lane.policy == one.policy or not one.adapt for one in streams], np.bool_)
        shares = None
        if self._enabled and model.reference is not None:
            shares = Requests(sizes).shares(served.logits.numpy().argmax(1), served.logits.shape[1])[named]
            shares[~(own & np.isfinite(values["entropy"][named]))] = np.nan
        if not values:
            return []
        told = {
            name: value[named] if name in SOURCE_PATH | ESTIMATED else np.where(own, value[named], np.nan)
            for name, value in values.items()
        }
        if self._enabled and lane.policy.plain:  # the source agrees with itself
            told |= {"agreement": np.where(own, 1.0, np.nan), "skew_damage": np.where(own, 0.0, np.nan)}
        return self.monitor.update(streams, sizes[named], told, model.reference, shares)


LEAST_COMPARED = 0.05
"""Share of a guarded stream's requests that is compared with the source, whatever the monitor's."""
SOURCE_PATH = frozenset(
    {"feature_distance", "source_entropy", "source_energy", "label_skew", "bn_distance", "bn_distance_max"}
    | {f"bn_distance_{third}" for third in ("early", "middle", "late")}
)
"""Signals that do not depend on who answered, measured of all requests that the source is asked for."""
ESTIMATED = frozenset({"source_accuracy_atc", "source_accuracy_pdd"})
"""Neither do these, estimated on every few of them."""


def _is_due(job: Job, lane: Lane, ratio: float) -> bool:
    """Whether this request is among the share of its stream's that is looked at, by who answers."""
    stream = job.stream
    past = stream.requests - stream.adapted if lane.policy.plain else stream.adapted
    return math.ceil((past + 1) * ratio) > math.ceil(past * ratio)


def _sources(jobs: list[int], output: Output, sizes: NDArray[np.int64]) -> Sources:
    return Sources(jobs, output.logits.float().cpu().numpy(), output.features.float().cpu().numpy(), sizes)


def _spread(values: Floats, jobs: list[int], count: int) -> Floats:
    """The ``values`` of some jobs at their places among ``count``, NaN at the others'."""
    spread = np.full(count, np.nan)
    spread[jobs] = values
    return spread
