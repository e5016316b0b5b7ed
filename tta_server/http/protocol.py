"""The connection: bounds on how many there are, on headers, and on clients that are slow or silent.

uvicorn's own protocol reads requests; what it leaves unbounded is bounded here. Errors are ``{"error": ...}``, as
everywhere.
"""

from __future__ import annotations

import asyncio
import http
import sys
from typing import Any, cast

import orjson
from starlette.types import Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from tta_server.settings import LimitSettings

PIPELINED = 16
"""Most requests that may wait on one connection; each takes memory, and clients hardly ever send a second."""
_BODY = (b"content-length", b"transfer-encoding")
"""Headers that say that a body follows."""


def bounded(limits: LimitSettings) -> type[asyncio.Protocol]:
    """The protocol class under these limits."""
    too_large = f"the headers are over the limit, limits.header_bytes = {limits.header_bytes}"

    class BoundedProtocol(HttpToolsProtocol):
        """One connection. A request's *head* is its request line and headers."""

        _in_head = True
        _no_body = 0
        """Bytes that came since the last of a body: a head, or what follows a chunked body."""
        _running: RequestResponseCycle = None  # type: ignore[assignment]  # as uvicorn has its own
        """The request being answered, or the last one. uvicorn's ``cycle`` is the newest, which may wait behind it."""
        _timer: asyncio.TimerHandle | None = None
        """Runs while a head, or the end of the connection, is due."""
        _stuck: asyncio.TimerHandle | None = None
        """Runs while the client does not take its answer."""

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(cast("asyncio.Transport", transport))
            if len(self.connections) > limits.connections:
                text = f"{limits.connections} connections are open; the limit is limits.connections"
                self._refuse(503, text, b"retry-after: 1\r\n")
            else:
                # uvicorn counts a connection as idle after its first answer only.
                self.timeout_keep_alive_task = self.loop.call_later(
                    self.timeout_keep_alive, self.timeout_keep_alive_handler
                )

        def connection_lost(self, exc: Exception | None) -> None:
            self._wait(None)
            self.resume_writing()
            self.cycle = self._running  # that one is told
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            if self.transport.is_closing():
                return
            self._no_body += len(data)
            if self._in_head and self._timer is None:
                self._wait(limits.header_seconds)
            super().data_received(data)
            if self._no_body > limits.header_bytes:
                self._refuse(431, too_large)

        def on_headers_complete(self) -> None:
            size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
            if size > limits.header_bytes:
                self._refuse(431, too_large)
            elif len(self.pipeline) == PIPELINED:
                self._refuse(400, f"{PIPELINED} requests wait on this connection, the most; read their answers")
            elif self.parser.should_upgrade() and any(name in _BODY and value != b"0" for name, value in self.headers):
                # The parser would leave the body out.
                self._refuse(400, "a body together with an Upgrade header is not taken; have the client use HTTP/1.1")
            if self.transport.is_closing():
                raise RuntimeError("refused")  # for the parser, to leave the rest
            self._in_head, self._no_body = False, 0
            self._wait(None)
            super().on_headers_complete()

        def on_body(self, body: bytes) -> None:
            self._no_body = 0
            super().on_body(body)

        def on_message_complete(self) -> None:
            super().on_message_complete()
            self._in_head = True

        def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
            async def to_the_end(scope: Scope, receive: Receive, send: Send) -> None:
                """Ends a request that was refused early only when all of it is here, or will not come: hanging up
                before would lose the answer to those who send all before they read."""
                early = False

                async def watched(message: Message) -> None:
                    nonlocal early
                    if cycle.more_body and message["type"] == "http.response.body" and not message.get("more_body"):
                        early, message = True, {**message, "more_body": True}
                    await send(message)

                await app(scope, receive, watched)
                if early:
                    await self._discard(cycle, receive)
                    await send({"type": "http.response.body"})

            self._running = cycle
            super()._start_asgi_task(cycle, to_the_end)  # type: ignore[arg-type]  # uvicorn has types of its own

        async def _discard(self, cycle: RequestResponseCycle, receive: Receive) -> None:
            """What is still to come of a request's body."""
            try:
                async with asyncio.timeout(limits.header_seconds):
                    while cycle.more_body and not cycle.disconnected:
                        await receive()
            except TimeoutError:
                self._hang_up()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if self.transport.is_closing():
                self._hang_up()

        def timeout_keep_alive_handler(self) -> None:
            self._hang_up()

        def send_400_response(self, msg: str) -> None:
            self._refuse(400, f"this is not HTTP/1.1: {sys.exception()}")

        def pause_writing(self) -> None:
            super().pause_writing()
            self._stuck = self.loop.call_later(limits.body_seconds, self.transport.abort)

        def resume_writing(self) -> None:
            if self._stuck is not None:
                self._stuck.cancel()
                self._stuck = None
            super().resume_writing()

        def _wait(self, seconds: float | None) -> None:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = None if seconds is None else self.loop.call_later(seconds, self._late)

        def _late(self) -> None:
            if self.transport.is_closing():
                self.transport.abort()
            else:
                text = f"the headers did not arrive within {limits.header_seconds:g} s (limits.header_seconds)"
                self._refuse(408, text)

        def _hang_up(self) -> None:
            """Closes the connection once the client took what was written, or has had its time for that."""
            self.transport.close()
            self._wait(limits.body_seconds)

        def _refuse(self, status: int, text: str, headers: bytes = b"") -> None:
            """Answers without the application, in place of a request that has no answer yet, and hangs up."""
            if self.transport.is_closing():
                return
            if self._running is None or self._running.response_complete or not self._running.response_started:
                body = orjson.dumps({"error": text}, option=orjson.OPT_APPEND_NEWLINE)
                phrase = http.HTTPStatus(status).phrase.encode()
                head = b"HTTP/1.1 %d %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\n%s"
                self.transport.write(head % (status, phrase, len(body), headers) + b"connection: close\r\n\r\n" + body)
            self._hang_up()

    return BoundedProtocol
