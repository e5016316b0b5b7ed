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


class NoNorms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(torch.relu(self.conv(x)).mean((2, 3)))
        return scores


def test_all_weights_adapt_without_norm_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """There is nothing for tent, but all that CoTTA needs."""
    assert check(tmp_path, monkeypatch, NoNorms, policy="cotta") == 0
    rows = {line.split()[1]: line.split()[3] for line in capsys.readouterr().out.splitlines() if line.startswith("│")}
    assert (rows["tent"], rows["cotta"], rows["petal"]) == ("no", "yes", "yes")


class Stiff(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> Tensor:
        raise RuntimeError("no way back")


class OneWay(TinyNetwork):
    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = Stiff.apply(super().forward(x))  # type: ignore[no-untyped-call]
        return scores


@pytest.mark.parametrize("window", [0, 64])
def test_a_step_that_fails_in_its_backward_pass_is_found_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], window: int
) -> None:
    """Also where the few rows of the trial do not fill the policy's window."""
    assert check(tmp_path, monkeypatch, OneWay, policies={"tent": {"window": window}}) == 1
    assert "no way back" in capsys.readouterr().err
