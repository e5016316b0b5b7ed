"""Bodies to tensors: what is read, value by value, and that everything else is refused as ``BadInput``."""

from __future__ import annotations

import asyncio
import io
import struct
import tempfile
import tracemalloc
import zlib
from typing import Any

import httpx
import numpy as np
import orjson
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin
from torch import Tensor

from tta_server.errors import BadInput, TooLarge
from tta_server.http.codec import decode_inputs, multipart
from tta_server.http.tensors import decode_images
from tta_server.settings import InputSettings, LimitSettings

COLOUR = InputSettings(shape=(3, 8, 8))
GREY = InputSettings(shape=(1, 4, 6))
VECTOR = InputSettings(shape=(4,), range=None)

RANDOM = np.random.default_rng(0)
PIXELS = RANDOM.integers(0, 256, (8, 8, 3), dtype=np.uint8)
ROW = torch.from_numpy(PIXELS.transpose(2, 0, 1).astype(np.float32)) / 255


def decode(body: bytes, spec: InputSettings, datatype: str | None = None, **limits: int) -> Tensor:
    return decode_inputs(bytearray(body), spec, LimitSettings(**limits), datatype)


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
def test_a_mangled_png_is_read_or_refused(header: bytes, pixels: bytes, extra: tuple[bytes, bytes]) -> None:
    read_or_refused(png_of_chunks((b"IHDR", header), extra, (b"IDAT", pixels), (b"IEND", b"")))


def of_chunks(width: int, height: int) -> bytes:
    """A PNG that says it is so large, and is not."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return png_of_chunks((b"IHDR", header), (b"IDAT", IDAT), (b"IEND", b""))


PHOTO = InputSettings(shape=(3, 16, 12), resize=20)


@pytest.mark.parametrize("spec", [PHOTO, COLOUR], ids=["resized", "exact"])
@pytest.mark.parametrize("size", [(2**16, 2**13), (30_000, 30_000), (2**31 - 1, 2**31 - 1)], ids=str)
def test_the_size_is_seen_before_a_pixel_is_decoded(spec: InputSettings, size: tuple[int, int]) -> None:
    """Among them sizes that Pillow itself warns of or refuses, where it is asked to open an image."""
    tracemalloc.start()
    try:
        with pytest.raises(BadInput if spec is COLOUR else TooLarge) as caught:
            decode(of_chunks(*size), spec)
        assert tracemalloc.get_traced_memory()[1] < 1e6
    finally:
        tracemalloc.stop()
    said = "must be 8 x 8 pixels, got" if spec is COLOUR else f"limits.image_pixels = {2**25}"
    assert said in str(caught.value)
    assert f"{size[0]} x {size[1]}" in str(caught.value)


@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_images_up_to_the_limit_of_pixels(format: str) -> None:
    body = image(Image.new("RGB", (40, 30)), format)
    assert decode(body, PHOTO, image_pixels=1200).shape == (1, 3, 16, 12)
    with pytest.raises(TooLarge, match=r"40 x 30 pixels; the limit is limits\.image_pixels = 1199"):
        decode(body, PHOTO, image_pixels=1199)


def smooth(width: int, height: int) -> Image.Image:
    """Something like a photograph: brightness runs right in red, down in green, and in waves in blue."""
    across, down = np.linspace(0, 1, width)[None, :], np.linspace(0, 1, height)[:, None]
    waves = 0.5 + 0.5 * np.sin(9 * across + 5 * down)
    channels = np.stack([across + 0 * down, down + 0 * across, waves], axis=-1)
    return Image.fromarray((channels * 255).round().astype(np.uint8))


def evaluated(picture: Image.Image, spec: InputSettings) -> Tensor:
    """Resize and centre crop written out, as they are done to evaluate image classifiers."""
    assert spec.resize is not None
    width, height = picture.size
    short, (wanted_height, wanted_width) = min(width, height), spec.shape[1:]
    picture = picture.resize((spec.resize * width // short, spec.resize * height // short), Image.Resampling.BILINEAR)
    left, top = round((picture.width - wanted_width) / 2), round((picture.height - wanted_height) / 2)
    picture = picture.crop((left, top, left + wanted_width, top + wanted_height))
    return torch.from_numpy(np.array(picture.convert("RGB")).transpose(2, 0, 1)).float() / 255


SIZES = [
    (20, 20),
    (40, 30),
    (30, 40),
    (41, 33),
    (12, 16),
    (5, 7),
    (200, 21),
    (21, 200),
    (333, 517),
    (1000, 750),
    (1600, 1200),
]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_photographs_are_resized_and_cropped(size: tuple[int, int], format: str) -> None:
    body = image(smooth(*size), format, **({"quality": 95} if format == "JPEG" else {}))
    with Image.open(io.BytesIO(body)) as stored:
        expected = evaluated(stored, PHOTO)
    atol = 1.01 / 255 if format == "PNG" or size != (1600, 1200) else 2.01 / 255  # decoded at an eighth of its size
    torch.testing.assert_close(decode(body, PHOTO)[0], expected, rtol=0, atol=atol)


@pytest.mark.parametrize("size", [(2**20, 1), (1, 2**20), (2**16, 2)], ids=str)
def test_a_thin_image_takes_no_more_room_than_another(size: tuple[int, int]) -> None:
    """Resized as a whole, its other side would have twenty million pixels."""
    assert decode(image(Image.new("RGB", size, (10, 20, 30)), "PNG"), PHOTO)[0, :, 8, 6].mul(255).tolist() == (
        pytest.approx([10, 20, 30])
    )


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "RGBA", "CMYK"])
def test_photographs_of_other_kinds(mode: str) -> None:
    picture = smooth(40, 30).convert(mode)
    body = image(picture, "JPEG" if mode == "CMYK" else "PNG")
    x = decode(body, PHOTO)[0]
    with Image.open(io.BytesIO(body)) as stored:
        torch.testing.assert_close(x, evaluated(stored.convert("RGB"), PHOTO), rtol=0, atol=1.01 / 255)


def test_photographs_for_a_grey_model() -> None:
    spec = InputSettings(shape=(1, 16, 16), resize=16)
    assert decode(image(Image.new("RGB", (40, 30), (255, 0, 0)), "PNG"), spec).mean().item() == pytest.approx(
        0.298, abs=0.01
    )


UPRIGHT: dict[int, list[Image.Transpose]] = {
    1: [],
    2: [Image.Transpose.FLIP_LEFT_RIGHT],
    3: [Image.Transpose.ROTATE_180],
    4: [Image.Transpose.FLIP_TOP_BOTTOM],
    5: [Image.Transpose.TRANSPOSE],
    6: [Image.Transpose.ROTATE_90],
    7: [Image.Transpose.TRANSVERSE],
    8: [Image.Transpose.ROTATE_270],
}
"""How a camera stores an upright picture whose EXIF orientation is the key."""


@pytest.mark.parametrize("orientation", [*UPRIGHT, 0, 9, 65535])
@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_photographs_are_turned_upright(orientation: int, format: str) -> None:
    stored = upright = smooth(45, 64)
    for turn in UPRIGHT.get(orientation, []):
        stored = stored.transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    x = decode(image(stored, format, exif=exif, **({"quality": 95} if format == "JPEG" else {})), PHOTO)
    torch.testing.assert_close(x[0], evaluated(upright, PHOTO), rtol=0, atol=8 / 255)


def test_images_of_the_exact_size_are_taken_as_they_are_stored() -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    torch.testing.assert_close(decode(image(PIXELS, "PNG", exif=exif), COLOUR)[0], ROW)


@pytest.mark.parametrize("transparency", [0, bytes([0, 128]), bytes(256)], ids=["one", "two", "all"])
def test_transparency_is_dropped(transparency: int | bytes) -> None:
    picture = Image.fromarray(np.full((8, 8), 1, dtype=np.uint8), "L").convert("P")
    picture.putpalette([255, 0, 0, 10, 200, 30])
    x = decode(image(picture, "PNG", transparency=transparency), COLOUR)
    assert x[0, :, 3, 3].mul(255).tolist() == pytest.approx([10, 200, 30])


JPEG_BYTES = image(PIXELS, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0")


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(
    changes=st.lists(st.tuples(st.integers(3, len(JPEG_BYTES) - 1), st.integers(0, 255)), min_size=1, max_size=5),
    length=st.integers(0, len(JPEG_BYTES)) | st.just(len(JPEG_BYTES)),
    resized=st.booleans(),
)
def test_a_mangled_jpeg_is_read_or_refused(changes: list[tuple[int, int]], length: int, resized: bool) -> None:
    body = bytearray(JPEG_BYTES)
    for place, byte in changes:
        body[place] = byte
    try:
        x = decode(bytes(body[:length]), PHOTO if resized else COLOUR, image_pixels=10_000)
    except (BadInput, TooLarge):
        return
    assert x.dtype == torch.float32


# Several images


def form(*parts: tuple[str, bytes], boundary: str = "limit") -> bytes:
    """A multipart body of these parts, each what its Content-Disposition says after ``form-data;`` and its content."""
    lines = [f"--{boundary}\r\nContent-Disposition: form-data; {head}\r\n\r\n".encode() + body for head, body in parts]
    return b"\r\n".join([*lines, f"--{boundary}--\r\n".encode()])


def decode_form(body: bytes, kind: str = "multipart/form-data; boundary=limit", **limits: int) -> Tensor:
    return asyncio.run(multipart(bytearray(body), kind, COLOUR, LimitSettings(**limits)))


def refused_form(body: bytes, said: str, kind: str = "multipart/form-data; boundary=limit", **limits: int) -> None:
    with pytest.raises(BadInput) as caught:
        decode_form(body, kind, **limits)
    assert said in str(caught.value)


def files(count: int) -> list[tuple[str, bytes]]:
    pictures = [Image.new("RGB", (8, 8), (at, 2 * at, 3 * at)) for at in range(count)]
    return [(f'name="file"; filename="{at}.png"', image(one, "PNG")) for at, one in enumerate(pictures)]


@pytest.mark.parametrize("count", [1, 2, 40])
def test_every_file_is_a_row(count: int) -> None:
    x = decode_form(form(*files(count)))
    assert x.shape == (count, 3, 8, 8)
    assert x[:, :, 3, 3].mul(255).round().tolist() == [[at, 2 * at, 3 * at] for at in range(count)]


def test_what_a_common_client_sends() -> None:
    jpeg = image(np.full((8, 8, 3), 100, dtype=np.uint8), "JPEG")
    request = httpx.Request("POST", "http://x/", files=[("a", ("a.png", image(PIXELS, "PNG"))), ("b", jpeg)])
    x = decode_form(request.read(), request.headers["content-type"])
    torch.testing.assert_close(x[0], ROW)
    torch.testing.assert_close(x[1], torch.full((3, 8, 8), 100 / 255), rtol=0, atol=0.01)


def test_a_large_file_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Larger than the pieces that are parsed at a time, and than what the parser keeps in memory by itself."""
    monkeypatch.setattr(tempfile, "tempdir", "/no/such/folder")
    noise = Image.fromarray(RANDOM.integers(0, 256, (800, 900, 3), dtype=np.uint8))
    body = form(files(1)[0], ('name="big"; filename="big.png"', image(noise, "PNG")))
    spec = InputSettings(shape=(3, 8, 8), resize=8)
    x = asyncio.run(multipart(bytearray(body), "multipart/form-data; boundary=limit", spec, LimitSettings()))
    torch.testing.assert_close(x[1], evaluated(noise, spec), rtol=0, atol=1.01 / 255)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (form(), "no parts"),
        (b"", "ends before its last boundary"),
        (form(('name="note"', b"text")), "part 'note' is not a file"),
        (form(files(1)[0], ('name="note"', b"text")), "part 'note' is not a file"),
        (form(files(1)[0], ('name="x"; filename="x"', b"text")), "part 1 ('x') is not a PNG or JPEG image"),
        (form(('name="x"; filename=""', b"")), "part 0 ('x') is not a PNG or JPEG image"),
        (form(('name="x"; filename="x"', image(PIXELS[:4], "PNG"))), "part 0 ('x') must be 8 x 8 pixels, got 8 x 4"),
        (form(('name="x"; filename="x"', image(PIXELS, "PNG")[:60])), "part 0 ('x') is not a readable PNG"),
        (form(('filename="x"', b"")), "not readable as multipart/form-data"),
        (form(*files(2))[:-10], "ends before its last boundary"),
        (b"nonsense", "not readable as multipart/form-data"),
        (b'{"inputs": []}', "not readable as multipart/form-data"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_forms_of_anything_else_are_refused(body: bytes, said: str) -> None:
    refused_form(body, said)


@pytest.mark.parametrize(
    "kind",
    [
        "multipart/form-data",
        "multipart/form-data; boundary=",
        "multipart/form-data; boundary=" + "x" * 1000,
        "multipart/form-data; boundary=other",
        "multipart/form-data; boundary=limit; charset=undefined",
        "",
        ";;;=",
    ],
    ids=lambda kind: kind[:60],
)
def test_content_types_that_do_not_fit_are_refused(kind: str) -> None:
    refused_form(form(*files(1)), "not readable as multipart/form-data", kind)


def test_more_files_than_rows_are_refused_before_they_are_decoded() -> None:
    assert len(decode_form(form(*files(2)), rows_per_request=2)) == 2
    broken = [('name="x"; filename="x"', b"")] * 3
    refused_form(form(*broken), "1 to 2 files (limits.rows_per_request): Too many files", rows_per_request=2)
    refused_form(form(*[('name="x"', b"")] * 3), "1 to 2 files (limits.rows_per_request)", rows_per_request=2)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(
    st.lists(
        st.sampled_from(
            [b"--limit", b"--", b"\r\n", b"Content-Disposition: form-data; ", b'name="x"', b"; filename=y", b":", b"\0"]
        )
        | st.binary(max_size=5)
        | st.just(form(*files(1))),
        max_size=12,
    ),
    st.text(st.characters(max_codepoint=255), max_size=20),
)
def test_any_form_is_read_or_refused(parts: list[bytes], kind: str) -> None:
    for content_type in ("multipart/form-data; boundary=limit", "multipart/form-data; boundary=limit;" + kind):
        try:
            assert len(decode_form(b"".join(parts), content_type))
        except BadInput:
            continue


# Raw numbers


@pytest.mark.parametrize(("datatype", "kind"), [("FP32", "<f4"), ("FP16", "<f2"), ("INT16", "<i2"), ("UINT8", "u1")])
@pytest.mark.parametrize("rows", [1, 3])
def test_raw_numbers_are_rows(datatype: str, kind: str, rows: int) -> None:
    numbers = RANDOM.integers(0, 100, (rows, 3, 8, 8)).astype(kind)
    x = decode(numbers.tobytes(), COLOUR, datatype)
    torch.testing.assert_close(x, torch.from_numpy(numbers.astype(np.float32)) / (255 if datatype == "UINT8" else 1))


def test_raw_numbers_may_begin_like_anything() -> None:
    for start in (b"\x89PNG", b"\x93NUM", b'{"in', b"\xff\xd8\xff\xe0"):
        body = start * 4
        assert decode(body, VECTOR, "FP32").tolist() == [list(struct.unpack("<4f", body))]


@pytest.mark.parametrize(
    ("size", "datatype", "said"),
    [
        (17, "FP32", "a multiple of 16 bytes, got 17"),
        (16, "BYTES", "not BYTES"),
        (16, "f4", "got f4"),
        (0, "FP32", "the body is empty"),
        (16 * 1025, "FP32", "limits.rows_per_request"),
    ],
)
def test_raw_numbers_that_do_not_fit_are_refused(size: int, datatype: str, said: str) -> None:
    with pytest.raises(BadInput) as caught:
        decode(bytes(size), VECTOR, datatype)
    assert said in str(caught.value)


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


def test_numbers_of_every_kind_keep_their_value_and_place() -> None:
    inputs = [[[0, 1, -1, 2**63], [0.0, 1.0, -0.5, 2**64 - 1]], [[1e-300, 1e39, 7, 3], [5, 6, 7, 8.5]]]
    x = decode(orjson.dumps({"inputs": inputs}), VECTOR)
    with np.errstate(over="ignore"):
        assert torch.equal(x, torch.from_numpy(np.array(inputs, dtype=np.float64).astype(np.float32)))


@pytest.mark.parametrize(("levels", "taken"), [(32, True), (33, False), (99, False)])
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
            decode(body, VECTOR, rows_per_request=2)
        assert said in str(caught.value)
    assert decode(orjson.dumps({"inputs": rows[:2].tolist()}), VECTOR, rows_per_request=2).shape == (2, 4)


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
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()


def test_json_over_its_limits_is_refused() -> None:
    body = orjson.dumps({"inputs": [[0.5] * 4]})
    assert decode(body, VECTOR, json_bytes=len(body), json_depth=3).shape == (1, 4)
    with pytest.raises(TooLarge, match=r"limits\.json_bytes"):
        decode(body, VECTOR, json_bytes=len(body) - 1)
    with pytest.raises(BadInput, match=r"limits\.json_depth = 2"):
        decode(body, VECTOR, json_depth=2)


@pytest.mark.parametrize("body", [b'{"inputs": [1, 2, 3, 4], "outputs": 5}', b"{}", b'{"input": []}'])
def test_other_keys_are_refused(body: bytes) -> None:
    refused(body, "must hold 'inputs' and nothing else", VECTOR)


@pytest.mark.parametrize("shape", ["(True, 3, 8, 8)", "(1.0, 3, 8, 8)"])
def test_the_shape_of_an_npy_array_is_of_whole_numbers(shape: str) -> None:
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}}}\n".encode()
    body = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(4 * 3 * 8 * 8)
    with pytest.raises(BadInput):
        decode_inputs(bytearray(body), COLOUR, LimitSettings())


def test_the_images_of_a_request_have_room_together() -> None:
    """Seen from their headers, before the first is decoded."""
    images = [("one", encoded(40, 30)), ("two", encoded(40, 30))]
    assert decode_images(images, PHOTO, LimitSettings(image_pixels=2400)).shape == (2, 3, 16, 12)
    with pytest.raises(TooLarge, match=r"2400 pixels together; the limit is limits\.image_pixels"):
        decode_images(images, PHOTO, LimitSettings(image_pixels=2399))


def encoded(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), (10, 200, 30)).save(file, "PNG")
    return file.getvalue()
