"""What the papers promise of ``sar`` and of the skip list it shares with ``deyo``, checked without reference code.

Numbers in brackets are sections of the project's algorithm notes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adapters.base import Norm, Output, Policy, Segments, State
from tests.adapters.networks import (
    CLASSES,
    SHAPES,
    Subject,
    assert_close,
    assert_same,
    build,
    drive,
    flat,
    join,
    make_batch,
    run,
    serve,
    subject,
)
from tta_server.policies import make_policy

every_net = pytest.mark.parametrize("kind", SHAPES)
# All rows are reliable, nothing is skipped, nothing collapses.
ALL: dict[str, Any] = {"entropy_margin": 1.1, "reset_below": 0.0, "lr": 0.1}


def sar(**settings: Any) -> Policy:
    return make_policy("sar", ALL | settings)


def one(
    policy: Policy, network: Subject, x: Tensor, state: State | None = None
) -> tuple[Tensor, State, dict[str, float]]:
    outcome = run(policy, network, [state or network.init(policy)], [x])
    return outcome.logits[0], outcome.states[0], outcome.signals[0]


def certain(kind: str) -> Subject:
    """The network with scores so large that predictions are one-hot."""
    network = build(kind)
    assert isinstance(network, nn.Sequential)
    head = network[-1]
    assert isinstance(head, nn.Linear)
    with torch.no_grad():
        head.weight.mul_(1e5)
    return serve(kind, network)


def watched(
    policy: Policy, network: Subject, states: list[State], xs: list[Tensor]
) -> tuple[list[tuple[dict[str, Tensor], Tensor, Segments, Output]], Tensor, State]:
    """A step with everything its forward passes got and gave, what it answered and the state it left."""
    calls = []
    batch = make_batch(policy, network, xs)

    def spy(weights: Mapping[str, Tensor], x: Tensor, segments: Segments, norm: Norm) -> Output:
        output = network.network(weights, x, segments, norm)
        calls.append(({key: value.detach() for key, value in weights.items()}, x, segments, output))
        return output

    logits, step = drive(policy, network, join(states), dataclasses.replace(batch, network=spy))
    return calls, logits, step.state


def entropies(logits: Tensor) -> Tensor:
    return torch.as_tensor(torch.special.entr(logits.detach().softmax(1)).sum(1))


@every_net
def test_without_a_climb_it_is_tent(kind: str) -> None:
    """[6.8] ``rho = 0``: the second gradient is the first, over several steps with momentum."""
    network, climber, tent = subject(kind), sar(rho=0.0), make_policy("tent", {"optimiser": "sgd", "lr": 0.1})
    states = [network.init(climber), network.init(tent)]
    for step in range(4):
        x = network.rows(step, 5)
        for index, policy in enumerate((climber, tent)):
            states[index] = one(policy, network, x, states[index])[1]
        assert_close(states[0].weights, states[1].weights)
    assert (states[0].weights["1.weight"] != network.source.weights["1.weight"]).all()


def test_without_a_climb_it_is_tent_on_the_reliable_rows() -> None:
    """[6.8] ``rho = 0``, where no row depends on another: TENT on the rows below the margin alone."""
    network, x = subject("conv-gn"), subject("conv-gn").rows(0, 8)
    entropy = entropies(one(sar(), network, x)[0])
    limit = float(entropy.median()) + 1e-9
    _, state, signals = one(sar(rho=0.0, entropy_margin=limit / math.log(CLASSES)), network, x)
    reliable = entropy < limit
    assert reliable.sum() == 4
    _, expected, _ = one(make_policy("tent", {"optimiser": "sgd", "lr": 0.1}), network, x[reliable])
    assert_close(state.weights, expected.weights)
    assert signals["selected"] == 0.5


@every_net
@pytest.mark.parametrize("rho", [0.05, 2.0])
def test_climbs_by_rho_and_steps_from_the_start(kind: str, rho: float) -> None:
    """[6.8] ``|theta^ - theta| = rho`` for each stream, uphill; and the step is taken from ``theta``, of the slope at
    ``theta^``."""
    network, policy = subject(kind), sar(rho=rho, momentum=0.0)
    states = [one(policy, network, network.rows(seed, 4))[1] for seed in (10, 11)]
    calls, logits, after = watched(policy, network, states, [network.rows(0, 5), 3 * network.rows(1, 2)])
    (start, _, _, first), (climbed, x, segments, second) = calls
    assert_same({"answer": logits}, {"answer": first.logits.detach()})
    assert_same(start, join(states).weights)
    distance = sum((climbed[key] - start[key]).square().flatten(1).sum(1) for key in start)
    torch.testing.assert_close(torch.as_tensor(distance).sqrt(), torch.full((2,), rho, dtype=torch.float64))
    if rho == 0.05:
        higher = segments.mean(entropies(second.logits)) - segments.mean(entropies(first.logits))
        assert (higher > 0).all()
    tent = make_policy("tent", {"optimiser": "sgd", "lr": 0.1, "momentum": 0.0})
    for index, rows in enumerate(x.split(segments.sizes)):
        there = {key: value[index : index + 1] for key, value in climbed.items()}
        step = run(tent, network, [State(there, {})], [rows]).states[0]
        expected = {key: start[key][index] + step.weights[key][0] - there[key][0] for key in start}
        assert_close({key: value[index] for key, value in after.weights.items()}, expected)


@every_net
def test_no_reliable_row_changes_nothing(kind: str) -> None:
    """[6.8, 1.4] Neither weights nor moments nor the average of losses; and there is no second forward pass."""
    network = subject(kind)
    _, state, _ = one(sar(), network, network.rows(0, 4))
    calls, _, after = watched(sar(entropy_margin=0.0), network, [state], [network.rows(1, 4)])
    assert len(calls) == 1
    assert_same(flat(after), flat(state))


def test_streams_without_a_reliable_row_are_not_looked_at_twice() -> None:
    """[1.4] They stay as they are, moments included, while another stream steps."""
    network, x = subject("conv-gn"), subject("conv-gn").rows(0, 8)
    logits, state, _ = one(sar(), network, x)
    entropy, order = entropies(logits).sort()
    policy = sar(entropy_margin=float(entropy[4]) / math.log(CLASSES))
    moved = State(network.init(policy).weights, state.memory)
    calls, _, after = watched(policy, network, [moved, moved], [x[order[-1:]], x[order[:2]]])
    assert calls[1][2].sizes == [0, 2]
    assert_same({k: v[:1] for k, v in flat(after).items()}, flat(moved))
    assert (after.weights["1.weight"][1] != moved.weights["1.weight"][0]).all()


@every_net
def test_collapse_resets_everything_once(kind: str) -> None:
    """[6.8, 2.8] An average below ``e_m`` means a new stream, momentum included; and as the average is forgotten, too,
    a request of higher loss that follows does not reset again."""
    network = subject(kind)
    losses = {}
    for seed in range(6):
        _, state, _ = one(sar(), network, network.rows(seed, 5))
        losses[seed] = float(state.memory["sar.loss"])
    low, high = min(losses, key=losses.__getitem__), max(losses, key=losses.__getitem__)
    limit = 0.8 * losses[low] + 0.2 * losses[high]  # one step of the average from low does not reach it
    policy = sar(reset_below=limit)
    _, state, signals = one(policy, network, network.rows(low, 5))
    assert signals["recovered"] == 1
    assert_same(flat(state), flat(network.init(policy)))
    _, state, signals = one(policy, network, network.rows(high, 5), state)
    assert signals["recovered"] == 0
    assert float(state.memory["sar.loss"]) == pytest.approx(losses[high])
    assert float(state.memory["sgd.m.1.weight"].abs().max()) > 0


@every_net
def test_reset_threshold_goes_with_the_number_of_classes(kind: str) -> None:
    """[2.8, 7.4] ``0.2 ln C / ln 1000``: just above it nothing happens, just below it the stream starts afresh."""
    network, policy = certain(kind), sar(reset_below=None)
    new, limit = network.init(policy), 0.2 * math.log(CLASSES) / math.log(1000)
    for factor, recovered in ((1.001, 0), (0.999, 1)):
        average = torch.full((1,), limit / 0.9 * factor, dtype=torch.float64)  # a loss of 0 takes a tenth of it away
        state = State(new.weights, new.memory | {"sar.loss": average})
        assert one(policy, network, network.rows(0, 4), state)[2]["recovered"] == recovered


@every_net
def test_predictions_without_entropy_are_a_collapse(kind: str) -> None:
    """[2.8] One-hot to the last bit: the average is 0, below any threshold but 0, which switches resets off."""
    network = certain(kind)
    for limit, recovered in ((None, 1), (1e-9, 1), (0.0, 0)):
        assert one(sar(reset_below=limit), network, network.rows(0, 4))[2]["recovered"] == recovered


def test_the_average_moves_by_a_tenth() -> None:
    """[2.8] ``e <- 0.9 e + 0.1 L``, from the loss at the sharp point."""
    network, policy, average = subject("conv-bn"), sar(), None
    state = network.init(policy)
    for step in range(4):
        calls, _, state = watched(policy, network, [state], [network.rows(step, 4)])
        loss = float(entropies(calls[1][3].logits).mean())
        average = loss if average is None else 0.9 * average + 0.1 * loss
        assert float(state.memory["sar.loss"]) == pytest.approx(average)


@pytest.mark.parametrize("name", ["sar", "deyo"])
def test_skips_the_layers_its_patterns_name(name: str) -> None:
    """[6.8] What is skipped has no state and so never moves; all else does."""
    network, policy = subject("conv-gn"), make_policy(name, {"skip": ["4", "1?"]})
    kept = {"1.weight", "1.bias", "8.weight", "8.bias"}
    assert network.init(policy).weights.keys() == kept
    with pytest.raises(ValueError, match=r"norm layer.*such as 1.*\?, \[0-9\]"):
        make_policy(name, {"skip": ["?", "[0-9]"]}).init(network.source)


@pytest.mark.parametrize("name", ["sar", "deyo"])
def test_skips_by_default_what_the_authors_skip(name: str) -> None:
    """[2.8] The last stage of a ResNet, the last blocks and the final norm of a ViT of 12 blocks."""
    kept = ("bn1", "layer3.5.bn2", "blocks.0.norm1", "blocks.8.norm2")
    top = ("layer4.0.bn1", "layer4.0.downsample.1", "blocks.9.norm1", "blocks.10.norm1", "blocks.11.norm2")
    affine = tuple(f"{layer}.weight" for layer in (*kept, *top, "norm", "norm.1", "fc_norm.0"))
    source = dataclasses.replace(subject("conv-bn").source, affine=affine)
    policy: Any = make_policy(name, {})
    assert policy.keys(source) == affine[: len(kept)]
