"""How the state store does, and what a crash would cost now; read when Prometheus asks.

Of a server that stores nothing (``state.folder: null``) most families have no series.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tta_server.metrics.scrape import Levels
from tta_server.types import Stream

PATIENCE = 2.0
"""A stream is late when a change of it has waited for this many times ``durability.seconds``."""


class Risk(NamedTuple):
    """What a crash would cost."""

    streams: int
    """With changes that are not saved."""
    steps: int
    """Of the stream that has most of them."""
    seconds: float
    """The oldest has waited for, at least."""
    late: int
    """Streams that would lose more than their durability allows."""


class Unsaved:
    """Looks for changes that are not saved, each time at all streams.

    How old a change is nobody notes: that would cost every step. It is at least as old as the first look that saw its
    stream as far behind, with nothing saved since. So an age is told too short by up to the time between two looks.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._first: dict[Stream, tuple[int, float]] = {}
        """By stream: the revision that is saved, and when it was first seen to be behind."""

    def look(self, streams: Iterable[Stream]) -> Risk:
        """At all streams. Those of durability ``none`` are not to be saved and do not count."""
        now, first = self._clock(), dict[Stream, tuple[int, float]]()
        most, longest, late = 0, 0.0, 0
        for stream in streams:
            saved = stream.saved.revision
            if saved >= stream.revision or stream.durability.mode == "none":
                continue
            known = self._first.get(stream)
            first[stream] = known = known if known is not None and known[0] == saved else (saved, now)
            steps, seconds = stream.revision - saved, now - known[1]
            most, longest = max(most, steps), max(longest, seconds)
            # One step more than the bound: the one that comes after the answer.
            late += steps > stream.durability.bound + 1 or seconds > PATIENCE * stream.durability.seconds
        self._first = first
        return Risk(len(first), most, longest, late)


class StateCollector(Collector):
    """The store, what is unsaved, and the last shutdown."""

    def __init__(self, levels: Callable[[], Levels]) -> None:
        self._levels, self._unsaved = levels, Unsaved()

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterable[Metric]:
        levels = self._levels()
        keeping, tally = levels.keeping, levels.keeping.tally
        risk = self._unsaved.look(levels.streams if keeping.persistent else ())
        is_up = not (keeping.problem or keeping.fenced)
        for name, text, value in (
            ("store_up", "1 while the state store can be written, 0 while it cannot.", is_up),
            ("store_fenced", "1 once another process has taken the state store over.", keeping.fenced),
            ("store_bytes", "Bytes that the state store takes on the disk.", keeping.bytes),
            ("waiting_streams", "Streams that wait for the thread that writes.", keeping.waiting),
            ("unsaved_streams", "Streams with changes that a crash now would cost.", risk.streams),
            ("unsaved_steps_max", "Most changes that a crash now would cost one stream.", risk.steps),
            ("unsaved_age_seconds", "How long, at least, the oldest unsaved change has waited.", risk.seconds),
            (
                "recovery_damaged_streams",
                "Streams that were found damaged in the store when this process started.",
                keeping.damaged_at_start,
            ),
            ("late_streams", "Streams that would lose more by a crash now than their durability allows.", risk.late),
        ):  # fmt: skip
            yield GaugeMetricFamily(f"tta_state_{name}", text, value=value if keeping.persistent else None)
        for name, text, value in (
            ("saved_bytes", "Bytes of states written to the store.", tally.saved_bytes),
            ("write_failures", "Attempts to write to the store that failed; each is repeated.", tally.failed),
            ("damaged", "Stored states that were found damaged when they were read.", tally.damaged),
        ):
            yield CounterMetricFamily(f"tta_state_{name}", text, value=value if keeping.persistent else None)
        saves = CounterMetricFamily(
            "tta_state_saves", "Saves of streams: saved; refused, as the store has another revision.", labels=["result"]
        )
        if keeping.persistent:
            saves.add_metric(["saved"], tally.saved)
            saves.add_metric(["refused"], tally.refused)
        yield saves
        clean = GaugeMetricFamily(
            "tta_state_last_shutdown_clean", "1 where the process that had the store before has saved everything."
        )
        streams = GaugeMetricFamily(
            "tta_state_last_shutdown_streams",
            "Streams that the process before still saved while it ended, and those that it could not.",
            labels=["result"],
        )
        last = keeping.last_shutdown
        if last is not None:
            clean.add_metric([], last.clean)
            streams.add_metric(["saved"], last.saved)
            streams.add_metric(["unsaved"], last.unsaved)
        yield from (clean, streams)
        budget = GaugeMetricFamily(
            "tta_stream_state_budget_bytes", "Most bytes of stream states in memory, by tier.", labels=["tier"]
        )
        budget.add_metric(["device"], levels.budget.device_bytes)
        budget.add_metric(["host"], levels.budget.host_bytes)
        yield budget
        yield CounterMetricFamily(
            "tta_stream_page_outs", "Stream states that left memory; they are on the disk.", value=levels.page_outs
        )
        pages = CounterMetricFamily(
            "tta_stream_page_ins",
            "Stream states that came back from the disk: a step waited for it, or it was prefetched.",
            labels=["kind"],
        )
        pages.add_metric(["waited"], tally.fetched)
        pages.add_metric(["prefetched"], tally.prefetched)
        yield pages
