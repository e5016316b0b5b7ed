"""A real Prometheus with the rules of ``deploy/`` scrapes the real server while some streams drift, others not."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import yaml

from tests.deploy.promql import BOARDS, expressions, filled, read_board, rules, series
from tta_server.demo.client import npy
from tta_server.demo.corruptions import CORRUPTIONS
from tta_server.demo.data import held_out
from tta_server.demo.run import CONFIG
from tta_server.state.records import Shutdown
from tta_server.state.sqlite import SqliteStore

ROOT = Path(__file__).parent.parent.parent
DEPLOY = ROOT / "deploy" / "prometheus"
WAIT_SECONDS = 60.0
ROUNDS, ROWS, SLOTS = 40, 32, 4
GUARDS: dict[str, dict[str, Any]] = {
    "drifting-noise": {},
    "drifting-audited": {"guarantee": {"kind": "audit", "q": 1.0}},
    "drifting-budget": {"guarantee": {"kind": "budget"}},
    "drifting-ledger": {"guarantee": {"kind": "ledger"}},
    "rejected": {"most_update": 1e-9, "rejected_steps": 1, "least_benefit": 0.0},
}
"""Streams with guards; the others have none. All of these drift, but the last is reset again and again."""
LABELLED = ("drifting-audited", "drifting-ledger")
REJECTED = "rejected"
DRIFTING = {f"drifting-{name}": name for name in ("noise", "blur", "contrast", "rotation")}
DRIFTING |= {name: "contrast" for name in GUARDS if name not in ("drifting-noise", REJECTED)}
CLEAN = [f"clean-{index}" for index in range(4)]
SOURCE_ONLY = "frozen"
"""A clean stream whose adaptation is off."""
CHOOSY = "choosy"
"""A clean stream of a policy that chooses among samples."""
WINDOW = "20s"
"""For Grafana's ``$__rate_interval``: a few scrapes, as there."""
NOTHING_TO_SHOW = {
    "tta_device_memory_bytes": "no CUDA device",
}
"""Families of which no server has series without the thing named."""

pytestmark = pytest.mark.skipif(
    shutil.which("prometheus") is None or shutil.which("promtool") is None, reason="no prometheus, no promtool here"
)


@dataclass(frozen=True)
class Scene:
    """The two of them, and since when."""

    server: httpx.Client
    prometheus: httpx.Client
    began: float

    def query(self, expression: str) -> list[tuple[dict[str, str], float]]:
        """What it gives now: labels and value."""
        return [(one["metric"], float(one["value"][1])) for one in self._ask("query", query=expression)]

    def value(self, expression: str) -> float:
        """Of the one series that it gives now."""
        ((_, value),) = self.query(expression)
        return value

    def has_shown(self, expression: str) -> bool:
        """Whether a graph of it since the beginning has any points. NaN, a quantile of nothing, is none."""
        found = self._ask("query_range", query=expression, start=self.began, end=time.time(), step=1)
        return any(value != "NaN" for one in found for _, value in one["values"])

    def firing(self, alert: str = "Tta.+") -> list[dict[str, str]]:
        """The labels of alerts that fire."""
        return [labels for labels, _ in self.query(f'ALERTS{{alertname=~"{alert}",alertstate="firing"}}')]

    def _ask(self, how: str, **what: str | float) -> list[dict[str, Any]]:
        answer = self.prometheus.get(f"/api/v1/{how}", params=what).json()
        assert answer["status"] == "success", f"{what}: {answer}"
        assert not answer.get("warnings"), f"{what}: {answer['warnings']}"
        found: list[dict[str, Any]] = answer["data"]["result"]
        return found


def wait_for(what: str, true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not true():
        assert time.monotonic() < deadline, f"never saw {what}"
        time.sleep(0.1)


def ready(client: httpx.Client, path: str) -> bool:
    try:
        return client.get(path).status_code == 200
    except httpx.TransportError:
        return False


@contextmanager
def running(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The command, until the end of the block."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=output, stderr=output, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def address(process: subprocess.Popen[bytes], log: Path, before: str) -> str:
    """Host and port, which the log of a process that was told to find one says behind ``before``."""
    found: list[str] = []

    def listens() -> bool:
        assert process.poll() is None, log.read_text()
        found[:] = re.findall(rf"{before}(127[\d.]+:\d+)", log.read_text())
        return bool(found)

    wait_for(f"where {process.args!r} listens", listens)
    return found[0]


def prepare_server(folder: Path) -> Path:
    """The demo's config, but with every request measured, and with a store: one that had an owner before, and that most
    states are in, since there is no room in memory."""
    config = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    for file in CONFIG.parent.glob("*.safetensors"):
        shutil.copy(file, folder)
    config["monitor"] = {"shadow_ratio": 1.0, "frozen_ratio": 1.0, "watched": [CLEAN[0]]}
    config["state"] = {"folder": "states"}
    config["limits"] = {"slots": SLOTS, "host_bytes": 10_000}
    before = SqliteStore(folder / "states")
    before.acquire()
    before.close(Shutdown(clean=True))
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def prepare_prometheus(folder: Path, target: str) -> Path:
    """Its config and rules as they are deployed, but quick, and without tokens."""
    config = yaml.safe_load((DEPLOY / "prometheus.yml").read_text(encoding="utf-8"))
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    for job in config["scrape_configs"]:
        del job["authorization"]
        job["static_configs"] = [{"targets": [target]}]
    (folder / "rules").mkdir()
    for file in DEPLOY.glob("rules/*.yml"):
        text = re.sub(r"for: \d+[mh]", "for: 2s", file.read_text(encoding="utf-8"))
        (folder / "rules" / file.name).write_text(text, encoding="utf-8")
    path = folder / "prometheus.yml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def drive(server: httpx.Client, rounds: int, drifts_at: int = 0) -> None:
    """Each round a request of every stream, corrupted from some round on where the stream drifts; and a reset."""
    images, labels = held_out()
    rng = np.random.default_rng(0)
    streams = [*DRIFTING, *CLEAN, SOURCE_ONLY, CHOOSY, REJECTED]
    for stream in streams:
        asked = {
            "adapt": stream != SOURCE_ONLY,
            "policy": "eta" if stream == CHOOSY else "tent",
            "guard": GUARDS.get(stream, {"enabled": False}),
        }
        server.put(f"/v1/streams/{stream}", json=asked).raise_for_status()
    for index in range(rounds):
        if index == rounds // 2:
            server.post(f"/v1/streams/{CLEAN[-1]}/reset").raise_for_status()
        for stream in streams:
            chosen = rng.integers(0, len(images), ROWS)
            batch = images[chosen]
            if stream in (*DRIFTING, REJECTED) and index >= drifts_at:
                batch = CORRUPTIONS[DRIFTING.get(stream, "blur")](batch, 0.8, rng)
            answer = server.post(f"/v1/streams/{stream}/predict", content=npy(batch)).raise_for_status().json()
            if stream in LABELLED:
                told = {"request": answer["request"], "labels": labels[chosen].tolist()}
                server.post(f"/v1/streams/{stream}/labels", json=told).raise_for_status()
                assert server.post(f"/v1/streams/{stream}/labels", json=told | {"request": "?"}).status_code == 404


@contextmanager
def scraped(folder: Path) -> Iterator[Scene]:
    """A server, and a Prometheus that scrapes it."""
    serve = [sys.executable, "-m", "tta_server", "serve", str(prepare_server(folder)), "--port", "0"]
    with running(serve, folder / "server.log") as process:
        target = address(process, folder / "server.log", "running on http://")
        scrape = [
            "prometheus",
            f"--config.file={prepare_prometheus(folder, target)}",
            f"--storage.tsdb.path={folder / 'series'}",
            "--web.listen-address=127.0.0.1:0",
        ]
        with running(scrape, folder / "prometheus.log") as process:
            asked = address(process, folder / "prometheus.log", 'msg="Listening on" address=')
            with (
                httpx.Client(base_url=f"http://{target}", timeout=WAIT_SECONDS) as server,
                httpx.Client(base_url=f"http://{asked}", timeout=WAIT_SECONDS) as prometheus,
            ):
                wait_for("a ready server", lambda: ready(server, "/v2/health/ready"))
                wait_for("a ready Prometheus", lambda: ready(prometheus, "/-/ready"))
                scene = Scene(server, prometheus, time.time())
                wait_for("a first scrape", lambda: [up for _, up in scene.query("up")] == [1, 1])
                yield scene


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """After the streams were driven, and everything was scraped and looked at since."""
    with scraped(tmp_path_factory.mktemp("prometheus")) as scene:
        drive(scene.server, ROUNDS)
        done = time.time()

        def is_settled() -> bool:
            groups = scene.prometheus.get("/api/v1/rules").json()["data"]["groups"]
            targets = scene.prometheus.get("/api/v1/targets").json()["data"]["activeTargets"]
            times = [group["lastEvaluation"] for group in groups] + [target["lastScrape"] for target in targets]
            # Alerts become firing some evaluations after what they are about was scraped.
            return all(np.datetime64(one.split("Z")[0], "ns") > np.datetime64(int(done + 5), "s") for one in times)

        wait_for("a scrape and an evaluation after the last request", is_settled)
        yield scene


@pytest.mark.parametrize("path", ["/metrics", "/metrics/streams", "/metrics/streams?match=drifting-*"])
def test_prometheus_own_check_finds_no_fault(scene: Scene, path: str) -> None:
    text = scene.server.get(path).text
    assert "drifting-noise" in text
    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_all_targets_and_rules_are_well(scene: Scene) -> None:
    targets = scene.prometheus.get("/api/v1/targets").json()["data"]["activeTargets"]
    assert {target["labels"]["job"]: target["health"] for target in targets} == {
        "tta-server": "up",
        "tta-streams": "up",
    }
    groups = scene.prometheus.get("/api/v1/rules").json()["data"]["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert {rule["health"] for rule in rules} == {"ok"}, [rule.get("lastError") for rule in rules]


@pytest.mark.parametrize("uid", BOARDS)
def test_every_query_of_a_dashboard_has_data(scene: Scene, uid: str) -> None:
    empty = []
    for place, expression in expressions(read_board(uid)):
        asked = filled(expression, WINDOW, model_name="digits", stream=f"{CLEAN[0]}|{next(iter(DRIFTING))}")
        if not scene.has_shown(asked) and not series(asked) <= NOTHING_TO_SHOW.keys():
            empty.append(f"{place}: {asked}")
    assert not empty, "\n".join(empty)


def test_every_rule_reads_what_is_there(scene: Scene) -> None:
    """Each recording rule has series. Most alerts should have none: what they read has."""
    for rule in rules("record"):
        assert scene.has_shown(rule["record"]), rule["record"]
    for rule in rules("alert"):
        for name in series(rule["expr"]):
            assert scene.has_shown(name), f"{rule['alert']} reads {name}"


def test_the_drift_alert_fires_for_the_streams_that_drift(scene: Scene) -> None:
    wait_for("an alert", lambda: len(scene.firing("TtaStreamDrifted")) >= len(DRIFTING))
    alerts = scene.firing("TtaStreamDrifted")
    assert sorted(alert["stream"] for alert in alerts) == sorted(DRIFTING)
    assert {alert["job"] for alert in alerts} == {"tta-server"}
    verdicts = {labels["stream"]: value for labels, value in scene.query('tta_stream_drifted{job="tta-server"}')}
    verdicts.pop(REJECTED, None)
    assert verdicts == dict.fromkeys(DRIFTING, 1) | dict.fromkeys([*CLEAN, SOURCE_ONLY, CHOOSY], 0)


def test_states_are_saved_and_move_through_all_tiers(scene: Scene) -> None:
    wait_for("everything saved", lambda: scene.value("tta_state_unsaved_streams") == 0)
    assert scene.value("tta_state_store_up") == 1
    assert scene.value('tta_state_saves_total{result="saved"}') >= len(DRIFTING)
    assert scene.value("tta_state_saved_bytes_total") > 0
    tiers = {labels["tier"]: value for labels, value in scene.query("tta_stream_states")}
    assert tiers["device"] in (SLOTS - 1, SLOTS), "a reset frees one"
    assert min(tiers["host"], tiers["disk"]) > 0
    adapting = len([*DRIFTING, *CLEAN, CHOOSY])
    assert adapting - 1 <= sum(tiers.values()) <= adapting + 1, "the frozen one has none, two with guards now and then"
    for moves in (
        "tta_stream_evictions_total",
        "tta_stream_page_outs_total",
        'tta_stream_page_ins_total{kind="waited"}',
    ):
        assert scene.value(moves) > ROUNDS, moves
    fetches = scene.value('tta_state_duration_seconds_count{operation="fetch"}')
    assert fetches == scene.value('tta_stream_page_ins_total{kind="waited"}')


def test_nothing_else_is_alarmed(scene: Scene) -> None:
    """All alerts have hardly any patience here. Of fourteen streams eight drift, of five with guards some fall back."""
    expected = {"TtaStreamDrifted", "TtaFleetDrift", "TtaGuardFallbacks"}
    assert {alert["alertname"] for alert in scene.firing()} <= expected
