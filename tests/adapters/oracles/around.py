"""What every policy can have around its step, told once more: a window for small requests, a periodic reset."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from adapters.rng import Random
from tests.adapters.oracles.base import Oracle, PlainBatchNorm


class WindowOracle(Oracle):
    """Row after row into a list; answers by averages of first and second moments over rows; a step when it is full."""

    def __init__(
        self, make: Callable[[], Oracle], original: nn.Module, settings: Any, artefacts: Mapping[str, Tensor]
    ) -> None:
        super().__init__(original, settings, artefacts)
        self.inner = make()
        self.rows: list[Tensor | None] = [None] * settings.window
        self.count = 0
        self.layers = {path: one for path, one in self.inner.norms.items() if isinstance(one, PlainBatchNorm)}
        self.first = {path: one.own_mean for path, one in self.layers.items()}
        self.second = {path: one.own_var + one.own_mean**2 for path, one in self.layers.items()}

    def step(self, x: Tensor, random: Random) -> Tensor:
        for path, layer in self.layers.items():
            layer.forward = partial(self.normalise, path)  # type: ignore[method-assign]
        with torch.no_grad():
            logits = torch.as_tensor(self.inner.network(x))
        for layer in self.layers.values():
            del layer.forward
        if self.settings.window_images == "none":
            if len(x) >= self.settings.window:
                self.inner.step(x, random.named("window 0"))
            return logits
        turn = 0
        for row in x:
            self.rows[self.count] = row
            self.count += 1
            if self.count == self.settings.window:
                self.inner.step(
                    torch.stack([one for one in self.rows if one is not None]), random.named(f"window {turn}")
                )
                self.count, turn = 0, turn + 1
        return logits

    def normalise(self, path: str, x: Tensor) -> Tensor:
        """Moments move by ``1 - (1 - 1/W)^n`` for ``n`` rows, the rows of a request counting alike."""
        share = 1 - (1 - 1 / self.settings.window) ** len(x)
        channels = x.transpose(0, 1).flatten(1)
        self.first[path] = (1 - share) * self.first[path] + share * channels.mean(1)
        self.second[path] = (1 - share) * self.second[path] + share * channels.square().mean(1)
        layer, shape = self.layers[path], (1, -1, *[1] * (x.dim() - 2))
        variance = self.second[path] - self.first[path] ** 2
        normalised = (x - self.first[path].view(shape)) / (variance + layer.eps).sqrt().view(shape)
        return normalised * layer.weight.detach().view(shape) + layer.bias.detach().view(shape)

    def state(self) -> dict[str, Tensor]:
        state = self.inner.state()
        for path in self.layers:
            state[f"memory/window.0.{path}.running_mean"] = self.first[path]
            state[f"memory/window.0.{path}.running_var"] = self.second[path] - self.first[path] ** 2
        if self.settings.window_images != "none":
            shape = next(one for one in self.rows if one is not None)
            state["memory/window.x"] = torch.stack(
                [torch.zeros_like(shape) if one is None else one for one in self.rows]
            )
            state["memory/window.rows"] = torch.tensor(self.count)
        return state


class ResetOracle(Oracle):
    """A new oracle in the place of the old one, once that has seen its rows."""

    def __init__(
        self, make: Callable[[], Oracle], original: nn.Module, settings: Any, artefacts: Mapping[str, Tensor]
    ) -> None:
        super().__init__(original, settings, artefacts)
        self.make, self.inner, self.seen = make, make(), 0

    def step(self, x: Tensor, random: Random) -> Tensor:
        if self.seen >= self.settings.reset_after:
            self.inner, self.seen = self.make(), 0
        self.seen += len(x)
        return self.inner.step(x, random)

    def state(self) -> dict[str, Tensor]:
        return self.inner.state() | {"memory/reset.rows": torch.tensor(self.seen)}
