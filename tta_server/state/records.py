"""What is kept of streams beyond the process, and the interface of the stores that keep it.

A *record* is everything about a stream but its state; a *revision* counts the changes of a stream (steps, resets,
rollbacks, changes of settings) and, unlike its version, never goes back. So a save can be a compare-and-set: it says
which revision it follows, and a store that has another one refuses it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import orjson
from pydantic import TypeAdapter, ValidationError

from adapters import Policy
from tta_server.errors import TtaError, Unavailable
from tta_server.policies import settings_of
from tta_server.settings import Consistency, Durability
from tta_server.types import DEFAULT_CONSISTENCY, Stream

_settings = lru_cache(maxsize=1024)(settings_of)


class StoreFailed(Unavailable):
    """The store cannot be read or written for now: the disk is full, gone, or read-only. Nothing was changed."""


class StoreBusy(StoreFailed):
    """Another process is writing to the store and does not come to an end."""


class InUse(TtaError):
    """Another process owns the store."""


class Fenced(Unavailable):
    """Another process has taken the store over; this one writes nothing to it any more."""


class Damaged(TtaError):
    """What was read is not what was written."""


@dataclass(frozen=True)
class Record:
    """What is stored of a stream beside its state. Times are Unix times in seconds."""

    tenant: str
    id: str
    model: str
    digest: str
    """Of the source that the state belongs to."""
    policy: str
    settings: dict[str, Any]
    """All of the policy's, defaults included."""
    durability: Durability
    random_key: int
    created: float
    last_seen: float
    adapt: bool
    version: int
    requests: int
    adapted: int
    failures: int
    last_number: int | None
    state_bytes: int
    guard: dict[str, Any] | None = None
    """Its guard's ``settings``, and ``state`` as :meth:`Guard.dump` has it. Records from before there were guards have
    none."""
    consistency: Consistency = DEFAULT_CONSISTENCY

    @staticmethod
    def of(stream: Stream, policy: Policy, digest: str) -> Record:
        """The stream as it is now, with the policy and source that its state is of: a change of these may be under
        way."""
        return Record(
            tenant=stream.tenant,
            id=stream.id,
            model=stream.model,
            digest=digest,
            policy=policy.name,
            settings=_settings(policy),
            durability=stream.durability,
            consistency=stream.consistency,
            random_key=stream.random_key,
            created=stream.created,
            last_seen=stream.last_seen,
            adapt=stream.adapt,
            version=stream.version,
            requests=stream.requests,
            adapted=stream.adapted,
            failures=stream.failures,
            last_number=stream.last_number,
            state_bytes=stream.state_bytes,
            guard=None
            if stream.guard is None
            else {"settings": stream.guard.settings.model_dump(), "state": stream.guard.dump()},
        )

    def stream(self, policy: Policy) -> Stream:
        """The stream again, of ``policy``, which is the record's own, made."""
        return Stream(
            id=self.id,
            model=self.model,
            policy=policy,
            random_key=self.random_key,
            created=self.created,
            digest=self.digest,
            tenant=self.tenant,
            adapt=self.adapt,
            durability=self.durability,
            consistency=self.consistency,
            state_bytes=self.state_bytes,
            last_seen=self.last_seen,
            version=self.version,
            requests=self.requests,
            adapted=self.adapted,
            failures=self.failures,
            last_number=self.last_number,
        )

    def dump(self) -> bytes:
        """As JSON."""
        return orjson.dumps(self, default=lambda value: value.model_dump())

    @staticmethod
    def parse(text: bytes) -> Record:
        """Reads :meth:`dump`'s JSON. Raises ``Damaged``."""
        try:
            return _RECORD.validate_json(text)
        except ValidationError as error:
            raise Damaged(f"no record of a stream: {error}") from error


_RECORD = TypeAdapter(Record)


class Field(NamedTuple):
    """One tensor of a state, in a state's order of bytes."""

    name: str
    """``weights/<key>`` or ``memory/<key>``."""
    dtype: str
    """As safetensors writes it: ``F32``, ``I64``, ..."""
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Save:
    """One stream to be written."""

    key: int
    """The stream's number in the store."""
    expected: int | None
    """The revision that the store must have of it; ``None``: none yet."""
    revision: int
    state_revision: int
    """Of the last change of the state itself."""
    record: Record
    is_new: bool
    """Whether this state was not stored before."""
    fields: tuple[Field, ...] = ()
    data: bytes | None = None
    """The state's tensors one behind the other; ``None``: the source's initial state, or, where ``is_new`` is false,
    as it is stored."""
    lost: int = 0
    """Changes that a crash cost the stream and that its client was not told of yet."""
    marks: tuple[str, ...] = ()
    """Names to give to this state."""


class Found(NamedTuple):
    """A stream in the store's index."""

    key: int
    revision: int
    state_revision: int
    record: Record
    lost: int
    """Changes before the last crash that are in no save."""
    note: str = ""
    """What was wrong with it, if something was."""


@dataclass(frozen=True)
class Stored:
    """A state as it is in the store."""

    revision: int
    record: Record
    """The stream as it was then."""
    fields: tuple[Field, ...]
    data: bytes | None
    """``None``: the initial state."""


@dataclass(frozen=True)
class Snapshot:
    """A state that is kept."""

    revision: int
    version: int
    saved: float
    """Unix time, seconds."""
    bytes: int
    marks: tuple[str, ...]
    automatic: bool
    """Of the ring of automatic ones."""
    current: bool
    """Whether it is the newest."""


@dataclass
class Index:
    """What is in a store, without the states."""

    streams: list[Found] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    """Streams of which nothing could be read, in words."""


@dataclass(frozen=True)
class Shutdown:
    """How the last process that owned the store ended."""

    clean: bool
    saved: int = 0
    """Streams written while it ended."""
    unsaved: int = 0
    """Streams that it could not write any more."""


class RecordStore(Protocol):
    """A store of streams. Every method may be called from any thread, :meth:`write` and its kin from one at a time.

    All raise ``StoreFailed``. What a store promises: :meth:`write` is all or nothing and survives a crash once it has
    returned; it refuses a save that does not follow on what is there, and every write of a process that is not the
    owner any more. A reader gets what was written or ``Damaged``, never anything in between.
    """

    persistent: bool
    """Whether it outlives the process."""

    def acquire(self, take_over: bool = False) -> None:
        """Makes this process the owner. Raises ``InUse`` while another one lives, unless told to take over, and
        ``Fenced`` where another one owned it since :meth:`index`."""

    def check_owner(self) -> None:
        """Raises ``Fenced`` if another process has become the owner."""

    def index(self) -> Index:
        """Every stream, without its states. Needs no ownership."""

    def new_key(self) -> int:
        """A number for a new stream."""

    def write(self, saves: Sequence[Save], removals: Sequence[int] = (), unmarks: Sequence[tuple[int, str]] = (),
              bad: Sequence[tuple[int, int, str]] = ()) -> set[int]:  # fmt: skip
        """Removes streams by key, writes ``saves``, takes names off states (key, name) and puts damaged states aside
        (key, revision, reason). Returns the places of the saves that were refused. Raises ``Fenced``."""

    def known(self, key: int, tenant: str, id: str) -> tuple[int, int] | None:
        """The revision of a stream and of its state; ``None`` where there is no such stream of that number."""

    def load(self, key: int, revision: int) -> Stored:
        """One state. Raises ``Damaged``; ``KeyError`` where it is not there."""

    def snapshots(self, key: int) -> list[Snapshot]:
        """The states that are kept of a stream and sound as far as known, newest first."""

    def note(self, key: int, revision: int, lost: int) -> None:
        """Remembers, cheaply, that a stream has come so far, and what it lost that no answer told of. Survives the
        process, not the machine. Raises nothing."""

    def last_shutdown(self) -> Shutdown | None:
        """How the owner before this one ended; ``None`` for a new store."""

    def size(self) -> int:
        """Bytes that it takes."""

    def close(self, shutdown: Shutdown | None = None) -> None:
        """Ends the ownership; ``shutdown`` is for the next owner."""
