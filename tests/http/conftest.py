"""The whole application in this process, over the tiny model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import httpx
import pytest
from fastapi import FastAPI
from torch import Tensor

from tests.serving import TIMEOUT, Gate, hold, load, varied
from tta_server import app as tta_app
from tta_server.engine.source import SourceModel
from tta_server.runner import Runner
from tta_server.service import Service
from tta_server.settings import Settings

Loaded = tuple[Settings, dict[str, SourceModel]]


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
    service: Service

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

    async def infer(self, x: Tensor, expect: int = 200, model: str = "tiny", **parameters: Any) -> Any:
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


class Impatient(httpx.ASGITransport):
    """Gives up on a request that hangs, so that the test fails and the next one runs."""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        async with asyncio.timeout(TIMEOUT):
            return await super().handle_async_request(request)


@asynccontextmanager
async def running(loaded: Loaded, **sections: dict[str, Any]) -> AsyncIterator[Server]:
    """The application with some settings replaced, through its whole lifespan."""
    settings, models = loaded
    made: list[Service] = []

    def keep(*parts: Any) -> Service:
        made.append(Service(*parts))
        return made[0]

    with patch.object(tta_app, "Service", keep):
        app = tta_app.create_app(varied(settings, **sections), models)
    transport = Impatient(app, raise_app_exceptions=False)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://test") as client,
    ):
        server = Server(app, client, made[0])
        yield server
    server.runner.engine.store.check_integrity()


@pytest.fixture
async def server(loaded: Loaded) -> AsyncIterator[Server]:
    async with running(loaded) as made:
        yield made
