"""The oracle of ``rmt``: two whole networks and a projector, all of ``torch.nn``, with ``torch.optim`` and loops."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn

from adapters.augment import augment
from adapters.base import Segments, Source
from adapters.contrast import new_projector  # for its first values alone, which are drawn
from adapters.rng import Random
from tests.adapters.oracles.base import Oracle

PROJECTOR = "contrast.projector."


class RmtOracle(Oracle):
    """Student, teacher and projector of one stream, all three normalising by what they are given."""

    def __init__(self, original: nn.Module, settings: Any, artefacts: Mapping[str, Tensor]) -> None:
        super().__init__(original, settings, artefacts)
        self.student = cast("nn.Sequential", self.network)
        self.teacher = Other(original, settings, artefacts).network.requires_grad_(False)
        self.keys = [
            key
            for key, _ in self.student.named_parameters()
            if settings.scope == "all" or key.rpartition(".")[0] in self.norms
        ]
        for key, value in self.student.named_parameters():
            value.requires_grad_(key in self.keys)
        self.features: list[Tensor] = []
        head = cast("nn.Linear", self.student[-1])
        head.register_forward_pre_hook(lambda _, inputs: self.features.append(inputs[0]))
        width = settings.projection
        self.projector = nn.Sequential(nn.Linear(head.in_features, width), nn.ReLU(), nn.Linear(width, width)).double()
        fresh = SimpleNamespace(feature_dim=head.in_features, dtype=torch.float64, device=torch.device("cpu"))
        with torch.no_grad():
            for key, drawn in new_projector(cast("Source", fresh), width).items():
                self.projector.get_parameter(key.removeprefix(PROJECTOR)).copy_(drawn[0])
        self.learners: dict[str, Tensor] = {key: self.student.get_parameter(key) for key in self.keys}
        if settings.lambda_contrast:
            self.learners |= {f"{PROJECTOR}{key}": value for key, value in self.projector.named_parameters()}
        values = list(self.learners.values())
        self.optimiser: torch.optim.Optimizer = (
            torch.optim.Adam(values, lr=settings.lr)
            if settings.optimiser == "adam"
            else torch.optim.SGD(values, lr=settings.lr, momentum=settings.momentum, nesterov=settings.nesterov)
        )
        if settings.warm_up:
            self.take_up("warmup" if settings.scope == "all" else "warmup_norm")

    def take_up(self, group: str) -> None:
        """Starts where the warm-up ended: weights, teacher and the optimiser's memory of the student's weights."""
        stored = {key.removeprefix(f"{group}/"): value[0].clone() for key, value in self.artefacts.items()}
        for key in self.keys:
            value = self.student.get_parameter(key)
            with torch.no_grad():
                value.copy_(stored[f"weights.{key}"])
                self.teacher.get_parameter(key).copy_(stored[f"memory.teacher.{key}"])
            assert self.settings.optimiser == "adam", "the warm-ups of these tests were made by Adam"
            self.optimiser.state[value] = {
                "step": stored["memory.adam.step"].float(),
                "exp_avg": stored[f"memory.adam.m.{key}"],
                "exp_avg_sq": stored[f"memory.adam.v.{key}"],
            }

    def seen(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The student's features and logits."""
        logits: Tensor = self.student(x)
        return self.features.pop(), logits

    def step(self, x: Tensor, random: Random) -> Tensor:
        settings = self.settings
        f, z = self.seen(x)
        t: Tensor = self.teacher(x)
        losses: list[Tensor] = []
        if settings.lambda_target or settings.lambda_contrast:
            view = augment(
                x,
                Segments([len(x)]),
                cast("Source", SimpleNamespace(input_range=(0.0, 1.0))),
                random.named("augment"),
            )
            f_a, z_a = self.seen(view)
            if settings.lambda_target:
                each = [(sce(z[i], t[i]) + sce(z_a[i], t[i])) / 2 for i in range(len(x))]
                losses.append(settings.lambda_target * torch.stack(each).mean())
            if settings.lambda_contrast:
                losses.append(settings.lambda_contrast * self.contrast(self.nearest(f.detach()), f, f_a))
        if settings.lambda_source:
            losses.append(settings.lambda_source * self.replay(len(x), random))
        if losses:
            self.optimiser.zero_grad(set_to_none=True)
            sum(losses[1:], losses[0]).backward()
            self.optimiser.step()
            keep = settings.teacher_momentum
            with torch.no_grad():
                for key in self.keys:
                    mean = self.teacher.get_parameter(key)
                    mean.copy_(keep * mean + (1 - keep) * self.student.get_parameter(key))
        return (z + t).detach()

    def nearest(self, features: Tensor) -> Tensor:
        """Of each row, the prototype at the smallest angle, among classes that were seen."""
        means, counts = self.artefacts["prototypes/mean"], self.artefacts["prototypes/counts"]
        chosen = []
        for row in features:
            cosines = {
                c: float(means[c] @ row / means[c].norm() / row.norm()) for c in range(len(means)) if counts[c] > 0
            }
            chosen.append(means[max(cosines, key=lambda c: cosines[c])])
        return torch.stack(chosen)

    def contrast(self, *views: Tensor) -> Tensor:
        """Every vector's mean -log share of the two others of its row, among all the 3B - 1 others."""
        rows = len(views[0])
        v = [row / row.norm() for view in views for row in self.projector(view)]
        scores = [[torch.exp(a @ b / self.settings.temperature) for b in v] for a in v]
        terms = []
        for anchor in range(3 * rows):
            others = [one for one in range(3 * rows) if one != anchor]
            total = torch.stack([scores[anchor][one] for one in others]).sum()
            positives = [one for one in others if one % rows == anchor % rows]
            assert len(positives) == 2
            terms.append(-torch.stack([torch.log(scores[anchor][one] / total) for one in positives]).mean())
        return torch.stack(terms).mean()

    def replay(self, rows: int, random: Random) -> Tensor:
        """Cross entropy of as many source images as came, over again where there are fewer, against their labels."""
        images, labels = self.artefacts["replay/images"], self.artefacts["replay/labels"]
        shuffled = random.named("replay").uniform((len(labels),))[0].argsort()
        order = torch.stack([shuffled[i % len(labels)] for i in range(rows)])
        _, logits = self.seen((images[order].float() / 255).double())
        return torch.stack([-logits[i].log_softmax(0)[labels[c]] for i, c in enumerate(order)]).mean()

    def state(self) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {}
        for key, value in self.learners.items():
            own = self.optimiser.state.get(value, {})
            zero = torch.zeros_like(value)
            if key in self.keys:
                state[f"weights/{key}"] = value
                state[f"memory/teacher.{key}"] = self.teacher.get_parameter(key)
            else:
                state[f"memory/{key}"] = value
            if self.settings.optimiser == "adam":
                state[f"memory/adam.m.{key}"] = own.get("exp_avg", zero)
                state[f"memory/adam.v.{key}"] = own.get("exp_avg_sq", zero)
                counter = "adam.step" if key in self.keys else "adam.step.projector"
                state[f"memory/{counter}"] = torch.as_tensor(own.get("step", 0)).long()
            elif self.settings.momentum:
                state[f"memory/sgd.m.{key}"] = own.get("momentum_buffer", zero)
        return {key: value.detach() for key, value in state.items()}


class Other(Oracle):
    """One more copy of the network, normalising by the batch."""

    def step(self, x: Tensor, random: Random) -> Tensor:
        raise NotImplementedError

    def state(self) -> dict[str, Tensor]:
        return {}


def sce(a: Tensor, b: Tensor) -> Tensor:
    """``(CE(b -> a) + CE(a -> b)) / 2`` of two rows of logits."""
    p, q = a.softmax(0), b.softmax(0)
    return -((q * p.log()).sum() + (p * q.log()).sum()) / 2


ORACLES = {"rmt": RmtOracle}
# Steps far above the defaults, a teacher that follows fast, and weights that tell the losses apart.
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "rmt": {
        "all": {
            "lr": 0.01, "teacher_momentum": 0.7, "temperature": 0.3, "projection": 5,
            "lambda_target": 0.8, "lambda_contrast": 0.6, "lambda_source": 1.3,
        },
        "norm": {
            "scope": "norm", "optimiser": "sgd", "lr": 0.1, "nesterov": True, "teacher_momentum": 0.8,
            "temperature": 0.5, "projection": 4, "lambda_source": 0.0, "warm_up": False,
        },
        "replay": {
            "scope": "norm", "lr": 0.02, "teacher_momentum": 0.7, "projection": 3, "lambda_target": 0.5,
            "lambda_contrast": 0.0,
        },
    },
}  # fmt: skip
