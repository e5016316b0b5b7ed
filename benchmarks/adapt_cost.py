"""What adapting costs: a TENT step in the engine against a plain forward in it, and against a plain PyTorch TENT loop.

    python benchmarks/adapt_cost.py [--rounds 15] [--threads N] [--out adapt_cost.png]

ResNet-20 for CIFAR with random weights (speed does not depend on them) and random images. One measurement is every
stream's next request: ``streams`` requests of ``rows`` images. The engine gets them through its scheduler, with the
server's default limits, so what is merged is what the server would merge. The plain loop keeps one deep-copied model
and one ``torch.optim.Adam`` per stream, as the published code does for one. All variants take turns within each round;
times are medians over rounds, ratios are medians of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import example
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from adapters import Policy
from adapters.source import SourcePolicy
from adapters.tent import Tent
from tta_server.drift.monitor import Monitor
from tta_server.engine.engine import Engine
from tta_server.engine.source import SourceModel, load_model
from tta_server.settings import load_settings
from tta_server.state.memory import Budget
from tta_server.state.store import StateStore
from tta_server.types import Lane, Stream

LEARNING_RATE = 1e-3


def example_model(device: torch.device) -> SourceModel:
    """The example's network as the engine loads it."""
    with tempfile.TemporaryDirectory() as folder:
        return load_model("resnet20", load_settings(example.write_config(Path(folder))), device)


def engine_variant(model: SourceModel, policy: Policy, streams: int, shadow: float) -> Callable[[list[Tensor]], None]:
    """Runs one request of each stream through scheduler and engine."""
    store = StateStore(Budget(), model.network.device)
    engine = Engine({model.name: model}, store, Monitor(20.0), shadow, monitored=shadow > 0)
    lane = Lane(model.name, policy)
    clients = [Stream(str(index), model.name, policy, index, 0.0) for index in range(streams)]

    return example.through_scheduler(engine, lane, clients)


def plain_variant(network: nn.Module, streams: int) -> Callable[[list[Tensor]], None]:
    """TENT as its paper's code runs it, once per stream: batch statistics, entropy, Adam over the norm layers."""
    models, optimisers = [], []
    for _ in range(streams):
        model = copy.deepcopy(network).train().requires_grad_(False)
        adapted: list[Tensor] = []
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.track_running_stats, module.running_mean, module.running_var = False, None, None
                adapted += [module.weight.requires_grad_(), module.bias.requires_grad_()]
        models.append(model)
        optimisers.append(torch.optim.Adam(adapted, lr=LEARNING_RATE))

    def run(batches: list[Tensor]) -> None:
        for model, optimiser, x in zip(models, optimisers, batches, strict=True):
            logits = model(x)
            loss = -(logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()

    return run


def seconds(run: Callable[[list[Tensor]], None], batches: list[Tensor]) -> float:
    """Wall time of one run, device included."""
    started = time.perf_counter()
    run(batches)
    if batches[0].is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=None, help="where to save a plot")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, network = example_model(device), example.network().to(device)
    tent = Tent(lr=LEARNING_RATE)
    table = Table(title=f"ResNet-20, TENT with Adam, {device.type}, {options.threads} threads, {options.rounds} rounds")
    for column in (
        "streams",
        "rows",
        "forward ms",
        "TENT ms",
        "TENT / forward",
        "plain TENT ms",
        "TENT / plain",
        "with shadow / plain",
    ):
        table.add_column(column, justify="right")
    speedups: dict[int, list[tuple[int, float]]] = {}
    cases = [(streams, rows) for streams in (1, 32) for rows in (1, 8, 64, 200)]
    for streams, rows in track(cases, "measuring", console=Console(stderr=True)):
        batches = [torch.rand(rows, 3, 32, 32, device=device) for _ in range(streams)]
        variants = {
            "forward": engine_variant(model, SourcePolicy(), streams, 0.0),
            "tent": engine_variant(model, tent, streams, 0.0),
            "shadow": engine_variant(model, tent, streams, 0.25),
            "plain": plain_variant(network, streams),
        }
        for run in variants.values():
            run(batches)
        rounds = options.rounds if streams * rows < 1000 else max(3, options.rounds // 5)
        # The shadow runs on every fourth request: whole periods only.
        times = [
            {
                name: statistics.fmean(
                    seconds(run, batches) for _ in range(4 if name == "shadow" and rows < 200 else 1)
                )
                for name, run in variants.items()
            }
            for _ in range(rounds)
        ]
        middle = {name: statistics.median(one[name] for one in times) for name in variants}

        def ratio(above: str, below: str, times: list[dict[str, float]] = times) -> float:
            return statistics.median(one[above] / one[below] for one in times)

        table.add_row(
            str(streams), str(rows),
            *(f"{1e3 * middle[name]:.1f}" for name in ("forward", "tent")), f"{ratio('tent', 'forward'):.2f}",
            f"{1e3 * middle['plain']:.1f}", f"{ratio('tent', 'plain'):.2f}", f"{ratio('shadow', 'plain'):.2f}",
        )  # fmt: skip
        speedups.setdefault(streams, []).append((rows, ratio("plain", "tent")))
    Console().print(table)
    if options.out is not None:
        plot(speedups, options.out)


def plot(speedups: dict[int, list[tuple[int, float]]], path: Path) -> None:
    """Saves how many times faster than the plain loop each case is."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
    for streams, points in speedups.items():
        axes.plot(*zip(*points, strict=True), marker="o", label=f"{streams} stream{'s' if streams > 1 else ''}")
    axes.axhline(1, color="grey", linewidth=1)
    axes.set(xscale="log", xlabel="images per request", ylabel="times as fast as a plain TENT loop", ylim=(0, None))
    axes.set_xticks([1, 8, 64, 200], ["1", "8", "64", "200"])
    axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
