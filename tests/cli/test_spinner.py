"""The sign of life: on an empty line alone, and gone before anything else is written there."""

from __future__ import annotations

import io
import re
import time
from collections.abc import Callable

import pytest
from rich.console import Console

from minicpm_mlx.cli.chat.conversation import Loading, PlainStream, TerminalChat
from minicpm_mlx.cli.render import spinner
from minicpm_mlx.cli.render.spinner import SpinnerStream
from minicpm_mlx.cli.render.texts import Texts

SIGN = "\r\x1b[2m⋯ 1 s\x1b[0m\x1b[K"
GONE = "\r\x1b[K"

Make = Callable[..., tuple[SpinnerStream, io.StringIO]]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Make:
    """A stream that looks only when told to, a second after each thing written."""

    def call(width: int = 40, terminal: bool = True) -> tuple[SpinnerStream, io.StringIO]:
        file = io.StringIO()
        out = Console(file=file, force_terminal=terminal, width=width, color_system=None)
        monkeypatch.setattr(spinner, "console", lambda: out)
        monkeypatch.setattr(spinner, "STEP", 1000)
        times = iter(range(1000))
        monkeypatch.setattr(spinner, "monotonic", lambda: next(times))
        return SpinnerStream(lambda seconds: f"⋯ {seconds} s"), file

    return call


def test_it_shows_while_nothing_has_come_and_leaves_before_the_first_word(make: Make) -> None:
    stream, file = make()
    stream._update()
    assert file.getvalue() == SIGN
    stream.feed("Hel")
    assert file.getvalue() == SIGN  # the word goes on
    stream.feed("lo there. ")
    assert file.getvalue() == SIGN + GONE + "Hello there."
    stream._update()
    stream.close()
    assert file.getvalue() == SIGN + GONE + "Hello there.\n"


def test_it_shows_while_a_table_is_held_back(make: Make) -> None:
    stream, file = make()
    stream.feed("Look:\n| a | b |\n|---|---|\n")
    stream._update()
    stream.feed("| 1 | 2 |\n")
    assert file.getvalue() == "Look:\n" + SIGN
    stream.close()
    assert file.getvalue().startswith("Look:\n" + SIGN + GONE + "\n╭────┬")
    assert file.getvalue().count("⋯") == 1


def test_it_is_taken_away_where_nothing_came(make: Make) -> None:
    stream, file = make()
    stream._update()
    stream.close()
    stream._update()
    assert file.getvalue() == SIGN + GONE


@pytest.mark.parametrize(("width", "terminal"), [(12, True), (40, False)])
def test_it_never_wraps_and_is_for_terminals_alone(make: Make, width: int, terminal: bool) -> None:
    stream, file = make(width, terminal)
    stream._update()
    assert file.getvalue() == ""


def test_it_comes_by_itself_at_most_a_few_times_a_second(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, file = make()
    monkeypatch.setattr(spinner, "STEP", 0.05)
    monkeypatch.setattr(spinner, "QUIET", 0.1)
    monkeypatch.setattr(spinner, "monotonic", time.monotonic)
    stream = SpinnerStream(lambda seconds: "⋯")
    time.sleep(0.6)
    stream.feed("Hello. ")
    time.sleep(0.2)
    stream.close()
    assert 1 <= file.getvalue().count("⋯") <= 11
    assert re.sub("\r[^\r]*\x1b\\[K", "", file.getvalue()) == "Hello.\n"


@pytest.mark.parametrize("options", [{"markdown": False}, {"interactive": False}])
def test_plain_replies_have_none(options: dict[str, bool]) -> None:
    loading = Loading(lambda: None, background=False)  # type: ignore[arg-type, return-value]
    talk = TerminalChat(lambda lm: None, loading, Texts("en"), **options)  # type: ignore[arg-type, return-value]
    assert isinstance(talk._answer_stream(), PlainStream)
