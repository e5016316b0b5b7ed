"""What the benchmarks share: a ResNet-20 with random weights, as speed and memory do not mind, a real server, and an
engine behind a scheduler."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import orjson
import safetensors.torch
import torch
import yaml
from load import Load, Make, post
from numpy.typing import NDArray
from torch import Tensor, nn

from tta_server.client.core import infer
from tta_server.engine.engine import Engine
from tta_server.scheduler import Bounds, Scheduler
from tta_server.settings import LimitSettings
from tta_server.types import Answer, Job, Lane, Stream

ADAPTING: dict[str, Any] = {"limits": {"shed_share": 1.0, "queue_seconds": 600.0}, "guard": {"enabled": False}}
"""Config sections with which every request of a stream adapts it: none is shed or late, and no guard holds one back."""

Images = NDArray[np.float32]

EXAMPLE = Path(__file__).parent.parent / "examples" / "cifar10c"


def network() -> nn.Module:
    """A ResNet-20, the same at every call."""
    sys.path.insert(0, str(EXAMPLE))
    from resnet_cifar import resnet20

    torch.manual_seed(0)
    return resnet20()


def write_config(folder: Path, limits: Mapping[str, float] | None = None, **sections: Mapping[str, object]) -> Path:
    """Writes the network's weights and a config for them, with these ``limits`` and other sections, into ``folder``;
    returns its path."""
    safetensors.torch.save_file(network().state_dict(), folder / "weights.safetensors")
    model = {
        "factory": "resnet_cifar:resnet20",
        "weights": "weights.safetensors",
        "input": {"shape": [3, 32, 32]},
        "policies": {"tent": {"optimiser": "adam", "lr": 1e-3}},
    }
    (folder / "resnet_cifar.py").write_text((EXAMPLE / "resnet_cifar.py").read_text(encoding="utf-8"), encoding="utf-8")
    config = folder / "config.yaml"
    content = {"models": {"resnet20": model}, "limits": dict(limits or {}), **sections}
    config.write_text(yaml.safe_dump(content), encoding="utf-8")
    return config


@contextlib.contextmanager
def running(config: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A real server for ``config`` on a free loopback port: its URL and process. Ends with the context."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "tta_server", "serve", str(config), "--port", str(port)]
    server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not _is_ready(url):
            if server.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"the server did not become ready; try: {' '.join(command)}")
            time.sleep(0.1)
        yield url, server
    finally:
        server.terminate()
        server.wait()


def stream_request(stream: str, x: Images) -> bytes:
    """A request of that stream in V2 binary, as it goes over the socket."""
    call = infer("resnet20", x, None, {"sequence_id": stream})
    return post(call.path, call.content, call.headers)


def in_turn(requests: Sequence[bytes]) -> Make:
    """One after the other, over and over."""
    return lambda number: requests[number % len(requests)]


def stream_reports(load: Load) -> list[dict[str, object]]:
    """What each answer to such a request says beside the scores. Raises ``SystemExit`` if there is one that is none."""
    reports = []
    for answer in load.answers:
        length = answer.header("Inference-Header-Content-Length")
        if answer.status != 200 or length is None:
            raise SystemExit(f"the server answered {answer.status}: {answer.body[:500].decode(errors='replace')}")
        reports.append(orjson.loads(answer.body[: int(length)])["parameters"])
    return reports


def check_adapted(load: Load, adapted: bool = True) -> None:
    """Raises ``SystemExit`` unless each answer is by an adapted model that then took its step; or each is frozen."""
    for report in stream_reports(load):
        if report["adapted"] is not adapted or report.get("shed"):
            raise SystemExit(f"an answer that should {'' if adapted else 'not '}adapt: {report}")


def milliseconds(latencies: Iterable[float]) -> tuple[float, float]:
    """Median and 99th percentile of seconds."""
    p50, p99 = np.percentile([1e3 * one for one in latencies], [50, 99])
    return float(p50), float(p99)


def through_scheduler(engine: Engine, lane: Lane, clients: list[Stream]) -> Callable[[list[Tensor]], None]:
    """Runs one request of each client, merged as the server would with its default limits; an error is raised."""
    limits = LimitSettings()

    def expect(job: Job, answer: Answer | Exception) -> None:
        if isinstance(answer, Exception):
            raise answer

    def run(batches: list[Tensor]) -> None:
        scheduler = Scheduler(Bounds(max_rows=limits.batch_rows or 64, max_streams=limits.batch_streams))
        for client, x in zip(clients, batches, strict=True):
            scheduler.submit(Job(client, lambda answer, error: None, lane, x))
        while (plan := scheduler.next_batch(0.0)) is not None:
            engine.step(plan, expect)
            scheduler.complete(plan)

    return run


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/v2/health/ready").status_code == 200
    except httpx.TransportError:
        return False
