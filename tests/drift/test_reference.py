"""What clean data look like: z-scores of clean requests, the file's round trip, bands."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import safetensors.numpy
from numpy.typing import NDArray

from tta_server.drift.reference import LEAST_ROWS, MOST, TABLED, TOLERATED, CleanRows, Reference, make_reference
from tta_server.drift.signals import (
    SIGNALS,
    LayerStatistics,
    Requests,
    Scores,
    Values,
    bn_distances,
    of_served,
    of_source,
)

CLASSES, DIMENSION, CHANNELS = 5, 8, 12
LAYERS = LayerStatistics(np.zeros(CHANNELS), np.ones(CHANNELS), np.full(CHANNELS, 1e-5), np.arange(0, CHANNELS, 4))


def clean_rows(count: int, seed: int, offset: float = 0.0) -> CleanRows:
    """Rows of a made-up source: classes in clusters, confident scores, channels near their statistics."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, CLASSES, count)
    logits = generator.normal(0, 1.5, (count, CLASSES)) + 6 * np.eye(CLASSES)[labels]
    centres = np.random.default_rng(0).normal(0, 2, (CLASSES, DIMENSION))
    features = centres[labels] + generator.normal(offset, 1, (count, DIMENSION))
    means = generator.normal(offset, 0.4, (count, CHANNELS)) + 0.2 * np.arange(CHANNELS) / CHANNELS
    return CleanRows(logits, features, means, generator.gamma(8, 0.1, (count, CHANNELS)))


def signals(rows: CleanRows, sizes: NDArray[np.int64], reference: Reference) -> Values:
    """All tabled signals of these rows as requests of so many rows, one after the other."""
    requests, scores = Requests(sizes), Scores(rows.logits)
    ranked = np.sort(scores.probabilities, 1)
    values = of_served(scores, ranked[:, -1], ranked[:, -1] - ranked[:, -2], requests)
    values |= of_source(scores, rows.features, reference.features, requests)
    mean = requests.mean(rows.means)
    var = requests.mean(rows.vars + np.square(rows.means)) - np.square(mean)
    return values | bn_distances(mean, var, LAYERS)


@pytest.fixture(scope="module")
def reference() -> Reference:
    # So many that what they are themselves off by is little beside the noise of 256 rows.
    return make_reference(clean_rows(40_000, 1), LAYERS, 1)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 12, 24, 64, 100, 256])
def test_clean_requests_have_z_scores_of_mean_0_and_deviation_1(reference: Reference, size: int) -> None:
    sizes = np.full(400, size)
    values = signals(clean_rows(400 * size, 7), sizes, reference)
    assert values.keys() == set(TABLED)
    for name, z in reference.zscores(values, sizes).items():
        if values[name].std() < 1e-9:  # one row has one class, however sure the source is of it
            continue
        assert abs(z.mean()) < 0.3, (name, z.mean())
        assert 0.8 < z.std() < 1.25, (name, z.std())


@pytest.mark.parametrize("size", [1, 8, 64])
def test_requests_from_elsewhere_have_larger_distances(reference: Reference, size: int) -> None:
    sizes = np.full(50, size)
    z = reference.zscores(signals(clean_rows(50 * size, 7, offset=1.0), sizes, reference), sizes)
    for name in ("feature_distance", "bn_distance", "bn_distance_max", "bn_distance_late"):
        assert z[name].mean() > 0.5, name


def test_a_z_score_is_gap_over_deviation(reference: Reference) -> None:
    sizes = np.array([4, 6])
    values = signals(clean_rows(10, 3), sizes, reference)
    z = reference.zscores(values, sizes)
    share = np.log(6 / 4) / np.log(2)
    for row, name in enumerate(TABLED):
        told = np.log(values[name]) if SIGNALS[name].log else values[name]
        mean, sd = reference.mean[row], reference.sd[row]
        four, eight = reference.sizes.tolist().index(4), reference.sizes.tolist().index(8)
        assert z[name][0] == pytest.approx((told[0] - mean[four]) / sd[four])
        between = [(1 - share) * table[four] + share * table[eight] for table in (mean, sd)]
        assert z[name][1] == pytest.approx((told[1] - between[0]) / between[1])


@pytest.mark.parametrize(("rows", "largest"), [(LEAST_ROWS, 32), (1000, 128), (40_000, MOST)])
def test_tables_end_where_requests_would_be_too_much_alike(rows: int, largest: int) -> None:
    """The tables come from half of the rows, and no request from more than half of these."""
    made = make_reference(clean_rows(rows, 1), LAYERS, 0)
    assert made.sizes.tolist() == [2**power for power in range(largest.bit_length())]


@pytest.mark.parametrize("name", ["feature_distance", "bn_distance"])
def test_what_is_tolerated_is_a_share_of_a_single_rows_distance(reference: Reference, name: str) -> None:
    sizes, mean = reference.sizes, reference.mean[TABLED.index(name)]
    tolerated = {name: np.exp(mean) + TOLERATED * np.exp(mean[0])}
    allowance = reference.allowance(name, sizes)
    np.testing.assert_allclose(reference.zscores(tolerated, sizes)[name], allowance, rtol=1e-9, atol=1e-9)
    assert (np.diff(allowance) > 0).all()
    assert allowance[0] < 0.5


def test_sizes_beyond_the_table_are_held_against_its_end(reference: Reference) -> None:
    values = {"confidence": np.array([0.9, 0.9])}
    z = reference.zscores(values, np.array([reference.sizes[-1], 100 * reference.sizes[-1]]))["confidence"]
    assert z[0] == z[1]


def test_the_file_keeps_everything(reference: Reference) -> None:
    stored = safetensors.numpy.load(safetensors.numpy.save(reference.tensors()))
    same = Reference.of_tensors(stored)
    for field in fields(Reference):
        one, other = getattr(reference, field.name), getattr(same, field.name)
        if field.name == "features":
            np.testing.assert_array_equal(one.mean, other.mean)
            np.testing.assert_array_equal(one.second, other.second)
        else:
            np.testing.assert_array_equal(one, other)
            assert one.dtype == other.dtype


def test_a_signal_that_an_older_file_does_not_know_is_not_compared(reference: Reference) -> None:
    stored = reference.tensors()
    del stored["table.margin"]
    older = Reference.of_tensors(stored)
    values = {"margin": np.array([0.5]), "entropy": np.array([0.1])}
    z = older.zscores(values, np.array([3]))
    assert np.isfinite(z["entropy"]).all()
    assert "margin" not in z
    expected = reference.bands(3)
    del expected["margin"]
    assert older.bands(3) == expected


@pytest.mark.parametrize("size", [1, 8, 50])
def test_bands_hold_most_clean_requests(reference: Reference, size: int) -> None:
    sizes = np.full(400, size)
    values = signals(clean_rows(400 * size, 11), sizes, reference)
    bands = reference.bands(size)
    assert bands.keys() == set(TABLED)
    for name, (low, high) in bands.items():
        inside = (values[name] >= low) & (values[name] <= high)
        assert 0.9 < inside.mean() <= 1, name
        if SIGNALS[name].log:
            assert low > 0


def test_a_band_is_two_deviations_wide_to_either_side(reference: Reference) -> None:
    for size in (1, 3, 64):
        for index in (0, 1):
            ends = {name: np.array([band[index]]) for name, band in reference.bands(size).items()}
            for name, z in reference.zscores(ends, np.array([size])).items():
                assert z[0] == pytest.approx((-2, 2)[index]), name


def test_a_signal_without_a_table_has_no_z_score(reference: Reference) -> None:
    assert "agreement" not in reference.zscores({"agreement": np.ones(1)}, np.array([8]))


def test_without_batch_norms_their_signals_are_left_out() -> None:
    rows = clean_rows(400, 1)
    plain = CleanRows(rows.logits, rows.features, np.zeros((400, 0)), np.zeros((400, 0)))
    made = Reference.of_tensors(make_reference(plain, None, 0).tensors())
    assert made.bands(8).keys() == {name for name in TABLED if not name.startswith("bn_")}


def test_the_seed_decides_which_requests_are_drawn() -> None:
    rows = clean_rows(300, 1)
    one, same, other = (make_reference(rows, LAYERS, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one.mean, same.mean)
    assert not np.array_equal(one.mean, other.mean)
    np.testing.assert_array_equal(one.features.mean, other.features.mean)


def test_class_features_come_from_one_half_by_predicted_class() -> None:
    rows = clean_rows(300, 1)
    made = make_reference(rows, LAYERS, 0)
    labels = rows.logits.argmax(1)
    for label in range(CLASSES):
        own = rows.features[:150][labels[:150] == label]
        np.testing.assert_allclose(made.features.mean[label], own.mean(0))
        np.testing.assert_allclose(made.features.second[label] - np.square(own.mean(0)), own.var(0), rtol=1e-6)
    np.testing.assert_allclose(made.predicted, np.bincount(labels, minlength=CLASSES) / 300)


def test_a_class_that_is_never_predicted_is_like_all_rows_together() -> None:
    rows = clean_rows(300, 1)
    never = CleanRows(np.pad(rows.logits, ((0, 0), (0, 1)), constant_values=-50), rows.features, rows.means, rows.vars)
    made = make_reference(never, LAYERS, 0)
    np.testing.assert_allclose(made.features.mean[CLASSES], rows.features[:150].mean(0))
    assert made.predicted[CLASSES] == 0
    assert np.isfinite(made.mean).all()
    assert np.isfinite(made.sd).all()


def test_two_rows_are_enough() -> None:
    made = make_reference(clean_rows(2, 1), LAYERS, 0)
    assert np.isfinite(made.mean).all()
    assert (made.sd > 0).all()
