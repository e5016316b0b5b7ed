"""Writes ``store-v1.sqlite``: a store of version 1 as its release left it, which later releases must read.

    python -m tests.state.data.make_store FOLDER

It must not be written anew over the one that is here: there are others like that one.
"""

from __future__ import annotations

import sqlite3
import sys
from pathlib import Path

from tta_server.settings import Durability
from tta_server.state.records import Field, Record, Save, Shutdown
from tta_server.state.sqlite import FILE, SqliteStore

FIELDS = (Field("memory/step", "I64", ()), Field("weights/norm.weight", "F32", (2,)))
SNAPSHOT_STEPS, SNAPSHOTS = 2, 2
LOST = 3
"""Of the first stream, in its last save."""


def record(id: str, version: int) -> Record:
    return Record(
        tenant="hospital", id=id, model="digits", digest="5e" * 32, policy="tent",
        settings={"lr": 0.001, "ostta": None, "skip": ["layer4"], "nesterov": True},
        durability=Durability(mode="sync", steps=4, seconds=0.5), random_key=2**64 - 1, created=1750000000.25,
        last_seen=1750003600.5, adapt=True, version=version, requests=version + 2, adapted=version, failures=1,
        last_number=2**53 + 1, state_bytes=16,
    )  # fmt: skip


def state(version: int) -> bytes:
    return version.to_bytes(8, "little") + bytes(range(version, version + 8))


def make(folder: Path) -> Path:
    """Stream ``camera-1`` of 8 steps with marks ``good`` and ``first`` at its third revision; ``camera-2``, which is in
    its initial state and marked ``start``."""
    store = SqliteStore(folder, SNAPSHOT_STEPS, SNAPSHOTS)
    store.acquire()
    for version in range(9):
        revision = version + 1
        marks = ("first", "good") if revision == 3 else ()
        save = Save(1, revision - 1 or None, revision, revision, record("camera-1", version), True, FIELDS,
                    state(version) if version else None, LOST if version == 8 else 0, marks)  # fmt: skip
        assert not store.write([save])
    assert not store.write([Save(2, None, 1, 1, record("camera-2", 0), True, marks=("start",))])
    store.close(Shutdown(clean=True, saved=2, unsaved=1))
    db = sqlite3.connect(folder / FILE, isolation_level=None)
    db.execute("UPDATE owner SET name = 'process 1 on example', since = 1750003600.0")
    db.execute("VACUUM")
    db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    db.close()
    return folder / FILE


if __name__ == "__main__":
    made = make(Path(sys.argv[1]))
    made.rename(made.with_name("store-v1.sqlite"))
