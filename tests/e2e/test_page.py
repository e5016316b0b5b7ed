"""The live page in a real browser, and its streams of events over real connections."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.browser import ENTER, ESCAPE, Browser, browsing, needs_browser
from tests.e2e.process import Running, started
from tests.serving import MODEL, TIMEOUT, rows

TOKEN = "a-token-for-the-page"


@pytest.fixture(scope="module")
def cameras(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server with three streams that have had requests."""
    with started(tmp_path_factory.mktemp("cameras")) as server:
        for name in ("north", "south", "roof"):
            assert server.http.put(f"/v1/streams/{name}").status_code == 201
            predict(server, name)
        yield server


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browsing(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


@pytest.fixture
def page(browser: Browser, cameras: Running) -> Iterator[Browser]:
    """The page, anew and live. In the end nothing may have gone wrong in it, nor any request elsewhere."""
    browser.go("about:blank")
    browser.complaints(), browser.requested()
    browser.go(cameras.url)
    browser.wait_for("three rows", lambda: browser.run("return document.querySelectorAll('tbody tr').length") == 3)
    yield browser
    assert browser.complaints() == []
    requested = browser.requested()
    assert any(url.startswith(f"{cameras.url}/v1/live") for url in requested)
    elsewhere = [url for url in requested if not url.startswith((f"{cameras.url}/", "data:"))]
    assert elsewhere == []


def predict(server: Running, id: str, count: int = 1) -> None:
    for seed in range(count):
        answer = server.http.post(f"/v1/streams/{id}/predict", json={"inputs": rows(4, seed).tolist()})
        assert answer.status_code == 200, answer.text


def info(server: Running, id: str) -> Any:
    return server.http.get(f"/v1/streams/{id}").json()


def row(id: str, rest: str = "") -> str:
    return f"#list tr[data-id={id}] {rest}"


@needs_browser
def test_a_toggle_flips_adaptation_on_the_server(page: Browser, cameras: Running) -> None:
    switch = row("north", ".switch")

    def flip(on: bool) -> None:
        page.click(switch)
        assert page.attribute(switch, "aria-checked") == str(on).lower(), "at once"
        page.wait_for("the answer", lambda: page.attribute(switch, "aria-busy") == "false")
        assert page.attribute(switch, "aria-checked") == str(on).lower(), "and it stays"
        assert info(cameras, "north")["adapt"] is on
        page.wait_for("the event", lambda: f"north adaptation {'on' if on else 'off'}" in page.text("#strip"))

    flip(False)
    flip(True)


@needs_browser
def test_a_toggle_goes_back_where_the_server_refuses(page: Browser, cameras: Running) -> None:
    """What the server would say of a stream that is closed at that moment."""
    page.run("""
        window.real = window.fetch
        window.fetch = async (path, options) => options.method === "PATCH"
            ? new Response('{"error": "no stream <b>here</b>"}', {status: 404})
            : window.real(path, options)
    """)
    page.click(row("south", ".switch"))
    said = "Adaptation of south stays on: no stream <b>here</b>"
    page.wait_for("the message", lambda: page.text("#message") == said)
    assert page.attribute(row("south", ".switch"), "aria-checked") == "true"
    assert info(cameras, "south")["adapt"] is True


@needs_browser
def test_values_move_while_requests_come(page: Browser, cameras: Running) -> None:
    before = {id: info(cameras, id)["requests"] for id in ("north", "roof")}
    shown = {id: row(id, "td:nth-child(7)") for id in before}
    page.wait_for("what is so", lambda: all(page.text(shown[id]) == str(before[id]) for id in before))
    confidence = page.text(row("roof", "td:nth-child(4) output"))
    assert confidence.endswith("%")
    predict(cameras, "roof", 5)
    page.wait_for("the new count", lambda: page.text(shown["roof"]) == str(before["roof"] + 5))
    page.wait_for("another confidence", lambda: page.text(row("roof", "td:nth-child(4) output")) != confidence)
    page.wait_for("a rate", lambda: page.text(".rate b")[0] in "123456789" or "." in page.text(".rate b"))
    assert page.text(shown["north"]) == str(before["north"])
    assert (page.run("return document.title"), page.text("#connection")) == ("tta-server", "live")


@needs_browser
def test_search_sort_and_one_stream(page: Browser, cameras: Running) -> None:
    names = "return [...document.querySelectorAll('#list .id')].map(one => one.innerText)"
    page.click("th[data-key=id] button")
    page.wait_for("order", lambda: page.run(names) == ["north", "roof", "south"])
    assert page.attribute("th[data-key=id]", "aria-sort") == "ascending"
    page.press("/")
    page.type("#search", "OU")
    page.wait_for("what is found", lambda: page.run(names) == ["south"])
    assert page.text("#all b") == "1"
    page.click(row("south", ".id"))
    page.wait_for("the drawer", lambda: page.text("#name") == "south")
    page.wait_for("its signals", lambda: "largest probability" in page.text("#detail .signals"))
    assert f"model\n{MODEL}" in page.text("#detail .facts")
    assert "opened, policy tent" in page.text("#detail .events")
    page.press(ESCAPE)
    page.wait_for("its end", lambda: page.attribute("#detail", "hidden") == "")
    assert page.run("return document.activeElement.innerText") == "south", "where the user was"


@needs_browser
def test_a_reset_asks_first(page: Browser, cameras: Running) -> None:
    predict(cameras, "north", 2)
    page.wait_for("its steps", lambda: info(cameras, "north")["version"] >= 2)
    for answer in ("no", "yes"):
        page.click(row("north", ".reset"))
        page.wait_for("the question", lambda: page.text("#confirm-title") == "Reset north?")
        page.click(f"#confirm button[value={answer}]")
        if answer == "no":
            assert info(cameras, "north")["version"] >= 2
    page.wait_for("the reset", lambda: info(cameras, "north")["version"] == 0)
    page.wait_for("the event", lambda: "north reset to the source" in page.text("#strip"))


@needs_browser
def test_a_server_that_asks_for_a_token_and_one_that_is_gone(tmp_path: Path) -> None:
    tokens = [
        {"token": TOKEN, "tenant": "a", "rights": ["streams"]},
        {"token": f"{TOKEN}-too-little", "tenant": "a", "rights": ["predict"]},
    ]
    with started(tmp_path, auth={"tokens": tokens}) as server, browsing(tmp_path) as browser:
        browser.go(server.url)
        assert server.http.put("/v1/streams/mine", headers={"authorization": f"Bearer {TOKEN}"}).status_code == 201

        def refused(token: str, said: str) -> None:
            browser.wait_for("the question", lambda: browser.attribute("#login", "open") == "")
            browser.type("#token", token + ENTER)
            browser.wait_for("the reason", lambda: said in browser.text("#login-error"))

        refused("wrong", "nobody has this token")
        refused(f"{TOKEN}-too-little", "the right streams")
        browser.type("#token", TOKEN + ENTER)
        browser.wait_for("the stream", lambda: browser.text("#list .id") == "mine")
        assert TOKEN not in browser.run("return location.href + document.cookie + JSON.stringify(localStorage)")
        browser.go(server.url)
        browser.wait_for("the stream", lambda: browser.text("#list .id") == "mine")
        assert browser.attribute("#login", "open") is None, "asked once"
        server.process.terminate()
        browser.wait_for("the end", lambda: browser.text("#connection").startswith("disconnected; trying again"))


@needs_browser
def test_a_page_without_streams_says_how_to_begin(tmp_path: Path) -> None:
    with started(tmp_path) as server, browsing(tmp_path) as browser:
        browser.go(server.url)
        line = f"curl -X PUT {server.url}/v1/streams/my-camera"
        browser.wait_for("the line", lambda: line in browser.text("#empty pre"))
        assert server.http.put("/v1/streams/my-camera").status_code == 201
        browser.wait_for("the stream", lambda: browser.text("#list .id") == "my-camera")


# Over real connections


def test_following_outlasts_the_limits_of_a_connection_and_ends_with_the_server(tmp_path: Path) -> None:
    limits = {"header_seconds": 0.2, "body_seconds": 0.2, "idle_seconds": 0.2}
    with started(tmp_path, limits=limits) as server:
        got: dict[str, list[float]] = {"/v1/live": [], "/v1/events": []}

        def follow(path: str) -> None:
            with httpx.stream("GET", server.url + path, timeout=TIMEOUT, trust_env=False) as response:
                for line in response.iter_lines():
                    if line.startswith("data:"):
                        got[path].append(time.monotonic())

        threads = [threading.Thread(target=follow, args=[path]) for path in got]
        for thread in threads:
            thread.start()
        server.wait_for("three seconds of events", lambda: len(got["/v1/live"]) >= 4)
        assert server.http.put("/v1/streams/s").status_code == 201
        server.wait_for("an event after them", lambda: len(got["/v1/events"]) == 1)
        told = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join(TIMEOUT)
            assert not thread.is_alive()
        assert server.process.wait(TIMEOUT) == 0
        assert time.monotonic() - told < TIMEOUT / 2
        assert "Traceback" not in server.log
        gaps = [after - before for before, after in zip(got["/v1/live"], got["/v1/live"][1:], strict=False)]
        assert 0.5 < sum(gaps) / len(gaps) < 3
