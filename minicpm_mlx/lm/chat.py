"""A conversation: its messages, and the cache that keeps each turn from being read again."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace

from ..arguments import at_least_one, shown, whole
from ..engine import Sampling, Session
from ..errors import ContextLengthError, InvalidArgumentError
from .lm import LM
from .outputs import Piece, stop_list

OVERFLOW = ("stop", "slide")


@dataclass
class Chat:
    """Turns of one conversation with a model.

    chat = Chat(lm, system="Answer in one sentence.")
    for piece in chat.reply("What is MLX?"):
        print(piece.text, end="")
    """

    lm: LM
    system: str | None = None
    """What the model is told before the first turn."""
    sampling: Sampling | None = None
    """None: the model's own."""
    max_tokens: int | None = None
    """Longest reply; None: as far as the context goes."""
    stop: Sequence[str] = ()
    """Strings that end a reply."""
    messages: list[dict[str, str]] = field(default_factory=list)
    """The turns so far, without the system text."""
    context: int | None = None
    """Tokens that a prompt and its reply may have together, where that is to be fewer than the
    model's; bounds the memory of the cache."""
    kv_bits: int | None = None
    """8 or 4: keep the cache in that many bits."""
    on_overflow: str = "stop"
    """What happens once the conversation outgrows the context: "stop" refuses the next turn,
    "slide" lets the oldest turns out of what the model is shown."""
    forgotten: int = 0
    """Messages at the start that have slid out."""
    session: Session = field(init=False, repr=False)
    _again: int = field(default=0, init=False, repr=False)
    """Times the last question was answered anew."""

    def __post_init__(self) -> None:
        if self.on_overflow not in OVERFLOW:
            raise InvalidArgumentError(
                f"on_overflow must be one of {', '.join(OVERFLOW)}, got {shown(self.on_overflow)}"
            )
        if self.max_tokens is not None:
            self.max_tokens = at_least_one("max_tokens", self.max_tokens)
        if self.context is not None:
            self.context = at_least_one("context", self.context)
        if self.kv_bits is not None:
            self.kv_bits = whole("kv_bits", self.kv_bits)
        self.stop = stop_list(self.stop)
        self.session = self.lm.session(self.kv_bits)

    @property
    def context_length(self) -> int:
        """Tokens that a prompt and its reply may have together."""
        return min(self.context or self.lm.context_length, self.lm.context_length)

    def reply(self, text: str) -> Generator[Piece, None, None]:
        """Answer `text`, a piece at a time.

        A reply that is broken off (Ctrl-C, or the iterator closed) stays in the conversation as far
        as it came; a turn that failed, or was broken off before its first word, leaves no trace.
        ContextLengthError: the conversation no longer fits.
        """
        self._again = 0
        asked = [*self.messages, {"role": "user", "content": text}]
        return self._turn(asked, self.forgotten)

    def edit(self, text: str) -> Generator[Piece, None, None]:
        """Ask `text` in the last question's place; the old turn stays unless an answer comes."""
        self._again = 0
        at = self.last_question()
        asked = [*self.messages[:at], {"role": "user", "content": text}]
        return self._turn(asked, self._shown_before(at))

    def retry(self) -> Generator[Piece, None, None]:
        """Answer the last question anew; the old answer stays unless a new one comes."""
        if [message["role"] for message in self.messages[-2:]] != ["user", "assistant"]:
            raise InvalidArgumentError("there is no answer yet to try again")
        self._again += 1
        asked = self.messages[:-1]
        return self._turn(asked, min(self.forgotten, len(asked) - 1))

    def undo(self) -> str:
        """Take the last question and its answer back; the question."""
        at = self.last_question()
        question = self.messages[at]["content"]
        del self.messages[at:]
        self.forgotten = self._shown_before(at)
        return question

    def last_question(self) -> int:
        """Where in the messages the last question is."""
        asked = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        if not asked:
            raise InvalidArgumentError("there is no turn to take back")
        return asked[-1]

    def clear(self) -> None:
        """Forget the turns; the system text stays."""
        self.messages.clear()
        self.forgotten = 0

    def tokens(self) -> int:
        """Tokens of what the model would be shown now."""
        shown = self._shown()
        return len(self.lm.encode(shown)) if shown else 0

    def alone(self, text: str) -> int:
        """Tokens of a message and the system text, without any turn before it."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return len(self.lm.encode([*system, {"role": "user", "content": text}]))

    def _shown_before(self, at: int) -> int:
        """`forgotten` once message `at` has gone: where it had pushed out all others, what fits is
        shown again."""
        return self.forgotten if self.forgotten < at else 0

    def _turn(self, asked: list[dict[str, str]], forgotten: int) -> Generator[Piece, None, None]:
        before, slid = list(self.messages), self.forgotten
        self.messages[:], self.forgotten = asked, forgotten
        said: list[str] = []
        try:
            ids = self._fitting()
            room = self.context_length - len(ids)
            template = self.lm.tokenizer.template
            pieces = self.lm.stream(
                ids,
                max_tokens=room if self.max_tokens is None else min(self.max_tokens, room),
                sampling=self._sampling(),
                stop=[*stop_list(self.stop), *(template.stop_strings if template else ())],
                session=self.session,
            )
            with closing(pieces):
                for piece in pieces:
                    said.append(piece.text)
                    yield piece
        finally:
            if any(said):
                self.messages.append({"role": "assistant", "content": "".join(said)})
            else:
                self.messages[:], self.forgotten = before, slid

    def _fitting(self) -> list[int]:
        """The prompt's ids, once what must slide out has."""
        limit = self.context_length
        ids = self.lm.encode(self._shown())
        if self.on_overflow == "slide" and limit - len(ids) < limit // 8:
            # Further than needed, since the rest is then read anew: not with every turn.
            while limit - len(ids) < limit // 3 and self._slide():
                ids = self.lm.encode(self._shown())
        if len(ids) >= limit:
            alone = self.alone(self.messages[-1]["content"])
            if alone >= limit:
                raise ContextLengthError(
                    f"this message alone has {alone} tokens and the context is {limit}; shorten it"
                )
            raise ContextLengthError(
                f"the conversation has {len(ids)} tokens and the context is {limit}; take a turn "
                "back or begin anew"
            )
        return ids

    def _slide(self) -> bool:
        """Let the oldest turn out; False where only the last question is left."""
        later = range(self.forgotten + 1, len(self.messages))
        turns = [index for index in later if self.messages[index]["role"] == "user"]
        if turns:
            self.forgotten = turns[0]
        return bool(turns)

    def _shown(self) -> list[dict[str, str]]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return system + self.messages[self.forgotten :]

    def _sampling(self) -> Sampling:
        """With a seed, another one for each retry: the same would draw the same."""
        how = self.lm.sampling if self.sampling is None else self.sampling
        if how.seed is None or not self._again:
            return how
        return replace(how, seed=(how.seed + self._again) % 2**64)


# Files within a message
