"""Input rows kept in a stream's state: as 8-bit values where inputs have a range, else as they are."""

from __future__ import annotations

import torch
from torch import Tensor

from adapters.base import Source


class ImageStore:
    """How rows of a source's inputs are stored.

    8-bit storage holds ``round(255 (x - low) / (high - low))``: exact for inputs that came as 8-bit images, and within
    half a step, ``(high - low) / 510``, for others. ``exact`` keeps the model's own type, as do inputs without a range.
    """

    def __init__(self, source: Source, exact: bool = False) -> None:
        self._shape, self._range = source.input_shape, None if exact else source.input_range
        self._dtype, self._device = source.dtype, source.device

    def empty(self, rows: int) -> Tensor:
        """Room for so many rows of one stream, ``[1, rows, *shape]`` of zeros."""
        dtype = self._dtype if self._range is None else torch.uint8
        return torch.zeros(1, rows, *self._shape, dtype=dtype, device=self._device)

    def pack(self, x: Tensor) -> Tensor:
        """Inputs ``[..., *shape]`` as they are stored."""
        if self._range is None:
            return x
        low, high = self._range
        return ((x - low) * (255 / (high - low))).round().clamp(0, 255).to(torch.uint8)

    def unpack(self, stored: Tensor) -> Tensor:
        """Stored rows as inputs."""
        if self._range is None:
            return stored
        low, high = self._range
        return (low + (high - low) * (stored.float() / 255)).to(self._dtype)
