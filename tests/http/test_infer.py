"""The Open Inference Protocol: inference, tensors as JSON and binary, and streams named by ``sequence_id``."""

from __future__ import annotations

import asyncio
import gzip
import json
import zlib
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from torch import Tensor

from tests.http.conftest import (
    INFER,
    Loaded,
    Server,
    error_of,
    image,
    infer_body,
    running,
    untouched,
)
from tests.serving import CLASSES, MODEL, Gate, let_pass, rows, tiny_network
from tta_server.http.infer import HEADER_LENGTH
from tta_server.state.keeper import Done
from tta_server.types import Lane, Stream

pytestmark = pytest.mark.anyio


def output(answer: Any, name: str = "logits") -> Tensor:
    """An output tensor of a JSON answer."""
    (found,) = (one for one in answer["outputs"] if one["name"] == name)
    assert found["datatype"] == "FP32"
    return torch.tensor(found["data"], dtype=torch.float32).reshape(found["shape"])


def source_scores(x: Tensor) -> Tensor:
    """What plain torch computes."""
    with torch.no_grad():
        scores: Tensor = tiny_network()(x)
    return scores


# Inference


async def test_without_a_sequence_the_source_answers(server: Server) -> None:
    x = rows(4)
    answer = await server.infer(x)
    torch.testing.assert_close(output(answer), source_scores(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output(answer, "probabilities"), source_scores(x).softmax(1), rtol=1e-4, atol=1e-5)
    assert (answer["model_name"], answer["model_version"]) == (MODEL, "1")
    report = answer["parameters"]
    assert (report["state_version"], report["adapted"], report["policy"]) == (0, False, "source")
    assert "stream_id" not in report
    assert "id" not in answer
    assert await server.listed() == []


async def test_the_version_may_be_in_the_path(server: Server) -> None:
    body = infer_body(rows(1))
    answer = await server.json("POST", f"/v2/models/{MODEL}/versions/1/infer", json=body)
    assert answer["outputs"] == (await server.json("POST", INFER, json=body))["outputs"]


@pytest.mark.parametrize("chosen", [["logits"], ["probabilities"], ["probabilities", "logits"], []])
async def test_outputs_come_as_asked(server: Server, chosen: list[str]) -> None:
    answer = await server.json("POST", INFER, json=infer_body(rows(2), outputs=chosen))
    assert [one["name"] for one in answer["outputs"]] == (chosen or ["logits", "probabilities"])
    assert all(one["shape"] == [2, 5] and len(one["data"]) == 10 for one in answer["outputs"])


@pytest.mark.parametrize("id", ["request-7", "", "ä\n"])
async def test_the_request_id_comes_back(server: Server, id: str) -> None:
    assert (await server.json("POST", INFER, json=infer_body(rows(1)) | {"id": id}))["id"] == id


async def test_the_request_may_say_json_in_its_own_words(server: Server) -> None:
    """What the stock client sends to ask for JSON; parameters nobody knows are left alone."""
    body = infer_body(rows(1), outputs=["logits"], binary_data_output=False, somebody_elses="x", priority=0)
    body["outputs"][0]["parameters"] = {"binary_data": False}
    body["inputs"][0]["parameters"] = {}
    await server.json("POST", INFER, json=body)


DATATYPES: dict[str, tuple[float, str]] = {
    "BOOL": (1, "u1"), "UINT8": (255, "u1"), "UINT16": (1, "<u2"), "UINT32": (1, "<u4"), "UINT64": (1, "<u8"),
    "INT8": (1, "i1"), "INT16": (1, "<i2"), "INT32": (1, "<i4"), "INT64": (1, "<i8"),
    "FP16": (1, "<f2"), "FP32": (1, "<f4"), "FP64": (1, "<f8"),
}  # fmt: skip
"""By datatype of numbers: what stands for the model's 1.0, and how numpy calls it."""


def values_of(x: Tensor, datatype: str) -> Any:
    """The rows as an array of a datatype."""
    scale, kind = DATATYPES[datatype]
    return np.round(x.numpy() * scale).astype(kind) if "f" not in kind else x.numpy().astype(kind)


def of_datatype(x: Tensor, datatype: str) -> Tensor:
    """The rows as that datatype can hold them."""
    scale, _ = DATATYPES[datatype]
    return torch.from_numpy(values_of(x, datatype).astype(np.float32) / np.float32(scale))


@pytest.mark.parametrize("datatype", DATATYPES)
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "flat"])
async def test_json_tensors(server: Server, datatype: str, nested: bool) -> None:
    values = values_of(rows(2), datatype)
    data = (values if nested else values.flatten()).tolist()
    body = {"inputs": [{"name": "input", "shape": [2, 3, 8, 8], "datatype": datatype, "data": data}]}
    answer = await server.json("POST", INFER, json=body)
    torch.testing.assert_close(output(answer), source_scores(of_datatype(rows(2), datatype)), rtol=1e-4, atol=1e-4)


# Binary tensors


def binary_body(header: dict[str, Any], *tensors: bytes) -> tuple[bytes, dict[str, str]]:
    """A body of JSON and binary data, and its header."""
    text = json.dumps(header).encode()
    return b"".join([text, *tensors]), {HEADER_LENGTH: str(len(text))}


def binary_input(x: Tensor, datatype: str = "FP32", **request: Any) -> tuple[bytes, dict[str, str]]:
    """A request whose input is binary."""
    raw = values_of(x, datatype).tobytes()
    tensor = {
        "name": "input", "shape": list(x.shape), "datatype": datatype, "parameters": {"binary_data_size": len(raw)},
    }  # fmt: skip
    return binary_body({"inputs": [tensor], **request}, raw)


async def send(server: Server, body: bytes, headers: dict[str, str]) -> httpx.Response:
    """Sends what has no Content-Type, as the stock client does."""
    request = server.client.build_request("POST", INFER, content=body, headers=headers)
    assert "content-type" not in request.headers
    return await server.client.send(request)


def read(response: httpx.Response) -> tuple[Any, dict[str, Any]]:
    """The JSON of an answer, and all its outputs, binary or not."""
    assert response.status_code == 200, response.text
    length = response.headers.get(HEADER_LENGTH)
    kind = "application/json" if length is None else "application/octet-stream"
    assert response.headers["content-type"] == kind
    end = len(response.content) if length is None else int(length)
    header, outputs = json.loads(response.content[:end]), {}
    for one in header["outputs"]:
        size = one.get("parameters", {}).get("binary_data_size")
        assert (size is None) is ("data" in one)
        if size is None:
            outputs[one["name"]] = np.array(one["data"], np.float32).reshape(one["shape"])
        else:
            assert one["datatype"] == "FP32"
            outputs[one["name"]] = np.frombuffer(response.content[end : end + size], "<f4").reshape(one["shape"])
            end += size
    assert end == len(response.content)
    return header, outputs


@pytest.mark.parametrize("datatype", DATATYPES)
async def test_binary_tensors(server: Server, datatype: str) -> None:
    _, outputs = read(await send(server, *binary_input(rows(2), datatype)))
    expected = source_scores(of_datatype(rows(2), datatype)).numpy()
    np.testing.assert_allclose(outputs["logits"], expected, rtol=1e-4, atol=1e-4)


async def test_the_upper_half_of_fp32_is_a_datatype(server: Server) -> None:
    raw = (rows(2).numpy().view(np.uint32) >> 16).astype("<u2")
    tensor = {"name": "input", "shape": [2, 3, 8, 8], "datatype": "BF16", "parameters": {"binary_data_size": 768}}
    _, outputs = read(await send(server, *binary_body({"inputs": [tensor]}, raw.tobytes())))
    same = torch.from_numpy((raw.astype(np.uint32) << 16).view(np.float32))
    np.testing.assert_allclose(outputs["logits"], source_scores(same).numpy(), rtol=1e-4, atol=1e-4)


async def test_encoded_images_are_a_tensor_of_bytes(server: Server) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    files = [image(one) for one in pixels]
    raw = b"".join(len(one).to_bytes(4, "little") + one for one in files)
    tensor = {"name": "input", "shape": [2], "datatype": "BYTES", "parameters": {"binary_data_size": len(raw)}}
    _, outputs = read(await send(server, *binary_body({"inputs": [tensor]}, raw)))
    x = torch.from_numpy(pixels.transpose(0, 3, 1, 2) / np.float32(255))
    np.testing.assert_allclose(outputs["logits"], source_scores(x).numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("for_all", "asked", "binary"),
    [
        (None, None, []),
        (True, None, ["logits", "probabilities"]),
        (False, None, []),
        (True, {"logits": None}, ["logits"]),
        (True, {"logits": None, "probabilities": False}, ["logits"]),
        (False, {"probabilities": True, "logits": None}, ["probabilities"]),
        (None, {"probabilities": True, "logits": True}, ["probabilities", "logits"]),
    ],
    ids=str,
)
async def test_outputs_come_binary_where_that_is_asked_for(
    server: Server, for_all: bool | None, asked: dict[str, bool | None] | None, binary: list[str]
) -> None:
    x = rows(3)
    request = infer_body(x) if for_all is None else infer_body(x, binary_data_output=for_all)
    if asked is not None:
        request["outputs"] = [
            {"name": name, "parameters": {} if one is None else {"binary_data": one}} for name, one in asked.items()
        ]
    response = await server.client.post(INFER, json=request)
    header, outputs = read(response)
    assert [one["name"] for one in header["outputs"] if "data" not in one] == binary
    assert list(outputs) == (["logits", "probabilities"] if asked is None else list(asked))
    expected = {"logits": source_scores(x), "probabilities": source_scores(x).softmax(1)}
    for name, values in outputs.items():
        np.testing.assert_allclose(values, expected[name].numpy(), rtol=1e-4, atol=1e-5)


async def test_a_raw_request_is_one_tensor_and_nothing_else(server: Server) -> None:
    header, outputs = read(await send(server, rows(3).numpy().tobytes(), {HEADER_LENGTH: "0"}))
    assert [one["parameters"]["binary_data_size"] for one in header["outputs"]] == [60, 60]
    np.testing.assert_allclose(outputs["logits"], source_scores(rows(3)).numpy(), rtol=1e-4, atol=1e-5)
    assert header["parameters"]["policy"] == "source"


@pytest.mark.parametrize("accept", ["gzip", "deflate", "identity"])
@pytest.mark.parametrize(
    ("encoding", "squeeze"), [("gzip", gzip.compress), ("deflate", zlib.compress), ("identity", bytes)]
)
async def test_compression_both_ways(server: Server, encoding: str, squeeze: Any, accept: str) -> None:
    """Inference-Header-Content-Length counts before compression, on the way in and out."""
    body, headers = binary_input(rows(64), parameters={"binary_data_output": True})
    headers |= {"content-encoding": encoding, "accept-encoding": accept}
    response = await send(server, squeeze(body), headers)
    assert response.headers.get("content-encoding", "identity") == accept
    _, outputs = read(response)
    np.testing.assert_allclose(outputs["logits"], source_scores(rows(64)).numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("length", "said"),
    [
        ("-1", "must be a number of bytes, got '-1'"),
        ("many", "must be a number of bytes, got 'many'"),
        ("", "must be a number of bytes, got ''"),
        ("1e3", "must be a number of bytes"),
        ("9" * 30, "must be a number of bytes"),
        ("99999", "is 99999, but the body has"),
        ("5", "the body is not JSON"),
    ],
    ids=lambda value: value[:10],
)
async def test_header_lengths_that_do_not_fit(refusing: Server, length: str, said: str) -> None:
    body, _ = binary_input(rows(1))
    assert said in error_of(await send(refusing, body, {HEADER_LENGTH: length}), 400)


async def test_a_header_length_sent_twice(server: Server) -> None:
    body, headers = binary_input(rows(1))
    twice = list(headers.items()) * 2
    assert "sent once, got it 2 times" in error_of(await server.client.post(INFER, content=body, headers=twice), 400)


@pytest.mark.parametrize("change", [-1, 1])
async def test_short_and_trailing_bytes(server: Server, change: int) -> None:
    body, headers = binary_input(rows(1))
    text = error_of(await send(server, body[:change] if change < 0 else body + b"x", headers), 400)
    assert "768" in text
    assert str(768 + change) in text


@pytest.mark.parametrize("body", [b"", bytes(767), bytes(769)], ids=len)
async def test_raw_requests_that_do_not_fit(refusing: Server, body: bytes) -> None:
    assert str(len(body)) in error_of(await send(refusing, body, {HEADER_LENGTH: "0"}), 400)


@pytest.mark.parametrize("binary", [True, False], ids=["binary", "json"])
async def test_classification(server: Server, binary: bool) -> None:
    """``score:index:label``, best first."""
    x = rows(2)
    request = infer_body(x, outputs=["probabilities"])
    request["outputs"][0]["parameters"] = {"classification": 2, "binary_data": binary}
    response = await server.client.post(INFER, json=request)
    length = int(response.headers.get(HEADER_LENGTH, len(response.content)))
    (found,) = json.loads(response.content[:length])["outputs"]
    assert (found["datatype"], found["shape"]) == ("BYTES", [2, 2])
    scores = source_scores(x).softmax(1)
    best = scores.argsort(1, descending=True)[:, :2]
    expected = [
        f"{row[index]:f}:{index}:{CLASSES[index]}" for row, order in zip(scores, best, strict=True) for index in order
    ]
    if binary:
        assert response.content[length:] == b"".join(len(one).to_bytes(4, "little") + one.encode() for one in expected)
    else:
        assert found["data"] == expected


# Streams


async def test_a_sequence_is_a_stream(server: Server) -> None:
    answers = []
    for seed in range(3):
        answers.append(await server.infer(rows(4, seed), sequence_id="cam"))
        await server.settled()
    reports = [one["parameters"] for one in answers]
    assert [one["state_version"] for one in reports] == [0, 1, 2]
    assert all((one["stream_id"], one["adapted"], one["policy"]) == ("cam", True, "tent") for one in reports)
    assert "agreement" not in reports[0], "not measured yet"
    assert 0 <= reports[1]["agreement"] <= 1
    assert all("drift" not in one and one["verdict"] == "unknown" for one in reports), "nothing to compare with"
    assert all(0 < one["confidence"] <= 1 for one in reports)
    assert all(0 <= one["entropy_ratio"] <= 1 and 0 <= one["margin"] <= 1 for one in reports)
    for report in reports:
        assert all(isinstance(value, str | int | float | bool) for value in report.values()), "flat"
    assert (await server.info("cam"))["version"] == 3
    assert (await server.predict("cam", rows(4)))["version"] == 3, "/v1 sees the same stream"


@pytest.mark.parametrize(
    ("given", "id"),
    [("cam:1", "cam:1"), (7, "7"), (2**53 + 1, "9007199254740993"), (2**64 - 1, "18446744073709551615"), ("0", "0")],
    ids=str,
)
async def test_sequence_ids(server: Server, given: str | int, id: str) -> None:
    answer = await server.infer(rows(2), sequence_id=given)
    assert answer["parameters"]["stream_id"] == id
    assert await server.listed() == [id]


@pytest.mark.parametrize("none", [0, ""], ids=repr)
async def test_no_sequence(server: Server, none: Any) -> None:
    answer = await server.infer(rows(2), sequence_id=none, sequence_start=False, sequence_end=False)
    assert "stream_id" not in answer["parameters"]
    assert await server.listed() == []


async def test_big_ids_stay_apart(server: Server) -> None:
    for id in (2**53, 2**53 + 1):
        await server.infer(rows(2), sequence_id=id)
    assert await server.listed() == [str(2**53), str(2**53 + 1)]


async def test_a_start_on_a_live_id_replaces_it_and_says_so(server: Server) -> None:
    x = rows(4)
    first = await server.infer(x, sequence_id=5, sequence_start=True)
    assert "replaced" not in first["parameters"]
    await server.infer(x, sequence_id=5)
    again = await server.infer(x, sequence_id=5, sequence_start=True)
    assert again["parameters"]["replaced"] is True
    assert again["parameters"]["state_version"] == 0
    assert torch.equal(output(first), output(again))
    assert "replaced" not in (await server.infer(x, sequence_id=5))["parameters"]
    assert (await server.info("5"))["version"] == 2


async def test_an_end_closes_after_this_request(server: Server) -> None:
    await server.infer(rows(4), sequence_id="s")
    last = await server.infer(rows(4), sequence_id="s", sequence_end=True)
    assert last["parameters"]["state_version"] == 1
    await server.json("GET", "/v1/streams/s", 404)
    assert (await server.infer(rows(4), sequence_id="s"))["parameters"]["state_version"] == 0


@pytest.mark.parametrize("id", [7, 2**53 + 1, 2**64 - 1, "cam:1"], ids=str)
async def test_a_sequence_as_the_stock_client_sends_it(server: Server, id: int | str) -> None:
    """Start and end come with every request; a neighbouring number is another stream."""
    other = id - 1 if isinstance(id, int) else f"{id}a"
    await server.infer(rows(4), sequence_id=other, sequence_start=True, sequence_end=False)
    reports = []
    for turn in range(3):
        answer = await server.infer(rows(4), sequence_id=id, sequence_start=turn == 0, sequence_end=turn == 2)
        reports.append(answer["parameters"])
    assert [one["state_version"] for one in reports] == [0, 1, 2]
    assert {one["stream_id"] for one in reports} == {str(id)}
    assert await server.listed() == [str(other)]
    assert (await server.info(str(other)))["version"] == 1


async def test_start_and_end_in_one_request(server: Server) -> None:
    answer = await server.infer(rows(4), sequence_id="s", sequence_start=True, sequence_end=True)
    assert (answer["parameters"]["stream_id"], answer["parameters"]["state_version"]) == ("s", 0)
    await server.json("GET", "/v1/streams/s", 404)
    await server.settled()
    assert server.service.levels().states == dict.fromkeys(("device", "host", "disk"), (0, 0))


async def test_a_request_that_is_not_the_first_begins_no_other_stream(server: Server) -> None:
    """A number above 0 says that there were requests before: a stream that was lost, or closed, is not made up for."""
    assert "no stream 's'" in (await server.infer(rows(2), 404, sequence_id="s", tta_seq=1))["error"]
    assert await server.listed() == []
    await server.infer(rows(2), sequence_id="s", tta_seq=0)
    await server.infer(rows(2), sequence_id="s", tta_seq=1, sequence_end=True)
    await server.infer(rows(2), 404, sequence_id="s", tta_seq=1, sequence_end=True)
    assert (await server.infer(rows(2), sequence_id="s", tta_seq=7, sequence_start=True))["parameters"]["adapted"]


async def test_unknown_ids_can_be_refused(loaded: Loaded) -> None:
    async with running(loaded, streams={"unknown_id": "refuse"}) as server:
        assert "no stream 's'" in (await server.infer(rows(2), 404, sequence_id="s"))["error"]
        assert await server.listed() == []
        await server.infer(rows(2), sequence_id="s", sequence_start=True)
        assert (await server.infer(rows(2), sequence_id="s"))["parameters"]["state_version"] == 1
        await server.infer(rows(2))


async def test_a_default_stream_takes_requests_without_a_sequence(loaded: Loaded) -> None:
    async with running(loaded, streams={"default": "shared", "unknown_id": "refuse"}) as server:
        answers = [await server.infer(rows(2)), await server.infer(rows(2), sequence_id=0)]
        assert [one["parameters"]["state_version"] for one in answers] == [0, 1]
        assert (await server.info("shared"))["version"] == 2
        await server.infer(rows(2), 404, sequence_id="other")


async def test_our_parameters(server: Server) -> None:
    first = await server.infer(rows(4), sequence_id="s", sequence_start=True, tta_policy="norm", tta_seq=1)
    assert (first["parameters"]["policy"], first["parameters"]["state_version"]) == ("norm", 0)
    again = await server.infer(rows(4), sequence_id="s", tta_seq=1)
    assert again["parameters"].pop("replayed") is True
    assert again == first
    off = await server.infer(rows(4), sequence_id="s", tta_adapt=False, tta_seq=2)
    assert (off["parameters"]["policy"], off["parameters"]["adapted"]) == ("source", False)
    torch.testing.assert_close(output(off), source_scores(rows(4)), rtol=1e-4, atol=1e-5)
    assert (await server.info("s"))["requests"] == 2
    assert "out of order" in (await server.infer(rows(4), 409, sequence_id="s", tta_seq=1))["error"]
    assert "'norm'" in (await server.infer(rows(4), 409, sequence_id="s", tta_policy="tent"))["error"]


async def test_a_timeout_is_in_microseconds(server: Server) -> None:
    gate = await server.hold()
    error = await server.infer(rows(2), 504, sequence_id="s", timeout=1500)
    assert "waited 0.0015 s" in error["error"]
    patient = asyncio.create_task(server.infer(rows(2), sequence_id="s", timeout=0))
    await server.waiting(1)
    gate.open()
    assert (await patient)["parameters"]["state_version"] == 0, "nothing adapted before; 0 means none"


# What a refused request must not do


@pytest.mark.parametrize(
    ("x", "parameters"),
    [
        (rows(2) * 300, {}),
        (torch.zeros(2, 3, 9, 9), {}),
        (torch.zeros(0, 3, 8, 8), {}),
        (rows(2), {"tta_policy": "magic"}),
    ],
    ids=["out of range", "wrong shape", "no rows", "unknown policy"],
)
async def test_a_refused_start_leaves_the_live_stream_alone(
    server: Server, x: Tensor, parameters: dict[str, Any]
) -> None:
    """A request that is refused has no effect: least of all may it destroy what the stream has learnt."""
    await server.adapt()
    async with untouched(server):
        body = infer_body(x, sequence_id="s", sequence_start=True, **parameters)
        assert (await server.client.post(INFER, json=body)).status_code in (400, 404)


async def test_a_refused_request_opens_no_stream(server: Server) -> None:
    await server.infer(rows(2) * 300, 400, sequence_id="s")
    assert await server.listed() == []


async def test_a_start_refused_for_a_full_queue_leaves_the_live_stream_alone(loaded: Loaded) -> None:
    async with running(loaded, limits={"queue": 1}) as server:
        await server.adapt()
        async with untouched(server):
            gate = await server.hold()
            waiting = asyncio.create_task(server.infer(rows(4)))
            await server.waiting(1)
            await server.infer(rows(4), 429, sequence_id="s", sequence_start=True)
            await server.infer(rows(4), 429, sequence_id="new")
            gate.open()
            await waiting


async def test_two_starts_at_once_are_both_fresh(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever comes second replaces the first's stream; nobody joins a sequence that is not new."""
    await server.infer(rows(4), sequence_id="s")
    await server.settled()
    gate, engine = Gate(), server.runner.engine
    drop = engine.drop

    def slow_drop(lane: Lane, stream: Stream, done: Done) -> None:
        gate.pass_through()
        drop(lane, stream, done)

    monkeypatch.setattr(engine, "drop", slow_drop)
    first = asyncio.create_task(server.infer(rows(4), sequence_id="s", sequence_start=True))
    await asyncio.to_thread(gate.reached)
    second = asyncio.create_task(server.infer(rows(4), sequence_id="s", sequence_start=True))
    await server.waiting(1)
    gate.open()
    answers = await asyncio.gather(first, second)
    assert [answer["parameters"]["state_version"] for answer in answers] == [0, 0]


# Priority, pressure, and who goes away


async def test_a_higher_priority_goes_ahead(server: Server) -> None:
    """1 is the highest; what came last goes first if it came less than a second later."""
    gate = await server.hold()
    done: list[str] = []

    async def ask(name: str, **parameters: Any) -> None:
        await server.infer(rows(2), **parameters)
        done.append(name)

    # Streams of full-model policies do not merge, so that an order shows.
    low = asyncio.create_task(ask("low", sequence_id="c", sequence_start=True, tta_policy="cotta", priority=10))
    await server.waiting(1)
    high = asyncio.create_task(ask("high", sequence_id="d", sequence_start=True, tta_policy="cotta", priority=1))
    await server.waiting(2)
    gate.open()
    await asyncio.gather(low, high)
    assert done == ["high", "low"]


async def test_under_pressure_answers_come_without_adaptation_and_say_so(loaded: Loaded) -> None:
    async with running(loaded) as server:
        for id in "abc":
            await server.adapt(id)
        gate = await server.hold()
        tasks = []
        for count, id in enumerate("abc", 1):
            tasks.append(asyncio.create_task(server.infer(rows(4), sequence_id=id)))
            await server.waiting(count)
        let_pass(server.runner, 20.0)
        gate.open()
        reports = [(await task)["parameters"] for task in tasks]
        assert [one.get("shed") for one in reports] == [True] * 3, "they may wait 30 s"
        assert [one["adapted"] for one in reports] == [True] * 3, "answered by what the streams had learnt"
        assert [(await server.info(id))["version"] for id in "abc"] == [2, 2, 2]
        alone = await server.predict("a", rows(4))
        assert (alone["shed"], alone["version"]) == (False, 2)


async def test_v1_tells_of_pressure_too(loaded: Loaded) -> None:
    async with running(loaded) as server:
        for id in "ab":
            await server.open(id)
        gate = await server.hold()
        tasks = [asyncio.create_task(server.predict(id, rows(4))) for id in "ab"]
        await server.waiting(2)
        let_pass(server.runner, 20.0)
        gate.open()
        assert [(await task)["shed"] for task in tasks] == [True, True]


# Sequences that come to nothing


async def test_a_stream_that_begins_and_ends_unanswered_is_closed(server: Server) -> None:
    """Late here. Nothing else would ever close it; a live stream stays, so that its last request can be sent again."""
    gate = await server.hold()
    for id in ("new", "other"):
        answer = await server.infer(rows(1), 504, sequence_id=id, sequence_start=True, sequence_end=True, timeout=1000)
        assert "waited 0.001 s" in answer["error"]
    gate.open()
    assert await server.json("GET", "/v1/streams") == {"streams": [], "next": None}
    await server.adapt("s")
    await server.infer(rows(1), 400, sequence_id="s", sequence_end=True, tta_seq="x")
    assert (await server.info("s"))["version"] == 2


async def test_a_request_without_an_id_neither_begins_nor_ends_a_stream(loaded: Loaded) -> None:
    async with running(loaded, streams={"default": "shared"}) as server:
        await server.infer(rows(4))
        for control in ("sequence_start", "sequence_end"):
            answer = await server.json("POST", INFER, json=infer_body(rows(4)) | {"parameters": {control: True}})
            assert "replaced" not in answer["parameters"]
        assert (await server.info("shared"))["version"] == 3
        refused = await server.infer(rows(1), 400, tta_policy="norm")
        assert "tta_policy needs a sequence_id" in refused["error"]
