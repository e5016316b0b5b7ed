"""What is left of streams when their server is killed, told to stop, paused and replaced, or its disk fails.

The tests go on with one store and the clients of its streams, each from where the one before has left them; any of them
can begin.
"""

from __future__ import annotations

import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPResponse
from pathlib import Path

import httpx
import psutil
import pytest

from tests.e2e.crashes import Client, Clients, Crash, body, inputs
from tests.e2e.process import ROOT, START_SECONDS, Running, gated_rows, started
from tests.e2e.test_disconnects import infer, waiting
from tests.serving import TIMEOUT, rows, write_config
from tta_server.settings import Durability, LimitSettings, StateSettings

QUICK, SYNC, CLOSE = Durability(seconds=1), Durability(mode="sync"), Durability(steps=3, seconds=1)
PATIENT = Durability(steps=20, seconds=600)
"""Nothing is stored before the tenth step since the last time."""
NONE = Durability(mode="none")
PAGING = {"slots": 3, "host_bytes": 1000}
"""Room for few streams."""
FILE_BYTES = 50_000
"""More than the server's log takes, and less than its store."""
MOUNT_BYTES = 12_000_000
"""More than the store and its log take, so that it is the other file that fills the disk."""
LIMITS, STATE = LimitSettings(), StateSettings()


@dataclass
class Kept:
    """A store, and the clients of the streams in it."""

    folder: Path
    clients: Clients
    is_known: bool = True
    """Whether the clients know what is in it."""

    @property
    def store(self) -> Path:
        return self.folder / "store"

    def server(self, *options: str, **limits: int) -> AbstractContextManager[Running]:
        """On the store, with a folder of its own."""
        own = self.folder / str(len(list(self.folder.iterdir())))
        own.mkdir()
        self.is_known = False
        state = {"folder": str(self.store), "snapshot_steps": 7}
        return started(own, *options, state=state, limits={"shed_share": 1, **limits})

    def of(self, *durabilities: Durability) -> list[Client]:
        """Those of the clients."""
        return [client for client in self.clients.clients.values() if client.durability in durabilities]

    def check(self, is_quiet: bool = True) -> list[Crash]:
        """Looks at what the end of a server has left."""
        self.clients.check_answers()
        crashes = self.clients.check_store(self.store, is_quiet)
        self.is_known = True
        return crashes


def kept_in(folder: Path, *durabilities: Durability) -> Kept:
    """With some streams of each."""
    reference = folder / "reference"
    reference.mkdir()
    clients = (
        Client(f"{policy}-{index}", policy, durability)
        for index, durability in enumerate(2 * durabilities)
        for policy in (("tent", "rotta") if index < len(durabilities) else ("tent",))
    )
    return Kept(folder, Clients(clients, write_config(reference)))


@pytest.fixture(scope="module")
def stores() -> list[Kept]:
    return []


@pytest.fixture
def kept(stores: list[Kept], tmp_path: Path) -> Kept:
    """The one of the test before, unless that has failed."""
    if not stores or not stores[-1].is_known:
        stores.append(kept_in(tmp_path, QUICK, SYNC, CLOSE, PATIENT, NONE))
    return stores[-1]


def kill(server: Running) -> None:
    server.process.kill()
    server.process.wait()


def stop(server: Running) -> None:
    """As systemd and Kubernetes do."""
    server.process.terminate()
    assert server.process.wait(TIMEOUT) == 0, server.log
    assert "Traceback" not in server.log


def wait_until_saved(server: Running, clients: list[Client]) -> None:
    server.wait_for(
        "that all is saved",
        lambda: not any(server.http.get(client.url).json()["unsaved_steps"] for client in clients),
    )


def check_stored(server: Running, is_stored: bool) -> None:
    """Whether the server says so, which is ready all the same."""
    ready = server.http.get("/v2/health/ready")
    assert ready.status_code == 200
    state = ready.json()["state"]
    assert (state["stored"], bool(state["problem"])) == (is_stored, not is_stored)
    assert server.metric("tta_state_store_up") == is_stored


@pytest.mark.parametrize("turn", range(3))
def test_killed_under_load(kept: Kept, turn: int) -> None:
    """Each stream comes back at a version that is no older than promised, bit for bit as it was then, and the next
    answer tells how many steps are lost. At first all states fit into memory; later most are on the disk, or on the way
    there or back."""
    limits, page_outs = (PAGING if turn else {}), 0.0
    with kept.server(**limits) as server:

        def end() -> None:
            nonlocal page_outs
            page_outs = server.metric("tta_stream_page_outs_total")
            time.sleep(random.uniform(0, 0.02))
            kill(server)

        kept.clients.load(server.url, random.randrange(150, 300), end)
        assert (page_outs > 50) == (limits == PAGING)
        assert "Traceback" not in server.log
    crashes = kept.check(is_quiet=False)
    assert max(crash.recovered for crash in crashes) > 5
    assert all(crash.recovered >= crash.answered for crash in crashes if crash.durability == SYNC)


def test_lost_steps_are_exact(kept: Kept) -> None:
    """And told once, with the first answer, also where that comes only after another crash."""
    patient = kept.of(PATIENT)
    some, others = patient[:1], patient[1:]
    with kept.server() as server:
        kept.clients.run(server.url, 0)
        for client in patient:
            assert server.http.post(f"{client.url}/snapshots", json={"name": "before"}).status_code == 201
        kept.clients.run(server.url, 5)
        kill(server)
    lost = {crash.id: crash.lost for crash in kept.check()}
    assert [lost[client.id] for client in patient] == [5] * len(patient)
    with kept.server() as server:
        kept.clients.run(server.url, 2, some)
        kill(server)
    lost = {crash.id: crash.lost for crash in kept.check()}
    assert [lost[client.id] for client in some] == [2]
    assert [lost[client.id] for client in others] == [5] * len(others)


def test_stopped_under_load(kept: Kept) -> None:
    """What was asked before is answered, nothing is taken any more, all is stored, and the next server knows that."""
    clients = list(kept.clients.clients.values())
    with ExitStack() as connections, kept.server() as server:
        kept.clients.run(server.url, 3)
        other = connections.enter_context(server.connect())
        other.sendall(infer(gated_rows()))
        held = server.held()
        asked = [connections.enter_context(server.connect()) for _ in clients]
        for client, connection in zip(clients, asked, strict=True):
            connection.sendall(request(client))
        waiting(server, len(clients))
        late = connections.enter_context(server.connect())
        head, _, content = infer(rows(1)).partition(b"\r\n\r\n")
        late.sendall(head + b"\r\nExpect: 100-continue\r\n\r\n")
        assert late.recv(2**10).startswith(b"HTTP/1.1 100 ")

        began = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        server.wait_for("a closed port", lambda: not is_open(server.port))
        late.sendall(content)
        refused = reply(late)
        assert (refused.status_code, refused.headers["Retry-After"].isdigit()) == (503, True)
        held.close()
        for client, connection in zip(clients, asked, strict=True):
            client.take(reply(connection))
        assert server.process.wait(TIMEOUT) == 0, server.log
        assert time.monotonic() - began < LIMITS.drain_seconds + STATE.flush_seconds
        assert re.search(r"drained given_up=0 saved=[1-9]\d* unsaved=0", server.log), server.log
    stored = [crash for crash in kept.check() if crash.durability != NONE]
    assert all((crash.recovered, crash.lost) == (crash.answered + 1, 0) for crash in stored)
    with kept.server() as server:
        assert "clean_shutdown=True" in server.log
        assert server.metric("tta_state_last_shutdown_clean") == 1
        kept.clients.run(server.url, 2)
        stop(server)
    kept.check()


def test_files_that_cannot_grow(kept: Kept) -> None:
    """As by a quota. Streams go on in memory, everybody can see it, and what is unsaved is stored as soon as it can."""
    stored = kept.of(QUICK, SYNC, CLOSE)
    with kept.server() as server:
        kept.clients.run(server.url, 3)
        process = psutil.Process(server.process.pid)
        limits = process.rlimit(psutil.RLIMIT_FSIZE)
        process.rlimit(psutil.RLIMIT_FSIZE, (FILE_BYTES, limits[1]))
        kept.clients.run(server.url, 2)
        server.wait_for("the fault", lambda: server.metric("tta_state_store_up") == 0)
        kept.clients.run(server.url, 8)
        check_stored(server, False)
        assert all(client.number - client.promised > 8 for client in stored)
        process.rlimit(psutil.RLIMIT_FSIZE, limits)
        wait_until_saved(server, stored)
        check_stored(server, True)
        kept.clients.run(server.url, 1)
        kill(server)
    crashes = kept.check()
    assert all(crash.recovered >= crash.answered for crash in crashes if crash.durability == SYNC)


def test_disk_that_is_read_only_and_then_full(tmp_path: Path) -> None:
    kept = kept_in(tmp_path, QUICK, SYNC, CLOSE)
    clients = list(kept.clients.clients.values())
    with mounted(kept.store, "ro"):
        with kept.server() as server:
            kept.clients.run(server.url, 5)
            check_stored(server, False)
            assert all(client.promised == -1 for client in clients)
            remount(kept.store, "rw")
            wait_until_saved(server, clients)
            check_stored(server, True)
            kept.clients.run(server.url, 5)
            while server.metric("tta_state_store_up"):
                fill(kept.store / "other")
                kept.clients.run(server.url, 1)
            fill(kept.store / "other")  # also the room that the store made for itself
            told = [client.promised for client in clients]
            kept.clients.run(server.url, 5)
            check_stored(server, False)
            assert [client.promised for client in clients] == told
            (kept.store / "other").unlink()
            wait_until_saved(server, clients)
            check_stored(server, True)
            kill(server)
        assert all((crash.recovered, crash.lost) == (crash.answered + 1, 0) for crash in kept.check())


def test_two_servers(kept: Kept) -> None:
    """The second is refused, or takes the streams over; then the first can do nothing to them any more, also where it
    was paused meanwhile and does not know."""
    with kept.server() as first:
        kept.clients.run(first.url, 3)
        refused = subprocess.run(
            [sys.executable, "-m", "tta_server", "serve", str(first.folder / "config.yaml"), "--port", "0"],
            cwd=ROOT, capture_output=True, text=True, timeout=START_SECONDS, check=False,
        )  # fmt: skip
        assert refused.returncode == 1
        assert f"{kept.store} is in use by process {first.process.pid}" in refused.stderr
        assert "Traceback" not in refused.stderr
        kept.clients.run(first.url, 1)
        wait_until_saved(first, kept.of(QUICK, SYNC, CLOSE))  # it is not to be paused in the middle of a write
        first.process.send_signal(signal.SIGSTOP)
        kept.check()
        with kept.server("--take-over") as second:
            kept.clients.run(second.url, 3)
            first.process.send_signal(signal.SIGCONT)
            client = kept.of(SYNC)[0]
            # Before it knows: what comes to it now is stored nowhere, and at most one answer, of what was, leaves.
            early = [first.http.post(f"{client.url}/predict", content=body(inputs("", 0))) for _ in range(2)]
            assert early[1].status_code == 503
            first.wait_for("that it knows", lambda: not first.is_ready())
            for method, path in (("GET", "/v1/streams"), ("GET", client.url), ("POST", f"{client.url}/predict")):
                answer = first.http.request(method, path, content=body(inputs("", 0)))
                assert (answer.status_code, answer.headers["Retry-After"].isdigit()) == (503, True)
            assert first.metric("tta_state_store_fenced") == 1
            kept.clients.run(second.url, 2)
            first.process.terminate()
            assert first.process.wait(TIMEOUT) == 0, first.log
            kept.clients.run(second.url, 2)
            stop(second)
    stored = [crash for crash in kept.check() if crash.durability != NONE]
    assert all((crash.recovered, crash.lost) == (crash.answered + 1, 0) for crash in stored)


def request(client: Client) -> bytes:
    """The client's next."""
    content = body(inputs(client.id, client.number))
    path = f"{client.url}/predict?seq={client.number}&output=logits"
    return f"POST {path} HTTP/1.1\r\nHost: test\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content


def reply(connection: socket.socket) -> httpx.Response:
    """What comes."""
    with HTTPResponse(connection) as found:
        found.begin()
        return httpx.Response(found.status, headers=found.getheaders(), content=found.read())


def is_open(port: int) -> bool:
    with suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False


@contextmanager
def mounted(folder: Path, *options: str) -> Iterator[None]:
    """A small disk of its own."""
    folder.mkdir()
    chosen = ",".join((f"size={MOUNT_BYTES}", *options))
    if subprocess.run(["mount", "-t", "tmpfs", "-o", chosen, "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def remount(folder: Path, *options: str) -> None:
    subprocess.run(["mount", "-o", ",".join(("remount", *options)), folder], check=True)


def fill(path: Path) -> None:
    """Takes all that is free on the disk."""
    with path.open("ab", buffering=0) as file, suppress(OSError):
        while file.write(bytes(2**12)):
            pass
