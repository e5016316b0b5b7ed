"""The dashboards: current, within the rules of Grafana's dashboard linter, and of families that the server has."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import httpx
import promql_parser
import pytest

from tests.deploy.promql import (
    BOARDS,
    DEPLOY,
    Json,
    expressions,
    family,
    filled,
    panels,
    read_board,
    rules,
    selectors,
    series,
)
from tta_server.app import create_app, load_models
from tta_server.demo.run import CONFIG
from tta_server.settings import load_settings

DOCS = Path(__file__).parent.parent.parent / "docs"
UNITS = {"none", "short", "percentunit", "s", "bytes", "Bps", "reqps", "ops", "cps", "cpm"}
"""Of Grafana's, those in use here."""
COUNTING = {"rate", "irate", "increase"}
OF_PROMETHEUS = {"up", "ALERTS"}
WITH_CUDA = {"tta_device_memory_bytes"}
"""Families of the server that are there on some machines only."""


@pytest.fixture(params=BOARDS)
def board(request: pytest.FixtureRequest) -> Json:
    return read_board(request.param)


def test_the_committed_files_are_what_the_code_writes(tmp_path: Path) -> None:
    subprocess.run([sys.executable, str(DEPLOY / "grafana" / "build.py"), str(tmp_path)], check=True)
    committed = {path.name: path.read_bytes() for path in (DEPLOY / "grafana" / "dashboards").iterdir()}
    assert committed == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert sorted(committed) == sorted(f"{uid}.json" for uid in BOARDS)


# The linter's rules


def test_identity(board: Json) -> None:
    assert board["uid"] in BOARDS
    assert board["editable"] is False
    assert board["title"]
    assert "id" not in board
    numbers = [panel["id"] for panel in board["panels"]]
    assert len(set(numbers)) == len(numbers)


def test_template_datasource_job_and_instance(board: Json) -> None:
    variables = {variable["name"]: variable for variable in board["templating"]["list"]}
    (source,) = [variable for variable in variables.values() if variable["type"] == "datasource"]
    assert (source["name"], source["label"], source["query"]) == ("datasource", "Data Source", "prometheus")
    for name in ("job", "instance"):
        variable = variables[name]
        assert (variable["type"], variable["label"]) == ("query", name.title())
        assert (variable["multi"], variable["includeAll"], variable["allValue"]) == (True, True, ".+")
    for variable in variables.values():
        if variable["type"] == "query":
            assert variable["datasource"]["uid"] == "$datasource"
            assert variable["refresh"] == 2  # when the time range changes
            found = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"])
            assert found, variable["query"]
            promql_parser.parse(filled(found[1]))


def test_panels_have_title_description_unit_and_datasource(board: Json) -> None:
    for panel in panels(board):
        assert panel["title"]
        if panel["type"] == "text":
            continue
        assert panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"] in UNITS, panel["title"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert panel["targets"], panel["title"]
        names = [target["refId"] for target in panel["targets"]]
        assert len(set(names)) == len(names)
        for target in panel["targets"]:
            assert target["datasource"] == panel["datasource"]


def test_panels_fill_their_rows_and_do_not_overlap(board: Json) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= cells
    height = max(y for _, y in taken) + 1
    assert len(taken) == 24 * height


def test_queries_are_promql_of_the_chosen_servers(board: Json) -> None:
    for title, expression in expressions(board):
        for selector, calls in selectors(filled(expression)):
            name = selector.name or ""
            # Histograms of all streams are as they are now: their buckets go up and down.
            of_now = name == family(name) or name.startswith("tta_streams_")
            counts = name.endswith("_total") or not of_now
            assert counts != COUNTING.isdisjoint(calls), f"{title}: {name}, with {calls}"
        for selector, _ in selectors(filled(expression, job="JOB", instance="INSTANCE")):
            wanted = {(str(one.op), one.name): one.value for one in selector.matchers.matchers}
            assert wanted[("MatchOp.Re", "job")] == "JOB", title
            assert wanted[("MatchOp.Re", "instance")] == "INSTANCE", title
        assert set(re.findall(r"\[(.*?)\]", expression)) <= {"$__rate_interval"}, title


def test_linked_dashboards_and_variables_are_there(board: Json) -> None:
    links = re.findall(r"/d/([\w-]+)\?([^\"\s]*)", str(board["panels"]))
    for uid, arguments in links:
        variables = {variable["name"] for variable in read_board(uid)["templating"]["list"]}
        assert set(re.findall(r"var-(\w+)=", arguments)) <= variables


def test_the_line_in_drift_panels_is_that_of_the_docs() -> None:
    drawn = {
        step["value"]
        for uid in BOARDS
        for panel in panels(read_board(uid))
        if panel["title"].startswith("Drift score") and panel["type"] == "timeseries"
        for step in panel["fieldConfig"]["defaults"]["thresholds"]["steps"]
    }
    told = (DOCS / "metrics.md").read_text(encoding="utf-8")
    bad = re.search(r"`tta_stream_drift_zscore` \| the drift score \| above (\d+) \|", told)
    assert bad is not None
    assert drawn == {None, int(bad[1])}


async def exported() -> set[str]:
    """The families of the demo server's ``/metrics``."""
    settings = load_settings(CONFIG)
    app = create_app(settings, load_models(settings))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
        text = (await client.get("/metrics")).text
    return set(re.findall(r"^# TYPE (\w+)", text, re.MULTILINE))


@pytest.mark.anyio
async def test_every_family_is_read_and_every_family_that_is_read_exists() -> None:
    queries = [filled(expression) for uid in BOARDS for _, expression in expressions(read_board(uid))]
    queries += [rule["expr"] for kind in ("record", "alert") for rule in rules(kind)]
    recorded = {rule["record"] for rule in rules("record")}
    read = {name for query in queries for name in series(query)} - recorded - OF_PROMETHEUS
    families = await exported()
    assert {family(name) for name in read} - WITH_CUDA <= families
    assert {one for one in families if one.startswith("tta_")} <= {family(name) for name in read}
