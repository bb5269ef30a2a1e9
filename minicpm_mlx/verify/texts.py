"""Greedy texts: the same in a batch as alone, and with drafts as without."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import mlx.core as mx

from .. import device
from ..engine import Batch, Sampling, Speculation, generate
from ..weights.lazy_tensor import dtype_name
from .cases import CASES
from .formats import limit
from .golden import Loaded, load
from .results import CheckResult, Errors, as_numpy, catching

TOKENS = 12
"""Tokens of a text."""
PROMPTS = (40, 9, 23)
"""Tokens of the prompts that share a batch."""
DRAFT = 4
"""Tokens of a draft, of which the third is wrong."""

CHECKS = ("batch = alone", "speculation = plain")


def check_texts() -> Iterator[CheckResult]:
    """Compare texts in float32, in the format this device prefers, and in 4 bits.

    A difference counts as the gap of the logits between the two tokens, in units of their
    deviation: rounding may tip a tie, which is no error.
    """
    preferred = dtype_name(device.choose_dtype(mx.bfloat16))
    for format in dict.fromkeys(("float32", preferred, "4 bits")):
        # Both sides of a gap may be off.
        alone, plain = (Errors(name, format, 2 * limit(format)) for name in CHECKS)
        for case in CASES:
            with catching(case.name, alone, plain):
                loaded = load(case, format)
                texts = [_text(loaded, case.ids[:length]) for length in PROMPTS]
                _compare_batch(loaded, texts, alone)
                _compare_drafted(loaded, texts[0], plain)
        yield from (alone.result(), plain.result())


def _compare_batch(loaded: Loaded, texts: list[list[int]], alone: Errors) -> None:
    for length, text, batched in zip(PROMPTS, texts, _batch(loaded), strict=True):
        alone.add(loaded.case.name, _gap(loaded, loaded.case.ids[:length], text, batched))


def _compare_drafted(loaded: Loaded, text: list[int], plain: Errors) -> None:
    case, prompt = loaded.case, loaded.case.ids[: PROMPTS[0]]
    drafts = FixedDrafts([*prompt, *text], case.config.vocab_size)
    drafted = _text(loaded, prompt, drafts)
    plain.add(case.name, _gap(loaded, prompt, text, drafted))
    threshold = case.config.rotation_threshold  # beyond it nothing is drafted
    drafts_fit = threshold is None or threshold > len(prompt) + TOKENS
    if drafts_fit and drafts.passes >= TOKENS - 1:
        plain.add(f"{case.name}, whose drafts saved no pass", math.inf)


class FixedDrafts(Speculation):
    """Drafts the tokens of a known text, some of them wrong, whatever that costs."""

    def __init__(self, known: Sequence[int], vocab_size: int):
        super().__init__(None)
        self.known, self.vocab_size = known, vocab_size

    def draft_tokens(self, text: Sequence[int], limit: int) -> list[int]:
        draft = list(self.known[len(text) : len(text) + min(DRAFT, limit)])
        if len(draft) > 2:
            draft[2] = (draft[2] + 1) % self.vocab_size
        return draft


def _text(loaded: Loaded, prompt: list[int], drafts: Speculation | None = None) -> list[int]:
    return list(generate(loaded.inference, prompt, max_tokens=TOKENS, speculation=drafts))


def _batch(loaded: Loaded) -> list[list[int]]:
    """The texts of PROMPTS, computed together."""
    batch, case = Batch(loaded.inference, width=len(PROMPTS)), loaded.case
    try:
        streams = [
            batch.add(case.ids[:length], max_tokens=TOKENS, sampling=Sampling())
            for length in PROMPTS
        ]
        texts: dict[int, list[int]] = {stream: [] for stream in streams}
        for token in batch.tokens():
            texts[token.stream].append(token.token)
        return list(texts.values())
    finally:
        batch.close()


def _gap(loaded: Loaded, prompt: list[int], text: list[int], other: list[int]) -> float:
    """How far the logits of two texts' first different tokens are apart; 0 for one text."""
    pairs = enumerate(zip(text, other, strict=True))
    first = next((i for i, (a, b) in pairs if a != b), None)
    if first is None:
        return 0.0
    logits = as_numpy(loaded.inference(mx.array([[*prompt, *text[:first]]]))[0, -1])
    return float(abs(logits[text[first]] - logits[other[first]]) / logits.std())
