"""The embedded store: compared with a plain dict, killed, filled up, damaged, taken over, and of older releases."""

from __future__ import annotations

import copy
import os
import random
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.state.data import make_store
from tests.state.stored import FIELDS, make_record, make_save
from tta_server.state import sqlite
from tta_server.state.records import Damaged, Fenced, InUse, Record, Save, Shutdown, StoreFailed
from tta_server.state.sqlite import FILE, PAGE, PROGRESS, SCHEMA, SqliteStore

STEPS, RING = 3, 2
"""Versions between automatic snapshots, and how many are kept."""
VERSION_1 = Path(__file__).parent / "data" / "store-v1.sqlite"


def opened(folder: Path | None, take_over: bool = False) -> SqliteStore:
    """A store of this process. Here the power stays on, so that no commit waits for the disk."""
    store = SqliteStore(folder, STEPS, RING)
    store.acquire(take_over)
    store.index()
    assert store._writer is not None
    store._writer.execute("PRAGMA synchronous = OFF")
    return store


def filled(folder: Path | None, *ids: str, revisions: int = 2) -> SqliteStore:
    """One with streams of these names, numbered from 1 on, each of so many revisions and states."""
    store = opened(folder)
    for key, id in enumerate(ids, 1):
        assert store.new_key() == key
        for revision in range(1, revisions + 1):
            assert not store.write([make_save(key, revision - 1 or None, revision, id)])
    return store


def left_by_a_crash(folder: Path, copied: Path) -> Path:
    """The files as they are now, as a process that is killed leaves them."""
    copied.mkdir()
    for file in folder.iterdir():
        if not file.name.endswith(("-shm", ".lock")):
            shutil.copy(file, copied)
    return copied


def run_raw(folder: Path, statement: str, *values: object) -> None:
    """Past the store, like a fault of the disk."""
    db = sqlite3.connect(folder / FILE)
    with db:
        assert db.execute(statement, values).rowcount != 0
    db.close()


def held(store: SqliteStore) -> dict[int, tuple[object, ...]]:
    """All that a store gives back, by stream."""
    index = store.index()
    assert not index.damaged
    return {
        found.key: (found, [(shot, store.load(found.key, shot.revision)) for shot in store.snapshots(found.key)])
        for found in index.streams
    }


@contextmanager
def full(store: SqliteStore) -> Iterator[None]:
    """The file cannot grow."""
    assert store._writer is not None
    (pages,) = store._writer.execute("PRAGMA page_count").fetchone()
    store._writer.execute(f"PRAGMA max_page_count = {pages}")
    yield
    store._writer.execute(f"PRAGMA max_page_count = {2**30}")


@contextmanager
def ended_after(store: SqliteStore, operations: int) -> Iterator[None]:
    """SQLite gives up after so many of its own operations."""
    left = operations

    def count() -> bool:
        nonlocal left
        left -= 1
        return left == 0

    assert store._writer is not None
    store._writer.set_progress_handler(count, 1)
    yield
    store._writer.set_progress_handler(None, 1)


@contextmanager
def sound(store: SqliteStore) -> Iterator[None]:
    yield


@dataclass
class Kept:
    """A state in the model."""

    record: Record
    data: bytes | None
    automatic: bool
    bad: str = ""


@dataclass
class Model:
    """What must be known of a stream."""

    record: Record
    revision: int
    state: int
    previous: int
    lost: int
    """As stored."""
    reached: int
    """Newest revision that was noted."""
    untold: int = 0
    states: dict[int, Kept] = field(default_factory=dict)
    marks: dict[str, int] = field(default_factory=dict)

    def take(self, save: Save) -> None:
        self.record, self.revision, self.lost = save.record, save.revision, save.lost
        self.reached = max(self.reached, save.revision)
        if save.state_revision != self.state:
            self.previous, self.state = self.state, save.state_revision
        if save.is_new:
            ring = self.ring()
            is_due = not ring or abs(save.record.version - self.states[ring[0]].record.version) >= STEPS
            self.states[self.state] = Kept(save.record, save.data, is_due and save.data is not None)
            self.prune()
        self.marks |= dict.fromkeys(save.marks, self.state)

    def ring(self) -> list[int]:
        return sorted((key for key, kept in self.states.items() if kept.automatic and not kept.bad), reverse=True)

    def prune(self) -> None:
        wanted = {self.state, self.previous, *self.marks.values(), *self.ring()[:RING]}
        self.states = {key: kept for key, kept in self.states.items() if kept.bad or key in wanted}


changes = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(("state", "state", "state", "initial", "same", "stale", "new", "new")),
        "stream": st.integers(0, 3),
        "gap": st.integers(1, 3),
        "steps": st.integers(-2, 4),
        "bytes": st.sampled_from((0, 24, 40000)),
        "marks": st.sets(st.sampled_from(("m", "n")), max_size=1),
    }
)


class StoreMachine(RuleBasedStateMachine):
    """Four names at most, in one store, through writes, faults, crashes and owners."""

    def __init__(self) -> None:
        super().__init__()
        self.base = tempfile.TemporaryDirectory()
        self.folder = Path(self.base.name) / "0"
        self.streams: dict[int, Model] = {}
        self.folders = self.bytes = 0
        self.store = opened(self.folder)
        assert self.store.last_shutdown() is None

    def teardown(self) -> None:
        self.store.close()
        self.base.cleanup()

    def key(self, number: int) -> int:
        return sorted(self.streams)[number % len(self.streams)]

    def prepare(self, kind: str, stream: int, gap: int, steps: int, bytes: int, marks: set[str]) -> tuple[Save, bool]:
        """A save, and whether it must be refused; the model has it already."""
        self.bytes += 1
        data = self.bytes.to_bytes(8, "little") + b"\7" * bytes
        if kind == "new" or not self.streams:
            id = "abcd"[stream]
            is_taken = id in {model.record.id for model in self.streams.values()}
            key = self.store.new_key()
            assert key not in self.streams
            save = make_save(key, None, 1, id, data=None if bytes == 0 else data, marks=tuple(marks))
            if not is_taken:
                self.streams[key] = Model(save.record, 1, 1, 1, 0, 1)
                self.streams[key].take(save)
            return save, is_taken
        key = self.key(stream)
        model = self.streams[key]
        model.reached += gap
        self.store.note(key, model.reached, model.untold)
        is_new = kind != "same"
        save = make_save(
            key, model.revision + (kind == "stale"), model.reached, model.record.id, is_new=is_new, marks=tuple(marks),
            state_revision=model.reached if is_new else model.state, data=data if kind == "state" else None,
            fields=FIELDS if kind == "state" else (), lost=model.untold,
            record=make_record(model.record.id, max(0, model.record.version + steps)),
        )  # fmt: skip
        if kind != "stale":
            model.take(save)
        return save, kind == "stale"

    @rule(
        drawn=st.lists(changes, min_size=1, max_size=4),
        removed=st.sets(st.integers(0, 3), max_size=1),
        unmarked=st.sets(st.tuples(st.integers(0, 3), st.sampled_from(("m", "n"))), max_size=1),
        bad=st.sets(st.tuples(st.integers(0, 3), st.integers(0, 5)), max_size=1),
        fault=st.sampled_from((None, None, "full", 1, 3, 7, 30, 60, 100, 150, 250)),
    )
    def write(
        self,
        drawn: list[dict[str, object]],
        removed: set[int],
        unmarked: set[tuple[int, str]],
        bad: set[tuple[int, int]],
        fault: int | str | None,
    ) -> None:
        """All of it or nothing; of the saves, those that follow on what is there."""
        before = copy.deepcopy(self.streams)
        removals = sorted({self.key(number) for number in removed}) if self.streams else []
        for key in removals:
            del self.streams[key]
        put_aside = []
        for number, which in bad if self.streams else ():
            key = self.key(number)
            revision = sorted(self.streams[key].states)[which % len(self.streams[key].states)]
            self.streams[key].states[revision].bad = "worn out"
            put_aside.append((key, revision, "worn out"))
        saves = [self.prepare(**change) for change in drawn]  # type: ignore[arg-type]
        unmarks = [(self.key(number), name) for number, name in unmarked] if self.streams else []
        for key, name in unmarks:
            self.streams[key].marks.pop(name, None)
            self.streams[key].prune()
        failing = sound(self.store) if fault is None else full(self.store) if fault == "full" else (
            ended_after(self.store, int(fault)))  # fmt: skip
        is_written = True
        with failing:
            try:
                refused = self.store.write([save for save, _ in saves], removals, unmarks, put_aside)
            except StoreFailed:
                is_written = False
        if is_written:
            assert refused == {place for place, (_, is_refused) in enumerate(saves) if is_refused}
        else:
            assert fault is not None
            for key, model in before.items():  # it goes on from the revision that it had come to
                if key in self.streams and key not in removals:
                    model.reached = self.streams[key].reached
            self.streams = before

    @precondition(lambda self: self.streams)
    @rule(stream=st.integers(0, 3), steps=st.integers(1, 5))
    def go_on(self, stream: int, steps: int) -> None:
        """Without a save."""
        model = self.streams[key := self.key(stream)]
        model.reached += steps
        self.store.note(key, model.reached, model.untold)

    @precondition(lambda self: self.streams)
    @rule(stream=st.integers(0, 3))
    def tell(self, stream: int) -> None:
        """An answer told of the losses."""
        model = self.streams[key := self.key(stream)]
        model.untold = 0
        self.store.note(key, model.reached, 0)

    def lose(self) -> None:
        """What was not saved is lost, and known to be."""
        for model in self.streams.values():
            model.untold += model.reached - model.revision
            model.lost, model.reached = model.untold, model.revision

    @rule(saved=st.integers(0, 9))
    def stop(self, saved: int) -> None:
        told = Shutdown(clean=True, saved=saved, unsaved=1)
        self.store.close(told)
        self.store = opened(self.folder)
        assert self.store.last_shutdown() == told
        assert not list(self.folder.glob(f"{PROGRESS}-{self.store._epoch - 1}"))
        self.lose()

    @rule()
    def crash(self) -> None:
        self.folders += 1
        copied = left_by_a_crash(self.folder, self.folder.with_name(str(self.folders)))
        self.store.close()
        self.folder, self.store = copied, opened(copied)
        assert self.store.last_shutdown() == Shutdown(clean=False)
        self.lose()

    @rule()
    def take_over(self) -> None:
        """The one that had it writes nothing any more, whatever it tries."""
        with pytest.raises(InUse, match="take-over"):
            SqliteStore(self.folder).acquire()
        before, self.store = self.store, opened(self.folder, take_over=True)
        self.lose()
        for model, key in ((model, key) for key, model in self.streams.items()):
            with pytest.raises(Fenced):
                before.write([make_save(key, model.revision, model.revision + 1, model.record.id)])
            before.note(key, model.revision + 50, 50)
        for write in (lambda: before.write([], list(self.streams)), before.check_owner):
            with pytest.raises(Fenced):
                write()
        before.close(Shutdown(clean=True))
        with pytest.raises(InUse):  # the lock is this one's
            SqliteStore(self.folder).acquire()

    @invariant()
    def agrees(self) -> None:
        index = self.store.index()
        assert not index.damaged
        assert {found.key: found[1:] for found in index.streams} == {
            key: (model.revision, model.state, model.record, model.lost, "") for key, model in self.streams.items()
        }
        for key, model in self.streams.items():
            sound_ones = sorted((revision for revision in model.states if not model.states[revision].bad), reverse=True)
            assert [
                (shot.revision, shot.version, shot.bytes, set(shot.marks), shot.automatic, shot.current)
                for shot in self.store.snapshots(key)
            ] == [
                (
                    revision, (kept := model.states[revision]).record.version, len(kept.data or b""),
                    {name for name, marked in model.marks.items() if marked == revision}, kept.automatic,
                    revision == model.state,
                )
                for revision in sound_ones
            ]  # fmt: skip
            for revision, kept in model.states.items():
                if kept.bad:
                    with pytest.raises(Damaged, match=kept.bad):
                        self.store.load(key, revision)
                else:
                    stored = self.store.load(key, revision)
                    assert (stored.revision, stored.record, stored.data) == (revision, kept.record, kept.data)
                    assert kept.data is None or stored.fields == FIELDS


TestStore = StoreMachine.TestCase
TestStore.settings = settings(
    max_examples=30,
    stateful_step_count=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@pytest.mark.parametrize("is_file", [True, False])
def test_which_states_are_kept(tmp_path: Path, is_file: bool) -> None:
    """The newest, the one before, the marked, and a ring of automatic ones; also in memory alone."""
    store = filled(tmp_path if is_file else None, "a", revisions=4)
    assert store.persistent is is_file
    assert not store.write([make_save(1, 4, 5, marks=("good",))])
    for revision in range(6, 13):
        assert not store.write([make_save(1, revision - 1, revision)])
    shots = store.snapshots(1)
    assert [(one.revision, one.version, one.automatic, one.marks) for one in shots] == [
        (12, 11, False, ()), (11, 10, False, ()), (10, 9, True, ()), (7, 6, True, ()), (5, 4, False, ("good",)),
    ]  # fmt: skip
    assert [one.current for one in shots] == [True, False, False, False, False]
    assert store.load(1, 5).data == make_save(1, 4, 5).data
    with pytest.raises(KeyError):
        store.load(1, 6)
    assert not store.write([], unmarks=[(1, "good")])
    assert [one.revision for one in store.snapshots(1)] == [12, 11, 10, 7]
    assert store.size() >= PAGE
    store.close(Shutdown(clean=True))


def test_a_state_that_is_saved_again(tmp_path: Path) -> None:
    """Takes the place of the one of its revision: as after a write that was there although it had failed."""
    store = filled(tmp_path, "a")
    assert not store.write([make_save(1, 2, 1, data=b"again"), make_save(1, 1, 2, data=b"again, too")])
    assert [one.revision for one in store.snapshots(1)] == [2, 1]
    assert [store.load(1, revision).data for revision in (1, 2)] == [b"again", b"again, too"]
    store.close()


def test_a_number_is_given_to_one_stream(tmp_path: Path) -> None:
    """Also when its stream was removed twice, and after a start."""
    store = filled(tmp_path, "a", "b", "c")
    store.write([], [2])
    store.write([], [2])
    assert [store.new_key() for _ in range(3)] == [2, 4, 5]
    store.close()
    again = opened(tmp_path)
    assert [again.new_key() for _ in range(3)] == [2, 4, 5]
    again.close()


@pytest.mark.parametrize("operations", range(1, 12))
def test_a_write_that_ends_while_it_begins_is_not_the_last(tmp_path: Path, operations: int) -> None:
    """Whatever SQLite has begun is undone, and the next write is like any other."""
    store = filled(tmp_path, "a")
    before = held(store)
    with ended_after(store, operations), pytest.raises(StoreFailed, match="interrupted"):
        store.write([make_save(1, 2, 3)])
    assert held(store) == before
    assert not store.write([make_save(1, 2, 3)])
    store.close()


def test_a_full_disk(tmp_path: Path) -> None:
    """Neither a new store nor a write that does not fit leaves anything; with room both go on."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    store, news = filled(tmp_path / "large", "a"), [SqliteStore(tmp_path / str(pages)) for pages in range(1, 8, 2)]
    before = held(store)
    try:
        for pages, new in zip(range(1, 8, 2), news, strict=True):
            resource.setrlimit(resource.RLIMIT_FSIZE, (pages * PAGE, hard))
            with pytest.raises(StoreFailed, match="disk I/O error"):
                new.acquire()
        with pytest.raises(StoreFailed, match="disk I/O error"):
            store.write([make_save(1, 2, 3, data=bytes(10 * PAGE))])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert held(store) == before
    assert not store.write([make_save(1, 2, 3, data=bytes(10 * PAGE))])
    store.close()
    for new in news:
        new.acquire()
        assert not new.write([make_save(1, None, 1)])
        new.close()


# Damage


def text(column: str) -> str:
    return f"{column} = CAST({column} AS TEXT)"


@pytest.mark.parametrize(
    "change",
    [
        "data = x'00' || substr(data, 2)", "data = substr(data, 2)", "data = NULL", text("data"), text("record"),
        "record = replace(record, '1', '2')", "record = CAST(x'ff' AS TEXT)", "data = CAST(x'80808080' AS TEXT)",
        "checksum = randomblob(16)", "checksum = 'text'", "layout = 5.5", "layout = zeroblob(16)",
    ],
)  # fmt: skip
def test_a_damaged_state_is_found_out(tmp_path: Path, change: str) -> None:
    """And harms no other: not the one before, and no other stream."""
    store = filled(tmp_path, "a", "b")
    others = store.load(1, 1), store.load(2, 2)
    run_raw(tmp_path, f"UPDATE states SET {change} WHERE stream = 1 AND revision = 2")
    with pytest.raises(Damaged):
        store.load(1, 2)
    (fault,) = store.verify()
    assert "stream 'a' of tenant 't': its state of version 1 (revision 2)" in fault
    assert (store.load(1, 1), store.load(2, 2)) == others
    assert [one.revision for one in store.snapshots(1)] == [2, 1]
    assert not store.write([make_save(1, 2, 3), make_save(2, 2, 3, "b")], bad=[(1, 2, "it is")])
    assert [one.revision for one in store.snapshots(1)] == [3, 1]
    assert store.load(1, 3).data == make_save(1, 2, 3).data
    store.close()


@pytest.mark.parametrize("change", [text("fields"), "fields = x'5b5d'", "fields = NULL"])
def test_a_damaged_layout_is_found_out(tmp_path: Path, change: str) -> None:
    store = filled(tmp_path, "a")
    if change == "fields = NULL":
        run_raw(tmp_path, "DELETE FROM layouts")
    else:
        run_raw(tmp_path, f"UPDATE layouts SET {change}")
    with pytest.raises(Damaged):
        store.load(1, 2)
    store.close()


@pytest.mark.parametrize(
    ("change", "becomes"),
    [
        ("id = CAST(x'ff61' AS TEXT)", "sound"),
        ("epoch = 1", "sound"),
        ("lost = 'x'", "sound"),
        ("lost = 1e30", "sound"),
        ("record = 'text'", "older"),
        ("record = x'7b7d'", "older"),
        ("checksum = zeroblob(16)", "older"),
        ("revision = 'x'", "lost"),
        ("revision = 1", "lost"),
        ("state = 'x'", "lost"),
        ("key = -5", "lost"),
        ("key = 1 << 40", "lost"),
    ],
)
def test_a_damaged_record_is_found_out(tmp_path: Path, change: str, becomes: str) -> None:
    """What can be read of the stream is: at least an older record, and all of the others. It is told in words."""
    filled(tmp_path, "a", "b").close(Shutdown(clean=True))
    db = sqlite3.connect(tmp_path / FILE)
    with db:
        db.execute(f"UPDATE streams SET {change} WHERE key = 1")
    db.close()
    for take in (SqliteStore(tmp_path), opened(tmp_path)):
        index = take.index()
        found = {one.key: one for one in index.streams}
        assert found[2] == (2, 2, 2, make_record("b", 1), 0, "")
        if becomes == "lost":
            assert list(found) == [2]
            assert "stream 'a' of tenant 't'" in index.damaged[0]
        else:
            assert found[1][:4] == (1, 2, 2, make_record("a", 1))
            assert bool(found[1].note) is (becomes == "older")
            assert index.damaged == []
        if take._writer is not None:
            assert (tmp_path / f"{PROGRESS}-2").stat().st_size < 1000
            assert not take.write([make_save(2, 2, 3, "b")])
            assert bool(take.verify()) is (becomes != "sound")
        take.close()


def test_a_stream_that_cannot_be_read_makes_room(tmp_path: Path) -> None:
    """For a new one of its name; it stays there under another, until it is collected."""
    filled(tmp_path, "a", "b").close()
    run_raw(tmp_path, "UPDATE streams SET record = x'00' WHERE key = 1")
    run_raw(tmp_path, "UPDATE states SET record = x'00' WHERE stream = 1")
    store = opened(tmp_path)
    assert [found.key for found in store.index().streams] == [2]
    key = store.new_key()
    assert store.write([make_save(store.new_key(), None, 1, "b")]) == {0}  # this one is sound
    assert not store.write([make_save(key, None, 1, "a")])
    index = store.index()
    assert [(found.key, found.record.id) for found in index.streams] == [(2, "b"), (key, "a")]
    assert len(index.damaged) == 1
    assert store.collect() == (0, 1)
    assert store.index().damaged == store.verify() == []
    store.close()


def test_states_of_a_stream_that_vanished_are_nobodys(tmp_path: Path) -> None:
    """A new stream of its number gets none of them."""
    filled(tmp_path, "a", "b", revisions=9).close()
    run_raw(tmp_path, "DELETE FROM streams WHERE key = 1")
    run_raw(tmp_path, "INSERT INTO marks VALUES (1, 'theirs', 1)")
    store = opened(tmp_path)
    assert store.verify()[:2] == [f"there are {what} of a stream that is not there" for what in ("marks", "states")]
    assert store.new_key() == 1
    assert not store.write([make_save(1, None, 1, "c")])
    assert [(one.revision, one.marks) for one in store.snapshots(1)] == [(1, ())]
    assert store.verify() == []
    store.close()


def test_collect_removes_what_is_of_no_use(tmp_path: Path) -> None:
    store = filled(tmp_path, "a", "b", revisions=8)
    assert not store.write([make_save(2, 8, 9, "b", fields=FIELDS[:1], data=bytes(8 * PAGE))], bad=[(2, 8, "worn")])
    assert "was put aside: worn" in store.verify()[0]
    run_raw(tmp_path, "DELETE FROM streams WHERE key = 1")
    size = store.size()
    before = store.snapshots(2)
    assert store.collect() == (1, 0)
    assert store.verify() == []
    assert store.snapshots(2) == before
    assert not store.write([], [2])
    assert store.collect() == (0, 0)
    assert store.size() < size
    db = sqlite3.connect(tmp_path / FILE)
    counts = [db.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in ("states", "marks", "layouts")]
    db.close()
    assert counts == [0, 0, 0]
    store.close()


@pytest.mark.parametrize("told", ["{", "[1]", '{"clean": true, "more": 1}', None])
def test_an_end_that_cannot_be_read_is_no_clean_one(tmp_path: Path, told: str | None) -> None:
    filled(tmp_path, "a").close(Shutdown(clean=True))
    run_raw(tmp_path, "UPDATE owner SET shutdown = ?", told)
    store = opened(tmp_path)
    assert store.last_shutdown() == Shutdown(clean=False)
    store.close()
    run_raw(tmp_path, "DELETE FROM owner")
    again = opened(tmp_path)
    assert len(again.index().streams) == 1
    run_raw(tmp_path, "DELETE FROM owner")
    for call in (again.check_owner, lambda: again.write([make_save(1, 2, 3)])):
        with pytest.raises(Damaged, match="who owns it"):
            call()
    again.close()


def damaged_pages(whole: bytes) -> Iterator[bytes]:
    """Each page overwritten by noise, by zeros and by another page; and bits and bytes here and there."""
    chance = random.Random(6)
    for begin in range(0, len(whole), PAGE):
        other = chance.randrange(0, len(whole), PAGE)
        for page in (chance.randbytes(PAGE), bytes(PAGE), whole[other : other + PAGE]):
            yield whole[:begin] + page + whole[begin + PAGE :]
        for at in (begin + chance.randrange(100), begin + chance.randrange(PAGE)):
            changed = bytearray(whole)
            changed[at] ^= 1 << chance.randrange(8)
            yield bytes(changed)
    yield whole[: len(whole) // 2]
    yield whole[:100]
    yield chance.randbytes(5000)


def test_never_wrong_data_from_a_damaged_file(tmp_path: Path) -> None:
    """What is read is what was written, or an error of ours says that it is not."""
    first, second = tmp_path / "first", tmp_path / "second"
    store, written, second_one = opened(first), dict[tuple[int, int], Save](), second / FILE
    for key in range(1, 7):
        for revision in range(1, 6):
            data, marks = bytes([key]) * (900 * key * revision), ("m",) if revision == 2 else ()
            save = make_save(key, revision - 1 or None, revision, f"s{key}", data=data, marks=marks)
            written[key, revision] = save
            assert not store.write([save])
    store.close(Shutdown(clean=True))
    second.mkdir()
    outcomes = {True: 0, False: 0}
    for number, damaged in enumerate(damaged_pages((first / FILE).read_bytes())):
        for file in second.iterdir():
            file.unlink()
        second_one.write_bytes(damaged)
        (second / f"{PROGRESS}-1").write_bytes(b"\7" * 50)
        store = SqliteStore(second, STEPS, RING)
        if number % 3:
            with suppress(Damaged, StoreFailed):
                store.acquire()
        with suppress(Damaged, StoreFailed):
            for found in store.index().streams:
                if not found.note:
                    assert (found.revision, found.record) == (5, written[found.key, 5].record)
        for (key, revision), save in written.items():
            try:
                stored = store.load(key, revision)
            except (Damaged, StoreFailed, KeyError):
                outcomes[False] += 1
            else:
                outcomes[True] += 1
                assert (stored.record, stored.fields, stored.data) == (save.record, FIELDS, save.data)
        for key in range(1, 7):
            with suppress(Damaged, StoreFailed):
                store.snapshots(key)
        with suppress(Damaged, StoreFailed):
            store.verify()
        if store._writer is not None:
            with suppress(Damaged, StoreFailed):
                store.write([make_save(key, 5, 6, f"s{key}") for key in range(1, 7)])
        store.close(Shutdown(clean=True))
    assert min(outcomes.values()) > 100


def test_a_page_that_is_a_copy_of_another(tmp_path: Path) -> None:
    """No stream is found twice."""
    first, second = tmp_path / "first", tmp_path / "second"
    filled(first, *(f"s{number}" for number in range(90)), revisions=1).close()
    whole = (first / FILE).read_bytes()
    leaves = [begin for begin in range(0, len(whole), PAGE) if whole[begin] == 13]  # of tables
    second.mkdir()
    for one in leaves:
        for other in leaves:
            (second / FILE).write_bytes(whole[:one] + whole[other : other + PAGE] + whole[one + PAGE :])
            store = SqliteStore(second)
            with suppress(Damaged):
                keys = [found.key for found in store.index().streams]
                assert len(keys) == len(set(keys))
            store.close()


def test_a_log_that_ends_early(tmp_path: Path) -> None:
    """Of what was committed, whole commits are there, in their order, whatever is missing or damaged at the end."""
    first, second = tmp_path / "first", tmp_path / "second"
    store = filled(first, "a", "b")
    history = [held(store)]
    for revision in range(3, 12):
        assert not store.write([make_save(1, revision - 1, revision, data=bytes(1000 * revision), marks=("m",)),
                                make_save(2, revision - 1, revision, "b")])  # fmt: skip
        history.append(held(store))
        if revision == 3:
            assert store._writer is not None
            store._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
            history = history[-1:]
    log = (first / f"{FILE}-wal").read_bytes()
    whole, chance, seen = (first / FILE).read_bytes(), random.Random(6), set()
    store.close()
    second.mkdir()
    for number in range(40):
        for file in second.iterdir():
            file.unlink()
        at = chance.randrange(len(log))
        damaged = log[:at] if number % 2 else log[:at] + bytes([log[at] ^ 64]) + log[at + 1 :]
        (second / FILE).write_bytes(whole)
        (second / f"{FILE}-wal").write_bytes(damaged)
        store = opened(second) if number % 3 else SqliteStore(second)
        now = held(store)
        assert now in history
        seen.add(history.index(now))
        store.close()
    assert len(seen) > 5


@pytest.mark.parametrize("content", [b"", b"no store " * 500, b"SQLite format 3\0" + bytes(200)])
def test_no_file_is_left_open(tmp_path: Path, content: bytes) -> None:
    """By attempts at what is no store."""
    (tmp_path / FILE).write_bytes(content)
    store = SqliteStore(tmp_path)
    before = len(os.listdir("/dev/fd"))
    for _ in range(5):
        with suppress(Damaged, StoreFailed):
            store.index()
        if content:
            with pytest.raises(Damaged):
                store.acquire()
    assert len(os.listdir("/dev/fd")) == before


def test_a_store_that_breaks_while_it_is_open_can_be_closed(tmp_path: Path) -> None:
    store = filled(tmp_path, "a")
    assert store._writer is not None
    store._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    with (tmp_path / FILE).open("r+b") as file:
        file.write(random.Random(6).randbytes((tmp_path / FILE).stat().st_size))
    other = SqliteStore(tmp_path)
    with pytest.raises((Damaged, StoreFailed)):
        other.load(1, 2)
    with suppress(Damaged, StoreFailed):
        store.write([make_save(1, 2, 3)])
    store.close(Shutdown(clean=True))
    other.close()


# Owners

CHILD = """
import sys
from pathlib import Path
from tests.state.stored import make_save
from tta_server.state.sqlite import SqliteStore
store = SqliteStore(Path(sys.argv[1]))
store.acquire()
store.index()
store.new_key()
revision = 0
while True:
    store.note(1, revision + 1, 0)
    assert not store.write([make_save(1, revision or None, revision + 1, data=bytes(30000))])
    revision += 1
    store.note(1, revision + 2, 0)
    print(revision, flush=True)
"""


def test_a_process_that_is_killed(tmp_path: Path) -> None:
    """While it writes: whatever it was told is stored is there, what is not is counted, and nobody waits for it."""
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None
        for _ in range(20):
            told = int(child.stdout.readline())
        with pytest.raises(InUse, match=f"process {child.pid} on .* since .*--take-over"):
            SqliteStore(tmp_path).acquire()
        reader = SqliteStore(tmp_path)
        assert str(child.pid) in reader.in_use()
        reader.close()
    finally:
        child.send_signal(signal.SIGKILL)
        rest = child.communicate()[0].split()
    told = int(rest[-1]) if rest and rest[-1].isdigit() else told
    store = opened(tmp_path)
    assert store.in_use() == ""
    assert store.last_shutdown() == Shutdown(clean=False)
    (found,) = store.index().streams
    assert told <= found.revision <= told + 1
    assert found.lost in (0, 1, 2)
    assert store.load(1, found.state_revision).data == bytes(30000)
    assert store.verify() == []
    store.close()


def test_an_owner_between_reading_and_owning(tmp_path: Path) -> None:
    """Who read a store and comes to own it later must not write over what another one did meanwhile."""
    filled(tmp_path, "a").close()
    late, between = SqliteStore(tmp_path), SqliteStore(tmp_path)
    assert late.index().streams[0].revision == 2
    between.acquire()
    between.close(Shutdown(clean=True))
    with pytest.raises(Fenced, match="has used"):
        late.acquire()
    again = SqliteStore(tmp_path)
    again.index()
    again.acquire()
    assert not again.write([make_save(1, 2, 3)])
    assert [path.name for path in sorted(tmp_path.glob("*-*[0-9]*"))] == ["owner-3.lock", f"{PROGRESS}-3"]
    late.close()
    again.close()


def test_two_that_want_to_own_it_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One does, also where both found it free."""
    filled(tmp_path, "a").close()
    first, second = SqliteStore(tmp_path), SqliteStore(tmp_path)
    begin = sqlite._begin

    def begin_second(db: sqlite3.Connection) -> None:
        monkeypatch.setattr(sqlite, "_begin", begin)
        first.acquire()
        begin(db)

    monkeypatch.setattr(sqlite, "_begin", begin_second)
    with pytest.raises(InUse):
        second.acquire()
    first.check_owner()
    first.close()
    second.acquire()
    second.close()


def test_only_files_of_owners_before_are_removed(tmp_path: Path) -> None:
    """A later one's are not: it is about to take over."""
    filled(tmp_path, "a").close()
    for name in ("owner-9.lock", f"{PROGRESS}-9", "owner-1", "notes-1", f"{PROGRESS}-x"):
        (tmp_path / name).touch()
    opened(tmp_path).close()
    assert sorted(path.name for path in tmp_path.glob("*-*")) == [
        "notes-1", "owner-1", "owner-2.lock", "owner-9.lock", f"{PROGRESS}-2", f"{PROGRESS}-9", f"{PROGRESS}-x",
    ]  # fmt: skip


def test_losses_are_of_the_owner_before(tmp_path: Path) -> None:
    """A process that was taken over goes on counting its own steps; they are not the new owner's."""
    one = filled(tmp_path, "a")
    two = opened(tmp_path, take_over=True)
    one.note(1, 99, 5)
    one.close()
    two.note(1, 4, 0)
    two.close()
    for _ in range(2):  # also where nothing was done with it in between
        three = opened(tmp_path)
        assert [found.lost for found in three.index().streams] == [2]
        three.close()


def test_another_process_in_the_middle_of_a_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tta_server.state.sqlite.BUSY_SECONDS", 0.01)
    store = filled(tmp_path, "a")
    other = sqlite3.connect(tmp_path / FILE, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(InUse, match="end that process first"):
        opened(tmp_path, take_over=True)
    assert store._writer is not None
    store._writer.execute("PRAGMA busy_timeout = 10")
    with pytest.raises(StoreFailed, match="in the middle of a write"):
        store.write([make_save(1, 2, 3)])
    store.close(Shutdown(clean=True))
    other.execute("ROLLBACK")
    other.close()
    again = opened(tmp_path)
    assert again.last_shutdown() == Shutdown(clean=False), "that could not be written"
    assert not again.write([make_save(1, 2, 3)])
    again.close()


@contextmanager
def ordinary_user() -> Iterator[Path]:
    """A folder of a user to whom permissions apply, which they do not to root."""
    with tempfile.TemporaryDirectory() as name:
        is_root = os.geteuid() == 0
        if is_root:
            os.chown(name, 65534, 65534)
            os.seteuid(65534)
        try:
            yield Path(name)
        finally:
            if is_root:
                os.seteuid(0)


def test_a_folder_that_cannot_be_written_to() -> None:
    """Is read as it is, and owned once it can be; what was read ahead of that is read anew."""
    with ordinary_user() as base:
        folder = base / "streams"
        filled(folder, "a").close(Shutdown(clean=True))
        folder.chmod(0o500)
        store = SqliteStore(folder)
        with pytest.raises(StoreFailed):
            store.acquire()
        assert store.index().streams[0].revision == 2
        assert store.load(1, 2).data == make_save(1, 1, 2).data
        for call in (lambda: store.write([make_save(1, 2, 3)]), lambda: store.known(1, "t", "a"), store.check_owner):
            with pytest.raises(StoreFailed, match="not open for writing"):
                call()
        folder.chmod(0o700)
        store.acquire()
        assert not store.write([make_save(1, 2, 3)])
        assert store.load(1, 3).data == make_save(1, 2, 3).data
        assert [one.revision for one in store.snapshots(1)] == [3, 2, 1]
        assert (store.known(1, "t", "a"), store.known(1, "t", "b"), store.known(2, "t", "a")) == ((3, 3), None, None)
        store.close()
        (folder / FILE).chmod(0)
        with pytest.raises(StoreFailed):
            SqliteStore(folder).index()


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "here").write_bytes(b"")
    store = SqliteStore(tmp_path / "here" / "streams")
    for _ in range(2):
        with pytest.raises(StoreFailed):
            store.acquire()
    assert store.index().streams == []
    with pytest.raises(StoreFailed):
        store.load(1, 1)
    (tmp_path / "here").unlink()
    store.acquire()
    assert not store.write([make_save(store.new_key(), None, 1)])
    assert (tmp_path / "here" / "streams").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "here" / "streams" / FILE).stat().st_mode & 0o777 == 0o600
    store.close()


# Older and newer releases


def test_a_store_of_version_1(tmp_path: Path) -> None:
    """Is read bit for bit and written to."""
    shutil.copy(VERSION_1, tmp_path / FILE)
    store = SqliteStore(tmp_path, make_store.SNAPSHOT_STEPS, make_store.SNAPSHOTS)
    for _ in range(2):  # before this process owns it, and after
        camera, initial = store.index().streams
        assert camera == (1, 9, 9, make_store.record("camera-1", 8), make_store.LOST, "")
        assert initial == (2, 1, 1, make_store.record("camera-2", 0), 0, "")
        assert [(one.revision, one.version, one.bytes, one.marks, one.automatic) for one in store.snapshots(1)] == [
            (9, 8, 16, (), False), (8, 7, 16, (), True), (6, 5, 16, (), True), (3, 2, 16, ("first", "good"), False),
        ]  # fmt: skip
        for revision in (9, 8, 6, 3):
            stored = store.load(1, revision)
            assert stored.record == make_store.record("camera-1", revision - 1)
            assert (stored.fields, stored.data) == (make_store.FIELDS, make_store.state(revision - 1))
        assert [(one.revision, one.bytes, one.marks) for one in store.snapshots(2)] == [(1, 0, ("start",))]
        start = store.load(2, 1)
        assert (start.record, start.fields, start.data) == (make_store.record("camera-2", 0), (), None)
        assert store.verify() == []
        if store._writer is None:
            store.acquire()
    assert store.last_shutdown() == Shutdown(clean=True, saved=2, unsaved=1)
    assert not store.write([make_save(1, 9, 10, "camera-1", record=make_store.record("camera-1", 9))])
    assert not store.write([], unmarks=[(1, "first")])
    store.close()
    store = opened(tmp_path)
    assert [(one.revision, one.marks) for one in store.snapshots(1)][::3] == [(10, ()), (3, ("good",))]
    assert store.verify() == []
    store.close()


def test_a_store_of_a_newer_release_is_left_alone(tmp_path: Path) -> None:
    """Not even read; the message has both versions."""
    shutil.copy(VERSION_1, tmp_path / FILE)
    db = sqlite3.connect(tmp_path / FILE, isolation_level=None)
    db.execute("PRAGMA journal_mode = DELETE").fetchall()
    db.execute(f"PRAGMA user_version = {SCHEMA + 6}")
    db.close()
    before = (tmp_path / FILE).read_bytes()
    calls: list[Callable[[SqliteStore], object]] = [
        lambda store: store.acquire(), lambda store: store.acquire(take_over=True), lambda store: store.index(),
        lambda store: store.load(1, 9), lambda store: store.verify(),
    ]  # fmt: skip
    for call in calls:
        store = SqliteStore(tmp_path)
        with pytest.raises(Damaged, match=rf"version {SCHEMA + 6}, this one knows {SCHEMA}\b"):
            call(store)
        store.close(Shutdown(clean=True))
        assert [path.name for path in tmp_path.iterdir()] == [FILE]
        assert (tmp_path / FILE).read_bytes() == before
