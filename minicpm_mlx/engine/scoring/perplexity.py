"""Perplexity of a model on a text, and its divergence from a reference model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx
import numpy as np

from ...arguments import at_least_one
from ...errors import InvalidArgumentError, NumericsError
from ...model.config import Config

LOGIT_ROWS = 256
"""Positions whose logits are held at once."""


class Predictor(Protocol):
    """The interface of models here; also models that are read a layer at a time."""

    @property
    def config(self) -> Config: ...

    def hidden(self, ids: mx.array) -> mx.array: ...

    def logits(self, hidden: mx.array) -> mx.array: ...


@dataclass(frozen=True, kw_only=True)
class PerplexityScore:
    """How well a model predicts a text."""

    tokens: int
    """Tokens predicted."""
    context: int
    """Tokens of the longest window, its start token included."""
    stride: int
    """New tokens in each window but the first."""
    bos: bool = False
    """Whether each window began with the start token."""
    loss: float
    """Mean negative log-likelihood a token, in nats."""
    reference_loss: float | None = None
    """The reference model's."""
    kl: float | None = None
    """Mean Kullback-Leibler divergence from the reference's predictions, in nats a token."""
    kl_99: float | None = None
    """The 99th percentile of the divergence."""
    top_1: float | None = None
    """Share of tokens for which both models rank the same token first."""

    @property
    def perplexity(self) -> float:
        return _exp(self.loss)

    @property
    def reference_perplexity(self) -> float | None:
        return None if self.reference_loss is None else _exp(self.reference_loss)


def score(
    model: Predictor,
    ids: Sequence[int],
    *,
    context: int = 2048,
    stride: int | None = None,
    bos: int | None = None,
    reference: Predictor | None = None,
    progress: Callable[[int], object] = lambda done: None,
) -> PerplexityScore:
    """Predict each of `ids` but the first, in windows of at most `context` tokens.

    Windows begin `stride` apart, by default end to end, as AWQ and GPTQ measure it; each predicts
    the tokens that no earlier one has. With `bos`, a start token that is not among `ids`, each
    window begins with it, and the first of `ids` is predicted as well. `progress` receives the
    number of tokens predicted so far.
    InvalidArgumentError for fewer than two ids, for ids or a reference of another vocabulary, and
    as in `check_windows`; NumericsError if the model produces NaN.
    """
    lead = 0 if bos is None else 1
    context, stride = check_windows(context, stride, bos=bool(lead))
    check_text(ids)
    vocabulary = model.config.vocab_size
    if not all(0 <= token < vocabulary for token in ids):
        raise InvalidArgumentError(
            f"the text holds ids outside 0..{vocabulary - 1}; was it encoded by another model's "
            "tokenizer?"
        )
    if reference and reference.config.vocab_size != vocabulary:
        raise InvalidArgumentError(
            f"the reference predicts {reference.config.vocab_size} tokens and the model "
            f"{vocabulary}; expected the same vocabulary"
        )
    # One array of each window's tokens; the last three only with a reference.
    losses: list[mx.array] = []
    reference_losses: list[mx.array] = []
    divergences: list[mx.array] = []
    top_matches: list[mx.array] = []
    done = 0
    for begin, end, first in windows(len(ids), context, stride, bos=bool(lead)):
        text = mx.array([[*[bos] * lead, *ids[begin:end]]])
        hidden = model.hidden(text)[0]  # (T, hidden)
        reference_hidden = reference.hidden(text)[0] if reference else None
        for start in range(first - begin + lead - 1, text.shape[1] - 1, LOGIT_ROWS):
            rows = slice(start, min(start + LOGIT_ROWS, text.shape[1] - 1))
            targets = text[0, rows.start + 1 : rows.stop + 1]
            logprobs = _log_softmax(model, hidden[rows])  # (rows, V)
            losses.append(_losses(logprobs, targets))
            if reference and reference_hidden is not None:
                truth = _log_softmax(reference, reference_hidden[rows])
                reference_losses.append(_losses(truth, targets))
                divergences.append(_divergence(truth, logprobs))
                top_matches.append(truth.argmax(axis=-1) == logprobs.argmax(axis=-1))
            mx.eval(losses, reference_losses, divergences, top_matches)
            done += rows.stop - rows.start
            progress(done)
    loss = _mean(losses)
    kl = np.sort(np.array(mx.concatenate(divergences))) if divergences else None
    if not np.isfinite([loss, 0.0 if kl is None else kl[-1]]).all():
        raise NumericsError(
            "the model produced NaN; expected numbers. Are the weights damaged, or is float16 too "
            "narrow for them (try --dtype bfloat16 or float32)?"
        )
    return PerplexityScore(
        tokens=done,
        context=min(context, len(ids) + lead),
        stride=stride,
        bos=bool(lead),
        loss=loss,
        reference_loss=_mean(reference_losses) if reference_losses else None,
        kl=None if kl is None else float(np.mean(kl, dtype=np.float64)),
        kl_99=None if kl is None else float(kl[int(0.99 * (done - 1))]),
        top_1=_mean(top_matches) if top_matches else None,
    )


def _divergence(truth: mx.array, logprobs: mx.array) -> mx.array:
    """The KL divergence of predictions from those of the reference: (rows,).

    Both are log probabilities (rows, V). The sum of p log(p / q) - p + q, whose terms are never
    negative; as p and q sum to 1 it is the divergence, without the rounding errors of p log(p / q)
    that leave small divergences below 0.
    """
    ratio = logprobs - truth
    near = mx.exp(truth) * (mx.expm1(mx.minimum(ratio, 1)) - ratio)
    far = mx.exp(logprobs) - mx.exp(truth) * (1 + ratio)  # where exp(ratio) could overflow
    return mx.maximum(mx.where(ratio < 1, near, far), 0).sum(axis=-1)


def check_text(ids: Sequence[int]) -> None:
    if len(ids) < 2:
        raise InvalidArgumentError(f"expected a text of two tokens or more, got {len(ids)}")


def check_windows(context: int, stride: int | None, *, bos: bool = False) -> tuple[int, int]:
    """Return `context` and `stride` of `score`, the default filled in.

    InvalidArgumentError for a context of fewer than two tokens, or a stride beyond the context,
    of which a start token takes one.
    """
    context = at_least_one("context", context)
    if context < 2:
        raise InvalidArgumentError(
            "must be 2 or more, got 1: a token is predicted from those before it", field="context"
        )
    room = context - bos
    stride = room if stride is None else at_least_one("stride", stride)
    if stride > room:
        start = " less the start token" if bos else ""
        raise InvalidArgumentError(
            f"must be at most the context{start}, {room}, or tokens are left out; got {stride}",
            field="stride",
        )
    return context, stride


def windows(
    count: int, context: int, stride: int, *, bos: bool = False
) -> Iterator[tuple[int, int, int]]:
    """Yield begin and end of each window of a text of `count` tokens, and its first new token.

    The text's first token is new only if `bos`, a start token within `context`, precedes it.
    """
    known = 0
    for begin in range(0, count, stride):
        end = min(begin + context - bos, count)
        # Without a start token, the first token of a window has nothing to be predicted from.
        first = max(known, begin + (not bos))
        if first < end:
            yield begin, end, first
        known = end
        if end == count:
            return


def _log_softmax(model: Predictor, hidden: mx.array) -> mx.array:
    """Log probabilities (T, V) from hidden states (T, hidden), in float32."""
    logits = model.logits(hidden[None])[0].astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def _losses(logprobs: mx.array, targets: mx.array) -> mx.array:
    """Negative log probabilities (T,) of targets (T,) under log probabilities (T, V)."""
    return -mx.take_along_axis(logprobs, targets[:, None], axis=-1)[:, 0]


def _mean(arrays: list[mx.array]) -> float:
    return float(np.mean(np.array(mx.concatenate(arrays)), dtype=np.float64))


def _exp(loss: float) -> float:
    with suppress(OverflowError):
        return math.exp(loss)
    return math.inf
