"""Clients that go away, at every point of a request: nothing of theirs is left behind."""

from __future__ import annotations

import json
import random
import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack

import httpx
import psutil
import pytest
from torch import Tensor

from tests.e2e.conftest import CONCURRENT
from tests.e2e.process import Running, gated_rows
from tests.serving import MODEL, rows

STREAM = "/v1/streams/gone"


@pytest.fixture(autouse=True)
def _stream(server: Running) -> Iterator[None]:
    """A new stream, and the proof that the server is as it was."""
    assert server.http.put(STREAM).status_code == 201
    yield
    assert server.http.delete(STREAM).status_code == 204
    server.check_sound()


def predict(x: Tensor, path: str = f"{STREAM}/predict") -> bytes:
    body = json.dumps({"inputs": x.tolist()}).encode()
    return f"POST {path} HTTP/1.1\r\nHost: test\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def infer(x: Tensor) -> bytes:
    """Of no stream."""
    data = {"name": "input", "shape": list(x.shape), "datatype": "FP32", "data": x.flatten().tolist()}
    body = json.dumps({"inputs": [data]}).encode()
    return f"POST /v2/models/{MODEL}/infer HTTP/1.1\r\nHost: t\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def waiting(server: Running, count: int) -> None:
    server.wait_for(f"{count} waiting requests", lambda: server.metric("tta_requests_waiting") == count)


def test_while_it_sends(server: Running) -> None:
    given_up = server.given_up()
    with server.connect() as connection:
        connection.sendall(predict(rows(2))[:500])
    server.wait_for("the end of the request", lambda: server.given_up() == given_up + 1)
    assert server.http.get(STREAM).json()["requests"] == 0


def test_while_it_waits_for_its_turn(server: Running) -> None:
    """The request is taken back, and adapts nothing."""
    given_up = server.given_up()
    with server.connect() as other:
        other.sendall(infer(gated_rows()))
        held = server.held()
        with server.connect() as connection:
            connection.sendall(predict(rows(2)))
            waiting(server, 1)
        waiting(server, 0)
        server.wait_for("the end of the request", lambda: server.given_up() == given_up + 1)
        held.close()
        assert other.recv(12) == b"HTTP/1.1 200"
    info = server.http.get(STREAM).json()
    assert (info["requests"], info["version"]) == (0, 0)


def test_while_it_runs(server: Running) -> None:
    """The step is finished and kept, by the transaction rule; the server goes on."""
    given_up = server.given_up()
    with server.connect() as connection:
        connection.sendall(predict(gated_rows()))
        held = server.held()
    server.wait_for("the end of the request", lambda: server.given_up() == given_up + 1)
    assert server.is_ready(), "the loop is free while a step runs"
    held.close()
    server.wait_for("the step", lambda: bool(server.http.get(STREAM).json()["version"] == 1))
    answer = server.http.post(f"{STREAM}/predict", json={"inputs": rows(2).tolist()})
    assert answer.json()["version"] == 1


def test_while_it_runs_and_another_waits_behind_it_on_the_connection(server: Running) -> None:
    given_up = server.given_up()
    with server.connect() as connection:
        connection.sendall(predict(gated_rows()) + predict(rows(2)))
        held = server.held()
    server.wait_for("the end of the first request", lambda: server.given_up() == given_up + 1)
    held.close()
    server.wait_for("the step", lambda: bool(server.http.get(STREAM).json()["version"] == 1))
    assert server.http.get(STREAM).json()["requests"] == 1, "the second never began"


def test_a_thousand_times_at_any_point(server: Running) -> None:
    draw = random.Random(0)
    requests = [predict(rows(2)), infer(rows(3)), predict(rows(2), "/v1/streams/nobody/predict"), infer(rows(200))]
    files, given_up = psutil.Process(server.process.pid).num_fds(), server.given_up()

    def go(connection: socket.socket) -> None:
        """Politely, or by a reset."""
        if draw.random() < 0.5:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()

    for _ in range(400):  # while sending
        connection, sent = server.connect(), draw.choice(requests)
        connection.sendall(sent[: draw.randrange(len(sent))])
        go(connection)
    for _ in range(250):  # wherever it is then: arriving, queued, running, or answered
        connection = server.connect()
        connection.sendall(draw.choice(requests))
        go(connection)
    for _ in range(220):  # while receiving
        connection = server.connect()
        connection.sendall(draw.choice(requests))
        connection.recv(draw.randrange(1, 500))
        go(connection)
    for _ in range(10):  # while running, and while queued behind that
        with ExitStack() as stack:
            running = stack.enter_context(server.connect())
            running.sendall(infer(gated_rows()))
            held = stack.enter_context(server.held())
            queued = [stack.enter_context(server.connect()) for _ in range(CONCURRENT - 2)]
            for connection in queued:
                connection.sendall(infer(rows(2)))
            waiting(server, len(queued))
            for connection in (*queued, running):
                go(connection)
            waiting(server, 0)
            held.close()
    for _ in range(60):  # several at once on one connection
        connection = server.connect()
        connection.sendall(b"".join(draw.choices(requests, k=5)))
        go(connection)

    server.check_sound()
    assert server.given_up() >= given_up + 10 * (CONCURRENT - 1), "those that were held, and more"
    server.wait_for("all files closed", lambda: psutil.Process(server.process.pid).num_fds() == files)
    assert server.http.post(f"{STREAM}/predict", json={"inputs": rows(2).tolist()}).status_code == 200
    check_permits(server)
    # Waits for the requests that are under way, and would do so for one that was forgotten.
    for change in ("unload", "load"):
        assert server.http.post(f"/v2/repository/models/{MODEL}/{change}").status_code == 200
    assert server.http.post(f"{STREAM}/predict", json={"inputs": rows(2).tolist()}).status_code == 200


def check_permits(server: Running) -> None:
    """As many calls at the same time as are allowed, and no more."""
    with ExitStack() as stack:
        connections = [stack.enter_context(server.connect()) for _ in range(CONCURRENT)]
        connections[0].sendall(infer(gated_rows()))
        held = server.held()
        for connection in connections[1:-1]:
            connection.sendall(infer(rows(2)))
        waiting(server, CONCURRENT - 2)  # asking this takes the last permit, and gives it back
        connections[-1].sendall(infer(rows(2)))

        def refused() -> httpx.Response | None:
            reply = server.http.get("/v2")
            return reply if reply.status_code == 429 else None

        server.wait_for("a refusal", lambda: refused() is not None)
        reply = refused()
        assert reply is not None
        assert f"the limit is auth.tenants.default.concurrent = {CONCURRENT}" in reply.json()["error"]
        assert reply.headers["retry-after"] == "1"
        held.close()
        assert [connection.recv(12) for connection in connections] == [b"HTTP/1.1 200"] * CONCURRENT
