"""A model that says what it is told to, so that a turn takes no time."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import minicpm_mlx as mm
from minicpm_mlx.lm.outputs import Stats
from minicpm_mlx.text.chat_prompt import ChatPrompt
from support.data import CASES, GOLDEN


class FakeLM:
    """Answers each prompt with the next of `replies`; an exception among them is raised."""

    def __init__(self, *replies: list[object]) -> None:
        self.replies = list(replies)
        self.prompts: list[list[dict[str, str]]] = []
        self.context_length = 64
        self.config = mm.Config.load(GOLDEN / CASES[0])
        self.card = SimpleNamespace(name="[fake]", path=None, repo=None, note="a :smile: note")
        self.card.note_zh, self.adapter, self.room, self.draft = "", None, None, None
        self.tokenizer = SimpleNamespace(
            template=None, thinking=None, encode=lambda text, add_bos: list(text)
        )
        self.sampling, self.thinking_sampling = mm.Sampling(), None
        self.on_dense = None

    def session(self, kv_bits: int | None = None) -> object:
        return SimpleNamespace(ids=[])

    def encode(self, messages: list[dict[str, str]]) -> list[int]:
        self.shown = [dict(message) for message in messages]
        return list(range(9))

    def chat_prompt(
        self, messages: list[dict[str, str]], think: bool | None, tools: None = None
    ) -> ChatPrompt:
        return ChatPrompt(ids=self.encode(messages))

    def default_sampling(self, prompt: ChatPrompt) -> mm.Sampling:
        return self.sampling

    def stream(self, prompt: ChatPrompt, **_: Any) -> Iterator[mm.Piece]:
        self.prompts.append(self.shown)
        return self._pieces(self.replies.pop(0))

    def _pieces(self, reply: list[object]) -> Iterator[mm.Piece]:
        for text in reply:
            if isinstance(text, BaseException):
                raise text
            yield mm.Piece(text=str(text), token_ids=(1,))
        stats = Stats(
            prompt_tokens=9,
            cached_tokens=0,
            completion_tokens=len(reply),
            passes=len(reply) - 1,
            ttft=0.5,
            seconds=1.5,
            peak_memory=0,
        )
        yield mm.Piece(text="", finish_reason="stop", stats=stats)
