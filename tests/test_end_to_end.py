"""The command line, and the end of a server that it started."""

from __future__ import annotations

import hashlib
import pickle
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
import safetensors.torch
import torch
from torch import Tensor

from tests.e2e.process import ROOT, START_SECONDS, gated_rows, started
from tests.serving import MODEL, TIMEOUT, rows, tiny_network, write_config
from tta_server import cli

SHUTTING_DOWN = re.compile("Shutting down.*(Waiting for|Cancel)", re.DOTALL)
"""What uvicorn logs when it has stopped listening, and waits for open requests or gives them up."""


def test_a_termination_under_load_answers_what_was_taken(tmp_path: Path) -> None:
    with started(tmp_path) as running:
        replies: dict[str, httpx.Response] = {}

        def ask(id: str, x: Tensor) -> None:
            replies[id] = running.http.post(f"/v1/streams/{id}/predict", json={"inputs": x.tolist()})

        ids = ["running", "a", "b", "c"]
        for id in ids:
            assert running.http.put(f"/v1/streams/{id}").status_code == 201
        threads = [
            threading.Thread(target=ask, args=(id, gated_rows() if id == "running" else rows(2)), daemon=True)
            for id in ids
        ]
        with running.connect():  # a connection that asks nothing is waited for by nobody
            threads[0].start()
            held = running.held()
            for thread in threads[1:]:
                thread.start()
            running.wait_for("three waiting requests", lambda: running.metric("tta_requests_waiting") == 3)
            running.process.send_signal(signal.SIGTERM)
            running.wait_for("the wait for open requests", lambda: bool(SHUTTING_DOWN.search(running.log)))
            assert not running.is_ready(), "nothing new is taken"
            assert replies == {}
            held.close()
            for thread in threads:
                thread.join(TIMEOUT)
            assert {id: reply.status_code for id, reply in replies.items()} == dict.fromkeys(ids, 200)
            assert all(reply.json()["version"] == 0 for reply in replies.values())
            code = running.process.wait(TIMEOUT)
        assert "drained given_up=0" in running.log
        assert "Traceback" not in running.log
        assert code == 0, "a termination that went well is a success to systemd, Docker and Kubernetes"


# Refusals to start


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs the command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "tta_server", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=START_SECONDS,
        check=False,
    )


def test_others_are_not_served_without_tokens(tmp_path: Path) -> None:
    done = command("serve", str(write_config(tmp_path)), "--host", "0.0.0.0", "--port", "0")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: others can reach 0.0.0.0, and anybody who does could use every stream: ")
    for way_out in ("auth.tokens", "auth.file", "tta-server token", "--insecure"):
        assert way_out in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_file_that_is_no_certificate(tmp_path: Path) -> None:
    tls = {"certificate": "config.yaml", "key": "config.yaml"}
    done = command("serve", str(write_config(tmp_path, server={"device": "cpu", "port": 0, "tls": tls})))
    assert done.returncode == 1
    assert "error: server.tls cannot be used: " in done.stderr
    assert "Traceback" not in done.stderr


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = command("serve", str(write_config(tmp_path)), "--port", str(taken.getsockname()[1]))
    assert done.returncode != 0
    assert "Address already in use" in done.stderr
    assert re.search(r"error: cannot listen on 127.0.0.1 port \d+", done.stderr)
    assert "Traceback" not in done.stderr


def test_the_command_fails_in_one_line(tmp_path: Path) -> None:
    done = command("check", str(tmp_path / "missing.yaml"))
    assert done.returncode == 1
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(f"error: cannot read the config file {tmp_path / 'missing.yaml'}")


# tta-server token


def test_a_token_and_its_digest(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    made = set()
    for _ in range(2):
        assert run(monkeypatch, "token") == 0
        found = re.fullmatch(r"token:  ([\w-]{43})\nsha256: ([0-9a-f]{64})\n", capsys.readouterr().out)
        assert found
        assert found[2] == hashlib.sha256(found[1].encode()).hexdigest()
        made.add(found[1])
    assert len(made) == 2, "each is another"


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
