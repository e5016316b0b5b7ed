"""Three tiers over a real store: whatever moves where, whatever crashes when, a stream has the state it should have."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from adapters.base import State
from tests.adapters.networks import assert_same, flat, join
from tests.state.test_store import BYTES, CPU, INITIAL, LANE, make_state, make_stream
from tta_server.errors import Conflict, TtaError
from tta_server.settings import Durability
from tta_server.state.keeper import Keeper
from tta_server.state.memory import Budget, free_bytes
from tta_server.state.records import Shutdown, StoreFailed
from tta_server.state.sqlite import FILE, SqliteStore
from tta_server.state.store import StateStore
from tta_server.types import Event, Stream

SYNC, ASYNC, NONE = (Durability(mode="sync"), Durability(steps=4, seconds=5.0), Durability(mode="none"))
FLUSH = 20.0


class Tiers:
    """A store of two slots and two host places over a folder, with a clock of its own."""

    def __init__(self, folder: Path, slots: int = 2, host: int = 2, idle_seconds: float = math.inf) -> None:
        self.folder, self.now, self.events = folder, 0.0, list[Event]()
        self._arguments = slots, host, idle_seconds
        self.open()

    def open(self, take_over: bool = False) -> dict[str, Stream]:
        """Begins as a server does; returns the streams that were there."""
        slots, host, idle_seconds = self._arguments
        self.keeper = Keeper(SqliteStore(self.folder, snapshot_steps=3, snapshots=2))
        index = self.keeper.open(take_over)
        budget = Budget(slots, 2**40, host * BYTES)
        self.store = StateStore(budget, CPU, self.keeper, idle_seconds, self.events.append, lambda: self.now)
        self.store.add_lane(LANE, INITIAL)
        self.keeper.start()
        found = {}
        for one in index.streams:
            stream = one.record.stream(LANE.policy)
            self.store.adopt(stream, one)
            found[stream.id] = stream
        return found

    def step(self, *streams: Stream, value: float = 0.0) -> None:
        """A step of these streams to states of this value and their next version."""
        self.store.add_lane(LANE, INITIAL)
        lease, _ = self.store.lease(LANE, streams)
        try:
            new = join([make_state(value, stream.version + 1) for stream in streams])
            assert all(self.store.commit(lease, new, [True] * len(streams)).kept)
        finally:
            self.store.release(lease)
        self.store.save_due()

    def held(self, stream: Stream) -> State:
        self.store.add_lane(LANE, INITIAL)
        return self.store.export(LANE, stream)

    def flush(self) -> None:
        self.store.save_all()
        assert self.keeper.flush(FLUSH)

    def crash(self) -> None:
        """Ends at once, with whatever is stored by now."""
        self.keeper.close(Shutdown(False))


@pytest.fixture
def tiers(tmp_path: Path) -> Iterator[Tiers]:
    made = Tiers(tmp_path)
    yield made
    made.crash()


def make(name: str, durability: Durability = ASYNC) -> Stream:
    stream = make_stream(name)
    stream.durability, stream.state_bytes = durability, BYTES
    return stream


def test_a_working_set_larger_than_memory_goes_to_the_disk_and_comes_back(tiers: Tiers) -> None:
    streams = [make(f"s{index}", NONE if index % 3 == 2 else ASYNC) for index in range(12)]
    for turn in range(3):
        for index, stream in enumerate(streams):
            tiers.step(stream, value=100 * turn + index)
            tiers.store.check_integrity()
    assert tiers.keeper.flush(FLUSH)
    tiers.step(streams[0], value=7.0)  # what was unsaved can leave host memory now
    assert {tiers.store.tier(LANE, stream) for stream in streams} == {"device", "host", "disk"}
    counts = tiers.store.counts()
    assert counts["device"] == (2, 2 * BYTES)
    assert sum(number for number, _ in counts.values()) == 12
    assert counts["disk"][1] == counts["disk"][0] * BYTES
    for index, stream in enumerate(streams[1:], 1):
        assert_same(flat(tiers.held(stream)), flat(make_state(200 + index, 3)))


def test_a_stream_on_its_way_to_the_device_does_not_leave_memory(tmp_path: Path) -> None:
    """It was used longest ago, is saved, and its coming makes another one go where there is no room."""
    tiers, one, other = Tiers(tmp_path, slots=1, host=1), make("one"), make("other")
    tiers.step(one, value=1.0)
    tiers.step(other, value=2.0)
    tiers.flush()
    assert tiers.store.tier(LANE, one) == "host"
    lease, state = tiers.store.lease(LANE, [one])
    assert_same(flat(state), flat(make_state(1.0, 1)))
    tiers.store.release(lease)
    assert_same(flat(tiers.held(other)), flat(make_state(2.0, 1)))
    tiers.crash()


def test_a_state_stays_in_memory_until_it_is_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the disk fails, host memory holds more than it should, and nothing is lost; then it shrinks by itself."""
    tiers, streams = Tiers(tmp_path), [make(f"s{index}") for index in range(8)]
    with monkeypatch.context() as broken:

        def fail(*_: object) -> None:
            raise StoreFailed("the disk is full")

        broken.setattr(SqliteStore, "write", fail)
        for turn in range(6):
            for index, stream in enumerate(streams):
                tiers.step(stream, value=10 * turn + index)
        assert tiers.store.tier(LANE, streams[0]) == "host"
        assert tiers.store.counts()["disk"] == (0, 0)
        assert "disk is full" in tiers.keeper.problem
        assert [stream.saved.revision for stream in streams] == [0] * 8
    assert tiers.keeper.flush(FLUSH)
    tiers.flush()
    for stream in streams:
        tiers.step(stream, value=1.0)
    tiers.flush()
    assert tiers.keeper.problem == ""
    for stream in streams:
        tiers.step(stream, value=2.0)
    assert tiers.store.counts()["disk"][0] > 0
    tiers.crash()


def test_idle_streams_leave_memory_and_are_told_of(tmp_path: Path) -> None:
    tiers = Tiers(tmp_path, slots=8, idle_seconds=60.0)
    old, new, fresh = make("old"), make("new"), make("fresh")
    tiers.step(old, value=1.0)
    tiers.store.release(tiers.store.lease(LANE, [fresh])[0])
    tiers.now = 30.0
    tiers.step(new, value=2.0)
    tiers.now = 61.0
    assert tiers.store.maintain() <= 1.0
    assert tiers.keeper.flush(FLUSH)
    tiers.now = 63.0
    tiers.store.maintain()
    assert [tiers.store.tier(LANE, one) for one in (old, new, fresh)] == ["disk", "device", "none"]
    assert [(event.kind, event.stream, event.fields) for event in tiers.events] == [("evicted", old, {"version": 1})]
    assert_same(flat(tiers.held(old)), flat(make_state(1.0, 1)))
    tiers.step(old, value=3.0)
    assert (old.version, tiers.store.tier(LANE, old)) == (2, "device")
    tiers.crash()


def test_time_alone_has_a_step_saved(tiers: Tiers) -> None:
    stream = make("s", Durability(steps=1000, seconds=5.0))
    tiers.step(stream, value=1.0)
    assert tiers.keeper.flush(FLUSH)
    assert stream.saved.version == 1, "what is new is saved at once"
    for tiers.now in (2.0, 4.0):
        tiers.step(stream, value=tiers.now)
    tiers.now = 6.9
    assert tiers.store.maintain() == pytest.approx(0.1)
    assert tiers.keeper.flush(FLUSH)
    assert stream.saved.version == 1
    tiers.now = 7.0
    tiers.store.maintain()
    assert tiers.keeper.flush(FLUSH)
    assert (stream.saved.version, stream.unsaved) == (3, 0)
    for tiers.now in (8.0, 9.0):
        tiers.step(stream, value=tiers.now)
        tiers.flush()
    assert len(tiers.store._due_later) == 1, "one timer for each"


@pytest.mark.parametrize(("durability", "bound"), [(SYNC, 0), (ASYNC, 4), (NONE, math.inf)])
def test_an_answer_waits_for_what_its_durability_says(tiers: Tiers, durability: Durability, bound: float) -> None:
    """However fast steps are, no answer leaves with more unsaved steps before it than promised."""
    stream, told = make("s", durability), list[int]()
    for turn in range(40):
        revision = stream.revision

        def release(refusal: TtaError | None, revision: int = revision) -> None:
            assert refusal is None
            told.append(revision - stream.saved.revision)

        tiers.store.meet(stream)
        tiers.store.hold(stream, release)
        tiers.step(stream, value=float(turn))
    tiers.flush()
    assert len(told) == 40
    # The first answer is by the initial state: nothing of it can be lost.
    assert max(told[1:]) <= bound


def test_a_reset_and_a_change_of_settings_are_saved_too(tiers: Tiers) -> None:
    stream = make("s")
    tiers.step(stream, value=1.0)
    tiers.flush()
    tiers.store.reset(LANE, stream)
    tiers.flush()
    assert (stream.saved.version, stream.unsaved) == (0, 0)
    stream.adapt = False
    tiers.store.touch(stream)
    tiers.flush()
    tiers.crash()
    found = tiers.open()["s"]
    assert (found.version, found.adapt, found.lost) == (0, False, 0)
    assert_same(flat(tiers.held(found)), flat(INITIAL))


def test_a_crash_tells_how_many_steps_it_cost(tiers: Tiers) -> None:
    stream = make("s", Durability(steps=100, seconds=3600.0))
    for turn in range(7):
        tiers.step(stream, value=float(turn))
        if turn == 2:
            tiers.flush()
    tiers.crash()
    found = tiers.open()["s"]
    assert (found.version, found.lost) == (3, 4)
    assert_same(flat(tiers.held(found)), flat(make_state(2.0, 3)))
    tiers.crash()
    again = tiers.open()["s"]
    assert again.lost == 4, "nobody was told yet"


def test_a_damaged_state_is_put_aside_for_the_one_before(tiers: Tiers) -> None:
    import sqlite3

    stream = make("s")
    for turn in range(3):
        tiers.step(stream, value=float(turn))
        tiers.flush()
    tiers.crash()
    with sqlite3.connect(tiers.folder / FILE) as db:
        db.execute(
            "UPDATE states SET data = zeroblob(length(data)) WHERE revision = (SELECT max(revision) FROM states)"
        )
    db.close()
    found = tiers.open()["s"]
    assert found.version == 3
    assert_same(flat(tiers.held(found)), flat(make_state(1.0, 2)))
    assert (found.version, found.lost, tiers.keeper.tally.damaged) == (2, 1, 1)
    (event,) = tiers.events
    assert (event.kind, event.fields["version"], event.fields["went_back_to"]) == ("damaged", 3, 2)
    tiers.step(found, value=9.0)
    tiers.flush()
    tiers.crash()
    assert_same(flat(tiers.held(tiers.open()["s"])), flat(make_state(9.0, 3)))


def test_a_state_of_another_layout_is_refused_and_stays(tiers: Tiers) -> None:
    stream = make("s")
    tiers.step(stream, value=1.0)
    tiers.flush()
    tiers.crash()
    found = tiers.open()["s"]
    other = State({"norm.weight": INITIAL.weights["norm.weight"].float()}, INITIAL.memory)
    tiers.store._lanes.clear()
    tiers.store.add_lane(LANE, other)
    with pytest.raises(Conflict, match=r"weights/norm.weight F64 \[3\] where .* is expected"):
        tiers.store.lease(LANE, [found])
    assert (found.version, tiers.store.tier(LANE, found)) == (1, "disk")


def test_what_is_read_ahead_is_not_waited_for(tiers: Tiers) -> None:
    streams = [make(f"s{index}") for index in range(8)]
    for index, stream in enumerate(streams):
        tiers.step(stream, value=float(index))
    tiers.flush()
    tiers.crash()
    found = tiers.open()
    ahead = [found["s0"], found["s1"]]
    tiers.store.prefetch(ahead, [])
    keeper = tiers.keeper
    with keeper._readable:
        assert keeper._readable.wait_for(lambda: None not in keeper._ahead.values(), FLUSH)
    tiers.store.prefetch([found["s2"]], ahead)
    lease, _ = tiers.store.lease(LANE, ahead)
    tiers.store.release(lease)
    assert (tiers.keeper.tally.prefetched, tiers.keeper.tally.fetched) == (2, 0)
    for index, stream in enumerate(ahead):
        assert_same(flat(tiers.held(stream)), flat(make_state(float(index), 1)))


def test_free_memory_is_what_the_container_leaves(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 2000 kB\nMemAvailable:    1000 kB\n")
    assert free_bytes(tmp_path, tmp_path / "none") == 1000 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    assert free_bytes(tmp_path, tmp_path) == 1000 * 1024
    (tmp_path / "memory.max").write_text("300000\n")
    (tmp_path / "memory.current").write_text("100000\n")
    assert free_bytes(tmp_path, tmp_path) == 200_000
    assert free_bytes() > 0


class AnyOrder(RuleBasedStateMachine):
    """Streams of every durability over tiny tiers against a list of the states each has had."""

    names = st.sampled_from(["a", "b", "c", "d", "e", "f"])

    def __init__(self) -> None:
        super().__init__()
        self._folder = tempfile.TemporaryDirectory()
        self.tiers = Tiers(Path(self._folder.name), idle_seconds=50.0)
        self.streams: dict[str, Stream] = {}
        self.history: dict[str, dict[int, State]] = {}
        """By stream and revision."""
        self.counter = 0.0

    @rule(names=st.lists(names, min_size=1, max_size=2, unique=True), durability=st.sampled_from([SYNC, ASYNC, NONE]))
    def step(self, names: list[str], durability: Durability) -> None:
        for name in names:
            if name not in self.streams:
                self.streams[name] = make(name, durability)
                self.history[name] = {1: INITIAL}
        self.counter += 1
        streams = [self.streams[name] for name in names]
        self.tiers.step(*streams, value=self.counter)
        for name, stream in zip(names, streams, strict=True):
            self.history[name][stream.revision] = make_state(self.counter, stream.version)

    @rule(name=names)
    def reset(self, name: str) -> None:
        if name in self.streams:
            self.tiers.store.reset(LANE, self.streams[name])
            self.history[name][self.streams[name].revision] = INITIAL

    @rule(name=names)
    def remove(self, name: str) -> None:
        if name in self.streams:
            self.tiers.store.remove(LANE, self.streams.pop(name))
            self.tiers.store.add_lane(LANE, INITIAL)
            del self.history[name]

    @rule(seconds=st.sampled_from([1.0, 6.0, 100.0]))
    def pass_time(self, seconds: float) -> None:
        self.tiers.now += seconds
        self.tiers.store.maintain()

    @rule()
    def flush(self) -> None:
        self.tiers.flush()

    @rule(is_clean=st.booleans())
    def restart(self, is_clean: bool) -> None:
        if is_clean:
            self.tiers.flush()
        self.tiers.crash()
        promised = {name: stream.saved.revision for name, stream in self.streams.items()}
        before, self.streams = self.streams, self.tiers.open()
        for name, old in before.items():
            stream = self.streams.get(name)
            if stream is None:
                assert not is_clean or old.durability.mode == "none"
                assert not promised[name]
                del self.history[name]
                continue
            assert promised[name] <= stream.revision <= old.revision
            assert stream.lost == (0 if old.durability.mode == "none" else old.lost + old.revision - stream.revision)
            state = self.history[name][stream.state_revision]
            assert_same(flat(self.tiers.held(stream)), flat(state))
            self.history[name] = {stream.revision: state}
        assert self.streams.keys() <= before.keys()

    @invariant()
    def every_stream_has_its_state(self) -> None:
        """What was handed over is written first, so that the same calls have the same effect every time."""
        assert self.tiers.keeper.flush(FLUSH)
        self.tiers.store.check_integrity()
        for name, stream in self.streams.items():
            assert_same(flat(self.tiers.held(stream)), flat(self.history[name][max(self.history[name])]))

    def teardown(self) -> None:
        self.tiers.crash()
        self._folder.cleanup()


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(
    max_examples=15, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
