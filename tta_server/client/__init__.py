"""The Python client, sync and async: numpy arrays in, numpy arrays out. It needs httpx, numpy and orjson only.

::

    with Client("http://localhost:8000") as server:
        stream = server.stream("ward-3", policy="tent", settings={"lr": 5e-4})
        answer = stream.predict(images)
        print(answer.classes, answer.probabilities, answer.version)

The classes here only send; what they send, how answers are read and when a request is repeated is in ``core.py``.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import suppress
from typing import Any, Self, TypeVar, Unpack

import httpx
from numpy.typing import ArrayLike

from tta_server.client import core
from tta_server.client.core import Answer, Change, Filters, Json, Labels, NoAnswer, Wanted
from tta_server.errors import UnknownName

__all__ = ["Answer", "AsyncClient", "AsyncStream", "Client", "NoAnswer", "Stream"]

T = TypeVar("T")


class Client:
    """One server. Threads may share it.

    ``timeout`` (seconds) is for each attempt to connect, send or receive, and should be longer than requests may wait
    in the server's queue. ``retries`` is how many attempts may follow the first one, ``sleep`` what waits between them,
    ``transport`` httpx's, for certificates, proxies or socket files.

    Every method raises what the server refuses with: the class of ``tta_server.errors`` for its status, with its text,
    and with the status as ``status``. Without any answer it raises :class:`NoAnswer`.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        timeout: float = 60.0,
        retries: int = 4,
        transport: httpx.BaseTransport | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._http = httpx.Client(transport=transport, **core.options(url, token, timeout))
        self._retries, self._sleep = retries, sleep

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections. The streams stay."""
        self._http.close()

    def models(self) -> list[Json]:
        """The server's models."""
        return self._call(core.everything("models"))

    def policies(self) -> list[Json]:
        """The server's policies, with the JSON schemas of their settings."""
        return self._call(core.everything("policies"))

    def streams(self, **only: Unpack[Filters]) -> Iterator[Json]:
        """The open streams, in order of creation. They are asked for page by page, as they are used."""
        found, cursor = self._call(core.page(only, None))
        yield from found
        while cursor is not None:
            found, cursor = self._call(core.page(only, cursor))
            yield from found

    def stream(self, id: str, **wanted: Unpack[Wanted]) -> Stream:
        """Creates a stream, or confirms that it is what is wanted. Raises ``Conflict`` when it is not.

        Open a stream once and share the object: two that number the same stream's requests end in a ``Conflict``.
        """
        return Stream(self, self._call(core.ask("PUT", core.stream_path(id), wanted)))

    def restore(self, id: str, file: bytes) -> Stream:
        """Gives a stream the state of a file that :meth:`Stream.export` made, and makes the stream where there is none.

        Raises ``Conflict`` where the server has not the file's model, or the stream another policy or other settings.
        """
        return Stream(self, self._call(core.put(core.stream_path(id), file)))

    def state(self) -> Json:
        """How the server stores streams, and what keeps it from that."""
        return self._call(core.ask("GET", "/v1/state"))

    def predict(self, images: ArrayLike, *, model: str | None = None, timeout: float | None = None) -> Answer:
        """What the plain source model says to ``images``, see :meth:`Stream.predict`."""
        model = model or core.only_one(self.models())
        return self._call(core.infer(model, images, timeout, {"tta_adapt": False}))

    def _call(self, call: core.Call[T]) -> T:
        attempt, outcome = 0, self._send(call)
        while attempt < self._retries and (pause := core.pause(outcome, attempt, call.repeats)) is not None:
            self._sleep(pause)
            attempt, outcome = attempt + 1, self._send(call)
        return core.result(call, outcome, attempt)

    def _send(self, call: core.Call[Any]) -> core.Outcome:
        try:
            return self._http.request(call.method, call.path, content=call.content, headers=call.headers)
        except httpx.RequestError as error:
            return error


class Stream(core.Numbered):
    """One stream, made by :meth:`Client.stream`. Threads may share it; its calls go one at a time."""

    def __init__(self, server: Client, info: Json) -> None:
        super().__init__(info)
        self._server, self._lock = server, threading.Lock()

    def predict(self, images: ArrayLike, *, adapt: bool | None = None, timeout: float | None = None) -> Answer:
        """Scores for ``images [N, ...]``, to which the stream then adapts.

        uint8 arrays are pixels, 0 to 255; others hold values in the model's range, which is 0 to 1 as a rule. ``adapt``
        overrides the stream's switch for this request. ``timeout`` (seconds) shortens the longest wait in the queue.
        """
        with self._lock:
            return self._server._call(self._infer(images, adapt, timeout))

    def update(self, **change: Unpack[Change]) -> Json:
        """Changes the stream from its next request on; returns what it is then."""
        return self._call(core.ask("PATCH", self._path, change))

    def info(self) -> Json:
        """What the stream is now."""
        return self._call(core.ask("GET", self._path))

    def reset(self) -> Json:
        """Takes the stream back to the source model; returns what it is then."""
        return self._call(core.ask("POST", f"{self._path}/reset"))

    def snapshots(self) -> list[Json]:
        """The states of the stream that the server keeps, the newest first."""
        return self._call(core.everything("snapshots", self._path))

    def mark(self, name: str) -> Json:
        """Has the state kept under a name. Raises ``Conflict`` for one that is taken."""
        return self._call(core.ask("POST", f"{self._path}/snapshots", {"name": name}, repeats=False))

    def unmark(self, name: str) -> None:
        """Takes a name off a state, if it has not gone already."""
        with suppress(UnknownName):
            self._call(core.ask("DELETE", core.snapshot_path(self._path, name)))

    def rollback(self, snapshot: str | None = None, *, version: int | None = None) -> Json:
        """Takes the stream back to a state that is kept, by its name or its version; returns what it is then."""
        return self._call(core.ask("POST", f"{self._path}/rollback", core.target(snapshot, version)))

    def fork(self, id: str) -> Stream:
        """Copies the stream to a new id. Raises ``Conflict`` for one that is taken."""
        return Stream(self._server, self._call(core.ask("POST", f"{self._path}/fork", {"id": id}, repeats=False)))

    def label(self, request: Answer | str, labels: Labels) -> Json:
        """Tells what the rows of an earlier prediction were: class numbers, ``None`` where unknown, now or for good.

        ``request``: its answer, or the ``request`` of that. Returns how many were ``taken``, ``repeated`` and are still
        ``missing``. Raises ``UnknownName`` where the prediction is no longer kept, and ``Conflict`` for a row that has
        another label.
        """
        return self._call(core.label(self._path, request, labels))

    def labels(self) -> Json:
        """What labels say of the stream so far, and those that the server would like to have."""
        return self._call(core.ask("GET", f"{self._path}/labels"))

    def guard(self, state: str) -> Json:
        """Puts the stream's guard into a state, where it stays: ``shadow``, ``canary``, ``active``, ``frozen`` or
        ``quarantine``; with ``auto`` it decides again. Returns what the stream is then."""
        return self._call(core.ask("POST", f"{self._path}/guard", {"state": state}))

    def export(self) -> bytes:
        """The state as a file: safetensors, for :meth:`Client.restore` there or on another server."""
        return self._call(core.export(self._path))

    def close(self) -> None:
        """Makes the server forget the stream, if it has not already."""
        with suppress(UnknownName):
            self._call(core.ask("DELETE", self._path))

    def _call(self, call: core.Call[T]) -> T:
        with self._lock:
            return self._server._call(call)


class AsyncClient:
    """:class:`Client` for ``asyncio``, with tasks in the place of threads."""

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        timeout: float = 60.0,
        retries: int = 4,
        transport: httpx.AsyncBaseTransport | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._http = httpx.AsyncClient(transport=transport, **core.options(url, token, timeout))
        self._retries, self._sleep = retries, sleep

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    async def models(self) -> list[Json]:
        return await self._call(core.everything("models"))

    async def policies(self) -> list[Json]:
        return await self._call(core.everything("policies"))

    async def streams(self, **only: Unpack[Filters]) -> AsyncIterator[Json]:
        found, cursor = await self._call(core.page(only, None))
        for one in found:
            yield one
        while cursor is not None:
            found, cursor = await self._call(core.page(only, cursor))
            for one in found:
                yield one

    async def stream(self, id: str, **wanted: Unpack[Wanted]) -> AsyncStream:
        return AsyncStream(self, await self._call(core.ask("PUT", core.stream_path(id), wanted)))

    async def restore(self, id: str, file: bytes) -> AsyncStream:
        return AsyncStream(self, await self._call(core.put(core.stream_path(id), file)))

    async def state(self) -> Json:
        return await self._call(core.ask("GET", "/v1/state"))

    async def predict(self, images: ArrayLike, *, model: str | None = None, timeout: float | None = None) -> Answer:
        model = model or core.only_one(await self.models())
        return await self._call(core.infer(model, images, timeout, {"tta_adapt": False}))

    async def _call(self, call: core.Call[T]) -> T:
        attempt, outcome = 0, await self._send(call)
        while attempt < self._retries and (pause := core.pause(outcome, attempt, call.repeats)) is not None:
            await self._sleep(pause)
            attempt, outcome = attempt + 1, await self._send(call)
        return core.result(call, outcome, attempt)

    async def _send(self, call: core.Call[Any]) -> core.Outcome:
        try:
            return await self._http.request(call.method, call.path, content=call.content, headers=call.headers)
        except httpx.RequestError as error:
            return error


class AsyncStream(core.Numbered):
    """:class:`Stream` for ``asyncio``, made by :meth:`AsyncClient.stream`."""

    def __init__(self, server: AsyncClient, info: Json) -> None:
        super().__init__(info)
        self._server, self._lock = server, asyncio.Lock()

    async def predict(self, images: ArrayLike, *, adapt: bool | None = None, timeout: float | None = None) -> Answer:
        async with self._lock:
            return await self._server._call(self._infer(images, adapt, timeout))

    async def update(self, **change: Unpack[Change]) -> Json:
        return await self._call(core.ask("PATCH", self._path, change))

    async def info(self) -> Json:
        return await self._call(core.ask("GET", self._path))

    async def reset(self) -> Json:
        return await self._call(core.ask("POST", f"{self._path}/reset"))

    async def snapshots(self) -> list[Json]:
        return await self._call(core.everything("snapshots", self._path))

    async def mark(self, name: str) -> Json:
        return await self._call(core.ask("POST", f"{self._path}/snapshots", {"name": name}, repeats=False))

    async def unmark(self, name: str) -> None:
        with suppress(UnknownName):
            await self._call(core.ask("DELETE", core.snapshot_path(self._path, name)))

    async def rollback(self, snapshot: str | None = None, *, version: int | None = None) -> Json:
        return await self._call(core.ask("POST", f"{self._path}/rollback", core.target(snapshot, version)))

    async def fork(self, id: str) -> AsyncStream:
        call = core.ask("POST", f"{self._path}/fork", {"id": id}, repeats=False)
        return AsyncStream(self._server, await self._call(call))

    async def label(self, request: Answer | str, labels: Labels) -> Json:
        return await self._call(core.label(self._path, request, labels))

    async def labels(self) -> Json:
        return await self._call(core.ask("GET", f"{self._path}/labels"))

    async def guard(self, state: str) -> Json:
        return await self._call(core.ask("POST", f"{self._path}/guard", {"state": state}))

    async def export(self) -> bytes:
        return await self._call(core.export(self._path))

    async def close(self) -> None:
        with suppress(UnknownName):
            await self._call(core.ask("DELETE", self._path))

    async def _call(self, call: core.Call[T]) -> T:
        async with self._lock:
            return await self._server._call(call)
