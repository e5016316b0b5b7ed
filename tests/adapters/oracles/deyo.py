"""The oracle of ``deyo``."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adapters.base import Segments
from adapters.rng import Random
from tests.adapters.oracles.entropy import entropies
from tests.adapters.oracles.sar import SelectiveOracle


class DeyoOracle(SelectiveOracle):
    """Certain rows whose prediction suffers when the object in the image is destroyed."""

    def step(self, x: Tensor, random: Random) -> Tensor:
        logits: Tensor = self.network(x)
        s = self.settings
        certain = self.rows_that_may_count(x, logits)
        chosen, drops = [], []
        if certain:
            with torch.no_grad():
                destroyed = self.network(self.destroyed(x[certain], random)).softmax(1)
            for place, i in enumerate(certain):
                p = logits[i].detach().softmax(0)
                drop = float(p.max() - destroyed[place, p.argmax()])
                if drop > s.plpd_threshold:
                    chosen.append(i)
                    drops.append(drop)
        if not chosen and not s.ostta:
            return logits.detach()
        loss = self.marginal(logits) if s.ostta else torch.zeros(())
        for i, drop in zip(chosen, drops, strict=True):
            entropy = entropies(logits[i : i + 1])[0]
            weight = 0.0
            if s.weigh_entropy:
                weight += math.exp(s.weight_margin * math.log(logits.shape[1]) - float(entropy.detach()))
            if s.weigh_plpd:
                weight += math.exp(drop)
            if not s.weigh_entropy and not s.weigh_plpd:
                weight = 1.0
            loss = loss + weight * entropy / len(chosen)
        self.descend(loss)
        return logits.detach()

    def destroyed(self, x: Tensor, random: Random) -> Tensor:
        x, (rows, _, height, width) = x.clone(), x.shape
        draws = random.named("destroy")
        if self.settings.destroy == "pixel":
            order = draws.uniform((height * width,))[0].argsort().tolist()
            out = torch.empty_like(x)
            for place, origin in enumerate(order):
                out[:, :, place // width, place % width] = x[:, :, origin // width, origin % width]
            return out
        if self.settings.destroy == "occlusion":
            for image in x:
                for channel in image:
                    mean = float(channel.mean())
                    for row in range(height // 4, height // 4 + height // 2):
                        for column in range(width // 4, width // 4 + width // 2):
                            channel[row, column] = mean
            return x
        side = self.settings.patch_len
        high, wide = height // side, width // side
        fits = (high * side, wide * side)
        if fits != (height, width):
            x = F.interpolate(x, fits, mode="bilinear", align_corners=False)
        orders = draws.uniform_rows(Segments([rows]), (side * side,)).argsort(1).tolist()
        out = torch.empty_like(x)
        for image, order in enumerate(orders):
            for place, origin in enumerate(order):
                to, start = (place // side * high, place % side * wide), (origin // side * high, origin % side * wide)
                block = x[image, :, start[0] : start[0] + high, start[1] : start[1] + wide]
                out[image, :, to[0] : to[0] + high, to[1] : to[1] + wide] = block
        return out if fits == (height, width) else F.interpolate(out, (height, width), mode="bilinear")


ORACLES = {"deyo": DeyoOracle}
_LARGE = {"optimiser": "sgd", "lr": 0.05, "entropy_margin": 0.9, "plpd_threshold": 0.0}
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "deyo": {
        "resized": _LARGE,  # the networks' images are 6 x 6, which 4 does not divide
        "whole": _LARGE | {"patch_len": 3, "weigh_entropy": False, "skip": ["4"]},
        "pixel": _LARGE | {"optimiser": "adam", "lr": 0.02, "destroy": "pixel", "weigh_plpd": False, "ostta": 0.5},
        "occlusion": _LARGE | {"destroy": "occlusion", "plpd_threshold": 0.02},
    },
}
