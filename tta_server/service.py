"""The async facade: open, predict, reset, close; what a request must be, request numbers. No HTTP in here.

Runs on the event loop; the work goes to the device thread through ``dispatch``.
"""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from adapters import Policy, rng
from adapters.source import SourcePolicy
from tta_server.dispatch import Dispatcher, Flight
from tta_server.engine.engine import initial_state
from tta_server.engine.report import STEP_FAILS
from tta_server.engine.source import SourceModel
from tta_server.errors import BadInput, Conflict, QueueFull, UnknownName
from tta_server.metrics import Levels
from tta_server.policies import make_policy, settings_of, starting_settings
from tta_server.runner import Runner
from tta_server.settings import NAME, Settings, type_and_line
from tta_server.state.slots import Layout
from tta_server.types import Answer, Lane, Stream

STREAM_ID = re.compile(NAME)


@dataclass(eq=False)
class _Open:
    """An open stream with its numbered requests."""

    stream: Stream
    last_number: int | None = None
    last_answer: Answer | None = None
    flights: dict[int, Flight] = field(default_factory=dict)


class Service:
    """Streams and predictions over one runner. All methods are for the event loop's thread."""

    def __init__(self, settings: Settings, models: Mapping[str, SourceModel], runner: Runner) -> None:
        self.settings, self.models, self._runner = settings, models, runner
        self._dispatcher = Dispatcher(runner, settings.limits.queue_seconds)
        self._streams: dict[str, _Open] = {}
        self._source_policy = SourcePolicy()
        self.draining = False
        self._drained: asyncio.Task[int] | None = None

    # Streams

    def open(
        self,
        id: str,
        model: str | None = None,
        policy: str | None = None,
        settings: Mapping[str, Any] | None = None,
        adapt: bool | None = None,
        replace: bool = False,
    ) -> tuple[Stream, bool]:
        """Creates the stream ``id``, or confirms one that is the same; with ``replace``, starts it afresh in any case.

        Returns the stream and whether it is new.

        What is left out is as it is on a stream that exists. On a new one, ``model`` is the only one there is,
        ``policy`` the model's own, ``adapt`` on, and ``settings`` go over the model's preset for the policy, that over
        the policy's defaults. Raises ``BadInput`` for what does not fit, ``UnknownName``, ``Conflict`` when the stream
        exists otherwise or the policy cannot run on the model, and ``QueueFull`` beyond the limit on streams.
        """
        _check_id(id)
        existing = self._streams.get(id)
        if existing is not None and not replace:
            self._confirm(existing.stream, model, policy, settings)
            if adapt is not None:
                existing.stream.adapt = adapt
            return existing.stream, False
        source = self.model(model)
        made = self._make_policy(source, policy or source.settings.policy, settings)
        self._check_runs(source, made)
        if existing is None and len(self._streams) >= self.settings.limits.streams:
            raise QueueFull(
                f"{len(self._streams)} streams are open; the limit is limits.streams = {self.settings.limits.streams}. "
                "Delete streams that are done"
            )
        stream = Stream(
            id=id,
            model=source.name,
            policy=made,
            random_key=rng.stream_key(id, self.settings.server.seed),
            created=time.time(),
            adapt=adapt is not False,
        )
        if existing is not None:
            # Nobody waits for it; a shutdown that gives it up is not worth a complaint.
            self._drop(existing.stream).add_done_callback(lambda dropped: dropped.cancelled() or dropped.exception())
        self._streams[id] = _Open(stream)
        return stream, True

    def is_open(self, id: str) -> bool:
        """Whether there is a stream ``id``."""
        return id in self._streams

    def stream(self, id: str) -> Stream:
        """The open stream ``id``. Raises ``UnknownName``."""
        return self._open(id).stream

    def streams(self) -> list[Stream]:
        """All open streams, in order of creation."""
        return [one.stream for one in self._streams.values()]

    def signals(self, stream: Stream) -> dict[str, float]:
        """The moving averages of a stream's signals, see ``drift/monitor.py``."""
        return self._runner.engine.monitor.read(stream)

    def state_bytes(self, stream: Stream) -> int | None:
        """Size of the stream's state; ``None`` before its policy's first request on the model."""
        return self._runner.engine.store.state_bytes(Lane(stream.model, stream.policy))

    def tier(self, stream: Stream) -> str:
        """Where the stream's state is now: ``device``, ``host`` or ``none``."""
        return self._runner.engine.store.tier(Lane(stream.model, stream.policy), stream)

    async def reset(self, id: str) -> Stream:
        """Takes a stream back to the source once its requests so far are done; its request numbers go on."""
        stream = self._open(id).stream
        await self._dispatcher.command(stream, lambda: self._runner.engine.reset(stream))
        return stream

    async def close(self, id: str, only: Stream | None = None) -> None:
        """Forgets a stream. Its id is free at once; requests it still has under way are finished first.

        With ``only``, does nothing when the id belongs to another stream by now, or to none.
        """
        if only is not None and (id not in self._streams or self._streams[id].stream is not only):
            return
        stream = self._open(id).stream
        dropped = self._drop(stream)
        del self._streams[id]
        await dropped

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
    ) -> tuple[Answer, bool]:
        """Scores for ``x [N, ...]``; returns them and whether they are the stored answer to a repeated number.

        Without a ``stream`` the plain source model answers. ``adapt`` overrides the stream's toggle for this request:
        without adaptation the source model answers and the stream's state rests. ``number`` is the request number: a
        repeated one gets the first one's answer and never adapts twice, one older than the last is a ``Conflict``.
        ``timeout`` (seconds) may shorten the longest wait in the queue.
        """
        source = self.model(model)
        self.check_input(source, x)
        if stream is None:
            if number is not None:
                raise BadInput("a request number needs a stream to be counted in")
            anonymous = Stream("", source.name, self._source_policy, 0, 0.0)
            flight = self._dispatcher.launch(anonymous, Lane(source.name, self._source_policy), x, timeout)
            return await flight.wait(), False
        opened = self._open(stream)
        if opened.stream.model != source.name and model is not None:
            raise Conflict(f"stream {stream!r} belongs to model {opened.stream.model!r}, not to {source.name!r}")
        if number is not None:
            if number == opened.last_number:
                if opened.last_answer is None:
                    raise Conflict(
                        f"request number {number} of stream {stream!r} was answered already, and its answer was too "
                        "large to keep (limits.stored_answer_bytes)"
                    )
                return opened.last_answer, True
            if number in opened.flights:
                return await opened.flights[number].wait(), True
            newest = max([*opened.flights, -1 if opened.last_number is None else opened.last_number])
            if number < newest:
                raise Conflict(f"request number {number} of stream {stream!r} is out of order: {newest} came before")
        opened.stream.last_seen = time.time()
        wanted = opened.stream.adapt if adapt is None else adapt
        lane = Lane(source.name, opened.stream.policy if wanted else self._source_policy)

        def keep(answer: Answer | None) -> None:
            if number is not None:
                del opened.flights[number]
                if answer is not None:
                    opened.last_number = number
                    opened.last_answer = _stored(answer, self.settings.limits.stored_answer_bytes)

        flight = self._dispatcher.launch(opened.stream, lane, x, timeout, keep)
        if number is not None:
            opened.flights[number] = flight
        return await flight.wait(), False

    def check_input(self, model: SourceModel, x: Tensor) -> None:
        """Raises ``BadInput`` unless ``x`` is rows of the model's input shape, finite and in its value range."""
        spec, max_rows = model.settings.input, self.settings.limits.rows_per_request
        if tuple(x.shape[1:]) != spec.shape or x.dim() == 0:
            raise BadInput(f"inputs must be [rows, {', '.join(map(str, spec.shape))}], got {list(x.shape)}")
        if not 1 <= len(x) <= max_rows:
            raise BadInput(f"a request holds 1 to {max_rows} rows (limits.rows_per_request), got {len(x)}")
        low, high = (value.item() for value in torch.aminmax(x))
        if not (math.isfinite(low) and math.isfinite(high)):
            row = int((~x.flatten(1).isfinite().all(1)).nonzero()[0])
            raise BadInput(f"inputs must be finite, but row {row} holds NaN or infinity; the stream was left as it was")
        if spec.range is not None:
            slack = 1e-3 * (spec.range[1] - spec.range[0])
            if low < spec.range[0] - slack or high > spec.range[1] + slack:
                raise BadInput(
                    f"inputs must lie in [{spec.range[0]:g}, {spec.range[1]:g}] before normalisation, which the model "
                    f"does itself; got values from {low:g} to {high:g}"
                )

    def check_room(self) -> None:
        """Raises ``QueueFull`` when no request could be queued now. True until the next await: only the loop queues."""
        waiting, limit = self._runner.waiting, self.settings.limits.queue
        if waiting >= limit:
            raise QueueFull(f"{waiting} requests wait already; the limit is limits.queue = {limit}")

    # The rest

    def model(self, name: str | None) -> SourceModel:
        """The model of that name, or the only one. Raises ``UnknownName``."""
        if name is None and len(self.models) == 1:
            return next(iter(self.models.values()))
        if name is None or name not in self.models:
            asked = "name one" if name is None else f"no model {name!r}"
            raise UnknownName(f"{asked}; there are: {', '.join(sorted(self.models))}")
        return self.models[name]

    def levels(self) -> Levels:
        """What the metrics read at every scrape."""
        store = self._runner.engine.store
        kinds = Counter((one.model, one.policy.name, one.adapt) for one in self.streams())
        return Levels(
            waiting=self._runner.waiting,
            streams=dict(kinds),
            states=store.counts(),
            evictions=store.evictions,
            digests={name: model.digest for name, model in self.models.items()},
        )

    async def drain(self) -> int:
        """Stops admitting, finishes what waits within ``limits.drain_seconds``; returns how many were given up."""
        self.draining = True
        if self._drained is None:
            drain = asyncio.to_thread(self._runner.drain, self.settings.limits.drain_seconds)
            self._drained = asyncio.create_task(drain)
        return await self._drained

    @staticmethod
    def _make_policy(source: SourceModel, name: str, settings: Mapping[str, Any] | None) -> Policy:
        return make_policy(name, {**starting_settings(name, source.settings), **(settings or {})})

    def _check_runs(self, source: SourceModel, policy: Policy) -> None:
        """Raises ``Conflict`` when the policy cannot run on the model.

        The preset was tried at the start. Other settings may do where it does not, unless the step itself fails.
        """
        reason: str | None = source.reports.get(policy.name, {}).get("reason")
        tried = policy.name in source.reports and policy == self._make_policy(source, policy.name, None)
        size = source.reports.get(policy.name, {}).get("bytes_per_stream", 0)
        if not tried and (reason is None or not reason.startswith(STEP_FAILS)):
            reason = None
            try:
                size = Layout(initial_state(policy, source)).bytes
            except (ValueError, RuntimeError) as error:  # torch raises the latter for what does not fit into memory
                reason = type_and_line(error) if isinstance(error, RuntimeError) else str(error)
        limit = self.settings.limits.state_bytes
        if reason is None and size > limit:
            reason = f"a stream's state would be {size:,} bytes, over the limit limits.state_bytes = {limit:,}"
        if reason is not None:
            raise Conflict(f"policy {policy.name!r} cannot run on model {source.name!r}: {reason}")

    def _confirm(
        self, stream: Stream, model: str | None, policy: str | None, settings: Mapping[str, Any] | None
    ) -> None:
        """Raises ``Conflict`` unless what is asked for is what the stream is."""
        if model is not None and self.model(model).name != stream.model:
            raise Conflict(f"stream {stream.id!r} belongs to model {stream.model!r}, not to {model!r}")
        if policy is None and settings is None:
            return
        made = self._make_policy(self.models[stream.model], policy or stream.policy.name, settings)
        if made.name != stream.policy.name or (settings is not None and made != stream.policy):
            raise Conflict(
                f"stream {stream.id!r} runs policy {stream.policy.name!r} {settings_of(stream.policy)}, asked for was "
                f"{made.name!r} {settings_of(made)}; delete it first, or use another id"
            )

    def _open(self, id: str) -> _Open:
        _check_id(id)
        if id not in self._streams:
            raise UnknownName(f"no stream {id!r}; create it with PUT /v1/streams/<id>")
        return self._streams[id]

    def _drop(self, stream: Stream) -> asyncio.Future[None]:
        return self._dispatcher.command(stream, lambda: self._runner.engine.drop(stream))


def _check_id(id: str) -> None:
    if not STREAM_ID.fullmatch(id):
        raise BadInput(f"a stream id has 1 to 128 of A-Z a-z 0-9 . _ : -, got {id[:150]!r}")


def _stored(answer: Answer, limit: int) -> Answer | None:
    """A copy to keep, which pins nobody else's rows; ``None`` when its scores are over ``limit`` bytes."""
    if answer.logits.nbytes > limit:
        return None
    own = {name: getattr(answer, name).clone() for name in ("logits", "entropy", "confidence")}
    return replace(answer, **own)
