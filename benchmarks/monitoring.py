"""What monitoring and guards cost: throughput with them over that without, and a scrape with 10,000 streams.

    python benchmarks/monitoring.py [--rounds 12] [--out monitoring.json]

ResNet-20 for CIFAR with random weights (speed does not depend on them), random images and a monitoring bundle made of
such, through the engine, with the server's default sampling and limits: the part of a request's way that monitoring is
on, without HTTP, which would only dilute it. The variants: nothing; all signals, as by default but for the estimates of
accuracy and the guards; with both of these, the guards of active streams, which is how most streams are most of the
time; the same with canaries, whose every row is compared with the source before the answer. They take turns within
each round; the ratios are medians of the rounds' ratios. A round sends whole sampling periods: 20 requests of each
stream where the source answers or the step is small, else 4.

The scrape: 100 and then 10,000 streams of one model, all measured; how long ``/metrics`` takes to render (median of 9),
its bytes and its series.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import example
import numpy as np
import torch
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from adapters import Policy
from adapters.norm import NormPolicy
from adapters.source import SourcePolicy
from adapters.tent import Tent
from tta_server.drift.benefit import FIGURES, Judge
from tta_server.drift.monitor import Monitor
from tta_server.engine.engine import Engine
from tta_server.engine.guarding import make_guard
from tta_server.engine.source import SourceModel, load_model
from tta_server.metrics.prometheus import PrometheusRecorder
from tta_server.metrics.scrape import Levels, Watchlist
from tta_server.prepare import PrepareOptions, prepare
from tta_server.settings import GuardSettings, MonitorSettings, load_settings
from tta_server.state.keeper import Keeping, Tally
from tta_server.state.memory import Budget
from tta_server.state.store import StateStore
from tta_server.trust.guard import State
from tta_server.types import Lane, Saved, Stream

CASES = ((1, 1), (1, 64), (1, 200), (64, 1), (8, 16))
"""Streams and rows per request."""
POLICIES: tuple[Policy, ...] = (Tent(lr=1e-3), NormPolicy(), SourcePolicy())


def watched_model(device: torch.device) -> SourceModel:
    """The example's network with its monitoring bundle."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config, data = example.write_config(folder), folder / "images.npz"
        generator = np.random.default_rng(0)
        images, labels = generator.integers(0, 256, (600, 32, 32, 3), np.uint8), generator.integers(0, 10, 600)
        np.savez(data, images=images, labels=labels)
        prepare(PrepareOptions(config, data, only=("monitoring", "estimates")), Console(stderr=True))
        judge = Judge(np.full(len(FIGURES), 0.1), 0.0, 0.1)  # what it says is of no matter to its cost
        return replace(load_model("resnet20", load_settings(config), device), judge=judge)


VARIANTS = ("off", "monitored", "active", "canary")


def variant(model: SourceModel, policy: Policy, streams: int, name: str) -> Callable[[list[Tensor]], None]:
    """Runs one request of each stream through scheduler, engine and recorder."""
    watching = MonitorSettings()
    monitor = Monitor(watching.half_life)
    engine = Engine(
        {model.name: model},
        StateStore(Budget(), model.network.device),
        monitor,
        watching.shadow_ratio,
        watching.frozen_ratio,
        name != "off",
        watching.estimate_every if name in ("active", "canary") else 0,
    )
    lane = Lane(model.name, policy, model.digest)
    clients = [Stream(str(index), model.name, policy, index, 0.0, model.digest) for index in range(streams)]
    if name in ("active", "canary") and not policy.plain:
        for client in clients:
            client.guard = make_guard(GuardSettings())
            client.guard.put(State(name))
    return example.through_scheduler(engine, lane, clients)


def cost(model: SourceModel, policy: Policy, streams: int, rows: int, rounds: int) -> dict[str, float]:
    """Requests per second with nothing, and the median ratios of the throughputs: monitored over that, and guarded over
    monitored."""
    batches = [torch.rand(rows, 3, 32, 32) for _ in range(streams)]
    variants = {name: variant(model, policy, streams, name) for name in VARIANTS}
    repeats = 20 if streams * rows <= 32 or policy.plain else 4
    times: list[dict[str, float]] = []
    for run in variants.values():
        run(batches)
    for turn in range(rounds):
        taken = {}
        for name in VARIANTS if turn % 2 else VARIANTS[::-1]:
            started = time.perf_counter()
            for _ in range(repeats):
                variants[name](batches)
            taken[name] = (time.perf_counter() - started) / (repeats * streams)
        times.append(taken)
    ratios = (("off", "monitored"), ("monitored", "active"), ("monitored", "canary"))
    return {
        "off": 1 / statistics.median(one["off"] for one in times),
        **{slow: statistics.median(one[fast] / one[slow] for one in times) for fast, slow in ratios},
    }


def scrapes(model: SourceModel) -> list[dict[str, float]]:
    """Series, bytes and seconds of a scrape by number of streams."""
    policy, generator = Tent(), np.random.default_rng(0)
    monitor = Monitor(20.0)
    streams, saved = list[Stream](), Saved(1, 1, 0, 0, 0.0)
    keeping = Keeping(True, "", False, 0, 0, Tally(), None, 0)
    digests, references = {model.name: model.digest}, {model.name: True}
    levels = Levels(0, streams, {"device": (0, 0), "host": (0, 0)}, 0, 0, keeping, digests, references, Budget())
    recorder = PrometheusRecorder(lambda: levels, monitor, Watchlist((), MonitorSettings().worst))
    found = []
    for count in (100, 1000, 10_000):
        while len(streams) < count:
            own = [Stream(f"s{len(streams) + one}", model.name, policy, 0, 0.0, saved=saved) for one in range(100)]
            streams += own
            for _ in range(5):
                values = {name: np.exp(generator.normal(size=100)) for name in (*THIRDS, "feature_distance")}
                values |= {name: generator.random(100) for name in ("agreement", "confidence", "diversity", "entropy")}
                values["parameter_distance"] = generator.random(100)
                shares = generator.dirichlet(np.ones(len(model.classes)), 100)
                monitor.update(own, np.full(100, 16), values, model.reference, shares)
        seconds = []
        for _ in range(9):
            started = time.perf_counter()
            text = recorder.render()
            seconds.append(time.perf_counter() - started)
        series = sum(len(family.samples) for family in text_string_to_metric_families(text.decode()))
        found.append(
            {"streams": count, "series": series, "bytes": len(text), "milliseconds": 1e3 * statistics.median(seconds)}
        )
    return found


THIRDS = ("bn_distance", "bn_distance_early", "bn_distance_middle", "bn_distance_late")


def main() -> None:
    """Measures and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--out", type=Path, default=None, help="where to save the figures as JSON")
    options = parser.parse_args()
    model = watched_model(torch.device("cpu"))
    table = Table(title=f"Monitoring, ResNet-20, {torch.get_num_threads()} threads, {options.rounds} rounds")
    for column in (
        "policy", "streams", "rows", "requests/s without", "monitored / without", "active / monitored",
        "canary / monitored",
    ):  # fmt: skip
        table.add_column(column, justify="left" if column == "policy" else "right")
    results: dict[str, object] = {}
    rows_of = []
    for policy in POLICIES:
        for streams, rows in track(CASES, f"measuring {policy.name}", console=Console(stderr=True)):
            found = cost(model, policy, streams, rows, options.rounds)
            ratios = [f"{found[name]:.3f}" for name in VARIANTS[1:]]
            table.add_row(policy.name, str(streams), str(rows), f"{found['off']:.1f}", *ratios)
            rows_of.append({"policy": policy.name, "streams": streams, "rows": rows, **found})
    results["throughput"] = rows_of
    results["scrape"] = scraping = scrapes(model)
    Console().print(table)
    scraped = Table("streams", "series", "bytes", "ms", title="A scrape of /metrics")
    for one in scraping:
        scraped.add_row(*(f"{one[name]:,.0f}" for name in ("streams", "series", "bytes")), f"{one['milliseconds']:.1f}")
    Console().print(scraped)
    if options.out is not None:
        options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
