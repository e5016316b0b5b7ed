"""The newest events of each tenant's streams, for those who follow them."""

from __future__ import annotations

import threading
from collections import deque

from tta_server.types import Call, Event, StepStats


class EventLog:
    """A recorder that keeps each tenant's newest events, numbered from 1. Written and read from any thread."""

    def __init__(self, most: int) -> None:
        """``most`` of a tenant."""
        self._most = most
        self._kept: dict[str, deque[tuple[int, Event]]] = {}
        self._lock = threading.Lock()

    def newest(self, tenant: str) -> int:
        """The number of a tenant's last event; 0 before the first."""
        kept = self._kept.get(tenant)
        return kept[-1][0] if kept else 0

    def since(self, last: int, tenant: str) -> list[tuple[int, Event]]:
        """A tenant's events after number ``last``, oldest first, as far as they are kept."""
        if last >= self.newest(tenant):
            return []
        with self._lock:
            return [(number, event) for number, event in self._kept[tenant] if number > last]

    def step(self, stats: StepStats) -> None:
        """See :class:`tta_server.metrics.Recorder`."""

    def request(self, call: Call) -> None:
        """See :class:`tta_server.metrics.Recorder`."""

    def event(self, event: Event) -> None:
        """See :class:`tta_server.metrics.Recorder`."""
        tenant = event.stream.tenant
        with self._lock:
            number = self.newest(tenant) + 1
            self._kept.setdefault(tenant, deque(maxlen=self._most)).append((number, event))
