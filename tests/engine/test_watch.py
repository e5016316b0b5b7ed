"""What is measured of a step, from whom, and that measuring costs nobody anything but time."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from adapters import Policy
from adapters.base import Batch, Source, State, Step
from adapters.lame import Lame
from adapters.norm import NormPolicy
from adapters.source import SourcePolicy
from adapters.tent import Tent
from tests.serving import CPU
from tta_server.demo.data import held_out
from tta_server.drift.monitor import Monitor, Verdict
from tta_server.drift.reference import Reference
from tta_server.drift.signals import ClassFeatures
from tta_server.engine.engine import Engine
from tta_server.engine.source import SourceModel, load_model
from tta_server.engine.watch import ESTIMATED, SOURCE_PATH
from tta_server.settings import load_settings
from tta_server.state.memory import Budget
from tta_server.state.store import StateStore
from tta_server.types import Answer, Job, Lane, Origin, Plan, StepStats, Stream

BATCH_NORM = {name for name in SOURCE_PATH if name.startswith("bn_distance")}
SERVED = {"confidence", "entropy", "margin", "diversity"}
BOTH = {"agreement", "skew_damage"}
SHARES = {"label_divergence", "label_psi"}
ADAPTED = {"accuracy_atc", "accuracy_pdd", "estimator_disagreement"}


def make_engine(model: SourceModel, shadow: float = 1.0, frozen: float = 1.0, monitored: bool = True) -> Engine:
    return Engine({model.name: model}, StateStore(Budget(64), CPU), Monitor(20.0), shadow, frozen, monitored)


def make_stream(model: SourceModel, policy: Policy, id: str = "s", adapt: bool = True) -> Stream:
    return Stream(id, model.name, policy, 1, 0.0, digest=model.digest, adapt=adapt)


def step(engine: Engine, policy: Policy, requests: list[tuple[Stream, Tensor]]) -> StepStats:
    """One engine step in the lane of ``policy``."""
    lane = Lane("digits", policy, engine.models["digits"].digest)
    jobs = [Job(stream, lambda *_: None, lane, x, origin=Origin("request-7")) for stream, x in requests]
    return engine.step(Plan(lane, jobs), _ignore)


def _ignore(job: Job, answer: Answer | Exception) -> None:
    pass


@pytest.fixture(scope="module")
def digits() -> SourceModel:
    """The demo's model with its reference of clean digits."""
    config = Path(__file__).parent.parent.parent / "tta_server" / "demo" / "config.yaml"
    return load_model("digits", load_settings(config), CPU)


@pytest.fixture
def clean() -> Tensor:
    return torch.from_numpy(held_out()[0]).float() / 255


def test_an_adapting_stream_is_measured_on_both_paths(digits: SourceModel, clean: Tensor) -> None:
    engine, stream = make_engine(digits), make_stream(digits, Tent())
    stats = step(engine, Tent(), [(stream, clean[:32])])
    ours = SOURCE_PATH | SERVED | BOTH | {"update_norm", "parameter_distance"} | ESTIMATED | ADAPTED
    assert stats.jobs[0].signals.keys() == ours | {"loss"}
    readings = engine.monitor.readings(stream)
    assert readings.keys() == ours | SHARES | {"loss"}
    assert {name for name, one in readings.items() if one.z is not None} == SOURCE_PATH | SERVED
    for name in SOURCE_PATH - BATCH_NORM:
        low, high = readings[name].band or (np.nan, np.nan)
        assert low - (high - low) / 2 <= readings[name].value <= high + (high - low) / 2, "clean digits"
    assert stats.shadow_seconds > 0 < stats.monitor_seconds
    assert not stats.monitor_failed


@pytest.mark.parametrize("policy", [SourcePolicy(), Lame()], ids=str)
def test_who_asks_the_source_anyway_needs_no_shadow(digits: SourceModel, clean: Tensor, policy: Policy) -> None:
    """All is measured but the batch norms; with them it is the same, from the one pass more."""
    without, watched = make_engine(digits, 0.0, 0.0), make_engine(digits)
    stats = step(without, policy, [(make_stream(digits, policy), clean[:16])])
    assert stats.shadow_seconds == 0
    measured = stats.jobs[0].signals
    assert measured.keys() >= (SOURCE_PATH - BATCH_NORM) | SERVED
    assert not measured.keys() & BATCH_NORM
    more = step(watched, policy, [(make_stream(digits, policy), clean[:16])]).jobs[0].signals
    assert more.keys() == measured.keys() | BATCH_NORM
    assert all(more[name] == value for name, value in measured.items())


def test_the_source_path_is_the_same_whoever_answers(digits: SourceModel, clean: Tensor) -> None:
    told = [
        step(make_engine(digits), policy, [(make_stream(digits, policy), clean[:16])]).jobs[0].signals
        for policy in (SourcePolicy(), Tent(), NormPolicy())
    ]
    for one in told[1:]:
        assert {name: one[name] for name in SOURCE_PATH} == pytest.approx(
            {name: told[0][name] for name in SOURCE_PATH}, rel=1e-4
        )


def test_a_stream_is_measured_alike_in_company(digits: SourceModel, clean: Tensor) -> None:
    """Requests of three sizes in one step, and each by itself."""
    parts = list(clean[:40].split([1, 7, 32]))
    together, apart = make_engine(digits), make_engine(digits)
    streams = [make_stream(digits, Tent(), str(index)) for index in range(3)]
    others = [make_stream(digits, Tent(), str(index)) for index in range(3)]
    for _ in range(3):
        step(together, Tent(), list(zip(streams, parts, strict=True)))
        for request in zip(others, parts, strict=True):
            step(apart, Tent(), [request])
    for one, other in zip(streams, others, strict=True):
        expected = apart.monitor.read(other)
        assert together.monitor.read(one) == pytest.approx(expected, rel=1e-3, abs=1e-5)
        assert together.monitor.drift(one) == pytest.approx(apart.monitor.drift(other), rel=1e-3, abs=1e-3)


def test_an_answer_of_the_source_does_not_speak_for_a_stream_that_adapts(digits: SourceModel, clean: Tensor) -> None:
    """Asked with ``adapt=false``, only the source path counts; switched off, what it is served is the source's."""
    engine = make_engine(digits)
    path = SOURCE_PATH | ESTIMATED
    for adapt, expected in ((True, path), (False, path | SERVED | BOTH | SHARES)):
        stream = make_stream(digits, Tent(), str(adapt), adapt)
        step(engine, SourcePolicy(), [(stream, clean[:16])])
        assert engine.monitor.read(stream).keys() == expected
        assert engine.monitor.agreement(stream) == (None if adapt else 1.0)


def test_nothing_is_measured_when_that_is_off(digits: SourceModel, clean: Tensor) -> None:
    """But what the step tells anyway."""
    engine, stream = make_engine(digits, monitored=False), make_stream(digits, Tent())
    stats = step(engine, Tent(), [(stream, clean[:16])])
    assert stats.shadow_seconds == 0
    assert stats.jobs[0].signals.keys() == {"loss", "update_norm", "parameter_distance"}
    assert (engine.monitor.drift(stream), engine.monitor.verdict(stream)) == (None, Verdict.UNKNOWN)
    plain = step(engine, SourcePolicy(), [(stream, clean[:16])])
    assert (plain.jobs[0].signals, plain.monitor_failed) == ({}, False)


def test_without_a_reference_there_is_no_drift_score(digits: SourceModel, clean: Tensor) -> None:
    engine, stream = make_engine(replace(digits, reference=None)), make_stream(digits, Tent())
    for _ in range(5):
        step(engine, Tent(), [(stream, clean[:16])])
    assert engine.monitor.read(stream).keys() >= BATCH_NORM | BOTH
    assert "feature_distance" not in engine.monitor.read(stream)
    assert (engine.monitor.drift(stream), engine.monitor.verdict(stream)) == (None, Verdict.UNKNOWN)
    assert all(one.z is None and one.band is None for one in engine.monitor.readings(stream).values())


def test_a_fault_of_the_monitor_costs_no_answer_and_no_step(
    digits: SourceModel, clean: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    assert digits.reference is not None
    odd = ClassFeatures(np.zeros((10, 3)), np.ones((10, 3)))
    broken: Reference = replace(digits.reference, features=odd)
    engine, stream = make_engine(replace(digits, reference=broken)), make_stream(digits, Tent())
    for _ in range(2):
        stats = step(engine, Tent(), [(stream, clean[:16])])
        assert stats.monitor_failed
        assert stats.jobs[0].result == "applied"
    assert (stream.version, stream.requests) == (2, 2)
    assert "monitoring failed" in caplog.text


def test_a_step_that_is_not_kept_is_told(digits: SourceModel, clean: Tensor) -> None:
    """As an event that names the request, and in the stream's count; the others of the step have none."""
    engine, good, bad = make_engine(digits), make_stream(digits, Tent(), "good"), make_stream(digits, Tent(), "bad")
    poison = clean[:16].clone()
    poison[3, 0, 0, 0] = torch.nan
    stats = step(engine, Tent(), [(good, clean[:16]), (bad, poison)])
    (event,) = stats.events
    assert (event.kind, event.stream, event.fields) == ("rejected", bad, {"version": 0, "reason": "rejected_nonfinite"})
    assert event.origin.request == "request-7"
    assert (good.failures, bad.failures) == (0, 1)
    assert all(np.isfinite(value) for value in engine.monitor.read(bad).values()), "what is not finite does not count"


def test_drift_is_found_and_told(digits: SourceModel, clean: Tensor) -> None:
    """A clean stream stays near its source; one whose images fade leaves it, with an event, and comes back."""
    engine, near, far = make_engine(digits), make_stream(digits, Tent(), "near"), make_stream(digits, Tent(), "far")
    generator, kinds = torch.Generator().manual_seed(0), list[tuple[str, str]]()
    for turn in range(60):
        requests = []
        for stream in (near, far):
            x = clean[torch.randperm(len(clean), generator=generator)[:32]]
            requests.append((stream, 0.6 * x + 0.25 if stream is far and turn < 25 else x))
        stats = step(engine, Tent(), requests)
        kinds += [(event.stream.id, event.kind) for event in stats.events]
        assert all(event.fields.keys() == {"signal", "drift"} for event in stats.events)
        if turn == 24:
            assert engine.monitor.verdict(far) == Verdict.DRIFTED
            assert (engine.monitor.drift(far) or 0) > 4
            assert engine.monitor.verdict(near) == Verdict.NEAR
    assert ("far", "departure") in kinds
    assert ("far", "change") in kinds
    assert ("near", "departure") not in kinds
    assert engine.monitor.verdict(far) == Verdict.NEAR


def test_a_signal_of_another_shape_is_a_failed_step(
    digits: SourceModel, clean: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found before anything is committed."""
    original = Tent.step

    def odd(self: Tent, source: Source, state: State, batch: Batch) -> Generator[Tensor, None, Step]:
        done = yield from original(self, source, state, batch)
        return Step(done.state, {"loss": torch.tensor(1.0)})

    monkeypatch.setattr(Tent, "step", odd)
    engine, stream = make_engine(digits), make_stream(digits, Tent())
    stats = step(engine, Tent(), [(stream, clean[:16])])
    assert (stats.jobs[0].result, stream.version, stream.failures) == ("failed", 0, 1)
    assert [event.kind for event in stats.events] == ["failed"]
