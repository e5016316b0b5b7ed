"""Log lines: their form, the request they are about, and what is written of streams."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import re
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import redirect_stderr
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from adapters.tent import Tent
from tests.http.conftest import Server, error_of, running
from tests.serving import MODEL, Loaded, load, rows, stream_of
from tta_server import logs
from tta_server.http.wire import request_id
from tta_server.types import Event, Origin

pytestmark = pytest.mark.anyio

Lines = Callable[[], list[dict[str, Any]]]
log = logging.getLogger("tta_server.test")


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return load(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
async def server(loaded: Loaded) -> AsyncIterator[Server]:
    async with running(loaded) as made:
        yield made


@pytest.fixture(autouse=True)
def logging_as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Puts back what ``configure`` changes in the process, and keeps it from closing pytest's own handlers."""
    monkeypatch.setattr(logging, "_handlerList", [])
    loggers = [logging.getLogger(name) for name in (None, "tta_server", "python_multipart")]
    before = [(one.level, one.handlers[:]) for one in loggers]
    yield
    logging.captureWarnings(False)
    for one, (level, handlers) in zip(loggers, before, strict=True):
        one.setLevel(level)
        one.handlers[:] = handlers


@pytest.fixture
def lines() -> Lines:
    """The lines since the last call; every one has to be a JSON object."""
    output = io.StringIO()
    with redirect_stderr(output):
        logs.configure("json", "DEBUG")

    def read() -> list[dict[str, Any]]:
        written = output.getvalue().splitlines()
        output.seek(0)
        output.truncate()
        return [json.loads(line, parse_constant=pytest.fail) for line in written]

    return read


def of(lines: list[dict[str, Any]], logger: str) -> list[dict[str, Any]]:
    return [line for line in lines if line["logger"] == f"tta_server.{logger}"]


# The form of a line


def test_an_object_a_line(lines: Lines) -> None:
    log.info("read %d\nfiles", 2, extra={"stream": "s", "model": MODEL, "version": 3, "seconds": 0.5})
    (line,) = lines()
    age = datetime.now(UTC) - datetime.fromisoformat(line.pop("time"))
    assert timedelta(0) <= age < timedelta(minutes=1)
    assert line == {
        "level": "INFO", "logger": "tta_server.test", "message": "read 2\nfiles",
        "stream": "s", "model": MODEL, "version": 3, "seconds": 0.5,
    }  # fmt: skip


def test_the_time_is_utc(lines: Lines, monkeypatch: pytest.MonkeyPatch) -> None:
    record = logging.LogRecord("tta_server.test", logging.INFO, "", 0, "text", (), None)
    record.created = 86_400.25
    logging.getLogger().handle(record)
    assert lines()[0]["time"] == "1970-01-02T00:00:00.250+00:00"


def test_an_exception_is_a_field(lines: Lines) -> None:
    try:
        raise ValueError("no\nlines")
    except ValueError:
        log.exception("failed", extra={"streams": ["a", "b"]})
    (line,) = lines()
    assert (line["level"], line["message"], line["streams"]) == ("ERROR", "failed", ["a", "b"])
    assert line["exception"].startswith("Traceback")
    assert line["exception"].endswith("ValueError: no\nlines")


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (float("nan"), None),
        (np.float32(0.5), 0.5),
        (np.arange(3), [0, 1, 2]),
        (Path("a/b"), "a/b"),
        ({1: (2, None)}, {"1": [2, None]}),
        (2**70, str(2**70)),
        ("file \udce9", "'file \\udce9'"),
    ],
    ids=str,
)
def test_whatever_is_passed_as_a_field_can_be_written(lines: Lines, value: Any, written: Any) -> None:
    log.info("text", extra={"value": value, "rest": True})
    (line,) = lines()
    assert (line["value"], line["rest"]) == (written, True)


def test_a_field_does_not_take_the_place_of_what_every_line_has(lines: Lines) -> None:
    log.warning("text", extra={"level": "x", "logger": "x", "time": "x", "more": 1})
    (line,) = lines()
    assert (line["level"], line["logger"], line["more"]) == ("WARNING", "tta_server.test", 1)
    assert line["time"].startswith("2")


def test_lines_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure()
    with logs.about(Origin("r-1", f"00-{32 * 'a'}-{16 * 'b'}-01")):
        log.info("read %d files", 2, extra={"stream": "s"})
    log.debug("nobody asked")
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(
        rf"[\d-]+ [\d:,]+ INFO tta_server\.test: read 2 files request=r-1 trace_id={32 * 'a'} stream=s", line
    )


@pytest.mark.parametrize("level", ["DEBUG", "INFO", "WARNING", "ERROR"])
def test_the_level_is_ours_and_below_info_only_ours(capsys: pytest.CaptureFixture[str], level: str) -> None:
    logs.configure("json", level)
    numbers = [logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR]
    for number in numbers:
        log.log(number, "ours")
        logging.getLogger("another.package").log(number, "theirs")
    written = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    names = [logging.getLevelName(number) for number in numbers if number >= getattr(logging, level)]
    assert [line["level"] for line in written if line["message"] == "ours"] == names
    theirs = [line["level"] for line in written if line["message"] == "theirs"]
    assert theirs == [name for name in names if name != "DEBUG"]


def test_warnings_are_lines_too(lines: Lines) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(True)  # the context above has put the function back that is replaced
        warnings.warn("soon gone", stacklevel=1)
    (line,) = lines()
    assert (line["level"], line["logger"]) == ("WARNING", "py.warnings")
    assert "soon gone" in line["message"]


# The request that a line is about


async def test_lines_tell_the_request_and_its_trace(lines: Lines) -> None:
    async def later() -> None:
        await asyncio.sleep(0)
        log.info("in a task of it")

    log.info("before")
    with logs.about(Origin("r", f"00-{32 * 'a'}-{16 * 'b'}-00")):
        log.info("in it")
        task = asyncio.create_task(later())
        with logs.about(Origin("other")):
            log.info("in another")
    log.info("after")
    await task
    assert [(one["message"], one.get("request"), one.get("trace_id")) for one in lines()] == [
        ("before", None, None),
        ("in it", "r", 32 * "a"),
        ("in another", "other", None),
        ("after", None, None),
        ("in a task of it", "r", 32 * "a"),
    ]


GOOD = ["x", "0af7651916cd43dd8448eb211c80319c", "7c9e6679-7425-40de-944b-e07fc1f90ae7", 'a"{}~!', 128 * "z"]
BAD = ["", "a b", " ", 129 * "z", "tab\t", "zwölf", "\x7f"]


@pytest.mark.parametrize("id", GOOD)
def test_ids_that_are_kept(id: str) -> None:
    assert request_id([(b"host", b"h"), (b"x-request-id", id.encode())]) == id


@pytest.mark.parametrize("id", BAD)
def test_ids_that_are_not(id: str) -> None:
    made = [request_id([(b"x-request-id", id.encode())]) for _ in range(2)]
    assert all(re.fullmatch("[0-9a-f]{32}", one) for one in made)
    assert made[0] != made[1]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("PUT", "/v1/streams/s", 201),
        ("GET", "/v2/health/ready", 200),
        ("GET", "/metrics", 200),
        ("GET", "/docs", 200),
        ("GET", "/v1/streams/nobody", 404),
        ("GET", "/no/such/path", 404),
        ("PUT", "/v2/health/live", 405),
        ("POST", f"/v2/models/{MODEL}/infer", 400),
    ],
)
async def test_every_response_has_the_id(server: Server, method: str, path: str, status: int) -> None:
    response = await server.client.request(method, path, headers={"X-Request-ID": "mine"})
    assert (response.status_code, response.headers.get_list("x-request-id")) == (status, ["mine"])
    response = await server.client.request("GET", path)
    assert re.fullmatch("[0-9a-f]{32}", response.headers["x-request-id"])


async def test_so_has_the_answer_to_a_path_of_another_address(server: Server) -> None:
    server.app.state.metrics_port = 9100
    response = await server.client.get("http://test:9100/v2", headers={"X-Request-ID": "mine"})
    assert "no such path on this address" in error_of(response, 404)
    assert response.headers["x-request-id"] == "mine"


async def test_an_error_that_nobody_foresaw_can_be_found_by_its_id(
    server: Server, lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("tta_server.http.v1.describe", fail)
    response = await server.client.get("/v1/policies", headers={"X-Request-ID": "r-7"})
    assert "ZeroDivisionError" in error_of(response, 500)
    assert response.headers["x-request-id"] == "r-7"
    (line,) = of(lines(), "http.problems")
    assert (line["level"], line["request"]) == ("ERROR", "r-7")
    assert "ZeroDivisionError" in line["exception"]


async def test_requests_are_written_at_debug(server: Server, lines: Lines) -> None:
    await server.client.put("/v1/streams/s", headers={"X-Request-ID": "r-8"})
    (line,) = of(lines(), "requests")
    assert 0 < line.pop("seconds") < 60
    line.pop("time")
    assert line == {
        "level": "DEBUG", "logger": "tta_server.requests", "message": "request answered", "request": "r-8",
        "route": "/v1/streams/{id}", "code": 201, "model": "",
    }  # fmt: skip
    logging.getLogger("tta_server").setLevel("INFO")
    await server.client.get("/v1/streams/s")
    assert of(lines(), "requests") == []


# What happens to streams


async def test_the_life_of_a_stream(server: Server, lines: Lines) -> None:
    client: httpx.AsyncClient = server.client
    for number, (method, path, body) in enumerate(
        [
            ("PUT", "", {}),
            ("POST", "/predict", {"inputs": rows(4).tolist()}),
            ("PATCH", "", {"adapt": False}),
            ("PATCH", "", {"policy": "norm"}),
            ("POST", "/reset", None),
            ("DELETE", "", None),
        ]
    ):
        headers = {"X-Request-ID": f"r-{number}"}
        assert (await client.request(method, f"/v1/streams/s{path}", json=body, headers=headers)).is_success
        await server.settled()
    told = of(lines(), "streams")
    assert {(one["stream"], one["tenant"], one["model"], one["level"]) for one in told} == {
        ("s", "default", MODEL, "DEBUG")
    }
    assert [(one["request"], one["event"], one["version"]) for one in told] == [
        ("r-0", "opened", 0), ("r-2", "changed", 1), ("r-3", "changed", 0), ("r-4", "reset", 0), ("r-5", "closed", 0),
    ]  # fmt: skip
    assert (told[1]["adapt"], told[2]["policy"], told[2]["state_kept"]) == (False, "norm", False)


async def test_a_step_that_is_not_kept_is_a_warning(server: Server, lines: Lines) -> None:
    """A learning rate that leaves no finite weights."""
    await server.open("s", settings={"lr": 1e38})
    for number in range(2):
        body = {"inputs": rows(4, number).tolist()}
        await server.client.post("/v1/streams/s/predict", json=body, headers={"X-Request-ID": f"r-{number}"})
        await server.settled()
    told = [one for one in of(lines(), "streams") if one["event"] == "rejected"]
    assert {(one["level"], one["stream"], one["model"], one["version"]) for one in told} == {("WARNING", "s", MODEL, 0)}
    assert [one["request"] for one in told] == ["r-0", "r-1"]


@pytest.mark.parametrize(
    ("kind", "level"),
    [("departure", "INFO"), ("change", "INFO"), ("failed", "WARNING"), ("rejected", "WARNING"), ("opened", "DEBUG")],
)
def test_levels_of_events(lines: Lines, kind: str, level: str) -> None:
    stream = stream_of(Tent(), "s")
    stream.version = 4
    logs.EventLogger().event(Event(kind, stream, {"signal": "entropy", "drift": float("nan")}))
    (line,) = lines()
    assert (line["level"], line["event"], line["signal"], line["drift"]) == (level, kind, "entropy", None)
    assert (line["stream"], line["model"], line["version"]) == ("s", MODEL, 4)
