"""A stream's past and copies of it: marks, rollback, fork, export and import of its state.

Runs on the event loop; states are read and written on the device thread, in the stream's order of requests.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from tta_server.backend import Backend
from tta_server.errors import BadInput, Conflict, QueueFull, UnknownName
from tta_server.policies import make_policy, policy_digest, settings_of
from tta_server.state.portable import Manifest, Portable
from tta_server.state.records import Damaged, Field, Snapshot
from tta_server.tenant import STREAM_ID, Tenant
from tta_server.types import Lane, Stream

T = TypeVar("T")


@dataclass(frozen=True)
class _Dump:
    """A stream's state, read between two of its requests."""

    lane: Lane
    fields: tuple[Field, ...]
    data: bytes
    version: int
    random_key: int
    last_number: int | None


class History:
    """What one tenant can do with the states of its streams. All methods are for the event loop's thread."""

    def __init__(self, tenant: Tenant, backend: Backend) -> None:
        self._tenant, self._backend = tenant, backend

    async def snapshots(self, id: str) -> list[Snapshot]:
        """The states that are kept of a stream, newest first. Raises ``UnknownName``, and ``StoreFailed`` where the
        store cannot be read."""
        stream, keeper = self._tenant.stream(id), self._backend.keeper
        return await asyncio.to_thread(keeper.snapshots, stream)

    async def mark(self, id: str, name: str) -> Snapshot:
        """Keeps the stream's state, after its requests so far, under a name, until that is taken off it.

        Raises ``BadInput``, ``UnknownName``, ``Conflict`` for a name that is taken, ``QueueFull`` beyond
        ``limits.marks``, and ``Unavailable`` where the store cannot be written.
        """
        if not STREAM_ID.fullmatch(name):
            raise BadInput(f"a snapshot's name has 1 to 128 of A-Z a-z 0-9 . _ : -, got {name[:150]!r}")
        stream, most = self._tenant.stream(id), self._backend.settings.limits.marks
        taken = self._backend.marking
        if (stream, name) in taken:
            raise Conflict(f"a snapshot {name!r} of stream {id!r} is being made; choose another name")
        taken.add((stream, name))
        try:
            marks = [mark for snapshot in await self.snapshots(id) for mark in snapshot.marks]
            if name in marks:
                raise Conflict(f"stream {id!r} has a snapshot {name!r} already; delete it, or choose another name")
            count = len({*marks, *(mark for other, mark in taken if other is stream)})
            if count > most:
                raise QueueFull(f"stream {id!r} would have {count} named snapshots; the limit is limits.marks = {most}")
            await self._tenant.store(stream, (name,))
        finally:
            taken.discard((stream, name))
        self._backend.tell_of("marked", stream, mark=name)
        for snapshot in await self.snapshots(id):
            if name in snapshot.marks:
                return snapshot
        raise Conflict(f"the snapshot {name!r} of stream {id!r} was deleted at once")

    async def unmark(self, id: str, name: str) -> None:
        """Takes a name off a state, which is then kept no longer than others. Raises ``UnknownName``, and
        ``Unavailable`` where the store cannot be written."""
        stream = self._tenant.stream(id)
        await self._find(id, name, None)
        unmarked, done = self._backend.dispatcher.promise()
        self._backend.keeper.unmark(stream, name, done)
        await unmarked

    async def rollback(self, id: str, name: str | None, version: int | None) -> Stream:
        """Takes a stream back to a state that is kept, by its mark or, the newest of that, its version.

        Its requests so far are done first; its request numbers go on. Raises ``UnknownName``, and ``Conflict`` for a
        state of another model or policy.
        """
        stream, backend = self._tenant.stream(id), self._backend
        revision = (await self._find(id, name, version)).revision

        def go_back(lane: Lane) -> int:
            before = stream.version
            try:
                stored = backend.keeper.load(stream, revision)
            except KeyError as error:
                raise UnknownName(f"the snapshot of stream {id!r} is not kept any more") from error
            except Damaged as error:
                raise Conflict(f"the snapshot of stream {id!r} cannot be used: {error}") from error
            record = stored.record
            if (record.digest, record.policy) != (lane.digest, lane.policy.name):
                raise Conflict(
                    f"the snapshot of stream {id!r} is of policy {record.policy!r} on the model with digest "
                    f"{record.digest}, the stream has {lane.policy.name!r} on {lane.digest}"
                )
            if stored.data is None:
                backend.engine.reset(lane, lane, stream)
            else:
                self._restore(lane, stream, stored.fields, stored.data, record.version)
            stream.random_key = record.random_key
            return before

        before = await self._on_device(stream, go_back)
        self._backend.tell_of("rolled_back", stream, version=stream.version, before=before)
        await self._tenant.settle(stream)
        return stream

    async def fork(self, id: str, new_id: str) -> Stream:
        """Copies a stream, after its requests so far, to a new id. From then on each goes its own way; given the same
        requests, it is the same way. Raises ``Conflict`` where the new id is taken."""
        stream = self._tenant.stream(id)
        dump = await self._dump(stream)
        fork = Stream(
            id=new_id,
            model=stream.model,
            policy=dump.lane.policy,
            random_key=dump.random_key,
            created=time.time(),
            digest=dump.lane.digest,
            tenant=stream.tenant,
            adapt=stream.adapt,
            durability=stream.durability,
            consistency=stream.consistency,
            state_bytes=len(dump.data),
        )
        self._tenant.guards.inherit(fork, stream)
        await self._begin(fork, dump.fields, dump.data, dump.version)
        self._backend.tell_of("imported", fork, version=dump.version, of=id)
        return fork

    async def export(self, id: str) -> bytes:
        """The stream's state, after its requests so far, as a file, see ``state/portable.py``."""
        stream = self._tenant.stream(id)
        dump = await self._dump(stream)
        manifest = Manifest(
            stream=stream.id,
            model=stream.model,
            model_digest=dump.lane.digest,
            policy=dump.lane.policy.name,
            settings=settings_of(dump.lane.policy),
            policy_digest=policy_digest(dump.lane.policy),
            version=dump.version,
            request_number=dump.last_number,
            random_key=dump.random_key,
            created=stream.created,
            exported=time.time(),
        )
        return await asyncio.to_thread(Portable(manifest, dump.fields, dump.data).dump)

    async def restore(self, id: str, file: Portable) -> tuple[Stream, bool]:
        """Gives a stream the state of a file, after its requests so far; makes the stream where there is none.

        Returns it and whether it is new. Raises ``Conflict``, with both digests, where the file is of another model, or
        the stream of another policy or other settings, or the tensors are not those that they have.
        """
        manifest, is_new = file.manifest, not self._tenant.is_open(id)
        if is_new:
            model = self._tenant.model_for(manifest.model, manifest.model_digest)
            policy = make_policy(manifest.policy, manifest.settings)
            if policy_digest(policy) != manifest.policy_digest:
                raise Conflict(
                    f"the settings in the file make policy {manifest.policy!r} with digest {policy_digest(policy)} in "
                    f"this release, the file was written for {manifest.policy_digest}"
                )
            stream = self._tenant.build(id, model, policy)
            stream.random_key, stream.last_number = manifest.random_key, manifest.request_number
            await self._begin(stream, file.fields, file.data, manifest.version)
        else:
            stream = self._tenant.stream(id)

            def put(lane: Lane) -> None:
                ours = lane.digest, policy_digest(lane.policy)
                if ours != (manifest.model_digest, manifest.policy_digest):
                    raise Conflict(
                        f"the file is of model {manifest.model_digest} and policy {manifest.policy_digest} "
                        f"({manifest.policy}), stream {id!r} is of {ours[0]} and {ours[1]} ({lane.policy.name})"
                    )
                self._restore(lane, stream, file.fields, file.data, manifest.version)
                stream.random_key = manifest.random_key

            await self._on_device(stream, put)
            await self._tenant.settle(stream)
        self._backend.tell_of("imported", stream, version=manifest.version, of=manifest.stream)
        return stream, is_new

    async def _dump(self, stream: Stream) -> _Dump:
        engine = self._backend.engine

        def dump(lane: Lane) -> _Dump:
            engine.add_lane(lane)
            fields, data = engine.store.dump(lane, stream)
            return _Dump(lane, fields, data, stream.version, stream.random_key, stream.last_number)

        return await self._on_device(stream, dump)

    async def _begin(self, stream: Stream, fields: tuple[Field, ...], data: bytes, version: int) -> None:
        """Takes in a stream with a state. It is forgotten again where that does not fit."""

        lane = stream.lane

        def begin() -> None:
            self._restore(lane, stream, fields, data, version)

        begun = self._tenant.admit(stream, begin)

        def check(begun: asyncio.Future[None]) -> None:  # also when the client has left by then
            if begun.cancelled() or begun.exception() is not None:
                self._tenant.discard(stream)

        begun.add_done_callback(check)
        await asyncio.shield(begun)
        await self._tenant.settle(stream)

    def _restore(self, lane: Lane, stream: Stream, fields: tuple[Field, ...], data: bytes, version: int) -> None:
        """On the device thread. Raises ``Conflict`` where the tensors are not those of the stream's policy."""
        engine = self._backend.engine
        engine.add_lane(lane)
        engine.store.restore_dump(lane, stream, fields, data, version)
        engine.forget(stream)

    async def _on_device(self, stream: Stream, run: Callable[[Lane], T]) -> T:
        """What ``run`` returns, on the device thread, after the stream's requests so far; not broken off.

        It is given the lane that the stream's state is in then: a change of policy that comes later queues behind.
        Raises ``UnknownName`` where the stream was deleted meanwhile.
        """
        self._tenant.check_open(stream)
        results, lane = list[T](), stream.lane
        repository = self._backend.repository
        self._backend.source_of(stream)
        done = self._backend.dispatcher.command(stream, lambda: results.append(run(lane)))
        repository.enter(stream.model)  # it stays loaded until then
        done.add_done_callback(lambda done: repository.leave(stream.model))
        await asyncio.shield(done)
        return results[0]

    async def _find(self, id: str, name: str | None, version: int | None) -> Snapshot:
        for snapshot in await self.snapshots(id):
            if name in snapshot.marks if name is not None else snapshot.version == version:
                return snapshot
        wanted = f"snapshot {name!r}" if name is not None else f"state of version {version}"
        raise UnknownName(f"no {wanted} of stream {id!r} is kept; GET /v1/streams/{id}/snapshots lists what is")
