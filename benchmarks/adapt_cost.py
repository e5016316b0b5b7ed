"""What adapting costs: a TENT step in the engine against forward passes in it, and against a plain PyTorch TENT loop.

    python benchmarks/adapt_cost.py [--rounds 11] [--threads N] [--out adapt_cost.png]

ResNet-20 for CIFAR and ResNet-50 for 224 x 224 images, with random weights (speed does not depend on them) and random
images. One measurement is every stream's next request: ``streams`` requests of ``rows`` images. The engine gets them
through its scheduler, so what is merged is what the server would merge.

*Forward* is the frozen source model, a compiled graph; *own forward* the same pass that TENT answers by, each request
normalised by its own statistics, without learning (policy ``norm``). The *floor* of a TENT step is two frozen forward
passes, as the pass back to the inputs of the layers costs about as much. The *plain* loop (``plain_tent.py``) keeps a
deep copy and a ``torch.optim.Adam`` per stream, as the published code does for one; it runs in a process of its own, as
a user would run it. *Plain, kept memory* is the same loop with the engine's settings of the allocator, which save it
from page faults, too. All take turns within each round; times are medians over rounds, ratios of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import example
import torch
from gpu import SHAPES, load, network
from plain_tent import LEARNING_RATE, PlainTent
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from adapters import Policy
from adapters.norm import NormPolicy
from adapters.source import SourcePolicy
from adapters.tent import Tent
from tta_server.drift.monitor import Monitor
from tta_server.engine.allocator import keep_memory
from tta_server.engine.engine import Engine, initial_state
from tta_server.engine.source import SourceModel
from tta_server.state.memory import Budget
from tta_server.state.slots import Layout
from tta_server.state.store import StateStore
from tta_server.types import Lane, Stream

Run = Callable[[], float]
"""One request of each stream; returns seconds."""
CASES = (
    *(("resnet20", streams, rows) for streams in (1, 32) for rows in (1, 8, 64, 200)),
    ("resnet50", 1, 8),
)
TENT = Tent(lr=LEARNING_RATE)


def images(name: str, streams: int, rows: int, device: torch.device | str = "cpu") -> list[Tensor]:
    """A request of each stream."""
    torch.manual_seed(0)
    return [torch.rand(rows, *SHAPES[name], device=device) for _ in range(streams)]


def engine_variant(model: SourceModel, policy: Policy, batches: list[Tensor], shadow: float = 0.0) -> Run:
    """Through scheduler and engine."""
    store = StateStore(Budget(), model.network.device)
    engine = Engine({model.name: model}, store, Monitor(20.0), shadow, monitored=shadow > 0)
    lane = Lane(model.name, policy)
    clients = [Stream(str(index), model.name, policy, index, 0.0) for index in range(len(batches))]
    step = example.through_scheduler(engine, lane, clients)
    return lambda: seconds(lambda: step(batches), batches[0].is_cuda)


def seconds(run: Callable[[], object], on_gpu: bool = False) -> float:
    """Wall time of one run, device included."""
    started = time.perf_counter()
    run()
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def plain_process(pipe: Connection, keeps_memory: bool, threads: int) -> None:
    """Runs the plain loop whenever it is asked to: once for each case that it is sent, until it is sent ``None``."""
    if keeps_memory:
        keep_memory()
    torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loop: PlainTent | None = None
    batches: list[Tensor] = []
    while (asked := pipe.recv()) is not None:
        if isinstance(asked, tuple):
            name, streams, rows = asked
            batches, loop = images(name, streams, rows, device), PlainTent(network(name).to(device))
        assert loop is not None

        def turn(loop: PlainTent = loop, batches: list[Tensor] = batches) -> None:
            for index, x in enumerate(batches):
                loop(str(index), x)

        pipe.send(seconds(turn, device == "cuda"))


class Plain:
    """The plain loop in a process of its own."""

    def __init__(self, keeps_memory: bool, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=plain_process, args=(other, keeps_memory, threads), daemon=True)
        self._process.start()

    def ask(self, what: tuple[str, int, int] | str | None) -> float:
        """Seconds of a turn of another case, or of the same once more; ``None`` ends it."""
        self._pipe.send(what)
        return 0.0 if what is None else float(self._pipe.recv())


def main() -> None:
    """Measures and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=None, help="where to save a plot")
    options = parser.parse_args()
    plain, kept = (Plain(keeps_memory, options.threads) for keeps_memory in (False, True))
    keep_memory()
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models = {name: load(name, device) for name in SHAPES}
    title = f"TENT with Adam, {device.type}, {options.threads} threads, {options.rounds} rounds; times in ms"
    table = Table(title=title)
    for column in (
        "network", "streams", "rows", "forward", "own forward", "TENT", "plain", "TENT / forward", "TENT / own",
        "TENT / floor", "TENT / plain", "TENT / plain, kept memory", "with shadow / plain",
    ):  # fmt: skip
        table.add_column(column, justify="right")
    speedups: dict[str, list[tuple[int, float]]] = {}
    for name, streams, rows in track(CASES, "measuring", console=Console(stderr=True)):
        batches, model = images(name, streams, rows, device), models[name]
        variants: dict[str, Run] = {
            "forward": engine_variant(model, SourcePolicy(), batches),
            "own": engine_variant(model, NormPolicy(), batches),
            "tent": engine_variant(model, TENT, batches),
            "shadow": engine_variant(model, TENT, batches, 0.25),
            "plain": lambda: plain.ask("again"),
            "kept": lambda: kept.ask("again"),
        }
        plain.ask((name, streams, rows)), kept.ask((name, streams, rows))
        for run in variants.values():
            run()
        rounds = options.rounds if streams * rows < 1000 and name == "resnet20" else max(3, options.rounds // 4)
        # The shadow runs on every fourth request: whole periods only.
        times = [
            {
                key: statistics.fmean(run() for _ in range(4 if key == "shadow" and streams * rows < 200 else 1))
                for key, run in variants.items()
            }
            for _ in range(rounds)
        ]
        middle = {key: statistics.median(one[key] for one in times) for key in variants}

        def ratio(above: str, below: str, times: list[dict[str, float]] = times) -> float:
            return statistics.median(one[above] / one[below] for one in times)

        table.add_row(
            name, str(streams), str(rows),
            *(f"{1e3 * middle[key]:.1f}" for key in ("forward", "own", "tent", "plain")),
            f"{ratio('tent', 'forward'):.2f}", f"{ratio('tent', 'own'):.2f}", f"{ratio('tent', 'forward') / 2:.2f}",
            f"{ratio('tent', 'plain'):.2f}", f"{ratio('tent', 'kept'):.2f}", f"{ratio('shadow', 'plain'):.2f}",
        )  # fmt: skip
        if name == "resnet20":
            label = f"{streams} stream{'s' if streams > 1 else ''}"
            speedups.setdefault(label, []).append((rows, ratio("plain", "tent")))
    plain.ask(None), kept.ask(None)
    console = Console(width=170)
    console.print(table)
    for name, model in models.items():
        state = Layout(initial_state(TENT, model)).bytes
        whole = sum(value.nbytes for value in model.source.weights.values())
        console.print(f"{name}: a TENT stream has {state:,} bytes, 1/{whole / state:.0f} of a deep copy ({whole:,})")
    if options.out is not None:
        plot(speedups, options.out)


def plot(speedups: dict[str, list[tuple[int, float]]], path: Path) -> None:
    """Saves how many times faster than the plain loop each case is."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
    for label, points in speedups.items():
        axes.plot(*zip(*points, strict=True), marker="o", label=label)
    axes.axhline(1, color="grey", linewidth=1)
    axes.set(xscale="log", xlabel="images per request", ylabel="times as fast as a plain TENT loop", ylim=(0, None))
    axes.set_xticks([1, 8, 64, 200], ["1", "8", "64", "200"])
    axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
