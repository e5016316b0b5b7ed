"""Do the drift signals rank domains as the source model's error does?

    TTA_DATA=<folder> python benchmarks/drift.py [--requests 40] [--out drift-out]

The ResNet-20 and data of ``examples/cifar10c``; what clean data look like is prepared from ``source_train.npz``, as
``tta-server prepare`` does it. A stream per domain, of the clean images and of those sorted by label goes through
engine and monitor, all of its requests measured and none adapted to: so many requests of 1, of 8 and of 64 images, all
domains the same ones in the same order. At the end each signal's z-score, averaged with a half-life of 20 requests, is
held against the error on all 1,000 images of the domain: Spearman's rank correlation over the 15 domains. With 1 and 8
images a request this is done several times with other images; figures are means over the repeats.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from example import EXAMPLE
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from adapters.base import Segments
from adapters.source import SourcePolicy
from tta_server.data import CLEAN, Domain, load_domains, to_inputs
from tta_server.drift.monitor import Monitor
from tta_server.drift.reference import TABLED, CleanRows
from tta_server.drift.signals import DRIFT, LayerStatistics
from tta_server.engine.engine import Engine
from tta_server.engine.norm import Pass
from tta_server.engine.source import SourceModel, load_model
from tta_server.prepare import PrepareOptions, prepare
from tta_server.settings import load_settings
from tta_server.state.memory import Budget
from tta_server.state.store import StateStore
from tta_server.types import Answer, Job, Lane, Plan, Stream

SIZES = {1: 8, 8: 4, 64: 1}
"""Images a request, and how often it is done."""
HALF_LIFE = 20.0
SORTED = "clean, sorted by label"
MERGED = 64
"""Most images in a step."""

Floats = NDArray[np.float64]
Rows = NDArray[np.int64]


def data_folder() -> Path:
    """Where the data are, by ``TTA_DATA``."""
    if "TTA_DATA" not in os.environ:
        raise SystemExit("set TTA_DATA to the folder with the data, see examples/cifar10c/README.md")
    return Path(os.environ["TTA_DATA"])


@contextlib.contextmanager
def source_model() -> Iterator[SourceModel]:
    """The example's network with what clean data look like to the monitor, made by ``tta-server prepare``."""
    with tempfile.TemporaryDirectory() as name:
        for file in ("config.yaml", "resnet_cifar.py"):
            shutil.copy(EXAMPLE / file, name)
        config = Path(name) / "config.yaml"
        prepare(PrepareOptions(config, data_folder(), only=("monitoring",)), Console(file=io.StringIO()))
        yield load_model("resnet20", load_settings(config), torch.device("cpu"))


def look(model: SourceModel, images: NDArray[np.uint8]) -> tuple[CleanRows, LayerStatistics]:
    """What the source makes of these images, each by itself, and its batch norms' own statistics."""
    parts: list[tuple[NDArray[Any], ...]] = []
    for some in np.array_split(images, -(-len(images) // MERGED)):
        watched = Pass(Segments([1] * len(some)), observe=True)
        with torch.no_grad():
            output = model.network.run(watched, to_inputs(some, model.settings.input))
        observed = model.network.observed(watched)
        assert observed is not None, "the network has no batch norms"
        parts.append((output.logits.numpy(), output.features.numpy(), *observed[:2]))
        layers = observed[2]
    return CleanRows(*(np.concatenate(column) for column in zip(*parts, strict=True))), layers


def order(labels: NDArray[np.int64], generator: np.random.Generator, by_label: bool, count: int) -> Rows:
    """So many rows: all in random order, or label after label, and over again."""
    rows: list[Rows] = []
    while sum(map(len, rows)) < count:
        shuffled = generator.permutation(len(labels))
        rows.append(shuffled[np.argsort(labels[shuffled], kind="stable")] if by_label else shuffled)
    return np.concatenate(rows)[:count]


def measure(
    model: SourceModel, domains: Mapping[str, Domain], size: int, requests: int, seed: int, progress: Progress
) -> dict[str, dict[str, float]]:
    """Sends ``requests`` of ``size`` images of each domain through the engine; z-scores by domain and signal."""
    monitor = Monitor(HALF_LIFE)
    engine = Engine({model.name: model}, StateStore(Budget(1), model.network.device), monitor, 1.0, 1.0)
    lane = Lane(model.name, SourcePolicy(), model.digest)
    clients = {name: Stream(name, model.name, lane.policy, 0, 0.0, model.digest) for name in (*domains, SORTED)}
    inputs, labels = {**domains, SORTED: domains[CLEAN]}, domains[CLEAN].labels
    rows = {
        name: order(labels, np.random.default_rng(seed), name == SORTED, size * requests).reshape(requests, size)
        for name in clients
    }
    names, together = list(clients), max(1, MERGED // size)
    task = progress.add_task(f"{size} images a request, {seed + 1} of {SIZES[size]}", total=requests)
    for request in range(requests):
        for start in range(0, len(names), together):
            jobs = [
                Job(clients[name], lambda *_: None, lane, to_inputs(inputs[name].images[rows[name][request]], spec))
                for spec in [model.settings.input]
                for name in names[start : start + together]
            ]
            engine.step(Plan(lane, jobs, False), _expect_answer)
        progress.advance(task)
    readings = {name: monitor.readings(client) for name, client in clients.items()}
    return {name: {signal: one.z for signal, one in own.items() if one.z is not None} for name, own in readings.items()}


def _expect_answer(job: Job, answer: Answer | Exception) -> None:
    if isinstance(answer, Exception):
        raise answer


def rank_correlation(one: Floats, other: Floats) -> float:
    """Spearman's, of values without ties."""
    return float(np.corrcoef(one.argsort().argsort(), other.argsort().argsort())[0, 1])


def summarise(repeats: list[dict[str, dict[str, float]]], errors: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """By signal: the rank correlation with the error, and z-scores on clean data."""
    error = np.array(list(errors.values()))
    found = {}
    for signal in TABLED:
        each = [rank_correlation(np.array([one[name][signal] for name in errors]), error) for one in repeats]
        found[signal] = {
            "correlation": float(np.mean(each)),
            "lowest": min(each),
            "highest": max(each),
            "clean": float(np.mean([one[CLEAN][signal] for one in repeats])),
            "sorted": float(np.mean([one[SORTED][signal] for one in repeats])),
        }
    return found


def report(found: Mapping[int, Mapping[str, Mapping[str, float]]]) -> Table:
    """Signals by request size."""
    table = Table(title="Rank correlation with the source's error over 15 domains; z-score on clean data, and sorted")
    table.add_column("signal")
    for size in found:
        for column in (f"{size}: correlation", "clean", "sorted"):
            table.add_column(column, justify="right")
    for signal in TABLED:
        cells = [own[signal] for own in found.values()]
        table.add_row(
            signal,
            *(
                text
                for one in cells
                for text in (f"{one['correlation']:.2f}", f"{one['clean']:.1f}", f"{one['sorted']:.1f}")
            ),
        )
    return table


def plot(scores: Mapping[int, Mapping[str, float]], errors: Mapping[str, float], clean: float, path: Path) -> None:
    """Saves the drift score of every domain over the source's error on it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    for axes, (size, own) in zip(figure.subplots(1, len(scores)), scores.items(), strict=True):
        axes.scatter([100 * error for error in errors.values()], [own[name] for name in errors], s=18)
        for name, error in errors.items():
            short = name.split("_")[0]
            axes.annotate(short, (100 * error, own[name]), (3, 3), textcoords="offset points", fontsize=6.5)
        for name, marker in ((CLEAN, "o"), (SORTED, "s")):
            axes.scatter([100 * clean], [own[name]], color="tab:green", marker=marker, s=26, label=name)
        axes.set(title=f"images a request: {size}", xlabel="source's error, percent", xlim=(0, 95))
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel(f"drift score (z of {DRIFT})")
    figure.axes[0].legend(fontsize=7, loc="upper left")
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measures, prints the table, and saves figures and plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=40, help="of each stream")
    parser.add_argument("--out", type=Path, default=None, help="folder for drift.json and drift.png")
    options = parser.parse_args()
    domains = {domain.name: domain for domain in load_domains(data_folder())}
    clean = load_domains(data_folder(), [CLEAN])[0]
    console = Console(stderr=True)
    with source_model() as model, Progress(console=console) as progress:
        task = progress.add_task("the source's errors", total=len(domains) + 1)
        errors = {}
        for name, domain in {**domains, CLEAN: clean}.items():
            errors[name] = float((look(model, domain.images)[0].logits.argmax(1) != domain.labels).mean())
            progress.advance(task)
        clean_error = errors.pop(CLEAN)
        measured = {
            size: [
                measure(model, {**domains, CLEAN: clean}, size, options.requests, seed, progress)
                for seed in range(repeats)
            ]
            for size, repeats in SIZES.items()
        }
    found = {size: summarise(repeats, errors) for size, repeats in measured.items()}
    Console().print(report(found))
    scores = {
        size: {name: float(np.mean([one[name][DRIFT] for one in repeats])) for name in (*errors, CLEAN, SORTED)}
        for size, repeats in measured.items()
    }
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        results = {"error": {**errors, CLEAN: clean_error}, "drift": scores, "signals": found}
        (options.out / "drift.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        plot(scores, errors, clean_error, options.out / "drift.png")


if __name__ == "__main__":
    main()
