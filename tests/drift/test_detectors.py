"""The detectors: against plain loops, an oracle, and what theory says of their false alarms and delays."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tta_server.drift.detectors import LARGEST, LEAST_SPREAD, Change, Departure, Detector

Sequence = list[list[float | None]]
"""By stream, its values; ``None`` where a step goes without it."""

SEQUENCES = st.lists(st.lists(st.none() | st.floats(-20, 20), min_size=60, max_size=60), min_size=1, max_size=4)
MAKERS: dict[str, Callable[[], Detector]] = {
    "departure": lambda: Departure(0.5, 5.0),
    "change": lambda: Change(0.5, 5.0, 10.0, 5),
}


def jumping(streams: int, length: int, seed: int) -> NDArray[np.float64]:
    """Values ``[R, T]`` around a level that is another one every 15 values."""
    generator = np.random.default_rng(seed)
    levels = generator.choice([-4.0, 0.0, 4.0, 8.0], (streams, length // 15 + 1))
    return np.repeat(levels, 15, axis=1)[:, :length] + generator.normal(size=(streams, length))


def run(detector: Detector, values: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Values ``[R, T]`` -> where alarms begin, ``[R, T]``."""
    rows = np.arange(len(values))
    detector.grow(len(values))
    return np.stack([detector.update(rows, column) for column in values.T], axis=1)


def run_with_gaps(detector: Detector, sequences: Sequence) -> list[list[bool]]:
    """By stream, whether an alarm begins at each of the values it has."""
    detector.grow(len(sequences))
    found: list[list[bool]] = [[] for _ in sequences]
    for column in zip(*sequences, strict=True):
        rows = [row for row, value in enumerate(column) if value is not None]
        began = detector.update(np.array(rows, np.int64), np.array([column[row] for row in rows], np.float64))
        for row, flag in zip(rows, began.tolist(), strict=True):
            found[row].append(flag)
    return found


def slow_departure(values: list[float], slack: float, threshold: float) -> list[bool]:
    level, on, found = 0.0, False, []
    for value in values:
        level = min(threshold, max(0.0, level + max(-LARGEST, min(LARGEST, value)) - slack))
        now = level >= (threshold / 2 if on else threshold)
        found.append(now and not on)
        on = now
    return found


def slow_change(values: list[float], slack: float, threshold: float, half_life: float, learn: int) -> list[bool]:
    count, mean, var, up, down, found = 0, 0.0, 0.0, 0.0, 0.0, []
    for value in values:
        if count >= learn:
            deviation = math.sqrt(max(var, LEAST_SPREAD**2) * (1 + 1 / max(count, 1)))
            residual = max(-LARGEST, min(LARGEST, (value - mean) / deviation))
            up, down = max(0.0, up + residual - slack), max(0.0, down - residual - slack)
        if max(up, down) >= threshold:
            count, mean, var, up, down = 0, 0.0, 0.0, 0.0, 0.0
            found.append(True)
            continue
        count += 1
        share = max(1 / count, 1 - 0.5 ** (1 / half_life))
        var = (1 - share) * (var + share * (value - mean) ** 2)
        mean += share * (value - mean)
        found.append(False)
    return found


@given(sequences=SEQUENCES)
@settings(max_examples=60, deadline=None)
def test_detectors_equal_plain_loops(sequences: Sequence) -> None:
    own = [[value for value in stream if value is not None] for stream in sequences]
    departures = run_with_gaps(Departure(0.5, 5.0), sequences)
    assert departures == [slow_departure(values, 0.5, 5.0) for values in own]
    changes = run_with_gaps(Change(0.5, 5.0, 10.0, 5), sequences)
    assert changes == [slow_change(values, 0.5, 5.0, 10.0, 5) for values in own]


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_growing_keeps_the_streams_there_are(make: Callable[[], Detector]) -> None:
    values = jumping(3, 80, 0)
    expected = run(make(), values)
    assert expected.any(1).all()
    detector, found = make(), []
    detector.grow(3)
    for step, column in enumerate(values.T):
        if step % 10 == 9:
            detector.grow(4 + step)
        found.append(detector.update(np.arange(3), column))
    np.testing.assert_array_equal(np.stack(found, axis=1), expected)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_a_cleared_row_is_as_new_and_the_others_stay(make: Callable[[], Detector]) -> None:
    before, after = jumping(2, 40, 1), jumping(2, 80, 2)
    detector, unclear = make(), make()
    run(detector, before)
    detector.clear(0)
    run(unclear, before)
    found = run(detector, after)
    assert found[0].any()
    np.testing.assert_array_equal(found[0], run(make(), after)[0])
    np.testing.assert_array_equal(found[1], run(unclear, after)[1])


def test_departure_false_alarms_come_as_rarely_as_theory_says() -> None:
    """Siegmund's approximation of the mean number of values to a false alarm, for normal values."""
    slack, threshold, streams = 0.5, 4.0, 800
    reach = 2 * slack * (threshold + 1.166)
    expected = (math.exp(reach) - reach - 1) / (2 * slack**2)
    assert expected == pytest.approx(338, abs=1)
    began = run(Departure(slack, threshold), np.random.default_rng(0).normal(size=(streams, 4000)))
    assert began.any(1).all()
    first = began.argmax(1) + 1
    assert first.mean() == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize("shift", [1.0, 2.0, 4.0])
def test_departures_are_found_as_soon_as_theory_says(shift: float) -> None:
    """From level 0, after about ``h / (shift - k)`` values."""
    began = run(Departure(0.5, 10.0), np.random.default_rng(0).normal(shift, 1, (400, 200)))
    assert (began.argmax(1) + 1).mean() == pytest.approx(10 / (shift - 0.5), rel=0.2)


def test_departure_agrees_with_page_hinkley() -> None:
    """river's compares with the mean of all values so far: after very many zeros that stays 0, as our reference is."""
    river = pytest.importorskip("river.drift")
    generator = np.random.default_rng(0)
    for case in range(6):
        values = np.concatenate([generator.normal(0, 1, 60), generator.normal(0.3 * case, 1, 60)])
        oracle = river.PageHinkley(min_instances=1, delta=0.25, threshold=8.0, alpha=1.0, mode="up")
        for _ in range(100_000):
            oracle.update(0.0)
        fired = []
        for value in values.tolist():
            oracle.update(value)
            fired.append(oracle.drift_detected)
            if fired[-1]:
                break
        ours = run(Departure(0.25, 8.0), values[None, : len(fired)])[0].tolist()
        assert ours == fired


def test_one_outlier_alone_is_no_alarm() -> None:
    for outlier in (1e9, np.inf):
        departure = Departure(0.5, 10.0)
        assert not run(departure, np.array([[0.0, outlier, 0.0]])).any()
        assert departure.level[0] == LARGEST - 2 * 0.5
    noise = np.random.default_rng(0).normal(size=(1, 60))
    noise[0, 30] = 1e6
    assert not run(Change(0.75, 10.0, 50.0, 10), noise).any()


def test_a_departure_ends_as_quickly_as_it_began() -> None:
    """However long the stream was away."""
    for away in (5, 5000):
        departure = Departure(0.5, 10.0)
        began = run(departure, np.full((1, away), 3.0))[0]
        assert began.tolist() == [False] * 3 + [True] + [False] * (away - 4)
        assert departure.on[0]
        back = 0
        while departure.on[0]:
            run(departure, np.array([[-1.0]]))
            back += 1
        assert back == 4
        assert run(departure, np.full((1, 3), 3.0))[0].tolist() == [False, False, True]


@given(scale=st.floats(0.5, 100), offset=st.floats(-100, 100), seed=st.integers(0, 20))
@settings(max_examples=40, deadline=None)
def test_change_needs_no_clean_data(scale: float, offset: float, seed: int) -> None:
    """It finds the same in values of any unit and level."""
    generator = np.random.default_rng(seed)
    values = np.concatenate([generator.normal(0, 1, (4, 60)), generator.normal(2.5, 1, (4, 60))], axis=1)
    expected = run(Change(0.75, 10.0, 50.0, 10), values)
    assert expected[:, 60:].any()
    np.testing.assert_array_equal(run(Change(0.75, 10.0, 50.0, 10), scale * values + offset), expected)


@pytest.mark.parametrize("level", [0.0, 8.0])
def test_change_is_quiet_while_nothing_changes(level: float) -> None:
    values = np.random.default_rng(0).normal(level, 1, (100, 1000))
    assert run(Change(0.75, 10.0, 50.0, 10), values).mean() < 1e-4


@pytest.mark.parametrize("shift", [3.0, -3.0])
def test_change_finds_a_shift_once_and_then_is_used_to_it(shift: float) -> None:
    generator = np.random.default_rng(0)
    values = np.concatenate([generator.normal(0, 1, (100, 100)), generator.normal(shift, 1, (100, 300))], axis=1)
    began = run(Change(0.75, 10.0, 50.0, 10), values)
    assert not began[:, :100].any()
    delay = began[:, 100:].argmax(1) + 1
    assert began[:, 100:].any(1).all()
    assert np.quantile(delay, 0.9) <= 12
    assert began.sum(1).mean() < 1.1


def test_change_does_not_mind_dust_on_a_stream_that_stands_still() -> None:
    still = np.full((1, 40), 1.7)
    dusty = still + np.where(np.arange(40) >= 20, 0.02, 0.0)
    assert not run(Change(0.75, 10.0, 50.0, 10), dusty).any()
    moved = still + np.where(np.arange(40) >= 20, 1.0, 0.0)
    assert run(Change(0.75, 10.0, 50.0, 10), moved)[0, 20:23].any()


def test_change_only_learns_from_the_first_values() -> None:
    wild = np.random.default_rng(0).normal(0, 1, (50, 10)) * 10.0 ** np.arange(10)
    assert not run(Change(0.75, 10.0, 50.0, 10), wild).any()
