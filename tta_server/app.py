"""The composition root: the only file that knows every part."""

from __future__ import annotations

import asyncio
import logging
import math
import signal
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import uvicorn
from fastapi import APIRouter, FastAPI, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import adapters
from tta_server import __version__
from tta_server.drift.monitor import Monitor
from tta_server.engine.engine import Engine
from tta_server.engine.report import check_defaults, policy_report
from tta_server.engine.source import SourceModel, choose_device, load_model
from tta_server.http import problems, v1, v2
from tta_server.http.schemas import REQUESTS
from tta_server.metrics import PrometheusRecorder, Recorder
from tta_server.policies import make_policy, starting_settings
from tta_server.runner import HANGS, Runner
from tta_server.scheduler import Bounds, Scheduler
from tta_server.service import Service
from tta_server.settings import Settings
from tta_server.state.store import StateStore

log = logging.getLogger(__name__)


def load_models(settings: Settings) -> dict[str, SourceModel]:
    """Loads every model of the config, checks its policy presets and tries every policy on it.

    Raises ``ConfigError``, ``BadInput`` or ``UnknownName``.
    """
    device = choose_device(settings.server.device)
    for model in settings.models.values():
        for policy in {model.policy, *model.policies}:
            make_policy(policy, starting_settings(policy, model))
    models = {name: load_model(name, settings, device) for name in settings.models}
    return {
        name: replace(model, reports={policy: policy_report(policy, model) for policy in adapters.policies()})
        for name, model in models.items()
    }


def create_app(settings: Settings, models: dict[str, SourceModel]) -> FastAPI:
    """The server as an ASGI application. Its lifespan starts the device thread, and drains it at the end.

    Raises ``ConfigError`` for a model whose own policy cannot run on it.
    """
    check_defaults(models)
    limits = settings.limits
    store = StateStore(limits.slots, next(iter(models.values())).network.device)
    engine = Engine(models, store, Monitor(settings.monitor.half_life), settings.monitor.shadow_ratio)
    scheduler = Scheduler(
        Bounds(
            max_rows=limits.batch_rows,
            max_streams=limits.slots,
            per_stream=limits.queue_per_stream,
            in_all=limits.queue,
        )
    )
    recorder = PrometheusRecorder(
        {name: len(model.classes) for name, model in models.items()}, lambda: service.levels()
    )
    runner = Runner(engine, scheduler, recorder)
    service = Service(settings, models, runner)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        runner.start()
        yield
        given_up = await service.drain()
        log.info("drained", extra={"given_up": given_up})

    app = FastAPI(
        title="tta-server",
        version=__version__,
        summary="Test-time adaptation of vision models, per client stream",
        lifespan=lifespan,
        redoc_url=None,
        redirect_slashes=False,
    )
    operations = APIRouter(tags=["operations"])

    @operations.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Everything measured, in Prometheus' text format."""
        return Response(recorder.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    routers = (v1.router(service), v2.router(service), operations)
    for router in routers:
        app.include_router(router)
    app.state.service = service
    problems.install(app, [route for router in routers for route in router.routes])
    app.add_middleware(_Measured, recorder=recorder)
    _correct_openapi(app)
    return app


def serve(app: FastAPI, settings: Settings) -> None:
    """Runs ``app`` until it is told to stop; then answers or refuses what is under way, within the limits."""
    # uvicorn raises the signal that ended it once more when it is done. Told to stop, it did: that is exit status 0.
    for sign in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sign, lambda *_: None)
    config = uvicorn.Config(
        app,
        host=settings.server.host,
        port=settings.server.port,
        log_config=None,
        access_log=False,
        # Longer than the queue may take, so that every request gets its answer or its refusal.
        timeout_graceful_shutdown=math.ceil(settings.limits.drain_seconds + HANGS) + 5,
    )
    server = _Server(config, app.state.service)
    server.run()


class _Server(uvicorn.Server):
    """Drains the queue while uvicorn waits for its connections, not after it."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        draining = asyncio.create_task(self._service.drain())
        await super().shutdown(sockets)
        await draining


class _Measured:
    """Middleware that tells the recorder about every request: its route's template, status and duration."""

    def __init__(self, app: ASGIApp, recorder: Recorder) -> None:
        self._app, self._recorder = app, recorder

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.monotonic(), 500

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            route = getattr(scope.get("route"), "path", "unmatched")
            model = scope.get("state", {}).get("model", "")
            self._recorder.request(model, route, status, time.monotonic() - started)


def _correct_openapi(app: FastAPI) -> None:
    """Mends the framework's document: no 422 (this server answers 400, in its own shape), and the bodies it misses."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        document = generate()
        for path in document["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        components = document["components"]["schemas"]
        for name in ("HTTPValidationError", "ValidationError"):
            components.pop(name, None)
        for request in REQUESTS:
            schema = request.model_json_schema(ref_template="#/components/schemas/{model}")
            components |= schema.pop("$defs", {}) | {request.__name__: schema}
        return document

    app.openapi = openapi  # type: ignore[method-assign]  # the framework's documented way to change the document
