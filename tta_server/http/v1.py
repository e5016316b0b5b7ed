"""``/v1``: policies, models, and how streams are stored."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Response

import adapters
from tta_server.engine.source import SourceModel
from tta_server.http.guard import guarded, needs
from tta_server.http.schemas import ModelInfo, ModelList, PolicyInfo, PolicyList, StoreInfo
from tta_server.http.wire import PROBLEMS, json_response
from tta_server.policies import describe
from tta_server.service import Service
from tta_server.settings import Right


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

    @routes.get("/state", tags=["operations"], response_model=StoreInfo)
    @needs(Right.METRICS)
    async def state() -> Response:
        """How the streams of all tenants are stored, and what keeps them from it."""
        return json_response(_store_info(service))

    return routes


def _store_info(service: Service) -> dict[str, Any]:
    levels = service.levels()
    keeping = levels.keeping
    unsaved = [one.unsaved for one in levels.streams if one.durability.mode != "none" and one.unsaved]
    return {
        "persistent": keeping.persistent,
        "problem": keeping.problem or None,
        "fenced": keeping.fenced,
        "waiting": keeping.waiting,
        "bytes": keeping.bytes,
        "streams": len(levels.streams),
        "unsaved_streams": len(unsaved),
        "unsaved_steps": max(unsaved, default=0),
        "tiers": {tier: {"streams": count, "bytes": size} for tier, (count, size) in levels.states.items()},
        "totals": asdict(keeping.tally),
        "last_shutdown": None if keeping.last_shutdown is None else asdict(keeping.last_shutdown),
    }


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
