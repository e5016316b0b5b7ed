"""What a crash costs: the server is killed under load again and again.

    python benchmarks/crash.py [--kills 50] [--modes none async sync] [--streams 16] [--seed 0] [--out crash.png]

The real server with a tiny network, and clients that each send their stream's next request when the last is answered:
the same inputs in every run. At a random moment the process gets SIGKILL; the next one starts on the same store. Every
second process has room for so few states in memory that most are on the disk, or on the way there or back.

After each kill all that is stored is read and compared, bit for bit, with a run that was never interrupted, as are all
answers: each stream must be at a version that is no older than its durability and the answers promised, and its next
answer must tell how many steps are lost. The script ends with an ``AssertionError`` where one is not, and leaves the
store where it is.

The table says how many answers and stored states were compared and how many steps a kill cost a stream: with
durability ``none``, or where it was not stored yet, all since it was opened; with ``sync`` a step that was taken, but
which no answer had been computed with. *Behind* is the most steps by which a stream was older than its last answer, and
*bound* what its durability allows for that.
"""

from __future__ import annotations

import argparse
import random
import shutil
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from tests.e2e.crashes import Client, Clients, Crash
from tests.e2e.process import Running, started
from tests.serving import write_config
from tta_server.settings import Durability

POLICIES = ("tent", "tent", "rotta", "roid")
MOST_ANSWERS = 400
"""Before a kill, of all streams."""
PAGING = {"slots": 3, "host_bytes": 1000}


@dataclass
class Result:
    """Of one durability."""

    durability: Durability
    crashes: list[Crash] = field(default_factory=list)
    answers: int = 0
    """That were compared."""

    @property
    def lost(self) -> list[int]:
        """Steps by crash and stream."""
        return [crash.answered + 1 if crash.recovered < 0 else crash.lost for crash in self.crashes]

    @property
    def behind(self) -> int:
        """Largest number of steps by which a stream was behind its last answer."""
        return max(crash.answered - crash.recovered for crash in self.crashes)

    @property
    def bound(self) -> str:
        """Of that, as the durability says."""
        return "-" if self.durability.mode == "none" else str(int(self.durability.bound))


def kills(durability: Durability, options: argparse.Namespace, chance: random.Random, progress: Progress) -> Result:
    """Kills servers on one store, and looks at what is left of it each time."""
    result, task = Result(durability), progress.add_task(durability.mode, total=options.kills)
    folder = Path(tempfile.mkdtemp(prefix=f"crash-{durability.mode}-"))
    (folder / "reference").mkdir()
    clients = Clients(
        (Client(f"s{index}", POLICIES[index % len(POLICIES)], durability) for index in range(options.streams)),
        write_config(folder / "reference"),
    )
    try:
        for turn in range(options.kills):
            limits = {"shed_share": 1} | (PAGING if turn % 2 else {})
            with started(folder, state={"folder": "store", "snapshot_steps": 10}, limits=limits) as server:
                kill(server, clients, chance.randrange(MOST_ANSWERS), chance.uniform(0, 0.02))
            result.answers += clients.check_answers()
            result.crashes += clients.check_store(folder / "store")
            progress.advance(task)
    except BaseException:
        progress.console.print(f"[red]kill {len(result.crashes) // options.streams + 1}; see {folder}")
        raise
    shutil.rmtree(folder)
    return result


def kill(server: Running, clients: Clients, answers: int, seconds: float) -> None:
    """So many seconds after so many answers."""

    def end() -> None:
        time.sleep(seconds)
        server.process.kill()
        server.process.wait()

    clients.load(server.url, answers, end)


def table(results: list[Result]) -> Table:
    """What the crashes cost, by durability."""
    shown = Table(title="Steps that a kill cost a stream")
    for column in (
        "mode", "kills", "answers", "states", "lost: median", "mean", "most", "behind", "bound",
    ):  # fmt: skip
        shown.add_column(column, justify="left" if column == "mode" else "right")
    for result in results:
        shown.add_row(
            result.durability.mode,
            str(len(result.crashes) // len({crash.id for crash in result.crashes})),
            f"{result.answers:,}",
            f"{sum(crash.states for crash in result.crashes):,}",
            f"{statistics.median(result.lost):g}",
            f"{statistics.mean(result.lost):.2f}",
            str(max(result.lost)),
            str(max(0, result.behind)),
            result.bound,
        )
    return shown


def plot(results: list[Result], path: Path) -> None:
    """Saves the histograms of lost steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(results), 3.2), layout="constrained")
    for place, result in enumerate(results, 1):
        axes = figure.add_subplot(1, len(results), place)
        most = max(result.lost)
        axes.hist(result.lost, bins=[step - 0.5 for step in range(0, most + 2, most // 40 + 1)])
        axes.set(title=result.durability.mode, xlabel="steps lost by a stream", ylabel="kills x streams")
        axes.locator_params(axis="x", integer=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Kills servers and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="of each mode")
    parser.add_argument("--modes", nargs="+", choices=("none", "async", "sync"), default=["none", "async", "sync"])
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", type=Path, default=None, help="where to save the histograms")
    options = parser.parse_args()
    torch.set_num_threads(1)
    chance = random.Random(options.seed)
    with Progress(console=Console(stderr=True)) as progress:
        results = [kills(Durability(mode=mode), options, chance, progress) for mode in options.modes]
    Console().print(table(results))
    if options.out is not None:
        plot(results, options.out)


if __name__ == "__main__":
    main()
