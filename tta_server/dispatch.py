"""From the event loop to the device thread and back: requests under way, their waiters, deadlines and ends."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from tta_server.errors import Cancelled, DeadlineExceeded, TtaError
from tta_server.runner import Runner
from tta_server.types import NOWHERE, Answer, Job, Lane, Origin, Stream, head_start

Done = Callable[[Exception | None], None]
End = Callable[[Answer | None, Exception | None], None]


@dataclass(eq=False)
class Flight:
    """A request under way and those who wait for it (more than one when a request number is repeated)."""

    future: asyncio.Future[Answer]
    abandon: Callable[[], None]
    waiters: int = 0

    async def wait(self) -> Answer:
        """The answer. When the last waiter is cancelled before the request's turn came, the request is taken back."""
        self.waiters += 1
        try:
            return await asyncio.shield(self.future)
        finally:
            self.waiters -= 1
            if not self.waiters and not self.future.done():
                self.abandon()


class Dispatcher:
    """Puts jobs into the runner's queues. All methods are for the event loop's thread."""

    def __init__(self, runner: Runner, longest_wait: float) -> None:
        """``longest_wait``: seconds that a request may wait for its turn."""
        self._runner, self._longest_wait = runner, longest_wait
        self._mailbox = _Mailbox()

    def launch(
        self,
        stream: Stream,
        lane: Lane,
        x: Tensor,
        timeout: float | None,
        priority: int = 0,
        settled: Callable[[Answer | None], None] = lambda answer: None,
        origin: Origin = NOWHERE,
        number: int | None = None,
    ) -> Flight:
        """Queues a request; ``settled`` is called on the loop when it ends, with its answer if there is one.

        ``timeout`` (seconds) may shorten the longest wait; ``priority`` as in :func:`types.head_start`. Raises
        ``QueueFull`` or ``Unavailable``.
        """
        loop = asyncio.get_running_loop()
        wait = self._longest_wait if timeout is None else min(timeout, self._longest_wait)

        def finish(answer: Answer | None, error: Exception | None) -> None:
            timer.cancel()
            flight.abandon = _nothing  # it holds the job and its inputs, which then wait for no garbage collector
            settled(answer)
            if not flight.future.done():
                if answer is not None:
                    flight.future.set_result(answer)
                elif flight.waiters:
                    flight.future.set_exception(error or TtaError("no answer"))
                else:
                    flight.future.cancel()

        def expire() -> None:
            if self._runner.cancel(job):
                text = f"waited {wait:.3g} s in the queue without its turn coming; nothing adapted"
                finish(None, DeadlineExceeded(text))

        def abandon() -> None:
            if self._runner.cancel(job):
                finish(None, Cancelled("the client went away"))

        job = Job(
            stream,
            self._mailbox.address(loop, finish),
            lane,
            x,
            deadline=time.monotonic() + wait,
            head_start=head_start(priority),
            origin=origin,
            request_number=number,
        )
        flight = Flight(loop.create_future(), abandon)
        self._runner.submit(job)
        timer = loop.call_later(wait, expire)
        return flight

    def promise(self) -> tuple[asyncio.Future[None], Done]:
        """Something to wait for, and what keeps it, or breaks it with an error, from any thread."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()

        def finish(answer: Answer | None, error: Exception | None) -> None:
            if not future.done():
                future.set_result(None) if error is None else future.set_exception(error)

        address = self._mailbox.address(loop, finish)
        return future, lambda error: address(None, error)

    def command(self, stream: Stream, command: Callable[[], None]) -> asyncio.Future[None]:
        """Queues a command behind the stream's requests; the future is done when it has run."""
        future, done = self.promise()
        self._runner.submit(Job(stream, lambda answer, error: done(error), command=command))
        return future


def _nothing() -> None:
    pass


class _Mailbox:
    """From other threads to the event loop: what they leave while it is busy costs it one wake-up, not one each."""

    def __init__(self) -> None:
        self._letters: deque[tuple[End, Answer | None, Exception | None]] = deque()
        self._woken = False

    def address(self, loop: asyncio.AbstractEventLoop, done: End) -> End:
        """``done``, to be called from any thread, run on the loop."""

        def call(answer: Answer | None, error: Exception | None) -> None:
            self._letters.append((done, answer, error))
            if not self._woken:
                self._woken = True
                loop.call_soon_threadsafe(self._deliver)

        return call

    def _deliver(self) -> None:
        self._woken = False  # before looking: a letter that comes in between wakes the loop again
        try:
            while self._letters:
                done, answer, error = self._letters.popleft()
                done(answer, error)
        finally:
            if self._letters:  # one of them raised
                asyncio.get_running_loop().call_soon(self._deliver)
