"""What all tenants share."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tta_server.dispatch import Dispatcher
from tta_server.engine.engine import Engine
from tta_server.engine.source import SourceModel
from tta_server.errors import Conflict
from tta_server.logs import current
from tta_server.repository import Repository
from tta_server.settings import Settings
from tta_server.state.keeper import Keeper
from tta_server.types import Event, Stream


@dataclass(frozen=True)
class Backend:
    """The parts that every tenant's streams go through."""

    settings: Settings
    repository: Repository
    dispatcher: Dispatcher
    engine: Engine
    keeper: Keeper
    tell: Callable[[Event], None]
    """What happens to streams."""
    marking: set[tuple[Stream, str]] = field(default_factory=set)
    """Names of states that are being stored."""

    def tell_of(self, kind: str, stream: Stream, **fields: Any) -> None:
        """Tells what happened to a stream, in the course of the request that is being answered."""
        self.tell(Event(kind, stream, fields, current()))

    def source_of(self, stream: Stream) -> SourceModel:
        """The stream's model. Raises ``Unavailable``, or ``Conflict`` when its weights are not the stream's."""
        source = self.repository.get(stream.model)
        if source.digest != stream.digest:
            raise Conflict(
                f"stream {stream.id!r} adapted model {stream.model!r} with digest {stream.digest}, but the one that is "
                f"loaded has {source.digest}; load the former, or reset the stream to start from the latter"
            )
        return source


def ignore(future: asyncio.Future[None]) -> None:
    """Nobody waits for it, and nobody wants its error, such as that the server shuts down."""
    future.add_done_callback(lambda future: future.cancelled() or future.exception())
