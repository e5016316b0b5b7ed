"""``tta-server state``: what is stored of streams, seen and changed from the shell. No model is loaded.

What reads works beside a server that runs, too, and sees what that has stored so far. What writes needs a store that no
server uses; a server's own streams are changed through its HTTP API.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import orjson
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from tta_server.access import DEFAULT_TENANT
from tta_server.errors import BadInput, ConfigError, Conflict, TooLarge, TtaError, UnknownName
from tta_server.policies import load_plugins, make_policy, policy_digest, settings_of
from tta_server.settings import NAME, Durability, Settings, load_settings
from tta_server.state.portable import Manifest, Portable
from tta_server.state.records import Damaged, Field, Found, Index, InUse, Record, Save, Shutdown, Snapshot, Stored
from tta_server.state.sqlite import FILE, SqliteStore

DAY = 86400.0

commands = typer.Typer(help="Looks after the stored streams, without a server.", no_args_is_help=True)

Config = Annotated[Path, typer.Argument(help="The config file (YAML).", metavar="CONFIG")]
Id = Annotated[str, typer.Argument(help="The stream.", metavar="ID")]
Folder = Annotated[Path | None, typer.Option("--state", help="Folder of the stored streams, instead of the config's.")]
Tenant = Annotated[str | None, typer.Option(help="Whose streams; default: whoever has one of that id.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON. Times are Unix times in seconds.")]


@commands.command("ls")
def list_streams(
    config: Config,
    state: Folder = None,
    tenant: Annotated[str | None, typer.Option(help="Only this tenant's.")] = None,
    json: AsJson = False,
) -> None:
    """Lists the streams. Where the output is no terminal: a line each, fields separated by tabs."""
    with _reading(config, state) as (_, store):
        index = store.index()
        told = [_facts(found, _kept(store, found)) for found in index.streams if tenant in (None, found.record.tenant)]
        user = store.in_use()
    if json:
        _print_json(told)
    else:
        columns = {
            "id": "id", "tenant": "tenant", "model": "model", "policy": "policy", "version": "version",
            "requests": "requests", "size": "state_bytes", "last seen": "last_seen", "durability": "durability",
            "saved states": "saved_states",
        }  # fmt: skip
        shown = [one | {"last_seen": _time(one["last_seen"]), "durability": one["durability"]["mode"]} for one in told]
        _print_table(list(columns), [[one[key] for key in columns.values()] for one in shown])
    for text in [*index.damaged, *(f"stream {one['id']!r}: {one['note']}" for one in told if one["note"])]:
        _warn(text)
    _warn_if_in_use(user)


@commands.command()
def show(config: Config, id: Id, state: Folder = None, tenant: Tenant = None, json: AsJson = False) -> None:
    """Says all that is stored of a stream, and which of its states are kept."""
    with _reading(config, state) as (_, store):
        found = _find(store.index(), id, tenant)
        kept, user = _kept(store, found), store.in_use()
        facts = _facts(found, kept)
        try:
            stored = store.load(found.key, found.state_revision)
            tensors = [field._asdict() for field in stored.fields]
        except (Damaged, KeyError) as error:
            tensors = []
            facts["note"] = "; ".join(
                filter(None, [facts["note"], f"its newest state cannot be used: {_reason(error)}"])
            )
    facts |= {"policy_digest": _digest_of(found.record), "tensors": tensors}
    if json:
        _print_json(facts | {"snapshots": [asdict(one) for one in kept]})
    else:
        facts |= {key: _time(facts[key]) for key in ("created", "last_seen")} | {"tensors": len(tensors)}
        facts["random_key"] = str(facts["random_key"])  # no quantity
        _print_table(["what", "value"], list(facts.items()))
        columns = ["version", "revision", "saved", "bytes", "marks", "automatic", "newest"]
        _print_table(columns, [
            (one.version, one.revision, _time(one.saved), one.bytes, " ".join(one.marks), one.automatic, one.current)
            for one in kept
        ])  # fmt: skip
    _warn_if_in_use(user)


@commands.command("export")
def export_state(
    config: Config,
    id: Id,
    file: Annotated[Path, typer.Argument(help="The file to write.", metavar="FILE")],
    state: Folder = None,
    tenant: Tenant = None,
    snapshot: Annotated[str | None, typer.Option(help="The state of this name, not the newest.")] = None,
    version: Annotated[int | None, typer.Option(min=0, help="The newest state of this version.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
) -> None:
    """Writes a stream's state to a file, which import, here and over HTTP, takes."""
    if snapshot is not None and version is not None:
        raise BadInput("give either --snapshot or --version")
    if file.exists() and not force:
        raise Conflict(f"{file} is there already; choose another name, or say --force")
    with _reading(config, state) as (_, store):
        found = _find(store.index(), id, tenant)
        stored, record = _load(store, found, _kept(store, found), snapshot, version)
    if stored.data is None:
        raise Conflict(f"this state of stream {id!r} is the model's own: it took no step; there is nothing to export")
    policy = make_policy(record.policy, record.settings)
    manifest = Manifest(
        stream=record.id,
        model=record.model,
        model_digest=record.digest,
        policy=record.policy,
        settings=settings_of(policy),
        policy_digest=policy_digest(policy),
        version=record.version,
        request_number=record.last_number,
        random_key=record.random_key,
        created=record.created,
        exported=time.time(),
    )
    body = Portable(manifest, stored.fields, stored.data).dump()
    _write(file, body)
    typer.echo(f"Stream {id!r}, version {record.version}: {len(body):,} bytes in {file}")


@commands.command("import")
def import_state(
    config: Config,
    file: Annotated[Path, typer.Argument(help="The file that export, here or over HTTP, wrote.", metavar="FILE")],
    state: Folder = None,
    id: Annotated[str | None, typer.Option(help="Id of the stream, instead of the file's.")] = None,
    tenant: Annotated[str, typer.Option(help="Whose stream it is to be.")] = DEFAULT_TENANT,
    model: Annotated[str | None, typer.Option(help="The model's name in this config, instead of the file's.")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Give the state to a stream that is there.")] = False,
) -> None:
    """Makes a stream from a file. Whether it fits the model's weights is seen when a server has loaded them."""
    settings = _settings(config)
    body = _read(file, settings.limits.import_bytes)
    portable = Portable.parse(body)
    manifest = portable.manifest
    name, model = id or manifest.stream, model or manifest.model
    _check_file(portable, settings, name, model)
    with _owning(settings, state, new=True) as store:
        index = store.index()
        there = [one for one in index.streams if (one.record.tenant, one.record.id) == (tenant, name)]
        if there and not replace:
            raise Conflict(f"there is a stream {name!r} already; choose another --id, or say --replace")
        save = (
            _replacement(store, there[0], portable) if there else _new(store, portable, settings, tenant, name, model)
        )
        if store.write([save]):
            raise Conflict(f"the store has another revision of stream {name!r} than it had a moment ago")
    typer.echo(f"Stream {name!r} of tenant {tenant!r}, policy {manifest.policy!r}, is at version {manifest.version}")


@commands.command()
def rm(
    config: Config,
    ids: Annotated[list[str], typer.Argument(help="The streams.", metavar="ID...")],
    state: Folder = None,
    tenant: Tenant = None,
    yes: Yes = False,
) -> None:
    """Deletes streams and all of their states, for good."""
    with _owning(_settings(config), state) as store:
        index = store.index()
        streams = [_find(index, id, tenant) for id in dict.fromkeys(ids)]
        _confirm(streams, yes)
        store.write([], [found.key for found in streams])
    typer.echo(f"Deleted {_counted(len(streams), 'stream')}")


@commands.command()
def verify(config: Config, state: Folder = None) -> None:
    """Reads everything that is stored and checks it. Exits 1, with a list, when something is wrong."""
    errors, streams = Console(stderr=True), 0
    with (
        _reading(config, state) as (_, store),
        Progress(console=errors, transient=True, disable=not errors.is_terminal) as progress,
    ):
        task = progress.add_task("Reading the streams", total=None)

        def tell(done: int, of: int) -> None:
            nonlocal streams
            streams = of
            progress.update(task, completed=done, total=of)

        faults, size = store.verify(tell), store.size()
    for fault in faults:
        typer.echo(fault)
    if faults:
        raise typer.Exit(1)
    typer.echo(f"{_counted(streams, 'stream')} in {size:,} bytes: all is as it was written")


@commands.command()
def gc(
    config: Config,
    state: Folder = None,
    older_than: Annotated[
        float | None, typer.Option(min=0, help="Delete streams without requests for so many days, too.", metavar="DAYS")
    ] = None,
    yes: Yes = False,
) -> None:
    """Deletes damaged states that were put aside and streams that cannot be read, and makes the file small again."""
    with _owning(_settings(config), state) as store:
        index, before, old = store.index(), store.size(), list[Found]()
        if older_than is not None:
            since = time.time() - older_than * DAY
            old = [one for one in index.streams if max(one.record.last_seen, one.record.created) < since]
            if old:
                _confirm(old, yes)
                store.write([], [found.key for found in old])
        states, streams = store.collect()
        after = store.size()
    typer.echo(
        f"Deleted: {_counted(len(old), 'old stream')}, {_counted(states, 'damaged state')}, "
        f"{_counted(streams, 'unreadable stream')}. {before:,} bytes before, {after:,} now"
    )


# The store


def _settings(config: Path) -> Settings:
    load_plugins()
    return load_settings(config)


def _open(settings: Settings, folder: Path | None, new: bool = False) -> SqliteStore:
    if folder is None:
        if settings.state.folder is None:
            raise ConfigError("the config has state.folder: null, so nothing is stored; give a folder with --state")
        folder = settings.folder / settings.state.folder
    if not new and not (folder / FILE).exists():
        raise UnknownName(f"no state store in {folder}: a server makes it when it starts")
    return SqliteStore(folder.absolute(), settings.state.snapshot_steps, settings.state.snapshots)


@contextmanager
def _reading(config: Path, folder: Path | None) -> Iterator[tuple[Settings, SqliteStore]]:
    settings = _settings(config)
    store = _open(settings, folder)
    try:
        yield settings, store
    finally:
        store.close()


@contextmanager
def _owning(settings: Settings, folder: Path | None, new: bool = False) -> Iterator[SqliteStore]:
    """The store, owned. What it knows of the last server's end stays."""
    store = _open(settings, folder, new)
    try:
        store.acquire()
    except InUse as error:
        user = store.in_use()
        raise Conflict(
            f"a server has the streams: {user}. Use its HTTP API instead (DELETE /v1/streams/<id>, "
            "PUT /v1/streams/<id>/state), or stop it first"
            if user
            else str(error)
        ) from error
    try:
        yield store
    finally:
        store.close(store.last_shutdown() or Shutdown(True))


def _find(index: Index, id: str, tenant: str | None) -> Found:
    found = [one for one in index.streams if one.record.id == id and tenant in (None, one.record.tenant)]
    if not found:
        whose = "" if tenant is None else f" of tenant {tenant!r}"
        unread = f"; {_counted(len(index.damaged), 'stream')} cannot be read, see verify" if index.damaged else ""
        raise UnknownName(f"no stream {id!r}{whose} is stored{unread}")
    if len(found) > 1:
        tenants = ", ".join(one.record.tenant for one in found)
        raise BadInput(f"several tenants have a stream {id!r}: {tenants}; say whose with --tenant")
    return found[0]


def _kept(store: SqliteStore, found: Found) -> list[Snapshot]:
    """What is kept of a stream; nothing where that cannot be read, which verify says more of."""
    try:
        return store.snapshots(found.key)
    except Damaged:
        return []


def _reason(error: Damaged | KeyError) -> str:
    return str(error) if isinstance(error, Damaged) else "it is missing"


def _load(
    store: SqliteStore, found: Found, kept: Sequence[Snapshot], name: str | None, version: int | None
) -> tuple[Stored, Record]:
    """The state of that name or version, or the newest, and the stream as it was with it."""
    id, revision = found.record.id, found.state_revision
    others = ", ".join(f"version {one.version}" + "".join(f" ({mark})" for mark in one.marks) for one in kept)
    if name is not None or version is not None:
        chosen = [one for one in kept if (name in one.marks if name is not None else one.version == version)]
        if not chosen:
            wanted = f"snapshot {name!r}" if name is not None else f"state of version {version}"
            raise UnknownName(f"no {wanted} of stream {id!r} is kept; there are: {others or 'none'}")
        revision = chosen[0].revision
    try:
        stored = store.load(found.key, revision)
    except (Damaged, KeyError) as error:
        problem = f"this state of stream {id!r} cannot be used: {_reason(error)}"
        raise Conflict(f"{problem}; kept are: {others or 'none'}") from error
    return stored, found.record if revision == found.state_revision else stored.record


# Import


def _check_file(file: Portable, settings: Settings, id: str, model: str) -> None:
    """What can be checked without the model."""
    manifest, limits = file.manifest, settings.limits
    if not re.fullmatch(NAME, id):
        raise BadInput(f"a stream id has 1 to 128 of A-Z a-z 0-9 . _ : -, got {id[:150]!r}")
    if model not in settings.models:
        raise UnknownName(
            f"the config has no model {model!r}; it has: {', '.join(settings.models)}. Say which: --model"
        )
    if len(file.data) > limits.state_bytes:
        raise TooLarge(
            f"the state has {len(file.data):,} bytes; the limit is limits.state_bytes = {limits.state_bytes:,}"
        )
    made = policy_digest(make_policy(manifest.policy, manifest.settings))
    if made != manifest.policy_digest:
        raise Conflict(
            f"the settings in the file make policy {manifest.policy!r} with digest {made} in this release, the file "
            f"was written for {manifest.policy_digest}"
        )


def _new(store: SqliteStore, file: Portable, settings: Settings, tenant: str, id: str, model: str) -> Save:
    manifest, durability = file.manifest, settings.state.durability
    record = Record(
        tenant=tenant,
        id=id,
        model=model,
        digest=manifest.model_digest,
        policy=manifest.policy,
        settings=manifest.settings,
        durability=Durability() if durability.mode == "none" else durability,  # else it would be dropped at the start
        consistency=settings.streams.consistency,
        random_key=manifest.random_key,
        created=time.time(),
        last_seen=0.0,
        adapt=True,
        version=manifest.version,
        requests=0,
        adapted=0,
        failures=0,
        last_number=manifest.request_number,
        state_bytes=len(file.data),
    )
    return Save(store.new_key(), None, 1, 1, record, True, *_state(file))


def _replacement(store: SqliteStore, found: Found, file: Portable) -> Save:
    record, manifest = found.record, file.manifest
    ours, theirs = (record.digest, _digest_of(record)), (manifest.model_digest, manifest.policy_digest)
    if ours != theirs:
        raise Conflict(
            f"the file is of model {theirs[0]} and policy {theirs[1]} ({manifest.policy}), stream {record.id!r} is of "
            f"{ours[0]} and {ours[1]} ({record.policy})"
        )
    record = replace(record, version=manifest.version, random_key=manifest.random_key)
    revision = found.revision + 1
    return Save(found.key, found.revision, revision, revision, record, True, *_state(file), found.lost)


def _state(file: Portable) -> tuple[tuple[Field, ...], bytes | None]:
    return (file.fields, file.data) if file.manifest.version else ((), None)


def _digest_of(record: Record) -> str:
    """Of its policy and settings; empty where this installation does not have the policy."""
    try:
        return policy_digest(make_policy(record.policy, record.settings))
    except TtaError:
        return ""


def _read(file: Path, most: int) -> bytes:
    try:
        size = file.stat().st_size
        if size > most:
            raise TooLarge(f"{file} has {size:,} bytes; the limit is limits.import_bytes = {most:,}")
        return file.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}") from error


def _write(file: Path, body: bytes) -> None:
    """Whole or not at all, and for nobody else to read."""
    part = file.with_name(f"{file.name}.part")
    try:
        part.unlink(missing_ok=True)
        with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as target:
            target.write(body)
            target.flush()
            os.fsync(target.fileno())
        part.replace(file)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise ConfigError(f"cannot write {file}: {error.strerror}") from error


# Output


def _facts(found: Found, kept: Sequence[Snapshot]) -> dict[str, Any]:
    """What there is to say of a stream, as plain values. ``behind``: changes that the store does not have; the server
    that runs has not stored them yet, or a crash lost them."""
    return {
        **vars(found.record),
        "durability": found.record.durability.model_dump(),
        "consistency": found.record.consistency.model_dump(),
        "last_seen": found.record.last_seen or None,
        "revision": found.revision,
        "behind": found.lost,
        "saved_states": len(kept),
        "saved_bytes": sum(one.bytes for one in kept),
        "note": found.note,
    }


def _print_json(value: Any) -> None:
    typer.echo(orjson.dumps(value, option=orjson.OPT_INDENT_2).decode())


def _print_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """For people; where the output is no terminal, for programs: a line each, fields separated by tabs."""
    console = Console(highlight=False)
    if not console.is_terminal:
        for row in (columns, *rows):
            typer.echo("\t".join(re.sub(r"\s", " ", _text(value, "d")) for value in row))
        return
    table = Table()
    for column, value in zip(columns, rows[0] if rows else columns, strict=True):
        table.add_column(column, justify="right" if type(value) is int else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(_text(value, ",")) for value in row))
    console.print(table)


def _text(value: Any, number: str) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{key} {one}" for key, one in value.items()) or "none"
    if value is None:
        return "-"
    return format(value, number) if isinstance(value, int) else str(value)


def _time(seconds: float | None) -> str | None:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds)) if seconds else None


def _warn_if_in_use(user: str) -> None:
    if user:
        _warn(f"In use by {user}: what that has not stored yet is not here.")


def _warn(text: str) -> None:
    """To standard error: results go to standard output alone."""
    Console(stderr=True, highlight=False).print(text, markup=False, soft_wrap=True)


def _confirm(streams: Sequence[Found], yes: bool) -> None:
    if yes:
        return
    if not sys.stdin.isatty():
        raise BadInput(f"{_counted(len(streams), 'stream')} would be deleted for good; say --yes")
    shown = ", ".join(found.record.id for found in streams[:10]) + (", ..." if len(streams) > 10 else "")
    typer.confirm(f"Delete {_counted(len(streams), 'stream')} for good ({shown})?", abort=True)


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"
