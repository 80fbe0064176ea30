"""A headless Chromium, driven over WebDriver's HTTP interface (W3C WebDriver, 6.3) by the standard library alone."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

DRIVER = shutil.which("chromedriver")
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
START_S = 30
_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the key that stands for an element (12.1)


class Page:
    """A page that is open. Errors of its scripts are collected in `window.faults`."""

    def __init__(self, base: str, session: str) -> None:
        self.address = f"{base}/session/{session}"

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data, {"Content-Type": "application/json"}, method=method)
        with urllib.request.urlopen(request, timeout=START_S) as reply:
            return json.load(reply)["value"]

    def run(self, script: str) -> Any:
        """What the body of a JavaScript function returns."""
        return self.ask("POST", "/execute/sync", {"script": script, "args": []})

    def hover(self, selector: str) -> None:
        """Move the mouse to the middle of the first element that a CSS selector finds."""
        element = self.ask("POST", "/element", {"using": "css selector", "value": selector})
        self.ask("POST", "/actions", {"actions": [{"type": "pointer", "id": "mouse", "actions": [
            {"type": "pointerMove", "duration": 0, "origin": {_ELEMENT: element[_ELEMENT]}, "x": 0, "y": 0}]}]})

    def click(self, selector: str) -> None:
        element = self.ask("POST", "/element", {"using": "css selector", "value": selector})
        self.ask("POST", f"/element/{element[_ELEMENT]}/click", {})

    def screenshot(self) -> bytes:
        """A PNG of what is seen."""
        return base64.b64decode(self.ask("GET", "/screenshot"))


@contextmanager
def open_page(path: Path, width: int = 1366, height: int = 768) -> Iterator[Page]:
    """Open a file in a browser of its own."""
    assert DRIVER is not None and BROWSER is not None
    with tempfile.TemporaryDirectory() as profile:
        driver = subprocess.Popen([DRIVER, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        session = ""
        page = None
        try:
            assert driver.stdout is not None
            port = next(found[1] for line in driver.stdout if (found := re.search(r"successfully on port (\d+)", line)))
            base = f"http://127.0.0.1:{port}"
            options = {"binary": BROWSER, "args": [
                "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                f"--user-data-dir={profile}", f"--window-size={width},{height}"]}
            body = json.dumps({"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}}).encode()
            reply = _post(f"{base}/session", body)
            session = reply["value"]["sessionId"]
            page = Page(base, session)
            page.ask("POST", "/url", {"url": path.as_uri()})
            yield page
        finally:
            if page is not None:
                page.ask("DELETE", "")
            driver.terminate()
            driver.wait(START_S)


def _post(address: str, body: bytes) -> Any:
    end = time.monotonic() + START_S
    while True:
        try:
            with urllib.request.urlopen(urllib.request.Request(address, body), timeout=START_S) as reply:
                return json.load(reply)
        except urllib.error.URLError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)
