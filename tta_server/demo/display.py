"""What the demo shows: the live table, the table at the end, and the plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich import box
from rich.table import Table
from rich.text import Text

from tta_server.demo.client import Record, Run, Session

RECENT = 10
"""Batches that the live table looks back on."""
SMOOTHING = 5
"""Batches that a point of the plot's curves is the mean of."""
SAMPLES = 5
"""Images above each of the plot's panels."""
THUMBNAIL = 0.13
"""Width of such an image, as a share of the panel's."""

SOURCE_COLOUR, SERVED_COLOUR, SWITCH_COLOUR = "#d9703f", "#1f6fb2", "#2e7d4f"
SEVERITY_COLOUR, GRID_COLOUR, NOTE_COLOUR = "#ececec", "#d9d9d9", "#555555"


def live_table(session: Session) -> Table:
    """Every stream as it is now."""
    table = _table(f"Error in % over each stream's last {RECENT} batches", progress(session))
    _add_columns(table, "severity", "source\nmodel", "as\nserved", "drift", "verdict", "version", "adapts", "guard")
    for run in session.runs:
        if not run.records:
            table.add_row(run.camera.id)
            continue
        recent, last = run.records[-RECENT:], run.records[-1]
        source, served, _ = _errors(recent)
        table.add_row(
            run.camera.id,
            f"{last.severity:.2f}",
            source,
            served,
            _drift(last),
            last.verdict,
            str(last.version),
            "yes" if last.adapted else "no",
            last.guard,
        )
    return table


def progress(session: Session) -> str:
    """How far the run is, in one line."""
    rate = session.answered / session.seconds if session.seconds else 0.0
    wanted = sum(run.batches for run in session.runs)
    return (
        f"{session.batches_done} of {wanted} batches, {session.seconds:.0f} s, "
        f"{session.answered} requests, {rate:.0f} per second"
    )


def final_table(runs: Sequence[Run], window: int) -> Table:
    """Every stream over its last ``window`` batches and over the whole run."""
    notes = ["drift: standard deviations farther from clean digits than they are"]
    for run in runs:
        switch = run.camera.switch(run.batches)
        if switch is not None:
            notes.append(f"{run.camera.id}: adaptation was off for the first {switch} of {run.batches} batches")
    labelled = [run.camera.id for run in runs if run.camera.labelled]
    notes.append(f"{' and '.join(labelled)} sent labels back; where the guard stays in its shadow, the source answers")
    table = _table(f"Error in % at the end of the drift: each stream's last {window} batches", "\n".join(notes))
    _add_columns(table, "source\nmodel", "as\nserved", "drift", "verdict", "guard", "over the\nwhole run")
    for run in runs:
        last = run.records[-window:]
        table.add_row(
            run.camera.id,
            *_errors(last)[:2],
            _drift(last[-1]),
            last[-1].verdict,
            last[-1].guard,
            _both(run.records),
        )
    table.add_section()
    ends, wholes = [one for run in runs for one in run.records[-window:]], [one for run in runs for one in run.records]
    table.add_row("all streams", *_errors(ends)[:2], "", "", "", _both(wholes))
    return table


def source_error(records: Sequence[Record]) -> float:
    """Mean error of the source model."""
    return fmean(one.source_error for one in records)


def served_error(records: Sequence[Record]) -> float:
    """Mean error as served."""
    return fmean(one.served_error for one in records)


def save_plot(runs: Sequence[Run], window: int, path: Path) -> None:
    """One panel per stream: both errors over its batches, its severity behind them, what the camera sent above."""
    figure = Figure(figsize=(14, 7.6), dpi=110)
    grid = figure.subplots(
        2,
        4,
        sharex=True,
        sharey=True,
        gridspec_kw={"left": 0.05, "right": 0.985, "top": 0.77, "bottom": 0.07, "wspace": 0.1, "hspace": 0.56},
    )
    panels = list(grid.flat)
    for axes, run in zip(panels, runs, strict=False):
        _draw_panel(axes, run, window)
    panels[0].set(xlim=(1, max(run.batches for run in runs)), ylim=(0, None))
    for axes in grid[:, 0]:
        axes.set_ylabel("error, %")
    for axes in (*grid[1], panels[len(runs) - len(grid[0])]):
        axes.set_xlabel("batch")
        axes.tick_params(labelbottom=True)
    _draw_legend(panels[len(runs)], panels[: len(runs)], window)
    title = f"{len(runs)} camera streams on one server: each adapts to its own drift, without labels"
    figure.text(0.05, 0.935, title, fontsize=15, fontweight="bold")
    figure.savefig(path)


def _draw_panel(axes: Axes, run: Run, window: int) -> None:
    batches = np.arange(1, len(run.records) + 1)
    axes.fill_between(
        batches,
        [one.severity for one in run.records],
        transform=axes.get_xaxis_transform(),
        color=SEVERITY_COLOUR,
        linewidth=0,
        label="severity (full height: 1)",
    )
    # The wider line lies below, so that both are seen where they are one.
    source = [one.source_error for one in run.records]
    axes.plot(batches, _smooth(source), color=SOURCE_COLOUR, linewidth=3, label="error of the source model")
    served = [one.served_error for one in run.records]
    axes.plot(batches, _smooth(served), color=SERVED_COLOUR, linewidth=1.8, label="error as served")
    switch = run.camera.switch(run.batches)
    if switch is not None:
        axes.axvline(switch + 0.5, color=SWITCH_COLOUR, linestyle="--", linewidth=1.5, label="adaptation switched on")
    last = run.records[-window:]
    axes.text(0, 1.31, run.camera.id, transform=axes.transAxes, fontsize=12, fontweight="bold")
    at_end = f"{_both(last)} %"
    axes.text(1, 1.31, at_end, transform=axes.transAxes, ha="right", fontsize=11, color=NOTE_COLOUR)
    for place in np.linspace(0, 1, SAMPLES):
        inset = axes.inset_axes((place * (1 - THUMBNAIL), 1.05, THUMBNAIL, 0.21))
        inset.imshow(run.records[round(place * (len(run.records) - 1))].sample, cmap="gray", vmin=0, vmax=255)
        inset.set_axis_off()
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=GRID_COLOUR, linewidth=0.6)
    axes.set_axisbelow(True)


def _draw_legend(axes: Axes, panels: Sequence[Axes], window: int) -> None:
    """The last, empty panel says what the others show."""
    entries: dict[str, Artist] = {}
    for panel in panels:
        handles, labels = panel.get_legend_handles_labels()
        entries.update(zip(labels, handles, strict=True))
    axes.set_axis_off()
    axes.legend(list(entries.values()), list(entries), loc="upper left", frameon=False, fontsize=11, borderaxespad=0)
    notes = (
        f"Curves: mean of the last {SMOOTHING} batches.\n"
        f"Figures: error over the last {window} batches,\nsource model → as served.\n"
        "Images: what the camera sent, first batch\n(left) to last (right)."
    )
    axes.text(0, 0, notes, transform=axes.transAxes, fontsize=10, color=NOTE_COLOUR, linespacing=1.4)


def _smooth(values: Sequence[float]) -> NDArray[np.float64]:
    """The mean of each value and up to ``SMOOTHING - 1`` before it."""
    sums = np.cumsum([0.0, *values])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - SMOOTHING, 0)
    smoothed: NDArray[np.float64] = (sums[ends] - sums[starts]) / (ends - starts)
    return smoothed


def _table(title: str, caption: str) -> Table:
    return Table(
        title=title,
        caption=caption,
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )


def _add_columns(table: Table, *names: str) -> None:
    """The column of stream ids, then ``names``. Eight such columns fit into 80 characters."""
    table.add_column("stream", no_wrap=True, vertical="bottom")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)


def _errors(records: Sequence[Record]) -> tuple[str, Text, Text]:
    """Source model, as served, and the difference, as cells."""
    source, served = source_error(records), served_error(records)
    style = _verdict(served - source)
    return f"{100 * source:.1f}", Text(f"{100 * served:.1f}", style), Text(f"{100 * (served - source):+.1f}", style)


def _both(records: Sequence[Record]) -> str:
    return f"{100 * source_error(records):.1f} → {100 * served_error(records):.1f}"


def _verdict(change: float) -> str:
    """The style of an error that differs by ``change`` from the source model's; half a point is noise."""
    if abs(change) < 0.005:
        return ""
    return "green" if change < 0 else "red"


def _drift(record: Record) -> str:
    return "-" if record.drift is None else f"{record.drift:.1f}"
