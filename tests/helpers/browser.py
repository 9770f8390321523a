"""A real browser for tests: Chromium without a window,
driven through a pipe by its DevTools protocol.

https://chromedevtools.github.io/devtools-protocol. No package and no port is needed.
"""

import base64
import json
import os
import shutil
import subprocess
import time
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
LIMIT = 60  # seconds for what should take one


def found() -> str | None:
    """The browser to use: what CHROME names, or one that is installed; None where there is none."""
    if os.name == "nt":  # its pipes have no numbers
        return None
    return next(
        (name for name in (os.environ.get("CHROME"), *NAMES) if name and shutil.which(name)), None
    )


class Page:
    """One open page."""

    def __init__(self, send, receive):
        self._send, self._receive, self._numbers = send, receive, count(1)
        self.events: list[dict] = []  # what the browser told meanwhile
        self._session = None

    def call(self, method: str, **params) -> dict:
        """One command of the protocol and its answer."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        self._send(message)
        while True:
            answer = self._receive()
            if answer.get("id") == number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self.events.append(answer)

    def open(
        self,
        address: str,
        scripts: bool = True,
        before: str = "",
        width: int = 1000,
        height: int = 800,
    ) -> None:
        """Show an address in a new tab.

        `before` is a script that runs first; what happens gathers in `events`.
        """
        if self._session:
            self.call("Page.close")
        self._session = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setScriptExecutionDisabled", value=not scripts)
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        if before:
            self.call("Page.addScriptToEvaluateOnNewDocument", source=before)
        self.events.clear()
        self.call("Page.navigate", url=address)
        self._wait_for("Page.loadEventFired")

    def _wait_for(self, method: str) -> None:
        while not any(event.get("method") == method for event in self.events):
            self.events.append(self._receive())

    def run(self, expression: str):
        """What a JavaScript expression gives; a promise is waited for."""
        answer = self.call(
            "Runtime.evaluate",
            expression=expression,
            awaitPromise=True,
            returnByValue=True,
            userGesture=True,
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def until(self, expression: str, seconds: float = LIMIT):
        """Wait until an expression is true; its value."""
        last = time.monotonic() + seconds
        while not (value := self.run(expression)):
            assert time.monotonic() < last, f"not within {seconds} s: {expression}"
            time.sleep(0.05)
        return value

    def click(self, x: float, y: float) -> None:
        """Press and release the mouse at a place in the window."""
        for kind in ("mousePressed", "mouseReleased"):
            self.call(
                "Input.dispatchMouseEvent",
                type=kind,
                x=x,
                y=y,
                button="left",
                buttons=1,
                clickCount=1,
            )

    def key(self, name: str, code: int) -> None:
        """Press and release a key: its name in JavaScript, and its number in Windows."""
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent", type=kind, key=name, code=name, windowsVirtualKeyCode=code
            )

    def requests(self) -> list[str]:
        """The addresses that the page asked for, without those that lie in itself."""
        self.run("1")
        asked = [
            event["params"]["request"]["url"]
            for event in self.events
            if event.get("method") == "Network.requestWillBeSent"
        ]
        return [address for address in asked if not address.startswith(("data:", "blob:"))]

    def errors(self) -> list[str]:
        """What went wrong in the page's scripts."""
        self.run("1")
        thrown = [
            str(event["params"]["exceptionDetails"])
            for event in self.events
            if event.get("method") == "Runtime.exceptionThrown"
        ]
        logged = [
            event["params"]["entry"]["text"]
            for event in self.events
            if event.get("method") == "Log.entryAdded"
            and event["params"]["entry"]["level"] == "error"
        ]
        return [text[:600] for text in thrown + logged]

    def picture(self, path: Path) -> None:
        """What the window shows, as a PNG."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))


@contextmanager
def browser(folder: Path):
    """A `Page` of a new browser that keeps its files in `folder`."""
    command = [
        found(),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--disable-background-networking",
        "--autoplay-policy=no-user-gesture-required",
        "--mute-audio",
        "--remote-debugging-pipe",
        f"--user-data-dir={folder / 'profile'}",
    ]
    its_in, our_out = os.pipe()
    our_in, its_out = os.pipe()

    def become():  # the browser reads commands from file 3 and answers into file 4
        a, b = os.dup(its_in), os.dup(its_out)
        os.dup2(a, 3)
        os.dup2(b, 4)

    log = (folder / "browser.log").open("wb")
    process = subprocess.Popen(command, preexec_fn=become, close_fds=False, stdout=log, stderr=log)
    os.close(its_in)
    os.close(its_out)
    reader, writer = os.fdopen(our_in, "rb", buffering=0), os.fdopen(our_out, "wb", buffering=0)
    buffer = bytearray()

    def send(message):
        writer.write(json.dumps(message).encode() + b"\0")

    def receive():
        while b"\0" not in buffer:
            part = reader.read(1 << 20)
            assert part, f"the browser ended: {(folder / 'browser.log').read_text()[-500:]}"
            buffer.extend(part)
        message, _, rest = bytes(buffer).partition(b"\0")
        buffer[:] = rest
        return json.loads(message)

    page = Page(send, receive)
    try:
        yield page
    finally:
        with suppress(Exception):
            page._session = None
            page.call("Browser.close")
        reader.close()
        writer.close()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        log.close()
