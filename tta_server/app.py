"""The composition root: the only file that knows every part."""

from __future__ import annotations

import asyncio
import gc
import ipaddress
import logging
import math
import resource
import signal
import socket
import ssl
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Any

import uvicorn
from fastapi import APIRouter, FastAPI, Query, Request, Response
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import State
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import adapters
from tta_server import __version__, logs, report_card
from tta_server.access import Access
from tta_server.drift.monitor import Monitor
from tta_server.engine.engine import Engine
from tta_server.engine.merging import best_rows
from tta_server.engine.report import check_defaults, policy_report
from tta_server.engine.source import SourceModel, choose_device, load_model
from tta_server.engine.threads import in_passing
from tta_server.errors import ConfigError
from tta_server.events import EventLog
from tta_server.http import feedback, infer, live, problems, schemas, schemas_v2, snapshots, streams, v1, v2
from tta_server.http.guard import guarded, needs
from tta_server.http.protocol import bounded
from tta_server.http.wire import PROBLEMS, refuse_unknown, request_id
from tta_server.metrics import Recorder, Recorders
from tta_server.metrics.prometheus import PrometheusRecorder
from tta_server.metrics.scrape import Watchlist, matcher
from tta_server.policies import make_policy, starting_settings
from tta_server.runner import HANGS, Runner
from tta_server.scheduler import Bounds, Scheduler
from tta_server.service import Service
from tta_server.settings import Right, Settings
from tta_server.state import memory
from tta_server.state.keeper import Keeper
from tta_server.state.memory import Budget
from tta_server.state.sqlite import SqliteStore
from tta_server.state.store import StateStore
from tta_server.statistics import Statistics
from tta_server.types import Call, Event, Origin

if TYPE_CHECKING:
    from fastapi.telemetry import TelemetryConfig

    from tta_server.traces import Traces

log = logging.getLogger(__name__)

TEXT = "text/plain; version=0.0.4; charset=utf-8"

_SPANS_ONLY: TelemetryConfig = {"metrics": False, "logs": False, "operation_spans": False, "auto_configure": False}
"""Of what the framework can tell OpenTelemetry: a span for each request."""


def load_models(settings: Settings) -> dict[str, SourceModel]:
    """Loads every model of the config, checks its policy presets and tries every policy on it.

    Raises ``ConfigError``, ``BadInput`` or ``UnknownName``.
    """
    for model in settings.models.values():
        for policy in {model.policy, *model.policies}:
            make_policy(policy, starting_settings(policy, model))
    return {name: _load(settings, name) for name in settings.models}


def _load(settings: Settings, name: str) -> SourceModel:
    def load() -> SourceModel:
        model = load_model(name, settings, choose_device(settings.server.device))
        reports = {policy: policy_report(policy, model) for policy in adapters.policies()}
        cards = report_card.read_card(report_card.card_path(settings.artefacts_path(name)), model, settings.guard)
        for policy in cards.keys() & reports.keys():
            reports[policy]["card"] = cards[policy].model_dump()
        if cards:
            verdicts = {policy: card.verdict for policy, card in sorted(cards.items())}
            log.info("report card", extra={"model": name, "verdicts": verdicts})
        return replace(model, reports=reports)

    return in_passing(load)


def measure_memory(settings: Settings, models: Mapping[str, SourceModel]) -> Budget:
    """What stream states may take, beside these models."""
    return memory.measure(settings.limits, next(iter(models.values())).network.device)


def _default_bytes(model: SourceModel) -> int:
    """Of the state of a stream of the model's own policy."""
    return int(model.reports[model.settings.policy]["bytes_per_stream"])


def create_app(settings: Settings, models: dict[str, SourceModel]) -> FastAPI:
    """The server as an ASGI application. Its lifespan starts the device thread, and drains it at the end.

    Raises ``ConfigError`` for a model whose own policy cannot run on it, for tokens that cannot be used, and for traces
    whose packages are missing.
    """
    check_defaults(models)
    limits = settings.limits
    device, budget = next(iter(models.values())).network.device, measure_memory(settings, models)
    log.info("memory for stream states", extra={
        "device_bytes": budget.device_bytes, "host_bytes": budget.host_bytes,
        "slots": {name: budget.fit(_default_bytes(model)) for name, model in models.items()},
    })  # fmt: skip
    folder = None if settings.state.folder is None else settings.folder / settings.state.folder

    def tell(event: Event) -> None:
        recorder.event(event)

    def timed(operation: str, seconds: float) -> None:
        prometheus.stored(operation, seconds)

    keeper = Keeper(SqliteStore(folder, settings.state.snapshot_steps, settings.state.snapshots), timed)
    store = StateStore(budget, device, keeper, settings.state.idle_seconds, tell)
    watching = settings.monitor
    monitor = Monitor(watching.half_life)
    engine = Engine(
        models,
        store,
        monitor,
        watching.shadow_ratio,
        watching.frozen_ratio,
        watching.enabled,
        watching.estimate_every,
    )
    merged = limits.batch_rows or in_passing(lambda: max(map(best_rows, models.values())))
    scheduler = Scheduler(
        Bounds(
            max_rows=merged,
            open_rows=limits.open_rows or max(2 * merged, 16),
            max_streams=min(limits.batch_streams, budget.slots),
            per_stream=limits.queue_per_stream,
            in_all=limits.queue,
            shed_share=limits.shed_share,
        )
    )
    prometheus = PrometheusRecorder(lambda: service.levels(), monitor, Watchlist(watching.watched, watching.worst))
    statistics, events = Statistics(), EventLog(watching.events)
    traces = _traces(settings, monitor)
    recorder = Recorders(prometheus, statistics, events, logs.EventLogger(), *([] if traces is None else [traces]))
    runner = Runner(engine, scheduler, recorder)

    def load(name: str) -> SourceModel:
        model = _load(settings, name)
        check_defaults({name: model})
        return model

    service = Service(settings, models, runner, keeper, Access(settings.auth, settings.folder), load)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.begin()
        expiring = asyncio.create_task(service.expire())
        yield
        expiring.cancel()
        drained = await service.drain()
        log.info("drained", extra=asdict(drained))
        if traces is not None:
            await asyncio.to_thread(traces.close)

    app = FastAPI(
        title="tta-server",
        version=__version__,
        summary="Test-time adaptation of vision models, per client stream",
        lifespan=lifespan,
        redoc_url=None,
        redirect_slashes=False,
        telemetry=None if traces is None else {**_SPANS_ONLY, "tracer_provider": traces.provider},
    )
    operations = APIRouter(tags=["operations"], responses=PROBLEMS, route_class=guarded(service))

    @operations.get("/metrics", response_class=Response)
    @needs(Right.METRICS)
    async def metrics() -> Response:
        """Everything measured, in Prometheus' text format."""
        return Response(prometheus.render(), media_type=TEXT)

    @operations.get("/metrics/streams", response_class=Response)
    @needs(Right.METRICS)
    async def stream_metrics(
        request: Request,
        match: Annotated[str, Query(max_length=256, description="Of the ids; with `*` and `?`.")] = "*",
        limit: Annotated[int, Query(ge=1, le=10_000, description="Most streams.")] = 1000,
    ) -> Response:
        """Single streams' signals, in Prometheus' text format, for a scrape job of its own."""
        refuse_unknown("query parameter", request.query_params, ("match", "limit"))
        fits = matcher([match])
        chosen = [stream for stream in service.levels().streams if fits(stream)]
        # Ten thousand take half a second.
        text = await run_in_threadpool(lambda: prometheus.render_streams(chosen[:limit]))
        return Response(text, media_type=TEXT)

    # In the order in which a request's path is looked up: predictions first.
    routers = (
        infer.router(service), streams.router(service), snapshots.router(service), feedback.router(service),
        v1.router(service),
        v2.router(service, statistics), live.router(service, events), operations,
    )  # fmt: skip
    for router in routers:
        app.include_router(router)
    app.state.service = service
    problems.install(app, [route for router in routers for route in router.routes])
    app.add_middleware(_MetricsApart, state=app.state)
    app.add_middleware(_Measured, recorder=recorder, traces=traces)  # the last one added comes first
    _correct_openapi(app)
    return app


def check_exposure(settings: Settings, insecure: bool) -> None:
    """Raises ``ConfigError`` where strangers could reach a server that asks nobody for a token."""
    server, auth = settings.server, settings.auth
    if insecure or auth.tokens or auth.file is not None:
        return
    hosts = [server.host] if server.metrics is None else [server.host, server.metrics.host]
    for host in hosts:
        if not _is_loopback(host):
            raise ConfigError(
                f"others can reach {host}, and anybody who does could use every stream: set auth.tokens or auth.file "
                "(tta-server token makes a token), or start with --insecure if something else keeps strangers out"
            )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def serve(app: FastAPI, settings: Settings, take_over: bool = False) -> None:
    """Runs ``app`` until it is told to stop; then answers or refuses what is under way, within the limits.

    Takes the streams once it has its address: who cannot serve them leaves them to who does. Raises ``ConfigError``
    for certificates, an address or a store that cannot be used.
    """
    # uvicorn raises the signal that ended it once more when it is done. Told to stop, it did: that is exit status 0.
    for sign in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sign, lambda *_: None)
    limits, tls = settings.limits, _tls(settings)
    config = uvicorn.Config(
        app,
        host=settings.server.host,
        port=settings.server.port,
        http=bounded(limits),
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=math.ceil(limits.idle_seconds),
        # Longer than the queue may take, so that every request gets its answer or its refusal.
        timeout_graceful_shutdown=math.ceil(limits.drain_seconds + HANGS + settings.state.flush_seconds) + 5,
        **tls,
    )
    try:
        config.load()
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"server.tls cannot be used: {error}") from error
    _allow_connections(limits.connections)
    # What is loaded by now stays: a collection of garbage need not look at it, and pause the server for that.
    gc.collect()
    gc.freeze()
    sockets = [_bind(config)]
    if settings.server.metrics is not None:
        apart = settings.server.metrics
        own = uvicorn.Config(app, host=apart.host, port=apart.port, log_config=None, **tls)
        sockets.append(_bind(own))
        app.state.metrics_port = sockets[1].getsockname()[1]
    app.state.service.begin(take_over)
    _Server(config, app.state.service).run(sockets)


def _bind(config: uvicorn.Config) -> socket.socket:
    try:
        return config.bind_socket()
    except SystemExit as error:  # after it has logged why
        raise ConfigError(f"cannot listen on {config.host} port {config.port}") from error


def _allow_connections(most: int) -> None:
    """Asks the system for enough file descriptors, of which the usual 1024 are fewer than connections may be open."""
    wanted = most + 256
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed < wanted:
        log.warning("limits.connections = %d needs about %d file descriptors; ulimit -n allows %d", most, wanted, hard)


def _tls(settings: Settings) -> dict[str, Any]:
    """What uvicorn needs to know of it."""
    tls = settings.server.tls
    if tls is None:
        return {}
    chosen: dict[str, Any] = {
        "ssl_certfile": settings.find(tls.certificate),
        "ssl_keyfile": settings.find(tls.key),
        "ssl_keyfile_password": None if tls.key_password is None else tls.key_password.get_secret_value(),
    }
    if tls.client_ca is not None:
        chosen |= {"ssl_ca_certs": str(settings.find(tls.client_ca)), "ssl_cert_reqs": ssl.CERT_REQUIRED}
    return chosen


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
    """Middleware that gives every request its id, and tells the recorder its route's template, status and duration."""

    def __init__(self, app: ASGIApp, recorder: Recorder, traces: Traces | None) -> None:
        self._app, self._recorder, self._traces = app, recorder, traces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, request = time.monotonic(), request_id(scope["headers"])
        call = Call(origin=Origin(request, "" if self._traces is None else self._traces.begin(request)))
        scope["call"] = call
        with logs.about(call.origin):
            await self._measure(call, started, scope, receive, send)

    async def _measure(self, call: Call, started: float, scope: Scope, receive: Receive, send: Send) -> None:
        begun, header = False, (b"x-request-id", call.origin.request.encode())

        async def watched(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun, call.code = True, message["status"]
                message = {**message, "headers": [*message["headers"], header]}
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception as error:
            if begun:
                raise
            # Here and not in the framework's own handler, which raises on: the connection would not survive that.
            await problems.unexpected(scope["path"], error)(scope, receive, watched)
        finally:
            call.route = getattr(scope.get("route"), "path", "unmatched")
            call.seconds = time.monotonic() - started
            self._recorder.request(call)


def _traces(settings: Settings, monitor: Monitor) -> Traces | None:
    """The traces, where the config asks for them. Raises ``ConfigError`` without their packages."""
    if settings.traces is None:
        return None
    try:
        from tta_server.traces import Traces
    except ImportError as error:
        raise ConfigError(f"{error}; traces need more packages: pip install 'tta-server[otel]'") from error
    return Traces(settings.traces, monitor.verdict)


class _MetricsApart:
    """Middleware that keeps ``/metrics``, where it has an address of its own, there and everything else off it."""

    def __init__(self, app: ASGIApp, state: State) -> None:
        self._app, self._state = app, state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        port = getattr(self._state, "metrics_port", None)
        if scope["type"] == "http" and port is not None:
            server = scope.get("server") or ("", None)
            if (server[1] == port) != (f"{scope['path']}/".startswith("/metrics/")):
                await problems.problem(404, f"no such path on this address: {scope['path']}")(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _correct_openapi(app: FastAPI) -> None:
    """Mends the framework's document: no 422 (this server answers 400, in its own shape), and the bodies it misses."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        document = generate()
        for path in document["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        document["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{}, {"token": []}]
        components = document["components"]["schemas"]
        for name in ("HTTPValidationError", "ValidationError"):
            components.pop(name, None)
        for request in (*schemas.REQUESTS, *schemas_v2.REQUESTS):
            schema = request.model_json_schema(ref_template="#/components/schemas/{model}")
            components |= schema.pop("$defs", {}) | {request.__name__: schema}
        return document

    app.openapi = openapi  # type: ignore[method-assign]  # the framework's documented way to change the document
