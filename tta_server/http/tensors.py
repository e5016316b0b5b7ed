"""Tensors of the Open Inference Protocol V2, as JSON and as binary data: inputs to rows, scores to outputs.

What a request claims of its tensors is checked before anything is allocated for it.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from reprlib import repr as short
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from tta_server.errors import BadInput, TooLarge
from tta_server.http.images import check_total, decode_image
from tta_server.http.schemas_v2 import InferInput, InferOutput
from tta_server.http.values import DATATYPES as DATATYPES
from tta_server.http.values import (
    Array,
    check_rows,
    find_datatype,
    from_bytes,
    from_json,
    size_of,
    softmax,
    to_rows,
    unnest,
)
from tta_server.settings import InputSettings, LimitSettings

OUTPUTS = ("logits", "probabilities")


# The parts of a request


def only(values: list[str]) -> str | None:
    """A header's value, ``None`` where there is none. Raises ``BadInput`` for one sent more than once."""
    if len(values) > 1:
        raise BadInput(f"a header must be sent once, got it {len(values)} times: {short(values)}")
    return values[0] if values else None


def split(body: bytearray, header_length: str | None, limits: LimitSettings) -> tuple[memoryview, memoryview]:
    """The JSON part and the binary part of a body, not copied.

    ``header_length`` is Inference-Header-Content-Length as sent, the bytes of JSON. Without it all is JSON; 0 says that
    the body is one tensor without JSON, see :func:`raw_input`. Raises ``BadInput`` for one that is not a plain decimal
    number or is longer than the body, and ``TooLarge`` over ``limits.json_bytes``.
    """
    view = memoryview(body)
    if header_length is None:
        return view, view[len(view) :]
    if not (header_length.isascii() and header_length.isdecimal() and len(header_length) <= 20):
        raise BadInput(f"Inference-Header-Content-Length must be a number of bytes, got {short(header_length)}")
    length = int(header_length)
    if length > len(view):
        raise BadInput(f"Inference-Header-Content-Length is {length}, but the body has {len(view)} bytes")
    if length > limits.json_bytes:
        raise TooLarge(f"the JSON is {length} bytes; the limit is limits.json_bytes = {limits.json_bytes}")
    return view[:length], view[length:]


def take_binary(inputs: Sequence[InferInput], binary: memoryview) -> list[memoryview | None]:
    """Each input's own bytes of the binary part, not copied; ``None`` for an input whose data are in the JSON.

    Raises ``BadInput`` where the inputs' ``binary_data_size`` and the bytes that are there differ.
    """
    taken: list[memoryview | None] = []
    start = 0
    for tensor in inputs:
        name = f"input {short(tensor.name)}"
        _refuse_shared_memory(tensor.parameters, name)
        if "binary_data_size" not in tensor.parameters:
            taken.append(None)
            continue
        size = tensor.parameters["binary_data_size"]
        if type(size) is not int or size < 0:
            raise BadInput(f"{name}: binary_data_size must be a number of bytes, got {short(size)}")
        if tensor.data is not None:
            raise BadInput(f"{name} has both data and binary_data_size; send one of them")
        if size > len(binary) - start:
            raise BadInput(f"{name} promises {size} bytes of binary data, but only {len(binary) - start} are there")
        taken.append(binary[start : start + size])
        start += size
    if start != len(binary):
        raise BadInput(f"the inputs promise {start} bytes of binary data, but {len(binary)} follow the JSON")
    return taken


def _refuse_shared_memory(parameters: dict[str, Any], name: str) -> None:
    if any(key.startswith("shared_memory") for key in parameters):
        raise BadInput(f"{name}: shared memory is not offered; send the data in the body")


# Inputs


def decode_input(tensor: InferInput, binary: memoryview | None, spec: InputSettings, limits: LimitSettings) -> Tensor:
    """The float32 rows of an input, shaped as it says, from its ``binary`` bytes or else its JSON ``data``.

    Numbers keep their value; UINT8 are pixels, spread over the model's value range. BYTES of shape ``[N]`` or
    ``[N, 1]`` are N encoded images, in JSON as base64, and make ``[N, *spec.shape]``. FP32 that is aligned within the
    body is not copied. Raises ``BadInput`` where datatype, shape and data differ, and for more values than
    ``limits.rows_per_request`` rows have, before they are converted.
    """
    name = f"input {short(tensor.name)}"
    dtype = find_datatype(tensor.datatype, name)
    count = size_of(tensor.shape, name)
    if binary is None and tensor.data is None:
        raise BadInput(f"{name} has no data")
    if tensor.datatype == "BYTES":
        return _decode_images(tensor, binary, name, spec, limits)
    check_rows(count, spec, limits)
    if binary is not None:
        size = count * dtype.itemsize
        if len(binary) != size:
            what = f"{name} of datatype {tensor.datatype} and shape {tensor.shape}"
            raise BadInput(f"{what} needs {size} bytes, got {len(binary)}")
        values = from_bytes(binary, tensor.datatype, name)
    else:
        flat, _ = unnest(tensor.data, name)
        if len(flat) != count:
            raise BadInput(f"{name} of shape {tensor.shape} needs {count} values, got {len(flat)}")
        values = from_json(flat, tensor.datatype, name)
    return to_rows(values.reshape(tensor.shape), spec)


def raw_input(binary: memoryview, spec: InputSettings, limits: LimitSettings, datatype: str = "FP32") -> Tensor:
    """The rows ``[N, *spec.shape]`` of a body that is one tensor of ``datatype`` and nothing else, as many as it holds.

    Raises ``BadInput`` for a part of a row, more than ``limits.rows_per_request`` rows, and BYTES.
    """
    dtype = find_datatype(datatype, "a raw body")
    if datatype == "BYTES":
        raise BadInput(
            "a raw body holds numbers, not BYTES; send one image as it is, or several as multipart/form-data"
        )
    row = math.prod(spec.shape) * dtype.itemsize
    if len(binary) % row:
        rows = f"rows of shape {list(spec.shape)}, a multiple of {row} bytes"
        raise BadInput(f"a raw body of {datatype} must be {rows}, got {len(binary)}")
    check_rows(len(binary) // dtype.itemsize, spec, limits)
    return to_rows(from_bytes(binary, datatype, "a raw body").reshape(-1, *spec.shape), spec)


def decode_images(images: Sequence[tuple[str, bytes]], spec: InputSettings, limits: LimitSettings) -> Tensor:
    """The rows ``[N, *spec.shape]`` of N encoded images, each with the name that errors call it."""
    check_total((image for _, image in images), limits)
    pixels = [decode_image(image, spec, limits, name) for name, image in images]
    return to_rows(np.concatenate(pixels) if pixels else np.empty((0, *spec.shape), np.float32), spec)


def _decode_images(
    tensor: InferInput, binary: memoryview | None, name: str, spec: InputSettings, limits: LimitSettings
) -> Tensor:
    if len(tensor.shape) not in (1, 2) or tensor.shape[1:] not in ([], [1]):
        raise BadInput(f"{name}: BYTES are encoded images, of shape [N] or [N, 1], got {tensor.shape}")
    count, most = tensor.shape[0], limits.rows_per_request
    if count > most:
        raise BadInput(f"a request holds 1 to {most} rows (limits.rows_per_request), got {count}")
    elements = _base64(tensor.data, count, name) if binary is None else _elements(binary, count, name)
    return decode_images([(f"element {at} of {name}", one) for at, one in enumerate(elements)], spec, limits)


def _elements(binary: memoryview, count: int, name: str) -> list[bytes]:
    """The elements of binary BYTES, each behind its length, a little-endian uint32."""
    elements, end = [], 0
    for number in range(count):
        start = end + 4
        end = start + int.from_bytes(binary[end:start], "little")
        if start > len(binary) or end > len(binary):
            raise BadInput(f"{name} of {count} elements ends after {len(binary)} bytes, within element {number}")
        elements.append(bytes(binary[start:end]))
    if end != len(binary):
        raise BadInput(f"{name} of {count} elements needs {end} bytes, got {len(binary)}")
    return elements


def _base64(data: Any, count: int, name: str) -> list[bytes]:
    """The elements of JSON BYTES, each a base64 text."""
    texts = unnest(data, name)[0] if type(data) is list else None
    if texts is None or not set(map(type, texts)) <= {str}:
        raise BadInput(f"{name}: BYTES in JSON are a list of base64 texts, got {short(data)}")
    if len(texts) != count:
        raise BadInput(f"{name} of {count} elements got {len(texts)}")
    try:
        return [base64.b64decode(text, validate=True) for text in texts]
    except ValueError as error:
        raise BadInput(f"{name}: BYTES in JSON are base64 texts: {error}") from error


# Outputs


class Wanted(NamedTuple):
    """An output as it was asked for."""

    name: str
    binary: bool | None
    """Whether as binary data; ``None``: as the request says for all."""
    classes: int | None
    """How many of the best classes; ``None``: the scores of all, as numbers."""


def check_outputs(asked: Sequence[InferOutput]) -> list[Wanted]:
    """What is asked for; nothing means all. Raises ``BadInput`` for an output that is unknown, asked for twice, or has
    parameters of the wrong kind."""
    wanted: list[Wanted] = []
    for output in asked:
        name, parameters = f"output {short(output.name)}", output.parameters
        if output.name not in OUTPUTS:
            raise BadInput(f"no {name}; there are {' and '.join(OUTPUTS)}")
        if output.name in (one.name for one in wanted):
            raise BadInput(f"{name} is asked for twice")
        _refuse_shared_memory(parameters, name)
        binary, classes = parameters.get("binary_data"), parameters.get("classification")
        if "binary_data" in parameters and type(binary) is not bool:
            raise BadInput(f"{name}: binary_data must be true or false, got {short(binary)}")
        if "classification" in parameters and (type(classes) is not int or classes < 1):
            raise BadInput(f"{name}: classification must be a number of classes from 1 on, got {short(classes)}")
        wanted.append(Wanted(output.name, binary, classes))
    return wanted or [Wanted(name, None, None) for name in OUTPUTS]


def encode_outputs(
    asked: Sequence[InferOutput], binary_default: bool, logits: Tensor, classes: tuple[str, ...]
) -> tuple[list[dict[str, Any]], list[bytes]]:
    """The entries of ``outputs`` for the scores ``[N, C]``, and the binary data of those that have them, in order.

    An output is FP32 ``[N, C]``. With the parameter ``classification: k`` it is BYTES ``[N, min(k, C)]``, each
    ``score:index:label``, best first (Triton's classification extension). Raises as :func:`check_outputs`.
    """
    entries: list[dict[str, Any]] = []
    blobs: list[bytes] = []
    served: Array = logits.float().numpy()
    for output in check_outputs(asked):
        scores = served if output.name == "logits" else softmax(served)
        entry: dict[str, Any] = {"name": output.name}
        if output.classes is None:
            data: Array | list[str] = scores.reshape(-1)
            entry |= {"datatype": "FP32", "shape": list(scores.shape)}
        else:
            data = _best(scores, output.classes, classes)
            entry |= {"datatype": "BYTES", "shape": [len(scores), min(output.classes, scores.shape[1])]}
        if binary_default if output.binary is None else output.binary:
            blobs.append(_to_bytes(data))
            entry["parameters"] = {"binary_data_size": len(blobs[-1])}
        else:
            entry["data"] = data
        entries.append(entry)
    return entries, blobs


def _best(scores: Array, count: int, classes: tuple[str, ...]) -> list[str]:
    """``score:index:label`` of each row's best classes; of equal ones the first comes first."""
    indices = np.argsort(-scores, axis=1, kind="stable")[:, :count]
    best = np.take_along_axis(scores, indices, axis=1)
    pairs = zip(best.reshape(-1).tolist(), indices.reshape(-1).tolist(), strict=True)
    return [f"{score:f}:{index}:{classes[index]}" for score, index in pairs]


def _to_bytes(data: Array | list[str]) -> bytes:
    """An output's values as they are on the wire."""
    if isinstance(data, np.ndarray):
        return data.astype(DATATYPES["FP32"]).tobytes()
    return b"".join(len(raw).to_bytes(4, "little") + raw for raw in map(str.encode, data))
