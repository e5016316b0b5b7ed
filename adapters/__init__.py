"""Test-time adaptation policies over stacked per-stream state: torch and the standard library only.

Importing the package registers every policy in it; ``policies()`` is the table.
"""

from __future__ import annotations

from adapters import (
    eata,
    norm,
    source,
    tent,
)  # isort: skip  the order of the table
from adapters.base import Policy, policies, register

__all__ = ["Policy", "eata", "norm", "policies", "register", "source", "tent"]
