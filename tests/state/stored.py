"""What the tests of the store save: streams of any revision, with states of a few bytes."""

from __future__ import annotations

from typing import Any

from tta_server.settings import Durability
from tta_server.state.records import Field, Record, Save

FIELDS = (Field("memory/step", "I64", ()), Field("weights/norm.weight", "F32", (2, 3)))


def make_record(id: str = "a", version: int = 1, **others: Any) -> Record:
    """Of a stream of tenant ``t`` unless told otherwise."""
    values: dict[str, Any] = {
        "tenant": "t", "id": id, "model": "digits", "digest": "5e", "policy": "tent",
        "settings": {"lr": 0.001, "ostta": None, "skip": ["norm"]}, "durability": Durability(mode="sync"),
        "random_key": 2**64 - 1, "created": 1750000000.25, "last_seen": 1750003600.5, "adapt": True,
        "version": version, "requests": version + 3, "adapted": version, "failures": 1, "last_number": 2**63 - 1,
        "state_bytes": 32,
    }  # fmt: skip
    return Record(**values | others)


def make_save(key: int, expected: int | None, revision: int, id: str = "a", **others: Any) -> Save:
    """With a new state, whose bytes tell stream and revision apart, unless told otherwise."""
    values: dict[str, Any] = {
        "state_revision": revision,
        "record": make_record(id, revision - 1),
        "is_new": True,
        "fields": FIELDS,
        "data": f"{id} {revision} ".encode() * 4,
    }
    return Save(key=key, expected=expected, revision=revision, **values | others)
