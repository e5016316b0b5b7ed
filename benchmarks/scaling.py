"""How throughput and latency go with the number of streams and the size of their requests.

    python benchmarks/scaling.py [--streams 1 8 64 512] [--images 1 8 64] [--rounds 3] [--seconds 4] [--out scaling-out]

TENT on a ResNet-20 (random weights, as speed does not depend on them) through the real server, over HTTP in V2 binary;
no guards and nothing shed, all else as by default. A closed loop with at most 64 requests under way and at most one of
each stream: with more streams than that, each client goes round several of its own. Figures are medians over rounds;
each round starts a server for each number of streams, and goes through the sizes in ascending order. Memory is the
server's resident memory after the size, and how much of it is more than before the first request: what smaller sizes
needed is in it. With the defaults it takes about 6 minutes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import example
import httpx
import numpy as np
import psutil
from load import Load, closed_loop
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

MOST_UNDER_WAY = 64


@dataclass(frozen=True)
class Figures:
    """Of one number of streams and one size, in one round."""

    per_second: float
    p50_ms: float
    p99_ms: float
    memory_mb: float
    grown_mb: float
    """Since before the first request."""


Results = dict[tuple[int, int], list[Figures]]
"""By streams and images a request, the rounds' figures."""


def drive(port: int, requests: list[bytes], seconds: float) -> Load:
    """A closed loop over a request of each stream, again and again; or once, with no ``seconds``."""
    clients = min(len(requests), MOST_UNDER_WAY)
    load = asyncio.run(closed_loop(port, example.in_turn(requests), clients, seconds))
    example.check_adapted(load)
    return load


def measure(streams: int, sizes: list[int], seconds: float) -> dict[int, Figures]:
    """One server with so many streams, and all sizes."""
    figures = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        example.running(example.write_config(Path(folder), **example.ADAPTING)) as (url, server),
    ):
        port, process = httpx.URL(url).port, psutil.Process(server.pid)
        assert port is not None
        ready = process.memory_info().rss / 1e6
        opening = [example.stream_request(str(number), images(1)) for number in range(streams)]
        for start in range(0, streams, MOST_UNDER_WAY):  # every stream has a state before anything is measured
            drive(port, opening[start : start + MOST_UNDER_WAY], 0.0)
        for size in sizes:
            requests = [example.stream_request(str(number), images(size)) for number in range(streams)]
            drive(port, requests, seconds / 8)
            load = drive(port, requests, seconds)
            memory = process.memory_info().rss / 1e6
            p50, p99 = example.milliseconds(answer.seconds for answer in load.answers)
            figures[size] = Figures(len(load.answers) / load.seconds, p50, p99, memory, memory - ready)
    return figures


def images(count: int) -> example.Images:
    """Fixed images."""
    return np.random.default_rng(count).random((count, 3, 32, 32), dtype=np.float32)


def middle(figures: list[Figures], name: str) -> float:
    """Median over the rounds."""
    return float(statistics.median(getattr(one, name) for one in figures))


def report(results: Results) -> Table:
    """The table of all figures."""
    table = Table(title=f"TENT, ResNet-20, closed loop, at most {MOST_UNDER_WAY} requests under way")
    for column in (
        "images", "streams", "requests/s", "images/s", "of 1 stream's", "p50 ms", "p99 ms", "MB", "grown MB",
    ):  # fmt: skip
        table.add_column(column, justify="right")
    fewest = min(streams for streams, _ in results)
    table.columns[4].header = f"of {fewest} stream's" if fewest == 1 else f"of {fewest} streams'"
    for size in dict.fromkeys(size for _, size in results):
        for streams in dict.fromkeys(streams for streams, _ in results):
            own, first = results[streams, size], results[fewest, size]
            ratio = statistics.median(a.per_second / b.per_second for a, b in zip(own, first, strict=True))
            rate = middle(own, "per_second")
            table.add_row(
                str(size),
                str(streams),
                f"{rate:.1f}",
                f"{size * rate:.0f}",
                f"{ratio:.2f}",
                *(f"{middle(own, name):.1f}" for name in ("p50_ms", "p99_ms")),
                *(f"{middle(own, name):.0f}" for name in ("memory_mb", "grown_mb")),
            )
        table.add_section()
    return table


def plot(results: Results, path: Path) -> None:
    """Saves images per second, 99th percentile and memory over the number of streams."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 3, figsize=(11, 3.5), layout="constrained")
    counts = list(dict.fromkeys(streams for streams, _ in results))
    for size in dict.fromkeys(size for _, size in results):
        label = f"{size} image{'s' if size > 1 else ''} a request"
        for axes, name, factor in zip(panels, ("per_second", "p99_ms", "memory_mb"), (size, 1, 1), strict=True):
            figures = [factor * middle(results[streams, size], name) for streams in counts]
            axes.plot(counts, figures, marker="o", label=label)
    for axes, what in zip(panels, ("images a second", "p99, ms", "server's resident memory, MB"), strict=True):
        axes.set(xscale="log", xlabel="streams", ylabel=what)
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.minorticks_off()
    panels[1].set(yscale="log")
    for axes in (panels[0], panels[2]):
        axes.set(ylim=(0, None))
    panels[0].legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measures, prints the table, saves figures and plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 64, 512])
    parser.add_argument("--images", type=int, nargs="+", default=[1, 8, 64], help="in a request")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0, help="of one measurement")
    parser.add_argument("--out", type=Path, default=Path("scaling-out"), help="folder for scaling.json and .png")
    options = parser.parse_args()
    counts, sizes = sorted(options.streams), sorted(options.images)
    busy = os.getloadavg()[0]
    results: Results = {(streams, size): [] for streams in counts for size in sizes}
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=options.rounds * len(counts))
        for number in range(options.rounds):
            for streams in counts:
                progress.update(task, description=f"round {number + 1}: {streams} stream{'s' if streams > 1 else ''}")
                for size, figures in measure(streams, sizes, options.seconds).items():
                    results[streams, size].append(figures)
                progress.advance(task)
    Console().print(report(results))
    Console().print(f"The machine's load average before the first turn was {busy:.2f}; it should be near 0.")
    options.out.mkdir(parents=True, exist_ok=True)
    content = {
        "most_under_way": MOST_UNDER_WAY,
        "load_average_before": busy,
        "cases": [
            {"streams": streams, "images": size, "rounds": [asdict(one) for one in figures]}
            for (streams, size), figures in results.items()
        ],
    }
    (options.out / "scaling.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    plot(results, options.out / "scaling.png")
    Console().print(f"wrote {options.out}/scaling.json and scaling.png")


if __name__ == "__main__":
    main()
