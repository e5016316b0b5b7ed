"""How many requests a step merges."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.serving import MODEL, load
from tta_server.engine import merging
from tta_server.engine.merging import LONGEST, MOST_ROWS, best_rows
from tta_server.engine.source import SourceModel


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> SourceModel:
    _, models = load(tmp_path_factory.mktemp("tiny"))
    return models[MODEL]


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (lambda rows: 0.010 + 0.0001 * rows, 64),
        (lambda rows: 0.001 * rows, 4),
        (lambda rows: 0.004 + 0.001 * rows, 64),
        (lambda rows: 0.010 + 0.001 * rows if rows <= 16 else 0.003 * rows, 16),
        (lambda rows: LONGEST / 3 * (1 + 0.1 * rows), 16),
        (lambda rows: 2 * LONGEST, 4),
    ],
    ids=[
        "calls cost more than rows", "rows cost all", "calls cost as four rows",
        "caches end at 16", "too long from 32", "too long from the start",
    ],
)  # fmt: skip
def test_as_many_as_pay(
    model: SourceModel, monkeypatch: pytest.MonkeyPatch, seconds: Callable[[int], float], expected: int
) -> None:
    monkeypatch.setattr(merging, "_step_seconds", lambda _, rows: seconds(rows))
    assert best_rows(model) == expected


def test_a_model_is_measured(model: SourceModel) -> None:
    rows = best_rows(model)
    assert 4 <= rows <= MOST_ROWS["cpu"]
    assert rows & (rows - 1) == 0
