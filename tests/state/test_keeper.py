"""The keeper: who is told what and when, whatever the store does meanwhile. The store is the real one, made to fail."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.state.test_sqlite import left_by_a_crash, opened, run_raw
from tta_server.errors import TtaError, Unavailable
from tta_server.policies import make_policy
from tta_server.state import keeper as module
from tta_server.state.keeper import Keeper
from tta_server.state.records import Damaged, Fenced, Field, InUse, Record, Save, Shutdown, Stored, StoreFailed
from tta_server.state.sqlite import FILE, SqliteStore
from tta_server.types import NEVER_SAVED, Stream

TENT = make_policy("tent", {})
FIELDS = (Field("weights/norm.weight", "F32", (2,)),)
FAILS = 10**9
"""Times, until told otherwise."""


class Gate:
    """Where a thread can be made to wait."""

    def __init__(self) -> None:
        self._is_shut, self._entered, self._passing = False, threading.Semaphore(0), threading.Semaphore(0)

    def shut(self) -> None:
        self._is_shut = True

    def go_through(self) -> None:
        if self._is_shut:
            self._entered.release()
            assert self._passing.acquire(timeout=10)

    def wait(self) -> None:
        """Returns when a thread is there."""
        assert self._entered.acquire(timeout=10)

    def let_one(self) -> None:
        self._passing.release()

    def open(self) -> None:
        """For the one that is there, and for all to come."""
        self._is_shut = False
        self._passing.release()


class Faulty(SqliteStore):
    """Fails so many times before or after it has done its work."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.acquiring, self.writing, self.loading = Gate(), Gate(), Gate()
        self.not_acquired = self.before = self.after = 0
        self.after_fault: Exception = StoreFailed("it did not answer")
        self.load_faults = list[Exception]()
        self.writes = list[list[Save]]()

    def acquire(self, take_over: bool = False) -> None:
        self.acquiring.go_through()
        if self.not_acquired:
            self.not_acquired -= 1
            raise StoreFailed("it cannot be owned")
        super().acquire(take_over)
        assert self._writer is not None
        self._writer.execute("PRAGMA synchronous = OFF")  # the power stays on

    def write(
        self,
        saves: Sequence[Save],
        removals: Sequence[int] = (),
        unmarks: Sequence[tuple[int, str]] = (),
        bad: Sequence[tuple[int, int, str]] = (),
    ) -> set[int]:
        self.writing.go_through()
        self.writes.append(list(saves))
        if self.before:
            self.before -= 1
            raise StoreFailed("the disk is full")
        refused = super().write(saves, removals, unmarks, bad)
        if self.after:
            self.after -= 1
            raise self.after_fault
        return refused

    def load(self, key: int, revision: int) -> Stored:
        self.loading.go_through()
        if self.load_faults:
            raise self.load_faults.pop()
        return super().load(key, revision)


class Told:
    """Somebody who is told, and how often."""

    def __init__(self) -> None:
        self.of = list[TtaError | None]()
        self._event = threading.Event()

    def __call__(self, error: TtaError | None) -> None:
        self.of.append(error)
        self._event.set()

    def wait(self) -> TtaError | None:
        assert self._event.wait(10)
        assert len(self.of) == 1
        return self.of[0]


class Rig:
    """A keeper, its store, and streams for it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.store = folder, Faulty(folder)
        self.keeper = Keeper(self.store)
        self.told = list[Told]()

    def start(self) -> Rig:
        self.keeper.open()
        self.keeper.start()
        return self

    def teller(self) -> Told:
        self.told.append(Told())
        return self.told[-1]

    def stream(self, id: str = "a", steps: int = 0) -> Stream:
        """A new one, of so many stored steps."""
        stream = Stream(id, "digits", TENT, random_key=1, created=0.0, digest="5e", tenant="t")
        for _ in range(steps):
            assert self.step(stream).wait() is None
        return stream

    def step(self, stream: Stream, *marks: str) -> Told:
        stream.version += 1
        stream.revision += 1
        stream.state_revision = stream.revision
        return self.save(stream, FIELDS, content(stream), *marks)

    def touch(self, stream: Stream, *marks: str) -> Told:
        """A change that leaves the state as it is."""
        stream.revision += 1
        return self.save(stream, None, None, *marks)

    def save(self, stream: Stream, fields: tuple[Field, ...] | None, data: bytes | None, *marks: str) -> Told:
        told, state = self.teller(), None if fields is None else (fields, data)
        self.keeper.save(stream, Record.of(stream, TENT, stream.digest), state, marks, told)
        return told

    def hold(self, stream: Stream) -> Told:
        """An answer that waits for the stream as it is now."""
        told = self.teller()
        self.keeper.hold(stream, stream.revision, told)
        return told

    def remove(self, stream: Stream) -> Told:
        told = self.teller()
        self.keeper.remove(stream, told)
        return told

    def unmark(self, stream: Stream, name: str) -> Told:
        told = self.teller()
        self.keeper.unmark(stream, name, told)
        return told

    def write_now(self, *streams: Stream) -> None:
        """Returns while a write of these is held up."""
        self.store.writing.shut()
        for stream in streams:
            self.step(stream)
        self.store.writing.wait()

    def stored(self) -> dict[str, tuple[int, bytes | None]]:
        """By another reader: each stream's revision and newest state."""
        reader = SqliteStore(self.folder)
        index = reader.index()
        assert not index.damaged
        found = {one.record.id: (one.revision, reader.load(one.key, one.state_revision).data) for one in index.streams}
        reader.close()
        return found

    def end(self) -> None:
        self.store.writing.open()
        self.store.loading.open()
        self.store.acquiring.open()
        self.keeper.close(Shutdown(clean=True))
        self.store.close()
        assert [len(told.of) for told in self.told] == [1] * len(self.told), "each is told once"


def content(stream: Stream) -> bytes:
    return f"{stream.id:4}{stream.revision:4}".encode()


@pytest.fixture
def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    monkeypatch.setattr(module, "RETRY_SECONDS", 0.01)
    made = Rig(tmp_path / "streams")
    yield made
    made.end()


def in_thread(call: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    return thread


def ended(thread: threading.Thread) -> bool:
    thread.join(10)
    return not thread.is_alive()


def refused(told: Told) -> bool:
    return isinstance(told.wait(), Unavailable)


# Together


def test_what_waits_is_written_together(rig: Rig) -> None:
    """One commit for all that came while the one before was under way; of each stream the newest alone."""
    rig.start()
    a, b, c = (rig.stream(id) for id in "abc")
    rig.write_now(a)
    for _ in range(3):
        rig.step(b)
    rig.step(c)
    rig.touch(c)
    told = [rig.step(a) for _ in range(2)]
    assert rig.keeper.waiting == 3
    rig.store.writing.open()
    assert [one.wait() for one in told] == [None, None]
    assert rig.keeper.flush(10)
    assert [[(one.record.id, one.revision) for one in saves] for saves in rig.store.writes] == [
        [("a", 2)], [("b", 4), ("c", 3), ("a", 4)],
    ]  # fmt: skip
    assert rig.stored() == {"a": (4, b"a      4"), "b": (4, b"b      4"), "c": (3, b"c      2")}
    assert (a.unsaved, b.unsaved, c.unsaved) == (0, 0, 0)
    assert (c.saved.revision, c.saved.state_revision, c.saved.version) == (3, 2, 1)
    assert (rig.keeper.tally.saved, rig.keeper.tally.saved_bytes) == (4, 32)


def test_a_marked_state_is_not_left_out(rig: Rig) -> None:
    """However many newer ones come while it waits; names for the same state come together."""
    rig.start()
    a = rig.stream()
    rig.write_now(a)
    rig.step(a, "first")
    rig.touch(a, "second")
    rig.touch(a)
    rig.step(a)
    rig.step(a)
    rig.touch(a, "last")
    rig.store.writing.open()
    assert rig.keeper.flush(10)
    assert [(one.revision, one.state_revision, one.marks) for one in rig.store.writes[1]] == [
        (5, 3, ("first", "second")), (8, 7, ("last",)),
    ]  # fmt: skip
    assert [(one.revision, one.marks) for one in rig.keeper.snapshots(a)] == [
        (7, ("last",)), (3, ("first", "second")), (2, ()),
    ]  # fmt: skip
    assert rig.keeper.load(a, 3).data == b"a      3"
    assert rig.unmark(a, "first").wait() is None
    assert [one.marks for one in rig.keeper.snapshots(a)][1] == ("second",)


def test_a_commit_has_an_end(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is beyond so many bytes waits for the next, and none is left behind."""
    monkeypatch.setattr(module, "WRITE_BYTES", 15)
    rig.start()
    streams = [rig.stream(id) for id in "abcdef"]
    rig.write_now(streams[0])
    told = [rig.step(stream) for stream in streams]
    rig.store.writing.open()
    assert [one.wait() for one in told] == [None] * 6
    assert [len(saves) for saves in rig.store.writes] == [1, 2, 2, 2]


def test_flush_and_wait(rig: Rig) -> None:
    """``flush`` returns when all were told; ``wait`` when the write that is under way is over, not before."""
    rig.start()
    a = rig.stream()
    rig.step(a)
    assert rig.keeper.flush(10)
    assert rig.told[-1].of == [None]
    rig.write_now(a)
    assert rig.keeper.waiting == 0
    assert not rig.keeper.flush(0)
    waiting = in_thread(lambda: rig.keeper.wait(10))
    waiting.join(0.05)
    assert waiting.is_alive()
    rig.store.writing.open()
    assert ended(waiting)
    rig.keeper.wait(10)  # nothing is under way
    rig.store.before = FAILS
    assert refused(rig.step(a))
    assert not rig.keeper.flush(0)
    rig.store.before = 0
    assert rig.keeper.flush(10)


# Answers


def test_an_answer_leaves_when_its_step_is_stored(rig: Rig) -> None:
    """Once, and not before."""
    rig.start()
    a, other = rig.stream(steps=1), rig.stream("b")
    assert rig.hold(a).of == [None]
    assert rig.hold(other).of == [None], "nothing was handed over of it"
    rig.write_now(a)
    first = rig.hold(a)
    rig.step(a)
    second = rig.hold(a)
    rig.store.writing.let_one()
    assert first.wait() is None
    rig.store.writing.wait()
    assert (second.of, a.saved.revision) == ([], 3)
    rig.store.writing.open()
    assert second.wait() is None
    assert a.saved.revision == 4


@pytest.mark.parametrize("why", ["fails", "stalls", "refuses", "removed", "closed"])
def test_an_answer_that_need_not_wait(rig: Rig, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves at once, as do those after it."""
    rig.start()
    a = rig.stream(steps=1)
    rig.write_now(a)
    held = rig.hold(a)
    if why == "fails":
        rig.store.before = FAILS
        rig.store.writing.open()
    elif why == "stalls":
        rig.keeper.check_stall()
        assert held.of == []
        monkeypatch.setattr(module, "STALL_SECONDS", 0.0)
        rig.keeper.check_stall()
        assert "has not ended" in rig.keeper.problem
    elif why == "refuses":
        run_raw(rig.folder, "UPDATE streams SET revision = 40")
        rig.store.writing.open()
    elif why == "removed":
        rig.remove(a)
    else:
        closing = in_thread(lambda: rig.keeper.close(Shutdown(clean=True)))
    assert held.wait() is None
    if why in ("fails", "stalls", "closed"):
        rig.step(a)
        assert rig.hold(a).of == [None]
    rig.store.before = 0
    rig.store.writing.open()
    assert ended(closing) if why == "closed" else rig.keeper.flush(10)
    assert rig.keeper.problem == ""


# A store that fails


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("steps", [0, 2])
def test_what_could_not_be_written_is_written_later(rig: Rig, when: str, times: int, steps: int) -> None:
    """All of it, once, also where the store had it after all when it said that it failed. Who waited is told at once,
    and nobody is refused for ever."""
    rig.start()
    a, b = rig.stream("a", steps), rig.stream("b", steps)
    rig.write_now(a)
    rig.step(b)
    told = [rig.step(a, "kept"), rig.touch(a), rig.step(a)]
    setattr(rig.store, when, times)
    rig.store.writing.open()
    assert rig.keeper.flush(10)
    assert all(len(one.of) == 1 for one in told)
    assert rig.keeper.problem == ""
    assert (rig.keeper.tally.failed, rig.keeper.tally.refused) == (times, 0)
    for stream in (a, b):
        assert rig.stored()[stream.id] == (stream.revision, content(stream))
        assert rig.step(stream).wait() is None
        assert stream.saved.revision == stream.revision
        assert rig.stored()[stream.id] == (stream.revision, content(stream))
    assert rig.keeper.tally.refused == 0


@pytest.mark.parametrize("fault", [Damaged("noise"), TypeError("of our own")])
def test_a_fault_after_a_write(rig: Rig, fault: Exception) -> None:
    """Of any kind: what is stored is not refused."""
    rig.start()
    a, b = rig.stream("a", 1), rig.stream("b")
    rig.write_now(a)
    told = [rig.step(a), rig.step(b)]
    rig.store.after, rig.store.after_fault = 1, fault
    rig.store.writing.open()
    assert rig.keeper.flush(10)
    assert all(len(one.of) == 1 for one in told)
    assert (rig.keeper.problem, rig.keeper.tally.refused) == ("", 0)
    assert rig.stored() == {"a": (4, b"a      4"), "b": (2, b"b      2")}
    assert (a.unsaved, b.unsaved) == (0, 0)


def test_what_waits_while_the_store_fails_goes_together(rig: Rig) -> None:
    """The state of a save that failed is not lost by one without a state that comes after it; its name is, for who
    asked for it was told so."""
    rig.start()
    a = rig.stream(steps=1)
    rig.store.before = FAILS
    assert refused(rig.step(a, "name"))
    rig.touch(a)
    problem = rig.keeper.problem
    assert (problem, rig.keeper.waiting, a.saved.revision) == ("the disk is full", 1, 2)
    rig.store.before = 0
    assert rig.keeper.flush(10)
    assert rig.stored() == {"a": (4, b"a      3")}
    assert [one.marks for one in rig.keeper.snapshots(a)] == [(), ()]
    rig.store.before = FAILS
    assert refused(rig.unmark(a, "name"))
    rig.store.before = 0
    assert rig.keeper.flush(10)


def test_a_refused_save_is_handed_over_again(rig: Rig) -> None:
    """With its state; what came after it and relies on that state is refused, too."""
    rig.start()
    a = rig.stream(steps=1)
    run_raw(rig.folder, "UPDATE streams SET revision = 40")
    rig.write_now(a)
    first, second = rig.told[-1], rig.touch(a)
    assert rig.keeper.handed(a) == (4, 3)
    rig.store.writing.open()
    for told in (first, second):
        assert isinstance(told.wait(), StoreFailed)
    assert (rig.keeper.handed(a), rig.keeper.tally.refused, a.saved.revision) == ((2, 2), 2, 2)
    assert rig.step(a).wait() is None
    assert rig.stored() == {"a": (5, b"a      5")}
    assert rig.keeper.fetch(a)[0] is not None


def test_a_stream_that_cannot_be_written_keeps_no_other_from_it(rig: Rig) -> None:
    """It alone is refused, and so is nothing else that was to be written with it."""
    rig.start()
    a, gone, named, poison = rig.stream("a"), rig.stream("g", 1), rig.stream("n"), rig.stream("p")
    assert rig.step(named, "name").wait() is None
    rig.write_now(a)
    poison.last_number = 2**70  # not a number of JSON's
    bad, good = rig.step(poison), rig.step(a)
    held, others = rig.hold(poison), [rig.remove(gone), rig.unmark(named, "name")]
    rig.store.writing.open()
    assert isinstance(bad.wait(), StoreFailed)
    assert [good.wait(), held.wait(), *(one.wait() for one in others)] == [None] * 4
    assert rig.stored().keys() == {"a", "n"}
    assert (rig.keeper.problem, rig.keeper.handed(poison), rig.keeper.tally.refused) == ("", (0, 0), 1)
    assert poison.saved == NEVER_SAVED
    poison.last_number = 7
    assert rig.step(poison).wait() is None
    assert rig.stored()["p"] == (3, b"p      3")


def test_one_stream_alone_that_cannot_be_written_is_refused(rig: Rig) -> None:
    """The store does not fail for it: it is the stream's own fault."""
    rig.start()
    a, poison = rig.stream(), rig.stream("p")
    poison.last_number = 2**70
    assert "TypeError" in str(rig.step(poison).wait())
    assert rig.keeper.flush(10)
    assert rig.step(a).wait() is None
    assert rig.keeper.flush(10)
    assert rig.stored() == {"a": (2, b"a      2")}
    assert (rig.keeper.problem, rig.keeper.tally.refused) == ("", 1)


# Removal


def test_a_stream_removed_while_it_is_written(rig: Rig) -> None:
    """Is not in the store in the end, and everybody is told; its number and name are free."""
    rig.start()
    a = rig.stream()
    rig.write_now(a)
    waits = rig.step(a)
    gone = rig.remove(a)
    assert waits.of == [None], "there is nothing to wait for any more"
    rig.store.writing.open()
    assert gone.wait() is None
    assert rig.stored() == {}
    again = rig.stream(steps=1)
    assert rig.stored() == {"a": (2, b"a      2")}
    assert rig.keeper.snapshots(again)[0].revision == 2
    assert rig.unmark(a, "name").wait() is None, "it went with the stream"
    assert rig.remove(rig.stream("never saved")).of == [None]


def test_a_stream_removed_before_its_write_begins(rig: Rig) -> None:
    """By the thread that has taken it to be written already."""
    rig.store.not_acquired = 1
    rig.keeper.open()
    told, a = [], rig.stream()
    told.append(rig.step(a, "name"))
    rig.store.acquiring.shut()
    rig.keeper.start()
    rig.store.acquiring.wait()
    told.append(rig.remove(a))
    rig.store.acquiring.open()
    assert [one.wait() for one in told] == [None, None]
    assert rig.keeper.flush(10)
    assert rig.stored() == {}


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_removal_that_failed_is_made_up_for(rig: Rig, when: str) -> None:
    """And takes no other stream with it that got the number."""
    rig.start()
    a, b = rig.stream("a", 1), rig.stream("b", 1)
    setattr(rig.store, when, 2)
    assert refused(rig.remove(a))
    rig.step(b)
    assert rig.keeper.flush(10)
    assert rig.stored().keys() == {"b"}
    told = [rig.step(rig.stream(id)) for id in "acd"]
    assert [one.wait() for one in told] == [None] * 3
    assert rig.stored().keys() == set("abcd")


def test_removed_while_the_store_fails(rig: Rig) -> None:
    """The stream's saves are forgotten with it."""
    rig.start()
    a = rig.stream(steps=1)
    rig.store.before = FAILS
    assert refused(rig.step(a))
    assert refused(rig.remove(a))
    rig.store.before = 0
    assert rig.keeper.flush(10)
    assert rig.stored() == {}
    assert (rig.keeper.waiting, rig.keeper.problem) == (0, "")


# Reading


def read_ahead(rig: Rig, *streams: Stream) -> None:
    """Returns when these were read."""
    keeper = rig.keeper
    with keeper._readable:
        assert keeper._readable.wait_for(lambda: all(keeper._ahead.get(one) is not None for one in streams), 10)


def test_read_ahead(rig: Rig) -> None:
    """A step finds what was read for it, waits for what is being read, and never gets what is out of date."""
    rig.start()
    a, b, c = (rig.stream(id, 2) for id in "abc")
    tally = rig.keeper.tally
    rig.keeper.prefetch([a, b])
    read_ahead(rig, a, b)
    rig.keeper.prefetch([c], now=[a])
    for stream, counts in ((a, (0, 1)), (b, (1, 1)), (a, (2, 1))):
        stored, wrong = rig.keeper.fetch(stream)
        assert stored is not None
        assert (stored.data, wrong) == (content(stream), "")
        assert (tally.fetched, tally.prefetched) == counts
    read_ahead(rig, c)
    assert rig.step(c).wait() is None
    stored, _ = rig.keeper.fetch(c)
    assert stored is not None
    assert stored.data == content(c)

    got = []
    rig.store.loading.shut()
    rig.keeper.prefetch([a])
    rig.store.loading.wait()
    reading = in_thread(lambda: got.append(rig.keeper.fetch(a)))
    rig.store.loading.open()
    assert ended(reading)
    stored, _ = got[0]
    assert stored is not None
    assert stored.data == content(a)
    assert tally.prefetched == 1, "the step had to wait"


@pytest.mark.parametrize("fault", [TypeError("of our own"), StoreFailed("gone"), Damaged("noise"), KeyError(2)])
def test_reading_ahead_goes_on(rig: Rig, fault: Exception) -> None:
    """Whatever went wrong with one: the step that needs it looks for itself."""
    rig.start()
    a = rig.stream(steps=1)
    rig.store.load_faults = [fault]
    rig.store.loading.shut()
    rig.keeper.prefetch([a])
    rig.store.loading.wait()
    got = list[Stored | None]()
    reading = in_thread(lambda: got.append(rig.keeper.fetch(a)[0]))
    rig.store.loading.open()
    assert ended(reading)
    rig.keeper.prefetch([a])
    read_ahead(rig, a)
    assert rig.keeper.tally.damaged == 0
    assert got[0] is not None
    assert got[0].data == content(a)


@pytest.mark.parametrize("what", ["newest", "missing", "two", "other policy", "other source", "all"])
def test_a_damaged_state_is_put_aside(rig: Rig, what: str) -> None:
    """The newest sound one of the same policy and source takes its place."""
    rig.start()
    a = rig.stream()
    for number in range(4):
        assert rig.step(a, f"mark {number}").wait() is None
    b = rig.stream("b", 2)
    if what == "missing":
        run_raw(rig.folder, "DELETE FROM states WHERE revision = 5 AND stream = 1")
    else:
        first = {"two": 4, "all": 0}.get(what, 5)
        run_raw(rig.folder, "UPDATE states SET data = x'00' WHERE revision >= ? AND stream = 1", first)
    if what == "other policy":
        a.policy = make_policy("norm", {})
    if what == "other source":
        a.digest = "another"
    stored, reason = rig.keeper.fetch(a)
    assert reason == ("it is missing" if what == "missing" else "its checksum is wrong")
    expected = {"newest": 4, "missing": 4, "two": 3}.get(what)
    assert (None if stored is None else (stored.revision, stored.data)) == (
        None if expected is None else (expected, f"a   {expected:4}".encode())
    )
    assert rig.keeper.tally.damaged == 1
    assert rig.keeper.flush(10)
    assert 5 not in [one.revision for one in rig.keeper.snapshots(a)]
    assert rig.step(a).wait() is None
    assert rig.keeper.fetch(a)[1] == rig.keeper.fetch(b)[1] == ""


def test_a_store_that_cannot_be_read(rig: Rig) -> None:
    rig.start()
    a = rig.stream(steps=1)
    rig.store.load_faults = [StoreFailed("gone")]
    with pytest.raises(StoreFailed):
        rig.keeper.fetch(a)
    assert (rig.keeper.fetch(a)[1], rig.keeper.tally.damaged) == ("", 0)
    assert rig.keeper.snapshots(rig.stream("new")) == []
    with pytest.raises(KeyError):
        rig.keeper.load(rig.stream("new"), 1)


# Beginning and end


def test_a_store_that_is_there_already(rig: Rig) -> None:
    """Its streams go on where they were; what was noted and not saved is lost and known."""
    rig.start()
    a = rig.stream(steps=3)
    a.revision += 2
    rig.keeper.note(a)
    again = Rig(left_by_a_crash(rig.folder, rig.folder.with_name("again")))
    (found,) = again.keeper.open().streams
    assert (found.revision, found.state_revision, found.lost) == (4, 4, 2)
    assert again.keeper.last_shutdown() == Shutdown(clean=False)
    again.keeper.start()
    stream = again.stream()
    again.keeper.adopt(stream, found)
    assert (stream.revision, stream.saved.revision, stream.lost, stream.unsaved) == (4, 4, 2, 0)
    assert again.keeper.handed(stream) == (4, 4)
    assert again.hold(stream).of == [None]
    assert again.step(stream).wait() is None
    assert again.stored() == {"a": (5, b"a      5")}
    again.end()
    last = opened(again.folder)
    assert last.last_shutdown() == Shutdown(clean=True)
    assert [one.lost for one in last.index().streams] == [2]
    last.close()


def test_a_store_that_can_be_made_later(rig: Rig) -> None:
    """Until then everything is kept in memory, and nobody waits."""
    rig.folder.write_bytes(b"in the way")
    assert rig.start().keeper.problem
    a, b = rig.stream(), rig.stream("b")
    assert refused(rig.step(a))
    assert rig.hold(a).of == [None]
    rig.step(b)
    assert not rig.keeper.flush(0)
    rig.folder.unlink()
    assert rig.keeper.flush(10)
    assert rig.keeper.problem == ""
    assert rig.stored() == {"a": (2, b"a      2"), "b": (2, b"b      2")}
    assert rig.keeper.size > 0


def test_stores_that_are_not_opened(rig: Rig) -> None:
    """Another process's, unless it is taken over; and what is none."""
    owner = opened(rig.folder)
    with pytest.raises(InUse):
        rig.keeper.open()
    assert rig.keeper.open(take_over=True).streams == []
    with pytest.raises(Fenced):
        owner.check_owner()
    owner.close()
    none = rig.folder.with_name("none")
    none.mkdir()
    (none / FILE).write_bytes(b"none of ours " * 500)
    with pytest.raises(Damaged):
        Keeper(SqliteStore(none)).open()


def fenced(rig: Rig) -> bool:
    with rig.keeper._changed:
        return rig.keeper._changed.wait_for(lambda: rig.keeper.fenced, 10)


def test_a_keeper_that_was_taken_over(rig: Rig) -> None:
    """Refuses everything from then on, also what had waited, and writes nothing more; it finds out by itself."""
    rig.start()
    a, b = rig.stream(steps=1), rig.stream("b", 1)
    rig.write_now(a)
    held, waits, named = rig.hold(a), rig.step(b, "name"), rig.unmark(b, "name")
    other = opened(rig.folder, take_over=True)
    rig.store.writing.open()
    assert all(refused(one) for one in (rig.told[2], held, waits, named))
    assert fenced(rig)
    assert "has taken" in rig.keeper.problem
    for told in (rig.step(a), rig.hold(a), rig.unmark(a, "name"), rig.remove(a)):
        assert isinstance(told.of[0], Unavailable)
    rig.keeper.flush(10)
    rig.keeper.close(Shutdown(clean=True))
    assert rig.stored() == {"a": (2, b"a      2"), "b": (2, b"b      2")}
    other.close()
    last = opened(rig.folder)
    assert last.last_shutdown() == Shutdown(clean=False)
    last.close()


def test_a_keeper_with_nothing_to_do_finds_out(rig: Rig) -> None:
    rig.start()
    other = opened(rig.folder, take_over=True)
    assert fenced(rig)
    other.close()


def test_another_owner_before_it_could_own(rig: Rig) -> None:
    """What was read is out of date then."""
    opened(rig.folder).close()
    rig.store.not_acquired = 1
    rig.keeper.open()
    opened(rig.folder).close()
    rig.keeper.start()
    assert fenced(rig)
    assert isinstance(rig.step(rig.stream()).of[0], Unavailable)


def test_the_end(rig: Rig) -> None:
    """Who waits for a write that does not begin any more is told; what is under way is stored; nothing hangs."""
    rig.start()
    a, b = rig.stream(), rig.stream("b", 1)
    rig.write_now(a)
    written, waits, named = rig.told[-1], rig.step(b, "name"), rig.unmark(b, "name")
    closing = in_thread(lambda: rig.keeper.close(Shutdown(clean=True, saved=7)))
    assert refused(waits)
    assert refused(named)
    for told in (rig.step(b), rig.unmark(a, "name"), rig.remove(b)):
        assert isinstance(told.of[0], Unavailable)
    assert rig.hold(a).of == [None]
    rig.store.writing.open()
    assert ended(closing)
    rig.keeper.prefetch([a])
    assert ended(in_thread(lambda: rig.keeper.fetch(a)))
    assert written.wait() is None
    assert rig.stored() == {"a": (2, b"a      2"), "b": (2, b"b      2")}
    last = opened(rig.folder)
    assert last.last_shutdown() == Shutdown(clean=True, saved=7)
    last.close()
