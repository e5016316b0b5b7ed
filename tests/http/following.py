"""Following a path's server-sent events in this process, where the usual client would wait for their end."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx
from starlette.types import ASGIApp, Message

from tests.http.conftest import Server
from tests.serving import TIMEOUT


@dataclass(frozen=True)
class Event:
    """One event as it came."""

    fields: dict[str, str]

    @property
    def data(self) -> Any:
        """Its content."""
        return json.loads(self.fields["data"])

    @property
    def id(self) -> str:
        """Where to go on behind it."""
        return self.fields["id"]


@dataclass(frozen=True)
class Following:
    """A response that goes on."""

    response: httpx.Response
    _lines: AsyncIterator[str]

    async def next(self) -> Event:
        """The next event that has data. Raises ``EOFError`` when the server ended the response."""
        fields: dict[str, str] = {}
        async with asyncio.timeout(TIMEOUT):
            async for line in self._lines:
                name, _, text = line.partition(": ")
                if name:
                    fields[name] = text
                elif "data" in fields:
                    return Event(fields)
        raise EOFError

    async def ended(self) -> None:
        """Returns when the server has ended the response, whatever comes before."""
        try:
            while True:
                await self.next()
        except EOFError:
            pass


@asynccontextmanager
async def following(server: Server, path: str, **arguments: Any) -> AsyncIterator[Following]:
    """Follows until the end of the block, then hangs up; ``arguments`` as of a request."""
    async with _streaming(server) as client, client.stream("GET", path, **arguments) as response:
        assert response.status_code == 200, (await response.aread()).decode()
        assert response.headers["content-type"].startswith("text/event-stream")
        yield Following(response, response.aiter_lines())


async def begun(server: Server, path: str, **arguments: Any) -> httpx.Response:
    """A response as it is after its first piece, or all of one that has an end; then hangs up."""
    async with _streaming(server) as client, client.stream("GET", path, **arguments) as response:
        if response.headers["content-type"].startswith("text/event-stream"):
            content = await anext(response.aiter_raw())
        else:
            content = await response.aread()
        return httpx.Response(response.status_code, headers=response.headers, content=content)


def _streaming(server: Server) -> httpx.AsyncClient:
    """A client that is known by the same token."""
    return httpx.AsyncClient(
        transport=_Streaming(server.app), base_url=server.client.base_url, headers=server.client.headers
    )


class _Streaming(httpx.AsyncBaseTransport):
    """Hands a request without a body to an application, and what it answers on as it comes."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        told: asyncio.Queue[Message] = asyncio.Queue(maxsize=1)
        gone, asked = asyncio.Event(), False
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": request.method,
            "scheme": request.url.scheme,
            "path": request.url.path,
            "raw_path": request.url.raw_path.partition(b"?")[0],
            "query_string": request.url.query,
            "root_path": "",
            "headers": [(name.lower(), value) for name, value in request.headers.raw],
            "server": (request.url.host, request.url.port),
            "client": ("127.0.0.1", 1),
        }

        async def receive() -> Message:
            nonlocal asked
            if not asked:
                asked = True
                return {"type": "http.request", "body": b"", "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            if not gone.is_set():
                await told.put(message)

        async def run() -> None:
            await self._app(scope, receive, send)

        task = asyncio.create_task(run())

        class Body(httpx.AsyncByteStream):
            async def __aiter__(self) -> AsyncIterator[bytes]:
                more = True
                while more:
                    message = await told.get()
                    more = message.get("more_body", False)
                    yield message.get("body", b"")

            async def aclose(self) -> None:
                gone.set()
                while not told.empty():
                    told.get_nowait()
                async with asyncio.timeout(TIMEOUT):
                    await task

        async with asyncio.timeout(TIMEOUT):
            start = await told.get()
        return httpx.Response(start["status"], headers=start["headers"], stream=Body())
