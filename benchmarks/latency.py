"""What does a client feel of adaptation? Latencies of TENT streams over those of the same streams frozen.

    python benchmarks/latency.py [--load 0.5] [--seconds 25] [--rounds 3] [--stream JSON] [--out latency-out]

The real server, over HTTP in V2 binary; ResNet-20 (random weights, as speed does not depend on them); 16 streams; no
guards and nothing shed, all else as by default. Two cases: an image a request with TENT on a ``window`` of 16, and 16
images a request with TENT. First a closed loop, one client a stream, finds how many requests a second the server
answers and adapts to. Then requests arrive at random (Poisson, seeds fixed) at ``--load`` of that rate, each of a
random stream, and are sent when they are due, whatever is still under way. In each round the streams adapt and are
frozen (``adapt`` off) in turn, with the same arrivals.

A latency is the time from when a request was *due* to the last byte of its answer: a late sender or a queue hides
nothing. Ratios are medians of the rounds' ratios; the figures in milliseconds and the plot are of all rounds together.
``--stream`` is put over the body with which each stream is opened, for settings of streams to be compared: for instance
``--stream '{"settings": {"lr": 1e-4}}'``. With the defaults it takes 6 minutes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import selectors
import statistics
import tempfile
from collections.abc import Coroutine
from dataclasses import asdict, dataclass, field
from pathlib import Path

import example
import httpx
import numpy as np
from load import Load, closed_loop, on_schedule
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

STREAMS = 16
WARM_UP_SECONDS = 2.0
CAPACITY_SECONDS = 8.0
MOST_CONNECTIONS = 400
AIMS = (1.15, 1.5)
"""Of the ratios of p50 and p99."""


@dataclass(frozen=True)
class Case:
    """What the streams send and do."""

    name: str
    images: int
    """In a request."""
    settings: dict[str, object] = field(default_factory=dict)
    """Of TENT."""


CASES = (Case("1 image, window 16", 1, {"window": 16}), Case("16 images", 16))


@dataclass
class Result:
    """Of one case."""

    case: Case
    capacity: float
    """Adapting requests a second in the closed loop."""
    adapted: list[list[float]] = field(default_factory=list)
    """Latencies in seconds by round."""
    frozen: list[list[float]] = field(default_factory=list)
    lateness: list[float] = field(default_factory=list)
    """Seconds from when a request was due until it was sent, of all rounds: the load generator's own part."""
    generator_cpu: float = 0.0
    """Largest share of one core that the load generator took."""

    def ratio(self, percentile: int) -> float:
        """Median of the rounds' ratios, adapted over frozen."""
        pairs = zip(self.adapted, self.frozen, strict=True)
        return statistics.median(float(np.percentile(a, percentile) / np.percentile(f, percentile)) for a, f in pairs)


def drive(work: Coroutine[None, None, Load]) -> Load:
    """Runs it on an event loop that wakes up in time: epoll's, the default, sleeps whole milliseconds."""
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selectors.SelectSelector())) as runner:
        return runner.run(work)


def arrivals(rate: float, seconds: float, seed: int) -> tuple[list[float], list[int]]:
    """When requests arrive, in seconds from the start, and of which streams."""
    generator = np.random.default_rng(seed)
    due = np.cumsum(generator.exponential(1 / rate, round(1.5 * rate * seconds) + 100))
    due = due[due < seconds]
    return due.tolist(), generator.integers(STREAMS, size=len(due)).tolist()


def open_streams(client: httpx.Client, case: Case, more: dict[str, object]) -> None:
    """Opens the case's streams, as ``more`` says."""
    settings = more.get("settings", {})
    assert isinstance(settings, dict)
    body = {"policy": "tent", **more, "settings": case.settings | settings}
    for stream in range(STREAMS):
        client.put(f"/v1/streams/{case.images}-{stream}", json=body).raise_for_status()


def measure(url: str, case: Case, more: dict[str, object], options: argparse.Namespace, progress: Progress) -> Result:
    """The closed loop, and the rounds."""
    port = httpx.URL(url).port
    assert port is not None
    x = np.random.default_rng(0).random((case.images, 3, 32, 32), dtype=np.float32)
    requests = [example.stream_request(f"{case.images}-{stream}", x) for stream in range(STREAMS)]
    with httpx.Client(base_url=url, timeout=120) as client:
        open_streams(client, case, more)
        task = progress.add_task(f"{case.name}: capacity", total=1 + 2 * options.rounds)
        drive(closed_loop(port, example.in_turn(requests), STREAMS, WARM_UP_SECONDS))
        closed = drive(closed_loop(port, example.in_turn(requests), STREAMS, CAPACITY_SECONDS))
        example.check_adapted(closed)
        result = Result(case, len(closed.answers) / closed.seconds)
        progress.advance(task)
        for turn in range(options.rounds):
            due, streams = arrivals(options.load * result.capacity, options.seconds, turn)
            for adapt in (True, False) if turn % 2 == 0 else (False, True):
                progress.update(task, description=f"{case.name}: {'TENT' if adapt else 'frozen'}")
                for stream in range(STREAMS):
                    client.patch(f"/v1/streams/{case.images}-{stream}", json={"adapt": adapt}).raise_for_status()
                sent = [requests[stream] for stream in streams]
                load = drive(on_schedule(port, sent.__getitem__, due, MOST_CONNECTIONS))
                if load.unsent:
                    raise SystemExit(f"{load.unsent} requests found no connection: the server does not keep up")
                example.check_adapted(load, adapt)
                late = [one.sent - load.started - due[one.number] for one in load.answers]
                latencies = [wait + one.seconds for wait, one in zip(late, load.answers, strict=True)]
                (result.adapted if adapt else result.frozen).append(latencies)
                result.lateness += late
                result.generator_cpu = max(result.generator_cpu, load.cpu_seconds / load.seconds)
                progress.advance(task)
    return result


def report(results: list[Result], load: float) -> Table:
    """The table of all figures."""
    table = Table(title=f"ResNet-20, {STREAMS} streams, open loop at {load:.0%} of the adapting capacity")
    for column in ("requests", "capacity/s", "sent", "streams", "p50 ms", "p99 ms", "p50 ratio", "p99 ratio"):
        table.add_column(column, justify="left" if column in ("requests", "streams") else "right")
    for result in results:
        for name, rounds in (("TENT", result.adapted), ("frozen", result.frozen)):
            latencies = [one for latencies in rounds for one in latencies]
            table.add_row(
                result.case.name,
                f"{result.capacity:.1f}",
                f"{len(latencies):,}",
                name,
                *(f"{one:.1f}" for one in example.milliseconds(latencies)),
                *(f"{result.ratio(percentile):.2f}" if name == "TENT" else "" for percentile in (50, 99)),
            )
        table.add_section()
    late = ", ".join(f"{example.milliseconds(result.lateness)[1]:.2f} ms" for result in results)
    cpu = ", ".join(f"{result.generator_cpu:.2f}" for result in results)
    table.caption = (
        f"Aim: ratios of at most {AIMS[0]} and {AIMS[1]}. Load generator: p99 of its lateness {late}; {cpu} of a core."
    )
    return table


def plot(results: list[Result], path: Path) -> None:
    """Saves the share of requests that took longer, over latency."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        1, len(results), figsize=(9, 3.5), layout="constrained", sharey=True, squeeze=False
    )
    for result, axes in zip(results, panels[0], strict=True):
        for name, rounds in (("TENT", result.adapted), ("frozen", result.frozen)):
            latencies = np.sort(np.concatenate(rounds))
            axes.plot(1e3 * latencies, 1 - np.arange(len(latencies)) / len(latencies), label=name)
        axes.set(title=result.case.name, xlabel="latency, ms", xscale="log", yscale="log", ylim=(1e-3, 1))
        axes.grid(alpha=0.3)
        axes.legend()
    panels[0][0].set(ylabel="share of requests that took longer")
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measures, prints the table, saves figures and plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", type=float, default=0.5, help="arrivals as a share of the adapting capacity")
    parser.add_argument("--seconds", type=float, default=25.0, help="of arrivals, in each turn")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--stream", type=json.loads, default={}, help="JSON, over the body that opens a stream")
    parser.add_argument("--out", type=Path, default=Path("latency-out"), help="folder for latency.json and .png")
    options = parser.parse_args()
    busy = os.getloadavg()[0]
    with (
        tempfile.TemporaryDirectory() as folder,
        example.running(example.write_config(Path(folder), **example.ADAPTING)) as (url, _),
        Progress(console=Console(stderr=True)) as progress,
    ):
        results = [measure(url, case, options.stream, options, progress) for case in CASES]
    Console().print(report(results, options.load))
    Console().print(f"The machine's load average before the first turn was {busy:.2f}; it should be near 0.")
    options.out.mkdir(parents=True, exist_ok=True)
    content = {
        "load": options.load,
        "stream": options.stream,
        "load_average_before": busy,
        "cases": [
            asdict(one) | {"p50_ratio": one.ratio(50), "p99_ratio": one.ratio(99)} | {"lateness": max(one.lateness)}
            for one in results
        ],
    }
    (options.out / "latency.json").write_text(json.dumps(content) + "\n", encoding="utf-8")
    plot(results, options.out / "latency.png")
    Console().print(f"wrote {options.out}/latency.json and latency.png")


if __name__ == "__main__":
    main()
