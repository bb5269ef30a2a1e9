"""A loaded model with its tokenizer: text in, text out."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..arguments import at_least_one, is_whole, listed, shown, whole
from ..engine import (
    WIDTH,
    DraftModel,
    Grammar,
    PromptLookup,
    Sampling,
    Session,
    Speculation,
    generate,
)
from ..errors import ContextLengthError, InvalidArgumentError
from ..model.adapters import Adapter, apply_adapter
from ..model.config import Config
from ..model.fused import FusedModel
from ..model.transformer import Model
from ..model_cards import Card
from ..text.chat_prompt import ChatPrompt, chat_prompt
from ..text.tokenizer import Tokenizer
from .batch import BatchRequest, replies
from .outputs import Completion, Piece, Stats, collect, stop_list, with_calls
from .sampling import sampling_with
from .thinking_grammar import thinking_grammar
from .tools.tool_set import ToolSet, answer_grammar

Message = Mapping[str, Any]
"""{"role": "user", "content": "..."}; in a reply's, `reasoning_content` is its thought."""

Prompt = str | Sequence[int] | Sequence[Message] | ChatPrompt
"""Text to continue, token ids to continue, or a conversation to answer."""


@dataclass
class LM:
    """A model and its tokenizer; made by `load`."""

    model: Model | FusedModel
    tokenizer: Tokenizer
    card: Card
    sampling: Sampling
    """The default: the card's, or that of the folder's generation_config.json."""
    thinking_sampling: Sampling | None = None
    """The default for replies that begin with a thought, where the card has another."""
    folder: Path | None = None
    """Where it was loaded from."""
    read_adapter: Callable[[Path], Adapter] = field(kw_only=True, repr=False)
    """Reads the adapter in a folder, its deltas rescaled for this form of the model."""
    adapter: Path | None = None
    """The folder of the current adapter; see `use_adapter`."""
    draft: LM | None = None
    """A smaller model for speculative decoding."""
    room: int | None = None
    """Tokens of context that fit memory, if fewer than the model's."""
    on_dense: Callable[[], object] | None = field(default=None, repr=False)
    """Called once, by the first text that is longer than the config's `dense_len`."""
    sharded: bool = False
    """Whether the processes of a launch share it."""
    _session: Session | None = field(default=None, repr=False)
    """The session of the last `chat`."""

    @property
    def config(self) -> Config:
        return self.model.config

    @property
    def context_length(self) -> int:
        """Tokens that a prompt and its reply may have together."""
        limits = self.config.context_length, self.card.context, self.room
        return min(limit for limit in limits if limit)

    def use_adapter(self, folder: str | Path | None) -> None:
        """Apply the LoRA or DoRA adapter in `folder` (mlx-lm's layout or PEFT's), or none if None.

        It replaces the current adapter; the weights stay unchanged. One that was trained on another
        form of the model is rescaled. Not to be called while a reply is being generated.
        ConfigError or WeightsError leave the model as it was.
        """
        path = None if folder is None else Path(folder).expanduser().resolve()
        apply_adapter(self.model, None if path is None else self.read_adapter(path))
        self.adapter = path

    def session(self, kv_bits: int | None = None) -> Session:
        """A new key-value cache, to pass to every call of one conversation.

        `kv_bits` (8 or 4) quantizes it to that many bits (see `Session`).
        """
        return Session(self.config, kv_bits)

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt; messages are formatted by the chat template."""
        return self.chat_prompt(prompt).ids

    def chat_prompt(self, prompt: Prompt, think: bool | None = None, **options: Any) -> ChatPrompt:
        """The prompt as the model reads it; messages are formatted by the chat template.

        `think` and the other `options` (`tools`, `continues`, `variables`) are those of
        `text.chat_prompt`, and are for messages alone.
        """
        if not isinstance(prompt, str | ChatPrompt):
            expected = "text, a list of token ids or a list of messages"
            items = listed("a prompt", prompt, expected, lambda i: is_message(i) or is_whole(i))
            if any(map(is_message, items)):
                return chat_prompt(self.tokenizer, items, think=think, **options)
        if isinstance(prompt, ChatPrompt):
            options.pop("tools", None)  # it has them already
        for name, value in {"think": think, **options}.items():
            if value is not None:
                raise InvalidArgumentError("goes with a list of messages", field=name)
        if isinstance(prompt, str):
            return ChatPrompt(ids=self.tokenizer.encode(prompt))
        if isinstance(prompt, ChatPrompt):
            return prompt
        return ChatPrompt(ids=[whole("a token id", item) for item in items])

    def stream(
        self,
        prompt: Prompt,
        *,
        max_tokens: int | None = 512,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        session: Session | None = None,
        speculate: bool = True,
        grammar: Grammar | None = None,
        think: bool | None = None,
        think_tokens: int | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str = "auto",
        parallel_tool_calls: bool = True,
    ) -> Generator[Piece, None, None]:
        """Continue text or ids, or answer messages, a piece at a time.

        `max_tokens` None: as far as the context goes. Any of the strings in `stop` ends the answer
        before it. `session` keeps the cache from one call to the next. `speculate` False turns off
        speculative decoding (prompt lookup, or `draft`), which changes only the speed. `grammar`
        constrains the answer (see `structured.grammar.grammar_of`) and cannot be used again.

        `think` has the model think before it answers messages, or not; None leaves it to the chat
        template. A thought of `think_tokens` is ended, and the answer follows.

        `tools` are functions in OpenAI's form that the model may call in its answer to messages (a
        ChatPrompt was made with them). `tool_choice` is "auto", "none", "required" or the name of
        the one to call; calls that must come, or that a special token opens, follow their schemas.
        Nothing is called here: a `Piece` has the calls that are complete.

            for piece in lm.stream("Once upon a time"):
                print(piece.text, end="")
        """
        tool_set = ToolSet(self.tokenizer, tools, tool_choice, parallel_tool_calls)
        asked = self._request(
            prompt,
            tool_set,
            answer_grammar(tool_set, grammar),
            max_tokens=max_tokens,
            sampling=sampling,
            stop=stop,
            think=think,
            think_tokens=think_tokens,
        )
        session = self.session() if session is None else session
        vocabulary = self.tokenizer.vocab_size
        drafter = DraftModel(self.draft.model, vocabulary) if self.draft else PromptLookup()
        speculation = Speculation(drafter if speculate else None)
        tokens = generate(
            self.model,
            asked.ids,
            max_tokens=asked.max_tokens,
            sampling=asked.sampling,
            eos=self.tokenizer.eos_ids,
            session=session,
            vocab_size=vocabulary,
            speculation=speculation,
            grammar=asked.grammar,
        )
        pieces = self._pieces(tokens, asked, session.common(asked.ids), speculation)
        return with_calls(pieces, tool_set.reader()) if tool_set.active else pieces

    def note_length(self, tokens: int) -> None:
        """Call `on_dense`, once, if a text of so many tokens is beyond the published dense mode."""
        limit = self.config.dense_len
        if self.on_dense is not None and limit is not None and tokens > limit:
            call, self.on_dense = self.on_dense, None
            call()

    def _request(
        self,
        prompt: Prompt,
        tools: ToolSet,
        grammar: Grammar | None = None,
        *,
        max_tokens: int | None,
        sampling: Sampling | None,
        stop: Sequence[str],
        think: bool | None,
        think_tokens: int | None,
    ) -> BatchRequest:
        """One reply that is asked for, checked; without `sampling` the model's default for it.

        `grammar` is that of the answer.
        """
        chat = self.chat_prompt(prompt, think, tools=tools.for_template)
        self.note_length(len(chat.ids))
        if (room := self.context_length - len(chat.ids)) < 1:
            raise ContextLengthError(
                f"the prompt has {len(chat.ids)} tokens and the context is {self.context_length}; "
                "shorten it to leave room for a reply"
            )
        limit = room if max_tokens is None else at_least_one("max_tokens", max_tokens)
        return BatchRequest(
            ids=chat.ids,
            max_tokens=min(limit, room),
            sampling=self.default_sampling(chat) if sampling is None else sampling,
            stops=[*stop_list(stop), *tools.stops, *chat.stops],
            # A form may be followed with a space in front, which does not belong to it.
            continues=isinstance(prompt, str) and grammar is None,
            grammar=thinking_grammar(self.tokenizer, chat, think_tokens, grammar),
            thinking=chat.thinking,
            in_thought=chat.in_thought,
            tools=tools if tools.active else None,
        )

    def default_sampling(self, prompt: ChatPrompt) -> Sampling:
        """The model's own sampling for a prompt."""
        return (self.thinking_sampling if prompt.in_thought else None) or self.sampling

    def _pieces(
        self,
        tokens: Generator[int, None, None],
        asked: BatchRequest,
        cached: int,
        speculation: Speculation,
    ) -> Generator[Piece, None, None]:
        start, first = time.perf_counter(), 0.0
        transcript, length = asked.transcript(self.tokenizer), len(asked.ids)
        with closing(tokens):
            for token in tokens:
                first = first or time.perf_counter()
                piece = transcript.add(token)
                if piece.token_ids:
                    yield piece
                if transcript.ended:
                    break
        self.note_length(length + transcript.count)
        stats = Stats.measure(
            prompt_tokens=length,
            cached_tokens=cached,
            completion_tokens=transcript.count,
            thinking_tokens=transcript.thinking_count,
            start=start,
            first=first,
            passes=speculation.passes,
        )
        yield transcript.finish(stats)

    def generate(
        self,
        prompt: Prompt,
        *,
        max_tokens: int | None = 512,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        session: Session | None = None,
        speculate: bool = True,
        grammar: Grammar | None = None,
        think: bool | None = None,
        think_tokens: int | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str = "auto",
        parallel_tool_calls: bool = True,
    ) -> Completion:
        """The whole reply that `stream` yields, with the same options.

        lm.generate("The capital of France is", max_tokens=8).text
        """
        pieces = self.stream(
            prompt,
            max_tokens=max_tokens,
            sampling=sampling,
            stop=stop,
            session=session,
            speculate=speculate,
            grammar=grammar,
            think=think,
            think_tokens=think_tokens,
            tools=tools,
            tool_choice=tool_choice,
            parallel_tool_calls=parallel_tool_calls,
        )
        return collect(pieces)

    def generate_batch(
        self,
        prompts: Sequence[Prompt],
        *,
        max_tokens: int | None = 512,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        width: int = WIDTH,
        think: bool | None = None,
        think_tokens: int | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str = "auto",
        parallel_tool_calls: bool = True,
    ) -> list[Completion]:
        """`generate` for many prompts, `width` at a time; the replies in order.

        Each reply is what it would have been alone. Its seconds count from when it was started;
        a prefix that consecutive prompts share is read once.

            lm.generate_batch(["1 + 1 =", "The capital of France is"], max_tokens=8)
        """
        tool_set = ToolSet(self.tokenizer, tools, tool_choice, parallel_tool_calls)
        grammar = answer_grammar(tool_set, None)
        requests = [
            self._request(
                prompt,
                tool_set,
                None if grammar is None else grammar.copy(),
                max_tokens=max_tokens,
                sampling=sampling,
                stop=stop,
                think=think,
                think_tokens=think_tokens,
            )
            for prompt in prompts
        ]
        found = replies(self.model, self.tokenizer, requests, at_least_one("width", width))
        completions = dict(found)
        return [completions[index] for index in range(len(requests))]

    def chat(
        self,
        *arguments: Any,
        query: str | None = None,
        history: Sequence[Message] | None = None,
        role: str = "user",
        max_tokens: int | None = 1024,
        max_length: int | None = None,
        do_sample: bool = True,
        num_beams: int = 1,
        stop: Sequence[str] = (),
        think: bool | None = None,
        think_tokens: int | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str = "auto",
        parallel_tool_calls: bool = True,
        **sampling: Any,
    ) -> tuple[str, list[dict[str, Any]]]:
        """Answer `query`; the reply, and the history to give with the next one.

        Sampling is given by name (temperature, top_p, top_k, min_p, repetition_penalty, seed);
        `max_length` counts the prompt, `max_tokens` (None: as far as the context goes) does not.
        In the form of MiniCPM's own code, `chat(tokenizer, query, history, ...)`, the tokenizer is
        ignored in favour of the model's own.

        `tools` are as in `stream`. The history has the reply's calls; a result is a query of
        `role="tool"`.

            reply, history = lm.chat("山东省最高的山是哪座山？", temperature=0.5, top_p=0.8)
        """
        if num_beams != 1:
            raise InvalidArgumentError(f"beam search is not supported; got num_beams={num_beams!r}")
        positional = [item for item in arguments if not isinstance(item, Tokenizer)]
        text = positional.pop(0) if positional and query is None else query
        past = positional.pop(0) if positional and history is None else history
        if positional or not isinstance(text, str):
            raise InvalidArgumentError(
                "chat takes one text to answer, chat(query) or chat(tokenizer, query, history); "
                f"got {shown(arguments if query is None else query)}"
            )
        expected = "a list of messages, as chat returns"
        turns = listed("history", [] if past is None else past, expected, is_message)
        messages = [*map(dict, turns), {"role": role, "content": text}]
        described = ToolSet(self.tokenizer, tools, tool_choice).for_template
        prompt = self.chat_prompt(messages, think, tools=described)
        # Taken out while in use, so that a chat on another thread makes its own.
        session, self._session = self._session or self.session(), None
        completion = self.generate(
            prompt,
            max_tokens=self._max_tokens(prompt, max_length, max_tokens),
            sampling=sampling_with(self.default_sampling(prompt), do_sample=do_sample, **sampling),
            stop=stop,
            session=session,
            think_tokens=think_tokens,
            tools=tools,
            tool_choice=tool_choice,
            parallel_tool_calls=parallel_tool_calls,
        )
        self._session = session
        messages.append(completion.message())
        return completion.text, messages

    def _max_tokens(
        self, prompt: ChatPrompt, max_length: int | None, max_tokens: int | None
    ) -> int | None:
        """The stricter of both limits, in tokens of the reply."""
        if max_length is None:
            return max_tokens
        length = len(prompt.ids)
        if (room := whole("max_length", max_length) - length) < 1:
            raise InvalidArgumentError(
                f"the prompt has {length} tokens and max_length is {max_length}; "
                "raise it to leave room for a reply"
            )
        return room if max_tokens is None else min(room, at_least_one("max_tokens", max_tokens))


def is_message(item: object) -> bool:
    return isinstance(item, Mapping)
