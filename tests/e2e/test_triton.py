"""The stock client of the Open Inference Protocol, sync and aio, as people have it installed."""

from __future__ import annotations

import asyncio
import base64
import inspect
import io
from collections.abc import AsyncIterator, Awaitable, Callable
from itertools import product
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from PIL import Image
from tritonclient.utils import InferenceServerException

from tests.e2e.conftest import CONCURRENT
from tests.e2e.process import Running, gated_rows
from tests.serving import CLASSES, MODEL, rows, tiny_network
from tta_server import __version__

pytestmark = pytest.mark.anyio

Ask = Callable[..., Awaitable[Any]]
Array = np.ndarray[Any, Any]

NUMBERS: dict[str, Any] = {
    "FP64": np.float64, "FP32": np.float32, "FP16": np.float16, "BF16": ml_dtypes.bfloat16,
    "UINT8": np.uint8, "UINT16": np.uint16, "UINT32": np.uint32, "UINT64": np.uint64,
    "INT8": np.int8, "INT16": np.int16, "INT32": np.int32, "INT64": np.int64, "BOOL": np.bool_,
}  # fmt: skip
ROWS = 32
"""So many that every answer is long enough to be compressed."""


@pytest.fixture(params=[triton, triton_aio], ids=["sync", "aio"])
async def ask(request: pytest.FixtureRequest, server: Running) -> AsyncIterator[Ask]:
    """Calls a method of the client, of either kind."""
    client = request.param.InferenceServerClient(f"127.0.0.1:{server.port}")

    async def done(result: Any) -> Any:
        return await result if inspect.isawaitable(result) else result

    async def call(method: str, *arguments: Any, **options: Any) -> Any:
        return await done(getattr(client, method)(*arguments, **options))

    yield call
    await done(client.close())


def tensor(values: Array, datatype: str = "FP32", binary: bool = True, name: str = "input") -> list[Any]:
    made = triton.InferInput(name, list(values.shape), datatype)
    made.set_data_from_numpy(values, binary_data=binary)
    return [made]


def some(count: int = 2) -> list[Any]:
    return tensor(rows(count).numpy())


def wanted(name: str, binary: bool = True, classes: int = 0) -> Any:
    return triton.InferRequestedOutput(name, binary_data=binary, class_count=classes)


def parameters(result: Any) -> Any:
    return result.get_response()["parameters"]


def example(datatype: str) -> tuple[Array, torch.Tensor]:
    """Values of a datatype, and what the model is to make of them."""
    generator = np.random.default_rng(0)
    shape = (ROWS, 3, 8, 8)
    pixels = generator.integers(0, 256, shape, np.uint8)
    if datatype == "BYTES":
        return np.array([png(one) for one in pixels], dtype=object), torch.from_numpy(pixels).float() / 255
    if datatype == "UINT8":
        return pixels, torch.from_numpy(pixels).float() / 255
    whole = np.dtype(NUMBERS[datatype]).kind in "uib"
    values = (generator.integers(0, 2, shape) if whole else generator.random(shape)).astype(NUMBERS[datatype])
    return values, torch.from_numpy(values.astype(np.float32))


def png(pixels: Array) -> bytes:
    """``[3, H, W]`` as a file."""
    file = io.BytesIO()
    Image.fromarray(pixels.transpose(1, 2, 0)).save(file, "PNG")
    return file.getvalue()


def scores(x: torch.Tensor) -> dict[str, Array]:
    """What the network says, run here."""
    with torch.no_grad():
        logits = tiny_network()(x)
    return {"logits": logits.numpy(), "probabilities": logits.softmax(1).numpy()}


# Inference


@pytest.mark.parametrize("datatype", [*NUMBERS, "BYTES"])
@pytest.mark.parametrize("coding", [None, "gzip", "deflate"])
async def test_every_datatype_in_every_form(ask: Ask, datatype: str, coding: str | None) -> None:
    values, x = example(datatype)
    expected = scores(x)
    # In JSON the client has no BF16, and images are base64.
    inputs = [tensor(values, datatype)]
    if datatype == "BYTES":
        inputs.append(tensor(np.array([base64.b64encode(one) for one in values], object), datatype, binary=False))
    elif datatype != "BF16":
        inputs.append(tensor(values, datatype, binary=False))
    outputs = [
        None,
        *([wanted("logits", a), wanted("probabilities", b)] for a, b in product((True, False), repeat=2)),
    ]
    for given, asked in product(inputs, outputs):
        result = await ask(
            "infer",
            MODEL,
            given,
            outputs=asked,
            request_id="r-1",
            request_compression_algorithm=coding,
            response_compression_algorithm=coding,
        )
        for name, numbers in expected.items():
            np.testing.assert_allclose(result.as_numpy(name), numbers, rtol=1e-4, atol=1e-5)
            in_json = asked is not None and not asked[list(expected).index(name)]._parameters["binary_data"]
            assert ("data" in result.get_output(name)) == in_json
        response = result.get_response()
        assert response["id"] == "r-1"
        assert (response["parameters"]["policy"], response["parameters"]["adapted"]) == ("source", False)


async def test_only_the_outputs_that_are_listed_and_in_that_order(ask: Ask) -> None:
    async def names(*listed: str) -> list[str]:
        result = await ask("infer", MODEL, some(), outputs=[wanted(name) for name in listed])
        return [one["name"] for one in result.get_response()["outputs"]]

    assert await names("probabilities") == ["probabilities"]
    assert await names("probabilities", "logits") == ["probabilities", "logits"]
    assert await names() == ["logits", "probabilities"]


@pytest.mark.parametrize("binary", [True, False])
async def test_the_best_classes(ask: Ask, binary: bool) -> None:
    x = rows(4)
    result = await ask("infer", MODEL, tensor(x.numpy()), outputs=[wanted("logits", binary, classes=2)])
    best = result.as_numpy("logits")
    assert best.shape == (4, 2)
    for row, expected in zip(best, scores(x)["logits"], strict=True):
        for text, index in zip(row, (-expected).argsort(), strict=False):
            score, number, label = (text.decode() if binary else text).split(":")
            assert (int(number), label) == (index, CLASSES[index])
            assert float(score) == pytest.approx(expected[index], rel=1e-4, abs=1e-5)


# Streams


@pytest.mark.parametrize("id", [42, 2**53 + 1, 2**64 - 1, "camera-3"], ids=str)
async def test_a_sequence_is_a_stream(server: Running, ask: Ask, id: int | str) -> None:
    async def infer(**controls: bool) -> Any:
        return parameters(await ask("infer", MODEL, some(4), sequence_id=id, **controls))

    reports = [await infer(sequence_start=True), await infer(), await infer()]
    assert [report["state_version"] for report in reports] == [0, 1, 2]
    assert all((report["stream_id"], report["adapted"]) == (str(id), True) for report in reports)
    assert server.http.get(f"/v1/streams/{id}").status_code == 200
    again = await infer(sequence_start=True)
    assert again.pop("request_id") != reports[0].pop("request_id")
    assert again == reports[0] | {"replaced": True}
    last = await infer(sequence_end=True)
    assert last["state_version"] == 1
    assert server.http.get(f"/v1/streams/{id}").status_code == 404


async def test_our_own_parameters(ask: Ask) -> None:
    async def infer(start: bool = False, **ours: Any) -> Any:
        options = {"sequence_id": "ours", "sequence_start": start, "timeout": 10**7}
        return parameters(await ask("infer", MODEL, some(), parameters=ours, **options))

    assert (await infer(start=True, tta_seq=1, tta_policy="norm"))["policy"] == "norm"
    assert (await infer(tta_seq=1))["replayed"] is True
    assert (await infer(tta_seq=2, tta_adapt=False))["policy"] == "source"
    with pytest.raises(InferenceServerException) as caught:
        await infer(tta_seq=1)
    assert caught.value.status() == "409"
    assert "request number 1 of stream 'ours' is out of order: 2 came before" in caught.value.message()
    await ask("infer", MODEL, some(), sequence_id="ours", sequence_end=True)
    with pytest.raises(InferenceServerException) as caught:
        await infer(tta_seq=3)
    assert caught.value.status() == "404"
    assert "no stream 'ours'" in caught.value.message()


async def test_who_waits_behind_others_and_for_how_long(server: Running) -> None:
    """Priority, timeout, and the bound of a stream's queue, while the device is held."""
    async with triton_aio.InferenceServerClient(f"127.0.0.1:{server.port}") as client:

        def infer(values: torch.Tensor, **options: Any) -> asyncio.Task[Any]:
            return asyncio.create_task(client.infer(MODEL, tensor(values.numpy()), **options))

        async def waiting(count: int) -> None:
            is_so = lambda: server.metric("tta_requests_waiting") == count  # noqa: E731
            await asyncio.to_thread(server.wait_for, f"{count} waiting requests", is_so)

        running = infer(gated_rows())
        first = await asyncio.to_thread(server.held)
        with pytest.raises(InferenceServerException) as caught:
            await infer(rows(2), timeout=1000)
        # Refused at once by how long steps take here, which the held ones make long, or late.
        assert caught.value.status() in ("429", "504")
        said = caught.value.message()
        assert "waited 0.001 s in the queue without its turn coming; nothing adapted" in said or "its timeout" in said

        # 10 and 1 differ by 9 seconds of waiting; both stop in the model, so that the order is seen. As requests of
        # streams with different policies they cannot share a step.
        late = infer(gated_rows(), sequence_id="late", sequence_start=True, sequence_end=True, priority=10)
        await waiting(1)
        early = infer(
            gated_rows(), sequence_id="early", sequence_start=True, priority=1, parameters={"tta_policy": "norm"}
        )
        await waiting(2)
        first.close()
        await running
        second = await asyncio.to_thread(server.held)
        more = [infer(rows(2), sequence_id="early") for _ in range(4)]
        await waiting(5)
        with pytest.raises(InferenceServerException) as caught:
            await infer(rows(2), sequence_id="early")
        assert caught.value.status() == "429"
        assert "queue_per_stream" in caught.value.message()
        second.close()
        assert parameters(await early)["policy"] == "norm"
        third = await asyncio.to_thread(server.held)
        assert not late.done()
        third.close()
        await asyncio.gather(late, *more)
        await client.infer(MODEL, some(), sequence_id="early", sequence_end=True)


# Everything else that the client can ask


async def test_health_and_metadata(ask: Ask) -> None:
    assert await ask("is_server_live")
    assert await ask("is_server_ready")
    assert await ask("is_model_ready", MODEL)
    assert await ask("is_model_ready", MODEL, "1")
    assert not await ask("is_model_ready", "huge")
    told = await ask("get_server_metadata")
    assert (told["name"], told["version"]) == ("tta-server", __version__)
    for version in ("", "1"):
        assert await ask("get_model_metadata", MODEL, version) == {
            "name": MODEL,
            "versions": ["1"],
            "platform": "pytorch",
            "inputs": [{"name": "input", "datatype": "FP32", "shape": [-1, 3, 8, 8]}],
            "outputs": [
                {"name": name, "datatype": "FP32", "shape": [-1, 5]} for name in ("logits", "probabilities")
            ],
        }  # fmt: skip
        config = await ask("get_model_config", MODEL, version)
        assert config["max_batch_size"] == 1024
        assert config["input"] == [{"name": "input", "data_type": "TYPE_FP32", "dims": [3, 8, 8]}]
        assert [one["dims"] for one in config["output"]] == [[5], [5]]


async def test_unloading_and_loading(ask: Ask) -> None:
    async def index() -> Any:
        (entry,) = await ask("get_model_repository_index")
        return entry

    assert await index() == {"name": MODEL, "version": "1", "state": "READY", "reason": ""}
    await ask("infer", MODEL, some(), sequence_id="stays", sequence_start=True)
    await ask("unload_model", MODEL)
    assert (await index())["state"] == "UNAVAILABLE"
    assert not await ask("is_model_ready", MODEL)
    assert await ask("is_server_ready")
    with pytest.raises(InferenceServerException) as caught:
        await ask("infer", MODEL, some())
    assert caught.value.status() == "503"
    assert f"POST /v2/repository/models/{MODEL}/load brings it back" in caught.value.message()
    await ask("load_model", MODEL)
    assert (await index())["state"] == "READY"
    report = parameters(await ask("infer", MODEL, some(), sequence_id="stays", sequence_end=True))
    assert report["state_version"] == 1, "its state was kept"


async def test_a_model_of_other_weights_refuses_the_states_of_the_old_ones(server: Running, ask: Ask) -> None:
    file = server.folder / "tiny.safetensors"
    before = file.read_bytes()
    digest = server.http.get(f"/v1/models/{MODEL}").json()["digest"]
    await ask("infer", MODEL, some(), sequence_id="old", sequence_start=True)
    try:
        changed = {key: value * 1.5 if "head" in key else value for key, value in tiny_network().state_dict().items()}
        safetensors.torch.save_file(changed, file)
        await ask("load_model", MODEL)
        other = server.http.get(f"/v1/models/{MODEL}").json()["digest"]
        assert other != digest
        with pytest.raises(InferenceServerException) as caught:
            await ask("infer", MODEL, some(), sequence_id="old")
        assert caught.value.status() == "409"
        assert digest[:12] in caught.value.message()
        assert other[:12] in caught.value.message()
    finally:
        file.write_bytes(before)
        await ask("load_model", MODEL)
    assert parameters(await ask("infer", MODEL, some(), sequence_id="old", sequence_end=True))["state_version"] == 1


Problem = tuple[str, str, Callable[[Ask], Awaitable[Any]]]


def reshaped() -> list[Any]:
    return [some()[0].set_shape([1, 3, 8, 8])]


PROBLEMS: list[Problem] = [
    ("400", "1 to 1024 rows", lambda ask: ask("infer", MODEL, tensor(np.zeros((0, 3, 8, 8), np.float32)))),
    (
        "400",
        "1 to 1024 rows",
        lambda ask: ask("infer", MODEL, tensor(np.zeros((0, 3, 8, 8), np.float32), binary=False)),
    ),
    ("400", "1 to 1024 rows", lambda ask: ask("infer", MODEL, tensor(np.zeros(0, object), "BYTES"))),
    ("400", "[1, 3, 9, 9]", lambda ask: ask("infer", MODEL, tensor(np.zeros((1, 3, 9, 9), np.float32)))),
    ("400", "got none", lambda ask: ask("infer", MODEL, [])),
    ("400", "needs 768 bytes, got 1536", lambda ask: ask("infer", MODEL, reshaped())),
    (
        "400",
        "exactly one input, 'input'; got 'pixels'",
        lambda ask: ask("infer", MODEL, tensor(np.zeros((1, 3, 8, 8), np.float32), name="pixels")),
    ),
    ("400", "must lie in [0, 1]", lambda ask: ask("infer", MODEL, tensor(300 * np.ones((1, 3, 8, 8), np.float32)))),
    ("400", "row 0 holds NaN", lambda ask: ask("infer", MODEL, tensor(np.full((2, 3, 8, 8), np.nan, np.float32)))),
    (
        "400",
        "limits.rows_per_request",
        lambda ask: ask("infer", MODEL, tensor(np.zeros((1025, 3, 8, 8), np.float32))),
    ),
    ("400", "there are logits and probabilities", lambda ask: ask("infer", MODEL, some(), outputs=[wanted("x")])),
    ("400", "asked for twice", lambda ask: ask("infer", MODEL, some(), outputs=[wanted("logits"), wanted("logits")])),
    ("400", "1 to 128 of", lambda ask: ask("infer", MODEL, some(), sequence_id="a b")),
    ("400", "priority must not be negative", lambda ask: ask("infer", MODEL, some(), priority=-1)),
    ("400", "no parameter 'tta_adept'", lambda ask: ask("infer", MODEL, some(), parameters={"tta_adept": True})),
    ("400", "is not gzip data", lambda ask: ask("infer", MODEL, some(), headers={"Content-Encoding": "gzip"})),
    ("404", "no model 'huge'; there are: tiny", lambda ask: ask("infer", "huge", some())),
    ("404", "no model 'huge'; there are: tiny", lambda ask: ask("get_model_metadata", "huge")),
    ("404", "no model 'huge'; there are: tiny", lambda ask: ask("load_model", "huge")),
    ("404", "no model 'huge'; there are: tiny", lambda ask: ask("get_inference_statistics", "huge")),
    ("404", "version 1 only", lambda ask: ask("infer", MODEL, some(), model_version="7")),
    ("404", "version 1 only", lambda ask: ask("get_model_config", MODEL, "7")),
    ("404", "no such path", lambda ask: ask("get_model_metadata", "a/b/c")),
    ("405", "only POST", lambda ask: ask("get_model_metadata", f"{MODEL}/infer")),
    (
        "409",
        "tta-server prepare",
        lambda ask: ask("infer", MODEL, some(), sequence_id="e", parameters={"tta_policy": "eata"}),
    ),
    (
        "413",
        "limits.body_bytes = 900000",
        lambda ask: ask("infer", MODEL, tensor(np.zeros((650, 3, 8, 8), np.float64), "FP64")),
    ),
    (
        "413",
        "limits.inflated_bytes = 8388608",
        lambda ask: ask(
            "infer",
            MODEL,
            tensor(np.zeros((9000, 3, 8, 8), np.float64), "FP64"),
            request_compression_algorithm="gzip",
        ),
    ),
    ("415", "one of gzip, deflate", lambda ask: ask("infer", MODEL, some(), headers={"Content-Encoding": "br"})),
    ("400", "a model is loaded as the server's config says", lambda ask: ask("load_model", MODEL, config="{}")),
    ("501", "not offered", lambda ask: ask("get_trace_settings")),
    ("501", "not offered", lambda ask: ask("update_log_settings", {})),
    ("501", "not offered", lambda ask: ask("get_system_shared_memory_status")),
    ("501", "not offered", lambda ask: ask("unregister_cuda_shared_memory")),
]


@pytest.mark.parametrize(("status", "said", "call"), PROBLEMS, ids=[f"{one[0]} {one[1]}" for one in PROBLEMS])
async def test_errors_are_readable(ask: Ask, status: str, said: str, call: Callable[[Ask], Awaitable[Any]]) -> None:
    with pytest.raises(InferenceServerException) as caught:
        await call(ask)
    assert caught.value.status() == status
    assert said in caught.value.message()


def test_the_calls_of_perf_analyzer(server: Running) -> None:
    """What the load generator asks in its order, which trusts the statistics to tell what it sent."""
    requests, batch = 60, 3
    with triton.InferenceServerClient(f"127.0.0.1:{server.port}", concurrency=CONCURRENT) as client:
        assert client.is_server_ready()
        (name,) = (one["name"] for one in client.get_model_metadata(MODEL)["inputs"])
        config = client.get_model_config(MODEL)
        assert config["max_batch_size"] >= batch
        assert "sequence_batching" not in config, "it would send batches of one, in sequences"
        (dims,) = (one["dims"] for one in config["input"])

        def statistics() -> dict[str, Any]:
            (model,) = client.get_inference_statistics(MODEL)["model_stats"]
            assert (model["name"], model["version"]) == (MODEL, "1")
            assert model == client.get_inference_statistics()["model_stats"][0]
            found: dict[str, Any] = model
            return found

        before = statistics()
        values = tensor(np.zeros((batch, *dims), np.float32), name=name)
        under_way = [client.async_infer(MODEL, values) for _ in range(requests)]
        for one in under_way:
            assert one.get_result().as_numpy("logits").shape == (batch, 5)
        with pytest.raises(InferenceServerException):
            client.infer(MODEL, tensor(np.zeros((batch, 1), np.float32), name=name))
        # A step is counted when it is over, just after its answers have left.
        rows_so_far = before["inference_count"] + requests * batch
        server.wait_for("the last step", lambda: bool(statistics()["inference_count"] == rows_so_far))
        after = statistics()
    steps = after["execution_count"] - before["execution_count"]
    assert 1 <= steps <= requests
    assert after["last_inference"] >= before["last_inference"]
    counts = {
        key: after["inference_stats"][key]["count"] - before["inference_stats"][key]["count"]
        for key in before["inference_stats"]
    }
    each = ("success", "queue", "compute_input", "compute_infer", "compute_output")
    assert counts == dict.fromkeys(each, requests) | {"fail": 1, "cache_hit": 0, "cache_miss": 0}
    times = {key: after["inference_stats"][key]["ns"] - before["inference_stats"][key]["ns"] for key in each}
    assert all(time > 0 for time in times.values())
    assert times["success"] > times["compute_input"] + times["compute_output"]
