"""What the paper promises of ``lame``, checked without reference code.

Numbers in brackets are sections of the project's algorithm notes: [6.7] LAME, [2.7] its definition.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from adapters.base import SOURCE_NORM, Batch, Output, Scope, Segments, State
from adapters.rng import Random
from tests.adapters.networks import Server, Subject, assert_same, drive, flat, run, subject
from tests.adapters.oracles.lame import LameOracle
from tta_server.errors import BadInput
from tta_server.policies import make_policy

AFFINITIES = ("rbf", "knn", "linear")
every_affinity = pytest.mark.parametrize("affinity", AFFINITIES)
every_seed = pytest.mark.parametrize("seed", range(3))


def lame(**settings: Any) -> Any:
    return make_policy("lame", settings)


def rows(seed: int, count: int, classes: int = 5, width: int = 4) -> tuple[Tensor, Tensor]:
    """Logits and features of rows in clusters, one a class: most logits agree with the features, some do not."""
    generator = torch.Generator().manual_seed(seed)
    centres = 2 * torch.randn(classes, width, generator=generator, dtype=torch.float64)
    labels = torch.randint(classes, (count,), generator=generator)
    features = centres[labels] + 0.5 * torch.randn(count, width, generator=generator, dtype=torch.float64)
    noise = torch.randn(count, classes, generator=generator, dtype=torch.float64)
    return 2 * torch.nn.functional.one_hot(labels, classes) + noise, features


def answer(policy: Any, logits: Tensor, features: Tensor, sizes: list[int] | None = None) -> tuple[Tensor, Tensor]:
    """``Y`` and the steps it took, for rows with these logits and features."""
    segments = Segments(sizes or [len(logits)])
    zeros = torch.zeros(segments.streams, dtype=torch.int64)
    random = Random(zeros, zeros, torch.float64)
    batch = Batch(logits, segments, lambda *_: Output(logits, features), SOURCE_NORM, random)
    served, step = drive(policy, subject("mlp-bn"), State({}, {}), batch)
    assert flat(step.state) == {}
    return served.softmax(1), step.signals["iterations"]


def affinity_of(policy: Any, features: Tensor) -> Tensor:
    """``W``, by the oracle, which does not use the policy's code."""
    unit = features / features.norm(dim=1, keepdim=True)
    distance = (unit[:, None] - unit[None]).norm(dim=2)
    w: Tensor = getattr(_Affinities(policy), policy.affinity)(unit, distance)
    return (w + w.T) / 2 if policy.force_symmetry else w


class _Affinities(LameOracle):
    def __init__(self, settings: Any) -> None:
        self.settings = settings


def objective(y: Tensor, logits: Tensor, w: Tensor, weight: float) -> float:
    """``J(Y) = sum_i KL(y_i || q_i) - lambda/2 sum_ij W_ij <y_i, y_j>``, with the 1e-10 that is added to ``q``."""
    divergence = (torch.special.xlogy(y, y) - y * (logits.softmax(1) + 1e-10).log()).sum()
    return float(divergence - weight / 2 * (w * (y @ y.T)).sum())


@every_affinity
@every_seed
def test_answers_are_distributions(affinity: str, seed: int) -> None:
    """[6.7] Rows of ``Y`` are not negative and sum to 1; they differ from ``q``, and few steps suffice."""
    logits, features = rows(seed, 20)
    y, steps = answer(lame(affinity=affinity), logits, features)
    assert (y >= 0).all()
    torch.testing.assert_close(y.sum(1), torch.ones(20, dtype=torch.float64))
    assert (y - logits.softmax(1)).abs().max() > 0.1
    assert 3 <= steps.item() <= 100


@every_affinity
def test_no_affinity_is_the_source(affinity: str) -> None:
    """[6.7] ``lambda = 0``: ``Y = q`` within 1e-8."""
    logits, features = rows(0, 20)
    y, _ = answer(lame(affinity=affinity, weight=0.0), logits, features)
    torch.testing.assert_close(y, logits.softmax(1), rtol=0, atol=1e-8)


@every_affinity
def test_one_row_is_the_source(affinity: str) -> None:
    """[6.7] ``B = 1``: ``Y = q``, beside other streams as well as alone; no step is taken."""
    logits, features = rows(0, 8)
    y, steps = answer(lame(affinity=affinity), logits, features, [1, 6, 1])
    torch.testing.assert_close(y[[0, 7]], logits[[0, 7]].softmax(1))
    assert steps[0] == steps[2] == 0
    assert steps[1] > 0


def test_identical_rows_are_the_source() -> None:
    """[2.7] ``rbf`` without any distance has no scale: ``q`` unchanged and no NaN; so with features of zero."""
    logits, features = rows(0, 6)
    for same in (features[:1].expand(6, -1), torch.zeros_like(features), 1e-200 * features[:1].expand(6, -1)):
        y, steps = answer(lame(), logits, same)
        torch.testing.assert_close(y, logits.softmax(1))
        assert steps.item() == 0


@pytest.mark.parametrize("affinity", ["rbf", "linear"])
@pytest.mark.parametrize("weight", [0.3, 1.0, 4.0])
@every_seed
def test_objective_never_rises(affinity: str, weight: float, seed: int) -> None:
    """[6.7] ``J`` with the factor ``lambda / 2`` falls from step to step (``W`` symmetric, positive semi-definite)."""
    logits, features = rows(seed, 15)
    w = affinity_of(lame(affinity=affinity), features)
    values = [objective(logits.softmax(1), logits, w, weight)]
    for steps in range(1, 12):
        y, _ = answer(lame(affinity=affinity, weight=weight, steps=steps), logits, features)
        values.append(objective(y, logits, w, weight))
    for before, after in itertools.pairwise(values):
        assert after <= before + 1e-9
    assert values[-1] < values[0] - 0.1


@every_affinity
@every_seed
def test_ends_at_a_fixed_point(affinity: str, seed: int) -> None:
    """[6.7] ``Y = softmax(ln q + lambda W Y)`` where it stopped before its last step."""
    logits, features = rows(seed, 15)
    policy = lame(affinity=affinity, weight=0.7, steps=5000, force_symmetry=affinity == "knn")
    y, steps = answer(policy, logits, features)
    assert steps.item() < policy.steps
    again = (logits.log_softmax(1) + policy.weight * affinity_of(policy, features) @ y).softmax(1)
    torch.testing.assert_close(y, again, rtol=0, atol=1e-3)
    assert not torch.allclose(y, logits.softmax(1), atol=1e-2)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("neighbours", [1, 3, 50])
def test_knn_takes_the_nearest_others(symmetric: bool, neighbours: int) -> None:
    """[2.7] One step from ``q`` by hand: ``W`` is 1 for the ``min(k, B - 1)`` nearest others, 0 for the row itself."""
    logits, features = rows(1, 7)
    policy = lame(affinity="knn", neighbours=neighbours, force_symmetry=symmetric, steps=1)
    w = affinity_of(policy, features)
    assert w.diagonal().sum() == 0
    assert w.sum() == 7 * min(neighbours, 6)
    assert torch.equal(w, w.T) == (symmetric or neighbours == 50)
    y, _ = answer(policy, logits, features)
    expected = (logits.log_softmax(1) + w @ logits.softmax(1)).softmax(1)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-8)


def test_rbf_width_is_the_mean_kth_smallest_distance() -> None:
    """[2.7] Two rows at distance ``d``: the second smallest of each is ``d``, so ``W_01 = exp(-1/2)`` for any ``d``."""
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    q, w = logits.softmax(1), torch.tensor([[1.0, math.exp(-0.5)], [math.exp(-0.5), 1.0]], dtype=torch.float64)
    for angle in (1e-4, 0.3, 3.0):
        features = torch.tensor([[1.0, 0.0], [5 * math.cos(angle), 5 * math.sin(angle)]], dtype=torch.float64)
        y, _ = answer(lame(steps=1), logits, features)
        torch.testing.assert_close(y, (q.log() + w @ q).softmax(1), rtol=1e-7, atol=1e-8)


@every_affinity
def test_an_undecided_row_follows_its_neighbours(affinity: str) -> None:
    """[6.7] A row of uniform ``q`` takes the class of the rows around it, among rows of another class far away."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    classes = torch.tensor([0] * 6 + [1] * 6)
    features = centres[classes] + 0.02 * torch.randn(12, 2, generator=generator, dtype=torch.float64)
    logits = 4 * torch.nn.functional.one_hot(classes, 3).double()
    logits[0] = logits[6] = 0
    y, _ = answer(lame(affinity=affinity), logits, features)
    assert y.argmax(1).tolist() == classes.tolist()
    assert y[[0, 6]].amax(1).min() > 0.6


@every_affinity
def test_equal_rows_get_equal_answers(affinity: str) -> None:
    """[6.7] Identical features and identical ``q``: identical rows of ``Y``."""
    logits, features = rows(2, 9)
    logits[4], features[4] = logits[0], features[0]
    # Of their neighbourhoods under knn only the two themselves differ, and these are the same.
    y, _ = answer(lame(affinity=affinity), logits, features)
    torch.testing.assert_close(y[4], y[0], rtol=1e-12, atol=1e-13)
    assert (y[4] - y[1]).abs().max() > 1e-3


@every_affinity
@every_seed
def test_rows_in_another_order_get_the_same_answers(affinity: str, seed: int) -> None:
    """[6.7] Permuting the rows permutes ``Y``."""
    logits, features = rows(seed, 16)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(seed))
    straight, _ = answer(lame(affinity=affinity), logits, features)
    shuffled, _ = answer(lame(affinity=affinity), logits[order], features[order])
    torch.testing.assert_close(shuffled, straight[order], rtol=1e-9, atol=1e-12)


@every_affinity
def test_only_differences_of_scores_and_directions_of_features_count(affinity: str) -> None:
    """[6.7] A constant added to a row's logits, and a factor on its features, change nothing."""
    logits, features = rows(0, 10)
    expected, _ = answer(lame(affinity=affinity), logits, features)
    offsets = torch.linspace(-50, 50, 10, dtype=torch.float64)[:, None]
    shifted, _ = answer(lame(affinity=affinity), logits + offsets, features)
    torch.testing.assert_close(shifted, expected, rtol=1e-9, atol=1e-11)
    scaled, _ = answer(lame(affinity=affinity), logits, features * offsets.exp())
    torch.testing.assert_close(scaled, expected, rtol=1e-9, atol=1e-11)


@every_affinity
def test_stops_after_so_many_steps(affinity: str) -> None:
    """[6.7] Never more than ``steps``; and never before the third, even where nothing moves."""
    logits, features = rows(0, 12)
    for limit in (1, 2, 3, 4):
        _, steps = answer(lame(affinity=affinity, steps=limit), logits, features)
        assert min(limit, 3) <= steps.item() <= limit
    _, steps = answer(lame(affinity=affinity, weight=0.0), logits, features)
    assert steps.item() == 3


@every_affinity
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_scores_of_any_size_and_type_give_finite_answers(affinity: str, dtype: torch.dtype) -> None:
    """Logits of one-hot certainty and of either type: ``ln Y`` is finite, because of the 1e-10 beside ``q``."""
    logits, features = rows(0, 12)
    y, _ = answer(lame(affinity=affinity), (logits * 1e4).to(dtype), features.to(dtype))
    assert y.dtype == dtype
    assert y.isfinite().all()


def test_works_in_float64_on_float32_models() -> None:
    """A float32 model's answers are those that the same numbers get in float64, to float32's last digits: nothing
    builds up over the steps."""
    logits, features = (one.float() for one in rows(3, 40))
    narrow, steps = answer(lame(), logits, features)
    wide, expected = answer(lame(), logits.double(), features.double())
    torch.testing.assert_close(narrow.double(), wide, rtol=1e-5, atol=1e-6)
    assert steps.item() == expected.item()


def test_a_stream_of_nan_is_alone_with_it() -> None:
    """A NaN in one stream's rows reaches every answer of that stream, which is then refused, and no other's."""
    logits, features = rows(0, 9)
    expected, _ = answer(lame(), logits, features, [4, 5])
    logits[5], features[5] = torch.nan, torch.nan
    y, _ = answer(lame(), logits, features, [4, 5])
    assert torch.equal(y[:4], expected[:4])
    assert y[4:].isnan().any()


def test_keeps_nothing() -> None:
    """[6.7] Model and state untouched: outputs do not depend on what came before, the version stays 0."""
    network, policy = subject("conv-bn"), lame()
    assert policy.scope is Scope.NONE
    server, x = Server(policy, network), network.rows(0, 6)
    first = server.logits({"a": x})
    server.logits({"a": network.rows(1, 6)})
    assert_same(first, server.logits({"a": x}))
    assert server.stream("a").version == 0


def test_makes_a_difference_on_a_real_forward_pass() -> None:
    """Through the network: answers are normalised log-probabilities and not the source's."""
    network: Subject = subject("conv-bn")
    x = network.rows(0, 8)
    served = run(lame(), network, [network.init(lame())], [x]).logits[0]
    source = run(make_policy("source", {}), network, [State({}, {})], [x]).logits[0]
    torch.testing.assert_close(served.logsumexp(1), torch.zeros(8, dtype=torch.float64), rtol=0, atol=1e-12)
    assert (served.softmax(1) - source.softmax(1)).abs().max() > 0.1


@pytest.mark.parametrize(
    "settings", [{"neighbours": 1}, {"neighbours": 0, "affinity": "knn"}, {"steps": 0}, {"weight": -1.0}]
)
def test_settings_outside_their_range_are_refused(settings: dict[str, Any]) -> None:
    """By name; ``rbf`` with one neighbour would be the source for ever, as each row is its own nearest."""
    with pytest.raises(BadInput, match=next(iter(settings))):
        lame(**settings)
