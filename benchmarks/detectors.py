"""How often do the detectors raise false alarms, and how soon do they find planted changes?

    pip install river                                           # optional: its detectors beside ours
    TTA_DATA=<folder> python benchmarks/detectors.py [--streams 10] [--length 1000] [--out detectors-out]

The ResNet-20 and data of ``examples/cifar10c``. Every image goes through the source once; streams of requests are then
put together from what was measured of their rows, with the server's own formulas. A detector sees one z-score per
measured request, of ``feature_distance`` unless its name says otherwise; departures see how much it is more than the
reference allows. A *false alarm* is any on these streams, of ``--length`` measured requests each, clean ones but the
last:

- independent: each request random images;
- brightness: the same under an exposure that wanders (factor of the pixels with mean 1 and standard deviation 0.1 in
  [0.8, 1.2], correlation 0.95 from request to request);
- bursts: one class for 10 requests on average, then another;
- frames: the same request again and again, 10 times on average, as a camera sends that nothing moves before;
- sorted: 1,000 images of one class, then of the next;
- corrupted: random images under one of the 15 corruptions from start to end: no change, though a departure.

Planted shifts come after 200 clean requests: 5 corruptions each that cost the source little, some and much; from one
corruption to another, and back to clean. *Found* is an alarm within the 100 requests after it; the delay counts
requests, the first being 1. For a departure, coming back is found when its alarm ends.

Two references: of 2,000 training images, as ``tta-server prepare`` makes it, and of every second of the 1,000 clean
images, with streams of the others.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from drift import data_folder, look, source_model
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from tta_server.data import CLEAN, load_domains
from tta_server.drift.detectors import Change, Departure, Detector, Flags, Rows
from tta_server.drift.monitor import CHANGE_HALF_LIFE, CHANGE_SLACK, CHANGE_THRESHOLD, LEARN, SLACK, THRESHOLD
from tta_server.drift.reference import CleanRows, Reference, make_reference
from tta_server.drift.signals import (
    DISTANCE,
    DRIFT,
    Floats,
    LayerStatistics,
    Requests,
    Scores,
    Values,
    bn_distances,
    feature_distance,
)

SIZES = (1, 8, 16, 64)
"""Images a request."""
SHOWN = 16
"""Of the plot."""
CORRUPTED = "corrupted"
NULLS = ("independent", "brightness", "bursts", "frames", "sorted", CORRUPTED)
SHIFTS = ("small", "medium", "large", "another", "back")
BEFORE, AFTER = 200, 100
"""Requests before and after a planted shift."""
EXPOSURES = np.linspace(0.8, 1.2, 9)
WANDER, EXPOSURE_SD, SWITCH = 0.95, 0.1, 0.1
CLASS_IMAGES = 1000
SHIFT_STREAMS = 30
"""Of each kind of shift, about."""
WHICH = ("detector", "reference", "size", "every")
FIRST = "training images"
"""The reference of the first tables."""
COLUMNS = ("logits", "features", "means", "vars")
ROWS_AT_ONCE = 20_000


class Always:
    """Fires at every value."""

    def grow(self, streams: int) -> None:
        """See :class:`Detector`."""

    def clear(self, row: int) -> None:
        """See :class:`Detector`."""

    def update(self, rows: Rows, z: Floats) -> Flags:
        """See :class:`Detector`."""
        return np.ones(len(rows), np.bool_)


class Never(Always):
    """Fires at none."""

    def update(self, rows: Rows, z: Floats) -> Flags:
        """See :class:`Detector`."""
        return np.zeros(len(rows), np.bool_)


class _RiverDetector(Protocol):
    drift_detected: bool

    def update(self, x: float) -> Any:
        """Takes in the next value."""


class River:
    """One of river's detectors for each stream."""

    def __init__(self, make: Callable[[], _RiverDetector]) -> None:
        self._make, self._own = make, list[_RiverDetector]()

    def grow(self, streams: int) -> None:
        """See :class:`Detector`."""
        self._own += [self._make() for _ in range(streams - len(self._own))]

    def clear(self, row: int) -> None:
        """See :class:`Detector`."""
        self._own[row] = self._make()

    def update(self, rows: Rows, z: Floats) -> Flags:
        """See :class:`Detector`."""
        for row, value in zip(rows.tolist(), z.tolist(), strict=True):
            self._own[row].update(value)
        return np.array([self._own[row].drift_detected for row in rows.tolist()])


@dataclass(frozen=True)
class Candidate:
    """A detector on a signal."""

    name: str
    make: Callable[[], Detector]
    signal: str = DRIFT
    departs: bool = False
    """Whether its alarm lasts while the stream is away."""

    def run(self, z: Values) -> tuple[Flags, Flags]:
        """Streams' values ``[R, T]`` by signal -> where alarms begin, and where one lasts, ``[R, T]`` each."""
        values, detector = z[self.signal], self.make()
        rows = np.arange(len(values))
        detector.grow(len(values))
        began = np.zeros(values.shape, np.bool_)
        on = np.zeros(values.shape, np.bool_)
        for step in range(values.shape[1]):
            began[:, step] = detector.update(rows, values[:, step])
            on[:, step] = detector.on if isinstance(detector, Departure) else began[:, step]
        return began, on


OURS = (
    Candidate("departure", lambda: Departure(SLACK, THRESHOLD), f"{DRIFT} allowed", True),
    Candidate("departure, bn_distance", lambda: Departure(SLACK, THRESHOLD), f"{DISTANCE} allowed", True),
    Candidate("departure, no allowance", lambda: Departure(1.0, 10.0), departs=True),
    Candidate("change", lambda: Change(CHANGE_SLACK, CHANGE_THRESHOLD, CHANGE_HALF_LIFE, LEARN)),
    Candidate("change, bn_distance", lambda: Change(CHANGE_SLACK, CHANGE_THRESHOLD, CHANGE_HALF_LIFE, LEARN), DISTANCE),
)


def others() -> tuple[Candidate, ...]:
    """What ours are compared with: river's, where it is installed, and the two trivial ones."""
    trivial = (Candidate("always", Always), Candidate("never", Never))
    try:
        drift = importlib.import_module("river.drift")
    except ModuleNotFoundError:
        return trivial
    # As ours is: the same slack, threshold and number of first values.
    tuned = partial(drift.PageHinkley, LEARN, CHANGE_SLACK, CHANGE_THRESHOLD, 1.0)

    return (
        Candidate("river ADWIN, default", lambda: River(drift.ADWIN)),
        Candidate("river PageHinkley, default", lambda: River(drift.PageHinkley)),
        Candidate("river PageHinkley, tuned", lambda: River(tuned)),
        Candidate("river KSWIN, default", lambda: River(lambda: drift.KSWIN(seed=0))),
        *trivial,
    )


@dataclass(frozen=True)
class World:
    """All images as the source sees them. ``rows``: the clean ones once for each of ``EXPOSURES``, ``clean`` being
    where those of exposure 1 begin, then each corruption's from ``domains[name]`` on."""

    rows: CleanRows
    layers: LayerStatistics
    labels: NDArray[np.int64]
    clean: int
    domains: Mapping[str, int]
    groups: Mapping[str, list[str]]

    def zscores(self, chosen: NDArray[np.int64], reference: Reference) -> Values:
        """Of the watched signals for requests of these rows ``[R, T, B]`` -> ``[R, T]``; beside them, ``allowed``, what
        is more than the reference's allowance."""
        requests = chosen.reshape(-1, chosen.shape[-1])
        parts = np.array_split(requests, -(-requests.size // ROWS_AT_ONCE))
        measured = [self._measure(part, reference) for part in parts]
        values = {name: np.concatenate([one[name] for one in measured]) for name in measured[0]}
        sizes = np.full(len(requests), chosen.shape[-1])
        scored = reference.zscores(values, sizes)
        scored |= {f"{name} allowed": z - reference.allowance(name, sizes) for name, z in scored.items()}
        return {name: value.reshape(chosen.shape[:2]) for name, value in scored.items()}

    def _measure(self, chosen: NDArray[np.int64], reference: Reference) -> Values:
        everybody = Requests(np.full(len(chosen), chosen.shape[1]))
        flat = chosen.ravel()
        classes = Scores(self.rows.logits[flat]).classes
        means = self.rows.means[flat].reshape(*chosen.shape, -1)
        mean = means.mean(1)
        var = self.rows.vars[flat].reshape(*chosen.shape, -1).mean(1) + np.square(means - mean[:, None]).mean(1)
        return {
            DRIFT: feature_distance(self.rows.features[flat], classes, reference.features, everybody),
            DISTANCE: bn_distances(mean, var, self.layers)[DISTANCE],
        }


@dataclass
class Streams:
    """Draws streams of requests: rows of the world, ``[R, T, B]``. ``pool``: which images they may use, clean and
    corrupted."""

    world: World
    pool: NDArray[np.int64]
    size: int
    generator: np.random.Generator

    def null(self, kind: str, count: int, length: int, every: int) -> NDArray[np.int64]:
        """``count`` streams in which nothing changes with ``length`` measured requests each, one of ``every``."""
        return np.stack([self._null(kind, length, every) for _ in range(count)])

    def shift(self, before: int, after: int, count: int) -> NDArray[np.int64]:
        """Streams that change over from one domain to another, given where their rows begin."""
        first, then = (self.generator.choice(self.pool, (count, length, self.size)) for length in (BEFORE, AFTER))
        return np.concatenate([first + before, then + after], axis=1)

    def _null(self, kind: str, length: int, every: int) -> NDArray[np.int64]:
        draw, shape = self.generator, (length, self.size)
        if kind == "independent":
            return draw.choice(self.pool, shape) + self.world.clean
        if kind == CORRUPTED:
            return draw.choice(self.pool, shape) + int(draw.choice(list(self.world.domains.values())))
        if kind == "brightness":
            level = self._wander(length * every)[::every]
            return draw.choice(self.pool, shape) + len(self.world.labels) * level[:, None]
        if kind == "sorted":
            per_class = max(1, CLASS_IMAGES // self.size)
            classes = self.world.labels.max() + 1
            now = (np.arange(length * every) // per_class + draw.integers(classes))[::every] % classes
            return self._of_classes(now)
        scene = (np.cumsum(draw.random(length * every) < SWITCH))[::every]
        if kind == "bursts":
            return self._of_classes(draw.integers(0, self.world.labels.max() + 1, scene.max() + 1)[scene])
        return draw.choice(self.pool, (scene.max() + 1, self.size))[scene] + self.world.clean

    def _of_classes(self, classes: NDArray[np.int64]) -> NDArray[np.int64]:
        """A request of random images of one class for each of ``classes [T]``."""
        by_class = [self.pool[self.world.labels[self.pool] == one] for one in range(self.world.labels.max() + 1)]
        return np.stack([self.generator.choice(by_class[one], self.size) for one in classes]) + self.world.clean

    def _wander(self, length: int) -> NDArray[np.int64]:
        """Indices of exposures: a first-order autoregression, rounded and cut off."""
        noise = self.generator.normal(size=length)
        value = np.zeros(length)
        for step in range(1, length):
            value[step] = WANDER * value[step - 1] + np.sqrt(1 - WANDER**2) * noise[step]
        step_width = EXPOSURES[1] - EXPOSURES[0]
        middle = len(EXPOSURES) // 2
        level: NDArray[np.int64] = np.rint(middle + value * EXPOSURE_SD / step_width).astype(np.int64)
        return level.clip(0, len(EXPOSURES) - 1)


def load_world(progress: Progress) -> tuple[World, dict[str, tuple[Reference, NDArray[np.int64]]]]:
    """All rows; and by name each reference, with the images that its streams are made of."""
    corrupted, clean = load_domains(data_folder()), load_domains(data_folder(), [CLEAN])[0]
    task = progress.add_task("images through the source", total=len(corrupted) + len(EXPOSURES))
    with source_model() as model:
        assert model.reference is not None
        parts = []
        exposed = [(clean.images * factor).clip(0, 255).astype(np.uint8) for factor in EXPOSURES]
        for images in (*exposed, *(one.images for one in corrupted)):
            part, layers = look(model, images)
            parts.append(part)
            progress.advance(task)
    count = len(clean.labels)
    errors = {
        one.name: float((part.logits.argmax(1) != clean.labels).mean())
        for one, part in zip(corrupted, parts[len(EXPOSURES) :], strict=True)
    }
    ranked = sorted(errors, key=errors.__getitem__)
    rows = CleanRows(*(np.concatenate([getattr(part, name) for part in parts]) for name in COLUMNS))
    start = count * (len(EXPOSURES) // 2)
    world = World(
        rows,
        layers,
        clean.labels,
        start,
        {one.name: count * (len(EXPOSURES) + index) for index, one in enumerate(corrupted)},
        {"small": ranked[:5], "medium": ranked[5:10], "large": ranked[10:]},
    )
    held_out, rest = np.arange(count)[::2], np.arange(count)[1::2]
    return world, {
        FIRST: (model.reference, np.arange(count)),
        "clean images": (
            make_reference(CleanRows(*(getattr(rows, name)[held_out + start] for name in COLUMNS)), layers, 0),
            rest,
        ),
    }


def transitions(world: World) -> dict[str, list[tuple[int, int]]]:
    """The planted shifts: where the rows of the two domains begin."""
    ranked = [world.domains[name] for group in world.groups.values() for name in group]
    to = {group: [(world.clean, world.domains[name]) for name in names] for group, names in world.groups.items()}
    return to | {
        "another": list(zip(ranked, ranked[7:] + ranked[:7], strict=True)),
        "back": [(world.domains[name], world.clean) for name in world.groups["medium"]],
    }


def false_alarms(candidate: Candidate, z: Values) -> dict[str, float]:
    """Alarms per 1,000 values, and the share of values at which one lasts."""
    began, on = candidate.run(z)
    return {"per_1000": 1000 * float(began.mean()), "on": float(on.mean())}


def delays(candidate: Candidate, z: Values, kind: str) -> dict[str, float | None]:
    """Median and 90th percentile of the requests up to the first alarm after the shift, ``None`` where there is none
    within ``AFTER``; and the share of streams in which there is one. Of a departure that comes back, the same of its
    alarm's end, for streams in alarm."""
    began, on = candidate.run(z)
    if kind == "back" and candidate.departs:
        began = ~on[on[:, BEFORE - 1]]
    after = began[:, BEFORE:]
    if not len(after):
        return {"median": None, "p90": None, "found": 0.0}
    first = np.where(after.any(1), after.argmax(1) + 1.0, np.inf)
    median, late = (value if np.isfinite(value) else None for value in np.quantile(first, (0.5, 0.9), method="higher"))
    return {"median": median, "p90": late, "found": float(after.any(1).mean())}


def measure(
    world: World,
    references: Mapping[str, tuple[Reference, NDArray[np.int64]]],
    streams: int,
    length: int,
    progress: Progress,
) -> list[dict[str, Any]]:
    """One entry per reference, request size, sampling and detector."""
    results = []
    candidates = (*OURS, *others())
    planted = transitions(world)
    task = progress.add_task("streams", total=len(references) * len(SIZES) * (2 * len(NULLS) + len(planted)))
    for (name, (reference, pool)), size in itertools.product(references.items(), SIZES):
        draw = Streams(world, pool, size, np.random.default_rng(0))
        shifts = {}
        for kind, pairs in planted.items():
            each = max(1, SHIFT_STREAMS // len(pairs))
            shifts[kind] = world.zscores(np.concatenate([draw.shift(*pair, each) for pair in pairs]), reference)
            progress.advance(task)
        for every in (1, 4):
            nulls = {}
            for kind in NULLS:
                nulls[kind] = world.zscores(draw.null(kind, streams, length, every), reference)
                progress.advance(task)
            results += [
                {
                    "reference": name,
                    "size": size,
                    "every": every,
                    "detector": one.name,
                    # A departure has every reason for alarm while a stream is corrupted.
                    "false_alarms": {
                        kind: false_alarms(one, z) for kind, z in nulls.items() if kind != CORRUPTED or not one.departs
                    },
                    "delays": {
                        kind: delays(one, z, kind) for kind, z in shifts.items() if kind != "another" or not one.departs
                    },
                }
                for one in (candidates if every == 1 and name == FIRST else OURS)
            ]
    return results


def report(
    results: list[dict[str, Any]], title: str, columns: tuple[str, ...], shifts: tuple[str, ...] = SHIFTS
) -> Table:
    """A table of these results, named by what they differ in."""
    table = Table(title=title)
    for column in columns:
        table.add_column(column)
    for column in (*NULLS, *shifts):
        table.add_column(column, justify="right")
    for one in results:
        alarms = (_false_alarms(one["false_alarms"].get(kind)) for kind in NULLS)
        found = (_delay(one["delays"].get(kind)) for kind in shifts)
        table.add_row(*(str(one[column]) for column in columns), *alarms, *found)
    return table


def _false_alarms(figures: Mapping[str, float] | None) -> str:
    if figures is None:
        return "-"
    lasting = f" ({100 * figures['on']:.0f} %)" if figures["on"] > 2e-3 * figures["per_1000"] else ""
    return f"{figures['per_1000']:.1f}{lasting}"


def _delay(figures: Mapping[str, float | None] | None) -> str:
    if figures is None or not figures["found"]:
        return "-"
    median, late = ("-" if figures[key] is None else f"{figures[key]:.0f}" for key in ("median", "p90"))
    return f"{median} / {late} / {100 * figures['found']:.0f} %"


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Saves false alarms and delays of the detectors, at one request size."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    height = np.arange(len(results))[::-1]
    for index, kind in enumerate(NULLS):
        values = [one["false_alarms"].get(kind, {"per_1000": np.nan})["per_1000"] for one in results]
        left.scatter(values, height + 0.12 * (2 - index), s=22, label=kind)
    left.set_xscale("symlog", linthresh=0.1)
    left.set_xlim(-0.02, 2000)
    left.set(xlabel="false alarms per 1,000 requests", title=f"nothing changes, {SHOWN} images a request")
    left.set_yticks(height, [one["detector"] for one in results])
    for index, kind in enumerate(SHIFTS[:3]):
        found = [one["delays"][kind] for one in results]
        middle, late = (np.array([one[key] or AFTER for one in found]) for key in ("median", "p90"))
        right.errorbar(
            middle, height + 0.15 * (1 - index), xerr=[np.zeros(len(late)), late - middle], fmt="o", ms=4, label=kind
        )
    right.set_xscale("log")
    right.set(xlabel=f"requests to the alarm, median and 90 % ({AFTER}: not found)", title="planted shifts")
    for axes in (left, right):
        axes.grid(axis="x", alpha=0.3)
        axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=len(NULLS))
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measures, prints the tables, and saves figures and plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=10, help="of each kind of clean ones")
    parser.add_argument("--length", type=int, default=1000, help="measured requests of each of these")
    parser.add_argument("--out", type=Path, default=None, help="folder for detectors.json and detectors.png")
    options = parser.parse_args()
    with Progress(console=Console(stderr=True)) as progress:
        world, references = load_world(progress)
        results = measure(world, references, options.streams, options.length, progress)
    note = "false alarms per 1,000 requests (share of them in alarm); requests to the alarm: median / 90 % / found"
    console = Console()
    for size in SIZES:
        some = [one for one in results if (one["size"], one["every"], one["reference"]) == (size, 1, FIRST)]
        console.print(report(some, f"{size} images a request: {note}", ("detector",)))
        if size == SHOWN and options.out is not None:
            options.out.mkdir(parents=True, exist_ok=True)
            plot(some, options.out / "detectors.png")
    ours = [one for own in OURS for one in results if one["detector"] == own.name]
    console.print(
        report(ours, "False alarms of ours per 1,000 measured requests, one of every so many being measured", WHICH, ())
    )
    if options.out is not None:
        (options.out / "detectors.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
