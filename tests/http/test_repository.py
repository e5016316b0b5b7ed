"""The model repository: index, load, unload, models replaced under the streams that adapted them, two in one server."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from tests.http.conftest import INFER, PREDICT, Server, error_of, infer_body, retry_after, running, untouched
from tests.serving import LR, MODEL, rows, tiny_network, write_config
from tta_server.app import load_models
from tta_server.engine.source import SourceModel
from tta_server.settings import Settings, load_settings

pytestmark = pytest.mark.anyio

OTHER = "other"
LOAD, UNLOAD = (f"/v2/repository/models/{MODEL}/{what}" for what in ("load", "unload"))


def write_weights(folder: Path, name: str, shift: float = 0.0) -> None:
    """The tiny network's weights, its scores for the first class moved by ``shift``."""
    weights = tiny_network().state_dict()
    weights["head.bias"][0] += shift
    safetensors.torch.save_file(weights, folder / f"{name}.safetensors")


def write_all(folder: Path) -> Settings:
    """Config and weights of two models of one architecture."""
    model = {"factory": "tests.serving:TinyNetwork", "input": {"shape": [3, 8, 8]}, "policies": {"tent": {"lr": LR}}}
    models = {name: model | {"weights": f"{name}.safetensors"} for name in (MODEL, OTHER)}
    settings = load_settings(write_config(folder, models=models))
    write_weights(folder, OTHER, shift=1.0)
    return settings


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, SourceModel]:
    """Both, loaded."""
    return load_models(write_all(tmp_path_factory.mktemp("models")))


@pytest.fixture
async def server(models: dict[str, SourceModel], tmp_path: Path) -> AsyncIterator[Server]:
    """It serves both, and loads them again from files that only this test changes."""
    async with running((write_all(tmp_path), models)) as made:
        yield made


async def index(server: Server) -> dict[str, tuple[str, str]]:
    """State and reason by model."""
    listed = await server.json("POST", "/v2/repository/index")
    assert all(one["version"] == "1" for one in listed)
    return {one["name"]: (one["state"], one["reason"]) for one in listed}


async def done(server: Server, path: str, **arguments: Any) -> None:
    """Loads or unloads, whose answer is empty."""
    response = await server.client.post(path, **arguments)
    assert (response.status_code, response.content) == (200, b""), response.text


# Two models


async def test_two_models_serve_their_own_streams(server: Server) -> None:
    assert await index(server) == {MODEL: ("READY", ""), OTHER: ("READY", "")}
    infos = {one["name"]: one for one in (await server.json("GET", "/v1/models"))["models"]}
    assert infos[MODEL]["digest"] != infos[OTHER]["digest"]
    x, answers = rows(4), {}
    for model in (MODEL, OTHER):
        await server.open(f"on-{model}", model=model)
        answers[model] = await server.predict(f"on-{model}", x, output="logits", adapt=False)
        assert answers[model]["model"] == model
        over_v2 = await server.infer(x, model=model)
        assert over_v2["outputs"][0]["data"] == [one for row in answers[model]["logits"] for one in row]
    moved = torch.tensor(answers[OTHER]["logits"]) - torch.tensor(answers[MODEL]["logits"])
    torch.testing.assert_close(moved, torch.tensor([1.0, 0, 0, 0, 0]).expand(4, 5), atol=1e-5, rtol=0)
    assert await server.listed(model=OTHER) == [f"on-{OTHER}"]
    counted = {one["name"]: one for one in (await server.json("GET", "/v2/models/stats"))["model_stats"]}
    assert {name: one["inference_stats"]["success"]["count"] for name, one in counted.items()} == {MODEL: 2, OTHER: 2}


async def test_a_model_must_be_named_where_there_are_two(server: Server) -> None:
    text = error_of(await server.client.put("/v1/streams/s"), 404)
    assert text == f"name a model; there are: {OTHER}, {MODEL}"


async def test_a_stream_is_not_another_models(server: Server) -> None:
    await server.open("s", model=MODEL)
    await server.predict("s", rows(4))
    async with untouched(server):
        assert (
            "belongs to model 'tiny', not to 'other'"
            in (await server.infer(rows(4), 409, model=OTHER, sequence_id="s"))["error"]
        )
        response = await server.client.put("/v1/streams/s", json={"model": OTHER})
        assert "belongs to model 'tiny', not to 'other'" in error_of(response, 409)
    taken = await server.infer(rows(4), model=OTHER, sequence_id="s", sequence_start=True)
    assert taken["parameters"]["replaced"] is True
    assert (await server.info("s"))["model"] == OTHER


# Unload and load


async def test_an_unloaded_model_is_not_ready_until_it_is_loaded(server: Server) -> None:
    await server.open("s", model=MODEL)
    await server.predict("s", rows(4))
    await server.open("t", model=OTHER)
    info = await server.info("s")
    await done(server, UNLOAD)
    state, reason = (await index(server))[MODEL]
    assert state == "UNAVAILABLE"
    assert "was unloaded" in reason
    refused = [
        await server.client.post(INFER, json=infer_body(rows(1))),
        await server.client.post(PREDICT, json={"inputs": rows(1).tolist()}),
        await server.client.get(f"/v2/models/{MODEL}"),
        await server.client.get(f"/v2/models/{MODEL}/ready"),
        await server.client.get(f"/v2/models/{MODEL}/config"),
        await server.client.get(f"/v1/models/{MODEL}"),
        await server.client.put("/v1/streams/new", json={"model": MODEL}),
        await server.client.patch("/v1/streams/s", json={"settings": {"lr": 0.5}}),
    ]
    for response in refused:
        assert error_of(response, 503) == f"model 'tiny' is not ready: it was unloaded; POST {LOAD} brings it back"
        retry_after(response)
    assert [one["name"] for one in (await server.json("GET", "/v1/models"))["models"]] == [OTHER]
    assert (await server.predict("t", rows(4)))["version"] == 0, "the other model goes on"
    assert await server.info("s") == info | {"missing": {}}, "what a model lacks is not known without it"
    assert await server.listed() == ["s", "t"]
    await done(server, UNLOAD)

    await done(server, LOAD)
    assert (await index(server))[MODEL] == ("READY", "")
    assert await server.info("s") == info
    assert (await server.predict("s", rows(4)))["version"] == 1, "the stream goes on where it was"


@pytest.mark.parametrize("what", ["reset", "delete"])
async def test_streams_of_an_unloaded_model_can_be_reset_and_deleted(server: Server, what: str) -> None:
    await server.open("s", model=MODEL)
    await server.predict("s", rows(4))
    await done(server, UNLOAD)
    if what == "reset":
        assert (await server.json("POST", "/v1/streams/s/reset"))["version"] == 0
        await done(server, LOAD)
        assert (await server.predict("s", rows(4)))["version"] == 0
    else:
        assert (await server.client.delete("/v1/streams/s")).status_code == 204
    await server.settled()
    assert server.service.levels().states["device"][0] == (what == "reset")


async def test_requests_under_way_finish_before_a_model_goes(server: Server) -> None:
    """Those, too, that let others go ahead."""
    await server.open("s", model=MODEL)
    gate = await server.hold()
    under_way = asyncio.create_task(server.predict("s", rows(4), priority=10))
    await server.waiting(1)
    going = asyncio.create_task(done(server, UNLOAD))
    while (await index(server))[MODEL][0] == "READY":
        await asyncio.sleep(0)
    assert "was unloaded" in (await server.infer(rows(1), 503))["error"], "no new ones"
    assert not going.done()
    gate.open()
    assert (await under_way)["version"] == 0
    await going
    assert MODEL not in server.service.models.loaded()


@pytest.mark.parametrize(
    ("path", "body", "status", "said"),
    [
        ("/v2/repository/models/huge/load", None, 404, "no model 'huge'; there are: other, tiny"),
        ("/v2/repository/models/huge/unload", None, 404, "no model 'huge'"),
        (LOAD, {"parameters": {"config": "{}"}}, 400, "parameter 'config' is not taken"),
        (LOAD, {"parameters": {"file:1/model.pt": "AAAA"}}, 400, "is not taken"),
        (LOAD, {"parameters": {"config": {}}}, 400, "/parameters/config"),
        (LOAD, [], 400, "must be a JSON object"),
    ],
    ids=str,
)
async def test_loads_that_are_refused(server: Server, path: str, body: Any, status: int, said: str) -> None:
    assert said in error_of(await server.client.post(path, json=body), status)
    assert set((await index(server)).values()) == {("READY", "")}


@pytest.mark.parametrize(
    "arguments", [{}, {"json": {}}, {"json": {"parameters": {"unload_dependents": False}}}], ids=str
)
async def test_what_the_stock_client_sends(server: Server, arguments: dict[str, Any]) -> None:
    await done(server, LOAD, json={})
    await done(server, UNLOAD, **arguments)


async def test_a_compressed_load_is_read(server: Server) -> None:
    response = await server.client.post(
        LOAD, content=gzip.compress(b'{"parameters": {"config": "{}"}}'), headers={"content-encoding": "gzip"}
    )
    assert "'config' is not taken" in error_of(response, 400)
    response = await server.client.post(LOAD, content=b"{}", headers={"content-encoding": "br"})
    assert "'br'" in error_of(response, 415)


# Other weights under the same name


async def test_a_reload_of_the_same_files_changes_nothing(server: Server) -> None:
    await server.open("s", model=MODEL)
    await server.predict("s", rows(4))
    async with untouched(server):
        await done(server, LOAD)
    assert (await server.predict("s", rows(4)))["version"] == 1


async def test_streams_of_other_weights_are_refused_until_they_are_reset(server: Server, tmp_path: Path) -> None:
    await server.open("s", model=MODEL)
    await server.predict("s", rows(4))
    old = (await server.json("GET", f"/v1/models/{MODEL}"))["digest"]
    write_weights(tmp_path, MODEL, shift=2.0)
    async with untouched(server):
        await done(server, LOAD)
        new = (await server.json("GET", f"/v1/models/{MODEL}"))["digest"]
        assert new != old
        refused = [
            await server.client.post(PREDICT, json={"inputs": rows(1).tolist()}),
            await server.client.post(f"{PREDICT}?adapt=false", json={"inputs": rows(1).tolist()}),
            await server.client.post(INFER, json=infer_body(rows(1), sequence_id="s")),
            await server.client.patch("/v1/streams/s", json={"policy": "norm"}),
        ]
        for response in refused:
            text = error_of(response, 409)
            assert old in text
            assert new in text
            assert "reset the stream" in text
    await server.open("fresh", model=MODEL)
    reset = await server.json("POST", "/v1/streams/s/reset")
    assert (reset["digest"], reset["version"], reset["tier"]) == (new, 0, "none")
    answers = [await server.predict(id, rows(4), output="logits") for id in ("s", "fresh")]
    assert answers[0]["logits"] == answers[1]["logits"]
    assert (await server.info("s"))["version"] == 1


async def test_streams_go_on_when_their_weights_are_back(server: Server, tmp_path: Path) -> None:
    await server.open("s", model=MODEL)
    await server.predict("s", rows(4))
    async with untouched(server):
        for shift in (2.0, 0.0):
            write_weights(tmp_path, MODEL, shift)
            await done(server, LOAD)
    assert (await server.predict("s", rows(4)))["version"] == 1


async def test_a_start_takes_a_stream_to_the_new_weights(server: Server, tmp_path: Path) -> None:
    await server.infer(rows(4), sequence_id="s", sequence_start=True)
    write_weights(tmp_path, MODEL, shift=2.0)
    await done(server, LOAD)
    await server.infer(rows(4), 409, sequence_id="s")
    answer = await server.infer(rows(4), sequence_id="s", sequence_start=True)
    assert answer["parameters"]["replaced"] is True
    assert (await server.infer(rows(4), sequence_id="s"))["parameters"]["state_version"] == 1


@pytest.mark.parametrize("loaded_before", [True, False], ids=["replace", "load"])
async def test_files_that_cannot_be_used_leave_all_as_it_was(
    server: Server, tmp_path: Path, loaded_before: bool
) -> None:
    await server.open("s", model=MODEL)
    await server.predict("s", rows(4))
    if not loaded_before:
        await done(server, UNLOAD)
    before = await index(server)
    (tmp_path / f"{MODEL}.safetensors").write_bytes(b"not weights")
    async with untouched(server):
        text = error_of(await server.client.post(LOAD), 409)
        assert text.startswith("model 'tiny' was not loaded, all is as it was: ")
    assert await index(server) == before
    if loaded_before:
        assert (await server.predict("s", rows(4)))["version"] == 1
    write_weights(tmp_path, MODEL)
    await done(server, LOAD)
    assert (await server.predict("s", rows(4)))["version"] >= 1
