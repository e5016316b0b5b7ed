"""The oracles of the policies with a mean teacher and an anchor, ``cotta`` and ``petal``."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from adapters.base import Segments
from adapters.rng import Random
from tests.adapters.oracles.base import Oracle
from tests.adapters.slow_augment import slow_augment

RECIPE = SimpleNamespace(
    brightness=(0.6, 1.4),
    contrast=(0.7, 1.3),
    saturation=(0.5, 1.5),
    hue=(-0.06, 0.06),
    gamma=(0.7, 1.3),
    rotation=(-15, 15),
    translation=1 / 16,
    scale=(0.9, 1.1),
    blur=(0.001, 0.5),
    noise=0.005,
    padding="edge",
    flip=0.5,
)


class CottaOracle(Oracle):
    """Three whole networks: student, teacher and anchor, all normalising by the batch; ``torch.optim`` on the first."""

    def __init__(self, original: nn.Module, settings: Any, artefacts: Mapping[str, Tensor]) -> None:
        super().__init__(original, settings, artefacts)
        self.student = self.network
        self.teacher = Other(original, settings, artefacts).network.requires_grad_(False)
        self.anchor = Other(original, settings, artefacts).network.requires_grad_(False)
        self.keys = [
            key
            for key, _ in self.student.named_parameters()
            if settings.scope == "all" or key.rpartition(".")[0] in self.norms
        ]
        self.theta = {key: self.student.get_parameter(key) for key in self.keys}
        values = list(self.theta.values())
        self.optimiser: torch.optim.Optimizer = (
            torch.optim.Adam(values, lr=settings.lr)
            if settings.optimiser == "adam"
            else torch.optim.SGD(values, lr=settings.lr, momentum=settings.momentum, nesterov=settings.nesterov)
        )
        self.gradients: dict[str, Tensor] = {}

    def step(self, x: Tensor, random: Random) -> Tensor:
        answer = self.taught(x, random)
        self.optimiser.zero_grad()
        loss = self.distance(answer, self.student(x)) + self.penalty()
        loss.backward()
        self.gradients = {key: torch.as_tensor(value.grad).clone() for key, value in self.theta.items()}
        self.optimiser.step()
        keep = self.settings.teacher_momentum
        with torch.no_grad():
            for key, value in self.theta.items():
                mean = self.teacher.get_parameter(key)
                mean.copy_(keep * mean + (1 - keep) * value)
            self.put_back(random)
        return answer

    def taught(self, x: Tensor, random: Random) -> Tensor:
        with torch.no_grad():
            sure = float(self.anchor(x).softmax(1).amax(1).mean())
            if not sure < self.settings.threshold:
                return torch.as_tensor(self.teacher(x))
            count = self.settings.augmentations
            views = [augmented(x, random.named(f"augment {k}")) for k in range(count)]
            return torch.stack([self.teacher(view) for view in views]).mean(0)

    def distance(self, teacher: Tensor, student: Tensor) -> Tensor:
        """CE(t -> z), or the mean of both directions."""
        p, q = teacher.softmax(1), student.softmax(1)
        loss = -(p * q.log()).sum(1).mean()
        if self.settings.loss == "symmetric":
            loss = (loss - (q * p.log()).sum(1).mean()) / 2
        return loss

    def penalty(self) -> Tensor:
        return torch.tensor(0.0, dtype=torch.float64)

    def put_back(self, random: Random) -> None:
        """Each element of the student with probability ``restore``."""
        if self.settings.restore:
            total = sum(value.numel() for value in self.theta.values())
            mask = random.named("restore").coins(self.settings.restore, (total,))[0].tolist()
            for key, value in self.theta.items():
                own = torch.tensor([mask.pop(0) for _ in range(value.numel())]).view_as(value)
                value[own] = self.anchor.get_parameter(key)[own]

    def state(self) -> dict[str, Tensor]:
        state = {}
        for key, value in self.theta.items():
            own = self.optimiser.state[value]
            zero = torch.zeros_like(value)
            state[f"weights/{key}"] = value.detach()
            state[f"memory/teacher.{key}"] = self.teacher.get_parameter(key).detach()
            if self.settings.optimiser == "adam":
                state[f"memory/adam.m.{key}"] = own.get("exp_avg", zero)
                state[f"memory/adam.v.{key}"] = own.get("exp_avg_sq", zero)
                state["memory/adam.step"] = torch.as_tensor(own.get("step", 0)).long()
            elif self.settings.momentum:
                state[f"memory/sgd.m.{key}"] = own.get("momentum_buffer", zero)
        return {key: value.detach() for key, value in state.items()}


def augmented(x: Tensor, random: Random) -> Tensor:
    """One view of each image: the transformation is the request's, the noise the pixel's."""
    drawn = random.uniform((16,))[0].tolist()
    noise = random.normal_rows(Segments([len(x)]), tuple(x.shape[1:]))
    views = [
        slow_augment(image.permute(1, 2, 0).numpy(), drawn, own.permute(1, 2, 0).numpy(), RECIPE, endless=True)
        for image, own in zip(x, noise, strict=True)
    ]
    return torch.stack([torch.from_numpy(view).permute(2, 0, 1) for view in views])


class Other(Oracle):
    """One more copy of the network, normalising by the batch."""

    def step(self, x: Tensor, random: Random) -> Tensor:
        raise NotImplementedError

    def state(self) -> dict[str, Tensor]:
        return {}


class PetalOracle(CottaOracle):
    """CoTTA with a Gaussian around the source and the least important elements put back."""

    def penalty(self) -> Tensor:
        """s/2 sum (theta - mean)^2 / (V + 1e-6) over what SWAG knows."""
        total = super().penalty()
        for key, value in self.theta.items():
            if f"swag/mean/{key}" in self.artefacts:
                variance = self.artefacts[f"swag/variance/{key}"].clamp(min=0) + 1e-6
                total = total + ((value - self.artefacts[f"swag/mean/{key}"]) ** 2 / variance).sum() / 2
        return float(self.settings.swag_weight) * total

    def put_back(self, random: Random) -> None:
        if self.settings.restoration == "sres":
            super().put_back(random)
            return
        fisher = {key: gradient**2 for key, gradient in self.gradients.items()}
        bound = torch.quantile(torch.cat([one.flatten() for one in fisher.values()]), self.settings.fisher_quantile)
        for key, value in self.theta.items():
            mask = fisher[key] < bound
            value[mask] = self.anchor.get_parameter(key)[mask]


ORACLES = {"cotta": CottaOracle, "petal": PetalOracle}
# Steps far above the defaults, and teachers that follow fast. As long as student and teacher are the same, only the
# symmetric loss has a gradient (the other's is rounding, which Adam would blow up), or one on augmentations. The source
# is sure of `image-gn` more often than not at 0.7, and of `image-bn` at 0.36.
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "cotta": {
        "plain": {"lr": 0.005, "loss": "symmetric", "threshold": 0.0, "teacher_momentum": 0.7, "restore": 0.1},
        "augment": {
            "optimiser": "sgd", "lr": 0.1, "nesterov": True, "threshold": 0.7, "augmentations": 2,
            "teacher_momentum": 0.7, "restore": 0.05,
        },
        "norm": {
            "scope": "norm", "lr": 0.02, "loss": "symmetric", "threshold": 0.36, "augmentations": 1,
            "teacher_momentum": 0.8, "restore": 0.1,
        },
    },
    "petal": {
        "fim": {"lr": 0.005, "loss": "symmetric", "threshold": 0.0, "teacher_momentum": 0.7, "fisher_quantile": 0.3},
        "sres": {
            "optimiser": "sgd", "lr": 0.1, "threshold": 0.7, "augmentations": 1, "teacher_momentum": 0.7,
            "restoration": "sres", "restore": 0.1,
        },
    },
}  # fmt: skip
