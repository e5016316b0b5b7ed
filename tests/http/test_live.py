"""The live page's headers, and the two paths of server-sent events that feed it."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from adapters.tent import Tent
from tests.http.conftest import PREDICT, Loaded, Server, error_of, retry_after, running
from tests.http.following import begun, following
from tests.serving import MODEL, rows
from tta_server import access
from tta_server.drift.monitor import Monitor
from tta_server.drift.signals import DRIFT
from tta_server.http import live
from tta_server.types import Stream

pytestmark = pytest.mark.anyio

TOKENS = [{"token": f"token-of-tenant-{name}", "tenant": name} for name in "ab"]
PATHS = ["/v1/live", "/v1/events"]


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks at what is new all the time."""
    monkeypatch.setattr(live, "POLL", 0.005)
    monkeypatch.setattr(live, "FRESH", 0.0)


@pytest.fixture
async def tenants(loaded: Loaded) -> AsyncIterator[tuple[Server, Server]]:
    """One server as two tenants see it, who may each make one call at a time."""
    auth = {"tokens": TOKENS, "tenants": {name: {"concurrent": 1} for name in "ab"}}
    async with running(loaded, auth=auth) as server:
        yield server.known_by("token-of-tenant-a"), server.known_by("token-of-tenant-b")


async def told(server: Server, **query: Any) -> Any:
    """The first event of ``/v1/live``."""
    async with following(server, "/v1/live", params=query) as live:
        return (await live.next()).data


async def ids(server: Server, **query: Any) -> list[str]:
    """The streams of the first event, in order."""
    return [stream["id"] for stream in (await told(server, **query))["streams"]]


# The page


async def test_the_page_may_run_its_own_script_and_style_only(server: Server) -> None:
    response = await server.client.get("/")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/html")
    assert response.headers["cache-control"] == "no-cache"
    policy = dict(part.split(" ", 1) for part in response.headers["content-security-policy"].split("; "))
    assert (policy["default-src"], policy["connect-src"]) == ("'none'", "'self'")
    for tag in ("script", "style"):
        (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", response.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert policy[f"{tag}-src"] == f"'sha256-{digest}'"


async def test_the_page_brings_all_that_it_needs(server: Server) -> None:
    page = (await server.client.get("/")).text
    assert set(re.findall(r"https?://[^\s'\"/]+", page)) == {"http://www.w3.org"}, "names of SVG, which nobody fetches"
    assert not re.findall(r"""<[^>]+\s(?:src|style|on\w+)=|@import|url\(|innerHTML|eval\(""", page)


# What /v1/live tells


async def test_the_streams_are_told_as_they_are(server: Server) -> None:
    await server.adapt("s", steps=4)
    await server.open("t", adapt=False, policy="norm")
    await server.settled()
    event = await told(server)
    by_id = {stream["id"]: stream for stream in event["streams"]}
    info = await server.info("s")
    same = ("model", "policy", "adapt", "verdict", "drift", "agreement", "version", "requests", "failures", "last_seen")
    assert {name: by_id["s"][name] for name in same} == pytest.approx({name: info[name] for name in same}, abs=1e-4)
    assert by_id["s"]["version"] == 4
    assert by_id["s"]["confidence"] == pytest.approx(info["signals"]["confidence"]["value"], abs=1e-4)
    assert by_id["s"]["distance"] == pytest.approx(info["signals"]["bn_distance"]["value"], abs=1e-4)
    assert by_id["s"]["past"].keys() == {"drift", "confidence", "agreement"}
    assert len(by_id["s"]["past"]["confidence"]) == 1
    assert (by_id["t"]["policy"], by_id["t"]["adapt"], by_id["t"]["last_seen"]) == ("norm", False, None)
    assert by_id["t"]["confidence"] is by_id["t"]["distance"] is None
    assert (event["total"], event["matching"], event["requests"], event["models"]) == (2, 2, 4, [MODEL])
    assert event["counts"] == {"adapting": 1, "unknown": 2, "near source": 0, "drifted": 0, "changing": 0}


async def test_the_values_move_with_the_requests(server: Server) -> None:
    await server.open("s")
    async with following(server, "/v1/live") as live:
        (before,) = (await live.next()).data["streams"]
        await server.predict("s", rows(4))
        await server.settled()
        after: dict[str, Any] = {}
        while after.get("confidence") is None:  # a moment behind the version
            (after,) = (await live.next()).data["streams"]
    assert (before["requests"], before["confidence"]) == (0, None)
    assert (after["version"], after["requests"]) == (1, 1)
    assert after["confidence"] > 0


async def test_what_is_long_is_told_when_it_is_new(server: Server) -> None:
    await server.adapt("s", steps=1)
    await server.settled()
    monitor = server.service.monitor
    async with following(server, "/v1/live") as live:
        (first,) = (await live.next()).data["streams"]
        (again,) = (await live.next()).data["streams"]
        assert {"past", "band"} <= first.keys()
        assert again == {name: value for name, value in first.items() if name not in ("past", "band")}
        monitor._clock = lambda: float("inf")
        await server.predict("s", rows(4, 1))
        new: dict[str, Any] = {}
        while "past" not in new:
            (new,) = (await live.next()).data["streams"]
    assert len(new["past"]["confidence"]) == 2
    assert new["past"]["confidence"][0] == first["past"]["confidence"][0]


async def test_search_filters_and_counts(server: Server) -> None:
    for id in ("north-1", "North-2", "south-1"):
        await server.open(id, adapt=id != "North-2")
    assert await ids(server, sort="id", order="asc", search="NORTH") == ["North-2", "north-1"]
    assert await ids(server, adapt=False) == ["North-2"]
    assert await ids(server, verdict="unknown", adapt=True, search="1", sort="id") == ["south-1", "north-1"]
    assert await ids(server, model="another") == []
    event = await told(server, verdict="drifted", search="north")
    assert (event["streams"], event["matching"], event["total"]) == ([], 0, 3)
    assert (event["counts"]["adapting"], event["counts"]["unknown"]) == (1, 2), "of all that fit the search"


async def test_sorting_and_pages(server: Server) -> None:
    for id, count in (("b", 2), ("c", 1), ("a", 3), ("idle", 0)):
        await server.open(id)
        for seed in range(count):
            await server.predict(id, rows(4, count + seed))
    await server.settled()
    everything = {one["id"]: one for one in (await told(server))["streams"]}
    for sort in ("drift", "confidence", "agreement", "version", "requests", "failures", "last_seen", "id"):
        for order, sign in (("asc", 1), ("desc", -1)):
            found = await ids(server, sort=sort, order=order)
            values = [everything[id]["distance" if sort == "drift" else sort] for id in found]
            known = [value for value in values if value is not None]
            assert known == sorted(known, reverse=sign < 0), (sort, order)
            if sort in ("drift", "confidence"):
                assert found[-1] == "idle", "without a value it comes last either way"
    assert await ids(server, sort="requests", limit=2) == ["a", "b"]
    assert await ids(server, sort="requests", limit=2, offset=2) == ["c", "idle"]
    event = await told(server, limit=2, offset=7)
    assert (event["streams"], event["matching"], event["offset"]) == ([], 4, 7)


async def test_one_stream_is_told_wherever_it_is(server: Server) -> None:
    for id in "ab":
        await server.adapt(id, steps=1)
    event = await told(server, sort="id", order="asc", limit=1, stream="b")
    assert [stream["id"] for stream in event["streams"]] == ["a"]
    assert event["stream"]["id"] == "b"
    assert "past" in event["stream"]
    assert (await told(server, stream="nobody"))["stream"] is (await told(server))["stream"] is None


async def test_details_are_read_for_the_page_alone(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def past(self: Monitor, stream: Stream) -> dict[str, list[float]]:
        asked.append(stream.id)
        return {DRIFT: []}

    monkeypatch.setattr(Monitor, "past", past)
    tenant = server.service.tenant("default")
    for number in range(300):
        tenant.open(f"s{number:03}")
    event = await told(server, sort="id", order="asc", offset=100, limit=3)
    assert (event["total"], event["matching"]) == (300, 300)
    assert asked[:3] == ["s100", "s101", "s102"]
    assert set(asked[3:]) <= {*asked[:3]}, "those of further events"


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ({"limt": 3}, "query.limt: Extra inputs are not permitted"),
        ({"sort": "colour"}, "query.sort"),
        ({"verdict": "fine"}, "query.verdict"),
        ({"limit": 0}, "query.limit"),
        ({"limit": 101}, "query.limit"),
        ({"offset": -1}, "query.offset"),
        ({"search": "x" * 129}, "query.search"),
    ],
    ids=str,
)
async def test_queries_that_do_not_fit(server: Server, query: dict[str, Any], said: str) -> None:
    assert said in error_of(await begun(server, "/v1/live", params=query), 400)


# What /v1/events tells


async def test_what_happens_is_told_in_order(server: Server) -> None:
    await server.open("before")
    async with following(server, "/v1/events") as events:
        await server.open("s")
        await server.json("PATCH", "/v1/streams/s", json={"adapt": False})
        await server.json("PATCH", "/v1/streams/s", json={"policy": "norm"})
        await server.json("POST", "/v1/streams/s/reset")
        await server.client.delete("/v1/streams/s")
        found = [await events.next() for _ in range(5)]
    assert [event.data["kind"] for event in found] == ["opened", "changed", "changed", "reset", "closed"]
    assert {(event.data["stream"], event.data["model"]) for event in found} == {("s", MODEL)}
    assert found[1].data["fields"] == {"adapt": False}
    assert (found[2].data["fields"]["policy"], found[2].data["fields"]["state_kept"]) == ("norm", False)
    times = [event.data["time"] for event in found]
    assert times == sorted(times)
    assert len({event.id for event in found}) == 5


async def test_a_client_that_comes_back_misses_nothing(server: Server) -> None:
    await server.open("a")
    async with following(server, "/v1/events", headers={"last-event-id": "0"}) as events:
        first = await events.next()
        assert first.data["stream"] == "a"
    for id in "bc":
        await server.open(id)
    for last, expected in ((first.id, "bc"), ("0", "abc"), ("1-1", "abc"), ("1-999", "abc"), ("what?", "abc")):
        async with following(server, "/v1/events", headers={"last-event-id": last}) as events:
            assert [(await events.next()).data["stream"] for _ in expected] == [*expected], last
    ahead = first.id.partition("-")[0] + "-999"
    for headers in ({}, {"last-event-id": ahead}):
        async with following(server, "/v1/events", headers=headers) as events:
            await server.open("d")
            assert (await events.next()).data["stream"] == "d", "only what is new"
            await server.client.delete("/v1/streams/d")


async def test_a_step_that_was_not_kept_is_told_with_its_request(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Tent.step

    def broken(*arguments: Any) -> Any:
        yield next(step(*arguments))
        raise ZeroDivisionError

    monkeypatch.setattr(Tent, "step", broken)
    await server.open("s")
    async with following(server, "/v1/events") as events:
        body = {"inputs": rows(4).tolist()}
        await server.json("POST", PREDICT, json=body, headers={"x-request-id": "number-17"})
        event = (await events.next()).data
    assert (event["kind"], event["request"], event["fields"]) == (
        "failed",
        "number-17",
        {"version": 0, "reason": "failed"},
    )
    assert (await told(server))["streams"][0]["failures"] == 1


# Whoever follows


async def test_tenants_follow_their_own_streams(tenants: tuple[Server, Server]) -> None:
    a, b = tenants
    await a.open("s")
    assert await ids(a) == ["s"]
    assert (await told(b, stream="s"))["total"] == 0
    assert (await told(b, stream="s"))["stream"] is None
    async with following(b, "/v1/events", headers={"last-event-id": "0"}) as events:
        await a.open("t")
        await b.open("own")
        assert (await events.next()).data["stream"] == "own"


async def test_following_takes_none_of_the_calls(tenants: tuple[Server, Server]) -> None:
    """A tenant that may make one call at a time may follow once besides."""
    a, b = tenants
    async with following(a, "/v1/live") as live:
        await live.next()
        await a.open("s")
        await a.predict("s", rows(2))
        for path in PATHS:
            refused = await begun(a, path)
            assert "1 event streams at the same time; the limit is auth.tenants.a.concurrent = 1" in error_of(
                refused, 429
            )
            retry_after(refused)
        async with following(b, "/v1/live") as other:
            await other.next()
    for path in PATHS:  # whoever hung up is not counted any more
        assert (await begun(a, path)).status_code == 200


@pytest.mark.parametrize("path", PATHS)
async def test_a_server_that_drains_ends_them(server: Server, path: str) -> None:
    async with following(server, path) as followed:
        server.service.draining = True
        await followed.ended()


@pytest.mark.parametrize("path", PATHS)
async def test_a_token_that_is_taken_back_ends_them(
    loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.setattr(access, "LOOKS_AGAIN", 0.0)

    def write(**entry: Any) -> None:
        (tmp_path / "tokens.yaml").write_text(yaml.safe_dump({"tokens": [{**TOKENS[0], **entry}]}), encoding="utf-8")

    write()
    settings, models = loaded
    here = settings.model_copy(update={"folder": tmp_path})
    async with running((here, models), auth={"file": "tokens.yaml"}) as server:
        a = server.known_by("token-of-tenant-a")
        for change in ({"rights": ["predict"]}, {"tenant": "another"}, {"token": "token-of-somebody-else"}):
            write()
            async with following(a, path) as followed:
                write(**change)
                await followed.ended()


async def test_there_are_only_so_many_followers(loaded: Loaded) -> None:
    """Of all tenants together, whatever they follow."""
    async with running(loaded, limits={"followers": 1}) as server:
        async with following(server, "/v1/live") as live:
            await live.next()
            for path in PATHS:
                refused = await begun(server, path)
                assert "the limit is limits.followers = 1" in error_of(refused, 429)
        assert (await begun(server, PATHS[0])).status_code == 200
