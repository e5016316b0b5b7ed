from __future__ import annotations

import io
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from adapters.base import Segments
from tta_server.demo.client import CAMERAS, WORST_SEVERITY, Camera, DemoFailed, Session
from tta_server.demo.corruptions import CORRUPTIONS
from tta_server.demo.data import held_out
from tta_server.demo.display import live_table
from tta_server.demo.run import CONFIG, DemoOptions, run_demo
from tta_server.demo.train import WEIGHTS
from tta_server.drift.monitor import Verdict
from tta_server.engine.norm import Pass
from tta_server.engine.source import load_model
from tta_server.errors import ConfigError
from tta_server.settings import load_settings
from tta_server.trust.guard import State


def run(options: DemoOptions) -> str:
    """Runs the demo; returns what it printed."""
    output = io.StringIO()
    run_demo(options, Console(file=output, width=80))
    return output.getvalue()


def server_process(out: Path) -> int:
    """The id of the process that the demo's server ran in, from its log."""
    started = re.search(r"Started server process \[(\d+)\]", (out / "server.log").read_text())
    assert started
    return int(started[1])


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_short_demo_reports_every_stream_and_leaves_no_server(tmp_path: Path) -> None:
    printed = run(DemoOptions(tmp_path, batches=6, batch_size=8, interval=0))
    rows = {line.split()[0]: line.split() for line in printed.splitlines() if " → " in line}
    assert rows.keys() == {camera.id for camera in CAMERAS} | {"all"}
    assert all(float(rows[camera.id][3]) > -5 for camera in CAMERAS), "a drift score"
    assert {" ".join(rows[camera.id][4:-4]) for camera in CAMERAS} <= {*Verdict}
    assert {rows[camera.id][-4] for camera in CAMERAS} <= {*State}
    assert "42 of 42 batches" in printed
    assert "\x1b" not in printed
    assert "…" not in printed, "something did not fit into 80 columns"
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    example = np.load(tmp_path / "digits.npy")
    assert example.shape == (16, 1, 8, 8)
    assert example.dtype == np.uint8
    assert not is_alive(server_process(tmp_path))


def test_the_live_table_shows_streams_that_have_no_answer_yet() -> None:
    output = io.StringIO()
    session = Session("http://unused", held_out(), batches=2, batch_size=1, seed=0, interval=0.0)
    Console(file=output, width=80).print(live_table(session))
    assert all(camera.id in output.getvalue() for camera in CAMERAS)
    assert "0 of 14 batches" in output.getvalue()


def test_an_error_of_the_server_is_told_with_its_log_and_ends_it(tmp_path: Path) -> None:
    limit = load_settings(CONFIG).limits.rows_per_request
    with pytest.raises(DemoFailed, match=r"(?s)was answered 400: .*limits\.rows_per_request.*server's log") as failure:
        run(DemoOptions(tmp_path, batches=2, batch_size=limit + 1, interval=0))
    assert "Finished server process" in str(failure.value)
    assert not is_alive(server_process(tmp_path))


@pytest.mark.parametrize(
    "changes", [{"batches": 1}, {"batch_size": 0}, {"interval": -1.0}, {"seed": -1}], ids=lambda one: next(iter(one))
)
def test_impossible_options_are_refused_before_anything_starts(tmp_path: Path, changes: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="the demo needs"):
        run(DemoOptions(tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_severity_grows_evenly_to_the_worst_and_stays() -> None:
    camera = Camera("one", "blur", drifts_for=2 / 3)
    severities = [camera.severity(batch, 60) for batch in range(60)]
    assert severities[:41] == pytest.approx(np.linspace(0, WORST_SEVERITY, 41))
    assert set(severities[40:]) == {WORST_SEVERITY}


def test_the_switched_stream_has_drifted_fully_when_it_is_switched_on() -> None:
    [camera] = [one for one in CAMERAS if one.switched_on_at is not None]
    switch = camera.switch(60)
    assert switch == 30
    assert camera.severity(switch, 60) == WORST_SEVERITY


def test_the_cameras_show_every_corruption_and_a_clean_stream() -> None:
    assert {camera.corruption for camera in CAMERAS} == {*CORRUPTIONS, None}
    [clean] = [camera for camera in CAMERAS if camera.corruption is None]
    assert {clean.severity(batch, 60) for batch in range(60)} == {0.0}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corruption(name: str) -> None:
    corruption, images = CORRUPTIONS[name], held_out()[0][:20]
    before = images.copy()
    worst = corruption(images, 1.0, np.random.default_rng(3))
    assert worst.dtype == np.uint8
    assert worst.shape == images.shape
    assert (worst != images).any(axis=(1, 2, 3)).all()
    np.testing.assert_array_equal(images, before)
    np.testing.assert_array_equal(worst, corruption(images, 1.0, np.random.default_rng(3)))
    np.testing.assert_array_equal(images, corruption(images, 0.0, np.random.default_rng(3)))
    assert corruption(images[:0], 0.5, np.random.default_rng(3)).shape == (0, 1, 8, 8)
    with pytest.raises(ValueError, match="between 0"):
        corruption(images, 1.1, np.random.default_rng(3))


def test_the_bundled_model_is_accurate_as_configured_and_small() -> None:
    model = load_model("digits", load_settings(CONFIG), torch.device("cpu"))
    images, labels = held_out()
    x = torch.from_numpy(images).float() / 255
    classes = model.network.run(Pass(Segments([len(x)], x.device)), x).logits.argmax(1)
    assert (classes.numpy() == labels).mean() >= 0.97
    assert WEIGHTS.stat().st_size < 1_000_000
