"""Memory kept between steps, seen from outside: how many new pages a process is given."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

FAULTS = """
import resource, numpy
from tta_server.engine.allocator import keep_memory
kept = {call}
def use():
    for _ in range(10):
        numpy.ones(2**22)  # 32 MB
use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
use()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(call: str, **environment: str) -> tuple[str, int]:
    """What ``call`` says, and the page faults of ten large arrays, made and dropped one after the other."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    run = subprocess.run(
        [sys.executable, "-c", FAULTS.format(call=call)],
        env=inherited | environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    said, count = run.stdout.split()
    return said, int(count)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_what_was_freed_is_used_again() -> None:
    said, without = faults("None")
    assert without > 1000
    said, count = faults("keep_memory()")
    assert said == "True"
    assert count < without / 20


def test_the_environment_has_the_last_word() -> None:
    assert faults("keep_memory()", MALLOC_ARENA_MAX="4")[0] == "False"
