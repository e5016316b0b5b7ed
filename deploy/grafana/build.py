"""Writes the dashboards:  python deploy/grafana/build.py [FOLDER]

A test compares ``dashboards/`` with what this writes, so run it after a change here and commit both.
"""

from __future__ import annotations

import sys
from pathlib import Path

from adaptation import adaptation
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from overview import overview
from stream import stream


def main(folder: Path) -> None:
    for made in (overview(), adaptation(), stream()):
        text = JSONEncoder(sort_keys=True, indent=2, ensure_ascii=False).encode(made)
        (folder / f"{made.uid}.json").write_text(f"{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "dashboards")
