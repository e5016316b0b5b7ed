"""What goes over the wire of the Open Inference Protocol as JSON objects, and how it is documented in OpenAPI."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, FailFast, Field, WithJsonSchema

from tta_server.drift.monitor import Verdict
from tta_server.http.schemas import Bounded


def _scalar(given: Any) -> Any:
    if not isinstance(given, str | int | float):
        raise ValueError("must be a string, a number or a boolean")
    return given


# One validator instead of a union of types, which would tell four faults of a value, at places that do not exist.
Scalar = Annotated[
    Any,
    AfterValidator(_scalar),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "number"}, {"type": "boolean"}]}),
]
Parameters = Annotated[dict[str, Scalar], Bounded]


class Live(BaseModel):
    """Whether the process runs."""

    live: bool


class Storing(BaseModel):
    """Whether streams are being stored."""

    stored: bool = Field(description="False also where the config says that they end with the server.")
    problem: str | None = Field(description="That they cannot be, though they should; else null.")


class Ready(BaseModel):
    """Whether requests are taken."""

    ready: bool
    state: Storing


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
    parameters: dict[str, int] | None = Field(default=None, description="binary_data_size, of a binary one.")
    data: list[float | str | None] | None = Field(
        default=None, description="Flat, row by row; null in it: not a number, or infinite. Absent from a binary one."
    )


class ModelConfigTensor(BaseModel):
    """One input or output, in the words of Triton."""

    name: str
    data_type: str
    dims: list[int] = Field(description="Without the batch dimension.")


class ModelConfig(BaseModel):
    """Triton-style model configuration."""

    name: str
    platform: str
    backend: str
    max_batch_size: int
    input: list[ModelConfigTensor]
    output: list[ModelConfigTensor]


class Duration(BaseModel):
    """How often, and how long in all."""

    count: int
    ns: int


class InferStatistics(BaseModel):
    """Prediction requests since the start."""

    success: Duration
    fail: Duration
    queue: Duration
    compute_input: Duration = Field(description="Decoding.")
    compute_infer: Duration = Field(description="The forward pass, up to the answer.")
    compute_output: Duration = Field(description="Encoding.")
    cache_hit: Duration
    cache_miss: Duration


class BatchStatistics(BaseModel):
    """Engine steps of one size."""

    batch_size: int
    compute_input: Duration
    compute_infer: Duration
    compute_output: Duration


class ModelStatistics(BaseModel):
    """One model's statistics."""

    name: str
    version: str
    last_inference: int = Field(description="Unix time, milliseconds.")
    inference_count: int = Field(description="Rows.")
    execution_count: int = Field(description="Engine steps.")
    inference_stats: InferStatistics
    batch_stats: list[BatchStatistics]


class StatisticsList(BaseModel):
    """Open Inference Protocol V2 statistics extension."""

    model_stats: list[ModelStatistics]


class RepositoryModel(BaseModel):
    """One model of the config."""

    name: str
    version: str
    state: str = Field(description="READY or UNAVAILABLE.")
    reason: str


class LoadRequest(BaseModel):
    """Body of load and unload; may be empty. A configuration or files sent along are not taken."""

    model_config = ConfigDict(strict=True)

    parameters: Parameters = {}


class InferReport(BaseModel):
    """What an answer says about its stream. What does not apply is left out."""

    stream_id: str | None = None
    state_version: int = Field(description="The stream's version that answered.")
    behind: int | None = Field(
        default=None, description="Steps on earlier requests that this version does not have yet."
    )
    adapted: bool = Field(description="Whether the adapted model answered.")
    policy: str = Field(description="What answered.")
    confidence: float | None = Field(description="Mean over the rows of the largest probability, not calibrated.")
    entropy_ratio: float | None = Field(description="Mean over the rows of the entropy over ln(classes).")
    margin: float | None = Field(description="Mean over the rows of the largest less the second largest probability.")
    drift: float | None = Field(default=None, description="The stream's drift score before this request.")
    verdict: Verdict | None = Field(default=None, description="The stream in words before this request.")
    agreement: float | None = Field(default=None, description="Share of sampled rows with the source model's class.")
    served: str | None = Field(default=None, description="Whose scores these are: adapted, source or mixed.")
    guard_state: str | None = Field(default=None, description="Of the stream's guard; absent without one.")
    evidence: str | None = Field(default=None, description="What is known of the adapted model: unknown, helps, ...")
    benefit: float | None = Field(default=None, description="Its estimated accuracy less the source's.")
    request_id: str | None = Field(default=None, description="Of the request that this answers, for labels.")
    shed: bool | None = Field(default=None, description="The server was too busy to adapt to this request.")
    replayed: bool | None = Field(default=None, description="This is the stored answer to a repeated request number.")
    replaced: bool | None = Field(default=None, description="This request replaced a live stream of the same id.")
    unsaved_steps: int | None = Field(
        default=None,
        description="How many of the stream's changes up to this version a crash would have cost when the answer left.",
    )
    lost_steps: int | None = Field(
        default=None, description="Steps that a crash cost the stream, told once, in the first answer after it."
    )


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
    shape: Annotated[list[int], FailFast()]
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
    parameters: Parameters = {}
    inputs: Annotated[list[InferInput], FailFast()]
    outputs: Annotated[list[InferOutput], FailFast()] = []


REQUESTS: tuple[type[BaseModel], ...] = (InferRequest, LoadRequest)
"""Bodies that routes read by themselves, as in ``schemas.py``."""
