"""The functional optimisers against ``torch.optim``, one instance per stream."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from adapters import optim
from adapters.base import Tensors
from adapters.optim import Adam, Optimiser, Sgd
from tests.adapters.networks import assert_close, assert_same

SHAPES = {"norm.weight": (5,), "norm.bias": (5,), "head.weight": (3, 4), "scale": ()}
STREAMS, STEPS = 3, 24

OPTIMISERS: dict[str, tuple[Optimiser, type[torch.optim.Optimizer], dict[str, object]]] = {
    "sgd": (Sgd(0.1), torch.optim.SGD, {"lr": 0.1}),
    "sgd-decay": (Sgd(0.1, weight_decay=0.05), torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.05}),
    "momentum": (Sgd(0.1, 0.9), torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "momentum-decay": (
        Sgd(0.1, 0.7, weight_decay=0.05),
        torch.optim.SGD,
        {"lr": 0.1, "momentum": 0.7, "weight_decay": 0.05},
    ),
    "nesterov": (Sgd(0.1, 0.9, nesterov=True), torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "nesterov-decay": (
        Sgd(0.1, 0.9, nesterov=True, weight_decay=0.05),
        torch.optim.SGD,
        {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.05},
    ),
    "adam": (Adam(0.05), torch.optim.Adam, {"lr": 0.05}),
    "adam-options": (
        Adam(0.02, betas=(0.5, 0.9), eps=1e-3, weight_decay=0.1),
        torch.optim.Adam,
        {"lr": 0.02, "betas": (0.5, 0.9), "eps": 1e-3, "weight_decay": 0.1},
    ),
    "adamw": (
        Adam(0.05, weight_decay=0.1, decoupled=True),
        torch.optim.AdamW,
        {"lr": 0.05, "weight_decay": 0.1},
    ),
    "adamw-no-decay": (Adam(0.05, decoupled=True), torch.optim.AdamW, {"lr": 0.05, "weight_decay": 0.0}),
}

every_optimiser = pytest.mark.parametrize("name", OPTIMISERS)


class Reference:
    """One stream under ``torch.optim``."""

    def __init__(self, name: str, weights: Tensors) -> None:
        _, kind, settings = OPTIMISERS[name]
        self.weights = {key: value.clone().requires_grad_() for key, value in weights.items()}
        self.optimiser = kind(list(self.weights.values()), **settings)  # type: ignore[arg-type]  # of any of them
        self.steps = 0

    def step(self, gradients: Tensors) -> None:
        for key, value in self.weights.items():
            value.grad = gradients[key].clone()
        self.optimiser.step()
        self.steps += 1

    def memory(self) -> Tensors:
        """Its moments under our keys."""
        found: Tensors = {}
        for key, value in self.weights.items():
            own = self.optimiser.state[value]
            if "exp_avg" in own:
                found |= {f"adam.m.{key}": own["exp_avg"], f"adam.v.{key}": own["exp_avg_sq"]}
                found["adam.step"] = own["step"].long()
            elif own.get("momentum_buffer") is not None:
                found[f"sgd.m.{key}"] = own["momentum_buffer"]
        return found


def draw(generator: torch.Generator, scale: float = 1.0) -> Tensors:
    """Random tensors, one row per stream."""
    return {
        key: scale * torch.randn(STREAMS, *shape, generator=generator, dtype=torch.float64)
        for key, shape in SHAPES.items()
    }


def row(tensors: Tensors, stream: int) -> Tensors:
    return {key: value[stream] for key, value in tensors.items()}


def gradients_of(weights: Tensors, generator: torch.Generator, step: int) -> Tensors:
    """Depend on the weights, differ in size between streams and steps, and are exactly 0 here and there."""
    noise = draw(generator, 10.0 ** (step % 5 - 3))
    made = {key: 0.3 * value + noise[key] for key, value in weights.items()}
    made["scale"] = made["scale"] * (step % 3 > 0)
    made["norm.bias"] = made["norm.bias"] * torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    return made


@every_optimiser
def test_equals_torch_per_stream(name: str) -> None:
    """Over 24 steps, weights and moments of stacked streams are those of one torch optimiser each."""
    optimiser, _, _ = OPTIMISERS[name]
    generator = torch.Generator().manual_seed(0)
    weights = draw(generator)
    memory = optimiser.init(weights)
    references = [Reference(name, row(weights, stream)) for stream in range(STREAMS)]
    for step in range(STEPS):
        gradients = gradients_of(weights, generator, step)
        weights, memory = optimiser.update(weights, gradients, memory)
        for stream, reference in enumerate(references):
            reference.step(row(gradients, stream))
            assert_close(row(weights, stream), {k: v.detach() for k, v in reference.weights.items()}, atol=1e-12)
    for stream, reference in enumerate(references):
        assert_close(row(memory, stream), reference.memory(), atol=1e-12)


@every_optimiser
def test_streams_step_by_themselves(name: str) -> None:
    """With ``active``, streams take different numbers of steps, each with its own bias correction; who sits out keeps
    weights, moments and counter bit for bit."""
    optimiser, _, _ = OPTIMISERS[name]
    generator = torch.Generator().manual_seed(1)
    weights = draw(generator)
    memory = optimiser.init(weights)
    references = [Reference(name, row(weights, stream)) for stream in range(STREAMS)]
    for step in range(STEPS):
        gradients = gradients_of(weights, generator, step)
        active = torch.tensor([True, step % 2 == 0, step >= STEPS - 5])
        old_weights, old_memory = weights, memory
        weights, memory = optimiser.update(weights, gradients, memory, active)
        for stream, reference in enumerate(references):
            if active[stream]:
                reference.step(row(gradients, stream))
            else:
                assert_same(row(weights, stream), row(old_weights, stream))
                assert_same(row(memory, stream), row(old_memory, stream))
            assert_close(row(weights, stream), {k: v.detach() for k, v in reference.weights.items()}, atol=1e-12)
    assert [reference.steps for reference in references] == [STEPS, STEPS // 2, 5]
    for stream, reference in enumerate(references):
        assert_close(row(memory, stream), reference.memory(), atol=1e-12)


@every_optimiser
def test_broken_gradients_of_who_sits_out_do_not_matter(name: str) -> None:
    """A stream that is not active may have NaN gradients (an empty selection): nothing of them arrives anywhere."""
    optimiser, _, _ = OPTIMISERS[name]
    generator = torch.Generator().manual_seed(2)
    weights = draw(generator)
    weights, memory = optimiser.update(weights, draw(generator), optimiser.init(weights))
    gradients = draw(generator)
    broken = {key: value.clone() for key, value in gradients.items()}
    for value in broken.values():
        value[1] = torch.nan
    active = torch.tensor([True, False, True])
    sound, poisoned = (optimiser.update(weights, one, memory, active) for one in (gradients, broken))
    assert_same(sound[0], poisoned[0])
    assert_same(sound[1], poisoned[1])


@every_optimiser
def test_changes_nothing_in_place(name: str) -> None:
    """Weights, gradients and memory given to ``update`` stay as they are; all active equals no mask."""
    optimiser, _, _ = OPTIMISERS[name]
    generator = torch.Generator().manual_seed(3)
    weights, gradients = draw(generator), draw(generator)
    memory = optimiser.init(weights)
    weights, memory = optimiser.update(weights, gradients, memory)
    given: list[Tensors] = [weights, gradients, memory]
    copies = [{key: value.clone() for key, value in one.items()} for one in given]
    plain = optimiser.update(weights, gradients, memory)
    masked = optimiser.update(weights, gradients, memory, torch.ones(STREAMS, dtype=torch.bool))
    for one, copy in zip(given, copies, strict=True):
        assert_same(one, copy)
    assert_same(plain[0], masked[0])
    assert_same(plain[1], masked[1])
    assert memory.keys() == plain[1].keys()
    assert all(not value.requires_grad for value in (*plain[0].values(), *plain[1].values()))


@every_optimiser
def test_small_tensors_side_by_side_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Worked on as one tensor or each by itself, with some streams sitting out or none: the same, bit for bit."""
    optimiser, _, _ = OPTIMISERS[name]
    generator = torch.Generator().manual_seed(4)
    weights = draw(generator)
    memory = optimiser.init(weights)
    for active in (None, torch.tensor([True, False, True])):
        gradients = draw(generator)
        monkeypatch.setattr(optim, "_SMALL", 0)
        apart = optimiser.update(weights, gradients, memory, active)
        monkeypatch.undo()
        weights, memory = optimiser.update(weights, gradients, memory, active)
        assert_same(weights, apart[0])
        assert_same(memory, apart[1])


def test_types_are_kept() -> None:
    """A network may hold its norm layers in another precision than the rest."""
    weights = {"norm": torch.ones(2, 3), "head": torch.ones(2, 4, dtype=torch.float16)}
    optimiser = Adam(0.1)
    moved, memory = optimiser.update(weights, weights, optimiser.init(weights))
    assert [value.dtype for value in moved.values()] == [torch.float32, torch.float16]
    assert memory["adam.m.norm"].dtype == torch.float32
    assert memory["adam.v.head"].dtype == torch.float16


def test_no_momentum_needs_no_memory() -> None:
    """A stream under plain gradient descent keeps its weights alone."""
    assert Sgd(0.1).init(draw(torch.Generator())) == {}


def test_memory_starts_at_zero_with_one_counter_per_stream() -> None:
    """The counter is an integer, ``[S]``: it must not lose count in float32."""
    weights = draw(torch.Generator().manual_seed(0))
    for optimiser in (Sgd(0.1, 0.9), Adam(0.1)):
        assert not any(value.any() for value in optimiser.init(weights).values())
    counter = Adam(0.1).init(weights)["adam.step"]
    assert counter.shape == (STREAMS,)
    assert counter.dtype == torch.int64


def test_adam_in_float32_keeps_its_bias_correction() -> None:
    """``1 - b2^t`` at t = 1 has few digits left in float32; the first step must still be ``lr`` in size."""
    weights: dict[str, Tensor] = {"w": torch.zeros(2, 3)}
    gradients: dict[str, Tensor] = {"w": torch.tensor([[1.0, -2.0, 0.5]]).repeat(2, 1)}
    optimiser = Adam(1e-3)
    moved, memory = optimiser.update(weights, gradients, optimiser.init(weights))
    assert moved["w"].dtype == torch.float32
    torch.testing.assert_close(moved["w"], -1e-3 * gradients["w"].sign(), rtol=2e-6, atol=0)
    assert memory["adam.step"].tolist() == [1, 1]


def test_nesterov_without_momentum_is_refused() -> None:
    """As torch does: the setting would do nothing."""
    with pytest.raises(ValueError, match="momentum"):
        Sgd(0.1, nesterov=True)
