"""Section 1.6 of the algorithm notes once more, step by step on one image at a time: what ``adapters.augment`` is
measured by.

Knows of the fast one only which of the drawn numbers is for what. Everything else is written from the definitions:
the padding is made, the whole padded image is turned pixel by pixel, blurred by a square kernel, and then cropped.
"""

from __future__ import annotations

import colorsys
import math
from typing import Any

import numpy as np
import numpy.typing as npt

Image = npt.NDArray[np.float64]
"""``[H, W, C]`` in [0, 1]."""

COLOURS = ("brightness", "contrast", "saturation", "hue", "gamma")
AFTER = ("rotation", "horizontal", "vertical", "scale", "blur", "flip")


def slow_augment(x: Image, drawn: list[float], noise: Image | None, recipe: Any, endless: bool = False) -> Image:
    """One image's view. ``drawn``: 16 numbers from [0, 1); ``noise``: standard normal, per value. With ``endless``
    padding there is no black to be seen around it."""
    of = dict(zip([f"rank of {name}" for name in COLOURS] + list(COLOURS + AFTER), drawn, strict=True))

    def between(bounds: tuple[float, float], name: str) -> float:
        return bounds[0] * (1 - of[name]) + bounds[1] * of[name]

    x = np.clip(x, 0, 1)
    for name in sorted(COLOURS, key=lambda name: of[f"rank of {name}"]):
        x = colour(name, x, between(getattr(recipe, name), name))

    height, width, _ = x.shape
    by = (height // 2, width // 2)
    tall, wide = height + 2 * by[0], width + 2 * by[1]
    x = pad(x, by, recipe.padding)
    frame = (4 * tall, 4 * wide) if endless else (0, 0)
    if endless:
        x = pad(x[by[0] : by[0] + height, by[1] : by[1] + width], (by[0] + frame[0], by[1] + frame[1]), recipe.padding)
    right = round(between((-recipe.translation * wide, recipe.translation * wide), "horizontal"))
    down = round(between((-recipe.translation * tall, recipe.translation * tall), "vertical"))
    angle = math.radians(between(recipe.rotation, "rotation"))
    x = turn(x, (tall, wide), angle, right, down, between(recipe.scale, "scale"))
    if recipe.blur is not None:
        x = blur(x, between(recipe.blur, "blur"))
    x = x[by[0] : by[0] + height, by[1] : by[1] + width]
    if of["flip"] < recipe.flip:
        x = x[:, ::-1]
    if noise is not None:
        x = x + recipe.noise * noise
    return np.clip(x, 0, 1)


def grey_of(pixel: Image) -> float:
    if len(pixel) == 1:
        return float(pixel[0])
    return float(0.2989 * pixel[0] + 0.587 * pixel[1] + 0.114 * pixel[2])


def colour(name: str, x: Image, strength: float) -> Image:
    """One of the five operations, pixel by pixel."""
    grey = [[grey_of(pixel) for pixel in line] for line in x]
    mean = float(np.mean(grey))
    out = x.copy()
    for i, j in np.ndindex(x.shape[:2]):
        pixel = x[i, j]
        if name == "brightness":
            out[i, j] = strength * pixel
        elif name == "contrast":
            out[i, j] = strength * pixel + (1 - strength) * mean
        elif name == "gamma":
            out[i, j] = [max(value, 1e-8) ** strength for value in pixel]
        elif len(pixel) == 3 and name == "saturation":
            out[i, j] = strength * pixel + (1 - strength) * grey[i][j]
        elif len(pixel) == 3 and name == "hue":
            h, s, v = colorsys.rgb_to_hsv(*pixel)
            out[i, j] = colorsys.hsv_to_rgb((h + strength) % 1.0, s, v)
    return np.clip(out, 0, 1)


def pad(x: Image, by: tuple[int, int], padding: str) -> Image:
    size = ((by[0], by[0]), (by[1], by[1]), (0, 0))
    return np.pad(x, size, mode="reflect") if padding == "reflect" else np.pad(x, size, mode="edge")


def turn(x: Image, size: tuple[int, int], angle: float, right: int, down: int, scale: float) -> Image:
    """The middle ``size`` of the image after it was turned clockwise and scaled about its centre, then moved;
    bilinear, black outside."""
    forward = scale * np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    (across, slant), (lean, along) = np.linalg.inv(forward).tolist()  # of (x, y), with y downwards
    out = np.zeros((*size, x.shape[2]))
    for i, j in np.ndindex(*size):
        u, v = j - (size[1] - 1) / 2 - right, i - (size[0] - 1) / 2 - down
        column = across * u + slant * v + (x.shape[1] - 1) / 2
        line = lean * u + along * v + (x.shape[0] - 1) / 2
        left, top = math.floor(column), math.floor(line)
        for near_line, near_column in ((top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1)):
            if 0 <= near_line < x.shape[0] and 0 <= near_column < x.shape[1]:
                weight = (1 - abs(line - near_line)) * (1 - abs(column - near_column))
                out[i, j] += weight * x[near_line, near_column]
    return out


def blur(x: Image, sigma: float) -> Image:
    """Gaussian kernel of 5 x 5, reflected at the border (of the padded image, far from what is cropped)."""
    kernel = {(i, j): math.exp(-(i * i + j * j) / (2 * sigma * sigma)) for i in range(-2, 3) for j in range(-2, 3)}
    total = sum(kernel.values())
    height, width, _ = x.shape
    around = np.pad(x, ((2, 2), (2, 2), (0, 0)), mode="reflect")
    out = np.zeros_like(x)
    for (i, j), weight in kernel.items():
        out += weight / total * around[2 + i : 2 + i + height, 2 + j : 2 + j + width]
    return out
