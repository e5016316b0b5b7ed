"""What adapting a whole network costs: CoTTA and RMT steps in the engine against plain PyTorch loops.

    python benchmarks/full_model.py [--rounds 5] [--threads N] [--rows 8 64 200] [--streams 1 4] [--out full_model.png]

ResNet-20 for CIFAR with random weights and random images, prototypes and replay images, as speed does not depend on
them. CoTTA is always unsure: each answer averages 32 augmented views. RMT runs with replay, and source-free. One
measurement is every stream's next request, through scheduler and engine with the server's default limits, or through
the loops of ``plain_teacher.py``, one object per stream. Both take turns within each round, in one process; times are
medians over rounds, ratios are medians of the rounds' ratios. Before measuring, both take a step on the same views, and
have to find the same gradients.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import example
import gpu
import plain_teacher
import torch
from adapt_cost import seconds
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from adapters import Policy, contrast
from adapters.augment import augment
from adapters.base import Segments
from adapters.cotta import Cotta
from adapters.images import ImageStore
from adapters.rmt import Rmt
from adapters.rng import Random
from tta_server.drift.monitor import Monitor
from tta_server.engine.allocator import keep_memory
from tta_server.engine.engine import Engine
from tta_server.engine.source import SourceModel
from tta_server.state.memory import Budget
from tta_server.state.store import StateStore
from tta_server.types import Lane, Stream

REPLAY = 512
"""Source images to choose from."""
POLICIES: dict[str, Policy] = {
    "CoTTA": Cotta(threshold=1.1, augmentations=plain_teacher.VIEWS),
    "RMT": Rmt(warm_up=False),
    "RMT, source-free": Rmt(warm_up=False, lambda_source=0.0),
}
Plain = plain_teacher.PlainCotta | plain_teacher.PlainRmt


class Engined(NamedTuple):
    """Streams in the engine: what runs a request of each, and what holds their states."""

    run: Callable[[list[Tensor]], None]
    store: StateStore
    lane: Lane
    streams: list[Stream]


def engined(model: SourceModel, policy: Policy, streams: int) -> Engined:
    """So many new streams of a policy."""
    store = StateStore(Budget(), model.network.device)
    engine = Engine({model.name: model}, store, Monitor(20.0), 0.0, monitored=False)
    lane = Lane(model.name, policy)
    clients = [Stream(str(index), model.name, policy, index, 0.0) for index in range(streams)]
    return Engined(example.through_scheduler(engine, lane, clients), store, lane, clients)


def prepared(model: SourceModel) -> SourceModel:
    """The model with artefacts for RMT, at random."""
    source, generator = model.source, torch.Generator().manual_seed(0)
    images = torch.randint(256, (REPLAY, *source.input_shape), dtype=torch.uint8, generator=generator)
    made = {
        "prototypes/mean": torch.rand(source.num_classes, source.feature_dim, generator=generator),
        "prototypes/counts": torch.ones(source.num_classes),
        "replay/images": images,
        "replay/labels": torch.randint(source.num_classes, (REPLAY,), generator=generator),
    }
    return replace(model, source=replace(source, artefacts={**source.artefacts, **made}))


def plain(model: SourceModel, policy: Policy, view: plain_teacher.View = plain_teacher.augmented) -> Plain:
    """One stream of a policy in plain PyTorch."""
    source, network = model.source, example.network()
    if isinstance(policy, Cotta):
        return plain_teacher.PlainCotta(network, source.head, view, policy.augmentations, policy.restore)
    assert isinstance(policy, Rmt)
    width, features = policy.projection, source.feature_dim
    projector = nn.Sequential(nn.Linear(features, width), nn.ReLU(), nn.Linear(width, width))
    drawn = contrast.new_projector(source, width)
    with torch.no_grad():
        for own, value in zip(projector.parameters(), drawn.values(), strict=True):
            own.copy_(value[0])
    images, replay = source.artefact("replay"), None
    if policy.lambda_source:
        replay = ImageStore(source).unpack(images["images"]), images["labels"]
    return plain_teacher.PlainRmt(network, source.head, view, source.artefact("prototypes")["mean"], projector, replay)


def check(model: SourceModel) -> None:
    """A step of engine and loop on the same views, without what each draws for itself (restoration, replay). Raises
    ``SystemExit`` where their gradients differ by more than 2 %: rounding alone flips a few of a ReLU's decisions."""
    cases = {"CoTTA": Cotta(threshold=1.1, augmentations=4, restore=0.0), "RMT": POLICIES["RMT, source-free"]}
    for name, policy in cases.items():
        ours = engined(model, policy, 1)
        stream = ours.streams[0]
        called = "augment {}" if name == "CoTTA" else "augment"

        def view(x: Tensor, k: int, stream: Stream = stream, called: str = called) -> Tensor:
            random = Random(torch.tensor([stream.random_key]), torch.tensor([stream.version]))
            return augment(x, Segments([len(x)]), model.source, random.named(called.format(k)))

        theirs = plain(model, policy, view)
        x = torch.rand(16, *model.source.input_shape, generator=torch.Generator().manual_seed(0))
        theirs.step(x)
        ours.run([x])
        memory = ours.store.export(ours.lane, stream).memory
        plainly = {key: theirs.optimiser.state[value]["exp_avg"] for key, value in theirs.student.named_parameters()}
        apart = _length([memory[f"adam.m.{key}"][0] - value for key, value in plainly.items()])
        if apart > 0.02 * _length(list(plainly.values())):
            raise SystemExit(f"{name}: the engine's gradient is another one than the plain loop's")


def _length(values: list[Tensor]) -> float:
    return float(torch.cat([one.flatten() for one in values]).norm())


class Row(NamedTuple):
    """One line of the table."""

    policy: str
    streams: int
    rows: int
    engine_ms: float
    plain_ms: float
    ratio: float
    engine_mb: float
    plain_mb: float


def measure(model: SourceModel, name: str, streams: int, rows: int, rounds: int) -> Row:
    """Times of one case, and the memory of a stream."""
    ours = engined(model, POLICIES[name], streams)
    theirs = [plain(model, POLICIES[name]) for _ in range(streams)]
    batches = [torch.rand(rows, *model.source.input_shape) for _ in range(streams)]

    def run_plain(batches: list[Tensor]) -> None:
        for loop, x in zip(theirs, batches, strict=True):
            loop.step(x)

    ours.run(batches)
    run_plain(batches)
    times = [(seconds(lambda: ours.run(batches)), seconds(lambda: run_plain(batches))) for _ in range(rounds)]
    held, size = ours.store.counts()["device"]
    return Row(
        name,
        streams,
        rows,
        1e3 * statistics.median(one for one, _ in times),
        1e3 * statistics.median(one for _, one in times),
        statistics.median(one / other for one, other in times),
        size / held / 1e6,
        sum(value.numel() * value.itemsize for value in theirs[0].tensors()) / 1e6,
    )


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 64, 200], help="images per request")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--out", type=Path, default=None, help="where to save a plot")
    options = parser.parse_args()
    keep_memory()
    torch.set_num_threads(options.threads)
    model = prepared(gpu.load("resnet20", torch.device("cpu")))
    check(model)
    cases = list(itertools.product(POLICIES, options.streams, options.rows))
    found = [
        measure(model, *case, rounds=options.rounds if case[1] * case[2] < 200 else max(2, options.rounds // 2))
        for case in track(cases, "measuring", console=Console(stderr=True))
    ]
    table = Table(title=f"ResNet-20, all weights, Adam, CPU, {options.threads} threads, {options.rounds} rounds")
    for column in ("policy", "streams", "rows", "engine ms", "plain ms", "engine / plain", "MB a stream", "MB plain"):
        table.add_column(column, justify="left" if column == "policy" else "right")
    for row in found:
        table.add_row(
            row.policy, str(row.streams), str(row.rows), f"{row.engine_ms:.0f}", f"{row.plain_ms:.0f}",
            f"{row.ratio:.2f}", f"{row.engine_mb:.1f}", f"{row.plain_mb:.1f}",
        )  # fmt: skip
    Console().print(table)
    if options.out is not None:
        plot(found, options.out)


def plot(found: list[Row], path: Path) -> None:
    """Saves how many times faster than the plain loop each case is."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
    for (name, streams), rows in itertools.groupby(found, lambda row: (row.policy, row.streams)):
        points = [(row.rows, 1 / row.ratio) for row in rows]
        axes.plot(*zip(*points, strict=True), marker="o", label=f"{name}, {streams} stream{'s' if streams > 1 else ''}")
    ticks = sorted({row.rows for row in found})
    axes.axhline(1, color="grey", linewidth=1)
    axes.set(xscale="log", xlabel="images per request", ylabel="times as fast as a plain loop", ylim=(0, None))
    axes.set_xticks(ticks, [str(one) for one in ticks])
    axes.minorticks_off()
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
