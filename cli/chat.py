"""`minicpm-mlx chat`: a conversation in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import closing
from typing import TYPE_CHECKING, Annotated

import typer

from . import options
from .theme import console

if TYPE_CHECKING:
    from minicpm_mlx import LM, Chat, Piece, Stats

HELP = "/clear starts over · /exit or Ctrl-D leaves · Ctrl-C stops · Esc Enter: new line"


def chat(
    model: options.Model = options.DEFAULT_MODEL,
    system: options.System = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", help="Longest reply.")] = 2048,
    temp: options.Temp = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    seed: options.Seed = None,
    stop: options.Stop = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
) -> None:
    """Talk with a model; it remembers the conversation until you leave."""
    import minicpm_mlx as mm
    from minicpm_mlx.errors import InvalidArgumentError

    if max_tokens < 1:
        raise InvalidArgumentError(f"--max-tokens must be 1 or more, got {max_tokens}")
    lines = (line.rstrip("\n") for line in options.stdin_lines())
    lm = options.load(model, dtype, device)
    conversation = mm.Chat(
        lm,
        system=system,
        sampling=options.sampling(
            lm,
            temperature=temp,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
        ),
        max_tokens=max_tokens,
        stop=options.unescaped(stop),
    )
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    if interactive:
        _greet(lm)
    _converse(conversation, _reader() if interactive else lambda: next(lines, None), interactive)


def _converse(chat: Chat, read: Callable[[], str | None], interactive: bool) -> None:
    from minicpm_mlx.errors import ContextLengthError, MiniCPMError

    while (text := read()) is not None:
        command = text.strip()
        if not command:
            continue
        if command in ("/exit", "/quit"):
            return
        if command == "/clear":
            chat.clear()
            console(stderr=True).print("conversation cleared\n", style="quiet")
        elif command.startswith("/") and " " not in command and command.count("/") == 1:
            console(stderr=True).print(f"{HELP}\n", style="quiet")
        else:
            try:
                _answer(chat, text, interactive)
            except MiniCPMError as error:
                if not interactive:
                    raise
                hint = "; /clear starts over" if isinstance(error, ContextLengthError) else ""
                console(stderr=True).print(f"{error}{hint}\n", style="error")


def _answer(chat: Chat, text: str, interactive: bool) -> None:
    """Stream a reply; Ctrl-C breaks it off and leaves what came in the conversation."""
    last: Piece | None = None
    pieces = chat.reply(text)
    try:
        with closing(pieces):
            for piece in pieces:
                sys.stdout.write(piece.text)
                sys.stdout.flush()
                last = piece
    except KeyboardInterrupt:
        if not interactive:
            raise
    print()
    if interactive:
        note = "stopped"
        if last is not None and last.stats is not None:
            cut = "cut off by --max-tokens · " if last.finish_reason == "length" else ""
            note = cut + _summary(chat, last.stats)
        console().print(f"{note}\n", style="quiet")


def _summary(chat: Chat, stats: Stats) -> str:
    used = stats.prompt_tokens + stats.completion_tokens
    count = stats.completion_tokens
    speed = f"s · {stats.decode_tps:.1f} tok/s" if count > 1 else "" if count else "s"
    return (
        f"{count} token{speed} · first after {stats.ttft:.2f} s · "
        f"context {used}/{chat.lm.context_length}"
    )


def _greet(lm: LM) -> None:
    out = console()
    out.print(lm.card.name, style="title")
    for note in (lm.card.note, lm.card.note_zh):
        if note:
            out.print(note, style="quiet")
    out.print(f"{HELP}\n", style="quiet")


def _reader() -> Callable[[], str | None]:
    """Asks at the terminal: wide characters, history with the arrow keys, Esc Enter for a line."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.formatted_text import FormattedText
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()

    @keys.add("escape", "enter")  # Alt-Enter sends these two; prompt_toolkit would take the text
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    session: PromptSession[str] = PromptSession(key_bindings=keys)

    def read() -> str | None:
        try:
            return session.prompt(FormattedText([("bold ansicyan", "> ")]))
        except KeyboardInterrupt:
            return ""
        except EOFError:
            return None

    return read
