"""What the dashboards and rules ask Prometheus."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import yaml

DEPLOY = Path(__file__).parent.parent.parent / "deploy"
BOARDS = ("tta-overview", "tta-adaptation", "tta-stream")

Json = dict[str, Any]


def read_board(uid: str) -> Json:
    """A dashboard as it is committed."""
    board: Json = json.loads((DEPLOY / "grafana" / "dashboards" / f"{uid}.json").read_text(encoding="utf-8"))
    return board


def panels(board: Json) -> list[Json]:
    """All but the rows' headings."""
    return [panel for panel in board["panels"] if panel["type"] != "row"]


def expressions(board: Json) -> Iterator[tuple[str, str]]:
    """Every query, after the title of what it is for, with Grafana's variables in it."""
    for panel in panels(board):
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"]
    for annotation in board["annotations"]["list"]:
        yield annotation["name"], annotation["expr"]


def filled(expression: str, window: str = "5m", **chosen: str) -> str:
    """What Grafana asks when variables have these values, or all there are. Raises ``KeyError`` for an unknown one."""
    values = {"__rate_interval": window, "model_name": ".*"}
    values |= dict.fromkeys(("job", "instance", "tenant", "stream"), ".+") | chosen
    return re.sub(r"\$(\w+)|\$\{(\w+)\}", lambda found: values[found[1] or found[2]], expression)


def selectors(expression: str) -> list[tuple[promql_parser.VectorSelector, tuple[str, ...]]]:
    """What it reads, each with the functions that it goes through. Raises ``ValueError`` for what is no PromQL."""
    calls: list[str] = []
    found: list[tuple[promql_parser.VectorSelector, tuple[str, ...]]] = []

    def enter(node: promql_parser.Expr) -> None:
        if isinstance(node, promql_parser.VectorSelector):
            found.append((node, tuple(calls)))
        if isinstance(node, promql_parser.Call):
            calls.append(node.func.name)

    def leave(node: promql_parser.Expr) -> None:
        if isinstance(node, promql_parser.Call):
            calls.pop()

    promql_parser.walk(promql_parser.parse(expression), enter, leave)
    return found


def series(expression: str) -> set[str]:
    """The names of what it reads."""
    return {selector.name for selector, _ in selectors(expression) if selector.name is not None}


def family(name: str) -> str:
    """Of a series by this name."""
    return re.sub("_(bucket|sum|count)$", "", name)


def rules(kind: str) -> list[Json]:
    """All rules of a kind, ``record`` or ``alert``."""
    files = sorted(DEPLOY.glob("prometheus/rules/*.yml"))
    groups = [group for path in files for group in yaml.safe_load(path.read_text(encoding="utf-8"))["groups"]]
    return [rule for group in groups for rule in group["rules"] if kind in rule]
