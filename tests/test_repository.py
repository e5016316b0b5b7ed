"""Models that come, go and are replaced while requests wait and run."""

from __future__ import annotations

import asyncio
import gc
import os
import weakref
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.base import Scope
from adapters.eata import Eata
from adapters.rmt import Rmt, as_artefact
from adapters.tent import Tent
from tests.serving import (
    CPU,
    LR,
    MODEL,
    TIMEOUT,
    Bench,
    Gate,
    Loaded,
    load,
    loader,
    lost_exceptions,
    rows,
    same_state,
    scores,
    serving,
    soon,
    start,
    write_config,
    write_weights,
)
from tta_server.engine.artefacts import Artefacts
from tta_server.engine.source import SourceModel, load_model
from tta_server.errors import ConfigError, Conflict, DeadlineExceeded, Unavailable, UnknownName
from tta_server.repository import Entry, Load
from tta_server.settings import load_settings

pytestmark = pytest.mark.anyio

OTHER = "other"


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def tried(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """The tiny model, with all policies tried on it."""
    return load(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the files of the models are."""
    return tmp_path


@pytest.fixture
def loaded(folder: Path, tried: Loaded) -> Loaded:
    """Two of it, with files of their own that a test may replace."""
    settings = load_settings(write_config(folder, MODEL, OTHER))
    reports = tried[1][MODEL].reports
    return settings, {name: replace(load_model(name, settings, CPU), reports=reports) for name in (MODEL, OTHER)}


@pytest.fixture
async def bench(loaded: Loaded) -> AsyncIterator[Bench]:
    async with serving(loaded) as made:
        yield made


def gated(gate: Gate, load: Load) -> Load:
    """Stops a load before it reads its files."""

    def held(name: str) -> SourceModel:
        gate.pass_through()
        return load(name)

    return held


async def until(true: Callable[[], bool]) -> None:
    """Returns when it is, however many turns of the loop that takes."""
    async with asyncio.timeout(TIMEOUT):
        while not true():
            await asyncio.sleep(0)


def ready(bench: Bench, name: str = MODEL) -> bool:
    return {one.name: one.ready for one in bench.service.models.index()}[name]


# Names


async def test_models_by_name(bench: Bench) -> None:
    models = bench.service.models
    assert models.index() == [Entry(MODEL, True, ""), Entry(OTHER, True, "")]
    assert list(models.loaded()) == [MODEL, OTHER]
    assert models.get(OTHER) is models.loaded()[OTHER]
    with pytest.raises(UnknownName, match=r"name a model; there are: other, tiny"):
        models.get(None)
    for work in (models.load("huge"), models.unload("huge")):
        with pytest.raises(UnknownName, match=r"no model 'huge'; there are: other, tiny"):
            await work


async def test_the_only_model_needs_no_name(tried: Loaded) -> None:
    async with serving(tried) as bench:
        assert bench.service.models.get(None).name == MODEL
        await bench.service.models.unload(MODEL)
        with pytest.raises(Unavailable):
            bench.service.models.get(None)


# Unloading


async def test_an_unloaded_model_takes_no_requests_and_says_how_to_get_it_back(bench: Bench) -> None:
    stream, _ = bench.tenant.open("s", MODEL)
    bench.tenant.open("o", OTHER)
    await bench.service.models.unload(MODEL)
    said = r"model 'tiny' is not ready: it was unloaded; POST /v2/repository/models/tiny/load brings it back"
    for work in (
        bench.tenant.predict(None, rows(1), stream="s"),
        bench.tenant.predict(MODEL, rows(1)),
        bench.tenant.update("s", settings={"lr": 0.5}),
    ):
        with pytest.raises(Unavailable, match=said):
            await work
    with pytest.raises(Unavailable, match=said):
        bench.tenant.open("t", MODEL)
    assert [(one.name, one.ready, one.reason[:15]) for one in bench.service.models.index()] == [
        (MODEL, False, "it was unloaded"), (OTHER, True, ""),
    ]  # fmt: skip
    assert list(bench.device.engine.models) == list(bench.service.models.loaded()) == [OTHER]
    assert bench.tenant.open("s") == (stream, False), "its streams stay"
    assert await bench.tenant.update("s", adapt=False) == (stream, True), "a switch needs no model"
    assert (await bench.tenant.predict(OTHER, rows(1), stream="o"))[0].adapted
    await soon(bench.service.models.unload(MODEL))  # once more: nothing to do


async def test_streams_go_on_after_their_model_is_back(bench: Bench) -> None:
    """Bit for bit, as if it had never been away."""
    tenant, models = bench.tenant, bench.service.models
    streams = [tenant.open("s", MODEL)[0], tenant.open("twin", OTHER)[0]]
    for seed in range(2):
        for stream in streams:
            await tenant.predict(None, rows(4, seed), stream=stream.id)
    await bench.settled()
    before = bench.state(streams[0])
    await models.unload(MODEL)
    await models.load(MODEL)
    assert ready(bench)
    assert same_state(bench.state(streams[0]), before)
    answers = [(await tenant.predict(None, rows(4, 2), stream=stream.id))[0] for stream in streams]
    assert [answer.version for answer in answers] == [2, 2]
    assert torch.equal(answers[0].logits, answers[1].logits)


async def test_a_stream_closed_or_reset_while_its_model_is_away(bench: Bench) -> None:
    tenant, models = bench.tenant, bench.service.models
    for id in ("reset", "closed"):
        tenant.open(id, MODEL)
        await tenant.predict(None, rows(4), stream=id)
    await models.unload(MODEL)
    await tenant.close("closed")
    stream = await tenant.reset("reset")
    assert (stream.version, bench.device.store.counts()["device"][0]) == (0, 0)
    await models.load(MODEL)
    fresh, _ = tenant.open("fresh", MODEL)
    own, other = [await scores(tenant.predict(None, rows(4), stream=one.id)) for one in (stream, fresh)]
    assert torch.equal(own, other)


async def test_requests_under_way_finish_first_and_new_ones_are_refused_meanwhile(bench: Bench) -> None:
    tenant, models = bench.tenant, bench.service.models
    stream, _ = tenant.open("s", MODEL)
    gate = await bench.hold()
    under_way = [start(tenant.predict(None, rows(4), stream="s")), start(tenant.predict(MODEL, rows(4)))]
    await bench.waiting(2)
    changing = start(tenant.update("s", settings={"lr": 0.5}))
    await bench.waiting(3)
    unloading = start(models.unload(MODEL))
    await until(lambda: not ready(bench))
    with pytest.raises(Unavailable):
        await tenant.predict(None, rows(4), stream="s")
    assert (await asyncio.wait({unloading}, timeout=0))[1], "it waits"
    assert MODEL in bench.device.engine.models
    gate.open()
    assert [(await one)[0].version for one in under_way] == [0, 0]
    assert await changing == (stream, True)
    await soon(asyncio.wait_for(unloading, None))
    await bench.settled()
    assert sorted(bench.device.recorder.results()) == ["applied", "none"], "the step behind the answer, too"
    assert MODEL not in bench.device.engine.models


async def test_a_request_that_is_given_up_or_late_is_not_waited_for(bench: Bench) -> None:
    tenant = bench.tenant
    gate = await bench.hold()
    leaving = start(tenant.predict(MODEL, rows(4)))
    late = start(tenant.predict(MODEL, rows(4), timeout=0.05))
    await asyncio.sleep(0)  # both are queued
    unloading = start(bench.service.models.unload(MODEL))
    await until(lambda: not ready(bench))
    leaving.cancel()
    with pytest.raises(DeadlineExceeded):
        await late
    await bench.waiting(1)  # the change itself: nobody is waited for any more
    gate.open()
    await unloading
    assert MODEL not in bench.device.engine.models


async def test_an_unloaded_model_leaves_the_memory(loaded: Loaded) -> None:
    _, models = loaded

    def reload(name: str) -> SourceModel:
        raise AssertionError("nobody asked for it")

    async with serving(loaded, load=reload) as bench:
        network = weakref.ref(models[MODEL].network)
        models.clear()
        bench.tenant.open("s", MODEL)
        await bench.tenant.predict(None, rows(4), stream="s")
        await bench.tenant.predict(MODEL, rows(4))
        await bench.service.models.unload(MODEL)
        await bench.settled()
        gc.collect()
        assert network() is None


# Loading


async def test_a_model_is_served_while_its_successor_is_read(loaded: Loaded, folder: Path) -> None:
    gate = Gate()
    async with serving(loaded, load=gated(gate, loader(loaded))) as bench:
        write_weights(folder, seed=8)
        old = await scores(bench.tenant.predict(MODEL, rows(4)))
        loading = start(bench.service.models.load(MODEL))
        await gate.reached_soon()
        assert ready(bench)
        assert torch.equal(await scores(bench.tenant.predict(MODEL, rows(4))), old)
        gate.open()
        await loading
        assert not torch.equal(await scores(bench.tenant.predict(MODEL, rows(4))), old)


async def test_a_stream_of_other_weights_is_refused_until_it_is_reset(bench: Bench, folder: Path) -> None:
    tenant, models = bench.tenant, bench.service.models
    stream, _ = tenant.open("s", MODEL, settings={"lr": 0.5})
    await tenant.predict(None, rows(4), stream="s", number=1)
    await bench.settled()
    old, digest, before = stream.lane, stream.digest, bench.state(stream)
    write_weights(folder, seed=8)
    await models.load(MODEL)
    new = models.get(MODEL).digest
    assert new != digest
    said = rf"'s' adapted model 'tiny' with digest {digest}, but the one that is loaded has {new}; .*reset the stream"
    for work in (
        tenant.predict(None, rows(4), stream="s"),
        tenant.predict(None, rows(4), stream="s", adapt=False),
        tenant.update("s", settings={"lr": 0.1}),
    ):
        with pytest.raises(Conflict, match=said):
            await work
    with pytest.raises(Conflict, match=said):
        tenant.open("s", settings={"lr": 0.5})
    assert tenant.open("s") == (stream, False)
    assert same_state(bench.state(stream), before)
    assert bench.device.store.tier(old, stream) == "device"
    assert await tenant.reset("s") is stream
    assert (stream.digest, stream.policy, tenant.signals(stream)) == (new, Tent(lr=0.5), {})
    assert not bench.device.store.has_lane(old)
    assert stream.last_number == 1
    tenant.open("fresh", MODEL, settings={"lr": 0.5})
    for seed in range(2):
        own, other = [await scores(tenant.predict(None, rows(4, seed), stream=id)) for id in ("s", "fresh")]
        assert torch.equal(own, other)


async def test_a_stream_that_follows_its_model_starts_counting_its_steps_again(bench: Bench, folder: Path) -> None:
    """As after any reset: the number of its next answer, and its random draws, are those of a new stream."""
    stream, _ = bench.tenant.open("s", MODEL)
    await bench.tenant.predict(None, rows(4), stream="s")
    write_weights(folder, seed=8)
    await bench.service.models.load(MODEL)
    await bench.tenant.reset("s")
    assert stream.version == 0
    assert (await bench.tenant.predict(None, rows(4), stream="s"))[0].version == 0


async def test_a_stream_goes_on_when_its_weights_come_back(bench: Bench, folder: Path) -> None:
    """Streams of both weights are kept apart, although all of their lanes have one name and policy."""
    tenant, models = bench.tenant, bench.service.models
    old, _ = tenant.open("old", MODEL)
    await tenant.predict(None, rows(4), stream="old")
    await bench.settled()
    before = bench.state(old)
    write_weights(folder, seed=8)
    await models.load(MODEL)
    new, _ = tenant.open("new", MODEL)
    first = await scores(tenant.predict(None, rows(4), stream="new"))
    write_weights(folder)
    await models.load(MODEL)
    assert same_state(bench.state(old), before)
    assert (await tenant.predict(None, rows(4), stream="old"))[0].version == 1
    with pytest.raises(Conflict, match=f"with digest {new.digest}"):
        await tenant.predict(None, rows(4), stream="new")
    assert not torch.equal(await scores(tenant.predict(MODEL, rows(4))), first)


@pytest.mark.parametrize("unloaded", [False, True])
@pytest.mark.parametrize(
    ("content", "said"),
    [(b"no weights", "not a readable safetensors file"), (None, "no file 'tiny.safetensors'")],
    ids=["broken", "missing"],
)
async def test_a_load_that_fails_changes_nothing(
    bench: Bench, folder: Path, content: bytes | None, said: str, unloaded: bool
) -> None:
    models = bench.service.models
    bench.tenant.open("s", MODEL)
    first = await scores(bench.tenant.predict(None, rows(4), stream="s"))
    if unloaded:
        await models.unload(MODEL)
    before = (models.index(), models.loaded(), dict(bench.device.engine.models))
    (folder / "tiny.safetensors").unlink()
    if content is not None:
        (folder / "tiny.safetensors").write_bytes(content)
    with pytest.raises(Conflict, match=rf"model 'tiny' was not loaded, all is as it was: model 'tiny'.*{said}"):
        await models.load(MODEL)
    assert (models.index(), models.loaded(), dict(bench.device.engine.models)) == before
    if not unloaded:
        assert not torch.equal(await scores(bench.tenant.predict(None, rows(4), stream="s")), first)
    write_weights(folder)
    await models.load(MODEL)
    assert (await bench.tenant.predict(None, rows(4), stream="s"))[0].version == (1 if unloaded else 2)


async def test_changes_come_one_after_the_other(loaded: Loaded) -> None:
    """Also of several models: only one successor at a time is in memory beside what is served."""
    gate, order = Gate(), list[str]()
    real = loader(loaded)

    def held(name: str) -> SourceModel:
        order.append(name)
        gate.pass_through()
        return real(name)

    async with serving(loaded, load=held) as bench:
        models = bench.service.models
        tasks = [start(models.load(MODEL)), start(models.load(OTHER)), start(models.unload(MODEL))]
        await gate.reached_soon()
        assert order == [MODEL]
        gate.open()
        await asyncio.gather(*tasks)
        assert order == [MODEL, OTHER]
        assert list(models.loaded()) == [OTHER]
        await models.load(MODEL)
        assert ready(bench)


# Those who ask and do not wait


@pytest.mark.parametrize("kind", ["load", "unload"])
async def test_a_change_that_is_queued_is_made_although_its_client_left(bench: Bench, folder: Path, kind: str) -> None:
    """The device thread and the event loop agree on what is there."""
    models = bench.service.models
    before = models.get(MODEL)
    write_weights(folder, seed=8)
    gate = await bench.hold()
    change = start(models.load(MODEL) if kind == "load" else models.unload(MODEL))
    await bench.waiting(1)
    change.cancel()
    with pytest.raises(asyncio.CancelledError):
        await change
    gate.open()
    await until(lambda: models.loaded().get(MODEL) is not before)
    assert ready(bench) == (kind == "load")
    assert bench.device.engine.models == models.loaded()
    await models.load(MODEL)
    assert (await bench.tenant.predict(MODEL, rows(4)))[0].logits.isfinite().all()


async def test_a_failure_nobody_waits_for_is_not_reported_as_lost(loaded: Loaded) -> None:
    gate = Gate()

    def broken(name: str) -> SourceModel:
        raise ConfigError("no such file")

    async with serving(loaded, load=gated(gate, broken)) as bench:
        lost = lost_exceptions()
        loading = start(bench.service.models.load(MODEL))
        await gate.reached_soon()
        loading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await loading
        gate.open()
        await bench.service.models.unload(MODEL)  # its turn comes after
        del loading
        gc.collect()
        assert lost == []


@pytest.mark.parametrize("unloaded", [False, True])
async def test_a_drain_ends_changes_with_everything_as_it_was(loaded: Loaded, unloaded: bool) -> None:
    gate = Gate()
    async with serving(loaded, load=gated(gate, loader(loaded))) as bench:
        models = bench.service.models
        if unloaded:
            await models.unload(MODEL)
        before = (models.index(), models.loaded())
        loading = start(models.load(MODEL))
        await gate.reached_soon()
        await bench.service.drain()
        gate.open()
        with pytest.raises(Unavailable, match="shutting down"):
            await loading
        assert (models.index(), models.loaded()) == before
        assert bench.device.engine.models == before[1]


# Artefacts


def put_artefacts(folder: Path, model: SourceModel, **groups: dict[str, torch.Tensor]) -> None:
    """Writes an artefact file of the model."""
    made = Artefacts(model.digest)
    for name, tensors in groups.items():
        made.put(name, tensors, {})
    made.save(folder / "made")
    os.replace(folder / "made", folder / f"{model.name}.artefacts.safetensors")


async def test_artefacts_made_meanwhile_come_with_a_load(bench: Bench, folder: Path) -> None:
    tenant, models = bench.tenant, bench.service.models
    model = models.get(MODEL)
    with pytest.raises(Conflict, match=r"eata needs fisher of the source.*tta-server prepare"):
        tenant.open("s", MODEL, policy="eata", settings={"lr": LR})
    put_artefacts(
        folder, model, fisher={key: torch.ones_like(model.source.weights[key]) for key in model.source.affine}
    )
    await models.load(MODEL)
    stream, _ = tenant.open("s", MODEL, policy="eata", settings={"lr": LR})
    assert isinstance(stream.policy, Eata)
    assert (await tenant.predict(None, rows(4), stream="s"))[0].policy == "eata"
    (folder / f"{MODEL}.artefacts.safetensors").unlink()
    await models.load(MODEL)
    await tenant.predict(None, rows(4), stream="s")
    with pytest.raises(Conflict, match="eata needs fisher"):
        await tenant.update("s", settings={"lr": 0.5})


async def test_artefacts_of_another_model_are_refused(bench: Bench, folder: Path) -> None:
    write_weights(folder, seed=8)
    put_artefacts(folder, bench.service.models.get(MODEL), fisher={"x": torch.ones(1)})
    with pytest.raises(Conflict, match=r"the artefacts in .* belong to another model"):
        await bench.service.models.load(MODEL)
    assert ready(bench)


async def test_new_streams_start_from_the_artefacts_that_are_loaded(bench: Bench, folder: Path) -> None:
    """Also where the weights are the same, and a stream that started from the former artefacts is still there."""
    tenant, models = bench.tenant, bench.service.models
    settings: dict[str, Any] = {"scope": "norm", "lambda_contrast": 0, "lambda_source": 0}
    policy = Rmt(scope=Scope.NORM, lambda_contrast=0, lambda_source=0)
    model = models.get(MODEL)
    warm = as_artefact(policy.cold_start(model.source))
    first: list[torch.Tensor] = []
    for turn in range(2):
        moved = {key: value + turn * 0.5 if key.startswith("weights.") else value for key, value in warm.items()}
        put_artefacts(folder, model, **{policy.warmed: moved})
        await models.load(MODEL)
        tenant.open(f"s{turn}", MODEL, policy="rmt", settings=settings)
        first.append(await scores(tenant.predict(None, rows(4), stream=f"s{turn}")))
    await bench.settled()
    assert not torch.equal(*first)
