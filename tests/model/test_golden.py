"""Every golden case, in both forms and through both ways of rotating, against the reference."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest

from minicpm_mlx import device, load_model
from minicpm_mlx.engine import KVCache, Session, generate
from support.data import CASES, GOLDEN

TOLERANCE = 1e-3
LONG = [
    case for case in CASES if "long_logits" in mx.load(str(GOLDEN / case / "golden.safetensors"))
]
BATCHED = [
    case
    for case in CASES
    if "batch_last_logits" in mx.load(str(GOLDEN / case / "golden.safetensors"))
]


@pytest.fixture(params=[False, True], ids=["reference", "fused"])
def fuse(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(params=[False, True], ids=["table", "kernel"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Rotate as on a CPU, by a table, or as on a GPU, by mx.fast.rope."""
    if request.param:
        monkeypatch.setattr(device, "on_cpu", lambda: False)
    return bool(request.param)


def golden(case: str) -> dict[str, mx.array]:
    return dict(mx.load(str(GOLDEN / case / "golden.safetensors")))


def load(case: str, fuse: bool) -> Any:
    return load_model(GOLDEN / case, dtype="float32", fuse=fuse)


def difference(found: mx.array, expected: mx.array) -> float:
    return float(mx.abs(found - expected).max().item())


def greedy_uncached(model: Any, ids: mx.array, count: int) -> list[int]:
    for _ in range(count):
        following = mx.argmax(model(ids)[:, -1:], axis=-1).astype(ids.dtype)
        ids = mx.concatenate([ids, following], axis=1)
    return list(ids[0, -count:].tolist())


def greedy_cached(model: Any, ids: mx.array, count: int, **options: Any) -> list[int]:
    return list(generate(model, ids[0].tolist(), max_tokens=count, **options))


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_the_reference(case: str, fuse: bool, kernel: bool) -> None:
    expected, model = golden(case), load(case, fuse)
    assert difference(model(expected["input_ids"]), expected["logits"]) <= TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_greedy_ids_equal_the_reference_with_and_without_cache(case: str, fuse: bool) -> None:
    expected, model = golden(case), load(case, fuse)
    ids, wanted = expected["input_ids"], expected["greedy_ids"][0].tolist()
    assert greedy_cached(model, ids, len(wanted)) == wanted
    assert greedy_uncached(model, ids, len(wanted)) == wanted


@pytest.mark.parametrize("case", CASES)
def test_logits_of_each_cached_step_equal_the_reference(case: str, fuse: bool) -> None:
    expected, model = golden(case), load(case, fuse)
    if "greedy_step_logits" not in expected:
        pytest.skip("this case has no step logits (the llama format of another)")
    cache = [KVCache() for _ in model.layers]
    ids = expected["input_ids"]
    for step, wanted in enumerate(expected["greedy_ids"][0].tolist()):
        logits = model(ids, cache=cache)[:, -1]
        assert difference(logits, expected["greedy_step_logits"][:, step]) <= TOLERANCE
        ids = mx.array([[wanted]])


@pytest.mark.parametrize("case", CASES)
def test_loss_equals_the_reference(case: str) -> None:
    expected, model = golden(case), load(case, fuse=True)
    ids = expected["input_ids"]
    logits = model(ids)[:, :-1]
    chosen = mx.take_along_axis(logits, ids[:, 1:, None], axis=-1)[..., 0]
    loss = (mx.logsumexp(logits, axis=-1) - chosen).mean()
    assert difference(loss, expected["loss"][0]) <= TOLERANCE


@pytest.mark.parametrize("case", BATCHED)
def test_left_padded_batch_equals_each_row_alone(case: str, fuse: bool) -> None:
    from mlx_lm.models.cache import BatchKVCache

    expected, model = golden(case), load(case, fuse)
    padding = (1 - expected["batch_attention_mask"]).sum(axis=1).tolist()
    cache = [BatchKVCache(padding) for _ in model.layers]
    last = model(expected["batch_input_ids"], cache=cache)[:, -1]
    assert difference(last, expected["batch_last_logits"]) <= TOLERANCE
    alone = model(expected["short_input_ids"])[:, -1]
    assert difference(alone, expected["short_last_logits"]) <= TOLERANCE


@pytest.mark.parametrize("case", LONG)
def test_text_beyond_the_rotation_threshold_equals_the_reference(
    case: str, fuse: bool, kernel: bool
) -> None:
    expected, model = golden(case), load(case, fuse)
    ids = expected["long_input_ids"]
    assert difference(model(ids), expected["long_logits"]) <= TOLERANCE
    cached = expected["long_greedy_cached_ids"][0].tolist()
    uncached = expected["long_greedy_nocache_ids"][0].tolist()
    assert greedy_cached(model, ids, len(cached)) == cached
    assert greedy_uncached(model, ids, len(uncached)) == uncached


@pytest.mark.parametrize("case", LONG)
def test_decoding_across_the_rotation_threshold_equals_the_reference(case: str, fuse: bool) -> None:
    expected, model = golden(case), load(case, fuse)
    wanted = expected["cross_greedy_cached_ids"][0].tolist()
    assert greedy_cached(model, expected["cross_input_ids"], len(wanted)) == wanted


@pytest.mark.parametrize("case", LONG)
def test_rows_of_a_batch_are_rotated_by_their_own_length(case: str, fuse: bool) -> None:
    """One row beyond the threshold, one below; the reference takes the longest for all."""
    from mlx_lm.models.cache import BatchKVCache

    expected, model = golden(case), load(case, fuse)
    long, short = expected["long_input_ids"], expected["short_input_ids"]
    padding = long.shape[1] - short.shape[1]
    padded = mx.concatenate([mx.zeros((1, padding), short.dtype), short], axis=1)
    cache = [BatchKVCache([0, padding]) for _ in model.layers]
    last = model(mx.concatenate([long, padded]), cache=cache)[:, -1]
    alone = mx.concatenate([model(long)[:, -1], model(short)[:, -1]])
    assert difference(last, alone) <= TOLERANCE


@pytest.mark.parametrize("chunk", [1, 7])
@pytest.mark.parametrize("case", CASES)
def test_prompt_read_in_chunks_equals_one_read(case: str, chunk: int) -> None:
    expected, model = golden(case), load(case, fuse=True)
    ids = expected.get("long_input_ids", expected["input_ids"])
    assert greedy_cached(model, ids, 8, chunk=chunk) == greedy_cached(model, ids, 8)


@pytest.mark.parametrize("case", CASES)
def test_reused_cache_does_not_change_the_answer(case: str) -> None:
    expected, model = golden(case), load(case, fuse=True)
    ids = expected.get("long_input_ids", expected["input_ids"])
    session = Session(model.config)
    greedy_cached(model, ids[:, :20], 5, session=session)  # below the threshold, then beyond it
    assert greedy_cached(model, ids, 8, session=session) == greedy_cached(model, ids, 8)
    assert greedy_cached(model, ids[:, :30], 8, session=session) == greedy_cached(
        model, ids[:, :30], 8
    )
