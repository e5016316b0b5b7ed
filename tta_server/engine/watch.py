"""Measures steps for the monitor: the source shadow of a share of the requests, and the signals of all of them."""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from adapters import losses
from adapters.base import Output, Segments
from tta_server.drift.monitor import Detection, Monitor
from tta_server.drift.signals import Floats, Requests, Scores, Values, bn_distances, of_both, of_served, of_source
from tta_server.engine.norm import Pass
from tta_server.engine.run import PolicyRun
from tta_server.engine.source import SourceModel
from tta_server.types import Event, Job, Lane

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Served:
    """What the first half of a step answers: ``logits [N, C]`` on the CPU, and each row's confidence family."""

    run: PolicyRun
    logits: Tensor

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


class Sources(NamedTuple):
    """The source path of some of a step's jobs."""

    jobs: list[int]
    logits: Floats
    features: Floats


@dataclass
class Measured:
    """What came of it: each job's signals, the monitor's alarms, and the time it took."""

    signals: list[dict[str, float]]
    events: list[Event] = field(default_factory=list)
    shadow_seconds: float = 0.0
    monitor_seconds: float = 0.0
    failed: bool = False


class Watch:
    """Measures for one monitor."""

    def __init__(self, monitor: Monitor, shadow_ratio: float, frozen_ratio: float, enabled: bool) -> None:
        """``shadow_ratio``: share of each adapting stream's requests that also run through the source.
        ``frozen_ratio``: of those that the source is asked for anyway, the share whose batch norms are looked at.
        Unless ``enabled``, nothing is measured but what the step itself tells."""
        self.monitor, self._shadow_ratio, self._frozen_ratio = monitor, shadow_ratio, frozen_ratio
        self._enabled = enabled

    def sample(self, model: SourceModel, lane: Lane, jobs: list[Job], asked: bool) -> list[int]:
        """Which jobs' requests run through the source: an even share of each named stream's, by who answers.

        ``asked``: the step runs the source anyway, so that only its batch norms, if any, are left to be looked at.
        """
        if not self._enabled or (asked and not model.network.keeps_statistics):
            return []
        plain = lane.policy.plain
        ratio = self._frozen_ratio if asked else self._shadow_ratio
        chosen = []
        for index, job in enumerate(jobs):
            stream = job.stream
            past = stream.requests - stream.adapted if plain else stream.adapted
            if stream.id and math.ceil((past + 1) * ratio) > math.ceil(past * ratio):
                chosen.append(index)
        return chosen

    def measure(
        self, model: SourceModel, lane: Lane, jobs: list[Job], served: Served, step: Values, sampled: list[int]
    ) -> Measured:
        """Measures a step that is over, ``step`` being its own signals by name, ``[S]`` each. Raises nothing: measuring
        must not undo what is answered and committed."""
        started = time.monotonic()
        shadow_seconds = 0.0
        values = dict(step)
        measured = Measured([{} for _ in jobs])
        try:
            with np.errstate(all="ignore"):
                if self._enabled:
                    sources = self._shadow(model, served, sampled, values)
                    shadow_seconds = time.monotonic() - started
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
        measured.shadow_seconds = shadow_seconds if sampled else 0.0
        measured.monitor_seconds = time.monotonic() - started - measured.shadow_seconds
        return measured

    def _shadow(self, model: SourceModel, served: Served, sampled: list[int], values: Values) -> Sources | None:
        """Runs the sampled jobs through the source and measures its batch norms. Returns the source path of as many
        jobs as there is one of, without a pass of its own where the policy asked the source anyway."""
        sizes = served.run.segments.sizes
        shadow: Output | None = None
        if sampled:
            parts = served.run.x.split(sizes)
            watched = Pass(Segments([sizes[one] for one in sampled], model.network.device), observe=True)
            with torch.no_grad():
                shadow = model.network.run(watched, torch.cat([parts[one] for one in sampled]))
            observed = model.network.observed(watched)
            if observed is not None:
                for name, distance in bn_distances(*observed).items():
                    values[name] = _spread(distance, sampled, len(sizes))
        if served.run.source is not None:
            return _sources(list(range(len(sizes))), served.run.source)
        return None if shadow is None else _sources(sampled, shadow)

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
        sizes = np.array(served.run.segments.sizes)
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
            found |= of_both(Scores(answers.logits[rows]), scores, some)
        for name, value in found.items():
            values[name] = _spread(value, sources.jobs, len(jobs))

    def _tell(self, model: SourceModel, lane: Lane, jobs: list[Job], served: Served, values: Values) -> list[Detection]:
        """Hands the named streams' signals to the monitor.

        An answer of the plain source to a stream that adapts says nothing of how the adapted one does: of that, only
        the source path counts.
        """
        named = [index for index, job in enumerate(jobs) if job.stream.id]
        streams = [jobs[index].stream for index in named]
        sizes = np.array(served.run.segments.sizes)
        own = np.array([lane.policy == one.policy or not one.adapt for one in streams], np.bool_)
        shares = None
        if self._enabled and model.reference is not None:
            shares = Requests(sizes).shares(served.logits.numpy().argmax(1), served.logits.shape[1])[named]
            shares[~(own & np.isfinite(values["entropy"][named]))] = np.nan
        if not values:
            return []
        told = {
            name: value[named] if name in SOURCE_PATH else np.where(own, value[named], np.nan)
            for name, value in values.items()
        }
        if self._enabled and lane.policy.plain:  # the source agrees with itself
            told |= {"agreement": np.where(own, 1.0, np.nan), "skew_damage": np.where(own, 0.0, np.nan)}
        return self.monitor.update(streams, sizes[named], told, model.reference, shares)


SOURCE_PATH = frozenset(
    {"feature_distance", "source_entropy", "source_energy", "label_skew", "bn_distance", "bn_distance_max"}
    | {f"bn_distance_{third}" for third in ("early", "middle", "late")}
)
"""Signals that do not depend on who answered."""


def _sources(jobs: list[int], output: Output) -> Sources:
    return Sources(jobs, output.logits.float().cpu().numpy(), output.features.float().cpu().numpy())


def _spread(values: Floats, jobs: list[int], count: int) -> Floats:
    """The ``values`` of some jobs at their places among ``count``, NaN at the others'."""
    spread = np.full(count, np.nan)
    spread[jobs] = values
    return spread
