"""The Python client, sync and async, over the real server and a network that loses what it is told to lose."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import httpx
import numpy as np
import pytest
from anyio.from_thread import BlockingPortal, start_blocking_portal
from fastapi import FastAPI
from numpy.typing import NDArray

from tests.http.conftest import Impatient
from tests.serving import CLASSES, MODEL, TIMEOUT, hold, load, rows, varied
from tta_server.app import create_app
from tta_server.client import Answer, AsyncClient, AsyncStream, Client, NoAnswer, Stream, core
from tta_server.engine.source import SourceModel
from tta_server.errors import (
    BadInput,
    Conflict,
    DeadlineExceeded,
    Forbidden,
    QueueFull,
    TtaError,
    Unauthenticated,
    Unavailable,
    UnknownName,
)
from tta_server.http import problems
from tta_server.settings import Settings

pytestmark = pytest.mark.anyio

T = TypeVar("T")
Loaded = tuple[Settings, dict[str, SourceModel]]
Fate = tuple[bool, httpx.Response | httpx.RequestError]
"""Of a request: whether the server carries it out, and what the client sees instead of the server's answer."""
URL = "http://test"


def before(outcome: httpx.Response | httpx.RequestError) -> Fate:
    """The request does not reach the server."""
    return False, outcome


def after(outcome: httpx.Response | httpx.RequestError) -> Fate:
    """The answer is lost."""
    return True, outcome


class Network(httpx.BaseTransport, httpx.AsyncBaseTransport):
    """The way to the application, which runs in another thread; its next requests meet their ``fates``."""

    def __init__(self, portal: BlockingPortal, app: FastAPI) -> None:
        self.fates: list[Fate] = []
        self.seen: list[httpx.Request] = []
        self._portal, self._server = portal, Impatient(app, raise_app_exceptions=False)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        return self._portal.call(self._carry, request)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        return await asyncio.wrap_future(self._portal.start_task_soon(self._carry, request))

    async def _carry(self, request: httpx.Request) -> httpx.Response:
        self.seen.append(request)
        carried_out, outcome = self.fates.pop(0) if self.fates else (True, None)
        if carried_out:
            response = await self._server.handle_async_request(request)
            await response.aread()
            outcome = outcome or response
        if isinstance(outcome, Exception):
            raise outcome
        assert outcome is not None
        # A copy, which both kinds of client can read, and more than once.
        return httpx.Response(outcome.status_code, headers=outcome.headers, content=outcome.content)


@dataclass(frozen=True)
class Site:
    """A running server, the way to it, and one client with how long it paused between attempts."""

    app: FastAPI
    network: Network
    client: Client | AsyncClient
    pauses: list[float] = field(default_factory=list)

    async def stream(self, id: str = "s", **wanted: Any) -> Stream | AsyncStream:
        return await done(self.client.stream(id, **wanted))

    async def restore(self, id: str, file: bytes) -> Stream | AsyncStream:
        return await done(self.client.restore(id, file))

    async def fork(self, stream: Stream | AsyncStream, id: str) -> Stream | AsyncStream:
        return await done(stream.fork(id))

    async def info(self, stream: Stream | AsyncStream) -> Any:
        """What the stream is, once every step is over, adaptation included."""
        async with asyncio.timeout(TIMEOUT):
            while not self.app.state.service._runner._scheduler.idle:
                await asyncio.sleep(0)
        return await done(stream.info())

    async def json(self, method: str, path: str, **content: Any) -> Any:
        """What the server answers without our client."""
        async with httpx.AsyncClient(transport=self.network, base_url=URL) as plain:
            response = await plain.request(method, path, **content)
        assert response.is_success, response.text
        return response.json()


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """The tiny model."""
    return load(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(params=[Client, AsyncClient])
def kind(request: pytest.FixtureRequest) -> Any:
    """Every test runs for both."""
    return request.param


@pytest.fixture
async def site(loaded: Loaded, kind: Any) -> AsyncIterator[Site]:
    async with running(loaded, kind) as made:
        yield made


@asynccontextmanager
async def running(
    loaded: Loaded, kind: Any, sections: dict[str, Any] | None = None, **arguments: Any
) -> AsyncIterator[Site]:
    settings, models = loaded
    app = create_app(varied(settings, **(sections or {})), models)
    pauses: list[float] = []

    async def pause(seconds: float) -> None:
        pauses.append(seconds)

    with start_blocking_portal() as portal, portal.wrap_async_context_manager(app.router.lifespan_context(app)):
        network = Network(portal, app)
        if kind is Client:
            with Client(URL, transport=network, sleep=pauses.append, **arguments) as client:
                yield Site(app, network, client, pauses)
        else:
            async with AsyncClient(URL, transport=network, sleep=pause, **arguments) as async_client:
                yield Site(app, network, async_client, pauses)


async def done(value: T | Awaitable[T]) -> T:
    """What a method of either client returns."""
    return await value if isinstance(value, Awaitable) else value


async def listed(streams: Iterator[T] | AsyncIterator[T]) -> list[T]:
    return list(streams) if isinstance(streams, Iterator) else [one async for one in streams]


def images(seed: int = 0, count: int = 4) -> NDArray[np.float32]:
    x: NDArray[np.float32] = rows(count, seed).numpy()
    return x


def parameters_of(request: httpx.Request) -> dict[str, Any]:
    """What a V2 request asks for beside its tensors."""
    header = request.content[: int(request.headers["Inference-Header-Content-Length"])]
    parameters: dict[str, Any] = json.loads(header)["parameters"]
    return parameters


# Predictions


async def test_answers_are_those_of_the_json_interface(site: Site) -> None:
    stream = await site.stream(policy="tent")
    await site.json("PUT", "/v1/streams/twin", json={"policy": "tent"})
    for version in range(3):
        x = images(version)
        answer = await done(stream.predict(x))
        scores, shares = [
            await site.json(
                "POST", f"/v1/streams/twin/predict?output={output}&seq={version}", json={"inputs": x.tolist()}
            )
            for output in ("logits", "probabilities")
        ]
        assert answer.logits.dtype == answer.probabilities.dtype == np.float32
        assert np.array_equal(answer.logits, np.array(scores["logits"], np.float32))
        np.testing.assert_allclose(answer.probabilities, shares["probabilities"], rtol=1e-5)
        assert answer.classes.tolist() == scores["classes"]
        assert answer.confidence == pytest.approx(np.mean(scores["confidence"]))
        assert (answer.version, answer.adapted, answer.policy) == (version, True, "tent")
        told = (answer.drift, answer.verdict, answer.agreement)
        assert told == (scores["drift"], scores["verdict"], scores["agreement"])
        assert not answer.replayed
        assert not answer.shed
    assert answer.agreement is not None
    assert not site.pauses


@pytest.mark.parametrize("dtype", ["?", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f2", "f4", "f8", ">f4", ">i8"])
async def test_every_number_type_arrives_as_it_is(site: Site, dtype: str) -> None:
    x = np.asarray(images() > 0.3, dtype)
    assert 0 < x.mean() < 1
    expected = await done(site.client.predict(x.astype(np.float32)))
    got = await done(site.client.predict(x))
    assert np.array_equal(got.logits, expected.logits)


async def test_arrays_come_in_any_form(site: Site) -> None:
    x = images()
    expected = (await done(site.client.predict(x))).logits
    channels_last = np.ascontiguousarray(x.transpose(0, 2, 3, 1))
    wide = np.repeat(x, 2, axis=3)
    for same in (rows(4), x.tolist(), np.asfortranarray(x), channels_last.transpose(0, 3, 1, 2), wide[..., ::2]):
        assert np.array_equal((await done(site.client.predict(same))).logits, expected)


async def test_bytes_are_pixels(site: Site) -> None:
    pixels = np.arange(2 * 192, dtype=np.uint8).reshape(2, 3, 8, 8)
    expected = await done(site.client.predict(pixels.astype(np.float32) / np.float32(255)))
    got = await done(site.client.predict(pixels))
    np.testing.assert_allclose(got.logits, expected.logits, rtol=1e-5)


@pytest.mark.parametrize("array", [np.zeros((1, 3, 8, 8), np.complex64), "picture.png", [[None]]])
async def test_what_is_no_numbers_is_not_sent(site: Site, array: Any) -> None:
    stream = await site.stream()
    sent = len(site.network.seen)
    with pytest.raises(BadInput, match="images must be an array of numbers"):
        await done(stream.predict(array))
    assert len(site.network.seen) == sent


async def test_without_a_stream_the_source_model_answers(loaded: Loaded, kind: Any) -> None:
    async with running(loaded, kind, {"streams": {"default": "shared"}}) as site:
        shared = await site.stream("shared", policy="tent")
        first = await done(site.client.predict(images()))
        again = await done(site.client.predict(images(), model=MODEL))
        assert (first.adapted, first.policy) == (False, "source")
        assert np.array_equal(first.logits, again.logits)
        assert (await site.info(shared))["version"] == 0


async def test_a_model_is_named_where_there_are_several(site: Site) -> None:
    site.network.fates = [before(httpx.Response(200, json={"models": [{"name": "ant"}, {"name": "bee"}]}))]
    with pytest.raises(BadInput, match="ant, bee"):
        await done(site.client.predict(images()))
    with pytest.raises(UnknownName, match="a/b"):
        await done(site.client.predict(images(), model="a/b"))
    assert site.network.seen[-1].url.raw_path == b"/v2/models/a%2Fb/infer"


@pytest.mark.parametrize(("seconds", "microseconds"), [(0.01, 10_000), (1e-9, 1), (0.0, 1)])
async def test_a_request_can_wait_for_a_shorter_time(site: Site, seconds: float, microseconds: int) -> None:
    stream = await site.stream()
    gate = hold(site.app.state.service._runner)
    try:
        # Refused after that time, or at once where the server sees that it cannot do it in that time.
        with pytest.raises((DeadlineExceeded, QueueFull)):
            await done(stream.predict(images(), timeout=seconds))
    finally:
        gate.open()
    assert parameters_of(site.network.seen[-1])["timeout"] == microseconds
    assert (await done(stream.predict(images(), timeout=1000))).version == 0


def test_probabilities_of_large_scores() -> None:
    logits = np.array([[1000, 0, -1000], [-2000, -2000, -2000]], np.float32)
    answer = Answer(logits, 0, False, "source", False, False, None, None, None, None)
    assert answer.probabilities.tolist() == [[1, 0, 0], [pytest.approx(1 / 3)] * 3]


# Streams


async def test_the_life_of_a_stream(site: Site) -> None:
    stream = await site.stream("ward-3", policy="tent", settings={"lr": 5e-4})
    assert (stream.id, stream.model) == ("ward-3", MODEL)
    for _ in range(2):
        await done(stream.predict(images()))
    info = await site.info(stream)
    assert (info["policy"], info["settings"]["lr"], info["requests"]) == ("tent", 5e-4, 2)

    assert (await done(stream.update(settings={"lr": 0.001})))["settings"]["lr"] == 0.001
    assert not (await done(stream.update(adapt=False)))["adapt"]
    assert not (await done(stream.predict(images()))).adapted
    assert (await done(stream.predict(images(), adapt=True))).adapted
    assert (await done(stream.update(policy="norm", adapt=True)))["policy"] == "norm"
    assert (await done(stream.predict(images()))).policy == "norm"
    await done(stream.update(policy="tent"))
    await done(stream.predict(images()))
    assert (await done(stream.predict(images()))).version == 1
    assert (await done(stream.reset()))["version"] == 0
    assert (await done(stream.predict(images()))).version == 0

    await done(stream.close())
    await done(stream.close())
    with pytest.raises(UnknownName, match="ward-3"):
        await done(stream.info())


async def test_a_stream_that_exists_is_confirmed_and_its_numbers_go_on(site: Site) -> None:
    for version in range(3):
        stream = await site.stream(policy="tent")
        answer = await done(stream.predict(images(version)))
        assert (answer.version, answer.replayed) == (version, False)
    with pytest.raises(Conflict, match="runs policy 'tent'"):
        await site.stream(policy="norm")


async def test_the_past_of_a_stream(site: Site) -> None:
    stream = await site.stream(policy="tent")
    await done(stream.predict(images()))
    made = await done(stream.mark("here"))
    assert (made["names"], made["version"]) == (["here"], 1)
    first = [await done(stream.predict(images(seed))) for seed in (1, 2)]
    await done(stream.mark("there"))
    assert [one["names"] for one in await done(stream.snapshots())] == [["there"], ["here"]]

    assert (await done(stream.rollback("here")))["version"] == 1
    again = [await done(stream.predict(images(seed))) for seed in (1, 2)]
    for one, other in zip(first, again, strict=True):
        assert np.array_equal(one.logits, other.logits)
        assert not other.replayed
    assert (await done(stream.rollback(version=3)))["version"] == 3
    with pytest.raises(BadInput, match="give either snapshot or version"):
        await done(stream.rollback("here", version=3))
    with pytest.raises(UnknownName, match="no snapshot 'nowhere'"):
        await done(stream.rollback("nowhere"))
    with pytest.raises(Conflict, match="has a snapshot 'here' already"):
        await done(stream.mark("here"))

    await done(stream.unmark("here"))
    await done(stream.unmark("here"))
    assert [one["names"] for one in await done(stream.snapshots()) if one["names"]] == [["there"]]
    await done(stream.unmark("a/b?c"))
    assert site.network.seen[-1].url.raw_path == b"/v1/streams/s/snapshots/a%2Fb%3Fc"


async def test_copies_of_a_stream(site: Site) -> None:
    stream = await site.stream(policy="tent")
    for seed in range(3):
        await done(stream.predict(images(seed)))
    fork = await site.fork(stream, "copy")
    file = await done(stream.export())
    assert isinstance(file, bytes)
    restored = await site.restore("t", file)
    assert [(one.id, one.model) for one in (fork, restored)] == [("copy", MODEL), ("t", MODEL)]
    for seed in (3, 4):
        answers = [await done(one.predict(images(seed))) for one in (stream, fork, restored)]
        assert [one.version for one in answers] == [seed] * 3
        for one in answers[1:]:
            assert np.array_equal(one.logits, answers[0].logits)
    with pytest.raises(Conflict, match="there is a stream 't' already"):
        await site.fork(stream, "t")
    with pytest.raises(BadInput, match="altered"):
        await site.restore("t", file[:-1] + bytes([file[-1] ^ 1]))


async def test_how_a_stream_is_stored(loaded: Loaded, kind: Any, tmp_path: Path) -> None:
    async with running(loaded, kind, {"state": {"folder": str(tmp_path)}}) as site:
        stream = await site.stream(policy="tent", durability="sync")
        answers = [await done(stream.predict(images(seed))) for seed in range(2)]
        assert [(one.unsaved_steps, one.lost_steps) for one in answers] == [(0, 0)] * 2
        changed = await done(stream.update(durability={"mode": "async", "steps": 3}))
        assert (changed["durability"]["mode"], changed["durability"]["steps"]) == ("async", 3)
        await site.info(stream)
        told = await done(site.client.state())
        assert (told["persistent"], told["problem"], told["streams"]) == (True, None, 1)
    async with running(loaded, kind, {"state": {"folder": str(tmp_path)}}) as site:
        answer = await done((await site.stream()).predict(images()))
        assert (answer.version, answer.lost_steps) == (2, 0), "it came back"
    async with running(loaded, kind) as site:
        answer = await done((await site.stream()).predict(images()))
        assert (answer.unsaved_steps, answer.lost_steps) == (None, 0)


async def test_what_a_guard_says(loaded: Loaded, kind: Any) -> None:
    """In answers, and when an operator tells it what to do."""
    async with running(loaded, kind, {"guard": {"enabled": True}}) as site:
        stream = await site.stream(guard={"shadow_rows": 10_000, "guarantee": {"kind": "budget"}})
        settings = (await site.info(stream))["guard_settings"]
        assert (settings["shadow_rows"], settings["guarantee"]["kind"]) == (10_000, "budget")
        answer = await done(stream.predict(images()))
        assert (answer.served, answer.adapted, answer.guard) == ("source", True, "shadow")
        assert answer.evidence in ("helps", "unclear", "harms")
        assert answer.benefit is not None
        assert (await done(stream.guard("active")))["guard"]["pinned"] is True
        assert (await done(stream.predict(images()))).guard == "active"
        assert (await done(stream.guard("auto")))["guard"]["pinned"] is False
        with pytest.raises(BadInput):
            await done(stream.guard("asleep"))
        assert (await done(stream.update(guard={"shadow_rows": 5})))["state_kept"] is True
        assert (await site.info(stream))["guard_settings"]["shadow_rows"] == 5
        anonymous = await done(site.client.predict(images()))
        assert (anonymous.served, anonymous.guard, anonymous.evidence, anonymous.request) == ("source", *[None] * 3)


async def test_labels(site: Site) -> None:
    stream = await site.stream()
    first, second = [await done(stream.predict(images(seed))) for seed in range(2)]
    told = await done(stream.label(first, [0, None, None, 1]))
    assert told == {"request": first.request, "taken": 2, "repeated": 0, "missing": 2}
    assert (await done(stream.label(str(second.request), second.classes)))["taken"] == 4
    report = await done(stream.labels())
    assert (report["total"]["rows"], report["wanted"]) == (6, [])
    with pytest.raises(Conflict, match="row 0"):
        await done(stream.label(first, [1, None, None, None]))
    with pytest.raises(BadInput, match="got 1"):
        await done(stream.label(first, [0]))
    with pytest.raises(UnknownName):
        await done(stream.label("never", [0]))
    wrong: list[Any] = [[0.5] * 4, ["ant"] * 4, np.zeros(4)]
    for labels in wrong:
        with pytest.raises(BadInput, match="labels must be class numbers or None"):
            await done(stream.label(second, labels))
    assert (await done(stream.label(second, [*second.classes])))["repeated"] == 4
    with pytest.raises(BadInput, match="only answers of a stream"):
        await done(stream.label(await done(site.client.predict(images())), [0] * 4))


async def test_an_answer_that_was_lost_can_be_labelled(site: Site) -> None:
    stream = await site.stream()
    site.network.fates = [after(httpx.ReadError("lost"))]
    answer = await done(stream.predict(images()))
    assert answer.replayed
    assert (await done(stream.label(answer, answer.classes)))["taken"] == 4


async def test_labels_whose_receipt_was_lost_are_taken_once(site: Site) -> None:
    stream = await site.stream()
    answer = await done(stream.predict(images()))
    site.network.fates = [after(httpx.ReadError("lost"))]
    assert await done(stream.label(answer, [0, 1, 2, 3])) == {
        "request": answer.request, "taken": 0, "repeated": 4, "missing": 0
    }  # fmt: skip
    assert (await done(stream.labels()))["total"]["rows"] == 4


async def test_streams_are_listed_page_by_page(site: Site) -> None:
    ids = [f"s{index}" for index in range(103)]
    for index, id in enumerate(ids):
        await site.stream(id, policy=("tent", "norm")[index % 2], adapt=index % 3 > 0)
    asked = len(site.network.seen)
    streams = site.client.streams()
    first = next(streams) if isinstance(streams, Iterator) else await anext(streams)
    assert len(site.network.seen) == asked + 1
    assert [one["id"] for one in [first, *await listed(streams)]] == ids
    assert len(site.network.seen) == asked + 2

    tents = await listed(site.client.streams(model=MODEL, policy="tent", adapt=False))
    assert [one["id"] for one in tents] == ids[::6]
    with pytest.raises(BadInput, match="nonsense"):
        await listed(site.client.streams(nonsense=1))  # type: ignore[call-arg]


async def test_models_and_policies(site: Site) -> None:
    (model,) = await done(site.client.models())
    assert (model["name"], model["classes"]) == (MODEL, list(CLASSES))
    assert "tent" in [policy["name"] for policy in await done(site.client.policies())]


async def test_names_are_quoted(site: Site) -> None:
    with pytest.raises(BadInput, match="a stream id has"):
        await site.stream("a b?c#d%41")
    assert site.network.seen[-1].url.raw_path == b"/v1/streams/a%20b%3Fc%23d%2541"
    with pytest.raises(TtaError):
        await site.stream("s/reset")
    assert site.network.seen[-1].url.raw_path == b"/v1/streams/s%2Freset"


async def test_a_token_opens_what_it_is_for(loaded: Loaded, kind: Any) -> None:
    tokens = [{"token": "predicts-and-no-more", "rights": ["predict"]}, {"token": "does-what-streams-do"}]
    sections = {"auth": {"tokens": tokens}}
    async with running(loaded, kind, sections, token="does-what-streams-do") as site:
        await done((await site.stream()).predict(images()))
    async with running(loaded, kind, sections, token="predicts-and-no-more") as site:
        await done(site.client.predict(images()))
        with pytest.raises(Forbidden, match="right"):
            await site.stream()
    async with running(loaded, kind, sections) as site:
        with pytest.raises(Unauthenticated, match="token"):
            await done(site.client.models())


# Attempts

LOST = [httpx.ReadError("cut"), httpx.ReadTimeout("late"), httpx.RemoteProtocolError("closed"), httpx.WriteError("cut")]


@pytest.mark.parametrize("error", LOST, ids=repr)
async def test_a_lost_answer_does_not_adapt_twice(site: Site, error: httpx.RequestError) -> None:
    stream, twin = await site.stream("s", policy="tent"), await site.stream("twin", policy="tent")
    site.network.fates = [after(error), after(error)]
    answer = await done(stream.predict(images()))
    first, second, third = (request.content for request in site.network.seen[-3:])
    assert first == second == third
    assert answer.replayed
    assert len(site.pauses) == 2

    expected = await done(twin.predict(images()))
    assert np.array_equal(answer.logits, expected.logits)
    assert (await site.info(stream))["requests"] == 1
    answer, expected = [await done(one.predict(images(1))) for one in (stream, twin)]
    assert (answer.version, answer.replayed) == (1, False)
    assert np.array_equal(answer.logits, expected.logits)


REFUSED = [
    (httpx.ConnectError("nobody listens"), 0),
    (httpx.ConnectTimeout("nobody answers"), 0),
    (httpx.Response(429, json={"error": "full"}, headers={"Retry-After": "7"}), 7),
    (httpx.Response(503, json={"error": "loading"}, headers={"Retry-After": "3600"}), core.LONGEST_PAUSE),
    (httpx.Response(503, text="a proxy's", headers={"Retry-After": "Fri, 31 Dec 1999 23:59:59 GMT"}), 0),
]


@pytest.mark.parametrize(("outcome", "asked"), REFUSED)
async def test_what_was_refused_is_sent_again(
    site: Site, outcome: httpx.Response | httpx.RequestError, asked: float
) -> None:
    stream = await site.stream()
    site.network.fates = [before(outcome)] * 4
    answer = await done(stream.predict(images()))
    assert (answer.version, answer.replayed) == (0, False)
    assert len({parameters_of(request)["tta_seq"] for request in site.network.seen[-5:]}) == 1
    assert len(site.pauses) == 4
    for attempt, pause in enumerate(site.pauses):
        assert asked < pause < asked + core.FIRST_PAUSE * 2**attempt


def test_pauses_grow_to_a_limit_and_differ() -> None:
    error = httpx.ConnectError("nobody listens")
    for attempt, most in [(0, 0.25), (1, 0.5), (6, 16.0), (7, 30.0), (5000, 30.0)]:
        pauses = [core.pause(error, attempt) or 0.0 for _ in range(300)]
        assert 0.9 * most < max(pauses) <= most
        assert min(pauses) < 0.1 * most


async def test_every_change_may_be_sent_again(site: Site) -> None:
    cut = httpx.ReadError("cut")
    site.network.fates = [after(cut)]
    stream = await site.stream(policy="tent")
    await done(stream.predict(images()))
    site.network.fates = [after(cut)]
    assert (await done(stream.update(policy="norm", settings={"alpha": 0.5})))["settings"]["alpha"] == 0.5
    site.network.fates = [after(cut)]
    await done(stream.update(policy="tent"))
    await done(stream.predict(images()))
    site.network.fates = [after(cut)]
    assert (await done(stream.reset()))["version"] == 0
    await done(stream.predict(images()))
    await done(stream.mark("one"))
    await done(stream.predict(images()))
    site.network.fates = [after(cut)]
    assert (await done(stream.rollback("one")))["version"] == 1
    site.network.fates = [after(cut)]
    file = await done(stream.export())
    site.network.fates = [after(cut)]
    stream = await site.restore("s", file)
    assert (await done(stream.predict(images()))).version == 1
    site.network.fates = [after(cut)]
    await done(stream.unmark("one"))
    site.network.fates = [after(cut)]
    await done(stream.close())
    assert await listed(site.client.streams()) == []
    assert len(site.pauses) == 9


async def test_a_name_is_not_taken_twice(site: Site) -> None:
    """Where the first attempt may have taken it there is no second one, which would be refused."""
    stream = await site.stream(policy="tent")
    unseen = (httpx.ConnectError("nobody"), httpx.ConnectTimeout("late"), httpx.PoolTimeout("full"))
    refused = httpx.Response(503, json={"error": "loading"})
    for call in (stream.mark, stream.fork):
        site.network.fates = [after(httpx.ReadError("cut"))]
        with pytest.raises(NoAnswer, match="failed 1 times"):
            await done(call("a"))
        site.network.fates = [before(one) for one in (*unseen, refused)]
        await done(call("b"))
    assert len(site.pauses) == 8
    assert {name for one in await done(stream.snapshots()) for name in one["names"]} == {"a", "b"}
    assert [one["id"] for one in await listed(site.client.streams())] == ["s", "a", "b"]


async def test_a_prediction_that_failed_does_not_give_its_number_back(site: Site) -> None:
    stream = await site.stream(policy="tent")
    cut = httpx.ReadError("cut")
    site.network.fates = [after(cut)] * 5
    with pytest.raises(NoAnswer, match=r"POST /v2/models/tiny/infer at test failed 5 times: ReadError") as caught:
        await done(stream.predict(images()))
    assert caught.value.__cause__ is cut
    assert len(site.pauses) == 4

    # The server carried it out; its answer must not pass for one about other images.
    answer = await done(stream.predict(images(1)))
    assert (answer.version, answer.replayed) == (1, False)
    with pytest.raises(BadInput, match="inputs must be"):
        await done(stream.predict(images()[:, :2]))
    assert (await done(stream.predict(images()))).version == 2
    assert [parameters_of(request)["tta_seq"] for request in site.network.seen[-3:]] == [2, 3, 4]


async def test_retries_can_be_switched_off(loaded: Loaded, kind: Any) -> None:
    async with running(loaded, kind, retries=0) as site:
        site.network.fates = [before(httpx.ConnectError("nobody listens"))]
        with pytest.raises(NoAnswer, match="failed 1 times"):
            await done(site.client.models())
        assert not site.pauses


@pytest.mark.parametrize("error", [httpx.UnsupportedProtocol("ftp"), httpx.LocalProtocolError("bad header")], ids=repr)
async def test_what_cannot_be_sent_is_not_sent_again(site: Site, error: httpx.RequestError) -> None:
    site.network.fates = [before(error)]
    with pytest.raises(NoAnswer):
        await done(site.client.models())
    assert not site.pauses


def test_a_url_without_a_scheme() -> None:
    with Client("localhost:8000") as client, pytest.raises(NoAnswer, match="UnsupportedProtocol"):
        client.models()


async def test_an_answer_too_large_to_keep(loaded: Loaded, kind: Any) -> None:
    async with running(loaded, kind, {"limits": {"stored_answer_bytes": 1}}) as site:
        stream = await site.stream(policy="tent")
        site.network.fates = [after(httpx.ReadError("cut"))]
        with pytest.raises(Conflict, match="it was too large"):
            await done(stream.predict(images()))
        assert (await done(stream.predict(images(1)))).version == 1


async def test_calls_on_one_stream_keep_their_order(site: Site) -> None:
    stream = await site.stream(policy="tent")
    site.network.fates = [before(httpx.ConnectError("nobody listens"))] * 3

    async def predict() -> Answer:
        # In a thread of its own; of the async client only the coroutine is made there.
        return await done(await asyncio.to_thread(lambda: stream.predict(images())))

    answers = await asyncio.gather(*(predict() for _ in range(8)))
    assert sorted(answer.version for answer in answers) == list(range(8))
    assert not any(answer.replayed for answer in answers)


async def test_two_objects_that_number_one_stream_notice(site: Site) -> None:
    one, other = await site.stream(policy="tent"), await site.stream(policy="tent")
    await done(one.predict(images()))
    with pytest.raises(Conflict, match="request number 1 of stream 's' was used before"):
        await done(other.predict(images(1)))
    assert (await done(other.predict(images(1)))).version == 1
    await done(other.predict(images(1)))
    with pytest.raises(Conflict, match="out of order"):
        await done(one.predict(images()))


# Errors


def test_errors_come_back_as_what_they_were() -> None:
    assert {status: error for error, status in problems.STATUS.items()} == core.ERRORS


@pytest.mark.parametrize(("status", "expected"), [*core.ERRORS.items(), (418, TtaError), (307, TtaError)])
async def test_refusals_have_their_class_text_and_status(site: Site, status: int, expected: type[TtaError]) -> None:
    answer = httpx.Response(status, json={"error": "what was wrong"}, headers={"Retry-After": "9"})
    site.network.fates = [before(answer)] * 5
    with pytest.raises(expected) as caught:
        await done(site.client.models())
    assert type(caught.value) is expected
    assert str(caught.value) == "what was wrong"
    assert vars(caught.value)["status"] == status
    assert len(site.pauses) == (4 if status in (429, 503) else 0)
    if isinstance(caught.value, QueueFull | Unavailable):
        assert caught.value.retry_after == 9


async def test_something_else_answers_for_a_file(site: Site) -> None:
    stream = await site.stream()
    for answer in (httpx.Response(200, text="<h1>Welcome</h1>"), httpx.Response(200, content=b"")):
        site.network.fates = [before(answer)]
        with pytest.raises(TtaError, match="check the URL"):
            await done(stream.export())


FOREIGN = [
    (httpx.Response(502, text="<h1>Bad gateway</h1>"), "answered 502, not by a tta-server: '<h1>Bad gateway</h1>'"),
    (httpx.Response(500, json=["error"]), "answered 500, not by a tta-server"),
    (httpx.Response(200, text="<h1>Welcome</h1>"), "check the URL: JSONDecodeError"),
    (httpx.Response(200, json={}), "check the URL: KeyError"),
    (httpx.Response(200, json=[]), "check the URL: TypeError"),
]


@pytest.mark.parametrize(("answer", "text"), FOREIGN)
async def test_something_else_answers(site: Site, answer: httpx.Response, text: str) -> None:
    calls: Iterable[Callable[[], Any]] = (site.client.models, lambda: site.client.predict(images(), model=MODEL))
    for call in calls:
        site.network.fates = [before(answer)]
        with pytest.raises(TtaError) as caught:
            await done(call())
        if call == site.client.models:
            assert text in str(caught.value)


# What it needs


def test_importing_it_is_cheap() -> None:
    heavy = {"torch", "fastapi", "starlette", "pydantic", "uvicorn", "prometheus_client", "PIL", "yaml", "adapters"}
    script = f"import sys, tta_server.client; print(*({heavy!r} & sys.modules.keys()), sep=',')"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == ""
