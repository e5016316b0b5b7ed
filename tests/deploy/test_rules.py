"""Recording rules and alerts: Prometheus' own checks, and what else they should keep to."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.deploy.promql import BOARDS, DEPLOY, Json, family, read_board, rules, selectors, series

PROMETHEUS = DEPLOY / "prometheus"
RUNBOOKS = DEPLOY.parent / "docs" / "runbooks.md"


def promtool(*arguments: str | Path) -> str:
    """What it prints; fails with that where it finds a fault."""
    program = shutil.which("promtool")
    if program is None:
        pytest.skip("no promtool here")
    done = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def cases() -> list[Json]:
    """All of promtool's test cases."""
    files = sorted(PROMETHEUS.glob("tests/*.yml"))
    return [case for path in files for case in yaml.safe_load(path.read_text(encoding="utf-8"))["tests"]]


def test_rules_are_valid() -> None:
    promtool("check", "rules", *sorted(PROMETHEUS.glob("rules/*.yml")))


@pytest.mark.parametrize("path", sorted(PROMETHEUS.glob("tests/*.yml")), ids=lambda path: path.stem)
def test_alerts_fire_on_what_they_should(path: Path) -> None:
    assert "SUCCESS" in promtool("test", "rules", path)


def test_each_alert_has_a_case_in_which_it_fires_and_one_in_which_it_does_not() -> None:
    looked_at = [(test["alertname"], bool(test["exp_alerts"])) for case in cases() for test in case["alert_rule_test"]]
    names = {rule["alert"] for rule in rules("alert")}
    assert {name for name, fires in looked_at if fires} == names
    assert {name for name, fires in looked_at if not fires} == names


@pytest.mark.parametrize("rule", rules("alert"), ids=lambda rule: rule["alert"])
def test_alerts_tell_what_to_do(rule: Json) -> None:
    assert rule["alert"].startswith("Tta")
    assert rule["labels"]["severity"] in ("page", "ticket", "info")
    assert set(rule["annotations"]) == {"summary", "description", "runbook_url", "dashboard"}
    page, _, anchor = rule["annotations"]["runbook_url"].partition("#")
    headings = re.findall(r"^## (\w+)$", (DEPLOY.parent / page).read_text(encoding="utf-8"), re.MULTILINE)
    assert anchor == rule["alert"].lower()
    assert rule["alert"] in headings
    found = re.match(r"/d/([\w-]+)(?:\?(.*))?$", rule["annotations"]["dashboard"])
    assert found
    assert found[1] in BOARDS
    variables = {variable["name"] for variable in read_board(found[1])["templating"]["list"]}
    assert set(re.findall(r"var-(\w+)=", found[2] or "")) <= variables


def test_runbooks_are_those_of_the_alerts_in_their_order() -> None:
    headings = re.findall(r"^## (Tta\w+)$", RUNBOOKS.read_text(encoding="utf-8"), re.MULTILINE)
    assert headings == [rule["alert"] for rule in rules("alert")]


def test_recorded_series_are_named_by_rule_and_read() -> None:
    read = {name for kind in ("record", "alert") for rule in rules(kind) for name in series(rule["expr"])}
    for rule in rules("record"):
        level, metric, operations = rule["record"].split(":")
        assert re.fullmatch(r"instance(_\w+)?", level)
        # Of which metric it is: the name without _total, when it is a rate.
        sources = {name.removesuffix("_total") for name in series(rule["expr"])}
        assert any(source.split(":")[1 if ":" in source else 0].removesuffix("_bucket") in metric for source in sources)
        assert re.fullmatch(r"rate5m|increase6h|known|adapting|p\d\d(_rate5m)?", operations)
        assert rule["record"] in read


def test_counters_are_rated_and_streams_of_now_are_not() -> None:
    for rule in (*rules("record"), *rules("alert")):
        for selector, calls in selectors(rule["expr"]):
            name = selector.name or ""
            of_now = name == family(name) or name.startswith("tta_streams_")
            counts = name.endswith("_total") or not of_now
            assert counts == (not {"rate", "increase"}.isdisjoint(calls)), f"{name} in {rule['expr']}"
