"""``/v1/streams``: a tenant's streams as resources, and predictions in plain formats."""

from __future__ import annotations

import time
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request, Response
from torch import Tensor

from tta_server.errors import BadInput
from tta_server.http.codec import decode_inputs, multipart
from tta_server.http.guard import guarded, needs, tenant_of
from tta_server.http.images import JPEG, PNG
from tta_server.http.schemas import (
    ConsistencyChange,
    DurabilityChange,
    OpenStream,
    PatchedStream,
    PatchStream,
    Prediction,
    StreamDetail,
    StreamList,
    prediction,
    stream_detail,
    stream_info,
)
from tta_server.http.wire import (
    BINARY,
    INLINE,
    LARGEST,
    PROBLEMS,
    begin_call,
    body_of,
    enough_memory,
    json_body,
    json_of,
    json_response,
    offload,
    refuse_unknown,
    respond,
    to_json,
    unless_gone,
)
from tta_server.service import Service
from tta_server.settings import Consistency, Durability, Right
from tta_server.tenant import Tenant, check_input

_PREDICT_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["inputs"],
                    "additionalProperties": False,
                    "properties": {"inputs": {"type": "array", "items": {}, "description": "Rows, nested."}},
                }
            },
            "application/x-npy": BINARY,
            "application/octet-stream": BINARY,
            "image/png": BINARY,
            "image/jpeg": BINARY,
            "multipart/form-data": {
                "schema": {"type": "object", "additionalProperties": {"type": "string", "format": "binary"}}
            },
        },
    }
}
_PREDICT_QUERY = ("seq", "adapt", "timeout", "priority", "output", "top_k", "datatype")
_LIST_QUERY = ("limit", "cursor", "model", "policy", "adapt")


def durability_of(
    service: Service, tenant: Tenant, id: str, asked: DurabilityChange | None, is_new: bool = False
) -> Durability | None:
    """The durability that is asked for; what it leaves out is as the stream has it, or a new one from the config."""
    if asked is None:
        return None
    exists = tenant.is_open(id) and not is_new
    now = tenant.stream(id).durability if exists else service.settings.state.durability
    return now.model_copy(update=asked.model_dump(exclude_none=True))


def consistency_of(service: Service, tenant: Tenant, id: str, asked: ConsistencyChange | None) -> Consistency | None:
    """Likewise, the consistency."""
    if asked is None:
        return None
    now = tenant.stream(id).consistency if tenant.is_open(id) else service.settings.streams.consistency
    return now.model_copy(update=asked.model_dump(exclude_none=True))


def router(service: Service) -> APIRouter:
    """The routes over ``service``."""
    routes = APIRouter(prefix="/v1/streams", tags=["streams"], responses=PROBLEMS, route_class=guarded(service))
    limits = service.settings.limits

    @routes.put(
        "/{id}",
        response_model=StreamDetail,
        responses={201: {"model": StreamDetail, "description": "Created"}},
        openapi_extra=json_body(OpenStream, required=False),
    )
    @needs(Right.STREAMS)
    async def open_stream(id: str, request: Request) -> Response:
        """Creates a stream (201), or confirms one that is the same (200)."""
        asked = OpenStream.model_validate(await json_of(request, limits))
        tenant = tenant_of(request)
        durability = durability_of(service, tenant, id, asked.durability)
        stream, created = tenant.open(
            id, asked.model, asked.policy, asked.settings, asked.adapt, durability,
            guard=asked.guard, consistency=consistency_of(service, tenant, id, asked.consistency),
        )  # fmt: skip
        await tenant.settle(stream)
        return json_response(stream_detail(tenant, stream), 201 if created else 200)

    @routes.get("", response_model=StreamList)
    @needs(Right.STREAMS)
    async def list_streams(
        request: Request,
        limit: Annotated[int, Query(ge=1, le=1000, description="Most streams in the answer.")] = 100,
        cursor: Annotated[str, Query(description="`next` of the page before.")] = "0",
        model: Annotated[str | None, Query(description="Only streams of this model.")] = None,
        policy: Annotated[str | None, Query(description="Only streams of this policy.")] = None,
        adapt: Annotated[bool | None, Query(description="Only streams with adaptation on, or off.")] = None,
    ) -> Response:
        """The tenant's streams in order of creation, page by page."""
        refuse_unknown("query parameter", request.query_params, _LIST_QUERY)
        if not (cursor.isascii() and cursor.isdigit() and len(cursor) < 20):
            raise BadInput(f"cursor must be the 'next' of another page, got {cursor[:50]!r}")
        tenant = tenant_of(request)
        streams, more = tenant.page(int(cursor), limit, model, policy, adapt)
        following = None if more is None else str(more)
        return json_response({"streams": [stream_info(tenant, one) for one in streams], "next": following})

    @routes.get("/{id}", response_model=StreamDetail)
    @needs(Right.STREAMS)
    async def get_stream(id: str, request: Request) -> Response:
        """One stream."""
        tenant = tenant_of(request)
        return json_response(stream_detail(tenant, tenant.stream(id)))

    @routes.patch("/{id}", response_model=PatchedStream, openapi_extra=json_body(PatchStream))
    @needs(Right.STREAMS)
    async def patch_stream(id: str, request: Request) -> Response:
        """Switches adaptation on or off, or changes settings, policy, durability, consistency or guard, from the next
        request on."""
        asked = PatchStream.model_validate(await json_of(request, limits))
        tenant = tenant_of(request)
        durability = durability_of(service, tenant, id, asked.durability)
        stream, kept = await tenant.update(
            id, asked.adapt, asked.policy, asked.settings, durability, asked.guard,
            consistency_of(service, tenant, id, asked.consistency),
        )  # fmt: skip
        await tenant.settle(stream)
        return json_response({**stream_detail(tenant, stream), "state_kept": kept})

    @routes.post("/{id}/reset", response_model=StreamDetail)
    @needs(Right.STREAMS)
    async def reset_stream(id: str, request: Request) -> Response:
        """Takes the stream back to the source, after the requests that came before."""
        tenant = tenant_of(request)
        stream = await tenant.reset(id)
        await tenant.settle(stream)
        return json_response(stream_detail(tenant, stream))

    @routes.delete("/{id}", status_code=204)
    @needs(Right.STREAMS)
    async def delete_stream(id: str, request: Request) -> Response:
        """Forgets the stream, its state and its snapshots, on the disk too."""
        await tenant_of(request).close(id)
        return Response(status_code=204)

    @routes.post("/{id}/predict", response_model=Prediction, openapi_extra=_PREDICT_BODY)
    @needs(Right.PREDICT)
    async def predict(
        id: str,
        request: Request,
        seq: Annotated[
            int | None, Query(ge=0, le=LARGEST, description="Request number, for retries that cannot adapt twice.")
        ] = None,
        adapt: Annotated[bool | None, Query(description="Overrides the stream's toggle for this request.")] = None,
        timeout: Annotated[float | None, Query(gt=0, description="Longest wait in the queue, seconds.")] = None,
        priority: Annotated[int, Query(ge=0, description="1 goes first; 0 is the default, 2.")] = 0,
        output: Annotated[
            Literal["probabilities", "logits", "none"] | None,
            Query(description="Scores to answer; probabilities, or with top_k none."),
        ] = None,
        top_k: Annotated[int | None, Query(ge=1, description="Answer so many likeliest classes by name.")] = None,
        datatype: Annotated[
            str | None, Query(description="The body is raw rows of this V2 datatype, little-endian.")
        ] = None,
    ) -> Response:
        """Scores for one or more rows, after which the stream adapts to them."""
        refuse_unknown("query parameter", request.query_params, _PREDICT_QUERY)
        tenant = tenant_of(request)
        stream = tenant.stream(id)
        call = begin_call(request, stream.model)
        model = service.models.get(stream.model)
        service.check_room(timeout)
        body = await body_of(request, limits)
        started = time.monotonic()
        spec, kind = model.settings.input, request.headers.get("content-type", "")
        if kind.startswith("multipart/"):
            with enough_memory():
                x = await multipart(body, kind, spec, limits)
        else:

            def decode() -> Tensor:
                return decode_inputs(body, spec, limits, datatype)

            # An image may be much larger than its file.
            x = await offload(decode, len(body) > INLINE or body.startswith((PNG, JPEG)))
        check_input(model, x, limits.rows_per_request)
        call.decode_seconds = time.monotonic() - started
        answer, replayed = await unless_gone(
            request,
            tenant.predict(
                stream.model,
                x,
                stream=id,
                number=seq,
                adapt=adapt,
                timeout=timeout,
                priority=priority,
                origin=call.origin,
            ),
        )
        chosen = output or ("probabilities" if top_k is None else "none")

        def encode() -> tuple[bytes, dict[str, str], str]:
            content = prediction(stream, answer, replayed, model.classes, chosen, top_k)
            return to_json(content), {}, "application/json"

        return await respond(request, call, 10 * answer.logits.numel(), encode)

    return routes
