"""The newest events by tenant."""

from __future__ import annotations

from adapters.tent import Tent
from tta_server.events import EventLog
from tta_server.types import Event, Stream


def of(tenant: str) -> Event:
    return Event("opened", Stream("s", "m", Tent(), 0, 0.0, tenant=tenant))


def test_a_tenants_events_are_numbered_and_the_newest_kept() -> None:
    log = EventLog(3)
    assert (log.newest("a"), log.since(0, "a")) == (0, [])
    told = [of("a") for _ in range(5)]
    for event in told:
        log.event(event)
    assert log.newest("a") == 5
    assert log.since(0, "a") == [(3, told[2]), (4, told[3]), (5, told[4])]
    assert log.since(4, "a") == [(5, told[4])]
    assert log.since(5, "a") == []


def test_another_tenants_events_neither_show_nor_push_out() -> None:
    log, mine = EventLog(2), of("a")
    log.event(mine)
    for _ in range(10):
        log.event(of("b"))
    assert log.since(0, "a") == [(1, mine)]
    assert log.newest("b") == 10
