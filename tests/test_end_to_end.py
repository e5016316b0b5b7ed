"""The real server in a process of its own, the stock V2 client, and the command line."""

from __future__ import annotations

import json
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import safetensors.torch
import torch
import tritonclient.http as triton
from torch import Tensor
from tritonclient.utils import InferenceServerException

from tests.serving import MODEL, TIMEOUT, rows, tiny_network, write_config
from tta_server import __version__, cli

ROOT = Path(__file__).parent.parent
START_SECONDS = 60.0

GATED = """
    import os, socket
    from tests.serving import TinyNetwork

    class Gated(TinyNetwork):
        '''Stops at inputs with a certain first pixel, until the test hangs up.'''

        def forward(self, x):
            if bool((x[:, 0, 0, 0] == 0.625).any()):
                with socket.create_connection(("127.0.0.1", int(os.environ["TTA_TEST_GATE"])), timeout=30) as gate:
                    gate.recv(1)
            return super().forward(x)
    """
"""A module beside the config file."""


SHUTTING_DOWN = re.compile("Shutting down.*(Waiting for|Cancel)", re.DOTALL)
"""What uvicorn logs when it has stopped listening, and waits for open requests or gives them up."""


@dataclass(frozen=True)
class Running:
    """A server process."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path
    gate: socket.socket

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/v2/health/ready").status_code == 200
        except httpx.TransportError:
            return False

    def held(self) -> socket.socket:
        """Waits until a request is held in the model; closing what is returned lets it go on."""
        connection, _ = self.gate.accept()
        return connection

    def wait_for(self, what: str, true: Callable[[], bool]) -> None:
        """Waits for something in the other process."""
        deadline = time.monotonic() + START_SECONDS
        while not true():
            if time.monotonic() > deadline:
                raise AssertionError(f"never saw {what}; the server's log:\n{self.log.read_text()}")
            time.sleep(0.01)

    def metric(self, *parts: str) -> float:
        """Sum of the series whose lines hold all these parts."""
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line[0] != "#" and all(part in line for part in parts))

    def given_up(self) -> float:
        """Predictions whose client went away."""
        return self.metric("tta_requests_total", 'route="/v1/streams/{id}/predict"', 'code="499"')


@contextmanager
def started(folder: Path, port: int) -> Iterator[Running]:
    """A server on ``port``, or on one that it finds for 0; killed at the end if it still runs."""
    (folder / "gated.py").write_text(textwrap.dedent(GATED))
    model = {
        "factory": "gated:Gated", "weights": "tiny.safetensors", "input": {"shape": [3, 8, 8]},
        "policies": {"tent": {"lr": 0.01}},
    }  # fmt: skip
    sections = {"server": {"device": "cpu", "port": 1}, "monitor": {"shadow_ratio": 0}}
    config, log = write_config(folder, models={MODEL: model}, **sections), folder / "log"
    with socket.create_server(("127.0.0.1", 0)) as gate, log.open("wb") as output:
        gate.settimeout(TIMEOUT)
        process = subprocess.Popen(
            [sys.executable, "-m", "tta_server", "serve", str(config), "--port", str(port)],
            cwd=ROOT,
            stdout=output,
            stderr=output,
            env={**os.environ, "TTA_TEST_GATE": str(gate.getsockname()[1]), "OMP_NUM_THREADS": "1"},
        )
        try:
            yield _listening(process, log, gate)
        finally:
            process.kill()
            process.wait()


def _listening(process: subprocess.Popen[bytes], log: Path, gate: socket.socket) -> Running:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        found = re.search(r"running on http://127\.0\.0\.1:(\d+)", log.read_text())
        if found:
            running = Running(process, int(found[1]), log, gate)
            running.wait_for("a ready server", running.is_ready)
            return running
        time.sleep(0.02)
    raise AssertionError(f"the server did not start:\n{log.read_text()}")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        port: int = found.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One server for the tests that leave it as it was."""
    port = free_port()
    with started(tmp_path_factory.mktemp("server"), port) as running:
        assert running.port == port, "--port decides, not the config"
        yield running


@pytest.fixture
def client(server: Running) -> Iterator[Any]:
    made = triton.InferenceServerClient(f"127.0.0.1:{server.port}")
    yield made
    made.close()


def inputs(x: Tensor, binary: bool = False) -> list[Any]:
    tensor = triton.InferInput("input", list(x.shape), "FP32")
    tensor.set_data_from_numpy(x.numpy(), binary_data=binary)
    return [tensor]


def outputs(*names: str) -> list[Any]:
    return [triton.InferRequestedOutput(name, binary_data=False) for name in names]


def gated_rows() -> Tensor:
    x = rows(2)
    x[0, 0, 0, 0] = 0.625
    return x


# The stock client


def test_health_and_metadata(client: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready(MODEL)
    assert client.is_model_ready(MODEL, "1")
    assert not client.is_model_ready("huge")
    assert client.get_server_metadata()["version"] == __version__
    metadata = client.get_model_metadata(MODEL)
    assert metadata["name"] == MODEL
    assert metadata["inputs"] == [{"name": "input", "datatype": "FP32", "shape": [-1, 3, 8, 8]}]
    assert [one["name"] for one in metadata["outputs"]] == ["logits", "probabilities"]


def test_the_stock_client_gets_the_networks_scores(client: Any) -> None:
    x = rows(3)
    result = client.infer(MODEL, inputs(x), outputs=outputs("probabilities", "logits"), request_id="r-1")
    with torch.no_grad():
        expected = tiny_network()(x)
    np.testing.assert_allclose(result.as_numpy("logits"), expected.numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(result.as_numpy("probabilities"), expected.softmax(1).numpy(), rtol=1e-4, atol=1e-5)
    response = result.get_response()
    assert response["id"] == "r-1"
    assert (response["parameters"]["policy"], response["parameters"]["adapted"]) == ("source", False)


@pytest.mark.parametrize("id", [42, 2**53 + 1, "camera-3"], ids=str)
def test_the_stock_clients_sequence_is_a_stream(server: Running, client: Any, id: int | str) -> None:
    path = f"{server.url}/v1/streams/{id}"

    def infer(**controls: bool) -> Any:
        answer = client.infer(MODEL, inputs(rows(4)), outputs=outputs("logits"), sequence_id=id, **controls)
        return answer.get_response()["parameters"]

    reports = [infer(sequence_start=True), infer(), infer()]
    assert [report["state_version"] for report in reports] == [0, 1, 2]
    assert all((report["stream_id"], report["adapted"]) == (str(id), True) for report in reports)
    assert httpx.get(path).status_code == 200
    assert infer(sequence_start=True) == reports[0] | {"replaced": True}
    last = infer(sequence_end=True)
    assert last["state_version"] == 1
    assert httpx.get(path).status_code == 404


def test_the_stock_client_can_pass_our_parameters(client: Any) -> None:
    def infer(**parameters: Any) -> Any:
        answer = client.infer(
            MODEL, inputs(rows(4)), outputs=outputs("logits"), sequence_id="ours", parameters=parameters, timeout=10**7
        )
        return answer.get_response()["parameters"]

    assert infer(tta_seq=1, tta_policy="norm")["policy"] == "norm"
    assert infer(tta_seq=1)["replayed"] is True
    assert infer(tta_seq=2, tta_adapt=False)["policy"] == "source"


@pytest.mark.parametrize(
    ("call", "status", "said"),
    [
        (lambda c: c.infer("huge", inputs(rows(1)), outputs=outputs("logits")), "404", "no model 'huge'; there are"),
        (lambda c: c.infer(MODEL, inputs(rows(1)), outputs=outputs("x")), "400", "no output 'x'; there are logits"),
        (lambda c: c.infer(MODEL, inputs(torch.zeros(1, 3, 9, 9)), outputs=outputs("logits")), "400", "[1, 3, 9, 9]"),
        (lambda c: c.infer(MODEL, inputs(rows(1) * 300), outputs=outputs("logits")), "400", "must lie in [0, 1]"),
        (
            lambda c: c.infer(MODEL, inputs(rows(1)), outputs=outputs("logits"), sequence_id="a b"),
            "400",
            "1 to 128 of",
        ),
        (lambda c: c.get_model_metadata("huge"), "404", "no model 'huge'"),
        (lambda c: c.get_model_metadata(MODEL, "7"), "404", "version 1 only"),
        (lambda c: c.get_model_config(MODEL), "404", "no such path"),
        (lambda c: c.infer(MODEL, inputs(rows(1), binary=True)), "400", "binary_data=False"),
        (lambda c: c.infer(MODEL, inputs(rows(1))), "400", "binary outputs are not offered"),
    ],
)
def test_errors_are_readable_in_the_stock_client(
    client: Any, call: Callable[[Any], Any], status: str, said: str
) -> None:
    with pytest.raises(InferenceServerException) as caught:
        call(client)
    assert caught.value.status() == status
    assert said in caught.value.message()


# Connections and signals


def test_a_client_that_hangs_up_while_its_request_runs(server: Running) -> None:
    """The step is finished and kept, by the transaction rule; the server goes on."""
    stream = f"{server.url}/v1/streams/gone"
    assert httpx.put(stream).status_code == 201
    body, given_up = json.dumps({"inputs": gated_rows().tolist()}).encode(), server.given_up()
    head = f"POST /v1/streams/gone/predict HTTP/1.1\r\nHost: test\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=TIMEOUT) as connection:
        connection.sendall(head.encode() + body)
        held = server.held()
    server.wait_for("the end of the request", lambda: server.given_up() == given_up + 1)
    assert server.is_ready(), "the loop is free while a step runs"
    held.close()
    server.wait_for("the step", lambda: httpx.get(stream).json()["version"] == 1)
    assert server.is_ready()
    answer = httpx.post(f"{stream}/predict", json={"inputs": rows(2).tolist()})
    assert answer.json()["version"] == 1
    assert httpx.delete(stream).status_code == 204


def test_a_client_that_hangs_up_while_it_sends(server: Running) -> None:
    assert httpx.put(f"{server.url}/v1/streams/half").status_code == 201
    given_up = server.given_up()
    head = "POST /v1/streams/half/predict HTTP/1.1\r\nHost: test\r\nContent-Length: 1000\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=TIMEOUT) as connection:
        connection.sendall(head.encode() + b'{"inputs": [')
    server.wait_for("the end of the request", lambda: server.given_up() == given_up + 1)
    assert server.is_ready()
    assert httpx.get(f"{server.url}/v1/streams/half").json()["requests"] == 0
    assert httpx.delete(f"{server.url}/v1/streams/half").status_code == 204
    assert "Traceback" not in server.log.read_text()


def test_what_curl_sends(server: Running) -> None:
    """``Expect: 100-continue`` and a chunked body, without a Content-Type."""
    body = json.dumps({"inputs": rows(1).tolist()}).encode()
    head = (
        "POST /v1/streams/curl/predict HTTP/1.1\r\nHost: test\r\nConnection: close\r\n"
        "Transfer-Encoding: chunked\r\nExpect: 100-continue\r\n\r\n"
    )
    assert httpx.put(f"{server.url}/v1/streams/curl").status_code == 201
    with socket.create_connection(("127.0.0.1", server.port), timeout=TIMEOUT) as connection:
        connection.sendall(head.encode())
        assert connection.recv(25) == b"HTTP/1.1 100 Continue\r\n\r\n"
        for start in range(0, len(body), 1000):
            piece = body[start : start + 1000]
            connection.sendall(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
        connection.sendall(b"0\r\n\r\n")
        received = b"".join(iter(lambda: connection.recv(65536), b""))
    assert received.startswith(b"HTTP/1.1 200")
    assert httpx.delete(f"{server.url}/v1/streams/curl").status_code == 204


def test_a_termination_under_load_answers_what_was_taken(tmp_path: Path) -> None:
    with started(tmp_path, 0) as server:
        replies: dict[str, httpx.Response] = {}

        def ask(id: str, x: Tensor) -> None:
            url = f"{server.url}/v1/streams/{id}/predict"
            replies[id] = httpx.post(url, json={"inputs": x.tolist()}, timeout=TIMEOUT)

        ids = ["running", "a", "b", "c"]
        for id in ids:
            httpx.put(f"{server.url}/v1/streams/{id}")
        threads = [
            threading.Thread(target=ask, args=(id, gated_rows() if id == "running" else rows(2)), daemon=True)
            for id in ids
        ]
        threads[0].start()
        held = server.held()
        for thread in threads[1:]:
            thread.start()
        server.wait_for("three waiting requests", lambda: server.metric("tta_requests_waiting") == 3)
        server.process.send_signal(signal.SIGTERM)
        server.wait_for("the wait for open requests", lambda: bool(SHUTTING_DOWN.search(server.log.read_text())))
        assert not server.is_ready(), "nothing new is taken"
        assert replies == {}
        held.close()
        for thread in threads:
            thread.join(TIMEOUT)
        assert {id: reply.status_code for id, reply in replies.items()} == dict.fromkeys(ids, 200)
        assert all(reply.json()["version"] == 0 for reply in replies.values())
        code = server.process.wait(TIMEOUT)
        log = server.log.read_text()
        assert "drained given_up=0" in log
        assert "Traceback" not in log
        assert code == 0, "a termination that went well is a success to systemd, Docker and Kubernetes"


# tta-server check


class Code:
    """What a pickle may do when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Runs the command in this process; returns its exit status."""
    monkeypatch.setattr(sys, "argv", ["tta-server", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return caught.value.code if isinstance(caught.value.code, int) else 0


def model_with(**changes: Any) -> dict[str, Any]:
    base = {"factory": "tests.serving:TinyNetwork", "weights": "tiny.safetensors", "input": {"shape": [3, 8, 8]}}
    return {"models": {MODEL: base | changes}}


def test_check_says_what_was_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "check", str(write_config(tmp_path))) == 0
    said = capsys.readouterr()
    assert said.err == ""
    for found in ("tiny: TinyNetwork", "2 BatchNorm2d", "5", "head, of 8 features", "4 tensors, 28 values", "tent"):
        assert found in said.out


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        (model_with(weights="no/such.safetensors"), "no file 'no/such.safetensors': looked for"),
        (model_with(weights="${TTA_TEST_UNSET}"), "the environment variable TTA_TEST_UNSET is not set"),
        (model_with(weights="narrow.safetensors"), "conv1.weight is [6, 2, 3, 3], the network wants [6, 3, 3, 3]"),
        (model_with(weights="more.safetensors"), "nothing missing, extra.weight not known"),
        (model_with(weights="less.safetensors"), "head.bias missing, nothing not known"),
        (model_with(weights="text.safetensors"), "is not a readable safetensors file"),
        (model_with(weights="code.pt"), "it is refused; save model.state_dict()"),
        (model_with(input={"shape": [1, 8, 8]}), "does not run on inputs of shape [1, 8, 8]"),
        (model_with(input={"shape": [3, 8, 8], "size": 1}), "models.tiny.input.size: Extra inputs"),
        (model_with(classes=["a", "b"]), "names 2 classes, but the model has 5 scores"),
        (model_with(factory="tests.serving:nothing"), "factory 'tests.serving:nothing' failed: AttributeError"),
        (model_with(factory="tests.nowhere:x"), "failed: ModuleNotFoundError"),
        (model_with(factory="tests.serving:load", arguments={"folder": 1}), "the factory 'tests.serving:load' failed"),
        (model_with(head="tail"), "head = 'tail' is no layer of the model"),
        (model_with(policies={"tent": {"rate": 1}}), "the settings of policy 'tent' do not fit"),
        (model_with(policies={"tent": {"lr": -1}}), "lr must lie in [0, inf), got -1"),
        (model_with(policy="magic"), "no policy 'magic'; there are: "),
        ({"server": {"device": "warp"}}, "server.device = 'warp' cannot be used here"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_check_says_what_is_wrong(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    sections: dict[str, Any],
    said: str,
) -> None:
    monkeypatch.delenv("TTA_TEST_UNSET", raising=False)
    config, marker = write_config(tmp_path, **sections), tmp_path / "marker"
    sound = tiny_network().state_dict()
    variants = {
        "narrow": sound | {"conv1.weight": sound["conv1.weight"][:, :2].contiguous()},
        "more": sound | {"extra.weight": torch.zeros(1)},
        "less": {key: value for key, value in sound.items() if key != "head.bias"},
    }
    for name, tensors in variants.items():
        safetensors.torch.save_file(tensors, tmp_path / f"{name}.safetensors")
    (tmp_path / "text.safetensors").write_text("not tensors")
    torch.save({"weights": Code(marker)}, tmp_path / "code.pt")
    assert run(monkeypatch, "check", str(config)) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert said in printed.err
    assert "Traceback" not in printed.err
    listed = "do not fit" in printed.err or "does not fit" in printed.err
    rest = printed.err.splitlines()[1:]
    assert all(line.startswith("  ") for line in rest) if listed else not rest, "one line, but for lists of faults"
    assert not marker.exists(), "nothing of the file was run"


def test_a_pickle_that_runs_code_would_have(tmp_path: Path) -> None:
    """Proves the marker of the test above: plain unpickling does what loading weights must not."""
    pickle.loads(pickle.dumps(Code(tmp_path / "marker")))
    assert (tmp_path / "marker").exists()


def test_the_command_fails_as_a_process_too(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tta_server", "check", str(tmp_path / "missing.yaml")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=START_SECONDS,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(f"error: cannot read the config file {tmp_path / 'missing.yaml'}")
