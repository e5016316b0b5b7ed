"""Bodies of ``/v1`` predictions to tensors: JSON, ``.npy``, raw numbers, PNG and JPEG, one or several.

The kind of body is seen from its first bytes, so that a plain ``curl --data-binary @file`` works without headers. What
a body claims is checked before anything is allocated for it.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncGenerator

import numpy as np
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.formparsers import MultiPartParser
from torch import Tensor

from tta_server.errors import BadInput
from tta_server.http.body import parse_json
from tta_server.http.images import JPEG, PNG, decode_image
from tta_server.http.tensors import decode_images, raw_input
from tta_server.http.values import Array, cast, check_rows, numbers, size_of, to_rows, unnest
from tta_server.settings import InputSettings, LimitSettings

NPY = b"\x93NUMPY"
_NPY_VERSIONS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
"""Version 3.0 exists for names of record fields, which no array of numbers has."""
_NPY_HEADER = 16 * 2**10
"""Bytes in which the header ends, if it does: numpy reads none of more than 10,000 characters."""
_PIECE = 64 * 2**10
"""Bytes of a multipart body parsed at a time; between them the event loop serves others."""


def decode_inputs(body: bytearray, spec: InputSettings, limits: LimitSettings, datatype: str | None = None) -> Tensor:
    """The rows ``[N, *shape]`` of a predict body: ``{"inputs": ...}``, ``.npy``, one image, or, where the request names
    its ``datatype`` (a V2 one other than BYTES), nothing but the rows' numbers.

    A single row may come without its batch dimension. 8-bit unsigned integers are pixels, spread over the model's value
    range; in JSON, where they cannot be told, numbers are taken as they are. What holds more values than
    ``limits.rows_per_request`` rows have is refused before it is converted. Raises ``BadInput`` and ``TooLarge``.
    """
    if not body:
        raise BadInput('the body is empty; send {"inputs": [...]}, a .npy array, or a PNG or JPEG image')
    if datatype is not None:
        return raw_input(memoryview(body), spec, limits, datatype)
    if body.startswith((PNG, JPEG)):
        x: Array = decode_image(body, spec, limits)
    elif body.startswith(NPY):
        x = _npy(body, spec, limits)
    else:
        parsed = parse_json(body, limits)
        if parsed.keys() != {"inputs"}:
            raise BadInput(f"the body must hold 'inputs' and nothing else, got the keys {sorted(parsed)!r:.200}")
        values, shape = unnest(parsed["inputs"], "'inputs'")
        check_rows(len(values), spec, limits)
        x = cast(numbers(values, "'inputs'"), np.float32).reshape(shape)
    return to_rows(x.reshape(1, *x.shape) if x.shape == spec.shape else x, spec)


async def multipart(body: bytearray, content_type: str, spec: InputSettings, limits: LimitSettings) -> Tensor:
    """The rows ``[N, *shape]`` of a multipart/form-data body: N images, one per file, in order.

    The images are decoded in a thread. Raises ``TooLarge`` as :func:`~tta_server.http.images.decode_image` does, and
    ``BadInput`` for a part that is not an image, for none at all, and for more than ``limits.rows_per_request``.
    """

    async def pieces() -> AsyncGenerator[bytes, None]:
        view = memoryview(body)
        for start in range(0, len(view), _PIECE):
            yield bytes(view[start : start + _PIECE])
            await asyncio.sleep(0)
        if not parser.complete:
            raise EOFError("it ends before its last boundary")

    most = limits.rows_per_request
    parser = _FormParser(Headers({"content-type": content_type}), pieces(), max_files=most, max_fields=most)
    parser.spool_max_size = len(body)  # the whole is in memory already: no part goes to a file
    try:
        form = await parser.parse()
    except MemoryError:
        raise
    except Exception as error:  # the charset in the header can be any codec, which may raise anything
        raise BadInput(
            f"the body is not readable as multipart/form-data of 1 to {most} files (limits.rows_per_request): {error}"
        ) from error
    images: list[tuple[str, bytes]] = []
    try:
        for name, part in form.multi_items():
            if isinstance(part, str):
                raise BadInput(f"part {name[:50]!r} is not a file; send images as files (curl: -F file=@image.png)")
            images.append((f"part {len(images)} ({name[:50]!r})", part.file.read()))
    finally:
        await form.close()
    if not images:
        raise BadInput("the multipart body has no parts; send one file per image")
    return await run_in_threadpool(decode_images, images, spec, limits)


class _FormParser(MultiPartParser):
    """Knows whether the end was there. Without it the last part, cut short, would be left out silently."""

    complete = False

    def on_end(self) -> None:
        self.complete = True


def _npy(body: bytearray, spec: InputSettings, limits: LimitSettings) -> Array:
    file = io.BytesIO(body[:_NPY_HEADER])
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
    if not all(type(size) is int for size in shape):
        raise BadInput(f"the shape of the .npy array must be whole numbers, got {shape!r:.100}")
    if not isinstance(dtype, np.dtype) or dtype.kind not in "iuf":
        raise BadInput(f"the .npy array must hold numbers, got {dtype}")
    size = size_of(shape, "the .npy array")
    expected, got = size * dtype.itemsize, len(body) - file.tell()
    if expected != got:
        raise BadInput(f"the .npy header promises {expected} bytes ({dtype} {list(shape)}), the body holds {got}")
    check_rows(size, spec, limits)
    values = np.frombuffer(body, dtype, offset=file.tell()).reshape(shape, order="F" if fortran else "C")
    return cast(values, np.uint8 if dtype == np.uint8 else np.float32)
