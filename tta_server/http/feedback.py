"""``/v1/streams/{id}/labels`` and ``/guard``: what clients say of answers later, and what operators say of a stream."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from tta_server.http.guard import guarded, needs, tenant_of
from tta_server.http.schemas import (
    LabelReceipt,
    LabelReport,
    Labels,
    Operate,
    StreamDetail,
    label_report,
    stream_detail,
)
from tta_server.http.wire import PROBLEMS, json_body, json_of, json_response
from tta_server.service import Service
from tta_server.settings import Right
from tta_server.trust.guard import State


def router(service: Service) -> APIRouter:
    """The routes over ``service``."""
    routes = APIRouter(prefix="/v1/streams", tags=["trust"], responses=PROBLEMS, route_class=guarded(service))
    limits = service.settings.limits

    @routes.post("/{id}/labels", response_model=LabelReceipt, openapi_extra=json_body(Labels))
    @needs(Right.PREDICT)
    async def post_labels(id: str, request: Request) -> Response:
        """Tells what the rows of one of the stream's requests were. The same again changes nothing; another label for a
        row that has one is refused."""
        asked = Labels.model_validate(await json_of(request, limits))
        done = await tenant_of(request).label(id, asked.request, asked.labels)
        told = {"taken": len(done.rows), "repeated": done.repeated, "missing": done.missing}
        return json_response({"request": asked.request, **told})

    @routes.get("/{id}/labels", response_model=LabelReport)
    @needs(Right.STREAMS)
    async def get_labels(id: str, request: Request) -> Response:
        """Accuracy of the stream's answers, of its adapted model and of the source, as labels measure it; and the
        labels that the server would like to have."""
        tenant = tenant_of(request)
        return json_response(label_report(tenant, tenant.stream(id)))

    @routes.post("/{id}/guard", response_model=StreamDetail, openapi_extra=json_body(Operate))
    @needs(Right.STREAMS)
    async def operate(id: str, request: Request) -> Response:
        """Puts the stream's guard into a state, where it stays, or lets it decide again."""
        asked = Operate.model_validate(await json_of(request, limits))
        tenant = tenant_of(request)
        stream = await tenant.operate(id, None if asked.state == "auto" else State(asked.state))
        await tenant.settle(stream)
        return json_response(stream_detail(tenant, stream))

    return routes
