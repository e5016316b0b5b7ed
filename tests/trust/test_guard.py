"""The guard's state machine: every arrow, every rule, and what holds whatever happens."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tta_server.errors import BadInput
from tta_server.settings import GuardSettings
from tta_server.trust.guarantees import Audit, Budget, Ledger
from tta_server.trust.guard import MOST_COOLDOWN, Action, Evidence, Guard, Labels, Look, Move, State, Step

UNKNOWN = math.nan
GOOD, BARELY, UNCLEAR, BAD = 0.3, 0.05, 0.0, -0.3
LEAST, COLLAPSE = 0.04, 1.1
AUDIT = {"kind": "audit", "q": 1.0, "eps": 0.0, "c": 10.0, "alpha": 0.5}
ALL = [one for one in State if one is not State.OFF]
"""States that a stream which adapts can be in."""


class Clock:
    """Stands still until it is put forward."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def make(clock: Clock | None = None, coin: Callable[[], float] = lambda: 0.0, **changes: Any) -> Guard:
    """A guard with small numbers."""
    small = {
        "shadow_rows": 20, "canary_rows": 30, "cooldown_rows": 40, "rejected_steps": 3, "reset_rows": None,
        "least_benefit": LEAST, "collapse": COLLAPSE,
    }  # fmt: skip
    return Guard(GuardSettings.model_validate(small | changes), coin, clock or Clock())


def see(guard: Guard, benefit: float, rows: int = 10, collapse: float = 0.0) -> list[Move]:
    """A request whose rows are all compared."""
    return guard.consider(Look(rows, rows, benefit, collapse))


def active(guard: Guard) -> Guard:
    """Brought there by evidence alone."""
    if isinstance(guard.guarantee, Audit):
        certify(guard)
    for _ in range(20):
        see(guard, GOOD)
    assert guard.state is State.ACTIVE
    return guard


def at(state: State, **changes: Any) -> Guard:
    """A guard that came to ``state`` by itself."""
    guard = make(**({"guarantee": AUDIT} if state in (State.FROZEN, State.QUARANTINE) else {}) | changes)
    if state is State.CANARY:
        see(guard, GOOD, 20)
    elif state is State.ACTIVE:
        active(guard)
    elif state is State.FROZEN:
        active(guard)
        harm(guard)
        guard.consider(Look(0, 0))
    elif state is State.QUARANTINE:
        for _ in range(3):
            guard.state = State.CANARY  # where labels come in
            harm(guard)
            guard.consider(Look(0, 0))
    assert guard.state is state
    assert not guard.pinned
    return guard


def answer(guard: Guard, w: int, count: int) -> None:
    """Labels of so many disagreements."""
    assert guard.guarantee is not None
    first = guard.guarantee.rows
    guard.guarantee.allow(np.ones(count, np.bool_), guard.serves)
    for row in range(first, first + count):
        guard.guarantee.settle(row, w)


def harm(guard: Guard) -> None:
    """Labels that prove harm."""
    answer(guard, 1, 6)
    assert isinstance(guard.guarantee, Audit)
    assert guard.guarantee.alarm


def certify(guard: Guard) -> None:
    """Labels that prove a benefit."""
    answer(guard, -1, 4)
    assert isinstance(guard.guarantee, Audit)
    assert guard.guarantee.certified


# The way up


def test_a_stream_begins_in_the_shadow_and_nothing_is_known_of_it() -> None:
    guard = make()
    assert (guard.state, guard.evidence, guard.serves, guard.learns) == (State.SHADOW, Evidence.UNKNOWN, False, False)
    assert guard.compares
    assert guard.since is None


def test_evidence_of_shadow_rows_makes_it_a_canary() -> None:
    guard = make()
    assert see(guard, GOOD) == []
    (move,) = see(guard, GOOD)
    assert move == Move(State.SHADOW, State.CANARY, Action.NONE, "benefit", GOOD, LEAST)
    assert guard.since is move
    assert guard.serves
    assert guard.learns


@pytest.mark.parametrize("benefit", [UNKNOWN, BAD, UNCLEAR, LEAST - 1e-9])
def test_without_benefit_it_stays_in_the_shadow(benefit: float) -> None:
    guard = make()
    for _ in range(50):
        assert see(guard, benefit) == []
    assert (guard.state, guard.serves) == (State.SHADOW, False)


def test_rows_that_nobody_compared_are_no_evidence() -> None:
    """Whatever the look says the benefit is."""
    guard = make()
    for _ in range(50):
        assert guard.consider(Look(100, 0, GOOD)) == []
    assert (guard.state, guard.evidence, guard.serves, guard.learns) == (State.SHADOW, Evidence.UNKNOWN, False, False)


def test_canary_rows_without_a_veto_make_it_active() -> None:
    guard = at(State.CANARY)
    moves = [move for _ in range(3) for move in see(guard, BARELY)]
    assert moves == [Move(State.CANARY, State.ACTIVE, Action.NONE, "benefit", BARELY, LEAST)]
    assert (guard.serves, guard.learns, guard.compares) == (True, True, False)


def test_a_veto_starts_the_count_of_canary_rows_anew() -> None:
    guard = at(State.CANARY)
    for benefit in (GOOD, GOOD, UNCLEAR, GOOD, GOOD):
        assert see(guard, benefit) == []
    assert [move.after for move in see(guard, GOOD)] == [State.ACTIVE]


def test_a_canary_is_served_adapted_request_by_request() -> None:
    guard = at(State.CANARY)
    for benefit, good in ((BARELY, True), (LEAST, True), (LEAST - 1e-9, False), (UNKNOWN, False), (GOOD, True)):
        see(guard, benefit, 1)
        assert (guard.serves, guard.learns) == (good, good), benefit
        assert guard.compares


def test_under_audit_a_canary_waits_for_the_certificate() -> None:
    guard = make(guarantee=AUDIT)
    for _ in range(50):
        see(guard, GOOD)
    assert guard.state is State.CANARY
    certify(guard)
    assert [move.after for move in see(guard, GOOD)] == [State.ACTIVE]
    assert guard.compares, "each disagreement may be audited"


# The way down


@pytest.mark.parametrize("benefit", [BAD, UNCLEAR, LEAST - 1e-9, UNKNOWN])
def test_without_benefit_an_active_stream_is_a_canary_again(benefit: float) -> None:
    guard = at(State.ACTIVE)
    (move,) = see(guard, benefit)
    assert move[:4] == (State.ACTIVE, State.CANARY, Action.NONE, "benefit")
    assert move.statistic == benefit or math.isnan(benefit)
    assert move.threshold == LEAST
    assert (guard.serves, guard.learns, guard.compares) == (False, False, True)


def test_a_canary_that_is_vetoed_for_canary_rows_goes_back_to_the_shadow() -> None:
    guard = at(State.CANARY)
    assert see(guard, BAD) == []
    assert see(guard, BAD) == []
    assert see(guard, BAD) == [Move(State.CANARY, State.SHADOW, Action.NONE, "benefit", BAD, LEAST)]
    assert not guard.serves


def test_rows_below_the_least_benefit_must_be_on_end() -> None:
    guard = at(State.CANARY)
    for _ in range(10):
        assert see(guard, BAD, 20) == []
        assert see(guard, GOOD, 1) == []
    assert guard.state is State.CANARY


@pytest.mark.parametrize("state", [State.CANARY, State.ACTIVE, State.FROZEN])
def test_collapse_takes_it_to_the_source(state: State) -> None:
    guard = at(state)
    assert see(guard, GOOD, 5, COLLAPSE) == [], "not above the threshold"
    (move,) = see(guard, GOOD, 5, 1.2)
    assert move == Move(state, State.SHADOW, Action.RESET, "collapse", 1.2, COLLAPSE)
    assert (guard.evidence, guard.serves, guard.learns) == (Evidence.UNKNOWN, False, False)


def test_the_shadow_does_not_mind_collapse_and_nor_do_rows_that_were_not_compared() -> None:
    guard = make()
    assert see(guard, BAD, 5, 3.0) == []
    guard = at(State.ACTIVE)
    assert guard.consider(Look(5, 0, GOOD, 3.0)) == []


@pytest.mark.parametrize("state", [State.SHADOW, State.CANARY, State.ACTIVE, State.FROZEN])
def test_rejected_steps_on_end_take_it_to_the_source(state: State) -> None:
    guard = at(state)
    rejected = Step(10, False, True)
    assert [guard.took(rejected) for _ in range(2)] == [[], []]
    assert guard.took(Step(10, True)) == []
    assert [guard.took(step) for step in (rejected, Step(10, False), rejected)] == [[], [], []], "a veto is neither"
    (move,) = guard.took(rejected)
    assert move == Move(state, State.SHADOW, Action.RESET, "rejected steps", 3.0, 3.0)
    assert guard.took(rejected) == [], "counted from zero"


@pytest.mark.parametrize("state", [State.SHADOW, State.CANARY, State.ACTIVE])
def test_what_learned_for_long_enough_is_reset(state: State) -> None:
    guard = at(state, reset_rows=100)
    for _ in range(10):
        assert guard.state is state
        guard.took(Step(10, True))
        guard.took(Step(10, False))
    move = see(guard, GOOD, 1)[0]
    assert move == Move(state, State.SHADOW, Action.RESET, "periodic", 100.0, 100.0)
    assert see(guard, GOOD, 1) == [], "it counts from zero"


def test_a_periodic_reset_asks_for_no_cool_down() -> None:
    guard = at(State.ACTIVE, reset_rows=100)
    guard.took(Step(100, True))
    see(guard, GOOD, 1)
    moves = [move.after for _ in range(3) for move in see(guard, GOOD)]
    assert moves == [State.CANARY]


def test_a_certificate_puts_the_periodic_reset_off() -> None:
    guard = active(make(guarantee=AUDIT, reset_rows=100))
    guard.took(Step(1000, True))
    assert see(guard, GOOD) == []
    assert guard.state is State.ACTIVE


# Audits


def test_alarms_one_after_another_freeze_reset_and_quarantine() -> None:
    guard = active(make(guarantee=AUDIT, cooldown_rows=40))
    harm(guard)
    (move,) = guard.consider(Look(0, 0))
    assert move[:4] == (State.ACTIVE, State.FROZEN, Action.ROLLBACK, "audit")
    assert move.statistic >= move.threshold == 10.0
    assert not guard.learns
    assert guard.evidence is Evidence.UNKNOWN
    assert isinstance(guard.guarantee, Audit)
    assert not guard.guarantee.alarm, "the detector starts afresh"
    harm(guard)
    (move,) = guard.consider(Look(0, 0))
    assert move[:4] == (State.FROZEN, State.SHADOW, Action.RESET, "audit")
    for _ in range(8):
        see(guard, UNCLEAR)
    for _ in range(3):
        see(guard, GOOD)
    assert guard.state is State.CANARY
    harm(guard)
    (move,) = guard.consider(Look(0, 0))
    assert move[:4] == (State.CANARY, State.QUARANTINE, Action.RESET, "audit")
    assert not guard.serves
    assert not guard.learns


def test_alarms_that_lie_far_apart_are_first_ones() -> None:
    guard = active(make(guarantee=AUDIT, cooldown_rows=40))
    for _ in range(3):
        harm(guard)
        (move,) = guard.consider(Look(0, 0))
        assert move.after is State.FROZEN
        certify(guard)
        for _ in range(40):
            see(guard, GOOD)
        assert guard.state is State.ACTIVE


def test_a_frozen_stream_thaws_as_a_canary() -> None:
    guard = at(State.FROZEN)
    assert guard.serves
    seen: list[Move] = []
    for _ in range(4):
        assert (guard.state, guard.learns) == (State.FROZEN, False)
        seen += see(guard, BAD)
    assert [(move.before, move.after, move.rule) for move in seen] == [(State.FROZEN, State.CANARY, "cool-down over")]
    assert not guard.serves, "there is evidence against it"


def test_an_alarm_never_takes_a_stream_from_the_sources_answers() -> None:
    """Labels come late: of answers from before it was taken back to the source's."""
    guard = make(guarantee=AUDIT)
    assert guard.state is State.SHADOW
    harm(guard)
    guard.consider(Look(0, 0))
    assert not guard.serves


def test_an_alarm_tells_the_evidence_that_raised_it() -> None:
    guard = active(make(guarantee=AUDIT))
    harm(guard)
    answer(guard, -1, 12)  # of the same posting
    (move,) = guard.consider(Look(0, 0))
    assert move.rule == "audit"
    assert move.statistic >= move.threshold


@pytest.mark.parametrize("state", [State.CANARY, State.SHADOW])
def test_quarantine_ends_by_the_operator_only(state: State) -> None:
    guard = at(State.QUARANTINE)
    for _ in range(100):
        assert see(guard, GOOD, 100) == []
        assert guard.took(Step(100, False, True)) == []
    assert not guard.compares or not guard.serves
    if state is State.CANARY:
        assert [move.after for move in guard.put(State.CANARY)] == [State.CANARY]
    else:
        assert [(move.after, move.rule) for move in guard.release()] == [(State.SHADOW, "operator")]
        assert guard.evidence is Evidence.UNKNOWN or not guard.serves


# Cool-downs


def rows_until_canary(guard: Guard) -> int:
    """Rows of good evidence until a shadow stream is a canary."""
    for count in range(1, 10**6):
        if see(guard, GOOD, 1):
            assert guard.state is State.CANARY
            return count
    raise AssertionError


def vetoed(guard: Guard) -> None:
    """A canary goes back to the shadow."""
    (move,) = see(guard, BAD, 30)
    assert move.after is State.SHADOW


def test_a_cool_down_doubles_up_to_a_limit() -> None:
    guard = make(shadow_rows=1, canary_rows=30, cooldown_rows=40)
    rows_until_canary(guard)
    waited = []
    for _ in range(10):
        vetoed(guard)
        waited.append(rows_until_canary(guard))
    assert waited == [40 * min(2**time, MOST_COOLDOWN) for time in range(10)]


def test_who_comes_back_to_active_waits_for_the_first_length_again() -> None:
    guard = make(shadow_rows=1, canary_rows=30, cooldown_rows=40)
    rows_until_canary(guard)
    for _ in range(3):
        vetoed(guard)
        rows_until_canary(guard)
    active(guard)
    see(guard, BAD, 1)
    vetoed(guard)
    assert rows_until_canary(guard) == 40


def test_the_operator_ends_a_cool_down() -> None:
    guard = make(shadow_rows=1, canary_rows=30, cooldown_rows=40)
    rows_until_canary(guard)
    vetoed(guard)
    guard.release()
    assert rows_until_canary(guard) == 1
    vetoed(guard)
    assert rows_until_canary(guard) == 40, "and its doubling"


def test_another_cool_down_holds_from_now_on() -> None:
    """A new stream gets its own settings by ``change`` as well."""
    guard = make(shadow_rows=1, canary_rows=30, cooldown_rows=40)
    guard.change(guard.settings.model_copy(update={"cooldown_rows": 7}))
    rows_until_canary(guard)
    vetoed(guard)
    assert rows_until_canary(guard) == 7


def test_rows_compared_before_the_cool_down_is_over_count() -> None:
    """But it takes evidence of shadow_rows since the fall."""
    guard = make(shadow_rows=60, canary_rows=30, cooldown_rows=40)
    see(guard, GOOD, 60)
    vetoed(guard)
    assert rows_until_canary(guard) == 60


def test_rows_of_before_a_reset_are_no_evidence_of_what_comes_after_it() -> None:
    guard = at(State.ACTIVE, reset_rows=100)
    guard.took(Step(100, True))
    see(guard, GOOD, 200)
    assert guard.state is State.SHADOW
    assert see(guard, GOOD, 1) == []


# What it knows


@pytest.mark.parametrize(
    ("benefit", "evidence"),
    [
        (UNKNOWN, Evidence.UNKNOWN),
        (LEAST, Evidence.HELPS),
        (LEAST - 1e-9, Evidence.UNCLEAR),
        (-LEAST, Evidence.UNCLEAR),
        (-LEAST - 1e-9, Evidence.HARMS),
    ],
)
def test_evidence_in_a_word(benefit: float, evidence: Evidence) -> None:
    guard = make()
    see(guard, benefit)
    assert guard.evidence is evidence


@pytest.mark.parametrize("state", ALL)
def test_after_a_reset_nothing_is_known(state: State) -> None:
    guard = at(state)
    guard.was_reset()
    assert guard.evidence is Evidence.UNKNOWN
    assert not guard.learns


def test_after_a_reset_shadow_and_learning_are_counted_from_zero() -> None:
    guard = make(reset_rows=100)
    guard.took(Step(99, True))
    see(guard, GOOD, 19)
    guard.was_reset()
    guard.took(Step(99, True))
    assert see(guard, GOOD, 19) == []
    assert [move.rule for move in see(guard, GOOD, 1)] == ["benefit"]


@pytest.mark.parametrize(
    "cause",
    [
        "was_reset",
        "enabled again",
    ],
)
def test_unknown_is_never_fine(cause: str) -> None:
    """Whoever resets a stream, rolls it back, gives it another policy or has it guarded again."""
    guard = at(State.ACTIVE)
    if cause == "was_reset":
        guard.was_reset()
    else:
        guard.change(guard.settings.model_copy(update={"enabled": False}))
        guard.change(guard.settings.model_copy(update={"enabled": True}))
        assert guard.state is not State.ACTIVE, "nobody looked meanwhile"
    assert guard.compares or not guard.serves


@pytest.mark.parametrize("state", ALL)
def test_turned_on_again_it_starts_from_what_is_safe(state: State) -> None:
    guard = at(state)
    moves = guard.toggle()
    assert guard.evidence is Evidence.UNKNOWN
    expected = State.SHADOW if state in (State.CANARY, State.ACTIVE) else state
    assert guard.state is expected
    assert [(move.before, move.after, move.rule) for move in moves] == (
        [] if expected is state else [(state, State.SHADOW, "toggled")]
    )
    assert not guard.learns


# Labels


def test_labels_that_are_clear_count_for_more_than_the_estimate() -> None:
    guard = make()
    guard.labels = Labels(0.01, 0.2, guard.resets, guard.rows)
    assert [move.after for move in (*see(guard, BAD), *see(guard, UNKNOWN))] == [State.CANARY]
    assert (guard.evidence, guard.serves, guard.learns) == (Evidence.HELPS, True, True)
    guard = at(State.ACTIVE)
    guard.labels = Labels(-0.2, -0.01, guard.resets, guard.rows)
    assert (guard.evidence, guard.learns) == (Evidence.HARMS, False)
    assert [move.after for move in see(guard, GOOD)] == [State.CANARY]
    assert not guard.serves


@pytest.mark.parametrize("measured", [(-0.1, 0.1), (0.0, 0.1), (-0.1, 0.0)])
def test_labels_that_are_not_clear_leave_it_to_the_estimate(measured: tuple[float, float]) -> None:
    for benefit, evidence in ((GOOD, Evidence.HELPS), (BAD, Evidence.HARMS), (UNKNOWN, Evidence.UNKNOWN)):
        guard = make()
        guard.labels = Labels(*measured, guard.resets, guard.rows)
        see(guard, benefit)
        assert guard.evidence is evidence


@pytest.mark.parametrize("how", ["was_reset", "collapse"])
def test_labels_of_another_state_say_nothing(how: str) -> None:
    guard = at(State.ACTIVE)
    guard.labels = Labels(0.1, 0.2, guard.resets, guard.rows)
    if how == "was_reset":
        guard.was_reset()
    else:
        see(guard, GOOD, 1, 9.9)
    assert guard.evidence is Evidence.UNKNOWN


def test_labels_that_show_harm_end_what_is_served() -> None:
    """Without any pass of the source: ``monitor.shadow_ratio`` may be 0."""
    guard = at(State.ACTIVE)
    guard.labels = Labels(-0.2, -0.1, guard.resets, guard.rows)
    guard.consider(Look(10, 0))
    assert guard.evidence is Evidence.HARMS
    assert not guard.serves


# Updates a minute


def test_no_more_updates_a_minute_than_allowed() -> None:
    clock = Clock()
    guard = active(make(clock, updates_per_minute=3))
    for _ in range(3):
        assert guard.learns
        guard.took(Step(1, True))
        clock.now += 10
    assert not guard.learns
    assert guard.serves, "it is served as adapted all the same"
    clock.now = 159.9
    assert not guard.learns
    clock.now = 160.0
    assert guard.learns, "the first is a minute ago"
    guard.took(Step(1, True))
    assert not guard.learns
    clock.now = 170.0
    assert guard.learns


def test_steps_that_were_not_kept_are_no_updates() -> None:
    guard = active(make(updates_per_minute=1))
    guard.took(Step(1, False))
    guard.took(Step(1, False, True))
    assert guard.learns


def test_an_operator_does_not_lift_the_limit_on_updates() -> None:
    guard = make(updates_per_minute=1)
    guard.put(State.ACTIVE)
    guard.took(Step(1, True))
    assert not guard.learns


# Operators


@pytest.mark.parametrize("before", ALL)
@pytest.mark.parametrize("state", ALL)
def test_what_an_operator_chose_stays(before: State, state: State) -> None:
    guard = at(before)
    moves = guard.put(state)
    told = [(move.before, move.after, move.action, move.rule) for move in moves]
    assert told == ([] if state is before else [(before, state, Action.NONE, "operator")])
    assert guard.pinned
    for benefit in (GOOD, BAD, UNKNOWN):
        for _ in range(20):
            assert see(guard, benefit, 100, 9.9) == []
            assert guard.took(Step(100, False, True)) == []
    guard.toggle()
    assert guard.state is state
    assert guard.serves is (state in (State.CANARY, State.ACTIVE, State.FROZEN))
    assert guard.learns is (state in (State.SHADOW, State.CANARY, State.ACTIVE))


def test_a_pinned_stream_is_not_reset_by_its_audit() -> None:
    guard = at(State.FROZEN)
    guard.put(State.ACTIVE)
    harm(guard)
    assert guard.consider(Look(0, 0)) == []


def test_let_go_the_guard_decides_again() -> None:
    guard = make()
    guard.put(State.ACTIVE)
    see(guard, GOOD)
    assert guard.release() == []
    assert not guard.pinned
    assert [move.after for move in see(guard, BAD)] == [State.CANARY]


def test_a_frozen_stream_that_is_let_go_thaws() -> None:
    guard = make()
    guard.put(State.FROZEN)
    see(guard, GOOD)
    guard.release()
    assert [move.after for move in see(guard, BAD)] == [State.CANARY]


def test_let_go_it_is_not_taken_for_good_without_evidence() -> None:
    guard = make()
    guard.put(State.ACTIVE)
    guard.release()
    assert guard.evidence is Evidence.UNKNOWN
    assert guard.compares or not guard.serves


# Guarantees


@pytest.mark.parametrize(("kind", "made"), [("budget", Budget), ("ledger", Ledger), ("audit", Audit)])
def test_a_guarantee_wants_every_row_compared(kind: str, made: type) -> None:
    guard = make(guarantee={"kind": kind})
    assert isinstance(guard.guarantee, made)
    for state in ALL:
        guard.put(state)
        assert guard.compares
    assert make().guarantee is None


def test_another_guarantee_starts_afresh_and_the_same_goes_on() -> None:
    guard = make(guarantee={"kind": "budget", "eps": 0.1, "b0": 2.0})
    before = guard.guarantee
    guard.change(guard.settings.model_copy(update={"shadow_rows": 99}))
    assert guard.guarantee is before
    assert guard.settings.shadow_rows == 99
    wanted = guard.settings.guarantee.model_copy(update={"b0": 3.0})
    guard.change(guard.settings.model_copy(update={"guarantee": wanted}))
    assert guard.guarantee is not before


def test_the_audits_coin_is_the_one_that_was_given() -> None:
    tosses = iter([0.05, 0.5, 0.05])
    guard = make(coin=lambda: next(tosses), guarantee={**AUDIT, "q": 0.1})
    assert guard.guarantee is not None
    assert guard.guarantee.allow(np.ones(3, np.bool_)).ask.tolist() == [True, False, True]


def test_only_states_of_active_audited_streams_are_good_to_keep() -> None:
    guard = active(make(guarantee=AUDIT))
    assert not guard.is_good_to_keep(2)
    guard.took(Step(1, True))
    guard.took(Step(1, False))
    assert not guard.is_good_to_keep(2)
    guard.took(Step(1, True))
    assert guard.is_good_to_keep(2)
    assert not guard.is_good_to_keep(2), "counted from zero"
    unaudited = active(make())
    unaudited.took(Step(1, True))
    assert not unaudited.is_good_to_keep(1)


# To keep


@pytest.mark.parametrize("state", ALL)
@pytest.mark.parametrize("kind", ["none", "budget", "ledger", "audit"])
def test_a_guard_goes_on_where_it_left_off(state: State, kind: str) -> None:
    changes: dict[str, Any] = {"guarantee": {**AUDIT, "kind": kind}, "reset_rows": 500}
    guard = make(**changes)
    guard.put(state)
    guard.pinned = False
    for _ in range(3):
        see(guard, GOOD)
        if guard.guarantee is not None:
            guard.guarantee.allow(np.array([True, False]), guard.serves)
        guard.took(Step(10, True))
    again = make(**changes)
    again.restore(json.loads(json.dumps(guard.dump())))
    if isinstance(guard.guarantee, Audit):
        guard.guarantee.give_up()  # what it waited for is not remembered
    assert again.dump() | {"state": guard.dump()["state"]} == guard.dump()
    assert again.state is (State.SHADOW if guard.state in MAY_BE_SERVED else guard.state)
    assert again.evidence is Evidence.UNKNOWN
    assert not again.learns


@pytest.mark.parametrize("state", ALL)
def test_a_pin_is_kept(state: State) -> None:
    guard = make()
    guard.put(state)
    again = make()
    again.restore(guard.dump())
    assert (again.state, again.pinned) == (state, True)
    assert see(again, BAD, 100) == []


def test_a_cool_down_and_its_length_are_kept() -> None:
    guard = make(shadow_rows=1, canary_rows=30, cooldown_rows=40)
    rows_until_canary(guard)
    vetoed(guard)
    see(guard, GOOD, 15)
    again = make(shadow_rows=1, canary_rows=30, cooldown_rows=40)
    again.restore(guard.dump())
    assert rows_until_canary(again) == 25
    vetoed(again)
    assert rows_until_canary(again) == 80


def test_alarms_are_kept() -> None:
    guard = at(State.FROZEN)
    again = make(guarantee=AUDIT)
    again.restore(guard.dump())
    harm(again)
    assert [move.after for move in again.consider(Look(0, 0))] == [State.SHADOW], "the second one"


@pytest.mark.parametrize(
    "change",
    [
        {"state": "asleep"},
        {"state": None},
        {"rows": "many"},
        {"guarantee": {"kind": "none"}},
    ],
)
def test_what_is_no_saved_guard_is_refused(change: dict[str, Any]) -> None:
    guard = make(guarantee={"kind": "budget"})
    with pytest.raises((BadInput, ValueError, KeyError)):
        make(guarantee={"kind": "budget"}).restore(guard.dump() | change)
    for missing in guard.dump():
        with pytest.raises(KeyError):
            make(guarantee={"kind": "budget"}).restore({k: v for k, v in guard.dump().items() if k != missing})


# Whatever happens

ARROWS = {
    (State.SHADOW, State.CANARY), (State.CANARY, State.ACTIVE), (State.CANARY, State.SHADOW),
    (State.ACTIVE, State.CANARY), (State.ACTIVE, State.SHADOW), (State.SHADOW, State.SHADOW),
    (State.FROZEN, State.SHADOW), (State.FROZEN, State.CANARY), (State.FROZEN, State.FROZEN),
    (State.ACTIVE, State.FROZEN), (State.CANARY, State.FROZEN), *((one, State.QUARANTINE) for one in ALL),
}  # fmt: skip
"""Of the drawn diagram; ``RESET`` is the shadow, ``ROLLBACK`` is frozen."""
MAY_BE_SERVED = (State.CANARY, State.ACTIVE, State.FROZEN)
FIGURE = st.sampled_from([UNKNOWN, BAD, UNCLEAR, LEAST, BARELY, GOOD, -math.inf, math.inf])
OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("look"), st.integers(1, 60), st.booleans() | st.just(True), FIGURE, st.floats(0, 1.4)),
        st.tuples(st.just("good"), st.integers(1, 60)),
        st.tuples(st.just("step"), st.integers(1, 60), st.sampled_from(["applied", "vetoed", "rejected"])),
        st.tuples(st.just("labels"), st.sampled_from([-1, 0, 1, 1]), st.integers(1, 5)),
        st.tuples(st.just("put"), st.sampled_from(ALL)),
        st.tuples(st.just("release")),
        st.tuples(st.just("turn on")),
        st.tuples(st.just("reset")),
        st.tuples(st.just("measured"), st.sampled_from([(-0.3, -0.1), (-0.1, 0.1), (0.01, 0.2), (0.0, 0.1)])),
        st.tuples(st.just("restart")),
        st.tuples(st.just("wait"), st.integers(1, 90)),
    ),
    max_size=50,
)


def is_good(guard: Guard) -> bool:
    """By labels where they are clear, else by the estimate."""
    low, high = guard.measured or (-1, 1)
    return low > 0 or (high >= 0 and guard.benefit >= LEAST)


def check_moves(before: State, guard: Guard, moves: list[Move]) -> None:
    """They lead from one to the next, along the arrows, and say why."""
    states = [before, *(move.after for move in moves)]
    assert [move.before for move in moves] == states[:-1]
    assert states[-1] is guard.state
    assert not moves or guard.since is moves[-1]
    for move in moves:
        if move.rule in ("operator", "toggled"):
            continue
        assert move[:2] in ARROWS, move
        assert math.isnan(move.statistic) is math.isnan(move.threshold) or move.statistic != move.statistic
        if move.after in MAY_BE_SERVED and move.before not in MAY_BE_SERVED:
            assert (move.after, move.rule) in ((State.CANARY, "benefit"), (State.CANARY, "labels")), (
                "up only after fresh evidence"
            )
        if move.after is State.ACTIVE or (move.before, move.after) == (State.SHADOW, State.CANARY):
            assert guard.measured or move.statistic >= move.threshold == LEAST
        if move.action is not Action.NONE:
            assert move.rule in ("collapse", "periodic", "rejected steps", "audit")
            assert not move.statistic < move.threshold


@pytest.mark.parametrize("kind", ["none", "budget", "ledger", "audit"])
def test_whatever_happens(kind: str) -> None:
    @settings(max_examples=300, deadline=None)
    @given(OPERATIONS)
    def check(operations: list[tuple[Any, ...]]) -> None:
        clock = Clock()
        changes: dict[str, Any] = {
            "guarantee": {**AUDIT, "kind": kind}, "reset_rows": 150, "updates_per_minute": 4, "cooldown_rows": 30
        }  # fmt: skip
        guard = make(clock, **changes)
        kept: list[float] = []
        for name, *values in operations:
            before, was_pinned, moves = guard.state, guard.pinned, list[Move]()
            match name:
                case "look":
                    rows, compared, benefit, collapse = values
                    moves = guard.consider(Look(rows, rows if compared else 0, benefit, collapse))
                case "good":
                    moves = see(guard, GOOD, values[0])
                case "step":
                    rows, result = values
                    learns = guard.learns
                    result = "vetoed" if not learns and result == "applied" else result
                    kept += [clock.now] if result == "applied" else []
                    moves = guard.took(Step(rows, result == "applied", result == "rejected"))
                case "labels" if guard.guarantee is not None:
                    answer(guard, *values)
                    moves = guard.consider(Look(0, 0))
                case "put":
                    moves = guard.put(values[0])
                case "release":
                    moves = guard.release()
                    was_pinned = False
                case "turn on":
                    moves = guard.toggle()
                case "reset":
                    guard.was_reset()
                    before = guard.state
                    kept.clear()
                    assert guard.evidence is Evidence.UNKNOWN
                case "measured":
                    low, high = values[0]
                    guard.labels = Labels(low, high, guard.resets, guard.rows)
                case "restart":
                    saved = json.loads(json.dumps(guard.dump()))
                    guard = make(clock, **changes)
                    guard.restore(saved)
                    before = guard.state
                    assert guard.evidence is Evidence.UNKNOWN
                    kept.clear()
                case "wait":
                    clock.now += values[0]
            check_moves(before, guard, moves)
            automatic = name in ("look", "good", "step", "labels")
            assert not (was_pinned and automatic and moves)
            assert not (before is State.QUARANTINE and automatic and moves)
            assert 30 <= guard._cooldown <= 30 * MOST_COOLDOWN
            assert 0 <= guard._wait <= guard._cooldown
            if any(move.action is not Action.NONE for move in moves):
                kept.clear()
            now = [one for one in kept if one > clock.now - 60]
            assert len(now) <= 4
            if guard.learns:
                assert len(now) < 4
                assert guard.pinned or is_good(guard)
                assert guard.state in (State.SHADOW, State.CANARY, State.ACTIVE)
            if guard.serves:
                assert guard.state in MAY_BE_SERVED
                assert guard.pinned or guard.state is not State.CANARY or is_good(guard)
                assert guard.pinned or guard.state is State.FROZEN or guard.evidence is not Evidence.UNKNOWN
            if guard.state not in (State.ACTIVE, State.FROZEN):
                assert guard.compares

    check()
