"""The Dockerfile: facts that a build would need an engine to find out."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import pytest
import typer
import yaml

from tests.e2e.process import started
from tta_server.cli import cli
from tta_server.settings import Settings

ROOT = Path(__file__).parent.parent.parent
TARGETS = ("cpu", "gpu")


class Instruction(NamedTuple):
    """One of the Dockerfile's, its continued lines joined."""

    word: str
    rest: str


class Stage(NamedTuple):
    """What comes after one ``FROM``."""

    base: str
    instructions: list[Instruction]


def dockerfile() -> dict[str, Stage]:
    """The stages by name, in their order."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    stages: dict[str, Stage] = {}
    current: list[Instruction] = []
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        word, _, rest = line.partition(" ")
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            stages[name] = Stage(base, current := [])
        elif word:
            current.append(Instruction(word, rest))
    return stages


def of_image(target: str) -> list[Instruction]:
    """All instructions that make the image, those of the stages it is based on first."""
    stages = dockerfile()
    base, own = stages[target]
    return [*(of_image(base) if base in stages else []), *own]


def last(target: str, word: str) -> str:
    return [one.rest for one in of_image(target) if one.word == word][-1]


def in_context(path: PurePosixPath) -> bool:
    """Whether .dockerignore leaves the path in the build context: the last line that fits it or a folder above."""
    kept = True
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        pattern = line.removeprefix("!")
        if pattern and not pattern.startswith("#"):
            for one in (path, *path.parents[:-1]):
                if fnmatch(one.name if pattern.startswith("**/") else str(one), pattern.removeprefix("**/")):
                    kept = line.startswith("!")
    return kept


def services() -> dict[str, Any]:
    """Those of the compose file."""
    document: dict[str, Any] = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text(encoding="utf-8"))
    return dict(document["services"])


def copied() -> list[PurePosixPath]:
    """What the stages take from the build context."""
    copies = [one.rest.split() for stage in dockerfile().values() for one in stage.instructions if one.word == "COPY"]
    return [PurePosixPath(source) for words in copies if not words[0].startswith("--from=") for source in words[:-1]]


def test_plain_build_makes_the_cpu_image() -> None:
    assert list(dockerfile())[-1] == "cpu"


def test_what_is_copied_is_in_the_build_context() -> None:
    assert copied()
    for source in copied():
        files = [one for one in (ROOT / source).rglob("*") if one.is_file() and "__pycache__" not in one.parts]
        for path in [ROOT / source, *files]:
            assert path.exists()
            assert in_context(PurePosixPath(path.relative_to(ROOT))), path
    assert not in_context(PurePosixPath("tta_server/http/__pycache__/v1.pyc"))
    assert not in_context(PurePosixPath("deploy/compose.yaml"))


def test_the_wheel_finds_what_it_is_made_of() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    needed = {"pyproject.toml", project["project"]["readme"], *project["project"]["license-files"], *wheel}
    assert needed == {str(source) for source in copied()}


def test_images_have_the_torch_that_the_tests_run_with() -> None:
    default = re.search(r"^TORCH \?= (.+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert default
    assert Instruction("ARG", f'TORCH="{default[1]}"') in dockerfile()["build"].instructions
    assert services()["server"]["build"]["args"]["TORCH"] == f"${{TORCH:-{default[1]}}}"


@pytest.mark.parametrize("target", TARGETS)
def test_images_run_without_root(target: str) -> None:
    user = last(target, "USER")
    assert re.fullmatch("[1-9][0-9]*:[1-9][0-9]*", user), "a number: Kubernetes cannot tell whether a name is root"
    uid, gid = user.split(":")
    made = "".join(one.rest for one in of_image(target) if one.word == "RUN")
    assert f"--uid {uid} " in made
    assert f"--gid {gid} " in made


@pytest.mark.parametrize("target", TARGETS)
def test_the_user_owns_the_folder_that_states_are_stored_in(target: str) -> None:
    """Also where a volume of Docker's is mounted on it, which begins as a copy."""
    (folder,) = [volume.split(":")[1] for volume in services()["server"]["volumes"] if volume.startswith("state:")]
    made = [one.rest for one in of_image(target) if one.word == "RUN" and folder in one.rest]
    assert made
    assert re.search(rf"install --directory --owner tta --group tta [^&]*{folder}$", made[-1])


@pytest.mark.parametrize("target", TARGETS)
def test_both_stages_of_an_image_are_of_one_python(target: str) -> None:
    """The environment that one makes and the other runs links to the base image's interpreter."""
    (source,) = [one.rest for one in of_image(target) if one.word == "COPY"]
    stages, bases = dockerfile(), set()
    for stage in (target, source.split()[0].removeprefix("--from=")):
        while stage in stages:
            stage = stages[stage].base
        bases.add(stage)
    assert bases == {"python:${PYTHON}-slim"}


def test_health_check(tmp_path: Path) -> None:
    """The images' own command, against the real server: while it runs, and after."""
    command = json.loads(last("cpu", "HEALTHCHECK").partition(" CMD ")[2])
    assert last("gpu", "HEALTHCHECK") == last("cpu", "HEALTHCHECK")
    assert command[0] == "python"

    def is_healthy(url: str) -> bool:
        # What a proxy would answer tells nothing of the server.
        environment = {**os.environ, "TTA_HEALTH": url, "http_proxy": "http://127.0.0.1:9"}
        done = subprocess.run([sys.executable, *command[1:]], env=environment, capture_output=True, check=False)
        return done.returncode == 0

    with started(tmp_path) as running:
        asked = f"{running.url}/v2/health/ready"
        assert is_healthy(asked)
        assert not is_healthy(f"{running.url}/no/such/path")
    assert not is_healthy(asked)


@pytest.mark.parametrize("target", TARGETS)
def test_health_is_asked_of_the_port_that_is_served(target: str) -> None:
    port = last(target, "EXPOSE")
    asked = [one.rest for one in of_image(target) if one.word == "ENV" and "TTA_HEALTH=" in one.rest]
    assert asked[-1].endswith(f"TTA_HEALTH=http://127.0.0.1:{port}/v2/health/ready")
    served = accepted(json.loads(last(target, "CMD")))["port"]
    assert (Settings.model_fields["server"].default.port if served is None else served) == int(port)


def accepted(arguments: list[str]) -> dict[str, object]:
    """The options that the command line takes the arguments for. Raises ``click.UsageError`` where it would not."""
    group = typer.main.get_command(cli)
    command = group.commands[arguments[0]]  # type: ignore[attr-defined]  # a group has them
    parsed: dict[str, object] = command.make_context(arguments[0], arguments[1:]).params
    return parsed


def test_the_command_line_takes_what_containers_start_it_with() -> None:
    """The entry point's arguments wherever they are written."""
    commands = [json.loads(last(target, "CMD")) for target in TARGETS]
    commands.append(services()["client"]["command"])
    (stateful,) = yaml.safe_load_all((ROOT / "deploy/k8s/base/statefulset.yaml").read_text(encoding="utf-8"))
    commands.append(stateful["spec"]["template"]["spec"]["containers"][0]["args"])
    assert [command[0] for command in commands] == ["serve", "serve", "demo", "serve"]
    for command in commands:
        accepted(command)
