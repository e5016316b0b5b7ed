"""Connections that no client would make: malformed, slow, silent, too many, and never closed."""

from __future__ import annotations

import gzip
import json
import socket
from collections.abc import Iterator
from contextlib import ExitStack, suppress

import pytest

from tests.e2e.process import Running, started
from tests.serving import MODEL, TIMEOUT
from tta_server.http.protocol import PIPELINED

INFER = f"/v2/models/{MODEL}/infer"
MANY = 16
LARGE = "/openapi.json"


@pytest.fixture(scope="module")
def hasty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server that waits for nobody, for any address: what comes late is late on every machine."""
    limits = {"header_seconds": 1, "body_seconds": 1, "idle_seconds": 1}
    with started(tmp_path_factory.mktemp("hasty"), "--host", "0.0.0.0", "--insecure", limits=limits) as running:
        yield running
        running.check_sound()


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server for few connections, which may be silent but not deaf."""
    limits = {"connections": MANY, "body_seconds": 1}
    with started(tmp_path_factory.mktemp("few"), limits=limits) as running:
        yield running
        running.check_sound()


@pytest.fixture(autouse=True, scope="module")
def _sound(server: Running) -> Iterator[None]:
    yield
    server.check_sound()


def head(path: str, length: int | None, *headers: str, method: str = "POST") -> bytes:
    sized = [] if length is None else [f"Content-Length: {length}"]
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: test", *sized, *headers, "", ""]).encode()


def received(connection: socket.socket) -> bytes:
    """All that comes until the server hangs up."""
    found = bytearray()
    try:
        while piece := connection.recv(2**16):
            found += piece
    except ConnectionResetError:  # it had more to read when it did
        pass
    return bytes(found)


def answers(connection: socket.socket) -> list[tuple[int, str]]:
    """Status and error text (or nothing) of all answers that come until the server hangs up."""
    found, rest = [], received(connection)
    while rest:
        top, _, rest = rest.partition(b"\r\n\r\n")
        lines = top.decode().lower().split("\r\n")
        length = int(next(line.split(":")[1] for line in lines if line.startswith("content-length")))
        assert "content-type: application/json" in lines
        content = json.loads(rest[:length])
        found.append((int(lines[0].split()[1]), content.get("error", "") if isinstance(content, dict) else ""))
        rest = rest[length:]
    return found


def exchange(server: Running, sent: bytes) -> list[tuple[int, str]]:
    with server.connect() as connection:
        connection.sendall(sent)
        return answers(connection)


# Not HTTP


@pytest.mark.parametrize(
    "sent",
    [
        b"hello\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET /v2 HTTP/1.1\r\nno colon\r\n\r\n",
        b"GET \xff HTTP/1.1\r\n\r\n",
        b"CONNECT somewhere:443 HTTP/1.1\r\n\r\n",
        head(INFER, 0).replace(b" 0", b" -1"),
        head(INFER, 0).replace(b" 0", b" 99999999999999999999999"),
        head(INFER, 5, "Content-Length: 6") + b"12345",
        head(INFER, 5, "Transfer-Encoding: chunked") + b"0\r\n\r\n",
        head(INFER, None, "Transfer-Encoding: chunked") + b"zz\r\n",
        head("/v2", None, method="GET") + b"what follows is not\r\n",
    ],
    ids=lambda sent: sent.decode("latin-1").replace("\r\n", " ")[:60],
)
def test_what_is_not_http(server: Running, sent: bytes) -> None:
    ((status, error),) = exchange(server, sent)
    assert status == 400
    assert error.startswith("this is not HTTP/1.1: ")


def test_a_body_with_an_upgrade_is_not_taken_for_an_empty_one(server: Running) -> None:
    """So does Java's own client ask for HTTP/2."""
    upgrade = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c")
    ((status, error),) = exchange(server, head(INFER, 2, *upgrade) + b"{}")
    assert (status, "have the client use HTTP/1.1" in error) == (400, True)
    with server.connect() as connection:
        connection.sendall(head("/v2", 0, *upgrade, method="GET"))
        assert connection.recv(12) == b"HTTP/1.1 200"


def test_headers_that_are_too_large(server: Running) -> None:
    """Together or by themselves, at once or without an end, before or behind the body."""
    refusal = [(431, "the headers are over the limit, limits.header_bytes = 16384")]
    for sent in (
        head("/v2?" + "x" * 2**14, None, method="GET"),
        head("/v2", None, f"X: {'x' * 2**14}", method="GET"),
        head("/v2", None, *[f"X{number}: {'x' * 100}" for number in range(200)], method="GET"),
        head(INFER, 2**15, f"X: {'x' * 2**14}") + bytes(2**15),
    ):
        assert exchange(server, sent) == refusal
    for begun in (b"GET /v2 HTTP/1.1\r\nX: ", head(INFER, None, "Transfer-Encoding: chunked") + b"2\r\n{}\r\n0\r\nX: "):
        with server.connect() as connection:
            connection.sendall(begun)
            with suppress(ConnectionError):
                while True:
                    connection.sendall(b"x" * 2**14)
            assert answers(connection) == refusal
    ((status, _),) = exchange(server, head("/v3", 2**15, f"X: {'x' * 2**13}", "Connection: close") + bytes(2**15))
    assert status == 404, "the body does not count"


# Pipelining


def test_requests_sent_at_once_are_answered_in_their_order(server: Running) -> None:
    body = b"{}"
    sent = [
        head("/v2", None, method="GET"),
        head(INFER, len(body)) + body,
        head("/v3", None, method="GET"),
        head("/v2/health/ready", None, method="GET"),
        head("/v2/repository/index", 0),
        head("/v2", None, "Connection: close", method="DELETE"),
    ]
    found = exchange(server, b"".join(sent))
    assert [status for status, _ in found] == [200, 400, 404, 200, 200, 405]
    assert found == exchange_slowly(server, b"".join(sent))


def exchange_slowly(server: Running, sent: bytes) -> list[tuple[int, str]]:
    """The same, byte by byte."""
    with server.connect() as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in sent:
            connection.sendall(bytes([byte]))
        return answers(connection)


def test_more_requests_at_once_than_a_connection_may_hold(server: Running) -> None:
    one = head("/v2", None, method="GET")
    before = server.memory()
    with ExitStack() as stack:
        connections = [stack.enter_context(server.connect()) for _ in range(20)]
        for connection in connections:
            connection.setblocking(False)
            connection.send(one * 4000)
        for connection in connections:
            connection.settimeout(TIMEOUT)
            assert answers(connection)[-1] == (400, "16 requests wait on this connection, the most; read their answers")
    assert server.memory() < before + 50e6


# Bodies


def test_the_length_of_the_json(server: Running) -> None:
    name, close = "Inference-Header-Content-Length", "Connection: close"
    for value in ("-1", "+2", "1e3", "0x2", "9" * 5000, "2, 2", "\u0663"):
        ((status, error),) = exchange(server, head(INFER, 2, close, f"{name}: {value}") + b"{}")
        assert (status, error[:38]) == (400, "Inference-Header-Content-Length must b")
    ((status, error),) = exchange(server, head(INFER, 2, close, f"{name}: 18446744073709551616") + b"{}")
    assert (status, error[-24:]) == (400, "but the body has 2 bytes")
    ((status, error),) = exchange(server, head(INFER, 2, close, f"{name}: 2", f"{name}: 2") + b"{}")
    assert (status, "must be sent once" in error) == (400, True)


def test_gzip_bombs_take_no_memory(server: Running) -> None:
    bomb = gzip.compress(bytes(2**27), 9)
    headers = {"Content-Encoding": "gzip"}
    server.http.post(INFER, content=bomb, headers=headers)
    before = server.memory()
    for path in (INFER, "/v2/repository/models/tiny/load") * 10:
        reply = server.http.post(path, content=bomb, headers=headers)
        assert reply.status_code == 413 if path == INFER else 400
    assert server.memory() < before + 30e6


# Slow, silent and too many


def test_headers_that_trickle(hasty: Running) -> None:
    with hasty.connect() as connection:
        connection.sendall(head("/v2", None, method="GET")[:-2] + b"X: ")
        connection.settimeout(0.05)
        found = b""
        while not found:  # never silent for long
            connection.sendall(b"x")
            try:
                found = connection.recv(2**16)
            except TimeoutError:
                continue
    assert found.startswith(b"HTTP/1.1 408 ")
    assert b'{"error":"the headers did not arrive within 1 s (limits.header_seconds)"}' in found


@pytest.mark.parametrize("path", [INFER, "/v1/streams/slow/predict"])
def test_a_body_that_trickles(hasty: Running, path: str) -> None:
    if path != INFER:
        assert hasty.http.put("/v1/streams/slow").status_code == 201
    with hasty.connect() as connection:
        connection.sendall(head(path, 10**5) + b"{")
        connection.settimeout(0.05)
        found = b""
        while b"error" not in found:
            connection.sendall(b" ")
            try:
                found += connection.recv(2**16)
            except TimeoutError:
                continue
        assert found.startswith(b"HTTP/1.1 408 ")
        assert b"arrived within limits.body_seconds = 1; send it faster, or in smaller requests" in found
        # The rest of the body is waited for, so that the answer arrives; but not for long.
        connection.settimeout(TIMEOUT)
        assert received(connection) == b""


def test_a_body_that_nobody_reads_and_that_never_ends(hasty: Running) -> None:
    with hasty.connect() as connection:
        connection.sendall(head("/v3", 10**5) + b"{")
        ((status, _),) = answers(connection)
        assert status == 404


@pytest.mark.parametrize("sent", [b"", head("/v2", None, method="GET")], ids=["new", "used"])
def test_a_silent_connection_is_closed(hasty: Running, sent: bytes) -> None:
    with hasty.connect() as connection:
        connection.sendall(sent)
        assert [status for status, _ in answers(connection)] == ([200] if sent else [])


def test_clients_that_never_read_their_answers(few: Running, hasty: Running) -> None:
    """Whether the answers pile up, or the last of them is left lying and the connection is idle behind it."""
    size, rounds = len(few.http.get(LARGE).content), 1
    with deaf(few) as connection:
        while ask(few, [connection]):
            rounds += 1
        few.wait_for("the end of the connection", lambda: few.connections() == 0)
        assert len(received(connection)) < rounds * PIPELINED * size, "not all was taken: the client was given up"
    with ExitStack() as stack:
        connections = [stack.enter_context(deaf(hasty)) for _ in range(PIPELINED)]
        for _ in range(rounds - 1):
            ask(hasty, connections)
        # The one round more that was too much was so after this, or this, or this many requests.
        for count, connection in enumerate(connections):
            ask_for_more(connection, count)
        hasty.wait_for("the end of all connections", lambda: hasty.connections() == 0)


def deaf(server: Running) -> socket.socket:
    """A connection that takes as little as can be."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    connection.settimeout(TIMEOUT)
    connection.connect(("127.0.0.1", server.port))
    return connection


def ask(server: Running, connections: list[socket.socket]) -> bool:
    """One round of requests on each; reads no answer. Whether the server took all answers as sent."""

    def answered() -> float:
        return server.metric("tta_requests_total", 'route="unmatched"')

    expected = answered() + PIPELINED * len(connections)
    for connection in connections:
        ask_for_more(connection, PIPELINED)

    def over() -> bool:
        return answered() == expected or server.connections() < len(connections)

    server.wait_for("the answers, or the end of a connection", over)
    return answered() == expected


def ask_for_more(connection: socket.socket, count: int) -> None:
    with suppress(ConnectionError):  # the server may have had enough
        connection.sendall(head(LARGE, None, method="GET") * count)


def test_more_connections_than_allowed(few: Running) -> None:
    with ExitStack() as stack:
        connections = [stack.enter_context(few.connect()) for _ in range(MANY)]
        few.wait_for("all connections", lambda: few.connections() == MANY)
        with few.connect() as connection:
            text = received(connection).decode()
        assert text.startswith("HTTP/1.1 503 Service Unavailable\r\n")
        assert "\r\nretry-after: 1\r\n" in text
        assert text.endswith('\r\n\r\n{"error":"16 connections are open; the limit is limits.connections"}\n')
        connections[0].sendall(head("/v2", None, method="GET"))
        assert connections[0].recv(12) == b"HTTP/1.1 200", "those that are open are served"


# Hanging up, the other way around: see test_disconnects.py


def test_an_answer_arrives_after_garbage_that_follows_it(server: Running) -> None:
    """What has begun to be answered is not mixed with a refusal."""
    with server.connect() as connection:
        connection.sendall(head("/v2", None, method="GET"))
        assert connection.recv(12) == b"HTTP/1.1 200"
        connection.sendall(b"garbage\r\n\r\n")
        rest = received(connection)
    assert rest.count(b"HTTP/1.1 400") == 1
