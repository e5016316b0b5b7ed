"""``tta-server state``: the real command on stores that the real service wrote."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import sqlite3
import sys
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
import typer
import yaml
from torch import Tensor
from typer.testing import CliRunner

from tests.serving import MODEL, Bench, Loaded, load, rows, serving
from tta_server import cli, state_cli
from tta_server.errors import BadInput, ConfigError, Conflict, TooLarge, TtaError, UnknownName
from tta_server.settings import Settings
from tta_server.state.portable import Portable
from tta_server.state.records import Damaged, Shutdown
from tta_server.state.sqlite import FILE, SqliteStore

T = TypeVar("T")

STATE = {"durability": {"mode": "sync"}, "snapshot_steps": 2}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return load(tmp_path_factory.mktemp("model"))


def on_service(loaded: Loaded, folder: Path, work: Callable[[Bench], Coroutine[Any, Any, T]]) -> T:
    """What ``work`` returns, with a service on the store in ``folder``."""

    async def run() -> T:
        async with serving(loaded, state={**STATE, "folder": str(folder)}) as bench:
            return await work(bench)

    with asyncio.Runner() as runner:
        loop = runner.get_loop()
        return loop.run_until_complete(loop.create_task(run(), name="TestRunner"))  # the one that ``serving`` lets be


async def predict(bench: Bench, id: str, seed: int, tenant: str = "default", number: int | None = None) -> Tensor:
    """The scores; returns when the step after them is stored."""
    owner = bench.service.tenant(tenant)
    answer, _ = await owner.predict(None, rows(8, seed), stream=id, number=number)
    await owner.store(owner.stream(id))
    return answer.logits


async def fill(bench: Bench) -> tuple[list[Tensor], bytes]:
    """Stream ``a`` with five steps, marked after the third; ``a`` of another tenant, ``eata``, and ``fresh`` without a
    step. Returns what ``a`` answers next, after an export of it."""
    tenant, history = bench.tenant, bench.service.history(bench.tenant)
    tenant.open("a")
    for step in range(5):
        await predict(bench, "a", step, number=10 + step)
        if step == 2:
            await history.mark("a", "good")
    bench.service.tenant("ward").open("a", policy="norm")
    await predict(bench, "a", 9, "ward")
    tenant.open("other", policy="sar")
    await predict(bench, "other", 9)
    fresh, _ = tenant.open("fresh")
    await tenant.settle(fresh)
    exported = await history.export("a")
    await history.fork("a", "b")
    future = [await predict(bench, "b", step) for step in (20, 21)]
    await tenant.close("b")
    return future, exported


class Stored:
    """A store, and what is known of it."""

    def __init__(self, folder: Path, config: Path, future: list[Tensor], exported: bytes) -> None:
        self.folder, self.config, self.future, self.exported = folder, config, future, exported

    def run(self, command: str, *arguments: str | Path, **named: Any) -> str:
        """Runs ``tta-server state <command>`` on it, which must succeed; returns what it prints."""
        result = CliRunner().invoke(
            state_cli.commands, [command, str(self.config), *map(str, arguments), "--state", str(self.folder)], **named
        )
        if result.exception is not None:
            raise result.exception
        return result.stdout

    def refuses(self, error: type[TtaError], text: str, command: str, *arguments: str | Path) -> None:
        """It must fail with this error and change nothing."""
        before = self.streams()
        with pytest.raises(error, match=text):
            self.run(command, *arguments)
        assert self.streams() == before

    def streams(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(self.run("ls", "--json"))
        return found

    def show(self, id: str, *arguments: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.run("show", id, "--json", *arguments))
        return found

    def ids(self) -> list[str]:
        return [one["id"] for one in self.streams()]

    def sql(self, statement: str) -> list[Any]:
        """Reads or changes the file behind the store's back; what it changes must be there."""
        db = sqlite3.connect(self.folder / FILE)
        with db:
            done = db.execute(statement)
            assert done.rowcount, statement
            found = done.fetchall()
        db.close()
        return found


@pytest.fixture(scope="module")
def made(loaded: Loaded, tmp_path_factory: pytest.TempPathFactory) -> Stored:
    folder = tmp_path_factory.mktemp("made") / "st"
    future, exported = on_service(loaded, folder, fill)
    return Stored(folder, loaded[0].folder / "config.yaml", future, exported)


@pytest.fixture
def stored(made: Stored, tmp_path: Path) -> Stored:
    """A copy of the store of its own."""
    shutil.copytree(made.folder, tmp_path / "st")
    return Stored(tmp_path / "st", made.config, made.future, made.exported)


# Reading


def test_ls_is_a_line_for_each_stream(stored: Stored) -> None:
    header, *lines = [line.split("\t") for line in stored.run("ls").splitlines()]
    assert header == [
        "id", "tenant", "model", "policy", "version", "requests", "size", "last seen", "durability", "saved states",
    ]  # fmt: skip
    told = [dict(zip(header, line, strict=True)) for line in lines]
    assert [(one["tenant"], one["id"], one["policy"], one["version"], one["requests"]) for one in told] == [
        ("default", "a", "tent", "5", "5"),
        ("ward", "a", "norm", "0", "1"),
        ("default", "other", "sar", "1", "1"),
        ("default", "fresh", "tent", "0", "0"),
    ]
    assert {one["durability"] for one in told} == {"sync"}
    assert told[0]["saved states"] == "4"  # versions 1, 3 and 5 of the ring, 3 marked, 4 before the newest
    assert told[3]["last seen"] == "-"
    assert len(stored.run("ls", "--tenant", "ward").splitlines()) == 2


def test_ls_for_people_is_a_table(stored: Stored) -> None:
    text = stored.run("ls", env={"FORCE_COLOR": "1", "COLUMNS": "150"})
    assert "│ a     │ default │ tiny " in text
    assert "┏" in text


def test_show_says_all(stored: Stored) -> None:
    told = stored.show("a", "--tenant", "default")
    assert (told["model"], told["policy"], told["settings"]["lr"]) == (MODEL, "tent", 0.01)
    assert told["durability"] == {"mode": "sync", "steps": 16, "seconds": 5.0}
    assert (told["version"], told["last_number"], told["behind"], told["note"]) == (5, 14, 0, "")
    kept = [(one["version"], one["marks"], one["automatic"], one["current"]) for one in told["snapshots"]]
    assert kept == [(5, [], True, True), (4, [], False, False), (3, ["good"], True, False), (1, [], True, False)]
    portable = Portable.parse(stored.exported)
    assert told["policy_digest"] == portable.manifest.policy_digest
    assert [tuple(one.values()) for one in told["tensors"]] == [
        (name, dtype, list(shape)) for name, dtype, shape in portable.fields
    ]
    text = stored.run("show", "a", "--tenant", "default")
    assert f"digest\t{portable.manifest.model_digest}" in text
    assert "3\t" in text
    assert "\tgood\t" in text


def test_a_stream_is_found_by_its_id_alone_where_that_says_it(stored: Stored) -> None:
    assert stored.show("fresh")["tenant"] == "default"
    stored.refuses(BadInput, "several tenants have a stream 'a': default, ward; say whose with --tenant", "show", "a")
    stored.refuses(UnknownName, "no stream 'x' is stored", "show", "x")
    stored.refuses(UnknownName, "no stream 'fresh' of tenant 'ward' is stored", "show", "fresh", "--tenant", "ward")


def test_without_a_store_there_is_nothing(made: Stored, tmp_path: Path) -> None:
    empty = Stored(tmp_path / "none", made.config, [], b"")
    for command in ("ls", "verify", "gc"):
        with pytest.raises(UnknownName, match="no state store in"):
            empty.run(command)
    assert not empty.folder.exists()
    result = CliRunner().invoke(state_cli.commands, ["ls", str(made.config)])
    assert isinstance(result.exception, ConfigError)
    assert "give a folder with --state" in str(result.exception)


# Beside a server


def test_beside_a_server_it_reads_and_writes_nothing(loaded: Loaded, stored: Stored, tmp_path: Path) -> None:
    async def beside(bench: Bench) -> None:
        await predict(bench, "a", 30)
        assert stored.show("a", "--tenant", "default")["version"] == 6
        result = CliRunner().invoke(state_cli.commands, ["ls", str(stored.config), "--state", str(stored.folder)])
        assert "In use by process" in result.stderr
        stored.run("export", "other", tmp_path / "file")
        assert "all is as it was written" in stored.run("verify")
        for command in (["rm", "fresh", "--yes"], ["gc"], ["import", tmp_path / "file", "--id", "c"]):
            stored.refuses(Conflict, r"a server has the streams: process \d+ on .*DELETE /v1/streams", *command)
        await predict(bench, "a", 31)  # it owns the store still

    on_service(loaded, stored.folder, beside)
    assert stored.show("a", "--tenant", "default")["version"] == 7
    result = CliRunner().invoke(state_cli.commands, ["ls", str(stored.config), "--state", str(stored.folder)])
    assert result.stderr == ""


# Export and import


def test_export_is_what_the_server_exports(stored: Stored, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    stored.run("export", "a", file, "--tenant", "default")
    ours, servers = Portable.parse(file.read_bytes()), Portable.parse(stored.exported)
    assert (ours.fields, ours.data) == (servers.fields, servers.data)
    assert vars(ours.manifest) | {"exported": 0} == vars(servers.manifest) | {"exported": 0}
    assert file.stat().st_mode & 0o777 == 0o600
    stored.refuses(Conflict, "is there already", "export", "a", file, "--tenant", "default")
    stored.run("export", "a", file, "--tenant", "default", "--snapshot", "good", "--force")
    marked = Portable.parse(file.read_bytes())
    assert (marked.manifest.version, marked.manifest.request_number) == (3, 12)
    assert marked.data != ours.data
    stored.run("export", "a", file, "--tenant", "default", "--version", "3", "--force")
    assert Portable.parse(file.read_bytes()).data == marked.data
    assert [one.name for one in tmp_path.iterdir() if one.is_file()] == [file.name]


def test_export_says_what_there_is(stored: Stored, tmp_path: Path) -> None:
    a = ("export", "a", tmp_path / "file", "--tenant", "default")
    kept = r"kept; there are: version 5, version 4, version 3 \(good\), version 1"
    stored.refuses(UnknownName, f"no snapshot 'bad' of stream 'a' is {kept}", *a, "--snapshot", "bad")
    stored.refuses(UnknownName, f"no state of version 2 of stream 'a' is {kept}", *a, "--version", "2")
    stored.refuses(BadInput, "either", *a, "--version", "3", "--snapshot", "good")
    stored.refuses(Conflict, "nothing to export", "export", "fresh", tmp_path / "file")
    stored.refuses(ConfigError, "cannot write .*: No such file", "export", "other", tmp_path / "no" / "file")


def test_an_imported_stream_goes_on_as_the_exported_one(
    loaded: Loaded, made: Stored, stored: Stored, tmp_path: Path
) -> None:
    """Into the folder of a server that never started."""
    file = tmp_path / "file"
    stored.run("export", "a", file, "--tenant", "default")
    other = Stored(tmp_path / "other", made.config, [], b"")
    assert "is at version 5" in other.run("import", file, "--id", "moved")

    async def go_on(bench: Bench) -> list[Tensor]:
        assert bench.service.last_shutdown == Shutdown(True)
        stream = bench.tenant.stream("moved")
        assert (stream.version, stream.last_number, stream.lost) == (5, 14, 0)
        return [await predict(bench, "moved", step) for step in (20, 21)]

    assert all(map(torch.equal, on_service(loaded, other.folder, go_on), made.future))


def test_a_state_replaces_another(loaded: Loaded, made: Stored, stored: Stored, tmp_path: Path) -> None:
    a = ("--tenant", "default")
    file = tmp_path / "file"
    stored.run("export", "a", file, *a, "--snapshot", "good")
    stored.refuses(Conflict, "there is a stream 'a' already", "import", file)
    before = stored.show("a", *a)
    stored.run("import", file, "--replace")
    after = stored.show("a", *a)
    changed = {"version", "revision", "snapshots", "saved_states", "saved_bytes"}
    assert {key: after[key] for key in after.keys() - changed} == {key: before[key] for key in before.keys() - changed}
    assert (after["version"], after["revision"]) == (3, before["revision"] + 1)
    assert {one["version"] for one in after["snapshots"]} >= {5}  # the one before is kept

    async def back(bench: Bench) -> list[Tensor]:
        assert bench.tenant.stream("a").lost == 0
        return [await predict(bench, "a", step) for step in (3, 4, 20, 21)][2:]

    assert all(map(torch.equal, on_service(loaded, stored.folder, back), made.future))


def test_the_random_key_comes_with_the_state(stored: Stored, tmp_path: Path) -> None:
    file, portable = tmp_path / "file", Portable.parse(stored.exported)
    file.write_bytes(replace(portable, manifest=replace(portable.manifest, random_key=77)).dump())
    stored.run("import", file, "--replace")
    stored.run("import", file, "--id", "new")
    assert [stored.show(id, "--tenant", "default")["random_key"] for id in ("a", "new")] == [77, 77]


def test_import_refuses_what_does_not_fit(stored: Stored, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(stored.exported)
    ours = stored.show("other")
    theirs = Portable.parse(stored.exported).manifest
    text = f"model {theirs.model_digest} and policy {theirs.policy_digest}.* of {ours['digest']} and "
    stored.refuses(Conflict, text + ours["policy_digest"], "import", file, "--id", "other", "--replace")
    stored.refuses(BadInput, "a stream id has", "import", file, "--id", "a b")
    stored.refuses(UnknownName, "has no model 'big'; it has: tiny", "import", file, "--id", "c", "--model", "big")
    stored.refuses(ConfigError, "cannot read .*: No such file", "import", tmp_path / "no")
    portable = Portable.parse(stored.exported)
    file.write_bytes(replace(portable, manifest=replace(portable.manifest, policy_digest="0" * 64)).dump())
    stored.refuses(Conflict, f"digest {theirs.policy_digest} in .* for 0000", "import", file, "--id", "c")
    file.write_bytes(stored.exported[:-1])
    stored.refuses(BadInput, "cut off", "import", file, "--id", "c")


def test_import_heeds_the_limits_and_the_config(made: Stored, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(made.exported)
    text = made.config.read_text().replace(f"  {MODEL}:\n", "  renamed:\n")
    size = len(made.exported)
    for name, limit, told in (("import_bytes", size - 1, f"has {size:,} bytes"), ("state_bytes", 100, "bytes; the")):
        config = tmp_path / "config.yaml"
        config.write_text(f"{text}\nlimits: {{{name}: {limit}}}")
        limited = Stored(tmp_path / "st", config, [], b"")
        with pytest.raises(TooLarge, match=f"{told}.*limits.{name} = {limit:,}"):
            limited.run("import", file, "--model", "renamed")
    config.write_text(text.replace("folder: null", "durability: {mode: none}"))
    kept = Stored(tmp_path / "st", config, [], b"")
    kept.run("import", file, "--model", "renamed", "--tenant", "ward")
    (told_now,) = kept.streams()
    assert (told_now["tenant"], told_now["id"], told_now["model"]) == ("ward", "a", "renamed")
    assert told_now["durability"]["mode"] == "async"  # else the next start would drop it


# Deleting


def test_rm_forgets(loaded: Loaded, stored: Stored) -> None:
    stored.refuses(UnknownName, "no stream 'x'", "rm", "fresh", "x", "--yes")
    stored.refuses(BadInput, "2 streams would be deleted for good; say --yes", "rm", "fresh", "other")
    assert stored.run("rm", "fresh", "other", "fresh", "--yes") == "Deleted 2 streams\n"
    assert stored.ids() == ["a", "a"]

    async def look(bench: Bench) -> tuple[Shutdown | None, list[str]]:
        return bench.service.last_shutdown, [stream.id for stream in bench.tenant.streams()]

    shutdown, ids = on_service(loaded, stored.folder, look)
    assert ids == ["a"]
    assert shutdown is not None
    assert (shutdown.clean, shutdown.unsaved) == (True, 0)  # of the server before, not of the command


def test_gc_deletes_the_old(stored: Stored) -> None:
    assert "0 old streams" in stored.run("gc", "--older-than", "1")
    stored.refuses(BadInput, "4 streams would be deleted for good; say --yes", "gc", "--older-than", "0")
    assert "Deleted: 4 old streams" in stored.run("gc", "--older-than", "0", "--yes")
    assert stored.ids() == []


def test_gc_gives_room_back(stored: Stored) -> None:
    stored.run("rm", "fresh", "other", "--yes")
    stored.run("rm", "a", "--tenant", "default", "--yes")
    stored.sql("CREATE TABLE large AS SELECT zeroblob(200000)")
    stored.sql("DROP TABLE large")
    assert stored.sql("PRAGMA freelist_count")[0][0] > 10
    told = stored.run("gc")
    before, after = (int(part.split()[0].replace(",", "")) for part in told.split(". ")[1].split(" before, "))
    assert after < before
    assert sum(one.stat().st_size for one in stored.folder.iterdir()) < before
    assert stored.sql("PRAGMA freelist_count") == [(0,)]
    assert "1 stream in" in stored.run("verify")


# Damage


def test_a_damaged_record_is_no_damaged_stream(stored: Stored) -> None:
    """Its states have older ones, and gc does not delete it."""
    stored.sql("UPDATE streams SET checksum = x'00' WHERE id = 'other'")
    stored.run("gc")
    assert stored.show("other")["note"] == "its record's checksum is wrong; an older one is used"
    assert stored.show("other")["version"] == 1


def faults(stored: Stored) -> list[str]:
    result = CliRunner().invoke(
        state_cli.commands, ["verify", str(stored.config), "--state", str(stored.folder)], catch_exceptions=False
    )
    assert result.exit_code == 1
    return result.stdout.splitlines()


def test_verify_finds_nothing_in_a_sound_store(stored: Stored) -> None:
    assert stored.run("verify").startswith("4 streams in ")


def test_verify_finds_every_damage(stored: Stored) -> None:
    stored.sql("UPDATE states SET data = zeroblob(length(data)) WHERE stream = 1 AND version = 3")
    stored.sql("UPDATE states SET bad = 'its checksum is wrong' WHERE stream = 1 AND version = 4")
    stored.sql("UPDATE streams SET record = CAST(replace(record, 'tent', 'norm') AS BLOB) WHERE id = 'fresh'")
    stored.sql("DELETE FROM states WHERE stream = (SELECT key FROM streams WHERE id = 'other')")
    stored.sql("INSERT INTO marks VALUES (99, 'lost', 1)")
    assert faults(stored) == [
        "there are marks of a stream that is not there",
        "stream 'a' of tenant 'default': its state of version 3 (revision 4): its checksum is wrong",
        "stream 'a' of tenant 'default': its state of version 4 (revision 5) was put aside: its checksum is wrong",
        "stream 'other' of tenant 'default': its newest state (revision 2) is missing",
        "stream 'fresh' of tenant 'default': its record's checksum is wrong",
    ]


def test_verify_finds_pages_that_are_garbage(stored: Stored) -> None:
    """Wherever they are: a list, or one line of what is wrong; what is sound stays readable."""
    stored.sql("PRAGMA wal_checkpoint(TRUNCATE)")
    file = stored.folder / FILE
    whole = file.read_bytes()
    for page in range(1, len(whole) // 16384):
        file.write_bytes(whole[: 16384 * page] + b"\xa5" * 16384 + whole[16384 * (page + 1) :])
        assert faults(stored)
    file.write_bytes(b"\xa5" * len(whole))
    with pytest.raises(Damaged, match="not a database"):
        stored.run("verify")


def test_a_damaged_state_is_not_exported(stored: Stored, tmp_path: Path) -> None:
    stored.sql("UPDATE states SET data = zeroblob(length(data)) WHERE stream = 1 AND version = 5")
    a = ("a", tmp_path / "file", "--tenant", "default")
    stored.refuses(Conflict, "stream 'a' cannot be used: its checksum is wrong; kept are: version 5, ", "export", *a)
    assert "its newest state cannot be used" in stored.show("a", "--tenant", "default")["note"]
    stored.run("export", *a, "--version", "4")
    assert Portable.parse((tmp_path / "file").read_bytes()).manifest.version == 4


def test_gc_deletes_what_was_put_aside_and_what_cannot_be_read(loaded: Loaded, stored: Stored, tmp_path: Path) -> None:
    stored.sql("UPDATE states SET bad = 'its checksum is wrong' WHERE stream = 1 AND version = 4")
    stored.sql("UPDATE streams SET checksum = x'00' WHERE id = 'other'")
    stored.sql("UPDATE states SET checksum = x'00' WHERE stream = (SELECT key FROM streams WHERE id = 'other')")
    result = CliRunner().invoke(state_cli.commands, ["ls", str(stored.config), "--state", str(stored.folder)])
    assert "stream 'other' of tenant 'default' (number 3): its record's checksum is wrong" in result.stderr
    stored.refuses(UnknownName, "no stream 'other' is stored; 1 stream cannot be read", "show", "other")
    (tmp_path / "file").write_bytes(stored.exported)
    stored.run("import", tmp_path / "file", "--id", "other")  # the damaged one is not in its way
    stored.sql("INSERT INTO marks VALUES (1, 'of nothing', 99)")
    stored.sql("INSERT INTO layouts VALUES (x'00', x'00')")
    assert "1 damaged state, 1 unreadable stream" in stored.run("gc")
    assert stored.sql("SELECT name FROM marks") == [("good",)]
    assert stored.sql("SELECT 1 FROM layouts WHERE digest NOT IN (SELECT layout FROM states)") == []
    assert "4 streams in" in stored.run("verify")

    async def go_on(bench: Bench) -> list[Tensor]:
        return [await predict(bench, "other", step) for step in (20, 21)]

    assert all(map(torch.equal, on_service(loaded, stored.folder, go_on), stored.future))


def test_what_a_crash_lost_is_still_told_after_the_command(loaded: Loaded, stored: Stored, tmp_path: Path) -> None:
    """The command becomes the owner for a while: the next server must learn of the crash all the same."""
    store = SqliteStore(stored.folder)
    store.acquire()
    (found,) = [one for one in store.index().streams if one.record.tenant == "default" and one.record.id == "a"]
    store.note(found.key, found.revision + 3, 0)
    store.close()  # without a word of how it ended
    assert stored.show("a", "--tenant", "default")["behind"] == 3
    stored.run("rm", "fresh", "--yes")
    stored.run("gc")
    (tmp_path / "file").write_bytes(stored.exported)
    stored.run("import", tmp_path / "file", "--replace")

    async def look(bench: Bench) -> tuple[Shutdown | None, int]:
        return bench.service.last_shutdown, bench.tenant.stream("a").lost

    shutdown, lost = on_service(loaded, stored.folder, look)
    assert shutdown is not None
    assert (shutdown.clean, lost) == (False, 3)


# The command


def test_the_page_shows_every_command() -> None:
    page = (Path(__file__).parent.parent / "docs" / "operations.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"^tta-server state (\w+)", page, re.MULTILINE))
    assert shown == set(typer.main.get_command(state_cli.commands).commands)  # type: ignore[attr-defined]  # a group
    (config,) = re.findall(r"^```yaml\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    settings = {"models": {"m": {"factory": "a:b", "weights": "w", "input": {"shape": [3]}}}}
    assert Settings.model_validate(yaml.safe_load(config) | settings).state.durability.steps == 16


def test_errors_are_one_line_and_faults_a_list(
    stored: Stored, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As of the other commands: on standard error, with exit status 1."""

    def run(*arguments: str) -> tuple[str, str]:
        where = [str(stored.config), "--state", str(stored.folder)]
        monkeypatch.setattr(sys, "argv", ["tta-server", "state", *arguments[:1], *where, *arguments[1:]])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        assert exit.value.code == 1
        output = capsys.readouterr()
        return output.out, output.err

    assert run("show", "x") == ("", "error: no stream 'x' is stored\n")
    stored.sql("UPDATE states SET data = zeroblob(length(data)) WHERE stream = 1 AND version = 3")
    faults, errors = run("verify")
    assert errors == ""
    assert faults.endswith("(revision 4): its checksum is wrong\n")
