"""The chat's commands for thoughts: /think and /thoughts."""

from __future__ import annotations

from typing import TYPE_CHECKING

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


def thoughts(terminal: TerminalChat, _: str) -> None:
    if thought := terminal.chat.thought():
        stream = terminal.thought_stream(lasting=True)
        stream.feed(thought)
        stream.close()
        terminal.print("")
    else:
        terminal.note("no_thought", style="warning")
