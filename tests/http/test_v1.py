"""``/v1``: policies, models, and predictions from every kind of body."""

from __future__ import annotations

import asyncio
import gzip
import json
import math
import re
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import adapters
from tests.http.conftest import (
    PREDICT,
    Loaded,
    Server,
    error_of,
    image,
    npy,
    running,
    scrape,
    untouched,
    value,
)
from tests.serving import CLASSES, MODEL, rows, tiny_network
from tta_server.http.body import COMPRESS_FROM
from tta_server.http.schemas import Prediction

pytestmark = pytest.mark.anyio


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


# Policies and models


async def test_policies(server: Server) -> None:
    listed = (await server.json("GET", "/v1/policies"))["policies"]
    assert [one["name"] for one in listed] == list(adapters.policies())
    tent = await server.json("GET", "/v1/policies/tent")
    assert tent in listed
    assert (tent["scope"], tent["needs"]) == ("norm", [])
    assert tent["summary"]
    assert tent["settings"]["properties"]["lr"] == {"default": 0.001, "title": "Lr", "type": "number"}
    assert tent["settings"]["additionalProperties"] is False


async def test_models(server: Server) -> None:
    (model,) = (await server.json("GET", "/v1/models"))["models"]
    assert model == await server.json("GET", f"/v1/models/{MODEL}")
    assert (model["name"], model["architecture"], model["classes"]) == (MODEL, "TinyNetwork", list(CLASSES))
    assert re.fullmatch("[0-9a-f]{64}", model["digest"])
    assert model["input"]["shape"] == [3, 8, 8]
    assert model["adaptable"] == {"layers": {"BatchNorm2d": 2}, "values": 2 * (6 + 8)}
    assert (model["feature_dim"], model["default_policy"]) == (8, "tent")
    costs = {one["name"]: one for one in model["policies"]}
    assert costs["source"] == {"name": "source", "runs": True, "bytes_per_stream": 0}
    assert costs["tent"]["bytes_per_stream"] >= 3 * 4 * 28, "weights and two moments"


# Predictions


def oracle(x: Tensor, batch_statistics: bool) -> Tensor:
    """What plain torch computes: with the stored statistics, or, as TENT before its first step, with the batch's."""
    network = tiny_network().train(batch_statistics)
    with torch.no_grad():
        scores: Tensor = network(x)
    return scores


async def test_a_prediction_is_the_networks(server: Server) -> None:
    await server.open("s")
    x = rows(6)
    got = await server.predict("s", x)
    Prediction.model_validate(got)
    probabilities = tensor(got["probabilities"])
    torch.testing.assert_close(probabilities, oracle(x, True).softmax(1), rtol=1e-4, atol=1e-5)
    assert got["classes"] == probabilities.argmax(1).tolist()
    assert got["labels"] == [CLASSES[one] for one in got["classes"]]
    torch.testing.assert_close(tensor(got["confidence"]), probabilities.amax(1))
    entropy = -(probabilities * probabilities.log()).sum(1)
    torch.testing.assert_close(tensor(got["entropy"]), entropy, rtol=1e-4, atol=1e-5)
    assert "logits" not in got
    facts = (got["stream"], got["model"], got["policy"], got["version"], got["adapted"], got["replayed"])
    assert facts == ("s", MODEL, "tent", 0, True, False)
    assert got["queue_seconds"] >= 0
    assert got["inference_seconds"] > 0

    logits = await server.predict("s", x, output="logits", adapt=False)
    torch.testing.assert_close(tensor(logits["logits"]), oracle(x, False), rtol=1e-4, atol=1e-5)
    assert "probabilities" not in logits
    assert (logits["policy"], logits["version"], logits["adapted"]) == ("source", 1, False)


async def test_versions_and_measurements_come_with_the_answers(server: Server) -> None:
    await server.open("s")
    answers = []
    for seed in range(4):
        answers.append(await server.predict("s", rows(4, seed)))
        await server.settled()
    assert [one["version"] for one in answers] == [0, 1, 2, 3]
    assert (answers[0]["drift"], answers[0]["agreement"]) == (None, None), "not measured yet"
    for one in answers:
        assert one["verdict"] == "unknown", "there are no clean data to compare with"
        assert one["entropy_ratio"] == pytest.approx(np.array(one["entropy"]) / math.log(len(CLASSES)), abs=1e-6)
        best = np.sort(one["probabilities"], axis=1)
        assert one["margin"] == pytest.approx(best[:, -1] - best[:, -2], abs=1e-6)
    assert 0 <= answers[1]["agreement"] <= 1
    assert (await server.info("s"))["requests"] == 4


PIXELS = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
ROW = PIXELS.transpose(2, 0, 1)
REAL = ROW / 255
RAW = {
    "FP32": REAL.astype("<f4").tobytes(),
    "FP64": REAL.astype("<f8").tobytes(),
    "FP16": REAL.astype("<f2").tobytes(),
    "UINT8": ROW.tobytes(),
}
BODIES = {
    "json": json.dumps({"inputs": REAL[None].tolist()}).encode(),
    "json, one row": json.dumps({"inputs": REAL.tolist()}).encode(),
    "float32": npy(REAL[None].astype(np.float32)),
    "float64, one row": npy(REAL),
    "fortran": npy(np.asfortranarray(REAL[None])),
    "uint8": npy(ROW),
    "png": image(PIXELS),
}


def expected_logits(x: Any = REAL) -> list[float]:
    """The source model's scores for one row."""
    scores: list[float] = oracle(torch.from_numpy(np.asarray(x, np.float32)[None]), False)[0].tolist()
    return scores


async def logits_of(server: Server, body: bytes, headers: dict[str, str] | None = None, **query: Any) -> Any:
    """What a body sent without a Content-Type is answered, if none is given."""
    query = {"output": "logits", **query}
    request = server.client.build_request("POST", PREDICT, content=body, headers=headers, params=query)
    assert headers or "content-type" not in request.headers
    response = await server.client.send(request)
    assert response.status_code == 200, response.text
    return response.json()["logits"]


@pytest.mark.parametrize("kind", BODIES)
async def test_every_kind_of_body_means_the_same(server: Server, kind: str) -> None:
    await server.open("s", adapt=False)
    (logits,) = await logits_of(server, BODIES[kind])
    assert logits == pytest.approx(expected_logits(), abs=1e-4)


@pytest.mark.parametrize("datatype", RAW)
async def test_raw_rows_of_a_datatype(server: Server, datatype: str) -> None:
    await server.open("s", adapt=False)
    answered = await logits_of(server, RAW[datatype] * 3, datatype=datatype)
    assert len(answered) == 3
    for logits in answered:
        assert logits == pytest.approx(expected_logits(), abs=2e-2 if datatype == "FP16" else 1e-4)


@pytest.mark.parametrize(
    ("body", "datatype", "said"),
    [
        (RAW["FP32"][:-1], "FP32", "a multiple of 768 bytes, got 767"),
        (RAW["FP32"], "FP31", "got FP31"),
        (RAW["FP32"], "BYTES", "not BYTES"),
        (RAW["FP32"], "", "got "),
        (b"", "FP32", "empty"),
    ],
    ids=["part of a row", "unknown", "bytes", "none", "no body"],
)
async def test_raw_rows_that_are_none(refusing: Server, body: bytes, datatype: str, said: str) -> None:
    async with untouched(refusing):
        assert said in error_of(await refusing.client.post(PREDICT, content=body, params={"datatype": datatype}), 400)


async def test_a_jpeg_is_near_its_pixels(server: Server) -> None:
    await server.open("s", adapt=False)
    even = np.full((8, 8, 3), (200, 60, 120), np.uint8)
    (logits,) = await logits_of(server, image(even, "JPEG"))
    assert logits == pytest.approx(expected_logits(even.transpose(2, 0, 1) / 255), abs=0.1)


async def test_several_images_as_multipart(server: Server) -> None:
    """``curl -F a=@1.png -F b=@2.png``: one row per file, in order."""
    await server.open("s", adapt=False)
    pictures = [PIXELS, PIXELS[::-1].copy(), PIXELS[:, ::-1].copy()]
    files = [(name, (f"{name}.png", image(one), "image/png")) for name, one in zip("cab", pictures, strict=True)]
    answer = await server.json("POST", PREDICT, files=files, params={"output": "logits"})
    assert len(answer["logits"]) == 3
    for logits, one in zip(answer["logits"], pictures, strict=True):
        assert logits == pytest.approx(expected_logits(one.transpose(2, 0, 1) / 255), abs=1e-4)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (
            [("a", ("a.png", image(PIXELS))), ("b", ("b.png", b"GIF89a..."))],
            "begins with b'GIF89a",
        ),
        ([("a", ("a.png", image(PIXELS[:4])))], "must be 8 x 8 pixels, got 8 x 4"),
        ([("a", (None, "text"))], "part 'a' is not a file"),
    ],
    ids=["not an image", "wrong size", "not a file"],
)
async def test_multipart_bodies_that_are_no_images(refusing: Server, files: Any, said: str) -> None:
    async with untouched(refusing):
        assert said in error_of(await refusing.client.post(PREDICT, files=files), 400)


async def test_a_multipart_body_without_its_boundary(server: Server) -> None:
    await server.open("s")
    response = await server.client.post(PREDICT, content=b"--x", headers={"content-type": "multipart/form-data"})
    assert "multipart" in error_of(response, 400)


@pytest.mark.parametrize("kind", BODIES)
@pytest.mark.parametrize(("encoding", "squeeze"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
async def test_bodies_may_be_compressed(server: Server, kind: str, encoding: str, squeeze: Any) -> None:
    await server.open("s", adapt=False)
    (logits,) = await logits_of(server, squeeze(BODIES[kind]), {"content-encoding": encoding})
    assert logits == pytest.approx(expected_logits(), abs=1e-4)


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
@pytest.mark.parametrize(("count", "compressed"), [(1, False), (40, True)], ids=["small", "large"])
async def test_large_answers_are_compressed_if_the_client_likes(
    server: Server, encoding: str, count: int, compressed: bool
) -> None:
    await server.open("s", adapt=False)
    arguments: dict[str, Any] = {"json": {"inputs": rows(count).tolist()}, "params": {"output": "logits"}}
    plain = await server.client.post(PREDICT, headers={"accept-encoding": "identity"}, **arguments)
    answer = await server.client.post(PREDICT, headers={"accept-encoding": encoding}, **arguments)
    assert "content-encoding" not in plain.headers
    assert (len(plain.content) >= COMPRESS_FROM) is compressed
    assert answer.headers.get("content-encoding") == (encoding if compressed else None)
    assert answer.json()["logits"] == plain.json()["logits"]


# What comes back


@pytest.mark.parametrize(
    ("query", "scores"),
    [
        ({}, ["probabilities"]),
        ({"output": "probabilities"}, ["probabilities"]),
        ({"output": "logits"}, ["logits"]),
        ({"output": "none"}, []),
        ({"top_k": 2}, ["top"]),
        ({"top_k": 2, "output": "logits"}, ["logits", "top"]),
        ({"top_k": 2, "output": "none"}, ["top"]),
    ],
    ids=str,
)
async def test_scores_come_as_asked(server: Server, query: dict[str, Any], scores: list[str]) -> None:
    await server.open("s")
    answer = await server.predict("s", rows(3), **query)
    assert sorted(answer.keys() & {"probabilities", "logits", "top"}) == scores
    assert len(answer["classes"]) == len(answer["labels"]) == len(answer["entropy"]) == 3


@pytest.mark.parametrize(("asked", "given"), [(1, 1), (3, 3), (5, 5), (99, 5)])
async def test_the_likeliest_classes(server: Server, asked: int, given: int) -> None:
    await server.open("s", adapt=False)
    x = rows(4)
    answer = await server.predict("s", x, top_k=asked)
    for row, probabilities, best in zip(answer["top"], oracle(x, False).softmax(1), answer["labels"], strict=True):
        order = probabilities.argsort(descending=True)[:given].tolist()
        assert [one["class"] for one in row] == order
        assert [one["label"] for one in row] == [CLASSES[one] for one in order]
        assert [one["probability"] for one in row] == pytest.approx(probabilities[order].tolist(), abs=1e-5)
        assert row[0]["label"] == best


@pytest.mark.parametrize("kind", ["application/x-www-form-urlencoded", "application/octet-stream", "text/plain"])
async def test_the_content_type_does_not_matter(server: Server, kind: str) -> None:
    await server.open("s")
    body = json.dumps({"inputs": rows(2).tolist()})
    got = await server.json("POST", "/v1/streams/s/predict", content=body, headers={"content-type": kind})
    assert len(got["classes"]) == 2


async def test_a_big_body_is_decoded_beside_the_loop(server: Server) -> None:
    await server.open("s", adapt=False)
    x = rows(600)
    got = await server.json("POST", "/v1/streams/s/predict?output=logits", content=npy(x.numpy()))
    torch.testing.assert_close(tensor(got["logits"]), oracle(x, False), rtol=1e-4, atol=1e-4)


async def test_a_retry_gets_the_stored_answer(server: Server) -> None:
    await server.open("s")
    first = await server.predict("s", rows(4), seq=1)
    again = await server.predict("s", rows(4), seq=1)
    assert again == first | {"replayed": True}
    assert (await server.info("s"))["version"] == 1


async def test_streams_that_share_batches_do_not_meet(loaded: Loaded) -> None:
    ids, turns = ("left", "middle", "right"), 4
    batches = {id: [rows(2 + 2 * place, 10 * place + turn) for turn in range(turns)] for place, id in enumerate(ids)}
    alone: dict[str, list[Any]] = {}
    for id in ids:
        async with running(loaded) as server:
            await server.open(id)
            alone[id] = [await server.predict(id, x) for x in batches[id]]
    async with running(loaded) as server:
        for id in ids:
            await server.open(id)
        together: dict[str, list[Any]] = {id: [] for id in ids}
        for turn in range(turns):
            gate = await server.hold()
            tasks = {id: asyncio.create_task(server.predict(id, batches[id][turn])) for id in ids}
            await server.waiting(3)
            gate.open()
            for id, task in tasks.items():
                together[id].append(await task)
        await server.settled()
        samples = await scrape(server)
        assert value(samples, "tta_batch_samples_count") == turns, "all three went through in one step each time"
    for id in ids:
        for one, other in zip(together[id], alone[id], strict=True):
            assert one["version"] == other["version"]
            torch.testing.assert_close(tensor(one["probabilities"]), tensor(other["probabilities"]), rtol=0, atol=1e-4)
    moved = tensor(alone["left"][0]["probabilities"]) - oracle(batches["left"][0], False).softmax(1)
    assert moved.abs().max() > 1e-3, "adaptation shows, or this test would prove nothing"
