"""``evaluate`` end to end on a made-up folder and a tiny network, and once on the real one where it is at hand."""

from __future__ import annotations

import importlib
import io
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from numpy.typing import NDArray
from rich.console import Console
from torch import nn

from adapters.tent import Tent
from tta_server.data import load_domains
from tta_server.errors import ConfigError, StepFailed, TtaError, UnknownName
from tta_server.evaluate import EvaluateOptions, PolicyResult, Results, evaluate, results_table

CHECKOUT = Path(__file__).parents[1]
REAL_DATA = CHECKOUT.parent / "shared" / "cifar10c"
CLASSES = 4
DOMAINS = {"gaussian_noise": 30, "fog": 21, "zebra": 12}
"""Rows by domain."""

FACTORY = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, norm, fragile):
        super().__init__()
        self.conv, self.fragile = nn.Conv2d(3, 8, 3), fragile
        self.norm = nn.BatchNorm2d(8) if norm else nn.Identity()
        self.linear = nn.Linear(8, 4)

    def forward(self, x):
        scores = self.linear(torch.relu(self.norm(self.conv(x))).mean((2, 3)))
        return scores.masked_fill(x.mean((1, 2, 3)).gt(0.99)[:, None], torch.nan) if self.fragile else scores

def net(norm=True, fragile=False):
    return Net(norm, fragile)
"""
MODEL: dict[str, Any] = {
    "factory": "evaluate_test_net:net",
    "weights": "net.safetensors",
    "input": {"shape": [3, 6, 6], "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.2, 0.3]},
    "policies": {"tent": {"lr": 0.01}},
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``data`` with three domains, and a config with weights and factory beside it."""
    rng = np.random.default_rng(0)
    (tmp_path / "data").mkdir()
    for shift, (name, rows) in enumerate(DOMAINS.items()):
        images = rng.integers(60 * shift, 130 + 60 * shift, (rows, 6, 6, 3)).astype(np.uint8)
        np.savez(tmp_path / "data" / f"{name}.npz", images=images, labels=rng.integers(CLASSES, size=rows))
    (tmp_path / "evaluate_test_net.py").write_text(FACTORY, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "evaluate_test_net", raising=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        safetensors.torch.save_file(plain_network().state_dict(), tmp_path / "net.safetensors")
    write_config(tmp_path, {"tiny": MODEL})
    return tmp_path


def plain_network(**arguments: bool) -> nn.Module:
    network: nn.Module = importlib.import_module("evaluate_test_net").net(**arguments)
    return network


def write_config(folder: Path, models: dict[str, Any]) -> None:
    (folder / "config.yaml").write_text(yaml.safe_dump({"models": models}, sort_keys=False), encoding="utf-8")


def options_for(folder: Path, **changes: Any) -> EvaluateOptions:
    plain = EvaluateOptions(
        folder / "config.yaml", folder / "data", ("source", "norm", "tent"), batch_size=8, order="domains",
        out=folder / "out" / "run", save_logits=True,
    )  # fmt: skip
    return replace(plain, **changes)


def run(folder: Path, **changes: Any) -> tuple[Results, str]:
    """Evaluates; returns the results and what was printed."""
    printed = io.StringIO()
    return evaluate(options_for(folder, **changes), Console(file=printed, width=120)), printed.getvalue()


def logits_of(out: Path, policy: str) -> dict[str, NDArray[np.float32]]:
    with np.load(out / f"logits_{policy}.npz") as archive:
        return {name: archive[name] for name in archive.files}


def source_scores(network: nn.Module, images: NDArray[np.uint8], settings: dict[str, Any]) -> NDArray[np.float32]:
    """What plain PyTorch says: the network as built, in evaluation mode, all rows at once."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(settings[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        scores: NDArray[np.float32] = network.eval()((x - mean) / std).numpy()
    return scores


def test_results_json_holds_what_was_returned(folder: Path) -> None:
    results, _ = run(folder)
    out = folder / "out" / "run"
    stored = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert stored == asdict(results)
    assert list(stored) == ["policies", "config"]
    assert list(stored["policies"]) == ["source", "norm", "tent"]
    for result in stored["policies"].values():
        assert list(result) == ["mean_error", "per_domain", "per_pass", "seconds", "settings"]
        assert list(result["per_domain"]) == list(DOMAINS)
        assert result["mean_error"] == pytest.approx(sum(result["per_domain"].values()) / 3)
        assert result["per_pass"] == [pytest.approx(result["mean_error"])]
        assert result["seconds"] > 0
    assert stored["policies"]["tent"]["settings"] == asdict(Tent(lr=0.01))
    digest = stored["config"].pop("digest")
    assert len(digest) == 64
    assert stored["config"] == {
        "config": str(folder / "config.yaml"), "data": str(folder / "data"), "order": "domains", "batch_size": 8,
        "seed": 0, "domains": list(DOMAINS), "limit": None, "passes": 1, "severity": 5, "model": "tiny",
        "torch": torch.__version__,
    }  # fmt: skip
    assert (out / "errors.png").read_bytes().startswith(b"\x89PNG")


def test_passes_go_on_without_a_reset(folder: Path) -> None:
    """Two passes are the first one and what comes of it."""
    out = folder / "out" / "run"
    once, _ = run(folder, policies=("source", "tent"))
    first = logits_of(out, "tent")["fog"]
    twice, printed = run(folder, policies=("source", "tent"), passes=2)
    assert np.abs(logits_of(out, "tent")["fog"] - first).max() > 1e-3, "the second pass starts where the first ended"
    source, tent = twice.policies["source"], twice.policies["tent"]
    assert source.per_pass == [once.policies["source"].mean_error] * 2
    assert tent.per_pass[0] == once.policies["tent"].mean_error
    assert tent.mean_error == pytest.approx(sum(tent.per_pass) / 2)
    assert f"{tent.per_pass[1]:.2f}" in printed
    assert (out / "passes.png").read_bytes().startswith(b"\x89PNG")


def test_settings_for_all_policies(folder: Path) -> None:
    results, _ = run(folder, policies=("norm", "tent"), overrides=("window=8", "norm.mode=batch", "tent.lr=1e-2"))
    settings = {name: one.settings for name, one in results.policies.items()}
    assert settings["norm"]["window"] == settings["tent"]["window"] == 8
    assert settings["tent"]["lr"] == 0.01


@pytest.mark.parametrize("order", ["domains", "sorted", "shuffled", "dirichlet:0.1"])
def test_scores_are_in_file_order_whatever_the_order_served(folder: Path, order: str) -> None:
    results, _ = run(folder, order=order, seed=5)
    network = plain_network()
    safetensors.torch.load_model(network, folder / "net.safetensors")
    labels = {domain.name: domain.labels for domain in load_domains(folder / "data")}
    for policy in results.policies:
        scores = logits_of(folder / "out" / "run", policy)
        assert {name: one.shape for name, one in scores.items()} == {n: (rows, CLASSES) for n, rows in DOMAINS.items()}
        for name, one in scores.items():
            assert one.dtype == np.float32
            wrong = (one.argmax(1) != labels[name]).mean()
            assert results.policies[policy].per_domain[name] == pytest.approx(100 * wrong)
    for domain in load_domains(folder / "data"):
        np.testing.assert_allclose(
            logits_of(folder / "out" / "run", "source")[domain.name],
            source_scores(network, domain.images, MODEL["input"]),
            rtol=1e-4,
            atol=1e-5,
        )


def test_limit_and_domains(folder: Path) -> None:
    results, _ = run(folder, limit=5, domains=("zebra", "fog"))
    assert results.config["domains"] == ["zebra", "fog"]
    assert {name: len(one) for name, one in logits_of(folder / "out" / "run", "tent").items()} == {"zebra": 5, "fog": 5}


def test_scores_are_written_only_when_wanted(folder: Path) -> None:
    run(folder, save_logits=False)
    assert sorted(path.name for path in (folder / "out" / "run").iterdir()) == ["errors.png", "results.json"]


def test_adaptation_goes_on_from_domain_to_domain(folder: Path) -> None:
    def fog(**changes: Any) -> dict[str, NDArray[np.float32]]:
        results, _ = run(folder, **changes)
        return {name: logits_of(folder / "out" / "run", name)["fog"] for name in results.policies}

    alone, after = fog(domains=("fog",)), fog(domains=("gaussian_noise", "fog"))
    assert np.array_equal(alone["source"], after["source"])
    assert np.array_equal(alone["norm"], after["norm"]), "norm keeps nothing"
    assert not np.allclose(alone["tent"], after["tent"])


def test_the_seed_fixes_the_scores(folder: Path) -> None:
    def tent(seed: int) -> NDArray[np.float32]:
        run(folder, order="shuffled", seed=seed)
        return logits_of(folder / "out" / "run", "tent")["fog"]

    first = tent(1)
    assert np.array_equal(first, tent(1))
    assert not np.array_equal(first, tent(2))


def test_policies_do_not_disturb_one_another(folder: Path) -> None:
    run(folder, policies=("tent", "norm", "source"))
    together = logits_of(folder / "out" / "run", "tent")
    run(folder, policies=("tent",))
    alone = logits_of(folder / "out" / "run", "tent")
    assert all(np.array_equal(together[name], alone[name]) for name in DOMAINS)


def test_the_table_has_domains_means_and_times(folder: Path) -> None:
    results, printed = run(folder)
    lines = [line for line in printed.splitlines() if line.startswith("│")]
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]
    assert [row[0] for row in cells] == [*DOMAINS, "mean", "seconds per 1,000 images", "time / source"]
    assert cells[3][1:] == [f"{one.mean_error:.2f}" for one in results.policies.values()]
    assert cells[5][1] == "1.00"
    assert str(folder / "out" / "run") in printed.replace("\n", "")


@pytest.mark.parametrize(
    ("policies", "ratios"), [(["source", "tent"], ["1.00", "4.00"]), (["norm", "tent"], ["-", "-"])]
)
def test_times_are_compared_with_source(policies: list[str], ratios: list[str]) -> None:
    results = Results(
        {
            name: PolicyResult(50.0, {"fog": 50.0}, [50.0], seconds, {})
            for name, seconds in zip(policies, (0.5, 2.0), strict=True)
        },
        {"domains": ["fog"], "passes": 1},
    )
    table = results_table(results, images=250)
    columns = [list(column.cells) for column in table.columns[1:]]
    assert [cells[-1] for cells in columns] == ratios
    assert [cells[-2] for cells in columns] == ["2.000", "8.000"]


def test_steps_that_could_not_be_kept_are_told(folder: Path) -> None:
    write_config(folder, {"tiny": MODEL | {"policies": {"tent": {"lr": 1e39}}}})
    _, printed = run(folder)
    assert "tent: 9 of 9 steps could not be kept" in printed


def test_one_of_several_models_is_chosen(folder: Path) -> None:
    write_config(folder, {"tiny": MODEL, "other": MODEL | {"policies": {}}})
    with pytest.raises(ConfigError, match=r"several models, choose one with --model: tiny, other"):
        run(folder)
    with pytest.raises(UnknownName, match=r"no model 'third' in the config; there are: tiny, other"):
        run(folder, model="third")
    results, _ = run(folder, model="other")
    assert results.config["model"] == "other"
    assert results.policies["tent"].settings["lr"] == 0.001


def write_fog(folder: Path, size: int = 6, pixel: int = 0, label: int = 0) -> None:
    images = np.full((2, size, size, 3), pixel, np.uint8)
    np.savez(folder / "data" / "fog.npz", images=images, labels=np.array([0, label]))


def spoil_norm(folder: Path) -> None:
    weights = {key: value for key, value in plain_network(norm=False).state_dict().items() if "norm" not in key}
    safetensors.torch.save_file(weights, folder / "net.safetensors")
    write_config(folder, {"tiny": MODEL | {"arguments": {"norm": False}}})


def spoil_scores(folder: Path) -> None:
    write_fog(folder, pixel=255)
    write_config(folder, {"tiny": MODEL | {"arguments": {"fragile": True}, "input": {"shape": [3, 6, 6]}}})


def spoil_settings(folder: Path) -> None:
    write_config(folder, {"tiny": MODEL | {"policies": {"tent": {"rate": 1}}}})


def nothing(folder: Path) -> None:
    pass


FAULTS: list[tuple[Callable[[Path], None], dict[str, Any], type[TtaError], str]] = [
    (nothing, {"policies": ()}, ConfigError, r"at least one policy"),
    (nothing, {"policies": ("tent", "tent")}, ConfigError, r"policy 'tent' is named twice"),
    (nothing, {"policies": ("mend",)}, UnknownName, r"no policy 'mend'; there are: .*norm.*source.*tent"),
    (spoil_settings, {}, TtaError, r"settings of policy 'tent' do not fit:\n  rate"),
    (nothing, {"batch_size": 0}, ConfigError, r"batch size must be at least 1, got 0"),
    (nothing, {"passes": 0}, ConfigError, r"passes must be at least 1, got 0"),
    (nothing, {"overrides": ("lr",)}, ConfigError, r"given as policy\.setting=value or setting=value.*got 'lr'"),
    (nothing, {"overrides": ("eata.lr=1",)}, ConfigError, r"one of the policies evaluated; got 'eata\.lr=1'"),
    (nothing, {"overrides": ("tent.lr=[",)}, ConfigError, r"cannot read the value '\['"),
    (nothing, {"overrides": ("lr=0.1",)}, TtaError, r"settings of policy 'source' do not fit:\n  lr"),
    (nothing, {"seed": -1}, ConfigError, r"seed must not be negative, got -1"),
    (
        nothing,
        {"order": "random"},
        ConfigError,
        r"no order 'random'; there are: domains, shuffled, sorted, dirichlet:X",
    ),
    (nothing, {"domains": ("mist",)}, ConfigError, r"no domain 'mist' in .*; there are: gaussian_noise, fog, zebra"),
    (nothing, {"data": Path("missing")}, ConfigError, r"no data folder /.*missing"),
    (nothing, {"config": Path("missing")}, ConfigError, r"cannot read the config file missing"),
    (
        partial(write_fog, label=CLASSES),
        {},
        ConfigError,
        r"labels of domain 'fog' run from 0 to 4; the model has the 4 classes 0 to 3",
    ),
    (partial(write_fog, size=8), {}, ConfigError, r"images of domain 'fog' are \[8, 8, 3\].* input shape \[3, 6, 6\]"),
    (spoil_norm, {"policies": ("tent",)}, ConfigError, r"policy 'tent' cannot run on model 'tiny': tent adapts"),
    (spoil_scores, {}, StepFailed, r"policy 'source' did not answer: the scores for these inputs are not finite"),
]


@pytest.mark.parametrize(("spoil", "changes", "kind", "message"), FAULTS)
def test_what_is_wrong_is_said_and_nothing_written(
    folder: Path, spoil: Callable[[Path], None], changes: dict[str, Any], kind: type[TtaError], message: str
) -> None:
    spoil(folder)
    with pytest.raises(kind, match=message):
        run(folder, **changes)
    assert not list(folder.glob("out/run/*"))


def test_the_output_folder_must_be_one(folder: Path) -> None:
    (folder / "out").write_text("a file")
    with pytest.raises(ConfigError, match=r"cannot make the output folder .*out"):
        run(folder)


def test_missing_matplotlib_is_told_before_anything_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"pip install 'tta-server\[plot\]'"):
        run(folder, config=folder / "missing.yaml")


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="needs the CIFAR-10-C extract in ../shared/cifar10c")
def test_source_on_real_data_is_the_plain_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    example = CHECKOUT / "examples" / "cifar10c"
    monkeypatch.setenv("TTA_DATA", str(REAL_DATA))
    monkeypatch.syspath_prepend(example)
    names = ("gaussian_noise", "jpeg_compression")
    options = EvaluateOptions(
        example / "config.yaml", REAL_DATA, ("source",), batch_size=64, order="shuffled", out=tmp_path, limit=200,
        domains=names, save_logits=True,
    )  # fmt: skip
    results = evaluate(options, Console(file=io.StringIO()))
    network: nn.Module = importlib.import_module("resnet_cifar").resnet20()
    network.load_state_dict(safetensors.torch.load_file(REAL_DATA / "resnet20.safetensors"), strict=False)
    served = logits_of(tmp_path, "source")
    normalisation = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    for domain in load_domains(REAL_DATA, names, limit=200):
        plain = source_scores(network, domain.images, normalisation)
        np.testing.assert_allclose(served[domain.name], plain, rtol=1e-4, atol=1e-4)
        assert results.policies["source"].per_domain[domain.name] == 100 * (plain.argmax(1) != domain.labels).mean()
