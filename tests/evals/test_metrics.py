"""Metrics, by hand."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minicpm_mlx.evals.scoring.metrics import (
    exact_match,
    in_match,
    mean_loss_past_prefix,
    prefix_match,
    qa_match,
    smallest,
    total_loss,
)


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("(B)", 1),
        ("\n (B) because", 1),
        ("B", 0),
        ("The answer is (B).", 0),
        ("（B）", 0),
        ("(A)(B)", 0),
        ("", 0),
    ],
)
def test_prefix_match(reply: str, score: int) -> None:
    assert prefix_match(reply, "(B)") == score


@pytest.mark.parametrize(
    ("reply", "gold", "score"),
    [
        ("] >", "]>", 1),
        (" 12 ", "12", 1),
        ("12.0", "12", 0),
        ("", "", 0),
        ("  ", "12", 0),
    ],
)
def test_exact_match(reply: str, gold: str, score: int) -> None:
    assert exact_match(reply, gold) == score


@pytest.mark.parametrize(
    ("reply", "score"),
    [("(B)", 1), ("b", 1), ("(b) ", 1), ("(A) or (B)", 0), ("b)", 0), ("", 0)],
)
def test_in_match(reply: str, score: int) -> None:
    assert in_match(reply, ("(B)", "B")) == score


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("(B)", 1),
        ("(B).", 1),
        ("B.", 1),
        ("B because it shines", 1),
        ("\n(B)\nand (A)", 1),
        ("The answer is (B).", 0),
        ("（B）", 0),
        ("(A)", 0),
        ("the sun", 1),
        ("the sun, of course", 1),
        ("the moon", 0),
        ("What shines by day? the sun", 1),
        ("What shines by day?\nthe moon", 0),
        ("What shines by day? What shines by day? the sun", 0),  # one repetition is taken off
        ("", 0),
    ],
)
def test_qa_match(reply: str, score: int) -> None:
    assert qa_match(reply, "(B)", "the sun", "What shines by day?") == score


def test_an_option_without_text_is_not_found_everywhere() -> None:
    assert qa_match("anything", "(B)", "", "q") == 0


def test_the_sum_is_not_normalised_by_length() -> None:
    losses = total_loss([[-1.0, -1.0, -1.0], [-2.5]])
    assert losses == [3.0, 2.5]
    assert smallest(losses) == 1


def test_a_prefix_equal_for_all_options_does_not_count() -> None:
    # A mean over all would choose the second: (9 + 1)/2 = 5 against (9 + 2 + 2)/3 = 4.3.
    losses = mean_loss_past_prefix([[-9.0, -1.0], [-9.0, -2.0, -2.0]])
    assert losses == [1.0, 2.0]


def test_only_leading_tokens_are_a_prefix() -> None:
    assert mean_loss_past_prefix([[-1.0, -3.0, -1.0], [-1.0, -2.0, -1.0]]) == [2.0, 1.5]


def test_what_is_not_a_number_is_never_chosen() -> None:
    for loss in (total_loss, mean_loss_past_prefix):
        losses = loss([[math.nan, -1.0], [-9.0, -9.0]])
        assert losses[0] == math.inf
        assert smallest(losses) == 1


def test_an_option_that_is_all_prefix_is_never_chosen() -> None:
    assert mean_loss_past_prefix([[-1.0], [-1.0, -50.0]]) == [math.inf, 50.0]


def test_of_equals_the_first_is_chosen() -> None:
    assert smallest([2.0, 1.0, 1.0]) == 1


@given(st.lists(st.lists(st.floats(-50, 0), min_size=1, max_size=6), min_size=2, max_size=5))
def test_a_longer_common_prompt_changes_no_choice(options: list[list[float]]) -> None:
    longer = [[-0.25, -7.0, *option] for option in options]
    assert mean_loss_past_prefix(longer) == mean_loss_past_prefix(options)
    for more, plain in zip(total_loss(longer), total_loss(options), strict=True):
        assert more == pytest.approx(plain + 7.25)
