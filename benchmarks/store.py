"""Where to keep stream states: in one SQLite file, or in a file a stream?

    python benchmarks/store.py [--seconds 1] [--rounds 5] [--folder DIR]

The server's own ``SqliteStore`` against the plainest durable files: each state is written to a new file, flushed
(``fsync``), renamed over the old one, and the folder flushed, once for all states of a group. Both write the same bytes
with a checksum, and a reader checks it. SQLite does more: it compares revisions, keeps the state before and automatic
snapshots, and its index comes with it.

States of TENT and of CoTTA for a ResNet-20, filled with random bytes, saved one by one and in groups: as many as one
commit of the server would have, at most 64 and about 64 MiB. Cases take turns; rates are medians over rounds. Reads are
of random streams, with the file in the system's cache and with it dropped from there (``posix_fadvise``) before each.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import example
import numpy as np
import state_bytes
from rich.console import Console
from rich.progress import track
from rich.table import Table

from adapters import serving
from tta_server.policies import make_policy
from tta_server.state import sqlite
from tta_server.state.keeper import WRITE_BYTES
from tta_server.state.records import Record, Save
from tta_server.state.slots import Layout
from tta_server.types import Stream

STREAMS = {"tent": 1024, "cotta": 32}
GROUP = 64
STEPS = 8
"""From one save of a stream to the next: what the default durability makes of a busy stream."""
READS = 100
"""In each round."""
PAGES = (4096, 16384)


class Place(Protocol):
    """Somewhere to keep states, stream by stream."""

    def save(self, streams: Sequence[int], data: bytes) -> None:
        """Writes a new state of these streams, durable on return."""

    def load(self, stream: int) -> bytes:
        """The newest, checked."""

    def forget(self, stream: int) -> None:
        """Has the next read of this stream go to the disk."""

    def bytes(self) -> int:
        """What all takes."""

    def close(self) -> None:
        """Ends it."""


class Sqlite:
    """The server's store with pages of this size."""

    def __init__(self, folder: Path, page: int, layout: Layout) -> None:
        self._folder, self._fields = folder, layout.fields
        default, sqlite.PAGE = sqlite.PAGE, page
        try:
            self._store = sqlite.SqliteStore(folder)
            self._store.acquire()
        finally:
            sqlite.PAGE = default
        self._streams: dict[int, tuple[int, Stream]] = {}
        self._policy = make_policy("tent", {})

    def save(self, streams: Sequence[int], data: bytes) -> None:
        """See :class:`Place`."""
        saves = []
        for number in streams:
            expected: int | None = None
            if number in self._streams:
                key, stream = self._streams[number]
                expected = stream.revision
            else:
                key, stream = self._store.new_key(), Stream(f"s{number}", "resnet20", self._policy, number, 0.0)
                self._streams[number] = key, stream
            stream.revision, stream.version = stream.revision + STEPS, stream.version + STEPS
            record = Record.of(stream, stream.policy, stream.digest)
            saves.append(Save(key, expected, stream.revision, stream.revision, record, True, self._fields, data))
        assert not self._store.write(saves), "a save was refused"

    def load(self, stream: int) -> bytes:
        """See :class:`Place`."""
        key, known = self._streams[stream]
        data = self._store.load(key, known.revision).data
        assert data is not None
        return data

    def forget(self, stream: int) -> None:
        """See :class:`Place`."""
        drop(self._folder / sqlite.FILE)
        drop(self._folder / f"{sqlite.FILE}-wal")

    def bytes(self) -> int:
        """See :class:`Place`."""
        return self._store.size()

    def close(self) -> None:
        """See :class:`Place`."""
        self._store.close()


class Files:
    """A file a stream."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._folder, self._handle, self._last = folder, os.open(folder, os.O_RDONLY), folder

    def save(self, streams: Sequence[int], data: bytes) -> None:
        """See :class:`Place`."""
        for number in streams:
            new = self._folder / f"{number}.new"
            file = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.writev(file, [hashlib.blake2b(data, digest_size=16).digest(), data])
            os.fsync(file)
            os.close(file)
            new.rename(self._folder / str(number))
        os.fsync(self._handle)

    def load(self, stream: int) -> bytes:
        """See :class:`Place`."""
        content = (self._folder / str(stream)).read_bytes()
        data = content[16:]
        assert hashlib.blake2b(data, digest_size=16).digest() == content[:16], "damaged"
        return data

    def forget(self, stream: int) -> None:
        """See :class:`Place`."""
        drop(self._folder / str(stream))

    def bytes(self) -> int:
        """See :class:`Place`."""
        return sum(path.stat().st_size for path in self._folder.iterdir())

    def close(self) -> None:
        """See :class:`Place`."""
        os.close(self._handle)


def drop(path: Path) -> None:
    """Takes a file's clean pages out of the system's cache."""
    file = os.open(path, os.O_RDONLY)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(file)


@dataclass
class Case:
    """One place for states of one size, over all rounds."""

    name: str
    kind: str
    layout: Layout
    place: Place
    alone: list[float] = field(default_factory=list)
    """Saves a second, one by one."""
    together: list[float] = field(default_factory=list)
    cached: list[float] = field(default_factory=list)
    """Seconds of each read."""
    uncached: list[float] = field(default_factory=list)

    @property
    def group(self) -> int:
        """Streams of a commit."""
        return min(GROUP, WRITE_BYTES // self.layout.bytes)

    def fill(self, data: bytes) -> None:
        """Saves every stream once."""
        for first in range(0, STREAMS[self.kind], self.group):
            self.place.save(range(first, min(first + self.group, STREAMS[self.kind])), data)

    def run(self, states: Sequence[bytes], seconds: float, generator: np.random.Generator) -> None:
        """A round."""
        self.alone.append(self._rate(1, states, seconds))
        self.together.append(self._rate(self.group, states, seconds))
        for times, cold in ((self.cached, False), (self.uncached, True)):
            for stream in generator.integers(0, STREAMS[self.kind], READS).tolist():
                if cold:
                    self.place.forget(stream)
                started = time.perf_counter()
                self.place.load(stream)
                times.append(time.perf_counter() - started)

    def _rate(self, group: int, states: Sequence[bytes], seconds: float) -> float:
        started, count = time.perf_counter(), 0
        while (passed := time.perf_counter() - started) < seconds:
            streams = [(count + one) % STREAMS[self.kind] for one in range(group)]
            self.place.save(streams, states[count // group % len(states)])
            count += group
        return count / passed


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1.0, help="of one measurement of saves")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=None, help="on the disk to measure; a temporary one by default")
    options = parser.parse_args()
    generator = np.random.default_rng(0)
    source = state_bytes.source_of(example.network(), 32)
    layouts = {kind: Layout(serving.init(make_policy(kind, {}), source)) for kind in STREAMS}
    states = {kind: [generator.bytes(layout.bytes) for _ in range(8)] for kind, layout in layouts.items()}
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        cases = []
        for kind, layout in layouts.items():
            for page in PAGES:
                place = Sqlite(folder / f"{kind}-{page}", page, layout)
                cases.append(Case(f"SQLite, {page // 1024} KiB pages", kind, layout, place))
            cases.append(Case("a file a stream", kind, layout, Files(folder / kind)))
        for case in cases:
            case.fill(states[case.kind][0])
        for case in track(options.rounds * cases, "measuring", console=Console(stderr=True)):
            case.run(states[case.kind], options.seconds, generator)
        report(cases)
        for case in cases:
            case.place.close()


def report(cases: list[Case]) -> None:
    """Prints what was measured."""
    table = Table("state", "kept in")
    for column in (
        "saves/s one by one",
        "together",
        "read ms p50",
        "p99",
        "not cached p50",
        "p99",
        "on the disk / state",
    ):
        table.add_column(column, justify="right")
    for case in cases:
        size = case.layout.bytes
        reads = [
            f"{1e3 * float(np.percentile(times, percent)):.3g}"
            for times in (case.cached, case.uncached)
            for percent in (50, 99)
        ]
        table.add_row(
            f"{case.kind}, {size:,} B", case.name, f"{statistics.median(case.alone):,.0f}",
            f"{statistics.median(case.together):,.0f} (by {case.group})", *reads,
            f"{case.place.bytes() / (size * STREAMS[case.kind]):.2f}",
        )  # fmt: skip
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
