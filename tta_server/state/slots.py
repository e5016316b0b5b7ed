"""Pools of stream states: one row per slot, all of a state's tensors of one dtype side by side.

A policy's :class:`State` is a flat dict of tensors ``[S, *shape]``; in a pool it is packed into one ``[K, width]``
tensor per dtype, so that gathering and committing a batch of streams is one indexed copy each.
"""

from __future__ import annotations

import math
from functools import cached_property

import torch
from torch import Tensor

from adapters.base import State, Tensors
from tta_server.state.records import Field

_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
"""As safetensors writes them."""

Blob = bytes
"""Of a state. (A layout has a property ``bytes``.)"""
Packed = dict[torch.dtype, Tensor]
"""State rows by dtype: ``[S, width]``, or ``[width]`` for a single stream."""


class Layout:
    """Where each tensor of a state lies in its packed row. Taken from a template; other shapes are refused."""

    def __init__(self, template: State) -> None:
        self._fields: dict[torch.dtype, list[tuple[bool, str, tuple[int, ...], int]]] = {}
        for is_weight, tensors in ((True, template.weights), (False, template.memory)):
            for key, value in tensors.items():
                shape = tuple(value.shape[1:])
                self._fields.setdefault(value.dtype, []).append((is_weight, key, shape, math.prod(shape)))
        self.width = {dtype: sum(size for *_, size in fields) for dtype, fields in self._fields.items()}
        self.weights = {
            dtype: sum(size for is_weight, *_, size in fields if is_weight) for dtype, fields in self._fields.items()
        }
        """How much of a row, from its start, is weights and not memory, by dtype."""

    @property
    def bytes(self) -> int:
        """Of one stream's state."""
        return sum(dtype.itemsize * width for dtype, width in self.width.items())

    def fits(self, other: Layout) -> bool:
        """Whether rows of the one are rows of the other."""
        return self._fields == other._fields

    @cached_property
    def fields(self) -> tuple[Field, ...]:
        """The tensors in the order of :meth:`dump`'s bytes."""
        return tuple(
            Field(f"{'weights' if is_weight else 'memory'}/{key}", _DTYPES[dtype], shape)
            for dtype, fields in self._fields.items()
            for is_weight, key, shape, _ in fields
        )

    def dump(self, packed: Packed) -> Blob:
        """Rows ``[width]`` in host memory as bytes: the tensors of ``fields`` one behind the other, little-endian."""
        return b"".join(packed[dtype].contiguous().view(torch.uint8).numpy().tobytes() for dtype in self.width)

    def load(self, data: Blob) -> Packed:
        """The rows again, in host memory. Raises ``ValueError`` for bytes of another length."""
        if len(data) != self.bytes:
            raise ValueError(f"a state of {self.bytes:,} bytes is expected, got {len(data):,}")
        rows, start, whole = {}, 0, bytearray(data)
        for dtype, width in self.width.items():
            if width:
                rows[dtype] = torch.frombuffer(whole, dtype=dtype, count=width, offset=start)
            else:
                rows[dtype] = torch.empty(0, dtype=dtype)
            start += dtype.itemsize * width
        return rows

    def pack(self, state: State) -> Packed:
        """``State`` of ``[S, *shape]`` tensors -> rows ``[S, width]``. Raises ``ValueError`` where it does not fit."""
        known = {(is_weight, key) for fields in self._fields.values() for is_weight, key, *_ in fields}
        given = {(True, key) for key in state.weights} | {(False, key) for key in state.memory}
        if known != given:
            raise ValueError(f"state keys changed: {sorted(key for _, key in known ^ given)} are not in both")
        return {
            dtype: torch.cat([self._row(state, dtype, *field) for field in fields], dim=1).detach()
            for dtype, fields in self._fields.items()
        }

    def unpack(self, packed: Packed) -> State:
        """Rows ``[S, width]`` -> ``State`` of views into them."""
        weights, memory = Tensors(), Tensors()
        for dtype, fields in self._fields.items():
            parts = packed[dtype].split([size for *_, size in fields], dim=1)
            for (is_weight, key, shape, _), part in zip(fields, parts, strict=True):
                (weights if is_weight else memory)[key] = part.view(-1, *shape)
        return State(weights, memory)

    @staticmethod
    def _row(state: State, dtype: torch.dtype, is_weight: bool, key: str, shape: tuple[int, ...], size: int) -> Tensor:
        value = (state.weights if is_weight else state.memory)[key]
        if value.dtype != dtype or value.shape[1:] != shape:
            raise ValueError(
                f"state tensor {key} changed: {dtype} {list(shape)} became {value.dtype} {list(value.shape[1:])}"
            )
        return value.reshape(len(value), size)


class SlotPool:
    """``K`` slots of one layout on one device. Grows by doubling up to ``room``, so that an unused pool costs little,
    and slot by slot up to ``capacity``."""

    def __init__(self, layout: Layout, capacity: int, device: torch.device, room: int = 2**62) -> None:
        self.layout, self.capacity, self._device, self._room = layout, capacity, device, room
        self._rows: Packed = {
            dtype: torch.empty(0, width, dtype=dtype, device=device) for dtype, width in layout.width.items()
        }
        self._size = 0
        self._free: list[int] = []

    @property
    def used(self) -> int:
        """Slots taken."""
        return self._size - len(self._free)

    def acquire(self) -> int | None:
        """A slot with undefined content; ``None`` when all are taken."""
        if not self._free and self._size < self.capacity:
            grown = min(max(self._size + 1, min(2 * self._size, self._room)), self.capacity)
            larger = {}
            for dtype, rows in self._rows.items():
                larger[dtype] = torch.empty(grown, rows.shape[1], dtype=dtype, device=self._device)
                larger[dtype][: self._size] = rows
            self._rows = larger
            self._free = list(range(grown - 1, self._size - 1, -1))
            self._size = grown
        return self._free.pop() if self._free else None

    def release(self, slot: int) -> None:
        """Gives a slot back."""
        self._free.append(slot)

    def read(self, slot: int) -> Packed:
        """Views of one slot, on the pool's device: rows ``[width]``."""
        return {dtype: rows[slot] for dtype, rows in self._rows.items()}

    def write(self, slot: int, packed: Packed) -> None:
        """Fills one slot from rows ``[width]``."""
        for dtype, rows in self._rows.items():
            rows[slot] = packed[dtype]

    def gather(self, slots: list[int]) -> Packed:
        """A copy of these slots: rows ``[S, width]``."""
        index = torch.tensor(slots, device=self._device)
        return {dtype: rows.index_select(0, index) for dtype, rows in self._rows.items()}

    def scatter(self, slots: list[int], packed: Packed, accepted: list[int]) -> None:
        """Writes the rows ``accepted`` of ``packed [S, width]`` to their slots, all or (by an error before) none."""
        chosen = torch.tensor(accepted, device=self._device)
        index = torch.tensor([slots[one] for one in accepted], device=self._device)
        picked = (
            packed if len(accepted) == len(slots) else {k: rows.index_select(0, chosen) for k, rows in packed.items()}
        )
        for dtype, rows in self._rows.items():
            rows.index_copy_(0, index, picked[dtype])


class HostRows:
    """Packed states in host memory, a row each, as many as come. Grows by chunks, so nothing is copied or spread out:
    thousands of tensors of their own would cost half as much again in fragments of the heap."""

    CHUNK = 64
    """Most rows in a chunk."""
    CHUNK_BYTES = 2**24
    """And most bytes, where a row is not larger: the state of a policy that adapts a whole network may be."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._rows = max(1, min(self.CHUNK, self.CHUNK_BYTES // max(1, layout.bytes)))
        self._chunks: list[Packed] = []
        self._free: list[int] = []

    def put(self, packed: Packed) -> int:
        """Keeps a copy of rows ``[width]``; returns where."""
        if not self._free:
            first = len(self._chunks) * self._rows
            widths = self._layout.width.items()
            self._chunks.append({dtype: torch.empty(self._rows, width, dtype=dtype) for dtype, width in widths})
            self._free = list(range(first + self._rows - 1, first - 1, -1))
        place = self._free.pop()
        for dtype, rows in self._chunks[place // self._rows].items():
            rows[place % self._rows] = packed[dtype]
        return place

    def read(self, place: int) -> Packed:
        """Views of the rows at ``place``, good until it is freed."""
        return {dtype: rows[place % self._rows] for dtype, rows in self._chunks[place // self._rows].items()}

    def free(self, place: int) -> None:
        """Gives a place back, and with the last one all the memory: it is for other lanes now."""
        self._free.append(place)
        if len(self._free) == len(self._chunks) * self._rows:
            self._chunks, self._free = [], []
