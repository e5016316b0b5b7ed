"""``tta-server prepare``: what it computes, against a few lines of plain torch, and its manners."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from torch import Tensor, nn

from adapters.rmt import warm_up
from tta_server.cli import main
from tta_server.data import load_source_images
from tta_server.demo.network import digits_network
from tta_server.demo.run import CONFIG
from tta_server.drift.estimators import Head, make_estimates
from tta_server.drift.reference import Reference
from tta_server.engine.engine import initial_state
from tta_server.engine.source import SourceModel, load_model
from tta_server.errors import BadInput, ConfigError, TtaError
from tta_server.policies import make_policy
from tta_server.prepare import GROUPS, PrepareOptions, batch_sizes, prepare
from tta_server.settings import InputSettings, load_settings

MEAN, STD, CLASSES = 0.3049, 0.3754, tuple(map(str, range(10)))


def load(config: Path) -> SourceModel:
    return load_model("digits", load_settings(config), torch.device("cpu"))


def run(options: PrepareOptions) -> str:
    said = io.StringIO()
    prepare(options, Console(file=said, width=200))
    return said.getvalue()


@pytest.fixture
def folder(prepared_digits: Path, tmp_path: Path) -> Path:
    """A copy of the prepared folder, to do things to."""
    copied = tmp_path / "digits"
    shutil.copytree(prepared_digits.parent, copied)
    return copied


@pytest.fixture(scope="module")
def data(prepared_digits: Path) -> tuple[Tensor, Tensor]:
    """The source images as the network sees them, normalised, and their labels."""
    with np.load(prepared_digits.parent / "source_train.npz") as file:
        x = torch.from_numpy(file["images"]).permute(0, 3, 1, 2).float() / 255
        return (x - MEAN) / STD, torch.from_numpy(file["labels"])


@pytest.fixture
def network() -> nn.Module:
    """The digits network as it was trained."""
    made = digits_network()
    made.load_state_dict(safetensors.torch.load_file(CONFIG.with_name("digits.safetensors")))
    return made.eval()


@pytest.fixture(scope="module")
def made(prepared_digits: Path) -> dict[str, Tensor]:
    return dict(load(prepared_digits).source.artefacts)


def head_of(network: nn.Module) -> nn.Linear:
    return [one for one in network.modules() if isinstance(one, nn.Linear)][-1]


def features_of(network: nn.Module, x: Tensor) -> Tensor:
    seen: list[Tensor] = []
    hook = head_of(network).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        network(x)
    hook.remove()
    return seen[0]


def by_batch(network: nn.Module) -> nn.Module:
    """The network with batch norms that use the batch's statistics alone."""
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.track_running_stats, layer.running_mean, layer.running_var = False, None, None
    return network


def batches_of(data: tuple[Tensor, Tensor], count: int, size: int = 64) -> Iterator[tuple[Tensor, Tensor]]:
    """The documented order: one random permutation of the seed, cut into batches."""
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(data[0])))[:count]
    for chosen in order.split(size):
        yield data[0][chosen], data[1][chosen]


def test_all_groups_are_there(prepared_digits: Path) -> None:
    model = load(prepared_digits)
    assert model.prepared.keys() == GROUPS.keys()
    assert {key.partition("/")[0] for key in model.source.artefacts} == set(GROUPS)
    assert model.prepared["fisher"]["batch_size"] == 64
    assert model.prepared["fisher"]["images"] == 1000, "fewer than the 2,000 wanted, as there are no more"
    assert all(value.isfinite().all() for value in model.source.artefacts.values())


def test_fisher(made: dict[str, Tensor], network: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    """Mean over batches of the squared gradient of the mean cross entropy to the model's own labels."""
    by_batch(network)
    total: dict[str, Tensor] = {}
    norms = {name for name, one in network.named_modules() if isinstance(one, nn.BatchNorm2d)}
    batches = list(batches_of(data, 1000))
    for x, _ in batches:
        network.zero_grad()
        logits = network(x)
        F.cross_entropy(logits, logits.argmax(1)).backward()
        for key, parameter in network.named_parameters():
            if key.rpartition(".")[0] in norms:
                assert parameter.grad is not None
                total[key] = total.get(key, torch.zeros(())) + parameter.grad**2 / len(batches)
    found = {key.removeprefix("fisher/"): value for key, value in made.items() if key.startswith("fisher/")}
    assert found.keys() == total.keys()
    for key, value in total.items():
        torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-7)


def test_prototypes_are_class_means_under_batch_statistics(
    made: dict[str, Tensor], network: nn.Module, data: tuple[Tensor, Tensor]
) -> None:
    """[6.6] Each equals the mean of its class, and is its own nearest."""
    by_batch(network)
    rows = [(features_of(network, x), labels) for x, labels in batches_of(data, 1000)]
    features, labels = torch.cat([one for one, _ in rows]), torch.cat([one for _, one in rows])
    for label in range(10):
        own = features[labels == label]
        torch.testing.assert_close(made["prototypes/mean"][label], own.mean(0), rtol=1e-4, atol=1e-5)
        assert made["prototypes/counts"][label] == len(own)
    unit = F.normalize(made["prototypes/mean"], dim=1)
    assert (unit @ unit.T).argmax(1).tolist() == list(range(10))


def test_features(made: dict[str, Tensor], network: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    features = features_of(network, data[0]).double()
    torch.testing.assert_close(made["features/mean"].double(), features.mean(0), rtol=1e-4, atol=1e-5)
    centred = features.clone()
    for label in range(10):
        own = features[data[1] == label]
        centred[data[1] == label] -= own.mean(0)
        torch.testing.assert_close(made["features/class_mean"][label].double(), own.mean(0), rtol=1e-4, atol=1e-5)
        wanted = torch.cov(own.T, correction=0)
        torch.testing.assert_close(made["features/class_covariance"][label].double(), wanted, rtol=1e-3, atol=1e-5)
    wanted = centred.T @ centred / len(centred)
    torch.testing.assert_close(made["features/covariance"].double(), wanted, rtol=1e-3, atol=1e-5)


def test_prior_and_calibration(made: dict[str, Tensor], network: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    with torch.no_grad():
        logits = network(data[0])
    torch.testing.assert_close(made["prior/labels"].float(), torch.bincount(data[1]).float() / 1000)
    torch.testing.assert_close(made["prior/predicted"].float(), logits.softmax(1).mean(0), rtol=1e-4, atol=1e-5)
    order = torch.from_numpy(np.random.default_rng(0).permutation(1000))
    torch.testing.assert_close(made["calibration/logits"], logits[order], rtol=1e-4, atol=1e-4)
    assert torch.equal(made["calibration/labels"], data[1][order])


def test_the_monitors_reference_is_of_the_sources_own_view(
    made: dict[str, Tensor], network: nn.Module, data: tuple[Tensor, Tensor]
) -> None:
    """Its tables are of the source's signals on clean requests, whose mean hardly depends on which were drawn."""
    with torch.no_grad():
        logits = network(data[0])
    order = np.random.default_rng(0).permutation(1000)
    predicted = logits.argmax(1)
    torch.testing.assert_close(made["monitoring/predicted"].float(), torch.bincount(predicted).float() / 1000)
    reference = Reference.of_tensors(
        {key.partition("/")[2]: value.numpy() for key, value in made.items() if key.startswith("monitoring/")}
    )
    held = logits[order[500:]]
    confidence = held.softmax(1).amax(1).mean().item()
    low, high = reference.bands(64)["confidence"]
    assert (low + high) / 2 == pytest.approx(confidence, abs=0.005)
    assert reference.features.mean.shape == (10, made["prototypes/mean"].shape[1])
    assert reference.sizes.tolist() == [1, 2, 4, 8, 16, 32, 64, 128], "half of the 500 that are drawn from, at most"


def test_estimates_are_of_the_sources_own_view(
    made: dict[str, Tensor], network: nn.Module, data: tuple[Tensor, Tensor]
) -> None:
    """As made of plain torch's scores and features; and small."""
    with torch.no_grad():
        logits, features = network(data[0]).numpy(), features_of(network, data[0]).numpy()
    order, layer = np.random.default_rng(0).permutation(1000), head_of(network)
    head = Head(layer.weight.detach().numpy(), layer.bias.detach().numpy())
    expected = make_estimates(logits[order], features[order], data[1].numpy()[order], head).tensors()
    stored = {key.partition("/")[2]: value for key, value in made.items() if key.startswith("estimates/")}
    assert stored.keys() == expected.keys()
    for name, value in stored.items():
        np.testing.assert_allclose(value.numpy(), expected[name], rtol=1e-3, atol=1e-3, err_msg=name)
    assert sum(value.nbytes for value in stored.values()) < 100_000


def test_estimates_say_what_they_rest_on(folder: Path) -> None:
    """The network gets none of its training digits wrong; 150 are too few; and none but asked-for images are used."""
    options = PrepareOptions(folder / "config.yaml", folder, only=("estimates",), force=True, calibration_images=300)
    assert "estimates: of 300 clean images the model gets 0 wrong, too few" in run(options)
    assert load(folder / "config.yaml").prepared["estimates"]["images"] == 300
    with pytest.raises(ConfigError, match=r"estimates needs at least 200 clean images, and is to take 150 from"):
        run(replace(options, calibration_images=150))


def test_replay_images_are_source_images(made: dict[str, Tensor], prepared_digits: Path) -> None:
    with np.load(prepared_digits.parent / "source_train.npz") as file:
        order = np.random.default_rng(0).permutation(1000)[:200]
        assert np.array_equal(made["replay/images"].numpy().transpose(0, 2, 3, 1), file["images"][order])
        assert np.array_equal(made["replay/labels"].numpy(), file["labels"][order])
    assert made["replay/images"].dtype == torch.uint8


def test_warm_up(made: dict[str, Tensor], network: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    """16 steps of torch's Adam on SCE(student, teacher), its learning rate rising from lr/16 to lr, teacher behind."""
    student, teacher = by_batch(network), by_batch(digits_network().eval())
    teacher.load_state_dict({key: value.clone() for key, value in student.state_dict().items()})
    batches = list(batches_of(data, 1000))
    optimiser = torch.optim.Adam(student.parameters(), lr=1e-3)
    for step, (x, _) in enumerate(batches, 1):
        optimiser.param_groups[0]["lr"] = 1e-3 * step / len(batches)
        p = student(x)
        with torch.no_grad():
            q = teacher(x)
        loss = (F.cross_entropy(p, q.softmax(1)) + F.cross_entropy(q, p.softmax(1))) / 2
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        with torch.no_grad():
            for slow, fast in zip(teacher.parameters(), student.parameters(), strict=True):
                slow.copy_(0.999 * slow + 0.001 * fast)
    assert len(batches) == 16
    start = safetensors.torch.load_file(CONFIG.with_name("digits.safetensors"))
    for key, value in student.named_parameters():
        found = made[f"warmup/weights.{key}"][0]
        moved = (value.detach() - start[key]).norm()
        assert moved > 0
        assert (found - value.detach()).norm() < 0.05 * moved + 1e-6, key
    for key, value in teacher.named_parameters():
        torch.testing.assert_close(made[f"warmup/memory.teacher.{key}"][0], value.detach(), rtol=1e-3, atol=1e-5)
    assert made["warmup/memory.adam.step"].tolist() == [16]


def test_policies_start_from_the_warm_up(prepared_digits: Path) -> None:
    model = load(prepared_digits)
    for scope, group in (("all", "warmup"), ("norm", "warmup_norm")):
        state = initial_state(make_policy("rmt", {"scope": scope}), model)
        for key, value in state.weights.items():
            assert torch.equal(value, model.source.artefacts[f"{group}/weights.{key}"])
    with pytest.raises(
        ValueError, match=r"another optimiser than sgd.*prepare CONFIG --data DIR --only warmup --force"
    ):
        initial_state(make_policy("rmt", {"optimiser": "sgd"}), model)


@pytest.mark.parametrize(
    ("policy", "settings", "missing"),
    [
        ("eata", {}, "fisher"),
        ("rmt", {}, "prototypes,replay,warmup"),
        ("rmt", {"lambda_source": 0}, "prototypes,warmup"),
        ("rmt", {"lambda_source": 0, "scope": "norm"}, "prototypes,warmup_norm"),
    ],
)
def test_what_is_missing_is_refused_with_the_command(policy: str, settings: dict[str, Any], missing: str) -> None:
    """On the demo's model, which has no artefacts."""
    with pytest.raises(ValueError, match=rf"run: tta-server prepare CONFIG --data DIR --only {missing}$"):
        initial_state(make_policy(policy, settings), load(CONFIG))


def test_what_is_there_is_not_made_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "made.safetensors"
    before = path.read_bytes()
    options = PrepareOptions(folder / "config.yaml", folder, only=("fisher", "prior"))
    said = run(options)
    assert "fisher: there already" in said
    assert path.read_bytes() == before
    run(replace(options, force=True, batch_size=50, fisher_images=100))
    with safetensors.safe_open(path, framework="pt") as file:
        how = json.loads(file.metadata()["made"])
    assert (how["fisher"]["batch_size"], how["fisher"]["images"]) == (50, 100)
    assert how["replay"]["batch_size"] == 64
    assert how.keys() == GROUPS.keys()


def test_a_stopped_warm_up_goes_on_where_it_was(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after 9 of 16 steps, it takes 7 more, and ends where the whole one did, bit for bit."""
    whole = load(folder / "config.yaml").source.artefact("warmup")
    (folder / "made.safetensors").unlink()
    options = PrepareOptions(folder / "config.yaml", folder, only=("warmup",), warm_up_images=1000)
    taken = [0]

    def counted(*arguments: Any) -> Any:
        if taken[0] == 9:
            raise KeyboardInterrupt
        taken[0] += 1
        return warm_up(*arguments)

    monkeypatch.setattr("tta_server.prepare.SAVE_SECONDS", 0.0)
    monkeypatch.setattr("tta_server.prepare.warm_up", counted)
    with pytest.raises(KeyboardInterrupt):
        run(options)
    unfinished = folder / "made.safetensors.unfinished"
    assert unfinished.is_file()
    taken[0] = 2
    run(options)
    assert taken[0] == 9
    assert not unfinished.exists()
    again = load(folder / "config.yaml").source.artefact("warmup")
    assert again.keys() == whole.keys()
    assert all(torch.equal(again[key], value) for key, value in whole.items())


@pytest.mark.parametrize("change", ["images", "batch", "settings", "data"])
def test_a_stopped_warm_up_goes_on_under_equal_conditions_only(
    folder: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """More images to go through, another batch size or optimiser, other images of the same name: it starts over."""
    (folder / "made.safetensors").unlink()
    options = PrepareOptions(folder / "config.yaml", folder, only=("warmup_norm",), warm_up_images=320)
    calls: list[float] = []

    def counted(*arguments: Any) -> Any:
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(arguments[-1])
        return warm_up(*arguments)

    monkeypatch.setattr("tta_server.prepare.SAVE_SECONDS", 0.0)
    monkeypatch.setattr("tta_server.prepare.warm_up", counted)
    with pytest.raises(KeyboardInterrupt):
        run(options)
    if change == "images":
        options = replace(options, warm_up_images=384)
    elif change == "batch":
        options = replace(options, batch_size=160)
    elif change == "settings":
        config = (folder / "config.yaml").read_text()
        (folder / "config.yaml").write_text(config.replace("    policies:\n", "    preset: imagenet\n    policies:\n"))
        assert "preset" in (folder / "config.yaml").read_text()
    else:
        with np.load(folder / "source_train.npz") as file:
            images, labels = file["images"], file["labels"]
        np.savez(folder / "source_train.npz", images=255 - images, labels=labels)
    calls[:] = [0.0] * 4
    run(options)
    steps = {"images": 6, "batch": 2}.get(change, 5)
    assert calls[4:] == [pytest.approx(step / steps) for step in range(1, steps + 1)]


@pytest.mark.parametrize("labels", [np.zeros((9, 1), np.int64), np.array(["a"] * 9), np.full(9, 3.7)], ids=str)
def test_labels_that_are_none(folder: Path, labels: Any) -> None:
    with np.load(folder / "source_train.npz") as file:
        np.savez(folder / "odd.npz", images=file["images"][:9], labels=labels)
    with pytest.raises(ConfigError, match=r"must be whole numbers \[rows\]"):
        run(PrepareOptions(folder / "config.yaml", folder / "odd.npz"))


def test_a_wrong_setting_is_told_before_anything_is_computed(folder: Path) -> None:
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace("    policies:\n", "    policies:\n      eata: {lrr: 1}\n"))
    (folder / "made.safetensors").unlink()
    with pytest.raises(BadInput, match="eata"):
        run(PrepareOptions(folder / "config.yaml", folder))
    assert not (folder / "made.safetensors").exists()


def test_artefacts_of_another_model_are_refused(folder: Path) -> None:
    """With both digests and what to do."""
    path = folder / "made.safetensors"
    with safetensors.safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    digest = load(folder / "config.yaml").digest
    safetensors.torch.save_file(tensors, path, metadata | {"digest": "ab" * 32})
    with pytest.raises(ConfigError, match=f"belong to another model.*{'ab' * 8}.*{digest[:16]}"):
        load(folder / "config.yaml")
    safetensors.torch.save_file(tensors, path, {"format": "something else"})
    with pytest.raises(ConfigError, match="no artefact file of this version"):
        load(folder / "config.yaml")
    path.write_bytes(b"not a file of tensors")
    with pytest.raises(ConfigError, match="cannot read the artefacts"):
        load(folder / "config.yaml")


def test_images_without_labels(folder: Path) -> None:
    """Groups that need labels are left out, with a word; asked for, they are refused."""
    with np.load(folder / "source_train.npz") as file:
        np.savez(folder / "unlabelled.npz", images=file["images"][:80])
    (folder / "made.safetensors").unlink()
    options = PrepareOptions(folder / "config.yaml", folder / "unlabelled.npz", warm_up_images=128)
    said = run(options)
    assert "prototypes: left out" in said
    assert "monitoring: left out, as it needs at least 200 clean images" in said
    assert "estimates: left out, as it needs labels" in said
    assert "rmt still needs prototypes, replay" in " ".join(said.split())
    model = load(folder / "config.yaml")
    assert set(model.prepared) == {"fisher", "prior", "warmup"}
    assert "prior/labels" not in model.source.artefacts
    with pytest.raises(ConfigError, match="replay needs labels"):
        run(replace(options, only=("replay",)))


def test_a_class_without_images_has_no_prototype(folder: Path) -> None:
    with np.load(folder / "source_train.npz") as file:
        some = file["labels"] != 3
        np.savez(folder / "some.npz", images=file["images"][some], labels=file["labels"][some])
    run(PrepareOptions(folder / "config.yaml", folder / "some.npz", only=("prototypes", "features"), force=True))
    made = load(folder / "config.yaml").source.artefacts
    assert made["prototypes/counts"][3] == 0
    assert all(value.isfinite().all() for value in made.values())


def test_folders_of_image_files(tmp_path: Path) -> None:
    """One subfolder per class, by the classes' names or in their order; images of other sizes are scaled and cut."""
    spec = InputSettings(shape=(3, 8, 6))
    for name, colour in (("dog", (255, 0, 0)), ("cat", (0, 0, 255))):
        (tmp_path / name).mkdir()
        for index, size in enumerate(((6, 8), (60, 30), (13, 40))):
            Image.new("RGB", size, colour).save(tmp_path / name / f"{index}.png")
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    named = load_source_images(tmp_path, spec, ("dog", "cat"), 100, 0)
    images, labels = named.take(np.arange(6))
    assert images.shape == (6, 8, 6, 3)
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert (images[:3] == (255, 0, 0)).all()
    assert load_source_images(tmp_path, spec, ("x", "y"), 100, 0).take(np.array([0]))[0][0, 0, 0].tolist() == [
        0,
        0,
        255,
    ]
    some = load_source_images(tmp_path, spec, ("dog", "cat"), 4, 0)
    assert len(some) == 4
    with pytest.raises(ConfigError, match="2 subfolders for the model's 3 classes"):
        load_source_images(tmp_path, spec, ("a", "b", "c"), 100, 0)
    (tmp_path / "cat" / "broken.png").write_bytes(b"no image")
    with pytest.raises(ConfigError, match=r"cannot read the image .*broken\.png"):
        load_source_images(tmp_path, spec, ("dog", "cat"), 100, 0).take(np.arange(7))


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        ({"only": ("magic",)}, BadInput, "no artefact group 'magic'; there are: fisher, prototypes"),
        ({"data": Path("nowhere")}, ConfigError, "no source data .*nowhere"),
        ({"model": "other"}, TtaError, "no model 'other'"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(folder: Path, change: dict[str, Any], kind: type[Exception], said: str) -> None:
    with pytest.raises(kind, match=said):
        run(replace(PrepareOptions(folder / "config.yaml", folder), **change))


def test_from_the_command_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "made.safetensors").unlink()
    wanted = ["tta-server", "prepare", str(folder / "config.yaml"), "--data", str(folder), "--only", "prior,fisher"]
    monkeypatch.setattr("sys.argv", wanted)
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    assert "fisher" in capsys.readouterr().out
    assert set(load(folder / "config.yaml").prepared) == {"prior", "fisher"}


def test_batch_sizes() -> None:
    assert batch_sizes(10, 4) == [4, 4, 2]
    assert batch_sizes(9, 4) == [4, 4], "a batch of one image has no statistics"
    assert batch_sizes(1, 4) == [1]
