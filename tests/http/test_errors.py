"""What requests are refused for: the status, ``{"error": text}`` on every route, and no stream changes."""

from __future__ import annotations

from typing import Any

import httpx
import numpy as np
import pytest

from tests.http.conftest import (
    INFER,
    PREDICT,
    Loaded,
    Server,
    error_of,
    infer_body,
    npy,
    retry_after,
    running,
    untouched,
)
from tests.serving import MODEL, rows
from tta_server.errors import TtaError
from tta_server.http import problems
from tta_server.tenant import Tenant

pytestmark = pytest.mark.anyio


def deep(levels: int) -> bytes:
    return b"[" * levels + b"0.5" + b"]" * levels


def v2(data: Any = (0.5,) * 192, shape: Any = (1, 3, 8, 8), datatype: Any = "FP32", name: Any = "input") -> Any:
    return {"inputs": [{"name": name, "shape": shape, "datatype": datatype, "data": data}]}


async def test_unknown_paths(server: Server) -> None:
    for method, path in (
        ("GET", "/v1"), ("GET", "/v3"), ("POST", "/v1/streams/s/nothing"), ("GET", "/v1/streams/a/b/c"),
        ("GET", f"/v2/models/{MODEL}/versions/1/nothing"), ("DELETE", "/no/such/path"), ("GET", "/v2/models"),
    ):  # fmt: skip
        assert path in error_of(await server.client.request(method, path), 404)


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("POST", "/v1/policies", {"GET"}),
        ("DELETE", "/v1/models/tiny", {"GET"}),
        ("POST", "/v1/streams", {"GET"}),
        ("GET", PREDICT, {"POST"}),
        ("GET", INFER, {"POST"}),
        ("POST", "/v2/health/live", {"GET"}),
        ("PUT", "/metrics", {"GET"}),
        ("PATCH", "/v1/streams/s/reset", {"POST"}),
        ("POST", "/openapi.json", {"GET"}),
        ("DELETE", "/docs", {"GET"}),
    ],
)
async def test_wrong_methods(server: Server, method: str, path: str, allowed: set[str]) -> None:
    response = await server.client.request(method, path)
    assert method in error_of(response, 405)
    assert {one.strip() for one in response.headers["allow"].split(",")} >= allowed


@pytest.mark.parametrize("method", ["POST", "OPTIONS"])
async def test_a_wrong_method_on_a_stream_tells_all_that_are_allowed(server: Server, method: str) -> None:
    response = await server.client.request(method, "/v1/streams/s")
    error_of(response, 405)
    assert {one.strip() for one in response.headers["allow"].split(",")} == {"PUT", "GET", "PATCH", "DELETE"}


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        (PREDICT, b"", "the body is empty"),
        (PREDICT, b"{", "not JSON"),
        (PREDICT, b"\xff\xfe\x00", "not JSON"),
        (PREDICT, b'{"inputs": NaN}', "not JSON"),
        (PREDICT, b"[[0.5]]", "must be a JSON object, got list"),
        (PREDICT, b"null", "must be a JSON object"),
        (PREDICT, b"{}", "'inputs'"),
        (PREDICT, b'{"inputs": [], "model": "x"}', "nothing else"),
        (PREDICT, b'{"inputs": "cat"}', "must be numbers"),
        (PREDICT, b'{"inputs": null}', "must be numbers"),
        (PREDICT, b'{"inputs": {"a": 1}}', "must be numbers nested to equal lengths, got an object"),
        (PREDICT, b'{"inputs": [true, false]}', "must be numbers"),
        (PREDICT, b'{"inputs": [[1, 2], [3]]}', "equal lengths"),
        (PREDICT, b'{"inputs": 5}', "[rows, 3, 8, 8], got []"),
        (PREDICT, b'{"inputs": []}', "[rows, 3, 8, 8]"),
        (PREDICT, b'{"inputs": [[0.5, 0.5]]}', "[rows, 3, 8, 8], got [1, 2]"),
        pytest.param(PREDICT, b'{"inputs": ' + deep(33) + b"}", "at most 32 levels deep", id="deep"),
        pytest.param(PREDICT, b'{"inputs": ' + deep(100) + b"}", "limits.json_depth = 100", id="deeper"),
        pytest.param(PREDICT, b'{"inputs": ' + deep(10_000) + b"}", "limits.json_depth = 100", id="deepest"),
        (INFER, b"", "not JSON"),
        (INFER, b"nonsense", "not JSON"),
        (INFER, b"[]", "must be a JSON object"),
        (INFER, b"{}", "inputs"),
        (INFER, b'{"inputs": {}}', "inputs"),
        (INFER, b'{"inputs": [5]}', "/inputs/0: "),
        (INFER, b'{"inputs": [{"name": "input", "datatype": "FP32"}]}', "/inputs/0/shape: "),
        (INFER, b'{"inputs": []}', "exactly one input"),
        (INFER, b'{"inputs": [{"name": "input", "datatype": "FP32", "shape": "x"}]}', "/inputs/0/shape: "),
        (INFER, b'{"inputs": [{"name": "input", "datatype": "FP32", "shape": ["a"]}]}', "/inputs/0/shape/0: "),
        (INFER, b'{"inputs": [{"name": "input", "datatype": "FP32", "shape": [1.5]}]}', "/inputs/0/shape/0: "),
        (INFER, b'{"inputs": [{"name": 7, "datatype": "FP32", "shape": [1]}]}', "/inputs/0/name: "),
        (INFER, b'{"id": 7, "inputs": []}', "id"),
        (INFER, b'{"parameters": {"a": {"b": 1}}, "inputs": []}', "/parameters/a: "),
        (INFER, b'{"parameters": {"a": [1]}, "inputs": []}', "/parameters/a: "),
        (INFER, b'{"parameters": [], "inputs": []}', "parameters"),
        (INFER, b'{"outputs": "logits", "inputs": []}', "outputs"),
        (INFER, b'{"id": null, "parameters": {"a": null}, "inputs": []}', "/parameters/a: "),
        (INFER, b'{"parameters": {"a~b/c": []}, "inputs": []}', "/parameters/a~0b~1c"),
        pytest.param(INFER, b'{"inputs": ' + deep(100) + b"}", "limits.json_depth = 100", id="V2 deeper"),
        pytest.param(INFER, b'{"inputs": ' + deep(10_000) + b"}", "limits.json_depth = 100", id="V2 deepest"),
    ],
    ids=repr,
)
async def test_bodies_that_are_not_requests(refusing: Server, path: str, body: bytes, said: str) -> None:
    async with untouched(refusing):
        text = error_of(await refusing.client.post(path, content=body), 400)
    assert said in text
    assert len(text) < 2000


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (v2(data=[0.5] * 191), "needs 192 values, got 191"),
        (v2(data=[0.5] * 193), "needs 192 values, got 193"),
        (v2(data=[]), "needs 192 values, got 0"),
        (v2(data=None), "no data"),
        (v2(data="cat"), "must be numbers"),
        (v2(data=[True] * 192), "must be numbers"),
        (v2(data=[None] * 192), "must be numbers"),
        (v2(data=[[0.5] * 100, [0.5] * 92]), "equal lengths"),
        (v2(data=[1e39] * 192), "row 0 holds NaN or infinity"),
        (v2(data=[2.0] * 192), "must lie in [0, 1]"),
        (v2(shape=[1, 192]), "[rows, 3, 8, 8], got [1, 192]"),
        (v2(shape=[192]), "[rows, 3, 8, 8]"),
        (v2(shape=[], data=[0.5]), "[rows, 3, 8, 8], got []"),
        (v2(shape=[0, 3, 8, 8], data=[]), "1 to 1024 rows"),
        (v2(shape=[-1, 3, 8, 8]), "impossible shape"),
        (v2(shape=[-1, -192]), "impossible shape"),
        (v2(shape=[2**40, 2**40]), "impossible shape"),
        (v2(shape=[2**62, 4]), "impossible shape"),
        (v2(shape=[0, 2**63], data=[]), "shape"),
        (v2(shape=[0, 2**62, 8], data=[]), "shape"),
        (v2(shape=[1] * 65, data=[0.5]), "shape"),
        (v2(datatype="INT32"), "is INT32: all values must be whole numbers"),
        (v2(datatype="BYTES"), "BYTES are encoded images, of shape [N] or [N, 1], got [1, 3, 8, 8]"),
        (v2(datatype="BF16"), "BF16, which is taken as binary data only"),
        (v2(datatype="INT64", data=[2**63] * 192), "whole numbers from -9223372036854775808 to 9223372036854775807"),
        (v2(datatype="fp32"), "got fp32"),
        (v2(datatype="UINT8", data=[256] * 192), "whole numbers from 0 to 255"),
        (v2(datatype="UINT8", data=[-1] * 192), "whole numbers from 0 to 255"),
        (v2(datatype="UINT8", data=[0.5] * 192), "whole numbers from 0 to 255"),
        (v2(name="image"), "exactly one input, 'input'; got 'image'"),
        ({"inputs": v2()["inputs"] * 2}, "exactly one input"),
        (v2() | {"outputs": [{"name": "classes"}]}, "no output 'classes'; there are logits and probabilities"),
        (v2() | {"outputs": [{"name": "logits"}] * 2}, "asked for twice"),
        (
            v2() | {"outputs": [{"name": "logits", "parameters": {"binary_data": 1}}]},
            "binary_data must be true or false",
        ),
        (v2() | {"outputs": [{"name": "logits", "parameters": {"classification": 0}}]}, "classes from 1 on, got 0"),
        (v2() | {"parameters": {"binary_data_output": 1}}, "binary_data_output must be bool, got 1"),
        (v2() | {"parameters": {"priority": -1}}, "priority must not be negative, got -1"),
        (v2() | {"parameters": {"priority": 1.5}}, "priority must be int, got 1.5"),
        (v2() | {"parameters": {"sequence_id": True}}, "sequence_id must be"),
        (v2() | {"parameters": {"sequence_id": 1.5}}, "sequence_id must be"),
        (v2() | {"parameters": {"sequence_id": 2**64}}, "sequence_id must be"),
        (v2() | {"parameters": {"sequence_id": "a b"}}, "1 to 128 of"),
        (v2() | {"parameters": {"sequence_id": "x" * 129}}, "1 to 128 of"),
        (v2() | {"parameters": {"sequence_id": 1, "sequence_start": 1}}, "sequence_start must be bool"),
        (v2() | {"parameters": {"sequence_id": 1, "sequence_end": "yes"}}, "sequence_end must be bool"),
        (v2() | {"parameters": {"tta_adapt": "yes"}}, "tta_adapt must be bool"),
        (v2() | {"parameters": {"tta_adapt": 1}}, "tta_adapt must be bool"),
        (v2() | {"parameters": {"tta_policy": 5}}, "tta_policy must be str"),
        (v2() | {"parameters": {"tta_seq": "1"}}, "tta_seq must be int"),
        (v2() | {"parameters": {"tta_seq": True}}, "tta_seq must be int"),
        (v2() | {"parameters": {"tta_seq": 1.0}}, "tta_seq must be int"),
        (v2() | {"parameters": {"tta_seq": -1, "sequence_id": 1}}, "tta_seq must not be negative"),
        (v2() | {"parameters": {"tta_seq": 1}}, "needs a stream"),
        (
            v2() | {"parameters": {"tta_sec": 1}},
            "no parameter 'tta_sec'; there are: tta_adapt, tta_policy, tta_durability, tta_seq",
        ),
        (v2() | {"parameters": {"tta_": 0, "tta_adapt": False}}, "no parameter 'tta_'; there are"),
        (v2() | {"parameters": {"timeout": "soon"}}, "timeout must be int"),
        (v2() | {"parameters": {"timeout": -1}}, "timeout"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value,
)
async def test_tensors_and_parameters_that_do_not_fit(refusing: Server, body: Any, said: str) -> None:
    """With a sequence id where the case has none of its own, and one that is a stream's."""
    async with untouched(refusing):
        assert said in error_of(await refusing.client.post(INFER, json=body), 400)
        if "sequence_id" not in body.get("parameters", {}) and "needs a stream" not in said:
            body = body | {"parameters": {"sequence_id": "s", "sequence_end": True, **body.get("parameters", {})}}
            assert said in error_of(await refusing.client.post(INFER, json=body), 400)


@pytest.mark.parametrize(
    "query",
    ["seq=-1", "seq=x", "seq=1.5", f"seq={2**64}", f"seq={'9' * 4000}", "adapt=maybe", "timeout=0", "timeout=-1",
     "timeout=nan", "timeout=x", "output=classes", "top_k=0", "top_k=many", "priority=-1"],
    ids=lambda query: query[:12],
)  # fmt: skip
async def test_queries_that_do_not_fit(refusing: Server, query: str) -> None:
    async with untouched(refusing):
        response = await refusing.client.post(f"{PREDICT}?{query}", json={"inputs": rows(1).tolist()})
        name, _, given = query.partition("=")
        text = error_of(response, 400)
        assert text.startswith(f"the request does not fit: query.{name}: ")
        assert f", got '{given}"[:80] in text
        assert len(text) < 300


@pytest.mark.parametrize(
    "query",
    ["adpat=false", "adapt=false&Seq=3", "=", "x" * 999 + "=1", "output=logits&model="],
    ids=lambda query: query[:12],
)
async def test_a_query_parameter_that_is_none_is_not_passed_over(refusing: Server, query: str) -> None:
    async with untouched(refusing):
        response = await refusing.client.post(f"{PREDICT}?{query}", json={"inputs": rows(1).tolist()})
    text = error_of(response, 400)
    assert text.startswith("no query parameter '")
    assert text.endswith("; there are: seq, adapt, timeout, priority, output, top_k, datatype")
    assert len(text) < 150


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "said"),
    [
        ("PUT", "/v1/streams/new", {"policy": "magic"}, 404, "no policy 'magic'"),
        ("PUT", "/v1/streams/new", {"model": "huge"}, 404, "no model 'huge'"),
        ("PUT", "/v1/streams/new", {"settings": {"rate": 1}}, 400, "rate"),
        ("PUT", "/v1/streams/new", {"settings": {"lr": "fast"}}, 400, "lr"),
        ("PUT", "/v1/streams/new", {"settings": {"lr": -1}}, 400, "lr must lie in [0, inf), got -1"),
        ("PUT", "/v1/streams/new", {"policy": 5}, 400, "policy"),
        ("PUT", "/v1/streams/new", {"adapt": "on"}, 400, "adapt"),
        ("PUT", "/v1/streams/new", {"adapt": 1}, 400, "adapt"),
        ("PUT", "/v1/streams/new", {"nonsense": 1}, 400, "nonsense"),
        ("PUT", "/v1/streams/new", [], 400, "JSON object"),
        ("PUT", "/v1/streams/a%20b", {}, 400, "1 to 128 of"),
        pytest.param("PUT", "/v1/streams/" + "x" * 129, {}, 400, "1 to 128 of", id="long"),
        ("PUT", "/v1/streams/%C3%A4", {}, 400, "1 to 128 of"),
        ("PUT", "/v1/streams/s", {"policy": "norm"}, 409, "runs policy 'tent'"),
        ("PUT", "/v1/streams/s", {"settings": {"lr": 0.5}}, 409, "'lr': 0.5"),
        ("PATCH", "/v1/streams/nobody", {"adapt": True}, 404, "no stream 'nobody'"),
        ("GET", "/v1/streams/nobody", None, 404, "no stream 'nobody'"),
        ("DELETE", "/v1/streams/nobody", None, 404, "no stream 'nobody'"),
        ("POST", "/v1/streams/nobody/reset", None, 404, "no stream 'nobody'"),
        ("POST", "/v1/streams/nobody/predict", {"inputs": [0.5]}, 404, "no stream 'nobody'"),
        ("GET", "/v1/policies/magic", None, 404, "no policy 'magic'"),
        ("GET", "/v1/models/huge", None, 404, "no model 'huge'"),
        ("POST", "/v2/models/huge/infer", infer_body(rows(1)), 404, "no model 'huge'"),
        ("POST", "/v2/models/tiny/versions/01/infer", infer_body(rows(1)), 404, "version 1 only"),
    ],
)
async def test_streams_and_names(refusing: Server, method: str, path: str, body: Any, status: int, said: str) -> None:
    async with untouched(refusing):
        assert said in error_of(await refusing.client.request(method, path, json=body), status)


async def test_a_policy_that_cannot_run_on_the_model_is_a_conflict(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    from adapters.tent import Tent

    monkeypatch.setattr(Tent, "needs", frozenset({"fisher"}))
    response = await server.client.put("/v1/streams/s", json={"policy": "tent", "settings": {"lr": 0.02}})
    assert "needs fisher" in error_of(response, 409)


async def test_numbers_out_of_order_are_a_conflict(server: Server) -> None:
    await server.adapt()
    await server.predict("s", rows(1), seq=5)
    async with untouched(server):
        response = await server.client.post(f"{PREDICT}?seq=4", json={"inputs": rows(1).tolist()})
        assert "request number 4 of stream 's' is out of order: 5 came before" in error_of(response, 409)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
async def test_values_that_are_not_finite_leave_the_stream_alone(refusing: Server, value: float) -> None:
    x = rows(4).numpy()
    x[2, 1, 3, 3] = value
    async with untouched(refusing):
        assert "row 2 holds NaN or infinity" in error_of(await refusing.client.post(PREDICT, content=npy(x)), 400)


# Not now


async def test_a_server_that_shuts_down_says_so(loaded: Loaded) -> None:
    async with running(loaded) as server:
        await server.open("s")
        await server.service.drain()
        responses = [
            await server.client.post(PREDICT, json={"inputs": rows(1).tolist()}),
            await server.client.post(INFER, json=infer_body(rows(1))),
            await server.client.post("/v1/streams/s/reset"),
            await server.client.get("/v2/health/ready"),
            await server.client.get(f"/v2/models/{MODEL}/ready"),
        ]
        for response in responses:
            assert "shutting down" in error_of(response, 503)
            retry_after(response)


# Faults of our own


async def test_a_step_that_fails(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise ZeroDivisionError

    await server.adapt()
    async with untouched(server):
        monkeypatch.setattr(server.runner.engine, "answer", broken)
        error_of(await server.client.post(PREDICT, json={"inputs": rows(1).tolist()}), 500)


async def test_an_unexpected_error_shows_its_kind_and_nothing_else(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("secret detail")

    await server.open("s")
    monkeypatch.setattr(Tenant, "_launch", broken)
    monkeypatch.setattr(Tenant, "open", broken)
    for response in (
        await server.client.put("/v1/streams/t"),
        await server.client.post(PREDICT, json={"inputs": rows(1).tolist()}),
    ):
        assert error_of(response, 500) == "internal error: ZeroDivisionError"


def kinds(of: type[TtaError]) -> set[type[TtaError]]:
    """All classes below ``of``."""
    direct = set(of.__subclasses__())
    return direct.union(*map(kinds, direct))


def test_every_error_of_ours_has_its_status() -> None:
    from tta_server.errors import ConfigError

    ours = {kind for kind in kinds(TtaError) if kind.__module__ == TtaError.__module__}
    assert ours - {ConfigError} <= problems.STATUS.keys()


async def test_an_unexpected_error_ends_in_the_application(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raised on to the server, it would cost the connection, and with it somebody else's next request."""

    def broken(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("secret detail")

    monkeypatch.setattr(server.service, "check_room", broken)
    await server.open("s")
    transport = httpx.ASGITransport(server.app, raise_app_exceptions=True)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        response = await client.post("/v1/streams/s/predict", content=b"x")
        assert error_of(response, 500) == "internal error: ZeroDivisionError"
