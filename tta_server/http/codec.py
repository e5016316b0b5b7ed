"""Bodies to tensors: JSON, ``.npy``, PNG and JPEG. What a body claims is checked before anything is allocated for it.

The kind of body is seen from its first bytes, so that a plain ``curl --data-binary @file`` works without headers.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
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


def decode_inputs(body: bytes, spec: InputSettings) -> Tensor:
    """The rows ``[N, *shape]`` of a ``/v1`` predict body: ``{"inputs": ...}``, ``.npy``, or one image.

    A single row may come without its batch dimension. 8-bit integers are pixels, spread over the model's value range.
    """
    if not body:
        raise BadInput('the body is empty; send {"inputs": [...]}, a .npy array, or a PNG or JPEG image')
    if body.startswith(IMAGES):
        x = _image(body, spec)
    elif body.startswith(NPY):
        x = _npy(body, spec)
    else:
        parsed = parse_json(body)
        if parsed.keys() != {"inputs"}:
            raise BadInput(f"the body must hold 'inputs' and nothing else, got the keys {sorted(parsed)}")
        x = _numbers(parsed["inputs"], "inputs")
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
    values = _numbers(data, name).reshape(-1)
    if values.size != size:
        raise BadInput(f"input {name!r} of shape {list(shape)} needs {size} values, got {values.size}")
    if datatype == "UINT8":
        if values.size and not (values.min() >= 0 and values.max() <= 255 and (values == np.floor(values)).all()):
            raise BadInput(f"input {name!r} is UINT8, but not all values are whole numbers from 0 to 255")
        values = values.astype(np.uint8)
    return _to_range(values.reshape(tuple(shape)), spec)


def _numbers(data: Any, name: str) -> np.ndarray[Any, Any]:
    """Nested lists of numbers as float32. Booleans, strings and ragged nesting are refused."""
    try:
        values = np.array(data)
    except ValueError as error:
        raise BadInput(f"{name!r} must be numbers nested to equal lengths: {error}") from error
    if values.dtype.kind not in "iuf":
        raise BadInput(f"{name!r} must be numbers nested to equal lengths, got values of kind {values.dtype}")
    with np.errstate(over="ignore"):  # what overflows becomes infinite, and is refused as such
        return values.astype(np.float32)


def _npy(body: bytes, spec: InputSettings) -> np.ndarray[Any, Any]:
    file = io.BytesIO(body)
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
    except Exception as error:  # numpy evaluates the header as a literal, and a broken one raises nearly anything
        raise BadInput(f"not a readable .npy array: {error}") from error
    if not isinstance(dtype, np.dtype) or dtype.kind not in "iuf":
        raise BadInput(f"the .npy array must hold numbers, got {dtype}")
    expected, got = _size(shape, "the .npy array") * dtype.itemsize, len(body) - file.tell()
    if expected != got:
        raise BadInput(f"the .npy header promises {expected} bytes ({dtype} {list(shape)}), the body holds {got}")
    values = np.frombuffer(body, dtype, offset=file.tell()).reshape(shape, order="F" if fortran else "C")
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(values, dtype=np.uint8 if dtype == np.uint8 else np.float32)


def _size(shape: Sequence[int], name: str) -> int:
    """The number of values in ``shape``. Raises ``BadInput`` for one that no array can have."""
    # Zeros are left out of the product: numpy counts the rest of such a shape, too.
    if len(shape) > 32 or min(shape, default=0) < 0 or math.prod(size for size in shape if size) > 2**60:
        raise BadInput(f"{name} has an impossible shape {list(shape)[:33]}")
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
