"""What the papers promise of each policy, checked without reference code: ``source``, ``norm`` and ``tent``.

Numbers in brackets are sections of the project's algorithm notes: [6.1] all policies, [6.2] norm, [6.3] tent.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from adapters.base import Policy, Scope, State
from tests.adapters.networks import (
    ADAPTABLE_VALUES,
    CASES,
    CLASSES,
    SHAPES,
    Case,
    Server,
    Subject,
    assert_close,
    assert_same,
    build,
    flat,
    run,
    serve,
    subject,
    with_weights,
)
from tta_server.engine.norm import StreamBatchNorm
from tta_server.engine.source import SourceModel
from tta_server.errors import BadInput
from tta_server.policies import make_policy
from tta_server.state.slots import Layout
from tta_server.types import Answer

BATCH_NETS = ("conv-bn", "mlp-bn")
every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_net = pytest.mark.parametrize("kind", SHAPES)
every_batch_net = pytest.mark.parametrize("kind", BATCH_NETS)


def one(policy: Policy, network: Subject, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
    """One step of a single stream, new unless it has a state: logits and new state."""
    outcome = run(policy, network, [state or network.init(policy)], [x])
    return outcome.logits[0], outcome.states[0]


def plain(network: Subject, x: Tensor) -> Tensor:
    """The scores of the original network in evaluation mode."""
    with torch.no_grad():
        return torch.as_tensor(network.plain(x))


def mean_entropy(logits: Tensor) -> float:
    return float(torch.special.entr(logits.softmax(1)).sum(1).mean())


def changed_head(kind: str, weight_factor: float) -> Subject:
    """The network with its classifier's weights scaled and its bias at 0."""
    network = build(kind)
    assert isinstance(network, nn.Sequential)
    head = network[-1]
    assert isinstance(head, nn.Linear)
    with torch.no_grad():
        head.weight.mul_(weight_factor)
        head.bias.zero_()
    return serve(kind, network)


# --- [6.1] every policy ------------------------------------------------------------------------------------------


DEGENERATE: dict[str, Callable[[Tensor], Tensor]] = {
    "one_row": lambda x: x[:1],
    "identical_rows": lambda x: x[:1].expand_as(x),
    "zeros": torch.zeros_like,
    "huge": lambda x: 1e6 * x,
    "tiny": lambda x: 1e-30 * x,
    "constant": lambda x: torch.full_like(x, 0.7),
}


@every_case
@pytest.mark.parametrize("inputs", DEGENERATE)
def test_degenerate_inputs_leave_no_nan(case: Case, inputs: str) -> None:
    """[6.1.6, 6.1.7] Finite scores of the right shape and a finite, committed state for the oddest finite requests."""
    server = Server(case.policy, case.subject)
    for step in range(3):
        x = DEGENERATE[inputs](case.subject.rows(step, 4))
        answer = server.step({"a": x})["a"]
        assert isinstance(answer, Answer)
        assert answer.logits.shape == (len(x), CLASSES)
        assert answer.logits.isfinite().all()
        assert server.stats["a"].result in ("applied", "none")
        for key, value in flat(server.state("a")).items():
            assert value.isfinite().all(), key


@every_case
def test_saturated_scores_leave_no_nan(case: Case) -> None:
    """[6.1.6] Scores so large that the softmax is one-hot to the last bit."""
    network = changed_head(case.subject.kind, 1e5)
    server = Server(case.policy, network)
    for step in range(3):
        x = case.subject.rows(step, 4)
        assert plain(network, x).abs().max() > 1e4
        assert server.logits({"a": x})["a"].isfinite().all()
        assert server.stats["a"].result in ("applied", "none")
        for key, value in flat(server.state("a")).items():
            assert value.isfinite().all(), key


@every_case
def test_rows_of_a_request_may_come_in_any_order(case: Case) -> None:
    """[6.1.8] Permuting the samples of a request permutes the answers and leaves the new state as it would be.

    Not where rows are kept in order, or where something is drawn for each row.
    """
    if case.policy.window or case.policy.name in ("rotta", "deyo", "cotta", "petal", "rmt"):
        pytest.skip("depends on the order by design")
    x, order = case.subject.rows(1, 6), torch.tensor([4, 2, 5, 0, 1, 3])
    state = case.warm(0, (6,))[0]
    straight, shuffled = one(case.policy, case.subject, x, state), one(case.policy, case.subject, x[order], state)
    torch.testing.assert_close(shuffled[0], straight[0][order], rtol=1e-9, atol=1e-10)
    assert_close(flat(shuffled[1]), flat(straight[1]), rtol=1e-7)


@every_case
def test_the_source_is_frozen(case: Case) -> None:
    """[6.1.5] After some steps the served model's own tensors are still those of the original, bit for bit."""
    case.warm(0, (4, 2), steps=4)
    original = dict(case.subject.plain.named_parameters()) | dict(case.subject.plain.named_buffers())
    served = case.subject.source.weights
    assert_same(served, {key: original[key] for key in served})


# --- source ------------------------------------------------------------------------------------------------------


@every_net
def test_source_serves_the_original_network(kind: str) -> None:
    """The plain network in evaluation mode, up to the rounding of another batch size; nothing is kept."""
    network, policy = subject(kind), make_policy("source", {})
    x = network.rows(0, 5)
    logits, state = one(policy, network, x)
    torch.testing.assert_close(logits, plain(network, x), rtol=1e-12, atol=1e-13)
    assert flat(state) == {}
    assert Layout(network.init(policy)).bytes == 0
    assert policy.scope is Scope.NONE


# --- [6.2] norm --------------------------------------------------------------------------------------------------


def norm_policy(mode: str, alpha: float = 0.1) -> Policy:
    return make_policy("norm", {"mode": mode, "alpha": alpha})


def first_norm_input(network: Subject, x: Tensor) -> Tensor:
    """What enters the first norm layer, per channel: ``[channels, values]``."""
    assert isinstance(network.plain, nn.Sequential)
    with torch.no_grad():
        return torch.as_tensor(network.plain[0](x)).transpose(0, 1).flatten(1)


def test_norm_refuses_a_network_without_batch_norm() -> None:
    """It would do nothing there, and says so."""
    with pytest.raises(ValueError, match="no batch-norm layer"):
        make_policy("norm", {}).init(subject("conv-gn").source)


@every_batch_net
@pytest.mark.parametrize("mode", ["batch", "blend"])
def test_norm_keeps_nothing_without_a_running_average(kind: str, mode: str) -> None:
    """[6.2] Zero bytes of state: outputs do not depend on what came before."""
    network, policy = subject(kind), norm_policy(mode)
    assert Layout(network.init(policy)).bytes == 0
    server = Server(policy, network)
    x = network.rows(0, 4)
    first = server.logits({"a": x})
    server.logits({"a": network.rows(1, 6)})
    assert_same(first, server.logits({"a": x}))
    assert server.stream("a").version == 0


@every_batch_net
def test_norm_running_keeps_two_numbers_per_channel(kind: str) -> None:
    """Means and variances of the batch-norm layers, and nothing else."""
    state = subject(kind).init(norm_policy("running"))
    assert state.memory == {}
    assert sum(value.numel() for value in state.weights.values()) == ADAPTABLE_VALUES[kind]
    assert all(key.endswith((".running_mean", ".running_var")) for key in state.weights)


@pytest.mark.parametrize("factor", [0.01, 3.0, 200.0])
def test_norm_batch_ignores_the_scale_of_each_channel(factor: float) -> None:
    """[6.2] Scaling and shifting what enters a batch norm, per channel, leaves its output; so does scaling all inputs
    of a bias-free convolution before it."""
    network = build("conv-bn")
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-14  # the invariance is exact but for eps
    served = Subject("conv-bn", network, subject_with_eps(network, 1e-14), SHAPES["conv-bn"])
    policy, x = norm_policy("batch"), served.rows(0, 4)
    expected, _ = one(policy, served, x)
    scaled, _ = one(policy, served, factor * x)
    torch.testing.assert_close(scaled, expected, rtol=1e-7, atol=1e-8)
    assert not torch.allclose(plain(served, factor * x), plain(served, x), rtol=1e-2)

    per_channel = copy.deepcopy(network)
    assert isinstance(per_channel, nn.Sequential)
    convolution = per_channel[0]
    assert isinstance(convolution, nn.Conv2d)
    with torch.no_grad():
        convolution.weight.mul_(factor * torch.tensor([1.0, 0.5, 2.0, 7.0]).view(4, 1, 1, 1))
    other = Subject("conv-bn", per_channel, subject_with_eps(per_channel, 1e-14), SHAPES["conv-bn"])
    torch.testing.assert_close(one(policy, other, x)[0], expected, rtol=1e-7, atol=1e-8)


@every_batch_net
def test_norm_blend_of_nothing_is_the_source(kind: str) -> None:
    """[6.2] ``alpha = 0`` is the source exactly, whoever shares the batch."""
    network = subject(kind)
    xs = [network.rows(0, 4), network.rows(1, 1), network.rows(2, 3)]
    outcome = run(norm_policy("blend", 0.0), network, [network.init(norm_policy("blend", 0.0))] * 3, xs)
    for x, logits in zip(xs, outcome.logits, strict=True):
        torch.testing.assert_close(logits, plain(network, x), rtol=1e-12, atol=1e-12)
    source = make_policy("source", {})
    assert_same({"alone": one(norm_policy("blend", 0.0), network, xs[0])[0]}, {"alone": one(source, network, xs[0])[0]})


@every_batch_net
def test_norm_blend_of_all_is_the_batch_with_the_unbiased_variance(kind: str) -> None:
    """[6.2] ``alpha = 1`` normalises with the batch's mean and ``n / (n - 1)`` times its biased variance.

    The project takes ``Norm(1.0)`` for the pure batch, biased as in ``torch``; just below 1 the factor appears.
    """
    network, x = subject(kind), subject(kind).rows(0, 3)
    pure, _ = one(norm_policy("batch"), network, x)
    assert_same({"one": one(norm_policy("blend", 1.0), network, x)[0]}, {"one": pure})
    almost, _ = one(norm_policy("blend", 1 - 1e-12), network, x)
    reference = copy.deepcopy(network.plain)
    for module in reference.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.register_forward_pre_hook(_take_unbiased)
    with torch.no_grad():
        expected = reference(x)
    torch.testing.assert_close(almost, expected, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(almost, pure, rtol=1e-3)


def _take_unbiased(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Fills a plain batch norm's buffers with the mean and unbiased variance of what is about to enter it."""
    assert isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d)
    assert layer.running_mean is not None
    assert layer.running_var is not None
    by_channel = inputs[0].transpose(0, 1).flatten(1)
    layer.running_mean.copy_(by_channel.mean(1))
    layer.running_var.copy_(by_channel.var(1, correction=1))


@every_batch_net
def test_norm_mixes_linearly(kind: str) -> None:
    """[6.2] Mean and variance go linearly from the source's to the batch's as alpha grows."""
    network, x = subject(kind), subject(kind).rows(0, 4)
    ends = [one(norm_policy("running", alpha), network, x)[1].weights for alpha in (0.0, 1.0)]
    batch = first_norm_input(network, x)
    torch.testing.assert_close(ends[1]["1.running_mean"][0], batch.mean(1))
    torch.testing.assert_close(ends[1]["1.running_var"][0], batch.var(1, correction=1))
    for alpha in (0.25, 0.5, 0.9):
        mixed = one(norm_policy("running", alpha), network, x)[1].weights
        for key in ("1.running_mean", "1.running_var"):  # deeper layers see inputs that depend on alpha
            torch.testing.assert_close(mixed[key], (1 - alpha) * ends[0][key] + alpha * ends[1][key])


@every_batch_net
def test_norm_running_without_weight_is_the_source(kind: str) -> None:
    """[6.2] ``rho = 0``: the source's answers, and statistics that never move, for merged streams of any size."""
    network, policy = subject(kind), norm_policy("running", 0.0)
    states = [network.init(policy)] * 3
    for step in range(3):
        xs = [network.rows(3 * step + index, rows) for index, rows in enumerate((4, 1, 2))]
        outcome = run(policy, network, states, xs)
        for x, logits in zip(xs, outcome.logits, strict=True):
            torch.testing.assert_close(logits, plain(network, x), rtol=1e-12, atol=1e-12)
        states = outcome.states
    for state in states:
        assert_same(flat(state), flat(network.init(policy)))


@every_batch_net
@pytest.mark.parametrize("rho", [0.1, 0.5])
def test_norm_running_converges_geometrically(kind: str, rho: float) -> None:
    """[6.2] Under the same batch again and again the distance of the first layer's statistics to the batch's shrinks by
    ``1 - rho`` a step."""
    network, policy, x = subject(kind), norm_policy("running", rho), subject(kind).rows(0, 5)
    batch = first_norm_input(network, x)
    goal = {"1.running_mean": batch.mean(1), "1.running_var": batch.var(1, correction=1)}
    start = {key: network.source.weights[key] - value for key, value in goal.items()}
    state = network.init(policy)
    for step in range(1, 9):
        _, state = one(policy, network, x, state)
        for key, value in goal.items():
            torch.testing.assert_close(
                state.weights[key][0] - value, (1 - rho) ** step * start[key], rtol=1e-9, atol=1e-12
            )


@every_batch_net
def test_norm_running_answers_with_the_current_batch_in_it(kind: str) -> None:
    """[1.2] Prediction order: the statistics that normalise a request already hold it."""
    network, policy = subject(kind), norm_policy("running", 0.3)
    state = network.init(policy)
    for step in range(3):
        x = network.rows(step, 4)
        logits, state = one(policy, network, x, state)
        torch.testing.assert_close(logits, plain_with(network, state, x), rtol=1e-9, atol=1e-10)


def test_norm_of_a_single_value_keeps_the_reference() -> None:
    """[1.3] One row leaves a 1d batch norm nothing to take statistics from: the source's own serve."""
    network, x = subject("mlp-bn"), subject("mlp-bn").rows(0, 1)
    for mode in ("batch", "blend", "running"):
        policy = norm_policy(mode, 0.4)
        logits, state = one(policy, network, x)
        torch.testing.assert_close(logits, plain(network, x), rtol=1e-12, atol=1e-12)
        assert_same(flat(state), flat(network.init(policy)))


def plain_with(network: Subject, state: State, x: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.as_tensor(with_weights(network.plain, state.weights)(x))


def subject_with_eps(network: nn.Module, eps: float) -> SourceModel:
    """The network served like any other, its batch norms with another ``eps``."""
    model = serve("conv-bn", network).model
    for module in model.network._network.modules():
        if isinstance(module, StreamBatchNorm):
            module.eps = eps
    return model


# --- [6.3] tent --------------------------------------------------------------------------------------------------


def sgd(lr: float, momentum: float = 0.0) -> Policy:
    return make_policy("tent", {"optimiser": "sgd", "lr": lr, "momentum": momentum})


def batch_stats(network: Subject, weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """The plain network with some weights put in, normalising with the batch's own statistics."""
    changed = with_weights(network.plain, weights)
    for module in changed.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.track_running_stats, module.running_mean, module.running_var = False, None, None
    with torch.no_grad():
        return torch.as_tensor(changed(x))


def test_tent_refuses_a_network_without_norm_layers() -> None:
    """There would be nothing to adapt."""
    source = subject("conv-gn").source
    without = dataclasses.replace(source, affine=(), statistics=())
    with pytest.raises(ValueError, match="norm layers"):
        make_policy("tent", {}).init(without)


@every_net
def test_tent_adapts_scales_and_shifts_alone(kind: str) -> None:
    """[6.3] ``2 x sum of channels`` values, all of them gammas and betas, all of them moving."""
    network, policy = subject(kind), make_policy("tent", {})
    state = network.init(policy)
    assert state.weights.keys() == set(network.source.affine)
    assert sum(value.numel() for value in state.weights.values()) == ADAPTABLE_VALUES[kind]
    assert all(key.endswith((".weight", ".bias")) for key in state.weights)
    _, after = one(policy, network, network.rows(0, 6), state)
    for key, value in after.weights.items():
        assert (value != state.weights[key]).any(), key


@every_net
@pytest.mark.parametrize("seed", range(4))
def test_tent_step_lowers_the_entropy(kind: str, seed: int) -> None:
    """[6.3] One small step of gradient descent: the same request, asked again, has a lower mean entropy."""
    network, x = subject(kind, seed), subject(kind, seed).rows(seed, 6)
    policy = sgd(1e-4)
    logits, state = one(policy, network, x)
    again, _ = one(policy, network, x, state)
    assert mean_entropy(again) < mean_entropy(logits)
    first_order = (mean_entropy(again) - mean_entropy(logits)) * 1e-4
    moved = {key: value - network.source.weights[key] for key, value in state.weights.items()}
    squared = sum(float(value.square().sum()) for value in moved.values())
    assert first_order == pytest.approx(-squared, rel=0.05)  # dH = -lr |grad|^2 = -|step|^2 / lr


@every_net
def test_tent_gradient_equals_finite_differences(kind: str) -> None:
    """[6.3] Without momentum the step is ``-lr dH/dtheta``, coordinate by coordinate, on the plain network."""
    network, x, lr, h = subject(kind), subject(kind).rows(3, 4), 0.5, 1e-5
    start = network.init(sgd(lr))
    _, state = one(sgd(lr), network, x, start)
    for key, value in start.weights.items():
        for index in (0, value.shape[1] - 1):
            slopes = []
            for sign in (1, -1):
                moved = value.clone()
                moved[0, index] += sign * h
                slopes.append(sign * mean_entropy(batch_stats(network, start.weights | {key: moved}, x)))
            expected = -lr * sum(slopes) / (2 * h)
            assert float(state.weights[key][0, index] - value[0, index]) == pytest.approx(expected, rel=1e-5, abs=1e-8)


@every_net
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_tent_leaves_uniform_predictions_alone(kind: str, momentum: float) -> None:
    """[6.3] All scores equal: the entropy is at its maximum and flat, so plain gradient descent does not move.

    (Adam is no test of this: it divides rounding noise by its own size.)
    """
    network, policy = changed_head(kind, 0.0), sgd(1.0, momentum)
    x = network.rows(0, 5)
    logits, state = one(policy, network, x)
    assert mean_entropy(logits) == pytest.approx(math.log(CLASSES))
    assert_close(flat(state), flat(network.init(policy)), rtol=0, atol=1e-14)


@every_net
def test_tent_leaves_certain_predictions_alone(kind: str) -> None:
    """[6.3] Scores of one-hot certainty have no gradient to speak of."""
    network = changed_head(kind, 1e5)
    logits, state = one(sgd(1.0), network, network.rows(0, 5))
    assert mean_entropy(logits) == 0
    assert_close(flat(state), flat(network.init(sgd(1.0))), rtol=0, atol=1e-12)


@every_net
@pytest.mark.parametrize("optimiser", ["adam", "sgd"])
def test_tent_answers_before_it_steps(kind: str, optimiser: str) -> None:
    """[6.1.9] The answer to request t is a forward pass with the weights kept after t - 1."""
    network = subject(kind)
    policy = make_policy("tent", {"optimiser": optimiser, "lr": 0.05})
    state = network.init(policy)
    for step in range(4):
        x = network.rows(step, 4)
        logits, after = one(policy, network, x, state)
        torch.testing.assert_close(logits, batch_stats(network, state.weights, x), rtol=1e-9, atol=1e-10)
        assert not torch.allclose(logits, batch_stats(network, after.weights, x), rtol=1e-6)
        state = after


@every_net
@pytest.mark.parametrize("optimiser", ["adam", "sgd"])
def test_tent_without_learning_rate_only_normalises(kind: str, optimiser: str) -> None:
    """[6.1.4] ``lr = 0``: weights unchanged for ever; the answers of ``norm`` in batch mode, or of the source where no
    layer has batch statistics."""
    network, policy = subject(kind), make_policy("tent", {"optimiser": optimiser, "lr": 0.0})
    state = network.init(policy)
    for step in range(3):
        x = network.rows(step, 4)
        logits, state = one(policy, network, x, state)
        reference = plain(network, x) if kind == "conv-gn" else one(norm_policy("batch"), network, x)[0]
        torch.testing.assert_close(logits, reference, rtol=1e-9, atol=1e-10)
    assert_same(state.weights, network.init(policy).weights)


@every_net
def test_tent_reports_the_loss_of_the_answer(kind: str) -> None:
    """The signal ``loss`` is each stream's mean entropy of the scores it was given."""
    network, policy = subject(kind), make_policy("tent", {})
    outcome = run(policy, network, [network.init(policy)] * 2, [network.rows(0, 5), network.rows(1, 2)])
    for logits, signals in zip(outcome.logits, outcome.signals, strict=True):
        assert signals["loss"] == pytest.approx(mean_entropy(logits))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("tent", {"lr": -1e-3}),
        ("tent", {"momentum": 1.0}),
        ("tent", {"momentum": -0.1}),
        ("norm", {"alpha": 1.5}),
        ("norm", {"alpha": -0.1}),
    ],
)
def test_settings_outside_their_range_are_refused(name: str, settings: dict[str, float]) -> None:
    """By the policy itself, naming the value."""
    with pytest.raises(BadInput, match=str(next(iter(settings.values())))):
        make_policy(name, settings)
