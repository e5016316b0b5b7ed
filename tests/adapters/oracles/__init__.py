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
from typing import Any

from tests.adapters.oracles.base import Oracle

__all__ = ["ORACLES", "VARIANTS", "Oracle"]

ORACLES: dict[str, type[Oracle]] = {}
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {}
for _module in pkgutil.iter_modules(__path__):
    _loaded = importlib.import_module(f"{__name__}.{_module.name}")
    ORACLES |= getattr(_loaded, "ORACLES", {})
    VARIANTS |= getattr(_loaded, "VARIANTS", {})
