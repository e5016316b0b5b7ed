"""What the documents show works."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import adapters
from adapters import Policy
from tta_server.prepare import GROUPS
from tta_server.settings import Settings

ROOT = Path(__file__).parent.parent

USE_IT = """
import torch
from pathlib import Path
from tta_server.drift.monitor import Monitor
from tta_server.engine.engine import Engine
from tta_server.engine.source import load_model
from tta_server.policies import make_policy
from tta_server.settings import load_settings
from tta_server.state.store import StateStore
from tta_server.types import Job, Lane, Plan, Stream

model = load_model("digits", load_settings(Path(CONFIG)), torch.device("cpu"))
policy = make_policy("sharpen", {"lr": 0.01})
engine = Engine({"digits": model}, StateStore(8, torch.device("cpu")), Monitor(20.0), 1.0)
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
    config = ROOT / "tta_server" / "demo" / "config.yaml"
    script = f"{policy}\nCONFIG = {str(config)!r}\n{USE_IT}"
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_config_of_the_readme_is_one() -> None:
    (config,) = blocks("README.md", "yaml")
    assert Settings.model_validate(yaml.safe_load(config)).models["mine"].policy == "tent"


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
