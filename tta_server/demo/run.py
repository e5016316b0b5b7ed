"""``tta-server demo``: the real server, seven camera streams that drift, and what adaptation does for each of them."""

from __future__ import annotations

import asyncio
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import httpx
from rich.console import Console
from rich.live import Live

from tta_server.demo.client import DemoFailed, Session, npy
from tta_server.demo.data import Digits, held_out
from tta_server.demo.display import final_table, live_table, progress, save_plot
from tta_server.errors import ConfigError
from tta_server.settings import load_settings

CONFIG = Path(__file__).with_name("config.yaml")
HOST = "127.0.0.1"
START_SECONDS = 120.0
STOP_SECONDS = 15.0
LINE_SECONDS = 5.0
"""Between lines of progress where there is no terminal to draw on."""
LOG_LINES = 20
"""Of the server's log, shown when something fails."""
EXAMPLE_ROWS = 16


@dataclass(frozen=True)
class DemoOptions:
    """How to run the demo."""

    out: Path
    """A folder, made when missing; gets ``demo.png``, ``digits.npy`` and ``server.log``."""
    batches: int = 60
    """That every stream sends."""
    batch_size: int = 32
    interval: float = 0.4
    """Seconds from one batch of a stream to its next; 0: as fast as the server answers."""
    seed: int = 0
    """Of the digits' order and of random corruptions."""


def run_demo(options: DemoOptions, console: Console) -> None:
    """Runs the demo, prints its tables, saves the plot, and says how to go on.

    Raises ``ConfigError`` for what cannot be run with, and ``DemoFailed``, with the end of the server's log, when the
    server fails. Whatever happens, the server is stopped.
    """
    digits = _prepare(options)
    log = options.out / "server.log"
    window = max(1, options.batches // 4)
    try:
        with _server(log, console) as url:
            session = Session(url, digits, options.batches, options.batch_size, options.seed, options.interval)
            asyncio.run(_watch(session, console))
    except DemoFailed as error:
        tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:])
        raise DemoFailed(f"{error}\nThe end of the server's log, {log}:\n{tail}") from error
    plot, example = options.out / "demo.png", options.out / "digits.npy"
    save_plot(session.runs, window, plot)
    example.write_bytes(npy(digits[0][:EXAMPLE_ROWS]))
    console.print()
    console.print(final_table(session.runs, window))
    console.print(f"{progress(session)}.", highlight=False)
    _print_hints(console, plot, example, options.out / "state", digits)


def run_clients(options: DemoOptions, url: str, token: str, console: Console) -> None:
    """Sends the cameras' drifting streams to a server that runs already and serves the demo's model, over and over.

    Each round starts clean again. Ends with the process; raises ``DemoFailed`` when the server fails.
    """
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"--url must begin with http:// or https://, got {url!r}")
    digits = _prepare(options)
    while not _is_ready(url):
        console.print(f"Waiting for {url}", highlight=False)
        time.sleep(LINE_SECONDS)
    session = Session(url, digits, options.batches, options.batch_size, options.seed, options.interval, token)
    while True:
        asyncio.run(_watch(session, console))


def _prepare(options: DemoOptions) -> Digits:
    """Makes the output folder; returns the digits to send. Raises ``ConfigError``."""
    if options.batches < 2 or options.batch_size < 1 or options.interval < 0 or options.seed < 0:
        raise ConfigError(
            "the demo needs at least 2 batches of at least 1 row, and neither a negative interval nor a negative "
            f"seed; got {options.batches} batches of {options.batch_size}, {options.interval:g} s, {options.seed}"
        )
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot make the output folder {options.out}: {error}") from error
    try:
        return held_out()
    except ImportError as error:
        raise ConfigError(str(error)) from error


async def _watch(session: Session, console: Console) -> None:
    """Drives the session to its end, and shows meanwhile how it goes."""
    if console.is_terminal and not console.is_dumb_terminal:
        with Live(get_renderable=lambda: live_table(session), console=console, refresh_per_second=4, transient=True):
            await session.drive()
        return
    lines = asyncio.create_task(_print_lines(session, console))
    try:
        await session.drive()
    finally:
        lines.cancel()


async def _print_lines(session: Session, console: Console) -> None:
    while True:
        await asyncio.sleep(LINE_SECONDS)
        console.print(progress(session), highlight=False)


@contextmanager
def _server(log: Path, console: Console) -> Iterator[str]:
    """The server in a process of its own, ready; gives its URL. It is stopped at the end, come what may."""
    port = _free_port()
    url = f"http://{HOST}:{port}"
    console.print(f"Starting the server on {url}, log in {log}", highlight=False, soft_wrap=True)
    command = [sys.executable, "-m", "tta_server", "serve", str(CONFIG), "--host", HOST, "--port", str(port)]
    with log.open("wb") as file, _terminating():
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT)
        try:
            _wait_until_ready(process, url)
            yield url
        finally:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                console.print(f"The server did not stop within {STOP_SECONDS:g} s; it is killed.", highlight=False)
            finally:
                process.kill()  # does nothing to a process that has ended
                process.wait()


def _wait_until_ready(process: subprocess.Popen[bytes], url: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise DemoFailed(f"the server ended while starting, with status {process.returncode}")
        if _is_ready(url):
            return
        time.sleep(0.1)
    raise DemoFailed(f"the server was not ready within {START_SECONDS:g} s")


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/v2/health/ready", trust_env=False).is_success
    except httpx.TransportError:
        return False


@contextmanager
def _terminating() -> Iterator[None]:
    """Makes SIGTERM unwind the stack, as Ctrl-C does, so that the server is not left behind."""

    def unwind(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, unwind)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def _print_hints(console: Console, plot: Path, example: Path, state: Path, digits: Digits) -> None:
    """Says where the plot is, and how to keep the server running and send a first request; lines to copy."""
    stream = f"http://{HOST}:{load_settings(CONFIG).server.port}/v1/streams/my-camera"
    labels = " ".join(map(str, digits[1][:EXAMPLE_ROWS]))
    for line in (
        f"The plot is {_short(plot)}",
        "",
        "Keep a server running, whose streams outlive it:",
        f"  {_command()} serve {_short(CONFIG)} --state {_short(state)}",
        "then, in another terminal, create a stream and send it 16 digits:",
        f"  curl -X PUT {stream}",
        f"  curl --data-binary @{_short(example)} {stream}/predict",
        f'(They are {labels}; compare "classes" in the answer.)',
    ):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _command() -> str:
    """How to call ``tta-server`` from this shell: by name where that finds this environment's own."""
    own = Path(sys.executable).with_name("tta-server")
    if not own.exists():
        return f"{_short(Path(sys.executable))} -m tta_server"
    found = shutil.which("tta-server")
    return "tta-server" if found and os.path.samefile(found, own) else _short(own)


def _short(path: Path) -> str:
    """The path as one word for the shell: relative where it lies below the current folder."""
    absolute, here = Path(os.path.abspath(path)), Path.cwd()
    return shlex.quote(str(absolute.relative_to(here) if absolute.is_relative_to(here) else absolute))
