"""Saves streams to the store and fetches them back, beside the device thread.

One thread writes. What is handed over while it waits for the disk is written together by the next commit; of a stream's
saves that wait only the newest is written. While the store fails nobody waits for it: answers leave, what is unsaved is
kept in memory, and the thread tries again until it is written. A second thread reads ahead for the next engine step.

No torch in here: a state is bytes and the list of its tensors.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field

from tta_server.errors import TtaError, Unavailable
from tta_server.state.records import (
    Damaged,
    Fenced,
    Field,
    Found,
    Index,
    InUse,
    Record,
    RecordStore,
    Save,
    Shutdown,
    Snapshot,
    Stored,
    StoreFailed,
)
from tta_server.types import Saved, Stream

log = logging.getLogger(__name__)

Done = Callable[[TtaError | None], None]
"""Told once that something is stored, or why it is not. Called by any thread."""

Finished = list[tuple[Done, TtaError | None]]
"""Whom to tell what, once no lock is held."""

WRITE_BYTES = 2**26
"""About as much is written in one commit."""
STALL_SECONDS = 5.0
"""Longest time that an answer waits for a write."""
RETRY_SECONDS = 1.0
"""Between two attempts at a store that fails; and how soon it is seen that another process has taken it over."""


@dataclass(eq=False)
class _Entry:
    """What the store has of a stream."""

    key: int
    revision: int | None = None
    """``None``: nothing."""
    state_revision: int | None = None
    handed: tuple[int, int] = (0, 0)
    """Revision of the stream and of its state that were last handed over."""
    is_sure: bool = True
    """Whether that is known. After a write that failed the store may have it all the same."""


@dataclass(eq=False)
class _Waiting:
    """A stream as it is to be written."""

    record: Record
    revision: int
    state_revision: int
    lost: int
    fields: tuple[Field, ...]
    data: bytes | None
    has_state: bool
    marks: list[str] = field(default_factory=list)
    done: list[Done] = field(default_factory=list)

    def can_follow(self, earlier: _Waiting) -> bool:
        """Whether ``earlier`` need not be written when this is."""
        return not earlier.marks or earlier.state_revision == self.state_revision

    def save(self, key: int, revision: int | None, state_revision: int | None) -> Save:
        """As a save that follows on what the store has: this revision, with this one of the state."""
        return Save(
            key=key,
            expected=revision,
            revision=self.revision,
            state_revision=self.state_revision,
            record=self.record,
            is_new=self.state_revision != state_revision,
            fields=self.fields,
            data=self.data,
            lost=self.lost,
            marks=tuple(self.marks),
        )

    def replaces(self, earlier: _Waiting) -> None:
        """Takes over what is left of ``earlier``."""
        if not self.has_state and earlier.has_state and earlier.state_revision == self.state_revision:
            self.fields, self.data, self.has_state = earlier.fields, earlier.data, True
        self.marks, self.done = earlier.marks + self.marks, earlier.done + self.done


@dataclass
class _Batch:
    """What is to be written."""

    streams: dict[Stream, list[_Waiting]] = field(default_factory=dict)
    removals: dict[int, tuple[Done, ...]] = field(default_factory=dict)
    unmarks: list[tuple[int, str, Done]] = field(default_factory=list)
    bad: list[tuple[int, int, str]] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        return not (self.streams or self.removals or self.unmarks or self.bad)

    def waiting(self, streams: bool = True) -> list[Done]:
        """Who is to be told."""
        told = [done for queue in self.streams.values() for one in queue for done in one.done] if streams else []
        told += [done for waiting in self.removals.values() for done in waiting]
        return told + [done for _, _, done in self.unmarks]


@dataclass
class Tally:
    """Totals since the start."""

    saved: int = 0
    saved_bytes: int = 0
    failed: int = 0
    """Attempts to write."""
    refused: int = 0
    """Saves that the store refused."""
    damaged: int = 0
    fetched: int = 0
    """States that a step had to wait for."""
    prefetched: int = 0
    """States that were there when a step needed them."""


@dataclass(frozen=True)
class Keeping:
    """How a store does, for readiness and metrics."""

    persistent: bool
    problem: str
    """Why nothing can be stored now; empty while it can."""
    fenced: bool
    """Whether another process has the store now."""
    waiting: int
    """Streams that wait to be written."""
    bytes: int
    """What the store takes."""
    tally: Tally
    last_shutdown: Shutdown | None
    """Of the process that had the store before; ``None`` where there was none."""
    damaged_at_start: int
    """Streams that were not as they had been written when the process began."""


class Keeper:
    """Between the streams in memory and the store."""

    def __init__(
        self,
        store: RecordStore,
        measured: Callable[[str, float], None] = lambda operation, seconds: None,
    ) -> None:
        """``measured`` gets the duration of each ``write``, ``fetch`` and ``prefetch`` in seconds, from any thread."""
        self._store, self._measured = store, measured
        self.tally = Tally()
        self.problem = ""
        """Why nothing can be stored now; empty while it can."""
        self.size = 0
        """Bytes that the store takes, as of the last write."""
        self.fenced = False
        """Whether another process has the store now, for good."""
        self._changed = threading.Condition()
        self._entries: dict[Stream, _Entry] = {}
        self._to_write = _Batch()
        self._held: dict[Stream, list[tuple[int, Done]]] = {}
        self._acquired = self._closing = self._take_over = False
        self._writing_since: float | None = None
        self._ahead: dict[Stream, Stored | None] = {}
        """Read ahead; ``None`` while that is under way."""
        self._to_read: list[Stream] = []
        self._reading: Stream | None = None
        self._readable = threading.Condition()
        self._threads = [
            threading.Thread(target=self._write_on, name="store", daemon=True),
            threading.Thread(target=self._read_on, name="prefetch", daemon=True),
        ]

    @property
    def persistent(self) -> bool:
        """Whether what is stored outlives the process."""
        return self._store.persistent

    def open(self, take_over: bool = False) -> Index:
        """Becomes the store's owner and returns what is in it. A store that only cannot be written to is read, and
        owned as soon as it can be. Raises ``InUse``, ``Damaged``, or ``StoreFailed`` where it cannot be read."""
        self._take_over = take_over
        try:
            self._store.acquire(take_over)
            self._acquired = True
        except StoreFailed as error:
            self._fail(error)
        index = self._store.index()
        self.size = self._store.size()
        return index

    def start(self) -> None:
        """Starts the threads."""
        for thread in self._threads:
            thread.start()

    # Told by the device thread

    def adopt(self, stream: Stream, found: Found) -> None:
        """Knows a stream that is in the store already."""
        self._entries[stream] = _Entry(
            found.key, found.revision, found.state_revision, (found.revision, found.state_revision)
        )
        stream.revision, stream.state_revision, stream.lost = found.revision, found.state_revision, found.lost
        stream.saved = Saved(
            found.revision, found.state_revision, found.record.version, found.record.requests, found.record.last_seen
        )

    def save(
        self,
        stream: Stream,
        record: Record,
        state: tuple[tuple[Field, ...], bytes | None] | None,
        marks: Iterable[str] = (),
        done: Done | None = None,
    ) -> None:
        """Has the stream stored as it is now. ``state``: its tensors and their bytes, or no bytes for the initial
        state; ``None`` for the state that was handed over last."""
        fields, data = state or ((), None)
        waiting = _Waiting(
            record,
            stream.revision,
            stream.state_revision,
            stream.lost,
            fields,
            data,
            state is not None,
            list(marks),
            [] if done is None else [done],
        )
        with self._changed:
            if self._closing or self.fenced:
                refusal = self._refusal()
            else:
                if stream not in self._entries:
                    self._entries[stream] = _Entry(self._store.new_key())
                self._entries[stream].handed = (stream.revision, stream.state_revision)
                self._put(stream, waiting)
                self._changed.notify_all()
                return
        for one in waiting.done:
            one(refusal)

    def remove(self, stream: Stream, done: Done) -> None:
        """Forgets the stream, in the store too. ``done`` is told at once where nothing was handed over of it."""
        refusal: TtaError | None = None
        with self._changed:
            dropped = [one for waiting in self._to_write.streams.pop(stream, []) for one in waiting.done]
            dropped += [one for _, one in self._held.pop(stream, [])]
            entry = self._entries.pop(stream, None)
            is_written = entry is not None and not (self.fenced or self._closing)
            if entry is not None and is_written:
                self._to_write.removals[entry.key] = (done,)
                self._changed.notify_all()
            elif entry is not None:
                refusal = self._refusal()
        with self._readable:
            self._ahead.pop(stream, None)
        for one in dropped:
            one(None)
        if not is_written:
            done(refusal)

    def unmark(self, stream: Stream, name: str, done: Done) -> None:
        """Takes a name off a state."""
        refusal: TtaError | None = None
        with self._changed:
            entry = self._entries.get(stream)
            if self.fenced or self._closing:
                refusal = self._refusal()
            elif entry is not None:  # else it is removed, with its names
                self._to_write.unmarks.append((entry.key, name, done))
                self._changed.notify_all()
                return
        done(refusal)

    def note(self, stream: Stream) -> None:
        """Remembers that the stream has come to its present revision, for the case of a crash."""
        entry = self._entries.get(stream)
        if entry is not None:
            self._store.note(entry.key, stream.revision, stream.lost)

    def handed(self, stream: Stream) -> tuple[int, int]:
        """The revision of the stream, and of its state, that are stored or wait to be."""
        entry = self._entries.get(stream)
        return (0, 0) if entry is None else entry.handed

    def hold(self, stream: Stream, revision: int, release: Done) -> None:
        """Calls ``release`` when so much of the stream is stored. At once where nothing is to be waited for: it is, it
        was not handed over, or the store fails. With an error where another process has taken the store over."""
        with self._changed:
            if self.fenced:
                refusal: TtaError | None = self._refusal()
            elif self.problem or self._closing or not stream.saved.revision < revision <= self.handed(stream)[0]:
                refusal = None
            else:
                self._held.setdefault(stream, []).append((revision, release))
                return
        release(refusal)

    # Reading

    def fetch(self, stream: Stream) -> tuple[Stored | None, str]:
        """The stream's stored state, and what was wrong with it, if something was.

        Then it is the newest sound one of the same policy and source, ``None`` where there is none, and the damaged one
        is put aside. Raises ``StoreFailed``.
        """
        started, has_waited = time.monotonic(), False
        with self._readable:
            while (stored := self._ahead.get(stream)) is None and stream in self._ahead:
                has_waited = True
                self._readable.wait()
            self._ahead.pop(stream, None)
        is_good = stored is not None and stored.revision == stream.saved.state_revision
        if is_good and not has_waited:
            self.tally.prefetched += 1
            return stored, ""
        self.tally.fetched += 1
        try:
            if is_good:
                return stored, ""
            return self._store.load(self._entries[stream].key, stream.saved.state_revision), ""
        except (Damaged, KeyError) as error:
            reason = str(error) if isinstance(error, Damaged) else "it is missing"
        finally:
            self._measured("fetch", time.monotonic() - started)
        return self._older(stream, reason), reason

    def prefetch(self, streams: Iterable[Stream], now: Collection[Stream] = ()) -> None:
        """Reads these streams' states ahead. What was read ahead for others is forgotten, but for those needed now."""
        with self._readable:
            if self._closing:
                return
            ahead = {stream: self._ahead.get(stream) for stream in streams if stream in self._entries}
            self._to_read = [
                stream for stream, stored in ahead.items() if stored is None and stream is not self._reading
            ]
            # Nobody waits for what is needed now and was not begun: that is read at once.
            for stream in now:
                if stream in self._ahead and (self._ahead[stream] is not None or stream is self._reading):
                    ahead[stream] = self._ahead[stream]
            self._ahead = ahead
            self._readable.notify_all()

    def snapshots(self, stream: Stream) -> list[Snapshot]:
        """The states that are kept of a stream, newest first. Raises ``StoreFailed`` or ``Damaged``."""
        entry = self._entries.get(stream)
        return [] if entry is None or entry.revision is None else self._store.snapshots(entry.key)

    def load(self, stream: Stream, revision: int) -> Stored:
        """One of them. Raises ``Damaged``, ``StoreFailed``, or ``KeyError`` where it is not there any more."""
        entry = self._entries.get(stream)
        if entry is None:
            raise KeyError(revision)
        return self._store.load(entry.key, revision)

    def last_shutdown(self) -> Shutdown | None:
        """How the process that had the store before ended."""
        return self._store.last_shutdown()

    def _older(self, stream: Stream, reason: str) -> Stored | None:
        entry = self._entries[stream]
        log.error("a stored state is damaged", extra={"stream": stream.id, "reason": reason})
        self.tally.damaged += 1
        with self._changed:
            self._to_write.bad.append((entry.key, stream.saved.state_revision, reason))
            self._changed.notify_all()
        try:
            kept = self._store.snapshots(entry.key)
        except Damaged:
            kept = []
        for snapshot in kept:
            if snapshot.revision != stream.saved.state_revision:
                try:
                    stored = self._store.load(entry.key, snapshot.revision)
                except (Damaged, KeyError):
                    continue
                if (stored.record.policy, stored.record.digest) == (stream.policy.name, stream.digest):
                    return stored
        return None

    def _read_on(self) -> None:
        while True:
            with self._readable:
                while not self._to_read and not self._closing:
                    self._readable.wait()
                if self._closing:
                    self._ahead.clear()
                    self._readable.notify_all()
                    return
                stream = self._reading = self._to_read.pop(0)
                entry = self._entries.get(stream)
            started, stored = time.monotonic(), None
            try:
                if entry is not None:
                    stored = self._store.load(entry.key, stream.saved.state_revision)
            except (TtaError, KeyError):
                pass  # the step that needs it will find out by itself
            except Exception:  # a fault of our own must not end the thread, who waits for it would wait for ever
                log.exception("reading ahead")
            self._measured("prefetch", time.monotonic() - started)
            with self._readable:
                self._reading = None
                if stored is not None and stream in self._ahead:
                    self._ahead[stream] = stored
                else:
                    self._ahead.pop(stream, None)
                self._readable.notify_all()

    # Writing

    @property
    def waiting(self) -> int:
        """Streams that wait to be written."""
        return len(self._to_write.streams)

    def wait(self, seconds: float) -> None:
        """Returns when the next write is over, or after so long."""
        with self._changed:
            if (self.waiting or self._writing_since is not None) and not self.problem:
                self._changed.wait(seconds)

    def flush(self, seconds: float) -> bool:
        """Waits until all that was handed over is stored, at most so long; returns whether it is."""
        with self._changed:
            self._changed.wait_for(
                lambda: self.fenced or (self._to_write.is_empty and self._writing_since is None), seconds
            )
            return self._to_write.is_empty and self._writing_since is None

    def close(self, shutdown: Shutdown) -> None:
        """Ends the threads and the ownership. Whoever still waits is let go."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            left, refused, refusal = self._let_go(), self._to_write.waiting(), self._refusal()
            self._to_write = _Batch()
        for release in left:
            release(None)
        for done in refused:
            done(refusal)
        with self._readable:
            self._readable.notify_all()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(5.0)
        self._store.close(None if self.fenced or not self._acquired else shutdown)

    def _put(self, stream: Stream, waiting: _Waiting) -> None:
        queue = self._to_write.streams.setdefault(stream, [])
        if queue and waiting.can_follow(queue[-1]):
            waiting.replaces(queue.pop())
        queue.append(waiting)

    def _write_on(self) -> None:
        while True:
            with self._changed:
                if self.problem:
                    self._changed.wait_for(lambda: self._closing, RETRY_SECONDS)
                else:
                    self._changed.wait_for(lambda: self._closing or not self._to_write.is_empty, RETRY_SECONDS)
                if self._closing or self.fenced:
                    return
                batch, self._to_write = self._to_write, _Batch()
                self._leave_some(batch)
                self._writing_since = time.monotonic()
            try:
                if not self._acquired:
                    self._store.acquire(self._take_over)
                    self._acquired = True
                finished = self._write(batch)
            except StoreFailed as error:
                finished = self._put_back(batch, error)
            except (Fenced, InUse) as error:
                finished = self._be_fenced(batch, error)
            except Exception as error:  # damage, or a fault of our own: it must not end the thread that saves
                log.exception("the state store")
                finished = self._write_apart(batch, error)
            self.size = self._store.size()
            for done, refusal in finished:
                try:
                    done(refusal)
                except Exception:  # who is told may be gone; others wait
                    log.exception("somebody could not be told of a write")
            with self._changed:
                self._writing_since = None
                self._changed.notify_all()

    def _leave_some(self, batch: _Batch) -> None:
        """Takes no more of the batch, oldest first, than a commit should have; the rest stays."""
        size, later = 0, dict[Stream, list[_Waiting]]()
        for stream, queue in batch.streams.items():
            if size > WRITE_BYTES:
                later[stream] = queue
            size += sum(len(one.data or b"") for one in queue)
        for stream in later:
            del batch.streams[stream]
        self._to_write.streams = later

    def _write(self, batch: _Batch) -> Finished:
        if batch.is_empty:
            self._store.check_owner()
            self._recover()
            return []
        saves, owners, removed = [], [], list[Done]()
        for stream, queue in batch.streams.items():
            entry = self._entries.get(stream)
            if entry is None:  # removed meanwhile
                removed += [done for one in queue for done in one.done]
                continue
            if not entry.is_sure:
                known = self._store.known(entry.key, queue[0].record.tenant, queue[0].record.id)
                entry.revision, entry.state_revision = known or (None, None)
                entry.is_sure = True
            revision, state_revision = entry.revision, entry.state_revision
            for one in queue:
                if not one.has_state and one.state_revision != state_revision:
                    revision = -1  # its state was in a save that was refused: this one must be, too
                saves.append(one.save(entry.key, revision, state_revision))
                owners.append((stream, entry, one))
                revision, state_revision = one.revision, one.state_revision
        unmarks = [(key, name) for key, name, _ in batch.unmarks]
        started = time.monotonic()
        refused = self._store.write(saves, list(batch.removals), unmarks, batch.bad)
        self._measured("write", time.monotonic() - started)
        finished: Finished = [(done, None) for done in removed]
        with self._changed:
            self._recover()
            for place, (stream, entry, one) in enumerate(owners):
                error = self._refused(stream, one) if place in refused else None
                if error is None:
                    self._saved(stream, entry, one)
                finished += [(done, error) for done in one.done]
                held = self._held.pop(stream, [])
                finished += [(release, None) for revision, release in held if error or revision <= one.revision]
                if not error and (later := [pair for pair in held if pair[0] > one.revision]):
                    self._held[stream] = later
        return finished + [(done, None) for done in batch.waiting(streams=False)]

    def _write_apart(self, batch: _Batch, error: Exception) -> Finished:
        """Writes each stream by itself, so that one that cannot be written does not keep the others from it."""
        finished: Finished = []
        rest = _Batch(removals=batch.removals, unmarks=batch.unmarks, bad=batch.bad)
        parts = [
            *(_Batch({stream: queue}) for stream, queue in batch.streams.items()),
            *([] if rest.is_empty else [rest]),
        ]
        failed = list[tuple[_Batch, Exception]]()
        self._doubt(batch)
        for part in parts:
            try:
                finished += self._write(part)
            except (Fenced, InUse) as fenced:
                return finished + self._be_fenced(part, fenced)
            except Exception as fault:
                failed.append((part, fault))
        # One alone that fails in a way of its own is at fault itself.
        if len(failed) == len(parts) and (len(parts) > 1 or isinstance(error, TtaError)):
            return finished + self._put_back(batch, StoreFailed(f"{type(error).__name__}: {error}"))
        for part, own in failed:
            if isinstance(own, StoreFailed):
                finished += self._put_back(part, own)
                continue
            with self._changed:
                for stream, queue in part.streams.items():
                    refusals = [self._refused(stream, one, own) for one in queue]
                    released = [release for _, release in self._held.pop(stream, [])]
                    finished += [(done, one) for one, item in zip(refusals, queue, strict=True) for done in item.done]
                    finished += [(release, None) for release in released]
            finished += [(done, StoreFailed(str(own))) for done in part.waiting(streams=False)]
        return finished

    def _saved(self, stream: Stream, entry: _Entry, one: _Waiting) -> None:
        entry.revision, entry.state_revision = one.revision, one.state_revision
        stream.saved = Saved(one.revision, one.state_revision, one.record.version, one.record.requests, time.time())
        self.tally.saved += 1
        self.tally.saved_bytes += len(one.data or b"")

    def _refused(self, stream: Stream, one: _Waiting, why: Exception | None = None) -> StoreFailed:
        reason = f"it has another revision of stream {stream.id!r}" if why is None else f"{type(why).__name__}: {why}"
        log.error("the state store refused a save", extra={"stream": stream.id, "reason": reason})
        self.tally.refused += 1
        entry = self._entries.get(stream)
        if entry is not None:  # what was not taken is handed over again
            entry.is_sure, entry.handed = False, (stream.saved.revision, stream.saved.state_revision)
        return StoreFailed(f"the state store: {reason}")

    def _put_back(self, batch: _Batch, error: TtaError) -> Finished:
        """Keeps for the next attempt what could not be written, and lets go who waits for it. What somebody was told
        has failed does not happen later, but a removal."""
        refusal = Unavailable(str(error))
        finished: Finished = [(done, refusal) for done in batch.waiting()]
        with self._changed:
            self.tally.failed += 1
            self._fail(error)
            newer, self._to_write = self._to_write, _Batch()
            self._doubt(batch)
            for stream, queue in [*batch.streams.items(), *newer.streams.items()]:
                for one in queue if stream in self._entries else ():
                    if queue is batch.streams.get(stream):
                        one.done, one.marks = [], []
                    self._put(stream, one)
            self._to_write.removals = {**dict.fromkeys(batch.removals, ()), **newer.removals}
            self._to_write.bad, self._to_write.unmarks = batch.bad + newer.bad, newer.unmarks
            finished += [(release, None) for release in self._let_go()]
        return finished

    def _doubt(self, batch: _Batch) -> None:
        """The store may have what it did not say that it has."""
        with self._changed:
            for stream in batch.streams.keys() & self._entries.keys():
                self._entries[stream].is_sure = False

    def _be_fenced(self, batch: _Batch, error: TtaError) -> Finished:
        log.error("the state store belongs to another process now; streams are refused", extra={"reason": str(error)})
        with self._changed:
            self.fenced, self.problem = True, str(error)
            refusal = self._refusal()
            left = [*self._let_go(), *batch.waiting(), *self._to_write.waiting()]
            self._to_write = _Batch()
        return [(one, refusal) for one in left]

    def check_stall(self) -> None:
        """Lets nobody wait for a write that takes longer than ``STALL_SECONDS``, until it is over."""
        with self._changed:
            since = self._writing_since
            if since is None or self.problem or time.monotonic() - since < STALL_SECONDS:
                return
            self._fail(StoreFailed(f"the state store: a write has not ended for {STALL_SECONDS:g} s"))
            left = self._let_go()
        for release in left:
            release(None)

    def _let_go(self) -> list[Done]:
        left = [release for held in self._held.values() for _, release in held]
        self._held.clear()
        return left

    def _fail(self, error: TtaError) -> None:
        if not self.problem:
            log.error("nothing can be stored; what is unsaved is kept in memory", extra={"reason": str(error)})
        self.problem = str(error)

    def _recover(self) -> None:
        if self.problem:
            log.warning("the state store works again", extra={"waiting": self.waiting})
            self.problem = ""

    def _refusal(self) -> Unavailable:
        return Unavailable(f"{self.problem or 'the server is shutting down'}; ask the one that has the streams now")
