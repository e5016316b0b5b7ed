"""What the metrics tell of guards, labels and estimates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from prometheus_client.samples import Sample

from adapters.source import SourcePolicy
from adapters.tent import Tent
from tests.http.conftest import running, scrape, value
from tests.metrics.test_scrape import REFERENCE, Fleet
from tests.serving import MODEL, load, rows
from tta_server.engine.guarding import make_guard
from tta_server.errors import BadInput, Conflict, UnknownName
from tta_server.feedback import Feedback
from tta_server.metrics.prometheus import MOVES
from tta_server.metrics.trust import Budgets
from tta_server.settings import GuaranteeSettings, GuardSettings, LabelSettings
from tta_server.trust.guarantees import Audit
from tta_server.trust.guard import Action, Guard, Labels, Look, State, Step
from tta_server.trust.labels import Audits, LabelTally
from tta_server.types import Event, Stream

DIFFER = np.ones(4, np.bool_)
"""Rows on which the two models differ."""


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


def a_guard(kind: str = "none", **guarantee: float) -> Guard:
    return make_guard(GuardSettings(guarantee=GuaranteeSettings.model_validate({"kind": kind, **guarantee})))


def told(samples: Sequence[Sample], name: str, *labels: str) -> dict[str, float]:
    """The series of one name, by labels."""
    return {".".join(one.labels[label] for label in labels): one.value for one in samples if one.name == name}


def count(samples: Sequence[Sample], name: str, **labels: str) -> float:
    """How many streams a histogram of streams has, or how many of them up to ``le``."""
    return value(list(samples), f"{name}_{'bucket' if 'le' in labels else 'count'}", **labels)


# Guards


def test_every_open_stream_is_in_one_state_and_guarded_ones_have_evidence() -> None:
    fleet = Fleet()
    for stream, state in zip(fleet.add(*(f"s-{state}" for state in State)), State, strict=True):
        stream.guard = a_guard()
        stream.guard.put(state)
    off, disabled, plain, helped, harmed, unclear = fleet.add("off", "disabled", "plain", "helped", "harmed", "unclear")
    off.guard, off.adapt = a_guard(), False
    disabled.guard = make_guard(GuardSettings(enabled=False))
    plain.policy = SourcePolicy()
    for stream, benefit in ((helped, 0.9), (harmed, -0.9), (unclear, 0.0)):
        stream.guard = a_guard()
        stream.guard.consider(Look(1, 1, benefit, 0.0))
    samples = fleet.scrape()
    assert told(samples, "tta_guard_streams", "state") == {
        "off": 3, "shadow": 4, "canary": 1, "active": 1, "frozen": 1, "quarantine": 1, "unguarded": 1,
    }  # fmt: skip
    evidence = told(samples, "tta_guard_evidence_streams", "evidence")
    assert evidence == {"unknown": len(State), "helps": 1, "harms": 1, "unclear": 1}


def test_moves_are_counted_by_where_to_and_by_rule() -> None:
    fleet = Fleet()
    (stream,) = fleet.add("s")
    before = fleet.scrape()
    for to, action, rule in (
        (State.FROZEN, Action.ROLLBACK, "audit"),
        (State.SHADOW, Action.RESET, "audit"),
        (State.SHADOW, Action.RESET, "collapse"),
        (State.QUARANTINE, Action.RESET, "audit"),
        (State.QUARANTINE, Action.NONE, "operator"),
    ):
        fields = {"from": State.ACTIVE, "to": to, "action": action, "rule": rule, "version": 3}
        fleet.recorder.event(Event("guard", stream, fields))
    after = fleet.scrape()
    for (name, *labels), grown in {
        ("tta_guard_moves_total", "rule", "audit"): 3,
        ("tta_guard_moves_total", "to", "shadow"): 2,
        ("tta_guard_moves_total", "rule", "benefit"): 0,
        ("tta_adaptation_rollbacks_total",): 1,
        ("tta_quarantines_total",): 2,
        ("tta_stream_events_total", "kind", "guard"): 5,
    }.items():
        chosen = dict(zip(labels[::2], labels[1::2], strict=True))
        assert any(one.name == name for one in before), "the first of its kind must be seen to come"
        assert value(before, name, **chosen) == 0
        assert value(after, name, model_name="m", **chosen) == grown, (name, chosen)


def test_the_moves_that_begin_at_zero_are_those_that_guards_make() -> None:
    generator, seen = np.random.default_rng(0), set[tuple[str, str]]()
    guarantee = GuaranteeSettings(kind="audit", q=1, eps=0, c=50)
    settings = GuardSettings(
        least_benefit=0, shadow_rows=2, canary_rows=4, cooldown_rows=4, reset_rows=40,
        rejected_steps=3, guarantee=guarantee,
    )  # fmt: skip
    for _ in range(200):
        guard = make_guard(settings)
        helps = generator.choice((-0.9, 0.0, 0.9))
        for _ in range(100):
            at = float(generator.normal(0, 0.3))
            guard.labels = Labels(at - 0.2, at + 0.2, guard.resets, guard.rows) if generator.random() < 0.1 else None
            moves = guard.consider(Look(2, 2, float(generator.normal(0.1, 0.1)), float(generator.normal(0, 0.5))))
            kept = bool(generator.random() < 0.8)
            moves += guard.took(Step(2, kept, not kept))
            moves += guard.toggle() if generator.random() < 0.02 else []
            assert guard.guarantee is not None
            first = guard.guarantee.rows
            guard.guarantee.allow(DIFFER)
            for row in range(first, first + len(DIFFER)):
                guard.guarantee.settle(row, -1 if generator.random() < (1 + helps) / 2 else 1)
            seen |= {(move.after.value, move.rule) for move in moves}
    assert seen == set(MOVES)


# Budgets and evidence


def test_budgets_are_those_of_the_last_request() -> None:
    fleet = Fleet()
    budget, ledger, audit, _ = fleet.add("budget", "ledger", "audit", "none")
    budget.guard, ledger.guard = a_guard("budget", b0=4, eps=0), a_guard("ledger", b0=2, c0=6)
    audit.guard = a_guard("audit")
    name = "tta_streams_budget_remaining_ratio"
    assert count(fleet.scrape(), name) == 0, "there was no request yet"
    for stream in (budget, ledger):
        assert stream.guard is not None
        assert stream.guard.guarantee is not None
        stream.guard.guarantee.allow(DIFFER[:1])
    fleet.recorder._budgets.note(fleet.streams)
    samples = fleet.scrape()
    assert [count(samples, name, le=le) for le in ("0.1", "0.25", "0.5", "0.75", "+Inf")] == [0, 1, 1, 2, 2]
    assert value(samples, f"{name}_sum") == pytest.approx(0.75 + 1 / 8, abs=0.01)
    fleet.close(budget)
    assert count(fleet.scrape(), name) == 1
    assert set(fleet.recorder._budgets._left) == {ledger}, "a closed stream is not kept"


def test_a_stream_that_adapts_no_more_has_no_budget() -> None:
    fleet = Fleet()
    (stream,) = fleet.add("s")
    stream.guard = a_guard("budget")
    fleet.recorder._budgets.note([stream])
    assert count(fleet.scrape(), "tta_streams_budget_remaining_ratio") == 1
    stream.adapt = False
    assert count(fleet.scrape(), "tta_streams_budget_remaining_ratio") == 0


def test_a_guarantee_without_a_budget_has_nothing_left() -> None:
    budgets, stream = Budgets(), Stream("s", "m", Tent(), 0, 0.0, guard=a_guard("audit"))
    budgets.note([stream])
    assert budgets.left(stream) is None


def test_evidence_of_harm_is_that_of_answered_audits() -> None:
    fleet, name = Fleet(), "tta_streams_regret_evidence_log10"
    harmed, fresh = fleet.add("harmed", "fresh")
    harmed.guard, fresh.guard = a_guard("audit", q=1, eps=0, c=1e9), a_guard("audit", q=1)
    assert count(fleet.scrape(), name) == 0
    audit = harmed.guard.guarantee
    assert isinstance(audit, Audit)
    for row in range(30):
        audit.allow(DIFFER[:1])
        audit.settle(row, 1)
    samples = fleet.scrape()
    assert [count(samples, name, le=le) for le in ("4.0", "10.0")] == [0, 1]
    assert value(samples, f"{name}_sum") == pytest.approx(math.log10(audit.evidence))


# Estimates


def test_estimates_of_streams_are_spread_by_model_and_estimator() -> None:
    fleet = Fleet()
    one, other, _ = fleet.add("one", "other", "never")
    values = {
        "accuracy_atc": [0.75, 0.55],
        "accuracy_pdd": [0.55, np.nan],
        "source_accuracy_atc": [0.25, 0.25],
        "estimator_disagreement": [0.12, 0.4],
        "benefit": [0.3, -0.03],
    }
    fleet.monitor.update(
        [one, other], np.full(2, 8), {name: np.array(column) for name, column in values.items()}, REFERENCE
    )
    samples = fleet.scrape()
    accuracy = "tta_streams_estimated_accuracy_ratio"
    assert told(samples, f"{accuracy}_count", "predictor", "estimator") == {
        "adapted.atc": 2, "adapted.pdd": 1, "source.atc": 2, "source.pdd": 0,
    }  # fmt: skip
    assert count(samples, accuracy, predictor="adapted", estimator="atc", le="0.6") == 1
    assert count(samples, accuracy, predictor="source", estimator="atc", le="0.3") == 2
    disagreement = [count(samples, "tta_streams_estimator_disagreement_ratio", le=le) for le in ("0.1", "0.15", "0.5")]
    assert disagreement == [0, 1, 2]
    benefit = [count(samples, "tta_streams_benefit_ratio", le=le) for le in ("-0.04", "-0.02", "0.2", "0.3", "+Inf")]
    assert benefit == [0, 1, 1, 2, 2]


def test_a_watched_stream_tells_its_benefit_and_who_is_served() -> None:
    fleet = Fleet(watched=("*",))
    streams = fleet.add("shadow", "active", "canary", "off", "unguarded")
    shadow, active, canary, off, _ = streams
    for stream, state in ((shadow, State.SHADOW), (active, State.ACTIVE), (off, State.ACTIVE)):
        stream.guard = a_guard()
        stream.guard.put(state)
    off.adapt = False
    canary.guard = a_guard()
    canary.guard.state = State.CANARY

    def served() -> dict[str, float]:
        return told(fleet.scrape(), "tta_stream_serves_adapted", "stream")

    assert served() == {"shadow": 0, "active": 1, "canary": 0, "off": 0, "unguarded": 1}
    canary.guard.consider(Look(1, 1, 0.2, 0.0))
    assert served()["canary"] == 1
    fleet.monitor.update([canary], np.array([8]), {"benefit": np.array([0.2])}, REFERENCE)
    assert told(fleet.scrape(), "tta_stream_benefit_ratio", "stream") == {"canary": 0.2}


# Labels


def test_labels_are_summed_over_tenants() -> None:
    feedbacks = [Feedback(LabelSettings()) for _ in range(2)]
    for place, feedback in enumerate(feedbacks, start=1):
        right = {"served": [1, 2 * place], "adapted": [0, 3], "source": [4, 0]}
        feedback.tallies["m"] = LabelTally(right, [1, 0, place, 0, 0, 0, 0, 0, 1], 20.0 * place)
        feedback.rejected = {UnknownName.__name__: place, BadInput.__name__: 1, Conflict.__name__: 5}
        feedback.predictions.audits = Audits(issued=10, answered=place, expired=3)
    feedbacks[0].tallies["gone"] = LabelTally()
    samples = Fleet(feedbacks=feedbacks).scrape()
    assert told(samples, "tta_labelled_predictions_total", "model_name", "predictor", "outcome") == {
        **{f"gone.{who}.{how}": 0 for who in ("served", "adapted", "source") for how in ("correct", "incorrect")},
        "m.served.correct": 6, "m.served.incorrect": 2, "m.adapted.correct": 6, "m.adapted.incorrect": 0,
        "m.source.correct": 0, "m.source.incorrect": 8,
    }  # fmt: skip
    seconds = ("1.0", "10.0", "60.0", "604800.0")
    delays = [count(samples, "tta_label_delay_seconds", model_name="m", le=le) for le in seconds]
    assert delays == [2, 2, 5, 5]
    assert value(samples, "tta_label_delay_seconds_count", model_name="m") == 7
    assert value(samples, "tta_label_delay_seconds_sum") == 60
    assert told(samples, "tta_labels_rejected_total", "reason") == {"unknown": 3, "unfit": 2, "conflict": 10}
    assert told(samples, "tta_audits_total", "result") == {"issued": 20, "answered": 3, "expired": 6}
    assert feedbacks[0].tallies["m"].right["served"] == [1, 2], "to read is not to change"


def test_a_model_without_labels_has_counters_at_zero() -> None:
    samples = Fleet().scrape()
    counts = told(samples, "tta_labelled_predictions_total", "predictor", "outcome")
    assert (len(counts), set(counts.values())) == (6, {0.0})
    assert set(told(samples, "tta_audits_total", "result").values()) == {0.0}
    assert set(told(samples, "tta_labels_rejected_total", "reason").values()) == {0.0}


@pytest.mark.anyio
async def test_a_server_tells_whose_answers_were_served_and_what_labels_said(tmp_path: Path) -> None:
    guard = {"enabled": True, "least_benefit": 1, "guarantee": {"kind": "audit", "q": 1}}
    async with running(load(tmp_path), guard=guard) as server:
        await server.open("s")
        first = await server.predict("s", rows(4))
        await server.json("POST", "/v1/streams/s/guard", json={"state": "active"})
        second = await server.predict("s", rows(3))
        await server.json("PATCH", "/v1/streams/s", json={"adapt": False})
        await server.predict("s", rows(2))
        path = "/v1/streams/s/labels"
        await server.json("POST", path, json={"request": second["request"], "labels": second["classes"]})
        await server.json("POST", path, 404, json={"request": "no such request", "labels": [0]})
        await server.json("POST", path, 400, json={"request": first["request"], "labels": [0]})
        await server.settled()
        samples = await scrape(server)
    served = told(samples, "tta_predictions_total", "model_name", "policy", "served_by")
    assert served == {f"{MODEL}.tent.source": 4, f"{MODEL}.tent.adapted": 3, f"{MODEL}.source.source": 2}
    assert value(samples, "tta_adaptation_steps_total", result="vetoed") == 1
    assert value(samples, "tta_labelled_predictions_total", predictor="served", outcome="correct") == 3
    assert value(samples, "tta_labelled_predictions_total", predictor="source") == 3
    assert value(samples, "tta_label_delay_seconds_count", model_name=MODEL) == 1
    assert told(samples, "tta_labels_rejected_total", "reason") == {"unknown": 1, "unfit": 1, "conflict": 0}
    assert value(samples, "tta_guard_moves_total", rule="operator", to="active") == 1
    assert told(samples, "tta_guard_streams", "state")["off"] == 1
