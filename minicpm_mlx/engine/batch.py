"""Many streams at once, joining and leaving as they come and end: mlx-lm's BatchGenerator."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import mlx.core as mx

from ..errors import NumericsError
from .generate import CHUNK, LanguageModel
from .sampling import NOT_A_NUMBER, Sampler, Sampling

WIDTH = 8
"""Streams that advance together, unless told otherwise."""


class Drawn(NamedTuple):
    """A token of one stream."""

    stream: int
    token: int
    reason: str | None
    """"stop" or "length" where it is the stream's last."""


class Batch:
    """Streams of one model; `step` advances all that run, up to `width`, and the rest wait."""

    def __init__(
        self,
        model: LanguageModel,
        *,
        eos: Collection[int] = (),
        vocab_size: int | None = None,
        width: int = WIDTH,
        chunk: int = CHUNK,
    ):
        # Here, since importing it takes the better part of a second.
        from mlx_lm.generate import BatchGenerator

        self.vocab_size = vocab_size or model.config.vocab_size
        self.generator: Any = BatchGenerator(
            model,  # type: ignore[arg-type]
            stop_tokens=[[token] for token in eos],
            completion_batch_size=width,
            prefill_batch_size=width,
            prefill_step_size=chunk,
            stream=mx.default_stream(mx.default_device()),
        )

    def add(self, prompt: Sequence[int], *, max_tokens: int, sampling: Sampling) -> int:
        """Begin a stream when there is room for it; its number."""
        draw = _Draw(Sampler(sampling, prompt, self.vocab_size))
        (number,) = self.generator.insert(
            [list(prompt)],
            max_tokens=[max_tokens],
            samplers=[draw],
            logits_processors=[[draw.adjust]],
        )
        return int(number)

    def step(self) -> list[Drawn]:
        """The next token of each stream that runs; nothing once all have ended."""
        drawn = []
        for found in self.generator.next_generated():
            if found.token == NOT_A_NUMBER:
                raise NumericsError(
                    "the model produced NaN; expected numbers. Are the weights damaged?"
                )
            drawn.append(Drawn(found.uid, found.token, found.finish_reason))
        return drawn

    def remove(self, stream: int) -> None:
        """End a stream early."""
        self.generator.remove([stream])

    def close(self) -> None:
        self.generator.close()


class _Draw:
    """Draws from the logits themselves, as a stream of its own would.

    BatchGenerator draws from their logarithms instead; so the token is drawn where it would have
    logits adjusted, which are then no longer needed.
    """

    def __init__(self, sampler: Sampler):
        self.sampler = sampler

    def adjust(self, _: mx.array, logits: mx.array) -> mx.array:
        self.token = self.sampler(logits)
        return mx.zeros((1, 1))

    def __call__(self, _: mx.array) -> mx.array:
        return self.token
