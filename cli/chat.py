"""`minicpm-mlx chat`: a conversation in the terminal."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from . import options
from .talk import Loading, Talk
from .words import LANGUAGES, Words

if TYPE_CHECKING:
    from minicpm_mlx import LM, Card, Chat
    from minicpm_mlx.sessions import Saved


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
) -> None:
    """Talk with a model; it remembers the conversation until you leave, and after."""
    from minicpm_mlx.errors import InvalidArgumentError

    if lang is not None and lang not in LANGUAGES:
        raise InvalidArgumentError(f"--lang must be one of {', '.join(LANGUAGES)}, got {lang!r}")
    if max_tokens is not None and max_tokens < 1:
        raise InvalidArgumentError(f"--max-tokens must be 1 or more, got {max_tokens}")
    if (resume is not None or go_on) and no_save:
        raise InvalidArgumentError("--no-save contradicts --resume and --continue; leave one out")
    settings = {
        "system": system,
        "stop": options.unescaped(stop) or None,
        "max_tokens": max_tokens,
        "on_overflow": on_overflow,
        "context": context,
        "kv_bits": kv_bits,
    }
    sampling = {
        "temperature": temp,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
    }
    options.check_sampling(**sampling)
    interactive = prompt is None and options.at_terminal()
    questions = None if interactive else _questions(prompt)
    say = Words(lang)
    saved = _saved(resume, go_on)
    wanted = model or (saved.model if saved else options.DEFAULT_MODEL)
    if interactive:
        wanted = _greet(wanted, say)
    talk = Talk(
        lambda lm: _chat(lm, settings, sampling),
        Loading(partial(options.load, wanted, dtype, device, quiet=interactive)),
        say,
        interactive=interactive,
        markdown=not plain,
        saved=saved,
        changes=settings | sampling,
    )
    if interactive and not no_save:
        talk.name = saved.name if saved else _new_name()
    if questions is not None:
        assert talk.chat  # a model that cannot be loaded is named, whether or not anything is asked
        for question in questions:
            talk.ask(question)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        converse(talk, _typed(talk))
    finally:
        talk.save()
        talk.keep_cache()


def converse(talk: Talk, read: Callable[[], str | None]) -> None:
    """Answer what is typed until its end."""
    from minicpm_mlx.errors import ContextLengthError, MiniCPMError

    from .commands import COMMANDS

    while (text := read()) is not None:
        stripped = text.strip()
        if not stripped:
            continue
        name, _, rest = stripped.partition(" ")
        if name in ("/exit", "/quit"):
            return
        try:
            if command := COMMANDS.get(name):
                command.run(talk, rest.strip())
            elif name.startswith("/") and not rest and name.count("/") == 1:
                talk.note("unknown", style="error", name=name)
            else:
                talk.ask(text)
        except MiniCPMError as error:
            if not talk.loading.done or talk.loading.failed:
                raise  # there is no model to talk with
            talk.print(str(error), style="error")
            if isinstance(error, ContextLengthError):
                talk.note("full", style="warning")
            talk.print("")


def _chat(lm: LM, settings: dict[str, object], sampling: dict[str, object]) -> Chat:
    """A new conversation with what the options say."""
    from minicpm_mlx import Chat

    given = {"max_tokens": 2048} | {k: v for k, v in settings.items() if v is not None}
    return Chat(lm, sampling=options.sampling(lm, **sampling), **given)  # type: ignore[arg-type]


def _saved(resume: str | None, go_on: bool) -> Saved | None:
    """The session to go on with, if one is asked for."""
    from minicpm_mlx.errors import SessionError

    if resume is None and not go_on:
        return None
    from minicpm_mlx import sessions

    if resume is not None:
        return sessions.load(resume)
    found = sessions.listed()
    if not found:
        raise SessionError(f"no saved session in {sessions.directory()}; leave out --continue")
    return found[0]


def _new_name() -> str:
    from minicpm_mlx import sessions

    return sessions.new_name()


def _questions(prompt: str | None) -> Iterator[str]:
    """What a pipe asks: each line, or with -p one text."""
    from minicpm_mlx.errors import InvalidArgumentError

    if prompt is None:
        for line in options.stdin_lines():
            text = line.rstrip("\n")
            if text.strip() in ("/exit", "/quit"):
                return
            if text.strip():
                yield text
        return
    text = "".join(options.stdin_lines()) if prompt == "-" else prompt
    if not text.strip():
        raise InvalidArgumentError("the prompt is empty; expected some text to answer")
    yield text


def _greet(wanted: str, say: Words) -> str:
    """Show the banner; the model to load, which is another where the user would not download it."""
    from minicpm_mlx.registry import resolve

    card = resolve(wanted)
    if card.repo is not None and not _is_here(card):
        print(say("absent", model=card.name, gb=card.size_gb or "?"))
        answer = input(say("offer")).strip().lower()[:1]
        if answer not in ("d", "t"):
            raise typer.Exit(0)
        if answer == "t":
            return _greet("demo", say)
    packed = f" · {card.bits} bit" if card.bits else ""
    print(f"\x1b[1m{card.name}\x1b[0m{packed}")
    for line in (say.pick(card.note, card.note_zh), say("tips")):
        if line:
            print(f"\x1b[2m{line}\x1b[0m")
    print(flush=True)
    return wanted


def _is_here(card: Card) -> bool:
    from minicpm_mlx.local import kept_folder

    whole = replace(card, bits=None, group_size=None)
    return kept_folder(card) is not None or kept_folder(whole) is not None


def _typed(talk: Talk) -> Callable[[], str | None]:
    """Asks at the terminal; Ctrl-C twice at an empty prompt is its end."""
    from minicpm_mlx.registry import cache_dir

    from . import commands
    from .prompt import Prompt

    history = cache_dir() / "history" if talk.name is not None else None
    prompt = Prompt(history, commands.COMMANDS, commands.arguments)
    warned = False

    def read() -> str | None:
        nonlocal warned
        draft, talk.draft = talk.draft, ""
        try:
            text = prompt.read(draft)
        except KeyboardInterrupt:
            if warned:
                return None
            warned = True
            talk.note("leave")
            return ""
        warned = False
        return text

    return read
