"""Clients that keep a server busy until it is killed, and what they may expect of the next one on the same store.

Request ``n`` of a stream has the same inputs in every run, and each request is one step. So version ``v`` of a stream
is the source after requests 0 to ``v - 1``, whichever processes took them: :class:`Uninterrupted` knows it bit for bit.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zlib import crc32

import httpx
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from adapters import rng
from tests.serving import CPU, MODEL, TIMEOUT, rows
from tta_server.drift.monitor import Monitor
from tta_server.engine.engine import Engine
from tta_server.engine.source import load_model
from tta_server.policies import make_policy, starting_settings
from tta_server.settings import Durability, load_settings
from tta_server.state.memory import Budget
from tta_server.state.records import Found
from tta_server.state.sqlite import SqliteStore
from tta_server.state.store import StateStore
from tta_server.types import DEFAULT_DURABILITY, Answer, Job, Plan, Stream

Scores = NDArray[np.float32]


def inputs(id: str, number: int) -> Tensor:
    """Of this request: one to three rows."""
    seed = crc32(f"{id}/{number}".encode())
    return rows(1 + seed % 3, seed)


def body(x: Tensor) -> bytes:
    """Of a request with these inputs: a NumPy file."""
    file = io.BytesIO()
    np.save(file, x.numpy())
    return file.getvalue()


class Uninterrupted:
    """The states and answers of streams whose server never stopped."""

    def __init__(self, config: Path) -> None:
        settings = load_settings(config)
        self.model = load_model(MODEL, settings, CPU)
        store = StateStore(Budget(), CPU)
        self._engine = Engine({MODEL: self.model}, store, Monitor(20.0), 0.0, monitored=False)
        self._streams: dict[str, Stream] = {}
        self._states: dict[str, list[bytes]] = {}
        self._scores: dict[str, list[Scores]] = {}

    def state(self, id: str, policy: str, version: int) -> bytes:
        """The stream's tensors at this version."""
        self._advance(id, policy, version)
        return self._states[id][version]

    def scores(self, id: str, policy: str, version: int) -> Scores:
        """The answer by this version to the request that comes then."""
        self._advance(id, policy, version + 1)
        return self._scores[id][version]

    def _advance(self, id: str, policy: str, version: int) -> None:
        store, model = self._engine.store, self.model
        if id not in self._streams:
            made = make_policy(policy, starting_settings(policy, model.settings))
            stream = Stream(id, MODEL, made, rng.stream_key(id), 0.0, model.digest)
            self._engine.add_lane(stream.lane)
            self._streams[id], self._scores[id] = stream, []
            self._states[id] = [store.dump(stream.lane, stream)[1]]
        stream = self._streams[id]
        assert stream.policy.name == policy
        while stream.version < version:
            job = Job(stream, lambda *_: None, stream.lane, inputs(id, stream.version))
            self._engine.step(Plan(stream.lane, [job]), self._keep)
            self._states[id].append(store.dump(stream.lane, stream)[1])

    def _keep(self, job: Job, answer: Answer | Exception) -> None:
        assert isinstance(answer, Answer), answer
        self._scores[job.stream.id].append(answer.logits.numpy().copy())


@dataclass(frozen=True)
class Crash:
    """What a crash cost one stream."""

    id: str
    durability: Durability
    answered: int
    """The newest version that an answer told; -1: none."""
    recovered: int
    """The version that is there; -1: none."""
    lost: int
    """Steps of which the next process will tell that they are lost."""
    states: int
    """That were kept of it, and are what they were."""


@dataclass(eq=False)
class Client:
    """One stream as its client knows it."""

    id: str
    policy: str = "tent"
    durability: Durability = DEFAULT_DURABILITY
    started: int = 0
    """The version at which this server process has it from the store."""
    number: int = 0
    """Of its next request, and the version of the answer to it."""
    promised: int = -1
    """The newest version that, by what was answered, is stored; -1: none, 0: that it exists."""
    owed: int = 0
    """Lost steps that this server process knew of when it started."""
    scores: dict[int, Scores] = field(default_factory=dict)
    """Of answers that were not compared yet, by version."""

    @property
    def url(self) -> str:
        return f"/v1/streams/{self.id}"

    async def open(self, http: httpx.AsyncClient) -> None:
        """Opens the stream where it is not there, and checks it where it is."""
        found = await http.get(self.url)
        if found.status_code == 404:
            assert self.promised < 0, f"{self} is gone"
            made = await http.put(self.url, json={"policy": self.policy, "durability": self.durability.model_dump()})
            assert made.status_code == 201, made.text
            if made.json()["unsaved_steps"] == 0:
                self.promised = 0
            return
        stream = found.json()
        newest = self.number - 1 if self.number else None
        assert (stream["version"], stream["requests"], stream["last_number"]) == (self.number, self.number, newest)
        assert (stream["policy"], stream["durability"]["mode"]) == (self.policy, self.durability.mode)
        if newest is not None and self.number == self.started:
            again = await self.ask(http, newest)
            assert again.status_code == 409, f"request {newest} of {self.id!r} ran twice: {again.text}"

    async def run(self, http: httpx.AsyncClient, times: int | None = None) -> None:
        """Opens the stream and sends one request after the other, so many or for ever."""
        await self.open(http)
        last = None if times is None else self.number + times
        while self.number != last:
            self.take(await self.ask(http, self.number))

    async def ask(self, http: httpx.AsyncClient, number: int) -> httpx.Response:
        """Sends the request of this number."""
        return await http.post(
            f"{self.url}/predict", params={"seq": number, "output": "logits"}, content=body(inputs(self.id, number))
        )

    def take(self, reply: httpx.Response) -> dict[str, Any]:
        """Checks the answer to the next request, and keeps its scores."""
        assert reply.status_code == 200, f"{self.id!r}: {reply.status_code} {reply.text}"
        answer: dict[str, Any] = reply.json()
        assert (answer["version"], answer["adapted"], answer["replayed"]) == (self.number, True, False)
        owed = self.owed if self.number == self.started else 0
        assert answer["lost_steps"] == owed, f"{self}: told were {answer['lost_steps']} lost steps"
        if answer["unsaved_steps"] is None:
            assert self.durability.mode == "none"
        else:
            self.promised = max(self.promised, self.number - answer["unsaved_steps"])
        self.scores[self.number] = np.array(answer["logits"], dtype=np.float32)
        self.number += 1
        return answer

    def check_lost(self, version: int, lost: int, is_quiet: bool) -> None:
        """After a crash that left it at ``version``: how many steps are lost is what the requests say.

        By the answers so far the steps before the last answer are taken. The last one itself may not have been, and
        one more may have been taken whose answer did not arrive; unless the server had come to rest. What was owed
        counts as told once a step was taken.
        """
        answers = self.number - self.started
        taken = [answers] if is_quiet else range(max(0, answers - 1), answers + 2)
        known = {self.started + steps - version + (0 if steps else self.owed) for steps in taken}
        assert lost in known, f"{self} came back at {version} and tells of {lost} lost steps, not one of {known}"


class Clients:
    """All of them, and the store behind."""

    def __init__(self, clients: Iterable[Client], config: Path) -> None:
        self.clients = {client.id: client for client in clients}
        self.reference = Uninterrupted(config)

    @property
    def answers(self) -> int:
        """That came so far, of streams that are there."""
        return sum(client.number - client.started for client in self.clients.values())

    def run(self, url: str, times: int, only: Iterable[Client] | None = None) -> None:
        """Opens the streams, sends so many requests of each, and waits until no step runs any more."""
        chosen = list(self.clients.values() if only is None else only)

        async def all_of_them() -> None:
            async with _connected(url) as http:
                async with asyncio.TaskGroup() as running:
                    for client in chosen:
                        running.create_task(client.run(http, times))
                for client in chosen:
                    while (await http.get(client.url)).json()["version"] != client.number:
                        await asyncio.sleep(0.001)

        asyncio.run(all_of_them())

    def load(self, url: str, answers: int, end: Callable[[], object]) -> None:
        """Opens the streams and keeps the server busy; calls ``end`` once there are so many answers more, and returns
        when the server is gone."""
        enough = self.answers + answers

        async def one(client: Client, http: httpx.AsyncClient) -> None:
            with suppress(httpx.TransportError):
                await client.run(http)

        async def all_of_them() -> None:
            async with _connected(url) as http, asyncio.TaskGroup() as running:
                for client in self.clients.values():
                    running.create_task(one(client, http))
                while self.answers < enough:
                    await asyncio.sleep(0.0005)
                await asyncio.to_thread(end)

        asyncio.run(all_of_them())

    def check_answers(self) -> int:
        """Every answer is what the uninterrupted run gives. Returns how many these were."""
        count = 0
        for client in self.clients.values():
            for version, scores in client.scores.items():
                expected = self.reference.scores(client.id, client.policy, version)
                assert np.array_equal(scores, expected), f"the answer of {client.id!r} at version {version}"
            count += len(client.scores)
            client.scores.clear()
        return count

    def check_store(self, folder: Path, is_quiet: bool = False) -> list[Crash]:
        """After the end of a process: every stream is there as it was at a version that is no older than was promised;
        all that is kept of it is sound. The clients go on from there.

        ``is_quiet``: no request was under way.
        """
        store = SqliteStore(folder)
        try:
            assert store.verify() == []
            index = store.index()
            assert not index.damaged
            found = {one.record.id: one for one in index.streams}
            assert found.keys() <= self.clients.keys()
            return [self._recover(client, store, found.get(client.id), is_quiet) for client in self.clients.values()]
        finally:
            store.close()

    def _recover(self, client: Client, store: SqliteStore, found: Found | None, is_quiet: bool) -> Crash:
        durability, answered = client.durability, client.number - 1
        states = 0 if found is None else self._check_states(client, store, found)
        if durability.mode == "none":
            found = None  # if it was there, it was to make room in memory, and the next process drops it
        version, lost = (-1, 0) if found is None else (found.record.version, found.lost)
        if durability.mode != "none":
            promised = max(client.promised, answered - int(durability.bound))
            assert version >= promised, f"{client} came back at {version}, promised were {promised}"
        if found is not None:
            assert not found.note
            client.check_lost(version, lost, is_quiet)
        client.started = client.number = max(0, version)
        client.promised, client.owed = version, lost
        return Crash(client.id, durability, answered, version, lost, states)

    def _check_states(self, client: Client, store: SqliteStore, found: Found) -> int:
        record, version = found.record, found.record.version
        assert (record.requests, record.adapted, record.failures) == (version, version, 0), client
        assert record.last_number == (version - 1 if version else None), client
        newest = store.load(found.key, found.state_revision)
        assert newest.record.version == version, f"{client.id!r}: its record and state are not of one step"
        kept = store.snapshots(found.key)
        for snapshot in kept:
            stored = store.load(found.key, snapshot.revision)
            expected = self.reference.state(client.id, client.policy, stored.record.version)
            if stored.data is None:
                assert stored.record.version == 0
            else:
                assert stored.data == expected, f"{client.id!r}: its state of version {stored.record.version}"
        return len(kept)


def _connected(url: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=url, limits=httpx.Limits(max_connections=None), timeout=TIMEOUT)
