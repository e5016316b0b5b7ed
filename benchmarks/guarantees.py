"""How often are the guarantees wrong, how soon do they tell, and what do they let through?

    python benchmarks/guarantees.py [--streams 200] [--audits 3000] [--out guarantees-out]

All streams are made up. ``W`` is 1 where the source is right and the adapted model is not, -1 the other way round; it
is 0 in a fifth of the disagreements, and its mean is given.

- *False alarms*: of the e-detector on streams of so many answered audits, harmless ones and such that are just
  tolerated; and how many audits go by from one alarm to the next, which must be ``c`` on average at least. Promotions
  where there is no benefit: a share of ``alpha`` at most. Regret outside the interval at any time: a share of ``level``
  at most; rows are fixed, change for good, or come from a foe that sees all earlier coins.
- *Delays*: answered audits, median and 90 %, until harm is found (from the first row, and after 500 good audits), a
  benefit is certified, and the interval of the regret leaves 0; where each disagreement is asked about with probability
  ``q``. Divided by ``q``, these are disagreements. At ``q = 1`` the regret is known, without an interval.
- *Budgets*: 20,000 rows, 3 in 10 differing. Regret per 100 rows, and the most that any window has beyond ``eps`` a row,
  which is ``b0 + c0`` at most for the ledger.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from tta_server.trust.guarantees import Audit, Budget, Guarantee, Ledger
from tta_server.trust.labels import LEAST_LABELS, WIDER, WINDOW, paired

Outcomes = NDArray[np.int64]

MEANS = (0.1, 0.2, 0.4, 0.6)
SHARES = (1.0, 0.3, 0.1)
"""``q``."""
EPS = 0.02
EDGE = 0.1
"""The tolerated mean of ``W`` where it is the edge that is looked at."""
GOOD = -0.15
LEVEL = 0.05
AT_ONCE = 50
LONGEST = 5000
"""Audits after which nothing more is expected."""
ROWS, DIFFERING = 20_000, 0.3
KINDS = ("fixed", "change", "foe above", "foe below")
DELAYS = ("alarm", "alarm after 500", "promotion", "interval")


def draw(mean: float, count: int, generator: np.random.Generator) -> Outcomes:
    """``W`` of disagreements."""
    return generator.choice([-1, 0, 1], count, p=[0.4 - mean / 2, 0.2, 0.4 + mean / 2])


def answer(audit: Audit, ws: Outcomes, look: Callable[[], bool], at_once: int = AT_ONCE) -> int | None:
    """Sends disagreements with these ``W``, ``at_once`` in a request, answers each audit, and looks after each: how
    many answers until ``look`` says so."""
    before, ones = audit.answered, np.ones(at_once, np.bool_)
    for part in range(0, len(ws), at_once):
        first = audit.rows
        for index in np.flatnonzero(audit.allow(ones[: len(ws) - part]).ask).tolist():
            audit.settle(first + index, int(ws[part + index]))
            if look():
                return audit.answered - before
    return None


def most(mean: float, eps: float, audits: int, generator: np.random.Generator) -> tuple[float, float]:
    """The most that evidence of harm, and wealth of a promotion, come to in one stream."""
    audit = Audit(1.0, eps, generator.random)
    highest = [0.0, 0.0]

    def look() -> bool:
        highest[:] = max(highest[0], audit.evidence), max(highest[1], audit.wealth)
        return False

    answer(audit, draw(mean, audits, generator), look)
    return highest[0], highest[1]


def wrongly(mean: float, eps: float, streams: int, audits: int, generator: np.random.Generator) -> dict[str, float]:
    """Shares of streams with an alarm, by ``c``, and certified, by ``alpha``."""
    harm, gain = np.array([most(mean, eps, audits, generator) for _ in range(streams)]).T
    found = {f"alarm, c = {c:g}": float(np.mean(harm >= c)) for c in (1e2, 1e3, 1e4)}
    # With a benefit, a promotion is right.
    level = {f"certified, alpha = {alpha:g}": float(np.mean(gain >= 1 / alpha)) for alpha in (0.1, 0.01)}
    return found | (level if mean >= 0 else {})


def run_length(c: float, alarms: int, generator: np.random.Generator) -> dict[str, float]:
    """Audits from one alarm to the next where harm is just tolerated: the mean, and its standard error."""
    lengths: list[int] = []
    audit = Audit(1.0, EDGE, generator.random, c=c)
    for _ in range(alarms):
        audit.restart()
        before = audit.answered
        while not audit.alarm:
            answer(audit, draw(EDGE, 1000, generator), lambda: audit.alarm)
        lengths.append(audit.answered - before)
    return {"mean": float(np.mean(lengths)), "error": float(np.std(lengths) / np.sqrt(alarms))}


def outside(kind: str, q: float, streams: int, rows: int, generator: np.random.Generator) -> float:
    """Share of streams whose regret was outside the interval at any of the times looked at, each 5 % after the last."""
    fixed = draw(0.2, rows, generator) if kind == "fixed" else np.repeat([-1, 1, 0, -1, 1], -(-rows // 5))
    looks = {round(10 * 1.05**power) for power in range(200)}
    one, missed = np.ones(1, np.bool_), 0
    for _ in range(streams):
        audit, regret, off, out = Audit(q, EPS, generator.random, level=LEVEL), 0, 0.0, False
        side = 1 if kind == "foe above" else -1
        for row in range(rows):
            w = (side if off <= 0 else -side) if kind.startswith("foe") else int(fixed[row])
            asked = bool(audit.allow(one).ask[0])
            off += side * (w - asked * w / q)
            regret += w
            if asked:
                audit.settle(row, w)
            if row + 1 in looks:
                low, high = audit.interval()
                out |= not low <= regret <= high
        missed += out
    return missed / streams


def delay(kind: str, mean: float, q: float, generator: np.random.Generator) -> int | None:
    """Answered audits until it is found in one stream; ``None``: not among so many."""
    ws = draw(-mean if kind == "promotion" else mean, int(LONGEST / q), generator)
    audit = Audit(q, EPS, generator.random, level=LEVEL)
    if kind == "promotion":
        return answer(audit, ws, lambda: audit.certified)
    if kind == "interval":
        # Not at every answer, which would take long: each 2 % after the last.
        return answer(
            audit, ws, lambda: audit.answered % (audit.answered // 50 + 1) == 0 and audit.interval()[0] > 0, 1
        )
    if kind == "alarm after 500":
        while audit.answered < 500:
            answer(audit, draw(GOOD, 5000, generator), lambda: audit.answered >= 500)
    return answer(audit, ws, lambda: audit.alarm)


def delays(streams: int, generator: np.random.Generator, advance: Callable[[], None]) -> list[dict[str, Any]]:
    """One entry for each mean and ``q``."""
    results = []
    for mean in MEANS:
        for q in SHARES:
            entry: dict[str, Any] = {"mean": mean, "q": q}
            for kind in DELAYS[: 3 if q == 1 else 4]:
                counts = [delay(kind, mean, q, generator) for _ in range(streams)]
                found = np.array([np.inf if count is None else count for count in counts])
                median, late = np.quantile(found, (0.5, 0.9), method="higher").tolist()
                entry[kind] = {"median": median, "p90": late, "found": float(np.isfinite(found).mean())}
                advance()
            results.append(entry)
    return results


GUARANTEES: dict[str, tuple[Callable[[], Guarantee], int | None, float]] = {
    "none": (lambda: Budget(1.0, 0.0), None, 0.0),
    "budget(0.02, 50)": (lambda: Budget(EPS, 50.0), None, 0.0),
    "ledger(0.02, 50, 50), labels at once": (lambda: Ledger(EPS, 50.0, 50.0), 0, 1.0),
    "... 1,000 rows late": (lambda: Ledger(EPS, 50.0, 50.0), 1000, 1.0),
    "... of half of the rows": (lambda: Ledger(EPS, 50.0, 50.0), 0, 0.5),
    "... of none": (lambda: Ledger(EPS, 50.0, 50.0), None, 0.0),
    "ledger(0.02, 50, no limit), at once": (lambda: Ledger(EPS, 50.0, 1e9), 0, 1.0),
}
"""With how many rows' delay labels come, and of which share of the rows."""
PHASES = {"good": (-0.4, -0.4), "bad": (0.4, 0.4), "good, then bad": (-0.4, 0.4), "bad, then good": (0.4, -0.4)}


def helped(times: float, streams: int, rows: int, generator: np.random.Generator) -> float:
    """Share of streams without a benefit whose labels are ever taken for one, by an interval so many times as wide as
    that of the newest ``WINDOW`` labelled rows, looked at every 16 rows."""
    found = 0
    for _ in range(streams):
        ws = draw(0.0, rows, generator) * (generator.random(rows) < DIFFERING)
        adapted, source = np.cumsum(ws < 0), np.cumsum(ws > 0)
        for end in range(LEAST_LABELS, rows, 16):
            start = max(0, end - WINDOW)
            told = paired(int(adapted[end] - adapted[start]), int(source[end] - source[start]), end - start)
            if told is not None and told.value - times * (told.value - told.low) > 0:
                found += 1
                break
    return found / streams


def served(name: str, means: tuple[float, float], generator: np.random.Generator) -> dict[str, float]:
    """Regret under a guarantee: per 100 rows, and the worst window's beyond ``EPS`` a row."""
    make, late, share = GUARANTEES[name]
    guarantee = make()
    differs = generator.random(ROWS) < DIFFERING
    ws = np.concatenate([draw(mean, ROWS // 2, generator) for mean in means]) * differs
    labelled = generator.random(ROWS) < share
    regret = np.zeros(ROWS)
    size = 20
    for first in range(0, ROWS, size):
        part = slice(first, first + size)
        adapted = guarantee.allow(differs[part]).adapted
        regret[part] = ws[part] * adapted
        if late is not None:
            for row in range(max(0, first - late), max(0, first + size - late)):
                if differs[row] and labelled[row]:
                    guarantee.settle(row, int(ws[row]))
    beyond = np.concatenate([[0.0], np.cumsum(regret - EPS)])
    return {"regret": float(100 * regret.mean()), "worst": float((beyond - np.minimum.accumulate(beyond)).max())}


def wrong(results: dict[str, Any]) -> Table:
    """False alarms and the like."""
    table = Table(title="How often they are wrong: share of streams")
    for column in ("what", "on", "measured", "promised"):
        table.add_column(column, justify="left" if column in ("what", "on") else "right")
    for name, shares in results["wrongly"].items():
        for what, share in shares.items():
            promised = f"<= {100 * float(what.split()[-1]):g} %" if what.startswith("certified") else "-"
            table.add_row(what, name, f"{100 * share:.1f} %", promised)
    for c, run in results["run_length"].items():
        table.add_row(
            f"audits to an alarm, c = {c}", "just tolerated harm", f"{run['mean']:.0f} ± {run['error']:.0f}", f">= {c}"
        )
    for times, share in results["helped"].items():
        table.add_row("labels ever taken for a benefit", f"interval {times} times as wide", f"{100 * share:.1f} %", "-")
    for name, share in results["outside"].items():
        table.add_row("regret outside its interval", name, f"{100 * share:.1f} %", "<= 5 %")
    return table


def soon(results: list[dict[str, Any]]) -> Table:
    """The delays."""
    table = Table(title="Answered audits until it is found: median / 90 %")
    for column in ("|mean of W|", "q", *DELAYS):
        table.add_column(column, justify="right")
    for one in results:
        table.add_row(f"{one['mean']:g}", f"{one['q']:g}", *(_delay(one.get(kind)) for kind in DELAYS))
    return table


def _delay(figures: dict[str, float] | None) -> str:
    if figures is None:
        return "-"
    return " / ".join(f"{figures[key]:.0f}" if np.isfinite(figures[key]) else "-" for key in ("median", "p90"))


def through(results: dict[str, dict[str, dict[str, float]]]) -> Table:
    """What the budgets let through."""
    table = Table(title="Regret per 100 rows (most of a window, beyond eps a row)")
    table.add_column("guarantee")
    for phase in PHASES:
        table.add_column(phase, justify="right")
    for name, phases in results.items():
        table.add_row(name, *(f"{phases[phase]['regret']:.2f} ({phases[phase]['worst']:.0f})" for phase in PHASES))
    return table


def plot(results: list[dict[str, Any]], generator: np.random.Generator, path: Path) -> None:
    """Saves the delays, and one stream's interval."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for kind, marker in zip(DELAYS, "os^D", strict=True):
        for q, colour in zip(SHARES, ("tab:blue", "tab:orange", "tab:green"), strict=True):
            some = [one for one in results if one["q"] == q and kind in one]
            if not some:
                continue
            left.plot(
                [one["mean"] for one in some],
                [one[kind]["median"] for one in some],
                marker=marker,
                ms=4,
                color=colour,
                alpha=0.8,
                label=f"{kind}, q = {q:g}",
            )
    left.set_xscale("log")
    left.set_yscale("log")
    left.set_xticks(MEANS, [f"{mean:g}" for mean in MEANS])
    left.minorticks_off()
    left.set(xlabel="|mean of W| of a disagreement", ylabel="answered audits, median", title="until it is found")
    left.legend(fontsize=6, ncols=2)
    ws = np.concatenate([draw(-0.4, 1000, generator), draw(0.6, 1000, generator)])
    right.plot(np.cumsum(ws), color="black", lw=1.2, label="regret")
    for q, colour in zip(SHARES[1:], ("tab:orange", "tab:green"), strict=True):
        audit, low, high = Audit(q, EPS, generator.random, level=LEVEL), [], []
        for row, w in enumerate(ws.tolist()):
            audit.allow(np.ones(1, np.bool_))
            audit.settle(row, w)
            ends = audit.interval() if row % 20 == 19 else (np.nan, np.nan)
            low.append(ends[0])
            high.append(ends[1])
        at = np.arange(19, len(ws), 20)
        right.fill_between(at, np.array(low)[at], np.array(high)[at], alpha=0.2, color=colour, label=f"q = {q:g}")
    right.set(xlabel="disagreements served", ylabel="errors more than the source", title="regret and its 95 % interval")
    right.legend(fontsize=7)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measures, prints the tables, and saves figures and plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=200, help="of each kind; five times as many for false alarms")
    parser.add_argument("--audits", type=int, default=3000, help="of each stream without harm or benefit")
    parser.add_argument("--out", type=Path, default=None, help="folder for guarantees.json and guarantees.png")
    options = parser.parse_args()
    generator = np.random.default_rng(0)
    count, audits = options.streams, options.audits
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task(
            "streams", total=8 + len(SHARES[1:]) * len(KINDS) + len(MEANS) * (len(SHARES) * len(DELAYS) - 1)
        )

        def done(value: Any) -> Any:
            progress.advance(task)
            return value

        results: dict[str, Any] = {
            "wrongly": {
                f"mean {mean:g}, tolerated {eps:g}": done(wrongly(mean, eps, 5 * count, audits, generator))
                for mean, eps in ((GOOD, EPS), (0.0, EPS), (EDGE, EDGE))
            },
            "run_length": {f"{c:g}": done(run_length(c, count, generator)) for c in (100.0, 1000.0)},
            "outside": {
                f"{kind}, q = {q:g}": done(outside(kind, q, count, audits, generator))
                for kind in KINDS
                for q in SHARES[1:]
            },
            "helped": {
                f"{times:g}": done(helped(times, 2 * count, audits, np.random.default_rng(2))) for times in (1.0, WIDER)
            },
            "delays": delays(count, generator, lambda: progress.advance(task)),
            "served": done(
                {
                    name: {phase: served(name, means, np.random.default_rng(1)) for phase, means in PHASES.items()}
                    for name in GUARANTEES
                }
            ),
        }
    console = Console()
    for table in (wrong(results), soon(results["delays"]), through(results["served"])):
        console.print(table)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "guarantees.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        plot(results["delays"], generator, options.out / "guarantees.png")


if __name__ == "__main__":
    main()
