"""A browser to test pages in: Chromium without a window, driven over HTTP as the W3C's WebDriver says."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
_OPTIONS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--force-color-profile=srgb",
    "--window-size=1200,1000",
)
KEYS = {"ArrowRight": "\ue014", "ArrowLeft": "\ue012", "Home": "\ue011", "End": "\ue010", "Tab": "\ue004"}


class Browser:
    """One window."""

    def __init__(self, port: int, folder: Path) -> None:
        self._open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
        self._root = f"http://127.0.0.1:{port}/session"
        chrome = {"binary": shutil.which("chromium"), "args": [*_OPTIONS, f"--user-data-dir={folder}"]}
        wanted = {"goog:chromeOptions": chrome, "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"}}
        session = self._send("", {"capabilities": {"alwaysMatch": wanted}})
        self._root += f"/{session['sessionId']}"

    def _send(self, path: str, body: dict[str, Any] | None, method: str = "POST") -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._root + path, data, {"Content-Type": "application/json"}, method=method)
        try:
            with self._open(request, timeout=60) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()) from error

    def open(self, page: Path) -> None:
        """Show a page of ours, once it says that it is ready."""
        self._send("/url", {"url": page.absolute().as_uri()})
        self.wait("return document.documentElement.dataset.ready === 'yes'")

    def run(self, script: str, *arguments: Any) -> Any:
        """What a function body returns in the page."""
        return self._send("/execute/sync", {"script": script, "args": list(arguments)})

    def wait(self, script: str, seconds: float = 20) -> None:
        """Until it returns true."""
        end = time.monotonic() + seconds
        while not self.run(script):
            assert time.monotonic() < end, f"never true: {script}"
            time.sleep(0.02)

    def element(self, selector: str) -> str:
        found = self._send("/element", {"using": "css selector", "value": selector})
        return str(found[_ELEMENT])

    def click(self, selector: str) -> None:
        self._send(f"/element/{self.element(selector)}/click", {})

    def press(self, *keys: str) -> None:
        """Keys, to whatever has the focus."""
        codes = [KEYS.get(key, key) for key in keys]
        actions = [{"type": kind, "value": code} for code in codes for kind in ("keyDown", "keyUp")]
        self._send("/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": actions}]})

    def point(self, x: int, y: int) -> None:
        """Move the pointer to a place in the window."""
        move = {"type": "pointerMove", "x": x, "y": y, "duration": 0, "origin": "viewport"}
        self._send("/actions", {"actions": [{"type": "pointer", "id": "mouse", "actions": [move]}]})

    def resize(self, width: int, height: int) -> None:
        """Give the window another size."""
        self._send("/window/rect", {"width": width, "height": height})

    def log(self, kind: str) -> list[dict[str, Any]]:
        return list(self._send("/se/log", {"type": kind}))

    def picture(self) -> bytes:
        """The window as a PNG."""
        return base64.b64decode(self._send("/screenshot", None, "GET"))

    def close(self) -> None:
        self._send("", None, "DELETE")


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """A window; without Chromium the test is skipped, but where `CI` is "true" it fails.

    Args:
        folder: for what the browser keeps.
    """
    driver = shutil.which("chromedriver")
    if driver is None or shutil.which("chromium") is None:
        message = "no chromium and chromedriver: on Debian, apt-get install chromium chromium-driver"
        assert os.environ.get("CI") != "true", message
        pytest.skip(message)
    with subprocess.Popen([driver, "--port=0"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            ports = (re.search(r"started successfully on port (\d+)", line) for line in process.stdout)
            window = Browser(int(next(port for port in ports if port)[1]), folder)
            try:
                yield window
            finally:
                window.close()
        finally:
            process.terminate()
