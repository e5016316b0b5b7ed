"""Every bound names its setting, is kept before more is read or made than it allows, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import gzip
import io
import json
import zlib
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.http.conftest import (
    INFER,
    PREDICT,
    Loaded,
    Server,
    error_of,
    image,
    infer_body,
    npy,
    retry_after,
    running,
    untouched,
)
from tests.serving import MODEL, Gate, rows
from tta_server.http import infer, streams, tensors
from tta_server.http.infer import HEADER_LENGTH
from tta_server.http.schemas import MOST_MEMBERS

pytestmark = pytest.mark.anyio

ROUTES_WITH_BODIES = [
    ("PUT", "/v1/streams/s"),
    ("PATCH", "/v1/streams/s"),
    ("POST", PREDICT),
    ("POST", INFER),
    ("POST", f"/v2/models/{MODEL}/versions/1/infer"),
    ("POST", f"/v2/repository/models/{MODEL}/load"),
    ("POST", f"/v2/repository/models/{MODEL}/unload"),
]
with_bodies = pytest.mark.parametrize(("method", "path"), ROUTES_WITH_BODIES, ids=lambda value: value.strip("/"))


# Bodies


async def pieces(body: bytes) -> AsyncIterator[bytes]:
    """A body of unknown length; it says when more of it is read than a bounded reader would."""
    for start in range(0, len(body), 100):
        assert start <= 1000, "the server reads on beyond its limit"
        yield body[start : start + 100]


async def unread() -> AsyncIterator[bytes]:
    """A body that must not be asked for."""
    raise AssertionError("the body was read")
    yield b""


@with_bodies
@pytest.mark.parametrize("chunked", [False, True], ids=["declared", "chunked"])
async def test_bodies_over_the_limit(loaded: Loaded, method: str, path: str, chunked: bool) -> None:
    async with running(loaded, limits={"body_bytes": 900}) as server:
        await server.open("s")
        async with untouched(server):
            content = pieces(b" " * 5000) if chunked else unread()
            headers = {} if chunked else {"content-length": "5000"}
            response = await server.client.request(method, path, content=content, headers=headers)
            assert "limits.body_bytes = 900" in error_of(response, 413)


async def test_a_body_at_the_limit_is_read(loaded: Loaded) -> None:
    body = json.dumps({"policy": "tent"}).encode()
    async with running(loaded, limits={"body_bytes": len(body)}) as server:
        assert (await server.client.put("/v1/streams/s", content=body)).status_code == 201
        error_of(await server.client.put("/v1/streams/t", content=body + b" "), 413)


@with_bodies
async def test_a_body_that_does_not_come(loaded: Loaded, method: str, path: str) -> None:
    async def slow() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.Event().wait()

    async with running(loaded, limits={"body_seconds": 0.01}) as server:
        await server.open("s")
        async with untouched(server):
            text = error_of(await server.client.request(method, path, content=slow()), 408)
            assert "only 1 bytes of the body arrived within limits.body_seconds = 0.01" in text


@with_bodies
async def test_an_encoded_body_is_not_mistaken_for_a_plain_one(refusing: Server, method: str, path: str) -> None:
    async with untouched(refusing):
        response = await refusing.client.request(method, path, content=b"{}", headers={"content-encoding": "br"})
        assert error_of(response, 415) == "bodies may be compressed by one of gzip, deflate; got Content-Encoding: 'br'"


@with_bodies
@pytest.mark.parametrize(("encoding", "squeeze"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
async def test_a_bomb_does_not_go_off(loaded: Loaded, method: str, path: str, encoding: str, squeeze: Any) -> None:
    async with running(loaded, limits={"inflated_bytes": 10_000}) as server:
        await server.open("s")
        async with untouched(server):
            response = await server.client.request(
                method, path, content=squeeze(b" " * 10**6), headers={"content-encoding": encoding}
            )
            assert "limits.inflated_bytes = 10000" in error_of(response, 413)


@with_bodies
async def test_json_over_its_limit(loaded: Loaded, method: str, path: str) -> None:
    async with running(loaded, limits={"json_bytes": 900}) as server:
        await server.open("s")
        async with untouched(server):
            response = await server.client.request(method, path, content=b'{"a": "%s"}' % (b"x" * 900))
            assert "the JSON is 909 bytes; the limit is limits.json_bytes = 900" in error_of(response, 413)


async def test_the_limit_on_json_is_not_one_on_tensors(loaded: Loaded) -> None:
    x = rows(4)
    header = json.dumps(
        {"inputs": [{"name": "input", "shape": [4, 3, 8, 8], "datatype": "FP32",
                     "parameters": {"binary_data_size": 3072}}]}
    ).encode()  # fmt: skip
    async with running(loaded, limits={"json_bytes": len(header)}) as server:
        await server.open("s")
        body, headers = header + x.numpy().tobytes(), {HEADER_LENGTH: str(len(header))}
        assert (await server.client.post(INFER, content=body, headers=headers)).status_code == 200
        assert (await server.client.post(PREDICT, content=npy(x.numpy()))).status_code == 200
        headers[HEADER_LENGTH] = str(len(header) + 1)
        assert "limits.json_bytes" in error_of(await server.client.post(INFER, content=body, headers=headers), 413)


@with_bodies
async def test_nesting_over_the_limit(loaded: Loaded, method: str, path: str) -> None:
    async with running(loaded, limits={"json_depth": 7}) as server:
        await server.open("s")
        async with untouched(server):
            response = await server.client.request(method, path, content=b'{"a": ' + b"[" * 7 + b"]" * 7 + b"}")
            assert "limits.json_depth = 7" in error_of(response, 400)


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", INFER, {"inputs": [5] * 10_000}),
        ("POST", INFER, {"inputs": [], "outputs": [5] * 10_000}),
        ("POST", INFER, {"inputs": [{"name": "input", "datatype": "FP32", "shape": ["a"] * 10_000}]}),
        ("POST", INFER, {"inputs": [], "parameters": {str(index): [] for index in range(10_000)}}),
        ("PUT", "/v1/streams/s", {str(index): 1 for index in range(10_000)}),
        ("PUT", "/v1/streams/s", {"settings": {str(index): 1 for index in range(10_000)}}),
        ("PATCH", "/v1/streams/s", {str(index): 1 for index in range(10_000)}),
        ("PATCH", "/v1/streams/s", {"settings": {str(index): 1 for index in range(10_000)}}),
        ("POST", f"/v2/repository/models/{MODEL}/load", {"parameters": {str(index): [] for index in range(10_000)}}),
    ],
    ids=["inputs", "outputs", "shape", "parameters", "open", "open settings", "patch", "patch settings", "load"],
)
async def test_many_faults_do_not_make_a_long_error(refusing: Server, method: str, path: str, body: Any) -> None:
    """An error for each of a million members of a small body would be gigabytes."""
    async with untouched(refusing):
        assert len(error_of(await refusing.client.request(method, path, json=body), 400)) < 300


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("PUT", "/v1/streams/s", {"policy": "x" * 10_000}),
        ("PUT", "/v1/streams/s", {"model": "x" * 10_000}),
        ("PUT", "/v1/streams/s", {"x" * 10_000: 1}),
        ("PUT", "/v1/streams/t", {"settings": {"x" * 10_000: 1}}),
        ("PUT", "/v1/streams/t", {"settings": {"lr": "x" * 10_000}}),
        ("PATCH", "/v1/streams/s", {"policy": "x" * 10_000}),
        ("PATCH", "/v1/streams/s", {"settings": {"x" * 10_000: 1}}),
        ("POST", INFER, infer_body(rows(1), sequence_id="x" * 10_000)),
        ("POST", INFER, infer_body(rows(1), sequence_id="t", tta_policy="x" * 10_000)),
        ("POST", INFER, infer_body(rows(1), tta_adapt="x" * 10_000)),
        ("POST", INFER, infer_body(rows(1)) | {"parameters": {"tta_" + "x" * 10_000: 1}}),
        ("POST", INFER, infer_body(rows(1)) | {"parameters": {"x" * 10_000: []}}),
        ("POST", INFER, infer_body(rows(1), outputs=["x" * 10_000])),
        ("POST", INFER, {"inputs": [{"name": "x" * 10_000, "shape": [1], "datatype": "FP32", "data": [1]}]}),
        ("POST", INFER, {"inputs": [{"name": "input", "shape": [1], "datatype": "x" * 10_000, "data": [1]}]}),
        ("POST", INFER, {"inputs": [{"name": "input", "shape": [1], "datatype": "FP32", "data": ["x" * 10_000]}]}),
        ("POST", PREDICT, {"x" * 10_000: 1}),
        ("POST", PREDICT, {"inputs": "x" * 10_000}),
        ("POST", f"{PREDICT}?datatype={'x' * 10_000}", {}),
        ("POST", f"{PREDICT}?output={'x' * 10_000}", {}),
        ("GET", f"/v1/streams?cursor={'x' * 10_000}", None),
        ("GET", "/v1/streams/" + "x" * 10_000, None),
        ("POST", f"/v2/repository/models/{MODEL}/load", {"parameters": {"x" * 10_000: "1"}}),
    ],
    ids=lambda value: str(value)[:30],
)
async def test_what_was_sent_does_not_come_back_at_length(refusing: Server, method: str, path: str, body: Any) -> None:
    async with untouched(refusing):
        assert len(error_of(await refusing.client.request(method, path, json=body), 400)) < 400


async def test_parameters_may_be_many_but_not_any_number(server: Server) -> None:
    parameters: dict[str, Any] = {f"theirs{index}": index for index in range(MOST_MEMBERS)}
    await server.infer(rows(1), **parameters)
    said = (await server.infer(rows(1), 400, **parameters, one_more=1))["error"]
    assert said == f"an object in the request has {MOST_MEMBERS + 1} members; it may have up to {MOST_MEMBERS}"


# Rows and images


async def test_rows_over_the_limit(loaded: Loaded) -> None:
    x = rows(3)
    pixels = [("a", image(np.zeros((8, 8, 3), np.uint8)))] * 3
    async with running(loaded, limits={"rows_per_request": 2}) as server:
        await server.open("s")
        async with untouched(server):
            responses = [
                await server.client.post(PREDICT, json={"inputs": x.tolist()}),
                await server.client.post(PREDICT, content=npy(x.numpy())),
                await server.client.post(PREDICT, content=x.numpy().tobytes(), params={"datatype": "FP32"}),
                await server.client.post(PREDICT, files=pixels),
                await server.client.post(INFER, json=infer_body(x, sequence_id="s")),
                await server.client.post(INFER, content=x.numpy().tobytes(), headers={HEADER_LENGTH: "0"}),
            ]
            for response in responses:
                assert "limits.rows_per_request" in error_of(response, 400)
        assert (await server.client.post(PREDICT, json={"inputs": rows(2).tolist()})).status_code == 200


async def test_pixels_over_the_limit(loaded: Loaded) -> None:
    """Seen from the image's header: what it promises is not there."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    async with running(loaded, limits={"image_pixels": 63}) as server:
        await server.open("s")
        async with untouched(server):
            broken = file.getvalue()[:60]
            for response in (
                await server.client.post(PREDICT, content=broken),
                await server.client.post(PREDICT, files=[("a", ("a.png", broken))]),
            ):
                assert "limits.image_pixels" in error_of(response, 413)


@pytest.mark.parametrize("inline", [True, False], ids=["inline", "thread"])
async def test_memory_that_does_not_suffice_is_the_bodys_fault(
    server: Server, monkeypatch: pytest.MonkeyPatch, inline: bool
) -> None:
    def no_memory(*_: Any) -> Any:
        raise MemoryError

    await server.adapt()
    monkeypatch.setattr(streams, "decode_inputs", no_memory)
    monkeypatch.setattr(tensors, "decode_input", no_memory)
    for routes in (streams, infer):
        monkeypatch.setattr(routes, "INLINE", 2**20 if inline else 0)
    async with untouched(server):
        for path, body in ((PREDICT, {"inputs": rows(1).tolist()}), (INFER, infer_body(rows(1), sequence_id="s"))):
            assert "not enough memory" in error_of(await server.client.post(path, json=body), 413)


# Streams and states


async def test_streams_over_the_limit(loaded: Loaded) -> None:
    async with running(loaded, limits={"streams": 2}) as server:
        for id in ("s", "t"):
            await server.open(id)
        async with untouched(server):
            for response in (
                await server.client.put("/v1/streams/u"),
                await server.client.post(INFER, json=infer_body(rows(1), sequence_id="u")),
            ):
                assert "2 streams are open; the limit is limits.streams = 2. Delete" in error_of(response, 429)
                retry_after(response)
        assert (await server.infer(rows(1), sequence_id="t", sequence_start=True))["parameters"]["replaced"]
        await server.client.delete("/v1/streams/t")
        await server.open("u")


async def test_a_state_over_the_limit(loaded: Loaded) -> None:
    async with running(loaded, limits={"state_bytes": 400}) as server:
        await server.open("s")
        async with untouched(server):
            for method in ("PUT", "PATCH"):
                path = "/v1/streams/t" if method == "PUT" else "/v1/streams/s"
                response = await server.client.request(method, path, json={"settings": {"window": 8}})
                assert "over the limit limits.state_bytes = 400" in error_of(response, 409)


async def test_an_answer_too_large_to_keep(loaded: Loaded) -> None:
    async with running(loaded, limits={"stored_answer_bytes": 19}) as server:
        await server.open("s")
        await server.predict("s", rows(1), seq=1)
        async with untouched(server):
            response = await server.client.post(f"{PREDICT}?seq=1", json={"inputs": rows(1).tolist()})
            assert "limits.stored_answer_bytes" in error_of(response, 409)


# Queues


@pytest.mark.parametrize("path", [PREDICT, INFER])
async def test_a_full_queue_refuses_before_the_body_is_read(loaded: Loaded, path: str) -> None:
    async with running(loaded, limits={"queue": 2}) as server:
        await server.adapt()
        async with untouched(server):
            gate = await server.hold()
            waiting = [asyncio.create_task(server.infer(rows(1))) for _ in range(2)]
            await server.waiting(2)
            response = await server.client.post(path, content=unread())
            assert "2 requests wait already; the limit is limits.queue = 2" in error_of(response, 429)
            retry_after(response)
            gate.open()
            await asyncio.gather(*waiting)


async def test_a_streams_full_queue(loaded: Loaded) -> None:
    async with running(loaded, limits={"queue_per_stream": 1}) as server:
        await server.open("s")
        gate = await server.hold()
        waiting = asyncio.create_task(server.predict("s", rows(1), seq=3))
        await server.waiting(1)
        for body in ({"sequence_id": "s"}, {"sequence_id": "s", "tta_seq": 4}):
            response = await server.client.post(INFER, json=infer_body(rows(1), **body))
            said = "1 requests of stream 's' wait already; the limit is limits.queue_per_stream = 1"
            assert said in error_of(response, 429)
            retry_after(response)
        assert (
            await server.client.post(INFER, json=infer_body(rows(1), sequence_id="t", timeout=1))
        ).status_code == 504
        gate.open()
        await waiting
        info = await server.info("s")
        assert (info["requests"], info["last_number"]) == (1, 3)


async def test_a_refused_number_can_be_sent_again(loaded: Loaded) -> None:
    async with running(loaded, limits={"queue_per_stream": 1}) as server:
        await server.open("s")
        gate = await server.hold()
        waiting = asyncio.create_task(server.predict("s", rows(1), seq=3))
        await server.waiting(1)
        query = f"{PREDICT}?seq=4"
        error_of(await server.client.post(query, json={"inputs": rows(1).tolist()}), 429)
        gate.open()
        await waiting
        assert (await server.predict("s", rows(1), seq=4))["replayed"] is False


async def test_the_longest_wait(loaded: Loaded) -> None:
    async with running(loaded, limits={"queue_seconds": 0.01}) as server:
        await server.open("s")
        async with untouched(server):
            gate = await server.hold()
            for response in (
                await server.client.post(PREDICT, json={"inputs": rows(1).tolist()}),
                await server.client.post(f"{PREDICT}?timeout=1000", json={"inputs": rows(1).tolist()}),
                await server.client.post(INFER, json=infer_body(rows(1), sequence_id="s", timeout=10**9)),
            ):
                assert "waited 0.01 s in the queue without its turn coming; nothing adapted" in error_of(response, 504)
            gate.open()


@pytest.mark.parametrize("path", [PREDICT, INFER])
async def test_time_that_ran_out(server: Server, path: str) -> None:
    await server.adapt(steps=0)
    async with untouched(server):
        gate = await server.hold()
        if path == PREDICT:
            response = await server.client.post(f"{path}?timeout=0.001", json={"inputs": rows(1).tolist()})
        else:
            response = await server.client.post(path, json=infer_body(rows(1), sequence_id="s", timeout=1000))
        assert "waited 0.001 s" in error_of(response, 504)
        gate.open()


async def test_a_wait_that_would_be_in_vain_is_refused_at_once(server: Server) -> None:
    """The pace of the steps before tells how long those that wait will take."""
    await server.adapt()
    async with untouched(server):
        gate = await server.hold()
        waiting = asyncio.create_task(server.infer(rows(1)))
        await server.waiting(1)
        response = await server.client.post(f"{PREDICT}?timeout=1e-9", content=unread())
        assert "this one may wait 1e-09 s (its timeout, or limits.queue_seconds)" in error_of(response, 429)
        retry_after(response)
        gate.open()
        await waiting


async def test_requests_that_cannot_be_answered_are_not_read(server: Server) -> None:
    await server.open("s")
    for path, status in (
        ("/v1/streams/nobody/predict", 404),
        (f"{PREDICT}?seq=-1", 400),
        (f"{PREDICT}?nonsense=1", 400),
        ("/v2/models/huge/infer", 404),
        (f"/v2/models/{MODEL}/versions/2/infer", 404),
        ("/no/such/path", 404),
        ("/v2/systemsharedmemory/region/a/register", 501),
    ):
        error_of(await server.client.post(path, content=unread()), status)


@pytest.mark.parametrize("path", [PREDICT, INFER])
async def test_a_server_that_shuts_down_reads_no_more(loaded: Loaded, path: str) -> None:
    async with running(loaded) as server:
        await server.adapt()
        async with untouched(server):
            await server.service.drain()
            error_of(await server.client.post(path, content=unread()), 503)
            await server.infer(rows(1), 503, sequence_id="new")


# Clients that go away


class Leaving:
    """An ASGI client that sends a body, or a part of it, and goes away when it is told to."""

    def __init__(self, path: str, body: bytes, whole: bool) -> None:
        self.left, self._sent = asyncio.Event(), False
        self._message = {"type": "http.request", "body": body, "more_body": not whole}
        self.scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
            "path": path, "raw_path": path.encode(), "query_string": b"", "headers": [],
            "server": ("test", 80), "client": ("test", 1), "root_path": "",
        }  # fmt: skip

    async def receive(self) -> Any:
        """The next message."""
        if not self._sent:
            self._sent = True
            return self._message
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        """Nobody listens."""


@pytest.mark.parametrize(("path", "body"), [(PREDICT, {"inputs": rows(2).tolist()}), (INFER, None)], ids=["v1", "v2"])
@pytest.mark.parametrize("whole", [True, False], ids=["waiting", "sending"])
async def test_a_client_that_leaves_adapts_nothing(server: Server, path: str, body: Any, whole: bool) -> None:
    await server.adapt()
    body = infer_body(rows(2), sequence_id="s", sequence_end=True) if body is None else body
    async with untouched(server):
        gate = await server.hold()
        client = Leaving(path, json.dumps(body).encode(), whole)
        request = asyncio.create_task(server.app(client.scope, client.receive, client.send))
        if whole:
            await server.waiting(1)
        client.left.set()
        await request
        assert server.runner.waiting == 0
        gate.open()


async def test_a_client_that_leaves_while_its_step_runs_costs_nobody_else(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What runs is finished: the step is committed whole, and the next request builds on it."""
    await server.open("s")
    gate, engine = Gate(), server.runner.engine
    step = engine.answer

    def slow_step(*arguments: Any) -> Any:
        gate.pass_through()
        return step(*arguments)

    monkeypatch.setattr(engine, "answer", slow_step)
    client = Leaving(PREDICT, json.dumps({"inputs": rows(4).tolist()}).encode(), whole=True)
    request = asyncio.create_task(server.app(client.scope, client.receive, client.send))
    await gate.reached_soon()
    client.left.set()
    await request
    gate.open()
    assert (await server.predict("s", rows(4)))["version"] == 1


# Room for all bodies


@pytest.mark.parametrize("path", [PREDICT, INFER])
async def test_bodies_have_room_together(loaded: Loaded, path: str) -> None:
    """What is inflated counts, and is given back, refused or not."""
    async with running(loaded, limits={"bodies_bytes": 1_000_000}) as server:
        await server.adapt()
        bomb = gzip.compress(bytes(2_000_000))
        for _ in range(3):
            async with untouched(server):
                response = await server.client.post(path, content=bomb, headers={"content-encoding": "gzip"})
                text = error_of(response, 429)
                assert "limits.bodies_bytes = 1000000" in text
                assert int(response.headers["retry-after"]) >= 1
        assert server.service.room._used == 0
        await server.predict("s", rows(2))
        assert server.service.room._used == 0
