"""The models of the config: loaded, unloaded and replaced while the server runs."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass

from tta_server.engine.engine import Engine
from tta_server.engine.source import SourceModel
from tta_server.errors import ConfigError, Conflict, Unavailable, UnknownName

log = logging.getLogger(__name__)

Load = Callable[[str], SourceModel]
"""Loads the model of that name and tries its policies. Runs in a worker thread; raises ``ConfigError``."""
OnDevice = Callable[[Callable[[], None]], asyncio.Future[None]]
"""Queues something for the device thread."""


@dataclass(frozen=True)
class Entry:
    """A model as the repository index shows it."""

    name: str
    ready: bool
    reason: str
    """Why it is not ready."""


class Repository:
    """Models by name. A name has one network at a time: before it changes, its requests under way finish.

    All methods are for the event loop's thread.
    """

    def __init__(self, models: Mapping[str, SourceModel], engine: Engine, load: Load, on_device: OnDevice) -> None:
        self._models, self._engine, self._load, self._on_device = dict(models), engine, load, on_device
        self._names = tuple(models)
        self._closed: dict[str, str] = {}
        """Why a model takes no requests, by name."""
        self._busy: Counter[str] = Counter()
        self._left = asyncio.Event()
        self._changing = asyncio.Lock()

    def index(self) -> list[Entry]:
        """All models of the config."""
        return [Entry(name, name not in self._closed, self._closed.get(name, "")) for name in self._names]

    def loaded(self) -> dict[str, SourceModel]:
        """The models that are in memory, by name."""
        return dict(self._models)

    def get(self, name: str | None) -> SourceModel:
        """The model of that name, or the only one. Raises ``UnknownName``, or ``Unavailable`` while it is not ready."""
        if name is None and len(self._names) == 1:
            name = self._names[0]
        self.check_name(name)
        assert name is not None
        if name in self._closed:
            raise Unavailable(f"model {name!r} is not ready: {self._closed[name]}")
        return self._models[name]

    def check_name(self, name: str | None) -> None:
        """Raises ``UnknownName`` for a model that the config does not have."""
        if name not in self._names:
            asked = "name a model" if name is None else f"no model {name!r}"
            raise UnknownName(f"{asked}; there are: {', '.join(sorted(self._names))}")

    def enter(self, name: str) -> None:
        """A request on this model begins; :meth:`leave` ends it."""
        self._busy[name] += 1

    def leave(self, name: str) -> None:
        """A request is over."""
        self._busy[name] -= 1
        self._left.set()

    async def load(self, name: str) -> None:
        """Loads a model that is unloaded, or loads it again from its files and serves the old one meanwhile.

        Raises ``UnknownName``, or ``Conflict`` for files that cannot be used; then all is as it was.
        """
        self.check_name(name)
        await _to_its_end(self._replace(name))

    async def unload(self, name: str) -> None:
        """Takes a model out of memory once its requests under way are done. Its streams keep their states."""
        self.check_name(name)
        await _to_its_end(self._remove(name))

    async def _replace(self, name: str) -> None:
        async with self._changing:
            started = time.monotonic()
            try:
                model = await asyncio.to_thread(self._load, name)
            except ConfigError as error:
                raise Conflict(f"model {name!r} was not loaded, all is as it was: {error}") from error

            def put() -> None:
                self._engine.put(model)

            await self._change(name, "it is being replaced; try again in a moment", put)
            self._models[name] = model
            del self._closed[name]
            log.info("loaded", extra={"model": name, "digest": model.digest, "seconds": time.monotonic() - started})

    async def _remove(self, name: str) -> None:
        async with self._changing:
            if name not in self._models:
                return

            def take() -> None:
                del self._engine.models[name]

            await self._change(name, f"it was unloaded; POST /v2/repository/models/{name}/load brings it back", take)
            del self._models[name]
            log.info("unloaded", extra={"model": name})

    async def _change(self, name: str, reason: str, change: Callable[[], None]) -> None:
        """Takes no more requests for ``reason``, waits for those under way, and has the device thread ``change``."""
        before = self._closed.get(name)
        self._closed[name] = reason
        try:
            while self._busy[name]:
                self._left.clear()
                await self._left.wait()
            await self._on_device(change)
        except BaseException:
            del self._closed[name]
            if before is not None:
                self._closed[name] = before
            raise


async def _to_its_end(change: Coroutine[object, object, None]) -> None:
    """Awaits a change, which goes on when nobody waits any more: what the device thread did, the loop then knows."""
    task = asyncio.create_task(change)
    task.add_done_callback(lambda task: task.cancelled() or task.exception())  # seen, should nobody be left to tell
    await asyncio.shield(task)
