"""The line the user types on: history, completion, several lines, an editor."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.buffer import Buffer
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.filters import Condition
from prompt_toolkit.formatted_text import FormattedText
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

QUOTES = '"""'


class LineEditor:
    """Reads what the user says; `completions` gives a command's possible arguments."""

    def __init__(
        self,
        history: Path | None,
        commands: Iterable[str],
        completions: Callable[[str], Iterable[str] | None],
    ) -> None:
        self.session: PromptSession[str] = PromptSession(
            history=_history(history),
            key_bindings=_keys(),
            completer=SlashCompleter(commands, completions),
            complete_while_typing=False,
            enable_open_in_editor=True,
            enable_suspend=True,
            tempfile_suffix=".md",
            multiline=Condition(lambda: self._typed and _is_open(self._text)),
            prompt_continuation="  ",
        )
        self._text = ""  # as it was before the last key
        self._typed = self._quotes = False  # quotes begin it: typed; typed now or earlier
        self.session.default_buffer.on_text_changed += self._changed

    def read(self, default: str = "", until: Callable[[], bool] = lambda: False) -> str | None:
        """What was typed; None at the end of input, or as soon as `until` says so. Raises
        KeyboardInterrupt for Ctrl-C on an empty line, and returns "" for one that drops a line
        begun."""

        async def watch() -> None:
            while not (until() or put_off):
                await asyncio.sleep(0.2)
            if not self.session.app.is_done:
                self.session.app.exit(exception=EOFError)

        def begin() -> None:
            self.session.app.create_background_task(watch())

        self._text, self._typed, self._quotes = default, False, False
        try:
            with _put_off(signal.SIGTERM) as put_off:
                text = self.session.prompt(
                    FormattedText([("bold ansicyan", "> ")]),
                    default=default,
                    pre_run=begin,
                )
        except EOFError:
            return None
        except KeyboardInterrupt:
            if self.session.default_buffer.text:
                return ""
            raise
        if self._quotes and not _is_open(text):
            return text.strip()[3:-3].strip("\n")
        return text

    def _changed(self, buffer: Buffer) -> None:
        """Quotes open a text of several lines where they were typed, not where they were pasted,
        which would leave Enter unable to send it."""
        before, self._text = self._text, buffer.text
        if not _is_quoted(self._text):
            self._typed = self._quotes = False
        elif not _is_quoted(before):
            self._typed = len(self._text) - len(before) == 1
            self._quotes = self._typed or self._text in self.session.history.get_strings()


class SlashCompleter(Completer):
    """Commands after a slash; after one what it takes: names, or a path where it says None."""

    def __init__(
        self, commands: Iterable[str], arguments: Callable[[str], Iterable[str] | None]
    ) -> None:
        self.commands = sorted(commands)
        self.arguments = arguments
        self.paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, event: CompleteEvent) -> Iterator[Completion]:
        text = document.text_before_cursor
        if not text.startswith("/") or "\n" in text:
            return
        command, space, typed = text.partition(" ")
        choices = self.arguments(command) if space else self.commands
        if choices is None:
            yield from self.paths.get_completions(Document(typed), event)
            return
        wanted = typed if space else command
        for choice in choices:
            if choice.lower().startswith(wanted.lower()):
                yield Completion(choice, start_position=-len(wanted))


@contextmanager
def _put_off(number: signal.Signals) -> Iterator[list[int]]:
    """Have a signal wait until the prompt has ended, which it is to do when the list has it: what a
    handler raises inside the event loop would be printed, and not heard."""
    came: list[int] = []
    before = signal.signal(number, lambda found, _: came.append(found))
    try:
        yield came
    finally:
        signal.signal(number, before)
        if came:
            signal.raise_signal(number)


def _is_quoted(text: str) -> bool:
    return text.lstrip().startswith(QUOTES)


def _is_open(text: str) -> bool:
    """Whether a text in triple quotes waits for its end."""
    text = text.strip()
    return _is_quoted(text) and not (len(text) >= 6 and text.endswith(QUOTES))


def _history(path: Path | None) -> History:
    if path is None:
        return InMemoryHistory()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        path.open("r+b").close()
    except OSError:
        return InMemoryHistory()
    return HistoryFile(str(path))


class HistoryFile(FileHistory):
    """A history in a file, as far as the disk has room and the text is one."""

    def store_string(self, string: str) -> None:
        with suppress(OSError, UnicodeError):
            super().store_string(string)


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("escape", "enter")  # Alt-Enter sends these two; prompt_toolkit would take the text
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys
