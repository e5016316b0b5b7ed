"""``/v1/streams``: streams as resources: created, listed, changed, reset, deleted."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import pytest

from adapters.tent import Tent
from tests.http.conftest import Server, error_of, untouched
from tests.serving import LR, MODEL, rows
from tta_server.http.schemas import StreamDetail

pytestmark = pytest.mark.anyio


async def test_a_stream_from_its_creation_to_its_end(server: Server) -> None:
    created = await server.open("cam-1")
    StreamDetail.model_validate(created)
    assert (created["id"], created["model"], created["policy"], created["adapt"]) == ("cam-1", MODEL, "tent", True)
    assert created["settings"] == dataclasses.asdict(Tent(lr=LR))
    assert (created["version"], created["requests"], created["last_seen"]) == (0, 0, None)
    assert (created["tier"], created["drift"], created["signals"]) == ("none", None, {})

    assert await server.json("PUT", "/v1/streams/cam-1") == created, "an empty body confirms"
    await server.predict("cam-1", rows(4))
    seen = await server.info("cam-1")
    assert (seen["version"], seen["requests"], seen["tier"]) == (1, 1, "device")
    assert created["state_bytes"] == seen["state_bytes"] == 3 * 4 * 28 + 8, "weights, two moments, a counter"
    assert seen["last_seen"] >= seen["created"] == created["created"]
    assert {"loss", "entropy", "confidence", "bn_distance", "agreement"} <= seen["signals"].keys()
    assert seen["signals"]["bn_distance"]["value"] > 0
    assert (seen["drift"], seen["verdict"]) == (None, "unknown"), "there are no clean data to compare with"
    assert seen["missing"].keys() == {"feature_distance", "label_divergence", "label_psi", "z", "accuracy"}

    off = await server.json("PATCH", "/v1/streams/cam-1", json={"adapt": False})
    assert off == seen | {"adapt": False, "state_kept": True}
    reset = await server.json("POST", "/v1/streams/cam-1/reset")
    assert (reset["version"], reset["tier"], reset["signals"], reset["adapt"]) == (0, "none", {}, False)

    response = await server.client.delete("/v1/streams/cam-1")
    assert (response.status_code, response.content) == (204, b"")
    assert "cam-1" in (await server.json("GET", "/v1/streams/cam-1", 404))["error"]
    assert await server.json("GET", "/v1/streams") == {"streams": [], "next": None}


async def test_streams_are_listed_as_they_came(server: Server) -> None:
    made = [await server.open(id) for id in "cab"]
    listed = await server.json("GET", "/v1/streams")
    assert listed["next"] is None
    for one, whole in zip(listed["streams"], made, strict=True):
        assert one == {
            key: value for key, value in whole.items() if key not in ("signals", "missing", "guard_settings")
        }


async def test_a_stream_takes_what_it_is_asked_for(server: Server) -> None:
    body = {"model": MODEL, "policy": "norm", "settings": {"mode": "running"}, "adapt": False}
    made = await server.open("s", **body)
    assert (made["policy"], made["settings"]["mode"], made["settings"]["alpha"]) == ("norm", "running", 0.1)
    assert made["adapt"] is False
    assert await server.json("PUT", "/v1/streams/s", json=body) == made
    assert (await server.json("PUT", "/v1/streams/s", json={"adapt": True}))["adapt"] is True


# Lists


async def pages(server: Server, **query: Any) -> list[list[str]]:
    """The ids on every page."""
    found, cursor = list[list[str]](), None
    while cursor is not None or not found:
        page = await server.json("GET", "/v1/streams", params=query | ({} if cursor is None else {"cursor": cursor}))
        found.append([one["id"] for one in page["streams"]])
        cursor = page["next"]
    return found


async def test_lists_come_page_by_page(server: Server) -> None:
    for index in range(5):
        await server.open(f"s{index}")
    assert await pages(server) == [["s0", "s1", "s2", "s3", "s4"]]
    assert await pages(server, limit=2) == [["s0", "s1"], ["s2", "s3"], ["s4"]]
    assert await pages(server, limit=5) == [["s0", "s1", "s2", "s3", "s4"]], "no empty page at the end"


async def test_a_page_goes_on_where_the_one_before_ended(server: Server) -> None:
    """Whatever is created and deleted in between: no stream is listed twice, none that stays is left out."""
    for id in "abcd":
        await server.open(id)
    first = await server.json("GET", "/v1/streams", params={"limit": 2})
    for id in "bc":
        await server.client.delete(f"/v1/streams/{id}")
    await server.open("e")
    await server.open("a2")
    rest = await server.json("GET", "/v1/streams", params={"limit": 9, "cursor": first["next"]})
    assert [one["id"] for one in first["streams"]] == ["a", "b"]
    assert [one["id"] for one in rest["streams"]] == ["d", "e", "a2"]
    assert rest["next"] is None


@pytest.mark.parametrize(
    ("query", "ids"),
    [
        ({"policy": "norm"}, ["c", "d"]),
        ({"adapt": "false"}, ["b", "d"]),
        ({"adapt": "true"}, ["a", "c", "e"]),
        ({"policy": "tent", "adapt": "true"}, ["a", "e"]),
        ({"model": MODEL, "policy": "norm"}, ["c", "d"]),
        ({"model": "other"}, []),
        ({"policy": "eata"}, []),
    ],
    ids=str,
)
async def test_lists_can_be_filtered(server: Server, query: dict[str, str], ids: list[str]) -> None:
    for id, policy, adapt in (
        ("a", "tent", True), ("b", "tent", False), ("c", "norm", True), ("d", "norm", False), ("e", "tent", True),
    ):  # fmt: skip
        await server.open(id, policy=policy, adapt=adapt)
    assert await pages(server, **query) == [ids]
    assert await pages(server, **query, limit=1) == ([[one] for one in ids] or [[]])


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("limit=0", "query.limit: Input should be greater than or equal to 1, got '0'"),
        ("limit=1001", "less than or equal to 1000, got '1001'"),
        ("limit=many", "query.limit"),
        ("adapt=perhaps", "query.adapt"),
        ("cursor=", "cursor must be the 'next' of another page, got ''"),
        ("cursor=-1", "got '-1'"),
        ("cursor=abc", "got 'abc'"),
        ("cursor=%C2%B2", "cursor must be"),
        ("cursor=" + "9" * 5000, "cursor must be"),
        ("polciy=tent", "no query parameter 'polciy'; there are: limit, cursor, model, policy, adapt"),
    ],
    ids=lambda value: value[:20],
)
async def test_lists_that_are_asked_for_wrongly(refusing: Server, query: str, said: str) -> None:
    text = error_of(await refusing.client.get(f"/v1/streams?{query}"), 400)
    assert said in text
    assert len(text) < 200


# Changes


@pytest.mark.parametrize(
    ("change", "kept"),
    [
        ({"settings": {"lr": 0.5}}, True),
        ({"settings": {}}, True),
        ({"settings": {"lr": LR}}, True),
        ({"policy": "tent"}, True),
        ({"policy": "tent", "settings": {"lr": 0.5}, "adapt": False}, True),
        ({"settings": {"optimiser": "sgd"}}, False),
        ({"settings": {"window": 8}}, False),
        ({"policy": "norm"}, False),
        ({"policy": "norm", "settings": {"mode": "running"}}, False),
    ],
    ids=str,
)
async def test_a_change_keeps_the_state_where_its_layout_stays(
    server: Server, change: dict[str, Any], kept: bool
) -> None:
    await server.adapt(steps=3)
    before = await server.info("s")
    changed = await server.json("PATCH", "/v1/streams/s", json=change)
    assert changed.pop("state_kept") is kept
    assert changed == await server.info("s")
    policy = change.get("policy", "tent")
    assert (changed["policy"], changed["adapt"]) == (policy, change.get("adapt", True))
    assert changed["settings"] == changed["settings"] | change.get("settings", {})
    if policy == "tent":
        assert changed["settings"] == before["settings"] | change.get("settings", {}), "what is left out stays"
    assert changed["version"] == (3 if kept else 0)
    assert (changed["tier"] != "none") is kept
    assert (changed["created"], changed["requests"]) == (before["created"], 3)
    assert (await server.predict("s", rows(4), adapt=True))["version"] == changed["version"]


async def test_a_changed_learning_rate_counts_from_the_next_request_on(server: Server) -> None:
    """With rate 0 the scores stay where the stream is; had the state been lost they would be the source's."""
    await server.adapt(steps=3)
    await server.json("PATCH", "/v1/streams/s", json={"settings": {"lr": 0}})
    answers = [await server.predict("s", rows(4), output="logits") for _ in range(2)]
    assert answers[0]["logits"] == answers[1]["logits"]
    await server.open("fresh")
    fresh = await server.predict("fresh", rows(4), output="logits")
    assert fresh["logits"] != answers[0]["logits"]


async def test_changes_take_their_place_among_the_requests(server: Server) -> None:
    await server.open("s")
    gate = await server.hold()
    first = asyncio.create_task(server.predict("s", rows(4)))
    await server.waiting(1)
    change = asyncio.create_task(server.json("PATCH", "/v1/streams/s", json={"policy": "norm"}))
    await server.waiting(2)
    last = asyncio.create_task(server.predict("s", rows(4)))
    await server.waiting(3)
    gate.open()
    assert ((await first)["policy"], (await first)["version"]) == ("tent", 0)
    assert (await change)["state_kept"] is False
    assert ((await last)["policy"], (await last)["version"]) == ("norm", 0)


async def test_adaptation_is_switched_off_and_on(server: Server) -> None:
    await server.adapt()
    await server.json("PATCH", "/v1/streams/s", json={"adapt": False})
    off = await server.predict("s", rows(4))
    assert (off["policy"], off["adapted"], off["version"]) == ("source", False, 2)
    await server.json("PATCH", "/v1/streams/s", json={"adapt": True})
    on = await server.predict("s", rows(4))
    assert (on["policy"], on["version"]) == ("tent", 2)


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({}, 400, "give at least one of adapt, policy, settings, durability, consistency and guard"),
        ({"adapt": None}, 400, "give at least one of"),
        ({"adapt": 1}, 400, "/adapt: Input should be a valid boolean, got 1"),
        ({"policy": 5}, 400, "/policy: Input should be a valid string, got 5"),
        ({"settings": []}, 400, "/settings: Input should be a valid dictionary, got []"),
        ({"model": MODEL, "adapt": True}, 400, "/model: Extra inputs are not permitted"),
        ({"policy": "magic"}, 404, "no policy 'magic'; there are: "),
        ({"settings": {"rate": 1}}, 400, "rate"),
        ({"settings": {"lr": -1}}, 400, "lr must lie in [0, inf), got -1"),
        ({"policy": "norm", "settings": {"lr": 0.1}, "adapt": False}, 400, "lr"),
        ({"policy": "eata"}, 409, "tta-server prepare"),
        ([], 400, "must be a JSON object, got list"),
    ],
    ids=str,
)
async def test_changes_that_are_refused_change_nothing(refusing: Server, body: Any, status: int, said: str) -> None:
    async with untouched(refusing):
        assert said in error_of(await refusing.client.patch("/v1/streams/s", json=body), status)


# Opening


async def test_opening_again_otherwise_is_a_conflict_that_says_how_to_change_it(server: Server) -> None:
    await server.adapt()
    async with untouched(server):
        response = await server.client.put("/v1/streams/s", json={"settings": {"lr": 0.5}})
        text = error_of(response, 409)
    assert "runs policy 'tent'" in text
    assert "change it with PATCH" in text


@pytest.mark.parametrize("number", [0, 2**53 + 1, 2**64 - 1])
async def test_the_newest_request_number_is_told(server: Server, number: int) -> None:
    await server.open("s")
    await server.predict("s", rows(1), seq=number)
    assert (await server.info("s"))["last_number"] == number


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("stale", {"mode": "stale", "steps": 9}),
        ({"mode": "stale"}, {"mode": "stale", "steps": 9}),
        ({"mode": "stale", "steps": 2}, {"mode": "stale", "steps": 2}),
        ("strict", {"mode": "strict", "steps": 9}),
    ],
    ids=str,
)
async def test_what_a_change_of_consistency_leaves_out_stays(server: Server, asked: Any, expected: Any) -> None:
    await server.open("s", consistency={"mode": "stale", "steps": 9})
    assert (await server.info("s"))["consistency"] == {"mode": "stale", "steps": 9}
    answer = await server.client.patch("/v1/streams/s", json={"consistency": asked})
    assert answer.json()["consistency"] == expected


@pytest.mark.parametrize(
    "asked", ["late", 5, [], {"steps": 3}, {"mode": "stale", "steps": 0}, {"mode": "stale", "n": 1}]
)
async def test_a_consistency_that_is_none_is_refused(server: Server, asked: Any) -> None:
    await server.open("s")
    error_of(await server.client.patch("/v1/streams/s", json={"consistency": asked}), 400)
    assert (await server.info("s"))["consistency"]["mode"] == "strict"
