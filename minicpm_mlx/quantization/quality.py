"""How far a smaller checkpoint is from its source, with a layer in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx

from ..engine.scoring.perplexity import Score, score
from ..model.config import Config
from ..weights.checkpoint import Checkpoint
from .layerwise import Pieces

Progress = Callable[[str], object]

CONTEXT = 512
"""Tokens that a prediction sees at most."""


class Walked:
    """A model that has read its windows of a text already, all of them layer by layer."""

    def __init__(
        self, checkpoint: Checkpoint, windows: Sequence[Sequence[int]], progress: Progress
    ):
        pieces = Pieces(checkpoint)
        self.config: Config = pieces.config
        xs = pieces.start(windows)
        run = pieces.runner(len(windows[0]))
        for number in range(self.config.num_hidden_layers):
            block = pieces.layer(number)
            xs = [run(block, x) for x in xs]
            mx.eval(xs)
            mx.clear_cache()
            progress(f"layer {number + 1} of {self.config.num_hidden_layers}")
        self._states = iter([pieces.finish(x) for x in xs])
        self._head = pieces[pieces.head_name]

    def hidden(self, ids: mx.array) -> mx.array:
        """The last states of the next window, which `ids` must be."""
        return next(self._states)

    def logits(self, hidden: mx.array) -> mx.array:
        return hidden @ self._head.T


def quality(
    source: Checkpoint,
    smaller: Checkpoint,
    ids: Sequence[int],
    context: int = CONTEXT,
    *,
    progress: Progress = lambda _: None,
) -> Score:
    """What `smaller` makes of a text, with its divergence from `source`; computed in float32.

    Of `ids` as many windows of `context` tokens are read as are whole: one at least, so that a
    text that is shorter is the window.
    """
    context = min(context, len(ids))
    windows = [list(ids[at : at + context]) for at in range(0, len(ids) - context + 1, context)]
    whole = [token for window in windows for token in window]
    model = Walked(smaller, windows, lambda what: progress(f"measuring the result, {what}"))
    reference = Walked(source, windows, lambda what: progress(f"measuring the source, {what}"))
    return score(model, whole, context=context, reference=reference)
