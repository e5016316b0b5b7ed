"""The records that travel between the layers: stream, job, plan, answer, statistics of a step."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from adapters import Policy
from adapters.base import Scope
from tta_server.settings import Consistency, Durability
from tta_server.trust.conformal import Sets
from tta_server.trust.guard import Guard

_job_numbers = itertools.count(1)


class Lane(NamedTuple):
    """One source under one policy setting: the unit inside which streams can share a batch."""

    model: str
    policy: Policy
    digest: str = ""
    """The source's. After a model was replaced by another under its name, the states of both are kept apart by it."""

    @property
    def merges(self) -> bool:
        """Whether streams gain by sharing a step. With networks of their own they run one by one all the same."""
        return self.policy.scope is not Scope.ALL


class Saved(NamedTuple):
    """How far a stream is in the store."""

    revision: int
    state_revision: int
    version: int
    requests: int
    time: float
    """When it was written, Unix time, seconds."""


DEFAULT_DURABILITY = Durability()
DEFAULT_CONSISTENCY = Consistency()
NOT_STORED = Durability(mode="none")
NEVER_SAVED = Saved(0, 0, 0, 0, 0.0)


@dataclass(eq=False, slots=True)
class Stream:
    """One client's ordered sequence of requests.

    Compared by identity: a stream that was deleted and one later opened under the same ``id`` are two. The service
    changes ``policy``, ``digest``, ``adapt``, ``durability``, ``consistency``, ``state_bytes`` and ``last_seen``, and
    the keeper ``saved``. ``version`` (number of committed steps since the start or the last reset), ``requests``
    (answered so far), ``adapted`` (how many of these by its policy, not the plain source model), ``failures`` (steps
    that were not kept) and all else are changed by the device thread alone.
    """

    id: str
    model: str
    policy: Policy
    random_key: int
    created: float
    """Unix time, seconds."""
    digest: str = ""
    """Of the source that its state belongs to."""
    tenant: str = ""
    """Whose it is."""
    adapt: bool = True
    durability: Durability = DEFAULT_DURABILITY
    consistency: Consistency = DEFAULT_CONSISTENCY
    state_bytes: int = 0
    """Of its state, which it has from its first step on."""
    last_seen: float = 0.0
    version: int = 0
    requests: int = 0
    adapted: int = 0
    failures: int = 0
    last_number: int | None = None
    """Newest request number that was answered."""
    revision: int = 1
    """Number of changes of the stream, its creation, resets, rollbacks and changes of settings included. Unlike the
    version it never goes back."""
    state_revision: int = 1
    """The revision of the last change of its state."""
    saved: Saved = NEVER_SAVED
    lost: int = 0
    """Changes that a crash, or damage to the store, cost it and that no answer told of yet."""
    removed: bool = False
    """From the store: nothing brings it back there."""
    guard: Guard | None = None
    """``None`` or not enabled: it is served as its policy has it, whatever comes of it."""

    @property
    def unsaved(self) -> int:
        """Changes that a crash now would cost."""
        return self.revision - self.saved.revision

    @property
    def guarded(self) -> Guard | None:
        """Its guard, if it has one that is enabled, and a policy that needs one."""
        guard = self.guard
        return guard if guard is not None and guard.settings.enabled and not self.policy.plain else None

    @property
    def lane(self) -> Lane:
        """Where its next request goes while it adapts."""
        return Lane(self.model, self.policy, self.digest)


class Standing(NamedTuple):
    """How a stream's guard stands, see ``trust/guard.py``."""

    state: str
    evidence: str
    benefit: float | None
    """Accuracy that the adapted model is estimated to have over the source's; ``None`` before it was."""


@dataclass(eq=False, slots=True)
class Comparison:
    """What the two models took an answer's rows for, ``[N]`` each. Without one before the answer it may come after it,
    or never."""

    adapted: NDArray[np.int32] | None = None
    source: NDArray[np.int32] | None = None
    resets: int = 0
    """How many the stream's guard had seen before the answer."""
    rows: int = 0
    """Likewise, rows."""
    first_row: int = 0
    """Number of the first row to the stream's guarantee."""
    count: object = None
    """The guard's ``count`` that these rows are in."""
    asked: NDArray[np.bool_] | None = None
    """Rows whose label the guarantee wants to know; ``None`` for none."""
    sets: Sets | None = None
    """The rows' prediction sets, where the stream wants them. Filled in on the event loop."""


@dataclass(frozen=True)
class Answer:
    """What one request gets back. Tensors are on the CPU."""

    logits: Tensor
    """``[N, C]``, the scores as served."""
    version: int
    """The stream's version these scores were computed with."""
    adapted: bool
    """Whether the stream's policy answered, not the plain source model."""
    policy: str
    shed: bool
    """Whether the step ends here, since the server is under pressure: nothing is learned from this request."""
    entropy: Tensor
    """``[N]``, nats, of the served softmax."""
    confidence: Tensor
    """``[N]``, largest served probability."""
    margin: Tensor
    """``[N]``, largest less second largest served probability."""
    drift: float | None
    """The stream's drift score so far, see ``drift/monitor.py``; ``None`` before it was measured."""
    verdict: str
    """The stream so far in words, see ``drift/monitor.py``."""
    agreement: float | None
    """Share of sampled rows so far on which served and source class agree; ``None`` before it was measured."""
    queue_seconds: float
    inference_seconds: float
    """From the start of the step that answered to the scores being there."""
    unsaved: int | None = None
    """Changes of the stream, up to this version, that a crash would have cost when the answer left; ``None`` where it
    is not stored."""
    lost: int = 0
    """Changes that the stream lost, told for the first time."""
    behind: int = 0
    """Steps on earlier requests that this version does not have yet, see ``Consistency``."""
    request: str = ""
    """Id of the request that it was first given to."""
    served: str = "adapted"
    """Whose scores these are: ``adapted``, ``source``, or ``mixed`` where the guard let some rows through only."""
    guard: Standing | None = None
    """How the stream's guard stood; ``None`` without one."""
    comparison: Comparison = field(default_factory=Comparison)


class Origin(NamedTuple):
    """Where a request came from, to find it again in logs and traces."""

    request: str = ""
    """Its id."""
    trace: str = ""
    """The span of the HTTP request, as a W3C ``traceparent``; empty without tracing."""


NOWHERE = Origin()


def head_start(priority: int) -> float:
    """Seconds that a request of this priority gains over one of the default, 2; 0 stands for that.

    Priority 1 goes ahead of what came up to a second earlier, 3 behind what comes up to a second later, and so on up to
    10. So nothing waits forever, whatever the others ask for.
    """
    return 2.0 - min(priority, 10) if priority else 0.0


@dataclass(eq=False)
class Job:
    """One request of one stream: ``x [N, ...]`` to answer in ``lane``, or, without a lane, a ``command`` to run.

    Commands (reset, drop) queue like requests, so that they take their place in the stream's order.
    ``deadline`` and ``arrived`` are seconds on the scheduler's clock. ``done`` is called exactly once, by whichever
    thread knows first, with the answer or the error.
    """

    stream: Stream
    done: Callable[[Answer | None, Exception | None], None]
    lane: Lane | None = None
    x: Tensor | None = None
    command: Callable[[], None] | None = None
    deadline: float = float("inf")
    arrived: float = 0.0
    head_start: float = 0.0
    """Seconds by which it goes ahead of other streams' requests, see :func:`head_start`."""
    origin: Origin = NOWHERE
    request_number: int | None = None
    """The client's, for retries."""
    behind: int = 0
    """Steps of its stream that were not committed yet when its turn came."""
    number: int = field(default_factory=lambda: next(_job_numbers))

    @property
    def rank(self) -> tuple[float, int]:
        """The lowest goes first."""
        return self.arrived - self.head_start, self.number

    @property
    def rows(self) -> int:
        return 0 if self.x is None else len(self.x)


@dataclass(frozen=True)
class Plan:
    """The jobs of one engine step: all of one lane, each of another stream; or a single command."""

    lane: Lane | None
    jobs: list[Job]
    shed: bool = False
    """Under pressure: the step ends with its answers, and nothing is learned."""
    behind: bool = False
    """These streams have steps that are not committed yet: they are answered from the last committed one."""


@dataclass(frozen=True)
class JobStats:
    """How one job of a step went. Row-wise values are tensors ``[N]`` on the CPU."""

    stream: Stream
    rows: int
    queue_seconds: float
    entropy: Tensor
    confidence: Tensor
    margin: Tensor
    result: str
    """``applied``, ``rejected_nonfinite``, ``rejected_update`` or ``rejected_distance`` (outside the trust region),
    ``failed``, ``vetoed`` by the guard, ``shed``, or ``none`` where the lane keeps no state."""
    signals: dict[str, float] = field(default_factory=dict)
    """Those that were measured: of ``drift/signals.py``, and the policy's own."""
    origin: Origin = NOWHERE
    served: str = "adapted"
    """Whose answer it got, see :class:`Answer`."""
    behind: int = 0
    """Likewise."""


EVENTS = (
    "opened", "closed", "expired", "changed", "reset", "rolled_back", "marked", "imported", "evicted", "lost",
    "damaged", "departure", "change", "rejected", "failed", "guard",
)  # fmt: skip
"""Kinds: ``expired`` is closed for want of requests, ``changed`` is of toggle, settings, policy or durability,
``imported`` also of a fork, ``evicted`` the state's way to the disk for want of requests, ``lost`` of changes that were
not saved when the server crashed, ``damaged`` of a stored state that is not what was written, ``departure`` and
``change`` are alarms of the monitor, ``rejected`` and ``failed`` steps that were not kept."""


@dataclass(frozen=True)
class Event:
    """Something that happened to a stream and that somebody may want to know of."""

    kind: str
    """One of ``EVENTS``."""
    stream: Stream
    fields: dict[str, Any] = field(default_factory=dict)
    """More to say: values for JSON."""
    origin: Origin = NOWHERE
    """The request in whose step it happened."""
    time: float = field(default_factory=time.time)
    """Unix time, seconds."""


@dataclass(frozen=True)
class StepStats:
    """What one engine step did, for the recorder. Durations in seconds; a phase that did not run is 0."""

    lane: Lane
    classes: int
    """Of the model."""
    jobs: list[JobStats]
    forward_seconds: float
    adapt_seconds: float
    shadow_seconds: float
    monitor_seconds: float = 0.0
    ended: float = 0.0
    """Unix time, seconds, after the last phase; they follow one another in the order of the fields."""
    events: list[Event] = field(default_factory=list)
    monitor_failed: bool = False
    """Whether measuring went wrong, which costs the step nothing."""
    deferred_seconds: float = 0.0
    """Since the answers had left, while other streams were answered."""


@dataclass(slots=True)
class Call:
    """How one HTTP request went, for the recorder; filled in on its way. Durations in seconds."""

    model: str = ""
    """Empty where it concerns none."""
    predicts: bool = False
    route: str = ""
    """The path's template."""
    code: int = 500
    seconds: float = 0.0
    """From its arrival to the last byte of the answer."""
    decode_seconds: float = 0.0
    encode_seconds: float = 0.0
    endless: bool = False
    """A stream of events, which lasts as long as its client likes."""
    origin: Origin = NOWHERE
