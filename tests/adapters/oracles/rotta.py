"""The oracle of ``rotta``."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from adapters.base import Segments
from adapters.rng import Random
from tests.adapters.oracles.base import NORMS, Oracle
from tests.adapters.slow_augment import slow_augment

RECIPE = SimpleNamespace(
    brightness=(0.6, 1.4),
    contrast=(0.7, 1.3),
    saturation=(0.5, 1.5),
    hue=(-0.06, 0.06),
    gamma=(0.7, 1.3),
    rotation=(-15.0, 15.0),
    translation=1 / 16,
    scale=(0.9, 1.1),
    blur=(0.001, 0.5),
    noise=0.005,
    padding="edge",
    flip=0.5,
)


class RobustBatchNorm(nn.Module):
    """Batch norm whose training mode moves the buffers by ``alpha`` and normalises with the moved ones, through which
    gradients flow; the variance of the batch is the biased one. In evaluation mode the buffers serve."""

    def __init__(self, original: nn.BatchNorm2d, alpha: float) -> None:
        super().__init__()
        self.weight, self.bias, self.eps, self.alpha = original.weight, original.bias, original.eps, alpha
        assert original.running_mean is not None
        assert original.running_var is not None
        self.running_mean, self.running_var = original.running_mean.clone(), original.running_var.clone()

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.running_mean, self.running_var
        if self.training:
            mean = (1 - self.alpha) * mean + self.alpha * x.mean((0, 2, 3))
            var = (1 - self.alpha) * var + self.alpha * x.var((0, 2, 3), correction=0)
            self.running_mean, self.running_var = mean.detach(), var.detach()
        x = (x - mean[:, None, None]) / torch.sqrt(var + self.eps)[:, None, None]
        return x * self.weight[:, None, None] + self.bias[:, None, None]


@dataclass
class Item:
    """A sample in the memory. ``image`` is 8-bit."""

    slot: int
    image: Tensor
    label: int
    uncertainty: float
    age: int = 0


class RottaOracle(Oracle):
    """A student and a teacher of robust batch norms, and a list of items in the order in which they came."""

    def __init__(self, original: nn.Module, settings: Any, artefacts: Mapping[str, Tensor]) -> None:
        self.settings, self.artefacts = settings, artefacts
        self.student, self.teacher = robust(original, settings.alpha), robust(original, settings.alpha)
        self.theta = norm_parameters(self.student)
        for value in self.theta.values():
            value.requires_grad_()
        self.optimiser = torch.optim.Adam(list(self.theta.values()), lr=settings.lr, betas=(0.9, 0.999))
        self.items: list[Item] = []
        self.seen = 0
        self.shape: tuple[int, ...] = ()
        self.classes = 0

    def step(self, x: Tensor, random: Random) -> Tensor:
        self.shape = tuple(x.shape[1:])
        with torch.no_grad():
            logits: Tensor = self.teacher.eval()(x)
        self.classes = logits.shape[1]
        updates = 0
        for image, scores in zip(x, logits, strict=True):
            p = scores.softmax(0)
            uncertainty = -sum(float(q) * math.log(float(q) + 1e-6) for q in p)
            as_kept = float(torch.tensor(uncertainty, dtype=torch.float32))
            self.offer(Item(-1, (255 * image).round().clamp(0, 255).byte(), int(p.argmax()), as_kept))
            self.seen += 1
            if self.seen % self.settings.update_every == 0:
                self.update(random.named(f"update {updates}"))
                updates += 1
        return logits

    def score(self, item: Item) -> float:
        timeliness = 1 / (1 + math.exp(-item.age / self.settings.capacity))
        return float(
            self.settings.lambda_t * timeliness + self.settings.lambda_u * item.uncertainty / math.log(self.classes)
        )

    def offer(self, new: Item) -> None:
        population = Counter(item.label for item in self.items)
        if population[new.label] < self.settings.capacity / self.classes:
            if len(self.items) < self.settings.capacity:
                taken = {item.slot for item in self.items}
                new.slot = min(slot for slot in range(self.settings.capacity) if slot not in taken)
                self.items.append(new)
            else:
                most = max(population.values())
                self.replace(new, [item for item in self.items if population[item.label] == most])
        else:
            self.replace(new, [item for item in self.items if item.label == new.label])
        for item in self.items:
            item.age += 1

    def replace(self, new: Item, candidates: list[Item]) -> None:
        victim = candidates[0]
        for item in candidates:
            if self.score(item) >= self.score(victim):
                victim = item
        if self.score(victim) > self.score(new):
            self.items.remove(victim)
            new.slot = victim.slot
            self.items.append(new)

    def update(self, random: Random) -> None:
        items = sorted(self.items, key=lambda item: item.slot)
        x = (torch.stack([item.image for item in items]).float() / 255).double()  # read back in single precision
        with torch.no_grad():
            target = self.teacher.train()(x).softmax(1)
        answer = self.student.train()(augmented(x, random)).log_softmax(1)
        loss = torch.zeros(())
        for item, t, log_s in zip(items, target, answer, strict=True):
            a = item.age / self.settings.capacity
            loss = loss - math.exp(-a) / (1 + math.exp(-a)) * (t * log_s).sum() / len(items)
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        with torch.no_grad():
            for key, value in norm_parameters(self.teacher).items():
                value.copy_((1 - self.settings.nu) * value + self.settings.nu * self.theta[key])

    def state(self) -> dict[str, Tensor]:
        state = {f"weights/{key}": value.detach() for key, value in norm_tensors(self.teacher).items()}
        state |= {f"memory/student.{key}": value.detach() for key, value in norm_tensors(self.student).items()}
        for key, value in self.theta.items():
            own = self.optimiser.state[value]
            state[f"memory/adam.m.{key}"] = own.get("exp_avg", torch.zeros_like(value))
            state[f"memory/adam.v.{key}"] = own.get("exp_avg_sq", torch.zeros_like(value))
            state["memory/adam.step"] = torch.as_tensor(own.get("step", 0)).long()
        capacity = self.settings.capacity
        images, labels = torch.zeros(capacity, *self.shape, dtype=torch.uint8), torch.full((capacity,), -1)
        uncertainty, age = torch.zeros(capacity), torch.zeros(capacity, dtype=torch.int64)
        for item in self.items:
            images[item.slot], labels[item.slot] = item.image, item.label
            uncertainty[item.slot], age[item.slot] = item.uncertainty, item.age
        return state | {
            "memory/rotta.images": images,
            "memory/rotta.labels": labels,
            "memory/rotta.uncertainty": uncertainty,
            "memory/rotta.age": age,
            "memory/rotta.seen": torch.tensor(self.seen),
        }


def augmented(x: Tensor, random: Random) -> Tensor:
    """Each image of ``x [n, 3, H, W]`` by the same numbers, but for the noise."""
    drawn = random.uniform((16,))[0].tolist()
    noise = random.normal_rows(Segments([len(x)]), tuple(x.shape[1:]))
    views = [
        slow_augment(image.permute(1, 2, 0).numpy(), drawn, added.permute(1, 2, 0).numpy(), RECIPE, endless=True)
        for image, added in zip(x, noise, strict=True)
    ]
    return torch.stack([torch.from_numpy(view.copy()).permute(2, 0, 1) for view in views])


def robust(original: nn.Module, alpha: float) -> nn.Module:
    """A copy with robust batch norms."""
    network = copy.deepcopy(original).requires_grad_(False)
    for path, module in list(network.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            parent, _, name = path.rpartition(".")
            setattr(network.get_submodule(parent), name, RobustBatchNorm(module, alpha))
    return network


def norm_parameters(network: nn.Module) -> dict[str, Tensor]:
    return {
        f"{path}.{name}": parameter
        for path, module in network.named_modules()
        if isinstance(module, (RobustBatchNorm, *NORMS))
        for name, parameter in module.named_parameters()
    }


def norm_tensors(network: nn.Module) -> dict[str, Tensor]:
    """Scales, shifts and running statistics."""
    tensors = norm_parameters(network)
    for path, module in network.named_modules():
        if isinstance(module, RobustBatchNorm):
            tensors |= {f"{path}.running_mean": module.running_mean, f"{path}.running_var": module.running_var}
    return tensors


ORACLES = {"rotta": RottaOracle}
# A memory so small that it overflows, quotas above and below 1, several updates in a request, and steps that show.
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "rotta": {
        "small": {"capacity": 6, "update_every": 5, "nu": 0.3, "alpha": 0.3, "lr": 0.05},
        "tiny": {
            "capacity": 3, "update_every": 3, "nu": 0.8, "alpha": 0.1, "lambda_t": 0.5, "lambda_u": 2.0, "lr": 0.02
        },
    }
}  # fmt: skip
