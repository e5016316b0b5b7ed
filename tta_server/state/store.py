"""Which stream's state is where. Used by the device thread alone.

Two tiers: device slots, and host memory for the streams that were used longest ago. A stream that never committed a
step has no state of its own: it starts from its lane's initial one. A durable tier goes behind
:meth:`StateStore.export` and :meth:`StateStore.restore`, the two ways in which a whole state leaves and enters.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adapters.base import State
from tta_server.state.slots import HostRows, Layout, Packed, SlotPool
from tta_server.types import Lane, Stream


@dataclass(frozen=True)
class Lease:
    """Slots pinned for one step: ``slots[i]`` belongs to ``streams[i]`` and will not be evicted before the release."""

    lane: Lane
    streams: list[Stream]
    slots: list[int]
    packed: Packed
    """The states as they were at the start, ``[S, width]``."""


@dataclass(frozen=True)
class Commit:
    """What became of a step's states. ``kept``: whose were; ``update`` and ``distance``, NaN for the others and for
    states without weights: the norms of a step's change of the weights, and of all change since the initial state, over
    that of the initial ones."""

    kept: list[bool]
    update: list[float]
    distance: list[float]


class _LaneStates:
    """One lane's pool and the places of its streams' states."""

    def __init__(self, initial: State, pool: Callable[[Layout], SlotPool]) -> None:
        self.layout = Layout(initial)
        self.has_weights = any(width and dtype.is_floating_point for dtype, width in self.layout.weights.items())
        self.initial = {dtype: rows[0] for dtype, rows in self.layout.pack(initial).items()}
        self.pool = pool(self.layout)
        self.resident: dict[Stream, int] = {}
        """Slots by stream."""
        self.host: dict[Stream, int] = {}
        """Places in ``rows`` by stream."""
        self.rows = HostRows(self.layout)
        self.fresh: set[Stream] = set()
        """Of the resident: those that have the initial state still, which need not be kept when evicted."""
        self.leased: set[Stream] = set()


class StateStore:
    """Leases, commits and moves stream states. All states of a lane have one layout, that of its initial state."""

    def __init__(self, slots: int, device: torch.device) -> None:
        """``slots``: states on the device, of all lanes together."""
        self._slots, self._device = slots, device
        self._lanes: dict[Lane, _LaneStates] = {}
        self._recent: OrderedDict[Stream, _LaneStates] = OrderedDict()
        """All streams on the device, the one used longest ago first."""
        self.evictions = 0

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
            states.initial = {dtype: rows[0] for dtype, rows in states.layout.pack(initial).items()}
            for stream in list(states.fresh):
                self._leave_device(states, stream)

    def has_lane(self, lane: Lane) -> bool:
        """Whether :meth:`add_lane` was called since the lane's last state was dropped."""
        return lane in self._lanes

    def has_state(self, lane: Lane) -> bool:
        """Whether streams of this lane keep anything at all between steps."""
        return bool(self._lanes[lane].layout.width)

    def lease(self, lane: Lane, streams: Sequence[Stream]) -> tuple[Lease, State]:
        """Pins a slot for each stream and returns a copy of their states, ``[S, ...]``.

        Streams not on the device are brought there, those used longest ago making room. At most as many streams as
        there are slots. Ends with :meth:`release`.
        """
        states = self._lanes[lane]
        states.leased.update(streams)
        try:
            slots = [self._resident_slot(states, stream) for stream in streams]
            packed = states.pool.gather(slots)
            state = states.layout.unpack(packed)
        except BaseException:
            states.leased.difference_update(streams)
            raise
        return Lease(lane, list(streams), slots, packed), state

    def part(self, lease: Lease, index: int) -> tuple[Lease, State]:
        """One stream's part of a lease, and a copy of its state, ``S = 1``. Ends with the whole lease."""
        slots = lease.slots[index : index + 1]
        states = self._lanes[lease.lane]
        packed = states.pool.gather(slots)
        return Lease(lease.lane, lease.streams[index : index + 1], slots, packed), states.layout.unpack(packed)

    def commit(self, lease: Lease, new: State, allowed: Sequence[bool]) -> Commit:
        """Keeps the new states ``[S, ...]`` that are ``allowed`` and finite throughout, each as the next version.

        The others stay as they were, bit for bit. Raises ``ValueError`` for a state of another
        layout, with nothing changed.
        """
        states = self._lanes[lease.lane]
        packed = states.layout.pack(new)
        sound = torch.tensor(allowed, device=self._device)
        for rows in packed.values():
            if rows.dtype.is_floating_point:
                sound &= rows.isfinite().all(1)
        kept: list[bool] = sound.tolist()
        accepted = [index for index, keep in enumerate(kept) if keep]
        nothing = [math.nan] * len(kept)
        update, distance = nothing, nothing
        if states.has_weights:
            size = _norm(states, {dtype: rows.unsqueeze(0) for dtype, rows in states.initial.items()}, None)
            update, distance = (
                [value if keep else math.nan for value, keep in zip((norm / size).tolist(), kept, strict=True)]
                for norm in (_norm(states, packed, lease.packed), _norm(states, packed, states.initial))
            )
        # Nothing that may fail comes after this.
        if accepted:
            states.pool.scatter(lease.slots, packed, accepted)
            for index in accepted:
                lease.streams[index].version += 1
            states.fresh.difference_update(lease.streams[index] for index in accepted)
        return Commit(kept, update, distance)

    def release(self, lease: Lease) -> None:
        """Ends a lease."""
        self._lanes[lease.lane].leased.difference_update(lease.streams)

    def reset(self, lane: Lane, stream: Stream) -> None:
        """Back to the initial state and version 0, as a new stream."""
        if lane in self._lanes:
            self._forget(self._lanes[lane], stream)
        stream.version = 0

    def drop(self, lane: Lane, stream: Stream) -> None:
        """Forgets a stream's state, and with a lane's last state the lane and its pool. It must not be leased."""
        states = self._lanes.get(lane)
        if states is not None:
            self._forget(states, stream)
            if not states.resident and not states.host:
                del self._lanes[lane]

    def move(self, old: Lane, new: Lane, stream: Stream) -> bool:
        """Takes a stream's state from one lane to another, if their layouts are equal; its version stays.

        Returns whether they are; else nothing changed.
        """
        if not self._lanes[old].layout.fits(self._lanes[new].layout):
            return False
        if self.tier(old, stream) != "none" and stream not in self._lanes[old].fresh:
            self.restore(new, stream, self.export(old, stream), stream.version)
        self.drop(old, stream)
        return True

    def _forget(self, states: _LaneStates, stream: Stream) -> None:
        assert stream not in states.leased, f"stream {stream.id!r} is in a running step"
        self._leave_device(states, stream)
        place = states.host.pop(stream, None)
        if place is not None:
            states.rows.free(place)

    def export(self, lane: Lane, stream: Stream) -> State:
        """A copy of the stream's whole state in host memory, ``S = 1``."""
        states = self._lanes[lane]
        slot, place = states.resident.get(stream), states.host.get(stream)
        row = states.initial
        if slot is not None:
            row = states.pool.read(slot)
        elif place is not None:
            row = states.rows.read(place)
        return states.layout.unpack({dtype: values.to("cpu", copy=True).unsqueeze(0) for dtype, values in row.items()})

    def restore(self, lane: Lane, stream: Stream, state: State, version: int) -> None:
        """Gives the stream a state (``S = 1``) and version. Raises ``ValueError`` where it does not fit."""
        states = self._lanes[lane]
        assert stream not in states.leased, f"stream {stream.id!r} is in a running step"
        place = states.rows.put({dtype: rows[0] for dtype, rows in states.layout.pack(state).items()})
        self._forget(states, stream)
        states.host[stream] = place
        stream.version = version

    def counts(self) -> dict[str, tuple[int, int]]:
        """Streams with a state and their bytes, by tier: ``{"device": (streams, bytes), "host": ...}``."""
        lanes = list(self._lanes.values())  # a copy: the scrape comes from another thread
        device = [(len(lane.resident), lane.layout.bytes) for lane in lanes]
        host = [(len(lane.host), lane.layout.bytes) for lane in lanes]
        return {
            tier: (sum(n for n, _ in sizes), sum(n * size for n, size in sizes))
            for tier, sizes in (("device", device), ("host", host))
        }

    def tier(self, lane: Lane, stream: Stream) -> str:
        """Where the stream's state is: ``device``, ``host``, or ``none`` while it has none of its own."""
        states = self._lanes.get(lane)
        if states is None:
            return "none"
        return "device" if stream in states.resident else "host" if stream in states.host else "none"

    def check_integrity(self) -> None:
        """Raises ``AssertionError`` where the books do not add up. For tests and for idle time."""
        on_device = sum(len(states.resident) for states in self._lanes.values())
        assert len(self._recent) == on_device <= self._slots, f"{on_device} states on the device of {self._slots}"
        for lane, states in self._lanes.items():
            slots = list(states.resident.values())
            assert len(set(slots)) == len(slots), f"{lane}: two streams share a slot"
            assert states.pool.used == len(slots), f"{lane}: {states.pool.used} slots taken for {len(slots)} streams"
            assert not states.resident.keys() & states.host.keys(), f"{lane}: a stream is in two tiers"
            assert states.fresh <= states.resident.keys(), f"{lane}: a stream without a slot counts as fresh"
            assert states.leased <= states.resident.keys(), f"{lane}: a leased stream has no slot"

    def _resident_slot(self, states: _LaneStates, stream: Stream) -> int:
        slot = states.resident.get(stream)
        if slot is None:
            slot = self._free_slot(states)
            place = states.host.get(stream)
            try:
                states.pool.write(slot, states.initial if place is None else states.rows.read(place))
            except BaseException:
                states.pool.release(slot)
                raise
            states.resident[stream] = slot
            self._recent[stream] = states
            if place is None:
                states.fresh.add(stream)
            else:
                del states.host[stream]
                states.rows.free(place)
        self._recent.move_to_end(stream)
        return slot

    def _free_slot(self, states: _LaneStates) -> int:
        while len(self._recent) >= self._slots:
            self._evict()
        slot = states.pool.acquire()
        assert slot is not None, "a pool is as large as all lanes together may be"
        return slot

    def _evict(self) -> None:
        """Moves the state used longest ago, of any lane, to host memory."""
        for stream, states in self._recent.items():
            if stream not in states.leased:
                if stream not in states.fresh:
                    states.host[stream] = states.rows.put(states.pool.read(states.resident[stream]))
                self._leave_device(states, stream)
                self.evictions += 1
                return
        raise ValueError(f"all {self._slots} slots are leased; a step takes at most that many streams")

    def _leave_device(self, states: _LaneStates, stream: Stream) -> None:
        slot = states.resident.pop(stream, None)
        if slot is None:
            return
        del self._recent[stream]
        states.fresh.discard(stream)
        states.pool.release(slot)
        if not states.resident:
            # Pools do not shrink; this one's memory is for other lanes now.
            states.pool = self._new_pool(states.layout)

    def _new_pool(self, layout: Layout) -> SlotPool:
        return SlotPool(layout, self._slots, self._device)


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
