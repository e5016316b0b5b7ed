"""Which policies can run on a model, and what a stream of each costs: for ``check`` and ``/v1/models``."""

from __future__ import annotations

from typing import Any

from tta_server.engine.engine import initial_state
from tta_server.engine.source import SourceModel
from tta_server.errors import BadInput
from tta_server.policies import make_policy
from tta_server.state.slots import Layout


def policy_report(name: str, model: SourceModel) -> dict[str, Any]:
    """One policy on one model: ``{"name", "runs", "bytes_per_stream"}`` or ``{"name", "runs": false, "reason"}``."""
    try:
        policy = make_policy(name, model.settings.policies.get(name, {}))
        state = initial_state(policy, model)
    except (ValueError, BadInput) as error:
        return {"name": name, "runs": False, "reason": str(error)}
    return {"name": name, "runs": True, "bytes_per_stream": Layout(state).bytes}
