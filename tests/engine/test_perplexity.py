"""Perplexity and divergence, against the obvious computation, a prefix at a time."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import minicpm_mlx as mm
from minicpm_mlx import load_model
from minicpm_mlx.engine.scoring import perplexity
from minicpm_mlx.engine.scoring.perplexity import score, windows
from minicpm_mlx.errors import InvalidArgumentError, NumericsError
from support.data import GOLDEN
from support.random_models import random_model


@given(count=st.integers(2, 200), context=st.integers(2, 50), stride=st.integers(1, 50))
def test_every_token_that_can_be_is_predicted_once(count: int, context: int, stride: int) -> None:
    stride = min(stride, context)
    predicted: list[int] = []
    for begin, end, first in windows(count, context, stride):
        assert begin < first < end <= begin + context
        predicted += range(first, end)
    assert predicted == sorted(set(predicted))
    left = set(range(1, count)) - set(predicted)
    if stride < context:
        assert not left
    else:  # the first of each window has nothing before it
        assert left == set(range(stride, count, stride))


@given(count=st.integers(2, 200), context=st.integers(2, 50), stride=st.integers(1, 50))
def test_with_a_start_token_all_tokens_are_predicted(count: int, context: int, stride: int) -> None:
    stride = min(stride, context - 1)
    predicted: list[int] = []
    for begin, end, first in windows(count, context, stride, bos=True):
        assert begin <= first < end < begin + context
        predicted += range(first, end)
    assert predicted == list(range(count))


@pytest.mark.parametrize("bos", [None, 1])
@pytest.mark.parametrize(("context", "stride"), [(64, None), (16, None), (16, 5), (16, 15)])
def test_each_token_is_predicted_from_its_window(
    context: int, stride: int | None, bos: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(perplexity, "LOGIT_ROWS", 7)
    model: Any = load_model(GOLDEN / "minicpm_2b_like", fuse=True)
    other = random_model()
    ids = np.random.default_rng(0).integers(0, 500, 50).tolist()
    losses, divergences, same = [], [], []
    start = [] if bos is None else [bos]
    usual = context - len(start)
    for begin, end, first in windows(len(ids), context, stride or usual, bos=bool(start)):
        for at in range(first, end):
            p, q = (m(mx.array([start + ids[begin:at]]))[0, -1] for m in (other, model))
            p, q = (np.array(x - mx.logsumexp(x), np.float64) for x in (p, q))
            losses.append(-q[ids[at]])
            divergences.append((np.exp(p) * (p - q)).sum())
            same.append(p.argmax() == q.argmax())
    told: list[int] = []
    found = score(
        *(model, ids),
        **{"context": context, "stride": stride, "bos": bos},
        reference=other,
        progress=told.append,
    )
    assert (found.context, found.stride) == (min(context, 50 + len(start)), stride or usual)
    assert found.bos == bool(start)
    assert found.tokens == len(losses) == told[-1]
    assert found.loss == pytest.approx(np.mean(losses), rel=1e-4)
    assert found.perplexity == pytest.approx(np.exp(np.mean(losses)), rel=1e-3)
    assert found.kl == pytest.approx(np.mean(divergences), rel=1e-3)
    assert found.kl_99 == pytest.approx(sorted(divergences)[int(0.99 * (len(same) - 1))], rel=1e-3)
    assert found.top_1 == pytest.approx(np.mean(same))


def test_a_model_is_not_far_from_itself() -> None:
    model: Any = load_model(GOLDEN / "minicpm_2b_like", fuse=True)
    found = score(model, list(range(40)), reference=model)
    assert found.kl == pytest.approx(0, abs=1e-6)
    assert found.top_1 == 1


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        ([1], {}, "two tokens"),
        ([1, 2], {"context": 0}, "context must be 1 or more"),
        ([1, 2], {"context": 1}, "context must be 2 or more, got 1"),
        ([1, 512], {}, r"ids outside 0\.\.511"),
        ([-1, 2], {}, "ids outside"),
        ([1, 2], {"context": 4, "stride": 5}, "at most the context"),
    ],
)
def test_what_cannot_be_scored_is_named(
    ids: list[int], options: dict[str, int], message: str
) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        score(random_model(), ids, **options)


def test_a_reference_of_another_vocabulary_is_refused() -> None:
    with pytest.raises(
        InvalidArgumentError, match="reference predicts 520 tokens and the model 512"
    ):
        score(random_model(), [1, 2, 3], reference=random_model(vocab_size=520))


def test_a_model_that_gives_no_numbers_is_named() -> None:
    broken: Any = random_model()
    broken.model.norm.weight = broken.model.norm.weight * float("nan")
    with pytest.raises(NumericsError, match="NaN"):
        score(broken, [1, 2, 3])
    with pytest.raises(NumericsError, match="NaN"):
        score(random_model(), [1, 2, 3], reference=broken)


@pytest.mark.parametrize("change", [1e-4, 1e-2, 1.0, 300.0])
def test_a_divergence_is_never_negative_and_is_that_of_double_precision(change: float) -> None:
    random = np.random.default_rng(0)
    logits = random.normal(size=(40, 500)) * 4
    truth, other = (
        (values - np.logaddexp.reduce(values, axis=-1, keepdims=True)).astype(np.float32)
        for values in (logits, logits + change * random.normal(size=logits.shape))
    )
    found = np.array(perplexity._divergence(mx.array(truth), mx.array(other)))
    p, q = truth.astype(np.float64), other.astype(np.float64)
    wanted = (np.exp(p) * (np.expm1(q - p) - (q - p))).sum(axis=-1)
    assert (found >= 0).all()
    np.testing.assert_allclose(found, wanted, rtol=1e-2, atol=1e-12)


def test_a_loss_beyond_all_numbers_is_infinite_perplexity() -> None:
    assert perplexity.PerplexityScore(
        tokens=1, context=2, stride=2, loss=710.0
    ).perplexity == float("inf")


def test_the_command_says_it_for_people_and_programs(
    tiny: mm.LM,
    tmp_path: Path,
    command: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, text = str(tiny.folder), tmp_path / "text.txt"
    text.write_text("The capital of France is Paris. The capital of Italy is Rome. " * 3)
    short = ["--text", str(text), "--limit", "30", "--context", "20", "--stride", "10"]
    assert command("ppl", "--model", model, *short, "--json") == 0
    alone = json.loads(capsys.readouterr().out)
    assert (alone["tokens"], alone["kl"]) == (29, None)
    assert alone["perplexity"] > 1
    assert command("ppl", "--model", model, *short, "--reference", model) == 0
    out = capsys.readouterr().out
    assert f"perplexity {alone['perplexity']:.4f}" in out
    assert "KL 0.00000" in out
    assert "100.00%" in out
    assert (alone["context"], alone["stride"], alone["bos"]) == (20, 10, False)
    assert command("ppl", "--model", "minicpm-2b-dpo", "--text", str(text), "--context", "1") == 1
    assert "context must be 2 or more" in capsys.readouterr().err  # before a model is loaded
    assert command("ppl", "--model", model, "--text", str(tmp_path / "none.txt")) == 1
    text.write_bytes(b"\xff\xfe")
    assert command("ppl", "--model", model, "--text", str(text)) == 1
    err = capsys.readouterr().err
    assert "none.txt: No such file" in err
    assert "not utf-8" in err


def test_each_window_of_the_command_begins_with_the_familys_start_token(
    tiny: mm.LM,
    tmp_path: Path,
    command: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """llama-perplexity's chunks begin with it; text comes from standard input."""
    folder = tmp_path / "model"
    shutil.copytree(str(tiny.folder), folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    lm = mm.load(folder)
    bos, text = lm.tokenizer.bos_id, "The capital of France is Paris. " * 3
    ids = lm.tokenizer.encode(text, add_bos=False)
    expected = score(lm.model, ids, context=16, bos=bos)
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    line = ("ppl", "--model", str(folder), "--text", "-", "--json")
    assert command(*line, "--context", "16") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["tokens"], found["bos"], found["stride"]) == (len(ids), True, 15)
    assert found["loss"] == pytest.approx(expected.loss, rel=1e-5)
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    assert command(*line, "--no-bos") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["tokens"], found["bos"]) == (len(ids) - 1, False)
    assert found["context"] == min(len(ids), lm.context_length)  # what was used, not the default
