"""How many requests per second the server answers from its source model, beside LitServe and a plain FastAPI handler.

    pip install litserve safetensors                            # in any environment with the same torch
    python benchmarks/wire.py [--litserve-python PATH] [--rounds 3] [--seconds 8] [--out wire-out]

The same ResNet-20 (random weights, as speed does not depend on them), the same machine, uvicorn under all of them, 32
clients that each send their next request when the last is answered (``load.py``, in this process; it shares the machine
with the server). This server gets Open Inference Protocol V2 requests without a stream and does all it always does:
checks of the input, request merging, metrics, drift. The others get the bare float32 values and check nothing. Each of
them first tries several ways to be set up, and goes on with the one that was fastest for that request size.

Then the servers take turns, one at a time, in rounds: figures are medians over rounds, ratios are medians of the
rounds' ratios. Before a server is measured, its scores for fixed images are compared with the plain network's.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.metadata
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import example
import httpx
import numpy as np
import orjson
import torch
from load import Answer, Load, closed_loop, post
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import nn

HERE = Path(__file__).parent
CLIENTS = 32
SIZES = (1, 32)
"""Images in a request."""
TOLERANCE = 1e-4
"""Largest difference of a score to the plain network's, relative to the largest score."""
WARM_UP_SECONDS = 1.0
TRIAL_SECONDS = 3.0
TRIALS = 2
"""Turns of each setup; the best one counts, since a busy machine only ever slows."""

Images = NDArray[np.float32]
Scores = NDArray[np.float32]
Setup = tuple[str, ...]
"""Command line options of a server."""


@dataclass(frozen=True)
class Wire:
    """How images travel to a server and scores back."""

    request: Callable[[Images], bytes]
    scores: Callable[[Answer], Scores]


@dataclass(frozen=True)
class Server:
    """What is compared. ``command`` goes before the port and the setup."""

    name: str
    wire: Wire
    ready: str
    command: tuple[str, ...]
    setups: tuple[Setup, ...] = ((),)


@dataclass(frozen=True)
class Figures:
    """One turn of one server."""

    per_second: float
    p50_ms: float
    p99_ms: float
    load_cpu: float
    """Share of one core that the load generator took."""


def _v2(parameters: dict[str, bool], tensor: dict[str, object]) -> bytes:
    inputs = [{"name": "input", "datatype": "FP32", **tensor}]
    content = {"inputs": inputs, "outputs": [{"name": "logits", "parameters": parameters}]}
    return orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)


def _json_request(x: Images) -> bytes:
    return post("/v2/models/resnet20/infer", _v2({}, {"shape": x.shape, "data": x.ravel()}))


def _json_scores(answer: Answer) -> Scores:
    output = orjson.loads(answer.body)["outputs"][0]
    return np.array(output["data"], dtype=np.float32).reshape(output["shape"])


def _binary_request(x: Images) -> bytes:
    header = _v2({"binary_data": True}, {"shape": x.shape, "parameters": {"binary_data_size": x.nbytes}})
    length = {"Inference-Header-Content-Length": str(len(header)), "Content-Type": "application/octet-stream"}
    return post("/v2/models/resnet20/infer", header + x.tobytes(), length)


def _binary_scores(answer: Answer) -> Scores:
    _, _, rest = answer.head.lower().partition(b"inference-header-content-length:")
    length = int(rest.split(b"\r\n")[0])
    shape = orjson.loads(answer.body[:length])["outputs"][0]["shape"]
    return np.frombuffer(answer.body, np.float32, offset=length).reshape(shape)


def _raw_request(x: Images) -> bytes:
    return post("/predict", x.tobytes(), {"Content-Type": "application/octet-stream"})


def _raw_scores(answer: Answer) -> Scores:
    return np.frombuffer(answer.body, np.float32).reshape(-1, 10)


JSON, BINARY, RAW = (
    Wire(_json_request, _json_scores),
    Wire(_binary_request, _binary_scores),
    Wire(_raw_request, _raw_scores),
)

LITSERVE_SETUPS: tuple[Setup, ...] = (
    ("--batch", "1"),
    ("--batch", "1", "--workers", "2"),
    ("--batch", "8"),
    ("--batch", "8", "--wait", "0.002"),
    ("--batch", "8", "--wait", "0.002", "--fast-queue"),
    ("--batch", "8", "--wait", "0.002", "--workers", "2"),
    ("--batch", "32", "--wait", "0.005"),
)


def servers(folder: Path, litserve_python: str) -> dict[str, Server]:
    """Everybody, by a short name."""
    ours = (sys.executable, "-m", "tta_server", "serve", str(folder / "config.yaml"))
    fastapi = (sys.executable, str(HERE / "serve_fastapi.py"), str(folder))
    litserve = (litserve_python, str(HERE / "serve_litserve.py"), str(folder))
    return {
        "binary": Server("tta-server, V2 binary", BINARY, "/v2/health/ready", ours),
        "json": Server("tta-server, V2 JSON", JSON, "/v2/health/ready", ours),
        "litserve": Server("LitServe, raw body", RAW, "/health", litserve, LITSERVE_SETUPS),
        "fastapi": Server("FastAPI, raw body", RAW, "/health", fastapi, ((), ("--inline",))),
    }


@contextlib.contextmanager
def running(server: Server, setup: Setup) -> Iterator[int]:
    """The server in a process of its own: its port on loopback. Ends with the context."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [*server.command, "--port", str(port), *setup]
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(command, stdout=quiet, stderr=quiet, start_new_session=True)
    try:
        deadline = time.monotonic() + 60
        while not _is_ready(f"http://127.0.0.1:{port}{server.ready}"):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{server.name} did not become ready; try: {' '.join(command)}")
            time.sleep(0.1)
        yield port
    finally:
        # LitServe leaves its workers behind when it is terminated by itself.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(url).status_code == 200
    except httpx.TransportError:
        return False


def measure(server: Server, port: int, x: Images, expected: Scores, seconds: float) -> Figures:
    """One turn: the check of the scores, a warm-up, the measurement."""
    request = server.wire.request(x)
    check(server, one_run(server, port, request, 1, 0.0).answers[0], expected)
    one_run(server, port, request, CLIENTS, WARM_UP_SECONDS)
    load = one_run(server, port, request, CLIENTS, seconds)
    p50, p99 = np.percentile([1e3 * answer.seconds for answer in load.answers], [50, 99])
    return Figures(len(load.answers) / load.seconds, float(p50), float(p99), load.cpu_seconds / load.seconds)


def one_run(server: Server, port: int, request: bytes, clients: int, seconds: float) -> Load:
    """A closed loop in which every answer must be a good one."""
    load = asyncio.run(closed_loop(port, lambda number: request, clients, seconds))
    bad = next((answer for answer in load.answers if answer.status != 200), None)
    if bad is not None:
        raise SystemExit(f"{server.name} answered {bad.status}: {bad.body[:500].decode(errors='replace')}")
    return load


def check(server: Server, answer: Answer, expected: Scores) -> None:
    """Raises ``SystemExit`` unless the scores are the plain network's, but for rounding."""
    gap = float(np.abs(server.wire.scores(answer) - expected).max())
    if not gap <= TOLERANCE * float(np.abs(expected).max()):
        raise SystemExit(f"{server.name} answers other scores than the plain network, by up to {gap:.2g}")


Results = dict[str, dict[int, list[Figures]]]
"""By server and images in a request, the rounds' figures."""


def run(chosen: dict[str, Server], rounds: int, seconds: float) -> tuple[Results, dict[str, dict[int, Setup]]]:
    """All turns of all servers, and with which setup they went."""
    network = example.network().eval()
    cases = {size: fixed_case(network, size) for size in SIZES}
    trials = sum(len(server.setups) for server in chosen.values() if len(server.setups) > 1)
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(SIZES) * (TRIALS * trials + rounds * len(chosen)))

        def turn(server: Server, setup: Setup, sizes: list[int], seconds: float, what: str) -> dict[int, Figures]:
            figures = {}
            progress.update(task, description=f"{what}: {server.name} {' '.join(setup)}")
            with running(server, setup) as port:
                for size in sizes:
                    figures[size] = measure(server, port, *cases[size], seconds)
                    progress.advance(task)
            return figures

        setups: dict[str, dict[int, Setup]] = {}
        for key, server in chosen.items():
            setups[key] = dict.fromkeys(SIZES, server.setups[0])
            if len(server.setups) > 1:
                tried: dict[Setup, dict[int, float]] = {setup: dict.fromkeys(SIZES, 0.0) for setup in server.setups}
                for _ in range(TRIALS):
                    for setup, best in tried.items():
                        for size, one in turn(server, setup, [*SIZES], TRIAL_SECONDS, "trial").items():
                            best[size] = max(best[size], one.per_second)
                for setup, best in tried.items():
                    each = ", ".join(f"{rate:.0f}/s of {size}" for size, rate in best.items())
                    progress.console.print(" ".join([server.name, *setup]) + f": {each}", highlight=False)
                for size in SIZES:
                    setups[key][size] = max(tried, key=lambda setup, size=size: tried[setup][size])  # type: ignore[misc]
        results: Results = {key: {size: [] for size in SIZES} for key in chosen}
        for number in range(rounds):
            for key, server in chosen.items():
                for setup in dict.fromkeys(setups[key].values()):
                    sizes = [size for size in SIZES if setups[key][size] == setup]
                    for size, one in turn(server, setup, sizes, seconds, f"round {number + 1}").items():
                        results[key][size].append(one)
    return results, setups


def fixed_case(network: nn.Module, size: int) -> tuple[Images, Scores]:
    """Fixed images and the plain network's scores for them."""
    x = torch.rand(size, 3, 32, 32, generator=torch.Generator().manual_seed(size))
    with torch.inference_mode():
        return x.numpy(), network(x).numpy()


def median(figures: list[Figures], name: str) -> float:
    """Over the rounds."""
    return float(statistics.median(getattr(one, name) for one in figures))


def ratio(above: list[Figures], below: list[Figures]) -> float:
    """Median of the rounds' ratios of requests per second."""
    return statistics.median(one.per_second / other.per_second for one, other in zip(above, below, strict=True))


def report(results: Results, chosen: dict[str, Server], setups: dict[str, dict[int, Setup]]) -> Table:
    """The table of all figures."""
    threads = torch.get_num_threads()
    table = Table(
        title=f"ResNet-20, {CLIENTS} clients, {threads} torch thread{'s' if threads > 1 else ''} (the default)"
    )
    rivals = [key for key in ("litserve", "fastapi") if key in chosen]
    for column in ("server", "images", "requests/s", "p50 ms", "p99 ms", *(f"vs {key}" for key in rivals)):
        table.add_column(column, justify="left" if column == "server" else "right")
    for size in SIZES:
        for key, server in chosen.items():
            own = results[key][size]
            table.add_row(
                server.name,
                str(size),
                *(f"{median(own, name):.1f}" for name in ("per_second", "p50_ms", "p99_ms")),
                *(f"{ratio(own, results[rival][size]):.2f}" for rival in rivals),
            )
        table.add_section()
    table.caption = "\n".join(
        f"{chosen[key].name}, {size} images: {' '.join(setups[key][size]) or 'as it is'}"
        for key in rivals
        for size in SIZES
    )
    return table


def plot(results: Results, chosen: dict[str, Server], path: Path) -> None:
    """Saves requests per second as bars, with the rounds as dots."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(SIZES), figsize=(8, 3), layout="constrained", sharey=True)
    names = [server.name for server in chosen.values()]
    for size, axes in zip(SIZES, panels, strict=True):
        axes.barh(names, [median(results[key][size], "per_second") for key in chosen], color="C0", alpha=0.6)
        for key, server in chosen.items():
            dots = [one.per_second for one in results[key][size]]
            axes.plot(dots, [server.name] * len(dots), ".", color="black")
        axes.set(title=f"{size} image{'s' if size > 1 else ''} a request", xlabel="requests per second", xlim=(0, None))
    panels[0].invert_yaxis()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measures, prints the table, saves figures and plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--litserve-python", default=sys.executable, help="interpreter that has litserve")
    parser.add_argument("--only", default="binary,json,litserve,fastapi", help="whom to measure, separated by commas")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8.0, help="of one turn")
    parser.add_argument("--out", type=Path, default=Path("wire-out"), help="folder for wire.json and wire.png")
    options = parser.parse_args()
    busy = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        example.write_config(Path(folder))
        everybody = servers(Path(folder), options.litserve_python)
        wanted = options.only.split(",")
        unknown = set(wanted) - everybody.keys()
        if unknown:
            parser.error(f"--only knows {', '.join(everybody)}; got {', '.join(sorted(unknown))}")
        if "litserve" in wanted:
            ask = "import litserve, safetensors, torch; print(litserve.__version__, torch.__version__)"
            answer = subprocess.run([options.litserve_python, "-c", ask], capture_output=True, text=True, check=False)
            if answer.returncode:
                parser.error(
                    f"{options.litserve_python} lacks litserve, safetensors or torch: name one that has them with "
                    "--litserve-python, or leave LitServe out with --only binary,json,fastapi"
                )
            versions = dict(zip(("litserve", "torch of litserve"), answer.stdout.split(), strict=True))
        else:
            versions = {}
        chosen = {key: everybody[key] for key in everybody if key in wanted}
        results, setups = run(chosen, options.rounds, options.seconds)
    Console().print(report(results, chosen, setups))
    Console().print(f"The machine's load average before the first turn was {busy:.2f}; it should be near 0.")
    options.out.mkdir(parents=True, exist_ok=True)
    versions |= {
        name: importlib.metadata.version(name) for name in ("torch", "fastapi", "uvicorn", "uvloop", "httptools")
    }
    content = {
        "clients": CLIENTS,
        "torch_threads": torch.get_num_threads(),
        "load_average_before": busy,
        "versions": versions,
        "setups": {key: {size: " ".join(setup) for size, setup in one.items()} for key, one in setups.items()},
        "rounds": {
            key: {size: [asdict(one) for one in figures] for size, figures in sizes.items()}
            for key, sizes in results.items()
        },
    }
    (options.out / "wire.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    plot(results, chosen, options.out / "wire.png")
    Console().print(f"wrote {options.out}/wire.json and wire.png")


if __name__ == "__main__":
    main()
