"""Test-time adaptation policies over stacked per-stream state: torch and the standard library only.

Importing the package registers every policy in it; ``policies()`` is the table.
"""

from __future__ import annotations

from adapters import norm, source, tent
from adapters.base import Policy, policies, register

__all__ = ["Policy", "norm", "policies", "register", "source", "tent"]
