"""Tokens that the device leaves undecided are drawn again, without a trace of the step after."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest

from minicpm_mlx import load_model
from minicpm_mlx.engine import Batch, Sampling, draw, generate, sampling
from minicpm_mlx.engine.sampling import UNDECIDED, Sampler
from support.data import GOLDEN

from .test_speculative import Eager, Oracle
from .test_token_mask import Stairs

PROMPT = [1, 5, 9, 200, 31, 7]
WAYS = [
    Sampling(temperature=0.3, top_p=0.6, repetition_penalty=1.2, seed=5),
    Sampling(temperature=0.4, top_p=0.5, min_p=0.01, frequency_penalty=0.5, seed=6),
    Sampling(temperature=0.5, top_p=0.6, top_k=9, seed=7),
]


@pytest.fixture(autouse=True)
def single_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draw, "MAX_TRIES", 1)
    monkeypatch.setattr(sampling, "device", SimpleNamespace(on_cpu=lambda: False))


def one_by_one(model: Any, how: Sampling, count: int, **options: Any) -> tuple[list[int], int]:
    """The text of a loop that decides each token before the next, and how many were undecided."""
    sampler = Sampler(how, PROMPT, model.config.vocab_size, **options)
    text, undecided = list(PROMPT), 0
    for _ in range(count):
        logits = model(mx.array([text]))[:, -1]
        token = int(sampler(logits).item())
        if token == UNDECIDED:
            undecided += 1
            token = int(sampler(sampler.rewind(1), decide=True).item())
        text.append(token)
    return text[len(PROMPT) :], undecided


@pytest.mark.parametrize("case", ["minicpm_2b_like", "minicpm3_like"])
@pytest.mark.parametrize("how", WAYS)
def test_a_stream_is_as_decided_one_by_one(case: str, how: Sampling) -> None:
    model: Any = load_model(GOLDEN / case, fuse=True)
    options: Any = {"max_tokens": 25, "sampling": how}
    text, undecided = one_by_one(model, how, 25)
    assert undecided > 2
    assert list(generate(model, PROMPT, **options)) == text
    guesses = Eager(Oracle(PROMPT + text, seed=1))
    assert list(generate(model, PROMPT, **options, speculation=guesses)) == text
    text, _ = one_by_one(model, how, 25, grammar=Stairs())
    assert list(generate(model, PROMPT, **options, grammar=Stairs())) == text


def test_streams_of_a_batch_are_as_alone() -> None:
    model: Any = load_model(GOLDEN / "minicpm_2b_like", fuse=True)
    alone = [list(generate(model, PROMPT, max_tokens=25, sampling=how)) for how in WAYS]
    eos = {alone[0][20]}
    alone = [list(generate(model, PROMPT, max_tokens=25, sampling=how, eos=eos)) for how in WAYS]
    batch = Batch(model, width=2)
    streams = [
        batch.add(PROMPT, max_tokens=25, sampling=how, eos=eos, top_logprobs=2) for how in WAYS
    ]
    texts: dict[int, list[int]] = {stream: [] for stream in streams}
    for token in batch.tokens():
        assert token.token_logprob is not None
        assert token.token_logprob.token == token.token
        texts[token.stream].append(token.token)
        if token.cache:  # what the stream has read is the beginning of its text
            read = token.cache.ids
            assert read == [*PROMPT, *texts[token.stream]][: len(read)]
            assert token.cache.cache[0].offset == len(read)
    assert [texts[stream] for stream in streams] == alone
