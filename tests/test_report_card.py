"""Report cards: their streams, figures and verdicts, the file, and where it is shown."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import safetensors.torch
import scipy.stats
import torch
import yaml
from rich.console import Console

from adapters.norm import NormPolicy
from tests.test_prepare import MEAN, STD, by_batch
from tta_server import app, cli
from tta_server.demo.network import digits_network
from tta_server.demo.run import CONFIG
from tta_server.engine.source import SourceModel, load_model
from tta_server.errors import ConfigError
from tta_server.prepare import PrepareOptions, prepare
from tta_server.report_card import (
    CONDITIONS,
    CORRUPTED,
    DRIFTED,
    ORDERS,
    SCENARIOS,
    Card,
    Difference,
    Gain,
    Outcome,
    Request,
    Scenario,
    _run,
    _Streams,
    card_path,
    compare,
    student_quantile,
    verdict_of,
)
from tta_server.settings import GuardSettings, load_settings

IMAGES = 96
"""Of a scenario: 12 requests of 8 rows."""


def read(config: Path) -> Card:
    return Card.model_validate_json((config.parent / "made.report.json").read_bytes())


def command(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """Runs it in this process; returns its exit status."""
    monkeypatch.setattr(sys, "argv", ["tta-server", *words])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return caught.value.code if isinstance(caught.value.code, int) else 0


def change(config: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    content = yaml.safe_load(config.read_text(encoding="utf-8"))
    edit(content)
    config.write_text(yaml.safe_dump(content), encoding="utf-8")


@pytest.fixture(scope="module")
def carded(prepared_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config of a copy of the prepared digits with a card of tent and norm."""
    folder = tmp_path_factory.mktemp("card") / "digits"
    shutil.copytree(prepared_digits.parent, folder)
    config = folder / "config.yaml"
    options = PrepareOptions(config, folder, only=("benefit",), report=("tent", "norm"), report_images=IMAGES)
    prepare(options, Console(file=io.StringIO()))
    return config


@pytest.fixture
def config(carded: Path, tmp_path: Path) -> Path:
    """The same, to do things to."""
    shutil.copytree(carded.parent, tmp_path / "digits")
    return tmp_path / "digits" / "config.yaml"


@pytest.fixture(scope="module")
def model(carded: Path) -> SourceModel:
    return load_model("digits", load_settings(carded), torch.device("cpu"))


@pytest.fixture(scope="module")
def held_out(carded: Path) -> tuple[torch.Tensor, np.ndarray[Any, np.dtype[np.int64]]]:
    """The last images of the random order that the artefacts take the first ones of."""
    with np.load(carded.parent / "source_train.npz") as file:
        rows = np.random.default_rng(0).permutation(len(file["labels"]))[-IMAGES:]
        return torch.from_numpy(file["images"][rows]).permute(0, 3, 1, 2).float() / 255, file["labels"][rows]


# Statistics


@pytest.mark.parametrize("probability", [0.9, 0.975, 1 - 0.05 / 16])
@pytest.mark.parametrize("degrees", [9, 11, 40, 150])
def test_quantiles_of_students_t(probability: float, degrees: int) -> None:
    assert student_quantile(probability, degrees) == pytest.approx(scipy.stats.t.ppf(probability, degrees), rel=1e-3)


def outcome(right: Any, rows: int, parts: Any = None) -> Outcome:
    counts = np.full(len(right), rows)
    return Outcome(np.zeros(len(right), np.int64) if parts is None else parts, counts, np.asarray(right), 0, 0)


def test_the_gain_and_its_interval() -> None:
    """One part, equal requests: the t interval of the mean over requests."""
    generator = np.random.default_rng(0)
    source, policy = generator.integers(0, 9, 12), generator.integers(0, 9, 12)
    gain = compare(outcome(policy, 8), outcome(source, 8))
    each = (policy - source) / 8
    assert gain.gain == pytest.approx(each.mean())
    assert gain.accuracy == pytest.approx(policy.mean() / 8)
    low, high = scipy.stats.t.interval(0.95, 11, each.mean(), each.std(ddof=1) / 12**0.5)
    assert (gain.low, gain.high) == pytest.approx((low, high), rel=1e-3)


def test_that_corruptions_differ_is_no_noise() -> None:
    """Gains of 8, 4 and 0 rows of 8, the same in every request of a part, are known exactly."""
    parts = np.repeat([0, 1, 2], 4)
    gain = compare(outcome(np.array([8, 4, 0])[parts], 8, parts), outcome(np.zeros(12, int), 8, parts))
    assert (gain.gain, gain.low, gain.high, gain.difference) == (0.5, 0.5, 0.5, "better")


def test_chance_is_seldom_called_a_difference() -> None:
    """Of two models that are right as often, by requests that are right or wrong as a whole more than row by row."""
    generator, runs, called, covered = np.random.default_rng(0), 2000, 0, 0
    for _ in range(runs):
        shares = np.clip(generator.normal(0.6, 0.2, (2, 12)), 0, 1)
        source, policy = generator.binomial(32, shares)
        gain = compare(outcome(policy, 32), outcome(source, 32))
        called += gain.difference != "none"
        covered += gain.low <= 0 <= gain.high
    assert called / runs <= 0.05 / len(SCENARIOS) + 3 * (0.05 / len(SCENARIOS) / runs) ** 0.5
    assert covered / runs == pytest.approx(0.95, abs=3 * (0.95 * 0.05 / runs) ** 0.5)


# Verdicts


def scenario(alone: float, guarded: float) -> Scenario:
    """With gains that are beyond chance from 10 points on."""

    def gain(value: float) -> Gain:
        difference: Difference = "better" if value >= 0.1 else "worse" if value <= -0.1 else "none"
        return Gain(
            accuracy=0.5 + value, gain=value, low=value - 0.1, high=value + 0.1, difference=difference, unanswered=0
        )

    return Scenario(rows=96, requests=12, source=0.5, alone=gain(alone), guarded=gain(guarded), served=1.0)


SORTED, SMALL = "clean sorted", "clean small"


@pytest.mark.parametrize(
    ("gains", "verdict", "told"),
    [
        ({DRIFTED: (0.2, 0.15)}, "helps", ["20.0 points alone", "15.0 under the guard"]),
        ({DRIFTED: (0.2, 0.0)}, "helps", ["20.0 points alone", "0.0 under the guard"]),
        ({DRIFTED: (0.2, 0.15), SORTED: (-0.4, 0.0)}, "guard-needed", [f"{SORTED} by 40.0 points", "by 15.0 points"]),
        ({DRIFTED: (0.2, 0.05), SORTED: (-0.4, 0.0)}, "harms", [f"{SORTED} by 40.0 points", "Under the guard neither"]),
        ({DRIFTED: (0.2, 0.15), SORTED: (-0.4, -0.1)}, "harms", ["Under the guard, too", f"{SORTED} by 10.0 points"]),
        ({DRIFTED: (0.0, 0.0), SORTED: (-0.1, 0.0)}, "harms", ["Alone worse"]),
        ({DRIFTED: (-0.3, -0.2), SORTED: (-0.4, -0.3), SMALL: (-0.4, -0.4)}, "harms", [
            f"{SMALL} by 40.0 points, {SORTED} by 30.0 points and 1 more"]),
        ({DRIFTED: (0.09, 0.09), SORTED: (-0.09, -0.09)}, "unclear", ["96 rows"]),
        ({"corrupted small": (0.3, 0.3)}, "unclear", ["No difference"]),
    ],
)  # fmt: skip
def test_verdicts(gains: dict[str, tuple[float, float]], verdict: str, told: list[str]) -> None:
    found, sentence = verdict_of({name: scenario(*gains.get(name, (0.0, 0.0))) for name in SCENARIOS})
    assert found == verdict
    assert all(part in sentence for part in told), sentence
    assert sentence.endswith(".")


# Streams


@pytest.fixture(scope="module")
def streams(model: SourceModel, held_out: tuple[torch.Tensor, Any]) -> _Streams:
    return _Streams(model, *held_out, seed=0)


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_scenario_has_every_image_once(streams: _Streams, held_out: tuple[torch.Tensor, Any], name: str) -> None:
    condition, order = name.split()
    requests = list(streams.requests(name))
    counted = [request.labels >= 0 for request in requests]
    labels = np.concatenate([one.labels[own] for one, own in zip(requests, counted, strict=True)])
    assert sorted(labels) == sorted(held_out[1])
    assert {request.part for request in requests} == set(range(len(CONDITIONS[condition])))
    sizes = [int(own.sum()) for own in counted]
    if order == "small":
        assert set(sizes) == {1, 2, 3, 4}
    else:
        assert sizes == [8] * 12
    for part in range(len(CONDITIONS[condition])):
        own = np.concatenate([one.labels[one.labels >= 0] for one in requests if one.part == part])
        assert (order == "sorted") == bool((np.diff(own) >= 0).all())
    junk = np.concatenate([~own for own in counted])
    assert junk.mean() == (0.5 if order == "poisoned" else 0)
    if condition == "clean" and order != "sorted":
        x = torch.cat([request.x for request in requests])[torch.from_numpy(~junk)]
        assert torch.equal(x, held_out[0]), "in their order, and as they were"
    again = list(streams.requests(name))
    assert all(torch.equal(one.x, other.x) for one, other in zip(requests, again, strict=True))


def test_what_is_damaged_how(streams: _Streams, held_out: tuple[torch.Tensor, Any]) -> None:
    requests = list(streams.requests(DRIFTED))
    for part in range(len(CORRUPTED)):
        x = torch.cat([one.x for one in requests if one.part == part])
        assert ((x - held_out[0][32 * part : 32 * (part + 1)]).abs().mean((1, 2, 3)) > 0.01).all()
    # The last part is in fog: nothing is dark.
    assert x.min() > 0.3
    junk = torch.cat([one.x[1::2] for one in streams.requests("clean poisoned")])
    assert junk.mean().item() == pytest.approx(0.5, abs=0.02)
    assert junk.std().item() == pytest.approx(12**-0.5, abs=0.02)


def test_a_request_that_fails_counts_as_wrong(model: SourceModel, held_out: tuple[torch.Tensor, Any]) -> None:
    x, labels = held_out
    requests = [Request(x[:8], labels[:8], 0), Request(torch.full_like(x[:8], torch.nan), labels[8:16], 0)]
    found = _run(model, NormPolicy(), requests, None, 0)
    assert found.unanswered == 8
    assert found.right.tolist() == [int(found.right[0]), 0]
    assert found.right[0] > 4


# The card


def test_the_figures_are_those_of_plain_torch(carded: Path, held_out: tuple[torch.Tensor, Any]) -> None:
    """The source everywhere where rows are clean, and norm in requests of 8."""
    card, (x, labels) = read(carded), held_out
    network = digits_network()
    network.load_state_dict(safetensors.torch.load_file(CONFIG.with_name("digits.safetensors")))
    known, x = torch.from_numpy(labels), (x - MEAN) / STD
    with torch.no_grad():
        source = (network.eval()(x).argmax(1) == known).float().mean().item()
        own = torch.cat([by_batch(network)(rows) for rows in x.split(8)]).argmax(1)
    for order in ORDERS:
        assert card.policies["norm"].scenarios[f"clean {order}"].source == pytest.approx(source)
    norm = card.policies["norm"].scenarios["clean mixed"]
    assert norm.alone.accuracy == pytest.approx((own == known).float().mean().item())
    assert norm.alone.gain == pytest.approx(norm.alone.accuracy - norm.source)
    assert (norm.rows, norm.requests) == (IMAGES, 12)


def test_what_is_known_of_the_digits(carded: Path) -> None:
    """Batch statistics of a few rows of one class, or of next to no rows, are no good; the guard lets few of those
    answers through."""
    card = read(carded)
    assert list(card.policies) == ["tent", "norm"]
    for one in card.policies.values():
        assert one.scenarios.keys() == set(SCENARIOS)
        assert one.verdict in ("guard-needed", "harms")
        for name in ("clean sorted", "clean small"):
            found = one.scenarios[name]
            assert found.alone.difference == "worse"
            assert found.alone.low < found.alone.gain < found.alone.high < 0
            assert found.guarded.gain > found.alone.gain / 4
            assert found.served < 0.5
        assert (one.verdict, one.sentence) == verdict_of(one.scenarios)
    assert card.policies["tent"].settings["lr"] == 0.003


def test_what_it_rests_on(carded: Path, model: SourceModel) -> None:
    basis = read(carded).basis
    assert basis.digest == model.digest
    assert GuardSettings.model_validate(basis.guard) == GuardSettings()
    assert (basis.images, basis.request_rows, basis.seed) == (IMAGES, 8, 0)
    assert basis.judge == model.prepared["benefit"]["made"]
    assert basis.judge_images == IMAGES, "the judge was made from all 1,000 digits there are"
    assert basis.corrupted == ["noise 0.6", "motion 0.6", "fog 0.6"]
    assert (carded.parent / "made.report.png").read_bytes().startswith(b"\x89PNG")
    assert not list(carded.parent.glob("*.tmp"))


@pytest.mark.parametrize(
    ("artefacts", "card"),
    [
        ("net.artefacts.safetensors", "net.report.json"),
        ("made.safetensors", "made.report.json"),
        ("other", "other.report.json"),
    ],
)
def test_its_place(artefacts: str, card: str) -> None:
    assert card_path(Path("folder") / artefacts) == Path("folder") / card


def test_the_command(config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Adds a policy to a card that rests on the same, and starts afresh where it does not."""
    monkeypatch.setenv("COLUMNS", "80")
    tent = read(config).policies["tent"]
    words = ["prepare", str(config), "--data", str(config.parent), "--only", "benefit"]
    images = ["--report-images", str(IMAGES)]
    assert command(monkeypatch, *words, *images, "--report", "lame") == 0
    card, said = read(config), capsys.readouterr().out
    assert list(card.policies) == ["tent", "norm", "lame"]
    assert card.policies["tent"] == tent
    assert "1 policies, alone and guarded, 8 scenarios of 96 images; expected to take" in " ".join(said.split())
    assert "made from 96 of these images, too" in " ".join(said.split())
    for name, one in card.policies.items():
        assert f"{name}: {one.verdict}. " in said
    worst = 100 * card.policies["tent"].scenarios["clean sorted"].alone.gain
    assert f"{worst:.1f}*/" in said, "the table fits into 80 columns"
    assert command(monkeypatch, *words, *images, "--seed", "1", "--report", "lame") == 0
    assert list(read(config).policies) == ["lame"]
    assert read(config).basis.judge_images == 0, "of another order"


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--report", "nobody"], "no policy 'nobody'; there are:"),
        (["--report", "source"], "'source' is no other"),
        (["tent"], "policies are named for --report only, got tent"),
        (["--report", "--images", "190"], "needs at least 192 clean images"),
        (["--report", "eata"], "policy 'eata' cannot run on model 'digits': eata needs fisher"),
    ],
)
def test_refusals(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], why: str
) -> None:
    if "eata" in words:
        config.with_name("made.safetensors").unlink()
    line = ["prepare", str(config), "--data", str(config.parent), "--only", "prior"]
    assert command(monkeypatch, *line, *words) == 1
    said = capsys.readouterr()
    assert why in " ".join(said.err.split())
    assert ("prior" in said.out) == ("eata" in words), "all others are refused before anything is computed"
    assert read(config).policies.keys() == {"tent", "norm"}


def test_it_needs_labels(config: Path) -> None:
    with np.load(config.parent / "source_train.npz") as file:
        np.savez(config.parent / "bare.npz", images=file["images"])
    options = PrepareOptions(config, config.parent / "bare.npz", only=("prior",), report=("tent",))
    with pytest.raises(ConfigError, match="needs labels, and the images of bare have none"):
        prepare(options, Console(file=io.StringIO()))


def test_a_folder_that_cannot_be_written(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The card that was there stays."""
    card, before = read(config), config.with_name("made.report.json").read_bytes()

    def full(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(ConfigError, match=r"cannot write the report card to .*No space left"):
        card.model_copy(update={"policies": {}}).save(config.with_name("made.report.json"))
    assert config.with_name("made.report.json").read_bytes() == before
    assert not list(config.parent.glob("*.tmp"))


# Where it is shown


def shown(config: Path) -> dict[str, dict[str, Any]]:
    """By policy, what ``/v1/models`` says of it."""
    settings = load_settings(config)
    served = app.create_app(settings, app.load_models(settings))

    async def ask() -> dict[str, Any]:
        transport = httpx.ASGITransport(served)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            answer: dict[str, Any] = (await client.get("/v1/models/digits")).raise_for_status().json()
            return answer

    return {one["name"]: one for one in asyncio.run(ask())["policies"]}


def test_the_server_shows_it(config: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        policies = shown(config)
    card = read(config)
    for name in ("tent", "norm"):
        assert policies[name]["card"] == json.loads(card.policies[name].model_dump_json())
    assert "card" not in policies["lame"]
    (line,) = (record for record in caplog.records if record.message == "report card")
    assert vars(line)["verdicts"] == {name: one.verdict for name, one in sorted(card.policies.items())}
    assert not [record for record in caplog.records if "ignored" in record.message]


def ignored(config: Path, caplog: pytest.LogCaptureFixture) -> tuple[set[str], list[tuple[str, str]]]:
    """The policies that still have a card, and what was logged of others: policy (or nothing) and reason."""
    settings = load_settings(config)
    with caplog.at_level(logging.WARNING, "tta_server.report_card"):
        reports = app.load_models(settings)["digits"].reports
    told = [(getattr(one, "policy", ""), vars(one)["reason"]) for one in caplog.records]
    return {name for name, one in reports.items() if "card" in one}, told


def test_other_settings_of_a_policy(config: Path, caplog: pytest.LogCaptureFixture) -> None:
    change(config, lambda content: content["models"]["digits"]["policies"]["tent"].update(lr=0.004))
    assert ignored(config, caplog) == ({"norm"}, [("tent", "it was made under other settings of the policy")])


def test_another_model(config: Path, caplog: pytest.LogCaptureFixture, model: SourceModel) -> None:
    config.with_name("made.safetensors").unlink()
    change(config, lambda content: content["models"]["digits"]["input"].update(mean=[0.3]))
    assert ignored(config, caplog) == (set(), [("", f"it is of another model, of digest {model.digest[:16]}")])


def test_other_settings_of_the_guard(config: Path, caplog: pytest.LogCaptureFixture) -> None:
    change(config, lambda content: content.update(guard={"enabled": False}))
    assert ignored(config, caplog) == ({"tent", "norm"}, []), "what it would do is still told"
    change(config, lambda content: content.update(guard={"least_benefit": 0.77}))
    assert ignored(config, caplog) == (set(), [("", "it was made under other settings of the guard")])


def _cut(card: Path) -> None:
    card.write_bytes(card.read_bytes()[:1000])


def _no_verdict(card: Path) -> None:
    content = json.loads(card.read_text(encoding="utf-8"))
    content["policies"]["tent"]["verdict"] = "is fine"
    card.write_text(json.dumps(content), encoding="utf-8")


def _newer(card: Path) -> None:
    card.write_text(card.read_text(encoding="utf-8").replace('"format": 1', '"format": 2'), encoding="utf-8")


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (_cut, "no report card of this version: Invalid JSON"),
        (_no_verdict, "no report card of this version: policies.tent.verdict: "),
        (_newer, "no report card of this version: format: "),
        (lambda card: card.write_bytes(b"\xff\xfe[" * 5000), "no report card of this version: Invalid JSON"),
        (lambda card: card.write_text("[" * 100_000), "no report card of this version: Invalid JSON"),
        (lambda card: card.write_text(""), "no report card of this version: Invalid JSON"),
    ],
)
def test_damaged_files(
    config: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], object], why: str
) -> None:
    damage(config.with_name("made.report.json"))
    left, ((_, reason),) = ignored(config, caplog)
    assert not left
    assert why in reason


def test_a_scenario_is_missing(config: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = config.with_name("made.report.json")
    content = json.loads(path.read_text(encoding="utf-8"))
    del content["policies"]["norm"]["scenarios"]["clean small"]
    path.write_text(json.dumps(content), encoding="utf-8")
    assert ignored(config, caplog) == ({"tent"}, [("norm", "scenarios are missing")])


def test_no_card_is_nothing_to_log(config: Path, caplog: pytest.LogCaptureFixture) -> None:
    config.with_name("made.report.json").unlink()
    assert ignored(config, caplog) == (set(), [])


def test_check_shows_it(config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert command(monkeypatch, "check", str(config)) == 0
    said, card = capsys.readouterr().out, read(config)
    rows = {line.split()[1]: line for line in said.splitlines() if line.startswith("│")}
    assert card.policies["tent"].verdict in rows["tent"]
    assert card.policies["tent"].verdict not in rows["lame"]
    assert f"norm: {card.policies['norm'].verdict}. {card.policies['norm'].sentence}" in " ".join(said.split())
    config.with_name("made.report.json").unlink()
    assert command(monkeypatch, "check", str(config)) == 0
    assert "report card    none; tta-server prepare CONFIG --data CLEAN_IMAGES --report" in capsys.readouterr().out
