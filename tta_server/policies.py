"""Policies by name: the registered ones and those of installed plug-ins, with settings checked by pydantic."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, cast

from pydantic import TypeAdapter, ValidationError

import adapters
from adapters import Policy
from tta_server.errors import BadInput, ConfigError, UnknownName
from tta_server.settings import ModelSettings, explain

PLUGINS = "tta_server.policies"
"""Entry point group: each entry is a module that registers its policies when imported."""


def load_plugins() -> None:
    """Imports the policies of other installed packages. Raises ``ConfigError`` naming the one that fails."""
    for entry in importlib.metadata.entry_points(group=PLUGINS):
        try:
            entry.load()
        except Exception as error:  # a plug-in may raise anything; the operator must know which one it was
            raise ConfigError(f"the policy plug-in {entry.name} ({entry.value}) cannot be loaded: {error}") from error


def check_package_names() -> None:
    """Raises ``ConfigError`` when another distribution owns the import name ``adapters`` (AdapterHub's has it, too)."""
    owners = set(importlib.metadata.packages_distributions().get("adapters", [])) - {"tta-server"}
    if owners:
        raise ConfigError(
            f"the Python package 'adapters' is also installed by {', '.join(sorted(owners))}, and the two cannot share "
            "an environment: uninstall it, or install tta-server in an environment of its own"
        )


def make_policy(name: str, settings: Mapping[str, Any]) -> Policy:
    """The policy ``name`` with these settings over its defaults.

    Nothing is converted but whole numbers to floats, and lists to tuples: ``"0.1"`` is no number. Raises
    ``UnknownName``, or ``BadInput`` listing every setting that does not fit.
    """
    kind = TypeAdapter(_policy_type(name))
    try:
        # As JSON, since pydantic's strict mode takes Python values for a dataclass and for tuples only as such.
        return kind.validate_json(json.dumps(dict(settings), default=str), strict=True)
    except ValidationError as error:
        raise BadInput(f"the settings of policy {name!r} do not fit:\n{explain(error)}") from error


def starting_settings(name: str, model: ModelSettings) -> dict[str, Any]:
    """The settings a policy starts from on a model: its published ones of the model's preset, then the model's own."""
    published = _policy_type(name).presets.get(model.preset, {}) if model.preset else {}
    return {**published, **model.policies.get(name, {})}


def describe(name: str) -> dict[str, Any]:
    """What a user needs to choose and set a policy: name, summary, scope, needs and the JSON schema of its settings."""
    kind = _policy_type(name)
    defaults = kind()
    schema = TypeAdapter(kind).json_schema()
    return {
        "name": kind.name,
        "summary": (kind.__doc__ or "").strip().split("\n")[0],
        "scope": str(defaults.scope),
        "needs": sorted(defaults.needs),
        "presets": kind.presets,
        "settings": {key: value for key, value in schema.items() if key not in ("title", "description")},
    }


def settings_of(policy: Policy) -> dict[str, Any]:
    """A policy's settings as a dict, defaults included."""
    return asdict(cast("Any", policy))


LATER = {"statistics": "mean", "source_rows": 0}
"""Settings of all policies that came after the first format of state files, and their defaults."""


def policy_digest(policy: Policy) -> str:
    """Hex SHA-256 of a policy's name and settings: equal digests, equal rule.

    What all policies can be given since the first release counts only where it is given, so that a state that was
    exported before fits.
    """
    settings = settings_of(policy)
    told = {key: value for key, value in settings.items() if key not in LATER or value != LATER[key]}
    return hashlib.sha256(json.dumps([policy.name, told], sort_keys=True).encode()).hexdigest()


def _policy_type(name: str) -> type[Policy]:
    known = adapters.policies()
    if name not in known:
        raise UnknownName(f"no policy {name!r}; there are: {', '.join(sorted(known))}")
    return known[name]
