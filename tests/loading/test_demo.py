"""The demo model: a real language model, so that what it says can be judged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import minicpm_mlx as mm
from support.data import need_shared

GREEDY = mm.Sampling()


def ask(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_it_knows_the_capital_of_france(demo: Any) -> None:
    reply = demo.generate(ask("What is the capital of France?"), max_tokens=24, sampling=GREEDY)
    assert reply.text == "The capital of France is Paris."
    assert reply.finish_reason == "stop"


def test_perplexity_on_wikitext_is_that_of_the_original(demo: Any) -> None:
    text = need_shared("corpora", "wikitext2-test.txt").read_text(encoding="utf-8")[:6000]
    ids = mx.array([demo.tokenizer.encode(text, add_bos=False)[:512]])
    logits = demo.model(ids)[:, :-1]
    chosen = mx.take_along_axis(logits, ids[:, 1:, None], axis=-1)[..., 0]
    perplexity = mx.exp((mx.logsumexp(logits, axis=-1) - chosen).mean()).item()
    assert perplexity == pytest.approx(20.31, abs=0.01)


def test_packed_weights_give_the_same_logits_as_unpacked_ones(
    demo: Any, demo_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minicpm_mlx.device.unpack_to", lambda dtype, parameters: None)
    packed = mm.load_model(demo_folder, fuse=True)
    ids = mx.array([[504, 3575, 282, 4649]])
    assert mx.abs(packed(ids) - demo.model(ids)).max().item() < 1e-3


def test_twin_says_the_same_as_the_fused_form(demo: Any, demo_folder: Path) -> None:
    twin = mm.load_model(demo_folder)
    ids = mx.array([demo.tokenizer.encode("The fox ran into the forest and")])
    assert mx.abs(twin(ids) - demo.model(ids)).max().item() < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("fuse", [False, True])
def test_sixteen_bits_stay_finite(demo: Any, demo_folder: Path, dtype: str, fuse: bool) -> None:
    """In muP form a feed-forward output of this model reaches 97,344; float16 ends at 65,504."""
    model = mm.load_model(demo_folder, dtype=dtype, fuse=fuse)
    ids = demo.tokenizer.encode("<|im_start|>user\nThe capital")
    logits = model(mx.array([ids]))
    assert mx.isfinite(logits).all().item()
    wanted = demo.model(mx.array([ids]))
    assert int(mx.argmax(logits[0, -1]).item()) == int(mx.argmax(wanted[0, -1]).item())


def test_embedding_is_stored_once(demo: Any) -> None:
    from minicpm_mlx.weights.load import parameters

    names = parameters(demo.model)
    assert not any(name.startswith("lm_head") for name in names)
    assert sum(a.size for a in names.values()) == pytest.approx(134.5e6, rel=0.01)
