"""A stream's state as one file: safetensors, with a manifest that says what the state belongs to.

The tensors are named as in :class:`Field`. The header's metadata has, all of it text,

- ``format``: ``tta-server stream, version 1``;
- ``manifest``: :class:`Manifest` as a JSON object;
- ``tensors``: their names, dtypes and shapes as a JSON list, in a state's order of bytes. The library that writes the
  file puts them in another one, by size of the number;
- ``checksum``: BLAKE2b, 128 bits in hex, of the three above and of the tensors' bytes in the order of ``tensors``.

A file may come from anyone. What it says of itself is checked before a tensor is read, and nothing takes more memory
than a small multiple of the file's size.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import numpy as np
import pydantic
from pydantic import AfterValidator, ConfigDict, TypeAdapter, ValidationError
from safetensors import SafetensorError, TensorSpec, deserialize, serialize

from tta_server.errors import BadInput
from tta_server.settings import Name, explain
from tta_server.state.records import Field

FORMAT = 1
"""Version of the file's format."""
HEADER_BYTES = 4 * 2**20
"""Largest header: room for about 20,000 tensors. Parsed, it takes some twenty times its size in memory, at worst."""
SETTINGS_DEPTH = 4
"""Deepest nesting of a policy's settings."""
DIMENSIONS = 64
"""Most of a tensor."""

_NAME = re.compile("(weights|memory)/.+", re.DOTALL)
_SIGNATURE = f"tta-server stream, version {FORMAT}"
_ANY_SIGNATURE = re.compile("tta-server stream, version ([1-9][0-9]{0,8})")
_METADATA = ("format", "manifest", "tensors", "checksum")


class _Kind(NamedTuple):
    """Of number."""

    name: str
    """What safetensors is told."""
    bytes: int
    exponent: int = 0
    """The bits of a float's exponent: in infinities and NaNs all are set, and in nothing else."""


_KINDS = {
    "F64": _Kind("float64", 8, 0x7FF0_0000_0000_0000), "F32": _Kind("float32", 4, 0x7F80_0000),
    "F16": _Kind("float16", 2, 0x7C00), "BF16": _Kind("bfloat16", 2, 0x7F80), "I64": _Kind("int64", 8),
    "I32": _Kind("int32", 4), "I16": _Kind("int16", 2), "I8": _Kind("int8", 1), "U8": _Kind("uint8", 1),
    "BOOL": _Kind("bool", 1),
}  # fmt: skip


def _plain(value: Any, depth: int = SETTINGS_DEPTH) -> Any:
    """Passes a value on. Raises ``ValueError`` where it is nested too deep or has a number that is not finite."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("every number must be finite")
    if isinstance(value, dict | list):
        if depth == 0:
            raise ValueError(f"the limit is {SETTINGS_DEPTH} levels of lists and objects")
        for one in value.values() if isinstance(value, dict) else value:
            _plain(one, depth - 1)
    return value


Digest = Annotated[str, pydantic.Field(pattern="^[0-9a-f]{64}$")]
Time = Annotated[float, pydantic.Field(ge=0, le=253402300799)]
"""Unix time in seconds, to the year 9999."""


@dataclass(frozen=True)
class Manifest:
    """What a state is of. The limits hold for files; a manifest made in code is not checked."""

    __pydantic_config__ = ConfigDict(strict=True)

    stream: Name
    model: Name
    model_digest: Digest
    policy: Annotated[str, pydantic.Field(min_length=1, max_length=128)]
    settings: Annotated[dict[str, Any], AfterValidator(_plain)]
    """All of the policy's, defaults included."""
    policy_digest: Digest
    version: Annotated[int, pydantic.Field(ge=0, lt=2**62)]
    """Leaves room for steps to come: numbers in the store have 64 bits."""
    request_number: Annotated[int, pydantic.Field(ge=0, lt=2**64)] | None
    """The newest that was answered."""
    random_key: Annotated[int, pydantic.Field(ge=0, lt=2**63)]
    created: Time
    """The stream."""
    exported: Time


_MANIFEST = TypeAdapter(Manifest)


@dataclass(frozen=True)
class Portable:
    """A state that can be taken elsewhere."""

    manifest: Manifest
    fields: tuple[Field, ...]
    data: bytes
    """The tensors one behind the other, little-endian, in the order of ``fields``."""

    def dump(self) -> bytes:
        """The file. Raises ``ValueError`` where the bytes are not as many as the tensors take, for settings that JSON
        cannot say, and for more tensors than a header has room for."""
        total = sum(map(_size, self.fields))
        if total != len(self.data):
            raise ValueError(f"the tensors take {total:,} bytes, got {len(self.data):,}")
        tensors, place = {}, np.frombuffer(self.data, np.uint8).ctypes.data
        for field in self.fields:
            size = _size(field)
            kind = _KINDS[field.dtype]
            tensors[field.name] = TensorSpec(dtype=kind.name, shape=field.shape, data_ptr=place, data_len=size)
            place += size
        said = [_SIGNATURE, _to_json(vars(self.manifest)), _to_json(self.fields)]
        metadata = dict(zip(_METADATA, [*said, _checksum(said, self.data)], strict=True))
        file = serialize(tensors, metadata)
        if (length := int.from_bytes(file[:8], "little")) > HEADER_BYTES:
            raise ValueError(f"the header takes {length:,} bytes; at most {HEADER_BYTES:,} can be read again")
        return file

    @staticmethod
    def parse(body: bytes) -> Portable:
        """Reads :meth:`dump`'s file. Raises ``BadInput`` for anything else."""
        start, metadata = _read_header(body)
        manifest, fields = _read_manifest(metadata["manifest"]), _read_fields(metadata["tensors"])
        total = sum(map(_size, fields))
        if total != len(body) - start:
            raise BadInput(
                f"the file is cut off, or has something behind its end: its tensors take {total:,} bytes, "
                f"{len(body) - start:,} follow the header"
            )
        data = _read_tensors(body, fields)
        checksum = _checksum([metadata[key] for key in _METADATA[:-1]], data)
        if metadata["checksum"] != checksum:
            raise BadInput(
                f"the file was altered: its checksum is {checksum}, it says {reprlib.repr(metadata['checksum'])}"
            )
        _check_values(fields, data)
        return Portable(manifest, fields, data)


def _read_header(body: bytes) -> tuple[int, dict[str, str]]:
    """Where the tensors start, and the metadata."""
    length, most = int.from_bytes(body[:8], "little"), min(HEADER_BYTES, len(body) - 8)
    if not 2 <= length <= most:
        raise BadInput(
            f"no stream's file, or cut off: of {len(body):,} bytes the header would take {length:,}, which must be "
            f"from 2 to {max(2, most):,}"
        )
    header = _from_json("header", body[8 : 8 + length])
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    if not isinstance(metadata, dict):
        raise BadInput(f"no stream's file: its header must have metadata; got {reprlib.repr(metadata)}")
    said = metadata.get("format")
    if said != _SIGNATURE:
        other = _ANY_SIGNATURE.fullmatch(said) if isinstance(said, str) else None
        if other is not None and int(other[1]) > FORMAT:
            raise BadInput(
                f"the file was written by a newer release: it has format {other[1]}, this one knows {FORMAT}"
            )
        raise BadInput(f"no stream's file: its metadata's format must be {_SIGNATURE!r}, got {reprlib.repr(said)}")
    _check_keys("metadata", metadata, _METADATA)
    for key, value in metadata.items():
        if not isinstance(value, str):
            raise BadInput(f"the file's metadata must be text; {key} is {type(value).__name__}")
    return 8 + length, metadata


def _read_manifest(text: str) -> Manifest:
    _check_keys("manifest", _from_json("manifest", text), [field.name for field in dataclasses.fields(Manifest)])
    try:
        return _MANIFEST.validate_json(text)
    except ValidationError as error:
        raise BadInput(f"the file's manifest cannot be used:\n{explain(error)}") from error


def _read_fields(text: str) -> tuple[Field, ...]:
    """The tensors that the file lists; their sizes are whole numbers of a sane length."""
    listed = _from_json("list of tensors", text)
    if not isinstance(listed, list):
        raise BadInput(f"the file's tensors must be a list, got {type(listed).__name__}")
    fields: dict[str, Field] = {}
    for entry in listed:
        match entry:
            case [str(name), str(dtype), [*shape]]:
                told = reprlib.repr(name)
            case _:
                raise BadInput(f"each of the file's tensors must be [name, dtype, shape], got {reprlib.repr(entry)}")
        if not _NAME.fullmatch(name):
            raise BadInput(f"a tensor's name must be weights/<key> or memory/<key>, got {told}")
        if name in fields:
            raise BadInput(f"the file's tensors must differ in name, got {told} twice")
        if dtype not in _KINDS:
            raise BadInput(f"the dtype of {told} must be one of {', '.join(_KINDS)}, got {reprlib.repr(dtype)}")
        are_sizes = len(shape) <= DIMENSIONS and all(type(size) is int and size >= 0 for size in shape)
        if not are_sizes or math.prod(shape) >= 2**63:
            raise BadInput(
                f"the shape of {told} must be at most {DIMENSIONS} whole numbers with a product below 2^63, "
                f"got {reprlib.repr(shape)}"
            )
        fields[name] = Field(name, dtype, tuple(shape))
    return tuple(fields.values())


def _read_tensors(body: bytes, fields: Sequence[Field]) -> bytes:
    """The tensors' bytes in the order of ``fields``, once they are known to be as many as the file has."""
    try:
        found = dict(deserialize(body))  # type: ignore[no-untyped-call]
    except SafetensorError as error:
        raise BadInput(f"the file's tensors cannot be read: {str(error)[:200]}") from error
    stored = {Field(name, tensor["dtype"], tuple(tensor["shape"])) for name, tensor in found.items()}
    if stored != set(fields):
        listed, others = min(set(fields) - stored, default=None), min(stored - set(fields), default=None)
        raise BadInput(
            f"the file's tensors are not those it lists: it lists {_described(listed)}, it has {_described(others)}"
        )
    return b"".join(found[field.name]["data"] for field in fields)


def _check_values(fields: Sequence[Field], data: bytes) -> None:
    """Raises ``BadInput`` for what no tensor of a server's can hold."""
    place = 0
    for field in fields:
        kind, size = _KINDS[field.dtype], _size(field)
        values = np.frombuffer(data, f"<u{kind.bytes}", size // kind.bytes, place)
        if kind.exponent and np.any(values & kind.exponent == kind.exponent):
            raise BadInput(f"every number must be finite; tensor {reprlib.repr(field.name)} has an infinity or a NaN")
        if field.dtype == "BOOL" and np.any(values > 1):
            raise BadInput(f"a BOOL is 0 or 1; tensor {reprlib.repr(field.name)} has {values.max()}")
        place += size


def _described(field: Field | None) -> str:
    return "no more" if field is None else f"{reprlib.repr(field.name)} {field.dtype} {reprlib.repr(list(field.shape))}"


def _size(field: Field) -> int:
    """Bytes of a tensor."""
    return math.prod(field.shape) * _KINDS[field.dtype].bytes


def _checksum(said: Sequence[str], data: bytes) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in [*(text.encode() for text in said), data]:
        digest.update(b"%d;" % len(part))
        digest.update(part)
    return digest.hexdigest()


def _to_json(value: Any) -> str:
    return json.dumps(value, allow_nan=False, separators=(",", ":"))


def _from_json(part: str, text: str | bytes) -> Any:
    """Raises ``BadInput`` for what is no JSON and for an object with two values of one name, which two readers could
    take for different things."""
    try:
        return json.loads(str(text, "utf-8") if isinstance(text, bytes) else text, object_pairs_hook=_unique)
    except RecursionError as error:
        raise BadInput(f"the file's {part} is nested too deep") from error
    except ValueError as error:
        raise BadInput(f"the file's {part} is no JSON: {error}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for name, value in pairs:
        if name in made:
            raise ValueError(f"{reprlib.repr(name)} is there twice")
        made[name] = value
    return made


def _check_keys(part: str, value: Any, expected: Sequence[str]) -> None:
    if not isinstance(value, dict) or set(value) != set(expected):
        got = reprlib.repr(sorted(value)) if isinstance(value, dict) else type(value).__name__
        raise BadInput(f"the file's {part} must have {', '.join(expected)}; got {got}")
