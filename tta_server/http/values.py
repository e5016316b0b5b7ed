"""Numbers as they come over the wire, nested lists or bytes, to arrays and to a model's rows."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from functools import reduce
from itertools import compress
from operator import iadd
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tta_server.errors import BadInput
from tta_server.settings import InputSettings, LimitSettings

Array = np.ndarray[Any, Any]

DATATYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype("u1"),  # numpy would take any byte but 0 for true; here 2 is an error
    "UINT8": np.dtype("u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
    "BF16": np.dtype("<u2"),  # the upper half of an FP32
    "BYTES": np.dtype("O"),
}
"""The datatypes of the Open Inference Protocol V2, with what holds their values as they are on the wire."""
DEEPEST = 32
"""Most dimensions that a shape or nested lists may have."""
_EXACT = 2**53
"""Up to here a float is the whole number that its text was."""


def find_datatype(datatype: str, name: str) -> np.dtype[Any]:
    """What holds the values of ``datatype``. Raises ``BadInput`` for one that does not exist."""
    if datatype not in DATATYPES:
        raise BadInput(f"{name} must be of one of the datatypes {' '.join(DATATYPES)}, got {datatype[:50]}")
    return DATATYPES[datatype]


def size_of(shape: Sequence[int], name: str) -> int:
    """The number of values in ``shape``. Raises ``BadInput`` for one that no array can have."""
    # Zeros are left out of the product: numpy counts the rest of such a shape, too.
    if len(shape) > DEEPEST or min(shape, default=0) < 0 or math.prod(size for size in shape if size) > 2**60:
        raise BadInput(f"{name} has an impossible shape {list(shape)[: DEEPEST + 1]}")
    return math.prod(shape)


def check_rows(count: int, spec: InputSettings, limits: LimitSettings) -> None:
    """Raises ``BadInput`` for more values than the rows of one request have."""
    rows = limits.rows_per_request
    most = rows * math.prod(spec.shape)
    if count > most:
        raise BadInput(
            f"a request holds 1 to {rows} rows (limits.rows_per_request) of shape {list(spec.shape)}, "
            f"that is at most {most} values, got {count}"
        )


def from_bytes(binary: memoryview, datatype: str, name: str) -> Array:
    """The values of a datatype of numbers from their bytes: flat, float32 or, for UINT8, uint8; FP32 is not copied."""
    values = np.frombuffer(binary, DATATYPES[datatype])
    if datatype == "UINT8":
        return values
    if datatype == "BOOL" and values.max(initial=0) > 1:
        raise BadInput(f"{name} is BOOL: all bytes must be 0 or 1, got {values.max()}")
    if datatype == "BF16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return cast(values, np.float32)


def from_json(values: list[Any], datatype: str, name: str) -> Array:
    """The values of a datatype of numbers from a list: float32 or, for UINT8, uint8.

    Raises ``BadInput`` for what is not of ``datatype``. Whole numbers are checked as such, not as floats.
    """
    if datatype == "BF16":
        raise BadInput(f"{name} is BF16, which is taken as binary data only; send FP32 in JSON")
    dtype = DATATYPES[datatype]
    array = cast(numbers(values, name), dtype) if dtype.kind == "f" else _whole(values, datatype, name)
    return array if datatype == "UINT8" else cast(array, np.float32)


def cast(values: Array, dtype: Any) -> Array:
    """The values as ``dtype``, not copied where they are. What overflows becomes infinite, and is refused later on."""
    with np.errstate(over="ignore", invalid="ignore"):
        return values.astype(dtype, copy=False)


def to_rows(values: Array, spec: InputSettings) -> Tensor:
    """An array, float32 or of pixels (uint8), as float32 in the model's value range.

    Copied only where torch could not use it as it is: not in row order, not aligned, or not to be written to.
    """
    if values.dtype == np.uint8:  # as InputSettings.from_pixels, but not in torch: see ``engine/threads.py``
        low, high = spec.range or (0.0, 1.0)
        values = np.float32(low) + np.float32(high - low) * (values / np.float32(255))
    return torch.from_numpy(np.require(values, requirements=("C", "A", "W")))


def softmax(scores: Array) -> Array:
    """``exp(z_c) / sum_k exp(z_k)`` of each row of ``scores [N, C]``, float32."""
    powers: Array = np.exp(scores - scores.max(1, keepdims=True))
    powers /= powers.sum(1, keepdims=True)
    return powers


def unnest(data: Any, name: str) -> tuple[list[Any], tuple[int, ...]]:
    """The leaves of nested lists in order, not looked at, and the lists' shape. Ragged nesting is refused."""
    if type(data) not in (list, int, float):
        raise BadInput(f"{name} must be numbers nested to equal lengths, got {_kind(data)}")
    values, shape = [data], list[int]()
    while values and type(values[0]) is list:
        if len(shape) == DEEPEST:
            raise BadInput(f"{name} must be numbers nested to equal lengths, at most {DEEPEST} levels deep")
        if set(map(type, values)) != {list}:
            odd = next(one for one in values if type(one) is not list)
            raise BadInput(f"{name} must be numbers nested to equal lengths, got a list beside {_kind(odd)}")
        lengths = set(map(len, values))
        if len(lengths) > 1:
            some = f"{min(lengths)} and {max(lengths)}"
            raise BadInput(f"{name} must be numbers nested to equal lengths, got lists of {some} at level {len(shape)}")
        shape.append(lengths.pop())
        values = reduce(iadd, values, []) if len(values) > 1 else values[0]
    return values, tuple(shape)


def numbers(values: list[Any], name: str) -> Array:
    """A list of numbers as float64. Anything else in it, booleans included, is refused.

    numpy is not shown the list: it would make room for the longest text in it, once per value.
    """
    try:
        doubles = np.frombuffer(struct.pack(f"{len(values)}d", *values), np.float64)
        # A boolean passes as a number, but only as one of two. The rest need not be looked at again.
        suspects = list(compress(values, ((doubles == 0) | (doubles == 1)).tobytes()))
    except struct.error:
        suspects = values
    if not set(map(type, suspects)) <= {int, float}:
        odd = next(one for one in suspects if type(one) not in (int, float))
        raise BadInput(f"{name} must be numbers nested to equal lengths, got {_kind(odd)}")
    return doubles


def _whole(values: list[Any], datatype: str, name: str) -> Array:
    """A list of whole numbers within the datatype's range; for BOOL, true and false, too."""
    dtype, kinds = DATATYPES[datatype], {int, bool} if datatype == "BOOL" else {int}
    low, high = (0, 1) if datatype == "BOOL" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
    if float in set(map(type, values)):  # 5.0 is how many clients write 5
        values = [int(one) if type(one) is float and one.is_integer() and abs(one) <= _EXACT else one for one in values]
    fit = set(map(type, values)) <= kinds and (not values or low <= min(values) <= max(values) <= high)
    if not fit:
        odd = next(one for one in values if type(one) not in kinds or not low <= one <= high)
        got = odd if type(odd) in (int, float) else _kind(odd)
        raise BadInput(f"{name} is {datatype}: all values must be whole numbers from {low} to {high}, got {got}")
    return np.array(values, dtype)


def _kind(value: Any) -> str:
    """How JSON calls what Python holds as ``value``."""
    names = {str: "a string", bool: "a boolean", type(None): "null", dict: "an object", list: "a list"}
    return names.get(type(value), "a number")
