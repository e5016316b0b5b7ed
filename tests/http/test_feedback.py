"""``/v1/streams/{id}/labels`` and ``/guard``: labels that come later, what they say, and who decides about a stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.http.conftest import PREDICT, Loaded, Server, error_of, running
from tests.http.following import following
from tests.serving import CLASSES, MODEL, rows, same_state, write_config, write_weights
from tta_server.access import DEFAULT_TENANT
from tta_server.app import load_models
from tta_server.drift.benefit import FIGURES, Judge
from tta_server.settings import load_settings
from tta_server.trust.conformal import Conformal

pytestmark = pytest.mark.anyio

LABELS, GUARD, STREAM = "/v1/streams/s/labels", "/v1/streams/s/guard", "/v1/streams/s"
SMALL: dict[str, Any] = {
    "enabled": True, "shadow_rows": 8, "canary_rows": 16, "cooldown_rows": 32, "least_benefit": 0.1
}  # fmt: skip
SHADOW = {"shadow_rows": 10**6}
"""Served the source's answers for good."""
AUDIT = {"kind": "audit", "q": 1.0, "eps": 0.0, "c": 10.0, "alpha": 0.5}
TOKENS = [{"token": f"token-of-tenant-{name}", "tenant": name} for name in "ab"]
CALIBRATION_ROWS = 200


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """The tiny network with weights for which the adapted model differs from the source on many rows."""
    folder = tmp_path_factory.mktemp("tiny")
    config = write_config(folder)
    write_weights(folder, seed=31)
    settings = load_settings(config)
    return settings, load_models(settings)


def estimating(loaded: Loaded, benefit: float, **artefacts: torch.Tensor) -> Loaded:
    """The model with a judge that is of one mind, once anything was compared."""
    settings, models = loaded
    model = models[MODEL]
    judge = Judge(np.zeros(len(FIGURES)), benefit, 0.1)
    return settings, {MODEL: replace(model, judge=judge, source=replace(model.source, artefacts=artefacts))}


@asynccontextmanager
async def guarding(loaded: Loaded, benefit: float = 0.5, **sections: Any) -> AsyncIterator[Server]:
    """A server with guards of small numbers."""
    guard = SMALL | sections.pop("guard", {})
    async with running(estimating(loaded, benefit), guard=guard, **sections) as made:
        yield made


@pytest.fixture
async def server(loaded: Loaded) -> AsyncIterator[Server]:
    async with guarding(loaded) as made:
        yield made


async def label(server: Server, request: str, labels: list[Any], expect: int = 200, id: str = "s") -> Any:
    body = {"request": request, "labels": labels}
    return await server.json("POST", f"/v1/streams/{id}/labels", expect, json=body)


async def report(server: Server, id: str = "s") -> Any:
    return await server.json("GET", f"/v1/streams/{id}/labels")


async def operate(server: Server, state: str, expect: int = 200, id: str = "s") -> Any:
    return await server.json("POST", f"/v1/streams/{id}/guard", expect, json={"state": state})


async def both(server: Server, seeds: range, size: int = 8) -> list[tuple[Any, NDArray[Any], NDArray[Any]]]:
    """Answers of stream "s", and what adapted model and source take the rows for; "free" is the same without guard."""
    await server.open("free", guard={"enabled": False})
    found = []
    for seed in seeds:
        answer, adapted = await server.predict("s", rows(size, seed)), await server.predict("free", rows(size, seed))
        source = await server.predict("free", rows(size, seed), adapt=False)
        found.append((answer, np.array(adapted["classes"]), np.array(source["classes"])))
    return found


# Labels


async def test_labels_of_a_request(server: Server) -> None:
    await server.open("s")
    answer = await server.predict("s", rows(4))
    request = answer["request"]
    assert await label(server, request, [0, 1, 2, 3]) == {"request": request, "taken": 4, "repeated": 0, "missing": 0}
    told = await report(server)
    assert told["total"]["rows"] == told["recent"]["rows"] == 4
    right = float(np.mean(np.array(answer["classes"]) == [0, 1, 2, 3]))
    assert told["total"]["served"]["value"] == right
    assert told["last_delay"] >= 0


async def test_the_same_labels_again_change_nothing(server: Server) -> None:
    await server.open("s")
    request = (await server.predict("s", rows(3)))["request"]
    await label(server, request, [0, 1, 2])
    before = await report(server)
    for _ in range(3):
        assert await label(server, request, [0, 1, 2]) == {
            "request": request, "taken": 0, "repeated": 3, "missing": 0
        }  # fmt: skip
    assert await report(server) == before


async def test_labels_in_parts(server: Server) -> None:
    await server.open("s")
    request = (await server.predict("s", rows(3)))["request"]
    told = [await label(server, request, labels) for labels in ([None, 1, None], [0, 1, None], [0, 1, 2])]
    assert [(one["taken"], one["repeated"], one["missing"]) for one in told] == [(1, 0, 2), (1, 1, 1), (1, 2, 0)]
    assert (await report(server))["total"]["rows"] == 3


async def test_another_label_is_refused_and_none_of_the_posting_is_taken(server: Server) -> None:
    await server.open("s")
    request = (await server.predict("s", rows(3)))["request"]
    await label(server, request, [0, None, None])
    before = await report(server)
    error = (await label(server, request, [1, 2, 2], 409))["error"]
    assert "row 0" in error
    assert "has label 0 already, got 1" in error
    assert await report(server) == before
    assert (await label(server, request, [0, 3, 3]))["taken"] == 2


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ([0, 1], "expected as many labels, got 2"),
        ([0, 1, 2, 3], "expected as many labels, got 4"),
        ([], "expected as many labels, got 0"),
        ([0, 1, 5], "row 2"),
        ([0, -1, 1], "row 1"),
        ([0, 1, 1.0], "row 2"),
        ([0, True, 1], "row 1"),
        ([0, 1, "ant"], "row 2"),
        ([0, 1, 10**30], "2"),
        ([[0], [1], [2]], "row 0"),
        ("012", "/labels"),
        (None, "/labels"),
    ],
)
async def test_labels_that_do_not_fit_are_refused(server: Server, labels: Any, said: str) -> None:
    await server.open("s")
    request = (await server.predict("s", rows(3)))["request"]
    assert said in (await label(server, request, labels, 400))["error"]
    assert (await report(server))["total"] is None


@pytest.mark.parametrize(
    "body", [{}, {"labels": [0]}, {"request": 7, "labels": [0]}, {"request": "x" * 10_000, "labels": [0]}, [], "x"]
)
async def test_what_is_no_posting_of_labels(server: Server, body: Any) -> None:
    await server.open("s")
    error_of(await server.client.post(LABELS, json=body), 400)


async def test_only_requests_of_the_stream_can_be_labelled(server: Server) -> None:
    await server.open("s")
    await server.open("t")
    request = (await server.predict("t", rows(2)))["request"]
    anonymous = await server.client.post(f"/v2/models/{MODEL}/infer", json={})
    for unknown in (request, "never", "", anonymous.headers["x-request-id"]):
        assert "was not served to stream 's'" in (await label(server, unknown, [0, 1], 404))["error"]
    assert (await label(server, request, [0, 1], id="t"))["taken"] == 2
    error_of(await server.client.post("/v1/streams/nothing/labels", json={"request": request, "labels": [0, 1]}), 404)
    assert (await server.client.get("/v1/streams/nothing/labels")).status_code == 404


async def test_another_tenants_requests_are_as_such_that_never_were(loaded: Loaded) -> None:
    async with guarding(loaded, auth={"tokens": TOKENS}) as server:
        a, b = (server.known_by(one["token"]) for one in TOKENS)
        for one in (a, b):
            await one.open("s")
        request = (await a.predict("s", rows(2)))["request"]
        real = await label(b, request, [0, 1], 404)
        assert real == {"error": (await label(b, "never", [0, 1], 404))["error"].replace("never", request)}
        assert (await report(b))["total"] is None
        assert (await label(a, request, [0, 1]))["taken"] == 2


async def test_after_a_stream_is_deleted_its_requests_are_gone(server: Server) -> None:
    await server.open("s")
    request = (await server.predict("s", rows(2)))["request"]
    await label(server, request, [0, None])
    assert (await server.client.delete(STREAM)).status_code == 204
    await label(server, request, [0, 1], 404)
    await server.open("s")
    await label(server, request, [0, 1], 404)
    assert (await report(server))["total"] is None


async def test_the_clients_own_request_id(server: Server) -> None:
    await server.open("s")
    response = await server.client.post(PREDICT, json={"inputs": rows(2).tolist()}, headers={"x-request-id": "mine-1"})
    assert response.json()["request"] == response.headers["x-request-id"] == "mine-1"
    assert (await label(server, "mine-1", [0, 1]))["taken"] == 2


async def test_a_request_over_v2(server: Server) -> None:
    """Its parameters say what ``/v1`` does."""
    told = (await server.infer(rows(4), sequence_id="s"))["parameters"]
    assert (told["served"], told["guard_state"], told["evidence"]) == ("source", "shadow", "helps")
    assert told["benefit"] == 0.5
    assert (await label(server, told["request_id"], [0, 1, 2, 3]))["taken"] == 4
    plain = (await server.infer(rows(4)))["parameters"]
    assert not plain.keys() & {"request_id", "guard_state", "evidence", "benefit"}
    assert plain["served"] == "source"


async def test_a_request_that_did_not_adapt(server: Server) -> None:
    """Only what was served is judged: of the two models, one did not run."""
    await server.open("s")
    answer = await server.predict("s", rows(4), adapt=False)
    assert (answer["served"], answer["adapted"]) == ("source", False)
    await label(server, answer["request"], answer["classes"])
    total = (await report(server))["total"]
    assert total["served"]["value"] == 1
    assert (total["adapted"], total["source"], total["benefit"], total["disagreements"]) == (None, None, None, 0)


async def test_a_stream_without_a_guard_can_be_labelled(loaded: Loaded) -> None:
    async with running(loaded) as server:
        await server.open("s", policy="source")
        await server.open("t")
        for id in "st":
            answer = await server.predict(id, rows(4))
            assert answer["guard"] is None
            assert (await label(server, answer["request"], answer["classes"], id=id))["taken"] == 4
            assert (await report(server, id))["total"]["served"]["value"] == 1


async def test_a_repeated_answer_can_be_labelled(server: Server) -> None:
    """The first one was lost on its way: the client knows this id only."""
    await server.open("s")
    await server.predict("s", rows(2), seq=1)
    repeated = await server.predict("s", rows(2), seq=1)
    assert repeated["replayed"]
    assert (await label(server, repeated["request"], [0, 1]))["taken"] == 2


async def test_predictions_that_are_not_kept(loaded: Loaded) -> None:
    async with guarding(loaded, labels={"requests": 2}) as server:
        await server.open("s")
        first, second, third = [(await server.predict("s", rows(1, seed)))["request"] for seed in range(3)]
        assert "labels.requests = 2" in (await label(server, first, [0], 404))["error"]
        for request in (second, third):
            assert (await label(server, request, [0]))["taken"] == 1
    async with guarding(loaded, labels={"requests": 0}) as server:
        await server.open("s")
        await label(server, (await server.predict("s", rows(1)))["request"], [0], 404)


async def test_labels_meet_requests_that_are_under_way(server: Server) -> None:
    """Nothing is known of a request before it is answered."""
    await server.open("s")
    gate = await server.hold()
    waiting = asyncio.create_task(
        server.client.post(PREDICT, json={"inputs": rows(1).tolist()}, headers={"x-request-id": "mine"})
    )
    await server.waiting(1)
    await label(server, "mine", [0], 404)
    gate.open()
    assert (await waiting).status_code == 200
    assert (await label(server, "mine", [0]))["taken"] == 1


# What labels say


async def test_figures_are_those_of_a_count_by_hand(loaded: Loaded) -> None:
    async with guarding(loaded, guard=SHADOW) as server:
        await server.open("s")
        draw = np.random.default_rng(0)
        served_right = adapted_right = source_right = total = 0
        only_adapted = only_source = differ = 0
        for answer, adapted, source in await both(server, range(12)):
            truth = draw.integers(0, len(CLASSES), 8)
            truth[:3], truth[3:6] = adapted[:3], source[3:6]
            assert answer["classes"] == source.tolist(), "in the shadow"
            await label(server, answer["request"], truth.tolist())
            total += 8
            served_right += int((np.array(answer["classes"]) == truth).sum())
            adapted_right += int((adapted == truth).sum())
            source_right += int((source == truth).sum())
            only_adapted += int(((adapted == truth) & (source != truth)).sum())
            only_source += int(((adapted != truth) & (source == truth)).sum())
            differ += int((adapted != source).sum())
        told = (await report(server))["total"]
        assert differ > 10
        assert only_adapted > 0 < only_source
        assert told["rows"] == total
        for who, right in (("served", served_right), ("adapted", adapted_right), ("source", source_right)):
            one = told[who]
            assert one["value"] == pytest.approx(right / total)
            assert one["low"] <= one["value"] <= one["high"]
            assert one["rows"] == total
        assert told["benefit"]["value"] == pytest.approx((adapted_right - source_right) / total)
        assert (told["disagreements"], told["adapted_right"], told["source_right"]) == (
            differ, only_adapted, only_source
        )  # fmt: skip
        assert told["neither_right"] == differ - only_adapted - only_source
        assert 0 <= told["brier"] <= 2


async def test_before_there_are_labels_nothing_is_known(server: Server) -> None:
    await server.open("s")
    await server.predict("s", rows(4))
    told = await report(server)
    assert (told["recent"], told["total"], told["calibration_error"], told["mean_delay"]) == (None,) * 4
    assert told["audits"] == {"issued": 0, "answered": 0, "expired": 0, "pending": 0}
    assert told["wanted"] == []
    assert told["sets"] is None


# Audits


async def test_an_audit_asks_for_the_rows_where_the_two_differ(loaded: Loaded) -> None:
    async with guarding(loaded, guard=SHADOW | {"guarantee": AUDIT}) as server:
        await server.open("s")
        answers = await both(server, range(6))
        wanted: dict[str, list[int]] = {}
        for answer, adapted, source in answers:
            differs = np.flatnonzero(adapted != source).tolist()
            assert answer.get("asked", []) == differs
            if differs:
                wanted[answer["request"]] = differs
        assert len(wanted) > 2
        told = await report(server)
        assert {one["request"]: one["rows"] for one in told["wanted"]} == wanted
        assert [one["request"] for one in told["wanted"]] == list(reversed(wanted)), "the newest first"
        issued = sum(len(one) for one in wanted.values())
        assert told["audits"] == {"issued": issued, "answered": 0, "expired": 0, "pending": issued}

        request, asked = next(iter(wanted.items()))
        labels: list[int | None] = [None] * 8
        labels[asked[0]] = 0
        await label(server, request, labels)
        told = await report(server)
        left = {one["request"]: one["rows"] for one in told["wanted"]}
        assert left.get(request, []) == asked[1:]
        assert told["audits"] == {"issued": issued, "answered": 1, "expired": 0, "pending": issued - 1}
        guarantee = (await server.info("s"))["guard"]["guarantee"]
        assert guarantee["kind"] == "audit"
        assert guarantee["certified"] is False


async def test_labels_that_prove_harm_take_a_stream_down_to_quarantine(loaded: Loaded) -> None:
    """Reset twice, quarantined; then the source answers, until the operator says otherwise."""
    async with guarding(loaded, guard={"guarantee": AUDIT, "cooldown_rows": 64}) as server:
        await server.open("s")
        states = ["shadow"]
        for seed in range(200):
            answer = await server.predict("s", rows(8, seed % 20))
            if answer["guard"]["state"] != states[-1]:
                states.append(answer["guard"]["state"])
            if answer["guard"]["state"] == "quarantine":
                break
            source = (await server.predict("s", rows(8, seed % 20), adapt=False))["classes"]
            if states[-1] != "shadow":
                await label(server, answer["request"], source)
        assert states == ["shadow", "canary", "shadow", "canary", "shadow", "canary", "quarantine"]
        info = await server.info("s")
        assert (info["guard"]["state"], info["guard"]["since"]["rule"], info["version"]) == ("quarantine", "audit", 0)
        answer = await server.predict("s", rows(8))
        assert (answer["policy"], answer["adapted"], answer["served"]) == ("source", False, "source")
        assert (await operate(server, "auto"))["guard"]["state"] == "shadow"
        answer = await server.predict("s", rows(8))
        assert (answer["policy"], answer["adapted"]) == ("tent", True)


@pytest.mark.parametrize("before", ["none", "budget"])
async def test_labels_of_before_a_guarantee_say_nothing_to_it(loaded: Loaded, before: str) -> None:
    """Its rows are counted from 0 again, and these were others."""
    generous = {"kind": "ledger", "eps": 1.0, "b0": 100.0, "c0": 0.0}
    async with guarding(loaded, guard={"guarantee": generous | {"kind": before}}) as server:
        await server.open("s")
        await operate(server, "active")
        old = await server.predict("s", rows(8, 4))
        await server.json("PATCH", STREAM, json={"guard": {"guarantee": generous | {"b0": 99.0}}})
        new = await server.predict("s", rows(8, 4))
        asked = new.get("asked", [])
        assert asked, "the two differ somewhere"
        told = (await server.info("s"))["guard"]["guarantee"]["worst"]
        assert told == len(asked), "none of its labels came"
        source = (await server.predict("s", rows(8, 4), adapt=False))["classes"]
        adapted = np.where(np.isin(np.arange(8), asked), new["classes"], source).tolist()
        await label(server, old["request"], adapted)
        assert (await server.info("s"))["guard"]["guarantee"]["worst"] == told


async def test_labels_buy_room_in_a_ledger(loaded: Loaded) -> None:
    ledger = {"kind": "ledger", "eps": 0.0, "b0": 3.0, "c0": 0.0}
    async with guarding(loaded, guard={"guarantee": ledger}) as server:
        await server.open("s")
        await operate(server, "active")
        answers = [answer for answer, _, _ in await both(server, range(8))]
        asked = [(answer, row) for answer in answers for row in answer.get("asked", [])]
        assert len(asked) == 3
        assert (await server.info("s"))["guard"]["guarantee"]["remaining"] == 0
        answer, row = asked[0]
        labels: list[int | None] = [None] * 8
        labels[row] = answer["classes"][row]
        await label(server, answer["request"], labels)
        guarantee = (await server.info("s"))["guard"]["guarantee"]
        assert guarantee["remaining"] > 0
        assert guarantee["worst"] == 1, "two that may be wrong, one that was right where the source was not"


# Prediction sets


@pytest.fixture(scope="module")
def calibration() -> dict[str, torch.Tensor]:
    """Scores of clean rows, and their labels."""
    draw = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(CALIBRATION_ROWS, len(CLASSES), generator=draw)
    noisy = logits + torch.randn(logits.shape, generator=draw)
    return {"calibration/logits": logits, "calibration/labels": noisy.argmax(1)}


@asynccontextmanager
async def calibrated(loaded: Loaded, calibration: dict[str, torch.Tensor], **guard: Any) -> AsyncIterator[Server]:
    async with running(estimating(loaded, 0.5, **calibration), guard=SMALL | guard) as made:
        yield made


async def test_answers_with_sets_say_where_they_abstain(loaded: Loaded, calibration: dict[str, torch.Tensor]) -> None:
    conformal = Conformal.calibrated(calibration["calibration/logits"], calibration["calibration/labels"])
    async with calibrated(loaded, calibration) as server:
        await server.open("s", guard={"miscoverage": 0.2})
        await server.open("without")
        sizes = set()
        for seed in range(6):
            answer = await server.predict("s", rows(16, seed))
            inside = conformal.sets(np.array(answer["probabilities"]), 0.2)
            assert answer["sets"] == [np.flatnonzero(row).tolist() for row in inside]
            assert answer["abstain"] == [len(one) != 1 for one in answer["sets"]]
            sizes |= {len(one) for one in answer["sets"]}
            plain = await server.predict("without", rows(16, seed))
            assert not plain.keys() & {"sets", "abstain"}
        assert len(sizes) > 1


async def test_sets_follow_the_labels(loaded: Loaded, calibration: dict[str, torch.Tensor]) -> None:
    """Labels that are in no set make them larger, until none is missed."""
    async with calibrated(loaded, calibration, miscoverage=0.2, miscoverage_step=0.05) as server:
        await server.open("s")
        alpha, missed, labelled, sizes = 0.2, 0, 0, []
        for seed in range(12):
            answer = await server.predict("s", rows(8, seed))
            sizes.append(sum(map(len, answer["sets"])))
            truth = np.array(answer["probabilities"]).argmin(1)
            await label(server, answer["request"], truth.tolist())
            wrong = sum(label not in one for label, one in zip(truth.tolist(), answer["sets"], strict=True))
            alpha += 0.05 * (0.2 * 8 - wrong)
            missed, labelled = missed + wrong, labelled + 8
            told = (await report(server))["sets"]
            assert told["alpha"] == pytest.approx(alpha)
            assert (told["labels"], told["coverage"]) == (labelled, pytest.approx(1 - missed / labelled))
        assert max(sizes) == 8 * len(CLASSES)


async def test_a_model_without_calibration_says_what_to_run(server: Server) -> None:
    command = "run: tta-server prepare CONFIG --data CLEAN_IMAGES --only calibration"
    await server.open("s")
    error = error_of(await server.client.patch(STREAM, json={"guard": {"miscoverage": 0.1}}), 409)
    assert command in error
    assert (await server.info("s"))["guard_settings"]["miscoverage"] is None
    error = error_of(await server.client.put("/v1/streams/t", json={"guard": {"miscoverage": 0.1}}), 409)
    assert command in error
    assert (await server.client.get("/v1/streams/t")).status_code == 404, "nor is one made"


# Operators


@pytest.mark.parametrize("state", ["shadow", "canary", "active", "frozen", "quarantine"])
async def test_an_operator_chooses_the_state(server: Server, state: str) -> None:
    await server.open("s")
    told = await operate(server, state)
    assert (told["id"], told["guard"]["state"], told["guard"]["pinned"]) == ("s", state, True)
    if state != "shadow":
        since = {"from": "shadow", "rule": "operator", "action": "none", "statistic": None, "threshold": None}
        assert told["guard"]["since"] == since
    for seed in range(6):
        answer = await server.predict("s", rows(8, seed))
        assert answer["guard"]["state"] == state
        assert answer["served"] == ("source" if state in ("shadow", "quarantine") else "adapted")
    version = (await server.info("s"))["version"]
    assert version == (6 if state in ("shadow", "canary", "active") else 0)
    told = await operate(server, "auto")
    assert told["guard"]["pinned"] is False
    assert told["guard"]["state"] == ("shadow" if state == "quarantine" else state)


async def test_in_quarantine_the_state_rests(server: Server) -> None:
    await server.adapt("s", steps=3)
    version = (await server.info("s"))["version"]
    assert version > 0
    await operate(server, "quarantine")
    source = (await server.predict("s", rows(8), adapt=False, output="logits"))["logits"]
    for adapt in ({}, {"adapt": True}):
        answer = await server.predict("s", rows(8), output="logits", **adapt)
        assert answer["logits"] == source
        assert (answer["policy"], answer["adapted"], answer["served"]) == ("source", False, "source")
        assert answer["guard"]["state"] == "quarantine"
    over_v2 = (await server.infer(rows(8), sequence_id="s"))["parameters"]
    assert (over_v2["policy"], over_v2["guard_state"], over_v2["served"]) == ("source", "quarantine", "source")
    assert (await server.info("s"))["version"] == version


@pytest.mark.parametrize("body", [{"state": "off"}, {"state": "rollback"}, {"state": None}, {}, {"state": 1}, []])
async def test_no_such_state(server: Server, body: Any) -> None:
    await server.open("s")
    error = error_of(await server.client.post(GUARD, json=body), 400)
    assert "state" in error or body == []
    assert (await server.info("s"))["guard"]["pinned"] is False


async def test_without_a_guard_there_is_nothing_to_operate(server: Server) -> None:
    await server.open("s", guard={"enabled": False})
    await server.open("plain", policy="source")
    assert "guard.enabled" in (await operate(server, "frozen", 409))["error"]
    await operate(server, "frozen", 409, "plain")
    await operate(server, "frozen", 404, "nothing")


async def test_moves_are_events(server: Server) -> None:
    seen: list[tuple[str, dict[str, Any]]] = []
    async with following(server, "/v1/events") as events:
        await server.open("s")
        await server.predict("s", rows(8))
        await operate(server, "frozen")
        while len(seen) < 2:
            event = (await events.next()).data
            if event["kind"] == "guard":
                seen.append((event["stream"], event["fields"]))
    rise = {"from": "shadow", "to": "canary", "action": "none", "rule": "benefit", "statistic": 0.5, "threshold": 0.1}
    assert seen[0] == ("s", rise | {"version": 1})
    hand = {"from": "canary", "to": "frozen", "action": "none", "rule": "operator", "version": 1}
    assert seen[1] == ("s", hand)


async def test_a_toggled_stream_starts_in_the_shadow(server: Server) -> None:
    await server.open("s")
    for seed in range(6):
        await server.predict("s", rows(8, seed))
    assert (await server.info("s"))["guard"]["state"] == "active"
    told = await server.json("PATCH", STREAM, json={"adapt": False})
    assert told["guard"]["state"] == "off"
    assert (await server.predict("s", rows(8)))["guard"]["state"] == "off"
    await server.json("PATCH", STREAM, json={"adapt": True})
    told = (await server.info("s"))["guard"]
    assert (told["state"], told["evidence"], told["since"]["rule"]) == ("shadow", "unknown", "toggled")


# Settings


async def test_settings_of_a_guard(server: Server) -> None:
    """Those given go over those there are."""
    await server.open("s", guard={"shadow_rows": 7, "guarantee": {"kind": "budget", "b0": 5.0}})
    told = (await server.info("s"))["guard_settings"]
    assert (told["shadow_rows"], told["canary_rows"]) == (7, SMALL["canary_rows"])
    assert (told["guarantee"]["kind"], told["guarantee"]["b0"]) == ("budget", 5.0)
    await server.json("PATCH", STREAM, json={"guard": {"canary_rows": 9, "guarantee": {"eps": 0.5}}})
    told = (await server.info("s"))["guard_settings"]
    assert (told["shadow_rows"], told["canary_rows"]) == (7, 9)
    assert (told["guarantee"]["kind"], told["guarantee"]["b0"], told["guarantee"]["eps"]) == ("budget", 5.0, 0.5)
    await server.json("PUT", STREAM, json={"guard": {"shadow_rows": 8}})
    assert (await server.info("s"))["guard_settings"]["shadow_rows"] == 8
    await server.json("PATCH", STREAM, json={"guard": {"updates_per_minute": 3, "reset_rows": None}})
    told = (await server.info("s"))["guard_settings"]
    assert (told["updates_per_minute"], told["reset_rows"]) == (3, None)


@pytest.mark.parametrize(
    ("guard", "said"),
    [
        ({"shadow_rows": 0}, "guard.shadow_rows"),
        ({"least_benefit": 2}, "guard.least_benefit"),
        ({"least_benefit": "high"}, "guard.least_benefit"),
        ({"collapse": -1}, "guard.collapse"),
        ({"sensitivity": 1}, "guard.sensitivity"),
        ({"guarantee": {"kind": "promise"}}, "guard.guarantee.kind"),
        ({"guarantee": {"kind": "audit", "q": 0}}, "guard.guarantee.q"),
        ({"guarantee": {"eps": 1.5}}, "guard.guarantee.eps"),
        ({"guarantee": {"kind": "ledger", "b0": 0.4, "c0": 0.4}}, "b0 + c0 must be at least 1"),
        ({"miscoverage": 1}, "guard.miscoverage"),
        ({"enabled": "perhaps"}, "guard.enabled"),
        ({"guarantee": "audit"}, "guard.guarantee"),
        ({"guarantee": [1]}, "guard.guarantee"),
        ([], "/guard"),
        ("on", "/guard"),
    ],
)
@pytest.mark.parametrize("method", ["PATCH", "PUT"])
async def test_bad_settings_are_named(server: Server, guard: Any, said: str, method: str) -> None:
    await server.open("s")
    before = await server.info("s")
    response = await server.client.request(method, STREAM, json={"guard": guard})
    assert said in error_of(response, 400)
    assert (await server.info("s"))["guard_settings"] == before["guard_settings"]
    error_of(await server.client.put("/v1/streams/new", json={"guard": guard}), 400)
    assert await server.listed() == ["s"]


async def test_the_source_needs_no_guard(server: Server) -> None:
    await server.open("s", policy="source")
    assert (await server.info("s"))["guard"] is None
    assert "needs no guard" in error_of(await server.client.patch(STREAM, json={"guard": {"shadow_rows": 3}}), 409)


async def test_a_stream_of_the_source_that_is_to_adapt_is_guarded(server: Server) -> None:
    await server.open("s", policy="source")
    await server.json("PATCH", STREAM, json={"policy": "tent"})
    answer = await server.predict("s", rows(8))
    assert answer["guard"] is not None
    assert (await server.info("s"))["guard"] is not None


async def test_changes_on_a_busy_device_add_up(server: Server) -> None:
    await server.open("s")
    gate = await server.hold()
    for guard in ({"shadow_rows": 7}, {"canary_rows": 9}):
        await server.json("PATCH", STREAM, json={"guard": guard})
    gate.open()
    told = (await server.info("s"))["guard_settings"]
    assert (told["shadow_rows"], told["canary_rows"]) == (7, 9)


async def test_a_guard_is_turned_off_and_on(server: Server) -> None:
    await server.open("s", guard={"enabled": False})
    for seed in range(3):
        answer = await server.predict("s", rows(8, seed))
        assert (answer["guard"], answer["served"]) == (None, "adapted")
    await server.json("PATCH", STREAM, json={"guard": {"enabled": True, **SHADOW}})
    answer = await server.predict("s", rows(8))
    assert (answer["guard"]["state"], answer["served"]) == ("shadow", "source")


async def test_a_fork_is_guarded_alike_and_begins_in_the_shadow(server: Server) -> None:
    await server.open("s", guard={"canary_rows": 11})
    for seed in range(6):
        await server.predict("s", rows(8, seed))
    await server.json("POST", f"{STREAM}/fork", 201, json={"id": "t"})
    told = await server.info("t")
    assert told["guard_settings"]["canary_rows"] == 11
    assert (told["guard"]["state"], told["guard"]["evidence"], told["version"]) == ("shadow", "unknown", 6)
    assert (await server.info("s"))["guard"]["state"] == "active"


async def test_an_imported_stream_is_guarded(server: Server) -> None:
    await server.adapt("s", steps=6)
    file = (await server.client.get(f"{STREAM}/state")).content
    await server.json("PUT", "/v1/streams/t/state", 201, content=file)
    told = (await server.info("t"))["guard"]
    assert (told["state"], told["evidence"]) == ("shadow", "unknown")
    await server.json("PUT", f"{STREAM}/state", content=file)
    assert (await server.info("s"))["guard"]["evidence"] == "unknown"


async def test_a_stream_that_was_reset_starts_in_the_shadow(server: Server) -> None:
    await server.adapt("s", steps=8)
    await server.json("POST", f"{STREAM}/reset")
    answer = await server.predict("s", rows(4))
    assert (answer["guard"]["evidence"], answer["served"]) != ("unknown", "adapted")


async def test_a_stream_under_a_budget_never_goes_over_it(loaded: Loaded) -> None:
    """Over HTTP, and as it says so itself."""
    async with guarding(loaded, guard={"guarantee": {"kind": "budget", "eps": 0.01, "b0": 2.0}}) as server:
        await server.open("s")
        await operate(server, "active")
        wrong = 0
        kinds = set()
        for seen, (answer, _, source) in enumerate(await both(server, range(10)), 1):
            wrong += int((np.array(answer["classes"]) != source).sum())
            assert wrong <= 2 + 0.01 * 8 * seen
            kinds.add(answer["served"])
        told = (await server.info("s"))["guard"]["guarantee"]
        assert told == {
            "kind": "budget", "worst": wrong, "bound": pytest.approx(2.8), "remaining": pytest.approx(1 - wrong / 2.8)
        }  # fmt: skip
        assert kinds & {"mixed", "source"}


async def test_an_alarm_and_a_change_of_policy_meet(loaded: Loaded) -> None:
    """The labels came first: what they say is of the old policy, whose state is reset."""
    async with guarding(loaded, guard={"guarantee": AUDIT}) as server:
        await server.open("s")
        answers = await both(server, range(6))
        gate = await server.hold()
        postings = []
        for count, (answer, _, source) in enumerate(answers, 1):
            postings.append(asyncio.create_task(label(server, answer["request"], source.tolist())))
            await server.waiting(count)
        change = asyncio.create_task(server.json("PATCH", STREAM, json={"settings": {"lr": 0.02}}))
        await server.waiting(len(answers) + 1)
        gate.open()
        assert [one["taken"] for one in await asyncio.gather(*postings)] == [8] * len(answers)
        assert (await change)["state_kept"] is True
        info = await server.info("s")
        assert info["guard"]["since"]["rule"] in ("audit", "reset")
        assert info["version"] == 0
        await server.open("fresh", settings={"lr": 0.02})
        store = server.runner.engine.store
        streams = [server.service.tenant(DEFAULT_TENANT).stream(id) for id in ("s", "fresh")]
        assert same_state(*(store.export(stream.lane, stream) for stream in streams))


async def test_many_bad_labels_are_one_fault(server: Server) -> None:
    """However many they are, they cost the server nothing and the answer is short."""
    await server.open("s")
    request = (await server.predict("s", rows(4)))["request"]
    error = await label(server, request, ["a"] * 300_000, 400)
    assert "expected as many labels, got 300000" in error["error"]
    assert len(error["error"]) < 1000


async def test_who_may_only_begin_a_stream_anew_does_not_free_it(server: Server) -> None:
    """Over V2, with the right to predict: guarantee, what was spent of it, and an operator's choice stay."""
    await server.open("s", guard={"guarantee": {"kind": "budget", "eps": 0.0, "b0": 3.0}})
    await operate(server, "quarantine")
    for _ in range(2):
        answer = await server.infer(rows(4), sequence_id="s", sequence_start=True)
        assert answer["parameters"]["served"] == "source"
    told = await server.info("s")
    assert (told["guard"]["state"], told["guard"]["pinned"]) == ("quarantine", True)
    assert told["guard_settings"]["guarantee"]["b0"] == 3.0
