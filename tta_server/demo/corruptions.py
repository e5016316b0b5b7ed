"""Five ways in which a camera's images go bad, each with a severity that can grow while a stream runs.

A corruption maps images `[N, 1, H, W]` of `uint8` to new images of the same shape and type; its input is not
changed. `severity` lies in [0, 1], else `ValueError`: 0 gives the images as they were, 1 is the worst.
Randomness comes from the given generator only: same state of the generator, same images.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Images: TypeAlias = NDArray[np.uint8]
Corruption: TypeAlias = Callable[[Images, float, np.random.Generator], Images]

WORST_NOISE = 100.0  # standard deviation, grey levels
WORST_BLUR = 1.0  # standard deviation of the Gaussian, pixels
WORST_FADE = 0.45  # share of the light that is fog
WORST_BAR = 2.0  # thickness, pixels
WORST_ANGLE = 30.0  # degrees
FOG = 160.0  # grey level
WHITE = 255.0


def noise(images: Images, severity: float, rng: np.random.Generator) -> Images:
    """Sensor noise in poor light: independent Gaussian noise on every pixel, cut off at black and white."""
    _check(severity)
    return _to_uint8(images + severity * WORST_NOISE * rng.standard_normal(images.shape))


def blur(images: Images, severity: float, rng: np.random.Generator) -> Images:
    """A lens out of focus: Gaussian blur, its weights rescaled at the border so that no light is lost.

    `rng` is not used: the same lens blurs every image alike.
    """
    _check(severity)
    sigma = max(severity * WORST_BLUR, 1e-3)  # 1e-3 pixels: no neighbour has any weight
    height, width = images.shape[-2:]
    return _to_uint8(_blur_matrix(height, sigma) @ images @ _blur_matrix(width, sigma).T)


def contrast(images: Images, severity: float, rng: np.random.Generator) -> Images:
    """Fog: every pixel fades towards the same light grey, so contrast falls and brightness shifts.

    `rng` is not used: the fog is even.
    """
    _check(severity)
    fade = severity * WORST_FADE
    return _to_uint8((1 - fade) * images + fade * FOG)


def occlusion(images: Images, severity: float, rng: np.random.Generator) -> Images:
    """Something bright in the way: a white bar across each image, upright or lying, at a random place.

    Severity is the bar's thickness; pixels that it covers in part are blended.
    """
    _check(severity)
    count, _, height, width = images.shape
    thickness = severity * WORST_BAR
    upright = rng.random(size=(count, 1, 1, 1)) < 0.5
    start = rng.random(size=(count, 1))
    columns = _covered(start, thickness, width)[:, None, None, :]
    rows = _covered(start, thickness, height)[:, None, :, None]
    cover = np.where(upright, columns, rows)
    return _to_uint8((1 - cover) * images + cover * WHITE)


def rotation(images: Images, severity: float, rng: np.random.Generator) -> Images:
    """A camera that slips round its axis: every image turns by the same angle, give or take a tenth of it.

    Bilinear interpolation about the centre; what turns in from outside is black.
    """
    _check(severity)
    count, _, height, width = images.shape
    angles = np.deg2rad(severity * WORST_ANGLE) * rng.normal(1.0, 0.1, size=(count, 1, 1))
    down, right = np.mgrid[:height, :width].astype(np.float64)
    down, right = down - (height - 1) / 2, right - (width - 1) / 2
    source_down = np.cos(angles) * down + np.sin(angles) * right + (height - 1) / 2
    source_right = np.cos(angles) * right - np.sin(angles) * down + (width - 1) / 2
    return _to_uint8(_sample(images[:, 0], source_down, source_right)[:, None])


CORRUPTIONS: dict[str, Corruption] = {
    "noise": noise,
    "blur": blur,
    "contrast": contrast,
    "occlusion": occlusion,
    "rotation": rotation,
}


def _check(severity: float) -> None:
    """Raise `ValueError` unless `severity` lies in [0, 1]."""
    if not 0.0 <= severity <= 1.0:
        raise ValueError(f"severity is {severity}; it must lie between 0 (no corruption) and 1 (the worst)")


def _to_uint8(pixels: NDArray[np.floating]) -> Images:
    """Round pixels to whole grey levels, cut off at 0 and 255."""
    levels: Images = np.clip(np.rint(pixels), 0, 255).astype(np.uint8)
    return levels


def _blur_matrix(size: int, sigma: float) -> NDArray[np.float64]:
    """Return the matrix `[size, size]` that blurs a line of pixels; rows sum to 1. `sigma` is in pixels."""
    places = np.arange(size)
    weights = np.exp(-0.5 * ((places[:, None] - places[None, :]) / sigma) ** 2)
    blurring: NDArray[np.float64] = weights / weights.sum(axis=1, keepdims=True)
    return blurring


def _covered(start: NDArray[np.float64], thickness: float, size: int) -> NDArray[np.float64]:
    """Return which share `[N, size]` of each pixel of a line a bar covers.

    `start` `[N, 1]` in [0, 1) places the bar between the line's two ends; `thickness` is in pixels.
    """
    first = start * (size - thickness)
    pixels = np.arange(size)
    covered: NDArray[np.float64] = np.clip(
        np.minimum(first + thickness, pixels + 1) - np.maximum(first, pixels), 0.0, 1.0
    )
    return covered


def _sample(images: Images, down: NDArray[np.float64], right: NDArray[np.float64]) -> NDArray[np.float64]:
    """Read images `[N, H, W]` at fractional places `down`, `right` `[N, H, W]`, bilinearly; black outside."""
    height, width = images.shape[1:]
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1)))
    down, right = np.clip(down + 1, 0, height + 1), np.clip(right + 1, 0, width + 1)
    top, left = np.minimum(down.astype(int), height), np.minimum(right.astype(int), width)
    below, beside = down - top, right - left
    which = np.arange(len(images))[:, None, None]
    upper = (1 - beside) * padded[which, top, left] + beside * padded[which, top, left + 1]
    lower = (1 - beside) * padded[which, top + 1, left] + beside * padded[which, top + 1, left + 1]
    sampled: NDArray[np.float64] = (1 - below) * upper + below * lower
    return sampled
