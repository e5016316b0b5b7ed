"""Which policies run on a model, tried out, and what a stream of each costs: for ``check`` and ``/v1/models``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from adapters import Policy, gradient
from adapters.base import Scope, Segments, State, Tensors
from tta_server.engine.engine import initial_state
from tta_server.engine.forward import plain_rows
from tta_server.engine.norm import Pass
from tta_server.engine.run import PolicyRun
from tta_server.engine.source import SourceModel
from tta_server.errors import BadInput, ConfigError
from tta_server.policies import make_policy, starting_settings
from tta_server.settings import type_and_line
from tta_server.state.slots import Layout
from tta_server.types import Job, Lane, Stream

STEP_FAILS = "its step fails"
"""How a reason begins that lies with the model, not with a policy's settings."""


def policy_report(name: str, model: SourceModel) -> dict[str, Any]:
    """One policy on one model: ``{"name", "runs", "bytes_per_stream"}`` or ``{"name", "runs": false, "reason"}``.

    Runs a step of it, so this is for before the device thread starts.
    """
    try:
        policy = make_policy(name, starting_settings(name, model.settings))
        state = initial_state(policy, model)
        layout = Layout(state)
        _try_step(policy, model, layout, state)
        if policy.window:
            # Two rows do not fill a window, so the policy's own step is tried without.
            own = replace(policy, window=0, reset_after=0)
            state = initial_state(own, model)
            _try_step(own, model, Layout(state), state)
    except (ValueError, BadInput) as error:
        return {"name": name, "runs": False, "reason": " ".join(str(error).split())}
    except Exception as error:  # a model's or a plug-in's own code may raise anything
        return {"name": name, "runs": False, "reason": f"{STEP_FAILS}: {type_and_line(error)}"}
    return {"name": name, "runs": True, "bytes_per_stream": layout.bytes}


def check_defaults(models: Mapping[str, SourceModel]) -> None:
    """Raises ``ConfigError`` for a model whose own policy cannot run on it."""
    for model in models.values():
        default = model.reports[model.settings.policy]
        if not default["runs"]:
            running = [name for name, report in model.reports.items() if report["runs"]]
            raise ConfigError(
                f"model {model.name!r} cannot have policy {default['name']!r} as its own: {default['reason']}; "
                f"set models.{model.name}.policy to one that runs: {', '.join(running) or 'there is none'}"
            )


def _try_step(policy: Policy, model: SourceModel, layout: Layout, initial: State) -> None:
    """One step of two streams of two rows each, as the engine does it. Raises what goes wrong."""
    lane, rows = Lane(model.name, policy), plain_rows(model.network, model.settings.input, 4).split(2)
    streams = [Stream(f"trial {key}", model.name, policy, random_key=key, created=0.0) for key in range(2)]
    jobs = [Job(stream, lambda *_: None, lane, x) for stream, x in zip(streams, rows, strict=True)]
    if policy.scope is not Scope.NONE and policy.differentiates:
        # A step on these rows may choose none of them and then takes no gradient.
        keys = model.source.parameters if policy.scope is Scope.ALL else model.source.affine
        weights = gradient.leaves(model.source.stacked(keys))
        if not model.network.run(
            Pass(Segments([4], model.network.device), weights), torch.cat(rows)
        ).logits.requires_grad:
            raise RuntimeError("the model's forward pass lets no gradient through to the weights")
    run = PolicyRun(model, lane, jobs, State(_twice(initial.weights), _twice(initial.memory)))
    logits = run.scores()
    if logits.shape != (4, model.source.num_classes):
        raise ValueError(f"its step yields {list(logits.shape)} for 4 rows and {model.source.num_classes} classes")
    step = run.finish()
    parts = [logits, *layout.pack(step.state).values()] if layout.width else [logits]
    if not all(part.isfinite().all() for part in parts):
        raise ValueError("its step is not finite")


def _twice(tensors: Tensors) -> Tensors:
    return {key: torch.cat([value, value]) for key, value in tensors.items()}
