"""Bodies to tensors: JSON, ``.npy``, PNG and JPEG. What a body claims is checked before anything is allocated for it.

The kind of body is seen from its first bytes, so that a plain ``curl --data-binary @file`` works without headers.
"""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Sequence
from functools import reduce
from itertools import compress
from operator import iadd
from typing import Any

import numpy as np
import orjson
import torch
from fastapi import Request
from PIL import Image
from starlette.requests import ClientDisconnect
from torch import Tensor

from tta_server.errors import BadInput, Cancelled, TooLarge, UnsupportedEncoding
from tta_server.settings import InputSettings

IMAGES = (b"\x89PNG", b"\xff\xd8\xff")
EIGHT_BIT = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
"""Pillow's modes of images that convert to 8-bit channels without loss."""
NPY = b"\x93NUMPY"
_NPY_VERSIONS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
"""Version 3.0 exists for names of record fields, which no array of numbers has."""
DEEPEST = 32
"""Most dimensions that a shape or nested lists may have."""


async def read_body(request: Request, limit: int) -> bytes:
    """The whole body. Raises ``TooLarge`` as soon as it passes ``limit`` bytes, before reading on."""
    encoding = request.headers.get("content-encoding", "identity")
    if encoding != "identity":
        raise UnsupportedEncoding(f"bodies must not be compressed, got Content-Encoding: {encoding[:50]}")
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit:
        raise TooLarge(f"the body is {declared} bytes; the limit is limits.body_bytes = {limit}")
    chunks, size = [], 0
    try:
        async for chunk in request.stream():
            size += len(chunk)
            if size > limit:
                raise TooLarge(f"the body is over the limit, limits.body_bytes = {limit}")
            chunks.append(chunk)
    except ClientDisconnect as error:
        raise Cancelled("the client went away while sending") from error
    return b"".join(chunks)


def parse_json(body: bytes) -> dict[str, Any]:
    """A JSON object. Raises ``BadInput``."""
    try:
        parsed = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BadInput(f"the body is not JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise BadInput(f"the body must be a JSON object, got {type(parsed).__name__}")
    return parsed


def decode_inputs(body: bytes, spec: InputSettings, max_rows: int) -> Tensor:
    """The rows ``[N, *shape]`` of a ``/v1`` predict body: ``{"inputs": ...}``, ``.npy``, or one image.

    A single row may come without its batch dimension. 8-bit integers are pixels, spread over the model's value range.
    What holds more values than ``max_rows`` rows have is refused before it is converted.
    """
    if not body:
        raise BadInput('the body is empty; send {"inputs": [...]}, a .npy array, or a PNG or JPEG image')
    if body.startswith(IMAGES):
        x = _image(body, spec)
    elif body.startswith(NPY):
        x = _npy(body, spec, max_rows)
    else:
        parsed = parse_json(body)
        if parsed.keys() != {"inputs"}:
            raise BadInput(f"the body must hold 'inputs' and nothing else, got the keys {sorted(parsed)}")
        values, shape = _unnest(parsed["inputs"], "inputs")
        _check_rows(len(values), spec, max_rows)
        x = _numbers(values, "inputs").reshape(shape)
    return _to_range(x.reshape(1, *x.shape) if x.shape == spec.shape else x, spec)


def decode_tensor(data: Any, datatype: str, shape: Sequence[int], spec: InputSettings, name: str) -> Tensor:
    """The rows of one V2 input tensor with JSON ``data``, flat or nested, of ``datatype`` FP32, FP64, FP16 or UINT8.

    Raises ``BadInput`` where data and shape differ, with expected and got.
    """
    if datatype not in ("FP32", "FP64", "FP16", "UINT8"):
        raise BadInput(f"input {name!r} must be FP32 (FP64, FP16 and, for pixels, UINT8 are taken too), got {datatype}")
    size = _size(shape, f"input {name!r}")
    if data is None:
        raise BadInput(f"input {name!r} has no data")
    flat, _ = _unnest(data, name)
    if len(flat) != size:
        raise BadInput(f"input {name!r} of shape {list(shape)} needs {size} values, got {len(flat)}")
    values = _numbers(flat, name)
    if datatype == "UINT8":
        if values.size and not (values.min() >= 0 and values.max() <= 255 and (values == np.floor(values)).all()):
            raise BadInput(f"input {name!r} is UINT8, but not all values are whole numbers from 0 to 255")
        values = values.astype(np.uint8)
    return _to_range(values.reshape(tuple(shape)), spec)


def _unnest(data: Any, name: str) -> tuple[list[Any], tuple[int, ...]]:
    """The leaves of nested lists in order, not looked at, and the lists' shape. Ragged nesting is refused."""
    if type(data) not in (list, int, float):
        raise BadInput(f"{name!r} must be numbers nested to equal lengths, got {_kind(type(data))}")
    values, shape = [data], list[int]()
    while values and type(values[0]) is list:
        if len(shape) == DEEPEST:
            raise BadInput(f"{name!r} must be numbers nested to equal lengths, at most {DEEPEST} levels deep")
        odd = next((one for one in set(map(type, values)) if one is not list), None)
        if odd is not None:
            raise BadInput(f"{name!r} must be numbers nested to equal lengths, got a list beside {_kind(odd)}")
        lengths = set(map(len, values))
        if len(lengths) > 1:
            some = f"{min(lengths)} and {max(lengths)}"
            raise BadInput(
                f"{name!r} must be numbers nested to equal lengths, got lists of {some} at level {len(shape)}"
            )
        shape.append(lengths.pop())
        values = reduce(iadd, values, []) if len(values) > 1 else values[0]
    return values, tuple(shape)


def _numbers(values: list[Any], name: str) -> np.ndarray[Any, Any]:
    """A list of numbers as float32. Anything else in it, booleans included, is refused.

    numpy is not shown the list: it would make room for the longest text in it, once per value.
    """
    try:
        doubles = np.frombuffer(struct.pack(f"{len(values)}d", *values), dtype=np.float64)
        # A boolean passes as a number, but only as one of two. The rest need not be looked at again.
        odd = set(map(type, compress(values, ((doubles == 0) | (doubles == 1)).tobytes()))) - {int, float}
    except struct.error:
        odd = set(map(type, values)) - {int, float}
    if odd:
        raise BadInput(f"{name!r} must be numbers nested to equal lengths, got {_kind(odd.pop())}")
    with np.errstate(over="ignore"):  # what overflows becomes infinite, and is refused as such
        return doubles.astype(np.float32)


def _kind(of: type[Any]) -> str:
    """How JSON calls what Python holds as ``of``."""
    names = {str: "a string", bool: "a boolean", type(None): "null", dict: "an object", list: "a list"}
    return names.get(of, "a number")


def _check_rows(count: int, spec: InputSettings, max_rows: int) -> None:
    limit = max_rows * math.prod(spec.shape)
    if count > limit:
        raise BadInput(
            f"a request holds 1 to {max_rows} rows (limits.rows_per_request) of shape {list(spec.shape)}, "
            f"that is at most {limit} values, got {count}"
        )


def _npy(body: bytes, spec: InputSettings, max_rows: int) -> np.ndarray[Any, Any]:
    file = io.BytesIO(body)
    try:
        version = np.lib.format.read_magic(file)
        read = _NPY_VERSIONS.get(version)
        if read is None:
            known = " and ".join(f"{major}.{minor}" for major, minor in _NPY_VERSIONS)
            raise BadInput(f"not a readable .npy array: its format is version {version[0]}.{version[1]}, not {known}")
        shape, fortran, dtype = read(file)
    except BadInput:
        raise
    except Exception as error:  # numpy evaluates the header as a literal, and a broken one raises nearly anything
        raise BadInput(f"not a readable .npy array: {error}") from error
    if not isinstance(dtype, np.dtype) or dtype.kind not in "iuf":
        raise BadInput(f"the .npy array must hold numbers, got {dtype}")
    size = _size(shape, "the .npy array")
    expected, got = size * dtype.itemsize, len(body) - file.tell()
    if expected != got:
        raise BadInput(f"the .npy header promises {expected} bytes ({dtype} {list(shape)}), the body holds {got}")
    _check_rows(size, spec, max_rows)
    values = np.frombuffer(body, dtype, offset=file.tell()).reshape(shape, order="F" if fortran else "C")
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(values, dtype=np.uint8 if dtype == np.uint8 else np.float32)


def _size(shape: Sequence[int], name: str) -> int:
    """The number of values in ``shape``. Raises ``BadInput`` for one that no array can have."""
    # Zeros are left out of the product: numpy counts the rest of such a shape, too.
    if len(shape) > DEEPEST or min(shape, default=0) < 0 or math.prod(size for size in shape if size) > 2**60:
        raise BadInput(f"{name} has an impossible shape {list(shape)[: DEEPEST + 1]}")
    return math.prod(shape)


def _image(body: bytes, spec: InputSettings) -> np.ndarray[Any, Any]:
    if len(spec.shape) != 3 or spec.shape[0] not in (1, 3):
        raise BadInput(f"this model takes {list(spec.shape)} rows, not images; send JSON or .npy")
    channels, height, width = spec.shape
    try:
        # Opening reads the header only: the size is known before a pixel is decoded.
        with Image.open(io.BytesIO(body), formats=("PNG", "JPEG")) as image:
            if image.size != (width, height):
                raise BadInput(f"the image must be {width} x {height} pixels, got {image.size[0]} x {image.size[1]}")
            if image.mode not in EIGHT_BIT:
                raise BadInput(
                    f"images must have 8 bits per channel, got one of mode {image.mode!r}; send .npy instead"
                )
            pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"), dtype=np.uint8)
    except BadInput:
        raise
    except Exception as error:  # a decoder may raise anything on bytes from outside
        raise BadInput(f"not a readable PNG or JPEG image: {error}") from error
    return np.ascontiguousarray(pixels.reshape(1, height, width, channels).transpose(0, 3, 1, 2))


def _to_range(values: np.ndarray[Any, Any], spec: InputSettings) -> Tensor:
    # The array may be a view of the request's bytes, which torch must not be given to write to.
    rows = torch.from_numpy(values if values.flags.writeable else values.copy())
    return spec.from_pixels(rows) if rows.dtype == torch.uint8 else rows
