"""A conversation: its messages, and the cache that saves reading earlier turns again."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from ..arguments import Limit, at_least_one, expect, shown, whole
from ..engine import Sampling, Session
from ..errors import ContextLengthError, InvalidArgumentError
from ..text.chat_prompt import ChatPrompt
from .lm import LM
from .outputs import Piece, reply_message, stop_list
from .tools.calls import ToolCall

OVERFLOW = ("stop", "slide")
_BUDGET = Limit(least=0, whole=True)


class ToolRunner(Protocol):
    """Calls functions for a conversation."""

    @property
    def described(self) -> Sequence[Mapping[str, Any]]:
        """The functions, in OpenAI's form."""

    def run(self, call: ToolCall) -> str:
        """The result as the model reads it, or why there is none; KeyboardInterrupt ends a turn."""


@dataclass
class Chat:
    """Turns of one conversation with a model.

    chat = Chat(lm, system="Answer in one sentence.")
    for piece in chat.reply("What is MLX?"):
        print(piece.text, end="")
    """

    lm: LM
    system: str | None = None
    """The system message."""
    sampling: Sampling | None = None
    """None: the model's default."""
    max_tokens: int | None = None
    """Longest reply; None: as far as the context goes."""
    stop: Sequence[str] = ()
    """Strings that end an answer."""
    think: bool | None = None
    """Whether the model thinks before it answers; None leaves it to the chat template."""
    think_tokens: int | None = None
    """Longest thought, in tokens; None: no limit."""
    tools: ToolRunner | None = None
    """Functions that the model may call: they are run, and it goes on with their results."""
    max_rounds: int = 10
    """Replies with calls to one question, at most. The calls of a further one are not run, and the
    turn ends with them: "go on" as the next message continues it."""
    messages: list[dict[str, Any]] = field(default_factory=list)
    """The turns so far, without the system text."""
    context: int | None = None
    """Limit of prompt and reply together, in tokens, if lower than the model's; it bounds the
    memory of the cache."""
    kv_bits: int | None = None
    """8 or 4: quantize the cache to that many bits."""
    on_overflow: str = "stop"
    """When the conversation outgrows the context, "stop" refuses the next turn and "slide" drops
    the oldest turns from the prompt."""
    forgotten: int = 0
    """Number of messages at the start that are no longer in the prompt."""
    session: Session = field(init=False, repr=False)
    _retries: int = field(default=0, init=False, repr=False)
    """Number of retries of the last question."""

    def __post_init__(self) -> None:
        if self.on_overflow not in OVERFLOW:
            raise InvalidArgumentError(
                f"on_overflow must be one of {', '.join(OVERFLOW)}, got {shown(self.on_overflow)}"
            )
        if self.max_tokens is not None:
            self.max_tokens = at_least_one("max_tokens", self.max_tokens)
        self.max_rounds = at_least_one("max_rounds", self.max_rounds)
        if self.context is not None:
            self.context = at_least_one("context", self.context)
        if self.kv_bits is not None:
            self.kv_bits = whole("kv_bits", self.kv_bits)
        if self.think is not None:
            expect("think", self.think, bool, "True, False or None")
        if self.think_tokens is not None:
            _BUDGET.check("think_tokens", self.think_tokens)
        self.stop = stop_list(self.stop)
        self.session = self.lm.session(self.kv_bits)

    @property
    def context_length(self) -> int:
        """Tokens that a prompt and its reply may have together."""
        return min(self.context or self.lm.context_length, self.lm.context_length)

    def reply(self, text: str) -> Generator[Piece, None, None]:
        """Answer `text`, a piece at a time.

        An interrupted reply (Ctrl-C, or the iterator closed) stays in the conversation as far as it
        came; a turn that failed, or was interrupted before its first word, leaves no trace.
        ContextLengthError if the conversation no longer fits.
        """
        self._retries = 0
        return self._turn([*self.messages, _question(text)], self.forgotten)

    def edit(self, text: str) -> Generator[Piece, None, None]:
        """Ask `text` instead of the last question; the old turn stays unless an answer comes."""
        self._retries = 0
        index = self.last_question()
        messages = [*self.messages[:index], _question(text)]
        return self._turn(messages, self._forgotten_before(index))

    def retry(self) -> Generator[Piece, None, None]:
        """Answer the last question again; the old answer stays unless a new one comes."""
        roles = [message["role"] for message in self.messages]
        if "user" not in roles or roles[-1] == "user":
            raise InvalidArgumentError("there is no answer yet to try again")
        self._retries += 1
        messages = self.messages[: self.last_question() + 1]
        return self._turn(messages, min(self.forgotten, len(messages) - 1))

    def undo(self) -> str:
        """Remove the last question and its answer; returns the question."""
        index = self.last_question()
        question = self.messages[index]["content"]
        del self.messages[index:]
        self.forgotten = self._forgotten_before(index)
        return question

    def last_question(self) -> int:
        """Index of the last question in the messages."""
        questions = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        if not questions:
            raise InvalidArgumentError("there is no turn to take back")
        return questions[-1]

    def clear(self) -> None:
        """Forget the turns; the system text stays."""
        self.messages.clear()
        self.forgotten = 0

    @property
    def current_sampling(self) -> Sampling:
        """The sampling of the next reply: the chat's own, or the model's for this way to think."""
        if self.sampling is not None or self.lm.thinking_sampling is None:
            return self.sampling or self.lm.sampling
        return self.lm.default_sampling(self.lm.chat_prompt([_question("?")], self.think))

    def thoughts(self) -> list[list[str]]:
        """The thoughts of each turn, one for each of its replies that has one."""
        turns: list[list[str]] = []
        for message in self.messages:
            if message["role"] == "user":
                turns.append([])
            elif turns and (thought := message.get("reasoning_content")):
                turns[-1].append(thought)
        return turns

    def tokens(self) -> int:
        """Tokens of the current prompt."""
        return len(self._encoded().ids) if self._prompt() else 0

    def alone(self, text: str, *, system: bool = True) -> int:
        """Tokens of a message without any turn before it, with or without the system text."""
        return len(self.lm.encode([*(self._system() if system else ()), _question(text)]))

    def tool_tokens(self) -> int:
        """Tokens that the description of the tools takes in a prompt."""
        if self.tools is None:
            return 0
        messages = [_question("")]
        with_tools = self.lm.chat_prompt(messages, tools=self.tools.described)
        return len(with_tools.ids) - len(self.lm.encode(messages))

    def system_tokens(self) -> int:
        """Tokens of the system text, without what the template puts around it."""
        return len(self.lm.tokenizer.encode(self.system or "", add_bos=False))

    def _forgotten_before(self, index: int) -> int:
        """`forgotten` once message `index` is removed; 0 if it had displaced all earlier ones."""
        return self.forgotten if self.forgotten < index else 0

    def _turn(self, messages: list[dict[str, Any]], forgotten: int) -> Generator[Piece, None, None]:
        before = list(self.messages), self.forgotten
        self.messages[:], self.forgotten = messages, forgotten
        try:
            for left in range(self.max_rounds, -1, -1):
                calls = yield from self._answer()
                for call in calls:
                    assert self.tools
                    text = self._cut(self.tools.run(call)) if left else _NOT_RUN
                    self._add_result(call.id, call.name, text)
                if not calls:
                    break
        finally:
            if len(self.messages) == len(messages):
                self.messages[:], self.forgotten = before
            else:
                self._add_missing_results()

    def _answer(self) -> Generator[Piece, None, Sequence[ToolCall]]:
        """One reply, which is added to the messages; returns its calls."""
        texts, thoughts, calls = list[str](), list[str](), list[ToolCall]()
        prompt = self._fit()
        room = self.context_length - len(prompt.ids)
        pieces = self.lm.stream(
            prompt,
            max_tokens=room if self.max_tokens is None else min(self.max_tokens, room),
            sampling=self._sampling(prompt),
            stop=self.stop,
            session=self.session,
            think_tokens=self.think_tokens,
            tools=self._described,
        )
        try:
            with closing(pieces):
                for piece in pieces:
                    texts.append(piece.text)
                    thoughts.append(piece.thinking)
                    calls += piece.tool_calls
                    yield piece
        finally:
            if any(texts) or any(thoughts) or calls:
                self.messages.append(reply_message("".join(texts), "".join(thoughts), calls))
        return calls

    def _cut(self, result: str) -> str:
        """A result, or as much of it as leaves half of the free context."""
        tokenizer, turn = self.lm.tokenizer, self.messages[self.last_question() :]
        # Older turns make room where they may be dropped.
        kept = turn if self.on_overflow == "slide" else self.messages[self.forgotten :]
        messages = [*self._system(), *kept]
        used = len(self.lm.chat_prompt(messages, self.think, tools=self._described).ids)
        room = max((self.context_length - used) // 2, 0)
        ids = tokenizer.encode(result, add_bos=False)
        if len(ids) <= room:
            return result
        start = tokenizer.decode(ids[:room], skip_special=False).rstrip("\ufffd")
        return f"{start}\n[cut: {len(ids) - room} of {len(ids)} tokens do not fit the context]"

    def _add_result(self, call_id: str, name: str, text: str) -> None:
        result = {"role": "tool", "content": text, "tool_call_id": call_id, "name": name}
        self.messages.append(result)

    def _add_missing_results(self) -> None:
        """A call without its result would be wrong in every later prompt."""
        turn = self.messages[self.last_question() :]
        there = {message.get("tool_call_id") for message in turn}
        for message in turn:
            for call in message.get("tool_calls", ()):
                if call["id"] not in there:
                    name = call["function"]["name"]
                    self._add_result(call["id"], name, "Error: the user interrupted this call.")

    def _fit(self) -> ChatPrompt:
        """The prompt, after dropping old turns where necessary."""
        limit = self.context_length
        prompt = self._encoded()
        if self.on_overflow == "slide" and limit - len(prompt.ids) < limit // 8:
            # More than necessary, since the rest must then be read again: not with every turn.
            while limit - len(prompt.ids) < limit // 3 and self._slide():
                prompt = self._encoded()
        if len(prompt.ids) >= limit:
            raise ContextLengthError(self._too_long(len(prompt.ids)))
        return prompt

    def _encoded(self) -> ChatPrompt:
        return self.lm.chat_prompt(self._prompt(), self.think, tools=self._described)

    @property
    def _described(self) -> Sequence[Mapping[str, Any]] | None:
        return self.tools.described if self.tools else None

    def _too_long(self, count: int) -> str:
        """The message for a prompt of `count` tokens, which names what is to be shortened."""
        limit, text = self.context_length, self.messages[-1]["content"]
        total, message = self.alone(text), self.alone(text, system=False)
        if message >= limit:
            return f"this message alone has {message} tokens and the context is {limit}; shorten it"
        if total >= limit:
            return (
                f"the system text has {self.system_tokens()} tokens and with this message "
                f"{total}, and the context is {limit}; shorten the system text"
            )
        return (
            f"the conversation has {count} tokens and the context is {limit}; take a turn back or "
            "begin anew"
        )

    def _slide(self) -> bool:
        """Drop the oldest turn from the prompt; False if only the last question is left."""
        later = range(self.forgotten + 1, len(self.messages))
        questions = [index for index in later if self.messages[index]["role"] == "user"]
        if questions:
            self.forgotten = questions[0]
        return bool(questions)

    def _system(self) -> list[dict[str, Any]]:
        return [{"role": "system", "content": self.system}] if self.system else []

    def _prompt(self) -> list[dict[str, Any]]:
        return self._system() + self.messages[self.forgotten :]

    def _sampling(self, prompt: ChatPrompt) -> Sampling:
        """The sampling, with another seed for each retry, so that the reply differs."""
        sampling = self.sampling or self.lm.default_sampling(prompt)
        if sampling.seed is None or not self._retries:
            return sampling
        return replace(sampling, seed=(sampling.seed + self._retries) % 2**64)


_NOT_RUN = "Error: not run, as there were too many calls without an answer."


def _question(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}
