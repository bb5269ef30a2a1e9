from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest

import minicpm_mlx as mm
from minicpm_mlx import load_model
from minicpm_mlx.engine import KVCache, Sampling, Session, generate
from minicpm_mlx.errors import InvalidArgumentError, NumericsError
from minicpm_mlx.model.attention import attend
from support.data import GOLDEN

PROMPT = [1, 5, 9, 200, 31, 7]


@pytest.fixture(scope="module")
def model() -> Any:
    return load_model(GOLDEN / "minicpm_2b_like", fuse=True)


def test_end_token_is_given_and_ends_the_stream(model: Any) -> None:
    ids = list(generate(model, PROMPT, max_tokens=10))
    assert list(generate(model, PROMPT, max_tokens=10, eos={ids[3]})) == ids[:4]


def test_session_notes_exactly_the_ids_its_cache_holds(model: Any) -> None:
    session = Session(model.config)
    ids = list(generate(model, PROMPT, max_tokens=5, session=session))
    assert session.ids == PROMPT + ids[:-1]  # the last one was never fed
    assert all(layer.offset == len(session.ids) for layer in session.cache)


def test_stream_broken_off_leaves_a_session_that_can_go_on(model: Any) -> None:
    session = Session(model.config)
    stream = generate(model, PROMPT, max_tokens=50, session=session)
    begun = [next(stream) for _ in range(4)]
    stream.close()
    wanted = list(generate(model, PROMPT + begun, max_tokens=6))
    assert list(generate(model, PROMPT + begun, max_tokens=6, session=session)) == wanted


def test_only_what_is_new_is_read_again(model: Any) -> None:
    session = Session(model.config)
    ids = list(generate(model, PROMPT, max_tokens=4, session=session))
    longer = PROMPT + ids[:3] + [8, 8]
    assert session.common(longer) == len(PROMPT) + 3
    assert session.common([*PROMPT[:2], 99, 98]) == 2
    assert session.common(PROMPT) == len(PROMPT) - 1  # the last id's logits are needed
    assert session.common([2]) == 0


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "message"),
    [
        ([], 5, "prompt is empty"),
        (PROMPT, 0, "max_tokens must be 1 or more, got 0"),
        (PROMPT, -3, "max_tokens must be 1 or more, got -3"),
        ([1, 512], 5, r"ids outside 0\.\.511"),
        ([1, -1], 5, r"ids outside 0\.\.511"),
    ],
)
def test_what_cannot_be_generated_is_refused_before_any_work(
    model: Any, prompt: list[int], max_tokens: int, message: str
) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        generate(model, prompt, max_tokens=max_tokens)


def test_nan_in_the_weights_is_an_error_not_a_token() -> None:
    model = load_model(GOLDEN / "minicpm_2b_like", fuse=True)
    model.norm.weight = model.norm.weight * float("nan")
    with pytest.raises(NumericsError, match="NaN"):
        list(generate(model, PROMPT, max_tokens=3))


def test_cache_grows_past_its_step_and_keeps_what_it_held() -> None:
    cache, reference = KVCache(), []
    for length in (200, 100, 1, 300):
        block = mx.random.normal((1, 2, length, 4))
        reference.append(block)
        keys, values = cache.update_and_fetch(block, block * 2)
        whole = mx.concatenate(reference, axis=2)
        assert mx.array_equal(keys, whole)
        assert mx.array_equal(values, whole * 2)
    assert cache.trim(10_000) == 601
    assert cache.offset == 0


def test_cache_mask_as_an_array_lets_each_position_see_itself_and_before() -> None:
    cache = KVCache()
    cache.update_and_fetch(mx.zeros((1, 1, 2, 4)), mx.zeros((1, 1, 2, 4)))
    assert cache.make_mask(2, return_array=True).tolist() == [
        [True, True, True, False],
        [True, True, True, True],
    ]
    assert cache.make_mask(2) == "causal"
    assert cache.make_mask(1) is None


def test_ids_that_only_pad_the_embedding_are_never_drawn(model: Any) -> None:
    how = Sampling(temperature=50.0, seed=1, repetition_penalty=1.1)
    ids = list(generate(model, PROMPT, max_tokens=60, sampling=how, vocab_size=40))
    assert max(ids) < 40


def test_second_stream_on_a_session_in_use_is_refused(model: Any) -> None:
    session = Session(model.config)
    first = generate(model, PROMPT, max_tokens=8, session=session)
    begun = next(first)
    with pytest.raises(InvalidArgumentError, match="in the middle of another stream"):
        next(generate(model, [2, 3], max_tokens=8, session=session))
    assert [begun, *first] == list(generate(model, PROMPT, max_tokens=8))
    assert next(generate(model, PROMPT, max_tokens=8, session=session)) == begun


# A cache in few bits


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("heads", "kv_heads", "D"), [(4, 4, 64), (6, 2, 64), (4, 1, 96)])
def test_packed_attention_is_attention_over_what_was_unpacked(
    bits: int, heads: int, kv_heads: int, D: int
) -> None:
    mx.random.seed(1)
    cache = KVCache(bits)
    for T in (3, 300, 1, 1):  # more than one step of room
        q = mx.random.normal((2, heads, T, D))
        k, v = (mx.random.normal((2, kv_heads, T, D)) for _ in range(2))
        found = attend(q, k, v, 0.1, cache.make_mask(T), cache)
        keys, values = (cache.dense(cache.used(x)) for x in (cache.keys, cache.values))
        mask = cache.make_mask(T)
        expected = mx.fast.scaled_dot_product_attention(q, keys, values, scale=0.1, mask=mask)
        expected = expected.transpose(0, 2, 1, 3).reshape(2, T, -1)
        assert mx.abs(found - expected).max().item() < 1e-4
    assert cache.offset == 305
    width = (
        bits + 64 / cache.packing(cache.keys)["group_size"]
    )  # a scale and a bias of 32 bits for each group
    assert cache.nbytes == 2 * 2 * kv_heads * cache.keys[0].shape[2] * D * width / 8
    step = mx.abs(keys[..., -1:, :] - k).max().item()
    assert 0 < step < (0.05 if bits == 8 else 0.6)


def test_a_cache_in_8_bits_answers_as_one_in_full(demo: mm.LM) -> None:
    ask = [{"role": "user", "content": "What is the capital of France?"}]
    session = demo.session(kv_bits=8)
    for _ in range(2):
        reply = demo.generate(ask, max_tokens=12, session=session)
        assert reply.text == "The capital of France is Paris."
        session.rewind(session.ids[:5])


@pytest.mark.parametrize("wrong", [0, 2, 16, "8", True, 4.5])
def test_other_bits_are_refused(demo: mm.LM, wrong: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="kv_bits must be 8 or 4"):
        demo.session(kv_bits=wrong)


@pytest.mark.slow
def test_twenty_thousand_tokens_take_no_memory_but_the_cache(model: Any) -> None:
    session = Session(model.config)
    stream = generate(model, PROMPT, max_tokens=20_000, session=session, sampling=Sampling())
    for _ in range(1000):
        next(stream)
    mx.clear_cache()
    before = mx.get_active_memory() - sum(layer.nbytes for layer in session.cache)
    for _ in stream:
        pass
    mx.clear_cache()
    after = mx.get_active_memory() - sum(layer.nbytes for layer in session.cache)
    assert session.cache[0].offset == len(PROMPT) + 20_000 - 1
    assert after - before < 200_000
    room = session.cache[0].keys[0].shape[2]
    assert room < 1.3 * session.cache[0].offset
