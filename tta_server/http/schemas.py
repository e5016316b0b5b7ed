"""What goes over the wire as JSON objects, and how it is documented in OpenAPI."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from tta_server.policies import settings_of
from tta_server.settings import InputSettings
from tta_server.types import Answer, Stream


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Problem(BaseModel):
    """Any error."""

    error: str


class OpenStream(_Request):
    """Body of ``PUT /v1/streams/{id}``. What is left out takes the model's defaults, or stays as it is."""

    model: str | None = None
    policy: str | None = None
    settings: dict[str, Any] | None = Field(default=None, description="Policy settings that differ from the defaults.")
    adapt: bool | None = Field(default=None, description="Whether the stream adapts; on for a new one.")


class PatchStream(_Request):
    """Body of ``PATCH /v1/streams/{id}``."""

    adapt: bool = Field(description="Takes effect with the next request. Off: the source model answers, state rests.")


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


class StreamInfo(BaseModel):
    """One stream as it is now."""

    id: str
    model: str
    policy: str
    settings: dict[str, Any]
    adapt: bool
    version: int = Field(description="Adaptation steps committed since the start or the last reset.")
    requests: int = Field(description="Prediction requests answered.")
    created: float = Field(description="Unix time, seconds.")
    last_seen: float | None = Field(description="Unix time of the last prediction request, seconds.")
    tier: str = Field(description="Where the state is: device, host, or none while the stream has none of its own.")
    state_bytes: int | None = Field(
        description="Size of the state, kept images included; null before the first request under these settings."
    )
    drift: float | None = Field(description="Drift score: distance of the stream's batch statistics to the source's.")
    signals: dict[str, float] = Field(description="Moving averages of the stream's signals.")


class StreamList(BaseModel):
    """All streams."""

    streams: list[StreamInfo]


class Prediction(BaseModel):
    """Answer of ``POST /v1/streams/{id}/predict``. Lists run over the rows of the request."""

    stream: str
    model: str
    policy: str = Field(description="What answered: the stream's policy, or 'source' while adaptation is off.")
    version: int = Field(description="The stream's version that answered.")
    adapted: bool = Field(description="Whether the adapted model answered.")
    replayed: bool = Field(description="Whether this is the stored answer to a repeated request number.")
    classes: list[int]
    labels: list[str]
    confidence: list[float] = Field(description="Largest probability, not calibrated.")
    entropy: list[float] = Field(description="Of the probabilities, nats.")
    probabilities: list[list[float]] | None = None
    logits: list[list[float]] | None = None
    drift: float | None = Field(description="The stream's drift score before this request.")
    agreement: float | None = Field(description="Share of sampled rows so far with the source model's class.")
    queue_seconds: float
    inference_seconds: float


class Live(BaseModel):
    """Whether the process runs."""

    live: bool


class Ready(BaseModel):
    """Whether requests are taken."""

    ready: bool


class ServerMetadata(BaseModel):
    """Open Inference Protocol V2 server metadata."""

    name: str
    version: str
    extensions: list[str]


class TensorMetadata(BaseModel):
    """One input or output of a model."""

    name: str
    datatype: str
    shape: list[int] = Field(description="-1: any size.")


class ModelMetadata(BaseModel):
    """Open Inference Protocol V2 model metadata."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class ModelReady(BaseModel):
    """Whether a model takes requests."""

    name: str
    ready: bool


class OutputTensor(BaseModel):
    """One output tensor of the Open Inference Protocol."""

    name: str
    datatype: str
    shape: list[int]
    data: list[float | None] = Field(description="Flat, row by row; null: not a number, or infinite.")


class InferReport(BaseModel):
    """What an answer says about its stream. What does not apply is left out."""

    stream_id: str | None = None
    state_version: int = Field(description="The stream's version that answered.")
    adapted: bool = Field(description="Whether the adapted model answered.")
    policy: str = Field(description="What answered.")
    confidence: float | None = Field(description="Mean over the rows of the largest probability, not calibrated.")
    drift: float | None = Field(default=None, description="The stream's drift score before this request.")
    replayed: bool | None = Field(default=None, description="This is the stored answer to a repeated request number.")
    replaced: bool | None = Field(default=None, description="This request replaced a live stream of the same id.")


class InferResponse(BaseModel):
    """Open Inference Protocol V2 inference response."""

    model_name: str
    model_version: str
    id: str | None = Field(default=None, description="As in the request.")
    parameters: InferReport
    outputs: list[OutputTensor]


class _V2(BaseModel):
    model_config = ConfigDict(strict=True)


class InferInput(_V2):
    """One input tensor of the Open Inference Protocol."""

    name: str
    shape: list[int]
    datatype: str
    parameters: dict[str, Any] = {}
    data: Any = None


class InferOutput(_V2):
    """One requested output."""

    name: str
    parameters: dict[str, Any] = {}


class InferRequest(_V2):
    """Open Inference Protocol V2 inference request."""

    id: str | None = None
    parameters: dict[str, str | int | float | bool] = {}
    inputs: list[InferInput]
    outputs: list[InferOutput] = []


REQUESTS: tuple[type[BaseModel], ...] = (OpenStream, PatchStream, InferRequest)
"""Bodies that routes read by themselves, which the framework therefore does not put into the OpenAPI document."""


def stream_info(
    stream: Stream, tier: str, state_bytes: int | None, signals: dict[str, float], drift: float | None
) -> dict[str, Any]:
    """:class:`StreamInfo` as a dict."""
    return {
        "id": stream.id,
        "model": stream.model,
        "policy": stream.policy.name,
        "settings": settings_of(stream.policy),
        "adapt": stream.adapt,
        "version": stream.version,
        "requests": stream.requests,
        "created": stream.created,
        "last_seen": stream.last_seen or None,
        "tier": tier,
        "state_bytes": state_bytes,
        "drift": drift,
        "signals": signals,
    }


def prediction(stream: Stream, answer: Answer, replayed: bool, labels: tuple[str, ...], output: str) -> dict[str, Any]:
    """:class:`Prediction` as a dict; ``output`` is ``probabilities`` or ``logits``."""
    classes = answer.logits.argmax(1)
    scores = answer.logits.softmax(1) if output == "probabilities" else answer.logits
    return {
        "stream": stream.id,
        "model": stream.model,
        "policy": answer.policy,
        "version": answer.version,
        "adapted": answer.adapted,
        "replayed": replayed,
        "classes": classes.numpy(),
        "labels": [labels[index] for index in classes.tolist()],
        "confidence": answer.confidence.numpy(),
        "entropy": answer.entropy.numpy(),
        output: scores.numpy(),
        "drift": answer.drift,
        "agreement": answer.agreement,
        "queue_seconds": answer.queue_seconds,
        "inference_seconds": answer.inference_seconds,
    }
