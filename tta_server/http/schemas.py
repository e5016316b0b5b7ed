"""What goes over the wire of ``/v1`` as JSON objects, and how it is documented in OpenAPI."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Annotated, Any, Literal, get_args

import numpy as np
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
    model_validator,
)

from tta_server.drift.monitor import Verdict
from tta_server.drift.signals import SIGNALS
from tta_server.errors import BadInput
from tta_server.http.values import softmax
from tta_server.policies import settings_of
from tta_server.report_card import PolicyCard
from tta_server.settings import Consistency, Durability, InputSettings
from tta_server.state.keeper import Tally
from tta_server.state.records import Shutdown, Snapshot
from tta_server.tenant import Tenant
from tta_server.trust.guarantees import Audit
from tta_server.trust.guard import Guard, State
from tta_server.trust.labels import Figures
from tta_server.types import Answer, Stream

MOST_MEMBERS = 256
"""Most members of an object in a request, where each of them may be wrong and would then be told."""


LONGEST_NAME = 128
"""Most characters of a name in a request, which an error would repeat."""


def _bounded(given: Any) -> Any:
    if isinstance(given, dict) and len(given) > MOST_MEMBERS:
        raise BadInput(f"an object in the request has {len(given)} members; it may have up to {MOST_MEMBERS}")
    if isinstance(given, dict) and max(map(len, given), default=0) > LONGEST_NAME:
        raise BadInput(f"an object in the request has a member with a name of over {LONGEST_NAME} characters")
    return given


Bounded = BeforeValidator(_bounded)
Name = Annotated[str, Field(max_length=LONGEST_NAME)]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _check_size(cls, given: Any) -> Any:
        return _bounded(given)


class Problem(BaseModel):
    """Any error."""

    error: str


Mode = Literal["none", "async", "sync"]
MODES: tuple[str, ...] = get_args(Mode)


class DurabilityChange(_Request):
    """How a stream is to be stored, see the setting `state.durability`. What is left out is as the stream has it, or a
    new one from the config."""

    mode: Mode = Field(
        description="none: not at all; async: a crash costs the last steps; sync: answers wait until the step before "
        "them is stored."
    )
    steps: int | None = Field(default=None, gt=0, description="Of async: the most steps that a crash costs.")
    seconds: float | None = Field(default=None, gt=0, description="Of async: a step is stored after so long.")


def _by_mode(given: Any) -> Any:
    return {"mode": given} if isinstance(given, str) else given


# One schema instead of a union of types, which would tell of a value what is wrong with it as each of them.
DurabilityWanted = Annotated[
    DurabilityChange | None,
    BeforeValidator(_by_mode),
    WithJsonSchema({"anyOf": [{"enum": list(MODES)}, DurabilityChange.model_json_schema(), {"type": "null"}]}),
]


class ConsistencyChange(_Request):
    """Whether a request waits for the steps on those before it, see the setting `streams.consistency`. What is left out
    is as the stream has it, or a new one from the config."""

    mode: Literal["strict", "stale"] = Field(
        description="strict: it waits; stale: it is answered while at most so many steps are under way."
    )
    steps: int | None = Field(default=None, ge=1, le=64, description="Of stale: the most steps under way.")


ConsistencyWanted = Annotated[
    ConsistencyChange | None,
    BeforeValidator(_by_mode),
    WithJsonSchema({"anyOf": [{"enum": ["strict", "stale"]}, ConsistencyChange.model_json_schema(), {"type": "null"}]}),
    Field(
        description="Whether a request waits for the steps on those before it (strict), or is answered while at most "
        "so many are under way (stale, steps), see the setting `streams.consistency`."
    ),
]


GUARD_TEXT = "What differs from the guard's settings as they are, see the setting `guard`."
GuardChanges = Annotated[dict[str, Any] | None, Bounded]


class OpenStream(_Request):
    """Body of ``PUT /v1/streams/{id}``. What is left out takes the model's defaults, or stays as it is."""

    model: Name | None = None
    policy: Name | None = None
    settings: Annotated[dict[str, Any] | None, Bounded] = Field(
        default=None, description="Policy settings that differ from the defaults."
    )
    adapt: bool | None = Field(default=None, description="Whether the stream adapts; on for a new one.")
    durability: DurabilityWanted = None
    consistency: ConsistencyWanted = None
    guard: GuardChanges = Field(default=None, description=GUARD_TEXT)


class PatchStream(_Request):
    """Body of ``PATCH /v1/streams/{id}``. Takes effect with the next request; what is left out stays."""

    adapt: bool | None = Field(default=None, description="Off: the source model answers, the state rests.")
    policy: Name | None = Field(default=None, description="Another policy starts from the source.")
    settings: Annotated[dict[str, Any] | None, Bounded] = Field(
        default=None,
        description="Over the settings the stream has, or, with another policy, over what that one starts from. The "
        "state is kept where its layout stays the same; another window or optimiser starts from the source.",
    )
    durability: DurabilityWanted = None
    consistency: ConsistencyWanted = None
    guard: GuardChanges = Field(default=None, description=GUARD_TEXT + " A guarantee of another kind starts afresh.")

    @model_validator(mode="after")
    def _check(self) -> PatchStream:
        given = (self.adapt, self.policy, self.settings, self.durability, self.consistency, self.guard)
        if all(one is None for one in given):
            raise ValueError("give at least one of adapt, policy, settings, durability, consistency and guard")
        return self


class NewSnapshot(_Request):
    """Body of ``POST /v1/streams/{id}/snapshots``."""

    name: Name = Field(description="1 to 128 of A-Z a-z 0-9 . _ : -; one that the stream has no snapshot of yet.")


class Rollback(_Request):
    """Body of ``POST /v1/streams/{id}/rollback``: where to."""

    snapshot: Name | None = Field(default=None, description="A snapshot's name.")
    version: int | None = Field(default=None, ge=0, description="Of a state that is kept; of several, the newest.")

    @model_validator(mode="after")
    def _check(self) -> Rollback:
        if (self.snapshot is None) == (self.version is None):
            raise ValueError("give either snapshot or version")
        return self


class Fork(_Request):
    """Body of ``POST /v1/streams/{id}/fork``."""

    id: Name = Field(description="Of the copy: 1 to 128 of A-Z a-z 0-9 . _ : -, not in use.")


class Operate(_Request):
    """Body of ``POST /v1/streams/{id}/guard``."""

    state: Literal["shadow", "canary", "active", "frozen", "quarantine", "auto"] = Field(
        description="Where the guard is to be, and to stay; auto: it decides again."
    )


class Labels(_Request):
    """Body of ``POST /v1/streams/{id}/labels``: what one request's rows were."""

    request: Annotated[str, Field(max_length=LONGEST_NAME)] = Field(
        description="Id of a prediction request of this stream: `request` in its answer, and its X-Request-ID."
    )
    labels: Annotated[
        list[Any], WithJsonSchema({"type": "array", "items": {"anyOf": [{"type": "integer"}, {"type": "null"}]}})
    ] = Field(description="Class numbers, one a row; null where unknown, perhaps until later.")
    """Checked against the request, not here: there may be millions, and one fault is enough."""


class PolicyInfo(BaseModel):
    """One policy."""

    name: str
    summary: str
    scope: str = Field(description="What it adapts.")
    needs: list[str] = Field(description="Artefacts that the model must have for it, under its defaults.")
    presets: dict[str, dict[str, Any]] = Field(description="Published settings by scale, where they differ.")
    settings: dict[str, Any] = Field(description="JSON schema of its settings, defaults included.")


class PolicyList(BaseModel):
    """All policies."""

    policies: list[PolicyInfo]


class Adaptable(BaseModel):
    """What policies can change in a model."""

    layers: dict[str, int] = Field(description="Norm layers by type.")
    values: int = Field(description="Scales and shifts in them.")


class PolicyCost(BaseModel):
    """One policy on one model."""

    name: str
    runs: bool
    bytes_per_stream: int | None = Field(default=None, description="Of state; only where the policy runs.")
    reason: str | None = Field(default=None, description="Only where the policy does not run.")
    card: PolicyCard | None = Field(
        default=None, description="What `tta-server prepare --report` found; only where that was run, and still fits."
    )


class ModelInfo(BaseModel):
    """One source model."""

    name: str
    architecture: str
    digest: str = Field(description="Hex SHA-256 of weights, architecture and input normalisation.")
    parameters: int
    input: InputSettings
    classes: list[str]
    feature_dim: int
    adaptable: Adaptable
    artefacts: list[str]
    default_policy: str
    policies: list[PolicyCost]


class ModelList(BaseModel):
    """All source models."""

    models: list[ModelInfo]


class GuardMove(BaseModel):
    """How a guard came into its state."""

    from_: str = Field(alias="from")
    rule: str
    action: str
    statistic: float | None
    threshold: float | None


class GuardInfo(BaseModel):
    """A stream's guard: what is served, and what is known of it."""

    state: Literal["off", "shadow", "canary", "active", "frozen", "quarantine"]
    pinned: bool = Field(description="Whether an operator chose the state, which then stays.")
    evidence: Literal["unknown", "helps", "unclear", "harms"]
    benefit: float | None = Field(
        description="Accuracy that the adapted model is estimated to have over the source's, without labels; null "
        "before anything was compared."
    )
    since: GuardMove | None = Field(description="The move into this state; null at the start.")
    guarantee: dict[str, Any] = Field(
        description="kind; remaining: share of the budget; bound: what is guaranteed of the errors beyond the "
        "source's; worst: the most they can be by the labels that came; of audits also evidence, certified, interval."
    )


class StreamInfo(BaseModel):
    """One stream as it is now."""

    id: str
    model: str
    digest: str = Field(description="Of the source that the stream adapts; where the model has another, it is refused.")
    policy: str
    settings: dict[str, Any]
    adapt: bool
    version: int = Field(description="Adaptation steps committed since the start or the last reset.")
    requests: int = Field(description="Prediction requests answered.")
    last_number: int | None = Field(description="Newest request number that was answered.")
    created: float = Field(description="Unix time, seconds.")
    last_seen: float | None = Field(description="Unix time of the last prediction request, seconds.")
    tier: str = Field(
        description="Where the state is: device, host, disk, or none while the stream has none of its own."
    )
    state_bytes: int = Field(description="Size of the state that it has from its first step on, kept images included.")
    durability: Durability
    consistency: Consistency
    unsaved_steps: int | None = Field(
        description="Steps and other changes that a crash now would cost; null where the stream is not stored."
    )
    saved_version: int | None = Field(description="The version that is stored; null while none is.")
    saved: float | None = Field(description="When it was stored, Unix time, seconds; null while none is.")
    failures: int = Field(description="Adaptation steps that failed or were not finite, and left no trace.")
    drift: float | None = Field(
        description="Drift score: by how many standard deviations the stream's requests are farther from clean data "
        "than clean requests of their size, on average of late. Null without clean data to compare with."
    )
    verdict: Verdict = Field(description="The stream in words.")
    agreement: float | None = Field(description="Share of sampled rows of late with the source model's class.")
    guard: GuardInfo | None = Field(description="Null where it is not enabled, and for the source policy.")


class Signal(BaseModel):
    """One signal of a stream."""

    value: float = Field(description="Moving average.")
    z: float | None = Field(description="Of its z-score against clean data; null where there is none.")
    band: tuple[float, float] | None = Field(
        description="Where clean requests as large as the stream's last mostly are: mean +- 2 standard deviations."
    )
    text: str | None = Field(description="What it is; null for a policy's own.")


class StreamDetail(StreamInfo):
    """One stream with all that is measured of it."""

    guard_settings: dict[str, Any] | None = Field(description="See the setting guard; null without one.")
    signals: dict[str, Signal]
    missing: dict[str, str] = Field(description="What cannot be measured of it, and how to get that.")


class PatchedStream(StreamDetail):
    """A stream after a change."""

    state_kept: bool = Field(description="False: the stream is back at the source, see the request.")


class StreamList(BaseModel):
    """A page of the tenant's streams."""

    streams: list[StreamInfo]
    next: str | None = Field(description="The cursor of the next page; null on the last one.")


class SnapshotInfo(BaseModel):
    """One state of a stream that is kept."""

    names: list[str] = Field(description="Under which it is kept; it stays while it has one.")
    version: int
    saved: float = Field(description="Unix time, seconds.")
    bytes: int = Field(description="Size of the state; 0 where it is the initial one.")
    automatic: bool = Field(description="Whether it is one of the last few automatic ones.")
    current: bool = Field(description="Whether it is the newest that is stored.")


class SnapshotList(BaseModel):
    """All states of a stream that are kept, the newest first."""

    snapshots: list[SnapshotInfo]


class TierInfo(BaseModel):
    """One place where states are."""

    streams: int
    bytes: int


class StoreInfo(BaseModel):
    """How streams are stored, those of all tenants."""

    persistent: bool = Field(description="Whether streams outlive the server.")
    problem: str | None = Field(description="Why nothing can be stored now; null while it can.")
    fenced: bool = Field(description="Whether another process has taken the streams over.")
    waiting: int = Field(description="Streams that wait to be written.")
    bytes: int = Field(description="What the store takes.")
    streams: int = Field(description="Open streams.")
    unsaved_streams: int = Field(description="Stored streams that have changes which a crash now would cost.")
    unsaved_steps: int = Field(description="The most such changes that one of them has.")
    tiers: dict[str, TierInfo] = Field(description="Where states are now: device, host, disk.")
    totals: Tally = Field(description="Since the start.")
    last_shutdown: Shutdown | None = Field(
        description="How the server before this one ended; null where there was none."
    )


class Ranked(BaseModel):
    """One of a row's likeliest classes."""

    class_: int = Field(alias="class")
    label: str
    probability: float


class Share(BaseModel):
    """A share, or a difference of two, and its 95 % interval. For one look at independent rows."""

    value: float
    low: float
    high: float
    rows: int


class LabelFigures(BaseModel):
    """What labels say. Null where there were none."""

    rows: int
    asked: int = Field(
        description="Of the rows, how many the server had asked for. These are where the two models differ, so the "
        "accuracies are then not those of the stream."
    )
    served: Share | None = Field(description="Accuracy of the answers.")
    adapted: Share | None = Field(description="Of the adapted model, on rows where both models ran.")
    source: Share | None = Field(description="Of the source, on the same rows.")
    benefit: Share | None = Field(description="The former less the latter, paired.")
    disagreements: int
    adapted_right: int
    source_right: int
    neither_right: int
    brier: float | None


class LabelReport(BaseModel):
    """What labels say of a stream, and which the server would like to have."""

    recent: LabelFigures | None = Field(description="Of the newest 1,000 labelled rows.")
    total: LabelFigures | None = Field(description="Of all.")
    calibration_error: float | None = Field(description="ECE in 15 bins of equal mass; null below 300 rows.")
    mean_delay: float | None = Field(description="From answer to label, seconds.")
    last_delay: float | None
    estimates: dict[str, dict[str, float | None]] = Field(
        description="What was estimated without labels, by signal: value, measured (by the recent labels), and error, "
        "their absolute difference; null where one of the two is unknown."
    )
    sets: dict[str, Any] | None = Field(description="How the prediction sets do: alpha, labels, coverage.")
    audits: dict[str, int] = Field(description="Rows asked for: issued, answered, expired, pending.")
    wanted: list[dict[str, Any]] = Field(description="Open ones: request, time, version, rows; the newest first.")


class LabelReceipt(BaseModel):
    """What a posting of labels brought."""

    request: str
    taken: int = Field(description="Rows labelled just now.")
    repeated: int = Field(description="Rows that had this label already.")
    missing: int = Field(description="Rows of the request without a label yet.")


class Prediction(BaseModel):
    """Answer of ``POST /v1/streams/{id}/predict``. Lists run over the rows of the request."""

    stream: str
    request: str = Field(description="Id, for labels, of the request that this answers, the first of repeated ones.")
    model: str
    policy: str = Field(description="What answered: the stream's policy, or 'source' while adaptation is off.")
    version: int = Field(description="The stream's version that answered.")
    behind: int = Field(description="Steps on earlier requests that this version does not have yet; 0 when strict.")
    adapted: bool = Field(description="Whether the stream's policy ran.")
    served: Literal["adapted", "source", "mixed"] = Field(
        description="Whose scores these are; mixed: the guard let some rows through only."
    )
    guard: dict[str, Any] | None = Field(description="State, evidence and benefit of the stream's guard; null without.")
    shed: bool = Field(description="Whether the server was too busy to adapt to this request.")
    replayed: bool = Field(description="Whether this is the stored answer to a repeated request number.")
    classes: list[int]
    labels: list[str]
    confidence: list[float] = Field(description="Largest probability, not calibrated.")
    entropy: list[float] = Field(description="Of the probabilities, nats.")
    entropy_ratio: list[float] = Field(description="The same over ln(classes): 0 to 1.")
    margin: list[float] = Field(description="Largest less second largest probability.")
    probabilities: list[list[float]] | None = None
    logits: list[list[float]] | None = None
    sets: list[list[int]] | None = Field(default=None, description="With miscoverage: per row, the classes in its set.")
    abstain: list[bool] | None = Field(default=None, description="Rows whose set is not exactly one class.")
    asked: list[int] | None = Field(default=None, description="Rows whose label the server would like to have.")
    top: list[list[Ranked]] | None = Field(default=None, description="With top_k: per row, the likeliest first.")
    drift: float | None = Field(description="The stream's drift score before this request, see the stream.")
    verdict: Verdict = Field(description="The stream in words before this request.")
    agreement: float | None = Field(description="Share of sampled rows so far with the source model's class.")
    queue_seconds: float
    inference_seconds: float
    unsaved_steps: int | None = Field(
        description="How many of the stream's changes up to this version a crash would have cost when the answer left; "
        "null where the stream is not stored."
    )
    lost_steps: int = Field(description="Steps that a crash cost the stream, told once, in the first answer after it.")


REQUESTS: tuple[type[BaseModel], ...] = (OpenStream, PatchStream, NewSnapshot, Rollback, Fork, Operate, Labels)
"""Bodies that routes read by themselves, which the framework therefore does not put into the OpenAPI document."""


def stream_info(tenant: Tenant, stream: Stream) -> dict[str, Any]:
    """:class:`StreamInfo` as a dict."""
    monitor = tenant.monitor
    return {
        "id": stream.id,
        "model": stream.model,
        "digest": stream.digest,
        "policy": stream.policy.name,
        "settings": settings_of(stream.policy),
        "adapt": stream.adapt,
        "version": stream.version,
        "requests": stream.requests,
        "last_number": stream.last_number,
        "created": stream.created,
        "last_seen": stream.last_seen or None,
        "tier": tenant.tier(stream),
        "state_bytes": stream.state_bytes,
        "durability": stream.durability.model_dump(),
        "consistency": stream.consistency.model_dump(),
        "unsaved_steps": stream.unsaved if stream.durability.mode != "none" else None,
        "saved_version": stream.saved.version if stream.saved.revision else None,
        "saved": stream.saved.time or None,
        "failures": stream.failures,
        "drift": monitor.drift(stream),
        "verdict": monitor.verdict(stream),
        "agreement": monitor.agreement(stream),
        "guard": None if stream.guarded is None else _guard_info(stream, stream.guarded),
    }


def _guard_info(stream: Stream, guard: Guard) -> dict[str, Any]:
    """:class:`GuardInfo` as a dict."""
    since = guard.since
    guarantee: dict[str, Any] = {"kind": guard.wanted.guarantee.kind}
    if guard.guarantee is not None:
        promised = guard.guarantee
        guarantee |= {"remaining": promised.remaining, "bound": promised.bound, "worst": promised.worst}
        if isinstance(promised, Audit):
            guarantee |= {
                "evidence": promised.evidence, "certified": promised.certified, "interval": promised.interval()
            }  # fmt: skip
    return {
        "state": guard.state if stream.adapt else State.OFF,
        "pinned": guard.pinned,
        "evidence": guard.evidence,
        "benefit": _known(guard.benefit),
        "since": None
        if since is None
        else {
            "from": since.before,
            "rule": since.rule,
            "action": since.action,
            "statistic": _known(since.statistic),
            "threshold": _known(since.threshold),
        },
        "guarantee": guarantee,
    }


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


def stream_detail(tenant: Tenant, stream: Stream) -> dict[str, Any]:
    """:class:`StreamDetail` as a dict."""
    signals = {
        name: {**reading._asdict(), "text": SIGNALS[name].text if name in SIGNALS else None}
        for name, reading in tenant.signals(stream).items()
    }
    return {
        **stream_info(tenant, stream),
        "guard_settings": None if stream.guard is None else stream.guard.wanted.model_dump(),
        "signals": signals,
        "missing": tenant.missing(stream),
    }


def label_report(tenant: Tenant, stream: Stream) -> dict[str, Any]:
    """:class:`LabelReport` as a dict."""
    feedback = tenant.feedback
    summary, audits = feedback.summary(stream), feedback.audits(stream)
    nothing = dict.fromkeys(("recent", "total", "calibration_error", "mean_delay", "last_delay"))
    return {
        **(nothing if summary is None else asdict(summary)),
        "estimates": _estimates(tenant.monitor.read(stream), None if summary is None else summary.recent),
        "sets": feedback.coverage(stream),
        "audits": {**asdict(audits), "pending": audits.pending},
        "wanted": [asdict(one) for one in feedback.wanted(stream)],
    }


def snapshot_info(snapshot: Snapshot) -> dict[str, Any]:
    """:class:`SnapshotInfo` as a dict."""
    return {
        "names": snapshot.marks,
        "version": snapshot.version,
        "saved": snapshot.saved,
        "bytes": snapshot.bytes,
        "automatic": snapshot.automatic,
        "current": snapshot.current,
    }


def _estimates(signals: dict[str, float], measured: Figures | None) -> dict[str, dict[str, float | None]]:
    """The estimates of accuracy beside what labels say."""
    told = {}
    for name, who in (
        ("accuracy_atc", "adapted"), ("accuracy_pdd", "adapted"), ("source_accuracy_atc", "source"),
        ("source_accuracy_pdd", "source"), ("benefit", "benefit"),
    ):  # fmt: skip
        if name in signals:
            known = None if measured is None else getattr(measured, who)
            truth = None if known is None else known.value
            error = None if truth is None else abs(signals[name] - truth)
            told[name] = {"value": signals[name], "measured": truth, "error": error}
    return told


def prediction(
    stream: Stream,
    answer: Answer,
    replayed: bool,
    labels: tuple[str, ...],
    output: str,
    top_k: int | None,
) -> dict[str, Any]:
    """:class:`Prediction` as a dict; ``output`` is ``probabilities``, ``logits`` or ``none``."""
    logits = answer.logits.numpy()
    classes = logits.argmax(1)
    content: dict[str, Any] = {
        "stream": stream.id,
        "request": answer.request,
        "model": stream.model,
        "policy": answer.policy,
        "version": answer.version,
        "behind": answer.behind,
        "adapted": answer.adapted,
        "served": answer.served,
        "guard": None if answer.guard is None else answer.guard._asdict(),
        "shed": answer.shed,
        "replayed": replayed,
        "classes": classes,
        "labels": [labels[index] for index in classes.tolist()],
        "confidence": answer.confidence.numpy(),
        "entropy": answer.entropy.numpy(),
        "entropy_ratio": answer.entropy.numpy() / math.log(max(logits.shape[1], 2)),
        "margin": answer.margin.numpy(),
        "drift": answer.drift,
        "verdict": answer.verdict,
        "agreement": answer.agreement,
        "queue_seconds": answer.queue_seconds,
        "inference_seconds": answer.inference_seconds,
        "unsaved_steps": answer.unsaved,
        "lost_steps": answer.lost,
    }
    note = answer.comparison
    if note.sets is not None:
        content["sets"] = [np.flatnonzero(row) for row in note.sets.inside]
        content["abstain"] = note.sets.abstains
    if note.asked is not None:
        content["asked"] = np.flatnonzero(note.asked)
    if output != "none":
        content[output] = softmax(logits) if output == "probabilities" else logits
    if top_k is not None:
        probabilities = softmax(logits)
        best = np.argsort(-probabilities, axis=1, kind="stable")[:, :top_k]
        content["top"] = [
            [{"class": index, "label": labels[index], "probability": one} for one, index in zip(*row, strict=True)]
            for row in zip(np.take_along_axis(probabilities, best, 1).tolist(), best.tolist(), strict=True)
        ]
    return content
