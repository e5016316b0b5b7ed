"""The signals against slow formulas, written out row by row and channel by channel, and against scipy."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import spatial, special, stats

from tta_server.drift.signals import (
    SIGNALS,
    ClassFeatures,
    Floats,
    LayerStatistics,
    Requests,
    Scores,
    Values,
    bn_distances,
    divergence,
    entropy,
    feature_distance,
    of_both,
    of_served,
    of_source,
    stability_index,
)

Parts = tuple[Floats, Floats, Floats]
"""Source logits, served logits and features of some rows."""
CLASSES, DIMENSION = 5, 7


def draw(rows: int, seed: int, scale: float = 3.0) -> Parts:
    generator = np.random.default_rng(seed)
    shape = (rows, CLASSES)
    return (
        generator.normal(0, scale, shape),
        generator.normal(0, scale, shape),
        generator.normal(1, 2, (rows, DIMENSION)),
    )


def take(parts: Parts, rows: slice | NDArray[np.int64]) -> Parts:
    source, served, features = parts
    return source[rows], served[rows], features[rows]


def clean_features(seed: int = 0) -> ClassFeatures:
    mean = np.random.default_rng(seed).normal(1, 1, (CLASSES, DIMENSION))
    return ClassFeatures(mean, np.square(mean) + np.random.default_rng(seed + 1).uniform(0.5, 2, mean.shape))


def served_signals(logits: Floats, requests: Requests) -> Values:
    ranked = np.sort(special.softmax(logits, 1), 1)
    return of_served(Scores(logits), ranked[:, -1], ranked[:, -1] - ranked[:, -2], requests)


def measure(parts: Parts, sizes: list[int]) -> Values:
    """All signals of rows."""
    source, served, features = parts
    requests = Requests(np.array(sizes))
    values = served_signals(served, requests)
    values |= of_source(Scores(source), features, clean_features(), requests)
    return values | of_both(Scores(served), Scores(source), requests)


def softmax(row: list[float]) -> list[float]:
    most = max(row)
    powers = [math.exp(value - most) for value in row]
    return [power / sum(powers) for power in powers]


def shannon(shares: list[float]) -> float:
    return -sum(share * math.log(share) for share in shares if share > 0)


def average(rows: list[list[float]]) -> list[float]:
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def slow(source: list[list[float]], served: list[list[float]], features: list[list[float]]) -> dict[str, float]:
    """All signals of one request, in plain Python."""
    count, most = len(source), math.log(CLASSES)
    answers, beliefs = [softmax(row) for row in served], [softmax(row) for row in source]
    best = [sorted(row)[::-1] for row in answers]
    now, before = average(answers), average(beliefs)
    middle = [(one + other) / 2 for one, other in zip(now, before, strict=True)]
    chosen = [row.index(max(row)) for row in source]
    clean, distance = clean_features(), 0.0
    for one in range(DIMENSION):
        column = [row[one] for row in features]
        mean = sum(column) / count
        deviation = math.sqrt(sum((value - mean) ** 2 for value in column) / count)
        expected = sum(float(clean.mean[label, one]) for label in chosen) / count
        second = sum(float(clean.second[label, one]) for label in chosen) / count
        distance += (mean - expected) ** 2 + (deviation - math.sqrt(second - expected**2)) ** 2
    return {
        "confidence": sum(row[0] for row in best) / count,
        "margin": sum(row[0] - row[1] for row in best) / count,
        "entropy": sum(shannon(row) for row in answers) / count / most,
        "diversity": shannon(now) / most,
        "source_entropy": sum(shannon(row) for row in beliefs) / count / most,
        "source_energy": -sum(math.log(sum(math.exp(value) for value in row)) for row in source) / count,
        "label_skew": 1 - shannon(before) / most,
        "agreement": sum(one.index(max(one)) == label for one, label in zip(served, chosen, strict=True)) / count,
        "skew_damage": (shannon(middle) - (shannon(now) + shannon(before)) / 2) / math.log(2),
        "feature_distance": distance,
    }


@pytest.mark.parametrize("sizes", [[1], [1, 1, 1], [4, 1, 9], [64], [2, 30, 5, 1, 1]])
def test_signals_equal_the_formulas_written_out(sizes: list[int]) -> None:
    parts = draw(sum(sizes), len(sizes))
    found = measure(parts, sizes)
    edges = [0, *np.cumsum(sizes).tolist()]
    for index, (start, end) in enumerate(pairwise(edges)):
        expected = slow(*(part[start:end].tolist() for part in parts))
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert found[name][index] == pytest.approx(value, rel=1e-9, abs=1e-12), name


def test_rows_agree_with_scipy() -> None:
    logits = draw(50, 1)[0]
    scores = Scores(logits)
    np.testing.assert_allclose(scores.probabilities, special.softmax(logits, 1), rtol=1e-12)
    np.testing.assert_allclose(scores.energy, -special.logsumexp(logits, 1), rtol=1e-12)
    np.testing.assert_allclose(scores.entropy, stats.entropy(special.softmax(logits, 1), axis=1, base=CLASSES))


def test_large_scores_neither_overflow_nor_warn() -> None:
    logits = np.array([[1e4, 0.0, -1e4], [-1e4, -1e4, -1e4]])
    scores = Scores(logits)
    np.testing.assert_allclose(scores.probabilities, np.array([[1, 0, 0], [1 / 3] * 3]))
    np.testing.assert_allclose(scores.entropy, np.array([0.0, 1.0]), atol=1e-12)
    np.testing.assert_allclose(scores.energy, np.array([-1e4, 1e4 - math.log(3)]))


@given(sizes=st.lists(st.integers(1, 6), min_size=1, max_size=5), seed=st.integers(0, 100))
@settings(max_examples=40, deadline=None)
def test_a_request_is_measured_as_if_alone(sizes: list[int], seed: int) -> None:
    parts = draw(sum(sizes), seed)
    together = measure(parts, sizes)
    for index, (start, end) in enumerate(pairwise([0, *np.cumsum(sizes).tolist()])):
        alone = measure(take(parts, slice(start, end)), [end - start])
        for name, value in alone.items():
            np.testing.assert_allclose(together[name][index], value[0], rtol=1e-9, atol=1e-12, err_msg=name)


def test_the_order_of_rows_does_not_matter() -> None:
    parts, shuffled = draw(12, 3), np.random.default_rng(0).permutation(12)
    before, after = measure(parts, [12]), measure(take(parts, shuffled), [12])
    for name, value in before.items():
        np.testing.assert_allclose(after[name], value, rtol=1e-9, err_msg=name)


def test_ratios_lie_between_0_and_1() -> None:
    for scale in (0.01, 1.0, 100.0):
        values = measure(draw(200, 4, scale), [1] * 40 + [8] * 20)
        for name in values.keys() - {"source_energy", "feature_distance"}:
            assert values[name].min() >= 0, name
            assert values[name].max() <= 1 + 1e-12, name


def test_divergence_is_the_squared_jensen_shannon_distance() -> None:
    one, other = np.random.default_rng(0).dirichlet(np.ones(6), (2, 30))
    expected = spatial.distance.jensenshannon(one, other, base=2, axis=1) ** 2
    np.testing.assert_allclose(divergence(one, other), expected, rtol=1e-9)
    np.testing.assert_allclose(divergence(one, one), 0)
    np.testing.assert_allclose(divergence(np.array([0.5, 0.5, 0]), np.array([0, 0, 1.0])), 1)


def test_entropy_agrees_with_scipy_and_takes_zeros() -> None:
    shares = np.array([[0.2, 0.3, 0.5], [1, 0, 0]])
    np.testing.assert_allclose(entropy(shares), stats.entropy(shares, axis=1), atol=1e-12)


def test_stability_index() -> None:
    now, before = np.array([0.1, 0.2, 0.7]), np.array([0.3, 0.3, 0.4])
    # The sum of the two Kullback-Leibler divergences.
    expected = stats.entropy(now, before) + stats.entropy(before, now)
    assert stability_index(now, before) == pytest.approx(expected)
    assert stability_index(now, now) == 0
    # A class that is gone counts as one with a share of 1e-4.
    gone = stability_index(np.array([0.0, 1.0]), np.array([0.5, 0.5]))
    assert gone == pytest.approx((1e-4 - 0.5) * math.log(1e-4 / 0.5) + 0.5 * math.log(2))


def normal_distance(mean: float, var: float, other_mean: float, other_var: float) -> float:
    """Squared 2-Wasserstein distance of two normal distributions, by the integral over their quantiles."""
    levels = (np.arange(200_000) + 0.5) / 200_000
    normal = stats.norm.ppf(levels)
    gap = mean + math.sqrt(var) * normal - (other_mean + math.sqrt(other_var) * normal)
    return float(np.square(gap).mean())


@pytest.mark.parametrize("one", [(0.0, 1.0, 2.0, 1.0), (1.0, 4.0, 1.0, 0.25), (-3.0, 0.5, 2.0, 3.0)])
def test_distances_are_those_of_normal_distributions(one: tuple[float, float, float, float]) -> None:
    mean, var, other_mean, other_var = one
    expected = normal_distance(*one)
    layer = LayerStatistics(np.array([other_mean]), np.array([other_var]), np.zeros(1), np.zeros(1, np.int64))
    measured = bn_distances(np.array([[mean]]), np.array([[var]]), layer)["bn_distance"][0]
    assert measured * other_var == pytest.approx(expected, rel=1e-3)
    # Two rows have any mean and variance that is wanted.
    features = np.array([[mean - math.sqrt(var)], [mean + math.sqrt(var)]])
    clean = ClassFeatures(np.array([[other_mean]]), np.array([[other_mean**2 + other_var]]))
    measured = feature_distance(features, np.zeros(2, np.int64), clean, Requests(np.array([2])))[0]
    assert measured == pytest.approx(expected, rel=1e-3)


def test_feature_distance_does_not_mind_the_mixture_of_classes() -> None:
    """Rows that are as clean ones of their classes are have no distance, be it of one class or of all."""
    generator = np.random.default_rng(0)
    rows = {label: generator.normal(3 * label, 1 + label, (20, DIMENSION)) for label in range(CLASSES)}
    mean = np.stack([own.mean(0) for own in rows.values()])
    clean = ClassFeatures(mean, np.stack([np.square(own).mean(0) for own in rows.values()]))
    for chosen in ([0], [3], [1, 1, 4], list(range(CLASSES))):
        features, classes = np.concatenate([rows[label] for label in chosen]), np.repeat(chosen, 20)
        requests = Requests(np.array([len(features)]))
        assert feature_distance(features, classes, clean, requests)[0] == pytest.approx(0, abs=1e-9)
        assert feature_distance(features + 1.5, classes, clean, requests)[0] == pytest.approx(1.5**2 * DIMENSION)
    everything = np.arange(20) % CLASSES
    assert feature_distance(rows[0], everything, clean, Requests(np.array([20])))[0] > 100


def test_bn_distances_equal_the_formula_written_out() -> None:
    generator = np.random.default_rng(0)
    sizes, eps = [3, 1, 4, 2, 5], [1e-5, 1e-3, 0.1, 1e-5, 1.0]
    edges = [0, *np.cumsum(sizes).tolist()]
    stored, measured = generator.normal(0, 1, (2, edges[-1])), generator.normal(0, 1, (2, 3, edges[-1]))
    layers = LayerStatistics(
        stored[0], np.square(stored[1]), np.repeat(eps, sizes), np.array(edges[:-1], dtype=np.int64)
    )
    found = bn_distances(measured[0], np.square(measured[1]), layers)
    for request in range(3):
        by_layer = []
        for own_eps, (start, end) in zip(eps, pairwise(edges), strict=True):
            total = 0.0
            for channel in range(start, end):
                mean_gap = measured[0, request, channel] - stored[0, channel]
                deviation_gap = abs(measured[1, request, channel]) - abs(stored[1, channel])
                total += (mean_gap**2 + deviation_gap**2) / (stored[1, channel] ** 2 + own_eps)
            by_layer.append(total / (end - start))
        expected = {
            "bn_distance": sum(by_layer) / 5,
            "bn_distance_max": max(by_layer),
            "bn_distance_early": (by_layer[0] + by_layer[1]) / 2,
            "bn_distance_middle": (by_layer[2] + by_layer[3]) / 2,
            "bn_distance_late": by_layer[4],
        }
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert found[name][request] == pytest.approx(value, rel=1e-9), name


def test_a_network_of_two_layers_has_no_late_third() -> None:
    layers = LayerStatistics(np.zeros(2), np.ones(2), np.zeros(2), np.array([0, 1]))
    found = bn_distances(np.array([[1.0, 2.0]]), np.ones((1, 2)), layers)
    assert found["bn_distance"][0] == 2.5
    assert (found["bn_distance_early"][0], found["bn_distance_middle"][0]) == (1, 4)
    assert np.isnan(found["bn_distance_late"][0])


def test_a_dead_channel_counts_as_much_as_its_layer_makes_of_it() -> None:
    layers = LayerStatistics(np.zeros(1), np.zeros(1), np.array([1e-5]), np.zeros(1, np.int64))
    assert bn_distances(np.array([[1e-3]]), np.zeros((1, 1)), layers)["bn_distance"][0] == pytest.approx(0.1)


def test_without_clean_data_there_is_no_feature_distance() -> None:
    source, _, features = draw(4, 0)
    found = of_source(Scores(source), features, None, Requests(np.array([4])))
    assert found.keys() == {"source_entropy", "source_energy", "label_skew"}


def test_single_precision_is_enough() -> None:
    source, served, features = (part.astype(np.float32) for part in draw(6, 0))
    found = measure((source, served, features), [3, 3])
    expected = measure(draw(6, 0), [3, 3])
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=2e-4, atol=1e-6, err_msg=name)


def test_a_single_class() -> None:
    one = of_served(Scores(np.zeros((2, 1))), np.ones(2), np.ones(2), Requests(np.array([2])))
    assert {name: value[0] for name, value in one.items()} == {
        "confidence": 1,
        "margin": 1,
        "entropy": 0,
        "diversity": 0,
    }


def test_every_signal_says_what_it_is() -> None:
    measured = {
        *measure(draw(2, 0), [2]),
        *(f"bn_distance{end}" for end in ("", "_max", "_early", "_middle", "_late")),
    }
    steps = {"label_divergence", "label_psi", "update_norm", "parameter_distance", "benefit", "estimator_disagreement"}
    steps |= {f"{path}accuracy_{kind}" for path in ("", "source_") for kind in ("atc", "pdd")}
    assert set(SIGNALS) == measured | steps
    assert {name for name, one in SIGNALS.items() if one.log} == {
        name for name in SIGNALS if "distance" in name
    } - steps
    assert all(one.text for one in SIGNALS.values())
