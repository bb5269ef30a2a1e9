"""The chat's slash commands.

To add one, write its function, enter it in `COMMANDS`, and describe it under its name in
`render/command_texts.py`, in both languages.
"""

from __future__ import annotations

import base64
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from minicpm_mlx import model_cards
from minicpm_mlx.lm.attachments import without_files

from ..render.texts import size_text
from ..render.theme import console
from ..render.wrap import wrap
from .attachments import attach, save, token_count, typed_path
from .conversation import LEAVE, is_here, offer
from .settings import CHAT_SETTINGS, NONE, expected, parse_setting, setting_text, settings
from .thinking import think, think_text, thoughts

if TYPE_CHECKING:
    from .conversation import TerminalChat


USAGE = 25
"""Columns of a command and its argument."""
LISTED = 30
"""Lines of a list that are shown; the rest is counted."""


@dataclass(frozen=True)
class Command:
    """A command; the interface texts describe it under its name."""

    run: Callable[[TerminalChat, str], None]
    argument: str = ""
    multiline: bool = False
    """Whether the argument may have several lines; else such a text is a message."""


def help_(terminal: TerminalChat, _: str) -> None:
    """Prints two columns; a long usage has a line of its own."""
    width = max(console().width - USAGE - 1, USAGE)
    for name, command in COMMANDS.items():
        usage = f"{name} {command.argument}".strip()
        rows = wrap(terminal.texts(name), width)
        if len(usage) >= USAGE:
            terminal.print(usage)
            usage = ""
        for row in rows:
            terminal.print(f"{usage:{USAGE}}{row}")
            usage = ""
    terminal.print("")


def system(terminal: TerminalChat, text: str) -> None:
    if text:
        terminal.chat.system = None if text == "off" else text
        terminal.save()
    prompt = terminal.chat.system
    terminal.note("system", text=prompt) if prompt else terminal.note("no_system")


SETTING = re.compile(r"([^\s=]*)[\s=]*(.*)", re.S)  # "name value" or "name=value"
ALIASES = {"temp": "temperature"}


def set_(terminal: TerminalChat, text: str) -> None:
    current = settings(terminal.chat)
    text = text.removeprefix("parameter ").lstrip()  # as Ollama has it
    name, value = SETTING.fullmatch(text).groups()  # type: ignore[union-attr]  # fits any text
    name = name.lower().replace("-", "_")
    name = ALIASES.get(name, name)
    if not name:
        show(terminal, "")
    elif name in SHOWN_COMMANDS:
        SHOWN_COMMANDS[name](terminal, "off" if value in NONE else value)
    elif name not in current:
        terminal.note("no_setting", style="error", name=name, names=", ".join(current))
    elif not value:
        terminal.note("set", name=name, value=setting_text(current[name]))
    else:
        try:
            new = parse_setting(name, value)
        except ValueError:
            terminal.note(expected(name), style="error", name=name, value=value)
        else:
            _change(terminal, name, new)


def _change(terminal: TerminalChat, name: str, value: Any) -> None:
    chat = terminal.chat
    if name not in CHAT_SETTINGS:
        chat.sampling = replace(chat.current_sampling, **{name: value})
        terminal.own.add(name)
    else:
        changed = replace(chat, **{name: value})  # which checks it, and makes a new cache
        if name != "kv_bits":
            changed.session = chat.session
        terminal.use(changed)
    terminal.save()
    terminal.note("set", name=name, value=setting_text(settings(terminal.chat)[name]))


def show(terminal: TerminalChat, _: str) -> None:
    chat = terminal.chat
    lm = chat.lm
    facts = {"model": lm.card.name, "adapter": lm.adapter, "session": terminal.name}
    facts["system"] = chat.system
    facts["think"] = think_text(chat.think) if lm.tokenizer.thinking else None
    for name, value in facts.items():
        terminal.print(f"{name:20} {'-' if value is None else value}")
    for name, value in settings(chat).items():
        terminal.print(f"{name:20} {setting_text(value)}")
    terminal.print("")


def load(terminal: TerminalChat, text: str) -> None:
    if not text:
        terminal.note("usage", usage="/load NAME", style="error")
        return
    resume(terminal, text)


def resume(terminal: TerminalChat, text: str) -> None:
    from minicpm_mlx.lm import sessions

    others = [] if text else [s for s in sessions.listed() if s.name != terminal.name]
    if not text and not others:
        terminal.note("none")
        return
    terminal.save_cache()
    terminal.resume(sessions.load(text or others[0].name))


def sessions_(terminal: TerminalChat, text: str) -> None:
    verb, _, name = text.partition(" ")
    if text and (verb != "delete" or not name.strip()):
        terminal.note("usage", usage="/sessions [delete NAME]", style="error")
    elif text:
        _delete_session(terminal, name.strip())
    else:
        _list_sessions(terminal)


def _list_sessions(terminal: TerminalChat) -> None:
    from minicpm_mlx.lm import sessions
    from minicpm_mlx.lm.session_list import summaries

    if not (rows := [row for row in summaries() if row.problem is None]):
        terminal.note("none")
        return
    for row in rows[:LISTED]:
        count = terminal.texts.count("message", row.messages)
        size = size_text(row.bytes + row.cache_bytes)
        when = row.saved[:16].replace("T", " ")
        line = f"{when}  {row.name:20}  {count:>12}  {size:>7}  {row.title}"
        terminal.print(" ".join(line.split("\n")), cut=True)
    if len(rows) > LISTED:
        terminal.note("more", count=len(rows) - LISTED)
    used = sum(sessions.cache_sizes().values())
    terminal.note("kept", used=size_text(used), limit=size_text(sessions.CACHE_LIMIT))
    terminal.print("")


def _delete_session(terminal: TerminalChat, name: str) -> None:
    from minicpm_mlx.lm import sessions

    if name == terminal.name:
        terminal.note("is_open", style="error", name=name)
        return
    if sessions.version(name) is None and not sessions.cache_path(name).exists():
        sessions.load(name)  # raises, and names the nearest
    terminal.note("deleted", name=name, size=size_text(sessions.remove(name)))


def new(terminal: TerminalChat, _: str) -> None:
    from minicpm_mlx.lm import sessions

    terminal.save_cache()
    terminal.use(replace(terminal.chat, messages=[], forgotten=0))
    terminal.autosave.start(sessions.new_name() if terminal.name is not None else None)
    terminal.drop_draft()
    terminal.note("new")


def clear(terminal: TerminalChat, _: str) -> None:
    terminal.chat.clear()
    terminal.drop_draft()
    terminal.save()
    terminal.note("cleared")


def _needs_turn(run: Callable[[TerminalChat], None]) -> Callable[[TerminalChat, str], None]:
    """A command that needs a turn in the conversation."""

    def checked(terminal: TerminalChat, _: str) -> None:
        if terminal.chat.messages:
            run(terminal)
        else:
            terminal.note("no_turn", style="warning")

    return checked


@_needs_turn
def undo(terminal: TerminalChat) -> None:
    _, question = without_files(terminal.chat.undo())
    terminal.save()
    terminal.print(terminal.texts("undone", text=question.strip().partition("\n")[0]), cut=True)


@_needs_turn
def retry(terminal: TerminalChat) -> None:
    chat = terminal.chat
    terminal.question = chat.messages[chat.last_question()]["content"]
    terminal.show(chat.retry())


@_needs_turn
def edit(terminal: TerminalChat) -> None:
    """Offers the last question as a draft; its turn stays until the next message replaces it."""
    chat = terminal.chat
    question = chat.messages[chat.last_question()]["content"]
    terminal.editing, terminal.draft = without_files(question)


def copy(terminal: TerminalChat, _: str) -> None:
    replies = [m["content"] for m in terminal.chat.messages if m["role"] == "assistant"]
    if not replies or not replies[-1]:
        terminal.note("nothing", style="warning")
        return
    for program in (["pbcopy"], ["wl-copy"], ["xclip", "-selection", "clipboard"]):
        if shutil.which(program[0]) and _copy_with(program, replies[-1]):
            break
    else:  # OSC 52: the terminal itself, also at the other end of an ssh connection
        text = base64.b64encode(replies[-1].encode(errors="replace")).decode()
        sys.stdout.write(f"\x1b]52;c;{text}\x07")
        sys.stdout.flush()
    terminal.note("copied")


def _copy_with(program: list[str], text: str) -> bool:
    """Whether a clipboard program took a text; without a display it fails."""
    quiet = subprocess.DEVNULL
    process = subprocess.run(
        program, input=text.encode(errors="replace"), stdout=quiet, stderr=quiet, check=False
    )
    return process.returncode == 0


def model(terminal: TerminalChat, text: str) -> None:
    if not text:
        terminal.note("model", model=terminal.chat.lm.card.name)
        return
    card, chat = model_cards.resolve(text), terminal.chat
    if not is_here(card):
        for line in offer(card, terminal.texts):
            terminal.print(line, style="quiet")
    assert terminal.load is not None
    before, own = chat.lm, _own_sampling(terminal)
    lm = terminal.load(text)
    terminal.use(replace(chat, lm=lm, sampling=replace(lm.sampling, **own) if own else None))
    terminal.save()
    terminal.note("model", model=lm.card.name)
    if own:
        values = (f"{name} = {setting_text(value)}" for name, value in own.items())
        terminal.note("keeps", settings=", ".join(values))
    if before.adapter:
        terminal.note("without_adapter", style="warning", path=before.adapter)
    if before.draft:
        terminal.note("without_draft", style="warning")


def _own_sampling(terminal: TerminalChat) -> dict[str, Any]:
    """Sampling settings that are the user's and not the model's.

    A bias is left out: another model has other tokens.
    """
    chat = terminal.chat
    if chat.sampling is None:
        return {}
    models = asdict(chat.lm.sampling)
    return {
        name: value
        for name, value in asdict(chat.sampling).items()
        if name != "logit_bias" and (value != models[name] or name in terminal.own)
    }


def adapter(terminal: TerminalChat, text: str) -> None:
    lm = terminal.chat.lm
    if text:
        lm.use_adapter(None if text == "off" else typed_path(text))
        terminal.save()
    terminal.note("adapter", path=lm.adapter) if lm.adapter else terminal.note("no_adapter")


CACHE_COST = {8: ("±0 %", 53), 4: ("+12 %", 28)}
"""Perplexity and memory of a cache by bits, against 16, as benchmarks/kv_bits.py measured them."""


def stats(terminal: TerminalChat, _: str) -> None:
    chat, replies, count = terminal.chat, terminal.replies, terminal.texts.count
    tokens = sum(reply.completion_tokens for reply in replies)
    seconds = sum(reply.seconds - reply.ttft for reply in replies)
    decoded = tokens - len(replies)  # prefill makes the first token of each
    passes = sum(reply.passes for reply in replies)
    terminal.note(
        "total",
        turns=count("reply", len(replies)),
        tokens=count("token", tokens),
        speed=decoded / seconds if seconds > 0 and decoded > 0 else 0.0,
        # Passes that made an end token, or were launched ahead of it, left none in the reply.
        each=max(decoded / passes, 1.0) if passes else 1.0,
    )
    layers, bits = chat.session.cache, chat.kv_bits
    loss, share = CACHE_COST.get(bits or 0, ("", 0))
    terminal.note(
        "cache",
        used=count("token", layers[0].offset),
        mb=sum(layer.nbytes for layer in layers) / 1e6,
        bits=terminal.texts("in_bits", bits=bits, loss=loss, share=share) if bits else "",
    )
    terminal.print("")


def tokens(terminal: TerminalChat, text: str) -> None:
    chat = terminal.chat
    if text:
        terminal.print(terminal.texts.count("token", token_count(terminal, text)))
    else:
        terminal.note("context", used=chat.tokens(), all=chat.context_length)


def list_tools(terminal: TerminalChat, text: str) -> None:
    """Lists the tools, or those whose name has a text in it."""
    given = terminal.tools
    if given is None or not given.described or terminal.chat.tools is None:
        offered = given is not None and given.described
        terminal.note("not_offered" if offered else "no_tool", style="warning")
        return
    lines = list(given.lines(text))
    if not lines:
        terminal.note("no_such_tool", style="warning", text=text)
        return
    for line in lines[:LISTED]:
        terminal.print(line, cut=True)
    if len(lines) > LISTED:
        terminal.note("more_tools", count=len(lines) - LISTED)
    if given.allowed:
        terminal.note("tools_end")
    terminal.print("")


SHOWN_COMMANDS = {"model": model, "adapter": adapter, "system": system, "think": think}
"""Commands whose settings /show lists too."""

COMMANDS = {
    "/help": Command(help_),
    "/?": Command(help_),
    "/system": Command(system, "[TEXT|off]", multiline=True),
    "/set": Command(set_, "NAME VALUE"),
    "/show": Command(show),
    "/think": Command(think, "[on|off|auto|N]"),
    "/thoughts": Command(thoughts, "[N|all]"),
    "/tools": Command(list_tools, "[TEXT]"),
    "/save": Command(save, "[-f] [-t] [NAME|FILE.md]"),
    "/load": Command(load, "NAME"),
    "/sessions": Command(sessions_, "[delete NAME]"),
    "/resume": Command(resume, "[NAME]"),
    "/new": Command(new),
    "/undo": Command(undo),
    "/retry": Command(retry),
    "/edit": Command(edit),
    "/copy": Command(copy),
    "/attach": Command(attach, "[FILE|off]"),
    "/model": Command(model, "[NAME]"),
    "/adapter": Command(adapter, "[FOLDER|off]"),
    "/stats": Command(stats),
    "/tokens": Command(tokens, "[TEXT]", multiline=True),
    "/clear": Command(clear),
    **{name: Command(lambda *_: None) for name in LEAVE},
}
