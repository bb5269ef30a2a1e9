from __future__ import annotations

from collections import Counter
from typing import Any

import mlx.core as mx
import pytest

from minicpm_mlx.engine.sampling import NOT_A_NUMBER, Sampler, Sampling
from minicpm_mlx.errors import InvalidArgumentError
from minicpm_mlx.lm.sampling import sampling_with

LOGITS = mx.log(mx.array([[0.5, 0.25, 0.15, 0.07, 0.03]]))


def draw(count: int = 2000, **how: float) -> Counter[int]:
    sampler = Sampler(sampling_with(Sampling(temperature=1.0, seed=7), **how), [0], 5)
    return Counter(int(sampler(LOGITS).item()) for _ in range(count))


def test_temperature_zero_takes_the_likeliest() -> None:
    assert int(Sampler(Sampling(), [0], 5)(LOGITS).item()) == 0


def test_drawn_shares_follow_the_probabilities() -> None:
    shares = draw()
    for token, probability in enumerate([0.5, 0.25, 0.15, 0.07, 0.03]):
        assert abs(shares[token] / 2000 - probability) < 0.05


@pytest.mark.parametrize(
    ("how", "kept"),
    [
        ({"top_k": 2}, {0, 1}),
        ({"top_p": 0.5}, {0}),
        ({"top_p": 0.6}, {0, 1}),
        ({"top_p": 0.9}, {0, 1, 2}),
        ({"min_p": 0.3}, {0, 1, 2}),
        ({"top_k": 3, "min_p": 0.4}, {0, 1}),
        ({"top_k": 2**40}, {0, 1, 2, 3, 4}),
        ({"temperature": 1e-320}, {0}),
    ],
)
def test_filters_keep_exactly_the_tokens_they_should(how: dict[str, float], kept: set[int]) -> None:
    assert set(draw(600, **how)) == kept


def test_same_seed_same_tokens_and_another_seed_others() -> None:
    def tokens(seed: int) -> list[int]:
        sampler = Sampler(Sampling(temperature=1.0, seed=seed), [0], 5)
        return [int(sampler(LOGITS).item()) for _ in range(50)]

    assert tokens(1) == tokens(1)
    assert tokens(1) != tokens(2)


def test_no_seed_draws_a_new_one_each_time() -> None:
    def tokens() -> list[int]:
        sampler = Sampler(Sampling(temperature=1.0), [0], 5)
        return [int(sampler(LOGITS).item()) for _ in range(50)]

    assert tokens() != tokens()


def test_repetition_penalty_counts_prompt_and_reply() -> None:
    """As transformers does it: divided where positive, multiplied where negative."""
    logits = mx.array([[2.0, 1.9, -1.0, -1.05, -9.0]])
    sampler = Sampler(Sampling(repetition_penalty=1.1), [0], 5)
    assert int(sampler(logits).item()) == 1  # 2.0 / 1.1 < 1.9
    assert int(sampler(logits).item()) == 0  # now 1.9 / 1.1 < 2.0 / 1.1
    negative = mx.array([[-1.0, -1.05, -9.0, -9.0, -9.0]])
    assert int(Sampler(Sampling(repetition_penalty=1.1), [0], 5)(negative).item()) == 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nan_anywhere_in_the_logits_is_noticed(temperature: float) -> None:
    sampler = Sampler(Sampling(temperature=temperature, seed=0, top_p=0.9), [0], 3)
    assert int(sampler(mx.array([[1.0, float("nan"), 0.0]])).item()) == NOT_A_NUMBER


@pytest.mark.parametrize("row", [[1.0, float("inf"), 0.0], [-float("inf")] * 3])
@pytest.mark.parametrize("how", [{}, {"top_p": 0.9}, {"top_k": 2}, {"min_p": 0.1}], ids=str)
def test_logits_without_a_distribution_are_noticed(row: list[float], how: dict[str, Any]) -> None:
    sampler = Sampler(Sampling(temperature=1.0, seed=0, **how), [0], 3)
    assert int(sampler(mx.array([row])).item()) == NOT_A_NUMBER


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"min_p": 2.0},
        {"repetition_penalty": 0.0},
        {"seed": -1},
    ],
)
def test_values_out_of_range_are_refused_by_name(wrong: dict[str, float]) -> None:
    with pytest.raises(InvalidArgumentError, match=next(iter(wrong))):
        Sampling(**wrong)  # type: ignore[arg-type]
