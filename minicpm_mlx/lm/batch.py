"""Replies to many prompts, `width` of them at a time, each yielded when it is finished.

A prefix that consecutive prompts share, such as few-shot examples, is read once; that changes
replies only by rounding.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from ..engine import WIDTH, Batch, Grammar, LanguageModel, Sampling
from ..engine.batching.prefix_cache import common_prefix_length, slice_cache
from ..engine.session import prefill
from ..memory import prefill_chunk
from ..text.thinking import ThinkingForm
from ..text.tokenizer import Tokenizer
from .outputs import Completion, Piece, Stats, Transcript, collect, with_calls
from .tools.tool_set import ToolSet

SHARED = 64
"""Shortest common prefix, in tokens, that is worth a cache of its own."""


@dataclass(frozen=True, kw_only=True)
class BatchRequest:
    """A prompt and the limits of its reply."""

    ids: Sequence[int]
    max_tokens: int
    """At most the context less the prompt."""
    sampling: Sampling
    stops: Sequence[str] = ()
    """Strings that end the text before them."""
    continues: bool = False
    """The prompt is text that the reply continues, so that a space may come first."""
    grammar: Grammar | None = None
    """Constrains the reply."""
    thinking: ThinkingForm | None = None
    """Tells thoughts from the answer."""
    in_thought: bool = False
    """The reply begins within a thought."""
    tools: ToolSet | None = None
    """Functions that it may call."""
    early_stop: Callable[[str], bool] | None = None
    """Called with the text so far; True ends the reply as a stop string does."""

    def transcript(self, tokenizer: Tokenizer) -> Transcript:
        """Decodes the reply."""
        return Transcript(
            tokenizer,
            self.stops,
            skip_special=self.tools is None or not self.tools.keep_special,
            continues=self.continues,
            token_marks=self.tools.token_marks if self.tools else None,
            thinking=self.thinking,
            in_thought=self.in_thought,
        )

    @property
    def size(self) -> int:
        """Most positions of cache that it takes."""
        return len(self.ids) + self.max_tokens


@dataclass
class _Stream:
    """A reply in progress."""

    index: int
    request: BatchRequest
    transcript: Transcript
    start: float
    cached: int
    first: float = 0.0
    pieces: list[Piece] = field(default_factory=list)
    text: str = ""

    def add(self, token: int) -> bool:
        """Append a token; whether the reply ends with it."""
        self.first = self.first or time.perf_counter()
        piece = self.transcript.add(token)
        self.pieces.append(piece)
        if self.request.early_stop and piece.text and not self.transcript.ended:
            self.text += piece.text
            self.transcript.ended = self.request.early_stop(self.text)
        return self.transcript.ended

    def completion(self) -> Completion:
        stats = Stats.measure(
            prompt_tokens=len(self.request.ids),
            cached_tokens=self.cached,
            completion_tokens=self.transcript.count,
            thinking_tokens=self.transcript.thinking_count,
            start=self.start,
            first=self.first,
        )
        pieces = (piece for piece in [*self.pieces, self.transcript.finish(stats)])
        tools = self.request.tools
        return collect(with_calls(pieces, tools.reader()) if tools else pieces)


def replies(
    model: LanguageModel,
    tokenizer: Tokenizer,
    requests: Iterable[BatchRequest],
    width: int = WIDTH,
    *,
    positions: int | None = None,
) -> Generator[tuple[int, Completion], None, None]:
    """The replies with the indices of their requests, each as soon as it is finished.

    Requests are taken while there is room in `positions` of cache, where each counts as long as the
    longest (None: no limit); a single one is always taken. Seconds count from when a request is
    taken. NumericsError if the model produces NaN.
    """
    batch = Batch(model, vocab_size=tokenizer.vocab_size, width=width)
    prefix = _SharedPrefix(model)
    queue = enumerate(requests)
    upcoming = next(queue, None)
    streams: dict[int, _Stream] = {}

    def fits(request: BatchRequest) -> bool:
        # Twice the width: when one reply ends, the next prompt has already been read.
        if len(streams) >= 2 * width or not streams or positions is None:
            return len(streams) < 2 * width
        sizes = [stream.request.size for stream in streams.values()]
        return (len(sizes) + 1) * max(*sizes, request.size) <= positions

    with closing(batch):
        while True:
            while upcoming and fits(upcoming[1]):
                (index, request), upcoming = upcoming, next(queue, None)
                cache = prefix.cache_for(request.ids, upcoming[1].ids if upcoming else ())
                number = batch.add(
                    request.ids,
                    max_tokens=request.max_tokens,
                    sampling=request.sampling,
                    eos=tokenizer.eos_ids,
                    cache=cache,
                    grammar=request.grammar,
                )
                streams[number] = _Stream(
                    index,
                    request,
                    request.transcript(tokenizer),
                    time.perf_counter(),
                    cache[0].offset if cache else 0,
                )
            if not streams:
                return
            for token in batch.step():
                token.raise_error()
                stream = streams[token.stream]
                if not stream.add(token.token) and not token.finish_reason:
                    continue
                if not token.finish_reason:
                    batch.remove(token.stream)
                del streams[token.stream]
                yield stream.index, stream.completion()


class _SharedPrefix:
    """Cache of the last prefix that consecutive prompts share."""

    def __init__(self, model: LanguageModel) -> None:
        self.model, self.threshold = model, model.config.rotation_threshold
        self.ids: list[int] = []
        self.cache: list[Any] = []

    def cache_for(self, ids: Sequence[int], next_ids: Sequence[int]) -> list[Any] | None:
        """Keys and values of a prefix of `ids`; reads a longer prefix if `next_ids` shares it."""
        if self.threshold is not None and len(ids) > self.threshold:
            return None  # dynamic RoPE: keys depend on the length of the whole text
        length = common_prefix_length(self.ids, ids)
        shared = common_prefix_length(ids, next_ids)
        if shared >= length + SHARED:
            self._read(ids[: min(shared, len(ids) - 1)])
            length = len(self.ids)
        length = min(length, len(ids) - 1)  # the last token must be read for its logits
        return slice_cache(self.cache, length) if length >= SHARED else None

    def _read(self, ids: Sequence[int]) -> None:
        from mlx_lm.models.cache import KVCache

        self.ids = list(ids)
        self.cache = [KVCache() for _ in range(self.model.config.num_hidden_layers)]
        chunk = prefill_chunk(self.model.config, len(ids))
        for _ in prefill(self.model, self.ids, self.cache, chunk=chunk, length=len(ids)):
            pass
