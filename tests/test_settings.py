"""The config file: what is filled in, what is found where, and that every fault is told with its place."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from adapters.norm import NormPolicy
from adapters.tent import Tent
from tta_server.errors import BadInput, ConfigError
from tta_server.policies import make_policy
from tta_server.settings import (
    AccessSettings,
    GuardSettings,
    InputSettings,
    LimitSettings,
    Right,
    Settings,
    TenantSettings,
    load_access,
    load_settings,
)

MODEL: dict[str, Any] = {"factory": "package.module:build", "weights": "w.safetensors", "input": {"shape": [3, 8, 8]}}


def write(folder: Path, content: Any) -> Path:
    path = folder / "config.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
    return path


def read(folder: Path, **sections: Any) -> Settings:
    return load_settings(write(folder, {"models": {"m": MODEL}} | sections))


def fault(folder: Path, content: Any) -> str:
    """The message with which a config is refused."""
    with pytest.raises(ConfigError) as caught:
        load_settings(write(folder, content))
    assert str(folder / "config.yaml") in str(caught.value)
    return str(caught.value)


def test_a_config_of_the_least_that_is_needed(tmp_path: Path) -> None:
    settings = read(tmp_path)
    model = settings.models["m"]
    assert (model.policy, model.policies, model.head, model.classes, model.arguments) == ("tent", {}, None, (), {})
    assert (model.input.range, model.input.mean, model.input.std) == ((0.0, 1.0), (), ())
    assert settings.limits == LimitSettings()
    assert (settings.server.host, settings.server.port, settings.server.device) == ("127.0.0.1", 8000, "auto")
    assert (settings.server.tls, settings.server.metrics) == (None, None)
    assert (settings.auth.tokens, settings.auth.tenants, settings.auth.file) == ((), {}, None)
    assert (settings.streams.unknown_id, settings.streams.default) == ("create", None)
    assert settings.folder == tmp_path


def test_every_value_can_be_set(tmp_path: Path) -> None:
    sections: dict[str, Any] = {
        "server": {
            "host": "0.0.0.0",
            "port": 0,
            "tls": {"certificate": "c.pem", "key": "k.pem", "key_password": None, "client_ca": "ca.pem"},
            "metrics": {"host": "::1", "port": 9},
            "device": "cpu",
            "seed": 3,
        },
        "auth": {
            "tokens": ({"sha256": 64 * "a", "token": None, "tenant": "t", "rights": ("admin", "metrics")},),
            "tenants": {"t": dict.fromkeys(TenantSettings.model_fields, 7)},
            "file": "tokens.yaml",
        },
        "limits": dict.fromkeys(LimitSettings.model_fields, 7) | {"shed_share": 0.7},
        "streams": {"unknown_id": "refuse", "default": "shared", "consistency": {"mode": "stale", "steps": 2}},
        "guard": {
            **dict.fromkeys(GuardSettings.model_fields, 0.5),
            "outliers": 1.5,
            **dict.fromkeys(
                ("shadow_rows", "canary_rows", "cooldown_rows", "rejected_steps", "updates_per_minute", "reset_rows"), 7
            ),
            "enabled": False,
            "guarantee": {"kind": "audit", "eps": 0.5, "b0": 3.0, "c0": 4.0, "q": 0.5, "c": 9.0, "alpha": 0.5},
        },
        "labels": {"requests": 7, "bytes": 8, "seconds": 9.5},
        "monitor": {
            "estimate_every": 3, "enabled": False, "shadow_ratio": 1, "frozen_ratio": 0.5, "half_life": 2.5, "worst": 3,
            "watched": ("door-*",), "events": 7,
        },
    }  # fmt: skip
    settings = read(tmp_path, **json.loads(json.dumps(sections)))
    for name, values in sections.items():
        assert getattr(settings, name).model_dump() == values


def test_settings_cannot_be_changed_by_accident(tmp_path: Path) -> None:
    settings = read(tmp_path)
    with pytest.raises(ValueError, match="frozen"):
        settings.limits.queue = 1


# Variables


def test_variables_are_filled_in_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TTA_TEST_PORT", "8123")
    monkeypatch.setenv("TTA_TEST_NAME", "weights")
    model = MODEL | {
        "weights": "${TTA_TEST_NAME}/${TTA_TEST_NAME}.pt",
        "classes": ["a", "${TTA_TEST_NAME}"],
        "arguments": {"deep": {"er": ["${TTA_TEST_PORT}", "$TTA_TEST_PORT", "${}"]}},
    }
    settings = read(tmp_path, models={"m": model}, server={"port": "${TTA_TEST_PORT}"})
    assert settings.server.port == 8123
    assert settings.models["m"].weights == "weights/weights.pt"
    assert settings.models["m"].classes == ("a", "weights")
    assert settings.models["m"].arguments == {"deep": {"er": ["8123", "$TTA_TEST_PORT", "${}"]}}


def test_a_variable_may_be_empty_but_not_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TTA_TEST_EMPTY", "")
    assert read(tmp_path, server={"host": "a${TTA_TEST_EMPTY}b"}).server.host == "ab"
    monkeypatch.delenv("TTA_TEST_EMPTY")
    said = fault(tmp_path, {"models": {"m": MODEL}, "server": {"host": "a${TTA_TEST_EMPTY}b"}})
    assert "the environment variable TTA_TEST_EMPTY is not set" in said


def test_what_a_variable_holds_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TTA_TEST_OUTER", "${TTA_TEST_INNER}")
    assert read(tmp_path, server={"host": "${TTA_TEST_OUTER}"}).server.host == "${TTA_TEST_INNER}"


# Faults


def test_all_faults_are_listed_with_their_places(tmp_path: Path) -> None:
    content = {
        "models": {"m": MODEL | {"weights": 5, "input": {"shape": [3, 0]}}, "n": {"factory": "no colon"}},
        "server": {"port": "eighty", "host": None},
        "limits": {"queue": 0, "queue_seconds": "soon", "streams": 1.5},
        "streams": {"unknown_id": "ignore"},
        "monitor": {"shadow_ratio": 1.5, "half_life": 0},
    }
    said = fault(tmp_path, content)
    lines = {line.strip().split(":")[0]: line for line in said.splitlines()[1:]}
    assert set(lines) == {
        "models.m.weights", "models.m.input.shape.1", "models.n.factory", "models.n.weights", "models.n.input",
        "server.port", "server.host", "limits.queue", "limits.queue_seconds", "limits.streams", "streams.unknown_id",
        "monitor.shadow_ratio", "monitor.half_life",
    }  # fmt: skip
    assert "got 'eighty'" in lines["server.port"]
    assert "got 0" in lines["limits.queue"]
    assert "'create' or 'refuse'" in lines["streams.unknown_id"]
    assert "got" not in lines["models.n.weights"].split("required")[-1], "there is no value to show"


@pytest.mark.parametrize(
    ("content", "place"),
    [
        ({"models": {"m": MODEL}, "limit": {}}, "limit"),
        ({"models": {"m": MODEL}, "limits": {"qeue": 5}}, "limits.qeue"),
        ({"models": {"m": MODEL | {"weight": "x"}}}, "models.m.weight"),
        ({"models": {"m": MODEL | {"input": {"shape": [3], "size": 8}}}}, "models.m.input.size"),
        ({"models": {"m": MODEL}, "server": {"workers": 2}}, "server.workers"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_unknown_keys_are_refused(tmp_path: Path, content: Any, place: str) -> None:
    assert f"  {place}: Extra inputs are not permitted" in fault(tmp_path, content)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "must be a mapping with the keys models, server, auth, limits, streams, state, guard, labels, monitor"),
        ("- a\n- b", "must be a mapping"),
        ("just text", "must be a mapping"),
        ("models: {m: [", "cannot read the config file"),
        ("models: !!python/object/apply:os.getcwd []", "cannot read the config file"),
        ({"models": {"m": MODEL}, "folder": "/"}, "must be a mapping with the keys models"),
        ({}, "models: Field required"),
        ({"models": {}}, "models: "),
        ({"models": []}, "models: "),
    ],
    ids=str,
)
def test_files_that_are_no_config(tmp_path: Path, content: Any, said: str) -> None:
    assert said in fault(tmp_path, content)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the config file .*missing\.yaml"):
        load_settings(tmp_path / "missing.yaml")
    with pytest.raises(ConfigError, match="cannot read the config file"):
        load_settings(tmp_path)
    (tmp_path / "latin.yaml").write_bytes("models: ä".encode("latin1"))
    with pytest.raises(ConfigError, match="cannot read the config file"):
        load_settings(tmp_path / "latin.yaml")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"mean": [0.5], "std": [0.5]}, "one value for each of 3 channels; got 1 and 1"),
        ({"mean": [0.5] * 3}, "got 3 and 0"),
        ({"std": [0.5] * 3}, "got 0 and 3"),
        ({"mean": [0.5] * 3, "std": [0.5, 0, 0.5]}, "every std must be above 0"),
        ({"range": [1, 0]}, "range must run from low to high"),
        ({"range": [1, 1]}, "range must run from low to high"),
        ({"range": [1]}, "range"),
        ({"shape": []}, "shape"),
    ],
    ids=str,
)
def test_inputs_that_contradict_themselves(tmp_path: Path, values: dict[str, Any], said: str) -> None:
    content = {"models": {"m": MODEL | {"input": {"shape": [3, 8, 8]} | values}}}
    message = fault(tmp_path, content)
    assert "models.m.input" in message
    assert said in message


def test_a_range_can_be_left_open(tmp_path: Path) -> None:
    model = MODEL | {"input": {"shape": [3], "range": None}}
    assert read(tmp_path, models={"m": model}).models["m"].input == InputSettings(shape=(3,), range=None)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"resize": 7}, "resize is for inputs [channels, height, width] and at least as large as both sides"),
        ({"shape": [8], "resize": 8}, "got 8 for [8]"),
        ({"shape": [3, 8, 16], "resize": 12}, "got 12 for [3, 8, 16]"),
        ({"resize": 0}, "resize"),
    ],
    ids=str,
)
def test_resizing_has_to_leave_enough(tmp_path: Path, values: dict[str, Any], said: str) -> None:
    content = {"models": {"m": MODEL | {"input": {"shape": [3, 8, 8]} | values}}}
    message = fault(tmp_path, content)
    assert "models.m.input" in message
    assert said in message


def test_the_metrics_have_a_port_of_their_own(tmp_path: Path) -> None:
    """Where both are left to the system they get different ones."""
    content = {"models": {"m": MODEL}, "server": {"port": 8000, "metrics": {"port": 8000}}}
    assert "server: Value error, the metrics need a port of their own, got 8000 for both" in fault(tmp_path, content)
    settings = read(tmp_path, server={"port": 0, "metrics": {"port": 0}}).server
    assert settings.metrics is not None
    assert settings.metrics.port == settings.port == 0


# Tokens

SECRET = "a-secret-of-somebodys"


def access(folder: Path, text: str) -> AccessSettings:
    path = folder / "tokens.yaml"
    path.write_text(text, encoding="utf-8")
    return load_access(path)


def access_fault(folder: Path, text: str) -> str:
    """The message with which a file of tokens is refused."""
    with pytest.raises(ConfigError) as caught:
        access(folder, text)
    return str(caught.value)


def test_a_file_of_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TTA_TEST_TOKEN", SECRET)
    read = access(
        tmp_path, "tokens: [{token: '${TTA_TEST_TOKEN}', tenant: a}]\ntenants: {a: {requests_per_second: 0.5}}"
    )
    (token,) = read.tokens
    assert token.token is not None
    assert (token.token.get_secret_value(), token.sha256, token.tenant) == (SECRET, None, "a")
    assert token.rights == (Right.PREDICT, Right.STREAMS)
    assert read.tenants == {"a": TenantSettings(requests_per_second=0.5)}
    assert SECRET not in repr(read)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"tokens: [{{token: {SECRET}, sha256: {64 * 'a'}}}]", "tokens.0: Value error, give either sha256 or token"),
        ("tokens: [{tenant: a}]", "tokens.0: Value error, give either sha256 or token"),
        (f"tokens: [{{token: {SECRET[:15]}}}]", "tokens.0.token: "),
        (f"tokens: [{{sha256: {64 * 'A'}}}]", "tokens.0.sha256: "),
        (f"tokens: [{{token: {SECRET}, rights: [root]}}]", "tokens.0.rights.0: "),
        (f"tokens: [{{token: {SECRET}, tenant: a/b}}]", "tokens.0.tenant: "),
        ("tenants: {a b: {}}", "tenants."),
        ("tenants: {a: {streams: 0}}", "tenants.a.streams: Input should be greater than 0"),
        ("tenants: {a: {requests_per_second: 0}}", "tenants.a.requests_per_second: "),
        ("file: more.yaml", "file: Extra inputs are not permitted"),
        (f"- token: {SECRET}", "must be a mapping with the keys tokens, tenants"),
    ],
)
def test_files_of_tokens_that_do_not_fit(tmp_path: Path, text: str, said: str) -> None:
    message = access_fault(tmp_path, text)
    assert said in message
    assert "secret" not in message


@pytest.mark.parametrize(
    "text",
    [
        f"token: {SECRET}",
        f"auth: {{tokens: [{{token: {SECRET}}}]}}",
        f"tenants: {{a: {{token: {SECRET}}}}}",
        f"tokens:\n- token: *{SECRET}",
        f"tokens:\n- token: !{SECRET}",
        f"tokens:\n- token: {SECRET}\n   tenant: a",
        f"tokens:\n- token: '{SECRET}' b",
    ],
    ids=["by itself", "a whole section", "of a tenant", "alias", "tag", "indented", "quoted"],
)
def test_a_misplaced_token_does_not_get_into_the_message(tmp_path: Path, text: str) -> None:
    """It ends up in the log: when the file is read again, and at the start."""
    message = access_fault(tmp_path, text)
    assert str(tmp_path / "tokens.yaml") in message
    assert "secret" not in message


@pytest.mark.parametrize(
    "section", [{"token": SECRET}, [{"token": SECRET}], {"tenants": {"a": {"token": SECRET}}}], ids=str
)
def test_a_misplaced_token_of_the_config_does_not_either(tmp_path: Path, section: Any) -> None:
    message = fault(tmp_path, {"models": {"m": MODEL}, "auth": section})
    assert "  auth" in message
    assert SECRET not in message


@pytest.mark.parametrize("value", ["2024-13-45", "2024-02-30 10:00:00", "0b_", "0x_"])
def test_values_that_yaml_cannot_make(tmp_path: Path, value: str) -> None:
    """Its reader raises what Python raises for a date or number that there is not."""
    assert "cannot read the config file" in access_fault(tmp_path, f"tokens: []\nday: {value}")


@pytest.mark.parametrize("name", ["a b", "a/b", "", "a" * 129, "a\n"])
def test_names_that_do_not_fit_into_a_url(tmp_path: Path, name: str) -> None:
    assert "streams.default" in fault(tmp_path, {"models": {"m": MODEL}, "streams": {"default": name}})
    assert "models." in fault(tmp_path, {"models": {name: MODEL}})


def test_names_that_do(tmp_path: Path) -> None:
    name = "Aa0._:-" + 121 * "x"
    settings = read(tmp_path, models={name: MODEL}, streams={"default": name})
    assert (settings.streams.default, list(settings.models)) == (name, [name])


# Settings of policies


@pytest.mark.parametrize("written", ["1e-3", "1E-3", "0.001", "1.0e-3", "+1.e-03"])
def test_numbers_may_have_an_exponent(tmp_path: Path, written: str) -> None:
    text = yaml.safe_dump({"models": {"m": MODEL | {"policies": {"tent": {"lr": "HERE"}}}}})
    settings = load_settings(write(tmp_path, text.replace("HERE", written)))
    assert make_policy("tent", settings.models["m"].policies["tent"]) == Tent(lr=0.001)


@pytest.mark.parametrize("value", ["0.1", "nan", True, None, [0.1], float("nan"), float("inf"), -float("inf"), -1])
def test_learning_rates_that_are_not(value: Any) -> None:
    with pytest.raises(BadInput, match="lr"):
        make_policy("tent", {"lr": value})
    with pytest.raises(BadInput, match="momentum"):
        make_policy("tent", {"momentum": value})


def test_whole_numbers_are_numbers() -> None:
    made = make_policy("tent", {"lr": 0, "optimiser": "sgd", "momentum": 0})
    assert made == Tent("sgd", 0.0, 0.0)
    assert isinstance(made, Tent)
    assert type(made.lr) is float


@dataclass(frozen=True)
class Ranged(NormPolicy):
    """A policy with a setting of several numbers. Not registered."""

    bounds: tuple[float, float] = (0.0, 1.0)


def test_lists_are_taken_for_tuples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapters.policies", lambda: {"norm": Ranged})
    assert make_policy("norm", {"bounds": [0, 0.5], "alpha": 1}) == Ranged(alpha=1.0, bounds=(0.0, 0.5))
    with pytest.raises(BadInput, match="bounds"):
        make_policy("norm", {"bounds": ["0", 0.5]})


# Files


def test_files_are_looked_for_beside_the_config_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    beside, here = tmp_path / "beside", tmp_path / "here"
    for folder in (beside, here):
        (folder / "sub").mkdir(parents=True)
    monkeypatch.chdir(here)
    settings = read(beside)
    with pytest.raises(ConfigError) as caught:
        settings.find("sub/w.pt")
    assert all(str(folder / "sub" / "w.pt") in str(caught.value) for folder in (beside, here))
    (here / "sub" / "w.pt").touch()
    assert settings.find("sub/w.pt").resolve() == here / "sub" / "w.pt"
    (beside / "sub" / "w.pt").touch()
    assert settings.find("sub/w.pt") == beside / "sub" / "w.pt"
    assert settings.find(str(here / "sub" / "w.pt")) == here / "sub" / "w.pt"
    with pytest.raises(ConfigError, match="no file 'sub'"):
        settings.find("sub")


def test_the_config_may_be_named_from_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, {"models": {"m": MODEL}})
    (tmp_path / "w.safetensors").touch()
    monkeypatch.chdir(tmp_path)
    settings = load_settings(Path("config.yaml"))
    assert settings.find("w.safetensors").resolve() == tmp_path / "w.safetensors"


@pytest.mark.parametrize(
    "config",
    [
        {"tokns": [{"token": "SECRETSECRETSECRET"}]},
        {"atuh": {"tokens": [{"token": "SECRETSECRETSECRET"}]}},
        {"server": {"tls": {"certificate": "c", "key": "k", "key_password": 5318008}}},
        {"server": {"tlss": {"key_password": "SECRETSECRETSECRET"}}},
        {"auth": {"tokens": [{"token": "SECRETSECRETSECRET ${TTA_TEST_NOT_SET}"}]}},
    ],
    ids=["tokns", "atuh", "password", "tlss", "variable"],
)
def test_a_secret_under_a_wrong_name_is_in_no_message(tmp_path: Path, config: dict[str, Any]) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"models": {"m": MODEL}, **config}))
    with pytest.raises(ConfigError) as refused:
        load_settings(path)
    assert "SECRET" not in str(refused.value)
    assert "5318008" not in str(refused.value)


@pytest.mark.parametrize("text", ["[" * 3000, "a: &a [*a]"], ids=["deep", "circle"])
def test_a_file_that_never_ends_is_a_fault_of_the_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "tokens.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError):
        load_access(path)
