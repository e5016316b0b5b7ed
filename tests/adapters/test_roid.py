"""What the paper promises of ``roid``, checked without reference code. Numbers in brackets are sections of the
project's algorithm notes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from adapters.base import Norm, Output, Segments, State
from adapters.roid import Roid, soft_likelihood_ratio
from tests.adapters.networks import (
    CLASSES,
    IMAGES,
    Subject,
    assert_close,
    assert_same,
    drive,
    flat,
    join,
    make_batch,
    run,
    subject,
)
from tta_server.errors import BadInput
from tta_server.policies import make_policy

every_net = pytest.mark.parametrize("kind", IMAGES)
LARGE: dict[str, Any] = {"optimiser": "sgd", "lr": 0.1, "batch_size": 4}


def roid(**settings: Any) -> Roid:
    policy = make_policy("roid", LARGE | settings)
    assert isinstance(policy, Roid)
    return policy


def one(
    policy: Roid, network: Subject, x: Tensor, state: State | None = None
) -> tuple[Tensor, State, dict[str, float]]:
    outcome = run(policy, network, [state or network.init(policy)], [x])
    return outcome.logits[0], outcome.states[0], outcome.signals[0]


def watched(policy: Roid, network: Subject, xs: list[Tensor]) -> tuple[list[tuple[Tensor, Segments, Tensor]], Tensor]:
    """The inputs, their owners and the logits of a first step's forward passes, and what it answered."""
    calls = []

    def spy(weights: Mapping[str, Tensor], x: Tensor, segments: Segments, norm: Norm) -> Output:
        output = network.network(weights, x, segments, norm)
        calls.append((x, segments, output.logits.detach()))
        return output

    batch = dataclasses.replace(make_batch(policy, network, xs), network=spy)
    return calls, drive(policy, network, join([network.init(policy)] * len(xs)), batch)[0]


def uniform(streams: int) -> Tensor:
    return torch.full((streams, CLASSES), 1 / CLASSES, dtype=torch.float64)


def random_logits(rows: int, scale: float = 2.0, seed: int = 0) -> Tensor:
    return scale * torch.randn(rows, CLASSES, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@every_net
@pytest.mark.parametrize("optimiser", ["adam", "sgd"])
def test_without_learning_rate_it_stays_at_the_source(kind: str, optimiser: str) -> None:
    """[6.8] Bit for bit: the pull to the source adds a multiple of a difference that is 0."""
    network, policy = subject(kind), roid(optimiser=optimiser, lr=0.0)
    state = network.init(policy)
    for step in range(4):
        _, state, _ = one(policy, network, network.rows(step, 5), state)
    assert_same(state.weights, network.init(policy).weights)


@every_net
def test_is_pulled_to_the_source(kind: str) -> None:
    """[6.8] ``theta <- a theta + (1 - a) theta0``: no pull for ``a = 1``, the source itself for ``a = 0``."""
    network, x = subject(kind), subject(kind).rows(0, 5)
    source = network.init(roid()).weights
    free = one(roid(source_momentum=1.0), network, x)[1].weights
    assert (free["1.weight"] != source["1.weight"]).any()
    for momentum in (0.99, 0.5, 0.01):
        pulled = one(roid(source_momentum=momentum), network, x)[1].weights
        assert_close(pulled, {key: momentum * free[key] + (1 - momentum) * source[key] for key in free})
    assert_same(one(roid(source_momentum=0.0), network, x)[1].weights, source)


@pytest.mark.parametrize("seed", range(4))
def test_weights_are_zero_or_between_one_and_the_greatest(seed: int) -> None:
    """[6.8] Zero exactly where a row is less diverse than the mean of its stream, else in ``[1, e^(1 / tau)]``, and
    the most diverse row is kept."""
    segments, logits = Segments([7, 2, 12]), random_logits(21, seed=seed)
    known = random_logits(3, seed=seed + 10).softmax(1)
    weight, kept = roid().weigh(known, logits, segments)
    diversity = 1 - torch.cosine_similarity(segments.spread(known), logits.softmax(1))
    start = 0
    for size in segments.sizes:
        own = slice(start, start + size)
        assert torch.equal(weight[own] == 0, diversity[own] < diversity[own].mean())
        assert kept[own][diversity[own].argmax()]
        start += size
    assert torch.equal(kept, weight > 0)
    assert 1 <= weight[kept].min() <= weight[kept].max() <= math.exp(3) * (1 + 1e-12)
    assert weight.max() > 2


def test_rows_that_are_alike_weigh_one() -> None:
    """[2.15] A single row, or equal ones: there is no range to scale by, and all count, alike; a stream beside them is
    weighed as if alone."""
    other = random_logits(5)
    alike = random_logits(1, seed=3)
    logits, segments = torch.cat([alike, alike.expand(4, -1), other]), Segments([1, 4, 5])
    weight, kept = roid().weigh(uniform(3), logits, segments)
    assert (weight[:5] == 1).all()
    assert kept[:5].all()
    torch.testing.assert_close(weight[5:], roid().weigh(uniform(1), other, Segments([5]))[0])
    assert 0 < kept[5:].sum() < 5


def test_of_two_rows_one_is_kept() -> None:
    """[2.15] The more diverse one."""
    weight, _ = roid().weigh(uniform(1), random_logits(2), Segments([2]))
    assert sorted((weight > 0).tolist()) == [False, True]


@every_net
def test_the_moving_mean_of_classes_is_a_distribution(kind: str) -> None:
    """[6.8] It sums to 1 and moves a tenth of the way to the mean of all predictions, kept or not."""
    network, policy = subject(kind), roid(prior="none")
    state, known = network.init(policy), uniform(1)
    assert_same({"q": state.memory["roid.classes"]}, {"q": known})
    for step in range(4):
        logits, state, _ = one(policy, network, network.rows(step, 6), state)
        known = 0.9 * known + 0.1 * logits.softmax(1).mean(0)
        torch.testing.assert_close(state.memory["roid.classes"], known)
        assert float(state.memory["roid.classes"].sum()) == pytest.approx(1)


@pytest.mark.parametrize("prior", ["log_prior", "logits"])
def test_a_uniform_prior_changes_no_decision(prior: str) -> None:
    """[6.8] Where the mean prediction is uniform, the answer's order of classes is that of the logits."""
    logits = random_logits(30)
    answer = roid(prior=prior).corrected(logits, uniform(2), Segments([20, 10]))
    assert torch.equal(answer.argsort(1), logits.argsort(1))


def test_the_prior_multiplies_probabilities_or_logits() -> None:
    """[2.15] By ``(pi + g) / (1 + g C)``, with ``g`` the greater of ``1 / B`` and ``1 / C`` over the greatest of
    ``pi``; each stream has its own."""
    logits, segments = random_logits(10), Segments([3, 7])
    mean = segments.mean(logits.softmax(1))
    by_log = roid(prior="log_prior").corrected(logits, mean, segments).softmax(1)
    by_logit = roid(prior="logits").corrected(logits, mean, segments)
    for rows, own in ((slice(0, 3), mean[0]), (slice(3, 10), mean[1])):
        smoothing = max(1 / (rows.stop - rows.start), 1 / CLASSES) / own.max()
        prior = (own + smoothing) / (1 + smoothing * CLASSES)
        assert float(prior.sum()) == pytest.approx(1)
        expected = logits[rows].softmax(1) * prior
        torch.testing.assert_close(by_log[rows], expected / expected.sum(1, keepdim=True))
        torch.testing.assert_close(by_logit[rows], logits[rows] * prior)
    assert_same({"none": roid(prior="none").corrected(logits, mean, segments)}, {"none": logits})


@every_net
@pytest.mark.parametrize("prior", ["log_prior", "logits", "none"])
def test_a_single_row_is_sound(kind: str, prior: str) -> None:
    """[6.8] Finite answer and state, of weight 1, over several steps."""
    network, policy = subject(kind), roid(prior=prior)
    state = network.init(policy)
    for step in range(3):
        logits, state, signals = one(policy, network, network.rows(step, 1), state)
        assert logits.isfinite().all()
        assert signals["selected"] == 1
        assert all(value.isfinite().all() for value in flat(state).values())


@every_net
def test_kept_rows_alone_are_looked_at_again(kind: str) -> None:
    """[2.15] Augmented, as a batch of their own; what is answered is the first look, corrected."""
    network, xs = subject(kind), [subject(kind).rows(seed, rows) for seed, rows in enumerate((6, 1, 4))]
    calls, answer = watched(roid(), network, xs)
    (x, segments, logits), (views, some, _) = calls
    _, kept = roid().weigh(uniform(3), logits, segments)
    assert some.sizes == [int(part.sum()) for part in kept.split(segments.sizes)]
    assert 0 < some.rows < segments.rows
    assert views.shape == (some.rows, *x.shape[1:])
    assert not torch.allclose(views, x[kept])
    torch.testing.assert_close(answer, roid().corrected(logits, segments.mean(logits.softmax(1)), segments))


@every_net
@pytest.mark.parametrize("weighting", [True, False])
@pytest.mark.parametrize("consistency", [True, False])
def test_weighting_and_consistency_are_independent(kind: str, weighting: bool, consistency: bool) -> None:
    """[2.15] Either works without the other; without weights all rows count, without consistency there is one look."""
    network, policy = subject(kind), roid(weighting=weighting, consistency=consistency)
    calls, _ = watched(policy, network, [network.rows(0, 6)])
    assert len(calls) == 1 + consistency
    _, state, signals = one(policy, network, network.rows(0, 6))
    assert (signals["selected"] == 1) is not weighting
    assert (state.weights["1.weight"] != network.source.weights["1.weight"]).any()


@every_net
def test_the_step_goes_with_rows_over_the_batch_size(kind: str) -> None:
    """[2.15] The divisor is a setting, not the rows of the request: twice the divisor, half the step."""
    network, x = subject(kind), subject(kind).rows(0, 5)
    start = network.init(roid()).weights
    full, half = (one(roid(batch_size=size, source_momentum=1.0), network, x)[1].weights for size in (4, 8))
    assert_close({k: full[k] - start[k] for k in start}, {k: 2 * (half[k] - start[k]) for k in start})


def test_soft_likelihood_ratio() -> None:
    """[2.15] ``-ln(p / (1 - p))`` where there are two classes' worth of doubt; no slope where the prediction is
    clipped, unlike the entropy's opposite: it stays steep up to there."""
    flat_logits = torch.zeros(1, CLASSES, dtype=torch.float64)
    expected = -math.log((1 / CLASSES) / (1 - 1 / CLASSES) + 1e-5)
    torch.testing.assert_close(soft_likelihood_ratio(flat_logits, 0.99), torch.tensor([expected], dtype=torch.float64))
    certain = torch.tensor([[60.0, 0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(soft_likelihood_ratio(certain, 0.99).sum(), certain)
    assert slope.abs().max() < 1e-12
    sure = torch.tensor([[4.0, 0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(soft_likelihood_ratio(sure, 0.99).sum(), sure)
    assert slope[0, 0] < -0.5


def test_small_requests_of_a_window_are_answered_without_the_prior() -> None:
    """A prior is one of a batch; the row is answered by the weights as they are."""
    network, policy = subject("image-gn"), roid(window=4)
    x = network.rows(0, 1)
    logits, state, _ = one(policy, network, x)
    with torch.no_grad():
        torch.testing.assert_close(logits, network.plain(x), rtol=1e-12, atol=1e-12)
    for step in range(1, 4):
        _, state, signals = one(policy, network, network.rows(step, 1), state)
    assert signals["selected"] < 1
    assert (state.weights["1.weight"] != network.source.weights["1.weight"]).any()


def test_consistency_needs_images() -> None:
    """[1.6] Inputs without a range cannot be augmented; without consistency they need not be."""
    source = subject("conv-bn").source
    with pytest.raises(ValueError, match="range"):
        roid().init(source)
    roid(consistency=False).init(source)


@pytest.mark.parametrize("settings", [{"ostta": 0.5}, {"temperature": 0.0}, {"clip": 1.0}, {"batch_size": 0}])
def test_refuses_settings_that_make_no_sense(settings: dict[str, Any]) -> None:
    """Among them OSTTA's filter: ROID has weights of its own."""
    with pytest.raises(BadInput, match=next(iter(settings))):
        roid(**settings)
