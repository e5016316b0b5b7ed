"""Does memory stay flat when streams come and go? And what does a stream that stays weigh?

    python benchmarks/stream_memory.py [--streams 5000] [--out stream_memory.png]

Starts the real server with a ResNet-20. First it opens, uses once and deletes one stream after the other and follows
the resident memory of the server's process; then it opens and uses as many again and lets them stay.
"""

from __future__ import annotations

import argparse
import io
import tempfile
from pathlib import Path

import example
import httpx
import numpy as np
import psutil
from rich.console import Console
from rich.progress import track
from rich.table import Table


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=5000)
    parser.add_argument("--out", type=Path, default=None, help="where to save a plot")
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        example.running(example.write_config(Path(folder))) as (url, server),
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        come_and_go, stay, metrics = measure(client, psutil.Process(server.pid), options.streams)
    report(come_and_go, stay, metrics, options.streams)
    if options.out is not None:
        plot(come_and_go, stay, options.out)


Readings = list[tuple[int, float]]
"""(streams so far, resident MB)."""


def measure(client: httpx.Client, process: psutil.Process, streams: int) -> tuple[Readings, Readings, dict[str, float]]:
    """Memory while streams come and go, then while they stay, and what the server says of its states at the end."""
    buffer = io.BytesIO()
    np.save(buffer, np.random.default_rng(0).random((4, 3, 32, 32), dtype=np.float32))
    body = buffer.getvalue()

    def readings(delete: bool) -> Readings:
        taken = []
        for number in track(range(streams + 1), "come and go" if delete else "stay", console=Console(stderr=True)):
            if number % max(1, streams // 20) == 0:
                taken.append((number, process.memory_info().rss / 1e6))
            if number < streams:
                client.put(f"/v1/streams/s{number}", json={"policy": "tent"}).raise_for_status()
                client.post(f"/v1/streams/s{number}/predict", content=body).raise_for_status()
                if delete:
                    client.delete(f"/v1/streams/s{number}").raise_for_status()
        return taken

    come_and_go, stay = readings(delete=True), readings(delete=False)
    lines = (line.rsplit(" ", 1) for line in client.get("/metrics").text.splitlines() if line.startswith("tta_stream"))
    return come_and_go, stay, {name: float(value) for name, value in lines}


def report(come_and_go: Readings, stay: Readings, metrics: dict[str, float], streams: int) -> None:
    """Prints what was measured."""
    # The first twentieth warms caches and allocator up.
    settled = [memory for _, memory in come_and_go[1:]]
    table = Table("what", "figure", title=f"{streams:,} TENT streams of ResNet-20, 4 images each")
    table.add_row("server before the first stream", f"{come_and_go[0][1]:.1f} MB")
    table.add_row("come and go: after the first 5 %", f"{settled[0]:.1f} MB")
    table.add_row("come and go: at the end", f"{settled[-1]:.1f} MB")
    table.add_row(
        "come and go: growth since the first 5 %, per stream",
        f"{1e6 * (settled[-1] - settled[0]) / (0.95 * streams):.0f} B",
    )
    table.add_row("stay: growth per stream", f"{1e6 * (stay[-1][1] - stay[0][1]) / streams:.0f} B")
    states = sum(value for name, value in metrics.items() if name.startswith("tta_stream_state_bytes"))
    count = sum(value for name, value in metrics.items() if name.startswith("tta_stream_states{"))
    table.add_row("state per stream, as the server counts it", f"{states / count:.0f} B")
    table.add_row("allowed: 4 floats x 1,376 adaptable values + 1 KiB", f"{4 * 4 * 1376 + 1024} B")
    Console().print(table)


def plot(come_and_go: Readings, stay: Readings, path: Path) -> None:
    """Saves memory over streams."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
    for label, readings in (("opened, used once, deleted", come_and_go), ("opened, used once, kept", stay)):
        axes.plot(*zip(*readings, strict=True), marker=".", label=label)
    axes.set(xlabel="streams so far", ylabel="server's resident memory, MB", ylim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
