"""Chromium without a window, driven by chromedriver over WebDriver's HTTP interface."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.process import START_SECONDS

needs_browser = pytest.mark.skipif(
    shutil.which("chromedriver") is None or not (shutil.which("chromium") or shutil.which("google-chrome")),
    reason="chromium and chromedriver are not both installed",
)
_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
"""WebDriver's name for a reference to an element."""
ESCAPE, ENTER = "\ue00c", "\ue007"


@dataclass(frozen=True)
class Browser:
    """One window."""

    _http: httpx.Client
    _session: str

    def go(self, url: str) -> None:
        """Opens a page."""
        self._call("POST", "/url", url=url)

    def run(self, script: str, *arguments: Any) -> Any:
        """What a function of this body returns in the page."""
        return self._call("POST", "/execute/sync", script=script, args=arguments)

    def click(self, selector: str) -> None:
        """As a user does: fails where something else lies over the element."""
        self._call("POST", f"/element/{self._find(selector)}/click")

    def type(self, selector: str, text: str) -> None:
        """Types into an element."""
        self._call("POST", f"/element/{self._find(selector)}/value", text=text)

    def press(self, key: str) -> None:
        """Presses a key wherever the focus is."""
        steps = [{"type": kind, "value": key} for kind in ("keyDown", "keyUp")]
        self._call("POST", "/actions", actions=[{"type": "key", "id": "keys", "actions": steps}])

    def text(self, selector: str) -> str:
        """What an element says; nothing where there is none."""
        return str(self.run("return document.querySelector(arguments[0])?.innerText ?? ''", selector))

    def attribute(self, selector: str, name: str) -> str | None:
        """Of an element; ``None`` without it."""
        value: str | None = self.run(
            "return document.querySelector(arguments[0])?.getAttribute(arguments[1]) ?? null", selector, name
        )
        return value

    def wait_for(self, what: str, true: Callable[[], bool]) -> None:
        """Waits until something is so."""
        deadline = time.monotonic() + START_SECONDS
        while not true():
            if time.monotonic() > deadline:
                raise AssertionError(f"never saw {what}; the page says:\n{self.text('body')}\n{self.complaints()}")
            time.sleep(0.05)

    def complaints(self) -> list[str]:
        """What the page wrote to the console since the last call, refused and failed requests included."""
        return [entry["message"] for entry in self._call("POST", "/se/log", type="browser")]

    def requested(self) -> list[str]:
        """Where requests went since the last call."""
        entries = [json.loads(one["message"])["message"] for one in self._call("POST", "/se/log", type="performance")]
        return [one["params"]["request"]["url"] for one in entries if one["method"] == "Network.requestWillBeSent"]

    def _find(self, selector: str) -> str:
        found = self._call("POST", "/element", using="css selector", value=selector)
        return str(found[_ELEMENT])

    def _call(self, method: str, path: str, **content: Any) -> Any:
        return call(self._http, method, self._session + path, content)


def call(http: httpx.Client, method: str, path: str, content: dict[str, Any]) -> Any:
    """The value of a WebDriver command."""
    value = http.request(method, path, json=content if method == "POST" else None).json()["value"]
    assert not (isinstance(value, dict) and "error" in value), value
    return value


@contextmanager
def browsing(folder: Path) -> Iterator[Browser]:
    """A browser of its own, with its profile in ``folder``."""
    arguments = [
        "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1400,900",
        "--no-proxy-server", f"--user-data-dir={folder / 'profile'}",
    ]  # fmt: skip
    wanted = {
        "browserName": "chrome",
        "goog:chromeOptions": {"args": arguments},
        "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
    }
    log = folder / "chromedriver.log"
    with log.open("wb") as output:
        driver = subprocess.Popen(["chromedriver", "--port=0"], stdout=output, stderr=output)
        try:
            url = f"http://127.0.0.1:{_port(driver, log)}"
            with httpx.Client(base_url=url, timeout=START_SECONDS, trust_env=False) as http:
                session = call(http, "POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
                path = f"/session/{session['sessionId']}"
                try:
                    yield Browser(http, path)
                finally:
                    call(http, "DELETE", path, {})
        finally:
            driver.terminate()
            driver.wait()


def _port(driver: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and driver.poll() is None:
        found = re.search(r"started successfully on port (\d+)", log.read_text())
        if found:
            return found[1]
        time.sleep(0.02)
    raise AssertionError(f"chromedriver did not start:\n{log.read_text()}")
