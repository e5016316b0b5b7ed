"""The statistics extension's numbers, and that every recorder is told."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from adapters.tent import Tent
from tta_server.metrics import Recorders
from tta_server.statistics import Statistics
from tta_server.types import Call, JobStats, Lane, StepStats, Stream

STREAM = Stream("s", "m", Tent(), 0, 0.0)


def step(*jobs: tuple[int, float], forward: float = 0.0, model: str = "m") -> StepStats:
    """A step of jobs ``(rows, seconds in the queue)``; adapting and measuring took long, and count for nothing here."""
    own = [
        JobStats(STREAM, rows, queue, torch.zeros(rows), torch.zeros(rows), torch.zeros(rows), "applied")
        for rows, queue in jobs
    ]
    return StepStats(Lane(model, Tent()), 5, own, forward, 100.0, 100.0)


def call(code: int = 200, seconds: float = 0.0, decode: float = 0.0, encode: float = 0.0, model: str = "m") -> Call:
    return Call(model, True, "/route", code, seconds, decode, encode)


def inference(statistics: Statistics, name: str = "m") -> dict[str, tuple[int, int]]:
    """``(count, ns)`` by kind."""
    told = statistics.of(name, "1")["inference_stats"]
    return {kind: (value["count"], value["ns"]) for kind, value in told.items()}


def test_a_model_without_requests_has_all_the_keys() -> None:
    """perf_analyzer fails where one is missing."""
    nothing = {"count": 0, "ns": 0}
    kinds = ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output", "cache_hit", "cache_miss")
    assert Statistics().of("m", "1") == {
        "name": "m",
        "version": "1",
        "last_inference": 0,
        "inference_count": 0,
        "execution_count": 0,
        "inference_stats": dict.fromkeys(kinds, nothing),
        "batch_stats": [],
    }


def test_steps_are_counted_once_and_their_time_once_for_each_request() -> None:
    statistics = Statistics()
    statistics.step(step((3, 0.25), (1, 0.5), forward=0.125))
    statistics.step(step((4, 0.0), forward=0.0625))
    statistics.step(step((2, 1.0), forward=0.5))
    told = statistics.of("m", "7")
    assert (told["version"], told["inference_count"], told["execution_count"]) == ("7", 10, 3)
    assert inference(statistics)["queue"] == (4, 1_750_000_000)
    assert inference(statistics)["compute_infer"] == (4, 812_500_000)
    batches: list[dict[str, Any]] = told["batch_stats"]
    assert [(one["batch_size"], one["compute_infer"]) for one in batches] == [
        (2, {"count": 1, "ns": 500_000_000}), (4, {"count": 2, "ns": 187_500_000}),
    ]  # fmt: skip
    assert all(one["compute_input"] == one["compute_output"] == {"count": 0, "ns": 0} for one in batches)


def test_the_last_inference_is_told_in_milliseconds(monkeypatch: pytest.MonkeyPatch) -> None:
    statistics = Statistics()
    monkeypatch.setattr("tta_server.statistics.time.time", lambda: 1_700_000_000.25)
    statistics.step(step((1, 0.0)))
    assert statistics.of("m", "1")["last_inference"] == 1_700_000_000_250


def test_a_step_that_answered_nobody_does_not_count() -> None:
    statistics = Statistics()
    statistics.step(step())
    assert statistics.of("m", "1") == Statistics().of("m", "1")


def test_requests_by_their_end() -> None:
    """What a failed one took to decode says nothing about the model."""
    statistics = Statistics()
    statistics.request(call(200, 1.0, 0.25, 0.125))
    statistics.request(call(200, 0.5, 0.25, 0.125))
    for code in (400, 429, 499, 500, 504):
        statistics.request(call(code, 2.0, 7.0, 7.0))
    told = inference(statistics)
    assert told["success"] == (2, 1_500_000_000)
    assert told["fail"] == (5, 10_000_000_000)
    assert told["compute_input"] == (2, 500_000_000)
    assert told["compute_output"] == (2, 250_000_000)
    assert statistics.of("m", "1")["inference_count"] == 0, "rows are counted by steps"


@pytest.mark.parametrize(
    "other", [Call("m", False, "/v2/models/m", 200, 1.0), Call("", True, "/v2", 404, 1.0)], ids=str
)
def test_requests_that_predict_nothing_do_not_count(other: Call) -> None:
    statistics = Statistics()
    statistics.request(other)
    assert statistics.of("m", "1") == Statistics().of("m", "1")
    assert statistics.of("", "1") == Statistics().of("", "1")


def test_models_are_counted_apart() -> None:
    statistics = Statistics()
    statistics.step(step((3, 0.0), model="a"))
    statistics.request(call(model="b"))
    assert [statistics.of(name, "1")["inference_count"] for name in "ab"] == [3, 0]
    assert [inference(statistics, name)["success"][0] for name in "ab"] == [0, 1]


def test_all_recorders_are_told() -> None:
    """In their order, each of everything."""
    both = [Statistics(), Statistics()]
    recorders = Recorders(*both)
    recorders.step(step((3, 0.5)))
    recorders.request(call(200, 1.0))
    told = [{**one.of("m", "1"), "last_inference": 0} for one in both]
    assert told[0] == told[1]
    assert (told[0]["inference_count"], inference(both[1])["success"]) == (3, (1, 1_000_000_000))


def test_a_call_that_nobody_filled_in_counts_as_a_failure_of_ours() -> None:
    assert (Call().code, Call().predicts, Call().model) == (500, False, "")
