"""The monitor: its averages, verdicts and alarms, who may read them when, and that streams leave nothing behind."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from adapters.source import SourcePolicy
from tta_server.drift.monitor import HISTORY, HISTORY_SECONDS, LASTS, LEAST, Detection, Monitor, Verdict
from tta_server.drift.reference import TABLED, TOLERATED, Reference
from tta_server.drift.signals import DISTANCE, DRIFT, ClassFeatures, Floats, divergence, stability_index
from tta_server.types import Stream

HALF_LIFE = 20.0
NAN = float("nan")


def make_stream(name: str = "a") -> Stream:
    return Stream(name, "model", SourcePolicy(), 0, 0.0)


@pytest.fixture(scope="module")
def reference() -> Reference:
    """Clean values have logarithms (of distances) or values (of the rest) of mean 0 and deviation 1, whatever their
    size; two classes, one three times as frequent."""
    shape = (len(TABLED), 2)
    return Reference(
        ClassFeatures(np.zeros((2, 3)), np.ones((2, 3))),
        np.array([0.75, 0.25]),
        np.array([1, 256]),
        np.zeros(shape),
        np.ones(shape),
    )


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def tell(
    monitor: Monitor, stream: Stream, reference: Reference | None, size: int = 8, **values: float
) -> list[Detection]:
    """One request of one stream."""
    return monitor.update(
        [stream], np.array([size]), {name: np.array([value]) for name, value in values.items()}, reference
    )


def moving_average(values: list[float], half_life: float = HALF_LIFE) -> float:
    keep, count = 0.5 ** (1 / half_life), len(values)
    total = sum((1 - keep) * keep ** (count - 1 - index) * value for index, value in enumerate(values))
    return float(total / (1 - keep**count))


def test_averages_follow_their_formula(reference: Reference) -> None:
    monitor, stream = Monitor(HALF_LIFE), make_stream()
    told: list[float] = []
    for value in np.random.default_rng(0).uniform(0.5, 2, 30).tolist():
        told.append(value)
        tell(monitor, stream, reference, feature_distance=value, confidence=value / 2, loss=-value)
        readings = monitor.readings(stream)
        assert readings[DRIFT].value == pytest.approx(moving_average(told))
        assert readings["confidence"].value == pytest.approx(moving_average(told) / 2)
        assert readings["loss"].value == pytest.approx(-moving_average(told))
        assert readings[DRIFT].z == pytest.approx(moving_average(np.log(told).tolist()))
        assert readings["confidence"].z == pytest.approx(moving_average(told) / 2)
        assert monitor.drift(stream) == readings[DRIFT].z
    assert monitor.read(stream) == {name: one.value for name, one in monitor.readings(stream).items()}
    assert readings["loss"].z is None
    assert readings["loss"].band is None
    assert readings[DRIFT].band == pytest.approx((np.exp(-2), np.exp(2)))
    assert readings["confidence"].band == pytest.approx((-2, 2))


def test_levels_are_not_averaged_again(reference: Reference) -> None:
    monitor, stream = Monitor(HALF_LIFE), make_stream()
    for value in (0.1, 0.3, 0.2):
        tell(monitor, stream, reference, parameter_distance=value)
    assert monitor.read(stream)["parameter_distance"] == pytest.approx(0.2)


def test_labels_are_compared_with_clean_ones(reference: Reference) -> None:
    monitor, stream = Monitor(HALF_LIFE), make_stream()
    told: list[float] = []
    for share in (1.0, 0.5, 0.0, 0.25):
        told.append(share)
        monitor.update([stream], np.array([4]), {}, reference, np.array([[share, 1 - share]]))
        now = np.array([moving_average(told), 1 - moving_average(told)])
        read = monitor.read(stream)
        assert read["label_divergence"] == pytest.approx(float(divergence(now, reference.predicted)))
        assert read["label_psi"] == pytest.approx(float(stability_index(now, reference.predicted)))
    # An answer that says nothing of the stream's own leaves its shares as they were.
    monitor.update([stream], np.array([4]), {}, reference, np.array([[NAN, NAN]]))
    assert monitor.read(stream) == pytest.approx(read)


def test_another_reference_begins_comparing_again(reference: Reference) -> None:
    """As when a model's bundle is replaced: averages of values stay, what they were compared with does not count."""
    monitor, stream, generator = Monitor(HALF_LIFE), make_stream(), np.random.default_rng(0)
    for _ in range(40):
        tell(monitor, stream, reference, feature_distance=noisy(generator, 4), confidence=0.25)
    assert monitor.verdict(stream) is Verdict.DRIFTED
    farther = replace(reference, mean=reference.mean + 4)
    alarms = []
    told = [noisy(generator, 4) for _ in range(40)]
    for value in told:
        alarms += tell(monitor, stream, farther, feature_distance=value, confidence=0.25)
    assert not alarms
    assert monitor.verdict(stream) is Verdict.NEAR
    assert monitor.drift(stream) == pytest.approx(moving_average((np.log(told) - 4).tolist()))
    assert monitor.read(stream)["confidence"] == pytest.approx(0.25)


@dataclass(frozen=True)
class Request:
    """What a stream is told of."""

    stream: int
    size: int
    drift: float
    distance: float
    loss: float
    share: float


REQUESTS = st.lists(
    st.builds(
        Request,
        stream=st.integers(0, 4),
        size=st.integers(1, 300),
        drift=st.floats(1e-3, 1e3) | st.just(NAN),
        distance=st.floats(1e-3, 1e3) | st.just(NAN),
        loss=st.floats(-5, 5) | st.just(NAN),
        share=st.floats(0, 1) | st.just(NAN),
    ),
    min_size=1,
    max_size=60,
)


def feed(monitor: Monitor, streams: list[Stream], requests: list[Request], reference: Reference | None) -> list[str]:
    """One update with these requests, all of different streams; the alarms."""
    found = monitor.update(
        [streams[one.stream] for one in requests],
        np.array([one.size for one in requests]),
        {
            DRIFT: np.array([one.drift for one in requests]),
            DISTANCE: np.array([one.distance for one in requests]),
            "loss": np.array([one.loss for one in requests]),
        },
        reference,
        np.array([[one.share, 1 - one.share] for one in requests]),
    )
    return [f"{one.stream.id} {one.signal} {one.kind}" for one in found]


def groups(requests: list[Request], cuts: list[bool]) -> Iterator[list[Request]]:
    """The requests in their order, in groups without a stream twice; further cut where told."""
    group: list[Request] = []
    for index, request in enumerate(requests):
        if group and (any(one.stream == request.stream for one in group) or cuts[index % len(cuts)]):
            yield group
            group = []
        group.append(request)
    yield group


@given(requests=REQUESTS, cuts=st.lists(st.booleans(), min_size=1, max_size=20), known=st.booleans())
@settings(max_examples=60, deadline=None)
def test_any_grouping_is_as_one_by_one(
    reference: Reference, requests: list[Request], cuts: list[bool], known: bool
) -> None:
    streams = [make_stream(str(index)) for index in range(5)]
    used = reference if known else None
    alone, together = Monitor(HALF_LIFE, lambda: 0.0), Monitor(HALF_LIFE, lambda: 0.0)
    expected = [alarm for request in requests for alarm in feed(alone, streams, [request], used)]
    found = [alarm for group in groups(requests, cuts) for alarm in feed(together, streams, group, used)]
    assert sorted(found) == sorted(expected)
    for stream in streams:
        one, other = alone.readings(stream), together.readings(stream)
        assert one.keys() == other.keys()
        for name in one:
            assert other[name].value == pytest.approx(one[name].value, rel=1e-9, abs=1e-12)
            assert (other[name].z is None) == (one[name].z is None)
            assert other[name].z is None or other[name].z == pytest.approx(one[name].z, rel=1e-9, abs=1e-12)
            assert other[name].band == one[name].band
        assert together.verdict(stream) == alone.verdict(stream)


def everything(monitor: Monitor, stream: Stream) -> object:
    return (
        monitor.read(stream),
        monitor.readings(stream),
        monitor.drift(stream),
        monitor.agreement(stream),
        monitor.verdict(stream),
        monitor.past(stream),
    )


@pytest.mark.parametrize("reset", [False, True], ids=["another stream", "the stream itself"])
def test_a_forgotten_stream_leaves_nothing_to_the_next(reference: Reference, reset: bool) -> None:
    """In the same row, just after a change: what comes next is as the first stream of a fresh monitor."""
    clock = Clock()
    monitor, fresh = Monitor(HALF_LIFE, clock), Monitor(HALF_LIFE, clock)
    old = make_stream("old")
    for index in range(40):
        clock.now += 3
        far = 1.0 if index < 38 else 1e6
        tell(monitor, old, reference, feature_distance=far, bn_distance=far, agreement=0.1, loss=3.0)
        monitor.update([old], np.array([8]), {}, reference, np.array([[0.0, 1.0]]))
    assert monitor.verdict(old) is Verdict.CHANGING
    monitor.forget(old)
    assert len(monitor._rows) == 0
    new = old if reset else make_stream("new")
    for stream in (old, new):
        assert everything(monitor, stream) == everything(fresh, stream)
    generator = np.random.default_rng(0)
    for _ in range(60):
        values = {
            "feature_distance": np.exp(generator.normal(1.0, 1, 1)),
            "bn_distance": np.exp(generator.normal(0.5, 1, 1)),
            "agreement": generator.random(1),
        }
        shares = generator.dirichlet([1, 1], 1)
        alarms = [one.update([new], np.array([8]), values, reference, shares) for one in (monitor, fresh)]
        assert alarms[0] == alarms[1]
        assert everything(monitor, new) == everything(fresh, new)
        clock.now += 3


def test_more_streams_than_there_was_room_for(reference: Reference) -> None:
    monitor = Monitor(HALF_LIFE)
    streams = [make_stream(str(index)) for index in range(100)]
    for index, stream in enumerate(streams):
        tell(monitor, stream, reference, feature_distance=float(np.exp(index)), entropy=index / 100)
    assert len(monitor._rows) == 100
    for index, stream in enumerate(streams):
        assert monitor.drift(stream) == pytest.approx(index)
        assert monitor.read(stream)["entropy"] == pytest.approx(index / 100)
    for stream in streams[::2]:
        monitor.forget(stream)
    again = [make_stream(f"again {index}") for index in range(60)]
    for stream in again:
        tell(monitor, stream, reference, feature_distance=1.0)
    assert len(monitor._rows) == 110
    assert [monitor.drift(stream) for stream in again] == [0.0] * 60
    assert monitor.drift(streams[99]) == pytest.approx(99)


@pytest.mark.parametrize("value", [NAN, np.inf])
def test_what_was_not_measured_changes_nothing(reference: Reference, value: float) -> None:
    clock = Clock()
    monitor, stream = Monitor(HALF_LIFE, clock), make_stream()
    for _ in range(20):
        tell(monitor, stream, reference, feature_distance=1.0, bn_distance=2.0, agreement=0.5, loss=1.0)
    before = everything(monitor, stream)
    for _ in range(20):
        assert not tell(
            monitor, stream, reference, feature_distance=value, bn_distance=value, agreement=value, loss=value
        )
    assert everything(monitor, stream) == before
    assert not tell(monitor, stream, reference, feature_distance=1.0, bn_distance=2.0, agreement=0.5, loss=1.0)
    assert monitor.drift(stream) == pytest.approx(0)


def test_a_signal_never_measured_is_absent(reference: Reference) -> None:
    monitor, stream = Monitor(HALF_LIFE), make_stream()
    tell(monitor, stream, reference, feature_distance=NAN, confidence=0.5)
    assert monitor.read(stream) == {"confidence": 0.5}
    assert monitor.drift(stream) is None
    assert monitor.agreement(stream) is None
    assert monitor.verdict(stream) is Verdict.UNKNOWN


def noisy(generator: np.random.Generator, level: float) -> float:
    return float(np.exp(generator.normal(level, 1)))


def test_without_a_reference_changes_are_found_all_the_same() -> None:
    """Of a source without clean data, by its batch-norm distances; there is no drift score and no departure."""
    monitor, stream, generator = Monitor(HALF_LIFE), make_stream(), np.random.default_rng(0)
    quiet = [one for _ in range(100) for one in tell(monitor, stream, None, bn_distance=noisy(generator, 0))]
    assert not quiet
    assert monitor.verdict(stream) is Verdict.UNKNOWN
    alarms: list[Detection] = []
    while not alarms:
        alarms = tell(monitor, stream, None, bn_distance=noisy(generator, 5))
    assert alarms == [Detection(stream, DISTANCE, "change", None)]
    assert monitor.verdict(stream) is Verdict.CHANGING
    for _ in range(LASTS):
        tell(monitor, stream, None, bn_distance=noisy(generator, 5))
    assert monitor.verdict(stream) is Verdict.UNKNOWN
    assert monitor.drift(stream) is None
    assert all(one.z is None and one.band is None for one in monitor.readings(stream).values())


def test_the_life_of_a_verdict(reference: Reference) -> None:
    monitor, stream, generator = Monitor(HALF_LIFE), make_stream(), np.random.default_rng(0)
    verdicts: list[Verdict] = []
    alarms: list[tuple[str, str]] = []

    def live(level: float, requests: int) -> None:
        for _ in range(requests):
            found = tell(monitor, stream, reference, feature_distance=noisy(generator, level), bn_distance=1.0)
            alarms.extend((one.kind, one.signal) for one in found)
            verdicts.append(monitor.verdict(stream))

    assert monitor.verdict(stream) is Verdict.UNKNOWN
    live(0, 60)
    assert verdicts == [Verdict.UNKNOWN] * (LEAST - 1) + [Verdict.NEAR] * (61 - LEAST)
    assert not alarms
    live(5, 60)
    assert sorted(alarms) == [("change", DRIFT), ("departure", DRIFT)]
    away = verdicts[60:]
    first = away.index(Verdict.CHANGING)
    assert first < 6
    assert away[first : first + LASTS] == [Verdict.CHANGING] * LASTS
    assert set(away[first + LASTS :]) == {Verdict.DRIFTED}
    live(0, 60)
    back = verdicts[120:]
    assert back[0] is Verdict.DRIFTED
    assert back[-1] is Verdict.NEAR
    assert Verdict.CHANGING in back
    assert [kind for kind, _ in alarms].count("departure") == 1
    assert [kind for kind, _ in alarms].count("change") == 2


def test_a_stream_that_was_away_from_the_start_has_drifted_without_a_change(reference: Reference) -> None:
    monitor, stream, generator = Monitor(HALF_LIFE), make_stream(), np.random.default_rng(0)
    alarms = [one for _ in range(40) for one in tell(monitor, stream, reference, feature_distance=noisy(generator, 4))]
    assert [(one.kind, one.signal) for one in alarms] == [("departure", DRIFT)]
    assert alarms[0].drift == pytest.approx(4, abs=1.5)
    assert monitor.verdict(stream) is Verdict.DRIFTED


def test_a_distance_alone_is_an_alarm_but_no_verdict(reference: Reference) -> None:
    """Label-sorted clean streams move the batch-norm distance, and the feature distance not."""
    monitor, stream = Monitor(HALF_LIFE), make_stream()
    alarms = []
    for index in range(60):
        alarms += tell(monitor, stream, reference, feature_distance=1.0, bn_distance=1.0 if index < 20 else 200.0)
    assert {(one.kind, one.signal) for one in alarms} == {("departure", DISTANCE), ("change", DISTANCE)}
    assert monitor.verdict(stream) is Verdict.NEAR


def test_large_requests_may_be_as_far_away_as_is_tolerated(reference: Reference) -> None:
    """The same z-score speaks of a departure in small requests and of next to nothing in large ones."""
    mean = np.zeros_like(reference.mean)
    mean[:, 1] = -4.0  # distances of 256 rows
    falling = replace(reference, mean=mean)
    allowed = float(falling.allowance(DRIFT, np.array([256]))[0])
    assert allowed == pytest.approx(np.log1p(TOLERATED * np.exp(4)))
    for size, z, verdict in (
        (1, allowed, Verdict.DRIFTED),
        (256, allowed, Verdict.NEAR),
        (256, allowed + 1, Verdict.DRIFTED),
    ):
        monitor, stream = Monitor(HALF_LIFE), make_stream()
        for _ in range(50):
            tell(monitor, stream, falling, size=size, feature_distance=float(np.exp(z + (0.0 if size == 1 else -4.0))))
        assert monitor.drift(stream) == pytest.approx(z)
        assert monitor.verdict(stream) is verdict


def test_of_a_signal_that_the_reference_does_not_know_changes_are_found(reference: Reference) -> None:
    mean = reference.mean.copy()
    mean[TABLED.index(DISTANCE)] = np.nan
    older = replace(reference, mean=mean)
    monitor, stream, generator = Monitor(HALF_LIFE), make_stream(), np.random.default_rng(0)
    alarms = []
    for level in (0, 5):
        for _ in range(60):
            alarms += tell(monitor, stream, older, feature_distance=1.0, bn_distance=noisy(generator, level))
    assert [(one.kind, one.signal) for one in alarms] == [("change", DISTANCE)]


def test_a_survey_says_what_each_stream_says(reference: Reference) -> None:
    monitor, generator = Monitor(HALF_LIFE), np.random.default_rng(0)
    streams = [make_stream(str(index)) for index in range(30)]
    for _ in range(20):
        some = generator.permutation(25)[:10]
        values = {DRIFT: np.exp(some / 5), "confidence": generator.random(10)}
        monitor.update([streams[index] for index in some], np.full(10, 4), values, reference)
    survey = monitor.survey(streams)
    assert survey.verdicts() == [monitor.verdict(stream) for stream in streams]
    assert {Verdict.UNKNOWN, Verdict.NEAR, Verdict.DRIFTED} <= set(survey.verdicts())
    for scored in (False, True):
        for name in (DRIFT, "confidence", "no such signal"):
            for stream, value in zip(streams, survey.values(name, scored).tolist(), strict=True):
                own = monitor.readings(stream).get(name)
                expected = None if own is None else own.z if scored else own.value
                assert (None if np.isnan(value) else value) == expected


def test_the_recent_past_is_a_ring(reference: Reference) -> None:
    clock = Clock()
    monitor, stream = Monitor(1e-9, clock), make_stream()  # no memory: the averages are the last values
    assert monitor.past(stream) == {DRIFT: [], "confidence": [], "agreement": []}
    told = []
    for index in range(HISTORY + 40):
        told.append(round(index / 100, 4))
        tell(monitor, stream, reference, feature_distance=float(np.exp(told[-1])), confidence=told[-1])
        clock.now += HISTORY_SECONDS
        past = monitor.past(stream)
        assert past[DRIFT] == pytest.approx(told[-HISTORY:], abs=1e-4)
        assert past["confidence"] == pytest.approx(told[-HISTORY:], abs=1e-4)
        assert past["agreement"] == [None] * min(len(told), HISTORY)


def test_the_recent_past_has_a_point_every_few_seconds_at_most(reference: Reference) -> None:
    clock = Clock()
    monitor, stream = Monitor(1e-9, clock), make_stream()
    for index in range(20):
        tell(monitor, stream, reference, confidence=float(index))
        clock.now += HISTORY_SECONDS / 4
    assert monitor.past(stream)["confidence"] == [0, 4, 8, 12, 16]


def test_without_a_reference_the_past_shows_the_batch_norm_distance() -> None:
    monitor, stream = Monitor(HALF_LIFE, lambda: 0.0), make_stream()
    tell(monitor, stream, None, bn_distance=0.25)
    assert monitor.past(stream)[DRIFT] == [0.25]


def test_one_thread_may_read_while_another_writes(reference: Reference) -> None:
    """Streams come and go, new signals turn up, and no reader sees an error or a value that never was."""
    monitor = Monitor(5.0, lambda: 0.0)
    streams = [make_stream(str(index)) for index in range(300)]
    failures: list[BaseException] = []
    done = threading.Event()

    def guard(work: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            try:
                work()
            except BaseException as error:
                failures.append(error)
            finally:
                done.set()

        return run

    def check(values: Floats | list[float]) -> None:
        assert np.allclose(values, 1.0), values

    def write() -> None:
        generator = np.random.default_rng(0)
        for turn in range(400):
            some = [streams[index] for index in generator.permutation(min(300, 1 + turn))[:20]]
            ones: NDArray[np.float64] = np.ones(len(some))
            values = {DRIFT: np.exp(ones), "confidence": ones, f"signal {turn // 8}": ones}
            monitor.update(some, np.full(len(some), 4), values, reference, np.tile([0.5, 0.5], (len(some), 1)))
            for index in generator.permutation(300)[:3]:
                monitor.forget(streams[index])

    def read() -> None:
        while not done.is_set():
            survey = monitor.survey(streams)
            survey.verdicts()
            for name in ("confidence", "signal 3"):
                values = survey.values(name)
                check(values[~np.isnan(values)])
            for stream in streams[::7]:
                check([value for name, value in monitor.read(stream).items() if name[:5] in ("confi", "signa")])
                readings = monitor.readings(stream)
                check([one.z for name, one in readings.items() if name == DRIFT and one.z is not None])
                monitor.verdict(stream)
                monitor.agreement(stream)
                check([1.0 if drift is None else drift for drift in [monitor.drift(stream)]])
                check([value for value in monitor.past(stream)["confidence"] if value is not None])

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=guard(work)) for work in (write, read, read)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not failures, failures
