"""Quality lost and memory saved by a key-value cache in few bits, on the demo.

    python benchmarks/kv_bits.py [--json results/NAME.json]

The text is this repository's README. It is read as a chat is: a chunk, then token by token, so that
each token is predicted from packed keys and values. KL is to the cache in full precision.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import report

READ, PREDICTED = 256, 256
"""Tokens that are read at once, and tokens predicted one by one after them."""


def main() -> None:
    options = report.options(__doc__, rounds=1).parse_args()

    import mlx.core as mx

    import minicpm_mlx as mm

    lm = mm.load("demo")
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    ids = lm.tokenizer.encode(text)[: READ + PREDICTED]
    wanted = mx.array(ids[READ:])
    found = report.Report(read=READ, predicted=PREDICTED)
    full: Any = None
    for bits in (None, 8, 4):
        cache = lm.session(bits).cache
        states = [lm.model.hidden(mx.array([ids[:READ]]), cache)[:, -1:]]
        for token in ids[READ:-1]:
            states.append(lm.model.hidden(mx.array([[token]]), cache))
            mx.eval(states[-1])
        logits = lm.model.logits(mx.concatenate(states, axis=1))[0].astype(mx.float32)
        logs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)  # (T, V)
        full = logs if full is None else full
        name = f"{bits} bits" if bits else "full"
        loss = -mx.take_along_axis(logs, wanted[:, None], axis=-1).mean()
        found.add(f"{name}: perplexity", [mx.exp(loss).item()], "")
        found.add(f"{name}: KL", [(mx.exp(full) * (full - logs)).sum(axis=-1).mean().item()], "")
        agree = (full.argmax(axis=-1) == logs.argmax(axis=-1)).mean()
        found.add(f"{name}: top-1 agreement", [agree.item()], "")
        # Of the positions used, since room is added 256 at a time.
        held = sum(part.nbytes for layer in cache for part in layer.used(layer.keys)) * 2
        found.add(f"{name}: keys and values", [held / 1e6], "MB")
    found.save(options.json)


if __name__ == "__main__":
    main()
