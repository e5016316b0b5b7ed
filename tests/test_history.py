"""Marks, rollback, fork, export and import of a service's streams, and what cannot be done."""

from __future__ import annotations

import asyncio
import random
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.tent import Tent
from tests.serving import MODEL, TIMEOUT, Bench, Loaded, load, rows, same_state, scores, serving, soon, start
from tta_server.errors import BadInput, Conflict, QueueFull, StepFailed, Unavailable, UnknownName
from tta_server.history import History
from tta_server.policies import policy_digest
from tta_server.settings import Durability
from tta_server.state.portable import Portable
from tta_server.state.sqlite import FILE, SqliteStore
from tta_server.types import Stream

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """The tiny model."""
    return load(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
async def bench(loaded: Loaded) -> AsyncIterator[Bench]:
    async with serving(loaded) as made:
        yield made


def history(bench: Bench) -> History:
    return bench.service.history(bench.tenant)


async def adapted(bench: Bench, id: str = "s", steps: int = 2, **wanted: Any) -> Stream:
    """A stream that has learnt something."""
    stream, _ = bench.tenant.open(id, **wanted)
    for seed in range(steps):
        await bench.tenant.predict(MODEL, rows(4, seed), stream=id)
    await bench.settled()
    return stream


async def future(bench: Bench, id: str = "s") -> list[torch.Tensor]:
    return [await scores(bench.tenant.predict(MODEL, rows(3, seed), stream=id)) for seed in (50, 51, 52)]


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def events(bench: Bench) -> list[tuple[str, str, dict[str, Any]]]:
    return [(one.kind, one.stream.id, one.fields) for one in bench.device.recorder.events]


# Marks and rollback


async def test_a_marked_state_is_the_one_that_comes_back(bench: Bench) -> None:
    stream = await adapted(bench)
    state, key = bench.state(stream), stream.random_key
    made = await soon(history(bench).mark("s", "a"))
    assert (made.version, made.marks, made.current, made.revision) == (2, ("a",), True, stream.state_revision)
    before = stream.revision
    await future(bench)
    await bench.settled()
    assert not same_state(bench.state(stream), state)
    assert await soon(history(bench).rollback("s", "a", None)) is stream
    await bench.settled()
    assert same_state(bench.state(stream), state)
    assert (stream.version, stream.random_key) == (2, key)
    assert stream.revision == before + 4, "three steps and the way back: revisions only grow"
    told = [one for one in events(bench) if one[0] in ("marked", "rolled_back")]
    assert told == [("marked", "s", {"mark": "a"}), ("rolled_back", "s", {"version": 2, "before": 5})]
    assert bench.service.monitor.readings(stream) == {}, "what was measured since is of another state"


async def test_a_reset_can_be_undone(bench: Bench) -> None:
    """The random key, too, comes back: a reset gives the one of a new stream."""
    stream = await adapted(bench)
    stream.random_key ^= 1  # as that of an imported stream may differ
    state, key = bench.state(stream), stream.random_key
    await soon(history(bench).mark("s", "a"))
    await bench.tenant.reset("s")
    assert (stream.version, stream.random_key) == (0, key ^ 1)
    await soon(history(bench).rollback("s", "a", None))
    assert (stream.version, stream.random_key) == (2, key)
    assert same_state(bench.state(stream), state)


async def test_only_marks_of_the_same_policy_and_weights(bench: Bench) -> None:
    stream = await adapted(bench)
    await soon(history(bench).mark("s", "a"))
    await bench.tenant.update("s", policy="norm", settings={"mode": "running"})
    await bench.tenant.predict(MODEL, rows(4), stream="s")
    await bench.settled()
    state, version = bench.state(stream), stream.version
    with pytest.raises(Conflict, match=r"is of policy 'tent' .* the stream has 'norm'"):
        await soon(history(bench).rollback("s", "a", None))
    assert same_state(bench.state(stream), state)
    assert stream.version == version


async def test_other_optimisers_of_a_policy_do_not_fit(bench: Bench) -> None:
    stream = await adapted(bench)
    await soon(history(bench).mark("s", "a"))
    await bench.tenant.update("s", settings={"optimiser": "sgd"})
    await bench.tenant.predict(MODEL, rows(4), stream="s")
    await bench.settled()
    state = bench.state(stream)
    with pytest.raises(Conflict, match="the state does not fit policy 'tent' on model 'tiny': it has"):
        await soon(history(bench).rollback("s", "a", None))
    assert same_state(bench.state(stream), state)
    assert stream.version == 1


async def test_a_mark_is_of_what_came_before_it(bench: Bench) -> None:
    await adapted(bench, steps=0)
    gate = await bench.hold()
    requests = [start(bench.tenant.predict(MODEL, rows(4), stream="s")) for _ in range(2)]
    await bench.waiting(2)
    marking = start(history(bench).mark("s", "a"))
    await bench.waiting(3)
    later = start(bench.tenant.predict(MODEL, rows(4), stream="s"))
    await bench.waiting(4)
    gate.open()
    assert (await soon(asyncio.wait_for(marking, TIMEOUT))).version == 2
    assert [(await one)[0].version for one in (*requests, later)] == [0, 1, 2]


async def test_names(loaded: Loaded) -> None:
    async with serving(loaded, limits={"marks": 2}) as bench:
        await adapted(bench)
        past = history(bench)
        for name in ("", "a b", "x" * 129, "ä", "a/b"):
            with pytest.raises(BadInput, match="a snapshot's name has 1 to 128 of"):
                await past.mark("s", name)
        for name in ("a", "x" * 128):
            await soon(past.mark("s", name))
        with pytest.raises(Conflict, match="has a snapshot 'a' already"):
            await past.mark("s", "a")
        with pytest.raises(QueueFull, match=r"limits\.marks = 2"):
            await past.mark("s", "c")
        with pytest.raises(UnknownName, match="no snapshot 'c'"):
            await past.unmark("s", "c")
        await soon(past.unmark("s", "a"))
        await soon(past.mark("s", "c"))
        with pytest.raises(UnknownName, match="no stream 't'"):
            await past.mark("t", "a")


async def test_a_stream_that_is_not_stored_can_be_marked(loaded: Loaded, tmp_path: Path) -> None:
    async with serving(loaded, state={"folder": str(tmp_path), "durability": {"mode": "none"}}) as bench:
        stream = await adapted(bench)
        state = bench.state(stream)
        await soon(history(bench).mark("s", "a"))
        await future(bench)
        await soon(history(bench).rollback("s", "a", None))
        assert same_state(bench.state(stream), state)


async def test_a_mark_that_is_damaged(loaded: Loaded, tmp_path: Path) -> None:
    """It is refused, and the stream stays as it is; an older one serves."""
    async with serving(loaded, state={"folder": str(tmp_path)}) as bench:
        stream = await adapted(bench)
        await soon(history(bench).mark("s", "good"))
        await bench.tenant.predict(MODEL, rows(4), stream="s")
        await soon(history(bench).mark("s", "bad"))
        with sqlite3.connect(tmp_path / FILE) as db:
            db.execute("UPDATE states SET data = zeroblob(length(data)) WHERE version = 3")
        db.close()
        await bench.tenant.predict(MODEL, rows(4), stream="s")
        await bench.settled()
        state = bench.state(stream)
        with pytest.raises(Conflict, match="cannot be used: its checksum is wrong"):
            await soon(history(bench).rollback("s", "bad", None))
        assert (stream.version, same_state(bench.state(stream), state)) == (4, True)
        await soon(history(bench).rollback("s", "good", None))
        assert stream.version == 2


async def test_a_stream_whose_state_is_on_the_disk(loaded: Loaded, tmp_path: Path) -> None:
    """Everything works from there, and nothing is fetched that need not be."""
    sections: dict[str, Any] = {"state": {"folder": str(tmp_path), "durability": {"mode": "sync"}}}
    async with serving(loaded, **sections) as bench:
        await adapted(bench)
        expected = await future(bench)
        await bench.settled()
    async with serving(loaded, **sections) as bench:
        past, stream = history(bench), bench.tenant.stream("s")
        assert (stream.version, bench.tenant.tier(stream)) == (5, "disk")
        await soon(past.mark("s", "a"))
        assert bench.tenant.tier(stream) == "disk"
        file = await soon(past.export("s"))
        assert Portable.parse(file).manifest.version == 5
        await soon(past.fork("s", "t"))
        one, other = await future(bench, "s"), await future(bench, "t")
        assert equal(one, other)
        assert not equal(one, expected)


# Fork and import


async def test_a_fork_draws_what_the_original_draws(bench: Bench) -> None:
    stream = await adapted(bench)
    fork = await soon(history(bench).fork("s", "t"))
    assert (fork.random_key, fork.version, fork.policy, fork.tenant) == (stream.random_key, 2, stream.policy, "default")
    assert same_state(bench.state(fork), bench.state(stream))
    assert equal(await future(bench, "s"), await future(bench, "t"))
    assert ("imported", "t", {"version": 2, "of": "s"}) in events(bench)


async def test_a_fork_that_finds_its_id_taken_meanwhile(bench: Bench) -> None:
    await adapted(bench)
    gate = await bench.hold()
    forking = start(history(bench).fork("s", "t"))
    await bench.waiting(1)
    other, _ = bench.tenant.open("t", policy="norm")
    gate.open()
    with pytest.raises(Conflict, match="there is a stream 't' already"):
        await soon(asyncio.wait_for(forking, TIMEOUT))
    assert bench.tenant.stream("t") is other


async def test_requests_may_follow_a_fork_at_once(bench: Bench) -> None:
    """They find the state that is on its way."""
    await adapted(bench)
    file = Portable.parse(await soon(history(bench).export("s")))
    gate = await bench.hold()
    restoring = start(history(bench).restore("t", file))
    await bench.waiting(1)
    request = start(bench.tenant.predict(MODEL, rows(3, 50), stream="t"))
    await bench.waiting(2)
    gate.open()
    answer, _ = await request
    assert (await soon(asyncio.wait_for(restoring, TIMEOUT)))[1] is True
    assert answer.version == 2
    assert torch.equal(answer.logits, (await future(bench, "s"))[0])


async def test_quotas_hold_for_copies(loaded: Loaded) -> None:
    async with serving(loaded, limits={"streams": 2}) as bench:
        stream, past = await adapted(bench), history(bench)
        file = Portable.parse(await soon(past.export("s")))
        await soon(past.fork("s", "t"))
        size = stream.state_bytes
        for call in (past.fork("s", "u"), past.restore("u", file)):
            with pytest.raises(QueueFull, match=r"limits\.streams = 2"):
                await soon(call)
        await soon(past.restore("t", file))
    async with serving(loaded, auth={"tenants": {"default": {"state_bytes": 2 * size - 1}}}) as bench:
        await adapted(bench)
        past = history(bench)
        for call in (past.fork("s", "u"), past.restore("u", file)):
            with pytest.raises(QueueFull, match=rf"auth\.tenants\.default\.state_bytes = {2 * size - 1}"):
                await soon(call)
        await soon(past.restore("s", file))
        assert [one.id for one in bench.streams()] == ["s"]


async def test_a_file_goes_back_and_forth(bench: Bench) -> None:
    stream, past = await adapted(bench), history(bench)
    file = Portable.parse(await soon(past.export("s")))
    manifest = file.manifest
    assert (manifest.stream, manifest.model, manifest.model_digest) == ("s", MODEL, stream.digest)
    assert (manifest.version, manifest.random_key, manifest.request_number) == (2, stream.random_key, None)
    assert manifest.policy_digest == policy_digest(stream.policy)
    expected = await future(bench)
    assert await soon(past.restore("s", file)) == (stream, False)
    assert equal(await future(bench), expected)
    made, is_new = await soon(past.restore("t", file))
    assert (made.id, made.policy, is_new) == ("t", stream.policy, True)
    assert equal(await future(bench, "t"), expected)
    assert ("imported", "t", {"version": 2, "of": "s"}) in events(bench)


async def test_an_exported_stream_is_left_as_it_was(bench: Bench) -> None:
    stream = await adapted(bench)
    state, revision = bench.state(stream), stream.revision
    await soon(history(bench).export("s"))
    await soon(history(bench).snapshots("s"))
    assert (stream.version, stream.revision, same_state(bench.state(stream), state)) == (2, revision, True)


async def test_what_does_not_fit_leaves_no_trace(bench: Bench) -> None:
    stream, past = await adapted(bench), history(bench)
    file = Portable.parse(await soon(past.export("s")))
    state, revision = bench.state(stream), stream.revision
    other = replace(file.manifest, model_digest="0" * 64)
    unlike = replace(file.manifest, settings={**file.manifest.settings, "lr": 0.75})
    unlike = replace(unlike, policy_digest=policy_digest(replace(Tent(), **unlike.settings)))
    shorter = replace(file, fields=file.fields[1:], data=file.data[-4 * 6 :])
    for wrong, said in (
        (replace(file, manifest=other), "0{64}"),
        (replace(file, manifest=unlike), unlike.policy_digest),
        (shorter, "the state does not fit policy 'tent'"),
    ):
        with pytest.raises(Conflict, match=said):
            await soon(past.restore("s", wrong))
        assert (stream.version, stream.revision, same_state(bench.state(stream), state)) == (2, revision, True)
    for wrong, said in ((replace(file, manifest=other), "0{64}"), (shorter, "the state does not fit")):
        with pytest.raises(Conflict, match=said):
            await soon(past.restore("t", wrong))
        assert not bench.tenant.is_open("t")
    await soon(past.restore("t", replace(file, manifest=unlike)))
    assert bench.tenant.stream("t").policy == Tent(**unlike.settings)


async def test_a_stream_of_other_weights_cannot_be_copied(bench: Bench) -> None:
    """Its state can wait, be marked and deleted; to copy it or to go back, the model must be there."""
    stream, past = await adapted(bench), history(bench)
    await soon(past.mark("s", "a"))
    digest = stream.digest
    stream.digest = "0" * 64
    for call in (past.export("s"), past.fork("s", "t"), past.rollback("s", "a", None)):
        with pytest.raises(Conflict, match=r"adapted model 'tiny' with digest 0{64}"):
            await soon(call)
    stream.digest = digest
    await bench.service.models.unload(MODEL)
    for call in (past.export("s"), past.fork("s", "t"), past.rollback("s", "a", None)):
        with pytest.raises(Unavailable):
            await soon(call)
    await soon(past.mark("s", "b"))
    await bench.service.models.load(MODEL)
    assert (await soon(past.rollback("s", "b", None))).version == 2


async def test_nothing_of_this_while_it_drains(loaded: Loaded) -> None:
    async with serving(loaded) as bench:
        await adapted(bench)
        past = history(bench)
        file = Portable.parse(await soon(past.export("s")))
        await bench.service.drain()
        calls = (past.mark("s", "a"), past.fork("s", "t"), past.export("s"), past.restore("s", file))
        for call in (*calls, past.restore("t", file)):
            with pytest.raises(Unavailable):
                await soon(call)
        assert [one.id for one in bench.streams()] == ["s"]


async def test_no_fault_of_the_device_is_a_refusal(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that nobody foresaw comes back as one, and the stream stays."""
    await adapted(bench)

    def broken(*arguments: Any) -> Any:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(bench.device.store, "dump", broken)
    with pytest.raises(StepFailed, match="out of luck"):
        await soon(history(bench).fork("s", "t"))
    assert not bench.tenant.is_open("t")


# Everything at once


@pytest.mark.parametrize("seed", range(3))
async def test_whatever_happens_at_once_memory_and_store_agree(loaded: Loaded, tmp_path: Path, seed: int) -> None:
    """Random calls, twelve at a time, on few streams over tiny tiers. None fails but by an error that says why, and
    what is stored in the end is what was in memory, bit for bit."""
    chance, files, ids = random.Random(seed), list[bytes](), [f"s{index}" for index in range(6)]
    store = {"folder": str(tmp_path / "store")}
    async with serving(loaded, limits={"slots": 3, "host_bytes": 1}, state=store) as bench:
        tenant, past = bench.tenant, history(bench)

        async def export(id: str) -> None:
            files.append(await past.export(id))

        async def change(id: str, **wanted: Any) -> None:
            stream, _ = await tenant.update(id, **wanted)
            await tenant.settle(stream)

        async def one() -> None:
            id, other, mark = chance.choice(ids), chance.choice(ids), chance.choice("abc")
            mode, steps = chance.choice(["none", "async", "sync"]), chance.choice([1, 4])
            durability = Durability.model_validate(
                {"mode": mode, "steps": steps, "seconds": chance.choice([0.02, 5.0])}
            )
            x, adapt = rows(chance.randrange(1, 4), chance.randrange(99)), chance.choice([None, None, None, False])
            calls: list[tuple[int, Callable[[], Awaitable[object]]]] = [
                (50, lambda: tenant.predict(MODEL, x, stream=id, adapt=adapt)),
                (6, lambda: past.mark(id, mark)),
                (2, lambda: past.unmark(id, mark)),
                (8, lambda: past.rollback(id, mark, None)),
                (4, lambda: past.fork(id, other)),
                (5, lambda: export(id)),
                (4, lambda: past.restore(id, Portable.parse(chance.choice(files or [b""])))),
                (7, lambda: change(id, settings={"lr": chance.choice([0.01, 0.02, 0.03])})),
                (2, lambda: change(id, policy=chance.choice(["tent", "norm"]))),
                (4, lambda: change(id, durability=durability)),
                (3, lambda: tenant.reset(id)),
                (5, lambda: tenant.close(id)),
            ]
            if not tenant.is_open(id):
                stream, _ = tenant.open(id, policy=chance.choice(["tent", "norm"]), durability=durability)
                await tenant.settle(stream)
                return
            (call,) = chance.choices([call for _, call in calls], [weight for weight, _ in calls])
            # Whoever comes too late, or asks for what is not there, is told so.
            with suppress(BadInput, Conflict, QueueFull, UnknownName):
                await call()

        for _ in range(40):
            async with asyncio.timeout(TIMEOUT):
                await asyncio.gather(*(one() for _ in range(12)))
            await bench.settled()
            bench.device.store.check_integrity()
        expected = {
            stream.id: (stream.version, stream.revision, bench.device.store.dump(stream.lane, stream)[1])
            for stream in tenant.streams()
            if stream.durability.mode != "none" and stream.version
        }
        assert bench.device.keeper.tally.refused == bench.device.keeper.tally.damaged == 0
    stored = SqliteStore(tmp_path / "store")
    found = {
        one.record.id: (one.record.version, one.revision, stored.load(one.key, one.state_revision).data)
        for one in stored.index().streams
        if one.record.durability.mode != "none" and one.record.version
    }
    assert stored.verify() == []
    stored.close()
    assert found == expected


async def test_a_copy_is_of_the_policy_at_its_turn(bench: Bench) -> None:
    """A change of settings that comes later queues behind it, though the stream has it at once."""
    stream = await adapted(bench, settings={"lr": 0.02})
    before, data = stream.lane, bench.device.store.dump(stream.lane, stream)[1]
    gate = await bench.hold()
    exporting = start(history(bench).export("s"))
    await bench.waiting(1)
    changing = start(bench.tenant.update("s", settings={"lr": 0.5}))
    await bench.waiting(2)
    gate.open()
    file = Portable.parse(await exporting)
    assert (await changing)[1] is True
    assert (file.data, file.manifest.version, file.manifest.settings["lr"]) == (data, 2, 0.02)
    assert file.manifest.policy_digest == policy_digest(before.policy)


async def test_a_stream_that_is_deleted_meanwhile_stays_deleted(loaded: Loaded, tmp_path: Path) -> None:
    """In memory and in the store, and its id is free for another that is stored."""
    async with serving(loaded, state={"folder": str(tmp_path / "store")}) as bench:
        sync = Durability(mode="sync")
        old = await adapted(bench, durability=sync)
        await bench.tenant.close("s")
        with pytest.raises(UnknownName, match="deleted meanwhile"):
            await bench.tenant.store(old, ("mark",))
        await bench.tenant.settle(old)
        new = await adapted(bench, durability=sync)
        await bench.tenant.settle(new)
        assert (new.unsaved, bench.device.keeper.tally.refused) == (0, 0)
