"""The Open Inference Protocol, V2: health, metadata and inference with JSON tensors.

``parameters.sequence_id`` names the stream. The codec takes tensors by datatype and the answer is built per output, so
that binary tensors are an addition to both, not a change.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from tta_server import __version__
from tta_server.engine.source import SourceModel
from tta_server.errors import BadInput, Unavailable, UnknownName
from tta_server.http.codec import decode_tensor, parse_json, read_body
from tta_server.http.schemas import InferRequest, InferResponse, Live, ModelMetadata, ModelReady, Ready, ServerMetadata
from tta_server.http.wire import PROBLEMS, decode, json_body, json_response, refuse_unknown, unless_gone
from tta_server.service import Service
from tta_server.types import Answer, Stream

INPUT = "input"
OUTPUTS = ("logits", "probabilities")
VERSION = "1"
_OURS = ("tta_adapt", "tta_policy", "tta_seq")


def router(service: Service) -> APIRouter:
    """The routes over ``service``."""
    routes = APIRouter(prefix="/v2", tags=["Open Inference Protocol"], responses=PROBLEMS)
    limits = service.settings.limits

    def find(name: str, version: str = VERSION) -> SourceModel:
        model = service.model(name)
        if version != VERSION:
            raise UnknownName(f"model {name!r} has version {VERSION} only, asked for was {version!r}")
        return model

    @routes.get("/health/live", response_model=Live)
    async def live() -> Response:
        """The process runs."""
        return json_response({"live": True})

    @routes.get("/health/ready", response_model=Ready)
    async def ready() -> Response:
        """Requests are taken."""
        _refuse_while_draining(service)
        return json_response({"ready": True})

    @routes.get("", response_model=ServerMetadata)
    @routes.get("/", include_in_schema=False)
    async def server() -> Response:
        """Server metadata."""
        return json_response({"name": "tta-server", "version": __version__, "extensions": ["sequence", "parameters"]})

    def metadata_of(model: SourceModel) -> Response:
        outputs = [{"name": one, "datatype": "FP32", "shape": [-1, len(model.classes)]} for one in OUTPUTS]
        content = {
            "name": model.name,
            "versions": [VERSION],
            "platform": "pytorch",
            "inputs": [{"name": INPUT, "datatype": "FP32", "shape": [-1, *model.settings.input.shape]}],
            "outputs": outputs,
        }
        return json_response(content)

    def readiness_of(model: SourceModel) -> Response:
        _refuse_while_draining(service)
        return json_response({"name": model.name, "ready": True})

    async def infer_with(model: SourceModel, request: Request) -> Response:
        request.state.model = model.name
        if "inference-header-content-length" in request.headers:
            raise BadInput("binary tensors are not offered; send JSON tensors (tritonclient: binary_data=False)")
        body = await read_body(request, limits.body_bytes)
        asked = await decode(body, lambda raw: InferRequest.model_validate(parse_json(raw)))
        wanted = _outputs(asked)
        if len(asked.inputs) != 1 or asked.inputs[0].name != INPUT:
            names = ", ".join(repr(one.name) for one in asked.inputs[:8]) or "none"
            raise BadInput(f"the model has exactly one input, {INPUT!r}; got {names}")
        tensor = asked.inputs[0]
        x = await decode(
            body,
            lambda raw: decode_tensor(tensor.data, tensor.datatype, tensor.shape, model.settings.input, tensor.name),
        )
        controls = _Controls(asked.parameters, service.settings.streams.default)
        service.check_input(model, x)
        report: dict[str, Any] = {}
        stream: Stream | None = None

        async def answer_it() -> tuple[Answer, bool]:
            nonlocal stream
            # Nothing is awaited between finding the stream and queueing in it: nobody gets in between.
            if controls.stream is not None:
                service.check_room()
                known = controls.start or controls.stream == service.settings.streams.default
                if not known and service.settings.streams.unknown_id == "refuse":
                    service.stream(controls.stream)
                if controls.start and service.is_open(controls.stream):
                    report["replaced"] = True
                stream, _ = service.open(controls.stream, model.name, controls.policy, replace=controls.start)
            return await service.predict(
                model.name,
                x,
                stream=controls.stream,
                number=controls.number,
                adapt=controls.adapt,
                timeout=controls.timeout,
            )

        answer, replayed = await unless_gone(request, answer_it())
        if stream is not None and controls.end:
            await service.close(stream.id, only=stream)
        report |= _report(controls.stream, answer, replayed)
        return json_response(
            {
                "model_name": model.name,
                "model_version": VERSION,
                **({} if asked.id is None else {"id": asked.id}),
                "parameters": report,
                "outputs": [_output(one, answer) for one in wanted],
            }
        )

    @routes.get("/models/{name}", response_model=ModelMetadata)
    async def metadata(name: str) -> Response:
        """Model metadata."""
        return metadata_of(find(name))

    @routes.get("/models/{name}/versions/{version}", response_model=ModelMetadata)
    async def version_metadata(name: str, version: str) -> Response:
        """Model metadata."""
        return metadata_of(find(name, version))

    @routes.get("/models/{name}/ready", response_model=ModelReady)
    async def model_ready(name: str) -> Response:
        """The model takes requests."""
        return readiness_of(find(name))

    @routes.get("/models/{name}/versions/{version}/ready", response_model=ModelReady)
    async def version_ready(name: str, version: str) -> Response:
        """The model takes requests."""
        return readiness_of(find(name, version))

    @routes.post("/models/{name}/infer", response_model=InferResponse, openapi_extra=json_body(InferRequest))
    async def infer(name: str, request: Request) -> Response:
        """Scores; with ``parameters.sequence_id``, those of that stream, which then adapts."""
        return await infer_with(find(name), request)

    @routes.post(
        "/models/{name}/versions/{version}/infer", response_model=InferResponse, openapi_extra=json_body(InferRequest)
    )
    async def version_infer(name: str, version: str, request: Request) -> Response:
        """Scores; with ``parameters.sequence_id``, those of that stream, which then adapts."""
        return await infer_with(find(name, version), request)

    return routes


class _Controls:
    """What a request's ``parameters`` ask for. Raises ``BadInput`` for a value of the wrong type."""

    def __init__(self, parameters: dict[str, Any], default_stream: str | None) -> None:
        given = dict(parameters)
        id = given.pop("sequence_id", None)
        if isinstance(id, bool | float):
            raise BadInput(f"sequence_id must be a string or a whole number, got {id!r}")
        # 0 and the empty string mean no sequence.
        self.stream: str | None = str(id) if id else default_stream
        self.start = _take(given, "sequence_start", bool, False)
        self.end = _take(given, "sequence_end", bool, False)
        self.adapt: bool | None = _take(given, "tta_adapt", bool, None)
        self.policy: str | None = _take(given, "tta_policy", str, None)
        self.number: int | None = _take(given, "tta_seq", int, None)
        if self.number is not None and self.number < 0:
            raise BadInput(f"tta_seq must not be negative, got {self.number}")
        microseconds = _take(given, "timeout", int, None)
        if microseconds is not None and microseconds < 0:
            raise BadInput(f"timeout must not be negative, got {microseconds} microseconds")
        self.timeout: float | None = microseconds / 1e6 if microseconds else None
        if given.pop("binary_data_output", False):
            raise BadInput("binary outputs are not offered; ask for JSON (tritonclient: binary_data=False)")
        # Other names may be meant for another server; these can only be meant for this one.
        refuse_unknown("parameter", (name for name in given if name.startswith("tta_")), _OURS)


def _refuse_while_draining(service: Service) -> None:
    if service.draining:
        raise Unavailable("the server is shutting down")


def _take(given: dict[str, Any], name: str, kind: type[Any], default: Any) -> Any:
    value = given.pop(name, default)
    if value is not default and type(value) is not kind:
        raise BadInput(f"parameter {name} must be {kind.__name__}, got {value!r}")
    return value


def _outputs(asked: InferRequest) -> list[str]:
    for output in asked.outputs:
        if output.name not in OUTPUTS:
            raise BadInput(f"no output {output.name!r}; there are {' and '.join(OUTPUTS)}")
        if output.parameters.get("binary_data"):
            raise BadInput(f"output {output.name!r}: binary outputs are not offered; ask with binary_data=False")
    names = [output.name for output in asked.outputs] or list(OUTPUTS)
    if len(set(names)) != len(names):
        raise BadInput(f"an output is asked for twice: {names}")
    return names


def _output(name: str, answer: Answer) -> dict[str, Any]:
    scores = answer.logits if name == "logits" else answer.logits.softmax(1)
    return {"name": name, "datatype": "FP32", "shape": list(scores.shape), "data": scores.flatten().numpy()}


def _report(stream: str | None, answer: Answer, replayed: bool) -> dict[str, str | int | float | bool]:
    report: dict[str, str | int | float | bool | None] = {
        "stream_id": stream,
        "state_version": answer.version,
        "adapted": answer.adapted,
        "policy": answer.policy,
        "confidence": answer.confidence.mean().item(),
        "drift": answer.drift,
        "replayed": replayed or None,
    }
    return {key: value for key, value in report.items() if value is not None}
