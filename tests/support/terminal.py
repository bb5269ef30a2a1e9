"""A pseudo-terminal that runs the real program and types at it."""

from __future__ import annotations

import fcntl
import os
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

CODE = "from minicpm_mlx.cli.main import main; main()"
ESCAPES = re.compile(r"\x1b\][^\x07]*\x07|\x1b[\[(][0-9;?]*[A-Za-z]|\x1b[=>]|\r")
SIGN = re.compile(r"\x1b\[2m⋯[^\x1b]*\x1b\[0m\x1b\[K")  # written over as soon as there are words
PATIENCE = 60.0  # seconds before a screen that does not change is called stuck

ENTER, TAB, ESCAPE, UP = "\r", "\t", "\x1b", "\x1b[A"
CTRL_C, CTRL_D, CTRL_E, CTRL_R, CTRL_X = "\x03", "\x04", "\x05", "\x12", "\x18"
ALT_ENTER = ESCAPE + ENTER
STATS = r"(\d+) tokens? · .*first after \d+\.\d\d s · context (\d+)/8192"
PROMPT = r"> "


def scripted(script: Mapping[str, str]) -> str:
    """The program, whose models say what `script` has (`scripted_model.follow_script`)."""
    return f"""
import minicpm_mlx as mm
from support.scripted_model import follow_script
from minicpm_mlx.cli.main import main
load = mm.load
mm.load = lambda *a, **k: follow_script(load(*a, **k), {dict(script)!r})
main()
"""


def alone(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    """Settings of a terminal that do not hang on this machine's, and files of its own."""
    monkeypatch.setenv("MINICPM_MLX_HOME", str(home))
    monkeypatch.setenv("LANG", "C.UTF-8")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    for name in ("LC_ALL", "LC_MESSAGES", "NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)


class Terminal:
    """A process whose controlling terminal is a pseudo-terminal, wide enough for paths."""

    def __init__(self, *arguments: str, code: str | None = None, **environment: str) -> None:
        self.master, self.slave = os.openpty()
        self.resize(24, 160)
        own = "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
        env = {**os.environ, "TERM": "xterm-256color", "PROMPT_TOOLKIT_NO_CPR": "1", **environment}
        self.process = subprocess.Popen(
            [sys.executable, "-c", own + (code or CODE), *arguments],
            stdin=self.slave,
            stdout=self.slave,
            stderr=self.slave,
            env=env,
            start_new_session=True,
        )
        os.close(self.slave)
        self.raw = b""
        self.seen = 0  # how much of the text has been waited for already

    @property
    def text(self) -> str:
        return ESCAPES.sub("", SIGN.sub("", self.raw.decode(errors="ignore")))

    def wait(self, pattern: str) -> re.Match[str]:
        """Reads until `pattern` appears after what was last waited for."""
        deadline = time.monotonic() + PATIENCE
        while not (found := re.compile(pattern).search(self.text, self.seen)):
            read = self._read(deadline, f"never {pattern!r}")
            assert read != b"", f"it ended before {pattern!r}:\n{self.text}"
        self.seen = found.end()
        return found

    def wait_raw(self, text: str) -> None:
        """Reads until `text` was written; it may have been written over since."""
        deadline = time.monotonic() + PATIENCE
        while text not in self.raw.decode(errors="ignore"):
            assert self._read(deadline, f"never {text!r}"), f"it ended before {text!r}"

    def send(self, keys: str) -> None:
        os.write(self.master, keys.encode(errors="surrogateescape"))

    def say(self, line: str) -> None:
        """Types a line at the next prompt."""
        self.wait(PROMPT)
        self.send(line + ENTER)

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    @property
    def echoes(self) -> bool:
        """Whether the terminal was left as a shell expects it."""
        modes = termios.tcgetattr(self.master)[3]
        return bool(modes & termios.ECHO and modes & termios.ICANON)

    def status(self) -> int:
        """Reads to the end; the exit status."""
        deadline = time.monotonic() + PATIENCE
        while self._read(deadline, "it did not end"):
            pass
        return self.process.wait(PATIENCE)

    def hang_up(self) -> int:
        """Closes the window; the exit status."""
        os.close(self.master)
        self.master = -1
        return self.process.wait(PATIENCE)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait(PATIENCE)
        if self.master >= 0:
            os.close(self.master)

    def _read(self, deadline: float, otherwise: str) -> bytes:
        """What comes next; b"" at the end. AssertionError if nothing comes until `deadline`."""
        ready = select.select([self.master], [], [], max(0.0, deadline - time.monotonic()))[0]
        assert ready, f"{otherwise}:\n{self.text}"
        try:
            data = os.read(self.master, 4096)
        except OSError:  # how Linux says that the other end has closed
            data = b""
        self.raw += data
        return data
