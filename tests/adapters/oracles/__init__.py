"""Independent re-tellings of every policy: slow, one plain torch model per stream, straight from the equations.

Nothing here is shared with ``adapters`` or ``tta_server`` but the random numbers: each stream deep-copies the original
network, its batch-norm layers are swapped for plain ones (``base.py``), and ``torch.autograd`` and ``torch.optim`` do
the rest. To cover a new policy, add a module here with

``ORACLES``
    by policy name a subclass of :class:`Oracle`;
``VARIANTS``
    by policy name and name of the variant, the settings to run the laws with.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from tests.adapters.oracles.around import ResetOracle, WindowOracle
from tests.adapters.oracles.base import Oracle

__all__ = ["ORACLES", "VARIANTS", "Oracle", "make_oracle"]

ORACLES: dict[str, type[Oracle]] = {}
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {}
for _module in pkgutil.iter_modules(__path__):
    _loaded = importlib.import_module(f"{__name__}.{_module.name}")
    ORACLES |= getattr(_loaded, "ORACLES", {})
    VARIANTS |= getattr(_loaded, "VARIANTS", {})


def make_oracle(name: str, original: nn.Module, settings: Any, artefacts: Mapping[str, Tensor]) -> Oracle:
    """The oracle of a policy with these settings, in a window and with a periodic reset where they say so."""

    def plain() -> Oracle:
        return ORACLES[name](original, settings, artefacts)

    def windowed() -> Oracle:
        return WindowOracle(plain, original, settings, artefacts) if settings.window else plain()

    return ResetOracle(windowed, original, settings, artefacts) if settings.reset_after else windowed()
