"""The Open Inference Protocol, V2: inference. ``parameters.sequence_id`` names the stream."""

from __future__ import annotations

import math
import time
from contextlib import suppress
from reprlib import repr as short
from typing import Any

from fastapi import APIRouter, Request, Response
from torch import Tensor

from tta_server.engine.source import SourceModel
from tta_server.errors import BadInput, Unavailable
from tta_server.http import tensors
from tta_server.http.body import parse_json
from tta_server.http.guard import guarded, needs, tenant_of
from tta_server.http.schemas import LONGEST_NAME, MODES, DurabilityChange
from tta_server.http.schemas_v2 import InferOutput, InferRequest, InferResponse
from tta_server.http.streams import durability_of
from tta_server.http.v2 import INPUT, VERSION, VERSIONED, check_version, version_of
from tta_server.http.wire import (
    BINARY,
    INLINE,
    LARGEST,
    PROBLEMS,
    begin_call,
    body_of,
    json_body,
    offload,
    refuse_unknown,
    respond,
    to_json,
    unless_gone,
)
from tta_server.service import Service
from tta_server.settings import LimitSettings, Right
from tta_server.tenant import check_input
from tta_server.types import Answer, Stream

HEADER_LENGTH = "Inference-Header-Content-Length"
_OURS = ("tta_adapt", "tta_policy", "tta_durability", "tta_seq")


def router(service: Service) -> APIRouter:
    """The routes over ``service``."""
    routes = APIRouter(
        prefix="/v2/models/{name}",
        tags=["Open Inference Protocol"],
        responses=PROBLEMS,
        route_class=guarded(service),
    )
    limits, streams = service.settings.limits, service.settings.streams

    body_schema = json_body(InferRequest)
    documented: dict[str, Any] = {
        "response_model": InferResponse,
        "responses": {200: {"content": {"application/octet-stream": BINARY}}},
    }

    @routes.post("/infer", openapi_extra=body_schema, **documented)
    @routes.post("/versions/{version}/infer", openapi_extra=body_schema | VERSIONED, **documented)
    @needs(Right.PREDICT)
    async def infer(name: str, request: Request) -> Response:
        """Scores; with ``parameters.sequence_id``, those of that stream, which then adapts."""
        check_version(service, name, version_of(request))
        call, tenant = begin_call(request, name), tenant_of(request)
        model = service.models.get(name)
        service.check_room()
        length = tensors.only(request.headers.getlist(HEADER_LENGTH))
        body = await body_of(request, limits)
        started = time.monotonic()
        big = len(body) > INLINE
        asked = await offload(lambda: _Asked(body, length, limits), big)
        controls = _Controls(asked.request.parameters, streams.default)
        tensors.check_outputs(asked.request.outputs)
        x = await offload(lambda: asked.rows(model, limits), big or asked.has_images)
        call.decode_seconds = time.monotonic() - started
        report: dict[str, Any] = {}
        stream: Stream | None = None
        created = False

        async def answer_it() -> tuple[Answer, bool]:
            nonlocal stream, created
            # Nothing is awaited between finding the stream and queueing in it: nobody gets in between.
            if controls.stream is not None:
                service.check_room(controls.timeout)
                known = controls.start or controls.stream == streams.default
                # A request that is not its stream's first must not begin another one in the place of one that was lost.
                if not known and (streams.unknown_id == "refuse" or controls.number):
                    tenant.stream(controls.stream)
                if controls.start and tenant.is_open(controls.stream):
                    report["replaced"] = True
                durability = durability_of(service, tenant, controls.stream, controls.durability, controls.start)
                stream, created = tenant.open(
                    controls.stream, model.name, controls.policy, durability=durability, replace=controls.start
                )
            return await tenant.predict(
                model.name,
                x,
                stream=controls.stream,
                number=controls.number,
                adapt=controls.adapt,
                timeout=controls.timeout,
                priority=controls.priority,
                origin=call.origin,
            )

        try:
            answer, replayed = await unless_gone(request, answer_it())
        except Exception:
            # The first and last request of a stream that would stay open for good; any other can be sent again.
            if stream is not None and created and controls.end:
                with suppress(Unavailable):
                    tenant.discard(stream)
            raise
        if stream is not None and controls.end:
            await tenant.close(stream.id, only=stream)
        report |= _report(controls.stream, answer, replayed)

        def encode() -> tuple[bytes, dict[str, str], str]:
            return _encode(asked, model, answer, report)

        return await respond(request, call, asked.answer_bytes(answer), encode)

    return routes


class _Asked:
    """A request's body: a JSON header and, behind it, binary tensors."""

    def __init__(self, body: bytearray, header_length: str | None, limits: LimitSettings) -> None:
        header, self.binary = tensors.split(body, header_length, limits)
        self.raw = header_length is not None and not header
        if self.raw:
            # One raw tensor, and nothing said about it or the answer.
            self.request = InferRequest(inputs=[], parameters={"binary_data_output": True})
        else:
            self.request = InferRequest.model_validate(parse_json(header, limits))
        self.binary_outputs: bool = _take(self.request.parameters, "binary_data_output", bool, False)

    @property
    def has_images(self) -> bool:
        """Whether encoded images are to be decoded."""
        return any(one.datatype == "BYTES" for one in self.request.inputs)

    def rows(self, model: SourceModel, limits: LimitSettings) -> Tensor:
        """The rows of the model's input, checked."""
        spec, inputs = model.settings.input, self.request.inputs
        if self.raw:
            x = tensors.raw_input(self.binary, spec, limits)
        else:
            if len(inputs) != 1 or inputs[0].name != INPUT:
                names = ", ".join(repr(one.name[:50]) for one in inputs[:8]) or "none"
                raise BadInput(f"the model has exactly one input, {INPUT!r}; got {names}")
            (binary,) = tensors.take_binary(inputs, self.binary)
            x = tensors.decode_input(inputs[0], binary, spec, limits)
        check_input(model, x, limits.rows_per_request)
        return x

    def answer_bytes(self, answer: Answer) -> int:
        """About how much work the answer is to encode, in bytes of JSON."""
        return 0 if self.binary_outputs else 20 * answer.logits.numel()


class _Controls:
    """What a request's ``parameters`` ask for. Raises ``BadInput`` for a value of the wrong type."""

    def __init__(self, parameters: dict[str, Any], default_stream: str | None) -> None:
        given = dict(parameters)
        id = given.pop("sequence_id", None)
        if isinstance(id, bool | float) or (isinstance(id, int) and not 0 <= id <= LARGEST):
            raise BadInput(f"sequence_id must be a string or a whole number from 0 to 2^64 - 1, got {id!r}")
        # 0 and the empty string mean no sequence.
        self.stream: str | None = str(id) if id else default_stream
        # Without an id of its own a request neither begins nor ends a stream, least of all the one that all share.
        self.start = _take(given, "sequence_start", bool, False) and bool(id)
        self.end = _take(given, "sequence_end", bool, False) and bool(id)
        self.adapt: bool | None = _take(given, "tta_adapt", bool, None)
        self.policy: str | None = _take(given, "tta_policy", str, None)
        if self.policy is not None and not id:
            raise BadInput("tta_policy needs a sequence_id: it is the policy of the stream that this request begins")
        if self.policy is not None and len(self.policy) > LONGEST_NAME:
            raise BadInput(f"tta_policy must be the name of a policy, got {short(self.policy)}")
        mode: str | None = _take(given, "tta_durability", str, None)
        if mode is not None and not id:
            raise BadInput("tta_durability needs a sequence_id: it says how that stream is stored")
        if mode is not None and mode not in MODES:
            raise BadInput(f"tta_durability must be one of {', '.join(MODES)}, got {short(mode)}")
        self.durability = None if mode is None else DurabilityChange.model_validate({"mode": mode})
        self.number: int | None = _take_number(given, "tta_seq", None)
        self.priority = _take_number(given, "priority", 0)
        microseconds = _take_number(given, "timeout", None)
        self.timeout: float | None = microseconds / 1e6 if microseconds else None
        # Other names may be meant for another server; these can only be meant for this one.
        refuse_unknown("parameter", (name for name in given if name.startswith("tta_")), _OURS)


def _take(given: dict[str, Any], name: str, kind: type[Any], default: Any) -> Any:
    value = given.pop(name, default)
    if value is not default and type(value) is not kind:
        raise BadInput(f"parameter {name} must be {kind.__name__}, got {short(value)}")
    return value


def _take_number(given: dict[str, Any], name: str, default: Any) -> Any:
    value = _take(given, name, int, default)
    if value is not None and value < 0:
        raise BadInput(f"parameter {name} must not be negative, got {value}")
    return value


def _encode(
    asked: _Asked, model: SourceModel, answer: Answer, report: dict[str, Any]
) -> tuple[bytes, dict[str, str], str]:
    wanted: list[InferOutput] = asked.request.outputs
    outputs, blobs = tensors.encode_outputs(wanted, asked.binary_outputs, answer.logits, model.classes)
    header = to_json(
        {
            "model_name": model.name,
            "model_version": VERSION,
            **({} if asked.request.id is None else {"id": asked.request.id}),
            "parameters": report,
            "outputs": outputs,
        }
    )
    if not blobs:
        return header, {}, "application/json"
    return b"".join([header, *blobs]), {HEADER_LENGTH: str(len(header))}, "application/octet-stream"


def _report(stream: str | None, answer: Answer, replayed: bool) -> dict[str, str | int | float | bool]:
    report: dict[str, str | int | float | bool | None] = {
        "stream_id": stream,
        "state_version": answer.version,
        "behind": answer.behind or None,
        "adapted": answer.adapted,
        "policy": answer.policy,
        "confidence": float(answer.confidence.numpy().mean()),
        "entropy_ratio": float(answer.entropy.numpy().mean()) / math.log(max(answer.logits.shape[1], 2)),
        "margin": float(answer.margin.numpy().mean()),
        "drift": answer.drift,
        "verdict": answer.verdict if stream is not None else None,
        "agreement": answer.agreement,
        "served": answer.served,
        "guard_state": None if answer.guard is None else answer.guard.state,
        "evidence": None if answer.guard is None else answer.guard.evidence,
        "benefit": None if answer.guard is None else answer.guard.benefit,
        "request_id": answer.request if stream is not None else None,
        "shed": answer.shed or None,
        "replayed": replayed or None,
        "unsaved_steps": answer.unsaved,
        "lost_steps": answer.lost or None,
    }
    return {key: value for key, value in report.items() if value is not None}
