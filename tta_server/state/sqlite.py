"""The embedded store: one SQLite file in WAL mode, which needs no service.

Why SQLite and not a file a stream: many streams are written by one commit, that is by one flush of the disk; a commit
is whole or not there; and the index comes with it (``benchmarks/store.py`` has the figures). Beside the file lie

- ``owner-<epoch>.lock``: the owner holds a lock on it, which ends with its process, however that ends;
- ``progress-<epoch>``: 16 bytes for each stream, its newest revision and the losses that nobody was told of, written
  without a flush at every step. That survives the process, so after a crash it is known how many steps were lost.

The *epoch* counts owners. Each write checks that the file still has the writer's epoch, in the same transaction: a
process that was taken over while it was paused writes nothing any more.
"""

from __future__ import annotations

import fcntl
import hashlib
import heapq
import os
import re
import socket
import sqlite3
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from itertools import filterfalse, islice
from pathlib import Path
from typing import Any

import orjson

from tta_server.errors import TtaError
from tta_server.state.records import (
    Damaged,
    Fenced,
    Field,
    Found,
    Index,
    InUse,
    Record,
    Save,
    Shutdown,
    Snapshot,
    StoreBusy,
    Stored,
    StoreFailed,
)

FILE = "streams.sqlite"
PROGRESS = "progress"
_LEFT = re.compile(rf"(?:owner-(?=.*\.lock)|{PROGRESS}-)(\d+)(?:\.lock)?")
"""Files of an owner, which the next one removes."""
_PAIR = struct.Struct("<qq")
"""A stream's entry there."""
SCHEMA = 1
"""Version of the tables, in the file's ``user_version``."""
PAGE = 16384
LOG_BYTES = 2**22
"""About as large the log grows before it is taken over into the file."""
BUSY_SECONDS = 5.0
"""Longest wait for another process's transaction."""

MOST_STREAMS = 2**24
"""Up to this number a stream's progress is kept; a larger one is damage."""
MOST_FREE = 2**16
"""As many free numbers are looked for at the start."""

_PROGRESSED = "SELECT key, revision, lost FROM streams WHERE key BETWEEN 1 AND ? AND typeof(revision) = 'integer'"

_TABLES = """
CREATE TABLE owner (
    only INTEGER PRIMARY KEY CHECK (only = 1), epoch INTEGER NOT NULL, name TEXT NOT NULL, since REAL NOT NULL,
    shutdown TEXT);
CREATE TABLE streams (
    key INTEGER PRIMARY KEY, tenant TEXT NOT NULL, id TEXT NOT NULL, epoch INTEGER NOT NULL, revision INTEGER NOT NULL,
    state INTEGER NOT NULL, previous INTEGER NOT NULL, lost INTEGER NOT NULL, record BLOB NOT NULL,
    checksum BLOB NOT NULL, UNIQUE (tenant, id));
CREATE TABLE layouts (digest BLOB PRIMARY KEY, fields BLOB NOT NULL);
CREATE TABLE states (
    stream INTEGER NOT NULL REFERENCES streams (key) ON DELETE CASCADE, revision INTEGER NOT NULL,
    version INTEGER NOT NULL, saved REAL NOT NULL, automatic INTEGER NOT NULL, bad TEXT, layout BLOB NOT NULL,
    record BLOB NOT NULL, checksum BLOB NOT NULL, data BLOB, UNIQUE (stream, revision));
CREATE TABLE marks (
    stream INTEGER NOT NULL REFERENCES streams (key) ON DELETE CASCADE, name TEXT NOT NULL, revision INTEGER NOT NULL,
    PRIMARY KEY (stream, name)) WITHOUT ROWID;
"""

_PRUNE = """
DELETE FROM states WHERE stream = :key AND bad IS NULL
    AND revision NOT IN (SELECT state FROM streams WHERE key = :key)
    AND revision NOT IN (SELECT previous FROM streams WHERE key = :key)
    AND revision NOT IN (SELECT revision FROM marks WHERE stream = :key)
    AND revision NOT IN (
        SELECT revision FROM states WHERE stream = :key AND automatic AND bad IS NULL
        ORDER BY revision DESC LIMIT :keep)
"""
"""What is left of a stream's states: the newest, the one before, the marked, and the ring of automatic ones."""


class SqliteStore:
    """See :class:`tta_server.state.records.RecordStore`."""

    def __init__(self, folder: Path | None, snapshot_steps: int = 100, snapshots: int = 3) -> None:
        """Opens nothing yet. ``folder=None`` keeps everything in memory, for as long as the process lives.

        A state becomes an automatic snapshot where its version is ``snapshot_steps`` from the last one's; of these the
        newest ``snapshots`` are kept.
        """
        self.persistent = folder is not None
        self._folder, self._every, self._keep = folder, snapshot_steps, snapshots
        self._local, self._all, self._guard = threading.local(), list[sqlite3.Connection](), threading.Lock()
        self._writer: sqlite3.Connection | None = None
        self._epoch = 0
        self._seen: int | None = None
        """The epoch of the index that was read."""
        self._lock_file: int | None = None
        self._progress: int | None = None
        self._free, self._are_free = list[int](), set[int]()
        self._next = 1
        self._before: Shutdown | None = None

    # Ownership

    def acquire(self, take_over: bool = False) -> None:
        """See :class:`RecordStore`. Makes the folder and the file where there are none, and brings older files to this
        version."""
        with _failing():
            if self._folder is not None:
                self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            db = self._open_writer()
            try:
                self._check_free(db, take_over)
                try:
                    _begin(db)
                except StoreBusy as error:
                    raise InUse(f"{error}; it has {self._place()}: end that process first") from error
                try:
                    self._migrate(db)
                    self._become_owner(db, take_over)
                    self._settle(db)
                    db.execute("COMMIT")
                except BaseException:
                    if db.in_transaction:  # it is not where SQLite ended it by itself
                        db.execute("ROLLBACK")
                    raise
            except BaseException:
                self._give_up()
                db.close()
                raise
            self._writer = db
            self._local = threading.local()  # who read a folder that could not be written to would see nothing new
            for path in [] if self._folder is None else self._folder.glob("*-*"):
                if (left := _LEFT.fullmatch(path.name)) and int(left[1]) < self._epoch:
                    with suppress(OSError):
                        path.unlink()

    def check_owner(self) -> None:
        """See :class:`RecordStore`."""
        with _failing():
            self._check_epoch(self._owned())

    def last_shutdown(self) -> Shutdown | None:
        """See :class:`RecordStore`."""
        return self._before

    def _become_owner(self, db: sqlite3.Connection, take_over: bool) -> None:
        self._check_free(db, take_over)
        owner = self._owner(db)
        epoch, name = (0, "") if owner is None else owner
        if self._seen not in (None, epoch):
            raise Fenced(f"{name} has used {self._place()} since this process read it")
        if owner is not None:
            (shutdown,) = db.execute("SELECT shutdown FROM owner").fetchone()
            self._before = _shutdown(shutdown)
        epoch += 1
        self._lock(epoch)
        db.execute(
            "INSERT OR REPLACE INTO owner VALUES (1, ?, ?, ?, NULL)",
            (epoch, f"process {os.getpid()} on {socket.gethostname()}", time.time()),
        )
        self._epoch = epoch

    def _check_free(self, db: sqlite3.Connection, take_over: bool) -> None:
        """Raises ``InUse`` where a process that lives owns the store, unless told to take over."""
        if db.execute("SELECT 1 FROM sqlite_schema WHERE name = 'owner'").fetchone() is None:
            return
        owner = self._owner(db)
        if owner is not None and not take_over and self._is_locked(owner[0]):
            raise InUse(
                f"{self._place()} is in use by {owner[1]}. Stop that process, or give this one a folder of "
                "its own (state.folder); with --take-over this one takes the streams, and that one can save no more"
            )

    def _is_locked(self, epoch: int) -> bool:
        if self._folder is None:
            return False
        try:
            file = os.open(self._folder / f"owner-{epoch}.lock", os.O_RDWR)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(file)
        return False

    def _lock(self, epoch: int) -> None:
        if self._folder is not None:
            self._lock_file = self._create(f"owner-{epoch}.lock")
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _give_up(self) -> None:
        """Closes the files of the ownership."""
        files, self._lock_file, self._progress = (self._lock_file, self._progress), None, None
        for file in files:
            if file is not None:
                os.close(file)

    def _create(self, name: str) -> int:
        """Opens a file beside the store's, which belongs to whom that belongs to: root may only be passing by."""
        assert self._folder is not None
        file = os.open(self._folder / name, os.O_RDWR | os.O_CREAT, 0o600)
        owner = (self._folder / FILE).stat()
        if owner.st_uid != os.geteuid() == 0:
            os.fchown(file, owner.st_uid, owner.st_gid)
        return file

    def _check_epoch(self, db: sqlite3.Connection) -> None:
        owner = self._owner(db)
        if owner is None:
            raise Damaged(f"{self._place()} does not say any more who owns it")
        if owner[0] != self._epoch:
            raise Fenced(f"{owner[1]} has taken {self._place()} over")

    def _owner(self, db: sqlite3.Connection) -> tuple[int, str] | None:
        """The epoch, and in words who began it and when. Raises ``Damaged``."""
        row = db.execute("SELECT epoch, name, since FROM owner").fetchone()
        if row is None:
            return None
        try:
            epoch, name, since = row
            if not isinstance(epoch, int):
                raise TypeError
            return epoch, f"{name} since {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(since))}"
        except (TypeError, ValueError, OverflowError, OSError) as error:
            raise Damaged(f"{self._place()} does not say any more who owns it") from error

    # Reading

    def index(self) -> Index:
        """See :class:`RecordStore`."""
        found = Index()
        with _failing():
            db = self._reader()
            if db is None:
                self._seen = self._epoch
                return found
            row = db.execute("SELECT epoch FROM owner").fetchone()
            self._seen = row[0] if row else 0
            progress = self._read_progress(self._seen) if self._writer is None else {}
            taken = set()
            for key, tenant, id, revision, state, lost, text, checksum in db.execute(
                "SELECT key, tenant, id, revision, state, lost, record, checksum FROM streams ORDER BY key"
            ):
                if key in taken:
                    continue  # two pages are the same
                taken.add(key)
                lost = _lost(progress, key, revision, lost)
                note = ""
                try:
                    if checksum != _checksum(key, revision, state, text):
                        raise Damaged("its record's checksum is wrong")
                    record = Record.parse(text)
                except Damaged as error:
                    older = self._newest_record(db, key)
                    numbers = isinstance(revision, int) and isinstance(state, int) and revision >= state
                    if older is None or not numbers:
                        found.damaged.append(f"stream {id!r} of tenant {tenant!r} (number {key}): {error}")
                        continue
                    record, note = older, f"{error}; an older one is used"
                found.streams.append(Found(key, revision, state, record, lost, note))
        self._next = max(taken, default=0) + 1
        self._free = list(islice(filterfalse(taken.__contains__, range(1, self._next)), MOST_FREE))
        self._are_free = set(self._free)
        return found

    def known(self, key: int, tenant: str, id: str) -> tuple[int, int] | None:
        """See :class:`RecordStore`."""
        with _failing():
            row: tuple[int, int] | None = self._owned().execute(
                "SELECT revision, state FROM streams WHERE key = ? AND tenant = ? AND id = ?", (key, tenant, id)
            ).fetchone()  # fmt: skip
            return row

    def load(self, key: int, revision: int) -> Stored:
        """See :class:`RecordStore`."""
        with _failing(), _suspecting():
            row = self._reading().execute(
                "SELECT bad, layout, fields, record, checksum, data FROM states "
                "LEFT JOIN layouts ON layouts.digest = states.layout WHERE stream = ? AND revision = ?",
                (key, revision),
            ).fetchone()  # fmt: skip
        if row is None:
            raise KeyError(revision)
        bad, layout, fields, text, checksum, data = row
        if bad is not None:
            raise Damaged(bad)
        if checksum != _checksum(key, revision, layout, text, data or b""):
            raise Damaged("its checksum is wrong")
        if fields is None or _checksum(fields) != layout:
            raise Damaged("the description of its tensors is not there, or damaged")
        described = tuple(Field(name, dtype, tuple(shape)) for name, dtype, shape in orjson.loads(fields))
        return Stored(revision, Record.parse(text), described, data)

    def snapshots(self, key: int) -> list[Snapshot]:
        """See :class:`RecordStore`."""
        with _failing(), _suspecting():
            db = self._reading()
            named: dict[int, list[str]] = {}
            for name, revision in db.execute("SELECT name, revision FROM marks WHERE stream = ? ORDER BY name", (key,)):
                named.setdefault(revision, []).append(name)
            rows = db.execute(
                "SELECT states.revision, version, saved, length(data), automatic, states.revision = streams.state "
                "FROM states JOIN streams ON streams.key = stream WHERE stream = ? AND bad IS NULL "
                "ORDER BY states.revision DESC", (key,)
            ).fetchall()  # fmt: skip
        return [
            Snapshot(
                revision, version, saved, size or 0, tuple(named.get(revision, ())), bool(automatic), bool(current)
            )
            for revision, version, saved, size, automatic, current in rows
        ]

    def size(self) -> int:
        """See :class:`RecordStore`."""
        if self._folder is None:
            db = self._writer
            return 0 if db is None else PAGE * int(db.execute("PRAGMA page_count").fetchone()[0])
        total = 0
        for name in (FILE, f"{FILE}-wal", f"{FILE}-shm", f"{PROGRESS}-{self._epoch}"):
            with suppress(OSError):
                total += (self._folder / name).stat().st_size
        return total

    def _newest_record(self, db: sqlite3.Connection, key: int) -> Record | None:
        for (revision,) in db.execute(
            "SELECT revision FROM states WHERE stream = ? AND bad IS NULL ORDER BY revision DESC", (key,)
        ).fetchall():
            with suppress(Damaged, KeyError):
                return self.load(key, revision).record
        return None

    # Writing

    def new_key(self) -> int:
        """See :class:`RecordStore`. The lowest that is free, so that the file of progress stays small."""
        with self._guard:
            key = heapq.heappop(self._free) if self._free else self._next
            self._are_free.discard(key)
            self._next = max(self._next, key + 1)
        self.note(key, 0, 0)
        return key

    def write(
        self,
        saves: Sequence[Save],
        removals: Sequence[int] = (),
        unmarks: Sequence[tuple[int, str]] = (),
        bad: Sequence[tuple[int, int, str]] = (),
    ) -> set[int]:
        """See :class:`RecordStore`."""
        refused = set()
        with _failing():
            db = self._owned()
            _begin(db)
            try:
                self._check_epoch(db)
                db.executemany("DELETE FROM streams WHERE key = ?", ((key,) for key in removals))
                db.executemany("UPDATE states SET bad = ? WHERE stream = ? AND revision = ?",
                               ((reason, key, revision) for key, revision, reason in bad))  # fmt: skip
                for place, save in enumerate(saves):
                    if not self._save(db, save):
                        refused.add(place)
                for key, name in unmarks:
                    db.execute("DELETE FROM marks WHERE stream = ? AND name = ?", (key, name))
                    db.execute(_PRUNE, {"key": key, "keep": self._keep})
                db.execute("COMMIT")
            except BaseException:
                with suppress(sqlite3.Error):
                    if db.in_transaction:
                        db.execute("ROLLBACK")
                    db.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # what is in the log already may make room
                raise
        with self._guard:
            for key in removals:
                if key not in self._are_free:
                    self._are_free.add(key)
                    heapq.heappush(self._free, key)
        return refused

    def note(self, key: int, revision: int, lost: int) -> None:
        """See :class:`RecordStore`."""
        if self._progress is not None:
            with suppress(OSError):
                os.pwrite(self._progress, _PAIR.pack(revision, lost), _PAIR.size * key)

    def close(self, shutdown: Shutdown | None = None) -> None:
        """See :class:`RecordStore`."""
        if self._writer is not None:
            with suppress(TtaError), _failing():
                if shutdown is not None:
                    told = orjson.dumps(shutdown)
                    self._writer.execute("UPDATE owner SET shutdown = ? WHERE epoch = ?", (told, self._epoch))
        with self._guard:
            everything, self._all = self._all, []
        # The writer last: whoever is the last folds the log into the file, and readers cannot.
        for db in [*everything, *([] if self._writer is None else [self._writer])]:
            with suppress(sqlite3.Error):
                db.close()
        self._writer, self._local = None, threading.local()
        self._give_up()

    def _save(self, db: sqlite3.Connection, save: Save) -> bool:
        """Whether it follows on what is there."""
        text, state = save.record.dump(), save.state_revision
        checksum = _checksum(save.key, save.revision, state, text)
        if save.expected is None:
            self._make_room(db, save)
            row = (save.key, save.record.tenant, save.record.id, self._epoch, save.revision, state, state, save.lost)
            done = db.execute(
                "INSERT INTO streams VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
                (*row, text, checksum),
            )
        else:
            done = db.execute(
                "UPDATE streams SET epoch = :epoch, revision = :revision, lost = :lost, record = :record, "
                "previous = CASE WHEN state = :state THEN previous ELSE state END, state = :state, "
                "checksum = :checksum WHERE key = :key AND revision = :expected AND epoch <= :epoch",
                {
                    "epoch": self._epoch, "revision": save.revision, "lost": save.lost, "record": text,
                    "state": state, "checksum": checksum, "key": save.key, "expected": save.expected,
                },
            )  # fmt: skip
        if not done.rowcount:
            return False
        if save.expected is None:  # damage may have left states of a stream that had this number
            db.execute("DELETE FROM states WHERE stream = ?", (save.key,))
            db.execute("DELETE FROM marks WHERE stream = ?", (save.key,))
        if save.is_new:
            self._put_state(db, save, text)
            db.execute(_PRUNE, {"key": save.key, "keep": self._keep})
        db.executemany(
            "INSERT OR REPLACE INTO marks VALUES (?, ?, ?)", ((save.key, name, state) for name in save.marks)
        )
        return True

    def _make_room(self, db: sqlite3.Connection, save: Save) -> None:
        """Puts aside a stream that has the id of a new one, but cannot be read."""
        row = db.execute(
            "SELECT key, revision, state, record, checksum FROM streams WHERE tenant = ? AND id = ?",
            (save.record.tenant, save.record.id),
        ).fetchone()
        if row is not None and not _is_sound(*row):
            aside = f"{save.record.id} (damaged, {row[0]})"
            db.execute("UPDATE streams SET id = ? WHERE key = ?", (aside, row[0]))

    def _put_state(self, db: sqlite3.Connection, save: Save, text: bytes) -> None:
        layout, fields = _layout(save.fields)
        db.execute("INSERT OR IGNORE INTO layouts VALUES (?, ?)", (layout, fields))
        last = db.execute(
            "SELECT version FROM states WHERE stream = ? AND automatic AND bad IS NULL ORDER BY revision DESC LIMIT 1",
            (save.key,),
        ).fetchone()
        version = save.record.version
        is_due = last is None or abs(version - last[0]) >= self._every
        db.execute(
            "INSERT OR REPLACE INTO states VALUES (?, ?, ?, ?, ?, NULL, ?, ?, ?, ?)",
            (
                save.key, save.state_revision, version, time.time(), is_due and save.data is not None, layout, text,
                _checksum(save.key, save.state_revision, layout, text, save.data or b""), save.data,
            ),
        )  # fmt: skip

    # Files

    def _place(self) -> str:
        return f"the state store {self._folder}"

    def _open_writer(self) -> sqlite3.Connection:
        db = self._connect("rwc")
        try:
            _check_version(self._place(), db.execute("PRAGMA user_version").fetchone()[0])
            db.execute(f"PRAGMA page_size = {PAGE}")
            db.execute("PRAGMA journal_mode = WAL")
            db.execute(f"PRAGMA wal_autocheckpoint = {LOG_BYTES // PAGE}")
            db.execute("PRAGMA synchronous = FULL")  # a commit is on the disk when it returns
            db.execute("PRAGMA foreign_keys = ON")
        except BaseException:
            db.close()
            raise
        if self._folder is not None:
            with suppress(OSError):
                (self._folder / FILE).chmod(0o600)
        return db

    def _connect(self, mode: str) -> sqlite3.Connection:
        if self._folder is None:
            db = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
        else:
            uri = f"{(self._folder / FILE).absolute().as_uri()}?mode={mode}"
            db = sqlite3.connect(uri, BUSY_SECONDS, isolation_level=None, check_same_thread=False, uri=True)
        db.text_factory = lambda raw: raw.decode(errors="replace")  # damaged text must not end a query
        return db

    def _reader(self) -> sqlite3.Connection | None:
        """This thread's connection for reading; ``None`` where there is nothing to read yet."""
        if self._folder is None:
            return self._writer
        db: sqlite3.Connection | None = getattr(self._local, "db", None)
        if db is not None:
            return db
        if not (self._folder / FILE).exists():
            return None
        db = self._connect("ro")
        try:
            try:
                db.execute("SELECT 1 FROM sqlite_schema").fetchone()
            except sqlite3.OperationalError:
                # A folder that cannot be written to has no place for the files of a reader, and nobody who writes.
                if (self._folder / f"{FILE}-wal").exists():
                    raise
                db.close()
                db = self._connect("ro&immutable=1")
            version = db.execute("PRAGMA user_version").fetchone()[0]
            _check_version(self._place(), version)
            if 0 < version < SCHEMA:
                needs = f"it is brought to {SCHEMA} once it is writable"
                raise StoreFailed(f"{self._place()} has version {version}; {needs}")
        except BaseException:
            db.close()
            raise
        if version == 0:
            db.close()
            return None  # nothing in it yet
        with self._guard:
            self._all.append(db)
        self._local.db = db
        return db

    def _reading(self) -> sqlite3.Connection:
        db = self._reader()
        if db is None:
            raise StoreFailed(f"{self._place()} is not there")
        return db

    def _owned(self) -> sqlite3.Connection:
        if self._writer is None:
            raise StoreFailed(f"{self._place()} is not open for writing")
        return self._writer

    def _migrate(self, db: sqlite3.Connection) -> None:
        version = db.execute("PRAGMA user_version").fetchone()[0]
        _check_version(self._place(), version)
        if version == 0:
            for statement in _TABLES.split(";")[:-1]:
                db.execute(statement)
        db.execute(f"PRAGMA user_version = {SCHEMA}")

    # Progress

    def _read_progress(self, epoch: int) -> dict[int, tuple[int, int]]:
        """Revision and untold losses by stream, as the owner with this epoch left them."""
        if self._folder is None:
            return {}
        try:
            raw = (self._folder / f"{PROGRESS}-{epoch}").read_bytes()
        except OSError:
            return {}
        return dict(enumerate(_PAIR.iter_unpack(raw[: len(raw) // _PAIR.size * _PAIR.size])))

    def _settle(self, db: sqlite3.Connection) -> None:
        """Adds to each stream what the owner before did with it and did not save, and begins a file of progress."""
        if self._folder is None:
            return
        progress, entries, changes = self._read_progress(self._epoch - 1), dict[int, tuple[int, int]](), []
        for key, revision, before in db.execute(_PROGRESSED, (MOST_STREAMS,)).fetchall():
            lost = _lost(progress, key, revision, before)
            entries[key] = revision, lost
            if lost != before:
                changes.append((lost, key))
        db.executemany("UPDATE streams SET lost = ? WHERE key = ?", changes)
        values = bytearray(_PAIR.size * (max(entries, default=0) + 1))
        for key, entry in entries.items():
            _PAIR.pack_into(values, _PAIR.size * key, *entry)
        with suppress(OSError):  # without it, losses are not told, and nothing else
            self._progress = self._create(f"{PROGRESS}-{self._epoch}")
            os.ftruncate(self._progress, 0)
            os.pwrite(self._progress, values, 0)

    # Care

    def in_use(self) -> str:
        """Which process owns the store now, in words; empty where none does. Needs no ownership."""
        with _failing():
            db = self._reader()
            owner = None if db is None else self._owner(db)
        with suppress(OSError):  # who may not try the lock is not to know
            if owner is not None and owner[0] != self._epoch and self._is_locked(owner[0]):
                return owner[1]
        return ""

    def verify(self, tell: Callable[[int, int], None] = lambda done, of: None) -> list[str]:
        """Reads everything that is stored and says what is wrong with it, a line each. Needs no ownership.

        Reads stream by stream, so that an owner's log need not grow meanwhile. ``tell`` hears of how many streams of
        how many are done.
        """
        faults: list[str] = []

        def ask(statement: str) -> list[tuple[Any, ...]]:
            try:
                return db.execute(statement).fetchall()
            except sqlite3.OperationalError:
                raise
            except sqlite3.DatabaseError as error:
                faults.append(f"the file cannot be read for {statement!r}: {error}")
                return []

        with _failing():
            db = self._reading()
            faults += [line for (line,) in ask("PRAGMA integrity_check") if line != "ok"]
            orphans = sorted({table for table, *_ in ask("PRAGMA foreign_key_check")})
            faults += [f"there are {table} of a stream that is not there" for table in orphans]
            streams = ask("SELECT key, tenant, id FROM streams ORDER BY key")
            for done, (key, tenant, id) in enumerate(streams, 1):
                db.execute("BEGIN")
                try:
                    found = list(self._faults(db, key))
                finally:
                    db.execute("ROLLBACK")
                faults += [f"stream {id!r} of tenant {tenant!r}: {fault}" for fault in found]
                tell(done, len(streams))
        return faults

    def collect(self) -> tuple[int, int]:
        """Deletes states that were put aside, streams of which nothing can be read, and what belongs to none, and gives
        the room back to the disk. For an owner that does nothing else meanwhile. Returns how many of the two first."""
        with _failing():
            db = self._owned()
            db.execute("BEGIN IMMEDIATE")
            try:
                self._check_epoch(db)
                keys = [key for (key,) in db.execute("SELECT key FROM streams").fetchall()]
                hopeless = [
                    key for key in keys if not self._has_sound_record(db, key) and not self._newest_record(db, key)
                ]
                db.executemany("DELETE FROM streams WHERE key = ?", ((key,) for key in hopeless))
                states = db.execute("DELETE FROM states WHERE bad IS NOT NULL").rowcount
                db.execute("DELETE FROM states WHERE stream NOT IN (SELECT key FROM streams)")
                db.execute("DELETE FROM marks WHERE (stream, revision) NOT IN (SELECT stream, revision FROM states)")
                db.execute("DELETE FROM layouts WHERE digest NOT IN (SELECT layout FROM states)")
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise
            db.execute("VACUUM")
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        return states, len(hopeless)

    def _faults(self, db: sqlite3.Connection, key: int) -> Iterator[str]:
        try:
            if not self._has_sound_record(db, key):
                yield "its record's checksum is wrong"
            states = db.execute("SELECT revision, version, bad FROM states WHERE stream = ?", (key,)).fetchall()
            for revision, version, bad in states:
                state = f"its state of version {version} (revision {revision})"
                try:
                    if bad is None:
                        self.load(key, revision)
                    else:
                        yield f"{state} was put aside: {bad}"
                except Damaged as error:
                    yield f"{state}: {error}"
            for (newest,) in db.execute("SELECT state FROM streams WHERE key = ?", (key,)).fetchall():
                if newest not in {revision for revision, *_ in states}:
                    yield f"its newest state (revision {newest}) is missing"
        except sqlite3.OperationalError:
            raise
        except sqlite3.DatabaseError as error:
            yield f"it cannot be read: {error}"

    def _has_sound_record(self, db: sqlite3.Connection, key: int) -> bool:
        row = db.execute("SELECT key, revision, state, record, checksum FROM streams WHERE key = ?", (key,)).fetchone()
        return row is None or _is_sound(*row)


@lru_cache(maxsize=256)
def _layout(fields: tuple[Field, ...]) -> tuple[bytes, bytes]:
    """The digest of a state's tensors, and their names, types and shapes as JSON."""
    text = orjson.dumps([tuple(field) for field in fields])
    return hashlib.blake2b(text, digest_size=16).digest(), text


def _lost(progress: dict[int, tuple[int, int]], key: int, revision: int, before: int) -> int:
    """Changes of a stream that are in no save and were not told of, given the stored ``revision`` and the losses that
    were stored with it. Progress that is older than that was not flushed before the power went, and is none."""
    reached, untold = progress.get(key, (0, 0))
    if not (isinstance(revision, int) and isinstance(before, int)):
        return 0  # damaged
    return untold + reached - revision if reached >= revision else before


def _begin(db: sqlite3.Connection) -> None:
    """Begins to write. Raises ``InUse`` where another process does not end its own transaction."""
    try:
        db.execute("BEGIN IMMEDIATE")
    except sqlite3.OperationalError as error:
        if db.in_transaction:
            db.execute("ROLLBACK")
        if error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY:
            raise StoreBusy(
                f"the state store: another process has been in the middle of a write for {BUSY_SECONDS:g} s"
            ) from error
        raise


def _checksum(*parts: object) -> bytes:
    """Raises ``Damaged`` for a value that is neither a number nor bytes: none other was written."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, int):
            digest.update(b"%d;" % part)
        elif isinstance(part, bytes):
            digest.update(part)
        else:
            raise Damaged("a value in it has another type than was written")
    return digest.digest()


def _is_sound(key: int, revision: int, state: int, text: bytes, checksum: bytes) -> bool:
    try:
        return checksum == _checksum(key, revision, state, text)
    except Damaged:
        return False


def _check_version(place: str, version: int) -> None:
    if version > SCHEMA:
        raise Damaged(f"{place} was written by a newer release: it has version {version}, this one knows {SCHEMA}")


def _shutdown(told: bytes | None) -> Shutdown:
    try:
        return Shutdown(False) if told is None else Shutdown(**orjson.loads(told))
    except (ValueError, TypeError):
        return Shutdown(False)


@contextmanager
def _failing() -> Iterator[None]:
    """Puts into our words what goes wrong with the file or the disk."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        if isinstance(error, sqlite3.OperationalError):
            raise StoreFailed(f"the state store: {error}") from error
        raise Damaged(f"the state store is damaged: {error}") from error
    except OSError as error:
        raise StoreFailed(f"the state store: {error}") from error


@contextmanager
def _suspecting() -> Iterator[None]:
    """Inside of :func:`_failing`, for a single record: a damaged page may be this record's alone."""
    try:
        yield
    except sqlite3.OperationalError:
        raise
    except sqlite3.DatabaseError as error:
        raise Damaged(str(error)) from error
