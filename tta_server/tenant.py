"""One tenant's streams: open, predict, change, reset, close. Another tenant's streams are not in here at all.

Runs on the event loop; the work goes to the device thread through ``dispatch``.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import re
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import Tensor

from adapters import Policy, rng
from adapters.source import SourcePolicy
from tta_server.backend import Backend, ignore
from tta_server.dispatch import Flight
from tta_server.drift.benefit import GROUP as BENEFIT_GROUP
from tta_server.drift.benefit import UNPREPARED
from tta_server.drift.estimators import GROUP as ESTIMATES
from tta_server.drift.monitor import Monitor, Reading
from tta_server.drift.reference import GROUP as MONITORING
from tta_server.drift.signals import DISTANCE, DRIFT
from tta_server.engine.engine import initial_state
from tta_server.engine.report import STEP_FAILS
from tta_server.engine.source import SourceModel
from tta_server.engine.threads import in_passing
from tta_server.errors import BadInput, Conflict, QueueFull, Unavailable, UnknownName
from tta_server.feedback import Feedback
from tta_server.guards import Guards
from tta_server.policies import make_policy, settings_of, starting_settings
from tta_server.settings import NAME, Consistency, Durability, TenantSettings, type_and_line
from tta_server.state.slots import Layout
from tta_server.trust.guard import State
from tta_server.trust.labels import Labelled
from tta_server.types import NOT_STORED, NOWHERE, Answer, Lane, Origin, Stream

log = logging.getLogger(__name__)

STREAM_ID = re.compile(NAME)


@dataclass(eq=False)
class _Open:
    """An open stream: its place in the order of creation, its numbered requests."""

    stream: Stream
    place: int
    last_answer: Answer | None = None
    flights: dict[int, Flight] = field(default_factory=dict)


class Tenant:
    """The streams and predictions of one tenant. All methods are for the event loop's thread."""

    def __init__(
        self, name: str, backend: Backend, limits: Callable[[], TenantSettings], count: Callable[[], int]
    ) -> None:
        """``limits`` gives what the tenant may use now, ``count`` the open streams of all tenants."""
        self.name, self._backend, self._limits, self._count = name, backend, limits, count
        self._streams: dict[str, _Open] = {}
        self._unusable: dict[str, tuple[Stream, str]] = {}
        """Stored streams that this server cannot run, and why."""
        self._places = itertools.count(1)
        self._source_policy = SourcePolicy()
        self.feedback = Feedback(backend.settings.labels)
        """Its answers that can be labelled, and what labels said."""
        self.guards = Guards(backend)
        """What can be done with its streams' guards."""

    def __len__(self) -> int:
        """Open streams."""
        return len(self._streams)

    # Streams

    def open(
        self,
        id: str,
        model: str | None = None,
        policy: str | None = None,
        settings: Mapping[str, Any] | None = None,
        adapt: bool | None = None,
        durability: Durability | None = None,
        replace: bool = False,
        guard: Mapping[str, Any] | None = None,
        consistency: Consistency | None = None,
    ) -> tuple[Stream, bool]:
        """Creates the stream ``id``, or confirms one that is the same; with ``replace``, starts it afresh in any case.

        Returns the stream and whether it is new.

        What is left out is as it is on a stream that exists. On a new one, ``model`` is the only one there is,
        ``policy`` the model's own, ``adapt`` on, ``durability`` and ``consistency`` the config's, ``guard`` goes over
        the config's, and ``settings`` over the model's preset for the policy, that over the policy's defaults. Raises
        ``BadInput`` for what does not fit, ``UnknownName``, ``Unavailable`` for a model that is not ready, ``Conflict``
        when the stream exists otherwise or the policy cannot run on the model, and ``QueueFull`` beyond a limit on
        streams.
        """
        _check_id(id)
        self._check_owner()
        if id in self._unusable:
            self._open(id)
        existing = self._streams.get(id)
        if existing is not None and not replace:
            self._confirm(existing.stream, model, policy, settings)
            wanted = self.guards.settings(existing.stream, guard)
            changed = self._switch(existing.stream, adapt, durability, consistency)
            if self.guards.change(existing.stream, wanted) or changed:  # the caller settles it
                self._touch(existing.stream)
            return existing.stream, False
        source = self._backend.repository.get(model)
        made = _make_policy(source, policy or source.settings.policy, settings)
        size = self._size(source, made)
        self._check_quota(0 if existing else 1, size - (existing.stream.state_bytes if existing else 0))
        stream = self._build(id, source, made, size)
        stream.adapt, stream.durability = adapt is not False, self._durability(durability)
        stream.consistency = consistency or stream.consistency
        self.guards.begin(stream, guard, None if existing is None else existing.stream)
        if existing is not None:
            self.discard(existing.stream)
        self._enter(stream)
        self._backend.tell_of("opened", stream, policy=made.name)
        return stream, True

    def build(self, id: str, source: SourceModel, policy: Policy) -> Stream:
        """A new stream, for :meth:`admit`. Raises ``BadInput``, or ``Conflict`` where the policy cannot run."""
        _check_id(id)
        return self._build(id, source, policy, self._size(source, policy))

    def admit(self, stream: Stream, begin: Callable[[], None]) -> asyncio.Future[None]:
        """Takes in a stream that comes with a state; ``begin`` gives it that on the device thread, before its first
        request. Raises ``Conflict`` where there is one of its id, and ``QueueFull`` beyond a limit on streams."""
        _check_id(stream.id)
        self._check_owner()
        if stream.id in self._unusable or stream.id in self._streams:
            raise Conflict(f"there is a stream {stream.id!r} already; delete it, or choose another id")
        self._check_quota(1, stream.state_bytes)
        done = self._backend.dispatcher.command(stream, begin)
        self._enter(stream)
        return done

    def recover(self, stream: Stream, unusable: str = "") -> None:
        """Takes in a stream that was in the store at the start, or puts it aside for the reason it is ``unusable``."""
        if unusable:
            self._unusable[stream.id] = stream, unusable
        else:
            self._enter(stream)

    def unseen(self, before: float) -> list[Stream]:
        """The streams that had no request, and were not made, since then (Unix time, seconds)."""
        return [
            one.stream
            for one in self._streams.values()
            if max(one.stream.last_seen, one.stream.created) < before and not one.flights
        ]

    def is_open(self, id: str) -> bool:
        """Whether there is a stream ``id``."""
        return id in self._streams

    def stream(self, id: str) -> Stream:
        """The open stream ``id``. Raises ``UnknownName``."""
        return self._open(id).stream

    def check_open(self, stream: Stream) -> None:
        """Raises ``UnknownName`` where the stream was deleted, also when its id is another's by now."""
        if not self._is_current(stream):
            raise UnknownName(f"stream {stream.id!r} was deleted meanwhile")

    def _is_current(self, stream: Stream) -> bool:
        opened = self._streams.get(stream.id)
        return opened is not None and opened.stream is stream

    def streams(self) -> Iterator[Stream]:
        """All open streams, in order of creation."""
        return (one.stream for one in self._streams.values())

    def page(
        self, after: int, limit: int, model: str | None = None, policy: str | None = None, adapt: bool | None = None
    ) -> tuple[list[Stream], int | None]:
        """Up to ``limit`` streams of this model, policy and toggle, in order of creation, from behind place ``after``.

        Returns them and, if there are more, the place to go on behind.
        """
        self._check_owner()
        found: list[_Open] = []
        for one in self._streams.values():
            stream = one.stream
            wanted = model in (None, stream.model) and policy in (None, stream.policy.name)
            if one.place > after and wanted and adapt in (None, stream.adapt):
                if len(found) == limit:
                    return [one.stream for one in found], found[-1].place
                found.append(one)
        return [one.stream for one in found], None

    @property
    def monitor(self) -> Monitor:
        """What is known of each stream."""
        return self._backend.engine.monitor

    def signals(self, stream: Stream) -> dict[str, Reading]:
        """A stream's signals beside what clean data have, see ``drift/monitor.py``."""
        return self.monitor.readings(stream)

    def missing(self, stream: Stream) -> dict[str, str]:
        """Signals that the stream does not have, and how to get them."""
        source, settings = self._backend.repository.loaded().get(stream.model), self._backend.settings.monitor
        if not settings.enabled:
            return {"all": "monitor.enabled is false in the config"}
        missing = {}
        if not settings.shadow_ratio and not stream.policy.plain:
            missing["source path"] = "monitor.shadow_ratio is 0 in the config"
        if source is not None and source.reference is None:
            command = f"tta-server prepare CONFIG --data CLEAN_IMAGES --only {MONITORING}"
            for name in (DRIFT, "label_divergence", "label_psi"):
                missing[name] = f"needs to know what clean data look like; run: {command}"
            missing["z"] = f"so do z-scores, bands and the verdicts 'near source' and 'drifted'; run: {command}"
        how = "run: tta-server prepare CONFIG --data CLEAN_LABELLED_IMAGES --only"
        if source is not None and source.judge is UNPREPARED and stream.guarded is not None:
            missing["benefit"] = f"is a rule of thumb for now, not fitted to this model; {how} {BENEFIT_GROUP}"
        if source is not None and source.estimates is None:
            missing["accuracy"] = f"needs labelled images that the model was not trained on; {how} {ESTIMATES}"
        if source is not None and not source.network.keeps_statistics:
            missing[DISTANCE] = "the model has no batch norms that keep statistics"
        return missing

    def tier(self, stream: Stream) -> str:
        """Where the stream's state is now: ``device``, ``host``, ``disk`` or ``none``."""
        return self._backend.engine.store.tier(stream.lane, stream)

    async def update(
        self,
        id: str,
        adapt: bool | None = None,
        policy: str | None = None,
        settings: Mapping[str, Any] | None = None,
        durability: Durability | None = None,
        guard: Mapping[str, Any] | None = None,
        consistency: Consistency | None = None,
    ) -> tuple[Stream, bool]:
        """Changes a stream from the next request on; what is left out stays. Returns it and whether its state is kept.

        ``guard`` goes over the guard's settings as they are; another guarantee starts afresh.
        ``settings`` go over those the stream has, or, with another ``policy``, over what that one starts from on the
        model. The state is kept whole where policy and state layout stay the same (a learning rate, a threshold);
        otherwise (another policy, window or optimiser) the stream starts again from the source.
        """
        opened = self._open(id)
        stream, moving = opened.stream, None
        if guard is not None and policy not in (None, SourcePolicy.name):
            self.guards.give(stream)
        wanted = self.guards.settings(stream, guard)
        if policy is not None or settings is not None:
            source = self._backend.source_of(stream)
            if policy in (None, stream.policy.name):
                made = make_policy(stream.policy.name, {**settings_of(stream.policy), **(settings or {})})
            else:
                made = _make_policy(source, policy or "", settings)
            if made != stream.policy:
                moving = self._move(opened, source, made)
        changed = self._switch(stream, adapt, durability, consistency)
        if (self.guards.change(stream, wanted) or changed) and moving is None:
            self._touch(stream)
        return stream, moving is None or await moving

    async def operate(self, id: str, state: State | None) -> Stream:
        """An operator puts the stream's guard into a state, or lets go of it, see :meth:`Guards.operate`; that is
        stored, where the stream is, when this returns."""
        stream = self.stream(id)
        await self.guards.operate(stream, state)
        if stream.durability.mode != "none" and self._is_current(stream):
            with suppress(Unavailable):  # a crash must not undo it
                await self.store(stream)
        return stream

    async def label(self, id: str, request: str, labels: Sequence[int | None]) -> Labelled:
        """Takes in the labels of one of the stream's requests, see :meth:`Feedback.label`; its guarantee knows them
        when this returns."""
        stream = self.stream(id)
        done = self.feedback.label(stream, request, labels)
        if await self.guards.learn(stream, done):
            await self.settle(stream)
        return done

    async def reset(self, id: str) -> Stream:
        """Takes a stream back to the source once its requests so far are done; its request numbers go on.

        The source is the model as it is now, if it is loaded: this is how a stream follows its model to new weights.
        """
        opened = self._open(id)
        stream, engine = opened.stream, self._backend.engine
        old = stream.lane
        source = self._backend.repository.loaded().get(stream.model)
        if source is not None and source.digest != stream.digest:
            size = self._size(source, stream.policy)
            self._check_quota(0, size - opened.stream.state_bytes)
            stream.digest, stream.state_bytes = source.digest, size
        new, key = stream.lane, self._random_key(id)

        def reset() -> None:
            engine.reset(old, new, stream)
            stream.random_key = key

        await self._backend.dispatcher.command(stream, reset)
        self._backend.tell_of("reset", stream)
        return stream

    async def settle(self, stream: Stream) -> None:
        """Has a stream's newest changes saved in due time; where its durability says so, returns when they are.

        Not when the store cannot be written: the stream goes on with what it has, and tells what is unsaved.
        """
        if not self._is_current(stream):
            return  # deleted meanwhile: stored now, it would come back
        store = self._backend.engine.store
        # What is not to be stored any more is stored as such: what was stored before is not to come back.
        if stream.durability.mode == "sync" or (stream.durability.mode == "none" and stream.saved.revision):
            with suppress(Unavailable):
                await self.store(stream)
        elif stream.durability.mode == "async":
            ignore(self._backend.dispatcher.command(stream, lambda: store.meet(stream)))

    async def store(self, stream: Stream, marks: tuple[str, ...] = ()) -> None:
        """Saves a stream, after its requests so far, its state under these names. Raises ``Unavailable`` where the
        store cannot be written, and ``UnknownName`` where the stream was deleted meanwhile."""
        self.check_open(stream)
        stored, done = self._backend.dispatcher.promise()
        store = self._backend.engine.store
        await self._backend.dispatcher.command(stream, lambda: store.save(stream, marks, done))
        await stored

    async def close(self, id: str, only: Stream | None = None) -> None:
        """Forgets a stream, in the store too. Its id is free at once; requests it still has under way finish first.

        With ``only``, does nothing when the id belongs to another stream by now, or to none. Raises ``Unavailable``
        where the store cannot be written; then it is forgotten there as soon as it can.
        """
        if only is not None and (id not in self._streams or self._streams[id].stream is not only):
            return
        stream = self._unusable[id][0] if id in self._unusable else self._open(id).stream
        forgotten = self._forget(stream)
        try:
            await forgotten
        except Unavailable as error:
            raise Unavailable(
                f"stream {id!r} is closed, but what is stored of it could not be deleted yet: {error}. That is done as "
                "soon as the store can be written"
            ) from error

    def discard(self, stream: Stream, kind: str = "closed") -> None:
        """Forgets a stream, unless its id is another's by now. Nobody waits for it."""
        opened = self._streams.get(stream.id)
        if opened is not None and opened.stream is stream:
            forgotten = asyncio.ensure_future(self._forget(stream, kind))
            ignore(forgotten)

    # Predictions

    async def predict(
        self,
        model: str | None,
        x: Tensor,
        *,
        stream: str | None = None,
        number: int | None = None,
        adapt: bool | None = None,
        timeout: float | None = None,
        priority: int = 0,
        origin: Origin = NOWHERE,
    ) -> tuple[Answer, bool]:
        """Scores for ``x [N, ...]``, which :func:`check_input` has passed, and whether they are a stored answer.

        Without a ``stream`` the plain source model answers. ``adapt`` overrides the stream's toggle for this request:
        without adaptation the source model answers and the stream's state rests. ``number`` is the request number: a
        repeated one gets the first one's answer and never adapts twice, one older than the last is a ``Conflict``.
        ``timeout`` (seconds) may shorten the longest wait in the queue; ``priority`` as in :func:`types.head_start`.
        """
        if stream is None:
            if number is not None:
                raise BadInput("a request number needs a stream to be counted in")
            source = self._backend.repository.get(model)
            anonymous = Stream("", source.name, self._source_policy, 0, 0.0, durability=NOT_STORED)
            flight = self._launch(anonymous, source, self._source_policy, x, timeout, priority, origin)
            return await flight.wait(), False
        opened = self._open(stream)
        if model not in (None, opened.stream.model):
            raise Conflict(f"stream {stream!r} belongs to model {opened.stream.model!r}, not to {model!r}")
        if number is not None:
            if number in opened.flights:
                return await opened.flights[number].wait(), True
            last = opened.stream.last_number
            if number == last:
                if opened.last_answer is None:
                    raise Conflict(
                        f"request number {number} of stream {stream!r} was answered already, and its answer is not "
                        "kept: it was too large (limits.stored_answer_bytes), or the server was started anew since"
                    )
                return opened.last_answer, True
            newest = max([*opened.flights, -1 if last is None else last])
            if number < newest:
                raise Conflict(f"request number {number} of stream {stream!r} is out of order: {newest} came before")
        source = self._backend.source_of(opened.stream)
        opened.stream.last_seen = time.time()
        wanted = opened.stream.adapt if adapt is None else adapt

        def keep(answer: Answer | None) -> None:
            if number is not None:
                del opened.flights[number]
                if answer is not None:
                    opened.last_answer = _stored(answer, self._backend.settings.limits.stored_answer_bytes)

        guard = opened.stream.guarded
        if guard is not None and guard.state is State.QUARANTINE:
            wanted = False
        policy = opened.stream.policy if wanted else self._source_policy

        def remember(answer: Answer | None) -> None:
            if answer is not None and self._is_current(opened.stream):
                self.feedback.served(opened.stream, source, answer, origin.request)
                for lost in self.feedback.unanswered():
                    if self._is_current(lost[0]):
                        self.guards.give_up(*lost)
            keep(answer)

        flight = self._launch(opened.stream, source, policy, x, timeout, priority, origin, remember, number)
        if number is not None:
            opened.flights[number] = flight
        return await flight.wait(), False

    def _launch(
        self,
        stream: Stream,
        source: SourceModel,
        policy: Policy,
        x: Tensor,
        timeout: float | None,
        priority: int,
        origin: Origin,
        settled: Callable[[Answer | None], None] = lambda answer: None,
        number: int | None = None,
    ) -> Flight:
        """Queues a request, and has the model stay for it."""
        repository = self._backend.repository

        def over(answer: Answer | None) -> None:
            repository.leave(source.name)
            settled(answer)

        lane = Lane(source.name, policy, source.digest)
        flight = self._backend.dispatcher.launch(stream, lane, x, timeout, priority, over, origin, number)
        repository.enter(source.name)
        return flight

    def _move(self, opened: _Open, source: SourceModel, policy: Policy) -> Awaitable[bool]:
        """Gives a stream another policy setting from now on; to be awaited for whether its state came along."""
        size = self._size(source, policy)
        self._check_quota(0, size - opened.stream.state_bytes)
        stream, engine, repository = opened.stream, self._backend.engine, self._backend.repository
        old, new = stream.lane, Lane(source.name, policy, source.digest)
        kept: list[bool] = []
        done = self._backend.dispatcher.command(stream, lambda: kept.append(engine.move(old, new, stream)))
        # From here on, requests queue behind the move and in the new lane.
        stream.policy, stream.state_bytes = policy, size
        if not policy.plain:
            self.guards.give(stream)
        repository.enter(source.name)
        done.add_done_callback(lambda done: repository.leave(source.name))

        async def told() -> bool:
            await asyncio.shield(done)  # the model is needed until then, also when the client leaves
            settings = settings_of(policy)
            self._backend.tell_of("changed", stream, policy=policy.name, settings=settings, state_kept=kept[0])
            return kept[0]

        return told()

    def _build(self, id: str, source: SourceModel, policy: Policy, size: int) -> Stream:
        stream = Stream(
            id=id,
            model=source.name,
            policy=policy,
            random_key=self._random_key(id),
            created=time.time(),
            digest=source.digest,
            tenant=self.name,
            durability=self._durability(None),
            consistency=self._backend.settings.streams.consistency,
            state_bytes=size,
        )
        if not policy.plain:
            self.guards.give(stream)
        return stream

    def model_for(self, name: str, digest: str) -> SourceModel:
        """The model with this digest, best the one of that name. Raises ``Conflict`` with all digests there are."""
        loaded = self._backend.repository.loaded()
        for model in (loaded.get(name), *loaded.values()):
            if model is not None and model.digest == digest:
                return self._backend.repository.get(model.name)
        there = ", ".join(f"{model.name!r} with {model.digest}" for model in loaded.values())
        raise Conflict(f"the file is of model {name!r} with digest {digest}; there are: {there or 'none'}")

    def _size(self, source: SourceModel, policy: Policy) -> int:
        """Bytes of a stream's state. Raises ``Conflict`` when the policy cannot run on the model.

        The preset was tried at the start. Other settings may do where it does not, unless the step itself fails.
        """
        report = source.reports.get(policy.name, {})
        reason: str | None = report.get("reason")
        size = report.get("bytes_per_stream", 0)
        tried = policy.name in source.reports and policy == _make_policy(source, policy.name, None)
        if not tried and (reason is None or not reason.startswith(STEP_FAILS)):
            reason = None
            try:
                size = in_passing(lambda: Layout(initial_state(policy, source)).bytes)
            except (ValueError, RuntimeError) as error:  # torch raises the latter for what does not fit into memory
                reason = type_and_line(error) if isinstance(error, RuntimeError) else str(error)
        limit = self._backend.settings.limits.state_bytes
        if reason is None and size > limit:
            reason = f"a stream's state would be {size:,} bytes, over the limit limits.state_bytes = {limit:,}"
        if reason is not None:
            raise Conflict(f"policy {policy.name!r} cannot run on model {source.name!r}: {reason}")
        return int(size)

    def _check_quota(self, streams: int, bytes: int) -> None:
        """Raises ``QueueFull`` where so many more streams, or bytes of state, are beyond a limit."""
        limits, place, most = self._limits(), f"auth.tenants.{self.name}", self._backend.settings.limits.streams
        if streams and self._count() >= most:
            raise QueueFull(
                f"{self._count()} streams are open; the limit is limits.streams = {most}. Delete streams that are done"
            )
        if streams and limits.streams is not None and len(self) >= limits.streams:
            raise QueueFull(
                f"{len(self)} streams are open; the limit is {place}.streams = {limits.streams}. "
                "Delete streams that are done"
            )
        held = sum(one.stream.state_bytes for one in self._streams.values()) if limits.state_bytes is not None else 0
        if limits.state_bytes is not None and bytes > 0 and held + bytes > limits.state_bytes:
            raise QueueFull(
                f"the states of all streams may take {held + bytes:,} bytes then; the limit is "
                f"{place}.state_bytes = {limits.state_bytes:,}. Delete streams that are done"
            )

    def _confirm(
        self, stream: Stream, model: str | None, policy: str | None, settings: Mapping[str, Any] | None
    ) -> None:
        """Raises ``Conflict`` unless what is asked for is what the stream is."""
        if model is not None and model != stream.model:
            self._backend.repository.check_name(model)
            raise Conflict(f"stream {stream.id!r} belongs to model {stream.model!r}, not to {model!r}")
        if policy is None and settings is None:
            return
        source = self._backend.source_of(stream)
        made = _make_policy(source, policy or stream.policy.name, settings)
        if made.name != stream.policy.name or (settings is not None and made != stream.policy):
            raise Conflict(
                f"stream {stream.id!r} runs policy {stream.policy.name!r} {settings_of(stream.policy)}, asked for was "
                f"{made.name!r} {settings_of(made)}; change it with PATCH, or use another id"
            )

    def _check_owner(self) -> None:
        """Raises ``Unavailable`` where another process has the streams now."""
        keeper = self._backend.keeper
        if keeper.fenced:
            raise Unavailable(f"{keeper.problem}; ask the server that has the streams now")

    def _open(self, id: str) -> _Open:
        _check_id(id)
        self._check_owner()
        if id in self._unusable:
            raise Conflict(
                f"stream {id!r} is stored, but cannot be used: {self._unusable[id][1]}. Mend that and start the server "
                "anew, or delete the stream"
            )
        if id not in self._streams:
            raise UnknownName(f"no stream {id!r}; create it with PUT /v1/streams/<id>")
        return self._streams[id]

    def _switch(
        self, stream: Stream, adapt: bool | None, durability: Durability | None, consistency: Consistency | None
    ) -> bool:
        """Turns adaptation on or off, and changes how the stream is stored and whether its requests wait for steps;
        what is left out stays. Returns whether anything changed."""
        changes: dict[str, Any] = {}
        if adapt is not None and adapt != stream.adapt:
            stream.adapt = changes["adapt"] = adapt
            self.guards.toggle(stream)
        if durability is not None and (durability := self._durability(durability)) != stream.durability:
            stream.durability, changes["durability"] = durability, durability.model_dump()
        if consistency not in (None, stream.consistency):
            stream.consistency, changes["consistency"] = consistency, consistency.model_dump()
        if changes:
            self._backend.tell_of("changed", stream, **changes)
        return bool(changes)

    def _durability(self, wanted: Durability | None) -> Durability:
        """What is wanted, or the config's; none where nothing outlives the server, which is a ``Conflict`` when more is
        wanted."""
        if self._backend.keeper.persistent:
            return wanted or self._backend.settings.state.durability
        if wanted is not None and wanted.mode != "none":
            raise Conflict(f"durability {wanted.mode!r} needs a place to store streams, and state.folder is null")
        return NOT_STORED

    def _random_key(self, id: str) -> int:
        return rng.stream_key(id, self._backend.settings.server.seed)

    def _enter(self, stream: Stream) -> None:
        self._streams[stream.id] = _Open(stream, next(self._places))

    def _touch(self, stream: Stream) -> None:
        """Has a change saved that is none of its state."""
        store = self._backend.engine.store
        ignore(self._backend.dispatcher.command(stream, lambda: store.touch(stream)))

    def _forget(self, stream: Stream, kind: str = "closed") -> Awaitable[None]:
        """Forgets a stream now; to be awaited for the end of it in the store."""
        lane, engine, dispatcher = stream.lane, self._backend.engine, self._backend.dispatcher
        removed, done = dispatcher.promise()
        dropped = dispatcher.command(stream, lambda: engine.drop(lane, stream, done))
        self._unusable.pop(stream.id, None)
        self._streams.pop(stream.id, None)
        self.feedback.forget(stream.id)
        self._backend.tell_of(kind, stream)

        async def forgotten() -> None:
            await dropped
            await removed

        return forgotten()


def check_input(model: SourceModel, x: Tensor, max_rows: int) -> None:
    """Raises ``BadInput`` unless ``x`` is 1 to ``max_rows`` rows of the model's input, finite and in its range."""
    spec = model.settings.input
    if tuple(x.shape[1:]) != spec.shape or x.dim() == 0:
        raise BadInput(f"inputs must be [rows, {', '.join(map(str, spec.shape))}], got {list(x.shape)}")
    if not 1 <= len(x) <= max_rows:
        raise BadInput(f"a request holds 1 to {max_rows} rows (limits.rows_per_request), got {len(x)}")
    values = x.numpy()  # not torch: see ``engine/threads.py``
    low, high = float(values.min()), float(values.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        row = int(np.isfinite(values.reshape(len(values), -1)).all(1).argmin())
        raise BadInput(f"inputs must be finite, but row {row} holds NaN or infinity; the stream was left as it was")
    if spec.range is not None:
        slack = 1e-3 * (spec.range[1] - spec.range[0])
        if low < spec.range[0] - slack or high > spec.range[1] + slack:
            raise BadInput(
                f"inputs must lie in [{spec.range[0]:g}, {spec.range[1]:g}] before normalisation, which the model "
                f"does itself; got values from {low:g} to {high:g}"
            )


def _make_policy(source: SourceModel, name: str, settings: Mapping[str, Any] | None) -> Policy:
    return make_policy(name, {**starting_settings(name, source.settings), **(settings or {})})


def _check_id(id: str) -> None:
    if not STREAM_ID.fullmatch(id):
        raise BadInput(f"a stream id has 1 to 128 of A-Z a-z 0-9 . _ : -, got {id[:150]!r}")


def _stored(answer: Answer, limit: int) -> Answer | None:
    """A copy to keep, which pins nobody else's rows; ``None`` when its scores are over ``limit`` bytes."""
    if answer.logits.nbytes > limit:
        return None
    own = {name: getattr(answer, name).clone() for name in ("logits", "entropy", "confidence", "margin")}
    return replace(answer, **own)
