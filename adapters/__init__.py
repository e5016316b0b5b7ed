"""Test-time adaptation policies over stacked per-stream state: torch and the standard library only.

Importing the package registers every policy in it; ``policies()`` is the table.
"""

from __future__ import annotations

from adapters import cotta, deyo, eata, lame, norm, petal, rmt, roid, rotta, sar, source, t3a, tent
from adapters.base import Policy, policies, register

__all__ = [
    "Policy",
    "cotta",
    "deyo",
    "eata",
    "lame",
    "norm",
    "petal",
    "policies",
    "register",
    "rmt",
    "roid",
    "rotta",
    "sar",
    "source",
    "t3a",
    "tent",
]
