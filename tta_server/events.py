"""The newest events of all streams, for those who follow them."""

from __future__ import annotations

import threading
from collections import deque

from tta_server.types import Call, Event, StepStats


class EventLog:
    """A recorder that keeps the newest events, numbered from 1. Written and read from any thread."""

    def __init__(self, most: int) -> None:
        self._kept: deque[tuple[int, Event]] = deque(maxlen=most)
        self._lock = threading.Lock()
        self.newest = 0
        """The last event's number."""

    def since(self, last: int, tenant: str) -> list[tuple[int, Event]]:
        """A tenant's events after number ``last``, oldest first, as far as they are kept."""
        if last >= self.newest:
            return []
        with self._lock:
            return [(number, event) for number, event in self._kept if number > last and event.stream.tenant == tenant]

    def step(self, stats: StepStats) -> None:
        """See :class:`tta_server.metrics.Recorder`."""

    def request(self, call: Call) -> None:
        """See :class:`tta_server.metrics.Recorder`."""

    def event(self, event: Event) -> None:
        """See :class:`tta_server.metrics.Recorder`."""
        with self._lock:
            self.newest += 1
            self._kept.append((self.newest, event))
