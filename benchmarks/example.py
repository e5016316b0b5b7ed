"""What the benchmarks share: a ResNet-20 with random weights, as speed and memory do not mind, a real server, and an
engine behind a scheduler."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import httpx
import safetensors.torch
import torch
import yaml
from torch import Tensor, nn

from tta_server.engine.engine import Engine
from tta_server.scheduler import Bounds, Scheduler
from tta_server.settings import LimitSettings
from tta_server.types import Answer, Job, Lane, Stream

EXAMPLE = Path(__file__).parent.parent / "examples" / "cifar10c"


def network() -> nn.Module:
    """A ResNet-20, the same at every call."""
    sys.path.insert(0, str(EXAMPLE))
    from resnet_cifar import resnet20

    torch.manual_seed(0)
    return resnet20()


def write_config(folder: Path, limits: Mapping[str, float] | None = None) -> Path:
    """Writes the network's weights and a config for them, with these ``limits``, into ``folder``; returns its path."""
    safetensors.torch.save_file(network().state_dict(), folder / "weights.safetensors")
    model = {
        "factory": "resnet_cifar:resnet20",
        "weights": "weights.safetensors",
        "input": {"shape": [3, 32, 32]},
        "policies": {"tent": {"optimiser": "adam", "lr": 1e-3}},
    }
    (folder / "resnet_cifar.py").write_text((EXAMPLE / "resnet_cifar.py").read_text(encoding="utf-8"), encoding="utf-8")
    config = folder / "config.yaml"
    content = {"models": {"resnet20": model}, "limits": dict(limits or {})}
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


def through_scheduler(engine: Engine, lane: Lane, clients: list[Stream]) -> Callable[[list[Tensor]], None]:
    """Runs one request of each client, merged as the server would with its default limits; an error is raised."""
    limits = LimitSettings()

    def expect(job: Job, answer: Answer | Exception) -> None:
        if isinstance(answer, Exception):
            raise answer

    def run(batches: list[Tensor]) -> None:
        scheduler = Scheduler(Bounds(max_rows=limits.batch_rows, max_streams=limits.batch_streams))
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
