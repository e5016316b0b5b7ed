"""How streams are stored, as clients see it: durability, readiness, a store that fails, one that is taken over."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.http.conftest import Loaded, Server, error_of, infer_body, retry_after, running, untouched
from tests.http.test_snapshots import future
from tests.serving import MODEL, TIMEOUT, rows
from tta_server.http.schemas import MODES
from tta_server.settings import Durability
from tta_server.state.sqlite import FILE, SqliteStore

pytestmark = pytest.mark.anyio

STREAM = "/v1/streams/s"
CONFIGURED = {"mode": "async", "steps": 5, "seconds": 2.0}
CALLS: list[tuple[str, str, Any]] = [
    ("PUT", "/v1/streams/new", {}),
    ("PATCH", STREAM, {"adapt": False}),
    ("POST", f"{STREAM}/reset", None),
    ("POST", f"{STREAM}/predict", {"inputs": rows(1).tolist()}),
    ("POST", f"{STREAM}/snapshots", {"name": "a"}),
    ("POST", f"{STREAM}/rollback", {"version": 2}),
    ("POST", f"{STREAM}/fork", {"id": "t"}),
    ("GET", f"{STREAM}/state", None),
    ("POST", f"/v2/models/{MODEL}/infer", infer_body(rows(1), sequence_id="s")),
]
"""That need the device, or the streams."""


@asynccontextmanager
async def storing(loaded: Loaded, folder: Path, **sections: Any) -> AsyncIterator[Server]:
    """A server that stores its streams."""
    async with running(loaded, state={"folder": str(folder), "durability": CONFIGURED}, **sections) as made:
        yield made


@pytest.fixture
async def server(loaded: Loaded, tmp_path: Path) -> AsyncIterator[Server]:
    async with storing(loaded, tmp_path) as made:
        yield made


def stored_versions(folder: Path) -> dict[str, int]:
    """What another process finds in the file: each stream's version."""
    with sqlite3.connect(folder / FILE) as db:
        found = db.execute("SELECT id, json_extract(CAST(record AS TEXT), '$.version') FROM streams").fetchall()
    db.close()
    return dict(found)


async def state(server: Server) -> Any:
    return await server.json("GET", "/v1/state")


# Durability


@pytest.mark.parametrize(
    ("wanted", "durability"),
    [
        (None, CONFIGURED),
        ("none", CONFIGURED | {"mode": "none"}),
        ("async", CONFIGURED),
        ("sync", CONFIGURED | {"mode": "sync"}),
        ({"mode": "async"}, CONFIGURED),
        ({"mode": "async", "steps": 3}, CONFIGURED | {"steps": 3}),
        ({"mode": "sync", "steps": None, "seconds": 1}, CONFIGURED | {"mode": "sync", "seconds": 1.0}),
    ],
    ids=str,
)
async def test_a_stream_is_stored_as_it_asks(server: Server, wanted: Any, durability: dict[str, Any]) -> None:
    made = await server.open("s", durability=wanted)
    assert made["durability"] == durability
    assert (await server.info("s"))["durability"] == durability
    await server.open("t")
    changed = await server.json("PATCH", "/v1/streams/t", json={"durability": wanted or "async"})
    assert (changed["durability"], changed["state_kept"]) == (durability, True)


async def test_what_is_left_out_stays(server: Server) -> None:
    await server.open("s", durability={"mode": "async", "steps": 3, "seconds": 9})
    for method in ("PUT", "PATCH"):
        changed = await server.json(method, STREAM, json={"durability": "sync"})
        assert changed["durability"] == {"mode": "sync", "steps": 3, "seconds": 9.0}
        changed = await server.json(method, STREAM, json={"durability": {"mode": "async", "steps": 4}})
        assert changed["durability"] == {"mode": "async", "steps": 4, "seconds": 9.0}
        changed = await server.json(method, STREAM, json={"durability": {"mode": "async", "steps": 3}})
    assert (await server.json("PUT", STREAM, json={"adapt": True}))["durability"] == changed["durability"]


@pytest.mark.parametrize(
    ("durability", "said"),
    [
        ("always", "/durability/mode: Input should be 'none', 'async' or 'sync', got 'always'"),
        ({}, "/durability/mode: Field required"),
        ({"steps": 3}, "/durability/mode: Field required"),
        ({"mode": "async", "steps": 0}, "/durability/steps: Input should be greater than 0, got 0"),
        ({"mode": "async", "steps": "3"}, "/durability/steps: Input should be a valid integer, got '3'"),
        ({"mode": "async", "seconds": 0}, "/durability/seconds: Input should be greater than 0, got 0"),
        ({"mode": "sync", "minutes": 1}, "/durability/minutes: Extra inputs are not permitted"),
        (3, "/durability: Input should be"),
        (["sync"], "/durability: Input should be"),
    ],
    ids=str,
)
async def test_a_durability_that_is_none(refusing: Server, durability: Any, said: str) -> None:
    async with untouched(refusing):
        for method, path in (("PATCH", STREAM), ("PUT", STREAM), ("PUT", "/v1/streams/new")):
            text = error_of(await refusing.client.request(method, path, json={"durability": durability}), 400)
            assert said in text
            assert text.count("\n") == 1, "one fault, one line"


async def test_over_v2_a_stream_says_how_it_is_stored(server: Server) -> None:
    for mode in MODES:
        await server.infer(rows(2), sequence_id=mode, sequence_start=True, sequence_end=False, tta_durability=mode)
        assert (await server.info(mode))["durability"] == CONFIGURED | {"mode": mode}
        await server.infer(rows(2), sequence_id=mode)
        assert (await server.info(mode))["durability"]["mode"] == mode, "what is left out stays"
    await server.json("PATCH", "/v1/streams/sync", json={"durability": {"mode": "sync", "steps": 9}})
    await server.infer(rows(2), sequence_id="sync", tta_durability="async")
    assert (await server.info("sync"))["durability"] == CONFIGURED | {"steps": 9}
    await server.infer(rows(2), sequence_id="sync", sequence_start=True, tta_durability="async")
    assert (await server.info("sync"))["durability"] == CONFIGURED, "another stream of that id"


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"tta_durability": "sync"}, "tta_durability needs a sequence_id"),
        (
            {"tta_durability": "always", "sequence_id": 1},
            "tta_durability must be one of none, async, sync, got 'always'",
        ),
        ({"tta_durability": 3, "sequence_id": 1}, "parameter tta_durability must be str, got 3"),
        ({"tta_durable": "sync", "sequence_id": 1}, "there are: tta_adapt, tta_policy, tta_durability, tta_seq"),
    ],
    ids=str,
)
async def test_over_v2_a_durability_that_is_none(refusing: Server, parameters: Any, said: str) -> None:
    async with untouched(refusing):
        assert said in (await refusing.infer(rows(1), 400, **parameters))["error"]


@pytest.mark.parametrize("predicts", ["v1", "v2"])
async def test_answers_of_a_sync_stream_wait_for_the_step_before(server: Server, tmp_path: Path, predicts: str) -> None:
    """What the file has when an answer is there is at least the version that the answer was made with."""
    assert (await server.open("s", durability="sync"))["unsaved_steps"] == 0
    for version in range(4):
        if predicts == "v1":
            answer = await server.predict("s", rows(2, version))
        else:
            answer = (await server.infer(rows(2, version), sequence_id="s"))["parameters"]
            answer["version"] = answer["state_version"]
            answer["lost_steps"] = answer.get("lost_steps", 0)
        assert stored_versions(tmp_path)["s"] >= version
        assert (answer["version"], answer["unsaved_steps"], answer["lost_steps"]) == (version, 0, 0)


async def test_changes_of_a_sync_stream_are_stored_when_they_are_answered(server: Server, tmp_path: Path) -> None:
    await server.open("s", durability="sync")
    await server.predict("s", rows(2))
    for method, path, body in (
        ("PUT", STREAM, {"adapt": False}),
        ("PATCH", STREAM, {"adapt": True}),
        ("PATCH", STREAM, {"settings": {"lr": 0.5}}),
        ("POST", f"{STREAM}/snapshots", {"name": "one"}),
        ("POST", f"{STREAM}/reset", None),
        ("POST", f"{STREAM}/rollback", {"snapshot": "one"}),
        ("POST", f"{STREAM}/fork", {"id": "t"}),
    ):
        before = (await server.info("s"))["saved"]
        response = await server.client.request(method, path, json=body)
        assert response.is_success, response.text
        info = await server.info("s")
        assert (info["unsaved_steps"], info["saved_version"]) == (0, info["version"]), (method, path)
        assert info["saved"] > before or path.endswith("fork")
        assert stored_versions(tmp_path)["s"] == info["version"]
    assert stored_versions(tmp_path) == {"s": 1, "t": 1}


async def test_a_stream_tells_what_a_crash_would_cost(server: Server, tmp_path: Path) -> None:
    """Of 20 steps no answer leaves with more than 5 before it unsaved."""
    await server.open("s", durability={"mode": "async", "steps": 5, "seconds": 1000})
    for version in range(20):
        answer = await server.predict("s", rows(2, version))
        assert 0 <= answer["unsaved_steps"] <= 5
        assert stored_versions(tmp_path).get("s", 0) >= version - 5
    info = await server.info("s")
    assert info["version"] - 5 <= info["saved_version"] <= 20
    assert info["unsaved_steps"] <= 6
    await server.open("none", durability="none")
    answer = await server.predict("none", rows(2))
    assert (answer["unsaved_steps"], answer["lost_steps"]) == (None, 0)
    info = await server.info("none")
    assert (info["unsaved_steps"], info["saved_version"], info["saved"]) == (None, None, None)
    assert "none" not in stored_versions(tmp_path)


async def test_a_server_that_stores_nothing_says_so(loaded: Loaded) -> None:
    async with running(loaded) as server:
        refused = await server.client.put("/v1/streams/s", json={"durability": "sync"})
        assert (refused.status_code, "state.folder is null" in refused.json()["error"]) == (409, True)
        made = await server.open("s", durability="none")
        assert (made["durability"]["mode"], made["unsaved_steps"]) == ("none", None)
        told = await server.json("GET", "/v2/health/ready")
        assert told == {"ready": True, "state": {"stored": False, "problem": None}}
        assert (await state(server))["persistent"] is False


async def test_a_stream_comes_back_with_the_server(loaded: Loaded, tmp_path: Path) -> None:
    async with storing(loaded, tmp_path) as server:
        await server.adapt(steps=3)
        await server.json("PATCH", STREAM, json={"settings": {"lr": 0.02}})
        await server.json("POST", f"{STREAM}/snapshots", 201, json={"name": "night"})
        before = await server.info("s")
        expected = await future(server, "s")
        await server.json("POST", f"{STREAM}/rollback", json={"snapshot": "night"})
    async with storing(loaded, tmp_path) as server:
        after = await server.info("s")
        same = ("policy", "settings", "durability", "version", "created", "last_number", "failures")
        assert {key: after[key] for key in same} == {key: before[key] for key in same}
        assert (after["tier"], after["unsaved_steps"]) == ("disk", 0)
        assert (await state(server))["last_shutdown"]["clean"] is True
        assert await future(server, "s") == expected
        await server.json("POST", f"{STREAM}/rollback", json={"snapshot": "night"})
        assert await future(server, "s") == expected


# The store's state


async def test_the_state_of_the_store(server: Server) -> None:
    told = await state(server)
    assert (told["persistent"], told["problem"], told["fenced"], told["last_shutdown"]) == (True, None, False, None)
    assert (told["streams"], told["unsaved_streams"], told["unsaved_steps"]) == (0, 0, 0)
    assert await server.json("GET", "/v2/health/ready") == {"ready": True, "state": {"stored": True, "problem": None}}
    await server.open("s", durability={"mode": "async", "steps": 100, "seconds": 1000})
    await server.open("t", durability={"mode": "async", "steps": 100, "seconds": 1000})
    await server.open("u", durability="none")
    for id in "sstu":
        await server.predict(id, rows(2))
    await server.stored()
    told = await state(server)
    assert (told["streams"], told["unsaved_streams"], told["unsaved_steps"]) == (3, 2, 2), "their creation is stored"
    size = (await server.info("s"))["state_bytes"]
    assert told["tiers"]["device"] == {"streams": 3, "bytes": 3 * size}
    assert (told["totals"]["saved"], told["totals"]["saved_bytes"]) == (2, 0)
    await server.json("POST", f"{STREAM}/snapshots", 201, json={"name": "a"})
    told = await state(server)
    assert (told["unsaved_streams"], told["unsaved_steps"]) == (1, 1)
    assert (told["totals"]["saved"], told["totals"]["saved_bytes"]) == (3, size)
    assert told["bytes"] > size


# A store that fails


@contextmanager
def unwritable(server: Server) -> Iterator[None]:
    """SQLite refuses to write, as where the folder is read-only."""
    db = server.service._backend.keeper._store._writer  # type: ignore[attr-defined]
    db.execute("PRAGMA query_only = 1")
    try:
        yield
    finally:
        db.execute("PRAGMA query_only = 0")


async def until_problem(server: Server, expected: bool) -> Any:
    """The state of the store, once there is a problem or none."""
    async with asyncio.timeout(TIMEOUT):
        while bool((told := await state(server))["problem"]) is not expected:
            await asyncio.sleep(0.01)
    return told


async def test_a_store_that_fails_costs_no_answers(server: Server, tmp_path: Path) -> None:
    """Requests are answered and adapt, new streams too; the fault is told, and over when it can be written again."""
    for id in "abcdefgh":
        await server.open(id, durability="sync")
    with unwritable(server):
        for version in range(3):
            for id in "abcdefgh":
                assert (await server.predict(id, rows(2)))["version"] == version
        told = await until_problem(server, True)
        assert "readonly" in told["problem"]
        assert told["unsaved_streams"] > 0
        assert told["totals"]["failed"] > 0
        await server.open("new", policy="tent")
        ready = await server.json("GET", "/v2/health/ready")
        assert ready["ready"] is True
        assert ready["state"]["stored"] is False
        assert "cannot be stored now" in ready["state"]["problem"]
        assert "readonly" not in ready["state"]["problem"], "what is public says no more"
        assert (await server.json("GET", "/v1/streams/a"))["unsaved_steps"] > 0
        response = await server.client.post("/v1/streams/a/snapshots", json={"name": "x"})
        assert "readonly" in error_of(response, 503)
        assert retry_after(response)
        assert (await server.json("POST", "/v1/streams/a/reset"))["version"] == 0
        assert (await server.predict("a", rows(2)))["unsaved_steps"] > 0
    await until_problem(server, False)
    async with asyncio.timeout(TIMEOUT):
        while (await state(server))["unsaved_streams"]:
            await asyncio.sleep(0.01)
    await server.settled()
    assert stored_versions(tmp_path) == {"a": 1, **dict.fromkeys("bcdefgh", 3), "new": 0}
    await server.json("POST", "/v1/streams/a/snapshots", 201, json={"name": "x"})


# A store that another process has


async def test_a_server_whose_streams_were_taken_over_refuses_them(server: Server, tmp_path: Path) -> None:
    await server.adapt(steps=2)
    await server.json("POST", f"{STREAM}/snapshots", 201, json={"name": "mine"})
    version = stored_versions(tmp_path)["s"]
    other = SqliteStore(tmp_path)
    other.acquire(take_over=True)
    try:
        async with asyncio.timeout(TIMEOUT):
            while not (told := await state(server))["fenced"]:
                await asyncio.sleep(0.01)
        assert "taken" in told["problem"]
        response = await server.client.get("/v2/health/ready")
        assert error_of(response, 503) == "another server has taken the streams of this one over"
        assert retry_after(response)
        error_of(await server.client.get(f"/v2/models/{MODEL}/ready"), 503)
        assert (await server.client.get("/v2/health/live")).status_code == 200
        for method, path, body in [*CALLS, ("DELETE", STREAM, None), ("GET", STREAM, None)]:
            response = await server.client.request(method, path, json=body)
            assert "ask the server that has the streams now" in error_of(response, 503), (method, path)
            assert retry_after(response)
        assert (await server.infer(rows(1)))["parameters"]["policy"] == "source", "without a stream it can answer"
        assert stored_versions(tmp_path)["s"] == version
    finally:
        other.close()


# Shutdown


async def test_a_server_that_shuts_down_changes_no_stream(loaded: Loaded, tmp_path: Path) -> None:
    async with storing(loaded, tmp_path) as server:
        await server.adapt(steps=2)
        file = (await server.client.get(f"{STREAM}/state")).content
        await server.service.drain()
        for method, path, body in CALLS:
            response = await server.client.request(method, path, json=body)
            assert error_of(response, 503), (method, path)
            assert retry_after(response)
        for id in "st":
            response = await server.client.put(f"/v1/streams/{id}/state", content=file)
            assert "shutting down" in error_of(response, 503)
        error_of(await server.client.get("/v2/health/ready"), 503)
    assert stored_versions(tmp_path) == {"s": 2}


def test_the_defaults_of_the_config() -> None:
    assert Durability().model_dump() == {"mode": "async", "steps": 16, "seconds": 5.0}
