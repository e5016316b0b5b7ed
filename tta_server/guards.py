"""The guards of streams: made, set, operated, told of labels. What they do in a step is in ``engine/guarding.py``.

Runs on the event loop. A guard is changed on the device thread, in its stream's order of requests; only one that no
request has met yet is changed at once. Who calls these finds the streams, and has changes saved.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from pydantic import ValidationError

from tta_server.backend import Backend, ignore
from tta_server.engine.guarding import make_guard
from tta_server.errors import BadInput, Conflict, QueueFull, TtaError, Unavailable
from tta_server.feedback import check_sets, settle
from tta_server.settings import GuardSettings, type_and_line
from tta_server.trust.guard import Move, State
from tta_server.trust.labels import Labelled
from tta_server.types import Comparison, Stream

log = logging.getLogger(__name__)


class Guards:
    """What can be done with the guards of streams. All methods are for the event loop's thread."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    # A stream's guard begins

    def give(self, stream: Stream) -> None:
        """Gives a stream a guard by the config, unless it has one."""
        if stream.guard is None:
            stream.guard = make_guard(self._backend.settings.guard)

    def begin(self, stream: Stream, changes: Mapping[str, Any] | None, before: Stream | None) -> None:
        """Has a new stream's guard begin with these changes. A stream that takes the place of another one, ``before``,
        goes on with its guard: who may only begin it anew gets no other guarantee by that. Raises as :meth:`settings`.
        """
        wanted = self.settings(stream, changes)
        if stream.guard is None:
            return
        stream.guard.change(wanted)
        if before is not None and before.guard is not None:
            stream.guard = before.guard

    @staticmethod
    def inherit(stream: Stream, before: Stream) -> None:
        """Gives a copy of the stream ``before`` a new guard with its settings. What an operator, or proof of harm, put
        a stream into is not undone by a copy of it."""
        old = before.guard
        if old is None:
            return
        guard = stream.guard = make_guard(old.wanted)
        if old.pinned or old.state is State.QUARANTINE:
            guard.put(old.state)
            guard.pinned = old.pinned

    def equip(self, stream: Stream, kept: Mapping[str, Any] | None) -> None:
        """Gives a stream that was in the store its guard again; without one kept, or where it cannot be read, a new
        one, which lets it adapt only once there is evidence."""
        if stream.policy.plain:
            return
        stream.guard = make_guard(self._backend.settings.guard)
        if kept is None:
            return
        try:
            guard = make_guard(GuardSettings.model_validate(kept["settings"]))
            guard.restore(kept["state"])
        except (TtaError, ValueError, KeyError, TypeError) as error:
            log.error("a stored guard cannot be read", extra={"stream": stream.id, "reason": type_and_line(error)})
        else:
            stream.guard = guard

    # Its settings

    def settings(self, stream: Stream, changes: Mapping[str, Any] | None) -> GuardSettings:
        """The guard's settings of a stream with these changes. Raises ``BadInput``, or ``Conflict`` where the model
        lacks what they need."""
        now = self._backend.settings.guard if stream.guard is None else stream.guard.wanted
        if not changes:
            return now
        guarantee = changes.get("guarantee", {})
        if isinstance(guarantee, dict):
            guarantee = {**now.guarantee.model_dump(), **guarantee}
        try:
            wanted = GuardSettings.model_validate({**now.model_dump(), **changes, "guarantee": guarantee})
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, ("guard", *first["loc"])))
            raise BadInput(f"{place}: {first['msg']}; got {str(first['input'])[:100]}") from error
        if stream.guard is None:
            raise Conflict(f"stream {stream.id!r} has policy {stream.policy.name!r}, which needs no guard")
        if wanted.miscoverage is not None:
            check_sets(self._backend.source_of(stream))
        return wanted

    def change(self, stream: Stream, wanted: GuardSettings) -> bool:
        """Gives a stream's guard other settings, from the next request on; whether they are others."""
        guard = stream.guard
        if guard is None or wanted == guard.wanted:
            return False
        guard.wanted = wanted
        ignore(self._move(stream, lambda: guard.change(wanted)))
        self._backend.tell_of("changed", stream, guard=wanted.model_dump())
        return True

    # What it is told

    def toggle(self, stream: Stream) -> None:
        """The stream's adaptation was turned on or off."""
        guard = stream.guarded
        if guard is not None:
            ignore(self._move(stream, guard.toggle))

    async def operate(self, stream: Stream, state: State | None) -> None:
        """An operator puts the stream's guard into a state, where it stays, or with ``None`` lets it decide again,
        after the requests so far. Raises ``Conflict`` for a stream without a guard."""
        guard = stream.guarded
        if guard is None:
            need = "its policy needs none" if stream.policy.plain else "turn it on with guard.enabled"
            raise Conflict(f"stream {stream.id!r} has no guard; {need}")
        await self._move(stream, lambda: guard.release() if state is None else guard.put(state), touch=True)

    async def learn(self, stream: Stream, done: Labelled) -> bool:
        """Has the stream's guarantee know labels when this returns; whether there was anything for it to know."""
        guard = stream.guarded
        if guard is None or guard.guarantee is None or not len(done.rows):
            return False
        await self._move(stream, lambda: settle(stream, done), touch=True)
        return True

    def give_up(self, stream: Stream, note: Comparison, rows: Sequence[int]) -> None:
        """Has the stream's guarantee know that the labels of these rows of a request will not come any more."""
        guard = stream.guard
        if guard is None:
            return

        def settle_rows() -> None:
            if guard.guarantee is not None and note.count is guard.count:
                for row in rows:
                    guard.guarantee.settle(note.first_row + row, None)

        with suppress(Unavailable, QueueFull):
            ignore(self._backend.dispatcher.command(stream, settle_rows))

    def _move(self, stream: Stream, decide: Callable[[], list[Move]], touch: bool = False) -> asyncio.Future[None]:
        """Has the device thread call ``decide`` after the stream's requests so far, do what the moves ask for, and with
        ``touch`` have the stream saved."""
        engine, lane = self._backend.engine, stream.lane

        def move() -> None:
            for each in decide():
                self._backend.tell(engine.guarding.act(lane, stream, each))
            if touch:
                engine.store.touch(stream)

        return self._backend.dispatcher.command(stream, move)
