"""`minicpm-mlx chat`: a conversation in the terminal."""

from __future__ import annotations

import difflib
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import options
from ..render.texts import LANGUAGES, Texts
from ..render.theme import console
from . import keyboard
from .conversation import (
    LEAVE,
    Loading,
    TerminalChat,
    is_here,
)

if TYPE_CHECKING:
    from minicpm_mlx import LM, Chat
    from minicpm_mlx.lm.sessions import SavedSession


def chat(
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", help="Card, folder or repository; default: the session's, or 2B."
        ),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", "-p", help="Answer this and leave; - reads standard input."),
    ] = None,
    system: options.System = None,
    resume: Annotated[
        str | None, typer.Option("--resume", help="Go on with this saved session.")
    ] = None,
    go_on: Annotated[
        bool, typer.Option("--continue", "-c", help="Go on with the last session.")
    ] = False,
    no_save: Annotated[bool, typer.Option("--no-save", help="Keep nothing on disk.")] = False,
    plain: Annotated[bool, typer.Option("--plain", help="Replies as they come, no Markdown.")] = (
        False
    ),
    lang: Annotated[
        str | None, typer.Option("--lang", help="Language of the interface: en or zh.")
    ] = None,
    on_overflow: Annotated[
        str | None,
        typer.Option("--on-overflow", help="When the context is full: stop, or slide."),
    ] = None,
    context: Annotated[
        int | None, typer.Option("--context", help="Fewer tokens than the model's; less memory.")
    ] = None,
    kv_bits: Annotated[
        int | None, typer.Option("--kv-bits", help="Keep the cache in 8 or 4 bits.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", help="Longest reply; default 2048.")
    ] = None,
    temp: options.Temp = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    seed: options.Seed = None,
    stop: options.Stop = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    adapter: options.Adapter = None,
    draft: options.Draft = None,
) -> None:
    """Talk with a model; it remembers the conversation until you leave, and after."""
    from minicpm_mlx.errors import InvalidArgumentError

    if lang is not None and lang not in LANGUAGES:
        raise InvalidArgumentError(f"--lang must be one of {', '.join(LANGUAGES)}, got {lang!r}")
    if max_tokens is not None and max_tokens < 1:
        raise InvalidArgumentError(f"--max-tokens must be 1 or more, got {max_tokens}")
    if (resume is not None or go_on) and no_save:
        raise InvalidArgumentError("--no-save contradicts --resume and --continue; leave one out")
    settings: dict[str, Any] = {
        "system": system,
        "stop": options.unescaped(stop) or None,
        "max_tokens": max_tokens,
        "on_overflow": on_overflow,
        "context": context,
        "kv_bits": kv_bits,
    }
    sampling: dict[str, Any] = {
        "temperature": temp,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
    }
    options.check_sampling(**sampling)
    if context is not None and context < 1:
        raise InvalidArgumentError(f"--context must be 1 or more, got {context}")
    if kv_bits not in (None, 4, 8):
        raise InvalidArgumentError(f"--kv-bits must be 8 or 4, got {kv_bits}")
    if on_overflow not in (None, "stop", "slide"):
        raise InvalidArgumentError(f"--on-overflow must be stop or slide, got {on_overflow!r}")
    interactive = prompt is None and options.at_terminal()
    questions = None if interactive else _questions(prompt)
    say = Texts(lang)
    saved = _saved(resume, go_on)
    wanted = model or (saved.model if saved else options.DEFAULT_MODEL)
    if interactive:
        wanted = _greet(wanted, say)
    if interactive and (dtype or device):
        options.select(dtype, device)  # loading is not heard of at the prompt
    load = partial(options.load, dtype=dtype, device=device, context=context, kv_bits=kv_bits)
    talk = TerminalChat(
        lambda lm: _chat(lm, settings, sampling),
        Loading(
            lambda: load(wanted, quiet=interactive, adapter=adapter, draft=draft),
            background=interactive,
        ),
        say,
        interactive=interactive,
        markdown=not plain,
        name=saved.name if saved else _new_name() if interactive and not no_save else None,
        saved=saved,
        changes=settings | sampling,
        load=load,
        adapter=adapter is None,
    )
    if questions is not None:
        assert talk.chat  # a model that cannot be loaded is named, whether or not anything is asked
        for question in questions:
            talk.ask(question)
        talk.keep_cache()
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    signal.signal(signal.SIGHUP, _hang_up)
    if saved:
        talk.note("resumed", name=saved.name, messages=say.some("message", len(saved.messages)))
    try:
        with keyboard.quiet():
            converse(talk, _typed(talk))
    finally:
        talk.save()
        talk.keep_cache()
        talk.loading.abandon()


def converse(talk: TerminalChat, read: Callable[[], str | None]) -> None:
    """Answer what is typed until its end."""
    from minicpm_mlx.errors import ContextLengthError, MiniCPMError

    from .slash_commands import COMMANDS

    while (text := read()) is not None:
        edited, talk.editing = talk.editing, None
        stripped = text.strip()
        if not stripped:
            continue
        name, *rest = stripped.split(maxsplit=1)
        command = COMMANDS.get(name)
        if command and not command.lines and "\n" in stripped:
            command = None
        if command and rest and not command.takes:
            talk.note("usage", usage=name, style="error")
            continue
        if command and name in LEAVE:
            return
        keyboard.mark_pastes(True)
        try:
            if command:
                command.run(talk, *rest or [""])
            elif _meant_as_command(stripped, name, rest, COMMANDS):
                talk.note("unknown", style="error", name=name)
            else:
                talk.ask(text, edited)
        except KeyboardInterrupt:
            talk.note("stopped")
        except MiniCPMError as error:
            if talk.broken:
                raise
            if isinstance(error, ContextLengthError):
                talk.overflow(error)
            else:
                talk.print(str(error), style="error")
            talk.print("")
    if talk.loading.failed:
        talk.loading.wait()  # raises why


def _meant_as_command(text: str, name: str, rest: list[str], commands: Iterable[str]) -> bool:
    """Whether a command is misspelled here, rather than a path mentioned."""
    if "\n" in text or not re.fullmatch(r"/[^/]*", name):
        return False
    return not rest or bool(difflib.get_close_matches(name, commands, cutoff=0.75))


def _hang_up(*_: object) -> None:
    """The terminal has gone: what is still written to it goes nowhere, and the rest is kept."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    sys.exit(129)


def _chat(lm: LM, settings: dict[str, Any], sampling: dict[str, Any]) -> Chat:
    """A new conversation with what the options say."""
    from minicpm_mlx import Chat

    given = {"max_tokens": 2048} | {k: v for k, v in settings.items() if v is not None}
    return Chat(lm, sampling=options.sampling(lm, **sampling), **given)


def _saved(resume: str | None, go_on: bool) -> SavedSession | None:
    """The session to go on with, if one is asked for."""
    from minicpm_mlx.errors import SessionError

    if resume is None and not go_on:
        return None
    from minicpm_mlx.lm import sessions

    if resume is not None:
        return sessions.load(resume)
    found = sessions.listed()
    if not found:
        raise SessionError(f"no saved session in {sessions.directory()}; leave out --continue")
    return found[0]


def _new_name() -> str:
    from minicpm_mlx.lm import sessions

    return sessions.new_name()


def _questions(prompt: str | None) -> Iterator[str]:
    """What a pipe asks: each line, or with -p one text."""
    from minicpm_mlx.errors import InvalidArgumentError

    if prompt is None:
        for line in options.stdin_lines():
            text = line.rstrip("\n")
            if text.strip() in LEAVE:
                return
            if text.strip():
                yield text
        return
    text = "".join(options.stdin_lines()) if prompt == "-" else prompt
    if not text.strip():
        raise InvalidArgumentError("the prompt is empty; expected some text to answer")
    yield text


def _greet(wanted: str, say: Texts) -> str:
    """Show the banner; the model to load, which is another where the user would not download it."""
    from minicpm_mlx.model_cards import resolve

    card = resolve(wanted)
    if not is_here(card):
        print(say("absent", model=card.name, gb=card.size_gb or "?"))
        answer = _choice(say("offer"), "dtq")
        if answer == "q":
            raise typer.Exit(0)
        if answer == "t":
            return _greet("demo", say)
        from minicpm_mlx.loading.store import folder_of

        folder_of(card)  # here, where its progress is seen and Ctrl-C heard
    packed = f" · {card.bits} bit" if card.bits else ""
    console().print(f"{card.name}{packed}", style="title")
    for line in (say.pick(card.note, card.note_zh), say("tips")):
        if line:
            console().print(line, style="quiet")
    console().print()
    return wanted


def _choice(question: str, letters: str) -> str:
    """Asks until the answer begins with one of the letters; at the end of input, the last."""
    while True:
        try:
            answer = input(question).strip().lower()[:1]
        except EOFError:
            print()
            return letters[-1]
        if answer and answer in letters:
            return answer


def _typed(talk: TerminalChat) -> Callable[[], str | None]:
    """Asks at the terminal; Ctrl-C twice at an empty prompt is its end."""
    from minicpm_mlx.model_cards import cache_dir

    from . import slash_commands
    from .line_editor import LineEditor

    history = cache_dir() / "history" if talk.name is not None else None
    prompt = LineEditor(history, slash_commands.COMMANDS, slash_commands.arguments)
    warned = False

    def read() -> str | None:
        nonlocal warned
        draft, talk.draft = talk.draft, ""
        try:
            text = prompt.read(draft, until=lambda: talk.loading.failed)
        except KeyboardInterrupt:
            if warned:
                return None
            warned = True
            talk.note("leave")
            return ""
        warned = False
        return text

    return read
