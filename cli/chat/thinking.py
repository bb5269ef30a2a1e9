"""The chat's commands for thoughts: /think and /thoughts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from minicpm_mlx.lm.attachments import without_files

if TYPE_CHECKING:
    from .conversation import TerminalChat


def think(terminal: TerminalChat, text: str) -> None:
    """Sets whether the model thinks; a number is the longest thought, in tokens."""
    chat, word = terminal.chat, text.strip().lower()
    if chat.lm.tokenizer.thinking is None:
        terminal.note("no_thinking", style="warning" if word in ("", "off") else "error")
        return
    if word.isdecimal():
        chat.think, chat.think_tokens = True, int(word)
    elif word in THINK:
        chat.think, chat.think_tokens = THINK[word], None
    elif word:
        terminal.note("usage", usage="/think [on|off|auto|N]", style="error")
        return
    if word:
        terminal.save()
    state = terminal.texts(f"think.{think_text(chat.think)}")
    if chat.think is not False and chat.think_tokens is not None:
        tokens = terminal.texts.count("token", chat.think_tokens)
        state += terminal.texts("think.limit", tokens=tokens)
    terminal.print(state)


THINK = {"on": True, "off": False, "auto": None}


def think_text(value: bool | None) -> str:
    return next(word for word, meant in THINK.items() if meant is value)


def thoughts(terminal: TerminalChat, text: str) -> None:
    """Shows the thoughts of the last turn, of turn N, or of all turns under their questions."""
    turns, word = terminal.chat.thoughts(), text.strip().lower()
    if word.isdecimal() and not 1 <= int(word) <= len(turns):
        terminal.note("no_such_turn", style="error", count=len(turns))
    elif word and word != "all" and not word.isdecimal():
        terminal.note("usage", usage="/thoughts [N|all]", style="error")
    else:
        numbers = range(1, len(turns) + 1) if word == "all" else [int(word or len(turns))]
        _show_thoughts(terminal, [n for n in numbers if n and turns[n - 1]], named=bool(word))


def _show_thoughts(terminal: TerminalChat, numbers: Sequence[int], *, named: bool) -> None:
    chat = terminal.chat
    questions = [message["content"] for message in chat.messages if message["role"] == "user"]
    for number in numbers:
        if named:
            question = without_files(questions[number - 1])[1].strip()
            line = " ".join(question.split("\n"))
            terminal.print(f"{number}. {line}", style="title", cut=True)
        stream = terminal.thought_stream(lasting=True)
        stream.feed("\n\n".join(chat.thoughts()[number - 1]))
        stream.close()
        terminal.print("")
    if not numbers:
        terminal.note("no_thoughts" if named else "no_thought", style="warning")
