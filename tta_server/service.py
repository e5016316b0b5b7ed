"""The async facade: tenants over one runner, the models, draining. No HTTP in here."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from adapters import Policy
from adapters.source import SourcePolicy
from tta_server.access import Access, Room
from tta_server.backend import Backend
from tta_server.dispatch import Dispatcher
from tta_server.drift.monitor import Monitor
from tta_server.engine.source import SourceModel
from tta_server.errors import ConfigError, TtaError
from tta_server.history import History
from tta_server.metrics.scrape import Levels
from tta_server.policies import make_policy
from tta_server.repository import Load, Repository
from tta_server.runner import Runner
from tta_server.settings import Settings
from tta_server.state.keeper import Keeper, Keeping
from tta_server.state.records import Damaged, Fenced, Found, InUse, Shutdown, StoreFailed
from tta_server.tenant import Tenant
from tta_server.types import NOT_STORED, Event, Stream

log = logging.getLogger(__name__)


LOOK_SECONDS = 60.0
"""Longest time between two looks for streams to delete."""


@dataclass(frozen=True)
class Drained:
    """How a shutdown went."""

    given_up: int
    """Requests whose turn did not come."""
    saved: int
    """Streams stored in its course."""
    unsaved: int
    """Streams that could not be."""


class Service:
    """What the routes work with. All methods are for the event loop's thread."""

    def __init__(
        self,
        settings: Settings,
        models: Mapping[str, SourceModel],
        runner: Runner,
        keeper: Keeper,
        access: Access,
        load: Load,
    ) -> None:
        self.settings, self.access, self._runner = settings, access, runner
        self.room = Room(settings.limits.bodies_bytes)
        dispatcher = Dispatcher(runner, settings.limits.queue_seconds)

        def on_device(command: Callable[[], None]) -> asyncio.Future[None]:
            return dispatcher.command(Stream("", "", SourcePolicy(), 0, 0.0, durability=NOT_STORED), command)

        self.models = Repository(models, runner.engine, load, on_device)
        self._backend = Backend(settings, self.models, dispatcher, runner.engine, keeper, runner.recorder.event)
        self._tenants: dict[str, Tenant] = {}
        self.draining = False
        self._drained: asyncio.Task[Drained] | None = None
        self._begun, self._began = False, time.time()
        self._damaged = 0
        self._source_policy = SourcePolicy()
        self._policy = lru_cache(maxsize=None)(lambda name, settings: make_policy(name, json.loads(settings)))
        self.last_shutdown: Shutdown | None = None
        """Of the process that had the store before."""

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
            page_outs=store.page_outs,
            keeping=self.keeping(),
            budget=store.budget,
            digests={name: model.digest for name, model in loaded.items()},
            references={name: model.reference is not None for name, model in loaded.items()},
            labels=[tenant.feedback.status for tenant in self._tenants.values()],
        )

    def history(self, tenant: Tenant) -> History:
        """What can be done with the states of the tenant's streams."""
        return History(tenant, self._backend)

    def begin(self, take_over: bool = False) -> None:
        """Takes the streams from the store, without their states, and starts the threads; once.

        Raises ``ConfigError`` where the store is in use by another process, or cannot be read.
        """
        if self._begun:
            return
        keeper, started = self._backend.keeper, time.monotonic()
        try:
            index = keeper.open(take_over)
        except InUse as error:
            raise ConfigError(str(error)) from error
        except (Fenced, Damaged, StoreFailed) as error:
            raise ConfigError(f"state.folder = {self.settings.state.folder!r} cannot be used: {error}") from error
        self._begun = True
        self._damaged = len(index.damaged) + sum(bool(found.note) for found in index.streams)
        for reason in index.damaged:
            log.error("a stored stream cannot be read", extra={"reason": reason})
        for found in index.streams:
            self._recover(found)
        if keeper.persistent and not keeper.problem:
            self.last_shutdown = keeper.last_shutdown()
            log.info("streams recovered", extra={
                "streams": len(index.streams), "damaged": len(index.damaged), "seconds": time.monotonic() - started,
                "clean_shutdown": self.last_shutdown is None or self.last_shutdown.clean,
            })  # fmt: skip
        keeper.start()
        self._runner.start()

    def _recover(self, found: Found) -> None:
        record, unusable = found.record, ""
        policy: Policy = self._source_policy
        try:
            policy = self._policy(record.policy, json.dumps(record.settings))
            self.models.check_name(record.model)
        except TtaError as error:
            unusable = str(error)
        stream = record.stream(policy)
        self.tenant(record.tenant).guards.equip(stream, record.guard)
        keeper, tenant = self._backend.keeper, self.tenant(record.tenant)
        if unusable:
            log.error("a stored stream cannot be used", extra={"stream": stream.id, "reason": unusable})
            keeper.adopt(stream, found)
        else:
            self._runner.engine.store.adopt(stream, found)
        if record.durability.mode == "none":
            keeper.remove(stream, lambda error: None)  # it was there to make room in memory
            return
        tenant.recover(stream, unusable)
        if found.note:
            self._backend.tell(Event("damaged", stream, {"reason": found.note}))
        if found.lost:
            self._backend.tell(Event("lost", stream, {"steps": found.lost, "version": stream.version}))

    async def expire(self) -> None:
        """Deletes streams that had no request for ``state.keep_seconds``, again and again."""
        longest = self.settings.state.keep_seconds
        while longest is not None:
            await asyncio.sleep(min(longest / 10, LOOK_SECONDS))
            before = time.time() - longest
            if before < self._began:
                continue  # while the server was away, nobody could be seen
            for tenant in list(self._tenants.values()):
                for stream in tenant.unseen(before):
                    tenant.discard(stream, "expired")
                    await asyncio.sleep(0)  # there may be many

    def keeping(self) -> Keeping:
        """How the store does."""
        keeper = self._backend.keeper
        return Keeping(
            persistent=keeper.persistent,
            problem=keeper.problem,
            fenced=keeper.fenced,
            waiting=keeper.waiting,
            bytes=keeper.size,
            tally=keeper.tally,
            last_shutdown=self.last_shutdown,
            damaged_at_start=self._damaged,
        )

    async def drain(self) -> Drained:
        """Stops admitting, finishes what waits within ``limits.drain_seconds``, and saves what is unsaved within
        ``state.flush_seconds``."""
        self.draining = True
        if self._drained is None:
            self._drained = asyncio.create_task(asyncio.to_thread(self._drain))
        return await self._drained

    def _drain(self) -> Drained:
        keeper = self._backend.keeper
        before = keeper.tally.saved
        given_up = self._runner.drain(self.settings.limits.drain_seconds)
        keeper.flush(self.settings.state.flush_seconds)
        streams = [stream for tenant in self._tenants.values() for stream in tenant.streams()]
        unsaved = [one for one in streams if one.unsaved and one.durability.mode != "none"]
        drained = Drained(given_up, keeper.tally.saved - before, len(unsaved))
        keeper.close(Shutdown(not unsaved, drained.saved, drained.unsaved))
        if unsaved:
            log.error("streams that could not be saved", extra={"streams": [one.id for one in unsaved[:20]]})
        return drained
