"""The device thread with the real engine, scheduler and store: order, deadlines, failures, shutdown."""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import adapters
from adapters.base import BATCH_NORM, Batch, Norm, Policy, Scope, Source, State, Step
from adapters.norm import NormPolicy
from adapters.source import SourcePolicy
from adapters.tent import Tent
from tests.serving import (
    LR,
    MODEL,
    TIMEOUT,
    Device,
    Ending,
    Gate,
    hold,
    load,
    make_device,
    rows,
    same_state,
    stream_of,
    varied,
)
from tta_server import runner as runner_module
from tta_server.engine.engine import AnswerJob, OpenStep
from tta_server.engine.source import SourceModel
from tta_server.errors import DeadlineExceeded, QueueFull, StepFailed, Unavailable
from tta_server.runner import Runner
from tta_server.scheduler import Bounds, Scheduler
from tta_server.settings import Consistency, Settings
from tta_server.state.records import Shutdown
from tta_server.types import NOT_STORED, Answer, Job, Lane, Plan, StepStats, Stream

TENT = Tent(lr=LR)
TENT_LANE = Lane(MODEL, TENT)
POISON = 1.0
"""A pixel value that ``rows`` never draws."""


@dataclass(frozen=True)
class Hooked(Policy):
    """TENT with a hand in it: before the scores, on them, before the update, on its result. Not registered."""

    name = "hooked"
    scope = Scope.NORM

    before: Callable[[Batch], None] = lambda batch: None
    served: Callable[[Tensor], Tensor] = lambda logits: logits
    after: Callable[[Batch], None] = lambda batch: None
    result: Callable[[Step], Step] = lambda step: step
    yields: int = 1

    @property
    def norm(self) -> Norm:
        return BATCH_NORM

    def init(self, source: Source) -> State:
        return TENT.init(source)

    def step(self, source: Source, state: State, batch: Batch) -> Generator[Tensor, None, Step]:
        self.before(batch)
        tent = TENT.step(source, state, batch)
        logits = self.served(next(tent))
        for _ in range(self.yields):
            yield logits
        self.after(batch)
        try:
            next(tent)
        except StopIteration as end:
            return self.result(end.value)
        raise AssertionError("TENT yields once")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[Settings, dict[str, SourceModel]]:
    """The tiny model."""
    return load(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def device(source: tuple[Settings, dict[str, SourceModel]]) -> Iterator[Device]:
    """A runner that is not started yet; drained at the end."""
    made = make_device(*source)
    yield made
    made.runner.drain(0.0)
    made.store.check_integrity()


def submit(
    device: Device,
    stream: Stream,
    x: Tensor,
    lane: Lane | None = None,
    deadline: float = float("inf"),
    order: list[Ending] | None = None,
) -> Ending:
    """Submits a request, by default in the stream's own lane."""
    ending = Ending(order)
    device.runner.submit(Job(stream, ending, lane or Lane(MODEL, stream.policy), x, deadline=deadline))
    return ending


def command(device: Device, stream: Stream, what: Callable[[], None]) -> Ending:
    """Submits a command."""
    ending = Ending()
    device.runner.submit(Job(stream, ending, command=what))
    return ending


def settle(device: Device) -> None:
    """Returns when the thread has finished everything submitted before."""
    command(device, stream_of(TENT, "settle"), lambda: None).ended()


def draining(device: Device, seconds: float) -> tuple[threading.Thread, list[int]]:
    """Starts a drain in a thread; returns it, and the list that its result goes to. Admission has ended by then."""
    given_up: list[int] = []
    thread = threading.Thread(target=lambda: given_up.append(device.runner.drain(seconds)), daemon=True)
    thread.start()
    probe = Job(stream_of(TENT, "probe"), lambda *_: None, command=lambda: None)
    for _ in range(1_000_000):
        try:
            device.runner.submit(probe)
        except Unavailable:
            return thread, given_up
        if not device.runner.cancel(probe):
            probe = replace(probe)
    raise AssertionError("the drain never began")


def poisoned(count: int) -> Tensor:
    x = rows(count)
    x[0, 0, 0, 0] = POISON
    return x


def fail_on_poison(batch: Batch) -> None:
    if (batch.x == POISON).any():
        raise RuntimeError("poison")


def test_every_request_is_answered_and_adapts(device: Device) -> None:
    stream = stream_of(TENT)
    device.runner.start()
    answers = [submit(device, stream, rows(n, seed=n)).answer() for n in (4, 1, 7)]
    settle(device)
    assert [answer.version for answer in answers] == [0, 1, 2]
    assert [tuple(answer.logits.shape) for answer in answers] == [(4, 5), (1, 5), (7, 5)]
    assert all(answer.adapted and answer.policy == "tent" for answer in answers)
    assert stream.version == stream.requests == 3
    assert device.recorder.results() == ["applied"] * 3


def test_requests_of_a_stream_run_in_order_and_those_of_others_beside_them(device: Device) -> None:
    streams = [stream_of(TENT, id) for id in "abc"]
    order: list[Ending] = []
    endings = [[submit(device, stream, rows(2, seed), order=order) for stream in streams] for seed in range(4)]
    device.runner.start()
    for number, round in enumerate(endings):
        assert [ending.answer().version for ending in round] == [number] * 3
    for own in zip(*endings, strict=True):
        assert [ending for ending in order if ending in own] == list(own)
    settle(device)
    assert [len(step.jobs) for step in device.recorder.steps] == [3] * 4, "streams of one lane share their steps"


def test_a_merged_step_answers_each_stream_as_alone(device: Device) -> None:
    merged, alone = [stream_of(TENT, id) for id in "abc"], [stream_of(TENT, id) for id in "ABC"]
    sizes = (3, 1, 6)
    together = [
        [submit(device, stream, rows(size, 10 * turn + size)) for turn in range(3)]
        for stream, size in zip(merged, sizes, strict=True)
    ]
    device.runner.start()
    settle(device)
    for stream, size, endings in zip(alone, sizes, together, strict=True):
        for turn, ending in enumerate(endings):
            single = submit(device, stream, rows(size, 10 * turn + size)).answer()
            torch.testing.assert_close(ending.answer().logits, single.logits, rtol=1e-5, atol=1e-5)
    settle(device)
    assert [len(step.jobs) for step in device.recorder.steps][:4] == [3, 3, 3, 1]


def test_commands_take_their_place_in_the_stream(device: Device) -> None:
    stream, x = stream_of(TENT), rows(6)
    first = submit(device, stream, x)
    second = submit(device, stream, x)
    reset = command(device, stream, lambda: device.engine.reset(stream.lane, stream.lane, stream))
    third = submit(device, stream, x)
    device.runner.start()
    reset.ended()
    assert [one.answer().version for one in (first, second, third)] == [0, 1, 0]
    assert not torch.equal(first.answer().logits, second.answer().logits), "the step between must show"
    assert torch.equal(first.answer().logits, third.answer().logits)


def test_a_failing_command_ends_with_its_error_and_costs_nothing_else(device: Device) -> None:
    def fail() -> None:
        raise RuntimeError("broken command")

    device.runner.start()
    stream = stream_of(TENT)
    assert "broken command" in str(command(device, stream, fail).error())
    assert submit(device, stream, rows(2)).answer().version == 0


def test_a_passed_deadline_is_told_and_never_adapts(source: tuple[Settings, dict[str, SourceModel]]) -> None:
    now = 100.0
    device = make_device(*source, clock=lambda: now)
    stream, other = stream_of(TENT), stream_of(TENT, "other")
    late = submit(device, stream, rows(4, 1), deadline=105.0)
    later = submit(device, stream, rows(4, 2), deadline=130.0)
    beside = submit(device, other, rows(4, 3))
    now = 110.0
    device.runner.start()
    assert isinstance(late.error(), DeadlineExceeded)
    assert later.answer().version == 0, "nothing was adapted before it"
    assert beside.answer().version == 0
    assert device.runner.drain(TIMEOUT) == 0
    assert (stream.version, stream.requests) == (1, 1)
    assert [len(step.jobs) for step in device.recorder.steps] == [2]


def test_a_stream_of_expired_requests_only_wakes_nobody_up_for_nothing(
    source: tuple[Settings, dict[str, SourceModel]],
) -> None:
    now = 0.0
    device = make_device(*source, clock=lambda: now)
    stream = stream_of(TENT)
    endings = [submit(device, stream, rows(1), deadline=1.0) for _ in range(5)]
    now = 100.0
    device.runner.start()
    assert all(isinstance(ending.error(), DeadlineExceeded) for ending in endings)
    assert device.runner.drain(TIMEOUT) == 0
    assert device.recorder.steps == []
    assert device.store.counts()["device"] == (0, 0)


def test_cancelling_a_waiting_request_takes_it_out(device: Device) -> None:
    stream = stream_of(TENT)
    jobs = [Job(stream, Ending(), TENT_LANE, rows(3, seed)) for seed in range(3)]
    for job in jobs:
        device.runner.submit(job)
    assert device.runner.cancel(jobs[1])
    assert not device.runner.cancel(jobs[1]), "a second time there is nothing to take back"
    assert device.runner.waiting == 2
    device.runner.start()
    settle(device)
    assert [job.done.calls for job in jobs if isinstance(job.done, Ending) and not job.done.over] == [[]]
    assert stream.version == stream.requests == 2


def test_cancelling_a_running_request_is_too_late(device: Device) -> None:
    gate = Gate()
    stream = stream_of(Hooked(before=lambda batch: gate.pass_through()))
    job = Job(stream, ending := Ending(), Lane(MODEL, stream.policy), rows(3))
    device.runner.start()
    device.runner.submit(job)
    gate.reached()
    assert not device.runner.cancel(job)
    gate.open()
    assert ending.answer().version == 0
    settle(device)
    assert stream.version == 1


def test_the_answer_leaves_before_the_stream_adapts(device: Device) -> None:
    gate = Gate()
    stream = stream_of(Hooked(after=lambda batch: gate.pass_through()))
    device.runner.start()
    answer = submit(device, stream, rows(3)).answer()
    gate.reached()
    assert (answer.version, stream.version) == (0, 0), "answered, and not adapted yet"
    gate.open()
    settle(device)
    assert stream.version == 1


def test_drain_finishes_what_waits(device: Device) -> None:
    device.runner.start()
    gate, stream = hold(device.runner), stream_of(TENT)
    endings = [submit(device, stream, rows(2, seed)) for seed in range(5)]
    thread, given_up = draining(device, TIMEOUT)
    assert not any(ending.over for ending in endings)
    gate.open()
    assert [ending.answer().version for ending in endings] == [0, 1, 2, 3, 4]
    thread.join(TIMEOUT)
    assert given_up == [0]
    assert device.scheduler.idle


def test_drain_gives_up_after_its_budget(device: Device) -> None:
    gate = Gate()
    running, stream = stream_of(Hooked(before=lambda batch: gate.pass_through()), "running"), stream_of(TENT)
    device.runner.start()
    under_way = submit(device, running, rows(2))
    gate.reached()
    waiting = [submit(device, stream, rows(2)) for _ in range(3)]
    thread, given_up = draining(device, 0.01)
    assert all(isinstance(ending.error(), Unavailable) for ending in waiting)
    assert not under_way.over
    gate.open()
    thread.join(TIMEOUT)
    assert given_up == [3]
    assert under_way.answer().version == 0, "what ran was finished"
    assert (running.version, stream.version) == (1, 0)
    assert device.scheduler.idle


def test_drain_returns_as_soon_as_the_last_waiting_request_is_taken_back(device: Device) -> None:
    job = Job(stream_of(TENT), Ending(), TENT_LANE, rows(1))
    device.runner.submit(job)  # not started: nothing but the cancellation can empty the queue
    thread, given_up = draining(device, 2 * TIMEOUT)
    assert device.runner.cancel(job)
    thread.join(5.0)
    assert given_up == [0], "the drain sits its whole budget out although nothing waits"


class PoliteLock(threading.Condition):
    """Lets the one who waits for the condition go before the device thread, which a plain one may do or not."""

    def __init__(self, checked: threading.Event) -> None:
        super().__init__()
        self._checked = checked

    def notify_all(self) -> None:
        self._checked.clear()
        super().notify_all()

    def __exit__(self, *of: Any) -> None:
        super().__exit__(*of)
        if threading.current_thread().name == "device":
            self._checked.wait(0.1)


class WatchedScheduler(Scheduler):
    """Tells when somebody has looked whether it is idle."""

    def __init__(self, bounds: Bounds, checked: threading.Event) -> None:
        super().__init__(bounds)
        self._checked = checked

    @property
    def idle(self) -> bool:
        self._checked.set()
        return super().idle


def test_drain_returns_as_soon_as_the_last_waiting_request_has_expired(
    source: tuple[Settings, dict[str, SourceModel]], monkeypatch: pytest.MonkeyPatch
) -> None:
    now, checked, gate = 0.0, threading.Event(), Gate()
    plain = make_device(*source)
    scheduler = WatchedScheduler(plain.scheduler.bounds, checked)
    runner = Runner(plain.engine, scheduler, plain.recorder, clock=lambda: now)
    monkeypatch.setattr(runner, "_changed", PoliteLock(checked))
    device = replace(plain, scheduler=scheduler, runner=runner)
    stream = stream_of(Hooked(before=lambda batch: gate.pass_through()))
    runner.start()
    running, late = submit(device, stream, rows(1)), submit(device, stream, rows(1), deadline=5.0)
    gate.reached()
    thread, given_up = draining(device, 2 * TIMEOUT)
    now = 10.0
    gate.open()
    running.answer()
    assert isinstance(late.error(), DeadlineExceeded)
    thread.join(5.0)
    assert given_up == [0], "the drain sits its whole budget out although nothing waits"


def test_after_a_drain_nothing_is_taken(device: Device) -> None:
    device.runner.start()
    device.runner.drain(TIMEOUT)
    ending = Ending()
    with pytest.raises(Unavailable, match="shutting down"):
        device.runner.submit(Job(stream_of(TENT), ending, TENT_LANE, rows(1)))
    assert not ending.over
    assert device.runner.drain(TIMEOUT) == 0, "a second drain has nothing to do"


def test_a_policy_that_fails_before_its_scores_costs_its_own_request_only(device: Device) -> None:
    calls: list[int] = []

    def before(batch: Batch) -> None:
        calls.append(batch.segments.streams)
        fail_on_poison(batch)

    policy = Hooked(before=before)
    good, bad, fine = (stream_of(policy, id) for id in ("good", "bad", "fine"))
    device.runner.start()
    submit(device, bad, rows(4)).answer()
    settle(device)
    state = device.state(Lane(MODEL, policy), bad)
    calls.clear()
    gate = hold(device.runner)
    endings = [submit(device, good, rows(3, 1)), submit(device, bad, poisoned(4)), submit(device, fine, rows(2, 2))]
    gate.open()
    error = endings[1].error()
    assert isinstance(error, StepFailed)
    assert "poison" in str(error)
    settle(device)
    assert calls == [3, 1, 1, 1], "merged first, then one by one"
    assert (good.version, bad.version, fine.version) == (1, 1, 1)
    assert same_state(device.state(Lane(MODEL, policy), bad), state)
    for ending, size, seed in ((endings[0], 3, 1), (endings[2], 2, 2)):
        alone = submit(device, stream_of(TENT, f"alone{seed}"), rows(size, seed)).answer()
        torch.testing.assert_close(ending.answer().logits, alone.logits, rtol=1e-5, atol=1e-5)


def test_a_policy_that_fails_after_its_scores_leaves_the_state_as_it_was(device: Device) -> None:
    """The state of the stream whose fault it is; the others in its batch take their step."""
    policy = Hooked(after=fail_on_poison)
    lane, streams = Lane(MODEL, policy), [stream_of(policy, id) for id in "ab"]
    device.runner.start()
    for stream in streams:
        submit(device, stream, rows(4)).answer()
    settle(device)
    before = [device.state(lane, stream) for stream in streams]
    gate = hold(device.runner)
    endings = [submit(device, streams[0], rows(3, 1)), submit(device, streams[1], poisoned(2))]
    gate.open()
    assert [ending.answer().version for ending in endings] == [1, 1]
    settle(device)
    assert sorted(device.recorder.results()[-2:]) == ["applied", "failed"]
    assert [stream.version for stream in streams] == [2, 1]
    assert not same_state(device.state(lane, streams[0]), before[0])
    assert same_state(device.state(lane, streams[1]), before[1])
    assert submit(device, streams[1], rows(3)).answer().version == 1, "and it goes on from there"


def _first_key(step: Step, value: Tensor) -> Step:
    key = next(iter(step.state.weights))
    return Step(State(step.state.weights | {key: value}, step.state.memory), step.signals)


def _without_a_key(step: Step) -> Step:
    return Step(State(dict(list(step.state.weights.items())[1:]), step.state.memory))


def _wider(step: Step) -> Step:
    value = next(iter(step.state.weights.values()))
    return _first_key(step, torch.cat([value, value], 1))


@pytest.mark.parametrize(
    "policy",
    [Hooked(yields=2), Hooked(result=_without_a_key), Hooked(result=_wider)],
    ids=["yields twice", "loses a key", "changes a shape"],
)
def test_a_policy_that_breaks_its_contract_keeps_nothing(device: Device, policy: Hooked) -> None:
    stream = stream_of(policy)
    device.runner.start()
    assert submit(device, stream, rows(4)).answer().version == 0
    assert submit(device, stream, rows(4)).answer().version == 0
    settle(device)
    assert device.recorder.results() == ["failed", "failed"]
    assert same_state(device.state(Lane(MODEL, policy), stream), policy.init(device.engine.models[MODEL].source))


def test_a_state_that_is_not_finite_is_kept_from_its_own_stream_only(device: Device) -> None:
    def spoil_second(step: Step) -> Step:
        value = next(iter(step.state.weights.values())).clone()
        value[1:] = float("nan")
        return _first_key(step, value)

    policy = Hooked(result=spoil_second)
    sound, spoilt = stream_of(policy, "sound"), stream_of(policy, "spoilt")
    endings = [submit(device, one, rows(3)) for one in (sound, spoilt)]
    device.runner.start()
    assert [ending.answer().version for ending in endings] == [0, 0], "the scores were fine"
    settle(device)
    assert device.recorder.results() == ["applied", "rejected_nonfinite"]
    assert (sound.version, spoilt.version) == (1, 0)
    initial = policy.init(device.engine.models[MODEL].source)
    assert same_state(device.state(Lane(MODEL, policy), spoilt), initial)
    assert not same_state(device.state(Lane(MODEL, policy), sound), initial)


def test_scores_that_are_not_finite_are_an_error_and_adapt_nothing(device: Device) -> None:
    """The state it would keep is finite here, as a running mean's can be: the promise holds all the same."""

    def spoil_first(logits: Tensor) -> Tensor:
        return torch.cat([torch.full_like(logits[:1], float("nan")), logits[1:]])

    policy = Hooked(served=spoil_first)
    spoilt, sound = stream_of(policy, "spoilt"), stream_of(policy, "sound")
    endings = [submit(device, one, rows(3)) for one in (spoilt, sound)]
    device.runner.start()
    error = endings[0].error()
    assert isinstance(error, StepFailed)
    assert "left as it was" in str(error)
    assert endings[1].answer().version == 0
    settle(device)
    assert (spoilt.version, sound.version) == (0, 1), "the error says the stream was left as it was"
    assert device.recorder.results() == ["rejected_nonfinite", "applied"]
    assert same_state(device.state(Lane(MODEL, policy), spoilt), policy.init(device.engine.models[MODEL].source))


def test_the_thread_survives_an_engine_that_fails(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(plan: Plan, answer: AnswerJob) -> list[OpenStep]:
        answer(plan.jobs[0], StepFailed("told by the engine"))
        raise ZeroDivisionError("a bug of ours")

    device.runner.start()
    gate = hold(device.runner)
    with monkeypatch.context() as patch:
        patch.setattr(device.engine, "answer", broken)
        endings = [submit(device, stream_of(TENT, id), rows(2)) for id in "abc"]
        gate.open()
        errors = [str(ending.error()) for ending in endings]
        settle(device)
    assert errors[0] == "told by the engine", "who had been told is not told again"
    assert all("ZeroDivisionError: a bug of ours" in error for error in errors[1:])
    assert all(len(ending.calls) == 1 for ending in endings)
    assert submit(device, stream_of(TENT, "a"), rows(2)).answer().version == 0


def test_the_thread_survives_a_recorder_that_fails(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(stats: StepStats) -> None:
        raise ValueError("no such metric")

    monkeypatch.setattr(device.recorder, "step", broken)
    stream = stream_of(TENT)
    device.runner.start()
    assert [submit(device, stream, rows(2)).answer().version for _ in range(2)] == [0, 1]
    settle(device)
    assert stream.version == 2


def test_lanes_of_one_stream_take_turns(device: Device) -> None:
    """Adaptation switched off and on within a queue: other lanes, the same order, and the state rests meanwhile."""
    stream, plain, x = stream_of(TENT), Lane(MODEL, SourcePolicy()), rows(4)
    endings = [submit(device, stream, x, lane) for lane in (TENT_LANE, plain, TENT_LANE, plain)]
    device.runner.start()
    answers = [ending.answer() for ending in endings]
    assert [answer.adapted for answer in answers] == [True, False, True, False]
    assert [answer.version for answer in answers] == [0, 1, 1, 2]
    assert torch.equal(answers[1].logits, answers[3].logits)
    settle(device)
    assert device.recorder.results() == ["applied", "none", "applied", "none"]


def test_more_streams_than_slots_keep_their_states(source: tuple[Settings, dict[str, SourceModel]]) -> None:
    """States that had to leave the device come back as they were; a stateless lane needs no slots at all."""
    settings, models = source
    policy, answers = NormPolicy(mode="running", alpha=0.3), []
    for slots, evictions, tiers in ((2, 13, (2, 3)), (256, 0, (5, 0))):
        device = make_device(varied(settings, limits={"slots": slots}), models)
        device.runner.start()
        streams = [stream_of(policy, id) for id in "abcde"]
        answers.append([submit(device, stream, rows(3, turn)).answer() for turn in range(3) for stream in streams])
        assert device.runner.drain(TIMEOUT) == 0
        device.store.check_integrity()
        counts = device.store.counts()
        assert (counts["device"][0], counts["host"][0]) == tiers
        assert device.store.evictions == evictions
    cramped, roomy = answers
    assert [answer.version for answer in cramped] == [0] * 5 + [1] * 5 + [2] * 5
    assert all(torch.equal(one.logits, other.logits) for one, other in zip(cramped, roomy, strict=True))


def test_what_had_to_wait_too_long_is_answered_and_not_learned_from(
    source: tuple[Settings, dict[str, SourceModel]],
) -> None:
    """The requests may wait 30 s. After 20 s their step is shed; those that came later wait less, and are not."""
    now = 0.0
    device = make_device(*source, clock=lambda: now)
    streams = [stream_of(TENT, id) for id in "abc"]
    for stream in streams:
        submit(device, stream, rows(3), deadline=30.0)
    now = 20.0
    submit(device, streams[0], rows(3, 1), deadline=50.0)
    last = submit(device, streams[0], rows(3, 2), deadline=50.0)
    device.runner.start()
    assert last.answer().version == 1
    settle(device)
    assert [[job.result for job in step.jobs] for step in device.recorder.steps] == [
        ["shed"] * 3,
        ["applied"],
        ["applied"],
    ]
    assert [stream.version for stream in streams] == [2, 0, 0]
    assert device.runner.drain(TIMEOUT) == 0


def test_a_request_that_would_wait_in_vain_is_refused_at_once(source: tuple[Settings, dict[str, SourceModel]]) -> None:
    """A step took 500 s by this clock: each that waits or runs is expected to take as long. Commands do not count."""
    now = 0.0
    device = make_device(*source, clock=lambda: now)

    def slow(batch: Batch) -> None:
        nonlocal now
        now += 500.0

    stream, other = stream_of(Hooked(before=slow)), stream_of(TENT, "other")
    device.runner.start()
    submit(device, stream, rows(1)).answer()
    settle(device)
    gate = hold(device.runner)
    waiting = submit(device, other, rows(1), deadline=now + 16.0)
    device.runner.check_room(626.0)
    with pytest.raises(
        QueueFull, match=r"1 requests wait and 0 run, which takes about 500\.0 s; this one may wait 16 s"
    ):
        device.runner.check_room(16.0)
    with pytest.raises(QueueFull, match=r"may wait 624 s"):
        submit(device, other, rows(1), deadline=now + 624.0)
    assert device.runner.waiting == 1
    command(device, other, lambda: None)
    gate.open()
    assert waiting.answer().version == 0
    assert device.runner.drain(TIMEOUT) == 0


# Open steps


def held_stream(gate: Gate, id: str = "held") -> Stream:
    """A stream of TENT whose second half is held at the gate, before its way back, where it can be interrupted."""
    return stream_of(Hooked(after=lambda batch: gate.pass_through()), id)


def stale(policy: Policy, id: str = "stale", steps: int = 4) -> Stream:
    stream = stream_of(policy, id)
    stream.consistency = Consistency(mode="stale", steps=steps)
    return stream


def test_a_lone_request_is_answered_in_the_midst_of_an_open_step(device: Device) -> None:
    """One that came while another stream adapts: its answer leaves before that is done, and both adapt."""
    gate, order = Gate(), list[str]()

    def adapted(step: Step) -> Step:
        order.append("adapted")
        return step

    def answered(answer: Answer | None, error: Exception | None) -> None:
        order.append("answered")
        ending(answer, error)

    long = stream_of(Hooked(after=lambda batch: gate.pass_through(), result=adapted), "long")
    lone, ending = stream_of(TENT, "lone"), Ending()
    device.runner.start()
    submit(device, long, rows(3)).answer()
    gate.reached()
    device.runner.submit(Job(lone, answered, TENT_LANE, rows(2)))
    gate.open()
    assert ending.answer().version == 0
    settle(device)
    assert order == ["answered", "adapted"]
    assert (long.version, lone.version) == (1, 1)
    assert [stats.jobs[0].stream for stats in device.recorder.steps] == [long, lone], "finished in their order"


def test_interrupted_streams_end_as_uninterrupted_ones(
    device: Device, source: tuple[Settings, dict[str, SourceModel]]
) -> None:
    """Versions, scores and states, bit for bit."""
    gate = Gate()
    held, others = held_stream(gate), [stream_of(TENT, id) for id in "ab"]
    device.runner.start()
    first = submit(device, held, rows(3))
    gate.reached()
    endings = [submit(device, other, rows(4, seed)) for seed, other in enumerate(others)]
    gate.open()
    scores = [first.answer().logits, *(ending.answer().logits for ending in endings)]
    settle(device)
    calm = make_device(*source)
    calm.runner.start()
    twin, twins = held_stream(gate), [stream_of(TENT, id) for id in "ab"]
    expected = [submit(calm, twin, rows(3)).answer().logits]
    settle(calm)
    assert len(device.recorder.steps) == 2, "the others were merged"
    pause = hold(calm.runner)
    endings = [submit(calm, other, rows(4, seed)) for seed, other in enumerate(twins)]
    pause.open()
    expected += [ending.answer().logits for ending in endings]
    settle(calm)
    assert all(torch.equal(one, other) for one, other in zip(scores, expected, strict=True))
    for one, other in zip([held, *others], [twin, *twins], strict=True):
        assert one.version == other.version == 1
        lanes = Lane(MODEL, one.policy), Lane(MODEL, other.policy)
        assert same_state(device.state(lanes[0], one), calm.state(lanes[1], other))
    assert calm.runner.drain(TIMEOUT) == 0


def test_a_command_waits_for_open_steps(device: Device) -> None:
    """Of its own stream and of others, though answers go on leaving."""
    gate, seen = Gate(), list[int]()
    held, other = held_stream(gate), stream_of(TENT, "other")
    device.runner.start()
    submit(device, held, rows(3)).answer()
    gate.reached()
    before = submit(device, other, rows(2))
    reset = command(device, stream_of(TENT, "third"), lambda: seen.extend([held.version, other.version]))
    gate.open()
    assert before.answer().version == 0
    reset.ended()
    assert seen == [1, 1]


def test_a_drain_finishes_open_steps(device: Device) -> None:
    """What was answered is learned from; what came into the midst is answered."""
    gate = Gate()
    held, other = held_stream(gate), stream_of(TENT, "other")
    device.runner.start()
    submit(device, held, rows(3)).answer()
    gate.reached()
    waiting = submit(device, other, rows(2))
    thread, given_up = draining(device, TIMEOUT)
    gate.open()
    thread.join(TIMEOUT)
    assert given_up == [0]
    assert waiting.answer().version == 0
    assert (held.version, other.version) == (1, 1)
    assert not device.runner._open
    assert not any(states.leased for states in device.store._lanes.values())


def test_a_drain_that_is_out_of_time_finishes_open_steps_all_the_same(device: Device) -> None:
    """And gives up what was not answered."""
    gate = Gate()
    held, other = held_stream(gate), stream_of(TENT, "other")
    device.runner.start()
    submit(device, held, rows(3)).answer()
    gate.reached()
    waiting = submit(device, other, rows(2))
    thread, given_up = draining(device, 0.0)
    assert isinstance(waiting.error(), Unavailable)
    gate.open()
    thread.join(TIMEOUT)
    assert given_up == [1]
    assert (held.version, other.version) == (1, 0)
    assert device.scheduler.idle


def test_a_shutdown_saves_what_open_steps_learned(
    source: tuple[Settings, dict[str, SourceModel]], tmp_path: Path
) -> None:
    settings, models = source
    device, gate = make_device(varied(settings, state={"folder": str(tmp_path)}), models), Gate()
    stream = stream_of(TENT)
    device.keeper.open()
    device.keeper.start()
    device.runner.start()
    device.runner.submit(Job(stream, lambda *_: gate.pass_through(), TENT_LANE, rows(3)))
    gate.reached()
    thread, given_up = draining(device, 0.0)
    gate.open()
    thread.join(TIMEOUT)
    assert given_up == [0]
    assert stream.version == 1
    assert device.keeper.flush(TIMEOUT)
    assert (stream.saved.version, stream.unsaved) == (1, 0)
    device.keeper.close(Shutdown(True))


def test_streams_that_came_one_by_one_share_steps_under_load(device: Device) -> None:
    """32 clients, the next of whom comes when the last one was answered; from then on each asks again at once."""
    streams, asked, done = [stream_of(TENT, str(number)) for number in range(32)], Counter[Stream](), threading.Event()
    for stream in streams:
        stream.durability = NOT_STORED

    def ask(stream: Stream) -> None:
        asked[stream] += 1
        x = rows(1, asked[stream])
        device.runner.submit(Job(stream, lambda answer, error: answered(stream), TENT_LANE, x))

    def answered(stream: Stream) -> None:
        if len(asked) < 32:
            ask(streams[len(asked)])
        elif asked.total() == 32:
            for one in streams:
                ask(one)
        elif asked[stream] < 20:
            ask(stream)
        elif asked.total() == 640:
            done.set()

    device.runner.start()
    ask(streams[0])
    assert done.wait(TIMEOUT)
    settle(device)
    assert [stream.version for stream in streams] == [20] * 32
    sizes = [len(step.jobs) for step in device.recorder.steps]
    assert sizes[:32] == [1] * 32
    assert min(sizes[40:]) >= 8, sizes


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_a_stale_stream_is_answered_with_the_version_it_has(device: Device, steps: int) -> None:
    """In the midst of its own step, up to so many requests; a strict one waits. Both learn the same."""
    gate, policy = Gate(), Hooked()
    held = stale(replace(policy, after=lambda batch: gate.pass_through()), steps=max(steps, 1))
    if not steps:
        held.consistency = Consistency()
    device.runner.start()
    endings = [submit(device, held, rows(3, 0))]
    gate.reached()
    endings += [submit(device, held, rows(3, seed)) for seed in range(1, 6)]
    gate.open()
    versions = [ending.answer().version for ending in endings]
    assert versions[: steps + 1] == [0] * (steps + 1)
    assert versions[steps + 1] == 1
    assert all(number - version <= steps for number, version in enumerate(versions))
    settle(device)
    assert held.version == held.requests == 6
    strict = stream_of(TENT, "stale")
    for seed in range(6):
        submit(device, strict, rows(3, seed)).answer()
    settle(device)
    assert same_state(device.state(Lane(MODEL, held.policy), held), device.state(TENT_LANE, strict))


def test_no_test_policy_is_registered() -> None:
    assert "hooked" not in adapters.policies()


@pytest.mark.parametrize(("longest", "results"), [(1e9, ["none", "applied"]), (-1.0, ["applied", "none"])])
def test_a_step_that_is_open_for_long_goes_before_answers(
    device: Device, monkeypatch: pytest.MonkeyPatch, longest: float, results: list[str]
) -> None:
    """Requests of streams that do not learn could come for ever."""
    monkeypatch.setattr(runner_module, "LONGEST_OPEN", longest)
    device.runner.start()
    gate = hold(device.runner)
    adapting, frozen = stream_of(TENT, "a"), stream_of(SourcePolicy(), "b")
    endings = [submit(device, adapting, rows(4)), submit(device, frozen, rows(4))]
    gate.open()
    assert [ending.answer().version for ending in endings] == [0, 0]
    settle(device)
    assert device.recorder.results() == results


def test_clients_that_always_come_back_keep_no_step_open(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """They come in the midst of it: whenever a frozen answer leaves, the next request is there."""
    ticks = itertools.count()
    monkeypatch.setattr(device.runner, "_clock", lambda: next(ticks) * 0.01)
    frozen, most, answered = stream_of(SourcePolicy(), "b"), 1000, itertools.count(1)
    over, interrupt = threading.Event(), device.runner._interrupt

    def again(answer: Answer | None = None, error: Exception | None = None) -> None:
        if "applied" in device.recorder.results() or next(answered) > most:
            over.set()
        else:
            device.runner.submit(Job(frozen, again, Lane(MODEL, frozen.policy), rows(1)))

    def first_time() -> None:
        if not came:
            came.append(True)
            again()
        interrupt()

    came: list[bool] = []
    monkeypatch.setattr(device.runner, "_interrupt", first_time)
    device.runner.start()
    submit(device, stream_of(TENT, "a"), rows(4))
    assert over.wait(20)
    assert 2 < next(answered) < most
