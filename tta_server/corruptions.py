"""Ways in which images go bad, of any size and range: what streams are made of where only clean data are at hand.

A corruption maps inputs ``x [N, channels, height, width]``, whose values lie in ``[0, 1]``, to new ones, for a
``severity`` in ``(0, 1]``; its input is not changed. Randomness comes from the given generator only. They are kinds of
damage known from Hendrycks and Dietterich (ICLR 2019, arXiv 1903.12261), with formulas and strengths of our own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Corruption = Callable[[Tensor, float, torch.Generator], Tensor]


def noise(x: Tensor, severity: float, generator: torch.Generator) -> Tensor:
    """Independent Gaussian noise on every value, of deviation 0.25 at worst."""
    return (x + 0.25 * severity * _normal(x.shape, x, generator)).clamp(0, 1)


def dead_pixels(x: Tensor, severity: float, generator: torch.Generator) -> Tensor:
    """Up to 15 % of the pixels are black or white."""
    drawn = torch.rand(len(x), 1, *x.shape[2:], generator=generator).to(x)
    share = 0.15 * severity
    return torch.where(drawn < share, (drawn < share / 2).to(x.dtype), x)


def blur(x: Tensor, severity: float, generator: torch.Generator) -> Tensor:
    """Out of focus: Gaussian blur, of deviation up to a sixteenth of the shorter side."""
    sigma = severity * min(x.shape[2:]) / 16
    reach = max(1, round(3 * sigma))
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma) ** 2).to(x)
    return _filter(_filter(x, kernel / kernel.sum(), 2), kernel / kernel.sum(), 3)


def motion(x: Tensor, severity: float, generator: torch.Generator) -> Tensor:
    """Moved sideways while exposed: a mean along rows, over up to a quarter of the width."""
    reach = max(1, round(severity * x.shape[3] / 8))
    return _filter(x, x.new_full((2 * reach + 1,), 1 / (2 * reach + 1)), 3)


def fog(x: Tensor, severity: float, generator: torch.Generator) -> Tensor:
    """Contrast fades towards a light grey, to a quarter of it at worst."""
    fade = 0.75 * severity
    return (1 - fade) * x + fade * 0.7


def darkness(x: Tensor, severity: float, generator: torch.Generator) -> Tensor:
    """Under-exposed, to a fifth of the light at worst, with a little noise."""
    return ((1 - 0.8 * severity) * x + 0.02 * _normal(x.shape, x, generator)).clamp(0, 1)


def pixelate(x: Tensor, severity: float, generator: torch.Generator) -> Tensor:
    """A coarser sensor, down to three tenths of the resolution."""
    size = [max(2, round(side * (1 - 0.7 * severity))) for side in x.shape[2:]]
    return F.interpolate(F.interpolate(x, size, mode="area"), list(x.shape[2:]), mode="nearest")


def colour_cast(x: Tensor, severity: float, generator: torch.Generator) -> Tensor:
    """A filter before the lens: each channel has its own gain, from 1 down to 0.3, the same for all images.
    Images of one channel stay as they are."""
    gains = 1 - 0.7 * severity * torch.linspace(0, 1, x.shape[1]).to(x)
    return x * gains[:, None, None]


CORRUPTIONS: dict[str, Corruption] = {
    "noise": noise,
    "dead_pixels": dead_pixels,
    "blur": blur,
    "motion": motion,
    "fog": fog,
    "darkness": darkness,
    "pixelate": pixelate,
    "colour_cast": colour_cast,
}


def _normal(shape: torch.Size, like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator).to(like)


def _filter(x: Tensor, kernel: Tensor, dimension: int) -> Tensor:
    """``x`` filtered along one of its sides, the outermost values repeated beyond the borders."""
    reach = len(kernel) // 2
    x = x.transpose(dimension, 3)
    padded = F.pad(x, (reach, reach, 0, 0), mode="replicate")
    return F.conv2d(padded.flatten(0, 1).unsqueeze(1), kernel.view(1, 1, 1, -1)).view_as(x).transpose(dimension, 3)
