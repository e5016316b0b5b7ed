"""64 streams that adapt by TENT: this server beside LitServe around a plain TENT loop, and beside that loop by itself.

    pip install litserve safetensors numpy httptools uvloop     # in any environment with the same torch
    python benchmarks/throughput.py --litserve-python PATH [--rounds 3] [--seconds 3] [--out throughput-out]

ResNet-20 (random weights, as speed does not depend on them), 1, 16 and 64 images a request. A closed loop: each stream
sends its next request when its last one is answered. This server gets V2 binary; it has no guards and sheds nothing,
so that every request adapts, which is checked; all else is as by default, monitoring too, but for the row that says so.
LitServe gets bare float32 values, keeps a deep copy of the network and an optimiser for each stream
(``serve_tent_litserve.py``), and first tries several ways to be set up. *Two LitServes* have a core and half of the
streams each, and the client knows who has which: LitServe itself cannot send a stream to the worker that has its model.
*Loop* is the same code with no server (``plain_tent.py``); the last row is the loop with the settings of glibc's
allocator that keep freed memory, otherwise set up as the loop. Rivals run in the environment as it is, but for that
row.

All take turns, in rounds: figures are medians over rounds, ratios of requests per second are medians of the rounds'
ratios. In a turn the sizes come in ascending order, with the same streams. Memory is the resident memory of all the
processes of a server after a size, what smaller ones needed included; pages that processes share are counted in each.
*Grown* is how much more that is than before the first request. Before a size is measured, the first answer of a new
stream is compared with the plain network's, in train mode.

With the defaults it takes 8 minutes on two cores; ``--only`` and ``--rounds`` make it shorter.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import example
import numpy as np
import psutil
import torch
import wire
from load import Load, closed_loop, post
from numpy.typing import NDArray
from plain_tent import PlainTent, images
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

HERE = Path(__file__).parent
STREAMS = 64
SIZES = (1, 16, 64)
"""Images in a request."""
TRIAL_SECONDS = 1.5
MALLOC = {
    "MALLOC_TRIM_THRESHOLD_": str(512 * 2**20),
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TOP_PAD_": str(64 * 2**20),
    "MALLOC_ARENA_MAX": "1",
}
"""Of glibc: freed memory stays with the process, in one arena."""

Scores = NDArray[np.float32]
Setup = tuple[str, ...]


@dataclass(frozen=True)
class Rival:
    """Who is measured, this server included."""

    name: str
    turn: Turn
    setups: tuple[Setup, ...] = ((),)
    like: str = ""
    """Whose setups it takes, by short name, where that one is measured, too."""


@dataclass(frozen=True)
class Figures:
    """One turn of one of them, with one size."""

    per_second: float
    p50_ms: float
    p99_ms: float
    ready_mb: float
    """Resident memory before the first request, of all processes."""
    memory_mb: list[float]
    """And after the last, by process, the largest first."""
    load_cpu: float
    """Share of one core that the load generator took."""


Turn = Callable[[Setup, list[int], float], dict[int, Figures]]
"""A turn with some sizes, so many seconds each."""


def check(name: str, size: int, scores: Scores) -> None:
    """Raises ``SystemExit`` unless the scores are the plain network's in train mode, but for rounding."""
    expected = PlainTent(example.network())("", images(size)).numpy()
    gap = float(np.abs(scores - expected).max())
    if not gap <= wire.TOLERANCE * float(np.abs(expected).max()):
        raise SystemExit(f"{name} answers other scores than the plain network, by up to {gap:.2g}")


def http_turn(server: wire.Server, copies: int = 1) -> Turn:
    """Turns of a server, or of several that share the streams out among them."""

    def request(stream: str, size: int) -> bytes:
        x = images(size).numpy()
        if server.wire is wire.RAW:
            return post("/predict", x.tobytes(), {"Content-Type": "application/octet-stream", "X-Stream": stream})
        return example.stream_request(stream, x)

    async def drive(ports: list[int], requests: list[list[bytes]], seconds: float) -> list[Load]:
        """A closed loop in which every answer must be a good one."""
        pairs = zip(ports, requests, strict=True)
        loads = await asyncio.gather(
            *(closed_loop(port, example.in_turn(own), len(own), seconds) for port, own in pairs)
        )
        for answer in (answer for load in loads for answer in load.answers):
            if answer.status != 200:
                raise SystemExit(
                    f"{server.name} answered {answer.status}: {answer.body[:500].decode(errors='replace')}"
                )
        return loads

    def turn(setup: Setup, sizes: list[int], seconds: float) -> dict[int, Figures]:
        figures = {}
        with contextlib.ExitStack() as stack:
            ports = [stack.enter_context(wire.running(server, setup)) for _ in range(copies)]
            ready = sum(resident())
            for number, size in enumerate(sizes):
                (first,) = asyncio.run(drive(ports[:1], [[request(f"first-{size}", size)]], 0.0))
                check(server.name, size, server.wire.scores(first.answers[0]))
                streams = [[request(str(id), size) for id in range(one, STREAMS, copies)] for one in range(copies)]
                if number == 0:
                    asyncio.run(drive(ports, streams, 0.0))  # a request of each opens them
                loads = asyncio.run(drive(ports, streams, seconds))
                if server.wire is not wire.RAW:
                    example.check_adapted(loads[0])
                answers = [answer for load in loads for answer in load.answers]
                figures[size] = Figures(
                    sum(len(load.answers) / load.seconds for load in loads),
                    *example.milliseconds(answer.seconds for answer in answers),
                    ready,
                    resident(),
                    max(load.cpu_seconds / load.seconds for load in loads),
                )
        return figures

    return turn


def resident() -> list[float]:
    """Memory of each process below this one, MB, largest first."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            found.append(process.memory_info().rss / 1e6)
    return sorted(found, reverse=True)


def loop_turn(folder: Path, name: str, environment: dict[str, str]) -> Turn:
    """Turns of the loop without a server."""

    def turn(setup: Setup, sizes: list[int], seconds: float) -> dict[int, Figures]:
        command = [sys.executable, str(HERE / "plain_tent.py"), str(folder), "--streams", str(STREAMS)]
        command += ["--images", *map(str, sizes), "--seconds", str(seconds), *setup]
        done = subprocess.run(command, env=os.environ | environment, stdout=subprocess.PIPE, check=True)
        figures = {}
        for line in done.stdout.splitlines():
            content = json.loads(line)
            size = content.pop("images")
            check(name, size, np.array(content.pop("scores"), np.float32))
            figures[size] = Figures(**content, load_cpu=0.0)
        return figures

    return turn


LITSERVE_SETUPS: tuple[Setup, ...] = (
    ("--batch", "1"),
    ("--batch", "1", "--threads", "1"),
    ("--batch", "8", "--wait", "0.002"),
    ("--batch", "32", "--wait", "0.005", "--threads", "1"),
    ("--batch", "32", "--wait", "0.005", "--threads", "1", "--fast-queue"),
)
TWIN_SETUPS: tuple[Setup, ...] = (LITSERVE_SETUPS[3],)
LOOP_SETUPS: tuple[Setup, ...] = ((), ("--threads", "1"))


@contextlib.contextmanager
def rivals(litserve_python: str) -> Iterator[dict[str, Rival]]:
    """Everybody, by a short name."""
    with tempfile.TemporaryDirectory() as name:
        commands = {}
        for key, sections in (("ours", {}), ("unwatched", {"monitor": {"enabled": False}})):
            folder = Path(name) / key
            folder.mkdir()
            config = example.write_config(folder, **example.ADAPTING, **sections)
            commands[key] = (sys.executable, "-m", "tta_server", "serve", str(config))
        ours, unwatched = (
            wire.Server("tta-server" + suffix, wire.BINARY, "/v2/health/ready", commands[key])
            for key, suffix in (("ours", ""), ("unwatched", ", no monitoring"))
        )
        command = (litserve_python, str(HERE / "serve_tent_litserve.py"), str(folder))
        litserve = wire.Server("LitServe", wire.RAW, "/health", command)
        yield {
            "ours": Rival(ours.name, http_turn(ours)),
            "unwatched": Rival(unwatched.name, http_turn(unwatched)),
            "litserve": Rival(litserve.name, http_turn(litserve), LITSERVE_SETUPS),
            "twins": Rival("two LitServes", http_turn(litserve, 2), TWIN_SETUPS),
            "loop": Rival("loop", loop_turn(folder, "loop", {}), LOOP_SETUPS),
            "malloc": Rival("loop, allocator set", loop_turn(folder, "loop", MALLOC), like="loop"),
        }


Results = dict[str, dict[int, list[Figures]]]
"""By rival and images in a request, the rounds' figures."""


def run(
    chosen: dict[str, Rival], sizes: list[int], rounds: int, seconds: float
) -> tuple[Results, dict[str, dict[int, Setup]]]:
    """All turns of all rivals, and with which setup they went."""
    with Progress(console=Console(stderr=True)) as progress:
        trials = sum(len(rival.setups) for rival in chosen.values() if len(rival.setups) > 1)
        task = progress.add_task("", total=trials + rounds * len(chosen))
        setups: dict[str, dict[int, Setup]] = {}
        for key, rival in chosen.items():
            setups[key] = setups.get(rival.like) or dict.fromkeys(sizes, rival.setups[0])
            if len(rival.setups) > 1:
                tried: dict[Setup, dict[int, Figures]] = {}
                for setup in rival.setups:
                    progress.update(task, description=f"trial: {rival.name} {' '.join(setup)}")
                    tried[setup] = rival.turn(setup, sizes, TRIAL_SECONDS)
                    each = ", ".join(f"{one.per_second:.1f}/s of {size}" for size, one in tried[setup].items())
                    progress.console.print(" ".join([rival.name, *setup]) + f": {each}", highlight=False)
                    progress.advance(task)
                for size in sizes:
                    setups[key][size] = max((tried[setup][size].per_second, setup) for setup in tried)[1]
        results: Results = {key: {size: [] for size in sizes} for key in chosen}
        for number in range(rounds):
            for key, rival in chosen.items():
                for setup in dict.fromkeys(setups[key].values()):
                    progress.update(task, description=f"round {number + 1}: {rival.name} {' '.join(setup)}")
                    own = [size for size in sizes if setups[key][size] == setup]
                    for size, one in rival.turn(setup, own, seconds).items():
                        results[key][size].append(one)
                progress.advance(task)
    return results, setups


def report(results: Results, chosen: dict[str, Rival], setups: dict[str, dict[int, Setup]]) -> Table:
    """The table of all figures."""
    table = Table(title=f"{STREAMS} TENT streams of ResNet-20, a request of each under way")
    compared = [key for key in ("litserve", "twins", "loop", "malloc") if key in chosen]
    columns = ("who", "images", "requests/s", "p50 ms", "p99 ms", "MB", "grown MB")
    for column in (*columns, *(f"vs {key}" for key in compared)):
        table.add_column(column, justify="left" if column == "who" else "right")
    for size in next(iter(results.values())):
        for key, rival in chosen.items():
            own = results[key][size]
            table.add_row(
                rival.name,
                str(size),
                *(f"{middle(own, name):.1f}" for name in ("per_second", "p50_ms", "p99_ms")),
                f"{statistics.median(sum(one.memory_mb) for one in own):.0f}",
                f"{statistics.median(sum(one.memory_mb) - one.ready_mb for one in own):.0f}",
                *(f"{ratio(own, results[other][size]):.2f}" for other in compared),
            )
        table.add_section()
    table.caption = "\n".join(
        f"{chosen[key].name}, {size} images: {' '.join(setup) or 'as it is'}"
        for key, sizes in setups.items()
        if len(chosen[key].setups) > 1
        for size, setup in sizes.items()
    )
    return table


def middle(figures: list[Figures], name: str) -> float:
    """Median over the rounds."""
    return float(statistics.median(getattr(one, name) for one in figures))


def ratio(above: list[Figures], below: list[Figures]) -> float:
    """Median of the rounds' ratios of requests per second."""
    return statistics.median(one.per_second / other.per_second for one, other in zip(above, below, strict=True))


def plot(results: Results, chosen: dict[str, Rival], path: Path) -> None:
    """Saves requests per second as bars, with the rounds as dots."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sizes = list(next(iter(results.values())))
    figure, panels = pyplot.subplots(1, len(sizes), figsize=(10, 3), layout="constrained", sharey=True, squeeze=False)
    names = [rival.name for rival in chosen.values()]
    for size, axes in zip(sizes, panels[0], strict=True):
        axes.barh(names, [middle(results[key][size], "per_second") for key in chosen], color="C0", alpha=0.6)
        for key, rival in chosen.items():
            dots = [one.per_second for one in results[key][size]]
            axes.plot(dots, [rival.name] * len(dots), ".", color="black")
        axes.set(title=f"{size} image{'s' if size > 1 else ''} a request", xlabel="requests per second", xlim=(0, None))
    panels[0][0].invert_yaxis()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measures, prints the table, saves figures and plot."""
    everybody = "ours,unwatched,litserve,twins,loop,malloc"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--litserve-python", default=sys.executable, help="interpreter that has litserve")
    parser.add_argument("--only", default=everybody, help="whom to measure, separated by commas")
    parser.add_argument("--images", type=int, nargs="+", default=[*SIZES], help="in a request, ascending")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0, help="of one turn with one size")
    parser.add_argument("--out", type=Path, default=Path("throughput-out"), help="folder for throughput.json and .png")
    options = parser.parse_args()
    busy = os.getloadavg()[0]
    wanted = options.only.split(",")
    if unknown := set(wanted) - set(everybody.split(",")):
        parser.error(f"--only knows {everybody}; got {', '.join(sorted(unknown))}")
    versions = {name: importlib.metadata.version(name) for name in ("torch", "uvicorn", "uvloop", "httptools")}
    if {"litserve", "twins"} & set(wanted):
        needed = "litserve, safetensors, numpy, httptools, uvloop, torch"
        ask = f"import {needed}; print(litserve.__version__, torch.__version__)"
        answer = subprocess.run([options.litserve_python, "-c", ask], capture_output=True, text=True, check=False)
        if answer.returncode:
            parser.error(
                f"{options.litserve_python} lacks one of {needed}: name one that has them with --litserve-python, or "
                "leave LitServe out with --only ours,unwatched,loop,malloc"
            )
        versions |= dict(zip(("litserve", "torch of litserve"), answer.stdout.split(), strict=True))
    with rivals(options.litserve_python) as everyone:
        chosen = {key: rival for key, rival in everyone.items() if key in wanted}
        results, setups = run(chosen, sorted(options.images), options.rounds, options.seconds)
    Console().print(report(results, chosen, setups))
    Console().print(f"The machine's load average before the first turn was {busy:.2f}; it should be near 0.")
    options.out.mkdir(parents=True, exist_ok=True)
    content = {
        "streams": STREAMS,
        "torch_threads": torch.get_num_threads(),
        "load_average_before": busy,
        "versions": versions,
        "setups": {key: {size: " ".join(setup) for size, setup in one.items()} for key, one in setups.items()},
        "rounds": {
            key: {size: [asdict(one) for one in figures] for size, figures in sizes.items()}
            for key, sizes in results.items()
        },
    }
    (options.out / "throughput.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    plot(results, chosen, options.out / "throughput.png")
    Console().print(f"wrote {options.out}/throughput.json and throughput.png")


if __name__ == "__main__":
    main()
