"""What the documents show works."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
import yaml
from PIL import Image

import adapters
from adapters import Policy
from adapters.source import SourcePolicy
from tta_server.demo.data import training
from tta_server.drift.monitor import Monitor
from tta_server.drift.signals import SIGNALS
from tta_server.metrics.prometheus import PrometheusRecorder
from tta_server.metrics.scrape import Levels, Watchlist
from tta_server.prepare import GROUPS
from tta_server.settings import Settings, load_settings
from tta_server.state.keeper import Keeping, Tally
from tta_server.state.memory import Budget
from tta_server.state.records import Shutdown
from tta_server.types import Stream

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "tta_server" / "demo" / "config.yaml"
START_SECONDS = 60.0
MODEL = {"factory": "a:b", "weights": "w", "input": {"shape": [3]}}

USE_IT = """
import torch
from pathlib import Path
from tta_server.drift.monitor import Monitor
from tta_server.engine.engine import Engine
from tta_server.engine.source import load_model
from tta_server.policies import make_policy
from tta_server.settings import load_settings
from tta_server.state.memory import Budget
from tta_server.state.store import StateStore
from tta_server.types import Job, Lane, Plan, Stream

model = load_model("digits", load_settings(Path(CONFIG)), torch.device("cpu"))
policy = make_policy("sharpen", {"lr": 0.01})
engine = Engine({"digits": model}, StateStore(Budget(8), torch.device("cpu")), Monitor(20.0), 1.0)
lane, stream, x = Lane("digits", policy), Stream("s", "digits", policy, 1, 0.0), torch.rand(16, 1, 8, 8)
confidences = []
for _ in range(5):
    plan = Plan(lane, [Job(stream, print, lane, x)])
    engine.step(plan, lambda job, answer: confidences.append(answer.confidence.mean().item()))
assert stream.version == 5
assert confidences[-1] > confidences[0]
"""


def blocks(page: str, language: str) -> list[str]:
    return re.findall(
        rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )


def test_the_policy_of_the_guide_does_what_it_says() -> None:
    """In a process of its own, since it registers."""
    (policy,) = blocks("docs/add-a-policy.md", "python")
    script = f"{policy}\nCONFIG = {str(DEMO)!r}\n{USE_IT}"
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_config_of_the_readme_is_one() -> None:
    (config,) = blocks("README.md", "yaml")
    assert Settings.model_validate(yaml.safe_load(config)).models["mine"].policy == "tent"


@contextmanager
def demo_server(folder: Path) -> Iterator[str]:
    """``tta-server serve`` with the demo's model, in a process of its own; its address."""
    command = [sys.executable, "-m", "tta_server", "serve", str(DEMO), "--port", "0", "--state", str(folder / "state")]
    log = folder / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + START_SECONDS
        while not (found := re.findall(r"running on http://([\d.]+:\d+)", log.read_text())) or not _is_ready(found[0]):
            assert time.monotonic() < deadline, log.read_text()
            assert process.poll() is None, log.read_text()
            time.sleep(0.05)
        yield found[0]
    finally:
        process.terminate()
        process.wait(START_SECONDS)


def _is_ready(address: str) -> bool:
    try:
        return httpx.get(f"http://{address}/v2/health/ready").status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_examples_of_the_http_api_work(tmp_path: Path) -> None:
    """In the page's order, against a real server."""
    images, _ = training()
    np.save(tmp_path / "batch.npy", (images[:16] / 255).astype(np.float32))
    Image.fromarray(images[0, 0].astype(np.uint8)).save(tmp_path / "digit.png")
    page = (ROOT / "docs" / "http-api.md").read_text(encoding="utf-8")
    examples = re.findall(r"^```(bash|python)\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert {language for language, _ in examples} == {"bash", "python"}
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    with demo_server(tmp_path) as address:
        for language, example in examples:
            text = example.replace("localhost:8000", address)
            if language == "bash":
                text = f'set -e\ncurl() {{ command curl --silent --show-error --fail-with-body "$@"; }}\n{text}'
                command = ["bash", "-c", text]
            else:
                command = [sys.executable, "-W", "error", "-c", text]
            done = subprocess.run(
                command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=120
            )
            assert done.returncode == 0, f"{example}\n{done.stdout}\n{done.stderr}"
            assert done.stdout, example


def test_the_settings_of_the_http_api_are_some(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (config,) = blocks("docs/http-api.md", "yaml")
    (model,) = blocks("README.md", "yaml")
    monkeypatch.setenv("TTA_TOKEN", "0123456789abcdef")
    monkeypatch.setenv("MODELS", "/models")
    path = tmp_path / "config.yaml"
    path.write_text(f"{model}\n{config}")
    settings = load_settings(path)
    assert settings.auth.tokens[0].tenant == "hospital-a"
    assert settings.auth.tenants["hospital-a"].streams == 100
    assert settings.server.tls is not None
    assert settings.server.metrics is not None


@pytest.mark.parametrize("name", adapters.policies())
def test_every_policy_has_its_section(name: str) -> None:
    """In docs/policies.md: a row in the table to choose from, and a section that names every setting of its own."""
    text = (ROOT / "docs" / "policies.md").read_text(encoding="utf-8")
    assert f"\n| [{name}](#{name}) |" in text
    section = re.search(rf"^## `{name}`\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert section, f"docs/policies.md has no section of {name}"
    common = {one.name for one in dataclasses.fields(Policy)}
    settings = {one.name for one in dataclasses.fields(adapters.policies()[name])} - common
    missing = {one for one in settings if f"`{one}`" not in section[1]}
    assert not missing, f"the section of {name} does not say what {missing} is"
    assert all(f"**`{one}`**" in text for one in common)


def test_the_docs_name_every_artefact() -> None:
    text = (ROOT / "docs" / "policies.md").read_text(encoding="utf-8")
    rows = " ".join(line for line in text.splitlines() if line.startswith("| `"))
    assert all(f"`{group}`" in rows for group in GROUPS)


@pytest.mark.parametrize("page", ["README.md", *sorted(str(one.relative_to(ROOT)) for one in ROOT.glob("docs/*.md"))])
def test_links_and_files_exist(page: str) -> None:
    """Relative links, and paths in backticks that look like files of this project."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (ROOT / page).parent.joinpath(target).exists(), target
    for path in re.findall(
        r"`((?:adapters|tta_server|tests|benchmarks|docs|engine|state|drift|http)/[\w/]+\.\w+)`", text
    ):
        assert any((root / path).exists() for root in (ROOT, ROOT / "tta_server")), path


def test_the_docs_say_every_metric() -> None:
    """In docs/metrics.md, and none that is not there; the CUDA ones are not, without CUDA."""
    monitor = Monitor(20.0)
    streams = [Stream("s", "m", SourcePolicy(), 0, 0.0)]
    keeping = Keeping(True, "", False, 0, 0, Tally(), Shutdown(True), 0)
    levels = Levels(0, streams, {}, 0, 0, keeping, {"m": "d"}, {"m": True}, Budget())
    exposition = PrometheusRecorder(lambda: levels, monitor, Watchlist((), 20)).render().decode()
    families = set(re.findall(r"^# TYPE (tta_\w+)", exposition, re.MULTILINE))
    assert len(families) > 40
    text = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    told = {
        name for row in re.findall(r"^\| (`tta_.*?) \|", text, re.MULTILINE) for name in re.findall(r"tta_\w+", row)
    }
    assert told - {"tta_device_memory_bytes"} == families


def test_the_docs_say_every_signal() -> None:
    text = (ROOT / "docs" / "monitoring.md").read_text(encoding="utf-8")
    rows = " ".join(line for line in text.splitlines() if line.startswith("| `"))
    for name in SIGNALS:
        assert f"`{name}`" in rows or f"`{name.removeprefix('bn_distance')}`" in rows, name


def test_the_settings_of_the_monitoring_page_are_some() -> None:
    (config,) = blocks("docs/monitoring.md", "yaml")
    settings = Settings.model_validate(yaml.safe_load(config) | {"models": {"m": MODEL}})
    assert settings.monitor.watched == ("door-*",)
    assert settings.log.format == "json"
    assert settings.traces is not None
