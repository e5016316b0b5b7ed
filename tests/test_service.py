"""All tenants over one runner: drains, levels, room in the queue; and any order of operations leaves nothing behind."""

from __future__ import annotations

import asyncio
import gc
import os
from collections.abc import AsyncIterator, Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adapters.tent import Tent
from tests.serving import (
    MODEL,
    TIMEOUT,
    Bench,
    Loaded,
    hold,
    load,
    loader,
    lost_exceptions,
    make_device,
    rows,
    serving,
    start,
    unexpected,
    varied,
    write_weights,
)
from tta_server.access import Access
from tta_server.errors import QueueFull, TtaError, Unavailable
from tta_server.service import Drained, Service
from tta_server.types import Job, Lane, Plan, Stream

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the tiny model's files are."""
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Loaded:
    """The tiny model."""
    return load(folder)


@pytest.fixture
async def bench(loaded: Loaded) -> AsyncIterator[Bench]:
    async with serving(loaded) as made:
        yield made


def admits(bench: Bench) -> bool:
    """Whether the runner still takes work; if so, it got some that does nothing."""
    try:
        bench.device.runner.submit(Job(Stream("probe", MODEL, Tent(), 0, 0.0), lambda *_: None, command=lambda: None))
    except Unavailable:
        return False
    return True


async def test_a_name_is_one_tenant(bench: Bench) -> None:
    assert bench.service.tenant("a") is bench.service.tenant("a")
    assert bench.service.tenant("a") is not bench.service.tenant("b")
    assert bench.service.tenant("a").name == "a"


async def test_draining_refuses_new_work_and_finishes_the_old(loaded: Loaded) -> None:
    async with serving(loaded) as bench:
        stream, _ = bench.tenant.open("s")
        gate = await bench.hold()
        task = start(bench.tenant.predict(None, rows(2), stream="s"))
        await bench.waiting(1)
        drain = start(bench.service.drain())
        async with asyncio.timeout(TIMEOUT):
            while not bench.service.draining or admits(bench):
                await asyncio.sleep(0)
        for work in (
            bench.tenant.predict(None, rows(2), stream="s", number=1),
            bench.tenant.update("s", settings={"lr": 0.5}, adapt=False),
            bench.tenant.reset("s"),
            bench.tenant.close("s"),
        ):
            with pytest.raises(Unavailable, match="shutting down"):
                await work
        assert (bench.tenant.stream("s"), stream.policy.name, stream.adapt) == (stream, "tent", True)
        gate.open()
        assert (await task)[0].version == 0
        assert await drain == Drained(0, 0, 0)
        assert stream.version == 1


async def test_what_a_drain_gives_up_is_told_without_a_complaint_of_the_loop(loaded: Loaded) -> None:
    """A stream that was replaced is forgotten by a command that nobody waits for."""
    config, models = loaded
    device = make_device(config, models)
    access = Access(config.auth, config.folder)
    config = varied(config, limits={"drain_seconds": 0.001})
    service = Service(config, models, device.runner, device.keeper, access, loader(loaded))
    service.begin()
    lost, tenant = lost_exceptions(), service.tenant("default")
    tenant.open("s")
    gate = await asyncio.to_thread(hold, device.runner)
    task = start(tenant.predict(None, rows(2), stream="s"))
    async with asyncio.timeout(TIMEOUT):
        while device.runner.waiting != 1:
            await asyncio.sleep(0)
    tenant.open("s", replace=True)
    drain = start(service.drain())
    with pytest.raises(Unavailable, match="shut down before"):
        await task
    gate.open()
    assert (await drain).given_up == 2
    del task, drain
    await asyncio.sleep(0)
    gc.collect()
    assert lost == []


async def test_a_drain_happens_once(bench: Bench) -> None:
    """Whoever asks again gets the first one's outcome."""
    bench.tenant.open("s")
    await bench.tenant.predict(None, rows(2), stream="s")
    one, other = await asyncio.gather(bench.service.drain(), bench.service.drain())
    assert one is other


async def test_levels_are_read_from_what_is_there(bench: Bench) -> None:
    """Of all tenants together."""
    bench.tenant.open("a")
    bench.tenant.open("b", adapt=False)
    bench.service.tenant("other").open("a")
    bench.service.tenant("other").open("c", policy="norm")
    gate = await bench.hold()
    task = start(bench.tenant.predict(None, rows(2), stream="a"))
    await bench.waiting(1)
    levels = bench.service.levels()
    assert levels.waiting == 1
    assert [(one.tenant, one.id) for one in levels.streams] == [
        (bench.tenant.name, "a"), (bench.tenant.name, "b"), ("other", "a"), ("other", "c"),
    ]  # fmt: skip
    assert levels.references == dict.fromkeys(bench.service.models.loaded(), False)
    assert levels.states["device"] == (0, 0)
    gate.open()
    await task
    await bench.settled()
    count, size = bench.service.levels().states["device"]
    assert count == 1
    assert size > 4 * 28, "28 adaptable values and an optimiser's moments"
    assert bench.service.levels().digests == {name: one.digest for name, one in bench.service.models.loaded().items()}
    await bench.service.models.unload(MODEL)
    assert bench.service.levels().digests == {}


async def test_room_is_checked_before_a_body_is_read(loaded: Loaded) -> None:
    """By number, and by the time that what waits will take, see ``Scheduler.ran``."""
    async with serving(loaded, limits={"queue": 3, "queue_seconds": 20.0}) as bench:
        service, tenant = bench.service, bench.tenant
        tenant.open("s")
        gate = await bench.hold()
        lane = tenant.stream("s").lane
        bench.device.scheduler.ran(Plan(lane, [Job(tenant.stream("s"), lambda *_: None, lane)]), 6.8)
        service.check_room(0.0)
        tasks = []
        for count in (1, 2):
            tasks.append(start(tenant.predict(None, rows(1), stream="s")))
            await bench.waiting(count)
        service.check_room()
        service.check_room(17.1)
        with pytest.raises(QueueFull, match=r"2 requests wait.*about 13\.6 s; this one may wait 13\.5 s") as refused:
            service.check_room(13.5)
        assert refused.value.retry_after == 3
        with pytest.raises(QueueFull, match=r"may wait 1 s"):
            await tenant.predict(None, rows(1), stream="s", number=7, timeout=1.0)
        tasks.append(start(tenant.predict(None, rows(1), stream="s")))
        await bench.waiting(3)
        with pytest.raises(QueueFull, match=r"limits\.queue = 3"):
            service.check_room()
        gate.open()
        await asyncio.gather(*tasks)
        await bench.settled()
        service.check_room(0.0)


# Any order of operations

TENANTS, IDS = ("one", "other"), "ab"
Operation = tuple[str, str, str, int]
KINDS = (
    *("open", "open", "replace", "predict", "predict", "predict", "number", "number", "source", "late"),
    *("reset", "close", "adapt", "settings", "policy", "unload", "load", "other weights", "broken"),
    *("cancel", "cancel", "turn", "turn", "settle", "settle"),
)
OPERATIONS = st.lists(
    st.tuples(st.sampled_from(KINDS), st.sampled_from(TENANTS), st.sampled_from(IDS), st.integers(0, 50)),
    min_size=60,
    max_size=120,
)
OTHER_WEIGHTS, BROKEN = 8, -1


def put_weights(folder: Path, seed: int) -> None:
    """Replaces the weights file, whole, as whoever reads it needs it."""
    (folder / "next").mkdir(exist_ok=True)
    if seed == BROKEN:
        (folder / "next" / f"{MODEL}.safetensors").write_bytes(b"these are no weights")
    else:
        write_weights(folder / "next", seed)
    os.replace(folder / "next" / f"{MODEL}.safetensors", folder / f"{MODEL}.safetensors")


class Hands:
    """Does to a service whatever a list of operations says, and keeps the tasks."""

    def __init__(self, bench: Bench, folder: Path) -> None:
        self.bench, self.folder, self.tasks = bench, folder, list[asyncio.Task[Any]]()

    def spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        self.tasks.append(start(work))

    async def do(self, kind: str, name: str, id: str, number: int) -> None:
        tenant, x = self.bench.service.tenant(name), rows(1 + number % 4, number)
        match kind:
            case "open" | "replace":
                with suppress(TtaError):
                    policy = (None, "tent", "norm", "t3a")[number % 4]
                    tenant.open(id, policy=policy, replace=kind == "replace", adapt=number % 5 > 0)
            case "predict":
                self.spawn(
                    tenant.predict(None, x, stream=id, priority=number % 4, adapt=(None, None, False)[number % 3])
                )
            case "number":
                self.spawn(tenant.predict(None, x, stream=id, number=number // 10))
            case "source":
                self.spawn(tenant.predict(MODEL, x))
            case "late":
                self.spawn(tenant.predict(None, x, stream=id, timeout=(1e-6, 1e-3)[number % 2]))
            case "reset":
                self.spawn(tenant.reset(id))
            case "close":
                self.spawn(tenant.close(id))
            case "adapt":
                self.spawn(tenant.update(id, adapt=bool(number % 2)))
            case "settings":
                self.spawn(tenant.update(id, settings={"window": number % 3}))
            case "policy":
                self.spawn(
                    tenant.update(id, policy=("tent", "norm", "t3a")[number % 3], settings={"reset_after": number})
                )
            case "unload":
                self.spawn(self.bench.service.models.unload(MODEL))
            case "load" | "other weights" | "broken":
                put_weights(self.folder, {"load": 7, "other weights": OTHER_WEIGHTS, "broken": BROKEN}[kind])
                self.spawn(self.bench.service.models.load(MODEL))
                if number % 3:
                    await asyncio.wait(self.tasks[-1:])
            case "cancel" if self.tasks:
                self.tasks[-1 - number % min(8, len(self.tasks))].cancel()
            case "turn":
                await asyncio.sleep(0)
            case "settle":
                await self.bench.settled()


@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(operations=OPERATIONS)
async def test_any_order_of_operations_leaves_nothing_behind(
    loaded: Loaded, folder: Path, operations: list[Operation]
) -> None:
    """Two tenants, one model that comes, goes and changes, clients that leave: nothing leaks, nobody is stuck."""
    put_weights(folder, 7)
    limits = {"slots": 3, "queue": 20, "queue_per_stream": 4, "streams": 5}
    auth = {"tenants": {"one": {"streams": 2, "state_bytes": 10_000}}}
    async with serving(loaded, limits=limits, auth=auth) as bench:
        lost, hands = lost_exceptions(), Hands(bench, folder)
        for name in TENANTS:
            bench.service.tenant(name).open("a")
        for operation in operations:
            await hands.do(*operation)
        async with asyncio.timeout(TIMEOUT):
            outcomes = await asyncio.gather(*hands.tasks, return_exceptions=True)
        assert unexpected(outcomes) == []
        # Changes of the model go on without their client; the next one waits for them.
        put_weights(folder, 7)
        await bench.service.models.load(MODEL)
        await bench.settled()
        bench.check_nothing_left()
        assert bench.device.engine.models == bench.service.models.loaded()
        for name in TENANTS:
            tenant = bench.service.tenant(name)
            for stream in list(tenant.streams()):
                jobs = [job for step in bench.device.recorder.steps for job in step.jobs if job.stream is stream]
                assert stream.requests == len(jobs)
                assert stream.version <= [job.result for job in jobs].count("applied")
                await check_reset_is_a_new_stream(bench, name, stream)
                await tenant.close(stream.id)
        assert bench.device.store.counts() == {"device": (0, 0), "host": (0, 0), "disk": (0, 0)}
        assert bench.device.engine.monitor._rows == {}
        del outcomes
        hands.tasks.clear()
        gc.collect()
        assert lost == []


async def check_reset_is_a_new_stream(bench: Bench, tenant: str, stream: Stream) -> None:
    """Whatever a stream has been through, after a reset its answers are those of a new one."""
    await bench.service.tenant(tenant).reset(stream.id)
    assert stream.version == 0
    lane = Lane(MODEL, stream.policy, bench.service.models.get(MODEL).digest)
    assert stream.lane == lane
    fresh, answers = Stream(stream.id, MODEL, stream.policy, stream.random_key, 0.0, lane.digest), []
    for seed in range(2):
        own = (await bench.service.tenant(tenant).predict(None, rows(3, seed), stream=stream.id, adapt=True))[0].logits
        answers.append((own, await plain_answer(bench, fresh, rows(3, seed))))
    bench.device.engine.drop(lane, fresh)
    assert all(torch.equal(own, other) for own, other in answers)


async def plain_answer(bench: Bench, stream: Stream, x: torch.Tensor) -> torch.Tensor:
    """The scores of a stream that no tenant has."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[torch.Tensor] = loop.create_future()

    def done(answer: Any, error: Exception | None) -> None:
        assert error is None, error
        loop.call_soon_threadsafe(future.set_result, answer.logits)

    bench.device.runner.submit(Job(stream, done, stream.lane, x))
    result = await future
    await bench.settled()
    return result
