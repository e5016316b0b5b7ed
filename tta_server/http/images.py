"""Encoded images to pixels. What an image's header says is judged before a pixel is decoded."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

from tta_server.errors import BadInput, TooLarge, TtaError
from tta_server.settings import InputSettings, LimitSettings

Pixels = np.ndarray[Any, np.dtype[np.uint8]]

PNG, JPEG = b"\x89PNG", b"\xff\xd8\xff"
EIGHT_BIT = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
"""Pillow's modes of images that convert to 8-bit channels without loss."""


def check_total(images: Iterable[bytes | bytearray], limits: LimitSettings) -> None:
    """Raises ``TooLarge`` for images that have more than ``limits.image_pixels`` together; unreadable ones count 0."""
    total = 0
    for body in images:
        try:
            with _kind(body)(io.BytesIO(body)) as image:
                total += image.width * image.height
        except Exception:  # decoding it will say what is wrong
            continue
    if total > limits.image_pixels:
        raise TooLarge(f"the images have {total} pixels together; the limit is limits.image_pixels")


def _kind(body: bytes | bytearray) -> type[PngImageFile] | type[JpegImageFile]:
    """Pillow's class for it. Pillow's own way to open one warns of, or refuses, sizes that are a setting here."""
    return PngImageFile if body.startswith(PNG) else JpegImageFile


def decode_image(
    body: bytes | bytearray, spec: InputSettings, limits: LimitSettings, name: str = "the image"
) -> Pixels:
    """The pixels ``[1, channels, height, width]`` of a PNG or JPEG image, as wide and high as the model's input.

    With ``spec.resize`` the image is turned upright as its EXIF orientation says (cameras store it so), the shorter
    side is resized to ``resize``, bilinearly over all pixels that go into one (as Pillow does), and the middle is cut
    out. Without, it must be of the input's own size, and its pixels are taken as they are stored. Transparency is
    dropped. Raises ``BadInput``, and ``TooLarge`` over ``limits.image_pixels``; ``name`` is how errors call the image.
    """
    if len(spec.shape) != 3 or spec.shape[0] not in (1, 3):
        raise BadInput(f"this model takes {list(spec.shape)} rows, not images; send JSON or .npy")
    if not body.startswith((PNG, JPEG)):
        raise BadInput(f"{name} is not a PNG or JPEG image: it begins with {bytes(body[:8])!r}")
    channels, height, width = spec.shape
    try:
        with _kind(body)(io.BytesIO(body)) as image:
            _check(image, spec, limits, name)
            if spec.resize is not None and image.width % 8 == image.height % 8 == 0:
                # A large JPEG is decoded at a half to an eighth of its size, which is exact where it can be divided.
                image.draft(None, (2 * spec.resize, 2 * spec.resize))
            image.load()
            image.info.pop("transparency", None)
            plain = image.convert("L" if channels == 1 else "RGB")
        if spec.resize is not None:
            ImageOps.exif_transpose(plain, in_place=True)
            plain = _resize_and_crop(plain, spec.resize, width, height)
    except (TtaError, MemoryError):
        raise
    except Exception as error:  # a decoder may raise anything on bytes from outside
        raise BadInput(f"{name} is not a readable PNG or JPEG image: {error}") from error
    pixels = np.asarray(plain, dtype=np.uint8).reshape(1, height, width, channels)
    return pixels.transpose(0, 3, 1, 2)


def _check(image: Image.Image, spec: InputSettings, limits: LimitSettings, name: str) -> None:
    """Raises for an image whose header says that it should not be decoded."""
    (width, height), expected = image.size, (spec.shape[2], spec.shape[1])
    if spec.resize is None and image.size != expected:
        raise BadInput(f"{name} must be {expected[0]} x {expected[1]} pixels, got {width} x {height}")
    if width * height > limits.image_pixels:
        raise TooLarge(
            f"{name} has {width} x {height} pixels; the limit is limits.image_pixels = {limits.image_pixels}"
        )
    if image.mode not in EIGHT_BIT:
        raise BadInput(f"{name} must have 8 bits per channel, got one of mode {image.mode!r}; send .npy instead")


def _resize_and_crop(image: Image.Image, shorter: int, width: int, height: int) -> Image.Image:
    """The middle ``width x height`` of the image, its shorter side resized; sizes and places are rounded as
    torchvision's ``Resize`` and ``CenterCrop`` do.

    Only the part that is kept is computed, so a long, thin image takes no more room than another.
    """
    sides = image.size
    whole = [shorter * side // min(sides) for side in sides]
    start = [round((full - kept) / 2) for full, kept in zip(whole, (width, height), strict=True)]
    end = [start[0] + width, start[1] + height]
    left, top, right, bottom = (at * sides[i] / whole[i] for at, i in zip(start + end, (0, 1, 0, 1), strict=True))
    return image.resize((width, height), Image.Resampling.BILINEAR, (left, top, right, bottom))
