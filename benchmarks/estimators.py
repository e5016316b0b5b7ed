"""How far off are accuracies that are estimated without labels, of the adapted model and of its source?

    TTA_DATA=<folder> python benchmarks/estimators.py [--quick] [--out estimators-out]

The ResNet-20 and data of ``examples/cifar10c``, TENT, requests of 64 images. The estimates are fitted twice: on the
first 500 clean test images, and on 2,000 images that the network was trained on. The streams hold the other 500 images
and no others: the 15 corruptions of CIFAR-10-C one after the other, these with each domain sorted by label, with labels
in bursts (Dirichlet 0.1), with ten times the learning rate, and the clean images, also sorted. Nothing is fitted on
corrupted images, so none has to be left out.

Given is the mean absolute error against the accuracy on the request's own 64 images; *AC* is the mean confidence, for
comparison. Then how often the estimates are right about which of the two predictors does better on a request, of those
where it makes a difference; *always the same* names the one that mostly does.

``--quick`` takes every fifth corruption.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from drift import data_folder, look
from example import EXAMPLE
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table

from adapters.base import Segments
from tta_server.data import CLEAN, SOURCE_TRAIN, Domain, arrange, gather, load_domains, to_inputs
from tta_server.drift.estimators import Estimates, Head, make_estimates
from tta_server.drift.signals import Floats, Requests, Scores
from tta_server.engine.engine import initial_state
from tta_server.engine.norm import Pass
from tta_server.engine.run import PolicyRun
from tta_server.engine.source import SourceModel, load_model
from tta_server.policies import make_policy, starting_settings
from tta_server.settings import load_settings
from tta_server.types import Job, Lane, Stream

SIZE = 64
"""Images a request."""
HELD_OUT, TRAINING = 500, 2000
"""Images that the estimates are fitted on."""
LEAST = 32
"""Of a domain's last request, which is shorter, this many for it to count."""
SHAPES = ((10, 64), (100, 512), (1000, 2048))
"""Classes and features that the cost is measured with."""
PREDICTORS = ("source", "adapted")
METHODS = ("AC", "ATC", "PDD")
SAME = "always the same"


class Scenario(NamedTuple):
    """A stream: of the clean images or the corrupted ones, in which order, at how many times the learning rate."""

    clean: bool
    order: str = "domains"
    rate: float = 1.0


SCENARIOS = {
    "clean": Scenario(True),
    "clean, sorted": Scenario(True, "sorted"),
    "domains": Scenario(False),
    "sorted": Scenario(False, "sorted"),
    "dirichlet 0.1": Scenario(False, "dirichlet:0.1"),
    "lr x 10": Scenario(False, rate=10.0),
}


@dataclass(frozen=True)
class Seen:
    """A stream's labels, and per predictor its logits and features; ``requests`` says which rows came together."""

    requests: Requests
    labels: NDArray[np.int64]
    logits: dict[str, Floats]
    features: dict[str, Floats]


@dataclass(frozen=True)
class Found:
    """A predictor under a scenario: its accuracy, and by method the mean absolute error and the mean error."""

    scenario: str
    predictor: str
    calibration: str
    accuracy: float
    error: dict[str, float]
    bias: dict[str, float]
    disagreement: float
    sign: dict[str, float]


def run(model: SourceModel, domains: list[Domain], scenario: Scenario, name: str) -> Seen:
    """Sends a scenario's stream through the policy, the source beside it."""
    settings = starting_settings("tent", model.settings)
    settings["lr"] = scenario.rate * make_policy("tent", settings).lr  # type: ignore[attr-defined]
    policy = make_policy("tent", settings)
    lane, state = Lane(model.name, policy, model.digest), initial_state(policy, model)
    stream = Stream(name, model.name, policy, 1, 0.0, model.digest)
    labels: list[NDArray[np.int64]] = []
    outputs: dict[str, list[tuple[Floats, Floats]]] = {one: [] for one in PREDICTORS}
    batches = arrange([one.labels for one in domains], scenario.order, SIZE, 0)
    for batch in track(batches, name, console=Console(stderr=True)):
        images, own = gather(domains, batch)
        x = to_inputs(images, model.settings.input)
        with torch.no_grad():
            source = model.network.run(Pass(Segments([len(x)])), x)
        step = PolicyRun(model, lane, [Job(stream, lambda *_: None, lane, x)], state)
        step.scores()
        adapted = step.own
        assert adapted is not None, "TENT runs its network"
        state = step.finish().state
        stream.version += 1
        labels.append(own)
        for who, output in zip(PREDICTORS, (source, adapted), strict=True):
            outputs[who].append((output.logits.numpy(), output.features.numpy()))
    return Seen(
        Requests(np.array([len(one) for one in labels])),
        np.concatenate(labels),
        {who: np.concatenate([one for one, _ in parts]) for who, parts in outputs.items()},
        {who: np.concatenate([one for _, one in parts]) for who, parts in outputs.items()},
    )


def judge(estimates: Estimates, head: Head, seen: Seen, scenario: str, calibration: str) -> list[Found]:
    """Holds the estimates of each request against the truth."""
    counted = seen.requests.sizes >= LEAST
    truths, told = {}, {}
    for who in PREDICTORS:
        logits = seen.logits[who]
        found = estimates.estimate(logits, seen.features[who], head, seen.requests, who == "adapted")
        confidence = seen.requests.mean(Scores(logits).probabilities.max(1))
        truths[who] = seen.requests.mean((logits.argmax(1) == seen.labels).astype(np.float64))[counted]
        told[who] = dict(zip(METHODS, (one[counted] for one in (confidence, *found)), strict=True))
    gain = truths["adapted"] - truths["source"]
    sign = {
        method: float(((told["adapted"][method] - told["source"][method]) * gain > 0)[gain != 0].mean())
        for method in METHODS
    }
    sign[SAME] = float(max((gain > 0).sum(), (gain < 0).sum()) / (gain != 0).sum())
    return [
        Found(
            scenario,
            who,
            calibration,
            float(truths[who].mean()),
            {method: float(np.abs(one - truths[who]).mean()) for method, one in told[who].items()},
            {method: float((one - truths[who]).mean()) for method, one in told[who].items()},
            float(np.abs(told[who]["ATC"] - told[who]["PDD"]).mean()),
            sign,
        )
        for who in PREDICTORS
    ]


def cost(classes: int, dimension: int) -> float:
    """Microseconds that the two estimates of one predictor take for a request, median of 200."""
    generator = np.random.default_rng(0)
    head = Head(generator.normal(0, 1, (classes, dimension)).astype(np.float32))
    features = generator.normal(0, 1, (400, dimension)).astype(np.float32)
    logits = features @ head.weight.T
    estimates = make_estimates(logits, features, logits.argmax(1), head)
    taken, request = [], Requests(np.array([SIZE]))
    for _ in range(200):
        started = time.perf_counter()
        estimates.estimate(logits[:SIZE], features[:SIZE], head, request, True)
        taken.append(time.perf_counter() - started)
    return 1e6 * statistics.median(taken)


def report(found: Iterable[Found]) -> Table:
    """A row per scenario, predictor and calibration."""
    table = Table(title=f"Estimated less true accuracy of requests of {SIZE}: mean absolute error (mean error)")
    for column in ("fitted on", "scenario", "predictor", "accuracy", *METHODS, "|ATC - PDD|"):
        left = column in ("fitted on", "scenario", "predictor")
        table.add_column(column, justify="left" if left else "right")
    for one in found:
        errors = (f"{one.error[method]:.3f} ({one.bias[method]:+.2f})" for method in METHODS)
        names = (one.calibration, one.scenario, one.predictor, f"{one.accuracy:.3f}")
        table.add_row(*names, *errors, f"{one.disagreement:.3f}")
    return table


def report_signs(found: Iterable[Found]) -> Table:
    """How often each method knows which predictor does better."""
    methods = (*METHODS, SAME)
    table = Table("fitted on", "scenario", *methods, title="Requests of which the better predictor is told, percent")
    for one in found:
        if one.predictor == "adapted":
            table.add_row(one.calibration, one.scenario, *(f"{100 * one.sign[method]:.0f}" for method in methods))
    return table


def plot(estimates: Estimates, head: Head, streams: Mapping[str, Seen], path: Path) -> None:
    """Saves estimate over truth, per request."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7.5), layout="constrained")
    grid = figure.subplots(2, 3, sharex=True, sharey=True)
    for row, who in zip(grid, PREDICTORS, strict=True):
        for name, seen in streams.items():
            counted = seen.requests.sizes >= LEAST
            logits = seen.logits[who]
            truth = seen.requests.mean((logits.argmax(1) == seen.labels).astype(np.float64))
            told = estimates.estimate(logits, seen.features[who], head, seen.requests, who == "adapted")
            confidence = seen.requests.mean(Scores(logits).probabilities.max(1))
            for axes, one in zip(row, (confidence, *told), strict=True):
                axes.scatter(truth[counted], one[counted], s=9, alpha=0.6, label=name)
        for axes, method in zip(row, METHODS, strict=True):
            axes.plot([0, 1], [0, 1], color="black", linewidth=0.8)
            axes.set(title=f"{who}: {method}", xlim=(0, 1.01), ylim=(0, 1.01))
            axes.grid(alpha=0.3)
    for axes in grid[1]:
        axes.set_xlabel(f"accuracy on the request's {SIZE} images")
    for row in grid:
        row[0].set_ylabel("estimate")
    grid[0][0].legend(fontsize=7, loc="lower right")
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measures, prints the tables, and saves figures and plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="every fifth corruption")
    parser.add_argument("--out", type=Path, default=None, help="folder for estimators.json and estimators.png")
    options = parser.parse_args()
    folder = data_folder()
    model = load_model("resnet20", load_settings(EXAMPLE / "config.yaml"), torch.device("cpu"))
    weights, name = model.source.weights, model.source.head
    head = Head(weights[f"{name}.weight"].detach().numpy(), weights[f"{name}.bias"].detach().numpy())
    clean = load_domains(folder, [CLEAN])[0]
    trained = load_domains(folder, [SOURCE_TRAIN])[0]
    drawn = np.random.default_rng(0).permutation(len(trained.labels))[:TRAINING]
    fitted = {}
    for calibration, images, labels in (
        ("held-out images", clean.images[:HELD_OUT], clean.labels[:HELD_OUT]),
        ("training images", trained.images[drawn], trained.labels[drawn]),
    ):
        rows = look(model, images)[0]
        fitted[calibration] = make_estimates(rows.logits, rows.features, labels, head)
    corrupted = load_domains(folder)[:: 5 if options.quick else 1]
    parts = {
        kind: [Domain(one.name, one.images[HELD_OUT:], one.labels[HELD_OUT:]) for one in domains]
        for kind, domains in ((True, [clean]), (False, corrupted))
    }
    streams = {each: run(model, parts[scenario.clean], scenario, each) for each, scenario in SCENARIOS.items()}
    found = [
        one
        for calibration, estimates in fitted.items()
        for each, seen in streams.items()
        for one in judge(estimates, head, seen, each, calibration)
    ]
    costs = {f"{classes} classes, {dimension} features": cost(classes, dimension) for classes, dimension in SHAPES}
    console = Console()
    console.print(report(found))
    console.print(report_signs(found))
    for calibration, estimates in fitted.items():
        console.print(
            f"{calibration}: {estimates.wrong} of {estimates.rows} wrong, T {estimates.temperature:.2f}, dropout "
            f"{estimates.rate:.2f}, spread {', '.join(f'{one:.3f}' for one in estimates.spread)}"
        )
    for shape, taken in costs.items():
        console.print(f"{shape}: {taken:,.0f} us for one predictor of a request of {SIZE}")
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        results = {"found": [asdict(one) for one in found], "microseconds": costs}
        (options.out / "estimators.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        plot(fitted["held-out images"], head, streams, options.out / "estimators.png")


if __name__ == "__main__":
    main()
