"""One tenant's streams over a real runner: request numbers, cancellation, changes while requests wait, limits."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from adapters.norm import NormPolicy
from adapters.tent import Tent
from tests.serving import (
    LR,
    MODEL,
    Bench,
    Gate,
    Loaded,
    let_pass,
    load,
    lost_exceptions,
    rows,
    same_state,
    scores,
    serving,
    start,
)
from tta_server.engine.engine import AnswerJob, OpenStep
from tta_server.errors import BadInput, Conflict, DeadlineExceeded, QueueFull, StepFailed, UnknownName
from tta_server.policies import settings_of
from tta_server.tenant import check_input
from tta_server.types import Lane, Plan, Stream

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """The tiny model."""
    return load(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
async def bench(loaded: Loaded) -> AsyncIterator[Bench]:
    async with serving(loaded) as made:
        yield made


def gated_engine(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Gate:
    """Stops the engine inside of its next steps."""
    gate, real = Gate(), bench.device.engine.answer

    def step(plan: Plan, answer: AnswerJob) -> list[OpenStep]:
        gate.pass_through()
        return real(plan, answer)

    monkeypatch.setattr(bench.device.engine, "answer", step)
    return gate


# Inputs


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
        (rows(2)[:0], r"1 to 4 rows \(limits.rows_per_request\), got 0"),
        (torch.zeros(5, 3, 8, 8), r"1 to 4 rows \(limits.rows_per_request\), got 5"),
    ],
    ids=["nan", "inf", "-inf", "high", "low", "bytes", "channels", "one row", "scalar", "none", "many"],
)
async def test_inputs_that_do_not_fit(loaded: Loaded, x: Tensor, said: str) -> None:
    with pytest.raises(BadInput, match=said):
        check_input(loaded[1][MODEL], x, 4)


async def test_the_ends_of_the_value_range_are_in_it(loaded: Loaded) -> None:
    check_input(loaded[1][MODEL], torch.cat([torch.zeros(1, 3, 8, 8), torch.ones(1, 3, 8, 8)]), 2)


# Predictions


async def test_versions_grow_and_the_first_answer_is_the_one_before_any_step(bench: Bench) -> None:
    stream, created = bench.tenant.open("s")
    assert created
    answers = [(await bench.tenant.predict(None, rows(4, seed), stream="s"))[0] for seed in range(3)]
    await bench.settled()
    assert [answer.version for answer in answers] == [0, 1, 2]
    assert stream.version == stream.requests == 3
    assert stream.last_seen >= stream.created
    assert bench.device.recorder.results() == ["applied"] * 3


async def test_without_a_stream_the_source_answers_and_nothing_is_kept(bench: Bench) -> None:
    first, replayed = await bench.tenant.predict(MODEL, rows(4))
    again, _ = await bench.tenant.predict(None, rows(4))
    assert torch.equal(first.logits, again.logits)
    assert (first.adapted, first.policy, first.version, replayed) == (False, "source", 0, False)
    assert list(bench.tenant.streams()) == []
    assert bench.device.store.counts() == {"device": (0, 0), "host": (0, 0), "disk": (0, 0)}
    with pytest.raises(BadInput, match="request number needs a stream"):
        await bench.tenant.predict(None, rows(4), number=1)


async def test_unknown_names(bench: Bench) -> None:
    with pytest.raises(UnknownName, match=r"no model 'huge'; there are: tiny"):
        await bench.tenant.predict("huge", rows(1))
    with pytest.raises(UnknownName, match="no stream 'nobody'"):
        await bench.tenant.predict(None, rows(1), stream="nobody")
    for work in (bench.tenant.reset("nobody"), bench.tenant.close("nobody")):
        with pytest.raises(UnknownName, match="no stream 'nobody'"):
            await work


async def test_a_step_that_fails_is_told_and_can_be_tried_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    stream, _ = bench.tenant.open("s")

    def broken(plan: Plan, answer: AnswerJob) -> list[OpenStep]:
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(bench.device.engine, "answer", broken)
        with pytest.raises(StepFailed, match="ZeroDivisionError"):
            await bench.tenant.predict(None, rows(2), stream="s", number=5)
    _, replayed = await bench.tenant.predict(None, rows(2), stream="s", number=5)
    await bench.settled()
    assert not replayed
    assert stream.version == 1


# Request numbers


async def test_a_repeated_number_gets_the_stored_answer(bench: Bench) -> None:
    stream, _ = bench.tenant.open("s")
    first, replayed = await bench.tenant.predict(None, rows(4), stream="s", number=7)
    assert not replayed
    again, replayed = await bench.tenant.predict(None, rows(4), stream="s", number=7)
    assert replayed
    assert (again.version, again.policy) == (first.version, first.policy)
    assert torch.equal(again.logits, first.logits)
    await bench.settled()
    assert (stream.version, stream.requests) == (1, 1)


async def test_a_number_repeated_while_the_first_is_under_way_shares_its_answer(bench: Bench) -> None:
    stream, _ = bench.tenant.open("s")
    gate = await bench.hold()
    tasks = [start(bench.tenant.predict(None, rows(4), stream="s", number=3)) for _ in range(3)]
    await bench.waiting(1)
    gate.open()
    replies = await asyncio.gather(*tasks)
    assert [replayed for _, replayed in replies] == [False, True, True]
    assert all(answer is replies[0][0] for answer, _ in replies)
    await bench.settled()
    assert (stream.version, stream.requests) == (1, 1)


async def test_numbers_only_grow(bench: Bench) -> None:
    stream, _ = bench.tenant.open("s")
    await bench.tenant.predict(None, rows(4), stream="s", number=5)
    with pytest.raises(Conflict, match="request number 4 of stream 's' is out of order: 5 came before"):
        await bench.tenant.predict(None, rows(4), stream="s", number=4)
    await bench.tenant.predict(None, rows(4), stream="s", number=9)
    with pytest.raises(Conflict, match="9 came before"):
        await bench.tenant.predict(None, rows(4), stream="s", number=5)
    await bench.tenant.predict(None, rows(4), stream="s")  # without a number: beside the count
    assert (await bench.tenant.predict(None, rows(4), stream="s", number=9))[1]
    await bench.settled()
    assert stream.version == 3


async def test_a_number_that_is_older_than_one_under_way_is_out_of_order(bench: Bench) -> None:
    bench.tenant.open("s")
    gate = await bench.hold()
    task = start(bench.tenant.predict(None, rows(4), stream="s", number=2))
    await bench.waiting(1)
    with pytest.raises(Conflict, match="2 came before"):
        await bench.tenant.predict(None, rows(4), stream="s", number=1)
    gate.open()
    await task


async def test_numbers_of_several_requests_under_way_keep_their_order(bench: Bench) -> None:
    bench.tenant.open("s")
    gate = await bench.hold()
    tasks = [start(bench.tenant.predict(None, rows(4), stream="s", number=number)) for number in range(4)]
    await bench.waiting(4)
    gate.open()
    assert [answer.version for answer, _ in await asyncio.gather(*tasks)] == [0, 1, 2, 3]


async def test_a_reset_keeps_the_numbers(bench: Bench) -> None:
    stream, _ = bench.tenant.open("s")
    await bench.tenant.predict(None, rows(4), stream="s", number=5)
    assert (await bench.tenant.reset("s")).version == 0
    with pytest.raises(Conflict):
        await bench.tenant.predict(None, rows(4), stream="s", number=4)
    assert (await bench.tenant.predict(None, rows(4), stream="s", number=5))[1], "a retry never adapts twice"
    await bench.settled()
    assert stream.version == 0


async def test_a_stream_opened_again_starts_counting_again(bench: Bench) -> None:
    bench.tenant.open("s")
    await bench.tenant.predict(None, rows(4), stream="s", number=5)
    await bench.tenant.close("s")
    bench.tenant.open("s")
    answer, replayed = await bench.tenant.predict(None, rows(4), stream="s", number=1)
    assert (answer.version, replayed) == (0, False)


# Cancellation and time


async def test_a_request_given_up_in_the_queue_is_dropped(bench: Bench) -> None:
    stream, _ = bench.tenant.open("s")
    gate = await bench.hold()
    task = start(bench.tenant.predict(None, rows(4), stream="s", number=1))
    await bench.waiting(1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert bench.device.runner.waiting == 0
    gate.open()
    await bench.settled()
    assert (stream.version, stream.requests) == (0, 0)
    assert bench.device.recorder.steps == []
    _, replayed = await bench.tenant.predict(None, rows(4), stream="s", number=1)
    assert not replayed, "the retry is a first try"
    await bench.settled()
    assert stream.version == 1


async def test_one_of_two_who_wait_can_leave(bench: Bench) -> None:
    stream, _ = bench.tenant.open("s")
    gate = await bench.hold()
    first, second = (start(bench.tenant.predict(None, rows(4), stream="s", number=1)) for _ in range(2))
    await bench.waiting(1)
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
    stream, _ = bench.tenant.open("s")
    gate = gated_engine(bench, monkeypatch)
    task = start(bench.tenant.predict(None, rows(4), stream="s", number=1))
    await gate.reached_soon()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    retry = start(bench.tenant.predict(None, rows(4), stream="s", number=1))  # while the first still runs
    await asyncio.sleep(0)
    gate.open()
    answer, replayed = await retry
    assert (answer.version, replayed) == (0, True)
    await bench.settled()
    assert (stream.version, stream.requests) == (1, 1), "committed once"
    stored, replayed = await bench.tenant.predict(None, rows(4), stream="s", number=1)
    assert replayed
    assert torch.equal(stored.logits, answer.logits)


async def test_a_large_answer_is_not_kept_and_its_repeat_refused(loaded: Loaded) -> None:
    """It cannot adapt twice, but what is kept for repeats is bounded."""
    async with serving(loaded, limits={"stored_answer_bytes": 4 * 5 * 3}) as bench:
        stream, _ = bench.tenant.open("s")
        await bench.tenant.predict(None, rows(3), stream="s", number=1)
        assert (await bench.tenant.predict(None, rows(3), stream="s", number=1))[1]
        await bench.tenant.predict(None, rows(4), stream="s", number=2)
        with pytest.raises(Conflict, match=r"limits\.stored_answer_bytes"):
            await bench.tenant.predict(None, rows(4), stream="s", number=2)
        await bench.settled()
        assert stream.version == 2


async def test_the_inputs_of_a_request_go_with_it(bench: Bench) -> None:
    """By reference counting: under load, what waits for the garbage collector is memory."""
    bench.tenant.open("s")
    gc.collect()
    gc.disable()
    try:
        x = rows(4)
        alive = weakref.ref(x)
        await bench.tenant.predict(None, x, stream="s", number=1)
        await bench.settled()
        del x
        await bench.tenant.predict(None, rows(4), stream="s", number=2)  # the device thread holds its last plan
        await bench.settled()
        assert alive() is None
    finally:
        gc.enable()


async def test_an_end_does_not_close_what_came_after(bench: Bench) -> None:
    old, _ = bench.tenant.open("s")
    new, _ = bench.tenant.open("s", replace=True)
    await bench.tenant.close("s", only=old)
    assert bench.tenant.stream("s") is new
    await bench.tenant.close("s", only=new)
    assert not bench.tenant.is_open("s")


async def test_an_error_nobody_waits_for_is_not_reported_as_lost(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.tenant.open("s")
    gate = Gate()

    def broken(plan: Plan, answer: AnswerJob) -> list[OpenStep]:
        gate.pass_through()
        raise ZeroDivisionError

    monkeypatch.setattr(bench.device.engine, "answer", broken)
    lost = lost_exceptions()
    task = start(bench.tenant.predict(None, rows(4), stream="s", number=1))
    await gate.reached_soon()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    gate.open()
    await bench.settled()
    del task
    gc.collect()
    assert lost == []


async def test_time_runs_out_in_the_queue(bench: Bench) -> None:
    stream, _ = bench.tenant.open("s")
    gate = await bench.hold()
    with pytest.raises(DeadlineExceeded, match=r"waited 0\.001 s"):
        await bench.tenant.predict(None, rows(4), stream="s", number=1, timeout=0.001)
    assert bench.device.runner.waiting == 0
    gate.open()
    await bench.settled()
    assert (stream.version, stream.requests) == (0, 0)
    assert not (await bench.tenant.predict(None, rows(4), stream="s", number=1))[1]


async def test_a_request_can_shorten_the_wait_but_not_extend_it(loaded: Loaded) -> None:
    async with serving(loaded, limits={"queue_seconds": 0.001}) as bench:
        bench.tenant.open("s")
        gate = await bench.hold()
        with pytest.raises(DeadlineExceeded):
            await bench.tenant.predict(None, rows(4), stream="s", timeout=1000.0)
        gate.open()


# Switching adaptation off and on


async def test_adaptation_off_serves_the_source_and_lets_the_state_rest(bench: Bench) -> None:
    tenant = bench.tenant
    stream, _ = tenant.open("s")
    twin, _ = tenant.open("twin")
    for seed in range(3):
        for id in ("s", "twin"):
            await tenant.predict(None, rows(4, seed), stream=id)
    await bench.settled()
    before = bench.state(stream)
    assert tenant.open("s", adapt=False) == (stream, False)
    off, _ = await tenant.predict(None, rows(4, 9), stream="s")
    assert torch.equal(off.logits, await scores(tenant.predict(None, rows(4, 9))))
    assert (off.adapted, off.policy, off.version) == (False, "source", 3)
    await bench.settled()
    assert (stream.version, stream.requests) == (3, 4)
    assert same_state(bench.state(stream), before)
    tenant.open("s", adapt=True)
    on, _ = await tenant.predict(None, rows(4, 10), stream="s")
    assert (on.adapted, on.version) == (True, 3)
    assert torch.equal(on.logits, await scores(tenant.predict(None, rows(4, 10), stream="twin")))
    assert not torch.equal(on.logits, await scores(tenant.predict(None, rows(4, 10))))
    await bench.settled()
    assert stream.version == twin.version == 4


@pytest.mark.parametrize("toggle", [True, False])
async def test_one_request_can_differ_from_the_toggle(bench: Bench, toggle: bool) -> None:
    stream, _ = bench.tenant.open("s", adapt=toggle)
    answer, _ = await bench.tenant.predict(None, rows(4), stream="s", adapt=not toggle)
    assert answer.adapted is not toggle
    assert stream.adapt is toggle
    assert (await bench.tenant.predict(None, rows(4), stream="s"))[0].adapted is toggle
    await bench.settled()
    assert stream.version == 1


async def test_a_reset_is_a_new_stream(bench: Bench) -> None:
    stream, _ = bench.tenant.open("s")
    first = [await scores(bench.tenant.predict(None, rows(4, seed), stream="s")) for seed in range(3)]
    assert bench.tenant.signals(stream)
    assert bench.tenant.tier(stream) == "device"
    assert await bench.tenant.reset("s") is stream
    assert (stream.version, bench.tenant.signals(stream), bench.tenant.tier(stream)) == (0, {}, "none")
    again = [await scores(bench.tenant.predict(None, rows(4, seed), stream="s")) for seed in range(3)]
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


async def test_a_reset_waits_for_the_requests_before_it(bench: Bench) -> None:
    bench.tenant.open("s")
    gate = await bench.hold()
    before = start(bench.tenant.predict(None, rows(4), stream="s"))
    await bench.waiting(1)
    reset = start(bench.tenant.reset("s"))
    await bench.waiting(2)
    after = start(bench.tenant.predict(None, rows(4), stream="s"))
    await bench.waiting(3)
    assert not reset.done()
    gate.open()
    assert [(await one)[0].version for one in (before, after)] == [0, 0]
    await reset


# Opening and closing


async def test_opening_fills_in_what_is_left_out(bench: Bench) -> None:
    stream, created = bench.tenant.open("s")
    assert created
    assert (stream.model, stream.policy, stream.adapt) == (MODEL, Tent(lr=LR), True)
    assert bench.tenant.open("t", settings={"optimiser": "sgd"})[0].policy == Tent(lr=LR, optimiser="sgd")
    assert bench.tenant.open("u", MODEL, "source", {}, False)[0].adapt is False
    assert [one.id for one in bench.tenant.streams()] == ["s", "t", "u"]
    assert bench.tenant.stream("s") is stream


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
    stream, _ = bench.tenant.open("s", policy="tent", settings={"lr": 0.5}, adapt=False)
    assert bench.tenant.open("s", **same) == (stream, False)
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
    stream, _ = bench.tenant.open("s", settings={"lr": 0.5})
    with pytest.raises(kind, match=said):
        bench.tenant.open("s", **other, adapt=False)
    assert stream.adapt, "a refused request changes nothing"
    assert stream.policy == Tent(lr=0.5)


@pytest.mark.parametrize("id", ["", "a b", "a/b", "ä", "x" * 129, "a\n", "$"])
async def test_ids_of_other_characters_are_refused(bench: Bench, id: str) -> None:
    with pytest.raises(BadInput, match="1 to 128 of"):
        bench.tenant.open(id)
    assert list(bench.tenant.streams()) == []


async def test_ids_may_be_long_and_hold_punctuation(bench: Bench) -> None:
    for id in ("x" * 128, "A-z_0.9:1", "0"):
        assert bench.tenant.open(id)[1]


async def test_closing_frees_the_id_at_once_and_finishes_what_is_under_way(bench: Bench) -> None:
    old, _ = bench.tenant.open("s")
    await bench.tenant.predict(None, rows(4), stream="s")
    gate = await bench.hold()
    under_way = start(bench.tenant.predict(None, rows(4), stream="s", number=1))
    await bench.waiting(1)
    closing = start(bench.tenant.close("s"))
    await bench.waiting(2)
    with pytest.raises(UnknownName):
        bench.tenant.stream("s")
    new, created = bench.tenant.open("s")
    assert created
    assert new is not old
    fresh = start(bench.tenant.predict(None, rows(4), stream="s", number=1))
    await bench.waiting(3)
    assert not closing.done()
    gate.open()
    assert ((await under_way)[0].version, (await fresh)[0].version) == (1, 0)
    assert not (await fresh)[1], "the new stream does not know the old one's numbers"
    await closing
    await bench.settled()
    assert (old.version, new.version) == (2, 1)
    assert bench.tenant.tier(old) == "none"
    assert bench.tenant.signals(old) == {}
    assert bench.device.store.counts()["device"][0] == 1
    await bench.tenant.close("s")
    assert bench.device.store.counts() == {"device": (0, 0), "host": (0, 0), "disk": (0, 0)}


# Limits


async def test_the_limit_on_streams(loaded: Loaded) -> None:
    async with serving(loaded, limits={"streams": 2}) as bench:
        bench.tenant.open("a")
        bench.tenant.open("b")
        with pytest.raises(QueueFull, match=r"2 streams are open; the limit is limits\.streams = 2"):
            bench.tenant.open("c")
        assert bench.tenant.open("b")[1] is False, "confirming needs no room"
        await bench.tenant.close("a")
        assert bench.tenant.open("c")[1]


async def test_the_limits_on_the_queue(loaded: Loaded) -> None:
    async with serving(loaded, limits={"queue": 3, "queue_per_stream": 2}) as bench:
        for id in "ab":
            bench.tenant.open(id)
        gate = await bench.hold()
        tasks = [start(bench.tenant.predict(None, rows(1), stream="a", number=number)) for number in range(2)]
        await bench.waiting(2)
        with pytest.raises(QueueFull, match=r"2 requests of stream 'a' wait.*limits\.queue_per_stream = 2"):
            await bench.tenant.predict(None, rows(1), stream="a", number=2)
        tasks.append(start(bench.tenant.predict(None, rows(1), stream="b")))
        await bench.waiting(3)
        with pytest.raises(QueueFull, match=r"3 requests wait already; the limit is limits\.queue = 3"):
            await bench.tenant.predict(None, rows(1), stream="b", number=0)
        gate.open()
        await asyncio.gather(*tasks)
        for id, number in (("a", 2), ("b", 0)):
            assert not (await bench.tenant.predict(None, rows(1), stream=id, number=number))[1]


async def test_settings_of_a_policy_whose_step_fails_are_refused_too(loaded: Loaded) -> None:
    """What a trial at the start found to lie with the model does not go away with other settings."""
    reports = {"tent": {"name": "tent", "runs": False, "reason": "its step fails: RuntimeError: no gradient"}}
    async with serving((loaded[0], {MODEL: replace(loaded[1][MODEL], reports=reports)})) as bench:
        for settings in (None, {}, {"lr": 0.5}):
            with pytest.raises(Conflict, match="no gradient"):
                bench.tenant.open("s", policy="tent", settings=settings)
        assert not bench.tenant.is_open("s")


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
        bench.tenant.open("s", policy=policy, settings=settings)


async def test_a_state_over_the_limit_is_refused(loaded: Loaded) -> None:
    """With its size and the limit's name, whether by the preset or by settings of the stream's own."""
    async with serving(loaded, limits={"state_bytes": 4000}) as bench:
        bench.tenant.open("small", policy="tent")
        with pytest.raises(Conflict, match=r"state would be [\d,]+ bytes, over the limit limits\.state_bytes = 4,000"):
            bench.tenant.open("large", policy="tent", settings={"window": 64})
        with pytest.raises(Conflict, match=r"limits\.state_bytes"):
            bench.tenant.open("larger", policy="cotta")


# Changes


async def test_a_change_of_a_number_keeps_the_state(bench: Bench) -> None:
    """From the next request on the stream is one that has this state and the new settings."""
    tenant = bench.tenant
    stream, _ = tenant.open("s")
    for seed in range(2):
        await tenant.predict(None, rows(4, seed), stream="s")
    await bench.settled()
    before, signals = bench.state(stream), tenant.signals(stream)
    assert await tenant.update("s", settings={"lr": 0.1}) == (stream, True)
    assert (stream.policy, stream.version, tenant.signals(stream)) == (Tent(lr=0.1), 2, signals)
    assert same_state(bench.state(stream), before)
    other, _ = tenant.open("other", settings={"lr": 0.1})
    bench.device.store.restore(other.lane, other, before, 2)
    for seed in (2, 3):
        own, others = [(await tenant.predict(None, rows(4, seed), stream=id))[0] for id in ("s", "other")]
        assert own.version == others.version == seed
        assert torch.equal(own.logits, others.logits)


@pytest.mark.parametrize(
    "change",
    [{"policy": "norm"}, {"settings": {"window": 8}}, {"settings": {"optimiser": "sgd"}}, {"policy": "t3a"}],
    ids=str,
)
async def test_a_change_of_another_kind_starts_from_the_source(bench: Bench, change: dict[str, Any]) -> None:
    tenant = bench.tenant
    stream, _ = tenant.open("s")
    for seed in range(2):
        await tenant.predict(None, rows(4, seed), stream="s")
    old = stream.lane
    assert await tenant.update("s", **change) == (stream, False)
    assert (stream.version, tenant.signals(stream), tenant.tier(stream)) == (0, {}, "none")
    assert not bench.device.store.has_lane(old), "nothing of the former state is kept"
    fresh, _ = bench.service.tenant("other").open("s", policy=change.get("policy"), settings=change.get("settings"))
    assert fresh.policy == stream.policy
    for seed in range(3):
        own, others = [
            await scores(one.predict(None, rows(10, seed), stream="s"))
            for one in (tenant, bench.service.tenant("other"))
        ]
        assert torch.equal(own, others)


async def test_what_a_change_leaves_out_stays(bench: Bench) -> None:
    """Settings go over those of the stream; with another policy, over what that one starts from on the model."""
    stream, _ = bench.tenant.open("s", settings={"optimiser": "sgd"}, adapt=False)
    await bench.tenant.update("s", settings={"lr": 0.5})
    assert (stream.policy, stream.adapt) == (Tent(lr=0.5, optimiser="sgd"), False)
    await bench.tenant.update("s", policy="tent")
    assert stream.policy == Tent(lr=0.5, optimiser="sgd"), "the policy it has already"
    await bench.tenant.update("s", policy="norm")
    assert settings_of(stream.policy) == settings_of(NormPolicy())
    await bench.tenant.update("s", policy="tent", settings={"momentum": 0.5})
    assert stream.policy == Tent(lr=LR, momentum=0.5)
    assert await bench.tenant.update("s", adapt=True) == (stream, True)
    assert (stream.policy, stream.adapt) == (Tent(lr=LR, momentum=0.5), True)


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        ({"settings": {"lr": -1}}, BadInput, "lr must lie in"),
        ({"settings": {"learning_rate": 1}}, BadInput, "learning_rate"),
        ({"policy": "magic"}, UnknownName, "no policy 'magic'"),
        ({"policy": "eata"}, Conflict, "eata needs fisher of the source"),
        ({"settings": {"window": 4096}}, Conflict, r"limits\.state_bytes"),
        ({"settings": {"window": 64}}, QueueFull, r"auth\.tenants\.default\.state_bytes"),
    ],
    ids=str,
)
async def test_a_change_that_is_refused_changes_nothing(
    loaded: Loaded, change: dict[str, Any], kind: type[Exception], said: str
) -> None:
    limits, tenants = {"state_bytes": 100_000}, {"default": {"state_bytes": 4000}}
    async with serving(loaded, limits=limits, auth={"tenants": tenants}) as bench:
        stream, _ = bench.tenant.open("s")
        await bench.tenant.predict(None, rows(4), stream="s")
        await bench.settled()
        before = bench.state(stream)
        with pytest.raises(kind, match=said):
            await bench.tenant.update("s", **change, adapt=False)
        assert (stream.policy, stream.adapt, stream.version) == (Tent(lr=LR), True, 1)
        assert same_state(bench.state(stream), before)
        assert (await bench.tenant.predict(None, rows(4), stream="s"))[0].version == 1


@pytest.mark.parametrize(("change", "version"), [({"policy": "norm"}, 0), ({"settings": {"lr": 0.5}}, 1)], ids=str)
async def test_requests_before_a_change_run_under_the_old_settings_and_those_behind_under_the_new(
    bench: Bench, change: dict[str, Any], version: int
) -> None:
    stream, _ = bench.tenant.open("s")
    old = stream.lane
    gate = await bench.hold()
    before = start(bench.tenant.predict(None, rows(4), stream="s"))
    await bench.waiting(1)
    changing = start(bench.tenant.update("s", **change))
    await bench.waiting(2)
    after = start(bench.tenant.predict(None, rows(4), stream="s"))
    await bench.waiting(3)
    assert not changing.done()
    gate.open()
    assert ((await before)[0].version, (await after)[0].version) == (0, version)
    assert await changing == (stream, bool(version))
    await bench.settled()
    assert [step.lane for step in bench.device.recorder.steps] == [old, stream.lane]
    assert stream.lane != old


async def test_a_change_while_a_request_runs_waits_for_its_step(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    stream, _ = bench.tenant.open("s")
    gate = gated_engine(bench, monkeypatch)
    running = start(bench.tenant.predict(None, rows(4), stream="s"))
    await gate.reached_soon()
    changing = start(bench.tenant.update("s", settings={"lr": 0.5}))
    await bench.waiting(1)
    gate.open()
    await running
    assert await changing == (stream, True)
    assert (stream.version, bench.tenant.tier(stream)) == (1, "host"), "the step's result came along"


async def test_changes_one_behind_the_other(bench: Bench) -> None:
    """Each starts from what the one before leaves, although none has run yet when the next one comes."""
    stream, _ = bench.tenant.open("s")
    await bench.tenant.predict(None, rows(4), stream="s")
    gate = await bench.hold()
    changes = [start(bench.tenant.update("s", settings=one)) for one in ({"lr": 0.5}, {"momentum": 0.5}, {"window": 8})]
    await bench.waiting(3)
    gate.open()
    assert [(await one)[1] for one in changes] == [True, True, False]
    assert (stream.policy, stream.version) == (Tent(lr=0.5, momentum=0.5, window=8), 0)


@pytest.mark.parametrize("ends", ["close", "replace"])
async def test_a_stream_that_ends_while_it_changes(bench: Bench, ends: str) -> None:
    old, _ = bench.tenant.open("s")
    await bench.tenant.predict(None, rows(4), stream="s")
    gate = await bench.hold()
    changing = start(bench.tenant.update("s", settings={"lr": 0.5}))
    await bench.waiting(1)
    ending = start(bench.tenant.close("s")) if ends == "close" else None
    if ending is None:
        bench.tenant.open("s", replace=True)
    await bench.waiting(2)
    gate.open()
    assert await changing == (old, True)
    if ending is not None:
        await ending
    await bench.settled()
    assert bench.device.store.counts() == {"device": (0, 0), "host": (0, 0), "disk": (0, 0)}


async def test_a_change_whose_client_left_is_made_all_the_same(bench: Bench) -> None:
    stream, _ = bench.tenant.open("s")
    await bench.tenant.predict(None, rows(4), stream="s")
    gate = await bench.hold()
    changing = start(bench.tenant.update("s", settings={"lr": 0.5}, adapt=False))
    await bench.waiting(1)
    changing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await changing
    gate.open()
    await bench.settled()
    assert (stream.policy, stream.version, bench.tenant.tier(stream)) == (Tent(lr=0.5), 1, "host")
    assert stream.adapt is False, "the whole of it"


async def test_a_change_that_fails_on_the_device_leaves_a_stream_at_the_source(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream, _ = bench.tenant.open("s")
    await bench.tenant.predict(None, rows(4), stream="s")
    await bench.settled()

    def broken(old: Lane, new: Lane, stream: Stream) -> bool:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(bench.device.store, "move", broken)
        with pytest.raises(StepFailed, match="out of memory"):
            await bench.tenant.update("s", settings={"lr": 0.5})
    assert (stream.policy, stream.version, bench.tenant.tier(stream)) == (Tent(lr=0.5), 0, "none")
    assert (await bench.tenant.predict(None, rows(4), stream="s"))[0].version == 0


async def test_a_switch_beside_other_changes_holds_from_the_next_request_on(bench: Bench) -> None:
    """Whatever waits before it; and a later switch is not undone by an earlier one that took longer."""
    stream, _ = bench.tenant.open("s")
    gate = await bench.hold()
    changing = start(bench.tenant.update("s", settings={"lr": 0.5}, adapt=False))
    await bench.waiting(1)
    after = start(bench.tenant.predict(None, rows(4), stream="s"))
    await bench.waiting(2)
    assert (await bench.tenant.update("s", adapt=True))[0] is stream
    gate.open()
    assert (await after)[0].adapted is False
    await changing
    assert stream.adapt is True


@pytest.mark.parametrize("company", [False, True])
async def test_whether_a_state_is_kept_does_not_depend_on_other_streams(bench: Bench, company: bool) -> None:
    """The rule looks at policy and layout only, on a stream without a request, too."""
    bench.tenant.open("s")
    if company:
        other = bench.service.tenant("other")
        other.open("o")
        await other.predict(None, rows(4), stream="o")
    assert (await bench.tenant.update("s", settings={"lr": 0.5}))[1] is True


# Tenants


async def test_tenants_share_ids_but_nothing_else(bench: Bench) -> None:
    """Same ids, same steps, other data: each tenant is answered as if it were alone."""
    one, other = (bench.service.tenant(name) for name in ("one", "other"))
    streams = [tenant.open("s")[0] for tenant in (one, other)]
    together = []
    for seed in range(3):
        gate = await bench.hold()
        tasks = [
            start(tenant.predict(None, rows(4, seed + 10 * k), stream="s")) for k, tenant in enumerate((one, other))
        ]
        await bench.waiting(2)
        gate.open()
        together.append(await asyncio.gather(*tasks))
    await bench.settled()
    assert [len(step.jobs) for step in bench.device.recorder.steps] == [2] * 3, "they shared their steps"
    assert not same_state(*map(bench.state, streams))
    for k in range(2):
        alone = bench.service.tenant(f"alone{k}")
        alone.open("s")
        for seed in range(3):
            (answer, _) = await alone.predict(None, rows(4, seed + 10 * k), stream="s")
            torch.testing.assert_close(together[seed][k][0].logits, answer.logits, rtol=1e-5, atol=1e-5)


async def test_another_tenants_streams_do_not_exist(bench: Bench) -> None:
    one, other = (bench.service.tenant(name) for name in ("one", "other"))
    stream, _ = one.open("s")
    await one.predict(None, rows(4), stream="s", number=5)
    for work in (
        other.predict(None, rows(1), stream="s"), other.update("s", adapt=False), other.reset("s"), other.close("s"),
    ):  # fmt: skip
        with pytest.raises(UnknownName, match="no stream 's'"):
            await work
    assert (other.is_open("s"), len(other), list(other.streams()), other.page(0, 9)) == (False, 0, [], ([], None))
    twin, _ = other.open("s", policy="norm")
    assert (await other.predict(None, rows(4), stream="s", number=1))[1] is False, "numbers are each tenant's own"
    await other.close("s")
    assert one.stream("s") is stream
    assert (stream.version, stream.adapt, stream.last_number, twin.last_number) == (1, True, 5, 1)


# Listing


async def test_streams_are_listed_page_by_page(bench: Bench) -> None:
    tenant = bench.tenant
    for id in "abcde":
        tenant.open(id, policy="norm" if id in "bd" else "tent", adapt=id != "e")

    def pages(limit: int, **filters: Any) -> list[str]:
        found, place = [], 0
        while True:
            some, after = tenant.page(place, limit, **filters)
            found.append("".join(one.id for one in some))
            if after is None:
                return found
            place = after

    assert pages(2) == ["ab", "cd", "e"]
    assert pages(5) == pages(9) == ["abcde"], "a full last page says that it is the last"
    assert pages(1, policy="norm") == ["b", "d"]
    assert pages(9, adapt=False) == ["e"]
    assert pages(9, adapt=True, policy="tent") == ["ac"]
    assert pages(9, model=MODEL) == ["abcde"]
    assert pages(9, model="other") == [""]


async def test_pages_go_on_where_they_were_whatever_comes_and_goes(bench: Bench) -> None:
    tenant = bench.tenant
    for id in "abcd":
        tenant.open(id)
    first, place = tenant.page(0, 2)
    assert [one.id for one in first] == ["a", "b"]
    assert place is not None
    await tenant.close("b")
    await tenant.close("c")
    tenant.open("e")
    tenant.open("a", replace=True)
    rest, place = tenant.page(place, 9)
    assert [one.id for one in rest] == ["d", "e", "a"], "one that was replaced is a new one"
    assert place is None


# Quotas


async def test_a_tenants_streams_are_counted(loaded: Loaded) -> None:
    """Others are not held to its limit; confirming and replacing need no room; a close makes room at once."""
    async with serving(loaded, limits={"streams": 4}, auth={"tenants": {"small": {"streams": 2}}}) as bench:
        small, other = bench.service.tenant("small"), bench.service.tenant("other")
        for id in "ab":
            small.open(id)
        with pytest.raises(QueueFull, match=r"2 streams are open; the limit is auth\.tenants\.small\.streams = 2"):
            small.open("c")
        assert small.open("b")[1] is False
        assert small.open("b", replace=True)[1] is True
        other.open("a")
        gate = await bench.hold()
        closing = start(small.close("a"))
        await asyncio.sleep(0)
        small.open("c")
        other.open("b")
        with pytest.raises(QueueFull, match=r"4 streams are open; the limit is limits\.streams = 4"):
            other.open("c")
        gate.open()
        await closing


async def test_a_tenants_bytes_are_counted_from_the_start(loaded: Loaded) -> None:
    size = loaded[1][MODEL].reports["tent"]["bytes_per_stream"]
    async with serving(loaded, auth={"tenants": {"small": {"state_bytes": 2 * size}}}) as bench:
        small, other = bench.service.tenant("small"), bench.service.tenant("other")
        for id in "ab":
            small.open(id)
        limit = rf"take {3 * size:,} bytes then; the limit is auth\.tenants\.small\.state_bytes = {2 * size:,}"
        with pytest.raises(QueueFull, match=limit):
            small.open("c")
        assert other.open("c")[1]
        assert small.open("stateless", policy="norm")[1], "what takes nothing is not refused"
        assert small.open("b", replace=True)[1], "its predecessor's bytes are free"
        with pytest.raises(QueueFull, match=r"auth\.tenants\.small\.state_bytes"):
            small.open("b", replace=True, settings={"window": 8})
        assert small.stream("b").policy == Tent(lr=LR), "it was not replaced"
        await small.update("a", policy="norm")
        assert small.open("c")[1], "a change to less made room"
        with pytest.raises(QueueFull):
            await small.update("a", policy="tent")
        await small.close("c")
        assert await small.update("a", policy="tent") == (small.stream("a"), False)


# Under pressure


async def test_under_pressure_streams_are_answered_as_adapted_so_far_and_adapt_no_further(loaded: Loaded) -> None:
    async with serving(loaded) as bench:
        streams = [bench.tenant.open(id)[0] for id in "abc"]
        for id in "abc":
            await bench.tenant.predict(None, rows(4), stream=id)
        await bench.settled()
        before = [bench.state(stream) for stream in streams]
        gate = await bench.hold()
        tasks = [start(bench.tenant.predict(None, rows(4, 1), stream=id, number=1)) for id in "abc"]
        await bench.waiting(3)
        let_pass(bench.device.runner, 20.0)
        gate.open()
        answers = [answer for answer, _ in await asyncio.gather(*tasks)]
        await bench.settled()
        assert [(answer.shed, answer.adapted, answer.version) for answer in answers] == [(True, True, 1)] * 3
        assert bench.device.recorder.results() == ["applied"] * 3 + ["shed"] * 3
        assert [stream.version for stream in streams] == [1, 1, 1]
        assert all(same_state(bench.state(stream), state) for stream, state in zip(streams, before, strict=True))
        again, replayed = await bench.tenant.predict(None, rows(4, 1), stream="a", number=1)
        assert (again.shed, replayed) == (True, True), "a retry does not adapt what was shed"
        after, _ = await bench.tenant.predict(None, rows(4, 1), stream="a")
        assert torch.equal(after.logits, answers[0].logits)
        assert after.shed is False
        await bench.settled()
        assert streams[0].version == 2


async def test_an_urgent_request_goes_before_those_that_came_earlier(loaded: Loaded) -> None:
    """Of other streams; its own come first all the same."""
    async with serving(loaded, limits={"batch_rows": 1}) as bench:
        for id in "abc":
            bench.tenant.open(id)
        gate = await bench.hold()
        tasks = []
        for id, priority in (("a", 10), ("c", 10), ("b", 0), ("c", 1)):
            tasks.append(start(bench.tenant.predict(None, rows(1), stream=id, priority=priority)))
            await bench.waiting(len(tasks))
        gate.open()
        await asyncio.gather(*tasks)
        await bench.settled()
        assert [job.stream.id for step in bench.device.recorder.steps for job in step.jobs] == ["b", "a", "c", "c"]
