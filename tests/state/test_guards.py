"""A stream's guard is stored with the stream: after a new start it goes on from there, without its evidence."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from tests.serving import MODEL, TIMEOUT, Bench, Loaded, rows, serving, write_config, write_weights
from tta_server.app import load_models
from tta_server.drift.benefit import FIGURES, Judge
from tta_server.settings import Durability, load_settings
from tta_server.state.records import Record
from tta_server.state.sqlite import FILE
from tta_server.trust.guard import Evidence, Guard, State
from tta_server.types import Stream

pytestmark = pytest.mark.anyio

SMALL: dict[str, Any] = {
    "enabled": True, "shadow_rows": 8, "canary_rows": 16, "cooldown_rows": 32, "least_benefit": 0.1
}  # fmt: skip
BUDGET = {"kind": "budget", "eps": 0.0, "b0": 50.0}


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """The tiny network with weights for which the adapted model differs from the source, and a judge that likes it."""
    folder = tmp_path_factory.mktemp("tiny")
    config = write_config(folder)
    write_weights(folder, seed=31)
    settings = load_settings(config)
    models = load_models(settings)
    return settings, {MODEL: replace(models[MODEL], judge=Judge(np.zeros(len(FIGURES)), 0.5, 0.1))}


@asynccontextmanager
async def server(loaded: Loaded, folder: Path, **guard: Any) -> AsyncIterator[Bench]:
    """One run of a server over the store in ``folder``."""
    async with serving(loaded, state={"folder": str(folder)}, guard=SMALL | guard) as bench:
        yield bench


def guard_of(stream: Stream) -> Guard:
    assert stream.guard is not None
    return stream.guard


async def send(bench: Bench, count: int, first: int = 0) -> list[str]:
    """Requests of 8 rows; who served them."""
    served = []
    for seed in range(first, first + count):
        answer, _ = await bench.tenant.predict(None, rows(8, seed), stream="s")
        served.append(answer.served)
    await bench.settled()
    return served


@pytest.mark.parametrize("state", ["shadow", "canary", "active", "frozen", "quarantine"])
async def test_an_operators_choice_survives(loaded: Loaded, tmp_path: Path, state: str) -> None:
    async with server(loaded, tmp_path) as bench:
        bench.tenant.open("s")
        await bench.tenant.operate("s", State(state))
    async with server(loaded, tmp_path) as bench:
        guard = guard_of(bench.tenant.stream("s"))
        assert (guard.state, guard.pinned, guard.evidence) == (State(state), True, Evidence.UNKNOWN)
        served = await send(bench, 2)
        assert served == ["source" if state in ("shadow", "quarantine") else "adapted"] * 2
        assert guard.state is State(state)
        await bench.tenant.operate("s", None)
        assert not guard.pinned


async def test_an_active_stream_is_in_the_shadow_until_there_is_evidence(loaded: Loaded, tmp_path: Path) -> None:
    async with server(loaded, tmp_path) as bench:
        bench.tenant.open("s")
        await send(bench, 6)
        stream = bench.tenant.stream("s")
        assert (guard_of(stream).state, guard_of(stream).rows, stream.version) == (State.ACTIVE, 48, 6)
    async with server(loaded, tmp_path) as bench:
        stream = bench.tenant.stream("s")
        guard = guard_of(stream)
        assert (guard.state, guard.evidence, guard.rows, stream.version) == (State.SHADOW, Evidence.UNKNOWN, 48, 6)
        assert not guard.serves
        await send(bench, 6)
        assert guard.state is State.ACTIVE


async def test_settings_survive(loaded: Loaded, tmp_path: Path) -> None:
    """Those of the stream, not those of the config."""
    async with server(loaded, tmp_path) as bench:
        for id, guard in (("s", {"shadow_rows": 99, "guarantee": BUDGET}), ("off", {"enabled": False})):
            stream, _ = bench.tenant.open(id, guard=guard)
            await bench.tenant.settle(stream)
    async with server(loaded, tmp_path, shadow_rows=5) as bench:
        settings = guard_of(bench.tenant.stream("s")).settings
        assert (settings.shadow_rows, settings.guarantee.kind, settings.guarantee.b0) == (99, "budget", 50.0)
        assert bench.tenant.stream("off").guarded is None


async def test_changed_settings_survive(loaded: Loaded, tmp_path: Path) -> None:
    async with server(loaded, tmp_path) as bench:
        bench.tenant.open("s")
        await send(bench, 1)
        stream, _ = await bench.tenant.update("s", guard={"canary_rows": 77})
        await bench.tenant.settle(stream)
    async with server(loaded, tmp_path) as bench:
        assert guard_of(bench.tenant.stream("s")).settings.canary_rows == 77


@pytest.mark.parametrize("state", [State.CANARY, State.FROZEN])
async def test_a_budget_that_was_spent_stays_spent(loaded: Loaded, tmp_path: Path, state: State) -> None:
    """Across any number of starts, no more errors than promised."""
    spent = 0.0
    for run in range(3):
        async with server(loaded, tmp_path, guarantee=BUDGET) as bench:
            if not run:
                bench.tenant.open("s")
                await bench.tenant.operate("s", state)
            guarantee = guard_of(bench.tenant.stream("s")).guarantee
            assert guarantee is not None
            assert guarantee.worst == spent
            assert guarantee.rows == run * 48
            await send(bench, 6)
            assert guarantee.worst > spent or guarantee.worst == 50
            spent = guarantee.worst


@pytest.mark.parametrize("state", [State.CANARY, State.FROZEN])
async def test_what_is_spent_is_stored_as_steps_are(loaded: Loaded, tmp_path: Path, state: State) -> None:
    """A crash costs no more than the last request: ``sync``."""
    async with server(loaded, tmp_path, guarantee=BUDGET) as bench:
        stream, _ = bench.tenant.open("s", durability=Durability(mode="sync"))
        await bench.tenant.settle(stream)
        await bench.tenant.operate("s", state)
        await bench.tenant.settle(stream)
        await send(bench, 5)
        guarantee = guard_of(stream).guarantee
        assert guarantee is not None
        spent = guarantee.worst
        assert spent > 0
        await send(bench, 1, 5)
        assert await asyncio.to_thread(bench.device.keeper.flush, TIMEOUT)
        with sqlite3.connect(tmp_path / FILE) as db:
            ((text,),) = db.execute("SELECT record FROM streams").fetchall()
        db.close()
        assert orjson.loads(text)["guard"]["state"]["guarantee"]["spent"] >= spent


async def test_a_cool_down_survives(loaded: Loaded, tmp_path: Path) -> None:
    async with server(loaded, tmp_path) as bench:
        bench.tenant.open("s")
        await send(bench, 1)
        guard = guard_of(bench.tenant.stream("s"))
        guard._wait, guard._cooldown = 24, 64
        await send(bench, 1)
        assert guard._wait == 16
    async with server(loaded, tmp_path) as bench:
        dump = guard_of(bench.tenant.stream("s")).dump()
        assert (dump["wait"], dump["cooldown"]) == (16, 64)


async def test_a_stream_from_before_there_were_guards(loaded: Loaded, tmp_path: Path) -> None:
    """It begins in the shadow: its state is kept, and served once there is evidence."""
    async with server(loaded, tmp_path, enabled=False) as bench:
        bench.tenant.open("s")
        await send(bench, 3)
    with sqlite3.connect(tmp_path / FILE) as db:
        (text,) = db.execute("SELECT record FROM streams").fetchone()
        record = orjson.loads(text)
        del record["guard"]
        assert Record.parse(orjson.dumps(record)).guard is None
    db.close()
    async with server(loaded, tmp_path) as bench:
        stream = bench.tenant.stream("s")
        assert stream.version == 3
        assert stream.guarded is None, "as it was stored: not enabled"
        bench.tenant.guards.equip(stream, None)
        guard = guard_of(stream)
        assert (guard.state, guard.evidence, guard.settings.enabled) == (State.SHADOW, Evidence.UNKNOWN, True)
        assert await send(bench, 2) == ["adapted", "adapted"]


@pytest.mark.parametrize(
    "kept",
    [
        {},
        {"settings": {}},
        {"settings": {"shadow_rows": -1}, "state": {}},
        {"settings": {"from": "a later release"}, "state": {}},
        {"settings": {}, "state": {"state": "asleep"}},
        {"settings": {}, "state": None},
        {"settings": None, "state": {}},
        {"settings": {"guarantee": {"kind": "budget"}}, "state": {"guarantee": {"rows": "many"}}},
        {"settings": {"guarantee": {"kind": "budget"}}, "state": {"guarantee": []}},
    ],
    ids=str,
)
async def test_a_guard_that_cannot_be_read_is_a_new_one(
    loaded: Loaded, tmp_path: Path, kept: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """By the config, from the shadow; the stream is there all the same."""
    async with server(loaded, tmp_path) as bench:
        stream, _ = bench.tenant.open("s")
        await bench.tenant.settle(stream)
        whole = guard_of(stream).dump()
        if isinstance(kept.get("state"), dict):
            kept = kept | {"state": whole | kept["state"]} if kept["state"] else kept
        guard_of(stream).put(State.ACTIVE)
        with caplog.at_level(logging.ERROR):
            bench.tenant.guards.equip(stream, kept)
        assert "a stored guard cannot be read" in caplog.text
        guard = guard_of(stream)
        assert (guard.state, guard.pinned, guard.settings.shadow_rows) == (State.SHADOW, False, 8)
        assert guard.dump() == whole


async def test_a_stream_that_is_deleted_while_an_operator_acts_stays_deleted(loaded: Loaded, tmp_path: Path) -> None:
    """Neither what was asked before brings it back, nor does it keep a later one of its id from being stored."""
    async with server(loaded, tmp_path) as bench:
        for number in range(10):
            bench.tenant.open(f"s{number}")
            await bench.tenant.predict(MODEL, rows(8), stream=f"s{number}")
            asked = asyncio.create_task(bench.tenant.operate(f"s{number}", State.FROZEN))
            await asyncio.sleep(0)
            await bench.tenant.close(f"s{number}")
            await asyncio.gather(asked, return_exceptions=True)
        stream, _ = bench.tenant.open("s0", durability=Durability(mode="sync"))
        await bench.tenant.settle(stream)
        assert stream.saved.revision == stream.revision
    async with server(loaded, tmp_path) as bench:
        assert [stream.id for stream in bench.tenant.streams()] == ["s0"]


async def test_what_an_operator_chose_is_stored_at_once(loaded: Loaded, tmp_path: Path) -> None:
    """Not only after the steps that a stream may lose in a crash."""
    async with server(loaded, tmp_path) as bench:
        stream, _ = bench.tenant.open("s", durability=Durability(mode="async", steps=1000, seconds=3600))
        await send(bench, 2)
        await bench.tenant.operate("s", State.QUARANTINE)
        assert stream.saved.revision == stream.revision
