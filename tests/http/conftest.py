"""The whole application in this process, over the tiny model."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample
from starlette.routing import BaseRoute, Route
from torch import Tensor

from adapters.base import State
from tests.serving import MODEL, TIMEOUT, Gate, hold, load, rows, same_state, varied
from tta_server.access import DEFAULT_TENANT
from tta_server.app import create_app
from tta_server.engine.source import SourceModel
from tta_server.runner import Runner
from tta_server.service import Service
from tta_server.settings import Settings

Loaded = tuple[Settings, dict[str, SourceModel]]
INFER = f"/v2/models/{MODEL}/infer"
PREDICT = "/v1/streams/s/predict"


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """The tiny model and its config."""
    return load(tmp_path_factory.mktemp("tiny"))


@dataclass(frozen=True)
class Server:
    """A running application and a client of it."""

    app: FastAPI
    client: httpx.AsyncClient

    @property
    def service(self) -> Service:
        """What the routes work with."""
        service: Service = self.app.state.service
        return service

    def known_by(self, token: str) -> Server:
        """The same application, and a client that shows a token."""
        return Server(self.app, client_of(self.app, headers={"authorization": f"Bearer {token}"}))

    @property
    def runner(self) -> Runner:
        """The device thread's."""
        return self.service._runner

    async def hold(self) -> Gate:
        """Keeps requests in the queue until the gate is opened."""
        return await asyncio.to_thread(hold, self.runner)

    async def waiting(self, count: int) -> None:
        """Returns when so many requests are in the queue."""
        async with asyncio.timeout(TIMEOUT):
            while self.runner.waiting != count:
                await asyncio.sleep(0)

    async def settled(self) -> None:
        """Returns when every step is over, adaptation included."""
        async with asyncio.timeout(TIMEOUT):
            while not self.runner._scheduler.idle:
                await asyncio.sleep(0)

    async def stored(self) -> None:
        """Returns when all that is to be stored by now is."""
        await self.settled()
        assert await asyncio.to_thread(self.service._backend.keeper.flush, TIMEOUT)

    async def json(self, method: str, path: str, expect: int = 200, **arguments: Any) -> Any:
        """The content of a response of the expected status."""
        response = await self.client.request(method, path, **arguments)
        assert response.status_code == expect, response.text
        return response.json()

    async def open(self, id: str, **body: Any) -> Any:
        """Creates a stream over ``/v1``."""
        return await self.json("PUT", f"/v1/streams/{id}", 201, json=body)

    async def predict(self, id: str, x: Tensor, **query: Any) -> Any:
        """Asks ``/v1`` for a prediction."""
        return await self.json("POST", f"/v1/streams/{id}/predict", json={"inputs": x.tolist()}, params=query)

    async def info(self, id: str) -> Any:
        """The stream as ``/v1`` tells it, once it is at rest."""
        await self.settled()
        return await self.json("GET", f"/v1/streams/{id}")

    async def adapt(self, id: str = "s", steps: int = 2) -> None:
        """Creates a stream that has learnt something."""
        await self.open(id)
        for seed in range(steps):
            await self.predict(id, rows(4, seed))

    async def listed(self, **query: Any) -> list[str]:
        """The ids of the streams."""
        return [one["id"] for one in (await self.json("GET", "/v1/streams", params=query))["streams"]]

    async def infer(self, x: Tensor, expect: int = 200, model: str = MODEL, **parameters: Any) -> Any:
        """Asks V2 for a prediction."""
        return await self.json("POST", f"/v2/models/{model}/infer", expect, json=infer_body(x, **parameters))


def infer_body(x: Tensor, outputs: Sequence[str] = (), **parameters: Any) -> dict[str, Any]:
    """A V2 request."""
    data = {"name": "input", "shape": list(x.shape), "datatype": "FP32", "data": x.flatten().tolist()}
    body: dict[str, Any] = {"inputs": [data]}
    if outputs:
        body["outputs"] = [{"name": name} for name in outputs]
    if parameters:
        body["parameters"] = parameters
    return body


def routes_of(app: FastAPI) -> list[tuple[str, str]]:
    """Every method and path of an application, whether documented or not."""

    def walk(routes: Iterable[BaseRoute]) -> Iterator[tuple[str, str]]:
        for route in routes:
            included = getattr(route, "original_router", None)  # how newer versions of the framework nest routers
            if included is not None:
                yield from walk(included.routes)
            else:
                assert isinstance(route, Route | APIRoute), "what is this?"
                yield from ((method, route.path) for method in route.methods or ())

    return list(walk(app.routes))


def error_of(response: httpx.Response, status: int) -> str:
    """The text of an error response, whose form is always the same."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    content = response.json()
    assert content.keys() == {"error"}
    text = content["error"]
    assert isinstance(text, str)
    assert text
    return text


def retry_after(response: httpx.Response) -> int:
    """When to come back, in seconds from now."""
    seconds = int(response.headers["retry-after"])
    assert seconds >= 1
    return seconds


def npy(array: Any) -> bytes:
    """An array as a file."""
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def image(pixels: Any, format: str = "PNG") -> bytes:
    """Pixels ``[height, width, 3]``, uint8, as a file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format)
    return file.getvalue()


async def scrape(server: Server) -> list[Sample]:
    """What ``/metrics`` says."""
    response = await server.client.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    return [sample for family in text_string_to_metric_families(response.text) for sample in family.samples]


def value(samples: list[Sample], name: str, **labels: str) -> float:
    """Sum of the series that carry these labels."""
    return sum(one.value for one in samples if one.name == name and labels.items() <= one.labels.items())


class Impatient(httpx.ASGITransport):
    """Gives up on a request that hangs, so that the test fails and the next one runs."""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        async with asyncio.timeout(TIMEOUT):
            return await super().handle_async_request(request)


def client_of(app: FastAPI, **arguments: Any) -> httpx.AsyncClient:
    """A client whose requests go straight to the application."""
    transport = Impatient(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://test", **arguments)


@asynccontextmanager
async def running(loaded: Loaded, **sections: dict[str, Any]) -> AsyncIterator[Server]:
    """The application with some settings replaced, through its whole lifespan; in the end nothing may be left over."""
    settings, models = loaded
    app = create_app(varied(settings, **sections), models)
    async with app.router.lifespan_context(app), client_of(app) as client:
        server = Server(app, client)
        yield server
    check_rest(server)


def check_rest(server: Server) -> None:
    """Fails where something is counted as under way after all requests are over."""
    service = server.service
    assert server.runner.waiting == 0
    assert not any(service.models._busy.values()), "a model is kept busy by nobody"
    assert not any(meter.now for meter in service.access._meters.values()), "a call never ended"
    for tenant in service._tenants.values():
        assert not any(one.flights for one in tenant._streams.values()), "a numbered request never ended"
    server.runner.engine.store.check_integrity()


@asynccontextmanager
async def untouched(server: Server, id: str = "s", tenant: str = DEFAULT_TENANT) -> AsyncIterator[None]:
    """Fails where what happens inside changes a stream: state, version, counters, settings, or that it is there."""

    async def look() -> tuple[dict[str, Any], State]:
        info = await server.info(id)
        stream = server.service.tenant(tenant).stream(id)
        store = server.runner.engine.store
        state = store.export(stream.lane, stream) if store.has_lane(stream.lane) else State({}, {})
        stored = dict.fromkeys(("saved", "saved_version", "unsaved_steps"))  # that goes on by itself
        return info | {"last_seen": None, **stored}, state

    listed = await server.listed()
    info, state = await look()
    yield
    assert await server.listed() == listed
    after, state_after = await look()
    assert after == info
    assert same_state(state, state_after)


@pytest.fixture
async def server(loaded: Loaded) -> AsyncIterator[Server]:
    async with running(loaded) as made:
        yield made


@pytest.fixture(scope="module")
async def refusing(loaded: Loaded) -> AsyncIterator[Server]:
    """A server for requests that are refused: its stream "s" has learnt something, and no test changes it."""
    async with running(loaded) as made:
        await made.adapt()
        yield made
