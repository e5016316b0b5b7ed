"""Many more streams than slots: what does it cost that most states are on the disk?

    python benchmarks/paging.py [--streams 20000] [--slots 64] [--host-mb 8] [--out paging.png]

TENT streams of a ResNet-20 with random weights (speed does not depend on them), each with a state of its own, through
scheduler, device thread, engine and store as the server puts them together, without HTTP. Clients that each send their
next request when the last is answered, for the stream that is next: in turn, or by Zipf's law. A stream has one request
under way at most; draws of one that has are passed over.

Two servers, each a process with a store of its own, get the same kinds of requests and take turns: the *paged* one has
``--slots`` slots and ``--host-mb`` of host memory for states, the *roomy* one a slot for every stream. A turn ends when
its last change is stored, and follows on unmeasured requests of the same kind. Throughput is the median over rounds,
percentiles are those of all rounds' requests. A request's time is that until its answer.

Then one client alone asks streams that are on the disk, and each once more when it is on the device: what a cold
start adds, with the store's file in the system's cache and without.

The source shadow of the monitor is off: it runs on every fourth request of a stream, which in short turns is all of
them or none.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import queue
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

import example
import numpy as np
import psutil
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from adapters.tent import Tent
from tta_server.drift.monitor import Monitor
from tta_server.engine.engine import Engine
from tta_server.engine.source import SourceModel, load_model
from tta_server.engine.threads import in_passing
from tta_server.metrics import Recorders
from tta_server.runner import Runner
from tta_server.scheduler import Bounds, Scheduler
from tta_server.settings import LimitSettings, MonitorSettings, load_settings
from tta_server.state.keeper import Keeper
from tta_server.state.memory import Budget
from tta_server.state.records import Shutdown
from tta_server.state.sqlite import FILE, SqliteStore
from tta_server.state.store import StateStore
from tta_server.types import Answer, Job, Lane, Stream

ZIPF = 1.1
"""Exponent: the stream of rank ``k`` is asked in proportion to ``1 / k^ZIPF``."""
CLIENTS = {1: 128, 16: 32}
"""By images a request: more than one step takes, so that the next step's requests wait while one runs."""
AT_ONCE = {1: 64, 16: 4}
"""As many as one step takes: none wait when it begins."""
PIXELS = 2**22
"""Random numbers, of which every request's images are a part."""
SPARE = 8
"""Times as many draws as requests."""
SETS = (32, 64, 128, 512, 2048)
"""Working sets of the sweep, before that of all streams."""
SWEEPERS = 32
"""Clients of the sweep: no more than the smallest set has streams, so that all sets are asked alike."""


@dataclass(frozen=True)
class Turn:
    """Requests for one server: the streams' numbers in order."""

    requests: int
    order: list[int]
    """Of the streams, by number; more than there are requests, as those are passed over that have one under way."""
    rows: int = 1
    clients: int = 64
    alone: bool = False
    """Each request waits for the end of the step before it."""
    forget: bool = False
    """Of those, every second one begins with the store's file out of the system's cache."""


@dataclass
class Result:
    """How a turn went. Seconds and bytes."""

    seconds: float = 0.0
    """Until everything was stored."""
    times: list[float] = field(default_factory=list)
    """Of each request, in the order of the answers."""
    fetched: int = 0
    prefetched: int = 0
    saved: int = 0
    operations: dict[str, list[float]] = field(default_factory=dict)
    """Durations of the keeper's reads and writes."""
    memory: int = 0
    """Resident, at most."""
    store_bytes: int = 0
    tiers: dict[str, int] = field(default_factory=dict)
    """Streams by where their state is."""

    @property
    def throughput(self) -> float:
        """Requests a second."""
        return len(self.times) / self.seconds


class Server:
    """Everything of a server below the event loop."""

    def __init__(self, model: SourceModel, folder: Path, streams: int, budget: Budget) -> None:
        limits, watching = LimitSettings(), MonitorSettings()
        self._operations: dict[str, list[float]] = {}
        self._file = folder / FILE
        self._keeper = Keeper(SqliteStore(folder), self._measured)
        self._store = StateStore(budget, torch.device("cpu"), self._keeper)
        engine = Engine({model.name: model}, self._store, Monitor(watching.half_life), shadow_ratio=0.0)
        bounds = Bounds(limits.batch_rows or 64, min(limits.batch_streams, budget.slots))
        self._runner = Runner(engine, Scheduler(bounds), Recorders())
        policy = Tent(lr=1e-3)
        self._lane = Lane(model.name, policy, model.digest)
        self._streams = [
            Stream(f"s{number}", model.name, policy, number, time.time(), model.digest) for number in range(streams)
        ]
        self._generator = np.random.default_rng(0)
        self._pixels = self._generator.random(PIXELS, dtype=np.float32)
        self._process = psutil.Process()

    @contextmanager
    def running(self) -> Iterator[None]:
        """From the first request to the last."""
        self._keeper.open()
        self._keeper.start()
        self._runner.start()
        yield
        self._runner.drain(10.0)
        self._store.check_integrity()
        self._keeper.close(Shutdown(clean=True))

    def run(self, turn: Turn) -> Result:
        """Sends the requests, and waits until all that they changed is stored."""
        tally, result = self._keeper.tally, Result()
        before = tally.fetched, tally.prefetched, tally.saved
        self._operations = result.operations
        answers: queue.SimpleQueue[tuple[int, float, Exception | None]] = queue.SimpleQueue()
        order, left, busy = iter(turn.order), turn.requests, set[int]()

        def ask() -> None:
            """Sends the next request, if one is left, passing over streams that have one under way."""
            nonlocal left
            number = next((number for number in order if number not in busy), None) if left else None
            if number is None:
                return
            asked = time.perf_counter()

            def done(answer: Answer | None, error: Exception | None) -> None:
                answers.put((number, time.perf_counter() - asked, error))

            left -= 1
            busy.add(number)
            self._runner.submit(Job(self._streams[number], done, self._lane, self._images(turn.rows)))

        started = time.perf_counter()
        for _ in range(turn.clients):
            ask()
        while busy:
            number, seconds, error = answers.get()
            if error is not None:
                raise error
            result.times.append(seconds)
            busy.remove(number)
            if turn.alone:
                self._settle()
                if turn.forget and len(result.times) % 2 == 0:
                    self._forget_file()
            if len(result.times) % 64 == 0:
                result.memory = max(result.memory, self._process.memory_info().rss)
            ask()
        self._settle(save=not turn.alone)
        result.seconds = time.perf_counter() - started
        after = tally.fetched, tally.prefetched, tally.saved
        result.fetched, result.prefetched, result.saved = (now - then for now, then in zip(after, before, strict=True))
        result.memory = max(result.memory, self._process.memory_info().rss)
        result.store_bytes = self._keeper.size
        result.tiers = {tier: count for tier, (count, _) in self._store.counts().items()}
        return result

    def _images(self, rows: int) -> torch.Tensor:
        size = rows * 3 * 32 * 32
        start = int(self._generator.integers(PIXELS - size))
        return torch.from_numpy(self._pixels[start : start + size].reshape(rows, 3, 32, 32))

    def _settle(self, save: bool = False) -> None:
        """Returns when the running step is over and, with ``save``, everything stored."""
        over: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()

        def command() -> None:
            if save:
                self._store.save_all()

        nobody = Stream("", "", self._lane.policy, 0, 0.0)
        self._runner.submit(Job(nobody, lambda answer, error: over.put(error), command=command))
        error = over.get()
        if error is not None:
            raise error
        if save and not self._keeper.flush(60.0):
            raise SystemExit("the store does not keep up")

    def _forget_file(self) -> None:
        self._keeper.flush(60.0)
        for path in (self._file, self._file.with_name(f"{FILE}-wal")):
            file = os.open(path, os.O_RDONLY)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(file)

    def _measured(self, operation: str, seconds: float) -> None:
        self._operations.setdefault(operation, []).append(seconds)


def work(pipe: Connection, folder: Path, streams: int, budget: Budget) -> None:
    """A process with a server: gets turns and sends results until it gets ``None``."""

    def load() -> SourceModel:
        with tempfile.TemporaryDirectory() as config:
            return load_model("resnet20", load_settings(example.write_config(Path(config))), torch.device("cpu"))

    server = Server(in_passing(load), folder, streams, budget)
    with server.running():
        while (turn := pipe.recv()) is not None:
            pipe.send(server.run(turn))


class Remote:
    """Such a process."""

    def __init__(self, folder: Path, streams: int, budget: Budget) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=work, args=(theirs, folder, streams, budget), daemon=True)
        self._process.start()
        theirs.close()

    def run(self, turn: Turn) -> Result:
        self._pipe.send(turn)
        result: Result = self._pipe.recv()
        return result

    def close(self) -> None:
        self._pipe.send(None)
        self._process.join()


class Access:
    """Which stream is asked next, of the first ``streams``; goes on where it stopped."""

    def __init__(self, streams: int, zipf: bool = False) -> None:
        self.streams, self._generator, self._next = streams, np.random.default_rng(streams), 0
        self._shares = None
        if zipf:
            shares = 1.0 / np.arange(1, streams + 1) ** ZIPF
            self._shares = self._generator.permutation(shares / shares.sum())

    def take(self, count: int) -> list[int]:
        """The next numbers."""
        if self._shares is not None:
            drawn: list[int] = self._generator.choice(self.streams, count, p=self._shares).tolist()
            return drawn
        first, self._next = self._next, self._next + count
        return [number % self.streams for number in range(first, first + count)]

    def turn(self, requests: int, rows: int = 1, clients: int = CLIENTS[1]) -> Turn:
        """So many requests by so many clients, or as many as there are streams for."""
        order = self.take(requests if self._shares is None else SPARE * requests)
        return Turn(requests, order, rows, min(clients, self.streams))


@dataclass
class Case:
    """One kind of access of one server, over all rounds."""

    name: str
    server: Remote
    access: Access
    warm_up: int
    clients: int
    hot: Case | None = None
    """The same with all states on the device."""
    results: list[Result] = field(default_factory=list)

    def run(self, rows: int, requests: int) -> None:
        """A turn of such requests."""
        if self.warm_up:
            self.server.run(self.access.turn(self.warm_up))
        self.results.append(self.server.run(self.access.turn(requests, rows, self.clients)))

    def ratio(self, other: Case) -> float:
        """Of this throughput to another's, the median of the rounds'."""
        pairs = zip(self.results, other.results, strict=True)
        return statistics.median(one.throughput / beside.throughput for one, beside in pairs)

    @property
    def throughput(self) -> float:
        """Requests a second."""
        return statistics.median(one.throughput for one in self.results)

    def percentile(self, percent: float) -> float:
        """Of the requests' times, ms."""
        return percentile([seconds for one in self.results for seconds in one.times], percent)

    @property
    def cold(self) -> float:
        """Share of the requests whose state came from the disk."""
        return self._total("fetched", "prefetched") / sum(len(one.times) for one in self.results)

    @property
    def ahead(self) -> float:
        """Of these, the share that was there when its step needed it."""
        return self._total("prefetched") / max(1, self._total("fetched", "prefetched"))

    def _total(self, *names: str) -> int:
        return sum(getattr(one, name) for one in self.results for name in names)


def percentile(seconds: list[float], percent: float) -> float:
    """In ms."""
    return 1e3 * float(np.percentile(seconds, percent))


def main() -> None:
    """Measures and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=20_000)
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--host-mb", type=float, default=8.0, help="of host memory for states, in MB")
    parser.add_argument("--requests", type=int, default=2000, help="of one image in a turn; a sixth of that of 16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=300, help="of a cold and a warm request of a lone client")
    parser.add_argument("--folder", type=Path, default=None, help="where the stores are; a temporary one by default")
    parser.add_argument("--out", type=Path, default=None, help="where to save a plot")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder, Progress(console=Console(stderr=True)) as progress:
        measure(options, Path(folder), progress)


def measure(options: argparse.Namespace, folder: Path, progress: Progress) -> None:
    """Runs all turns and reports."""
    streams = options.streams
    paged = Remote(folder / "paged", streams, Budget(options.slots, host_bytes=int(1e6 * options.host_mb)))
    roomy = Remote(folder / "roomy", streams, Budget(streams))
    console = Console(width=160)
    console.print(
        f"{streams:,} TENT streams of ResNet-20, {options.slots} slots, {options.host_mb:g} MB of host memory, "
        f"{torch.get_num_threads()} torch threads"
    )
    start = paged.run(Access(options.slots).turn(20 * options.slots))
    console.print(f"paged, {options.slots} streams: {start.memory / 1e6:.0f} MB of memory")
    task = progress.add_task("making the streams", total=2 * streams)
    for name, server in (("paged", paged), ("roomy", roomy)):
        everybody = Access(streams)
        for first in range(0, streams, 1000):
            made = server.run(everybody.turn(min(1000, streams - first)))
            progress.advance(task, 1000)
        console.print(f"{name}, streams made: {described(made)}")
    compared, swept = {}, {}
    for rows, requests in ((1, options.requests), (16, options.requests // 6)):
        compared[rows] = kinds(options, paged, roomy, rows)
        swept[rows] = working_sets(options, paged)
        cases = compared[rows] + swept[rows]
        task = progress.add_task(f"{rows} images a request", total=options.rounds * len(cases))
        for _ in range(options.rounds):
            for case in cases:
                case.run(rows, requests)
                progress.advance(task)
    console.print(f"paged, at the end: {described(swept[16][-1].results[-1])}")
    lone = {forget: resume(paged, options, forget) for forget in (False, True)}
    paged.close()
    roomy.close()
    console.print(table_of("access", compared), table_of("working set", swept), resumed(lone))
    if options.out is not None:
        plot(swept, options.slots, options.out)


def kinds(options: argparse.Namespace, paged: Remote, roomy: Remote, rows: int) -> list[Case]:
    """As many streams as slots, which is the all-hot case; all streams, on either server."""
    settled, streams = settling(options), options.streams
    cases = [Case(f"{options.slots} in turn", paged, Access(options.slots), options.slots, CLIENTS[rows])]
    for name, zipf, clients in (
        ("in turn", False, CLIENTS[rows]),
        ("by Zipf", True, CLIENTS[rows]),
        (f"in turn, {AT_ONCE[rows]} clients", False, AT_ONCE[rows]),
    ):
        hot = Case(f"{streams:,} {name}, roomy", roomy, Access(streams, zipf), 0, clients)
        cases += [Case(f"{streams:,} {name}, paged", paged, Access(streams, zipf), settled, clients, hot), hot]
    return cases


def working_sets(options: argparse.Namespace, paged: Remote) -> list[Case]:
    """Ever more streams in turn."""
    sizes = [size for size in SETS if size < options.streams] + [options.streams]
    return [Case(f"{size:,}", paged, Access(size), min(size, settling(options)), SWEEPERS) for size in sizes]


def settling(options: argparse.Namespace) -> int:
    """Requests after which memory holds the states that it goes on to hold."""
    return min(1000, int(options.streams) // 2)


def resume(paged: Remote, options: argparse.Namespace, forget: bool) -> Result:
    """A lone client's requests, each stream's first from the disk and second from the device."""
    half = options.streams // 2
    paged.run(Access(half).turn(settling(options)))  # so that the other half is on the disk
    first = half + forget * options.pairs
    numbers = [number for number in range(first, first + options.pairs) for _ in range(2)]
    return paged.run(Turn(len(numbers), numbers, clients=1, alone=True, forget=forget))


def described(result: Result) -> str:
    """Memory, store and tiers after a turn."""
    tiers = ", ".join(f"{count:,} {tier}" for tier, count in result.tiers.items())
    return f"{result.memory / 1e6:.0f} MB of memory, store {result.store_bytes / 1e6:.0f} MB, states: {tiers}"


def table_of(heading: str, cases_of: dict[int, list[Case]]) -> Table:
    """What was measured of these cases, by images a request."""
    table = Table(heading)
    for column in ("images", "requests/s", "of the first", "of roomy", "p50 ms", "p99 ms"):
        table.add_column(column, justify="right")
    for column in ("from disk", "of these ahead", "memory MB"):
        table.add_column(column, justify="right")
    for rows, cases in cases_of.items():
        for case in cases:
            table.add_row(
                case.name, str(rows), f"{case.throughput:.1f}", f"{case.ratio(cases[0]):.2f}",
                f"{case.ratio(case.hot):.2f}" if case.hot else "", f"{case.percentile(50):.0f}",
                f"{case.percentile(99):.0f}", f"{case.cold:.1%}", f"{case.ahead:.1%}" if case.cold else "",
                f"{max(one.memory for one in case.results) / 1e6:.0f}",
            )  # fmt: skip
    return table


def resumed(lone: dict[bool, Result]) -> Table:
    """What a cold start adds."""
    table = Table("a lone client, one image; ms")
    for column in ("from disk p50", "p99", "from a slot p50", "p99", "added p50", "p99", "the read p50", "p99"):
        table.add_column(column, justify="right")
    for forget, result in lone.items():
        cold, warm = result.times[::2], result.times[1::2]
        added = [one - other for one, other in zip(cold, warm, strict=True)]
        table.add_row(
            "file not in the cache" if forget else "file in the cache",
            *(
                f"{percentile(times, percent):.2f}"
                for times in (cold, warm, added, result.operations["fetch"])
                for percent in (50, 99)
            ),
        )
    return table


def plot(swept: dict[int, list[Case]], slots: int, path: Path) -> None:
    """Saves throughput and p99 over the working set."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    sizes = [case.access.streams for case in swept[1]]
    for rows, cases in swept.items():
        label = f"{rows} image{'s' if rows > 1 else ''} a request"
        left.plot(sizes, [case.ratio(cases[0]) for case in cases], marker="o", label=label)
        right.plot(sizes, [case.percentile(99) for case in cases], marker="o", label=label)
    for axes, what in ((left, f"requests/s over those of {sizes[0]} streams"), (right, "p99 of a request's time, ms")):
        axes.axvline(slots, color="grey", linewidth=1, label="slots")
        axes.set(xscale="log", xlabel="streams, in turn", ylabel=what, ylim=(0, None))
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes], rotation=30)
        axes.minorticks_off()
    left.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
