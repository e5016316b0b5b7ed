"""The real server in a process of its own, and how a test sees and holds it from outside."""

from __future__ import annotations

import os
import re
import socket
import ssl
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
from torch import Tensor

from tests.serving import CLASSES, MODEL, TIMEOUT, rows, write_config

ROOT = Path(__file__).parent.parent.parent
START_SECONDS = 60.0

_GATED = """
    import os, socket
    from tests.serving import TinyNetwork

    class Gated(TinyNetwork):
        '''Stops at inputs with a certain first pixel, until the test hangs up.'''

        def forward(self, x):
            if bool((x[:, 0, 0, 0] == 0.625).any()):
                with socket.create_connection(("127.0.0.1", int(os.environ["TTA_TEST_GATE"])), timeout=30) as gate:
                    gate.recv(1)
            return super().forward(x)
    """
"""A module beside the config file."""


def gated_rows() -> Tensor:
    """Rows at which the model stops, see :meth:`Running.held`."""
    x = rows(2)
    x[0, 0, 0, 0] = 0.625
    return x


@dataclass(frozen=True)
class Running:
    """A server process."""

    process: subprocess.Popen[bytes]
    ports: tuple[int, ...]
    """Where it listens: the main port and, where it has one, that of the metrics."""
    http: httpx.Client
    """Opens a connection for every request and leaves none behind."""
    folder: Path
    gate: socket.socket

    @property
    def port(self) -> int:
        return self.ports[0]

    @property
    def url(self) -> str:
        return str(self.http.base_url)

    @property
    def log(self) -> str:
        """What it said so far."""
        return (self.folder / "log").read_text()

    def is_ready(self) -> bool:
        try:
            return self.http.get("/v2/health/ready").status_code == 200
        except httpx.TransportError:
            return False

    def connect(self) -> socket.socket:
        """A connection of its own, for bytes that no client would send."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=TIMEOUT)

    def held(self) -> socket.socket:
        """Waits until a request is held in the model; closing what is returned lets it go on."""
        connection, _ = self.gate.accept()
        return connection

    def wait_for(self, what: str, true: Callable[[], bool]) -> None:
        """Waits for something in the other process."""
        deadline = time.monotonic() + START_SECONDS
        while not true():
            if time.monotonic() > deadline:
                raise AssertionError(f"never saw {what}; the server's log:\n{self.log}")
            time.sleep(0.01)

    def metric(self, *parts: str) -> float:
        """Sum of the series whose lines hold all these parts."""
        url = self.http.base_url.copy_with(port=self.ports[-1], path="/metrics")
        lines = self.http.get(url).text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line[0] != "#" and all(part in line for part in parts))

    def given_up(self) -> float:
        """Predictions whose client went away."""
        return self.metric("tta_requests_total", 'code="499"')

    def connections(self) -> int:
        """Open connections of clients."""
        found = psutil.Process(self.process.pid).net_connections("tcp")
        return sum(one.status != psutil.CONN_LISTEN and one.laddr.port in self.ports for one in found)

    def memory(self) -> int:
        """Bytes of memory in use."""
        size: int = psutil.Process(self.process.pid).memory_info().rss
        return size

    def check_sound(self) -> None:
        """Nothing is left of the requests so far, and no error was a surprise."""
        assert self.is_ready()
        self.wait_for("the end of all connections", lambda: self.connections() == 0)
        assert self.metric("tta_requests_waiting") == 0
        assert "Traceback" not in self.log


@contextmanager
def started(
    folder: Path, *options: str, context: ssl.SSLContext | None = None, **sections: dict[str, Any]
) -> Iterator[Running]:
    """A server with these sections of the config and options of the command, on a port that it finds.

    ``context`` is for clients, where the server speaks TLS. Killed at the end if it still runs.
    """
    (folder / "gated.py").write_text(textwrap.dedent(_GATED))
    model = {
        "factory": "gated:Gated", "weights": "tiny.safetensors", "input": {"shape": [3, 8, 8]},
        "classes": list(CLASSES), "policies": {"tent": {"lr": 0.01}},
    }  # fmt: skip
    config = write_config(
        folder,
        models={MODEL: model},
        monitor={"shadow_ratio": 0},
        **sections | {"server": {"device": "cpu", "port": 1, **sections.get("server", {})}},
    )
    with socket.create_server(("127.0.0.1", 0)) as gate, (folder / "log").open("wb") as output:
        gate.settimeout(TIMEOUT)
        process = subprocess.Popen(
            [sys.executable, "-m", "tta_server", "serve", str(config), "--port", "0", *options],
            cwd=ROOT,
            stdout=output,
            stderr=output,
            env={**os.environ, "TTA_TEST_GATE": str(gate.getsockname()[1]), "OMP_NUM_THREADS": "1"},
        )
        try:
            listens = _listens(process, folder / "log", 2 if "metrics" in sections.get("server", {}) else 1)
            url = f"{'http' if context is None else 'https'}://127.0.0.1:{listens[0]}"
            limits = httpx.Limits(max_keepalive_connections=0)
            with httpx.Client(base_url=url, verify=context or False, limits=limits, timeout=TIMEOUT) as client:
                running = Running(process, listens, client, folder, gate)
                running.wait_for("a ready server", running.is_ready)
                yield running
        finally:
            process.kill()
            process.wait()


def _listens(process: subprocess.Popen[bytes], log: Path, count: int) -> tuple[int, ...]:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        found = re.findall(r"running on https?://[\d.]+:(\d+)", log.read_text())
        if len(found) == count:
            return tuple(map(int, found))
        time.sleep(0.02)
    raise AssertionError(f"the server did not start:\n{log.read_text()}")
