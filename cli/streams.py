"""Standard input and output, and text files, as the commands read and write them."""

from __future__ import annotations

import io
import json
import os
import select
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from minicpm_mlx.errors import DownloadError, InvalidArgumentError, StorageError

from .render.theme import console


def at_terminal() -> bool:
    """Whether a person types and reads; either stream may be closed."""
    return all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout))


def shows_progress() -> bool:
    """Whether a person sees both results and what is said beside them."""
    return all(stream is not None and stream.isatty() for stream in (sys.stdout, sys.stderr))


def stdin_lines() -> Iterator[str]:
    """Lines of standard input: UTF-8 whatever the locale, without byte order mark or CR LF."""
    if sys.stdin is None:
        raise InvalidArgumentError("standard input is closed; expected text from it")
    # A Python caller may have replaced it by a StringIO, which has no bytes below the text.
    lines = getattr(sys.stdin, "buffer", None) or io.BytesIO(sys.stdin.read().encode())
    return _decode(lines)


def ask(question: str, *, file: TextIO) -> str | None:
    """Asks at the terminal: the line typed, or None at the end of input.

    What was typed before the question counts. In a pipe (`yes | …`) no question is shown.
    """
    if sys.stdin is None:
        return None
    if interactive := sys.stdin.isatty():
        print(question, end="", file=file, flush=True)
        _wait_for_input()
    line = next(stdin_lines(), None)
    if line is None and interactive:
        print(file=file)
    return None if line is None else line.strip()


def _wait_for_input() -> None:
    """Waits until standard input can be read, or raises KeyboardInterrupt.

    A read alone would miss a Ctrl-C that comes just before it, and wait.
    """
    read, write = os.pipe()
    os.set_blocking(write, False)
    before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    try:
        while sys.stdin not in select.select([sys.stdin, read], [], [])[0]:
            os.read(read, 1)
    finally:
        signal.set_wakeup_fd(before)
        os.close(read)
        os.close(write)


def ask_key(show: Callable[[], None], choices: str) -> str:
    """Shows a question; the key pressed, of `choices`, or their last at the end of input.

    Keys that were pressed before are dropped: they were meant for something else.
    """
    import termios

    descriptor = sys.stdin.fileno()
    termios.tcflush(descriptor, termios.TCIFLUSH)
    show()
    while True:
        _wait_for_input()
        key = os.read(descriptor, 1).decode(errors="replace").lower()
        if key in ("", "\x04"):
            return choices[-1]
        if key in choices:
            return key


def confirm(
    question: str, unanswered: str = "nobody to ask, nothing deleted; --yes deletes without asking"
) -> bool:
    """Whether the answer is yes; InvalidArgumentError if nobody can be asked."""
    answer = ask(f"{question} [y/N]: ", file=sys.stderr)
    if answer is None:
        raise InvalidArgumentError(unanswered)
    return answer.lower() in ("y", "yes")


def _decode(lines: Iterable[bytes]) -> Iterator[str]:
    offset = 0
    for line in lines:
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            raise InvalidArgumentError(not_text("standard input", error, offset)) from None
        yield (text if offset else text.removeprefix("\ufeff")).replace("\r\n", "\n")
        offset += len(line)


def stdin_text() -> str:
    """All of standard input."""
    return "".join(stdin_lines())


def prompt_text(prompt: str, *, empty: bool = False) -> str:
    """The prompt, or standard input for "-"; InvalidArgumentError if it may not be `empty`.

    The newline that `echo` and editors end a text with is no part of a prompt.
    """
    text = stdin_text().removesuffix("\n") if prompt == "-" else prompt
    if not (empty or text.strip()):
        raise InvalidArgumentError("the prompt is empty; expected some text to answer")
    return text


def read_text(path: Path) -> str:
    """The text of a file in UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InvalidArgumentError(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise InvalidArgumentError(not_text(str(path), error)) from None


def not_text(source: str, error: UnicodeDecodeError, offset: int = 0) -> str:
    """The message for bytes that did not decode, `offset` bytes into `source`."""
    position, byte = offset + error.start, error.object[error.start]
    return f"{source} is not {error.encoding} (byte {position}, {byte:#04x}); convert it first"


def print_json(record: object, **options: object) -> None:
    """Prints one JSON value on a line; what JSON lacks (paths) becomes a string."""
    print(json.dumps(record, ensure_ascii=False, default=str, **options))  # type: ignore[arg-type]


@contextmanager
def notice(text: str) -> Iterator[None]:
    """Shows a line at the terminal while something takes its time, then removes it."""
    shown = sys.stderr.isatty()
    if shown:
        print(f"\x1b[2m{text}\x1b[0m", end="\r", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        if shown:
            print("\x1b[K", end="", file=sys.stderr, flush=True)


def progress() -> Callable[[str], None]:
    """Returns a function that rewrites one line at the terminal; "" removes the line."""
    stderr = console(stderr=True)

    def show(text: str) -> None:
        if stderr.is_terminal:
            stderr.file.write(f"\r\x1b[2K{text[: stderr.width - 1]}")
            stderr.file.flush()

    return show


@contextmanager
def resumable(folder: Callable[[], Path]) -> Iterator[None]:
    """Says how to resume if the block is interrupted and has left results in `folder()`."""
    try:
        yield
    except (KeyboardInterrupt, DownloadError, StorageError):
        progress()("")
        if folder().is_dir():
            text = f"finished work is kept in {folder()}; the same command resumes it"
            console(stderr=True).print(text, style="quiet")
        raise
