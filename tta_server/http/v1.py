"""``/v1``: policies, models, and streams as resources."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response

import adapters
from tta_server.http.codec import decode_inputs, parse_json, read_body
from tta_server.http.schemas import (
    ModelInfo,
    ModelList,
    OpenStream,
    PatchStream,
    PolicyInfo,
    PolicyList,
    Prediction,
    StreamInfo,
    StreamList,
    prediction,
    stream_info,
)
from tta_server.http.wire import PROBLEMS, decode, json_body, json_response, refuse_unknown, unless_gone
from tta_server.policies import describe
from tta_server.service import Service
from tta_server.types import DRIFT, Stream

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
            "application/x-npy": {"schema": {"type": "string", "format": "binary"}},
            "image/png": {"schema": {"type": "string", "format": "binary"}},
            "image/jpeg": {"schema": {"type": "string", "format": "binary"}},
        },
    }
}
_PREDICT_QUERY = ("seq", "adapt", "timeout", "output")


def router(service: Service) -> APIRouter:
    """The routes over ``service``."""
    routes = APIRouter(prefix="/v1", responses=PROBLEMS)
    limits = service.settings.limits

    def info(stream: Stream) -> dict[str, Any]:
        signals = service.signals(stream)
        return stream_info(stream, service.tier(stream), service.state_bytes(stream), signals, signals.get(DRIFT))

    @routes.get("/policies", tags=["policies"], response_model=PolicyList)
    async def list_policies() -> Response:
        """Every policy with the JSON schema of its settings."""
        return json_response({"policies": [describe(name) for name in adapters.policies()]})

    @routes.get("/policies/{name}", tags=["policies"], response_model=PolicyInfo)
    async def get_policy(name: str) -> Response:
        """One policy with the JSON schema of its settings."""
        return json_response(describe(name))

    def model_info(name: str) -> dict[str, Any]:
        model = service.model(name)
        return {
            "name": model.name,
            "architecture": model.architecture,
            "digest": model.digest,
            "parameters": model.parameters,
            "input": model.settings.input.model_dump(),
            "classes": model.classes,
            "feature_dim": model.source.feature_dim,
            "adaptable": {"layers": model.norm_layers, "values": model.adaptable_values},
            "artefacts": sorted(model.source.artefacts),
            "default_policy": model.settings.policy,
            "policies": list(model.reports.values()),
        }

    @routes.get("/models", tags=["models"], response_model=ModelList)
    async def list_models() -> Response:
        """Every source model."""
        return json_response({"models": [model_info(name) for name in service.models]})

    @routes.get("/models/{name}", tags=["models"], response_model=ModelInfo)
    async def get_model(name: str) -> Response:
        """One source model: digest, input, adaptable layers, bytes per stream by policy."""
        return json_response(model_info(name))

    @routes.put(
        "/streams/{id}",
        tags=["streams"],
        response_model=StreamInfo,
        responses={201: {"model": StreamInfo, "description": "Created"}},
        openapi_extra=json_body(OpenStream, required=False),
    )
    async def open_stream(id: str, request: Request) -> Response:
        """Creates a stream (201), or confirms one that is the same (200)."""
        body = await read_body(request, limits.body_bytes)
        asked = OpenStream.model_validate(parse_json(body) if body else {})
        stream, created = service.open(id, asked.model, asked.policy, asked.settings, asked.adapt)
        return json_response(info(stream), 201 if created else 200)

    @routes.get("/streams", tags=["streams"], response_model=StreamList)
    async def list_streams() -> Response:
        """All streams, in order of creation."""
        return json_response({"streams": [info(stream) for stream in service.streams()]})

    @routes.get("/streams/{id}", tags=["streams"], response_model=StreamInfo)
    async def get_stream(id: str) -> Response:
        """One stream."""
        return json_response(info(service.stream(id)))

    @routes.patch("/streams/{id}", tags=["streams"], response_model=StreamInfo, openapi_extra=json_body(PatchStream))
    async def patch_stream(id: str, request: Request) -> Response:
        """Switches adaptation on or off, from the next request on. The state is kept meanwhile."""
        asked = PatchStream.model_validate(parse_json(await read_body(request, limits.body_bytes)))
        stream = service.stream(id)
        stream.adapt = asked.adapt
        return json_response(info(stream))

    @routes.post("/streams/{id}/reset", tags=["streams"], response_model=StreamInfo)
    async def reset_stream(id: str) -> Response:
        """Takes the stream back to the source, after the requests that came before."""
        return json_response(info(await service.reset(id)))

    @routes.delete("/streams/{id}", tags=["streams"], status_code=204)
    async def delete_stream(id: str) -> Response:
        """Forgets the stream and its state."""
        await service.close(id)
        return Response(status_code=204)

    @routes.post("/streams/{id}/predict", tags=["streams"], response_model=Prediction, openapi_extra=_PREDICT_BODY)
    async def predict(
        id: str,
        request: Request,
        seq: Annotated[
            int | None, Query(ge=0, description="Request number, for retries that cannot adapt twice.")
        ] = None,
        adapt: Annotated[bool | None, Query(description="Overrides the stream's toggle for this request.")] = None,
        timeout: Annotated[float | None, Query(gt=0, description="Longest wait in the queue, seconds.")] = None,
        output: Annotated[Literal["probabilities", "logits"], Query()] = "probabilities",
    ) -> Response:
        """Scores for one or more rows, after which the stream adapts to them."""
        refuse_unknown("query parameter", request.query_params, _PREDICT_QUERY)
        stream = service.stream(id)
        request.state.model = stream.model
        model = service.models[stream.model]
        body = await read_body(request, limits.body_bytes)
        x = await decode(body, lambda raw: decode_inputs(raw, model.settings.input, limits.rows_per_request))
        answer, replayed = await unless_gone(
            request,
            service.predict(stream.model, x, stream=id, number=seq, adapt=adapt, timeout=timeout),
        )
        return json_response(prediction(stream, answer, replayed, model.classes, output))

    return routes
