"""Log probabilities with what texts share computed once, against one pass over each text."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import minicpm_mlx as mm
from minicpm_mlx.convert.checkpoint import convert
from minicpm_mlx.engine.scoring.loglikelihood import Alternatives, score, shared_prefix_length
from minicpm_mlx.errors import ContextLengthError, InvalidArgumentError
from minicpm_mlx.evals.data.load import load
from minicpm_mlx.evals.option_scores import encode_options, loglikelihoods
from minicpm_mlx.evals.tasks import TASKS
from minicpm_mlx.weights import load_model
from support.data import CASES, GOLDEN, need_shared
from support.tiny_tokenizer import tiny


class Counting:
    """A model that counts the positions it reads."""

    def __init__(self, model: Any) -> None:
        self.model, self.config, self.adapter = model, model.config, None
        self.read: list[tuple[int, ...]] = []

    def hidden(self, ids: mx.array, cache: Any = None, length: int | None = None) -> mx.array:
        self.read.append(tuple(ids.shape))
        return self.model.hidden(ids, cache, length)

    def logits(self, hidden: mx.array) -> mx.array:
        return self.model.logits(hidden)


def whole(model: Any, text: Sequence[int], start: int) -> tuple[list[float], list[bool]]:
    """The slow twin: one pass over the text."""
    if len(text) < 2:
        return [], []
    logits = model.logits(model.hidden(mx.array([text])))[0].astype(mx.float32)
    logs = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
    places = range(max(start, 1), len(text))
    return (
        [float(logs[place - 1, text[place]]) for place in places],
        [bool(logs[place - 1].argmax() == text[place]) for place in places],
    )


def made_up(vocabulary: int, seed: int) -> list[Alternatives]:
    """Questions with and without a beginning in common, options of all lengths, none among them."""
    rng = random.Random(seed)

    def some(count: int) -> list[int]:
        return [rng.randrange(vocabulary) for _ in range(count)]

    heads, groups = [some(length) for length in (0, 50, 75)], []
    for number in range(21):
        head = heads[number // 7] + some(rng.randrange(20))
        texts = [head + some(rng.randrange(8)) for _ in range(rng.randrange(1, 5))]
        if rng.random() < 0.2:
            texts.append(head)
        groups.append(Alternatives(texts, 1 if rng.random() < 0.3 else shared_prefix_length(texts)))
    return [*groups, Alternatives([[3]]), Alternatives([[], [1, 2]]), Alternatives([])]


@pytest.mark.parametrize("case", CASES)
def test_scores_are_those_of_one_pass_over_each_text(case: str) -> None:
    model: Any = load_model(GOLDEN / case, fuse=True)
    groups = made_up(model.config.vocab_size, 1)
    expected = [[whole(model, text, group.start) for text in group.texts] for group in groups]
    for positions in (None, 7):
        found = dict(score(model, groups, positions=positions, context=1 << 20))
        assert sorted(found) == list(range(len(groups)))
        for place, rows in enumerate(expected):
            for scores, (logprobs, greedy) in zip(found[place], rows, strict=True):
                assert scores.logprobs == pytest.approx(logprobs, abs=1e-4), positions
                assert scores.greedy == greedy, positions


def test_the_twin_form_gives_the_same() -> None:
    groups = made_up(512, 2)
    found = [
        dict(score(load_model(GOLDEN / "minicpm_2b_like", fuse=fuse), groups))
        for fuse in (False, True)
    ]
    for place in found[0]:
        for a, b in zip(found[0][place], found[1][place], strict=True):
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)


def test_what_questions_share_is_read_once() -> None:
    model = Counting(load_model(GOLDEN / "minicpm_2b_like", fuse=True))
    head = list(range(3, 203))
    groups = []
    for number in range(20):
        texts = [[*head, 210 + number, 300, 10 + k, 20] for k in range(4)]
        groups.append(Alternatives(texts, shared_prefix_length(texts)))
    assert len(dict(score(model, groups))) == 20
    read = sum(rows * steps for rows, steps in model.read)
    assert read <= 200 + 20 * 3 + 20 * 4 * 2
    assert model.read[0] == (1, 200)


def test_prompt_and_option_are_one_text() -> None:
    tokenizer = tiny()
    ((*_, last),) = encode_options(tokenizer, "a >", ["="])
    assert last == tokenizer.backend.token_to_id(">=")  # a piece of both
    lists = encode_options(tokenizer, "a b ", ["c", "a", ">", ""])
    assert lists == [tokenizer.encode(text) for text in ("a b c", "a b a", "a b >", "a b ")]


def test_whole_texts_are_scored_for_a_loaded_model(demo: mm.LM) -> None:
    prompts = ["The capital of France is", "One, two, three,"]
    options = [[" Paris", " London, or so"], [" four"]]
    found = loglikelihoods(demo, prompts, options)
    for prompt, texts, rows in zip(prompts, options, found, strict=True):
        for text, row in zip(texts, rows, strict=True):
            logprobs, _ = whole(demo.model, demo.tokenizer.encode(prompt + text), 1)
            assert row == pytest.approx(logprobs, abs=5e-4)  # its activations are large
    assert sum(found[0][0]) > sum(found[0][1])
    with pytest.raises(InvalidArgumentError, match="2 prompts, got 1"):
        loglikelihoods(demo, prompts, [[]])


def test_texts_beyond_the_context_or_the_vocabulary_are_refused() -> None:
    model = load_model(GOLDEN / "minicpm_2b_like", fuse=True)
    with pytest.raises(ContextLengthError, match="9 tokens and the context is 8"):
        list(score(model, [Alternatives([[1] * 9])], context=8))
    with pytest.raises(InvalidArgumentError, match=r"outside 0\.\.511"):
        list(score(model, [Alternatives([[1, 512]])]))


def llama_of(demo_folder: Path, tmp_path: Path) -> Any:
    """transformers' Llama of the demo's weights, in float32."""
    reason = "the choices are compared with those of transformers on torch"
    torch = pytest.importorskip("torch", reason=reason)
    transformers = pytest.importorskip("transformers", reason=reason)
    convert(demo_folder, tmp_path / "llama", format="llama", dtype="float32", dequantize=True)
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "llama", dtype=torch.float32)

    def logprobs(texts: list[list[int]]) -> list[list[float]]:
        longest = max(map(len, texts))  # what is padded comes later, and is not looked at
        ids = torch.tensor([text + [0] * (longest - len(text)) for text in texts])
        with torch.no_grad():
            logs = torch.log_softmax(model(ids).logits, -1)
        return [
            [float(logs[row, place - 1, text[place]]) for place in range(1, len(text))]
            for row, text in enumerate(texts)
        ]

    return logprobs


@pytest.mark.slow
@pytest.mark.parametrize("name", ["arc_easy", "arc_challenge", "hellaswag"])
def test_choices_are_those_of_transformers(
    name: str, demo: mm.LM, demo_folder: Path, tmp_path: Path
) -> None:
    task, loaded = TASKS[name], load(TASKS[name], need_shared("evals"))
    reference = llama_of(demo_folder, tmp_path)
    questions = [task.question(item, mode="ppl") for item in loaded.docs[""]]
    lists = [encode_options(demo.tokenizer, one.prompt, one.options) for one in questions]
    found = dict(
        score(demo.model, [Alternatives(texts, shared_prefix_length(texts)) for texts in lists])
    )
    everything = loglikelihoods(
        demo, [one.prompt for one in questions], [one.options for one in questions]
    )
    for place, (question, texts) in enumerate(zip(questions, lists, strict=True)):
        theirs = reference(texts)
        for mine, known in zip(everything[place], theirs, strict=True):
            assert mine == pytest.approx(known, abs=1e-3)
        choice = task.choose(theirs, question)
        assert task.choose(everything[place], question) == choice
        assert task.choose([one.logprobs for one in found[place]], question) == choice
