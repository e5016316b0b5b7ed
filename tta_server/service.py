"""The async facade: tenants over one runner, the models, draining. No HTTP in here."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from adapters.source import SourcePolicy
from tta_server.access import Access, Room
from tta_server.dispatch import Dispatcher
from tta_server.drift.monitor import Monitor
from tta_server.engine.source import SourceModel
from tta_server.metrics.scrape import Levels
from tta_server.repository import Load, Repository
from tta_server.runner import Runner
from tta_server.settings import Settings
from tta_server.tenant import Backend, Tenant
from tta_server.types import Stream


class Service:
    """What the routes work with. All methods are for the event loop's thread."""

    def __init__(
        self, settings: Settings, models: Mapping[str, SourceModel], runner: Runner, access: Access, load: Load
    ) -> None:
        self.settings, self.access, self._runner = settings, access, runner
        self.room = Room(settings.limits.bodies_bytes)
        dispatcher = Dispatcher(runner, settings.limits.queue_seconds)

        def on_device(command: Callable[[], None]) -> asyncio.Future[None]:
            return dispatcher.command(Stream("", "", SourcePolicy(), 0, 0.0), command)

        self.models = Repository(models, runner.engine, load, on_device)
        self._backend = Backend(settings, self.models, dispatcher, runner.engine, runner.recorder.event)
        self._tenants: dict[str, Tenant] = {}
        self.draining = False
        self._drained: asyncio.Task[int] | None = None

    def tenant(self, name: str) -> Tenant:
        """The tenant of that name."""
        found = self._tenants.get(name)
        if found is None:
            found = self._tenants[name] = Tenant(
                name, self._backend, lambda: self.access.limits(name), lambda: sum(map(len, self._tenants.values()))
            )
        return found

    @property
    def monitor(self) -> Monitor:
        """What is known of each stream."""
        return self._runner.engine.monitor

    def check_room(self, wait: float | None = None) -> None:
        """Raises ``QueueFull`` where a request that may wait so many seconds would be refused, or ``Unavailable``.

        True until the next await: only the event loop queues.
        """
        longest = self.settings.limits.queue_seconds
        self._runner.check_room(longest if wait is None else min(wait, longest))

    def levels(self) -> Levels:
        """What the metrics read at every scrape."""
        store, loaded = self._runner.engine.store, self.models.loaded()
        streams = [stream for tenant in self._tenants.values() for stream in tenant.streams()]
        return Levels(
            waiting=self._runner.waiting,
            streams=streams,
            states=store.counts(),
            evictions=store.evictions,
            digests={name: model.digest for name, model in loaded.items()},
            references={name: model.reference is not None for name, model in loaded.items()},
        )

    async def drain(self) -> int:
        """Stops admitting, finishes what waits within ``limits.drain_seconds``; returns how many were given up."""
        self.draining = True
        if self._drained is None:
            drain = asyncio.to_thread(self._runner.drain, self.settings.limits.drain_seconds)
            self._drained = asyncio.create_task(drain)
        return await self._drained
