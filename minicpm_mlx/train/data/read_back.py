"""Reads taught replies back as those of a model are read, so that nothing is learned in vain."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from ...arguments import shown
from ...errors import DataError
from ...lm.tools.calls import CallReader, ToolCall
from ...lm.tools.tool_set import ToolSet
from ...text.chat_prompt import ChatPrompt
from ...text.thinking import ThoughtReader
from ...text.tokenizer import Tokenizer
from .messages import Message


class ReplyReader:
    """Reads replies that may call `tools`; TemplateError where these cannot be read."""

    def __init__(self, tokenizer: Tokenizer, tools: Sequence[Mapping[str, Any]]) -> None:
        self.tokenizer = tokenizer
        self.tools = ToolSet(tokenizer, tools)

    def check(self, chat: ChatPrompt, reply: list[int], message: Message) -> None:
        """DataError if `reply` to a prompt has other calls, text or thought than `message`."""
        thought, text, calls = self._read(chat, reply)
        expected = [call["function"] for call in message.get("tool_calls", ())]
        wanted = [(function["name"], function["arguments"]) for function in expected]
        if list(map(_written, calls)) != list(map(_written, wanted)):
            field = "tool_calls" if wanted else "content"
            raise DataError(
                f"{field}: expected calls that are read as they are written, found "
                f"{_calls(wanted)}, which the model's form has as {_calls(calls)}; "
                + ("write arguments as their schema in tools has them" if wanted else _APART)
            )
        if (stated := message.get("reasoning_content")) is None:
            marks = (chat.thinking.opening, chat.thinking.closing) if chat.thinking else ()
            found, written = _bare(thought + text, marks), _bare(message["content"], marks)
        else:
            found, written = _bare(text), _bare(message["content"])
        if found != written:
            raise DataError(
                "content: expected text that is read as it is written, found "
                f"{shown(message['content'])}, which is read as {shown(text)} with the thought "
                f"{shown(thought)}; write thoughts into reasoning_content, and leave marks out"
            )
        if stated is not None and thought.strip() != stated.strip():
            raise DataError(
                "reasoning_content: expected a thought that is read as it is written, found "
                f"{shown(stated)}, which is read as {shown(thought)}; remove marks from it"
            )

    def _read(self, chat: ChatPrompt, reply: list[int]) -> tuple[str, str, list[tuple[str, Any]]]:
        """The thought, the text, and the calls as names and arguments."""
        ids = [token for token in reply if token not in self.tokenizer.eos_ids]
        thought, answer = self._split(chat, ids)
        # By text: a call that is spelled with other tokens than a call's must not be learned.
        reader = CallReader(self.tools.format, self.tools.functions)
        parts = [*reader.add(answer), *reader.finish()]
        text = "".join(part for part in parts if isinstance(part, str))
        calls = [part for part in parts if isinstance(part, ToolCall)]
        return thought, text, [(call.name, json.loads(call.arguments)) for call in calls]

    def _split(self, chat: ChatPrompt, ids: list[int]) -> tuple[str, str]:
        """Thought and answer of a reply, read in runs, as one token at a time takes long."""
        stream = self.tokenizer.stream(skip_special=not self.tools.keep_special)
        if chat.thinking is None:
            return "", "".join(map(stream.add, ids)) + stream.finish()
        reader = ThoughtReader(chat.thinking, is_open=chat.in_thought)
        parts = []
        for is_mark, tokens in groupby(ids, reader.is_mark):
            if is_mark:
                parts += [("", reader.mark(token)) for token in tokens]
            else:
                parts.append(reader.add("".join(map(stream.add, tokens)) + stream.finish()))
        parts.append(reader.finish())
        return "".join(thought for thought, _ in parts), "".join(text for _, text in parts)


_APART = "write calls into tool_calls"


def _bare(text: str, marks: Sequence[str] = ()) -> str:
    """Text without marks and white space, of which templates strip some."""
    for mark in marks:
        text = text.replace(mark, "")
    return "".join(text.split())


def _written(call: tuple[str, Any]) -> str:
    """A call for comparison, in which 1, 1.0 and true differ."""
    return json.dumps(call, sort_keys=True)


def _calls(calls: list[tuple[str, Any]]) -> str:
    texts = [f"{name}({shown(arguments)})" for name, arguments in calls]
    return ", ".join(texts) or "no call"
