"""Label-free accuracy: on a made-up linear source, against plain loops, and where it must say that it does not know."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import safetensors.numpy
from numpy.typing import NDArray

from tta_server.drift.estimators import FEW_WRONG, LEAST_ROWS, PASSES, Estimate, Estimates, Head, make_estimates
from tta_server.drift.signals import Floats, Requests

CLASSES, DIMENSION = 5, 24
Labels = NDArray[np.int64]


def head() -> Head:
    """Of the made-up source: the best linear rule for its own noise, but three times as sure as it should be."""
    centres = np.random.default_rng(0).normal(0, 0.44, (CLASSES, DIMENSION))
    return Head((3 * centres).astype(np.float32), (-1.5 * np.square(centres).sum(1)).astype(np.float32))


def rows(count: int, seed: int, strength: float = 1.0, labels: Labels | None = None) -> tuple[Floats, Floats, Labels]:
    """Logits, features and labels of the made-up source. The less ``strength`` classes have, the more it is wrong."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, CLASSES, count) if labels is None else labels
    features = strength * head().weight[labels] / 3 + generator.normal(0, 1, (len(labels), DIMENSION))
    features = features.astype(np.float32)
    return scores(features), features, labels


def scores(features: Floats) -> Floats:
    bias = head().bias
    assert bias is not None
    made: Floats = features @ head().weight.T + bias
    return made


def requests_of(size: int, count: int) -> Requests:
    return Requests(np.full(count // size, size))


def accuracy(logits: Floats, labels: Labels, requests: Requests) -> Floats:
    return requests.mean((logits.argmax(1) == labels).astype(np.float64))


@pytest.fixture(scope="module")
def made() -> Estimates:
    return make_estimates(*rows(4000, 1), head())


def softmax(logits: Floats) -> Floats:
    weights = np.exp(logits - logits.max(1, keepdims=True))
    shares: Floats = weights / weights.sum(1, keepdims=True)
    return shares


def test_on_the_rows_it_was_made_of_atc_is_the_accuracy(made: Estimates) -> None:
    logits, _, labels = rows(4000, 1)
    whole = Requests(np.array([4000]))
    assert made.accuracy == accuracy(logits, labels, whole)[0]
    assert made.wrong == round(4000 * (1 - made.accuracy))
    assert 0.7 < made.accuracy < 0.95
    assert whole.mean(made.sure(logits))[0] == pytest.approx(made.accuracy, abs=1 / 4000)


def test_as_many_answers_stay_under_dropout_as_are_right(made: Estimates) -> None:
    logits, features, _ = rows(4000, 1)
    kept = made.kept(logits, features, head(), Requests(np.array([4000])))
    assert kept.mean() == pytest.approx(made.accuracy, abs=0.005)
    assert made.masks is not None
    assert 1 - made.masks.mean() == pytest.approx(made.rate, abs=0.1)


def test_the_disagreement_has_no_sign() -> None:
    found = Estimate(np.array([0.25, 0.75, np.nan]), np.array([0.5, 0.5, 0.5]))
    assert found.disagreement.tolist()[:2] == [0.25, 0.25]
    assert np.isnan(found.disagreement[2])


def test_the_temperature_has_the_least_loss(made: Estimates) -> None:
    """Against a fine grid; the source is three times too sure, so it is near 3."""
    logits, _, labels = rows(4000, 1)
    grid = np.linspace(0.5, 8, 751)
    losses = [-np.log(softmax(logits / one)[np.arange(4000), labels]).mean() for one in grid]
    assert made.temperature == pytest.approx(grid[np.argmin(losses)], abs=0.01)
    assert made.temperature == pytest.approx(3, abs=0.3)


@pytest.mark.parametrize("adapted", [False, True])
def test_against_plain_loops(made: Estimates, adapted: bool) -> None:
    """Both formulas, row by row, on requests of 5 and 7 rows of few classes."""
    logits, features, _ = rows(12, 2, 0.5, np.array([0] * 5 + [1, 1, 2, 1, 1, 2, 1]))
    found = made.estimate(logits, features, head(), Requests(np.array([5, 7])), adapted)
    assert made.masks is not None
    for request, chosen in enumerate((range(5), range(5, 12))):
        sure, changed, collisions, pairs = 0, 0, 64 * made.collision, 64
        p = softmax(logits.astype(np.float64))
        for i in chosen:
            q = softmax(logits[i : i + 1] / made.temperature)[0]
            sure += (q * np.log(q)).sum() / math.log(CLASSES) > made.threshold
            for mask in made.masks:
                dropped = scores(np.where(mask, features[i] / (1 - made.rate), 0))
                changed += dropped.argmax() != logits[i].argmax()
            for j in chosen:
                if i != j:
                    collisions, pairs = collisions + p[i] @ p[j], pairs + 1
        error = changed / len(chosen) / PASSES
        if adapted:
            error /= min(1, math.log(collisions / pairs) / math.log(made.collision)) ** 3
        expected = min(1, max(1 / CLASSES, 1 - error + made.offsets[adapted]))
        assert found.atc[request] == pytest.approx(sure / len(chosen))
        assert found.pdd[request] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("size", [1, 2, 4, 8, 16, 64, 250])
@pytest.mark.parametrize("adapted", [False, True])
def test_clean_requests_of_any_size_are_told_the_clean_accuracy(made: Estimates, size: int, adapted: bool) -> None:
    logits, features, labels = rows(8000, 3)
    requests = requests_of(size, 8000)
    found, truth = made.estimate(logits, features, head(), requests, adapted), accuracy(logits, labels, requests).mean()
    assert found.atc.mean() == pytest.approx(truth, abs=0.02)
    assert found.pdd.mean() == pytest.approx(truth, abs=0.02)


@pytest.mark.parametrize("strength", [0.8, 0.6, 0.3])
def test_the_estimates_fall_with_the_accuracy(made: Estimates, strength: float) -> None:
    """On rows with less of a class to them than it has seen: nearer to the truth than its mean confidence by far."""
    logits, features, labels = rows(6400, 4, strength)
    truth, requests = (logits.argmax(1) == labels).mean(), requests_of(64, 6400)
    found = made.estimate(logits, features, head(), requests, False)
    gap = abs(softmax(logits).max(1).mean() - truth)
    assert truth < made.accuracy - 0.05
    for one in found:
        assert one.mean() < made.accuracy - 0.02
        assert abs(one.mean() - truth) < 0.75 * gap, (one.mean(), truth, gap)


def test_a_collapse_counts_where_weights_adapt(made: Estimates) -> None:
    """Rows of one class: of an adapted model that looks like a collapse, of the frozen source like what it is."""
    logits, features, labels = rows(640, 5, labels=np.zeros(640, np.int64))
    requests = requests_of(64, 640)
    truth = accuracy(logits, labels, requests).mean()
    assert made.estimate(logits, features, head(), requests, False).pdd.mean() == pytest.approx(truth, abs=0.1)
    assert (made.estimate(logits, features, head(), requests, True).pdd < truth - 0.3).all()


def test_every_request_by_its_own_head_and_in_any_company(made: Estimates) -> None:
    _, features, _ = rows(60, 6)
    generator = np.random.default_rng(6)
    weight = head().weight + generator.normal(0, 0.3, (3, CLASSES, DIMENSION)).astype(np.float32)
    bias = generator.normal(0, 1, (3, CLASSES)).astype(np.float32)
    starts = np.array([0, 10, 35, 60])
    parts = [features[starts[one] : starts[one + 1]] for one in range(3)]
    logits = [part @ weight[one].T + bias[one] for one, part in enumerate(parts)]
    together = made.estimate(
        np.concatenate(logits), features, Head(weight, bias), Requests(np.array([10, 25, 25])), True
    )
    for one in range(3):
        requests = Requests(np.array([len(parts[one])]))
        alone = made.estimate(logits[one], parts[one], Head(weight[one], bias[one]), requests, True)
        assert alone.atc[0] == pytest.approx(together.atc[one])
        assert alone.pdd[0] == pytest.approx(together.pdd[one])
    assert len(set(together.pdd.tolist())) == 3
    unbiased = made.estimate(np.concatenate(logits), features, Head(weight), Requests(np.array([10, 25, 25])), True)
    zeros = Head(weight, np.zeros_like(bias))
    assert np.array_equal(
        unbiased.pdd, made.estimate(np.concatenate(logits), features, zeros, Requests(np.array([10, 25, 25])), True).pdd
    )


@pytest.mark.parametrize("where", ["logits", "features"])
def test_scores_that_are_not_finite_have_no_estimate(made: Estimates, where: str) -> None:
    logits, features, _ = rows(30, 7)
    (logits if where == "logits" else features)[12] = np.nan
    with np.errstate(all="ignore"):
        found = made.estimate(logits, features, head(), requests_of(10, 30), True)
    assert np.isnan(found.pdd).tolist() == [False, True, False]
    assert np.isnan(found.atc).tolist() == [False, where == "logits", False]


@pytest.mark.parametrize("what", ["none", "another", "shape"])
def test_without_a_linear_head_there_is_atc_alone(what: str) -> None:
    """No head, one that does not make these logits, and one of another shape."""
    logits, features, labels = rows(1000, 8)
    heads = {"none": None, "another": Head(head().weight), "shape": Head(head().weight[:, 1:], head().bias)}
    made = make_estimates(logits, features, labels, heads[what])
    found = made.estimate(logits, features, head(), requests_of(100, 1000), True)
    assert np.isfinite(found.atc).all()
    assert np.isnan(found.pdd).all()
    assert np.isnan(found.disagreement).all()
    assert any("not linear" in one for one in made.remarks)
    assert math.isfinite(made.spread[0])


def test_there_and_back(made: Estimates) -> None:
    """Through the bytes of an artefact file; small ones, with 2,048 features, too."""
    stored = safetensors.numpy.load(safetensors.numpy.save(made.tensors()))
    again = Estimates.of_tensors(stored)
    logits, features, _ = rows(640, 9, 0.8)
    one, other = (each.estimate(logits, features, head(), requests_of(64, 640), True) for each in (made, again))
    assert np.array_equal(one, other)
    assert replace(again, masks=None) == replace(made, masks=None)
    wide = replace(made, masks=np.ones((PASSES, 2048), np.bool_))
    assert len(safetensors.numpy.save(wide.tensors())) < 100_000
    bare = replace(made, masks=None)
    assert Estimates.of_tensors(bare.tensors()).masks is None


def test_the_same_rows_make_the_same(made: Estimates) -> None:
    again = make_estimates(*rows(4000, 1), head()).tensors()
    assert all(np.array_equal(value, again[name]) for name, value in made.tensors().items())


@pytest.mark.parametrize(("adapted", "place"), [(False, 1), (True, 2)])
def test_the_band_is_what_clean_requests_are_off_by(made: Estimates, adapted: bool, place: int) -> None:
    """At 64 rows and, by the square root, at 16; of rows that it has not seen."""
    logits, features, labels = rows(32_000, 10)
    for size in (64, 16):
        requests = requests_of(size, 32_000)
        found, truth = made.estimate(logits, features, head(), requests, adapted), accuracy(logits, labels, requests)
        assert made.band(size)[0] == pytest.approx((found.atc - truth).std(), rel=0.25)
        if size == 64:  # a smaller request's PDD is cut off at 1
            assert made.band(size)[place] == pytest.approx((found.pdd - truth).std(), rel=0.25)


def test_a_source_that_is_never_wrong(made: Estimates) -> None:
    """Threshold and rate exist all the same, and what they rest on is said."""
    logits, features, labels = rows(1000, 11, 4.0)
    assert (logits.argmax(1) == labels).all()
    perfect = make_estimates(logits, features, labels, head())
    found = perfect.estimate(logits, features, head(), requests_of(100, 1000), True)
    assert (found.atc > 0.95).all()
    assert (found.pdd > 0.95).all()
    assert perfect.wrong == 0 < FEW_WRONG <= made.wrong
    assert any("0 wrong" in one for one in perfect.remarks)
    assert made.remarks == []


def test_what_it_cannot_be_made_of() -> None:
    logits, features, labels = rows(LEAST_ROWS, 12)
    make_estimates(logits, features, labels, head())
    with pytest.raises(ValueError, match=rf"at least {LEAST_ROWS} clean rows, got {LEAST_ROWS - 1}"):
        make_estimates(logits[1:], features[1:], labels[1:], head())
    logits[3, 2] = np.inf
    with pytest.raises(ValueError, match="not finite"):
        make_estimates(logits, features, labels, head())
