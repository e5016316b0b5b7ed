"""A cheap load generator over raw sockets: as little work per request as asyncio allows, to measure the server alone.

*Closed loop*: ``clients`` connections, each sends its next request when the answer to its last one is there. *Open
loop*: requests arrive when they are due whatever the server does; each takes a free connection, or a new one while
there are fewer than a limit. Run it in another process than the server. Speaks the little HTTP/1.1 that servers of
answers with a ``Content-Length`` need; anything else is an error.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)

Make = Callable[[int], bytes]
"""The bytes of request number 0, 1, 2, ..., see :func:`post`. Called when the request is sent: let it be quick."""


class Answer(NamedTuple):
    """One request and what came of it. Times in seconds; ``sent`` is on ``time.perf_counter``."""

    number: int
    sent: float
    seconds: float
    """From the first byte handed to the socket to the last byte of the answer."""
    status: int
    """0: the connection ended without an answer."""
    head: bytes
    """Status line and headers, as received."""
    body: bytes

    def header(self, name: str) -> str | None:
        """The value of a header."""
        found = re.search(rb"\r\n%s: *([^\r]*)" % re.escape(name.encode()), self.head, re.IGNORECASE)
        return None if found is None else found[1].decode()


@dataclass
class Load:
    """What a run did."""

    answers: list[Answer] = field(default_factory=list)
    """In the order in which they came."""
    started: float = 0.0
    """On ``time.perf_counter``."""
    seconds: float = 0.0
    """How long requests were sent."""
    cpu_seconds: float = 0.0
    """Processor time that this process took meanwhile."""
    unsent: int = 0
    """Open loop: arrivals for which no connection was free and no further one allowed."""


def post(path: str, body: bytes, headers: Mapping[str, str] | None = None) -> bytes:
    """A POST request as it goes over the socket."""
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


async def closed_loop(port: int, make: Make, clients: int, seconds: float) -> Load:
    """``clients`` connections, each busy with one request at a time for so long.

    Connection ``c`` of ``C`` sends the requests ``c``, ``c + C``, ``c + 2 C``, ...
    """
    connections = [await _connect(port) for _ in range(clients)]
    load, running, over = Load(), len(connections), asyncio.Event()

    def answered(connection: _Connection, answer: Answer) -> None:
        nonlocal running
        load.answers.append(answer)
        if answer.status and time.perf_counter() < end:
            following = answer.number + clients
            connection.send(following, make(following), answered)
            return
        connection.close()
        running -= 1
        if not running:
            over.set()

    load.started, cpu = time.perf_counter(), time.process_time()
    end = load.started + seconds
    for first, connection in enumerate(connections):
        connection.send(first, make(first), answered)
    await over.wait()
    load.seconds, load.cpu_seconds = time.perf_counter() - load.started, time.process_time() - cpu
    return load


async def open_loop(port: int, make: Make, rate: float, seconds: float, most_connections: int) -> Load:
    """``rate`` arrivals a second for so long; returns when all that were sent are answered or cut off."""
    return await on_schedule(port, make, [number / rate for number in range(round(rate * seconds))], most_connections)


async def on_schedule(port: int, make: Make, due: Sequence[float], most_connections: int) -> Load:
    """One arrival at each time in ``due``, seconds from the start, ascending; otherwise as :func:`open_loop`."""
    load, free, tasks = Load(), deque[_Connection](), set[asyncio.Task[None]]()
    waiting, made, over = 0, 0, asyncio.Event()

    def answered(connection: _Connection, answer: Answer) -> None:
        nonlocal waiting, made
        load.answers.append(answer)
        if connection.is_open:
            free.append(connection)
        else:
            made -= 1
        waiting -= 1
        if not waiting:
            over.set()

    async def send_on_new(number: int) -> None:
        asked = time.perf_counter()
        try:
            connection = await _connect(port)
        except OSError:
            connection = _Connection()
            answered(connection, Answer(number, asked, time.perf_counter() - asked, 0, b"", b""))
        else:
            connection.send(number, make(number), answered, asked)

    load.started, cpu = time.perf_counter(), time.process_time()
    for number, moment in enumerate(due):
        ahead = load.started + moment - time.perf_counter()
        # Late arrivals go at once, but the answers in between must be read.
        await asyncio.sleep(max(ahead, 0.0))
        while free and not free[-1].is_open:
            free.pop()
            made -= 1
        if not free and made >= most_connections:
            load.unsent += 1
            continue
        waiting += 1
        if free:
            free.pop().send(number, make(number), answered)
        else:
            made += 1
            task = asyncio.create_task(send_on_new(number))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
    load.seconds = time.perf_counter() - load.started
    while waiting:
        over.clear()
        await over.wait()
    load.cpu_seconds = time.process_time() - cpu
    for connection in free:
        connection.close()
    return load


async def _connect(port: int) -> _Connection:
    _, connection = await asyncio.get_running_loop().create_connection(_Connection, "127.0.0.1", port)
    return connection


_Answered = Callable[["_Connection", Answer], None]


class _Connection(asyncio.Protocol):
    """One keep-alive connection with at most one request under way."""

    def __init__(self) -> None:
        self.is_open = False
        self._transport: asyncio.Transport | None = None
        self._answered: _Answered | None = None
        self._received = bytearray()
        self._number, self._sent = 0, 0.0

    def send(self, number: int, request: bytes, answered: _Answered, since: float | None = None) -> None:
        """Sends a request; ``answered`` is called once, when its answer is there or the connection has ended."""
        self._number, self._answered = number, answered
        self._sent = time.perf_counter() if since is None else since
        if self._transport is None or not self.is_open:
            self._end(0, b"", b"")
        else:
            self._transport.write(request)

    def close(self) -> None:
        """Ends the connection."""
        self.is_open = False
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport, self.is_open = transport, True

    def data_received(self, data: bytes) -> None:
        self._received += data
        middle = self._received.find(b"\r\n\r\n")
        if middle < 0:
            return
        length = _LENGTH.search(self._received, 0, middle)
        if length is None:
            raise ValueError(f"an answer without Content-Length: {bytes(self._received[:middle])!r}")
        end = middle + 4 + int(length[1])
        if len(self._received) < end:
            return
        head, body = bytes(self._received[:middle]), bytes(self._received[middle + 4 : end])
        self._received.clear()
        if b"\r\nconnection: close" in head.lower():
            self.close()
        self._end(int(head[9:12]), head, body)

    def connection_lost(self, error: Exception | None) -> None:
        self.is_open = False
        self._end(0, b"", b"")

    def _end(self, status: int, head: bytes, body: bytes) -> None:
        answered, self._answered = self._answered, None
        if answered is not None:
            seconds = time.perf_counter() - self._sent
            answered(self, Answer(self._number, self._sent, seconds, status, head, body))
