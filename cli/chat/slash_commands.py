"""The chat's slash commands."""

from __future__ import annotations

import base64
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from .attachments import (
    attach,
    count,
    save,
    typed_path,
)
from .conversation import (
    CHAT_SETTINGS,
    LEAVE,
    is_here,
    settings,
)

if TYPE_CHECKING:
    from .conversation import TerminalChat


@dataclass(frozen=True)
class Command:
    """One command: what it takes, what it does."""

    run: Callable[[TerminalChat, str], None]
    takes: str
    help: tuple[str, str]
    lines: bool = False
    """Whether what it takes may have several lines; else such a text is a message."""


def help_(talk: TerminalChat, _: str) -> None:
    for name, command in COMMANDS.items():
        usage = f"{name} {command.takes}".strip()
        talk.print(f"{usage:24} {talk.say.pick(*command.help)}")
    talk.print("")


def system(talk: TerminalChat, text: str) -> None:
    if text:
        talk.chat.system = None if text == "off" else text
        talk.save()
    now = talk.chat.system
    talk.note("system", text=now) if now else talk.note("no_system")


SETTING = re.compile(r"([^\s=]*)[\s=]*(.*)", re.S)  # "name value" or "name=value"


def set_(talk: TerminalChat, text: str) -> None:
    chat, known = talk.chat, settings(talk.chat)
    name, value = SETTING.fullmatch(text).groups()  # type: ignore[union-attr]  # fits any text
    name = name.lower()
    if not name:
        show(talk, "")
        return
    if name not in known:
        talk.note("no_setting", style="error", name=name, names=", ".join(known))
        return
    if not value:
        talk.note("set", name=name, value=_or_dash(known[name]))
        return
    try:
        new = parsed(name, value)
    except ValueError:
        kind = "whole" if name in WHOLE else "number"
        talk.note(kind, style="error", name=name, value=value)
        return
    if name not in CHAT_SETTINGS:
        how = chat.lm.sampling if chat.sampling is None else chat.sampling
        chat.sampling = replace(how, **{name: new})
    else:
        changed = replace(chat, **{name: new})  # which checks it, and makes a new cache
        if name != "kv_bits":
            changed.session = chat.session
        talk.use(changed)
    talk.save()
    talk.note("set", name=name, value=_or_dash(settings(talk.chat)[name]))


def _or_dash(value: object) -> object:
    return "-" if value is None else value


WHOLE = ("top_k", "seed", "max_tokens", "context", "kv_bits")


def parsed(name: str, value: str) -> Any:
    """A setting's value as typed; what it may be is checked where it is used."""
    if name == "on_overflow":
        return value
    if value in ("none", "off") and name in WHOLE and name != "top_k":
        return None
    return int(value) if name in WHOLE else float(value)


def show(talk: TerminalChat, _: str) -> None:
    chat = talk.chat
    lm = chat.lm
    facts = {"model": lm.card.name, "adapter": lm.adapter, "session": talk.name}
    facts["system"] = chat.system
    for name, value in (facts | settings(chat)).items():
        talk.print(f"{name:20} {_or_dash(value)}")
    talk.print("")


def load(talk: TerminalChat, text: str) -> None:
    if not text:
        talk.note("usage", usage="/load NAME", style="error")
        return
    resume(talk, text)


def resume(talk: TerminalChat, text: str) -> None:
    from minicpm_mlx.lm import sessions

    known = [] if text else [s for s in sessions.listed() if s.name != talk.name]
    if not text and not known:
        talk.note("none")
        return
    talk.keep_cache()
    talk.resume(sessions.load(text or known[0].name))


def sessions_(talk: TerminalChat, _: str) -> None:
    from minicpm_mlx.lm import sessions

    found = sessions.listed()
    if not found:
        talk.note("none")
    for saved in found[:30]:
        size = talk.say.some("message", len(saved.messages))
        row = f"{saved.written:%Y-%m-%d %H:%M}  {saved.name:20}  {size:>12}  {saved.title}"
        talk.print(" ".join(row.split("\n")), cut=True)
    if len(found) > 30:
        talk.note("more", count=len(found) - 30)
    talk.print("")


def new(talk: TerminalChat, _: str) -> None:
    from minicpm_mlx.lm import sessions

    talk.keep_cache()
    talk.use(replace(talk.chat, messages=[], forgotten=0))
    talk.keeper.start(sessions.new_name() if talk.name is not None else None)
    talk.drop_draft()
    talk.note("new")


def clear(talk: TerminalChat, _: str) -> None:
    talk.chat.clear()
    talk.drop_draft()
    talk.save()
    talk.note("cleared")


def _of_a_turn(run: Callable[[TerminalChat], None]) -> Callable[[TerminalChat, str], None]:
    """A command that needs a turn to have been taken."""

    def checked(talk: TerminalChat, _: str) -> None:
        if talk.chat.messages:
            run(talk)
        else:
            talk.note("no_turn", style="warning")

    return checked


@_of_a_turn
def undo(talk: TerminalChat) -> None:
    from minicpm_mlx.lm.attachments import without_files

    _, question = without_files(talk.chat.undo())
    talk.save()
    talk.print(talk.say("undone", text=question.strip().partition("\n")[0]), cut=True)


@_of_a_turn
def retry(talk: TerminalChat) -> None:
    chat = talk.chat
    talk.asked = chat.messages[chat.last_question()]["content"]
    talk.show(chat.retry())


@_of_a_turn
def edit(talk: TerminalChat) -> None:
    """The turn stays until the next message takes its place."""
    from minicpm_mlx.lm.attachments import without_files

    chat = talk.chat
    question = chat.messages[chat.last_question()]["content"]
    talk.editing, talk.draft = without_files(question)


def copy(talk: TerminalChat, _: str) -> None:
    replies = [m["content"] for m in talk.chat.messages if m["role"] == "assistant"]
    if not replies:
        talk.note("nothing", style="warning")
        return
    for program in (["pbcopy"], ["wl-copy"], ["xclip", "-selection", "clipboard"]):
        if shutil.which(program[0]) and _takes(program, replies[-1]):
            break
    else:  # OSC 52: the terminal itself, also at the other end of an ssh connection
        text = base64.b64encode(replies[-1].encode(errors="replace")).decode()
        sys.stdout.write(f"\x1b]52;c;{text}\x07")
        sys.stdout.flush()
    talk.note("copied")


def _takes(program: list[str], text: str) -> bool:
    """Whether a clipboard program took a text; without a display it does not."""
    quiet = subprocess.DEVNULL
    done = subprocess.run(
        program, input=text.encode(errors="replace"), stdout=quiet, stderr=quiet, check=False
    )
    return done.returncode == 0


def model(talk: TerminalChat, text: str) -> None:
    from minicpm_mlx import model_cards

    if not text:
        talk.note("model", model=talk.chat.lm.card.name)
        return
    card, chat = model_cards.resolve(text), talk.chat
    if not is_here(card):
        talk.note("absent", model=card.name, gb=card.size_gb or "?")
    assert talk.load is not None
    lm = talk.load(text)
    talk.use(replace(chat, lm=lm, sampling=None))
    talk.save()
    talk.note("model", model=lm.card.name)


def adapter(talk: TerminalChat, text: str) -> None:
    lm = talk.chat.lm
    if text:
        lm.use_adapter(None if text == "off" else typed_path(text))
        talk.save()
    talk.note("adapter", path=lm.adapter) if lm.adapter else talk.note("no_adapter")


IN_BITS = {8: ("±0 %", 53), 4: ("+12 %", 28)}
"""What a cache in few bits does, as benchmarks/kv_bits.py measured it: perplexity, memory."""


def stats(talk: TerminalChat, _: str) -> None:
    chat, done = talk.chat, talk.replies
    tokens = sum(s.completion_tokens for s in done)
    seconds = sum(s.seconds - s.ttft for s in done)
    later = tokens - len(done)
    speed = later / seconds if seconds > 0 and later > 0 else 0.0
    passes = sum(s.passes for s in done)
    each = later / passes if passes else 1.0
    some = talk.say.some
    turns, all_tokens = some("reply", len(done)), some("token", tokens)
    talk.note("total", turns=turns, tokens=all_tokens, speed=speed, each=each)
    layers, bits = chat.session.cache, chat.kv_bits
    loss, share = IN_BITS.get(bits or 0, ("", 0))
    talk.note(
        "cache",
        used=some("token", layers[0].offset),
        mb=sum(layer.nbytes for layer in layers) / 1e6,
        bits=talk.say("in_bits", bits=bits, loss=loss, share=share) if bits else "",
    )
    talk.print("")


def tokens(talk: TerminalChat, text: str) -> None:
    chat = talk.chat
    if text:
        talk.print(talk.say.some("token", count(talk, text)))
    else:
        talk.note("context", used=chat.tokens(), all=chat.context_length)


COMMANDS = {
    "/help": Command(help_, "", ("this list", "显示本列表")),
    "/system": Command(
        system, "[TEXT|off]", ("what the model is told first", "系统提示"), lines=True
    ),
    "/set": Command(set_, "NAME VALUE", ("change a setting", "修改设置")),
    "/show": Command(show, "", ("model and settings", "模型与设置")),
    "/save": Command(
        save, "[-f] [NAME|FILE.md]", ("save, or export as Markdown", "保存或导出为 Markdown")
    ),
    "/load": Command(load, "NAME", ("go on with a saved session", "继续指定的会话")),
    "/sessions": Command(sessions_, "", ("saved sessions", "已保存的会话")),
    "/resume": Command(resume, "[NAME]", ("go on with the last session", "继续上一个会话")),
    "/new": Command(new, "", ("begin anew, keeping this one", "新建对话，保留当前")),
    "/undo": Command(undo, "", ("take the last turn back", "撤回上一轮")),
    "/retry": Command(retry, "", ("answer the last question anew", "重新回答")),
    "/edit": Command(edit, "", ("change the last question", "修改上一个问题")),
    "/copy": Command(copy, "", ("the last reply to the clipboard", "复制上一条回复")),
    "/attach": Command(attach, "[FILE|off]", ("send a text file along", "附上文本文件")),
    "/model": Command(model, "[NAME]", ("go on with another model", "换用其他模型")),
    "/adapter": Command(adapter, "[FOLDER|off]", ("put on a LoRA adapter", "换用 LoRA 适配器")),
    "/stats": Command(stats, "", ("speed and memory so far", "速度与内存统计")),
    "/tokens": Command(tokens, "[TEXT]", ("count tokens", "统计词元"), lines=True),
    "/clear": Command(clear, "", ("forget the turns", "清空对话")),
    **{name: Command(lambda *_: None, "", ("leave", "退出")) for name in LEAVE},
}


def arguments(command: str) -> Iterable[str] | None:
    """What may follow a command; None: a path."""
    from minicpm_mlx import model_cards
    from minicpm_mlx.errors import SessionError
    from minicpm_mlx.lm import sessions

    if command in ("/attach", "/save", "/adapter"):
        return None
    if command in ("/load", "/resume"):
        with suppress(SessionError):
            return [saved.name for saved in sessions.listed()]
        return []
    if command == "/model":
        return model_cards.cards()
    if command == "/set":
        from minicpm_mlx import Sampling

        return [*Sampling.__dataclass_fields__, *CHAT_SETTINGS]
    return ["off"] if command == "/system" else []
