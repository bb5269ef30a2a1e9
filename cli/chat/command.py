"""`minicpm-mlx chat`: a conversation in the terminal."""

from __future__ import annotations

import difflib
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minicpm_mlx.arguments import shown
from minicpm_mlx.errors import ContextLengthError, InvalidArgumentError, MiniCPMError, SessionError
from minicpm_mlx.lm.attachments import Files
from minicpm_mlx.loading.store import folder_of
from minicpm_mlx.model_cards import resolve

from .. import options, paths
from ..models.tuning import tune_new
from ..options import flag, option
from ..render.texts import LANGUAGES, Texts
from ..render.theme import console
from ..streams import ask, at_terminal, notice, prompt_text, stdin_lines
from ..thinking_options import ThinkingOptions
from . import keyboard, slash_commands
from .completions import completions
from .conversation import LEAVE, LEAVE_WORDS, Loading, TerminalChat, is_here, offer
from .model_picker import find_or_pick

if TYPE_CHECKING:
    from minicpm_mlx import LM, Chat
    from minicpm_mlx.lm.sessions import SavedSession

    from .tools import TerminalTools

MAX_TOKENS = 2048
AllowTool = Annotated[
    list[str] | None, typer.Option(help="Run this tool without asking. Repeatable.")
]


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class ChatOptions:
    """Options of `chat`."""

    model: str | None = option(
        "Card, folder or repository; default: the session's, the adapter's base, or "
        f"{options.DEFAULT_MODEL}; at a terminal, another on this disk, or one from a list.",
        "--model",
        "-m",
        check=paths.model_name,
    )
    prompt: str | None = option("Answer this and leave; - reads standard input.", "--prompt", "-p")
    system: options.System = None
    resume: str | None = option("Resume this saved session.")
    go_on: bool = flag("Resume the last session.", "--continue", "-c")
    no_save: bool = flag("Save nothing to disk.")
    plain: bool = flag("Print replies as they are, no Markdown.")
    lang: str | None = option("Language of the interface: en or zh.", choices=LANGUAGES)
    on_overflow: str | None = option(
        "When the context is full: stop, or slide.", choices=("stop", "slide")
    )
    context: int | None = option(
        "Fewer tokens than the model's context; saves memory.", limit=options.COUNT
    )
    kv_bits: int | None = options.kv_bits()
    max_tokens: int | None = option(
        f"Longest reply, in tokens; default {MAX_TOKENS}.", limit=options.COUNT
    )
    thinking: ThinkingOptions
    sampling: options.SamplingOptions
    stop: options.Stop = None
    compute: options.Compute
    adapter: options.Adapter = None
    draft: options.Draft = None
    mcp: Path | None = option(
        "Offer the tools of the MCP servers that this JSON file names.", check=paths.input_file
    )
    allow_tool: AllowTool = None
    max_rounds: int | None = option(
        "Replies with calls to one question, at most; default 10.", limit=options.COUNT
    )

    def check(self) -> None:
        """InvalidArgumentError for options that no chat can have, before a model is loaded."""
        if (self.resume is not None or self.go_on) and self.no_save:
            raise InvalidArgumentError(
                "--no-save contradicts --resume and --continue; leave one out"
            )
        if self.allow_tool and self.mcp is None:
            raise InvalidArgumentError("--allow-tool goes with --mcp; give that too")
        self.sampling.check()

    def settings(self) -> dict[str, Any]:
        """Values of Chat's fields; None for those that were not given."""
        names = ("system", "max_tokens", "on_overflow", "context", "kv_bits", "max_rounds")
        values = {name: getattr(self, name) for name in names}
        return values | asdict(self.thinking) | {"stop": options.unescape(self.stop) or None}

    def new_chat(self, lm: LM) -> Chat:
        from minicpm_mlx import Chat

        settings = {name: value for name, value in self.settings().items() if value is not None}
        sampling = self.sampling.apply(lm, self.thinking.think)
        return Chat(lm, sampling=sampling, **{"max_tokens": MAX_TOKENS} | settings)


@options.command(ChatOptions)
def chat(args: ChatOptions) -> None:
    """Talk with a model. It remembers the conversation, and saves it for the next time."""
    args.check()
    interactive = args.prompt is None and at_terminal()
    texts, saved = Texts(args.lang), _saved_session(args)
    asked = args.model or (saved.model if saved else None)
    if interactive and asked is None and args.adapter is None:
        asked = find_or_pick(texts)
        if asked is None:
            raise typer.Exit(0)
    model = options.choose_model(asked, [args.adapter], texts)
    if interactive:
        model = _greet(model, texts)
        if args.compute.dtype or args.compute.device:
            args.compute.select()  # loading in the background prints no warning
    args.thinking.check(model)
    questions = _lines() if args.prompt is None else [prompt_text(args.prompt)]
    with _tools(args, texts, interactive) as tools:
        terminal = _terminal_chat(args, model, texts, saved, interactive, tools)
        if interactive:
            _run_interactive(terminal, saved)
            return
        assert terminal.chat  # a model that cannot be loaded is an error even without a question
        for question in questions:
            terminal.ask(question)
        terminal.save_cache()
        if terminal.unfinished:
            raise typer.Exit(1)


@contextmanager
def _tools(args: ChatOptions, texts: Texts, interactive: bool) -> Iterator[TerminalTools | None]:
    """The tools of --mcp, whose servers run meanwhile."""
    if args.mcp is None:
        yield None
        return
    from .mcp.config import read_servers
    from .mcp.servers import McpServers
    from .tools import TerminalTools

    with ExitStack() as stack:
        with notice(texts("starting_tools")):
            servers = stack.enter_context(McpServers(read_servers(args.mcp)))
        for problem in servers.problems:
            text = texts("server_problem", problem=problem)
            console(stderr=not interactive).print(text, style="warning")
        known = {tool["function"]["name"] for tool in servers.tools}
        if unknown := [name for name in args.allow_tool or () if name not in known]:
            raise InvalidArgumentError(
                f"--allow-tool: there is no tool {shown(unknown[0])}; there are "
                f"{', '.join(sorted(known)) or 'none'}"
            )
        yield TerminalTools(servers, texts, interactive=interactive, allowed=args.allow_tool or ())


def _terminal_chat(
    args: ChatOptions,
    model: str,
    texts: Texts,
    saved: SavedSession | None,
    interactive: bool,
    tools: TerminalTools | None,
) -> TerminalChat:
    """The conversation; at a terminal its model loads in the background."""
    load = partial(
        options.load_model, compute=args.compute, context=args.context, kv_bits=args.kv_bits
    )
    name = saved.name if saved else None
    if saved is None and interactive and not args.no_save:
        from minicpm_mlx.lm import sessions

        name = sessions.new_name()
    return TerminalChat(
        args.new_chat,
        Loading(
            lambda: load(model, quiet=interactive, adapter=args.adapter, draft=args.draft),
            background=interactive,
        ),
        texts,
        interactive=interactive,
        markdown=not args.plain,
        name=name,
        saved=saved,
        changes=args.settings() | asdict(args.sampling),
        load=load,
        adapter=args.adapter is None,
        tools=tools,
    )


def _run_interactive(terminal: TerminalChat, saved: SavedSession | None) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    signal.signal(signal.SIGHUP, _hang_up)
    if saved:
        terminal.note_resumed(saved)
    try:
        with keyboard.quiet():
            converse(terminal, _reader(terminal))
    finally:
        terminal.save()
        terminal.save_cache()
        terminal.loading.abandon()


def converse(terminal: TerminalChat, read: Callable[[], str | None]) -> None:
    """Answers what is typed, until `read` returns None or a command leaves."""
    while (text := read()) is not None:
        edited, terminal.editing = terminal.editing, None
        if not text.strip():
            continue
        if (stripped := text.strip()) in LEAVE or stripped.lower() in LEAVE_WORDS:
            return
        keyboard.mark_pastes(True)
        try:
            _handle(terminal, text, edited)
        except KeyboardInterrupt:
            terminal.note("stopped")
        except MiniCPMError as error:
            if terminal.broken:
                raise
            if isinstance(error, ContextLengthError):
                terminal.overflow(error)
            else:
                terminal.print(str(error), style="error")
            terminal.print("")
    if terminal.loading.failed:
        terminal.loading.wait()  # raises why


def _handle(terminal: TerminalChat, text: str, edited: Files | None) -> None:
    """Runs a command, or asks the model."""
    stripped = text.strip()
    name, *rest = stripped.split(maxsplit=1)
    command = slash_commands.COMMANDS.get(name)
    if command and (command.multiline or "\n" not in stripped):
        if rest and not command.argument:
            terminal.note("usage", usage=name, style="error")
        else:
            command.run(terminal, *rest or [""])
    elif _is_misspelled_command(stripped, name, rest, slash_commands.COMMANDS):
        terminal.note("unknown", style="error", name=name)
    else:
        terminal.ask(text, edited)


def _is_misspelled_command(text: str, name: str, rest: list[str], commands: Iterable[str]) -> bool:
    """Whether the text begins with a misspelled command rather than a path."""
    if "\n" in text or not re.fullmatch(r"/[^/]*", name):
        return False
    return not rest or bool(difflib.get_close_matches(name, commands, cutoff=0.75))


def _hang_up(*_: object) -> None:
    """Leaves when the terminal has gone: discards further output, so that saving succeeds."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    sys.exit(129)


def _saved_session(args: ChatOptions) -> SavedSession | None:
    """The session to resume, if one is asked for."""
    if args.resume is None and not args.go_on:
        return None
    from minicpm_mlx.lm import sessions

    if args.resume is not None:
        return sessions.load(args.resume)
    saved = sessions.listed()
    if not saved:
        raise SessionError(f"no saved session in {sessions.directory()}; leave out --continue")
    return saved[0]


def _lines() -> Iterator[str]:
    """Each line of standard input that is a question."""
    for line in stdin_lines():
        text = line.rstrip("\n")
        if text.strip() in LEAVE:
            return
        if text.strip():
            yield text


def _greet(model: str, texts: Texts) -> str:
    """Shows the banner; returns the model to load, the demo if the user declines a download."""
    card = resolve(model)
    if not is_here(card):
        for line in offer(card, texts):
            print(line)
        answer = _choose(texts("offer"), "dtq")
        if answer == "q":
            raise typer.Exit(0)
        if answer == "t":
            return _greet("demo", texts)
        tune_new(model)  # in the foreground, which shows its progress and handles Ctrl-C
        folder_of(card)
    bits = f" · {card.bits} bit" if card.bits else ""
    console().print(f"{card.name}{bits}", style="title")
    for line in (texts.pick(card.note, card.note_zh), texts("tips")):
        if line:
            console().print(line, style="quiet")
    console().print()
    return model


def _choose(question: str, letters: str) -> str:
    """Asks until the answer begins with one of the letters; the last one at end of input."""
    while True:
        answer = ask(question, file=sys.stdout)
        if answer is None:
            return letters[-1]
        if (letter := answer.lower()[:1]) and letter in letters:
            return letter


def _reader(terminal: TerminalChat) -> Callable[[], str | None]:
    """Reads the next message at the terminal; Ctrl-C twice at an empty prompt ends it."""
    from minicpm_mlx.lm.user_data import HISTORY, user_data

    from .input.line_editor import LineEditor

    history = user_data() / HISTORY if terminal.name is not None else None
    editor = LineEditor(history, slash_commands.COMMANDS, completions)
    warned = False

    def read() -> str | None:
        nonlocal warned
        draft, terminal.draft = terminal.draft, ""
        try:
            text = editor.read(draft, until=lambda: terminal.loading.failed)
        except KeyboardInterrupt:
            if warned:
                return None
            warned = True
            terminal.note("leave")
            return ""
        warned = False
        return text

    return read
