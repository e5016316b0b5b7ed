"""``/v1/streams/{id}/snapshots``, ``rollback`` and ``fork``: a stream's past, and copies of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.http.conftest import Loaded, Server, error_of, running, untouched
from tests.http.following import following
from tests.serving import MODEL, rows

pytestmark = pytest.mark.anyio

STREAM, COPY = "/v1/streams/s", "/v1/streams/t"
SIZE = 3 * 4 * 28 + 8
"""Bytes of a TENT stream's state: weights, two moments, a counter."""
SIZES = (4, 1, 7, 3)
"""Rows of the requests that tell whether two streams have the same future."""


@pytest.fixture
async def server(loaded: Loaded, tmp_path: Path) -> AsyncIterator[Server]:
    async with running(loaded, state={"folder": str(tmp_path), "snapshot_steps": 3, "snapshots": 2}) as made:
        yield made


async def mark(server: Server, name: str, id: str = "s") -> Any:
    return await server.json("POST", f"/v1/streams/{id}/snapshots", 201, json={"name": name})


async def snapshots(server: Server, id: str = "s") -> list[Any]:
    found: list[Any] = (await server.json("GET", f"/v1/streams/{id}/snapshots"))["snapshots"]
    return found


async def future(server: Server, id: str, first: int = 100) -> list[Any]:
    """The scores of some requests to come."""
    return [
        (await server.predict(id, rows(size, first + seed), output="logits"))["logits"]
        for seed, size in enumerate(SIZES)
    ]


# Snapshots


async def test_a_snapshot_from_its_creation_to_its_end(server: Server) -> None:
    await server.adapt(steps=2)
    before = time.time()
    made = await mark(server, "night")
    assert before - 1 <= made.pop("saved") <= time.time()
    assert made == {"names": ["night"], "version": 2, "bytes": SIZE, "automatic": True, "current": True}
    assert await mark(server, "Day_1.a:b") == (await snapshots(server))[0]
    await server.predict("s", rows(4))
    await mark(server, "later")
    told = [(one["names"], one["version"], one["current"]) for one in await snapshots(server)]
    assert told == [(["later"], 3, True), (["Day_1.a:b", "night"], 2, False)]

    response = await server.client.delete(f"{STREAM}/snapshots/night")
    assert (response.status_code, response.content) == (204, b"")
    assert [one["names"] for one in await snapshots(server)] == [["later"], ["Day_1.a:b"]]
    assert "'night'" in (await server.json("DELETE", f"{STREAM}/snapshots/night", 404))["error"]
    await mark(server, "night")
    assert (await snapshots(server))[0]["names"] == ["later", "night"], "the name is free again"


async def test_a_state_with_a_name_stays_and_others_go(server: Server) -> None:
    """The newest, the one before, and two automatic ones, three steps or more apart; what was named goes with them."""
    await server.open("s", durability="sync")
    for version in range(1, 15):
        await server.predict("s", rows(2, version))
        await server.stored()  # each by itself: of those that wait for the disk only the newest is written
        if version == 5:
            await mark(server, "five")
    await server.info("s")
    await mark(server, "end")
    found = await snapshots(server)
    assert [one["version"] for one in found] == [14, 13, 10, 5]
    assert [one["version"] for one in found if one["automatic"]] == [13, 10]
    assert [one["version"] for one in found if one["current"]] == [14]
    await server.client.delete(f"{STREAM}/snapshots/five")
    assert [one["version"] for one in await snapshots(server)] == [14, 13, 10]


async def test_a_new_stream_can_be_marked(server: Server) -> None:
    await server.open("s")
    made = await mark(server, "start")
    assert (made["version"], made["bytes"], made["current"]) == (0, 0, True)
    first = await future(server, "s")
    assert (await server.json("POST", f"{STREAM}/rollback", json={"snapshot": "start"}))["version"] == 0
    assert await future(server, "s") == first


async def test_a_snapshot_takes_its_place_among_the_requests(server: Server) -> None:
    await server.adapt(steps=1)
    gate = await server.hold()
    first = asyncio.create_task(server.predict("s", rows(4)))
    await server.waiting(1)
    marking = asyncio.create_task(mark(server, "between"))
    await server.waiting(2)
    last = asyncio.create_task(server.predict("s", rows(4)))
    await server.waiting(3)
    gate.open()
    assert ((await first)["version"], (await marking)["version"], (await last)["version"]) == (1, 2, 2)


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({}, 400, "/name: Field required"),
        ({"name": 5}, 400, "/name: Input should be a valid string, got 5"),
        ({"name": ""}, 400, "a snapshot's name has 1 to 128 of"),
        ({"name": "a/b"}, 400, "got 'a/b'"),
        ({"name": "x" * 129}, 400, "/name: String should have at most 128 characters"),
        ({"name": "a", "version": 1}, 400, "/version: Extra inputs are not permitted"),
        ({"name": "taken"}, 409, "stream 's' has a snapshot 'taken' already; delete it, or choose another name"),
        ([], 400, "must be a JSON object"),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_snapshots_that_are_refused(server: Server, body: Any, status: int, said: str) -> None:
    await server.adapt()
    await mark(server, "taken")
    there = await snapshots(server)
    async with untouched(server):
        assert said in error_of(await server.client.post(f"{STREAM}/snapshots", json=body), status)
    assert await snapshots(server) == there


async def test_a_stream_has_so_many_names_and_no_more(loaded: Loaded) -> None:
    async with running(loaded, limits={"marks": 2}) as server:
        await server.adapt()
        for name in "ab":
            await mark(server, name)
        response = await server.client.post(f"{STREAM}/snapshots", json={"name": "c"})
        assert "would have 3 named snapshots; the limit is limits.marks = 2" in error_of(response, 429)
        await server.client.delete(f"{STREAM}/snapshots/a")
        await mark(server, "c")


# Rollback


@pytest.mark.parametrize("where", [{"snapshot": "here"}, {"version": 2}], ids=str)
async def test_a_stream_that_went_back_goes_on_as_it_did(server: Server, where: dict[str, Any]) -> None:
    await server.adapt(steps=2)
    await mark(server, "here")
    first = await future(server, "s")
    assert (await server.info("s"))["version"] == 2 + len(SIZES)
    back = await server.json("POST", f"{STREAM}/rollback", json=where)
    assert (back["id"], back["version"], back["signals"]) == ("s", 2, {})
    assert back["requests"] == 2 + len(SIZES), "which were answered all the same"
    assert await future(server, "s") == first
    assert await future(server, "s") != first, "the stream learns; else this would show nothing"


async def test_of_several_states_of_a_version_the_newest_is_meant(server: Server) -> None:
    await server.adapt(steps=2)
    await mark(server, "first")
    await server.json("POST", f"{STREAM}/reset")
    for seed in (7, 8):
        await server.predict("s", rows(4, seed))
    await mark(server, "second")
    expected = await future(server, "s")
    assert [one["version"] for one in await snapshots(server) if one["names"]] == [2, 2]
    await server.json("POST", f"{STREAM}/rollback", json={"version": 2})
    assert await future(server, "s") == expected
    await server.json("POST", f"{STREAM}/rollback", json={"snapshot": "first"})
    assert await future(server, "s") != expected


async def test_request_numbers_go_on_where_the_state_goes_back(server: Server) -> None:
    await server.open("s")
    for number in (1, 2):
        await server.predict("s", rows(4), seq=number)
        await mark(server, f"n{number}")
    await server.json("POST", f"{STREAM}/rollback", json={"snapshot": "n1"})
    assert (await server.predict("s", rows(4), seq=2))["replayed"] is True
    response = await server.client.post(f"{STREAM}/predict?seq=1", json={"inputs": rows(4).tolist()})
    assert "out of order" in error_of(response, 409)
    assert (await server.predict("s", rows(4), seq=3))["version"] == 1


async def test_a_rollback_takes_its_place_among_the_requests(server: Server) -> None:
    await server.adapt(steps=1)
    await mark(server, "one")
    gate = await server.hold()
    first = asyncio.create_task(server.predict("s", rows(4)))
    await server.waiting(1)
    rollback = asyncio.create_task(server.json("POST", f"{STREAM}/rollback", json={"snapshot": "one"}))
    await server.waiting(2)
    last = asyncio.create_task(server.predict("s", rows(4)))
    await server.waiting(3)
    gate.open()
    await rollback
    assert ((await first)["version"], (await last)["version"]) == (1, 1), "one more step, which is undone"
    assert (await server.info("s"))["requests"] == 3


async def test_a_change_of_settings_that_keeps_the_state_keeps_its_past(server: Server) -> None:
    await server.adapt(steps=2)
    await mark(server, "here")
    await server.json("PATCH", STREAM, json={"settings": {"lr": 0}})
    await server.predict("s", rows(4))
    back = await server.json("POST", f"{STREAM}/rollback", json={"snapshot": "here"})
    assert (back["version"], back["settings"]["lr"]) == (2, 0), "the state goes back, the settings stay"


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({}, 400, "give either snapshot or version"),
        ({"snapshot": "here", "version": 2}, 400, "give either snapshot or version"),
        ({"snapshot": None, "version": None}, 400, "give either snapshot or version"),
        ({"version": -1}, 400, "/version: Input should be greater than or equal to 0, got -1"),
        ({"version": "2"}, 400, "/version: Input should be a valid integer, got '2'"),
        ({"version": True}, 400, "/version"),
        ({"snapshot": 2}, 400, "/snapshot"),
        ({"to": 2}, 400, "/to: Extra inputs are not permitted"),
        ({"snapshot": "there"}, 404, "no snapshot 'there' of stream 's' is kept; GET /v1/streams/s/snapshots lists"),
        ({"version": 2**64}, 404, "no state of version"),
        ({"version": 1}, 404, "no state of version 1 of stream 's' is kept"),
    ],
    ids=str,
)
async def test_rollbacks_that_are_refused_change_nothing(server: Server, body: Any, status: int, said: str) -> None:
    await server.adapt()
    await mark(server, "here")
    async with untouched(server):
        response = await server.client.post(f"{STREAM}/rollback", json=body)
        if body.get("version") == 2**64:
            assert response.status_code in (400, 404), "no JSON parser knows such numbers"
        else:
            assert said in error_of(response, status)


async def test_a_snapshot_of_another_policy_is_refused(server: Server) -> None:
    await server.adapt()
    await mark(server, "tent")
    await server.json("PATCH", STREAM, json={"policy": "norm", "settings": {"mode": "running"}})
    await server.predict("s", rows(4))
    async with untouched(server):
        response = await server.client.post(f"{STREAM}/rollback", json={"snapshot": "tent"})
        assert "is of policy 'tent'" in (text := error_of(response, 409))
        assert "the stream has 'norm'" in text
    await server.json("PATCH", STREAM, json={"policy": "tent"})
    assert (await server.json("POST", f"{STREAM}/rollback", json={"snapshot": "tent"}))["version"] == 2


# Fork


async def test_a_fork_goes_the_same_way_and_its_own(server: Server) -> None:
    await server.adapt(steps=2)
    await server.predict("s", rows(4), seq=7)
    await server.json("PATCH", STREAM, json={"adapt": False, "durability": "sync"})
    original = await server.info("s")
    response = await server.client.post(f"{STREAM}/fork", json={"id": "t"})
    assert (response.status_code, response.headers["location"]) == (201, COPY)
    made = response.json()
    assert made == await server.info("t")
    alike = ("model", "digest", "policy", "settings", "adapt", "durability", "version", "state_bytes")
    assert {key: made[key] for key in alike} == {key: original[key] for key in alike}
    assert (made["id"], made["requests"], made["last_number"], made["failures"]) == ("t", 0, None, 0)
    assert made["created"] > original["created"]
    assert made["unsaved_steps"] == 0
    for id in "st":
        await server.json("PATCH", f"/v1/streams/{id}", json={"adapt": True})

    async with untouched(server):
        copied = await future(server, "t")
    assert await future(server, "s") == copied
    async with untouched(server, "t"):
        await future(server, "s", first=200)
    await server.client.delete(STREAM)
    assert (await server.predict("t", rows(4)))["version"] == 3 + len(SIZES)


async def test_a_fork_is_of_the_state_after_the_requests_before(server: Server) -> None:
    await server.adapt(steps=1)
    gate = await server.hold()
    first = asyncio.create_task(server.predict("s", rows(4)))
    await server.waiting(1)
    fork = asyncio.create_task(server.json("POST", f"{STREAM}/fork", 201, json={"id": "t"}))
    await server.waiting(2)
    last = asyncio.create_task(server.predict("s", rows(4)))
    await server.waiting(3)
    gate.open()
    assert ((await first)["version"], (await fork)["version"], (await last)["version"]) == (1, 2, 2)


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({}, 400, "/id: Field required"),
        ({"id": ""}, 400, "a stream id has 1 to 128 of"),
        ({"id": "a/b"}, 400, "got 'a/b'"),
        ({"id": 5}, 400, "/id: Input should be a valid string, got 5"),
        ({"id": "t", "adapt": False}, 400, "/adapt: Extra inputs are not permitted"),
        ({"id": "s"}, 409, "there is a stream 's' already; delete it, or choose another id"),
        ({"id": "other"}, 409, "there is a stream 'other' already"),
    ],
    ids=str,
)
async def test_forks_that_are_refused_change_nothing(server: Server, body: Any, status: int, said: str) -> None:
    await server.adapt()
    await server.adapt("other")
    async with untouched(server), untouched(server, "other"):
        assert said in error_of(await server.client.post(f"{STREAM}/fork", json=body), status)


async def test_forks_count_as_streams(loaded: Loaded) -> None:
    async with running(loaded, limits={"streams": 2}) as server:
        await server.adapt()
        await server.json("POST", f"{STREAM}/fork", 201, json={"id": "t"})
        response = await server.client.post(f"{STREAM}/fork", json={"id": "u"})
        assert "the limit is limits.streams = 2" in error_of(response, 429)
        assert await server.listed() == ["s", "t"]


# Events


async def test_what_happens_to_a_past_is_told(server: Server) -> None:
    async with following(server, "/v1/events") as events:
        await server.open("s")
        await server.predict("s", rows(4))
        await mark(server, "one")
        await server.predict("s", rows(4))
        await server.json("POST", f"{STREAM}/rollback", json={"snapshot": "one"})
        await server.json("POST", f"{STREAM}/fork", 201, json={"id": "t"})
        told = [(await events.next()).data for _ in range(4)]
    assert [(one["kind"], one["stream"]) for one in told] == [
        ("opened", "s"), ("marked", "s"), ("rolled_back", "s"), ("imported", "t"),
    ]  # fmt: skip
    assert [one["fields"] for one in told[1:]] == [
        {"mark": "one"}, {"version": 1, "before": 2}, {"version": 1, "of": "s"},
    ]  # fmt: skip
    assert {one["model"] for one in told} == {MODEL}


# Unknown streams


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "snapshots", None),
        ("POST", "snapshots", {"name": "a"}),
        ("DELETE", "snapshots/a", None),
        ("POST", "rollback", {"version": 0}),
        ("POST", "fork", {"id": "t"}),
        ("GET", "state", None),
    ],
)
async def test_streams_that_are_not_there(server: Server, method: str, path: str, body: Any) -> None:
    response = await server.client.request(method, f"/v1/streams/nobody/{path}", json=body)
    assert "no stream 'nobody'" in error_of(response, 404)
    response = await server.client.request(method, f"/v1/streams/no%20body/{path}", json=body)
    assert "a stream id has" in error_of(response, 400)
    assert await server.listed() == []
