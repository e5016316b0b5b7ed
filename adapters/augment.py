"""Random views of images: the augmentation that CoTTA, PETAL, RMT and RoTTA share, and ROID's variant of it.

In this order, on images in [0, 1] (section 1.6 of the project's algorithm notes; CoTTA, Wang et al., CVPR 2022, and
torchvision's definitions of the operations):

1. clip
2. five colour operations in random order, each clipped: brightness ``b x``; contrast ``c x + (1 - c) mean(grey(x))``;
   saturation ``s x + (1 - s) grey(x)``; hue ``+ h`` (in turns, through HSV); gamma ``max(x, 1e-8)^g``,
   with ``grey = 0.2989 R + 0.587 G + 0.114 B``
3. pad by half the side, by edge values (ROID: reflected without repeating the edge)
4. rotate by ``a`` and scale by ``k`` about the centre, then move by whole pixels ``t``, at most 1/16 of the padded
   side; bilinear: the pixel at ``p`` from the centre is taken from ``R(a)^-1 (p - t) / k``
5. Gaussian blur, 5 x 5 taps (ROID: none), 6. crop the centre, 7. flip with probability 1/2
8. Gaussian noise (ROID: none), 9. clip

All is drawn once per call and stream and shared by the stream's rows; only the noise is drawn per pixel. A draw per row
is a different algorithm.

The padding is not made but read from the image where the grid leaves it (and the flip is a mirrored grid), so it has no
end, while step 4 has zeros beyond half a side. In square images those hardly count with the strengths below: their
greatest weight in any pixel is nothing from a side of 22 on (without blur from 6), 4e-6 from 16 and 0.004 from 8. Long
images (over 1.8 times as long as wide, 1.3 with blur) do reach them, and have the padding there instead of black.
Images of unequal sides are padded, and moved, by each side's own share.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from adapters.base import Segments, Source
from adapters.rng import Random

Range = tuple[float, float]


@dataclass(frozen=True)
class Recipe:
    """How strong an augmentation is: the ranges to draw from, uniformly.

    ``brightness``, ``contrast``, ``saturation``, ``gamma`` and ``scale`` are factors (1: as it is), ``hue`` is in turns
    and ``rotation`` in degrees, clockwise. ``translation`` is the greatest, as a share of the padded side. ``blur`` is
    the range of the Gaussian's sigma in pixels, or ``None``; ``noise`` the standard deviation of the noise, in [0, 1]
    images, ``flip`` the probability of a horizontal flip.
    """

    brightness: Range = (0.6, 1.4)
    contrast: Range = (0.7, 1.3)
    saturation: Range = (0.5, 1.5)
    hue: Range = (-0.06, 0.06)
    gamma: Range = (0.7, 1.3)
    rotation: Range = (-15.0, 15.0)
    translation: float = 1 / 16
    scale: Range = (0.9, 1.1)
    blur: Range | None = (0.001, 0.5)
    noise: float = 0.005
    padding: Literal["edge", "reflect"] = "edge"
    flip: float = 0.5


STRONG = Recipe()
"""The published one."""
SOFT = Recipe(
    brightness=(0.8, 1.2),
    contrast=(0.85, 1.15),
    saturation=(0.75, 1.25),
    hue=(-0.03, 0.03),
    gamma=(0.85, 1.15),
    rotation=(-8.0, 8.0),
    scale=(0.95, 1.05),
    blur=(0.001, 0.25),
)
"""Its soft variant."""
PLAIN = Recipe(blur=None, noise=0.0, padding="reflect")
"""ROID's: no blur, no noise, reflected."""

COLUMNS = 16
"""Uniform numbers per stream and call: five whose ranks are the order of the colour operations, then those of
brightness, contrast, saturation, hue, gamma, rotation, horizontal and vertical translation, scale, blur and flip."""
_MARGIN = 2
"""Pixels on each side that the blur's five taps reach."""


def check(source: Source) -> None:
    """Raises ``ValueError`` unless the inputs of this source are images with a range, of one or three channels."""
    shape = source.input_shape
    if len(shape) != 3 or shape[0] not in (1, 3) or 0 in shape:
        raise ValueError(
            f"augmentation works on images of shape [1 or 3 channels, height, width], and this model's inputs have the "
            f"shape {list(shape)}: choose a policy that does not augment"
        )
    if source.input_range is None:
        raise ValueError(
            "augmentation needs to know the range of the inputs, and this model has none: set input.range to the least "
            "and greatest value of its images, with normalisation as a part of the model"
        )


def augment(x: Tensor, segments: Segments, source: Source, random: Random, recipe: Recipe = STRONG) -> Tensor:
    """One random view of each image, drawn once per stream: ``x [N, C, H, W]``, in the source's input range, to the
    same. ``segments`` says whose the rows are; streams may have none.

    Makes one call of ``random.uniform`` (``COLUMNS`` numbers, which see) and, where the recipe has noise, one of
    ``random.normal_rows``, whatever is drawn. No gradient goes through it. Half precision is computed in single.
    """
    drawn = random.uniform((COLUMNS,))
    noise = random.normal_rows(segments, tuple(x.shape[1:])) if recipe.noise else None
    low, high = source.input_range or (0.0, 1.0)
    working = torch.promote_types(x.dtype, torch.float32)
    drawn = drawn.to(working)
    with torch.no_grad():
        view = x.to(working)
        view = ((view - low) / (high - low)).clamp_(0, 1) if (low, high) != (0, 1) else view.clamp(0, 1)
        _jitter(view, segments, drawn[:, :5], drawn[:, 5:10], recipe)
        view = _warp(view, segments, drawn[:, 10:14], drawn[:, 15] < recipe.flip, recipe)
        if recipe.blur is not None:
            view = _blur(view, segments.spread(_between(recipe.blur, drawn[:, 14])))
        if noise is not None:
            view.add_(noise.to(working).mul_(recipe.noise))
        view.clamp_(0, 1)
        if (low, high) != (0, 1):
            view.mul_(high - low).add_(low).clamp_(low, high)
        return view.to(x.dtype)


def _between(bounds: Range, uniform: Tensor) -> Tensor:
    return bounds[0] + (bounds[1] - bounds[0]) * uniform


# --- colour, in place on images [N, C, H, W] in [0, 1]; factors are [N, 1, 1, 1] ----------------------------------


def _jitter(x: Tensor, segments: Segments, ranks: Tensor, drawn: Tensor, recipe: Recipe) -> None:
    """The five operations in each stream's own order: ``ranks [S, 5]``, ``drawn [S, 5]``."""
    bounds = (recipe.brightness, recipe.contrast, recipe.saturation, recipe.hue, recipe.gamma)
    factors = [segments.spread(_between(one, drawn[:, i])).view(-1, 1, 1, 1) for i, one in enumerate(bounds)]
    turns = segments.spread(ranks.argsort(dim=1, stable=True))  # [N, 5]: which operation is whose first, second, ...
    rows = turns.argsort(dim=0, stable=True)
    counts = (turns[..., None] == torch.arange(5, device=x.device)).sum(0).tolist()
    for turn, sizes in enumerate(counts):
        for operation, factor, index in zip(_OPERATIONS, factors, rows[:, turn].split(sizes), strict=True):
            if len(index) == len(x):
                operation(x, factor)
            elif len(index):
                part = x[index]
                operation(part, factor[index])
                x[index] = part


def _brightness(x: Tensor, factor: Tensor) -> None:
    x.mul_(factor).clamp_(0, 1)


def _contrast(x: Tensor, factor: Tensor) -> None:
    # Over columns, then over rows: a single sum over one large image would be split between threads.
    mean = _grey(x).mean(3, keepdim=True).mean(2, keepdim=True)
    x.mul_(factor).add_(mean.mul_(1 - factor)).clamp_(0, 1)


def _saturation(x: Tensor, factor: Tensor) -> None:
    if x.shape[1] == 3:
        grey = _grey(x)
        x.mul_(factor).add_(grey.mul_(1 - factor)).clamp_(0, 1)


def _hue(x: Tensor, shift: Tensor) -> None:
    if x.shape[1] != 3:
        return
    red, green, blue = x.unbind(1)
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    divisor = chroma.clamp_min(torch.finfo(x.dtype).tiny)
    from_green, from_blue = ((blue - red) / divisor).add_(2), ((red - green) / divisor).add_(4)
    # By weights of 0 and 1, which is exact, and a fifth of the time of torch.where.
    hue = from_green.lerp_(from_blue, (value - green).sign_())
    hue = (green - blue).div_(divisor).lerp_(hue, (value - red).sign_())  # in sixths of a turn
    hue.add_(6 * shift.squeeze(1))
    for channel, offset in enumerate((5, 3, 1)):  # V - C max(0, min(k, 4 - k, 1)), k = (offset + hue) mod 6
        k = hue + offset
        k.sub_((k / 6).floor_().mul_(6))
        torch.sub(value, torch.minimum(k, 4 - k).clamp_(0, 1).mul_(chroma), out=x[:, channel])
    x.clamp_(0, 1)


def _gamma(x: Tensor, exponent: Tensor) -> None:
    # Not x ** exponent: its last bit depends on where in memory a number lies.
    x.clamp_(min=1e-8).log_().mul_(exponent).exp_().clamp_(0, 1)


_OPERATIONS = (_brightness, _contrast, _saturation, _hue, _gamma)


def _grey(x: Tensor) -> Tensor:
    """``[N, 1, H, W]``, not a view of ``x``."""
    if x.shape[1] == 1:
        return x.clone()
    red, green, blue = x.split(1, 1)
    grey: Tensor = (0.2989 * red).add_(0.587 * green).add_(0.114 * blue)
    return grey


# --- geometry ------------------------------------------------------------------------------------------------------


def _warp(x: Tensor, segments: Segments, drawn: Tensor, flip: Tensor, recipe: Recipe) -> Tensor:
    """Steps 3, 4, 6 and 7: ``x [N, C, H, W]``, ``drawn [S, 4]``, ``flip [S]`` to ``[N, C, H, W]``, with the blur's
    margin around it if there is to be one."""
    height, width = x.shape[2:]
    margin = 0 if recipe.blur is None else _MARGIN
    angle = _between(recipe.rotation, drawn[:, 0, None, None]) * (math.pi / 180)
    scale = _between(recipe.scale, drawn[:, 3, None, None])
    side_to_side = torch.where(flip[:, None, None], -1.0, 1.0) * _centred(width, margin, x)[None, None, :]
    right = side_to_side - _shift(width, recipe, drawn[:, 1, None, None])
    down = _centred(height, margin, x)[None, :, None] - _shift(height, recipe, drawn[:, 2, None, None])
    cos, sin = angle.cos() / scale, angle.sin() / scale
    across, along = cos * right + sin * down, cos * down - sin * right  # from the centre, in pixels
    grid = torch.stack([across * (2 / max(width - 1, 1)), along * (2 / max(height - 1, 1))], -1)
    mode = "border" if recipe.padding == "edge" else "reflection"
    warped: Tensor = functional.grid_sample(x, segments.spread(grid), padding_mode=mode, align_corners=True)
    return warped


def _shift(side: int, recipe: Recipe, drawn: Tensor) -> Tensor:
    """Whole pixels, at most the recipe's share of the padded side."""
    greatest = recipe.translation * (side + 2 * (side // 2))
    return _between((-greatest, greatest), drawn).round_()


def _centred(side: int, margin: int, like: Tensor) -> Tensor:
    """Where the pixels of a side and its margin lie, from its centre."""
    return torch.arange(side + 2 * margin, dtype=like.dtype, device=like.device) - (side - 1 + 2 * margin) / 2


def _blur(x: Tensor, sigma: Tensor) -> Tensor:
    """``x [N, C, H + 4, W + 4]`` and ``sigma [N]`` to ``[N, C, H, W]``: one direction after the other."""
    taps = torch.exp(-0.5 * (torch.arange(3, dtype=x.dtype, device=x.device) / sigma[:, None]).square())
    taps = taps / (taps[:, :1] + 2 * taps[:, 1:2] + 2 * taps[:, 2:])
    centre, near, far = (one[:, None, None, None] for one in taps.unbind(1))
    for dimension in (2, 3):
        side = x.shape[dimension] - 2 * _MARGIN
        at = [x.narrow(dimension, start, side) for start in range(5)]
        x = (at[2] * centre).add_((at[1] + at[3]).mul_(near)).add_((at[0] + at[4]).mul_(far))
    return x
