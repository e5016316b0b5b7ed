"""What does the server do with ten times the requests it can answer? Measured on the real server, over HTTP.

    python benchmarks/overload.py [--factor 10] [--seconds 30] [--timeout 2] [--shed-queue N] [--out overload-out]

ResNet-20 (random weights, as speed does not depend on them), 64 TENT streams, requests of 16 images in V2 binary. First
a closed loop, one client a stream, finds how many a second the server answers and adapts to. Then requests arrive at
``--factor`` times that rate whatever the server does, each with its number in the stream and a ``timeout``, the longest
time it may wait in the queue. Nothing is sent twice.

*In order* means: of a stream's answers, sorted by request number, the first has version 0, and each other the version
before, plus 1 unless the request before was shed. So nothing was answered out of turn, and nothing that was refused or
late has adapted. The load generator shares the machine with the server, and its processor time is part of the report.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import tempfile
import time
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from subprocess import Popen

import example
import httpx
import numpy as np
import orjson
import psutil
from load import Answer, Load, Make, closed_loop, open_loop, post
from numpy.typing import NDArray
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.table import Table

from tta_server.client.core import infer

STREAMS = 64
IMAGES = 16
"""In a request."""
WARM_UP_SECONDS = 2.0
CAPACITY_SECONDS = 6.0
MOST_CONNECTIONS = 1900
"""Below ``limits.connections``, so that what is refused is refused for its queue."""

Images = NDArray[np.float32]
Readings = list[tuple[float, float]]
"""(seconds since the start, resident MB of the server)."""


@dataclass(frozen=True)
class Figures:
    """What a run came to. Latencies are those that the client sees."""

    factor: float
    timeout_seconds: float
    shed_share: float | None
    """``None``: the default."""
    capacity: float
    """Requests answered a second in the closed loop."""
    sent: int
    unsent: int
    """Arrivals for which ``MOST_CONNECTIONS`` did not suffice."""
    sent_per_second: float
    seconds: float
    by_status: dict[int, int]
    """0: no answer."""
    goodput: float
    """Requests answered a second, from the first arrival to the last answer."""
    in_time: float
    """Share of the requests taken into the queue that were answered within their time there; the others got a 504."""
    accepted_ms: tuple[float, float]
    """Median and 99th percentile, as of the following."""
    refused_ms: tuple[float, float]
    retry_after: float
    """Share of the refusals that say when to come again."""
    streams_in_order: int
    streams_answered: int
    shed: int
    """Answers that say so."""
    shed_steps: float
    """Steps that the server's metrics count as shed."""
    applied_steps: float
    memory_mb: tuple[float, ...]
    """Medians of the first, middle and last third of the run: single readings go up and down with the steps."""
    ready_status: int
    """Of ``/v2/health/ready`` right after the last answer."""
    ready_ms: float
    normal_ms: float
    """A request of one stream after that."""
    waiting: float
    """Requests in the queue after that, by the server's metrics."""
    generator_cpu: float
    """Share of one core that the load generator took."""
    load_average: tuple[float, float]
    """Of the machine, over a minute: before and after."""


def requests(prefix: str, x: Images, timeout: float | None, numbered: bool) -> Make:
    """Requests of ``STREAMS`` streams in turn, whose ids begin with ``prefix``."""

    def make(number: int) -> bytes:
        controls: dict[str, object] = {"sequence_id": f"{prefix}-{number % STREAMS}"}
        if numbered:
            controls["tta_seq"] = number // STREAMS
        call = infer("resnet20", x, timeout, controls)
        return post(call.path, call.content, call.headers)

    return make


async def overload(port: int, make: Make, rate: float, seconds: float, server: psutil.Process) -> tuple[Load, Readings]:
    """An open loop, and the server's memory meanwhile."""
    readings: Readings = []
    started = time.perf_counter()

    async def watch() -> None:
        while True:
            readings.append((time.perf_counter() - started, server.memory_info().rss / 1e6))
            await asyncio.sleep(0.25)

    watching = asyncio.create_task(watch())
    load = await open_loop(port, make, rate, seconds, MOST_CONNECTIONS)
    watching.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await watching
    return load, readings


def report_of(answer: Answer) -> dict[str, object]:
    """The ``parameters`` of an answer in V2 binary."""
    length = answer.header("Inference-Header-Content-Length")
    assert length is not None
    return dict(orjson.loads(answer.body[: int(length)])["parameters"])


def is_in_order(answers: list[Answer]) -> bool:
    """Whether one stream's answers, in any order, are those of one request after the other."""
    expected = 0
    for answer in sorted(answers):
        report = report_of(answer)
        if report["state_version"] != expected:
            return False
        expected += not report.get("shed", False)
    return True


def metric(client: httpx.Client, name: str, **labels: str) -> float:
    """Sum of the samples of that name with these labels."""
    families = text_string_to_metric_families(client.get("/metrics").raise_for_status().text)
    samples = (sample for family in families for sample in family.samples)
    return sum(one.value for one in samples if one.name == name and labels.items() <= one.labels.items())


def steps(client: httpx.Client) -> tuple[float, float]:
    """Adaptation steps of streams so far: applied and shed. Call it when nothing waits."""
    # The last answers came before their step was over. What comes after waits for that.
    client.post("/v1/streams/closed-0/reset").raise_for_status()
    applied, shed = (metric(client, "tta_adaptation_steps_total", result=one) for one in ("applied", "shed"))
    return applied, shed


def milliseconds(answers: list[Answer]) -> tuple[float, float]:
    """Median and 99th percentile of their latencies."""
    p50, p99 = np.percentile([1e3 * one.seconds for one in answers] or [np.nan], [50, 99])
    return float(p50), float(p99)


def measure(url: str, process: Popen[bytes], options: argparse.Namespace) -> tuple[Figures, Load, Readings]:
    """The closed loop, the overload, and what is left of it."""
    port = httpx.URL(url).port
    assert port is not None
    busy = os.getloadavg()[0]
    x = np.random.default_rng(0).random((IMAGES, 3, 32, 32), dtype=np.float32)
    asyncio.run(closed_loop(port, requests("warm-up", x, None, False), STREAMS, WARM_UP_SECONDS))
    closed = asyncio.run(closed_loop(port, requests("closed", x, None, False), STREAMS, CAPACITY_SECONDS))
    bad = next((one for one in closed.answers if one.status != 200), None)
    if bad is not None:
        raise SystemExit(f"in the closed loop the server answered {bad.status}: {bad.body[:500].decode()}")
    capacity = len(closed.answers) / closed.seconds
    with httpx.Client(base_url=url, timeout=60) as client:
        applied, shed = steps(client)
        for stream in range(STREAMS):  # a numbered request, unless it is number 0, is for streams that there are
            client.put(f"/v1/streams/open-{stream}").raise_for_status()
        make = requests("open", x, options.timeout, True)
        load, memory = asyncio.run(
            overload(port, make, options.factor * capacity, options.seconds, psutil.Process(process.pid))
        )
        ready_started = time.perf_counter()
        ready = client.get("/v2/health/ready")
        ready_seconds = time.perf_counter() - ready_started
        (normal,) = asyncio.run(closed_loop(port, requests("closed", x, None, False), 1, 0.0)).answers
        waiting = metric(client, "tta_requests_waiting")
        applied_after, shed_after = steps(client)
    by_stream = defaultdict[int, list[Answer]](list)
    for answer in load.answers:
        if answer.status == 200:
            by_stream[answer.number % STREAMS].append(answer)
    answered = [one for answers in by_stream.values() for one in answers]
    refused = [one for one in load.answers if one.status in (429, 503)]
    by_status = Counter(answer.status for answer in load.answers)
    last = max(answer.sent + answer.seconds for answer in load.answers)
    figures = Figures(
        factor=options.factor,
        timeout_seconds=options.timeout,
        shed_share=options.shed_share,
        capacity=capacity,
        sent=len(load.answers),
        unsent=load.unsent,
        sent_per_second=len(load.answers) / load.seconds,
        seconds=load.seconds,
        by_status=dict(sorted(by_status.items())),
        goodput=len(answered) / (last - min(answer.sent for answer in load.answers)),
        in_time=len(answered) / ((len(answered) + by_status[504]) or 1),
        accepted_ms=milliseconds(answered),
        refused_ms=milliseconds(refused),
        retry_after=sum(one.header("Retry-After") is not None for one in refused) / (len(refused) or 1),
        streams_in_order=sum(map(is_in_order, by_stream.values())),
        streams_answered=len(by_stream),
        shed=sum("shed" in report_of(one) for one in answered),
        shed_steps=shed_after - shed,
        applied_steps=applied_after - applied - (normal.status == 200),
        memory_mb=tuple(float(np.median(third)) for third in np.array_split([size for _, size in memory], 3)),
        ready_status=ready.status_code,
        ready_ms=1e3 * ready_seconds,
        normal_ms=1e3 * normal.seconds if normal.status == 200 else float("nan"),
        waiting=waiting,
        generator_cpu=load.cpu_seconds / load.seconds,
        load_average=(busy, os.getloadavg()[0]),
    )
    return figures, load, memory


def table(figures: Figures) -> Table:
    """All figures."""
    title = (
        f"{figures.factor:g} times the capacity for {figures.seconds:.0f} s, {STREAMS} TENT streams, {IMAGES} images"
    )
    table = Table("what", "figure", title=title)
    rows = {
        "capacity, requests/s": f"{figures.capacity:.1f}",
        "sent, requests/s": f"{figures.sent_per_second:.1f}" + f", {figures.unsent} not sent" * (figures.unsent > 0),
        "answers by status": ", ".join(f"{status}: {count:,}" for status, count in figures.by_status.items()),
        "goodput, requests/s": f"{figures.goodput:.1f} ({figures.goodput / figures.capacity:.0%} of the capacity)",
        f"of those queued, answered within {figures.timeout_seconds:g} s": f"{figures.in_time:.2%}",
        "answered, ms: median, p99": _pair(figures.accepted_ms),
        "refused, ms: median, p99": _pair(figures.refused_ms),
        "refused, with Retry-After": f"{figures.retry_after:.0%}",
        "streams in order": f"{figures.streams_in_order} of {figures.streams_answered}",
        "adaptation": f"{figures.applied_steps:.0f} applied, {figures.shed_steps:.0f} shed ({figures.shed} told)",
        "memory, MB: first, middle, last third": ", ".join(f"{one:.1f}" for one in figures.memory_mb),
        "right after: /v2/health/ready": f"{figures.ready_status} in {figures.ready_ms:.0f} ms",
        "right after: a request, ms": f"{figures.normal_ms:.0f}",
        "right after: requests in the queue": f"{figures.waiting:.0f}",
        "load generator, share of a core": f"{figures.generator_cpu:.2f}",
        "load average: before, after": ", ".join(f"{one:.1f}" for one in figures.load_average),
    }
    for what, figure in rows.items():
        table.add_row(what, figure)
    return table


def _pair(values: tuple[float, float]) -> str:
    return ", ".join(f"{value:.0f}" for value in values)


def plot(figures: Figures, load: Load, memory: Readings, path: Path) -> None:
    """Saves answers, latencies and memory over the seconds of the run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (counts, latencies, resident) = pyplot.subplots(3, 1, figsize=(8, 8), layout="constrained", sharex=True)
    start = min(answer.sent for answer in load.answers)
    for status in figures.by_status:
        chosen = [one for one in load.answers if one.status == status]
        ends = [one.sent + one.seconds - start for one in chosen]
        counts.stairs(*np.histogram(ends, np.arange(max(ends) + 2)), label=str(status))
        latencies.plot(ends, [1e3 * one.seconds for one in chosen], ".", markersize=2, label=str(status))
    counts.axhline(figures.capacity, color="black", linestyle="--", label="capacity")
    counts.set(ylabel="answers a second", yscale="log")
    counts.legend()
    latencies.axhline(1e3 * figures.timeout_seconds, color="black", linestyle="--", label="timeout")
    latencies.set(ylabel="latency, ms", yscale="log")
    resident.plot(*zip(*memory, strict=True))
    resident.set(ylabel="server's resident memory, MB", xlabel="seconds", ylim=(0, None))
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measures, prints the table, saves figures and plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--factor", type=float, default=10.0, help="arrivals as a multiple of the capacity")
    parser.add_argument("--seconds", type=float, default=30.0, help="of the overload")
    parser.add_argument("--timeout", type=float, default=2.0, help="seconds that a request may wait in the queue")
    parser.add_argument("--shed-share", type=float, default=None, help="limits.shed_share; 1 sheds nothing")
    parser.add_argument("--out", type=Path, default=Path("overload-out"), help="folder for overload.json and .png")
    options = parser.parse_args()
    limits = {} if options.shed_share is None else {"shed_share": options.shed_share}
    with (
        tempfile.TemporaryDirectory() as folder,
        example.running(example.write_config(Path(folder), limits)) as (url, process),
    ):
        figures, load, memory = measure(url, process, options)
    Console().print(table(figures))
    options.out.mkdir(parents=True, exist_ok=True)
    content = {**asdict(figures), "memory": memory}
    # Not a number, as the latency of no answers at all is, becomes null.
    text = orjson.dumps(content, option=orjson.OPT_INDENT_2 | orjson.OPT_NON_STR_KEYS | orjson.OPT_APPEND_NEWLINE)
    (options.out / "overload.json").write_bytes(text)
    plot(figures, load, memory, options.out / "overload.png")
    Console().print(f"wrote {options.out}/overload.json and overload.png")


if __name__ == "__main__":
    main()
