"""Guessing ahead: the text is what it is without, drawn or greedy; only the passes are fewer."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import minicpm_mlx as mm
from minicpm_mlx import load_model
from minicpm_mlx.bench.measure import PASSAGE
from minicpm_mlx.engine import DraftModel, PromptLookup, Sampling, Session, Speculation, generate
from minicpm_mlx.engine.speculative import MAX_DRAFT_TOKENS, MAX_MATCH
from minicpm_mlx.model.config import Config
from minicpm_mlx.model.config_sections import Quantization
from minicpm_mlx.model.fused import fuse
from minicpm_mlx.model.packing import quantize
from support.data import CASES, GOLDEN
from support.random_models import random_model

PROMPT = [1, 5, 9, 200, 31, 7]


class Oracle:
    """Guesses the text that is given, some tokens of it spoilt."""

    def __init__(self, text: Sequence[int], seed: int, wrong: float = 0.3):
        self.text, self.random, self.wrong = text, random.Random(seed), wrong

    def confidence(self, text: Sequence[int]) -> int:
        return 1

    def propose(self, text: Sequence[int], count: int) -> list[int]:
        coming = self.text[len(text) : len(text) + self.random.randint(0, count)]
        return [
            t if self.random.random() > self.wrong else self.random.randrange(500) for t in coming
        ]


class Eager(Speculation):
    """Guesses whether it pays or not."""

    def _best_count(self) -> int:
        return MAX_DRAFT_TOKENS


def checked(model: Any, how: Sampling, **options: Any) -> None:
    """The stream with guesses of which some are right equals the plain one, in fewer passes."""
    options |= {"max_tokens": 40, "sampling": how}
    plain = list(generate(model, PROMPT, **options))
    for seed in range(2):
        guessing = Eager(Oracle(PROMPT + plain, seed))
        session = Session(model.config)
        got = list(generate(model, PROMPT, **options, speculation=guessing, session=session))
        assert got == plain
        assert guessing.passes < len(plain) - 5
        known = [*PROMPT, *got]
        assert session.ids == known[: len(session.ids)]
        assert all(layer.offset >= len(session.ids) for layer in session.cache)
        again = list(generate(model, [*PROMPT, *plain], max_tokens=5, session=session))
        assert again == list(generate(model, [*PROMPT, *plain], max_tokens=5))


WAYS = {
    "greedy": Sampling(),
    "penalty": Sampling(repetition_penalty=1.3),
    "drawn": Sampling(temperature=1.3, seed=4),
    "filtered": Sampling(
        temperature=0.9, top_p=0.9, top_k=40, min_p=0.01, repetition_penalty=1.1, seed=5
    ),
}


@pytest.mark.parametrize("case", [case for case in CASES if "longctx" not in case])
def test_greedy_text_of_every_architecture_is_the_same(case: str) -> None:
    checked(load_model(GOLDEN / case, fuse=True), Sampling())


@pytest.mark.parametrize("way", WAYS)
def test_drawn_text_is_the_same_for_the_same_seed(way: str) -> None:
    checked(load_model(GOLDEN / "minicpm_2b_like", fuse=True), WAYS[way])


@pytest.mark.parametrize("form", ["float16", "bfloat16", "4-bit"])
def test_greedy_text_is_the_same_in_every_format(form: str) -> None:
    model = random_model()
    if form == "4-bit":
        quantize(model, Quantization(bits=4, group_size=32))
    else:
        model.set_dtype(getattr(mx, form))
    fused = fuse(model)
    if form == "bfloat16":  # whose ties are drawn differently by passes of other lengths
        plain = list(generate(fused, PROMPT, max_tokens=8))
        guessing = Eager(Oracle(PROMPT + plain, 1))
        assert list(generate(fused, PROMPT, max_tokens=8, speculation=guessing)) == plain
        return
    checked(fused, Sampling())


def test_a_threshold_of_rotation_is_kept_to() -> None:
    config = {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 24}
    model = fuse(random_model(**config))
    assert model.config.rotation_threshold == 24
    plain = list(generate(model, PROMPT, max_tokens=40))
    guessing = Eager(Oracle(PROMPT + plain, 0, wrong=0))
    assert list(generate(model, PROMPT, max_tokens=40, speculation=guessing)) == plain


def test_the_end_ends_it_also_among_guesses() -> None:
    model = load_model(GOLDEN / "minicpm_2b_like", fuse=True)
    plain = list(generate(model, PROMPT, max_tokens=20))
    eos = plain[7]
    upto = plain[: plain.index(eos) + 1]
    guessing = Eager(Oracle(PROMPT + plain, 0, wrong=0))
    assert list(generate(model, PROMPT, max_tokens=20, eos={eos}, speculation=guessing)) == upto


def test_a_stream_broken_off_among_guesses_can_go_on() -> None:
    model = load_model(GOLDEN / "minicpm_2b_like", fuse=True)
    plain = list(generate(model, PROMPT, max_tokens=20))
    for stop in range(1, 12):
        session = Session(model.config)
        guessing = Eager(Oracle(PROMPT + plain, stop, wrong=0.1))
        stream = generate(model, PROMPT, max_tokens=20, session=session, speculation=guessing)
        begun = [next(stream) for _ in range(stop)]
        stream.close()
        rest = list(generate(model, PROMPT + begun, max_tokens=5, session=session))
        assert begun + rest == plain[: stop + 5]


def test_sampling_s_distribution_is_unchanged() -> None:
    """Pairs of tokens drawn with guesses, against their probabilities: chi-squared, fixed seeds."""
    model = load_model(GOLDEN / "minicpm_2b_like", fuse=True)
    how = {"temperature": 1.0, "top_k": 3}

    def chances(text: list[int]) -> dict[int, float]:
        logits = model(mx.array([text]))[0, -1]
        top = mx.argsort(-logits)[:3]
        return dict(zip(top.tolist(), mx.softmax(logits[top]).tolist(), strict=True))  # type: ignore[arg-type]

    expected = {
        (a, b): p * q for a, p in chances(PROMPT).items() for b, q in chances([*PROMPT, a]).items()
    }
    likely = max(expected, key=lambda pair: expected[pair])
    draws = 400
    counts: Counter[tuple[int, int]] = Counter()
    for seed in range(draws):
        guessing = Eager(Oracle([*PROMPT, *likely, 3, 4], seed, wrong=0.0))
        sampling = Sampling(seed=seed, **how)  # type: ignore[arg-type]
        a, b, _ = generate(model, PROMPT, max_tokens=3, sampling=sampling, speculation=guessing)
        counts[a, b] += 1
    assert counts.keys() <= expected.keys()
    chi = sum((counts[pair] - draws * p) ** 2 / (draws * p) for pair, p in expected.items())
    assert chi < 26.1  # 99.9 % of chi-squared with 8 degrees of freedom


@settings(deadline=None, max_examples=200)
@given(text=st.lists(st.integers(0, 3), min_size=1, max_size=60), step=st.integers(1, 7))
def test_lookup_finds_the_longest_run_that_was_there_before(text: list[int], step: int) -> None:
    lookup = PromptLookup()
    for length in [*range(1, len(text), step), len(text)]:  # as the text grows
        alike = lookup.confidence(text[:length])
    best = 0
    for end in range(2, len(text)):
        size = 0
        while size < min(MAX_MATCH, end) and text[end - 1 - size] == text[-1 - size]:
            size += 1
        best = max(best, size if size >= 2 else 0)
    if len(text) <= 16:  # it looks at the last few places only
        assert alike == best
    assert alike <= best
    if alike:
        guess = lookup.propose(text, 12)
        assert len(guess) == 12
        whole = [*text, *guess]
        assert guess == whole[lookup.match_end : lookup.match_end + 12]


def test_guesses_that_do_not_come_true_end_and_those_that_do_grow() -> None:
    text = [1, 2, 3, 4, 1, 2, 3]
    good, bad = Speculation(PromptLookup()), Speculation(PromptLookup())
    for speculation, right in ((good, True), (bad, False)):
        speculation.record_step(1.0)
        for _ in range(30):
            guesses = speculation.draft_tokens(text, 100)
            if guesses:
                speculation.record_verified(len(guesses), len(guesses) * right, 1.3)
    assert len(good.draft_tokens(text, 100)) == MAX_DRAFT_TOKENS
    assert bad.draft_tokens(text, 100) == []
    assert good.draft_tokens(text, 3) == [4, 1, 2]
    for _ in range(1000):  # and are tried again one day
        bad.record_step(1.0)
    assert bad.draft_tokens(text, 100)


def test_the_demo_quotes_in_fewer_passes(demo: mm.LM) -> None:
    prompt = [{"role": "user", "content": f"Quote this text word for word:\n\n{PASSAGE}"}]
    greedy = Sampling()
    plain = demo.generate(prompt, max_tokens=28, sampling=greedy, speculate=False)
    quick = demo.generate(prompt, max_tokens=28, sampling=greedy)
    assert quick.token_ids == plain.token_ids
    assert plain.stats.passes >= len(plain.token_ids) - 1
    assert quick.stats.passes <= len(plain.token_ids) / 1.8


def test_a_draft_model_of_the_same_vocabulary(demo: mm.LM, tiny: mm.LM) -> None:
    question = [{"role": "user", "content": "What is the capital of France?"}]
    plain = demo.generate(question, max_tokens=12, speculate=False)
    demo.draft = demo  # which guesses perfectly
    try:
        drafted = demo.generate(question, max_tokens=12)
    finally:
        demo.draft = None
    assert drafted.token_ids == plain.token_ids
    assert drafted.stats.passes < plain.stats.passes
    folder = tiny.card.path
    assert mm.load(folder, draft=folder).draft


def test_a_draft_guesses_what_its_model_says() -> None:
    model = load_model(GOLDEN / "minicpm_2b_like", fuse=True)
    plain = list(generate(model, PROMPT, max_tokens=20))
    draft = DraftModel(model, model.config.vocab_size)
    assert draft.propose(PROMPT, 4) == plain[:4]
    assert draft.propose([*PROMPT, *plain[:6]], 3) == plain[6:9]
    assert draft.propose([*PROMPT, 3], 2) != []
    assert isinstance(model.config, Config)
