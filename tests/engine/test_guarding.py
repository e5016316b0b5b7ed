"""Guards at work in the engine: who is served what, whose step is kept, and that no guard minds other streams."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from adapters import Policy
from adapters.base import State as Weights
from adapters.eata import Eata
from adapters.lame import Lame
from adapters.norm import NormPolicy
from adapters.source import SourcePolicy
from adapters.tent import Tent
from tests.serving import CPU, same_state
from tta_server import corruptions
from tta_server.demo.data import held_out
from tta_server.drift.benefit import FIGURES, Judge
from tta_server.drift.monitor import Monitor
from tta_server.engine.engine import Engine
from tta_server.engine.guarding import GOOD_STEPS, make_guard
from tta_server.engine.run import PolicyRun
from tta_server.engine.source import SourceModel, load_model
from tta_server.engine.watch import Served, Watch
from tta_server.settings import GuardSettings, load_settings
from tta_server.state.memory import Budget
from tta_server.state.records import Record
from tta_server.state.store import StateStore
from tta_server.trust.guard import Guard, State
from tta_server.types import Answer, Job, Lane, Origin, Plan, StepStats, Stream

DEMO = Path(__file__).parent.parent.parent / "tta_server" / "demo" / "config.yaml"
LR = 0.02
"""Large enough that a few steps show."""
TENT = Tent(optimiser="adam", lr=LR)
AUDIT = {"kind": "audit", "q": 1.0, "eps": 0.0, "c": 10.0, "alpha": 0.5}


@pytest.fixture(scope="module")
def judged() -> SourceModel:
    """The demo's model with the judge that comes with it."""
    return load_model("digits", load_settings(DEMO), CPU)


def estimating(model: SourceModel, benefit: float) -> SourceModel:
    """The model with a judge that is of one mind, once anything was compared."""
    return replace(model, judge=Judge(np.zeros(len(FIGURES)), benefit, 0.1))


@pytest.fixture(scope="module")
def digits(judged: SourceModel) -> SourceModel:
    """The model with a judge that likes all it sees, which it says with an estimate of 0.5."""
    return estimating(judged, 0.5)


@pytest.fixture(scope="module")
def clean() -> Tensor:
    return torch.from_numpy(held_out()[0]).float() / 255


@pytest.fixture(scope="module")
def labels() -> NDArray[np.int64]:
    return held_out()[1].astype(np.int64)


@dataclass
class World:
    """An engine, and what became of its steps."""

    model: SourceModel
    policy: Policy = TENT
    shadow: float = 0.0
    engine: Engine = field(init=False)
    told: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    """Events: stream and fields."""
    results: list[str] = field(default_factory=list)
    """Of the last step."""
    last: StepStats | None = None

    def __post_init__(self) -> None:
        self.engine = Engine({self.model.name: self.model}, StateStore(Budget(64), CPU), Monitor(20.0), self.shadow)

    @property
    def lane(self) -> Lane:
        """Of all its streams."""
        return Lane(self.model.name, self.policy, self.model.digest)

    def stream(self, id: str = "s", guarded: bool = True, **settings: Any) -> Stream:
        """A new one, by default with a guard of small numbers."""
        stream = Stream(id, self.model.name, self.policy, 1, 0.0, digest=self.model.digest)
        if guarded:
            small = {"shadow_rows": 16, "canary_rows": 32, "cooldown_rows": 64, "least_benefit": 0.1}
            stream.guard = make_guard(GuardSettings.model_validate(small | settings))
        return stream

    def step(self, *requests: tuple[Stream, Tensor], shed: bool = False, plain: bool = False) -> list[Any]:
        """One engine step; the answers, or errors, in order. ``plain``: in the source's lane."""
        answers: dict[Stream, Any] = {}
        lane = self.lane._replace(policy=SourcePolicy()) if plain else self.lane
        jobs = [Job(stream, lambda *_: None, lane, x, origin=Origin("request-7")) for stream, x in requests]
        self.last = self.engine.step(
            Plan(lane, jobs, shed), lambda job, answer: answers.__setitem__(job.stream, answer)
        )
        results = {job.stream: job.result for job in self.last.jobs}
        self.results = [results[stream] for stream, _ in requests if stream in results]
        self.told += [(event.stream.id, event.fields) for event in self.last.events if event.kind == "guard"]
        return [answers[stream] for stream, _ in requests]

    def state(self, stream: Stream) -> Weights:
        """A copy of its state."""
        self.engine.add_lane(self.lane)
        return self.engine.store.export(self.lane, stream)

    def source(self, *parts: Tensor) -> list[Tensor]:
        """What the source alone says of these requests, in one step."""
        streams = [Stream(f"plain-{i}", self.model.name, SourcePolicy(), 1, 0.0) for i in range(len(parts))]
        return [one.logits for one in World(self.model).step(*zip(streams, parts, strict=True), plain=True)]


def guard_of(stream: Stream) -> Guard:
    assert stream.guard is not None
    return stream.guard


def lead_to(world: World, state: State, stream: Stream, x: Tensor) -> None:
    """Has a stream come to a state by itself."""
    guard = guard_of(stream)
    for turn in range(50):
        if guard.state is state:
            return
        world.step((stream, x[turn % 4 * 16 :][:16]))
    raise AssertionError(guard.state)


def certify(guard: Guard, w: int = -1, count: int = 6) -> None:
    """Labels that prove a benefit, or harm."""
    assert guard.guarantee is not None
    first = guard.guarantee.rows
    guard.guarantee.allow(np.ones(count, np.bool_), guard.serves)
    for row in range(first, first + count):
        guard.guarantee.settle(row, w)


# Shadow


@pytest.mark.parametrize("policy", [TENT, Eata(), NormPolicy(), Lame(), Tent(window=32)], ids=str)
def test_in_the_shadow_the_sources_scores_are_served_bit_for_bit(
    judged: SourceModel, clean: Tensor, policy: Policy, request: pytest.FixtureRequest
) -> None:
    model = estimating(judged, 0.5)
    if policy.needs:
        model = estimating(load_model("digits", load_settings(request.getfixturevalue("prepared_digits")), CPU), 0.5)
    world = World(model, policy)
    stream = world.stream(shadow_rows=10**6)
    for turn in range(4):
        x = clean[turn * 16 : turn * 16 + 16]
        ((answer,), (expected,)) = world.step((stream, x)), world.source(x)
        assert torch.equal(answer.logits, expected)
        torch.testing.assert_close(answer.confidence, expected.softmax(1).amax(1))
        assert (answer.served, answer.adapted, answer.policy) == ("source", True, policy.name)
        assert answer.guard.state == State.SHADOW
        assert answer.version == turn * (world.results == ["applied"])
        assert answer.comparison.source.tolist() == expected.argmax(1).tolist()


def test_while_it_learns_in_the_shadow_its_state_is_as_without_a_guard(digits: SourceModel, clean: Tensor) -> None:
    """What is served does not change what is learned."""
    world = World(digits)
    shadow, free = world.stream("shadow", shadow_rows=10**6), world.stream("free", guarded=False)
    for turn in range(5):
        x = clean[turn * 16 : turn * 16 + 16]
        world.step((shadow, x))
        world.step((free, x))
        assert world.results == ["applied"]
    assert shadow.version == free.version == 5
    assert same_state(world.state(shadow), world.state(free))
    assert guard_of(shadow).state is State.SHADOW


@pytest.mark.parametrize("benefit", [0.09, -0.5, float("nan")])
def test_what_does_not_help_leaves_state_and_version_bit_for_bit(
    judged: SourceModel, clean: Tensor, benefit: float
) -> None:
    world = World(estimating(judged, benefit))
    stream = world.stream()
    before = world.state(world.stream("fresh"))
    for turn in range(6):
        (answer,) = world.step((stream, clean[turn * 16 : turn * 16 + 16]))
        assert (world.results, answer.served, answer.version) == (["vetoed"], "source", 0)
        assert answer.guard.evidence == ("unknown" if np.isnan(benefit) else "unclear" if benefit > 0 else "harms")
    assert stream.version == 0
    assert (stream.requests, stream.adapted, stream.failures) == (6, 6, 0)
    assert same_state(world.state(stream), before)


def test_a_veto_holds_in_company(digits: SourceModel, clean: Tensor) -> None:
    """One stream's step is not kept, its neighbours' are."""
    world = World(digits)
    streams = [world.stream("asks for more", least_benefit=0.6), world.stream("s"), world.stream("t", guarded=False)]
    before = world.state(streams[0])
    for turn in range(4):
        world.step(*((stream, clean[turn * 16 + i : turn * 16 + 16]) for i, stream in enumerate(streams)))
        assert world.results == ["vetoed", "applied", "applied"]
    assert [stream.version for stream in streams] == [0, 4, 4]
    assert same_state(world.state(streams[0]), before)


# Up and down


def test_evidence_takes_a_stream_up_and_each_move_is_told(digits: SourceModel, clean: Tensor) -> None:
    world = World(digits)
    stream, free = world.stream(), world.stream("free", guarded=False)
    who = []
    for turn in range(6):
        x = clean[turn * 16 : turn * 16 + 16]
        (answer,), (alone,) = world.step((stream, x)), world.step((free, x))
        who.append((answer.guard.state, answer.served))
        (source,) = world.source(x)
        assert torch.equal(answer.logits, source if answer.served == "source" else alone.logits)
    assert who == [(State.CANARY, "adapted")] * 2 + [(State.ACTIVE, "adapted")] * 4
    figures = {"rule": "benefit", "action": "none", "statistic": 0.5, "threshold": 0.1}
    assert world.told == [
        ("s", {"from": "shadow", "to": "canary", **figures, "version": 1}),
        ("s", {"from": "canary", "to": "active", **figures, "version": 3}),
    ]


def test_a_canary_is_served_adapted_only_where_there_is_evidence(judged: SourceModel, clean: Tensor) -> None:
    """Request by request, of the request itself: of some the judge approves."""
    weights = np.zeros(len(FIGURES))
    weights[FIGURES.index("concentration_source")] = -1.0
    world = World(replace(judged, judge=Judge(weights, 0.6, 0.1)))
    stream, free = world.stream(canary_rows=10**6), world.stream("free", guarded=False)
    many, one = clean[:64], clean[:1].repeat(64, 1, 1, 1)
    world.step((stream, many))
    world.step((free, many))
    for x, expected in ((many, "adapted"), (one, "source"), (many, "adapted"), (one, "source")):
        (answer,) = world.step((stream, x))
        (source,) = world.source(x)
        assert (answer.guard.state, answer.served) == (State.CANARY, expected)
        assert world.results == ["applied" if expected == "adapted" else "vetoed"]
        if expected == "source":
            assert torch.equal(answer.logits, source)
        else:
            assert torch.equal(answer.logits, world.step((free, x))[0].logits)


def test_collapse_takes_the_state_to_the_source(digits: SourceModel, clean: Tensor) -> None:
    world = World(digits, Tent(optimiser="sgd", lr=30.0), 1.0)
    stream, before = world.stream(collapse=0.3), world.state(world.stream("fresh"))
    for turn in range(40):
        world.step((stream, clean[turn % 7 * 64 :][:64]))
        if any(fields["rule"] == "collapse" for _, fields in world.told):
            break
    else:
        raise AssertionError(guard_of(stream).state)
    (fields,) = (fields for _, fields in world.told if fields["rule"] == "collapse")
    assert (fields["to"], fields["action"], fields["threshold"]) == ("shadow", "reset", 0.3)
    assert fields["statistic"] > 0.3
    assert fields["version"] > 0
    assert stream.version == 0
    assert same_state(world.state(stream), before)
    assert guard_of(stream).evidence == "unknown"


def test_a_periodic_reset(digits: SourceModel, clean: Tensor) -> None:
    world = World(digits)
    stream, before = world.stream(reset_rows=64), world.state(world.stream("fresh"))
    for turn in range(4):
        world.step((stream, clean[turn * 16 :][:16]))
    assert stream.version == 4
    world = replace_shadow(world, 1.0)
    (answer,) = world.step((stream, clean[:16]))
    assert answer.version == 4, "told of the state that answered"
    assert world.told[-1][1] | {"from": ""} == {
        "from": "", "to": "shadow", "action": "reset", "rule": "periodic", "version": 4, "statistic": 64.0,
        "threshold": 64.0,
    }  # fmt: skip
    assert (stream.version, world.results) == (0, ["vetoed"])
    assert same_state(world.state(stream), before)


def replace_shadow(world: World, ratio: float) -> World:
    """The same world, whose active streams are compared at that ratio."""
    world.engine._watch._shadow_ratio = ratio
    return world


def test_an_active_stream_is_periodically_reset_without_being_compared(digits: SourceModel, clean: Tensor) -> None:
    world = World(digits)
    stream = world.stream(reset_rows=64)
    for turn in range(5):
        world.step((stream, clean[turn * 16 :][:16]))
    assert [fields["rule"] for _, fields in world.told][-1] == "periodic"


# Whom the source is asked for, and when


@dataclass
class Order:
    """In which order answers leave and the source is asked."""

    seen: list[tuple[str, list[str]]] = field(default_factory=list)

    def step(self, world: World, *requests: tuple[Stream, Tensor]) -> list[tuple[str, list[str]]]:
        """What happens in a step, in order."""
        self.seen.clear()
        jobs = [Job(stream, lambda *_: None, world.lane, x) for stream, x in requests]
        world.engine.step(Plan(world.lane, jobs), lambda job, _: self.seen.append(("answer", [job.stream.id])))
        return self.seen


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> Order:
    order, ask = Order(), Watch.ask

    def watched(self: Watch, model: SourceModel, served: Any, some: list[int], *rest: Any) -> Any:
        order.seen.append(("ask", [str(index) for index in some]))
        return ask(self, model, served, some, *rest)

    monkeypatch.setattr(Watch, "ask", watched)
    return order


@pytest.mark.parametrize("state", [one for one in State if one is not State.OFF])
@pytest.mark.parametrize("kind", ["none", "budget"])
def test_the_source_is_asked_before_the_answer_exactly_when_the_guard_compares(
    digits: SourceModel, clean: Tensor, order: Order, state: State, kind: str
) -> None:
    world = World(digits)
    stream = world.stream(guarantee={"kind": kind})
    guard_of(stream).put(state)
    first = kind == "budget" or state not in (State.ACTIVE, State.FROZEN)
    assert guard_of(stream).compares is first
    for number in range(3):  # without a share of its own the monitor leaves the guards a twentieth
        late = [] if first or number else [("ask", ["0"])]
        early = [("ask", ["0"])] if first else []
        assert order.step(world, (stream, clean[:8])) == [*early, ("answer", ["s"]), *late]
    replace_shadow(world, 1.0)
    expected = [("ask", ["0"]), ("answer", ["s"])] if first else [("answer", ["s"]), ("ask", ["0"])]
    assert order.step(world, (stream, clean[:8])) == expected


def test_only_those_who_need_it_are_asked_for_before_the_answers(
    digits: SourceModel, clean: Tensor, order: Order
) -> None:
    world = World(digits, shadow=1.0)
    streams = [world.stream("free", guarded=False), world.stream("shadow"), world.stream("active")]
    guard_of(streams[2]).put(State.ACTIVE)
    answers = [("answer", [stream.id]) for stream in streams]
    seen = order.step(world, *((stream, clean[:8]) for stream in streams))
    assert seen == [("ask", ["1"]), *answers, ("ask", ["0", "2"])]


def test_who_is_not_guarded_costs_no_pass(digits: SourceModel, clean: Tensor, order: Order) -> None:
    world = World(digits)
    off = world.stream("off", enabled=False)
    assert order.step(world, (off, clean[:8]), (world.stream("free", guarded=False), clean[:8])) == [
        ("answer", ["off"]),
        ("answer", ["free"]),
    ]
    assert guard_of(off).rows == 0


def test_an_active_stream_is_compared_at_the_shadow_ratio(digits: SourceModel, clean: Tensor, order: Order) -> None:
    world = World(digits, shadow=0.25)
    stream = world.stream()
    lead_to(world, State.ACTIVE, stream, clean)
    seen = [order.step(world, (stream, clean[:8])) != [("answer", ["s"])] for _ in range(40)]
    assert sum(seen) == 10


# Guarantees


def adversarial(world: World, stream: Stream, sizes: list[int], x: Tensor) -> Iterator[tuple[Answer, Tensor]]:
    """Requests, their answers and what the source says of them."""
    start = 0
    for size in sizes:
        rows = x[torch.arange(start, start + size) % len(x)]
        ((answer,), (source,)) = world.step((stream, rows)), world.source(rows)
        yield answer, source
        start += size


SIZES = [1, 16, 3, 40, 7, 64, 2, 2, 2, 33, 1, 1, 50, 16, 16]


@pytest.mark.parametrize(
    ("eps", "b0"), [(0.0, 0.0), (0.0, 5.0), (0.05, 2.0), (0.3, 0.0), (1.0, 0.0)], ids=lambda one: f"{one:g}"
)
@pytest.mark.parametrize("kind", ["budget", "ledger"])
def test_errors_beyond_the_sources_stay_within_the_bound_under_attack(
    digits: SourceModel, clean: Tensor, kind: str, eps: float, b0: float
) -> None:
    """The source is always right, so that each row served otherwise is an error; the guard is made to let all pass."""
    noisy = corruptions.noise(clean, 1.0, torch.Generator().manual_seed(0))
    world = World(digits, Tent(optimiser="sgd", lr=1.0))
    stream = world.stream(guarantee={"kind": kind, "eps": eps, "b0": b0, "c0": 1.0})
    guard_of(stream).put(State.ACTIVE)
    errors = total = differed = 0
    for answer, source in adversarial(world, stream, SIZES, noisy):
        wrong = (answer.logits.argmax(1) != source.argmax(1)).tolist()
        note = answer.comparison
        assert note.source is not None
        assert note.adapted is not None
        assert note.source.tolist() == source.argmax(1).tolist()
        differs = np.not_equal(note.adapted, note.source).tolist()
        assert note.first_row == total
        for row, bad in enumerate(wrong):
            errors, total, differed = errors + bad, total + 1, differed + differs[row]
            # Of the ledger, from the start: no labels came.
            assert errors <= b0 + eps * total + 1e-9
            assert not bad or differs[row]
    promised = guard_of(stream).guarantee
    assert promised is not None
    assert promised.worst == errors
    assert promised.rows == total
    assert errors == differed if eps == 1 else differed > errors


def test_rows_are_mixed_one_by_one(digits: SourceModel, clean: Tensor) -> None:
    """Each row has all of one model's scores; where the two agree, the adapted model's."""
    noisy = corruptions.noise(clean, 1.0, torch.Generator().manual_seed(0))
    world = World(digits)
    stream, free = world.stream(guarantee={"kind": "budget", "eps": 0.05, "b0": 1.0}), world.stream("free", False)
    guard_of(stream).put(State.ACTIVE)
    served = set()
    for turn in range(8):
        x = noisy[turn * 32 : turn * 32 + 32]
        (answer,), (own,), (source,) = world.step((stream, x)), world.step((free, x)), world.source(x)
        ours, theirs = (answer.logits == own.logits).all(1), (answer.logits == source).all(1)
        assert (ours ^ theirs).all()
        assert ours[own.logits.argmax(1) == source.argmax(1)].all()
        assert answer.served == ("adapted" if ours.all() else "source" if theirs.all() else "mixed")
        torch.testing.assert_close(answer.confidence, answer.logits.softmax(1).amax(1))
        served.add(answer.served)
        assert answer.comparison.asked is None, "a budget asks for nothing"
    assert "mixed" in served
    assert same_state(world.state(stream), world.state(free)), "what is served does not change what is learned"


def test_an_audit_asks_for_labels_where_the_two_differ(digits: SourceModel, clean: Tensor) -> None:
    noisy = corruptions.noise(clean, 1.0, torch.Generator().manual_seed(0))
    world = World(digits)
    stream, asked = world.stream(guarantee=AUDIT), 0
    for turn in range(8):
        (answer,) = world.step((stream, noisy[turn * 32 : turn * 32 + 32]))
        note = answer.comparison
        assert note.adapted is not None
        differs = note.adapted != note.source
        assert (note.asked is None) is not differs.any()
        assert note.asked is None or note.asked.tolist() == differs.tolist()
        asked += int(differs.sum())
    assert asked > 0


def test_an_alarm_takes_the_state_back_bit_for_bit(digits: SourceModel, clean: Tensor) -> None:
    """To the last good one, which is kept every so many steps of an active stream; what was learned since is lost."""
    world = World(digits)
    stream = world.stream(guarantee=AUDIT)
    guard = guard_of(stream)
    certify(guard)
    lead_to(world, State.ACTIVE, stream, clean)
    kept: dict[int, Weights] = {}
    for turn in range(GOOD_STEPS + 7):
        world.step((stream, clean[turn % 20 * 16 :][:16]))
        kept[stream.version] = world.state(stream)
    certify(guard, 1)
    world.step((stream, clean[:16]))
    assert world.results == ["vetoed"]
    told = world.told[-1][1]
    assert (told["from"], told["to"], told["action"], told["rule"]) == ("active", "frozen", "rollback", "audit")
    assert told["version"] == max(kept)
    assert stream.version == max(kept) - told_since(world, kept)
    assert same_state(world.state(stream), kept[stream.version])
    frozen = world.state(stream)
    (answer,) = world.step((stream, clean[16:32]))
    assert (answer.served, world.results, answer.version) == ("adapted", ["vetoed"], stream.version)
    assert same_state(world.state(stream), frozen)
    certify(guard, 1)
    world.step((stream, clean[:16]))
    assert world.told[-1][1]["action"] == "reset"
    assert stream.version == 0
    assert same_state(world.state(stream), world.state(world.stream("fresh")))


def told_since(world: World, kept: dict[int, Weights]) -> int:
    """Versions learned since the last good state."""
    versions = [version for _, (_, _, _, version) in world.engine.guarding._good.items()]
    assert len(versions) == 1
    return max(kept) - versions[0]


def test_an_alarm_with_no_good_state_serves_the_sources_answers(digits: SourceModel, clean: Tensor) -> None:
    """Batch statistics alone can do the harm that was proved: a reset state is not the source."""
    world = World(digits)
    stream = world.stream(guarantee=AUDIT)
    certify(guard_of(stream))
    lead_to(world, State.ACTIVE, stream, clean)
    certify(guard_of(stream), 1)
    world.step((stream, clean[:16]))
    assert stream.version == 0
    assert world.step((stream, clean[16:32]))[0].served == "source"


def test_a_good_state_goes_with_the_stream(digits: SourceModel, clean: Tensor) -> None:
    world = World(digits)
    stream = world.stream(guarantee=AUDIT)
    certify(guard_of(stream))
    for turn in range(GOOD_STEPS + 9):
        world.step((stream, clean[turn % 20 * 16 :][:16]))
    assert world.engine.guarding._good_bytes > 0
    world.engine.drop(world.lane, stream)
    assert (world.engine.guarding._good_bytes, len(world.engine.guarding._good)) == (0, 0)


# The trust region


def test_steps_outside_of_the_trust_region_are_not_kept(digits: SourceModel, clean: Tensor) -> None:
    world = World(digits)
    careful, far, free = (
        world.stream("careful", most_update=1e-6, rejected_steps=1000),
        world.stream("far", most_distance=0.05, rejected_steps=1000),
        world.stream("free"),
    )
    seen: dict[str, list[str]] = {"careful": [], "far": [], "free": []}
    for turn in range(30):
        world.step(*((stream, clean[turn % 7 * 64 :][:64]) for stream in (careful, far, free)))
        for name, result in zip(seen, world.results, strict=True):
            seen[name].append(result)
        assert world.last is not None
        distance = world.last.jobs[1].signals.get("parameter_distance")
        assert distance is None or distance <= 0.05
    assert set(seen["careful"]) == {"rejected_update"}
    assert (careful.version, careful.failures) == (0, 30)
    assert set(seen["far"]) == {"applied", "rejected_distance"}
    assert set(seen["free"]) == {"applied"}
    assert far.version == seen["far"].count("applied")


def test_rejected_steps_on_end_are_a_reset(digits: SourceModel, clean: Tensor) -> None:
    world = World(digits)
    stream = world.stream(most_update=1e-6, rejected_steps=3)
    for turn in range(3):
        assert not [one for one in world.told if one[1]["rule"] == "rejected steps"]
        world.step((stream, clean[turn * 16 :][:16]))
    told = world.told[-1][1]
    assert (told["rule"], told["to"], told["action"]) == ("rejected steps", "shadow", "reset")
    assert (told["statistic"], told["threshold"]) == (3, 3)
    assert guard_of(stream).state is State.SHADOW


def test_statistics_have_no_trust_region(digits: SourceModel, clean: Tensor) -> None:
    world = World(digits, Tent(lr=0.0))
    stream = world.stream(most_update=1e-9)
    world.step((stream, clean[:16]))
    assert world.results == ["applied"], "nothing moved"
    world = World(digits, NormPolicy())
    world.step((world.stream(most_update=1e-9), clean[:16]))
    assert not world.results[0].startswith("rejected")


# Outliers


def spoiled(clean: Tensor, start: int) -> tuple[Tensor, list[int]]:
    """A request with some rows like no other, and the numbers of those that are clean. Noise would not do: to this
    network it is nearer to the middle than digits are."""
    x = clean[start : start + 32].clone()
    bad = [3, 17, 18, 30]
    x[bad] = ((torch.arange(8) + torch.arange(8)[:, None]) % 2).float()
    return x, [row for row in range(32) if row not in bad]


def test_outliers_are_answered_and_not_learned_from(digits: SourceModel, clean: Tensor) -> None:
    """The state is, bit for bit, what the other rows make of it."""
    world = World(digits)
    stream, free = world.stream(outliers=2.0, shadow_rows=10**6), world.stream("free", guarded=False)
    found = 0
    for turn in range(5):
        x, _ = spoiled(clean, turn * 32)
        (inliers,) = kept_rows(world, stream, x)
        (answer,) = world.step((stream, x))
        assert torch.equal(answer.logits, world.source(x)[0]), "all rows are answered"
        assert world.results == ["applied"]
        world.step((free, x[torch.from_numpy(inliers)]))
        assert same_state(world.state(stream), world.state(free))
        assert world.last is not None
        found += 32 - len(inliers)
    assert found >= 5
    assert stream.version == 5


def kept_rows(world: World, stream: Stream, x: Tensor) -> list[NDArray[np.int64]]:
    """The rows that a step would learn from."""
    job = Job(stream, lambda *_: None, world.lane, x)
    world.engine.add_lane(world.lane)
    run = PolicyRun(world.model, world.lane, [job], world.state(stream))
    found = world.engine.guarding.inliers([job], Served.of(run, run.scores()), [True])
    run.stop()
    return [np.arange(len(x)) if one is None else one for one in found]


def test_rows_like_no_other_are_found(digits: SourceModel, clean: Tensor) -> None:
    """Most of those, and few of the others."""
    world, wrong, right = World(digits), 0, 0
    stream = world.stream(outliers=2.0)
    for turn in range(10):
        x, good = spoiled(clean, turn * 32)
        (kept,) = kept_rows(world, stream, x)
        wrong += len(set(kept) - set(good))
        right += len(set(kept) & set(good))
    assert wrong <= 16
    assert right >= 270


def test_outliers_of_one_stream_are_not_anothers(digits: SourceModel, clean: Tensor) -> None:
    together, alone = World(digits), [World(digits) for _ in range(3)]

    def made(world: World) -> list[Stream]:
        return [world.stream("looks", outliers=1.5), world.stream("s"), world.stream("free", guarded=False)]

    streams, others = made(together), [made(world)[i] for i, world in enumerate(alone)]
    for turn in range(4):
        x, _ = spoiled(clean, turn * 32)
        parts = [x, clean[turn * 16 :][:16], clean[turn * 9 :][:9]]
        answers = together.step(*zip(streams, parts, strict=True))
        for world, other, part, answer in zip(alone, others, parts, answers, strict=True):
            (expected,) = world.step((other, part))
            torch.testing.assert_close(answer.logits, expected.logits, atol=1e-4, rtol=0)
            assert (answer.version, answer.served) == (expected.version, expected.served)


def test_small_requests_and_even_ones_have_no_outliers(digits: SourceModel, clean: Tensor) -> None:
    world = World(digits)
    stream = world.stream(outliers=1.1)
    assert len(kept_rows(world, stream, clean[:7])[0]) == 7
    even = clean[:1].repeat(16, 1, 1, 1)
    assert len(kept_rows(world, stream, even)[0]) == 16
    world.step((stream, even))
    assert world.results == ["applied"]


# Company


def crowd(world: World) -> list[Stream]:
    """A stream of every kind."""
    made = [
        world.stream("free", guarded=False),
        world.stream("off", enabled=False),
        world.stream("shadow", shadow_rows=10**6),
        world.stream("rising", shadow_rows=24, canary_rows=48),
        world.stream("canary", canary_rows=10**6),
        world.stream("active"),
        world.stream("frozen"),
        world.stream("vetoed", least_benefit=0.9),
        world.stream("budget", guarantee={"kind": "budget", "eps": 0.02, "b0": 1.0}),
        world.stream("ledger", guarantee={"kind": "ledger", "eps": 0.02, "b0": 1.0, "c0": 1.0}),
        world.stream("audit", guarantee=AUDIT),
        world.stream("careful", most_update=1e-6),
        world.stream("fades", reset_rows=60),
    ]
    for stream in made[5:7]:
        guard_of(stream).put(State(stream.id))
    return made


@pytest.mark.parametrize("policy", [TENT, NormPolicy(), Tent(window=24, lr=LR)], ids=str)
@pytest.mark.parametrize("shadow", [0.0, 0.4])
def test_guarded_streams_are_served_in_company_as_if_alone(
    digits: SourceModel, clean: Tensor, policy: Policy, shadow: float
) -> None:
    noisy = corruptions.noise(clean, 0.7, torch.Generator().manual_seed(0))
    together = World(digits, policy, shadow)
    streams, draw = crowd(together), np.random.default_rng(0)
    alone = [World(digits, policy, shadow) for _ in streams]
    others = [crowd(world)[i] for i, world in enumerate(alone)]
    for _ in range(10):
        some = draw.permutation(len(streams))[: draw.integers(4, len(streams) + 1)]
        parts = {i: noisy[draw.choice(len(noisy), draw.integers(1, 33), replace=False)] for i in some}
        answers = together.step(*((streams[i], parts[i]) for i in some))
        results = dict(zip(some, together.results, strict=True))
        for i, answer in zip(some, answers, strict=True):
            (expected,) = alone[i].step((others[i], parts[i]))
            name = streams[i].id
            assert torch.equal(answer.logits, expected.logits), name
            assert (answer.served, answer.version) == (expected.served, expected.version), name
            if together.engine.store.has_state(together.lane):
                assert alone[i].results == [results[i]], name
            for one, other in ((answer.comparison.adapted, expected.comparison.adapted),
                               (answer.comparison.asked, expected.comparison.asked)):  # fmt: skip
                assert (one is None) is (other is None), name
                assert one is None or one.tolist() == other.tolist(), name
    for i, (stream, other) in enumerate(zip(streams, others, strict=True)):
        assert stream.version == other.version
        if stream.guard is not None:
            assert stream.guard.dump() == guard_of(other).dump(), stream.id
            assert stream.guard.benefit == pytest.approx(guard_of(other).benefit, nan_ok=True)
        mine = [fields for name, fields in together.told if name == stream.id]
        assert mine == [fields for name, fields in alone[i].told if name == other.id], stream.id
    assert len({guard_of(stream).state for stream in streams[1:]}) >= 3


def test_a_veto_without_a_state_is_told_alike_in_company(digits: SourceModel, clean: Tensor) -> None:
    world = World(digits, NormPolicy())
    vetoed, free = world.stream("vetoed", least_benefit=0.9), world.stream("free", guarded=False)
    world.step((vetoed, clean[:16]))
    alone = world.results[0]
    world.step((vetoed, clean[:16]), (free, clean[:16]))
    assert world.results[0] == alone


def test_figures_do_not_depend_on_company(judged: SourceModel, clean: Tensor) -> None:
    """With the judge that looks."""
    together, parts = World(judged), list(clean[:60].split([1, 19, 40]))
    streams = [together.stream(str(i), shadow_rows=10**6) for i in range(3)]
    alone = [World(judged) for _ in streams]
    others = [world.stream(str(i), shadow_rows=10**6) for i, world in enumerate(alone)]
    for _ in range(3):
        together.step(*zip(streams, parts, strict=True))
        for world, other, x in zip(alone, others, parts, strict=True):
            world.step((other, x))
    for stream, other in zip(streams, others, strict=True):
        assert guard_of(stream).benefit == pytest.approx(guard_of(other).benefit, abs=1e-4)


# What goes wrong


def failing_source(monkeypatch: pytest.MonkeyPatch, victim: str) -> None:
    """The source cannot be asked about one stream's rows."""
    ask = Watch.ask

    def fail(self: Watch, model: SourceModel, served: Any, some: list[int], *rest: Any) -> Any:
        if any(served.sizes[index] == 13 for index in some):
            raise RuntimeError(f"out of memory for {victim}")
        return ask(self, model, served, some, *rest)

    monkeypatch.setattr(Watch, "ask", fail)


def test_a_source_that_fails_before_the_answer_costs_nobody_else_anything(
    digits: SourceModel, clean: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who cannot be compared is not served adapted for want of better: it gets an error, and its state is untouched."""
    failing_source(monkeypatch, "victim")
    world = World(digits, shadow=1.0)
    free, shadow, victim = world.stream("free", guarded=False), world.stream("shadow"), world.stream("victim")
    before = world.state(victim)
    answers = world.step((free, clean[:16]), (shadow, clean[:16]), (victim, clean[:13]))
    assert isinstance(answers[0], Answer)
    assert isinstance(answers[1], Answer)
    assert "out of memory" in str(answers[2])
    assert (free.version, shadow.version, victim.version) == (1, 1, 0)
    assert guard_of(victim).evidence == "unknown"
    assert same_state(world.state(victim), before)


def test_a_source_that_fails_after_the_answer_costs_nothing(
    digits: SourceModel, clean: Tensor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    world = World(digits, shadow=1.0)
    stream = world.stream()
    lead_to(world, State.ACTIVE, stream, clean)
    failing_source(monkeypatch, "s")
    version, benefit = stream.version, guard_of(stream).benefit
    with caplog.at_level(logging.ERROR):
        (answer,) = world.step((stream, clean[:13]))
    assert isinstance(answer, Answer)
    assert answer.served == "adapted"
    assert "asking the source failed" in caplog.text
    assert world.last is not None
    assert world.last.monitor_failed
    assert guard_of(stream).benefit == benefit
    assert stream.version == version + 1


@pytest.mark.parametrize("state", [State.SHADOW, State.CANARY, State.ACTIVE])
def test_scores_that_are_not_finite_are_not_served(
    digits: SourceModel, clean: Tensor, monkeypatch: pytest.MonkeyPatch, state: State
) -> None:
    """The source answers in their place."""
    world = World(digits)
    stream = world.stream(canary_rows=32 if state is State.ACTIVE else 10**6, shadow_rows=16)
    if state is not State.SHADOW:
        lead_to(world, state, stream, clean)
    broken_network(monkeypatch)
    before = world.state(stream)
    ((answer,), (source,)) = world.step((stream, clean[:16])), world.source(clean[:16])
    assert isinstance(answer, Answer)
    assert answer.served == "source"
    assert torch.equal(answer.logits, source)
    assert same_state(world.state(stream), before)


def test_after_scores_that_were_not_finite_a_stream_finds_its_way_back(
    digits: SourceModel, clean: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(digits)
    stream = world.stream(cooldown_rows=16)
    lead_to(world, State.ACTIVE, stream, clean)
    with monkeypatch.context() as patched:
        broken_network(patched)
        world.step((stream, clean[:16]))
    for turn in range(40):
        (answer,) = world.step((stream, clean[turn % 7 * 64 :][:64]))
    assert answer.guard.evidence == "helps"


def broken_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """TENT's own network has scores that are not finite."""
    original = Tent.step

    def broken(self: Tent, source: Any, state: Any, batch: Any) -> Any:
        network = batch.network

        def odd(weights: Any, x: Tensor, segments: Any, norm: Any) -> Any:
            output = network(weights, x, segments, norm)
            output.logits.data.fill_(torch.nan)
            return output

        return (yield from original(self, source, state, replace(batch, network=odd)))

    monkeypatch.setattr(Tent, "step", broken)


# Other steps


def test_a_shed_step_is_guarded_too(digits: SourceModel, clean: Tensor) -> None:
    """It answers by the evidence, and learns nothing."""
    world = World(digits)
    stream, shadow = world.stream(), world.stream("shadow", least_benefit=0.9)
    before = world.state(stream)
    who = []
    for turn in range(5):
        answer, other = world.step((stream, clean[turn * 16 :][:16]), (shadow, clean[:16]), shed=True)
        assert world.results == ["shed", "shed"]
        assert answer.shed
        who.append(answer.guard.state)
        assert (answer.served, other.served) == ("adapted", "source")
        assert torch.equal(other.logits, world.source(clean[turn * 16 :][:16], clean[:16])[1])
    assert who[-1] == State.ACTIVE
    assert (stream.version, shadow.version) == (0, 0)
    assert same_state(world.state(stream), before)


@pytest.mark.parametrize("policy", [NormPolicy(), Lame()], ids=str)
def test_a_policy_without_a_state(digits: SourceModel, clean: Tensor, policy: Policy) -> None:
    """Has nothing to veto, keep or take back; what is served is guarded all the same."""
    world = World(digits, policy)
    stream, harmed = world.stream(guarantee=AUDIT), world.stream("harmed", least_benefit=0.9)
    certify(guard_of(stream))
    lead_to(world, State.ACTIVE, stream, clean)
    answer, other = world.step((stream, clean[:16]), (harmed, clean[:16]))
    assert (answer.served, other.served) == ("adapted", "source")
    certify(guard_of(stream), 1)
    world.step((stream, clean[:16]))
    told = world.told[-1][1]
    assert (told["action"], told["to"], told["rule"]) == ("reset", State.SHADOW, "audit")
    assert stream.version == 0


def test_in_the_sources_lane_a_guard_rests(digits: SourceModel, clean: Tensor) -> None:
    """A request that is not to adapt."""
    world = World(digits)
    stream = world.stream()
    lead_to(world, State.CANARY, stream, clean)
    (answer,) = world.step((stream, clean[:16]), plain=True)
    assert (answer.served, answer.adapted) == ("source", False)
    assert answer.guard.state == State.CANARY
    stream.adapt = False
    (answer,) = world.step((stream, clean[:16]), plain=True)
    assert answer.guard.state == "off"


def test_the_sources_answers_say_nothing_of_the_adapted_model(judged: SourceModel, clean: Tensor) -> None:
    worlds = [World(judged), World(judged)]
    streams = [world.stream() for world in worlds]
    for world, stream in zip(worlds, streams, strict=True):
        world.step((stream, clean[:16]))
    worlds[0].step((streams[0], clean[300:340]), plain=True)
    for world, stream in zip(worlds, streams, strict=True):
        world.step((stream, clean[16:32]))
    assert guard_of(streams[0]).benefit == guard_of(streams[1]).benefit


def test_a_move_in_the_sources_lane_is_made(digits: SourceModel, clean: Tensor) -> None:
    """Or later, but it is not forgotten."""
    world = World(digits)
    stream, before = world.stream(reset_rows=48), world.state(world.stream("fresh"))
    for turn in range(3):
        world.step((stream, clean[turn * 16 :][:16]))
    world.step((stream, clean[:16]), plain=True)
    world.step((stream, clean[:16]))
    assert [fields["rule"] for _, fields in world.told][-1] == "periodic"
    assert same_state(world.state(stream), before)


def test_a_stream_that_was_guarded_can_be_stored(digits: SourceModel, clean: Tensor) -> None:
    world = World(digits)
    stream = world.stream()
    for turn in range(4):
        world.step((stream, clean[turn * 16 :][:16]))
    assert Record.of(stream, TENT, "").dump()


def test_updates_a_minute(digits: SourceModel, clean: Tensor) -> None:
    world = World(digits)
    stream = world.stream(updates_per_minute=2)
    results = []
    for turn in range(5):
        world.step((stream, clean[turn * 16 :][:16]))
        results += world.results
    assert results == ["applied", "applied", "vetoed", "vetoed", "vetoed"]
    assert stream.version == 2


@pytest.mark.parametrize("how", ["reset", "move"])
def test_a_stream_that_is_taken_to_the_source_has_no_evidence(digits: SourceModel, clean: Tensor, how: str) -> None:
    world = World(digits)
    stream = world.stream()
    lead_to(world, State.CANARY, stream, clean)
    if how == "reset":
        world.engine.reset(world.lane, world.lane, stream)
    else:
        assert not world.engine.move(world.lane, world.lane._replace(policy=NormPolicy()), stream)
    assert guard_of(stream).evidence == "unknown"
    assert not guard_of(stream).serves


def test_an_active_stream_that_is_taken_to_the_source_is_not_served_adapted(digits: SourceModel, clean: Tensor) -> None:
    """Another policy is another model, of which nothing is known."""
    world = World(estimating(digits, 0.5))
    stream = world.stream()
    lead_to(world, State.ACTIVE, stream, clean)
    new = World(estimating(digits, -0.5), NormPolicy())
    world.engine.move(world.lane, new.lane, stream)
    stream.policy = new.policy
    world.engine.put(new.model)
    world.policy = new.policy
    assert world.step((stream, clean[:16]))[0].served == "source"


# With the judge that looks


DAMAGES: dict[str, Callable[[Tensor], Tensor]] = {
    "fog": lambda x: corruptions.fog(x, 1.0, torch.Generator()),
    "darkness": lambda x: corruptions.darkness(x, 1.0, torch.Generator().manual_seed(0)),
}


def run(world: World, stream: Stream, x: Tensor, labels: NDArray[np.int64], orders: list[NDArray[np.int64]]) -> float:
    """Accuracy of what is served."""
    right = [(world.step((stream, x[order]))[0].logits.argmax(1).numpy() == labels[order]).mean() for order in orders]
    return float(np.mean(right))


@pytest.mark.parametrize("damage", DAMAGES)
def test_where_adaptation_helps_most_of_the_gain_is_kept(
    judged: SourceModel, clean: Tensor, labels: NDArray[np.int64], damage: str
) -> None:
    """At the default settings: rows in random order."""
    x, draw = DAMAGES[damage](clean), np.random.default_rng(0)
    orders = [draw.choice(len(x), 32, replace=False) for _ in range(40)]
    world = World(judged, Tent(optimiser="adam", lr=0.003), 0.1)
    stream, free = world.stream("s", guarded=False), world.stream("free", guarded=False)
    stream.guard = make_guard(GuardSettings())
    guarded, alone = (run(world, one, x, labels, orders) for one in (stream, free))
    source = float(np.mean([(world.source(x[order])[0].argmax(1).numpy() == labels[order]).mean() for order in orders]))
    assert alone > source + 0.5
    assert guarded > source + 0.85 * (alone - source)
    assert guard_of(stream).state is State.ACTIVE


@pytest.mark.parametrize("damage", ["clean", "darkness"])
def test_where_adaptation_does_harm_the_source_is_served(
    judged: SourceModel, clean: Tensor, labels: NDArray[np.int64], damage: str
) -> None:
    """At the default settings: rows sorted by class."""
    x = DAMAGES[damage](clean) if damage in DAMAGES else clean
    sorted_rows = np.argsort(labels, kind="stable")
    orders = [sorted_rows[turn * 16 : turn * 16 + 32] for turn in range(30)]
    world = World(judged, Tent(optimiser="adam", lr=0.003), 0.1)
    stream = world.stream("s", guarded=False)
    stream.guard = make_guard(GuardSettings())
    guarded = run(world, stream, x, labels, orders)
    source = float(np.mean([(world.source(x[order])[0].argmax(1).numpy() == labels[order]).mean() for order in orders]))
    assert guarded >= source - 0.01
    assert stream.version == 0
