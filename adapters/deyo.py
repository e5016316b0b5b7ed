"""``deyo``: entropy minimisation on samples whose prediction hangs on the object's shape (Lee et al., ICLR 2024, arXiv
2403.07366).

Per request of a stream, with ``z`` the logits, ``p_i`` the prediction and ``H_i`` its entropy (section 4 of the paper):

    R = {i : H_i < E0}
    x'_i = destroy(x_i) for i in R,      p'_i the prediction for it, by the same weights
    PLPD_i = p_i[c_i] - p'_i[c_i],  c_i = argmax p_i           (pseudo-label probability difference, equation 4)
    S = {i in R : PLPD_i > tau}                                (equation 6)
    L = mean_S (exp(H0 - H_i) + exp(PLPD_i)) H_i               (equations 7, 8; the weights are constants)

The destroyed rows are a batch of their own, normalised by their own statistics. An empty ``R`` or ``S`` means no step.
The answer is the one computed before the step.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from adapters import gradient, losses
from adapters.base import Batch, Segments, Source, State, Step, register
from adapters.entropy import IMAGENET, SETTINGS, PartialEntropyPolicy
from adapters.rng import Random


@register
@dataclass(frozen=True)
class Deyo(PartialEntropyPolicy):
    """Entropy minimisation on certain samples whose prediction suffers when their shapes are destroyed.

    ``destroy``: how. ``patch`` cuts the image into ``patch_len x patch_len`` blocks and shuffles them, each image in
    its own way; ``pixel`` shuffles the pixels, all images of the request alike; ``occlusion`` paints the middle, half
    as high and wide as the image, in the image's mean colour. ``entropy_margin`` and ``weight_margin``: ``E0`` and
    ``H0`` as shares of the greatest entropy, ``ln C``. ``plpd_threshold``: ``tau``; 0.3 where only the corruption
    changes, 0.2 for mixed corruptions, small batches and shifting labels, 0.5 for Waterbirds. ``weigh_entropy``,
    ``weigh_plpd``: whether the terms of the weight are in it; without both, rows count alike.
    """

    name = "deyo"
    ranges = SETTINGS | {
        "patch_len": "[1, inf)",
        "entropy_margin": "[0, inf)",
        "weight_margin": "[0, inf)",
        "plpd_threshold": "[-2, 1]",
    }
    presets = {"imagenet": IMAGENET}

    destroy: Literal["patch", "pixel", "occlusion"] = "patch"
    patch_len: int = 4
    entropy_margin: float = 0.5
    weight_margin: float = 0.4
    plpd_threshold: float = 0.3
    weigh_entropy: bool = True
    weigh_plpd: bool = True

    def init(self, source: Source) -> State:
        shape = source.input_shape
        if len(shape) != 3 or min(shape[1:]) < self.patch_len:
            raise ValueError(
                f"deyo cuts images [channels, height, width] into {self.patch_len} blocks a side, and this model's "
                f"input is {list(shape)}"
            )
        return super().init(source)

    def step(self, source: Source, state: State, batch: Batch) -> Generator[Tensor, None, Step]:
        weights = gradient.leaves(state.weights)
        logits = batch.forward(weights, batch.x).logits
        yield logits.detach()
        segments, greatest = batch.segments, math.log(source.num_classes)
        kept, crowd = self.crowd(source, batch, logits)
        entropy, p = losses.entropy(logits), logits.detach().softmax(1)
        certain = kept & (entropy.detach() < self.entropy_margin * greatest)
        plpd = self._drop(state, batch, p, certain)
        chosen = certain & (plpd > self.plpd_threshold)
        count = segments.sum(chosen.to(p.dtype))
        active, share = self.counts(count), count / segments.rows_per_stream(p.dtype).squeeze(1)
        if not active.any():
            return Step(state, {"loss": torch.zeros_like(share), "selected": share})

        weight = torch.zeros_like(plpd) if self.weigh_entropy or self.weigh_plpd else torch.ones_like(plpd)
        if self.weigh_entropy:
            weight = weight + (self.weight_margin * greatest - entropy.detach()).exp()
        if self.weigh_plpd:
            weight = weight + plpd.exp()
        loss = losses.mean_of_chosen(weight * entropy, chosen, segments) + crowd
        moved, memory = self.descent.update(state.weights, gradient.per_stream(loss, weights), state.memory, active)
        return Step(State(moved, memory), {"loss": torch.where(active, loss.detach(), 0.0), "selected": share})

    def _drop(self, state: State, batch: Batch, p: Tensor, certain: Tensor) -> Tensor:
        """``PLPD [N]`` of the ``certain`` rows, 0 for the others."""
        drop = torch.zeros_like(p[:, 0])
        index, segments = batch.segments.select(certain)
        if not segments.rows:
            return drop
        with torch.no_grad():
            x = self.destroyed(batch.x[index], segments, batch.random.named("destroy"))
            after = batch.forward(state.weights, x, segments).logits.softmax(1)
        before, label = p[index].max(1)
        return drop.index_copy(0, index, before - after.gather(1, label[:, None]).squeeze(1))

    def destroyed(self, x: Tensor, segments: Segments, random: Random) -> Tensor:
        """``x [N, channels, height, width]`` without its shapes."""
        height, width = x.shape[2:]
        if self.destroy == "pixel":
            order = segments.spread(random.uniform((height * width,)).argsort(1))
            return _reorder(x.flatten(2), order).view_as(x)
        if self.destroy == "occlusion":
            rows = torch.arange(height, device=x.device)[:, None] - height // 4
            columns = torch.arange(width, device=x.device) - width // 4
            middle = (rows >= 0) & (rows < height // 2) & (columns >= 0) & (columns < width // 2)
            return torch.where(middle, x.mean((2, 3), keepdim=True), x)
        side = self.patch_len
        high, wide = height // side, width // side
        if (high * side, wide * side) != (height, width):
            x = F.interpolate(x, (high * side, wide * side), mode="bilinear")
        order = random.uniform_rows(segments, (side * side,)).argsort(1)
        blocks = F.unfold(x, (high, wide), stride=(high, wide))  # [N, channels high wide, side side]
        x = F.fold(_reorder(blocks, order), (high * side, wide * side), (high, wide), stride=(high, wide))
        return x if x.shape[2:] == (height, width) else F.interpolate(x, (height, width), mode="bilinear")


def _reorder(x: Tensor, order: Tensor) -> Tensor:
    """Each row of ``x [N, A, B]`` with its last dimension in its ``order [N, B]``."""
    return x.gather(2, order[:, None].expand_as(x))
