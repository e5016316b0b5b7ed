"""Delayed labels: what is remembered and for how long, and what the labels say, against plain recomputations."""

from __future__ import annotations

import gc
import json
import math
import tracemalloc
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from numpy.typing import NDArray
from scipy.stats import binomtest, multinomial

from tta_server.errors import BadInput, Conflict, UnknownName
from tta_server.trust.labels import (
    BINS,
    CALIBRATION_ROWS,
    MOST_CLASSES,
    OVERHEAD,
    Accuracy,
    Audits,
    Figures,
    Labelled,
    Limits,
    Prediction,
    Predictions,
    calibration_error,
    paired,
    wilson,
)


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def prediction(
    request: str = "r",
    rows: int = 3,
    time: float = 1_000_000.0,
    asked: list[int] | None = None,
    classes: int = 10,
    **others: Any,
) -> Prediction:
    mask = np.zeros(rows, np.bool_)
    mask[asked or []] = True
    made = Prediction(
        request=request,
        time=time,
        version=7,
        classes=classes,
        served=np.zeros(rows, np.int64),
        adapted=np.zeros(rows, np.int64),
        source=np.zeros(rows, np.int64),
        confidence=np.full(rows, 0.5),
        asked=mask,
    )
    return replace(made, **others)


def random_prediction(
    generator: np.random.Generator, request: str, rows: int, classes: int, probabilities: bool = True
) -> Prediction:
    """Served is adapted or source at random; some rows were not compared."""
    adapted, source = generator.integers(0, classes, (2, rows))
    source = np.where(generator.random(rows) < 0.4, adapted, source)
    served = np.where(generator.random(rows) < 0.5, adapted, source)
    p = generator.dirichlet(np.ones(classes), rows)
    return Prediction(
        request=request,
        time=1_000_000.0,
        version=1,
        classes=classes,
        served=served,
        adapted=np.where(generator.random(rows) < 0.1, -1, adapted),
        source=np.where(generator.random(rows) < 0.1, -1, source),
        confidence=p[np.arange(rows), served],
        asked=generator.random(rows) < 0.3,
        probabilities=p if probabilities else None,
    )


# What is remembered


def test_labels_are_judged_once_and_can_come_in_parts() -> None:
    clock = Clock()
    memory = Predictions(clock=clock)
    assert memory.add("s", prediction(asked=[1, 2], token="mine"))
    clock.now += 60
    first = memory.answer("s", "r", [4, None, 5])
    assert (first.rows.tolist(), first.labels.tolist()) == ([0, 2], [4, 5])
    assert (first.asked, first.repeated, first.missing, first.delay) == (1, 0, 1, 60.0)
    assert (first.prediction.token, first.prediction.version) == ("mine", 7)
    again = memory.answer("s", "r", [4, None, 5])
    assert (again.rows.tolist(), again.asked, again.repeated, again.missing) == ([], 0, 2, 1)
    rest = memory.answer("s", "r", [None, 0, 5])
    assert (rest.rows.tolist(), rest.labels.tolist(), rest.asked, rest.repeated, rest.missing) == ([1], [0], 1, 1, 0)
    assert memory.audits == memory.audits_of("s") == Audits(issued=2, answered=2)


def test_another_label_is_a_conflict_and_then_none_is_taken() -> None:
    memory = Predictions(clock=Clock())
    memory.add("s", prediction(asked=[0, 1]))
    memory.answer("s", "r", [None, 4, None])
    with pytest.raises(Conflict, match=r"row 1 of request 'r' has label 4 already, got 5"):
        memory.answer("s", "r", [1, 5, 1])
    assert memory.answer("s", "r", [2, 4, 2]).rows.tolist() == [0, 2]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([1, 2], r"has 3 rows: expected as many labels, got 2"),
        ([1, 2, 3, 4], r"expected as many labels, got 4"),
        ([1, 2, 10], r"row 2 of request 'r': expected a class from 0 to 9, or null, got 10"),
        ([1, -1, 2], r"row 1 .* got -1"),
        ([True, 1, 2], r"row 0 .* got True"),
        ([1, 2.0, 2], r"row 1 .* got 2\.0"),
        ([1, "2", 2], r"row 1 .* got '2'"),
    ],
)
def test_labels_that_do_not_fit_are_refused_and_change_nothing(labels: list[Any], message: str) -> None:
    memory = Predictions(clock=Clock())
    memory.add("s", prediction())
    with pytest.raises(BadInput, match=message):
        memory.answer("s", "r", labels)
    assert memory.answer("s", "r", [9, 9, 9]).repeated == 0


def test_only_what_was_served_to_the_stream_can_be_labelled() -> None:
    memory = Predictions(Limits(requests=5, bytes=10**5, seconds=30.0), Clock())
    memory.add("mine", prediction())
    for stream, request in (("other", "r"), ("mine", "q")):
        with pytest.raises(UnknownName) as error:
            memory.answer(stream, request, [1, 1, 1])
        for part in ("not served", "labels.requests = 5", "labels.bytes = 100000", "labels.seconds = 30"):
            assert part in str(error.value)


def test_the_newer_of_two_requests_with_one_id_stays() -> None:
    memory = Predictions(clock=Clock())
    memory.add("s", prediction(asked=[0, 1]))
    memory.answer("s", "r", [3, None, None])
    memory.add("s", prediction(rows=2))
    assert len(memory) == 1
    assert memory.answer("s", "r", [5, 5]).rows.tolist() == [0, 1]
    assert memory.audits == Audits(issued=2, answered=1, expired=1)


def test_the_oldest_go_first() -> None:
    clock = Clock()
    memory = Predictions(Limits(requests=2, seconds=100.0), clock)
    memory.add("s", prediction("a", asked=[0]))
    memory.add("t", prediction("a"))
    memory.add("s", prediction("b"))
    memory.add("s", prediction("c", time=clock.now + 50, asked=[2]))
    with pytest.raises(UnknownName):
        memory.answer("s", "a", [1, 1, 1])
    assert memory.audits_of("s") == Audits(issued=2, expired=1)
    assert memory.audits_of("t") == Audits()
    clock.now += 100
    assert len(memory) == 3
    memory.answer("t", "a", [1, 1, 1])
    clock.now += 1
    for stream, request in (("t", "a"), ("s", "b")):
        with pytest.raises(UnknownName):
            memory.answer(stream, request, [1, 1, 1])
    memory.answer("s", "c", [1, 1, None])
    clock.now += 50
    assert memory.asked("s") == []
    assert memory.audits_of("s") == memory.audits == Audits(issued=2, expired=2)
    assert (len(memory), memory.nbytes) == (0, 0)


def test_bytes_are_shared_by_all_streams() -> None:
    size = OVERHEAD + prediction().compact().nbytes + 3 * 4
    memory = Predictions(Limits(bytes=3 * size), Clock())
    for stream in "abc":
        memory.add(stream, prediction())
    assert (memory.nbytes, len(memory)) == (3 * size, 3)
    memory.add("d", prediction())
    assert (memory.nbytes, len(memory)) == (3 * size, 3)
    with pytest.raises(UnknownName):
        memory.answer("a", "r", [1, 1, 1])
    for stream in "bcd":
        memory.answer(stream, "r", [1, 1, 1])


def test_what_is_larger_than_all_room_drives_nothing_out() -> None:
    memory = Predictions(Limits(bytes=10_000), Clock())
    memory.add("s", prediction("small"))
    assert not memory.add("s", prediction("large", rows=5000, asked=[1, 2]))
    memory.answer("s", "small", [1, 1, 1])
    with pytest.raises(UnknownName):
        memory.answer("s", "large", [None] * 5000)
    assert memory.audits == Audits(issued=2, expired=2)


def test_labels_wanted_are_listed_newest_first() -> None:
    memory = Predictions(clock=Clock())
    memory.add("s", prediction("a", asked=[0, 2]))
    memory.add("s", prediction("b"))
    memory.add("s", prediction("c", asked=[1]))
    memory.add("t", prediction("d", asked=[1]))
    memory.answer("s", "a", [1, 1, None])
    wanted = memory.asked("s")
    assert [(one.request, one.rows, one.version) for one in wanted] == [("c", [1], 7), ("a", [2], 7)]
    memory.answer("s", "c", [None, 1, None])
    assert [one.request for one in memory.asked("s")] == ["a"]
    assert memory.asked("nobody") == []


def test_a_forgotten_stream_starts_afresh() -> None:
    memory = Predictions(clock=Clock())
    memory.add("s", prediction(asked=[0]))
    memory.add("t", prediction(asked=[0]))
    memory.forget("s")
    memory.forget("nobody")
    with pytest.raises(UnknownName):
        memory.answer("s", "r", [1, 1, 1])
    assert memory.audits_of("s") == Audits()
    assert memory.audits == Audits(issued=2, expired=1)
    assert memory.answer("t", "r", [1, 1, 1]).asked == 1


def test_what_is_kept_is_a_copy() -> None:
    columns: dict[str, type] = {
        "served": np.int16,
        "adapted": np.int16,
        "source": np.int16,
        "confidence": np.float32,
        "asked": np.bool_,
    }
    batch: dict[str, Any] = {name: np.zeros((1000, 3), kind) for name, kind in columns.items()}
    p = np.zeros((1000, 10), np.float16)
    memory = Predictions(clock=Clock())
    views = {name: column[:3, 1] for name, column in batch.items()}
    memory.add("s", replace(prediction(probabilities=p[:3]), **views))
    for column in (*batch.values(), p):
        column[:] = 1
    kept = memory.answer("s", "r", [1, 1, 1]).prediction
    for name in (*columns, "probabilities"):
        assert not getattr(kept, name).any()
        assert getattr(kept, name).base is None


@pytest.mark.parametrize(("classes", "kind"), [(2**15, np.int16), (2**15 + 1, np.int32)])
def test_classes_are_kept_in_the_smallest_type_that_holds_them(classes: int, kind: type) -> None:
    kept = prediction(served=np.full(3, classes - 1), classes=classes).compact()
    assert kept.served.dtype == kept.adapted.dtype == kept.source.dtype == kind
    assert kept.served.tolist() == [classes - 1] * 3


def test_probabilities_are_kept_for_few_classes_only() -> None:
    memory = Predictions(clock=Clock())
    for classes, kept in ((MOST_CLASSES, True), (MOST_CLASSES + 1, False)):
        p = np.full((3, classes), 1 / classes)
        memory.add("s", prediction(classes=classes, probabilities=p))
        labelled = memory.answer("s", "r", [classes - 1] * 3)
        assert (labelled.prediction.probabilities is not None) == kept
        accuracy = Accuracy()
        accuracy.update(labelled)
        assert (accuracy.summary().total.brier is not None) == kept


def test_arrays_that_do_not_fit_together_are_refused() -> None:
    for wrong in ({"source": np.zeros(2, np.int64)}, {"probabilities": np.zeros((3, 9))}):
        with pytest.raises(ValueError, match="do not all have 3 rows"):
            prediction(**wrong)


@pytest.mark.parametrize("streams", [1, 400])
@pytest.mark.parametrize(("rows", "classes"), [(1, 10), (64, 100), (200, 1000)])
def test_the_bytes_counted_are_no_less_than_those_used(streams: int, rows: int, classes: int) -> None:
    memory = Predictions(Limits(requests=10_000), Clock())
    probabilities = np.full((rows, classes), 1 / classes)
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for number in range(400):
            stream, request = f"stream-{number % streams:030}", f"request-{number:030}"
            memory.add(stream, prediction(request, rows, asked=[0], classes=classes, probabilities=probabilities))
        gc.collect()
        used = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert len(memory) == 400
    assert memory.nbytes / 3 < used < memory.nbytes


class Memory(RuleBasedStateMachine):
    """The memory beside a list of all that was ever added."""

    streams = st.sampled_from(["s", "t", "u"])
    requests = st.sampled_from(["a", "b", "c", "d", "e"])

    def __init__(self) -> None:
        super().__init__()
        self.clock, self.limits = Clock(), Limits(requests=3, bytes=6 * OVERHEAD, seconds=10.0)
        self.memory = Predictions(self.limits, self.clock)
        self.kept: list[dict[str, Any]] = []
        self.audits = Audits()
        self.audits_of = {stream: Audits() for stream in ("s", "t", "u")}

    def count(self, stream: str, what: str, rows: int) -> None:
        for audits in (self.audits, self.audits_of[stream]):
            setattr(audits, what, getattr(audits, what) + rows)

    def drop(self, gone: list[dict[str, Any]]) -> None:
        for one in gone:
            self.kept.remove(one)
            self.count(one["key"][0], "expired", len(one["asked"] - one["labels"].keys()))

    @rule(stream=streams, request=requests, rows=st.sampled_from([1, 3, 5, 300, 600]), asked=st.sets(st.integers(0, 5)))
    def add(self, stream: str, request: str, rows: int, asked: set[int]) -> None:
        asked = {row for row in asked if row < rows}
        made = prediction(request, rows, self.clock.now, sorted(asked))
        size = OVERHEAD + made.compact().nbytes + 4 * rows
        one = {"key": (stream, request), "asked": asked, "labels": {}, "rows": rows, "size": size}
        one["time"] = self.clock.now
        self.drop([old for old in self.kept if old["key"] == one["key"]])
        self.expire()
        self.count(stream, "issued", len(asked))
        assert self.memory.add(stream, made)
        while sum(old["size"] for old in self.kept) + size > self.limits.bytes:
            self.drop(self.kept[:1])
        mine = [old for old in self.kept if old["key"][0] == stream]
        self.drop(mine[: max(0, len(mine) + 1 - self.limits.requests)])
        self.kept.append(one)

    @rule(data=st.data())
    def answer(self, data: st.DataObject) -> None:
        known_keys = [one["key"] for one in self.kept]
        stream, request = data.draw(st.sampled_from([*known_keys, ("s", "never"), ("u", "a")]))
        self.expire()
        found = [one for one in self.kept if one["key"] == (stream, request)]
        if not found:
            with pytest.raises(UnknownName):
                self.memory.answer(stream, request, [1])
            return
        one, known = found[0], found[0]["labels"]
        given = data.draw(st.dictionaries(st.integers(0, min(one["rows"], 6) - 1), st.sampled_from([0, 0, 0, 0, 1])))
        labels = [given.get(row) for row in range(one["rows"])]
        if any(known.get(row, label) != label for row, label in given.items()):
            with pytest.raises(Conflict):
                self.memory.answer(stream, request, labels)
            return
        labelled = self.memory.answer(stream, request, labels)
        fresh = sorted(given.keys() - known.keys())
        assert labelled.rows.tolist() == fresh
        assert labelled.labels.tolist() == [given[row] for row in fresh]
        assert labelled.repeated == len(given) - len(fresh)
        assert labelled.asked == len(one["asked"] & set(fresh))
        self.count(stream, "answered", labelled.asked)
        known.update(given)
        assert labelled.missing == one["rows"] - len(known)

    @rule(stream=streams)
    def forget(self, stream: str) -> None:
        self.memory.forget(stream)
        self.drop([one for one in self.kept if one["key"][0] == stream])
        self.audits_of[stream] = Audits()

    @rule(seconds=st.floats(0, 8))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    def expire(self) -> None:
        self.drop([one for one in self.kept if one["time"] < self.clock.now - self.limits.seconds])

    @invariant()
    def they_agree(self) -> None:
        self.expire()
        for stream in ("s", "t", "u"):
            wanted = {one.request: one.rows for one in self.memory.asked(stream)}
            expected = {
                one["key"][1]: sorted(one["asked"] - one["labels"].keys())
                for one in reversed(self.kept)
                if one["key"][0] == stream and one["asked"] - one["labels"].keys()
            }
            assert list(wanted.items()) == list(expected.items())
            assert self.memory.audits_of(stream) == self.audits_of[stream]
        assert self.memory.nbytes == sum(one["size"] for one in self.kept) <= self.limits.bytes
        assert len(self.memory) == len(self.kept)
        assert self.memory.audits == self.audits
        assert self.audits.pending == sum(len(one["asked"] - one["labels"].keys()) for one in self.kept)


TestMemory = Memory.TestCase
TestMemory.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


# What the labels say


def labelled_in_parts(
    predictions: list[Prediction], labels: list[NDArray[np.int64]], order: list[tuple[int, list[int]]]
) -> list[Labelled]:
    """The labels of these rows of these requests, one posting after another."""
    memory = Predictions(clock=lambda: 1_000_010.0)
    for one in predictions:
        memory.add("s", one)
    return [
        memory.answer(
            "s",
            predictions[number].request,
            [int(label) if row in rows else None for row, label in enumerate(labels[number])],
        )
        for number, rows in order
    ]


def plain_figures(predictions: list[Prediction], labels: list[NDArray[np.int64]]) -> dict[str, Any]:
    """All figures but the intervals, row by row."""
    rows = [
        (bool(one.asked[i]), one.served[i], one.adapted[i], one.source[i], one.probabilities, i, label)
        for one, known in zip(predictions, labels, strict=True)
        for i, label in enumerate(known.tolist())
    ]
    both = [(adapted, source, label) for _, _, adapted, source, _, _, label in rows if adapted >= 0 and source >= 0]
    differ = [one for one in both if one[0] != one[1]]
    scores = [
        sum((float(p[i, k]) - (k == label)) ** 2 for k in range(p.shape[1]))
        for _, _, _, _, p, i, label in rows
        if p is not None
    ]
    n = len(both)
    return {
        "rows": len(rows),
        "asked": sum(asked for asked, *_ in rows),
        "served": sum(served == label for _, served, *_, label in rows) / len(rows),
        "adapted": sum(adapted == label for adapted, _, label in both) / n if n else None,
        "source": sum(source == label for _, source, label in both) / n if n else None,
        "benefit": sum(int(a == label) - int(s == label) for a, s, label in both) / n if n else None,
        "disagreements": len(differ),
        "adapted_right": sum(adapted == label for adapted, _, label in differ),
        "source_right": sum(source == label for _, source, label in differ),
        "neither_right": sum(label not in (adapted, source) for adapted, source, label in differ),
        "brier": float(np.mean(scores)) if scores else None,
    }


def values_of(figures: Figures) -> dict[str, Any]:
    return {
        name: value["value"] if isinstance(value, dict) else value
        for name, value in json.loads(json.dumps(asdict(figures))).items()
    }


@given(st.integers(0, 2**32 - 1), st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(2, 12), st.data())
@settings(deadline=None)
def test_labels_in_any_order_and_number_say_the_same(
    seed: int, sizes: list[int], classes: int, data: st.DataObject
) -> None:
    generator = np.random.default_rng(seed)
    predictions = [
        random_prediction(generator, f"r{number}", rows, classes, probabilities=bool(number % 3))
        for number, rows in enumerate(sizes)
    ]
    labels = [generator.integers(0, classes, rows) for rows in sizes]
    parts = [(number, [row]) for number, rows in enumerate(sizes) for row in range(rows)]
    repeats = data.draw(st.lists(st.sampled_from(parts), max_size=8))
    whole = [(number, list(range(rows))) for number, rows in enumerate(sizes)]
    order = data.draw(st.permutations(parts + repeats + data.draw(st.lists(st.sampled_from(whole), max_size=3))))
    accuracy = Accuracy()
    for labelled in labelled_in_parts(predictions, labels, list(order)):
        accuracy.update(labelled)
    summary, expected = accuracy.summary(), plain_figures(predictions, labels)
    assert values_of(summary.total) == pytest.approx(expected, abs=2e-3)
    assert values_of(summary.recent) == pytest.approx(values_of(summary.total), abs=1e-6)
    exact = plain_figures([one.compact() for one in predictions], labels)
    assert values_of(summary.total)["brier"] == pytest.approx(exact["brier"], abs=1e-6)
    assert (summary.mean_delay, summary.last_delay) == (10.0, 10.0)
    assert summary.total.disagreements == (
        summary.total.adapted_right + summary.total.source_right + summary.total.neither_right
    )


def labelled_rows(generator: np.random.Generator, rows: int, delay: float = 1.0) -> tuple[Labelled, Prediction]:
    one = random_prediction(generator, "r", rows, 4).compact()
    labels = generator.integers(0, 4, rows).astype(np.int32)
    return Labelled(one, np.arange(rows), labels, 0, 0, 0, delay), one


def test_recent_figures_are_those_of_the_last_rows() -> None:
    generator = np.random.default_rng(0)
    accuracy, predictions, labels = Accuracy(window=50), [], []
    for rows in (20, 7, 90, 1, 30, 33):
        labelled, one = labelled_rows(generator, rows)
        predictions.append(one)
        labels.append(labelled.labels.astype(np.int64))
        accuracy.update(labelled)
    summary = accuracy.summary()
    assert values_of(summary.total) == pytest.approx(plain_figures(predictions, labels), abs=1e-6)
    # The last 50 rows: the last 17 of the one before, then 33.
    last = replace(
        predictions[-2],
        **{name: getattr(predictions[-2], name)[-17:] for name in ("served", "adapted", "source", "confidence")},
        asked=predictions[-2].asked[-17:],
        probabilities=None if predictions[-2].probabilities is None else predictions[-2].probabilities[-17:],
    )
    expected = plain_figures([last, predictions[-1]], [labels[-2][-17:], labels[-1]])
    assert values_of(summary.recent) == pytest.approx(expected, abs=1e-6)


def test_nothing_is_known_without_labels() -> None:
    accuracy = Accuracy()
    accuracy.update(Labelled(prediction(), np.zeros(0, np.int64), np.zeros(0, np.int32), 0, 3, 0, 5.0))
    summary = accuracy.summary()
    for figures in (summary.recent, summary.total):
        assert {figures.served, figures.adapted, figures.source, figures.benefit, figures.brier} == {None}
        assert (figures.rows, figures.disagreements) == (0, 0)
    assert {summary.calibration_error, summary.mean_delay, summary.last_delay} == {None}


def test_both_predictors_are_judged_on_the_same_rows_only() -> None:
    one = prediction(rows=4, adapted=np.array([1, 1, -1, 2]), source=np.array([0, -1, 0, 2]), served=np.array([1] * 4))
    accuracy = Accuracy()
    accuracy.update(Labelled(one, np.arange(4), np.array([1, 1, 1, 1], np.int32), 0, 0, 0, 0.0))
    total = accuracy.summary().total
    assert total.served is not None
    assert total.adapted is not None
    assert total.source is not None
    assert (total.served.value, total.served.rows) == (1.0, 4)
    assert (total.adapted.value, total.source.value, total.adapted.rows) == (0.5, 0.0, 2)
    assert (total.disagreements, total.adapted_right) == (1, 1)


def test_the_window_does_not_grow_in_memory() -> None:
    generator = np.random.default_rng(0)
    accuracy = Accuracy()
    large, _ = labelled_rows(generator, 20_000)
    small, _ = labelled_rows(generator, 1)
    accuracy.update(small)
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(20):
            accuracy.update(small)
            accuracy.update(large)
        gc.collect()
        used = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert 14_000 <= used < 20_000


# Intervals


@given(st.integers(1, 5000), st.data())
def test_share_intervals_are_those_of_scipy(rows: int, data: st.DataObject) -> None:
    right = data.draw(st.integers(0, rows))
    found = wilson(right, rows)
    expected = binomtest(right, rows).proportion_ci(0.95, "wilson")
    assert found is not None
    assert (found.value, found.rows) == (right / rows, rows)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert 0 <= found.low <= found.value <= found.high <= 1


def test_the_interval_of_the_benefit_is_the_published_one() -> None:
    # R package statpsych, ci.prop.ps(.05, 12, 4, 26, 6): 0.44, from 0.2548067 to 0.6251933
    found = paired(26, 4, 48)
    assert found is not None
    assert (found.low, found.high) == pytest.approx((0.2548067, 0.6251933), abs=1e-7)
    assert found.value == pytest.approx(22 / 48)
    assert paired(0, 0, 0) is None


@given(st.integers(0, 2000), st.integers(0, 2000), st.integers(0, 2000))
def test_the_interval_of_the_benefit_is_sane(gained: int, lost: int, same: int) -> None:
    rows = gained + lost + same
    found, turned = paired(gained, lost, rows), paired(lost, gained, rows)
    if found is None or turned is None:
        assert rows == 0
        return
    assert -1 <= found.low <= found.value <= found.high <= 1
    assert (turned.value, turned.rows) == (-found.value, rows)
    assert (turned.low, turned.high) == pytest.approx((-found.high, -found.low))


@pytest.mark.parametrize("rows", [20, 60])
@pytest.mark.parametrize(("p", "q"), [(0.02, 0.01), (0.05, 0.05), (0.1, 0.3), (0.4, 0.1), (0.3, 0.3), (0.05, 0.6)])
def test_the_interval_of_the_benefit_covers_the_truth(rows: int, p: float, q: float) -> None:
    """The exact probability, by summing over all tables."""
    covered = 0.0
    for gained in range(rows + 1):
        for lost in range(rows + 1 - gained):
            found = paired(gained, lost, rows)
            assert found is not None
            if found.low <= p - q <= found.high:
                covered += multinomial.pmf([gained, lost, rows - gained - lost], rows, [p, q, 1 - p - q])
    assert covered >= 0.93


# Calibration


@given(st.integers(0, 2**32 - 1), st.integers(CALIBRATION_ROWS // BINS, 80), st.sampled_from([2, 10, 100, 10_000]))
@settings(max_examples=50, deadline=None)
def test_calibration_error_is_that_of_scikit_learn(seed: int, in_bin: int, levels: int) -> None:
    """Where the number of rows is a multiple of that of bins, so that no interpolated edge is a row's confidence."""
    curve = pytest.importorskip("sklearn.calibration").calibration_curve
    rows = in_bin * BINS
    generator = np.random.default_rng(seed)
    p = generator.integers(0, levels + 1, rows) / levels
    right = generator.random(rows) < p**2
    accuracy, confidence = curve(right, p, n_bins=BINS, strategy="quantile", pos_label=True)
    edges = np.percentile(p, np.linspace(0, 100, BINS + 1))[1:-1]
    sizes = np.bincount(np.searchsorted(edges, p))
    expected = np.abs(accuracy - confidence) @ sizes[sizes > 0] / rows
    assert calibration_error(p, right) == pytest.approx(expected, abs=1e-12)


@given(st.integers(0, 2**32 - 1), st.integers(CALIBRATION_ROWS, 1200))
@settings(max_examples=50, deadline=None)
def test_calibration_error_has_bins_of_equal_numbers(seed: int, rows: int) -> None:
    generator = np.random.default_rng(seed)
    p = generator.permutation(rows) / rows
    right = generator.random(rows) < 0.5
    order = np.argsort(p)
    bins = np.split(order, [rows * number // BINS for number in range(1, BINS)])
    assert max(map(len, bins)) - min(map(len, bins)) <= 1
    expected = sum(len(one) / rows * abs(float(right[one].mean()) - float(p[one].mean())) for one in bins)
    assert calibration_error(p, right) == pytest.approx(expected, abs=1e-12)


def test_calibration_error_of_simple_cases() -> None:
    rows = CALIBRATION_ROWS
    right = np.arange(rows) % 10 < 7
    assert calibration_error(np.full(rows, 0.7), right) == pytest.approx(0.0, abs=1e-12)
    assert calibration_error(np.full(rows, 0.95, np.float32), right) == pytest.approx(0.25, abs=1e-6)
    assert calibration_error(np.full(rows - 1, 0.7), right[1:]) is None
    broken = np.full(rows, 0.7)
    broken[0] = math.nan
    assert calibration_error(broken, right) is None


def test_calibration_error_is_reported_from_enough_rows_on() -> None:
    generator = np.random.default_rng(0)
    accuracy = Accuracy()
    first, one = labelled_rows(generator, CALIBRATION_ROWS - 1)
    accuracy.update(first)
    assert accuracy.summary().calibration_error is None
    second, other = labelled_rows(generator, 1)
    accuracy.update(second)
    confidence = np.concatenate((one.confidence, other.confidence))
    right = np.concatenate((one.served == first.labels, other.served == second.labels))
    assert accuracy.summary().calibration_error == calibration_error(confidence, right)
    assert accuracy.summary().calibration_error is not None
