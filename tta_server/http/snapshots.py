"""``/v1/streams/{id}/...``: a stream's past and copies of it. Snapshots, rollback, fork, export and import."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from tta_server.history import History
from tta_server.http.guard import guarded, needs, tenant_of
from tta_server.http.schemas import (
    Fork,
    NewSnapshot,
    Problem,
    Rollback,
    SnapshotInfo,
    SnapshotList,
    StreamDetail,
    snapshot_info,
    stream_detail,
)
from tta_server.http.wire import BINARY, INLINE, PROBLEMS, body_of, json_body, json_of, json_response, offload
from tta_server.service import Service
from tta_server.settings import Right
from tta_server.state.portable import Portable

FILE = "application/octet-stream"
_CREATED: dict[int | str, dict[str, Any]] = {201: {"model": StreamDetail, "description": "Created"}}
_FILE_BODY = {"requestBody": {"required": True, "content": {FILE: BINARY}}}


def _refused(**reasons: str) -> dict[int | str, dict[str, Any]]:
    """OpenAPI for refusals by status, as ``_409``."""
    return {int(status[1:]): {"model": Problem, "description": text} for status, text in reasons.items()}


_FAILING = "Another process has the streams now, the store cannot be written or read, or the server shuts down"


def router(service: Service) -> APIRouter:
    """The routes over ``service``."""
    routes = APIRouter(prefix="/v1/streams/{id}", tags=["snapshots"], responses=PROBLEMS, route_class=guarded(service))
    limits = service.settings.limits

    def history_of(request: Request) -> History:
        return service.history(tenant_of(request))

    @routes.get("/snapshots", response_model=SnapshotList, responses=_refused(_503=_FAILING))
    @needs(Right.STREAMS)
    async def list_snapshots(id: str, request: Request) -> Response:
        """The states of the stream that are kept, newest first: named ones, automatic ones, the last two stored."""
        found = await history_of(request).snapshots(id)
        return json_response({"snapshots": [snapshot_info(one) for one in found]})

    @routes.post(
        "/snapshots",
        status_code=201,
        response_model=SnapshotInfo,
        responses=_refused(
            _409="The stream has a snapshot of that name", _429="It has as many as it may", _503=_FAILING
        ),
        openapi_extra=json_body(NewSnapshot),
    )
    @needs(Right.STREAMS)
    async def mark(id: str, request: Request) -> Response:
        """Stores the state as it is after the requests that came before, and keeps it under a name."""
        asked = NewSnapshot.model_validate(await json_of(request, limits))
        return json_response(snapshot_info(await history_of(request).mark(id, asked.name)), 201)

    @routes.delete("/snapshots/{name}", status_code=204, responses=_refused(_503=_FAILING))
    @needs(Right.STREAMS)
    async def unmark(id: str, name: str, request: Request) -> Response:
        """Takes a name off a state, which is then kept no longer than one that never had a name."""
        await history_of(request).unmark(id, name)
        return Response(status_code=204)

    @routes.post(
        "/rollback",
        response_model=StreamDetail,
        responses=_refused(_409="The state is of another policy or model, or it is damaged", _503=_FAILING),
        openapi_extra=json_body(Rollback),
    )
    @needs(Right.STREAMS)
    async def rollback(id: str, request: Request) -> Response:
        """Takes the stream back to a state that is kept, after the requests that came before."""
        asked = Rollback.model_validate(await json_of(request, limits))
        stream = await history_of(request).rollback(id, asked.snapshot, asked.version)
        return json_response(stream_detail(tenant_of(request), stream))

    @routes.post(
        "/fork",
        status_code=201,
        response_model=StreamDetail,
        responses=_refused(_409="There is a stream of the new id", _429="A limit on streams", _503=_FAILING),
        openapi_extra=json_body(Fork),
    )
    @needs(Right.STREAMS)
    async def fork(id: str, request: Request) -> Response:
        """Copies the stream, as it is after the requests that came before, to a new id."""
        asked = Fork.model_validate(await json_of(request, limits))
        stream = await history_of(request).fork(id, asked.id)
        response = json_response(stream_detail(tenant_of(request), stream), 201)
        response.headers["Location"] = f"/v1/streams/{stream.id}"
        return response

    @routes.get(
        "/state",
        response_class=Response,
        responses={200: {"content": {FILE: BINARY}}, **_refused(_409="The model has other weights now", _503=_FAILING)},
    )
    @needs(Right.STREAMS)
    async def export_state(id: str, request: Request) -> Response:
        """The state, as it is after the requests that came before: a safetensors file with a manifest."""
        file = await history_of(request).export(id)
        return Response(
            file, headers={"Content-Disposition": f'attachment; filename="{id}.safetensors"'}, media_type=FILE
        )

    @routes.put(
        "/state",
        response_model=StreamDetail,
        responses={
            **_CREATED,
            **_refused(
                _409="The file is of a model, policy or settings that are not there, or not the stream's",
                _413="The file is over limits.import_bytes",
                _429="A limit on streams",
                _503=_FAILING,
            ),
        },
        openapi_extra=_FILE_BODY,
    )
    @needs(Right.STREAMS)
    async def import_state(id: str, request: Request) -> Response:
        """Gives a stream the state of an exported file (200), or makes one with it (201)."""
        body = await body_of(request, limits, "import_bytes", "import_bytes")
        file = await offload(lambda: Portable.parse(bytes(body)), len(body) > INLINE)
        stream, is_new = await history_of(request).restore(id, file)
        return json_response(stream_detail(tenant_of(request), stream), 201 if is_new else 200)

    return routes
