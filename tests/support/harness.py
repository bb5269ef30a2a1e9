"""Log likelihoods computed by plain passes, to compare with."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

import minicpm_mlx as mm


def passed(lm: mm.LM, ids: list[int], count: int) -> tuple[float, bool]:
    """Log likelihood of the last `count` ids, and whether all are the likeliest: one plain pass."""
    logits = np.array(lm.model(mx.array([ids]))[0, -count - 1 : -1], np.float64)
    # Not MLX's logsumexp: on a CPU it is wrong by 1e-4 a token.
    top = logits.max(axis=1)
    total = top + np.log(np.exp(logits - top[:, None]).sum(axis=1))
    own = logits[np.arange(count), ids[-count:]]
    return float((own - total).sum()), bool((own == top).all())


def prefixed(lm: mm.LM) -> int:
    """What lm-eval puts before a text without context."""
    bos = lm.tokenizer.bos_id
    return lm.tokenizer.eos_ids[0] if bos is None else bos
