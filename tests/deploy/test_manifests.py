"""What deploys the server fits its schemas, itself and the server."""

from __future__ import annotations

import importlib.util
import math
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tta_server import __version__
from tta_server.app import check_exposure, create_app, load_models
from tta_server.demo.run import CONFIG
from tta_server.errors import ConfigError
from tta_server.runner import HANGS
from tta_server.settings import Right, Settings, load_settings

DEPLOY = Path(__file__).parent.parent.parent / "deploy"
BASE = DEPLOY / "k8s" / "base"
MONITORING = DEPLOY / "k8s" / "monitoring"
TOKENS = {"TTA_TOKEN": "a-client's-token-to-test-with", "TTA_METRICS_TOKEN": "prometheus'-token-to-test-with"}

Yaml = dict[str, Any]


def read(path: Path) -> list[Yaml]:
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


def run(*command: str) -> str:
    """What a checker prints; fails with it where it finds a fault."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def module(name: str, *arguments: str) -> str:
    """Runs a checker that is a Python package."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"the package {name.replace('_', '-')} is not installed")
    return run(sys.executable, "-m", name, *arguments)


def tool(*names: str) -> str:
    """The first of these programs that is installed."""
    found = [path for path in map(shutil.which, names) if path is not None]
    if not found:
        pytest.skip(f"no {' or '.join(names)} here")
    return found[0]


@pytest.fixture
def tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the environment, as the containers have them."""
    for name, value in TOKENS.items():
        monkeypatch.setenv(name, value)


# Compose


@pytest.fixture(scope="module")
def compose() -> Yaml:
    (document,) = read(DEPLOY / "compose.yaml")
    return document


def binds(service: Yaml) -> Iterator[tuple[Path, str]]:
    """A service's folders and files of this tree, and where it sees them."""
    for volume in service.get("volumes", ()):
        source, target, *_ = volume.split(":")
        if source.startswith("."):
            yield DEPLOY / source, target


def test_compose_file_fits_its_schema() -> None:
    module("check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(DEPLOY / "compose.yaml"))


def test_compose_shows_nothing_to_other_machines(compose: Yaml) -> None:
    ports = [port for service in compose["services"].values() for port in service.get("ports", ())]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_compose_server_stores_streams_on_a_volume_and_has_the_time_to_save_them(compose: Yaml, tokens: None) -> None:
    server, settings = compose["services"]["server"], load_settings(DEPLOY / "demo.yaml")
    mounts = dict(volume.split(":")[:2] for volume in server["volumes"])
    (name,) = [source for source, target in mounts.items() if target == settings.state.folder]
    assert name in compose["volumes"]
    assert int(server["stop_grace_period"].removesuffix("s")) > longest_shutdown(settings)


def test_compose_services_find_their_files_and_images(compose: Yaml) -> None:
    built = {service["image"] for service in compose["services"].values() if "build" in service}
    for name, service in compose["services"].items():
        for source, _ in binds(service):
            assert source.exists(), (name, source)
        _, _, tag = service["image"].partition(":")
        assert service["image"] in built or tag.strip("v").count(".") == 2, f"{name}: a version of its own, not latest"


def test_demo_config_is_the_packaged_demo_with_tokens(tokens: None) -> None:
    settings, packaged = load_settings(DEPLOY / "demo.yaml"), load_settings(CONFIG)
    assert settings.models == packaged.models
    check_exposure(with_host(settings, "0.0.0.0"), insecure=False)


@pytest.mark.anyio
async def test_demo_server_answers_who_asks_it(tokens: None, tmp_path: Path, compose: Yaml) -> None:
    """Prometheus with its token at the paths of its config; the client; nobody else."""
    for source, target in binds(compose["services"]["server"]):
        assert Path(target).parent == Path("/models")
        shutil.copy(source, tmp_path / Path(target).name)
    settings = load_settings(tmp_path / "config.yaml")
    app = create_app(settings, load_models(settings))
    (prometheus,) = read(DEPLOY / "prometheus" / "prometheus.yml")
    paths = [job.get("metrics_path", "/metrics") for job in prometheus["scrape_configs"]]
    assert len(paths) == 2
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server:8000") as client:

        async def status(path: str, token: str | None) -> int:
            headers = {} if token is None else {"authorization": f"Bearer {TOKENS[token]}"}
            return (await client.get(path, headers=headers)).status_code

        for path in paths:
            assert await status(path, "TTA_METRICS_TOKEN") == 200, path
            assert await status(path, "TTA_TOKEN") == 403, path
            assert await status(path, None) == 401, path
        assert await status("/v1/streams", "TTA_TOKEN") == 200
        assert await status("/v1/streams", "TTA_METRICS_TOKEN") == 403


def test_prometheus_finds_the_server_and_grafana_prometheus(compose: Yaml) -> None:
    services = compose["services"]
    (prometheus,) = read(DEPLOY / "prometheus" / "prometheus.yml")
    for job in prometheus["scrape_configs"]:
        (static,) = job["static_configs"]
        for target in static["targets"]:
            host, _, port = target.partition(":")
            assert any(one.endswith(f":{port}") for one in services[host]["ports"])
        (token,) = services["prometheus"]["configs"]
        assert token["target"] == f"/etc/prometheus/{job['authorization']['credentials_file']}"
    content = compose["configs"][token["source"]]["content"]
    assert content == services["server"]["environment"]["TTA_METRICS_TOKEN"]
    assert services["client"]["environment"]["TTA_TOKEN"] == services["server"]["environment"]["TTA_TOKEN"]

    provisioning = DEPLOY / "grafana" / "provisioning"
    seen = dict(binds(services["grafana"]))
    (source,) = read(provisioning / "datasources" / "prometheus.yaml")[0]["datasources"]
    assert (source["uid"], source["url"]) == ("prometheus", "http://prometheus:9090")
    assert source["jsonData"]["timeInterval"] == prometheus["global"]["scrape_interval"]
    (provider,) = read(provisioning / "dashboards" / "tta-server.yaml")[0]["providers"]
    assert provider["options"]["path"] == seen[DEPLOY / "grafana" / "dashboards"]
    home = Path(services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert str(home.parent) == provider["options"]["path"]
    assert (DEPLOY / "grafana" / "dashboards" / home.name).is_file()


def test_prometheus_config_is_valid(tmp_path: Path) -> None:
    promtool = tool("promtool")
    folder = tmp_path / "prometheus"
    shutil.copytree(DEPLOY / "prometheus", folder)
    (folder / "metrics-token").write_text(TOKENS["TTA_METRICS_TOKEN"], encoding="utf-8")
    run(promtool, "check", "config", str(folder / "prometheus.yml"))


# Kubernetes


@pytest.fixture(scope="module")
def stateful() -> Yaml:
    (document,) = read(BASE / "statefulset.yaml")
    return document


@pytest.fixture(scope="module")
def server(stateful: Yaml) -> Yaml:
    """The server's container."""
    (container,) = stateful["spec"]["template"]["spec"]["containers"]
    return dict(container)


def with_host(settings: Settings, host: str) -> Settings:
    return settings.model_copy(update={"server": settings.server.model_copy(update={"host": host})})


def longest_shutdown(settings: Settings) -> float:
    """Seconds that the server may take to end, see ``app.serve``."""
    return math.ceil(settings.limits.drain_seconds + HANGS + settings.state.flush_seconds) + 5


def ports(container: Yaml) -> dict[str, int]:
    return {port["name"]: port["containerPort"] for port in container["ports"]}


def test_manifests_fit_their_schemas() -> None:
    (kustomization,) = read(BASE / "kustomization.yaml")
    files = [*kustomization["resources"], "secret.example.yaml"]
    module("kubernetes_validate", "--strict", *(str(BASE / file) for file in files))


@pytest.mark.parametrize("folder", ["base", "gpu", "monitoring"])
def test_kustomizations_build_what_fits(folder: str, tmp_path: Path) -> None:
    program = tool("kustomize", "kubectl")
    command = "build" if Path(program).name == "kustomize" else "kustomize"
    built = tmp_path / "built.yaml"
    built.write_text(run(program, command, str(DEPLOY / "k8s" / folder)), encoding="utf-8")
    kinds = {one["kind"]: one for one in read(built)}
    if folder == "monitoring":
        assert set(kinds) == {"ServiceMonitor"}
        return
    assert set(kinds) == {"ConfigMap", "Service", "StatefulSet", "NetworkPolicy"}
    module("kubernetes_validate", "--strict", str(built))
    pod = kinds["StatefulSet"]["spec"]["template"]["spec"]
    tag = __version__ if folder == "base" else f"{__version__}-gpu"
    assert {one["image"] for one in (*pod["initContainers"], *pod["containers"])} == {f"tta-server:{tag}"}
    assert pod["containers"][0]["resources"]["limits"].get("nvidia.com/gpu") == (1 if folder == "gpu" else None)
    (config,) = [one["configMap"]["name"] for one in pod["volumes"] if "configMap" in one]
    assert config == kinds["ConfigMap"]["metadata"]["name"]
    assert yaml.safe_load(kinds["ConfigMap"]["data"]["config.yaml"]) == read(BASE / "config.yaml")[0]


def test_pod_runs_the_config_of_its_config_map(tokens: None, stateful: Yaml, server: Yaml) -> None:
    pod = stateful["spec"]["template"]["spec"]
    settings = load_settings(BASE / "config.yaml")
    mounts = {mount["name"]: mount["mountPath"] for mount in server["volumeMounts"]}
    assert set(mounts) == {volume["name"] for volume in pod["volumes"]} | {
        claim["metadata"]["name"] for claim in stateful["spec"]["volumeClaimTemplates"]
    }
    assert server["args"][:2] == ["serve", f"{mounts['config']}/config.yaml"]
    assert {one["name"] for one in server["env"]} >= set(TOKENS)
    (model,) = settings.models.values()
    (packaged,) = load_settings(CONFIG).models.values()
    assert Path(model.weights).parent.is_relative_to(mounts["data"])
    assert model.model_copy(update={"weights": packaged.weights}) == packaged
    check_exposure(with_host(settings, "0.0.0.0"), insecure=False)
    assert settings.server.metrics is not None
    assert ports(server) == {"http": settings.server.port, "metrics": settings.server.metrics.port}


def test_pod_has_the_time_that_a_shutdown_takes(tokens: None, stateful: Yaml, server: Yaml) -> None:
    longest = server["lifecycle"]["preStop"]["sleep"]["seconds"] + longest_shutdown(load_settings(BASE / "config.yaml"))
    assert stateful["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] > longest


def test_pod_stores_streams_on_its_volume(tokens: None, server: Yaml) -> None:
    (data,) = [mount for mount in server["volumeMounts"] if mount["name"] == "data"]
    folder = load_settings(BASE / "config.yaml").state.folder
    assert folder is not None
    assert Path(folder).is_relative_to(data["mountPath"])
    assert not data.get("readOnly", False)


def test_pod_may_do_little(stateful: Yaml, server: Yaml) -> None:
    pod = stateful["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"]
    assert not pod["automountServiceAccountToken"]
    for container in (*pod["initContainers"], server):
        context = container["securityContext"]
        assert context["readOnlyRootFilesystem"]
        assert not context["allowPrivilegeEscalation"]
        assert context["capabilities"] == {"drop": ["ALL"]}


def test_probes_and_policies_name_ports_of_the_pod(server: Yaml) -> None:
    (policy,) = read(BASE / "networkpolicy.yaml")
    named = [server[f"{kind}Probe"]["httpGet"]["port"] for kind in ("startup", "readiness", "liveness")]
    named += [port["port"] for rule in policy["spec"]["ingress"] for port in rule["ports"]]
    named += [port["targetPort"] for service in read(BASE / "services.yaml") for port in service["spec"]["ports"]]
    assert set(named) == set(ports(server))


def test_services_and_monitors_find_what_they_select(stateful: Yaml) -> None:
    services = {service["metadata"]["name"]: service for service in read(BASE / "services.yaml")}
    labels = stateful["spec"]["template"]["metadata"]["labels"].items()
    assert services[stateful["spec"]["serviceName"]]["spec"]["clusterIP"] == "None"
    for selector in (
        stateful["spec"]["selector"]["matchLabels"],
        *(service["spec"]["selector"] for service in services.values()),
        read(BASE / "networkpolicy.yaml")[0]["spec"]["podSelector"]["matchLabels"],
    ):
        assert selector.items() <= labels
    (prometheus,) = read(DEPLOY / "prometheus" / "prometheus.yml")
    jobs = {job["job_name"]: job for job in prometheus["scrape_configs"]}
    monitors = read(MONITORING / "servicemonitors.yaml")
    assert [monitor["metadata"]["name"] for monitor in monitors] == list(jobs)
    (secret,) = read(BASE / "secret.example.yaml")
    for monitor in monitors:
        spec, job = monitor["spec"], jobs[monitor["metadata"]["name"]]
        wanted = spec["selector"]["matchLabels"].items()
        (service,) = [one for one in services.values() if wanted <= one["metadata"]["labels"].items()]
        (endpoint,) = spec["endpoints"]
        assert endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}
        # The same jobs as in prometheus.yml, by the same names: dashboards and rules fit both.
        assert endpoint["path"] == job.get("metrics_path", "/metrics")
        assert spec.get("sampleLimit") == job.get("sample_limit")
        renamed = [one["replacement"] for one in endpoint.get("relabelings", ()) if one["targetLabel"] == "job"]
        assert (renamed or [service["metadata"]["labels"][spec["jobLabel"]]]) == [job["job_name"]]
        credentials = endpoint["authorization"]["credentials"]
        assert credentials["name"] == secret["metadata"]["name"]
        assert credentials["key"] in secret["stringData"]


def test_secret_has_what_the_pod_asks_for_and_no_token_that_works(
    server: Yaml, monkeypatch: pytest.MonkeyPatch, tokens: None
) -> None:
    (secret,) = read(BASE / "secret.example.yaml")
    asked = {one["name"]: one["valueFrom"]["secretKeyRef"] for one in server["env"] if one["name"] in TOKENS}
    rights = {right for token in load_settings(BASE / "config.yaml").auth.tokens for right in token.rights}
    assert rights == {Right.PREDICT, Right.STREAMS, Right.METRICS}
    for name, reference in asked.items():
        assert reference["name"] == secret["metadata"]["name"]
        monkeypatch.setenv(name, secret["stringData"][reference["key"]])
        with pytest.raises(ConfigError, match="token"):
            load_settings(BASE / "config.yaml")
        monkeypatch.setenv(name, TOKENS[name])
