"""Which threads may run torch: one at a time.

Torch spreads an operation over the cores with OpenMP, and every thread that ever did so keeps helpers of its own. Where
there are more helpers than cores, GNU's OpenMP no longer lets them wait for work awake, and every operation pays for
waking them: on 2 cores, a forward pass of ResNet-20 takes 34 ms instead of 19 when the main thread has used torch
before. So models are loaded by threads that end, the device thread does all the rest, and whatever else handles arrays
(decoding, checks, answers) does it in numpy.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def in_passing(work: Callable[[], T]) -> T:
    """The result of ``work()``, run by a thread that ends with it. Raises what it raises."""
    results: list[T] = []
    failures: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run, name="passing")
    thread.start()
    thread.join()
    if failures:
        raise failures[0]
    return results[0]
