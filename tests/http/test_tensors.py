"""V2 tensors: every datatype both ways, against ``struct`` and the stock client; everything else is refused."""

from __future__ import annotations

import base64
import io
import math
import struct
import tracemalloc
from collections.abc import Iterable
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import orjson
import pytest
import torch
import tritonclient.http as triton
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from tta_server.errors import BadInput, TooLarge
from tta_server.http import values
from tta_server.http.body import parse_json
from tta_server.http.schemas_v2 import InferInput, InferOutput, InferRequest
from tta_server.http.tensors import (
    DATATYPES,
    OUTPUTS,
    check_outputs,
    decode_input,
    encode_outputs,
    only,
    raw_input,
    split,
    take_binary,
)
from tta_server.http.wire import json_response
from tta_server.settings import InputSettings, LimitSettings

LIMITS = LimitSettings()
VECTOR = InputSettings(shape=(4,), range=None)
COLOUR = InputSettings(shape=(3, 8, 8))
fuzz = settings(max_examples=200, deadline=None, derandomize=True, database=None)
# Making floats of 16 bits throws many away.
briefly = settings(fuzz, max_examples=40, suppress_health_check=[HealthCheck.filter_too_much])
"""For what runs for every datatype."""

CODES = {
    "BOOL": "?", "UINT8": "B", "UINT16": "H", "UINT32": "I", "UINT64": "Q", "INT8": "b", "INT16": "h", "INT32": "i",
    "INT64": "q", "FP16": "e", "FP32": "f", "FP64": "d",
}  # fmt: skip
"""How ``struct`` calls the datatypes; it has no BF16."""
WHOLE = {
    name: (0, 1)
    if name == "BOOL"
    else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    if name[0] == "I"
    else (0, 2**bits - 1)
    for name, code in CODES.items()
    if name[:2] != "FP" and (bits := 8 * struct.calcsize("<" + code))
}
"""The least and greatest value of the datatypes of whole numbers."""


def asked(shape: list[int], datatype: str, data: Any = None, **parameters: Any) -> InferInput:
    return InferInput(name="input", shape=shape, datatype=datatype, data=data, parameters=parameters)


def decode(
    tensor: InferInput, binary: bytes | None = None, spec: InputSettings = VECTOR, at: int = 0, **limits: int
) -> Tensor:
    """Decodes the tensor, its binary data at byte ``at`` of the body."""
    view = None if binary is None else memoryview(bytearray(at) + binary)[at:]
    return decode_input(tensor, view, spec, LimitSettings(**limits))


def refused(tensor: InferInput, said: str, binary: bytes | None = None, spec: InputSettings = VECTOR) -> None:
    with pytest.raises(BadInput) as caught:
        decode(tensor, binary, spec)
    assert said in str(caught.value)
    assert len(str(caught.value)) < 500


# Parts of the body


def test_a_header_comes_once() -> None:
    assert only([]) is None
    assert only(["5"]) == "5"
    for twice in (["5", "6"], ["5", "5"]):
        with pytest.raises(BadInput, match="once, got it 2 times"):
            only(twice)


@pytest.mark.parametrize(
    ("header", "length"), [(None, 10), ("0", 0), ("3", 3), ("10", 10), ("007", 7), ("00000000000000000001", 1)]
)
def test_a_body_is_split_without_a_copy(header: str | None, length: int) -> None:
    body = bytearray(b"0123456789")
    json, binary = split(body, header, LIMITS)
    assert (bytes(json), bytes(binary)) == (b"0123456789"[:length], b"0123456789"[length:])
    assert json.obj is binary.obj is body


@pytest.mark.parametrize(
    "header", ["-1", "+3", " 3", "3 ", "", "three", "3.0", "1_0", "0x3", "3,3", "٣", "²", "1e1", "9" * 21, "9" * 9000]
)
def test_a_header_length_is_a_plain_number(header: str) -> None:
    with pytest.raises(BadInput, match="must be a number of bytes, got") as caught:
        split(bytearray(10), header, LIMITS)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("header", ["11", "18446744073709551616", "9" * 20])
def test_a_header_length_is_within_the_body(header: str) -> None:
    with pytest.raises(BadInput, match=f"is {header}, but the body has 10 bytes"):
        split(bytearray(10), header, LIMITS)


def test_a_header_over_the_limit_of_json_is_refused() -> None:
    limits = LimitSettings(json_bytes=5)
    assert len(split(bytearray(10), "5", limits)[0]) == 5
    with pytest.raises(TooLarge, match=r"limits\.json_bytes = 5"):
        split(bytearray(10), "6", limits)


@fuzz
@given(st.lists(st.none() | st.binary(max_size=5), max_size=6))
def test_binary_data_are_taken_in_listed_order(parts: list[bytes | None]) -> None:
    inputs = [
        asked([1], "FP32", data=[0.5]) if part is None else asked([1], "FP32", binary_data_size=len(part))
        for part in parts
    ]
    taken = take_binary(inputs, memoryview(b"".join(part or b"" for part in parts)))
    assert [None if one is None else bytes(one) for one in taken] == parts


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"binary_data_size": 9}, "promises 9 bytes of binary data, but only 8 are there"),
        ({"binary_data_size": 2**63}, "promises 9223372036854775808 bytes"),
        ({"binary_data_size": 7}, "promise 7 bytes of binary data, but 8 follow the JSON"),
        ({"binary_data_size": 0}, "promise 0 bytes of binary data, but 8 follow the JSON"),
        ({}, "promise 0 bytes of binary data, but 8 follow the JSON"),
        ({"binary_data_size": -1}, "must be a number of bytes, got -1"),
        ({"binary_data_size": True}, "must be a number of bytes, got True"),
        ({"binary_data_size": 8.0}, "must be a number of bytes, got 8.0"),
        ({"binary_data_size": "8"}, "must be a number of bytes, got '8'"),
        ({"binary_data_size": None}, "must be a number of bytes, got None"),
        ({"binary_data_size": ["x" * 10**6]}, "must be a number of bytes, got ["),
        ({"shared_memory_region": "a", "shared_memory_byte_size": 8}, "shared memory is not offered"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_binary_data_that_do_not_fit_are_refused(parameters: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInput) as caught:
        take_binary([asked([2], "FP32", **parameters)], memoryview(bytes(8)))
    assert said in str(caught.value)
    assert len(str(caught.value)) < 200


def test_what_one_input_took_is_gone_for_the_next() -> None:
    with pytest.raises(BadInput, match="promises 5 bytes of binary data, but only 3 are there"):
        take_binary([asked([1], "FP32", binary_data_size=5)] * 2, memoryview(bytes(8)))


def test_data_come_in_one_way_only() -> None:
    with pytest.raises(BadInput, match="both data and binary_data_size"):
        take_binary([asked([2], "FP32", data=[0.5, 0.5], binary_data_size=8)], memoryview(bytes(8)))


# Numbers


def nearest(value: Any) -> float:
    """The float32 next to a value, from exact fractions."""
    if isinstance(value, float) and not math.isfinite(value):
        return value
    exact = abs(Fraction(value))
    if exact == 0:
        return float(value)
    exponent = max(math.frexp(float(exact))[1] - 24, -149)
    scaled = exact / Fraction(2) ** exponent
    if scaled >= 2**24:  # the double was rounded down to a power of two
        exponent, scaled = exponent + 1, scaled / 2
    rounded = round(scaled)  # to even
    if exponent + rounded.bit_length() > 128:
        return math.copysign(math.inf, value)
    return math.copysign(math.ldexp(rounded, exponent), value)


def same(got: Iterable[float], expected: Iterable[float]) -> None:
    for one, other in zip(got, expected, strict=True):
        assert one == other or (math.isnan(one) and math.isnan(other))


SHAPES = st.sampled_from([[0], [1], [4], [1, 4], [2, 4], [0, 4], [3, 2, 2], [], [2, 0, 3]])


@pytest.mark.parametrize("datatype", [one for one in CODES if one != "UINT8"])
@briefly
@given(shape=SHAPES, at=st.integers(0, 9), draw=st.data())
def test_binary_numbers_keep_their_value_and_place(datatype: str, shape: list[int], at: int, draw: Any) -> None:
    layout = f"<{math.prod(shape)}{CODES[datatype]}"
    size = struct.calcsize(layout)
    raw = draw.draw(st.binary(min_size=size, max_size=size))
    if datatype == "BOOL":
        raw = bytes(byte & 1 for byte in raw)
    x = decode(asked(shape, datatype), raw, at=at)
    assert (x.dtype, list(x.shape)) == (torch.float32, shape)
    same(x.flatten().tolist(), [nearest(one) for one in struct.unpack(layout, raw)])


@pytest.mark.parametrize(
    ("datatype", "raw"), [("FP16", "007d"), ("FP32", "0000a07f"), ("FP64", "000000000000f47f"), ("BF16", "a07f")]
)
def test_a_signalling_nan_is_taken_quietly(datatype: str, raw: str) -> None:
    """The processor raises a flag over it, of which numpy warns."""
    assert decode(asked([4], datatype), bytes.fromhex(raw) * 4).isnan().all()


@fuzz
@given(raw=st.binary(min_size=16, max_size=16), at=st.integers(0, 9))
def test_bf16_is_the_upper_half_of_fp32(raw: bytes, at: int) -> None:
    x = decode(asked([2, 4], "BF16"), raw, at=at)
    same(x.flatten().tolist(), [struct.unpack("<f", b"\0\0" + raw[i : i + 2])[0] for i in range(0, 16, 2)])


def numbers_of(datatype: str) -> st.SearchStrategy[Any]:
    if datatype == "BOOL":
        return st.booleans() | st.integers(0, 1)
    if datatype in WHOLE:
        low, high = WHOLE[datatype]
        return st.integers(low, high) | st.sampled_from([low, high])
    width = {"FP16": 16, "FP32": 32, "FP64": 64}[datatype]
    return st.floats(width=width, allow_nan=False, allow_infinity=False)  # type: ignore[arg-type]  # one of the three


@pytest.mark.parametrize("datatype", [one for one in CODES if one != "UINT8"])
@pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
@briefly
@given(draw=st.data())
def test_json_numbers_keep_their_value_and_place(datatype: str, nested: bool, draw: Any) -> None:
    data = draw.draw(st.lists(numbers_of(datatype), min_size=8, max_size=8))
    written = orjson.loads(orjson.dumps([data[:4], data[4:]] if nested else data))
    x = decode(asked([2, 4], datatype, written))
    same(x.flatten().tolist(), [nearest(one) for one in data])


@pytest.mark.parametrize(("datatype", "value", "taken"), [("FP16", 0.1, 0.0999755859375), ("FP32", 0.1, nearest(0.1))])
def test_json_floats_are_rounded_to_their_datatype(datatype: str, value: float, taken: float) -> None:
    assert decode(asked([1, 4], datatype, [value] * 4)).tolist() == [[taken] * 4]


@pytest.mark.parametrize(("datatype", "value"), [("FP16", 70_000.0), ("FP32", 1e39), ("FP64", 1e39), ("FP64", -1e300)])
def test_what_overflows_becomes_infinite_and_is_left_to_be_refused(datatype: str, value: float) -> None:
    assert decode(asked([4], datatype, [value] * 4)).isinf().all()


@pytest.mark.parametrize("binary", [False, True])
def test_uint8_are_pixels(binary: bool) -> None:
    spec = InputSettings(shape=(3,), range=(-1.0, 1.0))
    x = decode(asked([1, 3], "UINT8", None if binary else [0, 51, 255]), b"\x00\x33\xff" if binary else None, spec)
    assert x[0].tolist() == pytest.approx([-1.0, -0.6, 1.0])


@pytest.mark.parametrize("at", range(8))
def test_aligned_fp32_is_not_copied(at: int) -> None:
    body = bytearray(at) + np.arange(8, dtype="<f4").tobytes()
    x = decode_input(asked([2, 4], "FP32"), memoryview(body)[at:], VECTOR, LIMITS)
    assert x.flatten().tolist() == list(range(8))
    assert np.shares_memory(x.numpy(), np.frombuffer(body, np.uint8)) is (at % 4 == 0)
    x += 1  # it may be written to in any case


@pytest.mark.parametrize("datatype", ["UINT8", "FP32", "FP64"])
def test_bytes_that_must_not_be_written_to_are_copied(datatype: str) -> None:
    raw = bytes(DATATYPES[datatype].itemsize * 4)
    x = decode_input(asked([1, 4], datatype), memoryview(raw), VECTOR, LIMITS)
    x += 1
    assert not any(raw)


@pytest.mark.parametrize("byte", [2, 128, 255])
def test_a_boolean_is_0_or_1(byte: int) -> None:
    refused(asked([4], "BOOL"), f"must be 0 or 1, got {byte}", bytes([0, 1, byte, 1]))


@pytest.mark.parametrize("datatype", WHOLE)
@pytest.mark.parametrize("wrong", ["below", "above", "fraction", "huge", "text", "null", "boolean"])
def test_json_is_checked_against_the_datatype(datatype: str, wrong: str) -> None:
    low, high = WHOLE[datatype]
    value = {
        "below": low - 1, "above": high + 1, "fraction": 0.5, "huge": 1e300, "text": "1", "null": None,
        "boolean": "true" if datatype == "BOOL" else True,
    }[wrong]  # fmt: skip
    said = f"whole numbers from {low} to {high}, got "
    refused(asked([4], datatype, [value, 1, 1, 1]), said)
    refused(asked([1, 4], datatype, [[1, 1, 0, value]]), said)


@pytest.mark.parametrize(
    ("datatype", "text", "taken"),
    [
        ("UINT64", "18446744073709551615", True),
        ("UINT64", "18446744073709551616", False),
        ("INT64", "9223372036854775807", True),
        ("INT64", "9223372036854775808", False),
        ("INT64", "-9223372036854775808", True),
        ("INT64", "-9223372036854775809", False),
        ("INT64", "9223372036854774784.0", False),
        ("INT64", "9007199254740992.0", True),
        ("INT8", "127.0", True),
        ("INT8", "128.0", False),
        ("INT8", "1.5", False),
        ("INT8", "1e2", True),
        ("INT32", "true", False),
        ("UINT8", "-0.0", True),
        ("BOOL", "1.0", True),
    ],
)
def test_whole_numbers_never_pass_through_a_rounded_float(datatype: str, text: str, taken: bool) -> None:
    data = orjson.loads(f"[{text}, 0, 1, 1]")
    if not taken:
        refused(asked([4], datatype, data), "whole numbers from")
    elif datatype != "UINT8":
        assert decode(asked([4], datatype, data))[0].item() == nearest(Fraction(text))


@pytest.mark.parametrize("datatype", ["FP32", "FP16", "FP64"])
@pytest.mark.parametrize(
    ("data", "said"),
    [
        ([0.5, "2", 0.5, 0.5], "got a string"),
        ([0.5, 0.5, 0.5, None], "got null"),
        ([0.5, True, 0.5, 0.5], "got a boolean"),
        ([[0.5], 0.5, 0.5, 0.5], "got a list beside a number"),
        ([[0.5, 0.5, 0.5], [0.5]], "got lists of 1 and 3"),
        ({"a": 1}, "got an object"),
        ("cat", "got a string"),
        ([0.5] * 3, "needs 4 values, got 3"),
        ([0.5] * 5, "needs 4 values, got 5"),
        (None, "has no data"),
    ],
    ids=str,
)
def test_json_that_does_not_fit_is_refused(datatype: str, data: Any, said: str) -> None:
    refused(asked([1, 4], datatype, data), said)


@pytest.mark.parametrize("datatype", [one for one in DATATYPES if one != "BYTES"])
@pytest.mark.parametrize("change", [-1, 1, 4])
def test_binary_data_of_another_length_are_refused(datatype: str, change: int) -> None:
    size = 4 * DATATYPES[datatype].itemsize
    said = f"of datatype {datatype} and shape [1, 4] needs {size} bytes, got {size + change}"
    refused(asked([1, 4], datatype), said, bytes(size + change))


def test_bf16_is_binary_only() -> None:
    refused(asked([1, 4], "BF16", [0.5] * 4), "binary data only")


@pytest.mark.parametrize("datatype", ["", "fp32", "FP8", "INT4", "STRING", "float32", "X" * 5000])
def test_other_datatypes_are_refused(datatype: str) -> None:
    refused(asked([1], datatype, [0.5]), "one of the datatypes BOOL UINT8 ")
    refused(asked([1], datatype), f", got {datatype[:50]}", bytes(4))


@pytest.mark.parametrize(
    "shape",
    [[-1, 4], [-1, -4], [0, -1], [2**40, 2**40], [2**62, 4], [0, 2**63], [0, 2**62, 8], [1] * 33, [1] * 10**5],
    ids=lambda shape: str(shape)[:40],
)
@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("datatype", ["FP32", "UINT8", "BYTES"])
def test_impossible_shapes_are_refused(shape: list[int], binary: bool, datatype: str) -> None:
    refused(asked(shape, datatype, None if binary else []), "impossible shape", b"" if binary else None)


def test_more_values_than_the_rows_allowed_are_refused_before_they_are_converted() -> None:
    said = r"1 to 2 rows \(limits\.rows_per_request\) of shape \[4\], that is at most 8 values, got 12"
    for tensor, binary in [
        (asked([3, 4], "FP32", ["x"] * 12), None),
        (asked([3, 4], "BOOL"), b"\2" * 12),
        (asked([12], "BF16", [0.5]), None),
    ]:
        with pytest.raises(BadInput, match=said):
            decode(tensor, binary, rows_per_request=2)
    assert decode(asked([2, 4], "FP32"), bytes(32), rows_per_request=2).shape == (2, 4)
    with pytest.raises(BadInput, match=r"1 to 2 rows .limits\.rows_per_request., got 3"):
        decode(asked([3], "BYTES"), b"", COLOUR, rows_per_request=2)


@pytest.mark.parametrize("datatype", ["FP32", "INT64", "BYTES"])
def test_a_long_text_among_many_does_not_multiply(datatype: str) -> None:
    """An array of fixed-width texts would take 4 bytes x the longest x the number of them: 800 MB for 90 KB."""
    data = ["x" * 10_000, *[""] * 190]
    tracemalloc.start()
    try:
        refused(asked([191], datatype, data), "", spec=COLOUR)
        assert tracemalloc.get_traced_memory()[1] < 1e6
    finally:
        tracemalloc.stop()


# Encoded images

RANDOM = np.random.default_rng(0)
PIXELS = RANDOM.integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)


def png(pixels: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


PNGS = [png(one) for one in PIXELS]
ROWS = torch.from_numpy(PIXELS.transpose(0, 3, 1, 2).astype(np.float32)) / 255


def elements(*bodies: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(one)) + one for one in bodies)


def text(body: bytes) -> str:
    return base64.b64encode(body).decode()


@pytest.mark.parametrize("column", [False, True])
@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("count", range(4))
def test_bytes_are_encoded_images(column: bool, binary: bool, count: int) -> None:
    shape = [count, 1] if column else [count]
    data = [[text(one)] if column else text(one) for one in PNGS[:count]]
    tensor = asked(shape, "BYTES", None if binary else data)
    x = decode(tensor, elements(*PNGS[:count]) if binary else None, COLOUR)
    assert (x.dtype, tuple(x.shape)) == (torch.float32, (count, 3, 8, 8))
    torch.testing.assert_close(x, ROWS[:count])


@pytest.mark.parametrize(
    ("shape", "data", "said"),
    [
        ([], ["x"], "of shape [N] or [N, 1], got []"),
        ([1, 2], ["x", "x"], "of shape [N] or [N, 1], got [1, 2]"),
        ([1, 1, 1], ["x"], "of shape [N] or [N, 1], got [1, 1, 1]"),
        ([2], [text(PNGS[0])], "of 2 elements got 1"),
        ([1], [text(PNGS[0])] * 2, "of 1 elements got 2"),
        ([1], text(PNGS[0]), "a list of base64 texts"),
        ([1], [5], "a list of base64 texts"),
        ([2], [text(PNGS[0]), None], "a list of base64 texts"),
        ([1], {"b64": ""}, "a list of base64 texts"),
        ([1], ["no base64!"], "base64 texts"),
        ([1], ["abc"], "base64 texts"),
        ([1], ["äöü"], "base64 texts"),
        ([1], [text(PNGS[0])[:-4] + "\n" + text(PNGS[0])[-4:]], "base64 texts"),
        ([1], [""], "element 0 of input 'input' is not a PNG or JPEG image"),
        ([2], [text(PNGS[0]), text(b"GIF89a")], "element 1 of input 'input' is not a PNG or JPEG image"),
        ([1], [text(PNGS[0][:40])], "element 0 of input 'input' is not a readable PNG or JPEG image"),
        ([1], [text(png(PIXELS[0][:4]))], "element 0 of input 'input' must be 8 x 8 pixels, got 8 x 4"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_json_bytes_that_are_no_images_are_refused(shape: list[int], data: Any, said: str) -> None:
    refused(asked(shape, "BYTES", data), said, spec=COLOUR)


@pytest.mark.parametrize(
    ("count", "binary", "said"),
    [
        (1, b"", "within element 0"),
        (1, b"\1\0\0", "within element 0"),
        (1, b"\1\0\0\0", "within element 0"),
        (1, b"\xff\xff\xff\xffx", "within element 0"),
        (2, elements(PNGS[0]), "within element 1"),
        (2, elements(*PNGS[:2])[:-1], "within element 1"),
        (1, elements(*PNGS[:2]), "of 1 elements needs"),
        (1, elements(PNGS[0]) + b"\0", "of 1 elements needs"),
        (0, b"\0", "of 0 elements needs 0 bytes, got 1"),
        (1, elements(b""), "not a PNG or JPEG image"),
        (1, elements(b"GIF89a"), "not a PNG or JPEG image"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_binary_bytes_that_are_no_images_are_refused(count: int, binary: bytes, said: str) -> None:
    refused(asked([count], "BYTES"), said, binary, COLOUR)


def test_a_model_without_pixels_takes_no_images() -> None:
    refused(asked([1], "BYTES"), "takes [4] rows, not images", elements(PNGS[0]))


# Raw bodies


@pytest.mark.parametrize("datatype", [*CODES, "BF16"])
@pytest.mark.parametrize("rows", range(3))
def test_a_raw_body_is_as_many_rows_as_it_holds(datatype: str, rows: int) -> None:
    raw = bytes(RANDOM.integers(0, 2, rows * 4 * DATATYPES[datatype].itemsize, dtype=np.uint8))
    x = raw_input(memoryview(bytearray(raw)), VECTOR, LIMITS, datatype)
    assert torch.equal(x, decode(asked([rows, 4], datatype), raw))
    if datatype == "FP32":
        assert torch.equal(x, raw_input(memoryview(bytearray(raw)), VECTOR, LIMITS))


@pytest.mark.parametrize(
    ("size", "datatype", "said"),
    [
        (15, "FP32", "a multiple of 16 bytes, got 15"),
        (20, "FP32", "rows of shape [4], a multiple of 16 bytes, got 20"),
        (48, "FP32", "1 to 2 rows (limits.rows_per_request) of shape [4], that is at most 8 values, got 12"),
        (16, "BYTES", "not BYTES"),
        (16, "FP8", "got FP8"),
    ],
)
def test_raw_bodies_that_do_not_fit_are_refused(size: int, datatype: str, said: str) -> None:
    with pytest.raises(BadInput) as caught:
        raw_input(memoryview(bytearray(size)), VECTOR, LimitSettings(rows_per_request=2), datatype)
    assert said in str(caught.value)


# Outputs

LOGITS = torch.tensor([[0.5, 2.0, -1.0, 2.0], [1.25, 0.0, 3.5, -2.0]])
CLASSES = ("ant", "bee", "cät", "dog:1")


def outputs(*names: str, **parameters: Any) -> list[InferOutput]:
    return [InferOutput(name=name, parameters=parameters) for name in names]


def softmax(row: list[float]) -> list[float]:
    weights = [math.exp(one) for one in row]
    return [one / sum(weights) for one in weights]


EXPECTED = {"logits": LOGITS.tolist(), "probabilities": [softmax(row) for row in LOGITS.tolist()]}


@pytest.mark.parametrize("names", [(), ("logits",), ("probabilities",), ("probabilities", "logits")], ids=str)
@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("default", [False, True])
@pytest.mark.parametrize("said", [False, True], ids=["default", "said"])
def test_outputs_are_as_asked(names: tuple[str, ...], binary: bool, default: bool, said: bool) -> None:
    wanted = outputs(*names, **({"binary_data": binary} if said else {}))
    entries, blobs = encode_outputs(wanted, default, LOGITS, CLASSES)
    assert [one["name"] for one in entries] == list(names or OUTPUTS)
    as_binary = binary if said and names else default
    assert len(blobs) == (len(entries) if as_binary else 0)
    for number, entry in enumerate(entries):
        assert (entry["datatype"], entry["shape"]) == ("FP32", [2, 4])
        if as_binary:
            assert entry["parameters"] == {"binary_data_size": 32} == {"binary_data_size": len(blobs[number])}
            flat = list(struct.unpack("<8f", blobs[number]))
            assert "data" not in entry
        else:
            flat = entry["data"].tolist()
            assert "parameters" not in entry
        assert flat == pytest.approx([*EXPECTED[entry["name"]][0], *EXPECTED[entry["name"]][1]], rel=1e-6)


def test_each_output_has_its_own_form() -> None:
    wanted = outputs("logits", binary_data=True) + outputs("probabilities", binary_data=False)
    (logits, probabilities), blobs = encode_outputs(wanted, False, LOGITS, CLASSES)
    assert len(blobs) == 1
    assert "data" not in logits
    assert "data" in probabilities


@pytest.mark.parametrize("k", [1, 2, 4, 5, 2**63])
@pytest.mark.parametrize("binary", [False, True])
def test_the_best_classes(k: int, binary: bool) -> None:
    [entry], blobs = encode_outputs(outputs("logits", classification=k), binary, LOGITS, CLASSES)
    best = [
        ["2.000000:1:bee", "2.000000:3:dog:1", "0.500000:0:ant", "-1.000000:2:cät"],
        ["3.500000:2:cät", "1.250000:0:ant", "0.000000:1:bee", "-2.000000:3:dog:1"],
    ]
    expected = [one for row in best for one in row[:k]]
    assert (entry["datatype"], entry["shape"]) == ("BYTES", [2, min(k, 4)])
    if binary:
        assert blobs == [elements(*map(str.encode, expected))]
        assert entry["parameters"] == {"binary_data_size": len(blobs[0])}
    else:
        assert entry["data"] == expected
        assert blobs == []


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        (outputs("classes"), "no output 'classes'; there are logits and probabilities"),
        (outputs("x" * 10**6), "there are logits and probabilities"),
        (outputs("logits", "logits"), "'logits' is asked for twice"),
        (outputs("logits", binary_data=1), "binary_data must be true or false, got 1"),
        (outputs("logits", binary_data="true"), "binary_data must be true or false, got 'true'"),
        (outputs("logits", binary_data=None), "binary_data must be true or false, got None"),
        (outputs("logits", classification=0), "from 1 on, got 0"),
        (outputs("logits", classification=-1), "from 1 on, got -1"),
        (outputs("logits", classification=True), "from 1 on, got True"),
        (outputs("logits", classification=2.0), "from 1 on, got 2.0"),
        (outputs("logits", classification=None), "from 1 on, got None"),
        (outputs("logits", shared_memory_region="a"), "shared memory is not offered"),
    ],
    ids=lambda value: None if isinstance(value, str) else str(value[0].parameters),
)
def test_wrong_outputs_are_refused(wanted: list[InferOutput], said: str) -> None:
    for refuse in (lambda: check_outputs(wanted), lambda: encode_outputs(wanted, True, LOGITS, CLASSES)):
        with pytest.raises(BadInput) as caught:
            refuse()
        assert said in str(caught.value)
        assert len(str(caught.value)) < 200


# The stock client

NUMPY = {
    "BOOL": np.bool_, "UINT8": np.uint8, "UINT16": np.uint16, "UINT32": np.uint32, "UINT64": np.uint64, "INT8": np.int8,
    "INT16": np.int16, "INT32": np.int32, "INT64": np.int64, "FP16": np.float16, "FP32": np.float32,
    "FP64": np.float64, "BF16": ml_dtypes.bfloat16,
}  # fmt: skip


def read(body: bytes, json_size: int | None) -> list[Tensor]:
    """The inputs of a request as the stock client builds it."""
    json, binary = split(bytearray(body), None if json_size is None else str(json_size), LIMITS)
    inputs = InferRequest.model_validate(parse_json(json, LIMITS)).inputs
    return [
        decode_input(tensor, part, COLOUR, LIMITS)
        for tensor, part in zip(inputs, take_binary(inputs, binary), strict=True)
    ]


@pytest.mark.parametrize("datatype", [*NUMPY, "BYTES"])
@pytest.mark.parametrize("rows", [0, 1, 3])
def test_what_the_stock_client_sends(datatype: str, rows: int) -> None:
    whole = (RANDOM.random((rows, 3, 8, 8)) * 200).round() % (2 if datatype == "BOOL" else 128)
    array = np.array(PNGS[:rows], object) if datatype == "BYTES" else whole.astype(NUMPY[datatype])
    expected = ROWS[:rows] if datatype == "BYTES" else torch.from_numpy(array.astype(np.float32))
    tensors = []
    for at, binary in enumerate([True, True, False]):
        tensors.append(triton.InferInput(f"input{at}", list(array.shape), datatype))
        if binary or datatype not in ("BYTES", "BF16"):
            tensors[-1].set_data_from_numpy(array, binary_data=binary)
        else:
            tensors.pop()
    for x in read(*triton.InferenceServerClient.generate_request_body(tensors)):
        torch.testing.assert_close(x, expected / 255 if datatype == "UINT8" else expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("rows", [0, 2])
def test_what_the_stock_client_reads(binary: bool, rows: int) -> None:
    wanted = [triton.InferRequestedOutput("logits", binary), triton.InferRequestedOutput("probabilities", True, 2)]
    body, size = triton.InferenceServerClient.generate_request_body([], outputs=wanted)
    parsed = InferRequest.model_validate(parse_json(split(bytearray(body), size, LIMITS)[0], LIMITS))
    entries, blobs = encode_outputs(parsed.outputs, False, LOGITS[:rows], CLASSES)
    header = bytes(json_response({"model_name": "m", "outputs": entries}).body)
    result = triton.InferenceServerClient.parse_response_body(header + b"".join(blobs), header_length=len(header))
    np.testing.assert_array_equal(result.as_numpy("logits"), LOGITS[:rows].numpy())
    best = result.as_numpy("probabilities")
    assert best.shape == (rows, 2)
    for row, (label, index) in zip(best, [("bee", 1), ("cät", 2)], strict=False):
        assert row[0].decode().split(":")[1:] == [str(index), label]


# Anything


@fuzz
@given(
    data=st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(2**63), 2**64 - 1)
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(max_size=4)
        | st.just(text(PNGS[0])),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=1), inner, max_size=1),
        max_leaves=8,
    ),
    datatype=st.sampled_from([*DATATYPES, ""]),
    shape=st.lists(st.sampled_from([0, 1, 2, 4, -1, 2**31, 2**40, 2**62, 2**63, 2**64 - 1]), max_size=4),
    spec=st.sampled_from([VECTOR, COLOUR]),
)
@example(data=[], datatype="FP32", shape=[0, 2**59], spec=VECTOR)
@example(data=[], datatype="UINT8", shape=[0, 2**62, 8], spec=VECTOR)
@example(data=[0.5], datatype="FP32", shape=[1] * 65, spec=VECTOR)
def test_json_is_read_as_its_shape_says_or_refused(data: Any, datatype: str, shape: list[int], spec: Any) -> None:
    try:
        x = decode(asked(shape, datatype, data), spec=spec)
    except BadInput:
        return
    assert list(x.shape) == shape or (datatype == "BYTES" and list(x.shape) == [shape[0], *spec.shape])
    assert x.dtype == torch.float32


@fuzz
@given(
    binary=st.binary(max_size=40)
    | st.lists(st.sampled_from([*PNGS, b"", b"x"]), max_size=3).map(lambda s: elements(*s)),
    datatype=st.sampled_from([*DATATYPES, ""]),
    shape=st.lists(st.sampled_from([0, 1, 2, 4, -1, 2**40, 2**62]), max_size=3),
    spec=st.sampled_from([VECTOR, COLOUR]),
    at=st.integers(0, 3),
)
def test_bytes_are_read_as_their_shape_says_or_refused(
    binary: bytes, datatype: str, shape: list[int], spec: InputSettings, at: int
) -> None:
    try:
        x = decode(asked(shape, datatype), binary, spec, at)
    except BadInput:
        return
    assert list(x.shape) == shape or (datatype == "BYTES" and list(x.shape) == [shape[0], *spec.shape])
    assert x.dtype == torch.float32


@fuzz
@given(
    st.binary(max_size=60),
    st.none() | st.text(max_size=4) | st.integers(-5, 70).map(str),
    st.lists(st.none() | st.integers(-2, 70) | st.floats() | st.booleans() | st.text(max_size=2), max_size=3),
)
def test_any_parts_are_taken_or_refused(body: bytes, header: str | None, sizes: list[Any]) -> None:
    try:
        json, binary = split(bytearray(body), header, LIMITS)
        parts = take_binary([asked([1], "FP32", binary_data_size=size) for size in sizes], binary)
    except BadInput:
        return
    assert bytes(json) + b"".join(bytes(one) for one in parts if one is not None) == body


def test_the_table_of_datatypes() -> None:
    assert list(DATATYPES) == list(values.DATATYPES)
    sizes = {name: struct.calcsize("<" + code) for name, code in CODES.items()} | {"BF16": 2}
    assert {name: dtype.itemsize for name, dtype in DATATYPES.items() if name != "BYTES"} == sizes
