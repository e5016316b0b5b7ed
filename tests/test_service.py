"""The async facade over a real runner: request numbers, cancellation, the adapt toggle, limits, and no leaks."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import random
import weakref
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from adapters.base import State
from adapters.tent import Tent
from tests.serving import LR, MODEL, TIMEOUT, Device, Gate, hold, load, make_device, rows, same_state, varied
from tta_server.engine.engine import AnswerJob
from tta_server.engine.source import SourceModel
from tta_server.errors import (
    BadInput,
    Conflict,
    DeadlineExceeded,
    QueueFull,
    StepFailed,
    TtaError,
    Unavailable,
    UnknownName,
)
from tta_server.service import Service
from tta_server.settings import Settings
from tta_server.types import Answer, Job, Lane, Plan, StepStats, Stream

pytestmark = pytest.mark.anyio

Loaded = tuple[Settings, dict[str, SourceModel]]
Reply = tuple[Answer, bool]


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """The tiny model."""
    return load(tmp_path_factory.mktemp("tiny"))


class Impatient(Service):
    """Gives up on a request that hangs, so that the test fails and the next one runs."""

    async def predict(self, *arguments: Any, **named: Any) -> Reply:
        async with asyncio.timeout(TIMEOUT):
            return await super().predict(*arguments, **named)


@dataclass(frozen=True)
class Bench:
    """A service over a running device."""

    service: Service
    device: Device

    async def settled(self) -> None:
        """Returns when the device has nothing left to do and the loop knows about it."""
        async with asyncio.timeout(TIMEOUT):
            while not self.device.scheduler.idle:
                await asyncio.sleep(0)
        await asyncio.sleep(0)

    def state(self, stream: Stream) -> State:
        """A copy of the stream's state. For when the device is idle."""
        return self.device.state(Lane(stream.model, stream.policy), stream)


@asynccontextmanager
async def serving(loaded: Loaded, **sections: dict[str, Any]) -> AsyncIterator[Bench]:
    """A running service with some settings replaced; afterwards nothing of it may be left over."""
    settings, models = loaded
    settings = varied(settings, **sections)
    device = make_device(settings, models)
    service = Impatient(settings, models, device.runner)
    device.runner.start()
    yield Bench(service, device)
    assert await service.drain() == 0
    await asyncio.sleep(0)  # the thread's last callbacks
    assert_nothing_left(service, device)
    assert [task for task in asyncio.all_tasks() if "TestRunner" not in repr(task)] == []


@pytest.fixture
async def bench(loaded: Loaded) -> AsyncIterator[Bench]:
    async with serving(loaded) as made:
        yield made


def assert_nothing_left(service: Service, device: Device) -> None:
    """No request, timer, lease or misplaced slot."""
    assert device.scheduler.idle
    assert device.runner.waiting == 0
    assert [one.flights for one in service._streams.values() if one.flights] == []
    timers = getattr(asyncio.get_running_loop(), "_scheduled")  # noqa: B009 - the loop's own list, not in its types
    assert [timer for timer in timers if not timer.cancelled() and "Service" in repr(timer)] == []
    device.store.check_integrity()
    for states in device.store._lanes.values():
        assert not states.leased
        assert states.resident.keys() | states.host.keys() <= set(service.streams())


def start(work: Coroutine[Any, Any, Reply]) -> asyncio.Task[Reply]:
    """The request as a task."""
    return asyncio.get_running_loop().create_task(work)


async def waiting(bench: Bench, count: int) -> None:
    """Returns when so many requests are in the queue, however many turns of the loop that takes."""
    async with asyncio.timeout(TIMEOUT):
        while bench.device.runner.waiting != count:
            await asyncio.sleep(0)


def admits(bench: Bench) -> bool:
    """Whether the runner still takes work; if so, it got some that does nothing."""
    try:
        bench.device.runner.submit(Job(Stream("probe", MODEL, Tent(), 0, 0.0), lambda *_: None, command=lambda: None))
    except Unavailable:
        return False
    return True


def gated_engine(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Gate:
    """Stops the engine inside of its next steps."""
    gate, real = Gate(), bench.device.engine.step

    def step(plan: Plan, answer: AnswerJob) -> StepStats:
        gate.pass_through()
        return real(plan, answer)

    monkeypatch.setattr(bench.device.engine, "step", step)
    return gate


async def scores(work: Coroutine[Any, Any, Reply]) -> Tensor:
    return (await work)[0].logits


# Predictions


async def test_versions_grow_and_the_first_answer_is_the_one_before_any_step(bench: Bench) -> None:
    stream, created = bench.service.open("s")
    assert created
    answers = [(await bench.service.predict(None, rows(4, seed), stream="s"))[0] for seed in range(3)]
    await bench.settled()
    assert [answer.version for answer in answers] == [0, 1, 2]
    assert stream.version == stream.requests == 3
    assert stream.last_seen >= stream.created
    assert bench.device.recorder.results() == ["applied"] * 3


async def test_without_a_stream_the_source_answers_and_nothing_is_kept(bench: Bench) -> None:
    first, replayed = await bench.service.predict(MODEL, rows(4))
    again, _ = await bench.service.predict(None, rows(4))
    assert torch.equal(first.logits, again.logits)
    assert (first.adapted, first.policy, first.version, replayed) == (False, "source", 0, False)
    assert bench.service.streams() == []
    assert bench.device.store.counts() == {"device": (0, 0), "host": (0, 0)}
    with pytest.raises(BadInput, match="request number needs a stream"):
        await bench.service.predict(None, rows(4), number=1)


async def test_unknown_names(bench: Bench) -> None:
    with pytest.raises(UnknownName, match=r"no model 'huge'; there are: tiny"):
        await bench.service.predict("huge", rows(1))
    with pytest.raises(UnknownName, match="no stream 'nobody'"):
        await bench.service.predict(None, rows(1), stream="nobody")
    for work in (bench.service.reset("nobody"), bench.service.close("nobody")):
        with pytest.raises(UnknownName, match="no stream 'nobody'"):
            await work


@pytest.mark.parametrize(
    ("x", "said"),
    [
        (rows(3).index_fill(0, torch.tensor(1), float("nan")), "row 1 holds NaN"),
        (rows(3).index_fill(0, torch.tensor(2), float("inf")), "row 2 holds NaN or infinity"),
        (rows(3).index_fill(0, torch.tensor(0), -float("inf")), "row 0 holds"),
        (rows(2) + 0.5, r"inputs must lie in \[0, 1\].*to 1\.2"),
        (rows(2) - 0.5, r"inputs must lie in \[0, 1\].*from -0\."),
        (rows(2) * 255, r"inputs must lie in \[0, 1\]"),
        (rows(2)[:, :2], r"\[rows, 3, 8, 8\], got \[2, 2, 8, 8\]"),
        (rows(2)[0], r"\[rows, 3, 8, 8\], got \[3, 8, 8\]"),
        (torch.tensor(0.5), r"\[rows, 3, 8, 8\], got \[\]"),
        (rows(2)[:0], r"1 to 1024 rows \(limits.rows_per_request\), got 0"),
        (torch.zeros(1025, 3, 8, 8), r"1 to 1024 rows \(limits.rows_per_request\), got 1025"),
    ],
    ids=["nan", "inf", "-inf", "high", "low", "bytes", "channels", "one row", "scalar", "none", "many"],
)
async def test_inputs_that_do_not_fit_are_refused_before_anything_happens(bench: Bench, x: Tensor, said: str) -> None:
    stream, _ = bench.service.open("s")
    await bench.service.predict(None, rows(4), stream="s")
    await bench.settled()
    before = bench.state(stream)
    with pytest.raises(BadInput, match=said):
        await bench.service.predict(None, x, stream="s", number=1)
    await bench.settled()
    assert (stream.version, stream.requests) == (1, 1)
    assert same_state(bench.state(stream), before)
    assert (await bench.service.predict(None, rows(4), stream="s", number=1))[1] is False, "the number is still free"


async def test_the_ends_of_the_value_range_are_in_it(bench: Bench) -> None:
    answer, _ = await bench.service.predict(None, torch.cat([torch.zeros(1, 3, 8, 8), torch.ones(1, 3, 8, 8)]))
    assert answer.logits.isfinite().all()


async def test_a_step_that_fails_is_told_and_can_be_tried_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    stream, _ = bench.service.open("s")

    def broken(plan: Plan, answer: AnswerJob) -> StepStats:
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(bench.device.engine, "step", broken)
        with pytest.raises(StepFailed, match="ZeroDivisionError"):
            await bench.service.predict(None, rows(2), stream="s", number=5)
    _, replayed = await bench.service.predict(None, rows(2), stream="s", number=5)
    await bench.settled()
    assert not replayed
    assert stream.version == 1


# Request numbers


async def test_a_repeated_number_gets_the_stored_answer(bench: Bench) -> None:
    stream, _ = bench.service.open("s")
    first, replayed = await bench.service.predict(None, rows(4), stream="s", number=7)
    assert not replayed
    again, replayed = await bench.service.predict(None, rows(4), stream="s", number=7)
    assert replayed
    assert (again.version, again.policy) == (first.version, first.policy)
    assert torch.equal(again.logits, first.logits)
    await bench.settled()
    assert (stream.version, stream.requests) == (1, 1)


async def test_a_number_repeated_while_the_first_is_under_way_shares_its_answer(bench: Bench) -> None:
    stream, _ = bench.service.open("s")
    gate = await asyncio.to_thread(hold, bench.device.runner)
    tasks = [start(bench.service.predict(None, rows(4), stream="s", number=3)) for _ in range(3)]
    await waiting(bench, 1)
    gate.open()
    replies = await asyncio.gather(*tasks)
    assert [replayed for _, replayed in replies] == [False, True, True]
    assert all(answer is replies[0][0] for answer, _ in replies)
    await bench.settled()
    assert (stream.version, stream.requests) == (1, 1)


async def test_numbers_only_grow(bench: Bench) -> None:
    stream, _ = bench.service.open("s")
    await bench.service.predict(None, rows(4), stream="s", number=5)
    with pytest.raises(Conflict, match="request number 4 of stream 's' is out of order: 5 came before"):
        await bench.service.predict(None, rows(4), stream="s", number=4)
    await bench.service.predict(None, rows(4), stream="s", number=9)
    with pytest.raises(Conflict, match="9 came before"):
        await bench.service.predict(None, rows(4), stream="s", number=5)
    await bench.service.predict(None, rows(4), stream="s")  # without a number: beside the count
    assert (await bench.service.predict(None, rows(4), stream="s", number=9))[1]
    await bench.settled()
    assert stream.version == 3


async def test_a_number_that_is_older_than_one_under_way_is_out_of_order(bench: Bench) -> None:
    bench.service.open("s")
    gate = await asyncio.to_thread(hold, bench.device.runner)
    task = start(bench.service.predict(None, rows(4), stream="s", number=2))
    await waiting(bench, 1)
    with pytest.raises(Conflict, match="2 came before"):
        await bench.service.predict(None, rows(4), stream="s", number=1)
    gate.open()
    await task


async def test_numbers_of_several_requests_under_way_keep_their_order(bench: Bench) -> None:
    bench.service.open("s")
    gate = await asyncio.to_thread(hold, bench.device.runner)
    tasks = [start(bench.service.predict(None, rows(4), stream="s", number=number)) for number in range(4)]
    await waiting(bench, 4)
    gate.open()
    assert [answer.version for answer, _ in await asyncio.gather(*tasks)] == [0, 1, 2, 3]


async def test_a_reset_keeps_the_numbers(bench: Bench) -> None:
    stream, _ = bench.service.open("s")
    await bench.service.predict(None, rows(4), stream="s", number=5)
    assert (await bench.service.reset("s")).version == 0
    with pytest.raises(Conflict):
        await bench.service.predict(None, rows(4), stream="s", number=4)
    assert (await bench.service.predict(None, rows(4), stream="s", number=5))[1], "a retry never adapts twice"
    await bench.settled()
    assert stream.version == 0


async def test_a_stream_opened_again_starts_counting_again(bench: Bench) -> None:
    bench.service.open("s")
    await bench.service.predict(None, rows(4), stream="s", number=5)
    await bench.service.close("s")
    bench.service.open("s")
    answer, replayed = await bench.service.predict(None, rows(4), stream="s", number=1)
    assert (answer.version, replayed) == (0, False)


# Cancellation and time


async def test_a_request_given_up_in_the_queue_is_dropped(bench: Bench) -> None:
    stream, _ = bench.service.open("s")
    gate = await asyncio.to_thread(hold, bench.device.runner)
    task = start(bench.service.predict(None, rows(4), stream="s", number=1))
    await waiting(bench, 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert bench.device.runner.waiting == 0
    gate.open()
    await bench.settled()
    assert (stream.version, stream.requests) == (0, 0)
    assert bench.device.recorder.steps == []
    _, replayed = await bench.service.predict(None, rows(4), stream="s", number=1)
    assert not replayed, "the retry is a first try"
    await bench.settled()
    assert stream.version == 1


async def test_one_of_two_who_wait_can_leave(bench: Bench) -> None:
    stream, _ = bench.service.open("s")
    gate = await asyncio.to_thread(hold, bench.device.runner)
    first, second = (start(bench.service.predict(None, rows(4), stream="s", number=1)) for _ in range(2))
    await waiting(bench, 1)
    await asyncio.sleep(0)  # the second has joined the first
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert bench.device.runner.waiting == 1
    gate.open()
    answer, replayed = await second
    assert (answer.version, replayed) == (0, True)
    await bench.settled()
    assert stream.version == 1


async def test_a_request_given_up_while_it_runs_is_finished_and_its_answer_kept(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream, _ = bench.service.open("s")
    gate = gated_engine(bench, monkeypatch)
    task = start(bench.service.predict(None, rows(4), stream="s", number=1))
    await gate.reached_soon()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    retry = start(bench.service.predict(None, rows(4), stream="s", number=1))  # while the first still runs
    await asyncio.sleep(0)
    gate.open()
    answer, replayed = await retry
    assert (answer.version, replayed) == (0, True)
    await bench.settled()
    assert (stream.version, stream.requests) == (1, 1), "committed once"
    stored, replayed = await bench.service.predict(None, rows(4), stream="s", number=1)
    assert replayed
    assert torch.equal(stored.logits, answer.logits)


async def test_a_large_answer_is_not_kept_and_its_repeat_refused(bench: Bench) -> None:
    """It cannot adapt twice, but what is kept for repeats is bounded."""
    stream, _ = bench.service.open("s")
    bench.service.settings = bench.service.settings.model_copy(
        update={"limits": bench.service.settings.limits.model_copy(update={"stored_answer_bytes": 4 * 5 * 3})}
    )
    await bench.service.predict(None, rows(3), stream="s", number=1)
    assert (await bench.service.predict(None, rows(3), stream="s", number=1))[1]
    await bench.service.predict(None, rows(4), stream="s", number=2)
    with pytest.raises(Conflict, match=r"limits\.stored_answer_bytes"):
        await bench.service.predict(None, rows(4), stream="s", number=2)
    await bench.settled()
    assert stream.version == 2


async def test_the_inputs_of_a_request_go_with_it(bench: Bench) -> None:
    """By reference counting: under load, what waits for the garbage collector is memory."""
    bench.service.open("s")
    gc.collect()
    gc.disable()
    try:
        x = rows(4)
        alive = weakref.ref(x)
        await bench.service.predict(None, x, stream="s", number=1)
        await bench.settled()
        del x
        await bench.service.predict(None, rows(4), stream="s", number=2)  # the device thread holds its last plan
        await bench.settled()
        assert alive() is None
    finally:
        gc.enable()


async def test_an_end_does_not_close_what_came_after(bench: Bench) -> None:
    old, _ = bench.service.open("s")
    new, _ = bench.service.open("s", replace=True)
    await bench.service.close("s", only=old)
    assert bench.service.stream("s") is new
    await bench.service.close("s", only=new)
    assert not bench.service.is_open("s")


async def test_an_error_nobody_waits_for_is_not_reported_as_lost(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.service.open("s")
    gate = Gate()

    def broken(plan: Plan, answer: AnswerJob) -> StepStats:
        gate.pass_through()
        raise ZeroDivisionError

    monkeypatch.setattr(bench.device.engine, "step", broken)
    lost = _lost_exceptions()
    task = start(bench.service.predict(None, rows(4), stream="s", number=1))
    await gate.reached_soon()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    gate.open()
    await bench.settled()
    del task
    gc.collect()
    assert lost == []


def _lost_exceptions() -> list[dict[str, Any]]:
    """A list that fills with whatever the event loop complains about."""
    lost: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: lost.append(context))
    return lost


async def test_time_runs_out_in_the_queue(bench: Bench) -> None:
    stream, _ = bench.service.open("s")
    gate = await asyncio.to_thread(hold, bench.device.runner)
    with pytest.raises(DeadlineExceeded, match=r"waited 0\.001 s"):
        await bench.service.predict(None, rows(4), stream="s", number=1, timeout=0.001)
    assert bench.device.runner.waiting == 0
    gate.open()
    await bench.settled()
    assert (stream.version, stream.requests) == (0, 0)
    assert not (await bench.service.predict(None, rows(4), stream="s", number=1))[1]


async def test_a_request_can_shorten_the_wait_but_not_extend_it(loaded: Loaded) -> None:
    async with serving(loaded, limits={"queue_seconds": 0.001}) as bench:
        bench.service.open("s")
        gate = await asyncio.to_thread(hold, bench.device.runner)
        with pytest.raises(DeadlineExceeded):
            await bench.service.predict(None, rows(4), stream="s", timeout=1000.0)
        gate.open()


# Switching adaptation off and on


async def test_adaptation_off_serves_the_source_and_lets_the_state_rest(bench: Bench) -> None:
    service = bench.service
    stream, _ = service.open("s")
    twin, _ = service.open("twin")
    for seed in range(3):
        for id in ("s", "twin"):
            await service.predict(None, rows(4, seed), stream=id)
    await bench.settled()
    before = bench.state(stream)
    assert service.open("s", adapt=False) == (stream, False)
    off, _ = await service.predict(None, rows(4, 9), stream="s")
    assert torch.equal(off.logits, await scores(service.predict(None, rows(4, 9))))
    assert (off.adapted, off.policy, off.version) == (False, "source", 3)
    await bench.settled()
    assert (stream.version, stream.requests) == (3, 4)
    assert same_state(bench.state(stream), before)
    service.open("s", adapt=True)
    on, _ = await service.predict(None, rows(4, 10), stream="s")
    assert (on.adapted, on.version) == (True, 3)
    assert torch.equal(on.logits, await scores(service.predict(None, rows(4, 10), stream="twin")))
    assert not torch.equal(on.logits, await scores(service.predict(None, rows(4, 10))))
    await bench.settled()
    assert stream.version == twin.version == 4


@pytest.mark.parametrize("toggle", [True, False])
async def test_one_request_can_differ_from_the_toggle(bench: Bench, toggle: bool) -> None:
    stream, _ = bench.service.open("s", adapt=toggle)
    answer, _ = await bench.service.predict(None, rows(4), stream="s", adapt=not toggle)
    assert answer.adapted is not toggle
    assert stream.adapt is toggle
    assert (await bench.service.predict(None, rows(4), stream="s"))[0].adapted is toggle
    await bench.settled()
    assert stream.version == 1


async def test_a_reset_is_a_new_stream(bench: Bench) -> None:
    stream, _ = bench.service.open("s")
    first = [await scores(bench.service.predict(None, rows(4, seed), stream="s")) for seed in range(3)]
    assert bench.service.signals(stream)
    assert bench.service.tier(stream) == "device"
    assert await bench.service.reset("s") is stream
    assert (stream.version, bench.service.signals(stream), bench.service.tier(stream)) == (0, {}, "none")
    again = [await scores(bench.service.predict(None, rows(4, seed), stream="s")) for seed in range(3)]
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


async def test_a_reset_waits_for_the_requests_before_it(bench: Bench) -> None:
    bench.service.open("s")
    gate = await asyncio.to_thread(hold, bench.device.runner)
    before = start(bench.service.predict(None, rows(4), stream="s"))
    await waiting(bench, 1)
    reset = asyncio.get_running_loop().create_task(bench.service.reset("s"))
    await waiting(bench, 2)
    after = start(bench.service.predict(None, rows(4), stream="s"))
    await waiting(bench, 3)
    assert not reset.done()
    gate.open()
    assert [(await one)[0].version for one in (before, after)] == [0, 0]
    await reset


# Opening and closing


async def test_opening_fills_in_what_is_left_out(bench: Bench) -> None:
    stream, created = bench.service.open("s")
    assert created
    assert (stream.model, stream.policy, stream.adapt) == (MODEL, Tent(lr=LR), True)
    assert bench.service.open("t", settings={"optimiser": "sgd"})[0].policy == Tent(lr=LR, optimiser="sgd")
    assert bench.service.open("u", MODEL, "source", {}, False)[0].adapt is False
    assert [one.id for one in bench.service.streams()] == ["s", "t", "u"]
    assert bench.service.stream("s") is stream


@pytest.mark.parametrize(
    "same",
    [
        {},
        {"model": MODEL},
        {"policy": "tent"},
        {"settings": {"lr": 0.5}},
        {"model": MODEL, "policy": "tent", "settings": {"lr": 0.5, "optimiser": "adam"}},
    ],
    ids=str,
)
async def test_opening_again_the_same_way_confirms(bench: Bench, same: dict[str, Any]) -> None:
    stream, _ = bench.service.open("s", policy="tent", settings={"lr": 0.5}, adapt=False)
    assert bench.service.open("s", **same) == (stream, False)
    assert stream.adapt is False, "what is left out stays"


@pytest.mark.parametrize(
    ("other", "kind", "said"),
    [
        ({"policy": "norm"}, Conflict, "runs policy 'tent'.*asked for was 'norm'"),
        ({"settings": {}}, Conflict, "asked for was 'tent'"),
        ({"settings": {"lr": 0.25}}, Conflict, "'lr': 0.25"),
        ({"policy": "tent", "settings": {"optimiser": "sgd", "lr": 0.5}}, Conflict, "'optimiser': 'sgd'"),
        ({"model": "huge"}, UnknownName, "no model 'huge'"),
        ({"policy": "magic"}, UnknownName, "no policy 'magic'"),
        ({"settings": {"learning_rate": 1}}, BadInput, "learning_rate"),
        ({"settings": {"lr": -1}}, BadInput, r"lr must lie in \[0, inf\), got -1"),
    ],
    ids=str,
)
async def test_opening_again_otherwise_is_refused(
    bench: Bench, other: dict[str, Any], kind: type[Exception], said: str
) -> None:
    stream, _ = bench.service.open("s", settings={"lr": 0.5})
    with pytest.raises(kind, match=said):
        bench.service.open("s", **other, adapt=False)
    assert stream.adapt, "a refused request changes nothing"
    assert stream.policy == Tent(lr=0.5)


@pytest.mark.parametrize("id", ["", "a b", "a/b", "ä", "x" * 129, "a\n", "$"])
async def test_ids_of_other_characters_are_refused(bench: Bench, id: str) -> None:
    with pytest.raises(BadInput, match="1 to 128 of"):
        bench.service.open(id)
    assert bench.service.streams() == []


async def test_ids_may_be_long_and_hold_punctuation(bench: Bench) -> None:
    for id in ("x" * 128, "A-z_0.9:1", "0"):
        assert bench.service.open(id)[1]


async def test_closing_frees_the_id_at_once_and_finishes_what_is_under_way(bench: Bench) -> None:
    old, _ = bench.service.open("s")
    await bench.service.predict(None, rows(4), stream="s")
    gate = await asyncio.to_thread(hold, bench.device.runner)
    under_way = start(bench.service.predict(None, rows(4), stream="s", number=1))
    await waiting(bench, 1)
    closing = asyncio.get_running_loop().create_task(bench.service.close("s"))
    await waiting(bench, 2)
    with pytest.raises(UnknownName):
        bench.service.stream("s")
    new, created = bench.service.open("s")
    assert created
    assert new is not old
    fresh = start(bench.service.predict(None, rows(4), stream="s", number=1))
    await waiting(bench, 3)
    assert not closing.done()
    gate.open()
    assert ((await under_way)[0].version, (await fresh)[0].version) == (1, 0)
    assert not (await fresh)[1], "the new stream does not know the old one's numbers"
    await closing
    await bench.settled()
    assert (old.version, new.version) == (2, 1)
    assert bench.service.tier(old) == "none"
    assert bench.service.signals(old) == {}
    assert bench.device.store.counts()["device"][0] == 1
    await bench.service.close("s")
    assert bench.device.store.counts() == {"device": (0, 0), "host": (0, 0)}


# Limits


async def test_the_limit_on_streams(loaded: Loaded) -> None:
    async with serving(loaded, limits={"streams": 2}) as bench:
        bench.service.open("a")
        bench.service.open("b")
        with pytest.raises(QueueFull, match=r"2 streams are open; the limit is limits\.streams = 2"):
            bench.service.open("c")
        assert bench.service.open("b")[1] is False, "confirming needs no room"
        await bench.service.close("a")
        assert bench.service.open("c")[1]


async def test_the_limits_on_the_queue(loaded: Loaded) -> None:
    async with serving(loaded, limits={"queue": 3, "queue_per_stream": 2}) as bench:
        for id in "ab":
            bench.service.open(id)
        gate = await asyncio.to_thread(hold, bench.device.runner)
        tasks = [start(bench.service.predict(None, rows(1), stream="a", number=number)) for number in range(2)]
        await waiting(bench, 2)
        with pytest.raises(QueueFull, match=r"2 requests of stream 'a' wait.*limits\.queue_per_stream = 2"):
            await bench.service.predict(None, rows(1), stream="a", number=2)
        tasks.append(start(bench.service.predict(None, rows(1), stream="b")))
        await waiting(bench, 3)
        with pytest.raises(QueueFull, match=r"3 requests wait already; the limit is limits\.queue = 3"):
            await bench.service.predict(None, rows(1), stream="b", number=0)
        gate.open()
        await asyncio.gather(*tasks)
        for id, number in (("a", 2), ("b", 0)):
            assert not (await bench.service.predict(None, rows(1), stream=id, number=number))[1]


async def test_the_limit_on_rows(loaded: Loaded) -> None:
    async with serving(loaded, limits={"rows_per_request": 2}) as bench:
        await bench.service.predict(None, rows(2))
        with pytest.raises(BadInput, match=r"1 to 2 rows \(limits\.rows_per_request\), got 3"):
            await bench.service.predict(None, rows(3))


async def test_draining_refuses_new_work_and_finishes_the_old(loaded: Loaded) -> None:
    async with serving(loaded) as bench:
        stream, _ = bench.service.open("s")
        gate = await asyncio.to_thread(hold, bench.device.runner)
        task = start(bench.service.predict(None, rows(2), stream="s"))
        await waiting(bench, 1)
        drain = asyncio.get_running_loop().create_task(bench.service.drain())
        async with asyncio.timeout(TIMEOUT):
            while not bench.service.draining or admits(bench):
                await asyncio.sleep(0)
        with pytest.raises(Unavailable, match="shutting down"):
            await bench.service.predict(None, rows(2), stream="s", number=1)
        gate.open()
        assert (await task)[0].version == 0
        assert await drain == 0
        assert stream.version == 1


async def test_what_a_drain_gives_up_is_told_without_a_complaint_of_the_loop(loaded: Loaded) -> None:
    """A stream that was replaced is forgotten by a command that nobody waits for."""
    settings, models = loaded
    device = make_device(settings, models)
    service = Service(varied(settings, limits={"drain_seconds": 0.001}), models, device.runner)
    device.runner.start()
    lost = _lost_exceptions()
    service.open("s")
    gate = await asyncio.to_thread(hold, device.runner)
    task = start(service.predict(None, rows(2), stream="s"))
    async with asyncio.timeout(TIMEOUT):
        while device.runner.waiting != 1:
            await asyncio.sleep(0)
    service.open("s", replace=True)
    drain = asyncio.get_running_loop().create_task(service.drain())
    with pytest.raises(Unavailable, match="shut down before"):
        await task
    gate.open()
    assert await drain == 2
    del task, drain
    await asyncio.sleep(0)
    gc.collect()
    assert lost == []


async def test_levels_are_read_from_what_is_there(bench: Bench) -> None:
    bench.service.open("a")
    bench.service.open("b", adapt=False)
    bench.service.open("c", policy="norm")
    gate = await asyncio.to_thread(hold, bench.device.runner)
    task = start(bench.service.predict(None, rows(2), stream="a"))
    await waiting(bench, 1)
    levels = bench.service.levels()
    assert levels.waiting == 1
    assert levels.streams == {(MODEL, "tent", True): 1, (MODEL, "tent", False): 1, (MODEL, "norm", True): 1}
    assert levels.states["device"] == (0, 0)
    gate.open()
    await task
    await bench.settled()
    count, size = bench.service.levels().states["device"]
    assert count == 1
    assert size > 4 * 28, "28 adaptable values and an optimiser's moments"
    assert list(bench.service.levels().digests) == [MODEL]


# No leaks


@pytest.mark.parametrize("seed", range(3))
async def test_after_two_hundred_random_operations_nothing_is_left(loaded: Loaded, seed: int) -> None:
    chosen = random.Random(seed)
    limits = {"slots": 3, "queue": 40, "queue_per_stream": 6, "streams": 5}
    async with serving(loaded, limits=limits) as bench:
        service, lost = bench.service, _lost_exceptions()
        ids, counts = "abcdefg", dict.fromkeys("abcdefg", 0)
        tasks: list[asyncio.Task[Any]] = []

        def spawn(work: Coroutine[Any, Any, Any]) -> None:
            tasks.append(asyncio.get_running_loop().create_task(work))

        def request(id: str) -> None:
            counts[id] += chosen.choice([0, 0, 1, 1, 1, -1])
            x = rows(chosen.randint(1, 6), chosen.randrange(100))
            if chosen.random() < 0.1:
                x[-1] = float("nan")
            spawn(
                service.predict(
                    None,
                    x,
                    stream=id if chosen.random() < 0.9 else None,
                    number=chosen.choice([None, max(counts[id], 0)]),
                    adapt=chosen.choice([None, None, None, False, True]),
                    timeout=chosen.choice([None, None, None, 1e-6, 1e-3]),
                )
            )

        for _ in range(200):
            id, kind = chosen.choice(ids), chosen.random()
            if kind < 0.2:
                with suppress(Conflict, QueueFull):
                    service.open(id, policy=chosen.choice([None, "tent", "norm"]), adapt=chosen.choice([None, False]))
            elif kind < 0.75:
                request(id)
            elif kind < 0.8:
                spawn(service.reset(id))
            elif kind < 0.85:
                spawn(service.close(id))
            elif tasks:
                chosen.choice(tasks).cancel()
            if chosen.random() < 0.5:
                await asyncio.sleep(0)
            if chosen.random() < 0.05:
                await bench.settled()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        strange = [one for one in outcomes if isinstance(one, Exception) and not isinstance(one, TtaError)]
        assert strange == []
        assert any(isinstance(one, tuple) for one in outcomes), "some were answered"
        await bench.settled()
        assert_nothing_left(service, bench.device)
        for stream in service.streams():
            jobs = [job for step in bench.device.recorder.steps for job in step.jobs if job.stream is stream]
            assert stream.requests == len(jobs)
            assert stream.version <= [job.result for job in jobs].count("applied")
            await service.close(stream.id)
        assert bench.device.store.counts() == {"device": (0, 0), "host": (0, 0)}
        assert bench.device.engine.monitor._averages == {}
        del outcomes, strange
        tasks.clear()
        gc.collect()
        assert lost == []


async def test_settings_of_a_policy_whose_step_fails_are_refused_too(bench: Bench) -> None:
    """What a trial at the start found to lie with the model does not go away with other settings."""
    reports = {"tent": {"name": "tent", "runs": False, "reason": "its step fails: RuntimeError: no gradient"}}
    (name, model), *_ = bench.service.models.items()
    bench.service.models = {name: dataclasses.replace(model, reports=reports)}
    for settings in (None, {}, {"lr": 0.5}):
        with pytest.raises(Conflict, match="no gradient"):
            bench.service.open("s", policy="tent", settings=settings)
    assert not bench.service.is_open("s")


async def test_a_drain_happens_once(bench: Bench) -> None:
    """Whoever asks again gets the first one's outcome."""
    bench.service.open("s")
    await bench.service.predict(None, rows(2), stream="s")
    assert tuple(await asyncio.gather(bench.service.drain(), bench.service.drain())) == (0, 0)


@pytest.mark.parametrize(
    ("policy", "settings", "said"),
    [
        ("tent", {"window": 5000}, r"window must lie in \[0, 4096\], got 5000"),
        ("rotta", {"capacity": 10**9}, r"capacity must lie in \[1, 4096\]"),
        ("t3a", {"filter_k": 10**9}, r"filter_k must lie in \[1, 1000\]"),
        ("cotta", {"augmentations": 10**7}, r"augmentations must lie in \[1, 64\]"),
    ],
)
async def test_settings_that_would_take_all_of_the_machine(
    bench: Bench, policy: str, settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(BadInput, match=said):
        bench.service.open("s", policy=policy, settings=settings)


async def test_a_state_over_the_limit_is_refused(loaded: Loaded) -> None:
    """With its size and the limit's name, whether by the preset or by settings of the stream's own."""
    async with serving(loaded, limits={"state_bytes": 4000}) as bench:
        bench.service.open("small", policy="tent")
        with pytest.raises(Conflict, match=r"state would be [\d,]+ bytes, over the limit limits\.state_bytes = 4,000"):
            bench.service.open("large", policy="tent", settings={"window": 64})
        with pytest.raises(Conflict, match=r"limits\.state_bytes"):
            bench.service.open("larger", policy="cotta")
