"""Where stream state lives: examples for every promise of the store, and a stateful comparison with a plain dict."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from adapters.base import State
from tests.adapters.networks import assert_same, flat, join, take
from tta_server.policies import make_policy
from tta_server.state.memory import Budget
from tta_server.state.slots import HostRows, Layout, Packed, SlotPool
from tta_server.state.store import Lease, StateStore
from tta_server.types import Lane, Stream

CPU = torch.device("cpu")
TENT = make_policy("tent", {})
LANE, OTHER = Lane("digits", TENT), Lane("letters", TENT)
BYTES = 3 * 8 + 2 * 2 * 4 + 8 + 8 + 1
"""Of one state as below."""


def make_state(value: float, count: int = 0) -> State:
    """A state of several dtypes and shapes, a scalar among them, told apart by its values. ``S = 1``."""
    ramp = torch.arange(4, dtype=torch.float32).view(1, 2, 2)
    return State(
        {"norm.weight": torch.full((1, 3), value, dtype=torch.float64)},
        {
            "window": ramp + value,
            "step": torch.tensor([count]),
            "scale": torch.tensor([value / 2], dtype=torch.float64),
            "warm": torch.tensor([count > 0]),
        },
    )


INITIAL = make_state(-1.0)


def make_stream(name: str, lane: Lane = LANE) -> Stream:
    return Stream(name, lane.model, lane.policy, random_key=0, created=0.0)


def make_store(slots: int = 2) -> StateStore:
    store = StateStore(Budget(slots), CPU)
    store.add_lane(LANE, INITIAL)
    return store


def commit(
    store: StateStore, states: dict[Stream, State], lane: Lane = LANE, allowed: list[bool] | None = None
) -> list[bool]:
    """One step of these streams; all of them may keep what they get, unless ``allowed`` says otherwise."""
    lease, _ = store.lease(lane, list(states))
    try:
        return store.commit(lease, join(list(states.values())), allowed or [True] * len(states)).kept
    finally:
        store.release(lease)
        store.check_integrity()


def held(store: StateStore, stream: Stream, lane: Lane = LANE) -> dict[str, Tensor]:
    return flat(store.export(lane, stream))


def test_a_new_stream_starts_from_the_initial_state() -> None:
    """Leased or exported; it has no state of its own until its first commit."""
    store, a, b = make_store(), make_stream("a"), make_stream("b")
    assert store.tier(LANE, a) == "none"
    assert_same(held(store, a), flat(INITIAL))
    lease, states = store.lease(LANE, [a, b])
    for index in range(2):
        assert_same(flat(take(states, index)), flat(INITIAL))
    store.release(lease)
    assert (a.version, b.version) == (0, 0)


def test_commit_keeps_each_streams_own_state() -> None:
    """And raises its version by one; the next lease, in another order, finds them."""
    store, a, b = make_store(), make_stream("a"), make_stream("b")
    assert commit(store, {a: make_state(1.0, 1), b: make_state(2.0, 2)}) == [True, True]
    assert (a.version, b.version) == (1, 1)
    lease, states = store.lease(LANE, [b, a])
    assert_same(flat(take(states, 0)), flat(make_state(2.0, 2)))
    assert_same(flat(take(states, 1)), flat(make_state(1.0, 1)))
    store.release(lease)
    assert (a.version, b.version) == (1, 1)


def test_a_lease_hands_out_copies() -> None:
    """Whatever a policy does to the tensors it got, only a commit changes what is kept; an export is a copy, too."""
    store, a = make_store(), make_stream("a")
    commit(store, {a: make_state(1.0)})
    lease, states = store.lease(LANE, [a])
    for value in flat(states).values():
        value.zero_()
    store.release(lease)
    exported = store.export(LANE, a)
    for value in flat(exported).values():
        value.zero_()
    assert_same(held(store, a), flat(make_state(1.0)))
    new = make_stream("b")
    for value in flat(store.export(LANE, new)).values():
        value.zero_()
    assert_same(held(store, new), flat(INITIAL))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("key", ["norm.weight", "window", "scale"])
def test_commit_rejects_a_row_that_is_not_finite(key: str, bad: float) -> None:
    """Bit for bit: one bad value anywhere keeps the stream's whole previous state and version, and no other's."""
    store, a, b, c = make_store(3), make_stream("a"), make_stream("b"), make_stream("c")
    commit(store, {a: make_state(1.0, 1), b: make_state(2.0, 1), c: make_state(3.0, 1)})
    broken = make_state(5.0, 2)
    (broken.weights if key in broken.weights else broken.memory)[key].view(-1)[-1] = bad
    assert commit(store, {a: make_state(4.0, 2), b: broken, c: make_state(6.0, 2)}) == [True, False, True]
    assert_same(held(store, a), flat(make_state(4.0, 2)))
    assert_same(held(store, b), flat(make_state(2.0, 1)))
    assert_same(held(store, c), flat(make_state(6.0, 2)))
    assert (a.version, b.version, c.version) == (2, 1, 2)
    assert commit(store, {b: broken}) == [False]
    assert_same(held(store, b), flat(make_state(2.0, 1)))


def test_commit_keeps_only_what_is_allowed() -> None:
    """A sound state that was vetoed leaves its stream as it was; so does a broken one that was allowed."""
    store, a, b, c = make_store(3), make_stream("a"), make_stream("b"), make_stream("c")
    commit(store, {a: make_state(1.0), b: make_state(2.0), c: make_state(3.0)})
    new = {a: make_state(4.0), b: make_state(5.0), c: make_state(torch.nan)}
    assert commit(store, new, allowed=[False, True, True]) == [False, True, False]
    for stream, value, version in ((a, 1.0, 1), (b, 5.0, 2), (c, 3.0, 1)):
        assert_same(held(store, stream), flat(make_state(value)))
        assert stream.version == version
    assert commit(store, new, allowed=[False, False, False]) == [False, False, False]
    assert_same(held(store, b), flat(make_state(5.0)))


def misfits() -> dict[str, tuple[State, str]]:
    """States of another layout, and what the refusal must name."""
    fits = make_state(9.0)
    longer = {"norm.weight": torch.zeros(1, 4, dtype=torch.float64)}
    coarser = {"norm.weight": torch.zeros(1, 3)}
    return {
        "missing key": (State({}, fits.memory), "norm.weight"),
        "extra key": (State(fits.weights | {"other": torch.zeros(1, 2)}, fits.memory), "other"),
        "moved key": (State({}, fits.memory | fits.weights), "norm.weight"),
        "other shape": (State(longer, fits.memory), "norm.weight"),
        "other dtype": (State(coarser, fits.memory), "float32"),
    }


@pytest.mark.parametrize("what", misfits())
def test_a_state_of_another_layout_is_refused(what: str) -> None:
    """By commit and by restore, saying which tensor it is, with nothing changed."""
    state, named = misfits()[what]
    store, a = make_store(), make_stream("a")
    commit(store, {a: make_state(1.0)})
    lease, _ = store.lease(LANE, [a])
    with pytest.raises(ValueError, match=re.escape(named)):
        store.commit(lease, state, [True])
    store.release(lease)
    with pytest.raises(ValueError, match=re.escape(named)):
        store.restore(LANE, a, state, 7)
    assert_same(held(store, a), flat(make_state(1.0)))
    assert a.version == 1
    store.check_integrity()


def test_the_stream_used_longest_ago_makes_room() -> None:
    """Its state goes to host memory and comes back unchanged; using a stream counts, not only committing it."""
    store = make_store(slots=2)
    a, b, c = (make_stream(name) for name in "abc")
    commit(store, {a: make_state(1.0)})
    commit(store, {b: make_state(2.0)})
    lease, _ = store.lease(LANE, [a])
    store.release(lease)
    commit(store, {c: make_state(3.0)})
    assert [store.tier(LANE, one) for one in (a, b, c)] == ["device", "host", "device"]
    assert store.evictions == 1
    for stream, value in ((a, 1.0), (b, 2.0), (c, 3.0)):
        assert_same(held(store, stream), flat(make_state(value)))
    lease, states = store.lease(LANE, [b])
    assert_same(flat(states), flat(make_state(2.0)))
    store.release(lease)
    assert [store.tier(LANE, one) for one in (a, b, c)] == ["host", "device", "device"]
    assert a.version == b.version == c.version == 1


def test_counts_follow_the_tiers() -> None:
    """Streams and bytes on the device and in host memory."""
    store = make_store(slots=2)
    assert store.counts() == {"device": (0, 0), "host": (0, 0), "disk": (0, 0)}
    for index, name in enumerate("abc"):
        commit(store, {make_stream(name): make_state(float(index))})
    assert store.counts() == {"device": (2, 2 * BYTES), "host": (1, BYTES), "disk": (0, 0)}


def test_of_leases_of_one_stream_the_first_pins_it() -> None:
    """Another ends without a trace, whichever ends first; one that comes after the first is over pins anew."""
    store, a, b = make_store(), make_stream("a"), make_stream("b")
    leased = store._lanes[LANE].leased
    first, _ = store.lease(LANE, [a])
    second, _ = store.lease(LANE, [b, a])
    assert (first.pinned, second.pinned) == ([a], [b])
    store.release(second)
    assert leased == {a}
    second, _ = store.lease(LANE, [a])
    store.release(first)
    assert leased == set()
    third, _ = store.lease(LANE, [a])
    store.release(second)
    assert leased == {a}, "the third one's"
    part, _ = store.part(third, 0)
    store.release(part)
    assert leased == {a}, "a part ends with the whole"
    store.release(third)
    assert leased == set()


def test_a_lease_that_is_refused_leaves_the_pins_of_others() -> None:
    store, a, b, c = make_store(), make_stream("a"), make_stream("b"), make_stream("c")
    lease, _ = store.lease(LANE, [a])
    with pytest.raises(ValueError, match="2 slots are leased"):
        store.lease(LANE, [a, b, c])
    assert store._lanes[LANE].leased == {a}
    store.release(lease)
    assert store._lanes[LANE].leased == set()
    store.check_integrity()


def test_a_leased_stream_is_not_evicted() -> None:
    """When all slots are leased the next lease is refused, and refused without a trace."""
    store = make_store(slots=2)
    a, b, c = (make_stream(name) for name in "abc")
    commit(store, {a: make_state(1.0)})
    first, _ = store.lease(LANE, [a])
    second, states = store.lease(LANE, [b])
    with pytest.raises(ValueError, match="2 slots are leased"):
        store.lease(LANE, [c])
    store.check_integrity()
    assert [store.tier(LANE, one) for one in (a, b, c)] == ["device", "device", "none"]
    assert store.commit(second, make_state(2.0), [True]).kept == [True]
    store.release(second)
    assert_same(flat(states), flat(INITIAL))
    assert commit(store, {c: make_state(3.0)}) == [True]
    assert [store.tier(LANE, one) for one in (a, b, c)] == ["device", "host", "device"]
    assert store.commit(first, make_state(4.0), [True]).kept == [True]
    store.release(first)
    for stream, value in ((a, 4.0), (b, 2.0), (c, 3.0)):
        assert_same(held(store, stream), flat(make_state(value)))


def test_a_refused_lease_pins_nothing() -> None:
    """More streams than slots: an error, after which all slots can be leased and no state is lost."""
    store = make_store(slots=2)
    a, b, c = (make_stream(name) for name in "abc")
    commit(store, {a: make_state(1.0), b: make_state(2.0)})
    with pytest.raises(ValueError, match="slots are leased"):
        store.lease(LANE, [a, b, c])
    store.check_integrity()
    assert commit(store, {c: make_state(3.0)}) == [True]
    for stream, value in ((a, 1.0), (b, 2.0), (c, 3.0)):
        assert_same(held(store, stream), flat(make_state(value)))


def test_a_stream_without_commits_leaves_no_state_when_evicted() -> None:
    """It starts from the initial state again; nothing is kept for it."""
    store = make_store(slots=1)
    a, b = make_stream("a"), make_stream("b")
    lease, _ = store.lease(LANE, [a])
    store.release(lease)
    commit(store, {b: make_state(2.0)})
    assert store.tier(LANE, a) == "none"
    assert_same(held(store, a), flat(INITIAL))


@pytest.mark.parametrize("version", [0, 4])
def test_a_restored_state_survives_eviction(version: int) -> None:
    """Whatever its version: one that was forked from another stream may count from 0 and still has its own state."""
    store = make_store(slots=1)
    a, b = make_stream("a"), make_stream("b")
    store.restore(LANE, a, make_state(5.0, 3), version)
    assert a.version == version
    assert store.tier(LANE, a) == "host"
    lease, states = store.lease(LANE, [a])
    assert_same(flat(states), flat(make_state(5.0, 3)))
    store.release(lease)
    commit(store, {b: make_state(2.0)})
    assert_same(held(store, a), flat(make_state(5.0, 3)))
    store.check_integrity()


def test_restore_replaces_what_was_there_and_keeps_a_copy() -> None:
    """Also of a stream on the device; what the caller does to the tensors afterwards does not matter."""
    store, a = make_store(), make_stream("a")
    commit(store, {a: make_state(1.0)})
    given = make_state(5.0)
    store.restore(LANE, a, given, 9)
    for value in flat(given).values():
        value.zero_()
    assert_same(held(store, a), flat(make_state(5.0)))
    assert commit(store, {a: make_state(6.0)}) == [True]
    assert a.version == 10
    assert store.counts()["device"] == (1, BYTES)


@pytest.mark.parametrize("evicted", [False, True])
def test_reset_takes_a_stream_back_to_the_start(evicted: bool) -> None:
    """From the device or from host memory, and a reset of a stream without state changes nothing."""
    store = make_store(slots=1)
    a, b = make_stream("a"), make_stream("b")
    commit(store, {a: make_state(1.0)})
    if evicted:
        commit(store, {b: make_state(2.0)})
    store.reset(LANE, a)
    assert a.version == 0
    assert store.tier(LANE, a) == "none"
    lease, states = store.lease(LANE, [a])
    assert_same(flat(states), flat(INITIAL))
    store.release(lease)
    store.reset(LANE, a)
    store.reset(Lane("unknown", TENT), make_stream("z"))
    if evicted:
        assert_same(held(store, b), flat(make_state(2.0)))


def test_drop_gives_the_slot_back() -> None:
    """And with a lane's last state the lane goes; dropping what is not there is nothing."""
    store = make_store(slots=1)
    a, b = make_stream("a"), make_stream("b")
    commit(store, {a: make_state(1.0)})
    commit(store, {b: make_state(2.0)})
    store.drop(LANE, b)
    assert store.has_lane(LANE)
    assert store.counts() == {"device": (0, 0), "host": (1, BYTES), "disk": (0, 0)}
    store.check_integrity()
    store.drop(LANE, a)
    assert not store.has_lane(LANE)
    assert store.tier(LANE, a) == "none"
    store.drop(LANE, a)
    store.add_lane(LANE, INITIAL)
    assert commit(store, {make_stream("c"): make_state(3.0)}) == [True]


def test_a_stream_in_a_step_cannot_be_touched() -> None:
    """Resetting, dropping or restoring a leased stream is a fault of the caller, and is caught as one."""
    store, a = make_store(), make_stream("a")
    lease, _ = store.lease(LANE, [a])
    with pytest.raises(AssertionError, match="running step"):
        store.reset(LANE, a)
    with pytest.raises(AssertionError, match="running step"):
        store.drop(LANE, a)
    with pytest.raises(AssertionError, match="running step"):
        store.restore(LANE, a, INITIAL, 1)
    store.release(lease)
    store.check_integrity()


def test_lanes_share_the_slots_but_no_state() -> None:
    """The device's slots are one budget; the state used longest ago makes room, whatever its lane."""
    store, a, b = make_store(slots=1), make_stream("a"), make_stream("b", OTHER)
    store.add_lane(OTHER, make_state(-2.0))
    commit(store, {a: make_state(1.0)})
    assert_same(held(store, b, OTHER), flat(make_state(-2.0)))
    commit(store, {b: make_state(2.0)}, OTHER)
    assert store.evictions >= 1
    assert store.tier(LANE, a) == "host"
    assert store.tier(OTHER, b) == "device"
    store.check_integrity()
    store.add_lane(LANE, make_state(-3.0))
    assert_same(held(store, a), flat(make_state(1.0)))
    assert_same(held(store, make_stream("c")), flat(INITIAL))


def test_a_state_survives_a_device_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is fetched stays where it was until it has arrived, and the slot meant for it is free again."""
    store, a, b = make_store(slots=1), make_stream("a"), make_stream("b")
    commit(store, {a: make_state(1.0)})
    commit(store, {b: make_state(2.0)})
    assert store.tier(LANE, a) == "host"

    def broken(self: SlotPool, slot: int, packed: Packed) -> None:
        raise RuntimeError("device lost")

    with monkeypatch.context() as patch:
        patch.setattr(SlotPool, "write", broken)
        with pytest.raises(RuntimeError, match="device lost"):
            store.lease(LANE, [a])
    store.check_integrity()
    assert a.version == 1
    assert_same(held(store, a), flat(make_state(1.0)))


def test_a_lease_that_fails_pins_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copying the states out allocates, and may fail; the slots are free to be evicted afterwards."""
    store, a, b = make_store(slots=1), make_stream("a"), make_stream("b")
    commit(store, {a: make_state(1.0)})

    def broken(self: SlotPool, slots: list[int]) -> Packed:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(SlotPool, "gather", broken)
        with pytest.raises(RuntimeError, match="out of memory"):
            store.lease(LANE, [a])
    commit(store, {b: make_state(2.0)})
    assert_same(held(store, a), flat(make_state(1.0)))
    store.drop(LANE, a)
    store.check_integrity()


def test_a_restore_that_fails_leaves_the_old_state(monkeypatch: pytest.MonkeyPatch) -> None:
    store, a = make_store(), make_stream("a")
    commit(store, {a: make_state(1.0)})

    def broken(self: HostRows, packed: Packed) -> int:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(HostRows, "put", broken)
        with pytest.raises(MemoryError):
            store.restore(LANE, a, make_state(2.0), version=7)
    assert a.version == 1
    assert_same(held(store, a), flat(make_state(1.0)))


def test_a_pool_survives_a_growth_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """All its tensors grow, or none."""
    store, streams = make_store(slots=4), [make_stream(str(index)) for index in range(3)]
    commit(store, {streams[0]: make_state(0.0)})
    empty, calls = torch.empty, 0

    def failing(*args: Any, **kwargs: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise RuntimeError("out of memory")
        return empty(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", failing)
        with pytest.raises(RuntimeError, match="out of memory"):
            store.lease(LANE, [streams[1]])
    for index, stream in enumerate(streams[1:], start=1):
        commit(store, {stream: make_state(float(index))})
    store.check_integrity()
    for index, stream in enumerate(streams):
        assert_same(held(store, stream), flat(make_state(float(index))))


def test_a_policy_without_state_takes_no_room() -> None:
    """The store says so, and its export is empty."""
    store = StateStore(Budget(2), CPU)
    store.add_lane(LANE, State({}, {}))
    assert not store.has_state(LANE)
    assert flat(store.export(LANE, make_stream("a"))) == {}
    full = make_store()
    assert full.has_state(LANE)


def test_streams_are_told_apart_by_identity() -> None:
    """One that was deleted and one opened later under the same name are two."""
    store, old, new = make_store(), make_stream("a"), make_stream("a")
    commit(store, {old: make_state(1.0)})
    assert_same(held(store, new), flat(INITIAL))
    commit(store, {new: make_state(2.0)})
    assert_same(held(store, old), flat(make_state(1.0)))


def test_pool_grows_up_to_its_capacity() -> None:
    """Slots keep their content while the pool grows, are handed out once, and run out at the capacity."""
    layout = Layout(INITIAL)
    pool = SlotPool(layout, capacity=21, device=CPU)
    taken: list[int] = []
    for index in range(21):
        slot = pool.acquire()
        assert slot is not None
        pool.write(slot, {dtype: rows[0] for dtype, rows in layout.pack(make_state(float(index))).items()})
        taken.append(slot)
        assert pool.used == index + 1
    assert sorted(taken) == list(range(21))
    assert pool.acquire() is None
    states = layout.unpack(pool.gather(taken))
    for index in range(21):
        assert_same(flat(take(states, index)), flat(make_state(float(index))))
    pool.release(taken[4])
    assert pool.used == 20
    assert pool.acquire() == taken[4]
    assert pool.acquire() is None


def test_layout_packs_and_unpacks() -> None:
    """Stacked states of several dtypes come back as they were; the size is the sum of their tensors'."""
    layout = Layout(INITIAL)
    states = join([make_state(1.0, 1), make_state(2.0, 2), make_state(3.0, 3)])
    assert_same(flat(layout.unpack(layout.pack(states))), flat(states))
    assert layout.bytes == BYTES


# --- moves between lanes ------------------------------------------------------------------------------------------

SAME = Lane("digits", make_policy("tent", {"lr": 0.5}))
"""Another setting, so another lane."""


@pytest.mark.parametrize("tier", ["device", "host"])
@pytest.mark.parametrize("company", [False, True])
def test_a_state_moves_to_another_lane_as_it_is(tier: str, company: bool) -> None:
    """Bit for bit, with its version; the lane it leaves goes with its last state, and others' states stay."""
    store, a, b = make_store(), make_stream("a"), make_stream("b")
    commit(store, {a: make_state(1.0, 1)})
    commit(store, {a: make_state(2.0, 2)})
    if company:
        commit(store, {b: make_state(3.0)})
    if tier == "host":
        for name in "cd":
            lease, _ = store.lease(LANE, [make_stream(name)])
            store.release(lease)
    assert store.tier(LANE, a) == tier
    store.add_lane(SAME, make_state(-5.0))
    assert store.move(LANE, SAME, a) is True
    store.check_integrity()
    assert (store.tier(LANE, a), store.tier(SAME, a), a.version) == ("none", "host", 2)
    assert_same(held(store, a, SAME), flat(make_state(2.0, 2)))
    if company:
        assert_same(held(store, b), flat(make_state(3.0)))
    assert store.has_lane(LANE) == (company or tier == "host")
    assert commit(store, {a: make_state(4.0)}, SAME) == [True]
    assert a.version == 3


def test_a_stream_without_a_state_of_its_own_starts_from_that_of_the_new_lane() -> None:
    store, a = make_store(), make_stream("a")
    store.add_lane(SAME, make_state(-5.0))
    assert store.move(LANE, SAME, a) is True
    assert (store.tier(SAME, a), store.has_lane(LANE)) == ("none", False)
    assert_same(held(store, a, SAME), flat(make_state(-5.0)))


def test_a_stream_that_has_not_committed_takes_nothing_along() -> None:
    """Its slot holds the initial state of the lane it leaves: that is not its own."""
    store, a = make_store(), make_stream("a")
    lease, _ = store.lease(LANE, [a])
    store.release(lease)
    store.add_lane(SAME, make_state(-5.0))
    assert store.move(LANE, SAME, a) is True
    store.check_integrity()
    assert_same(held(store, a, SAME), flat(make_state(-5.0)))
    assert store.counts() == {"device": (0, 0), "host": (0, 0), "disk": (0, 0)}


@pytest.mark.parametrize("what", misfits())
def test_a_state_does_not_move_into_another_layout(what: str) -> None:
    """Then nothing changes."""
    store, a = make_store(), make_stream("a")
    commit(store, {a: make_state(1.0, 1)})
    store.add_lane(SAME, misfits()[what][0])
    assert store.move(LANE, SAME, a) is False
    store.check_integrity()
    assert (store.tier(LANE, a), store.tier(SAME, a), a.version) == ("device", "none", 1)
    assert_same(held(store, a), flat(make_state(1.0, 1)))


def test_layouts_fit_whatever_their_values() -> None:
    own = Layout(make_state(1.0))
    assert own.fits(Layout(make_state(2.0, 7)))
    for state, _ in misfits().values():
        assert not own.fits(Layout(state))
        assert not Layout(state).fits(own)


def test_a_stream_in_a_step_cannot_be_moved() -> None:
    store, a = make_store(), make_stream("a")
    commit(store, {a: make_state(1.0)})
    store.add_lane(SAME, INITIAL)
    lease, _ = store.lease(LANE, [a])
    with pytest.raises(AssertionError, match="stream 'a' is in a running step"):
        store.move(LANE, SAME, a)
    store.release(lease)


def test_host_memory_holds_many_states_and_reuses_their_room() -> None:
    """Far more streams than slots: every state is found again, also after others were dropped and new ones came."""
    store = make_store(slots=2)
    values: dict[Stream, float] = {}

    def add(count: int) -> None:
        for _ in range(count):
            stream, value = make_stream(f"s{len(values)}"), 1.0 + 1000 * len(values) + count
            commit(store, {stream: make_state(value)})
            values[stream] = value

    def check() -> None:
        for stream, value in values.items():
            assert_same(held(store, stream), flat(make_state(value)))
        assert store.counts() == {
            "device": (2, 2 * BYTES),
            "host": (len(values) - 2, (len(values) - 2) * BYTES),
            "disk": (0, 0),
        }

    add(150)
    check()
    for stream in list(values)[:148:2]:
        store.drop(LANE, stream)
        del values[stream]
    check()
    add(90)
    check()
    for stream, value in values.items():  # each comes to the device and pushes another out
        lease, states = store.lease(LANE, [stream])
        assert_same(flat(states), flat(make_state(value)))
        store.release(lease)
    check()
    assert len(store._lanes[LANE].rows._chunks) == 3, "room for the 164 in host memory, and no more"


# --- any order of calls, against a dict --------------------------------------------------------------------------


class StoreMachine(RuleBasedStateMachine):
    """The store against a dict of states, through leases that overlap, evictions, broken commits and drops."""

    SLOTS = 3

    @initialize()
    def start(self) -> None:
        self.store = StateStore(Budget(self.SLOTS), CPU)
        self.lanes = {LANE: make_state(-1.0), OTHER: make_state(-2.0)}
        self.streams = [make_stream(f"a{i}", LANE) for i in range(5)] + [make_stream(f"b{i}", OTHER) for i in range(2)]
        self.states: dict[Stream, State] = {}
        """Of the streams that have one of their own."""
        self.versions = dict.fromkeys(self.streams, 0)
        self.leases: list[Lease] = []
        self.value = 0

    def lane(self, stream: Stream) -> Lane:
        return Lane(stream.model, stream.policy)

    def expected(self, stream: Stream) -> dict[str, Tensor]:
        return flat(self.states.get(stream, self.lanes[self.lane(stream)]))

    def fresh(self) -> State:
        """A state told apart from all others."""
        self.value += 1
        return make_state(float(self.value), self.value)

    @property
    def leased(self) -> set[Stream]:
        return {stream for lease in self.leases for stream in lease.streams}

    @rule(lane=st.sampled_from([LANE, OTHER]), which=st.lists(st.integers(0, 4), min_size=1, max_size=4, unique=True))
    def lease(self, lane: Lane, which: list[int]) -> None:
        own = [stream for stream in self.streams if self.lane(stream) == lane]
        chosen = [own[index] for index in which if index < len(own) and own[index] not in self.leased]
        if not chosen:
            return
        self.store.add_lane(lane, self.lanes[lane])
        if len(self.leased) + len(chosen) > self.SLOTS:
            with pytest.raises(ValueError, match="slots are leased"):
                self.store.lease(lane, chosen)
            return
        lease, states = self.store.lease(lane, chosen)
        self.leases.append(lease)
        assert lease.streams == chosen
        for index, stream in enumerate(chosen):
            assert_same(flat(take(states, index)), self.expected(stream))

    @precondition(lambda self: self.leases)
    @rule(
        which=st.integers(0, 99),
        bad=st.lists(st.sampled_from(["", "", "", "weights", "memory", "veto"]), min_size=4, max_size=4),
    )
    def commit(self, which: int, bad: list[str]) -> None:
        lease = self.leases.pop(which % len(self.leases))
        states, sound = [self.fresh() for _ in lease.streams], list[bool]()
        for state, fault in zip(states, bad, strict=False):
            sound.append(not fault)
            if fault == "weights":
                state.weights["norm.weight"][0, 1] = torch.nan
            elif fault == "memory":
                state.memory["window"][0, 1, 0] = torch.inf
        allowed = [fault != "veto" for fault in bad[: len(states)]]
        assert self.store.commit(lease, join(states), allowed).kept == sound
        self.store.release(lease)
        for stream, state, kept in zip(lease.streams, states, sound, strict=True):
            if kept:
                self.states[stream] = state
                self.versions[stream] += 1

    @precondition(lambda self: self.leases)
    @rule(which=st.integers(0, 99))
    def release(self, which: int) -> None:
        self.store.release(self.leases.pop(which % len(self.leases)))

    @rule(which=st.integers(0, 6))
    def reset(self, which: int) -> None:
        stream = self.streams[which]
        if stream in self.leased:
            return
        self.store.reset(self.lane(stream), stream)
        self.states.pop(stream, None)
        self.versions[stream] = 0

    @rule(which=st.integers(0, 6))
    def drop(self, which: int) -> None:
        """The stream is gone; another of the same name comes."""
        stream = self.streams[which]
        if stream in self.leased:
            return
        self.store.drop(self.lane(stream), stream)
        assert self.store.tier(self.lane(stream), stream) == "none"
        self.states.pop(stream, None)
        del self.versions[stream]
        self.streams[which] = make_stream(stream.id, self.lane(stream))
        self.versions[self.streams[which]] = 0

    @rule(which=st.integers(0, 6))
    def move(self, which: int) -> None:
        """To the other lane, which has the same layout."""
        stream = self.streams[which]
        old = self.lane(stream)
        new = OTHER if old == LANE else LANE
        if stream in self.leased:
            return
        for lane in (old, new):
            self.store.add_lane(lane, self.lanes[lane])
        assert self.store.move(old, new, stream) is True
        stream.model = new.model
        assert self.store.tier(old, stream) == "none"

    @rule(which=st.integers(0, 6), version=st.integers(1, 9))
    def restore(self, which: int, version: int) -> None:
        stream, state = self.streams[which], self.fresh()
        if stream in self.leased:
            return
        self.store.add_lane(self.lane(stream), self.lanes[self.lane(stream)])
        self.store.restore(self.lane(stream), stream, state, version)
        self.states[stream], self.versions[stream] = state, version

    @invariant()
    def holds_what_the_dict_holds(self) -> None:
        for stream in self.streams:
            assert stream.version == self.versions[stream]
            lane = self.lane(stream)
            if self.store.has_lane(lane):
                assert_same(flat(self.store.export(lane, stream)), self.expected(stream))
            else:
                assert stream not in self.states, "a lane with states was dropped"

    @invariant()
    def keeps_its_books(self) -> None:
        self.store.check_integrity()
        tiers = {stream: self.store.tier(self.lane(stream), stream) for stream in self.streams}
        for lane in self.lanes:
            resident = [one for one, tier in tiers.items() if tier == "device" and self.lane(one) == lane]
            assert len(resident) <= self.SLOTS
        assert all(tiers[stream] == "device" for stream in self.leased), "a leased stream was evicted"
        assert all(tiers[stream] != "none" for stream in self.states)
        counts = self.store.counts()
        for tier in ("device", "host"):
            held = sum(one == tier for one in tiers.values())
            assert counts[tier] == (held, held * BYTES)
        for lease in self.leases:
            assert len(set(lease.slots)) == len(lease.slots)


StoreMachine.TestCase.settings = settings(
    max_examples=40,
    stateful_step_count=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
TestStoreMachine: Any = StoreMachine.TestCase


@pytest.mark.parametrize(("values", "rows"), [(10, 64), (2**20, 4), (2**22, 1), (2**23, 1)])
def test_host_memory_grows_by_few_rows_of_large_states(values: int, rows: int) -> None:
    """Chunks of at most 16 MB, or of one row: whole networks must not be reserved 64 at a time."""
    layout = Layout(State({}, {"x": torch.zeros(1, values)}))
    host = HostRows(layout)
    places = [host.put({torch.float32: torch.full((values,), float(index))}) for index in range(3)]
    assert len(set(places)) == 3
    assert [float(host.read(place)[torch.float32][-1]) for place in places] == [0.0, 1.0, 2.0]
    assert host._chunks[0][torch.float32].shape == (rows, values)
    host.free(places[1])
    assert host.put({torch.float32: torch.zeros(values)}) == places[1]


# How far a step went


def test_a_commit_tells_how_far_the_weights_went() -> None:
    """From before the step, and from the initial state, over the norm of the latter; memory does not count."""
    store, (a, b) = make_store(), (make_stream("a"), make_stream("b"))
    size = torch.linalg.vector_norm(torch.cat([value.flatten() for value in INITIAL.weights.values()]))
    for first, second in ((3.0, 5.0), (4.0, 5.0)):
        lease, before = store.lease(LANE, [a, b])
        new = join([make_state(first), make_state(second)])
        told = store.commit(lease, new, [True, False])
        for index, old in ((0, before), (1, before)):
            gaps = [(new.weights[key] - old.weights[key])[index].flatten() for key in new.weights]
            far = [(new.weights[key] - INITIAL.weights[key])[index].flatten() for key in new.weights]
            if index == 0:
                assert told.update[0] == pytest.approx(float(torch.linalg.vector_norm(torch.cat(gaps)) / size))
                assert told.distance[0] == pytest.approx(float(torch.linalg.vector_norm(torch.cat(far)) / size))
        assert math.isnan(told.update[1]), "it was not kept"
        store.release(lease)


def test_nothing_is_committed_when_that_cannot_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    store, a = make_store(), make_stream("a")
    lease, _ = store.lease(LANE, [a])

    def out_of_memory(*_: object) -> Tensor:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("tta_server.state.store._norm", out_of_memory)
    with pytest.raises(RuntimeError, match="out of memory"):
        store.commit(lease, make_state(3.0), [True])
    store.release(lease)
    assert a.version == 0
    assert_same(flat(store.export(LANE, a)), flat(INITIAL))
