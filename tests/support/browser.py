"""A headless Chromium, driven over its DevTools protocol: no driver, no download, no network."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
MAC = "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"
SECONDS = 30.0
"""That anything may take; far more than it does."""

FLAGS = (
    "--headless=new",
    "--remote-debugging-pipe",
    "--no-sandbox",  # which root cannot have; the page is our own
    "--no-first-run",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-extensions",
    "--disable-background-networking",
    "--disable-component-update",
    "--force-color-profile=srgb",
)


def chromium() -> str | None:
    """Where a Chromium is, if there is one."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    return found or (MAC if Path(MAC).exists() else None)


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """A browser which keeps what it keeps in `profile`."""
    program = chromium()
    assert program is not None
    command_read, command_write = _pipe()
    answer_read, answer_write = _pipe()
    # It reads from 3 and writes to 4; a shell puts them there.
    script = f'exec "$0" "$@" 3<&{command_read} 4>&{answer_write}'
    arguments = [program, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
    process = subprocess.Popen(
        ["bash", "-c", script, *arguments],
        pass_fds=(command_read, answer_write),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "HOME": str(profile)},
    )
    os.close(command_read)
    os.close(answer_write)
    try:
        yield Browser(command_write, answer_read)
    finally:
        os.close(command_write)  # which ends it
        os.close(answer_read)
        with suppress(subprocess.TimeoutExpired):
            process.wait(5)
        process.kill()
        process.wait()


def _pipe() -> tuple[int, int]:
    """A pipe whose ends are out of the way of 3 and 4."""
    ends = os.pipe()
    moved = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends]
    for end in ends:
        os.close(end)
    return moved[0], moved[1]


class Browser:
    """Sends commands, and keeps the events that come meanwhile."""

    def __init__(self, write: int, read: int) -> None:
        self._write, self._read = write, read
        self._unread = b""
        self._number = 0
        self._answers: dict[int, dict[str, Any]] = {}
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """What the browser answers to a command of the protocol."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if session:
            message["sessionId"] = session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._write, data) :]
        until = time.monotonic() + SECONDS
        while self._number not in self._answers:
            assert time.monotonic() < until, f"no answer to {method}"
            self.listen(1.0)
        answer = self._answers.pop(self._number)
        assert "error" not in answer, f"{method}: {answer['error']}"
        return dict(answer["result"])

    def listen(self, seconds: float) -> None:
        """Take what comes within `seconds`, at most until something has come."""
        if not select.select([self._read], [], [], seconds)[0]:
            return
        data = os.read(self._read, 2**20)
        assert data, "the browser has ended"
        *messages, self._unread = (self._unread + data).split(b"\0")
        for text in messages:
            message = json.loads(text)
            if "id" in message:
                self._answers[message["id"]] = message
            else:
                self.events.append(message)

    def page(
        self, url: str, *, language: str = "en-US", width: int = 1280, beside: Page | None = None
    ) -> Page:
        """A new tab, in a profile of its own or in that of the page `beside`."""
        context = beside and beside.context
        context = context or self.call("Target.createBrowserContext")["browserContextId"]
        target = self.call("Target.createTarget", url="about:blank", browserContextId=context)
        attached = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        page = Page(self, target["targetId"], attached["sessionId"], context)
        for domain in ("Page", "Runtime", "Network", "Log"):
            page.call(f"{domain}.enable")
        page.call(
            "Network.setUserAgentOverride", userAgent="Mozilla/5.0 Chrome", acceptLanguage=language
        )
        page.resize(width)
        page.call("Page.navigate", url=url)
        return page


class Page:
    """A tab. `script` arguments are JavaScript expressions."""

    def __init__(self, of: Browser, target: str, session: str, context: str) -> None:
        self._browser, self._target, self._session = of, target, session
        self.context = context

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self._browser.call(method, self._session, **parameters)

    def close(self) -> None:
        """As a user closes a tab."""
        self._browser.call("Target.closeTarget", targetId=self._target)

    def reload(self) -> None:
        """As the browser's button; comes back once the page has been loaded again."""
        loads = len(self.said("Page.loadEventFired"))
        self.call("Page.reload")
        until = time.monotonic() + SECONDS
        while len(self.said("Page.loadEventFired")) == loads:
            assert time.monotonic() < until, "the page does not load"
            self._browser.listen(0.1)

    def resize(self, width: int, height: int = 860) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )

    def prefer(self, scheme: str) -> None:
        """The system's "dark" or "light"."""
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.call("Emulation.setEmulatedMedia", features=[feature])

    def value(self, script: str) -> Any:
        """What an expression comes to; promises are waited for."""
        answer = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, script: str, seconds: float = SECONDS) -> Any:
        """What an expression comes to once that is true."""
        until = time.monotonic() + seconds
        while not (found := self.value(script)):
            assert time.monotonic() < until, f"not within {seconds} s: {script}\n{self.text()}"
            self._browser.listen(0.05)
        return found

    def see(self, selector: str, count: int = 1) -> None:
        """Wait until at least so many of what the selector finds are to be seen."""
        self.wait(
            f"[...document.querySelectorAll({json.dumps(selector)})]"
            f".filter(found => found.offsetWidth).length >= {count}"
        )

    def text(self) -> str:
        """All that can be read on the page."""
        return str(self.value("document.body.innerText"))

    def click(self, selector: str) -> None:
        """With the mouse, in the middle of what the selector finds first, once it keeps still."""
        script = f"""(() => {{
            const found = document.querySelector({json.dumps(selector)});
            if (!found || found.disabled) return null;
            found.scrollIntoView({{block: "nearest", behavior: "instant"}});
            const box = found.getBoundingClientRect();
            return box.width && {{x: box.x + box.width / 2, y: box.y + box.height / 2}};
        }})()"""
        spot = self.wait(script)
        while (
            found := self.wait(f"new Promise(done => setTimeout(() => done({script}), 50))")
        ) != spot:
            spot = found
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **spot)

    def wheel(self, x: float, y: float, delta: float) -> None:
        """Turns the wheel there, down by so many pixels, and waits for the next picture."""
        self.call("Input.dispatchMouseEvent", type="mouseWheel", x=x, y=y, deltaX=0, deltaY=delta)
        self.value("new Promise(done => setTimeout(done, 60))")

    def write(self, text: str) -> None:
        """As from a clipboard, into what has the focus."""
        self.call("Input.insertText", text=text)

    def press(self, key: str, *, shift: bool = False, code: int | None = None) -> None:
        """A key of the keyboard: "Enter", "Tab", "a"; 229 is the `code` of an input method's."""
        code = code or {"Enter": 13, "Tab": 9, "Escape": 27}.get(key, ord(key[0].upper()))
        text = "\r" if key == "Enter" else key if len(key) == 1 else ""
        how = {"key": key, "windowsVirtualKeyCode": code, "modifiers": 8 if shift else 0}
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **how)
        self.call("Input.dispatchKeyEvent", type="keyUp", **how)

    def compose(self, text: str) -> None:
        """As an input method shows what it would write, before it has written it."""
        self.call(
            "Input.imeSetComposition", text=text, selectionStart=len(text), selectionEnd=len(text)
        )

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    # What came meanwhile

    def said(self, method: str) -> list[dict[str, Any]]:
        """The parameters of this page's events of a kind."""
        self._browser.listen(0)
        return [
            event["params"]
            for event in self._browser.events
            if event["method"] == method and event.get("sessionId") == self._session
        ]

    def requested(self) -> list[str]:
        """Every address that was asked for; `data:` is none."""
        urls = [event["request"]["url"] for event in self.said("Network.requestWillBeSent")]
        return [url for url in urls if not url.startswith(("data:", "blob:", "about:"))]

    def problems(self) -> list[str]:
        """What the console says besides information: exceptions, errors, refusals, warnings."""
        texts: Callable[[dict[str, Any]], str] = lambda call: " ".join(  # noqa: E731
            str(one.get("value", one.get("description"))) for one in call["args"]
        )
        return [
            *(str(event["exceptionDetails"]) for event in self.said("Runtime.exceptionThrown")),
            *(
                texts(event)
                for event in self.said("Runtime.consoleAPICalled")
                if event["type"] in ("error", "warning", "assert")
            ),
            *(
                f"{event['entry']['text']} {event['entry'].get('url', '')}"
                for event in self.said("Log.entryAdded")
                if event["entry"]["level"] in ("error", "warning")
            ),
        ]
