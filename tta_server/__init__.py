"""An inference server that adapts vision models to each client's stream at test time.

Start at ``docs/architecture.md``.
"""

from __future__ import annotations

__version__ = "0.1.0"
