"""What a scrape tells of the state store, and of what a crash would cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from adapters.tent import Tent
from tests.serving import TIMEOUT
from tta_server.drift.monitor import Monitor
from tta_server.metrics.prometheus import PrometheusRecorder
from tta_server.metrics.scrape import Levels, Watchlist
from tta_server.metrics.state import Risk, Unsaved
from tta_server.settings import Durability
from tta_server.state.keeper import Keeper, Keeping, Tally
from tta_server.state.memory import Budget
from tta_server.state.records import Record, Shutdown
from tta_server.state.sqlite import SqliteStore
from tta_server.types import Event, Saved, Stream

STORED = Keeping(True, "", False, 0, 0, Tally(), None, 0)
"""A new store in which all is well."""


def a_stream(id: str = "s", mode: str = "async", steps: int = 4, seconds: float = 10.0) -> Stream:
    durability = Durability.model_validate({"mode": mode, "steps": steps, "seconds": seconds})
    return Stream(id, "m", Tent(), 0, 0.0, durability=durability)


def save(stream: Stream) -> None:
    stream.saved = Saved(stream.revision, stream.state_revision, stream.version, stream.requests, 0.0)


class Scraped:
    """A recorder of these levels, and what it shows."""

    def __init__(self, keeping: Callable[[], Keeping], streams: Sequence[Stream] = (), **more: int | Budget) -> None:
        self.reads = 0

        def levels() -> Levels:
            self.reads += 1
            known = Levels(0, list(streams), {}, 0, 0, keeping(), {"m": "d"}, {"m": True}, Budget())
            return replace(known, **more)  # type: ignore[arg-type]

        self.recorder = PrometheusRecorder(levels, Monitor(20.0), Watchlist((), 20))

    def __call__(self, prefix: str = "tta_state_") -> dict[str, float]:
        """The series by name and label values."""
        families = text_string_to_metric_families(self.recorder.render().decode())
        return {
            ".".join((sample.name, *sample.labels.values())).removeprefix(prefix): sample.value
            for family in families
            for sample in family.samples
            if sample.name.startswith(prefix) and "duration" not in sample.name
        }


# What a crash would cost


def test_a_crash_costs_what_came_after_the_last_save() -> None:
    saved, behind, new, kept_nowhere = a_stream("a"), a_stream("b"), a_stream("c"), a_stream("d", mode="none")
    for stream in (saved, behind):
        stream.revision = 7
        save(stream)
    behind.revision, kept_nowhere.revision = 10, 90
    assert Unsaved().look([saved, behind, new, kept_nowhere]) == Risk(streams=2, steps=3, seconds=0.0, late=0)


def test_ages_are_those_that_were_seen() -> None:
    """Of the oldest change of which it is known that it is not saved: since nothing was saved of its stream."""
    now = 100.0
    unsaved, stream = Unsaved(lambda: now), a_stream()
    save(stream)
    now += 1000
    stream.revision += 1
    assert unsaved.look([stream]).seconds == 0, "it may have come just now"
    now += 4
    stream.revision += 1
    assert unsaved.look([stream]).seconds == 4
    stream.saved = Saved(2, 2, 1, 1, 0.0)
    now += 1
    assert unsaved.look([stream]).seconds == 0, "the first is saved; when the second came nobody saw"
    now += 2
    assert unsaved.look([stream]).seconds == 2
    save(stream)
    assert unsaved.look([stream]) == Risk(0, 0, 0.0, 0)
    stream.revision += 1
    assert unsaved.look([stream]).seconds == 0


def test_streams_are_late_that_would_lose_more_than_they_may() -> None:
    now = 0.0
    unsaved = Unsaved(lambda: now)
    streams = [a_stream("0", "sync"), a_stream("1", steps=4), a_stream("2", steps=400), a_stream("3", "none")]

    def late(steps: int) -> int:
        for stream in streams:
            stream.revision = stream.saved.revision + steps
        return unsaved.look(streams).late

    # One more than the bound is the step after the answer: it is saved while the next request comes.
    assert [late(steps) for steps in (0, 1, 2, 5, 6, 401, 402)] == [0, 0, 1, 1, 2, 2, 3]
    assert late(0) == 0
    assert late(1) == 0
    now = 20.0
    assert late(1) == 0, "twice as long as it may take"
    now = 20.1
    assert late(1) == 3


def test_a_stream_that_is_gone_costs_nothing() -> None:
    unsaved, stream = Unsaved(), a_stream()
    assert unsaved.look([stream]).streams == 1
    assert unsaved.look([]) == Risk(0, 0, 0.0, 0)
    assert not unsaved._first, "and is not kept"


# The store


def test_a_store_that_is_well() -> None:
    tally = Tally(saved=5, saved_bytes=600, failed=2, refused=1, damaged=3, fetched=7, prefetched=9)
    keeping = Keeping(True, "", False, 4, 8192, tally, Shutdown(False, 11, 12), 6)
    scraped = Scraped(lambda: keeping, [a_stream()], page_outs=13, budget=Budget(1, 100, 200))
    assert scraped() == {
        "store_up": 1, "store_fenced": 0, "store_bytes": 8192, "waiting_streams": 4,
        "unsaved_streams": 1, "unsaved_steps_max": 1, "unsaved_age_seconds": 0, "late_streams": 0,
        "saved_bytes_total": 600, "write_failures_total": 2, "damaged_total": 3,
        "saves_total.saved": 5, "saves_total.refused": 1,
        "last_shutdown_clean": 0, "last_shutdown_streams.saved": 11, "last_shutdown_streams.unsaved": 12,
        "lost_steps_total.crash.m": 0, "lost_steps_total.damage.m": 0,
        "recovery_lost_steps": 0, "recovery_damaged_streams": 6,
    }  # fmt: skip
    assert scraped("tta_stream_page_") == {"outs_total": 13, "ins_total.waited": 7, "ins_total.prefetched": 9}
    assert scraped("tta_stream_state_budget_") == {"bytes.device": 100, "bytes.host": 200}


def test_a_store_that_fails_or_is_taken_over_is_not_up() -> None:
    for problem, fenced, up in (("", False, 1), ("disk full", False, 0), ("taken over", True, 0)):
        told = Scraped(lambda: replace(STORED, problem=problem, fenced=fenced))()  # noqa: B023  # called right here
        assert (told["store_up"], told["store_fenced"]) == (up, fenced)


def test_a_new_store_has_no_last_shutdown() -> None:
    told = Scraped(lambda: STORED)()
    assert "store_up" in told
    assert not [name for name in told if name.startswith("last_shutdown")]


def test_a_server_that_stores_nothing_has_families_without_series() -> None:
    """Zeros would say that a crash costs nothing."""
    scraped = Scraped(lambda: replace(STORED, persistent=False), [a_stream()])
    assert set(scraped()) == {
        "lost_steps_total.crash.m", "lost_steps_total.damage.m", "recovery_lost_steps",
    }  # fmt: skip
    assert "# TYPE tta_state_store_up gauge" in scraped.recorder.render().decode()


def test_the_levels_are_read_once_a_scrape() -> None:
    scraped = Scraped(lambda: STORED, [a_stream()])
    scraped()
    assert scraped.reads == 1


def test_what_was_lost_is_counted() -> None:
    scraped, stream = Scraped(lambda: STORED), a_stream()
    for kind, fields in (
        ("lost", {"steps": 3, "version": 9}),
        ("lost", {"steps": 4, "version": 9}),
        ("damaged", {"reason": "found at the start"}),
        ("damaged", {"reason": "read later", "version": 30, "went_back_to": 10}),
        ("damaged", {"reason": "the state before a reset", "version": 0, "went_back_to": 0}),
    ):
        scraped.recorder.event(Event(kind, stream, fields))
    told = scraped()
    assert told["lost_steps_total.crash.m"] == told["recovery_lost_steps"] == 7
    assert told["lost_steps_total.damage.m"] == 21


def test_a_real_store_fails_recovers_and_saves(tmp_path: Path) -> None:
    """A file is where its folder should be, and goes away."""
    folder, stream = tmp_path / "store", a_stream()
    folder.write_text("in the way")
    keeper = Keeper(SqliteStore(folder))

    def keeping() -> Keeping:
        return replace(STORED, problem=keeper.problem, waiting=keeper.waiting, bytes=keeper.size, tally=keeper.tally)

    scraped = Scraped(keeping, [stream])

    def wait_for(name: str, value: float) -> dict[str, float]:
        deadline = time.monotonic() + TIMEOUT
        while (told := scraped())[name] != value:
            assert time.monotonic() < deadline, told
            time.sleep(0.01)
        return told

    assert keeper.open().streams == []
    keeper.start()
    keeper.save(stream, Record.of(stream, stream.policy, "d"), ((), None))
    wait_for("write_failures_total", 1)
    told = wait_for("waiting_streams", 1)
    assert (told["store_up"], told["unsaved_steps_max"]) == (0, 1)
    folder.unlink()
    wait_for("store_up", 1)
    wait_for("saves_total.saved", 1)
    told = wait_for("unsaved_streams", 0)
    assert told["waiting_streams"] == 0
    assert told["store_bytes"] > 0
    keeper.close(Shutdown(True))
