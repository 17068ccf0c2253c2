"""Headless Chromium over its DevTools pipe, with the standard library alone: pointers, keys and screenshots."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SWITCHES = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
    *("--remote-debugging-pipe", "--hide-scrollbars", "--force-device-scale-factor=1"),
    # a page that reaches for the network finds none
    *("--disable-background-networking", "--proxy-server=127.0.0.1:9"),
)


class Page:
    """A tab, driven by DevTools messages: JSON ended by a zero byte, on a pipe each way."""

    def __init__(self, inbox: int, outbox: int):
        self.inbox, self.outbox, self.number, self.session, self.rest = inbox, outbox, 0, None, b""
        self.events: list[dict] = []

    def call(self, method: str, **params: Any) -> dict:
        """Sends one message and returns its answer; RuntimeError where Chromium says no."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session is not None:
            message["sessionId"] = self.session
        os.write(self.outbox, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self.number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self.events.append(answer)

    def _next(self) -> dict:
        while b"\0" not in self.rest:
            read = os.read(self.inbox, 1 << 20)
            if not read:
                raise RuntimeError("Chromium has ended")
            self.rest += read
        message, _, self.rest = self.rest.partition(b"\0")
        return json.loads(message)

    def open(self, path: Path, width: int = 1400, height: int = 860) -> None:
        """Opens a file in a window of this size and waits until it has drawn itself."""
        if self.session is None:
            target = self.call("Target.createTarget", url="about:blank")["targetId"]
            self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            for domain in ("Page", "Runtime", "Network"):
                self.call(f"{domain}.enable")
        self.events.clear()
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call("Page.navigate", url=path.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._next())
        self.settle()

    def settle(self) -> None:
        """Waits until what was asked for is drawn: two frames of the screen."""
        self.value("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done(0))))")

    def value(self, script: str) -> Any:
        """The value of an expression, its promise awaited; RuntimeError with what it threw."""
        done = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in done:
            raise RuntimeError(done["exceptionDetails"].get("exception", {}).get("description", script))
        return done["result"].get("value")

    def text(self, selector: str) -> str:
        """The text of an element as a person sees it."""
        return self.value(f"document.querySelector({json.dumps(selector)}).innerText")

    def middle(self, selector: str) -> tuple[float, float]:
        """The middle of an element, in the window's pixels."""
        box = self.value(f"(() => {{ const b = document.querySelector({json.dumps(selector)}).getBoundingClientRect(); "
                         "return [b.left + b.width / 2, b.top + b.height / 2]; })()")  # fmt: skip
        return tuple(box)

    def mouse(self, kind: str, x: float, y: float, **more: Any) -> None:
        self.call("Input.dispatchMouseEvent", type=f"mouse{kind}", x=x, y=y, **more)

    def hover(self, x: float, y: float) -> None:
        """Moves the pointer there."""
        self.mouse("Moved", x, y)
        self.settle()

    def click(self, x: float, y: float) -> None:
        """Moves the pointer there and presses and releases its left button."""
        self.mouse("Moved", x, y)
        for kind in ("Pressed", "Released"):
            self.mouse(kind, x, y, button="left", clickCount=1, buttons=1)
        self.settle()

    def drag(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        """Presses at the start and releases at the end."""
        self.mouse("Moved", *start)
        self.mouse("Pressed", *start, button="left", clickCount=1, buttons=1)
        for step in range(1, 6):
            self.mouse("Moved", *(a + (b - a) * step / 5 for a, b in zip(start, end)), button="left", buttons=1)
        self.mouse("Released", *end, button="left", clickCount=1)
        self.settle()

    def type(self, text: str) -> None:
        """Types into what has the focus."""
        self.call("Input.insertText", text=text)
        self.settle()

    def screenshot(self) -> bytes:
        """The window as PNG."""
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])


@contextlib.contextmanager
def browser(folder: Path) -> Iterator[Page]:
    """A Chromium of its own, with its profile in ``folder``; it ends with the block."""
    to_chromium, outbox = os.pipe()
    inbox, from_chromium = os.pipe()

    def wire() -> None:  # DevTools reads descriptor 3 and writes descriptor 4
        first, second = os.dup(to_chromium), os.dup(from_chromium)
        os.dup2(first, 3)
        os.dup2(second, 4)

    command = [CHROMIUM, *SWITCHES, f"--user-data-dir={folder / 'profile'}", "about:blank"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, preexec_fn=wire, close_fds=False, **quiet)
    os.close(to_chromium)
    os.close(from_chromium)
    try:
        yield Page(inbox, outbox)
    finally:
        process.terminate()
        process.wait(30)
        os.close(inbox)
        os.close(outbox)
