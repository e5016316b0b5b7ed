"""CoTTA and RMT in plain PyTorch, one stream each, written from the papers' equations: what ``full_model.py`` measures
the engine against.

A deep copy of the network for student and teacher each, ``torch.optim.Adam`` over all parameters, batch statistics,
moving average and restoration tensor by tensor, one forward pass per augmented view. Augmentation is drawn once per
batch and view, and made with the operations of ``adapters/augment.py``'s definition, the padding included.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEARNING_RATE, MOMENTUM, RESTORE, VIEWS = 1e-3, 0.999, 0.01, 32
TEMPERATURE = 0.1

View = Callable[[Tensor, int], Tensor]
"""The ``k``-th augmentation of images ``[N, 3, H, W]`` in [0, 1]."""


class Teacher:
    """A student with its optimiser, a teacher, and what the head gets as input."""

    def __init__(self, network: nn.Module, head: str) -> None:
        self.student = _on_batches(network).requires_grad_(True)
        self.teacher = _on_batches(network)
        self.optimiser = torch.optim.Adam(self.student.parameters(), lr=LEARNING_RATE)
        self.features = torch.empty(0)
        self.student.get_submodule(head).register_forward_pre_hook(self._catch)

    def follow(self) -> None:
        """``teacher <- m teacher + (1 - m) student``."""
        with torch.no_grad():
            for old, new in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                old.copy_(MOMENTUM * old + (1 - MOMENTUM) * new)

    def descend(self, loss: Tensor) -> None:
        """One step of the optimiser."""
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()

    def tensors(self) -> Iterator[Tensor]:
        """All that is kept between steps."""
        for network in (self.student, self.teacher):
            yield from network.parameters()
        for kept in self.optimiser.state.values():
            yield from kept.values()

    def _catch(self, head: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.features = inputs[0]


class PlainCotta(Teacher):
    """CoTTA (Wang et al., CVPR 2022), always unsure: every answer is an average over augmented views."""

    def __init__(self, network: nn.Module, head: str, view: View, views: int = VIEWS, restore: float = RESTORE) -> None:
        super().__init__(network, head)
        self._view, self._views, self._restore = view, views, restore
        self._source = [value.detach().clone() for value in network.parameters()]

    def step(self, x: Tensor) -> Tensor:
        """Answers ``x [N, ...]`` and adapts to it."""
        with torch.no_grad():
            answer = torch.stack([self.teacher(self._view(x, k)) for k in range(self._views)]).mean(0)
        student = self.student(x)
        self.descend(-(answer.softmax(1) * student.log_softmax(1)).sum(1).mean())
        self.follow()
        with torch.no_grad():
            for value, source in zip(self.student.parameters(), self._source, strict=True):
                chosen = (torch.rand(value.shape) < self._restore).to(value.dtype) if self._restore else 0.0
                value.copy_(source * chosen + value * (1 - chosen))
        return answer

    def tensors(self) -> Iterator[Tensor]:
        """With the source to restore from."""
        yield from super().tensors()
        yield from self._source


class PlainRmt(Teacher):
    """RMT (Doebler et al., CVPR 2023), from the source's weights; without ``replay`` images source-free."""

    def __init__(
        self,
        network: nn.Module,
        head: str,
        view: View,
        prototypes: Tensor,
        projector: nn.Module,
        replay: tuple[Tensor, Tensor] | None,
    ) -> None:
        super().__init__(network, head)
        self._view, self._prototypes, self._projector, self._replay = view, prototypes, projector, replay
        self.optimiser.add_param_group({"params": list(projector.parameters())})

    def step(self, x: Tensor) -> Tensor:
        """Answers ``x [N, ...]`` and adapts to it."""
        student, features = self.student(x), self.features
        with torch.no_grad():
            teacher = self.teacher(x)
        changed, changed_features = self.student(self._view(x, 0)), self.features
        loss = (_symmetric(student, teacher) + _symmetric(changed, teacher)).mean() / 2
        nearest = F.cosine_similarity(features[:, None].detach(), self._prototypes[None], dim=2).argmax(1)
        loss = loss + self._contrast(torch.cat([self._prototypes[nearest], features, changed_features]), len(x))
        if self._replay is not None:
            images, labels = self._replay
            chosen = torch.randperm(len(labels))[: len(x)]
            loss = loss + F.cross_entropy(self.student(images[chosen]), labels[chosen])
        self.descend(loss)
        self.follow()
        answer: Tensor = student.detach() + teacher
        return answer

    def _contrast(self, views: Tensor, rows: int) -> Tensor:
        v = F.normalize(self._projector(views), dim=1)
        others = ~torch.eye(len(v), dtype=torch.bool)
        logits = (v @ v.T / TEMPERATURE).masked_fill(~others, -torch.inf)
        same = torch.eye(rows, dtype=torch.bool).repeat(3, 3) & others
        loss: Tensor = -logits.log_softmax(1)[same].mean()
        return loss

    def tensors(self) -> Iterator[Tensor]:
        """With the projector."""
        yield from super().tensors()
        yield from self._projector.parameters()


def augmented(x: Tensor, _: int) -> Tensor:
    """One random view of all images, as CoTTA publishes it; the noise alone is drawn per pixel."""
    x = x.clamp(0, 1)
    for number in torch.randperm(5).tolist():
        x = _COLOURS[number](x).clamp(0, 1)
    height, width = x.shape[2:]
    x = F.pad(x, (width // 2, width // 2, height // 2, height // 2), "replicate")
    angle, scale = math.radians(_between(-15, 15)), _between(0.9, 1.1)
    right, down = (2 * round(_between(-side / 16, side / 16)) / side for side in (x.shape[3], x.shape[2]))
    cos, sin = math.cos(angle) / scale, math.sin(angle) / scale
    turn = torch.tensor([[cos, sin, -cos * right - sin * down], [-sin, cos, sin * right - cos * down]])
    grid = F.affine_grid(turn.expand(len(x), 2, 3), list(x.shape), align_corners=False)
    x = F.grid_sample(x, grid, align_corners=False)
    taps = torch.exp(-0.5 * (torch.arange(-2.0, 3.0) / _between(0.001, 0.5)) ** 2)
    taps = taps / taps.sum()
    x = F.conv2d(x, (taps[:, None] * taps).expand(x.shape[1], 1, 5, 5), padding=2, groups=x.shape[1])
    x = x[:, :, height // 2 : height // 2 + height, width // 2 : width // 2 + width]
    x = x.flip(3) if torch.rand(()) < 0.5 else x
    return (x + 0.005 * torch.randn_like(x)).clamp(0, 1)


def _between(low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand(()))


def _grey(x: Tensor) -> Tensor:
    return (x * torch.tensor([0.2989, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)


def _brightness(x: Tensor) -> Tensor:
    return x * _between(0.6, 1.4)


def _contrast(x: Tensor) -> Tensor:
    factor = _between(0.7, 1.3)
    return factor * x + (1 - factor) * _grey(x).mean((2, 3), keepdim=True)


def _saturation(x: Tensor) -> Tensor:
    factor = _between(0.5, 1.5)
    return factor * x + (1 - factor) * _grey(x)


def _hue(x: Tensor) -> Tensor:
    red, green, blue = x.unbind(1)
    value = x.amax(1)
    chroma = value - x.amin(1)
    divisor = torch.where(chroma == 0, 1.0, chroma)
    hue = torch.where(value == green, (blue - red) / divisor + 2, (red - green) / divisor + 4)
    hue = torch.where(value == red, (green - blue) / divisor, hue) + 6 * _between(-0.06, 0.06)
    turned = ((hue + offset) % 6 for offset in (5, 3, 1))
    return torch.stack([value - chroma * torch.minimum(k, 4 - k).clamp(0, 1) for k in turned], 1)


def _gamma(x: Tensor) -> Tensor:
    return x.clamp(min=1e-8) ** _between(0.7, 1.3)


_COLOURS = (_brightness, _contrast, _saturation, _hue, _gamma)


def _symmetric(a: Tensor, b: Tensor) -> Tensor:
    """``SCE(a, b)`` of logits, per row."""
    return -(b.softmax(1) * a.log_softmax(1) + a.softmax(1) * b.log_softmax(1)).sum(1) / 2


def _on_batches(network: nn.Module) -> nn.Module:
    """A copy that normalises by each batch."""
    copied = copy.deepcopy(network).train().requires_grad_(False)
    for module in copied.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats, module.running_mean, module.running_var = False, None, None
    return copied
