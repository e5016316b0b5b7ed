"""``/v1/streams/{id}/state``: a stream's state as a file, from one server to another."""

from __future__ import annotations

import gzip
import io
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
from rich.console import Console

import adapters
from tests.http.conftest import Loaded, Server, error_of, running, untouched
from tests.http.test_snapshots import future, mark
from tests.serving import MODEL, load, loader, rows, write_config
from tta_server.policies import make_policy, policy_digest
from tta_server.prepare import GROUPS, PrepareOptions, prepare
from tta_server.state.portable import Portable

pytestmark = pytest.mark.anyio

STATE = "/v1/streams/s/state"
IMAGES = 300
LEARNING: dict[str, dict[str, Any]] = {
    "cotta": {"augmentations": 3},
    "deyo": {"entropy_margin": 2.0, "plpd_threshold": -1.0},
    "eata": {"entropy_margin": 2.0, "cosine_margin": 1.0},
    "eta": {"entropy_margin": 2.0, "cosine_margin": 1.0},
    "norm": {"mode": "running"},
    "petal": {"augmentations": 3},
    "rotta": {"capacity": 4, "update_every": 4},
}
"""Settings by which a few small requests change the state, and take no long time."""
WITHOUT_WINDOW = {"lame", "norm", "rotta", "source", "t3a"}
DRAWING = {"cotta", "petal", "rmt", "roid", "rotta"}
"""Policies that augment images at random."""
VARIANTS = [
    *((policy, LEARNING.get(policy, {})) for policy in adapters.policies()),
    *((policy, LEARNING.get(policy, {}) | {"window": 4}) for policy in {*adapters.policies()} - WITHOUT_WINDOW),
    ("norm", {"window": 4}),
    ("tent", {"reset_after": 5}),
]


@dataclass(frozen=True)
class Two:
    """Servers of one model, whose new streams draw different random numbers."""

    here: Server
    there: Server


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """The tiny model with everything that policies ask for, made of random images."""
    folder = tmp_path_factory.mktemp("prepared")
    config, generator = write_config(folder), np.random.default_rng(0)
    images = generator.integers(0, 256, (IMAGES, 8, 8, 3), dtype=np.uint8)
    np.savez(folder / "source_train.npz", images=images, labels=generator.integers(0, 5, IMAGES))
    options = PrepareOptions(config, folder, only=tuple(GROUPS), warm_up_images=128, replay_images=32)
    prepare(options, Console(file=io.StringIO()))
    return load(folder)


@pytest.fixture(scope="module")
async def both(prepared: Loaded, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Two]:
    store = str(tmp_path_factory.mktemp("store"))
    again = prepared[0], {MODEL: loader(prepared)(MODEL)}
    async with (
        running(prepared, state={"folder": store}) as here,
        running(again, server={"seed": 5}) as there,
    ):
        yield Two(here, there)


@pytest.fixture
async def two(both: Two) -> AsyncIterator[Two]:
    """Without streams."""
    yield both
    for server in (both.here, both.there):
        for id in await server.listed():
            await server.client.delete(f"/v1/streams/{id}")


async def export(server: Server, id: str = "s") -> bytes:
    response = await server.client.get(f"/v1/streams/{id}/state")
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/octet-stream"
    assert response.headers["content-disposition"] == f'attachment; filename="{id}.safetensors"'
    return response.content


async def put(server: Server, file: bytes, expect: int, id: str = "s", **more: Any) -> Any:
    return await server.json("PUT", f"/v1/streams/{id}/state", expect, content=file, **more)


# The same future


def test_every_policy_runs(prepared: Loaded) -> None:
    reports = prepared[1][MODEL].reports
    assert [name for name, report in reports.items() if not report["runs"]] == []


@pytest.mark.parametrize(("policy", "settings"), sorted(VARIANTS, key=str), ids=str)
async def test_a_stream_goes_on_elsewhere_as_it_would_here(two: Two, policy: str, settings: dict[str, Any]) -> None:
    """Exported there, forked here, and here itself, once more after a rollback: the same scores, bit for bit."""
    here, there = two.here, two.there
    await here.open("s", policy=policy, settings=settings)
    for seed, size in enumerate((4, 1, 3)):
        await here.predict("s", rows(size, seed))
    await mark(here, "now")
    await put(there, file := await export(here), 201)
    await here.json("POST", "/v1/streams/s/fork", 201, json={"id": "fork"})

    stayed = await future(here, "s")
    assert await future(there, "s") == stayed
    assert await future(here, "fork") == stayed
    before, after, moved, forked = [
        Portable.parse(one) for one in (file, await export(here), await export(there), await export(here, "fork"))
    ]
    assert after.data == moved.data == forked.data
    assert after.manifest.version == moved.manifest.version == forked.manifest.version
    assert (after.data != before.data) is bool(before.data), "it learns"

    await here.json("POST", "/v1/streams/s/rollback", json={"snapshot": "now"})
    assert await future(here, "s") == stayed

    if policy in DRAWING:
        drawn = replace(before.manifest, random_key=before.manifest.random_key ^ 1)
        await put(there, replace(before, manifest=drawn).dump(), 200)
        assert await future(there, "s") != stayed, "the key counts"


# Files


async def test_the_file_says_what_it_is(server: Server) -> None:
    await server.adapt(steps=2)
    await server.predict("s", rows(4), seq=41)
    body = await export(server)
    info, file = await server.info("s"), Portable.parse(body)
    manifest = file.manifest
    assert (manifest.stream, manifest.model, manifest.model_digest) == ("s", MODEL, info["digest"])
    assert (manifest.policy, manifest.settings) == ("tent", info["settings"])
    assert manifest.policy_digest == policy_digest(make_policy("tent", info["settings"]))
    assert (manifest.version, manifest.request_number, manifest.created) == (3, 41, info["created"])
    assert len(file.data) == info["state_bytes"]
    tensors = safetensors.torch.load(body)
    assert tensors.keys() == {field.name for field in file.fields}
    stream = server.service.tenant("default").stream("s")
    state = server.runner.engine.store.export(stream.lane, stream)
    assert {f"weights/{key}" for key in state.weights} | {f"memory/{key}" for key in state.memory} == tensors.keys()
    for key, value in state.weights.items():
        assert tensors[f"weights/{key}"].equal(value[0])


async def test_a_stream_that_learnt_nothing_can_be_moved(server: Server) -> None:
    await server.open("s")
    file = await export(server)
    made = await put(server, file, 201, "t")
    assert (made["version"], made["tier"], made["last_number"]) == (0, "none", None)
    assert await future(server, "t") == await future(server, "s")


async def test_a_file_takes_the_place_of_a_state(server: Server) -> None:
    await server.adapt(steps=2)
    file, first = await export(server), await future(server, "s")
    await server.predict("s", rows(4), seq=9)
    replaced = await put(server, file, 200)
    assert (replaced["version"], replaced["last_number"], replaced["signals"]) == (2, 9, {})
    assert await future(server, "s") == first
    assert (await put(server, file, 200))["version"] == 2, "again, as a client that lost the answer would"
    await server.open("t")
    await put(server, file, 200, "t")
    assert await future(server, "t") == first


async def test_request_numbers_come_along(server: Server) -> None:
    await server.open("s")
    await server.predict("s", rows(4), seq=7)
    assert (await put(server, await export(server), 201, "t"))["last_number"] == 7
    response = await server.client.post("/v1/streams/t/predict?seq=7", json={"inputs": rows(4).tolist()})
    assert "was answered already, and its answer is not kept" in error_of(response, 409)
    assert (await server.predict("t", rows(4), seq=8))["version"] == 1


async def test_a_file_may_come_compressed(server: Server) -> None:
    await server.adapt()
    file = await export(server)
    headers = {"content-encoding": "gzip"}
    assert (await put(server, gzip.compress(file), 201, "t", headers=headers))["version"] == 2


async def test_a_file_may_be_larger_than_other_bodies(loaded: Loaded) -> None:
    async with running(loaded, limits={"body_bytes": 1000, "inflated_bytes": 1000}) as server:
        await server.open("s")
        file = await export(server)
        assert len(file) > 1000
        await put(server, file, 200)
        await put(server, gzip.compress(file), 200, headers={"content-encoding": "gzip"})


@pytest.mark.parametrize("declared", [True, False])
async def test_a_file_too_large_is_not_read(loaded: Loaded, declared: bool) -> None:
    limit = 1000

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(limit // 100 + 1):
            yield bytes(100)
        raise AssertionError("it was read on")

    async with running(loaded, limits={"import_bytes": limit}) as server:
        await server.adapt()
        file = await export(server)
        assert len(file) > limit
        async with untouched(server):
            response = await server.client.put(STATE, content=file if declared else chunks())
            assert f"limits.import_bytes = {limit}" in error_of(response, 413)
            response = await server.client.put(
                STATE, content=gzip.compress(bytes(10**5)), headers={"content-encoding": "gzip"}
            )
            assert f"limits.import_bytes = {limit} when decompressed" in error_of(response, 413)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "no stream's file, or cut off"),
        (b"{}", "no stream's file, or cut off"),
        (bytes(1000), "the header would take 0"),
        (b"\xff" * 1000, "the header would take"),
        (safetensors.torch.save({"weights/x": rows(1)}), "must have metadata"),
    ],
    ids=["empty", "json", "zeros", "ones", "another"],
)
async def test_garbage_is_refused(refusing: Server, body: bytes, said: str) -> None:
    async with untouched(refusing):
        assert said in error_of(await refusing.client.put(STATE, content=body), 400)
        assert said in error_of(await refusing.client.put("/v1/streams/new/state", content=body), 400)


async def test_a_file_that_was_altered_is_refused(refusing: Server) -> None:
    file = await export(refusing)
    async with untouched(refusing):
        cut = error_of(await refusing.client.put(STATE, content=file[:-1]), 400)
        assert "cut off" in cut
        flipped = bytearray(file)
        flipped[-3] ^= 1
        assert "altered" in error_of(await refusing.client.put(STATE, content=bytes(flipped)), 400)


# What does not fit


async def test_a_file_of_another_model_is_refused(server: Server, loaded: Loaded, tmp_path: Path) -> None:
    """With both digests, whether there is a stream or not."""
    await server.adapt()
    theirs, ours = "f" * 64, loaded[1][MODEL].digest
    file = Portable.parse(await export(server))
    other = replace(file, manifest=replace(file.manifest, model_digest=theirs)).dump()
    async with untouched(server):
        for id in "st":
            text = error_of(await server.client.put(f"/v1/streams/{id}/state", content=other), 409)
            assert theirs in text
            assert ours in text


@pytest.mark.parametrize("change", [{"policy": "norm"}, {"settings": {"lr": 0.5}}], ids=str)
async def test_a_file_of_another_policy_is_refused(server: Server, change: dict[str, Any]) -> None:
    await server.adapt()
    file = await export(server)
    await server.open("t", **change)
    info = await server.info("t")
    async with untouched(server, "t"):
        text = error_of(await server.client.put("/v1/streams/t/state", content=file), 409)
    assert Portable.parse(file).manifest.policy_digest in text
    assert policy_digest(make_policy(info["policy"], info["settings"])) in text


@pytest.mark.parametrize(
    ("change", "status", "said"),
    [
        ({"settings": {"lr": 0.25}}, 409, "the settings in the file make policy 'tent' with digest"),
        ({"settings": {"rate": 1}}, 400, "rate"),
        ({"settings": {"lr": -1}}, 400, "lr must lie in"),
        ({"policy": "magic"}, 404, "no policy 'magic'"),
    ],
    ids=str,
)
async def test_a_manifest_that_makes_no_such_policy(
    refusing: Server, change: dict[str, Any], status: int, said: str
) -> None:
    file = Portable.parse(await export(refusing))
    altered = replace(file, manifest=replace(file.manifest, **change)).dump()
    assert said in error_of(await refusing.client.put("/v1/streams/new/state", content=altered), status)
    assert "new" not in await refusing.listed()


async def test_tensors_that_the_policy_does_not_have(server: Server) -> None:
    await server.adapt()
    file = Portable.parse(await export(server))
    first = file.fields[0]
    renamed = replace(file, fields=(first._replace(name=f"{first.name}2"), *file.fields[1:])).dump()
    async with untouched(server):
        for id in "st":
            text = error_of(await server.client.put(f"/v1/streams/{id}/state", content=renamed), 409)
            assert f"it has {first.name}2 " in text
            assert f"where {first.name} " in text
        assert await server.listed() == ["s"]
    await server.open("t")


async def test_imports_count_as_streams(loaded: Loaded) -> None:
    async with running(loaded, limits={"streams": 1}) as server:
        await server.adapt()
        file = await export(server)
        response = await server.client.put("/v1/streams/t/state", content=file)
        assert "the limit is limits.streams = 1" in error_of(response, 429)
        await put(server, file, 200)


async def test_an_id_that_cannot_be_one(refusing: Server) -> None:
    file = await export(refusing)
    response = await refusing.client.put("/v1/streams/no%20body/state", content=file)
    assert "a stream id has" in error_of(response, 400)


async def test_a_model_is_known_by_its_digest(loaded: Loaded) -> None:
    """By whatever name it is loaded there."""
    settings, name = loaded[0], "renamed"
    async with running(loaded) as server:
        await server.adapt()
        file, first = await export(server), await future(server, "s")
    again = replace(loader(loaded)(MODEL), name=name)
    renamed = settings.model_copy(update={"models": {name: settings.models[MODEL]}})
    async with running((renamed, {name: again})) as server:
        assert (await put(server, file, 201))["model"] == name
        assert await future(server, "s") == first
