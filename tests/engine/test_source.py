"""Loading models: what a factory's network may be, what a weights file may hold, and which policies run on it."""

from __future__ import annotations

from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adapters.base import Batch, Source, State, Step
from adapters.norm import NormPolicy
from tests.serving import MODEL, TinyNetwork, tiny_network, write_config
from tta_server import app
from tta_server.engine.engine import initial_state
from tta_server.engine.report import policy_report
from tta_server.engine.source import SourceModel, choose_device, load_model
from tta_server.errors import ConfigError
from tta_server.policies import make_policy
from tta_server.settings import load_settings
from tta_server.state.slots import Layout


class Frozen(TinyNetwork):
    """As many networks made for inference have it."""

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Tuple(TinyNetwork):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), x


class Named(TinyNetwork):
    def forward(self, x: Tensor) -> Any:
        return {"logits": super().forward(x)}


class Raising(TinyNetwork):
    def forward(self, x: Tensor) -> Tensor:
        raise KeyError("labels\nare needed")


class Squeezing(TinyNetwork):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).squeeze(0)


class Mixing(TinyNetwork):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(0, keepdim=True))


def half() -> nn.Module:
    """All of it in float16."""
    return TinyNetwork().half()


def untracked() -> nn.Module:
    """Its batch norms keep no running statistics."""
    network = TinyNetwork()
    network.bn1, network.bn2 = (nn.BatchNorm2d(n, track_running_stats=False) for n in (6, 8))
    return network


def load(folder: Path, factory: Callable[[], nn.Module], weights: Any = None, **settings: Any) -> SourceModel:
    """The network of ``factory``, with its weights of ``tiny_network`` as far as it has them."""
    if weights is None:
        own, sound = factory().state_dict(), tiny_network().state_dict()
        weights = {key: sound[key].to(value.dtype) for key, value in own.items()}
    torch.save(weights, folder / "weights.pt")
    return read(folder, factory=f"{__name__}:{factory.__name__}", **settings)


def read(folder: Path, **settings: Any) -> SourceModel:
    base = {"factory": "tests.serving:TinyNetwork", "weights": "weights.pt", "input": {"shape": [3, 8, 8]}}
    config = write_config(folder, models={MODEL: base | settings})
    return load_model(MODEL, load_settings(config), torch.device("cpu"))


def fault(read_it: Callable[[], object]) -> str:
    """The message with which a model is refused, one line."""
    with pytest.raises(ConfigError) as caught:
        read_it()
    said = str(caught.value)
    assert "\n" not in said
    return said


# Networks


@pytest.mark.parametrize(
    ("factory", "said"),
    [
        (Tuple, "the model returns a tuple; it must return the scores alone, a tensor [rows, classes]"),
        (Named, "the model returns a dict; it must return the scores alone, a tensor [rows, classes]"),
        (Raising, "the model does not run on inputs of shape [3, 8, 8]: KeyError: 'labels"),
        (Squeezing, "the scores must be [rows, values], got [5] for 1 rows"),
        (Mixing, "rows influence one another in this model"),
    ],
)
def test_networks_that_cannot_be_served(tmp_path: Path, factory: Callable[[], nn.Module], said: str) -> None:
    assert said in fault(lambda: load(tmp_path, factory))


def test_batch_norms_without_running_statistics_can_be_served(tmp_path: Path) -> None:
    model = load(tmp_path, untracked)
    assert model.norm_layers == {"BatchNorm2d": 2}
    assert model.source.statistics == ()
    assert policy_report("tent", model)["runs"]
    assert policy_report("norm", model)["reason"].startswith("norm re-estimates batch-norm statistics")


# Weights


def test_a_checkpoint_is_told_from_a_state_dict(tmp_path: Path) -> None:
    state = tiny_network().state_dict()
    said = fault(lambda: load(tmp_path, TinyNetwork, {"state_dict": state, "epoch": 3}))
    assert "its entry 'state_dict' is of type " in said
    assert said.endswith("save checkpoint['state_dict']")
    said = fault(lambda: load(tmp_path, TinyNetwork, {"epoch": 3, "optimizer": {"lr": 0.1}, "net": dict(state)}))
    assert "its entry 'epoch' is of type int" in said
    assert said.endswith("save checkpoint['net']")
    assert fault(lambda: load(tmp_path, TinyNetwork, {"epoch": 3})).endswith("save model.state_dict()")
    assert "got list; save model.state_dict()" in fault(lambda: load(tmp_path, TinyNetwork, [1]))


@pytest.mark.parametrize("content", [b"hello weights\n", b"", b"PK\x03\x04 is how an archive starts", b"e\n"])
def test_a_file_that_is_no_weights(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "weights.pt").write_bytes(content)
    said = fault(lambda: read(tmp_path))
    assert "weights.pt" in said
    assert "save model.state_dict(), best as safetensors" in said


def test_a_whole_model_is_refused_without_advice_to_load_it_anyway(tmp_path: Path) -> None:
    said = fault(lambda: load(tmp_path, TinyNetwork, tiny_network()))
    assert "it holds tests.serving.TinyNetwork" in said
    assert "may run code when loaded, so it is refused; save model.state_dict()" in said
    assert "weights_only" not in said


@pytest.mark.parametrize("device", ["meta", "mps:0", "warp", "cuda:99"])
def test_devices_that_cannot_be_used(device: str) -> None:
    assert f"server.device = {device!r} cannot be used here: " in fault(lambda: choose_device(device))


def test_devices_that_can() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type in ("cpu", "cuda")


# Which policies run


def test_a_policy_that_runs(tmp_path: Path) -> None:
    model = load(tmp_path, TinyNetwork)
    size = Layout(initial_state(make_policy("tent", {}), model)).bytes
    before = {key: value.clone() for key, value in model.source.weights.items()}
    assert policy_report("tent", model) == {"name": "tent", "runs": True, "bytes_per_stream": size}
    assert all(torch.equal(value, model.source.weights[key]) for key, value in before.items())


def test_a_policy_is_tried_before_it_is_said_to_run(tmp_path: Path) -> None:
    frozen = load(tmp_path, Frozen)
    assert policy_report("norm", frozen)["runs"]
    report = policy_report("tent", frozen)
    assert not report["runs"]
    assert report["reason"].startswith("its step fails: RuntimeError: ")
    assert "\n" not in report["reason"]


def test_a_step_that_is_not_finite_does_not_run(tmp_path: Path) -> None:
    """Adam's eps is 0 in float16."""
    model = load(tmp_path, half)
    assert policy_report("tent", model) == {"name": "tent", "runs": False, "reason": "its step is not finite"}
    plain = load(tmp_path, half, policies={"tent": {"optimiser": "sgd"}})
    assert policy_report("tent", plain)["runs"], "it is the preset that is tried"


Rule = Generator[Tensor, None, Step]


def one_row(self: NormPolicy, source: Source, state: State, batch: Batch) -> Rule:
    yield batch.forward(state.weights, batch.x).logits[:1]
    return Step(state)


def twice(self: NormPolicy, source: Source, state: State, batch: Batch) -> Rule:
    for _ in range(2):
        yield batch.forward(state.weights, batch.x).logits
    return Step(state)


def no_memory(self: NormPolicy, source: Source, state: State, batch: Batch) -> Rule:
    yield batch.forward(state.weights, batch.x).logits
    return Step(State({}, {}))


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        (one_row, "yields [1, 5] for 4 rows and 5 classes"),
        (twice, "yielded a second time"),
        (no_memory, "keys changed"),
    ],
)
def test_a_policy_that_breaks_the_contract(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rule: Callable[..., Rule], reason: str
) -> None:
    model = load(tmp_path, TinyNetwork, policies={"norm": {"mode": "running"}})
    assert policy_report("norm", model)["runs"]
    monkeypatch.setattr(NormPolicy, "step", rule)
    report = policy_report("norm", model)
    assert not report["runs"]
    assert reason in report["reason"]


def test_the_server_does_not_start_with_a_default_that_cannot_run(tmp_path: Path) -> None:
    load(tmp_path, Frozen)
    settings = load_settings(tmp_path / "config.yaml")
    models = app.load_models(settings)
    assert {name: report["runs"] for name, report in models[MODEL].reports.items() if name in ("source", "tent")} == {
        "source": True,
        "tent": False,
    }
    said = fault(lambda: app.create_app(settings, models))
    assert said.startswith("model 'tiny' cannot have policy 'tent' as its own: its step fails: RuntimeError")
    assert "set models.tiny.policy to one that runs: " in said
