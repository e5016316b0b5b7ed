"""Bodies to tensors: what is read, value by value, and that everything else is refused as ``BadInput``."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zlib
from typing import Any

import numpy as np
import orjson
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin
from torch import Tensor

from tta_server.errors import BadInput
from tta_server.http.codec import decode_inputs, decode_tensor
from tta_server.settings import InputSettings

COLOUR = InputSettings(shape=(3, 8, 8))
GREY = InputSettings(shape=(1, 4, 6))
VECTOR = InputSettings(shape=(4,), range=None)

RANDOM = np.random.default_rng(0)
PIXELS = RANDOM.integers(0, 256, (8, 8, 3), dtype=np.uint8)
ROW = torch.from_numpy(PIXELS.transpose(2, 0, 1).astype(np.float32)) / 255


def decode(body: bytes, spec: InputSettings, max_rows: int = 1024) -> Tensor:
    return decode_inputs(body, spec, max_rows)


def npy(array: Any, **arguments: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **arguments)
    return file.getvalue()


def npy_with(header: str, body: bytes = b"", version: tuple[int, int] = (1, 0)) -> bytes:
    """A ``.npy`` file whose header says whatever it likes."""
    length = struct.pack("<H" if version == (1, 0) else "<I", len(header))
    return b"\x93NUMPY" + bytes(version) + length + header.encode("latin1") + body


def shaped(shape: str, descr: str = "'<f4'") -> str:
    return f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n"


def image(pixels: Any, format: str, **arguments: Any) -> bytes:
    file = io.BytesIO()
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(file, format, **arguments)
    return file.getvalue()


def refused(body: bytes, said: str = "", spec: InputSettings = COLOUR) -> None:
    with pytest.raises(BadInput) as caught:
        decode(body, spec)
    assert said in str(caught.value)


# .npy


@pytest.mark.parametrize("kind", ["<f4", ">f4", "<f8", "<f2", "=i4"])
@pytest.mark.parametrize("fortran", [False, True])
@pytest.mark.parametrize("single", [False, True], ids=["batch", "row"])
def test_npy_numbers_are_taken_as_they_are(kind: str, fortran: bool, single: bool) -> None:
    values = RANDOM.integers(0, 2, (2, 3, 8, 8)).astype(kind)
    array = np.asarray(values[0] if single else values, order="F" if fortran else "C")
    x = decode(npy(array), COLOUR)
    assert x.dtype == torch.float32
    assert x.is_contiguous()
    expected = torch.from_numpy(values.astype(np.float32))
    assert torch.equal(x, expected[:1] if single else expected)


@pytest.mark.parametrize("fortran", [False, True])
def test_npy_bytes_are_pixels(fortran: bool) -> None:
    array = np.asarray(PIXELS.transpose(2, 0, 1)[None], order="F" if fortran else "C")
    torch.testing.assert_close(decode(npy(array), COLOUR)[0], ROW)


@pytest.mark.parametrize(
    ("range", "ends"), [((-1.0, 1.0), (-1.0, 1.0)), ((0.0, 255.0), (0.0, 255.0)), (None, (0.0, 1.0))]
)
def test_pixels_spread_over_the_models_range(range: tuple[float, float] | None, ends: tuple[float, float]) -> None:
    spec = InputSettings(shape=(2,), range=range)
    x = decode(npy(np.array([[0, 255]], dtype=np.uint8)), spec)
    assert x[0].tolist() == pytest.approx(ends)


def test_a_decoded_array_does_not_share_memory_with_the_body() -> None:
    body = npy(np.zeros((1, 3, 8, 8), dtype=np.float32))
    x = decode(body, COLOUR)
    x += 1
    assert decode(body, COLOUR).sum() == 0


@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
def test_npy_versions(version: tuple[int, int]) -> None:
    body = npy_with(shaped("(1, 3, 8, 8)"), bytes(768), version)
    assert decode(body, COLOUR).shape == (1, 3, 8, 8)


@pytest.mark.parametrize("version", [(0, 0), (1, 1), (2, 1), (3, 0), (9, 0), (255, 255)])
def test_other_npy_versions_are_refused_by_name(version: tuple[int, int]) -> None:
    said = f"version {version[0]}.{version[1]}, not 1.0 and 2.0"
    refused(npy_with(shaped("(1, 3, 8, 8)"), bytes(768), version), said)


def test_npy_values_beyond_float32_become_infinite_and_are_left_to_be_refused() -> None:
    assert decode(npy(np.full((1, 3, 8, 8), 1e300)), COLOUR).isinf().all()


@pytest.mark.parametrize(
    "kind",
    [object, "U4", "S4", "?", "c8", "M8[s]", [("a", "f4")]],
    ids=["object", "str", "bytes", "bool", "complex", "date", "record"],
)
def test_npy_of_anything_but_numbers_is_refused(kind: Any) -> None:
    refused(npy(np.zeros((2, 2), dtype=kind), allow_pickle=True), "must hold numbers")


@pytest.mark.parametrize("missing", [1, 4, 700, 767, 768])
def test_a_truncated_npy_says_how_much_is_missing(missing: int) -> None:
    whole = npy(np.zeros((1, 3, 8, 8), dtype=np.float32))
    refused(whole[:-missing], f"promises 768 bytes (float32 [1, 3, 8, 8]), the body holds {768 - missing}")


def test_trailing_bytes_are_refused() -> None:
    refused(npy(np.zeros((1, 3, 8, 8), dtype=np.float32)) + b"x", "the body holds 769")


def test_a_header_that_promises_too_much_allocates_nothing() -> None:
    refused(npy_with(shaped(f"({2**50}, 3, 8, 8)")), "the body holds 0")


@pytest.mark.parametrize(
    "body",
    [
        b"\x93NUMPY",
        b"\x93NUMPY\x01\x00",
        b"\x93NUMPY\x01\x00\xff\xff",
        b"\x93NUMPY\x01\x00\x05\x00abc",
        npy_with("nonsense"),
        npy_with("{}"),
        npy_with("[1, 2]"),
        npy_with("{'descr': '<f4'}"),
        npy_with(shaped("5")),
        npy_with(shaped("('a',)")),
        npy_with(shaped("(1,)", descr="'nonsense'")),
        npy_with(shaped("(1,)", descr="[1]")),
        npy_with(shaped("(1,)", descr="()")),
        npy_with("{'descr': '<f4', ("),
        npy_with("{[]: 1}"),
        npy_with("{1: 1, 'a': 2}"),
        npy_with("(" * 3000),
        npy_with(shaped("(-1, -192)"), bytes(768)),
        npy_with(shaped("(-2, -96)"), bytes(768)),
        npy_with(shaped("(0, -5)")),
        npy_with(shaped(f"(0, {2**70})")),
        npy_with(shaped("(" + "1," * 70 + ")"), bytes(4)),
        npy_with(shaped("(1, 3, 8, 8)").replace("8", "8\0"), bytes(768)),
    ],
    ids=lambda body: repr(body[8:60]),
)
def test_wrong_npy_headers_are_refused(body: bytes) -> None:
    refused(body)


HEADER = len(npy(np.zeros((1, 3, 8, 8), dtype=np.float32))) - 768


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(st.lists(st.tuples(st.integers(6, HEADER - 1), st.integers(0, 255)), max_size=5), st.integers(0, 900))
def test_a_mangled_npy_is_read_or_refused(changes: list[tuple[int, int]], length: int) -> None:
    body = bytearray(npy(np.zeros((1, 3, 8, 8), dtype=np.float32)))
    for place, byte in changes:
        body[place] = byte
    read_or_refused(bytes(body[: HEADER + length]))


def read_or_refused(body: bytes) -> None:
    """The only two things that may come of a body."""
    try:
        x = decode(body, COLOUR)
    except BadInput:
        return
    assert x.dtype == torch.float32


# Images


def test_png_pixels_are_exact() -> None:
    x = decode(image(PIXELS, "PNG"), COLOUR)
    assert x.shape == (1, 3, 8, 8)
    torch.testing.assert_close(x[0], ROW)


def test_jpeg_pixels_are_close() -> None:
    flat = np.full((8, 8, 3), (200, 100, 50), dtype=np.uint8)
    x = decode(image(flat, "JPEG", quality=95), COLOUR)
    torch.testing.assert_close(x[0, :, 0, 0], torch.tensor([200, 100, 50]) / 255, rtol=0, atol=0.02)


@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_grey_images(format: str) -> None:
    pixels = np.full((4, 6), 100, dtype=np.uint8)
    x = decode(image(pixels, format), GREY)
    assert x.shape == (1, 1, 4, 6)
    torch.testing.assert_close(x, torch.full((1, 1, 4, 6), 100 / 255), rtol=0, atol=0.01)


def test_rows_and_columns_keep_their_places() -> None:
    pixels = np.arange(24, dtype=np.uint8).reshape(4, 6)
    torch.testing.assert_close(decode(image(pixels, "PNG"), GREY)[0, 0] * 255, torch.arange(24.0).view(4, 6))


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("L", 100, (100, 100, 100)),
        ("1", 1, (255, 255, 255)),
        ("LA", (100, 255), (100, 100, 100)),
        ("RGBA", (10, 20, 30, 255), (10, 20, 30)),
    ],
)
def test_a_colour_model_takes_other_kinds_of_images(mode: str, colour: Any, expected: tuple[int, ...]) -> None:
    x = decode(image(Image.new(mode, (8, 8), colour), "PNG"), COLOUR)
    torch.testing.assert_close(x[0, :, 3, 3] * 255, torch.tensor(expected, dtype=torch.float32))


def test_a_palette_is_looked_up() -> None:
    picture = Image.fromarray(np.full((8, 8, 3), (10, 200, 30), dtype=np.uint8)).convert(
        "P", palette=Image.Palette.ADAPTIVE
    )
    x = decode(image(picture, "PNG"), COLOUR)
    torch.testing.assert_close(x[0, :, 3, 3] * 255, torch.tensor([10.0, 200.0, 30.0]), rtol=0, atol=1.0)


def test_a_grey_model_takes_colour_images_as_luminance() -> None:
    x = decode(image(np.full((4, 6, 3), (255, 0, 0), dtype=np.uint8), "PNG"), GREY)
    assert x.mean().item() == pytest.approx(0.299, abs=0.01)


def test_sixteen_bits_are_scaled_or_refused_but_not_clipped() -> None:
    """Half of the range is 32768 of 65535. Cutting at 255 would serve a white picture without a word."""
    body = image(Image.new("I;16", (6, 4), 32768), "PNG")
    try:
        x = decode(body, GREY)
    except BadInput:
        return
    torch.testing.assert_close(x, torch.full_like(x, 0.5), rtol=0, atol=0.01)


@pytest.mark.parametrize("size", [(9, 8), (8, 9), (1, 1), (4096, 4096)], ids=str)
@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_the_size_must_be_the_models(size: tuple[int, int], format: str) -> None:
    refused(image(Image.new("L", size), format), f"must be 8 x 8 pixels, got {size[0]} x {size[1]}")


@pytest.mark.parametrize(
    ("format", "kept"), [("PNG", 4), ("PNG", 12), ("PNG", 30), ("PNG", -40), ("JPEG", 4), ("JPEG", 30), ("JPEG", -20)]
)
def test_truncated_images_are_refused(format: str, kept: int) -> None:
    refused(image(PIXELS, format)[:kept], "not a readable PNG or JPEG image")


@pytest.mark.parametrize("body", [b"\x89PNG\r\n\x1a\nnothing", b"\xff\xd8\xff\xe0nothing", b"\x89PNG", b"\xff\xd8\xff"])
def test_what_only_begins_like_an_image_is_refused(body: bytes) -> None:
    refused(body, "not a readable PNG or JPEG image")


@pytest.mark.parametrize("format", ["GIF", "BMP", "TIFF", "WEBP"])
def test_other_formats_are_not_read(format: str) -> None:
    refused(image(PIXELS, format), "not JSON")


def test_a_model_without_pixels_takes_no_images() -> None:
    refused(image(PIXELS, "PNG"), "takes [4] rows, not images", VECTOR)


def test_a_png_with_a_compressed_text_bomb_is_refused() -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "x" * 2**21, zip=True)
    refused(image(PIXELS, "PNG", pnginfo=text))


def png_of_chunks(*chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of these chunks, with sound checksums."""
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


IHDR = struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0)
IDAT = zlib.compress(bytes(8 * 25))
EXTRAS = [b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"gAMA", b"pHYs", b"tRNS", b"PLTE", b"eXIf", b"sRGB", b"cHRM", b"acTL"]


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(
    header=st.binary(max_size=14) | st.just(IHDR),
    pixels=st.binary(max_size=20) | st.just(IDAT),
    extra=st.tuples(st.sampled_from(EXTRAS), st.binary(max_size=12)),
)
@example(header=b"short", pixels=IDAT, extra=(b"gAMA", b""))
@example(header=IHDR, pixels=IDAT, extra=(b"gAMA", b""))
@example(header=IHDR, pixels=IDAT, extra=(b"tRNS", b"x"))
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_mangled_png_is_read_or_refused(header: bytes, pixels: bytes, extra: tuple[bytes, bytes]) -> None:
    read_or_refused(png_of_chunks((b"IHDR", header), extra, (b"IDAT", pixels), (b"IEND", b"")))


# JSON


def test_json_rows() -> None:
    assert decode(b'{"inputs": [[1, 2, 3, 4], [5, 6, 7, 8.5]]}', VECTOR).tolist() == [
        [1, 2, 3, 4],
        [5, 6, 7, 8.5],
    ]
    assert decode(b' \n{"inputs": [1, 2, 3, 4]}', VECTOR).tolist() == [[1, 2, 3, 4]]


@pytest.mark.parametrize("body", [b'{"inputs": [1, "2"]}', b'{"inputs": [1, null]}', b'{"inputs": [[1], 2]}'])
def test_json_of_mixed_things_is_refused(body: bytes) -> None:
    refused(body, "'inputs' must be numbers nested to equal lengths", VECTOR)


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ([0.5, "2", 0.5, 0.5], "got a string"),
        (["1", "0", "0", "0"], "got a string"),
        ([0.5, None, 0.5, 0.5], "got null"),
        ([0.5, {}, 0.5, 0.5], "got an object"),
        ([0.5, [0.5], 0.5, 0.5], "got a list"),
        ([0.5, 0.5, 0.5, True], "got a boolean"),
        ([False, 0.5, 0, 1], "got a boolean"),
        ([[0, 1, 0, 1], [0, 1, 0.0, False]], "got a boolean"),
        ([[0.5], 0.5], "got a list beside a number"),
        ([[0.5], "x"], "got a list beside a string"),
        ([[0.5, 0.5, 0.5, 0.5], [0.5, 0.5]], "got lists of 2 and 4 at level 1"),
        ([[[1, 2], [3, 4]], [[1, 2], [3]]], "got lists of 1 and 2 at level 2"),
        ("cat", "got a string"),
        (False, "got a boolean"),
    ],
    ids=str,
)
def test_what_is_not_a_number_is_named(inputs: Any, said: str) -> None:
    refused(orjson.dumps({"inputs": inputs}), said, VECTOR)
    with pytest.raises(BadInput, match=said):
        decode_tensor(inputs, "FP32", [np.array(inputs, dtype=object).size], VECTOR, "input")


def test_numbers_of_every_kind_keep_their_value_and_place() -> None:
    inputs = [[[0, 1, -1, 2**63], [0.0, 1.0, -0.5, 2**64 - 1]], [[1e-300, 1e39, 7, 3], [5, 6, 7, 8.5]]]
    x = decode(orjson.dumps({"inputs": inputs}), VECTOR)
    with np.errstate(over="ignore"):
        assert torch.equal(x, torch.from_numpy(np.array(inputs, dtype=np.float64).astype(np.float32)))


@pytest.mark.parametrize(("levels", "taken"), [(32, True), (33, False), (1000, False)])
def test_nesting_has_an_end(levels: int, taken: bool) -> None:
    body = b'{"inputs": ' + b"[" * levels + b"0.5" + b"]" * levels + b"}"
    if taken:
        assert decode(body, VECTOR).dim() == levels
    else:
        refused(body, "at most 32 levels deep", VECTOR)


def test_more_values_than_the_rows_allowed_are_refused_before_they_are_converted() -> None:
    said = "1 to 2 rows (limits.rows_per_request) of shape [4], that is at most 8 values, got 12"
    rows = np.zeros((3, 4), dtype=np.float32)
    for body in (orjson.dumps({"inputs": rows.tolist()}), orjson.dumps({"inputs": ["x"] * 12}), npy(rows)):
        with pytest.raises(BadInput) as caught:
            decode(body, VECTOR, max_rows=2)
        assert said in str(caught.value)
    assert decode(orjson.dumps({"inputs": rows[:2].tolist()}), VECTOR, max_rows=2).shape == (2, 4)


@pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
@pytest.mark.parametrize("first", [True, False], ids=["text first", "text last"])
def test_a_long_text_among_many_does_not_multiply(nested: bool, first: bool) -> None:
    """An array of fixed-width texts would take 4 bytes x the longest x the number of them: 800 MB for 90 KB."""
    texts: list[Any] = ["x" * 10_000, *[""] * 20_000] if first else [*[0.5] * 20_000, "x" * 10_000]
    data = [[text] for text in texts] if nested else texts
    body = orjson.dumps({"inputs": data})
    tracemalloc.start()
    try:
        refused(body, "got a string")
        with pytest.raises(BadInput, match="got a string"):
            decode_tensor(data, "FP32", [20_001], COLOUR, "input")
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()


# V2 tensors


def test_a_tensor_is_filled_row_by_row() -> None:
    flat = decode_tensor(list(range(8)), "FP32", [2, 4], VECTOR, "input")
    nested = decode_tensor([[0, 1, 2, 3], [4, 5, 6, 7]], "FP64", [2, 4], VECTOR, "input")
    assert flat.tolist() == nested.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert flat.dtype == nested.dtype == torch.float32


def test_a_tensor_of_bytes_is_pixels() -> None:
    spec = InputSettings(shape=(2,), range=(-1.0, 1.0))
    assert decode_tensor([[0, 255]], "UINT8", [1, 2], spec, "input")[0].tolist() == pytest.approx([-1.0, 1.0])


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(
    data=st.recursive(
        st.none() | st.booleans() | st.integers(-300, 300) | st.floats() | st.text(max_size=2),
        lambda inner: st.lists(inner, max_size=4),
        max_leaves=8,
    ),
    datatype=st.sampled_from(["FP32", "FP16", "FP64", "UINT8", "BOOL", "INT64", "BYTES", ""]),
    shape=st.lists(st.sampled_from([0, 1, 2, 4, -1, 2**31, 2**40, 2**62, 2**63, 2**64 - 1]), max_size=4),
)
@example(data=[], datatype="FP32", shape=[0, 2**63])
@example(data=[], datatype="UINT8", shape=[0, 2**62, 8])
@example(data=[0.5], datatype="FP32", shape=[1] * 65)
def test_a_tensor_is_read_as_its_shape_says_or_refused(data: Any, datatype: str, shape: list[int]) -> None:
    try:
        x: Tensor = decode_tensor(data, datatype, shape, VECTOR, "input")
    except BadInput:
        return
    assert list(x.shape) == shape
    assert x.dtype == torch.float32
