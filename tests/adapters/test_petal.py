"""What the paper promises of ``petal`` beyond ``cotta``: section 6.5 of the algorithm notes."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from adapters import teacher
from adapters.base import State, Tensors
from adapters.petal import Petal, quantile
from adapters.rng import Random
from tests.adapters.networks import SHAPES, Subject, assert_close, assert_same, flat, run, subject
from tests.adapters.oracles.teacher import PetalOracle
from tta_server.policies import make_policy

STEADY: dict[str, Any] = {"lr": 0.005, "loss": "symmetric", "threshold": 0.0, "teacher_momentum": 0.6}
PLAIN: dict[str, Any] = {"optimiser": "sgd", "lr": 1.0, "momentum": 0.0}
"""``theta - g``: the step shows the gradient."""
every_net = pytest.mark.parametrize("kind", SHAPES)


def petal(**settings: Any) -> Petal:
    policy = make_policy("petal", STEADY | settings)
    assert isinstance(policy, Petal)
    return policy


def with_swag(network: Subject, shift: float = 0.1) -> Subject:
    """The network with a SWAG solution: means beside its weights, variances down to 0 and, by rounding, below."""
    generator = torch.Generator().manual_seed(3)

    def normal(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=like.dtype)

    artefacts = dict(network.source.artefacts)
    for key in network.source.parameters:
        value = network.source.weights[key]
        artefacts[f"swag/mean/{key}"] = value + shift * normal(value)
        artefacts[f"swag/variance/{key}"] = (normal(value) + 0.5).clamp_min(-1e-9)
    source = dataclasses.replace(network.source, artefacts=artefacts)
    return dataclasses.replace(network, model=dataclasses.replace(network.model, source=source))


def step(policy: Any, network: Subject, state: State, seed: int = 0) -> tuple[State, dict[str, float]]:
    outcome = run(policy, network, [state], [network.rows(seed, 5)], steps=[seed])
    return outcome.states[0], outcome.signals[0]


def warm(network: Subject) -> State:
    state = network.init(petal())
    for seed in (90, 91):
        state = step(petal(), network, state, seed)[0]
    return State(state.weights, {key: value for key, value in state.memory.items() if key.startswith("teacher.")})


def joined(tensors: Tensors) -> Tensor:
    return torch.cat([value.flatten() for value in tensors.values()])


# --- restoration ---------------------------------------------------------------------------------------------------


@every_net
@pytest.mark.parametrize("share", [0.03, 0.25, 0.5, 1.0])
def test_the_least_important_are_restored(kind: str, share: float) -> None:
    """[6.5] Exactly those with a squared gradient below the quantile; all others are the stepped student's."""
    network = with_swag(subject(kind))
    state = warm(network)
    stepped = step(petal(**PLAIN, fisher_quantile=0.0, swag_weight=0.01), network, state)[0]
    restored = step(petal(**PLAIN, fisher_quantile=share, swag_weight=0.01), network, state)[0]
    assert_same(stepped.memory, restored.memory)
    before, after = joined(stepped.weights), joined(restored.weights)
    source = joined({key: network.source.weights[key] for key in stepped.weights})
    importance = (joined(state.weights) - before).square()
    put_back = importance < torch.quantile(importance, share)
    assert int(put_back.sum()) == math.ceil(share * (len(put_back) - 1))
    assert torch.equal(after[put_back], source[put_back])
    assert torch.equal(after[~put_back], before[~put_back])


def test_restoration_is_by_stream() -> None:
    """[6.1.10] The quantile is of the stream's own gradients: small ones of one stream do not count for another."""
    network = subject("conv-bn")
    flatter = {key: value if key != "9.weight" else 0.01 * value for key, value in warm(network).weights.items()}
    states = [warm(network), State(flatter, warm(network).memory)]
    xs = [network.rows(1, 4), network.rows(2, 3)]
    policy = petal(**PLAIN, fisher_quantile=0.3)
    together = run(policy, network, states, xs)
    for index, x in enumerate(xs):
        alone = run(policy, network, [states[index]], [x]).states[0]
        assert_same(flat(together.states[index]), flat(alone))
        same = joined(alone.weights) == joined({key: network.source.weights[key] for key in alone.weights})
        assert 0.25 < float(same.double().mean()) < 0.35


def test_nothing_is_restored_where_most_gradients_are_zero() -> None:
    """[2.10] None is less than the quantile where that is 0."""
    network = subject("conv-bn")
    policy = petal(**PLAIN, loss="paper", fisher_quantile=0.03)
    state = warm(network)
    # With the teacher's weights the student agrees with it, so that gradients are zero or rounding.
    agreed = State(teacher.weights(state.memory), state.memory)
    after = step(policy, network, agreed)[0]
    assert_close(after.memory, agreed.memory, rtol=0, atol=1e-12)
    zero = quantile(torch.cat([torch.zeros(5), torch.rand(95)]), 0.03)
    assert zero == 0
    assert not (torch.zeros(5) < zero).any()


def test_restoration_by_importance_draws_nothing() -> None:
    """[6.5] It is deterministic: the same under any key and step. The other one is not."""
    network = subject("conv-bn")
    for restoration, same in (("fim", True), ("sres", False)):
        policy = petal(restoration=restoration, restore=0.3, fisher_quantile=0.3)
        state, x = network.init(policy), network.rows(0, 4)
        first, second = (run(policy, network, [state], [x], [key], [3]).states[0] for key in (1, 2))
        assert torch.equal(joined(first.weights), joined(second.weights)) is same


@pytest.mark.parametrize("size", [1, 2, 5, 101, 1000])
@pytest.mark.parametrize("share", [0.0, 0.003, 0.03, 0.25, 0.5, 0.999, 1.0])
def test_quantile(size: int, share: float) -> None:
    """Equal to torch's, with and without ties."""
    generator = torch.Generator().manual_seed(size)
    drawn = torch.rand(size, generator=generator, dtype=torch.float64)
    for values in (drawn, (4 * drawn).round()):
        torch.testing.assert_close(quantile(values, share), torch.quantile(values, share), rtol=1e-13, atol=1e-15)


# --- the penalty ---------------------------------------------------------------------------------------------------


@every_net
def test_without_penalty_and_at_random_it_is_cotta(kind: str) -> None:
    """[6.5] ``s = 0`` and ``sres``: bit for bit."""
    network = with_swag(subject(kind))
    policies = (
        petal(restoration="sres", swag_weight=0.0, restore=0.2),
        make_policy("cotta", STEADY | {"restore": 0.2}),
    )
    states = [network.init(policy) for policy in policies]
    for seed in range(4):
        outcomes = [
            run(policy, network, [state], [network.rows(seed, 4)], steps=[seed])
            for policy, state in zip(policies, states, strict=True)
        ]
        assert_same({"logits": outcomes[0].logits[0]}, {"logits": outcomes[1].logits[0]})
        assert outcomes[0].signals == outcomes[1].signals
        states = [outcome.states[0] for outcome in outcomes]
        assert_same(flat(states[0]), flat(states[1]))


@every_net
def test_penalty_is_that_of_swag(kind: str) -> None:
    """[6.5] Nothing at the mean, neither value nor gradient; quadratic in the distance from it; and nothing at all
    without the artefact."""
    weight = 0.01
    network = subject(kind)
    free = with_swag(network, shift=0.0)
    state = network.init(petal(**PLAIN, fisher_quantile=0.0))
    plain, told = step(petal(**PLAIN, fisher_quantile=0.0, swag_weight=weight), network, state)
    at_mean, told_at_mean = step(petal(**PLAIN, fisher_quantile=0.0, swag_weight=weight), free, state)
    assert_same(flat(plain), flat(at_mean))
    assert told == told_at_mean

    penalties = []
    for distance in (0.01, 0.02):
        moved = State({key: value + distance for key, value in state.weights.items()}, state.memory)
        (with_it, one), (without, other) = (
            step(petal(**PLAIN, fisher_quantile=0.0, swag_weight=s), free, moved) for s in (weight, 0.0)
        )
        penalties.append(one["loss"] - other["loss"])
        total = 0.0
        for key, value in moved.weights.items():
            variance = free.source.artefacts[f"swag/variance/{key}"].clamp_min(0) + 1e-6
            pull = weight * (value - free.source.weights[key]) / variance
            torch.testing.assert_close(without.weights[key] - with_it.weights[key], pull, rtol=1e-7, atol=1e-9)
            total += float((distance * pull).sum()) / 2
        assert penalties[-1] == pytest.approx(total, rel=1e-9)
    assert penalties[1] == pytest.approx(4 * penalties[0], rel=1e-7)


@every_net
@pytest.mark.parametrize("restoration", ["fim", "sres"])
def test_with_a_swag_solution_it_equals_its_oracle(kind: str, restoration: str) -> None:
    """Law 8 with the artefact: the penalty is part of the gradients that the optimiser and the quantile see."""
    network = with_swag(subject(kind))
    policy = petal(restoration=restoration, restore=0.1, fisher_quantile=0.3, swag_weight=1e-4)
    oracle = PetalOracle(network.plain, policy, network.source.artefacts)
    state = network.init(policy)
    for seed in range(6):
        x = network.rows(seed, 4)
        expected = oracle.step(x, Random(torch.tensor([7]), torch.tensor([seed]), torch.float64))
        outcome = run(policy, network, [state], [x], [7], [seed])
        torch.testing.assert_close(outcome.logits[0], expected, rtol=1e-8, atol=1e-8)
        state = outcome.states[0]
        assert_close({k: v[0] for k, v in flat(state).items()}, oracle.state(), rtol=1e-7, atol=1e-8)
