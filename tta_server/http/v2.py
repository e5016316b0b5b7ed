"""The Open Inference Protocol, V2: health, metadata, statistics and the model repository."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from tta_server import __version__
from tta_server.engine.source import SourceModel
from tta_server.errors import BadInput, Unavailable, UnknownName
from tta_server.http.body import parse_json
from tta_server.http.guard import guarded, needs, public
from tta_server.http.problems import problem
from tta_server.http.schemas_v2 import (
    Live,
    LoadRequest,
    ModelConfig,
    ModelMetadata,
    ModelReady,
    Ready,
    RepositoryModel,
    ServerMetadata,
    StatisticsList,
)
from tta_server.http.tensors import OUTPUTS
from tta_server.http.wire import PROBLEMS, body_of, json_body, json_response
from tta_server.service import Service
from tta_server.settings import Right
from tta_server.statistics import Statistics

INPUT = "input"
VERSION = "1"
PLATFORM = "pytorch"
FAILS = "streams cannot be stored now; what they learn is kept in memory until they can. GET /v1/state says why"
"""All that is told to anybody: the reason may name files."""
EXTENSIONS = (
    "binary_tensor_data", "classification", "model_configuration", "model_repository", "parameters",
    "schedule_policy", "sequence", "statistics",
)  # fmt: skip


VERSIONED: dict[str, Any] = {
    "parameters": [{"name": "version", "in": "path", "required": True, "schema": {"type": "string"}}]
}
"""OpenAPI for the version in a path, which endpoints take from :func:`version_of`: not all their paths have it."""


def find_model(service: Service, name: str, version: str = VERSION) -> SourceModel:
    """The model, if it is ready. Raises ``UnknownName`` or ``Unavailable``."""
    check_version(service, name, version)
    return service.models.get(name)


def version_of(request: Request) -> str:
    """The version in the path, or the only one there is."""
    return str(request.path_params.get("version", VERSION))


def check_version(service: Service, name: str, version: str) -> None:
    """Raises ``UnknownName`` for a model or version that does not exist."""
    service.models.check_name(name)
    if version != VERSION:
        raise UnknownName(f"model {name!r} has version {VERSION} only, asked for was {version!r}")


def router(service: Service, statistics: Statistics) -> APIRouter:
    """The routes over ``service``; ``statistics`` are the ones it records."""
    routes = APIRouter(prefix="/v2", tags=["Open Inference Protocol"], responses=PROBLEMS, route_class=guarded(service))
    limits = service.settings.limits

    @routes.get("/health/live", response_model=Live)
    @public
    async def live() -> Response:
        """The process runs."""
        return json_response({"live": True})

    @routes.get("/health/ready", response_model=Ready)
    @public
    async def ready() -> Response:
        """Requests are taken. They also are while the store fails, which the answer says."""
        refuse_unless_serving()
        keeping = service.keeping()
        problem = FAILS if keeping.problem else None
        stored = keeping.persistent and problem is None
        return json_response({"ready": True, "state": {"stored": stored, "problem": problem}})

    @routes.get("", response_model=ServerMetadata)
    @routes.get("/", include_in_schema=False)
    async def server() -> Response:
        """Server metadata."""
        return json_response({"name": "tta-server", "version": __version__, "extensions": EXTENSIONS})

    def refuse_unless_serving() -> None:
        if service.draining:
            raise Unavailable("the server is shutting down")
        if service.keeping().fenced:
            raise Unavailable("another server has taken the streams of this one over")

    # Of all models

    @routes.get("/models/stats", response_model=StatisticsList)
    @needs(Right.METRICS)
    async def all_statistics() -> Response:
        """Statistics of all models."""
        names = [entry.name for entry in service.models.index()]
        return json_response({"model_stats": [statistics.of(name, VERSION) for name in names]})

    @routes.post("/repository/index", response_model=list[RepositoryModel])
    async def index() -> Response:
        """All models of the config."""
        return json_response(
            [
                {
                    "name": one.name,
                    "version": VERSION,
                    "state": "READY" if one.ready else "UNAVAILABLE",
                    "reason": one.reason,
                }
                for one in service.models.index()
            ]
        )

    empty: dict[str, Any] = {"response_class": Response, "openapi_extra": json_body(LoadRequest, required=False)}

    async def check_load(request: Request) -> None:
        body = await body_of(request, limits)
        asked = LoadRequest.model_validate(parse_json(body, limits) if body else {})
        given = [name for name in asked.parameters if name not in ("unload_dependents",)]
        if given:
            raise BadInput(f"parameter {given[0][:50]!r} is not taken: a model is loaded as the server's config says")

    @routes.post("/repository/models/{name}/load", **empty)
    @needs(Right.ADMIN)
    async def load(name: str, request: Request) -> Response:
        """Loads a model, or loads it again from its files. Streams of other weights are refused until reset."""
        await check_load(request)
        await service.models.load(name)
        return Response()

    @routes.post("/repository/models/{name}/unload", **empty)
    @needs(Right.ADMIN)
    async def unload(name: str, request: Request) -> Response:
        """Takes a model out of memory once its requests under way are done. Its streams keep their states."""
        await check_load(request)
        await service.models.unload(name)
        return Response()

    # Of one model, with and without the version in the path

    @routes.get("/models/{name}", response_model=ModelMetadata)
    @routes.get("/models/{name}/versions/{version}", response_model=ModelMetadata, openapi_extra=VERSIONED)
    async def metadata(name: str, request: Request) -> Response:
        """Model metadata."""
        return json_response(_metadata(find_model(service, name, version_of(request))))

    @routes.get("/models/{name}/ready", response_model=ModelReady)
    @routes.get("/models/{name}/versions/{version}/ready", response_model=ModelReady, openapi_extra=VERSIONED)
    @public
    async def model_ready(name: str, request: Request) -> Response:
        """The model takes requests."""
        refuse_unless_serving()
        return json_response({"name": find_model(service, name, version_of(request)).name, "ready": True})

    @routes.get("/models/{name}/config", response_model=ModelConfig)
    @routes.get("/models/{name}/versions/{version}/config", response_model=ModelConfig, openapi_extra=VERSIONED)
    async def config(name: str, request: Request) -> Response:
        """Model configuration, in the words of Triton."""
        return json_response(_config(find_model(service, name, version_of(request)), limits.rows_per_request))

    @routes.get("/models/{name}/stats", response_model=StatisticsList)
    @routes.get("/models/{name}/versions/{version}/stats", response_model=StatisticsList, openapi_extra=VERSIONED)
    @needs(Right.METRICS)
    async def model_statistics(name: str, request: Request) -> Response:
        """Statistics of one model."""
        check_version(service, name, version_of(request))
        return json_response({"model_stats": [statistics.of(name, VERSION)]})

    # What others have and this server does not

    async def not_offered(request: Request) -> Response:
        return problem(501, f"{request.url.path}: shared memory, trace and logging settings are not offered")

    for path in (
        "/systemsharedmemory/{rest:path}", "/cudasharedmemory/{rest:path}", "/trace/setting", "/logging",
        "/models/{name}/trace/setting",
    ):  # fmt: skip
        routes.add_api_route(path, not_offered, methods=["GET", "POST"], include_in_schema=False)

    return routes


def _metadata(model: SourceModel) -> dict[str, Any]:
    return {
        "name": model.name,
        "versions": [VERSION],
        "platform": PLATFORM,
        "inputs": [{"name": INPUT, "datatype": "FP32", "shape": [-1, *model.settings.input.shape]}],
        "outputs": [{"name": one, "datatype": "FP32", "shape": [-1, len(model.classes)]} for one in OUTPUTS],
    }


def _config(model: SourceModel, most_rows: int) -> dict[str, Any]:
    return {
        "name": model.name,
        "platform": PLATFORM,
        "backend": PLATFORM,
        "max_batch_size": most_rows,
        "input": [{"name": INPUT, "data_type": "TYPE_FP32", "dims": model.settings.input.shape}],
        "output": [{"name": one, "data_type": "TYPE_FP32", "dims": [len(model.classes)]} for one in OUTPUTS],
    }
