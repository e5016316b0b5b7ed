"""``tta-server check``: what it prints of models that need a word."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.serving import MODEL, TinyNetwork, write_config
from tta_server import cli


class Frozen(TinyNetwork):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Instance(TinyNetwork):
    """With a norm layer of torch's that is not replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.InstanceNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.extra(x))


def check(folder: Path, monkeypatch: pytest.MonkeyPatch, factory: type[nn.Module], **settings: Any) -> int:
    """Runs the command in this process; returns its exit status."""
    torch.save(factory().state_dict(), folder / "weights.pt")
    model = {"factory": f"{__name__}:{factory.__name__}", "weights": "weights.pt", "input": {"shape": [3, 8, 8]}}
    config = write_config(folder, models={MODEL: model | settings})
    monkeypatch.setattr(sys, "argv", ["tta-server", "check", str(config)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return caught.value.code if isinstance(caught.value.code, int) else 0


def test_a_policy_that_does_not_run_is_in_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check(tmp_path, monkeypatch, Frozen, policy="source") == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("│ tent"))
    assert "no" in row
    assert "its step fails" in row


def test_the_table_is_printed_before_the_default_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check(tmp_path, monkeypatch, Frozen) == 1
    said = capsys.readouterr()
    assert "its step fails" in said.out
    assert said.err.startswith("error: model 'tiny' cannot have policy 'tent' as its own: its step fails: ")
    assert "set models.tiny.policy to one that runs: " in said.err
    running = said.err.rpartition(": ")[2].strip().split(", ")
    assert {"norm", "source"} <= set(running)
    assert not {"tent", "eta", "sar"} & set(running), "they need gradients, which this model does not give"


def test_layers_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(tmp_path, monkeypatch, Instance) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "extra (InstanceNorm2d): of a type that streams cannot adapt yet; stays as trained" in said


@pytest.mark.parametrize("port", ["-1", "65536"])
def test_ports_that_there_are_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], port: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["tta-server", "serve", "nowhere.yaml", "--port", port])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    assert "--port" in capsys.readouterr().err
