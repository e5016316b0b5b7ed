"""The figures that the guard's estimate rests on, against a slow count row by row; that they are a stream's own; and
the estimate."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import special, stats
from scipy.spatial import distance

from tta_server.drift.benefit import FIGURES, RIDGE, ROWS, UNPREPARED, Compared, Evidence, Judge, compare, figures, fit
from tta_server.drift.signals import Floats, Scores

CLASSES = 5
SIZES = st.lists(st.integers(1, 30), min_size=1, max_size=6)
SEEDS = st.integers(0, 2**32 - 1)


class Request:
    """What the three models say of some rows; ``known``: whether the source was asked."""

    def __init__(self, rows: int, seed: int, known: bool = True, classes: int = CLASSES) -> None:
        generator = np.random.default_rng(seed)
        self.rows, self.known = rows, known
        self.own, self.source = generator.normal(0, 3, (2, rows, classes))
        same = generator.random(rows) < 0.5
        self.source[same] = self.own[same]
        self.referee = generator.integers(0, classes, rows)


def compared_of(requests: list[Request]) -> Compared:
    """As the guards of one step would have it."""
    known = [one for one in requests if one.known]
    classes = requests[0].own.shape[1]
    return compare(
        Scores(np.concatenate([one.own for one in requests])),
        np.array([one.rows for one in requests]),
        Scores(np.concatenate([np.zeros((0, classes)), *(one.source for one in known)])),
        np.concatenate([np.zeros(0, np.int64), *(one.referee for one in known)]),
        np.flatnonzero(np.repeat([one.known for one in requests], [one.rows for one in requests])),
    )


def slow(requests: list[Request]) -> dict[str, float]:
    """The figures of one stream's requests, the newest last: each row weighs what is left of it, row by row."""
    weights, rows = list[float](), list[tuple[Floats, Floats | None, int]]()
    for one in requests:
        weights = [weight * max(0.0, 1 - one.rows / ROWS) for weight in weights] + [1.0] * one.rows
        rows += [
            (special.softmax(one.own[i]), special.softmax(one.source[i]) if one.known else None, int(one.referee[i]))
            for i in range(one.rows)
        ]
    every = [(weight, p) for weight, (p, _, _) in zip(weights, rows, strict=True)]
    both = [(weight, p, q, third) for weight, (p, q, third) in zip(weights, rows, strict=True) if q is not None]
    total, compared = sum(weights), sum(weight for weight, *_ in both)
    log = math.log(len(rows[0][0]))

    def share(values: list[float]) -> float:
        return sum(value * weight for value, (weight, *_) in zip(values, both, strict=True)) / compared

    m_a = np.sum([weight * p for weight, p in every], axis=0) / total
    m_s = np.sum([weight * q for weight, _, q, _ in both], axis=0) / compared
    e_a = sum(weight * stats.entropy(p) / log for weight, p in every) / total
    e_s = share([stats.entropy(q) / log for _, _, q, _ in both])
    return {
        "margin": share([(p.max() - q.max()) * (p.argmax() != q.argmax()) for _, p, q, _ in both]),
        "differs": share([float(p.argmax() != q.argmax()) for _, p, q, _ in both]),
        "information_adapted": stats.entropy(m_a) / log - e_a,
        "information_source": stats.entropy(m_s) / log - e_s,
        "entropy_adapted": e_a,
        "entropy_source": e_s,
        "divergence": distance.jensenshannon(m_a, m_s, 2) ** 2,
        "concentration_adapted": math.log(len(m_a) * sum(one**2 for one in m_a)),
        "concentration_source": math.log(len(m_s) * sum(one**2 for one in m_s)),
        "agrees_adapted": share([float(p.argmax() == third) for _, p, _, third in both]),
        "agrees_source": share([float(q.argmax() == third) for _, _, q, third in both]),
    }


def close(found: Floats, expected: Floats) -> None:
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-4)


# Figures


@given(SIZES, SEEDS, st.lists(st.booleans(), min_size=6, max_size=6))
@settings(max_examples=60, deadline=None)
def test_figures_are_those_of_a_slow_count(sizes: list[int], seed: int, known: list[bool]) -> None:
    requests = [Request(size, seed + i, one) for i, (size, one) in enumerate(zip(sizes, known, strict=False))]
    evidence = Evidence(CLASSES)
    for count, one in enumerate(requests, 1):
        found = evidence.update(["s"], compared_of([one]))
        if any(one.known and rest_of(requests[:count], i) > 1e-3 for i, one in enumerate(requests[:count])):
            expected = slow(requests[:count])
            assert expected.keys() == set(FIGURES)
            close(found[0], np.array([expected[name] for name in FIGURES]))


def rest_of(requests: list[Request], index: int) -> float:
    """What weight is left of the rows of a request."""
    return math.prod(max(0.0, 1 - one.rows / ROWS) for one in requests[index + 1 :])


@given(SIZES, SEEDS)
@settings(max_examples=30, deadline=None)
def test_a_stream_that_does_not_differ_from_its_source(sizes: list[int], seed: int) -> None:
    """Both sides' figures are the same, and the others 0."""
    evidence = Evidence(CLASSES)
    for i, size in enumerate(sizes):
        one = Request(size, seed + i)
        one.source = one.own
        found = dict(zip(FIGURES, evidence.update(["s"], compared_of([one]))[0].tolist(), strict=True))
    for name in ("margin", "differs", "divergence"):
        assert found[name] == pytest.approx(0, abs=1e-6)
    for name in ("information", "entropy", "concentration", "agrees"):
        assert found[f"{name}_adapted"] == pytest.approx(found[f"{name}_source"], abs=1e-5)


def test_before_anything_was_compared_nothing_is_known() -> None:
    """But of the adapted model alone; whatever comes of a judge, it is not a number."""
    evidence = Evidence(CLASSES)
    for seed in range(5):
        found = evidence.update(["s"], compared_of([Request(7, seed, known=False)]))
        assert np.isnan(UNPREPARED.benefit(found)).all()
    found = evidence.update(["s"], compared_of([Request(7, 9)]))
    assert np.isfinite(UNPREPARED.benefit(found)).all()


def test_what_was_compared_long_ago_is_forgotten() -> None:
    evidence = Evidence(CLASSES)
    evidence.update(["s"], compared_of([Request(7, 1)]))
    found = evidence.update(["s"], compared_of([Request(ROWS, 2, known=False)]))
    assert np.isnan(UNPREPARED.benefit(found)).all()


# A stream's own


@given(SIZES, SEEDS, st.randoms())
@settings(max_examples=40, deadline=None)
def test_figures_do_not_depend_on_company(sizes: list[int], seed: int, random: object) -> None:
    """Streams in one step, in any order, and each by itself: the same, bit for bit."""
    names = [f"s{i}" for i in range(len(sizes))]
    alone, together = {name: Evidence(CLASSES) for name in names}, Evidence(CLASSES)
    for turn in range(4):
        requests = {
            name: Request(size, seed + 100 * turn + i, known=(seed + turn + i) % 3 > 0)
            for i, (name, size) in enumerate(zip(names, sizes, strict=True))
        }
        order = [name for name in names if (seed >> turn + len(name)) % 5]
        random.shuffle(order)  # type: ignore[attr-defined]
        if not order:
            continue
        found = together.update(order, compared_of([requests[name] for name in order]))
        for name, own in zip(order, found, strict=True):
            np.testing.assert_array_equal(own, alone[name].update([name], compared_of([requests[name]]))[0])


def test_a_place_that_was_given_back_is_empty() -> None:
    evidence = Evidence(CLASSES)
    evidence.update(["old"], compared_of([Request(9, 1)]))
    evidence.forget("old")
    evidence.forget("never there")
    new = evidence.update(["new"], compared_of([Request(9, 2)]))
    np.testing.assert_array_equal(new, Evidence(CLASSES).update(["new"], compared_of([Request(9, 2)])))
    again = evidence.update(["old"], compared_of([Request(9, 3)]))
    np.testing.assert_array_equal(again, Evidence(CLASSES).update(["old"], compared_of([Request(9, 3)])))


def test_more_streams_than_there_was_room_for() -> None:
    evidence = Evidence(CLASSES)
    first = [evidence.update([i], compared_of([Request(3, i)]))[0] for i in range(300)]
    for i in range(300):
        expected = Evidence(CLASSES)
        np.testing.assert_array_equal(expected.update([i], compared_of([Request(3, i)]))[0], first[i])
        np.testing.assert_array_equal(
            evidence.update([i], compared_of([Request(2, i + 1000)])),
            expected.update([i], compared_of([Request(2, i + 1000)])),
        )


def test_older_rows_lose_weight_with_each_row() -> None:
    """After 16 rows, of what came before 3/4 are left; after a request of ``ROWS``, nothing."""
    evidence = Evidence(CLASSES)
    big = Request(ROWS, 0)
    evidence.update(["s"], compared_of([big]))
    for rows in (16, 16, 1):
        evidence.update(["s"], compared_of([Request(rows, rows)]))
    last = Request(ROWS, 5)
    np.testing.assert_array_equal(
        evidence.update(["s"], compared_of([last])), Evidence(CLASSES).update(["s"], compared_of([last]))
    )
    calm, small = Request(16, 7), Request(16, 8)
    calm.source, calm.own = (np.eye(CLASSES)[np.full(16, one)] * 99 for one in (0, 1))
    small.source = small.own = np.eye(CLASSES)[np.full(16, 2)] * 99
    evidence = Evidence(CLASSES)
    evidence.update(["s"], compared_of([calm]))
    (found,) = evidence.update(["s"], compared_of([small]))
    assert found[FIGURES.index("differs")] == pytest.approx(12 / (12 + 16), rel=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_scores_that_were_not_finite_are_forgotten(bad: float) -> None:
    evidence = Evidence(CLASSES)
    broken = Request(8, 1)
    broken.own = np.full_like(broken.own, bad)
    with np.errstate(all="ignore"):
        evidence.update(["s"], compared_of([broken]))
        for seed in range(50):
            found = evidence.update(["s"], compared_of([Request(ROWS, seed)]))
    assert np.isfinite(found).all()


@pytest.mark.parametrize("classes", [1, 2, 1000])
def test_any_number_of_classes(classes: int) -> None:
    found = Evidence(classes).update(["s"], compared_of([Request(20, 1, classes=classes)]))
    assert np.isfinite(found).all()


def test_certain_answers_have_figures() -> None:
    """Probabilities of exactly 0 and 1."""
    one = Request(20, 1)
    one.own, one.source = one.own * 1e4, one.source * 1e4
    assert np.isfinite(Evidence(CLASSES).update(["s"], compared_of([one]))).all()


def test_figures_of_sums_do_not_depend_on_how_many_rows_they_are_of() -> None:
    parts = compared_of([Request(11, 3)])
    close(figures(*(3 * part for part in parts)), figures(*parts))


# The estimate


def drawn(count: int, seed: int = 0) -> tuple[Floats, NDArray[np.float64]]:
    generator = np.random.default_rng(seed)
    seen = generator.normal(0, generator.uniform(0.1, 1, len(FIGURES)), (count, len(FIGURES))) + 0.3
    return seen, generator.choice([16.0, 64.0, 200.0], count)


def test_a_fit_finds_the_weights_that_were_there() -> None:
    """But for the ridge, which takes its share of the weights of figures that do not go together."""
    seen, rows = drawn(20_000)
    weights = np.linspace(-0.4, 0.5, len(FIGURES))
    noise = np.random.default_rng(1).normal(0, 0.05, len(seen))
    judge = fit(seen, seen @ weights + 0.07 + noise, rows)
    np.testing.assert_allclose(judge.weights, weights / (1 + RIDGE), atol=0.01)


def test_the_spread_is_what_is_left() -> None:
    seen, rows = drawn(5_000)
    gained = np.random.default_rng(2).normal(0.1, 0.2, len(seen))
    judge = fit(seen, gained, rows)
    assert judge.spread == pytest.approx(0.2, rel=0.05)
    left = gained - (seen @ judge.weights + judge.offset)
    assert judge.spread == pytest.approx(math.sqrt(np.average(np.square(left), weights=rows)))


def test_streams_weigh_as_many_as_their_rows() -> None:
    """A stream of twice the rows counts as two."""
    seen, _ = drawn(50)
    gained = np.random.default_rng(3).normal(0, 0.2, 50)
    rows = np.full(50, 16.0)
    rows[::2] = 32.0
    twice = np.concatenate([seen, seen[::2]])
    heavy, light = fit(seen, gained, rows), fit(twice, np.concatenate([gained, gained[::2]]), np.full(75, 16.0))
    # The figures' means and deviations, which only the ridge depends on, do not count rows.
    np.testing.assert_allclose(heavy.weights, light.weights, rtol=0.2, atol=0.05)


def test_a_figure_that_never_changes_does_no_harm() -> None:
    seen, rows = drawn(200)
    seen[:, 3] = 0.25
    judge = fit(seen, seen[:, 0] * 0.5, rows)
    assert np.isfinite(judge.weights).all()
    assert judge.weights[3] == pytest.approx(0, abs=1e-6)


def test_a_judge_comes_back_from_its_artefacts() -> None:
    seen, rows = drawn(100)
    judge = fit(seen, seen[:, 1], rows)
    again = Judge.of_tensors(judge.tensors())
    np.testing.assert_array_equal(again.benefit(seen), judge.benefit(seen))
    assert (again.offset, again.spread) == (judge.offset, judge.spread)


def test_an_estimate_is_a_difference_of_two_shares() -> None:
    """Whatever is seen; and unknown where that is."""
    seen = np.full((3, len(FIGURES)), 1e6)
    seen[1] *= -1
    seen[2] = np.nan
    found = Judge(np.ones(len(FIGURES)), 0.0, 0.1).benefit(seen)
    np.testing.assert_array_equal(found, [1.0, -1.0, np.nan])


def test_unprepared_it_goes_by_who_is_surer_where_they_differ() -> None:
    """Just enough for the default guard where the policy is as sure as the source but for 0.03."""

    def of(gap: float, share: float) -> float:
        values = dict.fromkeys(FIGURES, 0.0) | {"margin": -gap * share, "differs": share}
        return float(UNPREPARED.benefit(np.array([list(values.values())]))[0])

    assert of(0.03, 0.4) == pytest.approx(of(0.03, 0.1)) == pytest.approx(UNPREPARED.offset)
    assert [one > other for one, other in pairwise(of(gap, 0.4) for gap in (0.0, 0.02, 0.03, 0.05))] == [True] * 3
