"""The Open Inference Protocol beside inference: health, metadata, configuration, statistics, what is not offered."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.http.conftest import INFER, Loaded, Server, error_of, infer_body, running
from tests.serving import MODEL, rows
from tta_server import __version__
from tta_server.http.v2 import EXTENSIONS

pytestmark = pytest.mark.anyio

BOTH_PATHS = pytest.mark.parametrize("path", [f"/v2/models/{MODEL}", f"/v2/models/{MODEL}/versions/1"])


async def test_health(server: Server) -> None:
    assert await server.json("GET", "/v2/health/live") == {"live": True}
    told = {"ready": True, "state": {"stored": False, "problem": None}}
    assert await server.json("GET", "/v2/health/ready") == told, "streams end with this server"


async def test_a_draining_server_is_alive_but_not_ready(loaded: Loaded) -> None:
    async with running(loaded) as server:
        await server.service.drain()
        assert await server.json("GET", "/v2/health/live") == {"live": True}
        for path in ("/v2/health/ready", f"/v2/models/{MODEL}/ready"):
            assert "shutting down" in (await server.json("GET", path, 503))["error"]


@pytest.mark.parametrize("path", ["/v2", "/v2/"])
async def test_server_metadata(server: Server, path: str) -> None:
    metadata = await server.json("GET", path)
    assert metadata == {"name": "tta-server", "version": __version__, "extensions": list(EXTENSIONS)}


@BOTH_PATHS
async def test_a_model_is_ready(server: Server, path: str) -> None:
    assert await server.json("GET", f"{path}/ready") == {"name": MODEL, "ready": True}


@BOTH_PATHS
async def test_model_metadata(server: Server, path: str) -> None:
    assert await server.json("GET", path) == {
        "name": MODEL,
        "versions": ["1"],
        "platform": "pytorch",
        "inputs": [{"name": "input", "datatype": "FP32", "shape": [-1, 3, 8, 8]}],
        "outputs": [
            {"name": "logits", "datatype": "FP32", "shape": [-1, 5]},
            {"name": "probabilities", "datatype": "FP32", "shape": [-1, 5]},
        ],
    }


@pytest.mark.parametrize("path", [f"/v2/models/{MODEL}", f"/v2/models/{MODEL}/versions/1"])
async def test_model_configuration(loaded: Loaded, path: str) -> None:
    """Without ``sequence_batching``, which would have perf_analyzer send single rows only."""
    async with running(loaded, limits={"rows_per_request": 32}) as server:
        assert await server.json("GET", f"{path}/config") == {
            "name": MODEL,
            "platform": "pytorch",
            "backend": "pytorch",
            "max_batch_size": 32,
            "input": [{"name": "input", "data_type": "TYPE_FP32", "dims": [3, 8, 8]}],
            "output": [
                {"name": "logits", "data_type": "TYPE_FP32", "dims": [5]},
                {"name": "probabilities", "data_type": "TYPE_FP32", "dims": [5]},
            ],
        }


# Statistics

PHASES = ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output", "cache_hit", "cache_miss")


async def statistics(server: Server, path: str = f"/v2/models/{MODEL}/stats") -> Any:
    """Those of the only model, once every step is over."""
    await server.settled()
    (found,) = (await server.json("GET", path))["model_stats"]
    return found


async def test_statistics_before_any_request(server: Server) -> None:
    nothing = {"count": 0, "ns": 0}
    assert await statistics(server) == {
        "name": MODEL,
        "version": "1",
        "last_inference": 0,
        "inference_count": 0,
        "execution_count": 0,
        "inference_stats": dict.fromkeys(PHASES, nothing),
        "batch_stats": [],
    }


async def test_statistics_count_rows_steps_and_requests(server: Server) -> None:
    await server.infer(rows(3))
    await server.open("s")
    await server.predict("s", rows(5), seq=1)
    await server.predict("s", rows(5), seq=1)
    await server.infer(rows(2) * 300, 400)
    await server.infer(rows(2), 409, sequence_id="s", tta_seq=0)
    gate = await server.hold()
    merged = [asyncio.create_task(server.infer(rows(count))) for count in (1, 2)]
    await server.waiting(2)
    late = await server.client.post(INFER, json=infer_body(rows(1), timeout=1))
    gate.open()
    await asyncio.gather(*merged)
    assert late.status_code in (429, 504)

    found = await statistics(server)
    assert found["inference_count"] == 3 + 5 + (1 + 2), "rows"
    assert found["execution_count"] == 3, "steps: the last two requests shared one"
    phases = found["inference_stats"]
    assert tuple(phases) == PHASES
    counts = {name: phase["count"] for name, phase in phases.items()}
    assert counts == {
        "success": 5, "fail": 3, "queue": 4, "compute_input": 5, "compute_infer": 4, "compute_output": 5,
        "cache_hit": 0, "cache_miss": 0,
    }, "one answer was a stored one"  # fmt: skip
    for name, phase in phases.items():
        assert (phase["ns"] > 0) is (phase["count"] > 0), name
    assert phases["success"]["ns"] > phases["queue"]["ns"] + phases["compute_infer"]["ns"]
    sizes = {one["batch_size"]: one["compute_infer"]["count"] for one in found["batch_stats"]}
    assert sizes == {3: 2, 5: 1}, "steps by their rows"
    stream = await server.info("s")
    assert abs(found["last_inference"] / 1000 - stream["last_seen"]) < 60, "milliseconds since 1970"


@pytest.mark.parametrize(
    "path", [f"/v2/models/{MODEL}/stats", f"/v2/models/{MODEL}/versions/1/stats", "/v2/models/stats"]
)
async def test_statistics_are_the_same_on_every_path(server: Server, path: str) -> None:
    await server.infer(rows(2))
    assert await statistics(server, path) == await statistics(server)
    assert (await statistics(server, path))["inference_count"] == 2


# What is not there


@pytest.mark.parametrize("rest", ["", "/ready", "/config", "/stats"])
@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("huge", "no model 'huge'; there are: tiny"),
        ("huge/versions/1", "no model 'huge'; there are: tiny"),
        (f"{MODEL}/versions/2", "has version 1 only, asked for was '2'"),
        (f"{MODEL}/versions/01", "has version 1 only, asked for was '01'"),
    ],
)
async def test_unknown_models_and_versions(refusing: Server, model: str, rest: str, said: str) -> None:
    assert said in error_of(await refusing.client.get(f"/v2/models/{model}{rest}"), 404)


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize(
    "path",
    [
        "/v2/systemsharedmemory/status",
        "/v2/systemsharedmemory/region/a/register",
        "/v2/cudasharedmemory/status",
        "/v2/cudasharedmemory/region/a/unregister",
        "/v2/trace/setting",
        "/v2/logging",
        f"/v2/models/{MODEL}/trace/setting",
    ],
)
async def test_what_others_have_is_not_offered(refusing: Server, method: str, path: str) -> None:
    text = error_of(await refusing.client.request(method, path), 501)
    assert text.startswith(path)
    assert "not offered" in text
