"""Conformal sets: coverage by simulation, the online bound against adversaries, others' code."""

from __future__ import annotations

import json
from collections import deque

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tta_server.errors import BadInput
from tta_server.trust.conformal import Adaptive, Conformal, abstains

Floats = NDArray[np.float64]
Classes = NDArray[np.int64]
CLASSES = 5


def softmax(logits: Floats) -> Floats:
    exponentials: Floats = np.exp(logits - logits.max(1, keepdims=True))
    shares: Floats = exponentials / exponentials.sum(1, keepdims=True)
    return shares


def rows(count: int, generator: np.random.Generator, noise: float = 1.5) -> tuple[Floats, Classes]:
    """Logits of a fair model, and labels."""
    labels = generator.integers(0, CLASSES, count)
    return 2 * np.eye(CLASSES)[labels] + noise * generator.normal(size=(count, CLASSES)), labels


@pytest.mark.parametrize(("alpha", "rank"), [(0.1, 18), (0.05, 19), (0.5, 10), (0.051, 19), (0.99, 1)])
def test_threshold_is_the_quantile_of_the_formula(alpha: float, rank: int) -> None:
    scores = np.random.default_rng(0).permutation(np.arange(1, 20)) / 20
    assert Conformal(scores).threshold(alpha) == rank / 20


@pytest.mark.parametrize(("alpha", "share"), [(-0.2, 1), (0.0, 1), (0.0499, 1), (1.0, 0), (1.2, 0)])
def test_far_alphas_give_all_classes_or_none(alpha: float, share: int) -> None:
    """Below 1 / 20, 19 rows say nothing."""
    one = Conformal(np.arange(1, 20) / 20)
    sets = one.sets(np.array([[1.0, 0.0, 0.0]], np.float32), alpha)
    assert sets.mean() == share
    np.testing.assert_array_equal(abstains(sets), [True])


def test_the_threshold_is_in_the_set() -> None:
    one = Conformal([0.25, 0.5, 0.75])
    np.testing.assert_array_equal(one.sets(np.array([[0.5, 0.49, 0.01]]), 0.5), [[True, False, False]])


def test_abstains_but_for_single_classes() -> None:
    sets = np.array([[True, False, False], [True, True, False], [False, False, False], [False, False, True]])
    np.testing.assert_array_equal(abstains(sets), [False, True, True, False])


def test_sets_hold_the_class_as_often_as_promised() -> None:
    """Over many calibrations: with probability in [1 - alpha, 1 - alpha + 1 / (n + 1)], as scores have no ties."""
    generator = np.random.default_rng(0)
    alpha, calibration, repeats = 0.2, 24, 2000
    held = []
    for _ in range(repeats):
        one = Conformal.calibrated(*rows(calibration, generator))
        logits, labels = rows(10, generator)
        held.append(one.sets(softmax(logits), alpha)[np.arange(10), labels].mean())
    error = 2.6 * np.std(held) / np.sqrt(repeats)
    assert 1 - alpha - error <= np.mean(held) <= 1 - alpha + 1 / (calibration + 1) + error


def test_calibration_is_kept_as_its_scores() -> None:
    logits, labels = rows(50, np.random.default_rng(1))
    one = Conformal.calibrated(logits + 700, labels)  # Too much for exp.
    again = Conformal(json.loads(json.dumps(one.scores.tolist())))
    np.testing.assert_array_equal(one.scores, again.scores)
    np.testing.assert_allclose(one.scores, np.sort(1 - softmax(logits)[np.arange(50), labels]), atol=1e-12)


@pytest.mark.parametrize("scores", [[[0.1]], [2.0], [-0.1], [float("nan")]])
def test_scores_that_are_none_are_refused(scores: list[object]) -> None:
    with pytest.raises(BadInput, match="from 0 to 1"):
        Conformal(scores)  # type: ignore[arg-type]


def test_logits_must_fit_their_labels() -> None:
    with pytest.raises(BadInput, match=r"got \[3, 2\] and \[2\]"):
        Conformal.calibrated(np.zeros((3, 2)), np.zeros(2))


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from([0.05, 0.1, 0.3, 0.9]),
    st.sampled_from([0.005, 0.05, 0.4, 2.0]),
    st.integers(0, 12),
    st.lists(st.tuples(st.sampled_from(["hit", "miss", "random"]), st.integers(0, 1000)), min_size=1, max_size=150),
)
def test_misses_are_bounded_whoever_chooses_the_labels(
    target: float, gamma: float, delay: int, plan: list[tuple[str, int]]
) -> None:
    """The adversary sees the set and then takes a class outside or inside, wherever there is one; it hands labels in
    any order, while ``delay`` rows wait."""
    model = Conformal(np.linspace(0, 1, 30))
    stream = Adaptive(target, gamma)
    waiting: deque[tuple[NDArray[np.bool_], int]] = deque()
    missed, labelled = 0, 0

    def check() -> None:
        assert -(delay + 1) * gamma - 1e-9 <= stream.alpha <= 1 + (delay + 1) * gamma + 1e-9
        if labelled:
            wide = (max(target, 1 - target) + (delay + 1) * gamma) / (gamma * labelled)
            assert abs(missed / labelled - target) <= wide + 1e-9
            assert stream.coverage == pytest.approx(1 - missed / labelled)

    for wish, number in plan:
        sets = model.sets(softmax(np.random.default_rng(number).normal(size=(1, CLASSES)) * 3), stream.alpha)
        choices = {"hit": np.flatnonzero(sets[0]), "miss": np.flatnonzero(~sets[0])}.get(wish, np.arange(CLASSES))
        waiting.append((sets, int(choices[number % len(choices)]) if len(choices) else number % CLASSES))
        if len(waiting) > delay:
            waiting.rotate(number)
            served, label = waiting.popleft()
            stream.learn(served, np.array([label]))
            missed, labelled = missed + (not served[0, label]), labelled + 1
        check()


@pytest.mark.parametrize("target", [0.1, 0.4])
def test_misses_come_to_the_target_in_the_long_run(target: float) -> None:
    """Labels are drawn without a look at the row."""
    generator = np.random.default_rng(0)
    model, stream, gamma, length = Conformal(np.linspace(0, 1, 100)), Adaptive(target, 0.05), 0.05, 3000
    for _ in range(length):
        sets = model.sets(softmax(generator.normal(size=(1, CLASSES)) * 4), stream.alpha)
        stream.learn(sets, generator.integers(0, CLASSES, 1))
    assert stream.coverage is not None
    assert abs(1 - stream.coverage - target) <= (max(target, 1 - target) + gamma) / (gamma * length)


def test_coverage_is_kept_through_a_shift() -> None:
    """Fixed sets lose it, adaptive ones come back to it."""
    generator = np.random.default_rng(3)
    model = Conformal.calibrated(*rows(500, generator))
    stream, held = Adaptive(0.1, 0.02), []
    for step in range(300):
        logits, labels = rows(10, generator, noise=1.5 if step < 100 else 4.0)
        fixed, sets = (model.sets(softmax(logits), alpha) for alpha in (0.1, stream.alpha))
        stream.learn(sets, labels)
        held.append([one[np.arange(10), labels].mean() for one in (fixed, sets)])
    before, after = np.mean(held[:100], 0), np.mean(held[150:], 0)
    assert before == pytest.approx([0.9, 0.9], abs=0.04)
    assert after[0] < 0.7
    assert after[1] == pytest.approx(0.9, abs=0.02)


@pytest.mark.parametrize(("target", "gamma"), [(0.0, 0.1), (1.0, 0.1), (0.1, 0.0)])
def test_settings_out_of_range_are_refused(target: float, gamma: float) -> None:
    with pytest.raises(ValueError, match="must be"):
        Adaptive(target, gamma)


@pytest.mark.parametrize("alpha", [0.05, 0.2, 0.5])
def test_sets_agree_with_mapie(alpha: float) -> None:
    classification = pytest.importorskip("mapie.classification")
    linear = pytest.importorskip("sklearn.linear_model")
    generator = np.random.default_rng(5)
    x, y = rows(200, generator)
    model = linear.LogisticRegression().fit(x, y)
    calibration, labels = rows(101, generator)
    theirs = classification.SplitConformalClassifier(model, confidence_level=1 - alpha, prefit=True)
    theirs.conformalize(calibration, labels)
    new, _ = rows(300, generator)
    _, sets = theirs.predict_set(new)
    ours = Conformal.calibrated(model.decision_function(calibration), labels)
    np.testing.assert_array_equal(ours.sets(model.predict_proba(new), alpha), sets[:, :, 0])
