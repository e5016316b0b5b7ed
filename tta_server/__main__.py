"""``python -m tta_server``."""

from __future__ import annotations

from tta_server.cli import main

main()
