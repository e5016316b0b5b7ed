"""Steps cut in two: open ones wait and are interrupted, answers come from behind, and every state is as without."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Generator, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from adapters import Policy
from adapters.base import BATCH_NORM, Batch, Norm, Scope, Segments, Source, State, Step
from adapters.cotta import Cotta
from adapters.eata import Eata
from adapters.norm import NormPolicy
from adapters.rmt import Rmt
from adapters.rotta import Rotta
from adapters.sar import Sar
from adapters.source import SourcePolicy
from adapters.tent import Tent
from tests.serving import CPU, LR, MODEL, Loaded, load, rows, same_state, stream_of
from tta_server.drift.benefit import FIGURES, Judge
from tta_server.drift.monitor import Monitor
from tta_server.engine.engine import Engine, OpenStep
from tta_server.engine.forward import StreamwiseNetwork
from tta_server.engine.guarding import make_guard
from tta_server.engine.norm import Pass
from tta_server.engine.source import SourceModel, load_model
from tta_server.errors import StepFailed, TtaError
from tta_server.settings import GuardSettings, InputSettings, load_settings
from tta_server.state.memory import Budget
from tta_server.state.records import StoreFailed
from tta_server.state.store import Lease, StateStore
from tta_server.trust.guard import State as Standing
from tta_server.types import Answer, Job, Lane, Plan, StepStats, Stream

TENT = Tent(optimiser="adam", lr=LR)
POISON = 1.0
"""A pixel value that ``rows`` never draws."""


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """The tiny model."""
    return load(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tiny(loaded: Loaded) -> SourceModel:
    return loaded[1][MODEL]


@pytest.fixture(scope="module")
def digits(prepared_digits: Path) -> SourceModel:
    """The bundled digits model, with what policies need of the source."""
    return load_model("digits", load_settings(prepared_digits), CPU)


@dataclass(frozen=True)
class Fragile(Policy):
    """TENT that fails on poison, before its scores or after them. Not registered."""

    name = "fragile"
    scope = Scope.NORM

    early: bool = False

    @property
    def norm(self) -> Norm:
        return BATCH_NORM

    def init(self, source: Source) -> State:
        return TENT.init(source)

    def step(self, source: Source, state: State, batch: Batch) -> Generator[Tensor, None, Step]:
        poisoned = bool((batch.x == POISON).any())
        if poisoned and self.early:
            raise RuntimeError("poison")
        tent = TENT.step(source, state, batch)
        yield next(tent)
        if poisoned:
            raise RuntimeError("poison")
        try:
            next(tent)
        except StopIteration as end:
            step: Step = end.value
            return step
        raise AssertionError("TENT yields once")


@dataclass
class World:
    """An engine, its open steps, the oldest first, and what became of its jobs."""

    model: SourceModel
    policy: Policy = TENT
    shadow: float = 0.0
    slots: int = 64
    engine: Engine = field(init=False)
    opened: deque[OpenStep] = field(default_factory=deque)
    named: dict[str, Stream] = field(default_factory=dict)
    answers: dict[Stream, list[Answer | TtaError]] = field(default_factory=dict)
    results: dict[Stream, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        store = StateStore(Budget(self.slots), CPU)
        self.engine = Engine({self.model.name: self.model}, store, Monitor(20.0), self.shadow)

    def stream(self, id: str) -> Stream:
        """The one of this name."""
        if id not in self.named:
            self.named[id] = replace(stream_of(self.policy, id), model=self.model.name, digest=self.model.digest)
        return self.named[id]

    def streams(self, ids: Iterable[str]) -> list[Stream]:
        return [self.stream(id) for id in ids]

    def _plan(self, requests: tuple[tuple[Stream, Tensor], ...], shed: bool, behind: bool, lane: Lane | None) -> Plan:
        lane = lane or requests[0][0].lane
        return Plan(lane, [Job(stream, lambda *_: None, lane, x) for stream, x in requests], shed, behind)

    def _answered(self, job: Job, answer: Answer | TtaError) -> None:
        self.answers.setdefault(job.stream, []).append(answer)

    def _kept(self, stats: StepStats) -> StepStats:
        for job in stats.jobs:
            self.results.setdefault(job.stream, []).append(job.result)
        return stats

    def step(self, *requests: tuple[Stream, Tensor]) -> StepStats:
        """A whole step."""
        return self._kept(self.engine.step(self._plan(requests, False, False, None), self._answered))

    def open(
        self, *requests: tuple[Stream, Tensor], shed: bool = False, behind: bool = False, lane: Lane | None = None
    ) -> list[OpenStep]:
        """The first half of one."""
        steps = self.engine.answer(self._plan(requests, shed, behind, lane), self._answered)
        self.opened += steps
        return steps

    def finish(self, pause: Callable[[], None] | None = None) -> StepStats:
        """The second half of the oldest. What it is interrupted by is not interrupted itself, as in the runner."""
        within = False

        def once() -> None:
            nonlocal within
            if pause is not None and not within:
                within = True
                pause()
                within = False

        return self._kept(self.engine.finish(self.opened.popleft(), once))

    def state(self, stream: Stream) -> State:
        """A copy of its state."""
        return self.engine.store.export(stream.lane, stream)

    def scores(self, id: str) -> Tensor:
        """Of its newest answer."""
        answer = self.answers[self.stream(id)][-1]
        assert isinstance(answer, Answer)
        return answer.logits

    def check(self) -> None:
        """Nothing is leased or out of place."""
        self.engine.store.check_integrity()
        assert not any(states.leased for states in self.engine.store._lanes.values())


def same(one: World, other: World) -> None:
    """Scores, results, versions, counts and states of all streams are equal, bit for bit."""
    assert one.named.keys() == other.named.keys()
    for id in one.named:
        a, b = one.stream(id), other.stream(id)
        for x, y in zip(one.answers[a], other.answers[b], strict=True):
            assert isinstance(x, Answer)
            assert isinstance(y, Answer)
            assert torch.equal(x.logits, y.logits)
            assert (x.version, x.served) == (y.version, y.served)
        assert one.results[a] == other.results[b]
        assert (a.version, a.requests, a.failures) == (b.version, b.requests, b.failures)
        assert same_state(one.state(a), other.state(b))
    one.check()
    other.check()


def draw(model: SourceModel, count: int, seed: int) -> Tensor:
    """Rows for the tiny model, or digits of some brightness."""
    if model.name == MODEL:
        return rows(count, seed)
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 1, 8, 8, generator=generator) * (0.4 + 0.1 * (seed % 6))


def poisoned(count: int, seed: int = 0) -> Tensor:
    x = rows(count, seed)
    x[0, 0, 0, 0] = POISON
    return x


POLICIES: dict[str, Policy] = {
    "tent": TENT,
    "tent-momentum": Tent(optimiser="sgd", lr=LR, momentum=0.9),
    "tent-window": Tent(window=8, lr=LR),
    "tent-median": Tent(statistics="median", lr=LR),
    "norm-running": NormPolicy(mode="running", alpha=0.3),
    "eata": Eata(),
    "sar": Sar(),
    "rotta": Rotta(capacity=8, update_every=8),
    "rmt": Rmt(),
    "rmt-norm": Rmt(scope=Scope.NORM),
    "cotta": Cotta(augmentations=4),
    "cotta-norm": Cotta(scope=Scope.NORM, augmentations=4),
}

every = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)


# Halves apart


@every
def test_the_halves_apart_are_a_step(digits: SourceModel, policy: Policy) -> None:
    """Of several streams together, with the source shadow, over several turns."""
    whole, cut = World(digits, policy, shadow=1.0), World(digits, policy, shadow=1.0)
    for turn in range(3):
        parts = [draw(digits, 4 + 3 * number, 10 * turn + number) for number in range(2)]
        whole.step(*zip(whole.streams("ab"), parts, strict=True))
        versions = [stream.version for stream in cut.streams("ab")]
        (step,) = cut.open(*zip(cut.streams("ab"), parts, strict=True))
        assert step.learns
        assert [stream.version for stream in cut.streams("ab")] == versions, "nothing is learned before the second half"
        cut.finish()
    same(whole, cut)


@pytest.mark.parametrize("policy", [TENT, Tent(window=8, lr=LR), NormPolicy(mode="running", alpha=0.3)], ids=str)
@pytest.mark.parametrize("order", ["abc", "cab", "bca"])
def test_several_steps_are_open_at_once(tiny: SourceModel, policy: Policy, order: str) -> None:
    """Answered in any order, finished as they were answered: each as by itself."""
    whole, cut = World(tiny, policy), World(tiny, policy)
    for turn in range(4):
        for id in "abc":
            whole.step((whole.stream(id), rows(5, 10 * turn + ord(id))))
        for id in order:
            cut.open((cut.stream(id), rows(5, 10 * turn + ord(id))))
        while cut.opened:
            cut.finish()
    same(whole, cut)


def test_an_open_step_with_nothing_to_learn_says_so(tiny: SourceModel) -> None:
    """Of the plain source, or shed; it is not kept waiting. Behind others it has to wait for them."""
    world = World(tiny)
    (plain,) = world.open((world.stream("a"), rows(3)), lane=world.stream("a").lane._replace(policy=SourcePolicy()))
    (shed,) = world.open((world.stream("b"), rows(3)), shed=True)
    assert (plain.learns, shed.learns) == (False, False)
    (first,) = world.open((world.stream("c"), rows(3)))
    (second,) = world.open((world.stream("c"), rows(3)), shed=True, behind=True)
    assert (first.learns, second.learns) == (True, True)
    while world.opened:
        world.finish()
    assert world.results[world.stream("c")] == ["applied", "shed"]
    world.check()


def test_a_merged_step_that_fails_leaves_a_step_for_each(tiny: SourceModel) -> None:
    """But for the one whose fault it was, which is answered with its error."""
    world = World(tiny, Fragile(early=True))
    a, b, c = world.streams("abc")
    steps = world.open((a, rows(3, 1)), (b, poisoned(3)), (c, rows(3, 2)))
    assert [[job.stream for job in step.jobs] for step in steps] == [[a], [c]]
    assert isinstance(world.answers[b][0], StepFailed)
    world.finish()
    world.finish()
    assert [one.version for one in (a, b, c)] == [1, 0, 1]
    world.check()


# Interrupted


class Interruptions:
    """Answers requests of other streams at chosen pauses of the steps that are finished."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.places: set[str] = set()
        """Where it answered: on the way ``forth`` or ``back``."""
        self.asked: list[tuple[str, Tensor]] = []

    def finish(self, chosen: Collection[int]) -> int:
        """Finishes the oldest step, with an answer to somebody else at these of its pauses; returns how many it had."""
        pauses, finished = 0, {job.stream for job in self.world.opened[0].jobs}

        def pause() -> None:
            nonlocal pauses
            assert torch.is_grad_enabled()
            if pauses in chosen:
                self.places.add("back" if self.world.model.network._conduit.current is None else "forth")
                self._ask(finished)
            pauses += 1

        self.world.finish(pause)
        assert torch.is_grad_enabled()
        return pauses

    def _ask(self, finished: set[Stream]) -> None:
        under_way = finished | {job.stream for step in self.world.opened for job in step.jobs}
        id = next(id for id in "uvwxyz" if self.world.stream(id) not in under_way)
        x = draw(self.world.model, 5, 1000 + len(self.asked))
        self.asked.append((id, x))
        self.world.open((self.world.stream(id), x))


@pytest.mark.parametrize("name", POLICIES)
def test_an_interrupted_step_is_as_an_uninterrupted_one(digits: SourceModel, name: str) -> None:
    """On the way forward and on the way back; so are those that came into the midst of it, which are interrupted, too.
    Scores, results, versions and states of all streams are equal bit for bit."""
    busy, calm = (World(digits, POLICIES[name], shadow=1.0) for _ in range(2))
    interruptions, pauses = Interruptions(busy), 0
    for turn in range(4):
        parts, seen = (
            [draw(digits, 4 + 3 * number, 10 * turn + number) for number in range(2)],
            len(interruptions.asked),
        )
        for world in (busy, calm):
            world.open(*zip(world.streams("ab"), parts, strict=True))
        calm.finish()
        spread = np.linspace(0, max(pauses - 1, 0), 5).round().astype(int).tolist()
        pauses = max(pauses, interruptions.finish(spread if turn else ()))
        if busy.opened:
            interruptions.finish({1})
        while busy.opened:
            busy.finish()
        for id, x in interruptions.asked[seen:]:
            calm.step((calm.stream(id), x))
    assert interruptions.places == PLACES.get(name, {"back"})
    same(busy, calm)


PLACES: dict[str, set[str]] = {
    "norm-running": set(),
    **{name: {"back", "forth"} for name in ("tent-window", "sar", "rotta", "rmt-norm", "cotta-norm")},
}
"""Where a second half can be interrupted, if not on the way back alone: the way forth of what a policy runs after its
scores, but not that of networks of the streams' own."""


@pytest.mark.parametrize("early", [True, False])
def test_a_request_that_fails_in_the_midst_of_a_step_costs_only_itself(tiny: SourceModel, early: bool) -> None:
    """Before its scores, or after them, when it is its turn."""
    busy, calm = (World(tiny, Fragile(early=early)) for _ in range(2))
    for seed in range(2):
        calm.step((calm.stream("a"), rows(4, seed)))
    busy.step((busy.stream("a"), rows(4, 0)))
    busy.open((busy.stream("a"), rows(4, 1)))
    bad: list[Stream] = []

    def pause() -> None:
        bad.append(busy.stream(f"bad{len(bad)}"))
        busy.open((bad[-1], poisoned(3)))

    busy.finish(pause)
    assert len(bad) == 2, "once for each norm"
    while busy.opened:
        busy.finish()
    for stream in bad:
        assert isinstance(busy.answers[stream][0], StepFailed) == early
        assert (stream.version, busy.results.get(stream)) == (0, None if early else ["failed"])
        del busy.named[stream.id]
    same(busy, calm)


def test_a_pass_in_the_midst_of_another_leaves_it_its_features() -> None:
    """Also where a norm comes after the head: they are what entered the head in the own pass."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3), nn.BatchNorm1d(3))
    network = StreamwiseNetwork(module, InputSettings(shape=(6,)), "3", CPU)
    x, other = torch.randn(5, 6), torch.randn(2, 6)
    alone = network.run(Pass(Segments([5], CPU), {}, BATCH_NORM), x)
    inside: list[Tensor] = []
    with network.pausing(lambda: inside.append(network.run(Pass(Segments([2], CPU)), other).logits)):
        output = network.run(Pass(Segments([5], CPU), {}, BATCH_NORM), x)
    assert len(inside) == 2
    assert torch.equal(output.logits, alone.logits)
    assert torch.equal(output.features, alone.features)


# Behind


STEPS = 6


def part(number: int, poison: int | None) -> Tensor:
    return poisoned(4, number) if number == poison else rows(4, number)


def strictly(world: World, poison: int | None) -> tuple[list[State], list[int], dict[tuple[int, int], Tensor]]:
    """What a stream's requests come to in order: its state and version after so many of them, and the scores that each
    of the next, by its number, would get then."""
    stream, states, versions, scores = world.stream("a"), [], [], {}
    for over in range(STEPS + 1):
        for number in range(over, STEPS):
            world.open((stream, part(number, poison)), shed=True)
            world.finish()
            scores[over, number] = world.scores("a")
        states.append(world.state(stream))
        versions.append(stream.version)
        if over < STEPS:
            world.step((stream, part(over, poison)))
    return states, versions, scores


BEHIND: dict[str, tuple[Policy, int | None]] = {
    "tent": (TENT, None),
    "window": (Tent(window=8, lr=LR), None),
    "running": (NormPolicy(mode="running", alpha=0.3), None),
    "cotta": (Cotta(augmentations=2), None),
    "poison": (Fragile(), 2),
}


@pytest.mark.parametrize(("policy", "poison"), BEHIND.values(), ids=BEHIND)
def test_from_behind_the_steps_are_the_strict_ones(tiny: SourceModel, policy: Policy, poison: int | None) -> None:
    """Whenever the requests of two streams are answered, in the midst of steps or between them: each from the version
    that it tells, and after every step the state is that of the strict order, bit for bit."""
    states, versions, scores = strictly(World(tiny, policy), poison)
    assert versions[-1] == STEPS - (poison is not None)

    @settings(max_examples=25, deadline=None, derandomize=True)
    @given(st.lists(st.sampled_from(["a", "a", "b", "finish", "finish", "amidst"]), min_size=6, max_size=20))
    def check(moves: list[str]) -> None:
        world, asked, over = World(tiny, policy), {"a": 0, "b": 0}, {"a": 0, "b": 0}
        world.stream("b").random_key = world.stream("a").random_key

        def ask(id: str) -> None:
            number = asked[id]
            if number == STEPS:
                return
            world.open((world.stream(id), part(number, poison)), behind=number > over[id])
            asked[id] += 1
            (*_, answer) = world.answers[world.stream(id)]
            assert isinstance(answer, Answer)
            assert answer.version == versions[over[id]]
            assert torch.equal(answer.logits, scores[over[id], number])

        def finish(*asking: str) -> None:
            stream, left = world.opened[0].jobs[0].stream, list(asking)
            world.finish(lambda: ask(left.pop()) if left else None)
            over[stream.id] += 1
            assert stream.version == versions[over[stream.id]]
            assert same_state(world.state(stream), states[over[stream.id]])

        for move in moves:
            if move in asked:
                ask(move)
            elif world.opened:
                finish(*("ab" if move == "amidst" else ""))
        while world.opened:
            finish()
        for id in "ab":
            wanted = ["failed" if number == poison else "applied" for number in range(asked[id])]
            assert world.results.get(world.stream(id), []) == wanted
            assert world.stream(id).requests == asked[id]
        world.check()

    check()


def test_merged_steps_from_behind_are_the_strict_ones(digits: SourceModel) -> None:
    """Where one fails for one stream, the other takes its own."""
    strict, stale = World(digits), World(digits)
    parts = [[draw(digits, 4 + 3 * number, 10 * turn + number) for number in range(2)] for turn in range(4)]
    for turn in range(4):
        strict.step(*zip(strict.streams("ab"), parts[turn], strict=True))
        stale.open(*zip(stale.streams("ab"), parts[turn], strict=True), behind=turn > 0)
    while stale.opened:
        stale.finish()
    for one, other in zip(strict.streams("ab"), stale.streams("ab"), strict=True):
        assert one.version == other.version == 4
        assert same_state(strict.state(one), stale.state(other))
    assert [getattr(answer, "version", None) for answer in stale.answers[stale.stream("a")]] == [0] * 4
    stale.check()


def test_a_stream_behind_makes_room_and_comes_back(tiny: SourceModel) -> None:
    """Its slot is pinned by its first step, not by those behind it; the states are the strict ones all the same."""
    strict, stale = World(tiny), World(tiny, slots=2)
    for turn in range(3):
        strict.step((strict.stream("a"), rows(4, turn)))
        stale.open((stale.stream("a"), rows(4, turn)), behind=turn > 0)
    lane = stale.stream("a").lane
    states = stale.engine.store._lanes[lane]
    assert states.leased == {stale.stream("a")}
    stale.open((stale.stream("b"), rows(4, 7)))
    (refused,) = (stale.stream("c"),)
    assert stale.open((refused, rows(4, 8))) == []
    assert isinstance(stale.answers[refused][0], StepFailed)
    stale.finish()
    assert states.leased == {stale.stream("b")}
    stale.open((refused, rows(4, 8)))
    assert stale.engine.store.tier(lane, stale.stream("a")) == "host", "its slot is another's"
    behind = [stale.opened.popleft(), stale.opened.popleft()]
    stale.finish()
    stale.finish()
    stale.opened += behind
    stale.finish()
    stale.finish()
    assert stale.stream("a").version == 3
    assert same_state(strict.state(strict.stream("a")), stale.state(stale.stream("a")))
    stale.check()


def test_a_state_that_cannot_be_read_again_costs_its_own_step_only(
    tiny: SourceModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answers have left. Who else was answered in this step learns from it, and both requests are counted."""
    strict, stale = World(tiny), World(tiny)
    for turn in range(2):
        strict.step((strict.stream("b"), rows(5, turn)))
        stale.open((stale.stream("a"), rows(4, turn)), (stale.stream("b"), rows(5, turn)), behind=turn > 0)
    stale.finish()
    lease = stale.engine.store.lease

    def broken(lane: Lane, streams: Sequence[Stream]) -> tuple[Lease, State]:
        if stale.stream("a") in streams:
            raise StoreFailed("the state of stream 'a' cannot be read")
        return lease(lane, streams)

    with monkeypatch.context() as patch:
        patch.setattr(stale.engine.store, "lease", broken)
        stale.finish()
    a, b = stale.streams("ab")
    assert (stale.results[a], stale.results[b]) == (["applied", "failed"], ["applied", "applied"])
    assert (a.version, a.requests, b.version, b.requests) == (1, 2, 2, 2)
    stale.check()


# Behind, with a guard


def guarded(model: SourceModel, shadow: float = 0.0, **values: object) -> tuple[World, Stream]:
    """A stream whose guard's judge likes all it sees."""
    world = World(replace(model, judge=Judge(np.zeros(len(FIGURES)), 0.5, 0.1)), shadow=shadow)
    stream = world.stream("a")
    small = {"shadow_rows": 8, "canary_rows": 8, "cooldown_rows": 8, "least_benefit": 0.1}
    stream.guard = make_guard(GuardSettings.model_validate(small | values))
    return world, stream


def test_in_the_shadow_the_source_answers_from_behind_and_the_stream_learns(tiny: SourceModel) -> None:
    """The same steps as in order."""
    (strict, one), (stale, other) = (guarded(tiny, shadow_rows=10**6) for _ in range(2))
    for turn in range(4):
        strict.step((one, rows(4, turn)))
        stale.open((other, rows(4, turn)), behind=turn > 0)
    while stale.opened:
        stale.finish()
    assert strict.results[one] == stale.results[other] == ["applied"] * 4
    assert same_state(strict.state(one), stale.state(other))
    for x, y in zip(strict.answers[one], stale.answers[other], strict=True):
        assert isinstance(x, Answer)
        assert isinstance(y, Answer)
        assert (x.served, y.served) == ("source", "source")
        assert torch.equal(x.logits, y.logits), "the source has no versions"
    assert [getattr(answer, "version", None) for answer in stale.answers[other]] == [0] * 4


def test_an_active_stream_is_answered_from_behind_as_adapted(tiny: SourceModel) -> None:
    world, stream = guarded(tiny)
    assert stream.guard is not None
    for turn in range(6):
        world.step((stream, rows(8, turn)))
    assert stream.guard.state is Standing.ACTIVE
    for turn in range(3):
        world.open((stream, rows(4, 10 + turn)), behind=turn > 0)
    while world.opened:
        world.finish()
    answers = world.answers[stream][6:]
    assert [(getattr(one, "served", ""), getattr(one, "version", -1)) for one in answers] == [("adapted", 6)] * 3
    assert (stream.version, stream.guard.state) == (9, Standing.ACTIVE)
    assert world.results[stream] == ["applied"] * 9
    world.check()


def test_a_stream_that_is_frozen_meanwhile_learns_nothing_more(tiny: SourceModel) -> None:
    """What was answered before, too, though the guard had let it learn then."""
    world, stream = guarded(tiny)
    assert stream.guard is not None
    for turn in range(3):
        world.open((stream, rows(4, turn)), behind=turn > 0)
    world.finish()
    frozen = world.state(stream)
    stream.guard.put(Standing.FROZEN)
    world.finish()
    world.finish()
    assert world.results[stream] == ["applied", "vetoed", "vetoed"]
    assert stream.version == 1
    assert same_state(world.state(stream), frozen)
    world.check()


def test_after_a_reset_nothing_is_learned_from_what_was_answered_before(tiny: SourceModel) -> None:
    """The guard decides on it at the third request; the fourth is answered before that is done, from a state that is
    gone when its turn to learn comes, and so is what was known of it. It is reset once."""
    world, stream = guarded(tiny, reset_rows=8, shadow_rows=10**6)
    for turn in range(2):
        world.step((stream, rows(4, turn)))
    assert stream.version == 2
    strict, other = guarded(tiny, reset_rows=8, shadow_rows=10**6)
    for turn in range(3):
        strict.step((other, rows(4, turn)))
    for turn in (2, 3):
        world.open((stream, rows(4, turn)), behind=turn > 2)
    world.finish()
    assert stream.version == 0, "it was reset"
    world.finish()
    assert world.results[stream] == ["applied", "applied", "vetoed", "vetoed"]
    assert stream.version == 0
    assert same_state(world.state(stream), world.state(world.stream("fresh")))
    world.step((stream, rows(4, 4)))
    assert (world.results[stream][-1], stream.version) == ("applied", 1)
    assert stream.guard is not None
    assert other.guard is not None
    assert stream.guard.resets == other.guard.resets
    world.check()


class OnSelf(nn.Module):
    """Keeps its skip connection on itself."""

    def __init__(self) -> None:
        super().__init__()
        self.bn1, self.bn2, self.head = nn.BatchNorm1d(6), nn.BatchNorm1d(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.skip = x
        scores: Tensor = self.head(self.bn2(self.bn1(x).relu()) + self.skip)
        return scores


@pytest.mark.parametrize("keeps", [True, False])
def test_a_network_that_keeps_values_outside_of_a_pass_is_found_out(keeps: bool) -> None:
    module: nn.Module = OnSelf()
    if not keeps:
        module = nn.Sequential(OrderedDict(bn1=nn.BatchNorm1d(6), relu=nn.ReLU(), head=nn.Linear(6, 3)))
    spec = InputSettings(shape=(6,))
    network = StreamwiseNetwork(module, spec, "head", torch.device("cpu"))
    affine = {f"bn1.{kind}": getattr(module.bn1, kind).detach().unsqueeze(0) for kind in ("weight", "bias")}
    network.try_pauses(spec, affine)
    assert network._conduit.only_on_the_way_back is keeps
