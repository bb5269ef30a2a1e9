"""lm-eval's local-completions, unchanged; the guide's example runs a whole task."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
import pytest

import minicpm_mlx as mm

pytest.importorskip("fastapi")

if TYPE_CHECKING:
    from support.serving import Live

PAIRS = [
    ("The capital of France is", " Paris"),
    ("The capital of France is", " London, of course"),
    ("1 2 3 4", " 5 6"),
    ("Q: 你好\nA:", " 世界"),
    ("", "Hello there"),
]


def harness(server: Live, **options: Any) -> Any:
    pytest.importorskip("lm_eval")
    pytest.importorskip("tenacity")  # of lm-eval[api]
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    return LocalCompletionsAPI(base_url=f"{server.url}/v1/completions", model="demo", **options)


def requests(pairs: list[tuple[Any, ...]]) -> list[Any]:
    return [SimpleNamespace(args=pair) for pair in pairs]


def expected(demo: mm.LM, context: str, continuation: str) -> tuple[float, bool]:
    """What lm-eval means by log-likelihood, from one plain pass of the model."""
    tokenizer = demo.tokenizer
    # It reads an empty context as the end of the text before.
    before = tokenizer.encode(context) if context else [tokenizer.eos_ids[0]]
    whole = tokenizer.encode(context + continuation) if context else None
    after = whole[len(before) :] if whole else tokenizer.encode(continuation)
    ids = [*before, *after]
    logits = demo.model(mx.array([ids]))[0, len(before) - 1 : -1].astype(mx.float32)
    logprobs = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
    own = logprobs[np.arange(len(after)), after]
    return float(own.sum()), bool((own == logprobs.max(axis=1)).all())


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 4},
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"num_concurrent": 3}, marks=pytest.mark.slow),
        pytest.param({"tokenized_requests": False}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_loglikelihoods_are_those_of_the_models_logits(server, demo, options, monkeypatch):
    # Its progress bars would ask the terminal; its own tokenizer comes from the server.
    there = harness(server, tokenizer_backend="auto", **options)
    assert there.tokenizer_backend == "remote"
    # bos is what it puts before an empty context, and the demo's is not its end of text.
    monkeypatch.setattr(type(there.tokenizer), "bos_token", None)
    found = there.loglikelihood(requests(PAIRS), disable_tqdm=True)
    for (logprob, greedy), pair in zip(found, PAIRS, strict=True):
        own, best = expected(demo, *pair)
        assert logprob == pytest.approx(own, abs=2e-3)
        assert greedy == best
    assert found[0][1]
    assert not found[1][1]


def test_generation_stops_where_the_task_says(server, demo):
    asked = {"until": ["\n", ".", "?", "!", ";"], "max_gen_toks": 12}
    prompt = "The capital of France is"
    [text] = harness(server).generate_until(requests([(prompt, asked)]), disable_tqdm=True)
    assert text == demo.generate(prompt, max_tokens=12, stop=asked["until"]).text
