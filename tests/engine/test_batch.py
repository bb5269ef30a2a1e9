"""Many streams at once say what each would have said alone."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest

import minicpm_mlx as mm
from minicpm_mlx import load_model
from minicpm_mlx.engine import Batch, Sampling, generate
from minicpm_mlx.errors import InvalidArgumentError, NumericsError
from support.data import CASES, GOLDEN

PROMPTS = [[1, 5, 9, 200, 31, 7], [4], [1, 300, *range(40, 75)], [9, 9], [1, 2, 3, 4, 5]]


def together(
    model: Any, lengths: list[int], how: list[Sampling], **options: Any
) -> list[list[int]]:
    eos = options.pop("eos", ())
    batch = Batch(model, **options)
    settings = zip(PROMPTS, lengths, how, strict=True)
    streams = [batch.add(p, max_tokens=n, sampling=s, eos=eos) for p, n, s in settings]
    told: dict[int, list[int]] = {stream: [] for stream in streams}
    for drawn in batch.tokens():
        told[drawn.stream].append(drawn.token)
    batch.close()
    return [told[stream] for stream in streams]


# Where frequencies depend on a text's length, streams of different lengths rotate alike only alone.
@pytest.mark.parametrize("case", [c for c in CASES if "longctx" not in c])
@pytest.mark.parametrize("width", [2, 8])
def test_streams_of_all_lengths_are_as_alone(case: str, width: int) -> None:
    model: Any = load_model(GOLDEN / case, fuse=True)
    lengths = [12, 20, 3, 1, 15]
    got = together(model, lengths, [Sampling()] * 5, width=width, chunk=16)
    alone = [list(generate(model, p, max_tokens=n)) for p, n in zip(PROMPTS, lengths, strict=True)]
    assert got == alone


def test_each_stream_is_drawn_its_own_way() -> None:
    model: Any = load_model(GOLDEN / "minicpm_2b_like", fuse=True)
    ways = [
        Sampling(),
        Sampling(temperature=1.2, seed=3),
        Sampling(repetition_penalty=1.5),
        Sampling(temperature=0.8, top_p=0.9, top_k=30, seed=3),
        Sampling(temperature=1.0, min_p=0.1, repetition_penalty=1.2, seed=8),
    ]
    got = together(model, [10] * 5, ways, width=3)
    pairs = zip(PROMPTS, ways, strict=True)
    assert got == [list(generate(model, p, max_tokens=10, sampling=how)) for p, how in pairs]


def test_an_end_token_ends_one_stream_and_makes_room_for_the_next() -> None:
    model: Any = load_model(GOLDEN / "minicpm_2b_like", fuse=True)
    alone = [list(generate(model, p, max_tokens=20)) for p in PROMPTS]
    eos = {alone[0][4]}
    got = together(model, [20] * 5, [Sampling()] * 5, width=2, eos=eos)
    assert got == [list(generate(model, p, max_tokens=20, eos=eos)) for p in PROMPTS]


def test_nan_is_named() -> None:
    model: Any = load_model(GOLDEN / "minicpm_2b_like", fuse=True)
    model.norm.weight = model.norm.weight * mx.nan
    with pytest.raises(NumericsError, match="NaN"):
        together(model, [3] * 5, [Sampling()] * 5)


def test_texts_are_answered_in_their_order_as_alone(demo: mm.LM) -> None:
    prompts: list[Any] = [
        [{"role": "user", "content": "What is the capital of Italy?"}],
        "One, two, three, four,",
        demo.encode("Water boils at"),
    ]
    how = mm.Sampling()
    got = demo.generate_batch(prompts, max_tokens=8, sampling=how, stop=["seven"], width=2)
    for prompt, reply in zip(prompts, got, strict=True):
        alone = demo.generate(prompt, max_tokens=8, sampling=how, stop=["seven"])
        assert (reply.text, reply.token_ids) == (alone.text, alone.token_ids)
        assert reply.finish_reason == alone.finish_reason
        assert reply.stats.completion_tokens == alone.stats.completion_tokens
        assert 0 < reply.stats.ttft <= reply.stats.seconds
    assert demo.generate_batch([]) == []
    with pytest.raises(InvalidArgumentError, match="width"):
        demo.generate_batch(["a"], width=0)
