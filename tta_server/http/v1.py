"""``/v1``: policies and models."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Response

import adapters
from tta_server.engine.source import SourceModel
from tta_server.http.guard import guarded
from tta_server.http.schemas import ModelInfo, ModelList, PolicyInfo, PolicyList
from tta_server.http.wire import PROBLEMS, json_response
from tta_server.policies import describe
from tta_server.service import Service


def router(service: Service) -> APIRouter:
    """The routes over ``service``."""
    routes = APIRouter(prefix="/v1", responses=PROBLEMS, route_class=guarded(service))

    @routes.get("/policies", tags=["policies"], response_model=PolicyList)
    async def list_policies() -> Response:
        """Every policy with the JSON schema of its settings."""
        return json_response({"policies": [describe(name) for name in adapters.policies()]})

    @routes.get("/policies/{name}", tags=["policies"], response_model=PolicyInfo)
    async def get_policy(name: str) -> Response:
        """One policy with the JSON schema of its settings."""
        return json_response(describe(name))

    @routes.get("/models", tags=["models"], response_model=ModelList)
    async def list_models() -> Response:
        """Every source model that is loaded."""
        return json_response({"models": [_model_info(model) for model in service.models.loaded().values()]})

    @routes.get("/models/{name}", tags=["models"], response_model=ModelInfo)
    async def get_model(name: str) -> Response:
        """One source model: digest, input, adaptable layers, bytes per stream by policy."""
        return json_response(_model_info(service.models.get(name)))

    return routes


def _model_info(model: SourceModel) -> dict[str, Any]:
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
