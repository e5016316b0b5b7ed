"""Which stream's state is where. Used by the device thread alone.

Three tiers: device slots, host memory for the streams that were used longest ago, and the disk for those of them that
host memory has no room for, or that nobody asked for in a while. A state leaves memory only when the store has it. A
stream that never committed a step has no state of its own: it starts from its lane's initial one.

The second thing this does is to have changes saved in time (:meth:`StateStore.save_due`), see ``settings.Durability``.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adapters.base import State
from tta_server.errors import Conflict
from tta_server.state.keeper import Done, Keeper
from tta_server.state.memory import Budget
from tta_server.state.records import Field, Found, Record
from tta_server.state.slots import HostRows, Layout, Packed, SlotPool
from tta_server.types import Event, Lane, Stream

log = logging.getLogger(__name__)

LOOK = 64
"""How many of the streams used longest ago are looked at for one that can leave memory."""
OVERDRAFT = 1.25
"""By this factor states may be over the host memory's budget before steps wait for the disk."""
IDLE_CHECK = 1.0
"""Seconds between two looks for streams that nobody asks for."""


@dataclass(frozen=True)
class Lease:
    """Slots pinned for one step: ``slots[i]`` belongs to ``streams[i]`` and will not be evicted before the release."""

    lane: Lane
    streams: list[Stream]
    slots: list[int]
    packed: Packed
    """The states as they were at the start, ``[S, width]``."""
    pinned: list[Stream]
    """The streams that were not pinned before."""


@dataclass(frozen=True)
class Commit:
    """What became of a step's states. ``results``: ``applied``, or ``rejected_nonfinite``, ``rejected_update``,
    ``rejected_distance``; ``update`` and ``distance``, NaN for what was not kept and for states without weights: the
    norms of a step's change of the weights, and of all change since the initial state, over that of the initial ones.
    """

    results: list[str]
    update: list[float]
    distance: list[float]

    @property
    def kept(self) -> list[bool]:
        """Whose were kept."""
        return [result == "applied" for result in self.results]


class _LaneStates:
    """One lane's pool and the places of its streams' states."""

    def __init__(self, initial: State, pool: Callable[[Layout], SlotPool]) -> None:
        self.layout = Layout(initial)
        self.start_from(initial)
        self.pool = pool(self.layout)
        self.resident: dict[Stream, int] = {}
        """Slots by stream."""
        self.host: dict[Stream, int] = {}
        """Places in ``rows`` by stream."""
        self.rows = HostRows(self.layout)
        self.fresh: set[Stream] = set()
        """Of the resident: those that have the initial state still, which need not be kept when evicted."""
        self.leased: set[Stream] = set()

    def start_from(self, initial: State) -> None:
        """What new streams start from; ``size`` is the norm of its weights, ``[1]``."""
        packed = self.layout.pack(initial)
        self.initial = {dtype: rows[0] for dtype, rows in packed.items()}
        has_weights = any(width and dtype.is_floating_point for dtype, width in self.layout.weights.items())
        self.size = _norm(self, packed, None) if has_weights else None


class StateStore:
    """Leases, commits and moves stream states. All states of a lane have one layout, that of its initial state."""

    def __init__(
        self,
        budget: Budget,
        device: torch.device,
        keeper: Keeper | None = None,
        idle_seconds: float = math.inf,
        tell: Callable[[Event], None] = lambda event: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Without a ``keeper`` nothing is saved, and nothing leaves memory."""
        self.budget, self._device, self._keeper, self._tell, self._clock = budget, device, keeper, tell, clock
        self._idle_seconds = idle_seconds
        self._lanes: dict[Lane, _LaneStates] = {}
        self._homes: dict[Stream, Lane] = {}
        """The lane of each stream that was met. A change of the stream's own lane may be under way."""
        self._on_device: OrderedDict[Stream, float] = OrderedDict()
        """When it was used last, by stream, the one used longest ago first."""
        self._in_host: OrderedDict[Stream, float] = OrderedDict()
        """Likewise."""
        self._device_bytes = self._host_bytes = 0
        self._due_now: dict[Stream, None] = {}
        self._due_later: list[tuple[float, int, Stream]] = []
        self._timed: set[Stream] = set()
        """Those that ``_due_later`` has a timer for."""
        self._since: dict[Stream, float] = {}
        """When the oldest change that was not handed over came."""
        self._order = itertools.count()
        self._looked_for_idle = 0.0
        self._read_ahead = False
        self.evictions = 0
        """From the device."""
        self.page_outs = 0
        """From host memory."""

    # Lanes

    def add_lane(self, lane: Lane, initial: State) -> None:
        """Makes room for a lane whose new streams start from ``initial`` (``S = 1``). Does nothing for one it has."""
        if lane not in self._lanes:
            self._lanes[lane] = _LaneStates(initial, self._new_pool)

    def lanes(self) -> list[Lane]:
        """The lanes that have room."""
        return list(self._lanes)

    def renew(self, lane: Lane, initial: State) -> None:
        """Has new streams, and those that never committed a step, start from ``initial``, if its layout is the same."""
        states = self._lanes[lane]
        if states.layout.fits(Layout(initial)):
            states.start_from(initial)
            for stream in list(states.fresh):
                self._leave_device(states, stream)

    def has_lane(self, lane: Lane) -> bool:
        """Whether :meth:`add_lane` was called since the lane's last state was dropped."""
        return lane in self._lanes

    def has_state(self, lane: Lane) -> bool:
        """Whether streams of this lane keep anything at all between steps."""
        return bool(self._lanes[lane].layout.width)

    # Steps

    def lease(self, lane: Lane, streams: Sequence[Stream]) -> tuple[Lease, State]:
        """Pins a slot for each stream and returns a copy of their states, ``[S, ...]``.

        Streams not on the device are brought there, those used longest ago making room. At most as many streams as
        there are slots. Ends with :meth:`release`. Raises ``StoreFailed`` for a state that cannot be read, and
        ``Conflict`` for one that does not fit.
        """
        states = self._lanes[lane]
        pinned = [stream for stream in streams if stream not in states.leased]
        states.leased.update(pinned)
        try:
            slots = [self._resident_slot(lane, states, stream) for stream in streams]
            packed = states.pool.gather(slots)
            state = states.layout.unpack(packed)
        except BaseException:
            states.leased.difference_update(pinned)
            raise
        return Lease(lane, list(streams), slots, packed, pinned), state

    def state_of(self, lease: Lease) -> State:
        """A copy of the leased states, ``[S, ...]``, again."""
        return self._lanes[lease.lane].layout.unpack(lease.packed)

    def part(self, lease: Lease, index: int) -> tuple[Lease, State]:
        """One stream's part of a lease, and a copy of its state, ``S = 1``. Ends with the whole lease."""
        slots = lease.slots[index : index + 1]
        states = self._lanes[lease.lane]
        packed = states.pool.gather(slots)
        return Lease(lease.lane, lease.streams[index : index + 1], slots, packed, []), states.layout.unpack(packed)

    def commit(
        self, lease: Lease, new: State, allowed: Sequence[bool], regions: Sequence[tuple[float, float]] | None = None
    ) -> Commit:
        """Keeps the new states ``[S, ...]`` that are ``allowed``, finite throughout and within the ``regions`` (the
        longest step and distance, as in :class:`Commit`), each as the next version.

        The others stay as they were, bit for bit. Raises ``ValueError`` for a state of another
        layout, with nothing changed.
        """
        states = self._lanes[lease.lane]
        packed = states.layout.pack(new)
        sound = torch.tensor(allowed, device=self._device)
        for rows in packed.values():
            if rows.dtype.is_floating_point:
                sound &= (rows * 0).sum(1) == 0  # all finite, ten times as fast as to ask each
        results = ["applied" if keep else "rejected_nonfinite" for keep in sound.tolist()]
        update, distance = ([math.nan] * len(results) for _ in range(2))
        if states.size is not None:
            steps, reached = (
                (norm / states.size).tolist()
                for norm in (_norm(states, packed, lease.packed), _norm(states, packed, states.initial))
            )
            for index, (longest, farthest) in enumerate(regions or [(math.inf, math.inf)] * len(results)):
                if results[index] == "applied" and steps[index] > longest:
                    results[index] = "rejected_update"
                elif results[index] == "applied" and reached[index] > farthest:
                    results[index] = "rejected_distance"
                if results[index] == "applied":
                    update[index], distance[index] = steps[index], reached[index]
        accepted = [index for index, result in enumerate(results) if result == "applied"]
        # Nothing that may fail comes after this.
        if accepted:
            states.pool.scatter(lease.slots, packed, accepted)
            for index in accepted:
                stream = lease.streams[index]
                stream.version += 1
                self._state_changed(stream)
            states.fresh.difference_update(lease.streams[index] for index in accepted)
        return Commit(results, update, distance)

    def release(self, lease: Lease) -> None:
        """Ends a lease."""
        self._lanes[lease.lane].leased.difference_update(lease.pinned)

    def prefetch(self, streams: Iterable[Stream], now: Collection[Stream]) -> None:
        """Has the states of these streams, the next step's, read ahead where they are on the disk, while that of the
        streams ``now`` runs."""
        if self._keeper is not None:
            cold = [stream for stream in streams if stream.version and not self._in_memory(stream)]
            if cold or self._read_ahead:
                self._keeper.prefetch(cold, now)
            self._read_ahead = bool(cold)

    # Single streams

    def reset(self, lane: Lane, stream: Stream) -> None:
        """Back to the initial state and version 0, as a new stream."""
        if lane in self._lanes:
            self._forget(self._lanes[lane], stream)
        self._homes[stream] = lane
        stream.version = 0
        self._state_changed(stream)

    def drop(self, lane: Lane, stream: Stream) -> None:
        """Forgets a stream's state in memory, and with a lane's last state the lane and its pool. It must not be
        leased."""
        states = self._lanes.get(lane)
        if states is not None:
            self._forget(states, stream)
            if not states.resident and not states.host:
                del self._lanes[lane]
        self._homes.pop(stream, None)
        self._timed.discard(stream)
        self._since.pop(stream, None)
        self._due_now.pop(stream, None)

    def remove(self, lane: Lane, stream: Stream, done: Done = lambda error: None) -> None:
        """Forgets a stream, in the store too; ``done`` is told when that is done."""
        stream.removed = True
        self.drop(lane, stream)
        if self._keeper is None:
            done(None)
        else:
            self._keeper.remove(stream, done)

    def move(self, old: Lane, new: Lane, stream: Stream) -> bool:
        """Takes a stream's state from one lane to another, if their layouts are equal; its version stays.

        Returns whether they are; else nothing changed.
        """
        if not self._lanes[old].layout.fits(self._lanes[new].layout):
            return False
        state = None
        if self._in_memory(stream) and stream not in self._lanes[old].fresh:
            state = self.export(old, stream)
        self.drop(old, stream)
        self._homes[stream] = new
        if state is not None:
            self._put(new, stream, state)
        self.touch(stream)
        return True

    def export(self, lane: Lane, stream: Stream) -> State:
        """A copy of the stream's whole state in host memory, ``S = 1``. Raises as :meth:`lease` does."""
        states = self._lanes[lane]
        return states.layout.unpack({dtype: rows.unsqueeze(0) for dtype, rows in self._row(lane, stream).items()})

    def dump(self, lane: Lane, stream: Stream) -> tuple[tuple[Field, ...], bytes]:
        """The stream's tensors and their bytes, the initial state's where it has none of its own. Raises as
        :meth:`lease` does."""
        layout = self._lanes[lane].layout
        return layout.fields, layout.dump(self._row(lane, stream))

    def restore(self, lane: Lane, stream: Stream, state: State | bytes, version: int) -> None:
        """Gives the stream a state (``S = 1``, or as :meth:`dump` gives its bytes) and version. Raises ``ValueError``
        where it does not fit."""
        self._put(lane, stream, state)
        self._homes[stream] = lane
        stream.version = version
        self._state_changed(stream)

    def restore_dump(self, lane: Lane, stream: Stream, fields: tuple[Field, ...], data: bytes, version: int) -> None:
        """The same from :meth:`dump`'s tensors. Raises ``Conflict`` where they are not the lane's."""
        layout = self._lanes[lane].layout
        if fields != layout.fields or len(data) != layout.bytes:
            raise Conflict(
                f"the state does not fit policy {lane.policy.name!r} on model {lane.model!r}: "
                f"{_difference(fields, layout.fields)}"
            )
        if version:
            self.restore(lane, stream, data, version)
        else:
            self.reset(lane, stream)

    def adopt(self, stream: Stream, found: Found) -> None:
        """Knows a stream that is in the store, and nowhere else yet."""
        assert self._keeper is not None
        self._keeper.adopt(stream, found)
        self._homes[stream] = stream.lane

    # Saving

    def told(self, stream: Stream) -> None:
        """An answer tells of the stream's losses: a later one does not."""
        stream.lost = 0
        if self._keeper is not None:
            self._keeper.note(stream)

    def meet(self, stream: Stream) -> None:
        """Has a stream that was not here before saved soon."""
        if stream.removed:
            return
        if stream not in self._homes and self._keeper is not None and stream.durability.mode != "none":
            self._homes[stream] = stream.lane
            self._due_now[stream] = None  # from then on it is known how many steps a crash costs it

    def touch(self, stream: Stream) -> None:
        """Something of the stream was changed, but not its state."""
        if stream.removed:
            return
        self._homes.setdefault(stream, stream.lane)
        stream.revision += 1
        self._schedule(stream)
        if self._keeper is not None and stream.durability.mode == "none" and self._keeper.handed(stream)[0]:
            self.save(stream)  # not to be stored any more: as it was stored before, it is not to come back

    def save(self, stream: Stream, marks: Iterable[str] = (), done: Done | None = None) -> None:
        """Has a stream saved now, its state under these names; ``done`` is told when it is."""
        if stream.removed:
            if done is not None:
                done(None)
            return
        self._homes.setdefault(stream, stream.lane)
        self._hand_over([stream], marks, done)

    def save_due(self) -> None:
        """Hands over what is to be saved by now."""
        now = self._clock()
        while self._due_later and self._due_later[0][0] <= now:
            stream = heapq.heappop(self._due_later)[2]
            if stream in self._timed:
                self._timed.discard(stream)
                self._time(stream)
        if self._due_now and self._keeper is not None:
            due, self._due_now = self._due_now, {}
            keeper = self._keeper
            self._hand_over_each([stream for stream in due if keeper.handed(stream)[0] < stream.revision])

    def save_all(self) -> int:
        """Hands over everything that is not saved, for a shutdown; returns how many streams that were."""
        keeper = self._keeper
        if keeper is None:
            return 0
        unsaved = [
            stream
            for stream in self._homes
            if stream.durability.mode != "none"
            and (keeper.handed(stream)[0] < stream.revision or stream.saved.requests != stream.requests)
        ]
        self._hand_over_each(unsaved)
        return len(unsaved)

    def secure(self, stream: Stream) -> None:
        """Before an answer: hands over what that will have to wait for, see :meth:`hold`."""
        keeper, bound = self._keeper, stream.durability.bound
        if keeper is not None and bound < math.inf and stream.revision - bound > keeper.handed(stream)[0]:
            self.save(stream)

    def hold(self, stream: Stream, release: Done) -> None:
        """Calls ``release`` when enough of the stream is saved for an answer by its present state to leave."""
        keeper, bound = self._keeper, stream.durability.bound
        if keeper is None or bound == math.inf:
            release(None)
            return
        keeper.hold(stream, stream.revision - int(bound), release)

    def maintain(self) -> float:
        """Does what is due with time: saves, and takes idle streams out of memory. Returns when to call it again, in
        seconds from now."""
        now = self._clock()
        self.save_due()
        if self._keeper is None or not self._keeper.persistent:
            return math.inf
        if now - self._looked_for_idle >= IDLE_CHECK:
            self._looked_for_idle = now
            self._keeper.check_stall()
            self._evict_idle(now)
        return min(IDLE_CHECK, self._due_later[0][0] - now if self._due_later else math.inf)

    # What is read from elsewhere

    def counts(self) -> dict[str, tuple[int, int]]:
        """Streams with a state and their bytes, by tier: ``{"device": (streams, bytes), "host": ..., "disk": ...}``."""
        # Copies: the scrape comes from another thread.
        lanes, homes = list(self._lanes.values()), list(self._homes)
        device = [(len(lane.resident), lane.layout.bytes) for lane in lanes]
        host = [(len(lane.host), lane.layout.bytes) for lane in lanes]
        disk = [(1, stream.state_bytes) for stream in homes if self._is_on_disk(stream)]
        return {
            tier: (sum(n for n, _ in sizes), sum(n * size for n, size in sizes))
            for tier, sizes in (("device", device), ("host", host), ("disk", disk))
        }

    def tier(self, lane: Lane, stream: Stream) -> str:
        """Where the stream's state is: ``device``, ``host``, ``disk``, or ``none`` while it has none of its own."""
        states = self._lanes.get(lane)
        if states is not None and stream in states.resident:
            return "device"
        if states is not None and stream in states.host:
            return "host"
        return "disk" if self._is_on_disk(stream) else "none"

    def check_integrity(self) -> None:
        """Raises ``AssertionError`` where the books do not add up. For tests and for idle time."""
        lanes = self._lanes.values()
        on_device = sum(len(states.resident) for states in lanes)
        in_host = sum(len(states.host) for states in lanes)
        assert len(self._on_device) == on_device <= self.budget.slots, f"{on_device} states of {self.budget.slots}"
        assert len(self._in_host) == in_host, f"{in_host} states in host memory, {len(self._in_host)} known"
        sizes = [(states.layout.bytes, len(states.resident), len(states.host)) for states in lanes]
        assert self._device_bytes == sum(size * device for size, device, _ in sizes), "bytes on the device"
        assert self._host_bytes == sum(size * host for size, _, host in sizes), "bytes in host memory"
        for lane, states in self._lanes.items():
            slots = list(states.resident.values())
            assert len(set(slots)) == len(slots), f"{lane}: two streams share a slot"
            assert states.pool.used == len(slots), f"{lane}: {states.pool.used} slots taken for {len(slots)} streams"
            assert not states.resident.keys() & states.host.keys(), f"{lane}: a stream is in two tiers"
            assert states.fresh <= states.resident.keys(), f"{lane}: a stream without a slot counts as fresh"
            assert states.leased <= states.resident.keys(), f"{lane}: a leased stream has no slot"
            homes = [self._homes.get(stream) for stream in (*states.resident, *states.host)]
            assert homes == [lane] * len(homes), f"{lane}: a stream's state is not at home"
        if self._keeper is not None:
            for stream in self._homes:
                is_safe = self._in_memory(stream) or not stream.version
                assert is_safe or stream.saved.state_revision == stream.state_revision, f"{stream.id!r} is nowhere"

    # How

    def _in_memory(self, stream: Stream) -> bool:
        return stream in self._on_device or stream in self._in_host

    def _is_on_disk(self, stream: Stream) -> bool:
        return stream.version > 0 and stream in self._homes and not self._in_memory(stream)

    def _state_changed(self, stream: Stream) -> None:
        stream.revision += 1
        stream.state_revision = stream.revision
        self._schedule(stream)

    def _schedule(self, stream: Stream) -> None:
        keeper = self._keeper
        if keeper is None or stream.durability.mode == "none":
            return
        keeper.note(stream)
        if stream.revision - keeper.handed(stream)[0] >= stream.durability.due:
            self._due_now[stream] = None
        else:
            self._since.setdefault(stream, self._clock())
            self._time(stream)

    def _time(self, stream: Stream) -> None:
        """Makes a stream due when its oldest change is old enough. There is one timer for each."""
        since = self._since.get(stream)
        if since is None or stream in self._timed:
            return
        due = since + stream.durability.seconds
        if due <= self._clock():
            self._due_now[stream] = None
        else:
            self._timed.add(stream)
            heapq.heappush(self._due_later, (due, next(self._order), stream))

    def _hand_over_each(self, streams: Sequence[Stream]) -> None:
        """Hands over together; where that fails, one by one: a stream that cannot be must not keep others from it."""
        try:
            self._hand_over(streams)
        except Exception:
            if len(streams) > 1:
                for stream in streams:
                    self._hand_over_each([stream])
                return
            log.exception("a stream cannot be saved", extra={"stream": streams[0].id})
            self._due_now[streams[0]] = None  # for the next time

    def _hand_over(self, streams: Sequence[Stream], marks: Iterable[str] = (), done: Done | None = None) -> None:
        keeper, packed = self._keeper, dict[Stream, tuple[Layout, Packed]]()
        if keeper is None:
            return
        by_lane: dict[Lane, list[Stream]] = {}
        for stream in streams:
            self._since.pop(stream, None)
            if keeper.handed(stream)[1] < stream.state_revision and stream in self._on_device:
                by_lane.setdefault(self._homes[stream], []).append(stream)
        for lane, group in by_lane.items():  # one copy from the device for all of a lane
            states = self._lanes[lane]
            rows = {
                dtype: values.cpu()
                for dtype, values in states.pool.gather([states.resident[stream] for stream in group]).items()
            }
            for index, stream in enumerate(group):
                packed[stream] = states.layout, {dtype: values[index] for dtype, values in rows.items()}
        for stream in streams:
            lane = self._homes[stream]
            record = Record.of(stream, lane.policy, lane.digest)
            state: tuple[tuple[Field, ...], bytes | None] | None = None
            if keeper.handed(stream)[1] < stream.state_revision:
                if stream in self._in_host:
                    states = self._lanes[lane]
                    packed[stream] = states.layout, states.rows.read(states.host[stream])
                if stream.version and stream in packed:
                    layout, row = packed[stream]
                    state = layout.fields, layout.dump(row)
                else:
                    state = (), None
            keeper.save(stream, record, state, marks, done)

    def _row(self, lane: Lane, stream: Stream) -> Packed:
        """A copy of the stream's row, in host memory."""
        states = self._lanes[lane]
        slot, place = states.resident.get(stream), states.host.get(stream)
        row = states.initial
        if slot is not None:
            row = states.pool.read(slot)
        elif place is not None:
            row = states.rows.read(place)
        elif stream.version:
            found = self._fetch(lane, stream)
            row = states.initial if found is None else found
        return {dtype: values.to("cpu", copy=True) for dtype, values in row.items()}

    def _put(self, lane: Lane, stream: Stream, state: State | bytes) -> None:
        """Puts a state into host memory."""
        states = self._lanes[lane]
        assert stream not in states.leased, f"stream {stream.id!r} is in a running step"
        if isinstance(state, State):
            row = {dtype: rows[0] for dtype, rows in states.layout.pack(state).items()}
        else:
            row = states.layout.load(state)
        place = states.rows.put(row)
        self._forget(states, stream)
        self._know_in_host(states, stream, place, self._clock())

    def _fetch(self, lane: Lane, stream: Stream) -> Packed | None:
        """The stream's row from the disk; ``None`` for the initial state."""
        assert self._keeper is not None
        layout = self._lanes[lane].layout
        stored, damage = self._keeper.fetch(stream)
        row = None
        if stored is not None and stored.data is not None:
            if stored.fields != layout.fields:
                raise Conflict(
                    f"the stored state of stream {stream.id!r} does not fit policy {lane.policy.name!r} of this "
                    f"release: {_difference(stored.fields, layout.fields)}; reset the stream, or roll it back"
                )
            row = layout.load(stored.data)
        if damage:
            version = 0 if stored is None else stored.record.version
            self._tell(Event("damaged", stream, {"reason": damage, "version": stream.version, "went_back_to": version}))
            stream.lost += max(1, stream.version - version)
            stream.version = version
            if row is not None:
                self._keep_in_host(self._lanes[lane], stream, row, self._clock())
            self._state_changed(stream)
        return row

    def _resident_slot(self, lane: Lane, states: _LaneStates, stream: Stream) -> int:
        now, slot = self._clock(), states.resident.get(stream)
        self.meet(stream)
        self._homes[stream] = lane  # and not the stream's own, which may have been changed for what comes later
        if slot is None:
            row, is_fresh = states.initial, False
            if stream not in states.host:
                found = self._fetch(lane, stream) if stream.version else None
                row, is_fresh = (states.initial, True) if found is None else (found, False)
            slot = self._free_slot(states)
            try:
                if stream in states.host:
                    row = states.rows.read(states.host[stream])
                states.pool.write(slot, row)
            except BaseException:
                states.pool.release(slot)
                raise
            self._leave_host(states, stream)
            states.resident[stream] = slot
            self._device_bytes += states.layout.bytes
            if is_fresh:
                states.fresh.add(stream)
        self._on_device[stream] = now
        self._on_device.move_to_end(stream)
        return slot

    def _free_slot(self, states: _LaneStates) -> int:
        size = states.layout.bytes
        while len(self._on_device) >= self.budget.slots or (
            self._on_device and self._device_bytes + size > self.budget.device_bytes
        ):
            if not self._evict():
                # Of bytes, a step may take more than there are; of slots it takes no more.
                if len(self._on_device) >= self.budget.slots:
                    slots = self.budget.slots
                    raise ValueError(f"all {slots} slots are leased; a step takes at most that many streams")
                break
        slot = states.pool.acquire()
        assert slot is not None, "a pool is as large as all lanes together may be"
        return slot

    def _evict(self) -> bool:
        """Moves the state used longest ago, of any lane, to host memory. False where all are leased."""
        for stream, used in self._on_device.items():
            states = self._lanes[self._homes[stream]]
            if stream not in states.leased:
                if stream not in states.fresh:
                    row = {dtype: rows.cpu() for dtype, rows in states.pool.read(states.resident[stream]).items()}
                    self._keep_in_host(states, stream, row, used)
                self._leave_device(states, stream)
                self.evictions += 1
                self._trim_host()
                return True
        return False

    def _trim_host(self) -> None:
        """Takes the states used longest ago out of host memory where there are too many. Those that are not saved yet
        are handed over, and go next time."""
        keeper, most = self._keeper, self.budget.host_bytes
        if keeper is None or not keeper.persistent or self._host_bytes <= most:
            return
        unsaved = []
        for stream in list(itertools.islice(self._in_host, LOOK)):
            if self._host_bytes <= most:
                break
            states = self._lanes[self._homes[stream]]
            if stream in states.leased:
                continue  # on its way to the device
            if stream.saved.state_revision == stream.state_revision:
                self._leave_host(states, stream)
                self.page_outs += 1
            elif keeper.handed(stream)[1] < stream.state_revision:
                unsaved.append(stream)
        self._hand_over_each(unsaved)
        if self._host_bytes > OVERDRAFT * most:
            keeper.wait(IDLE_CHECK)

    def _evict_idle(self, now: float) -> None:
        """Takes out of memory whom nobody asked for in a while."""
        keeper, unsaved = self._keeper, []
        assert keeper is not None
        for used_by in (self._on_device, self._in_host):
            for stream, used in list(itertools.islice(used_by.items(), 4 * LOOK)):
                if now - used < self._idle_seconds:
                    break
                states = self._lanes[self._homes[stream]]
                if stream in states.leased:
                    continue
                if stream in states.fresh:
                    self._leave_device(states, stream)
                elif stream.saved.state_revision == stream.state_revision:
                    if stream in states.resident:
                        self._leave_device(states, stream)
                    self._leave_host(states, stream)
                    self.page_outs += 1
                    self._tell(Event("evicted", stream, {"version": stream.version}))
                elif keeper.handed(stream)[1] < stream.state_revision:
                    unsaved.append(stream)
        self._hand_over_each(unsaved)
        for lane, states in list(self._lanes.items()):
            if not (states.resident or states.host or states.leased):
                del self._lanes[lane]

    def _forget(self, states: _LaneStates, stream: Stream) -> None:
        assert stream not in states.leased, f"stream {stream.id!r} is in a running step"
        self._leave_device(states, stream)
        self._leave_host(states, stream)

    def _keep_in_host(self, states: _LaneStates, stream: Stream, row: Packed, used: float) -> None:
        self._know_in_host(states, stream, states.rows.put(row), used)

    def _know_in_host(self, states: _LaneStates, stream: Stream, place: int, used: float) -> None:
        states.host[stream] = place
        self._in_host[stream] = used
        self._host_bytes += states.layout.bytes

    def _leave_host(self, states: _LaneStates, stream: Stream) -> None:
        place = states.host.pop(stream, None)
        if place is not None:
            states.rows.free(place)
            del self._in_host[stream]
            self._host_bytes -= states.layout.bytes

    def _leave_device(self, states: _LaneStates, stream: Stream) -> None:
        slot = states.resident.pop(stream, None)
        if slot is None:
            return
        del self._on_device[stream]
        self._device_bytes -= states.layout.bytes
        states.fresh.discard(stream)
        states.pool.release(slot)
        if not states.resident:
            # Pools do not shrink; this one's memory is for other lanes now.
            states.pool = self._new_pool(states.layout)

    def _new_pool(self, layout: Layout) -> SlotPool:
        return SlotPool(layout, self.budget.slots, self._device, self.budget.fit(layout.bytes))


def _difference(stored: tuple[Field, ...], expected: tuple[Field, ...]) -> str:
    """The first field that differs, in words."""
    for old, new in itertools.zip_longest(stored, expected):
        if old != new:
            return f"it has {_described(old)} where {_described(new)} is expected"
    return "they are the same"


def _described(field: Field | None) -> str:
    return "nothing" if field is None else f"{field.name} {field.dtype} {list(field.shape)}"


def _norm(states: _LaneStates, rows: Packed, other: Packed | None) -> Tensor:
    """Of the weights in ``rows [S, width]``, or of their difference to the ``other``'s -> ``[S]``."""
    norms = []
    for dtype, width in states.layout.weights.items():
        if width and dtype.is_floating_point:
            own = rows[dtype][:, :width]
            if other is not None:
                own = own - other[dtype][..., :width]
            norms.append(torch.linalg.vector_norm(own, dim=1, dtype=torch.promote_types(dtype, torch.float32)).double())
    return torch.stack(norms).square().sum(0).sqrt()
