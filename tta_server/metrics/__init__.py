"""What the server tells about itself, and who listens. Only the modules beside this one know the library."""

from __future__ import annotations

from typing import Protocol

from tta_server.types import Call, Event, StepStats


class Recorder(Protocol):
    """Listens. Called from the device thread and from the event loop's."""

    def step(self, stats: StepStats) -> None:
        """An engine step is over."""

    def request(self, call: Call) -> None:
        """An HTTP request was answered."""

    def event(self, event: Event) -> None:
        """Something happened to a stream."""


class Recorders:
    """Tells several recorders, and what happened in a step as events."""

    def __init__(self, *recorders: Recorder) -> None:
        self._recorders = recorders

    def step(self, stats: StepStats) -> None:
        """See :class:`Recorder`."""
        for recorder in self._recorders:
            recorder.step(stats)
        for event in stats.events:
            self.event(event)

    def request(self, call: Call) -> None:
        """See :class:`Recorder`."""
        for recorder in self._recorders:
            recorder.request(call)

    def event(self, event: Event) -> None:
        """See :class:`Recorder`."""
        for recorder in self._recorders:
            recorder.event(event)
