"""Metrics, against results worked out by hand."""

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


def check(score: object, right: tuple[str, ...], wrong: tuple[str, ...]) -> None:
    assert callable(score)
    assert {reply: score(reply) for reply in right + wrong} == {
        **dict.fromkeys(right, 1.0),
        **dict.fromkeys(wrong, 0.0),
    }


def test_prefix_match() -> None:
    wrong = ("B", "The answer is (B).", "（B）", "(A)(B)", "")
    check(lambda reply: prefix_match(reply, "(B)"), ("(B)", "\n (B) because"), wrong)


def test_exact_match() -> None:
    check(lambda reply: exact_match(reply, "]>"), ("] >",), ("]", ""))
    check(lambda reply: exact_match(reply, "12"), (" 12 ",), ("12.0", "  "))
    assert exact_match("", "") == 0


def test_in_match() -> None:
    right, wrong = ("(B)", "b", "(b) "), ("(A) or (B)", "b)", "")
    check(lambda reply: in_match(reply, ("(B)", "B")), right, wrong)


def test_qa_match() -> None:
    question = "What shines by day?"
    right = ("(B)", "(B).", "B.", "B because it shines", "\n(B)\nand (A)", "the sun")
    right += ("the sun, of course", f"{question} the sun")
    wrong = ("The answer is (B).", "（B）", "(A)", "the moon", f"{question}\nthe moon", "")
    wrong += (f"{question} {question} the sun",)  # one repetition is removed
    check(lambda reply: qa_match(reply, "(B)", "the sun", question), right, wrong)
    assert qa_match("anything", "(B)", "", "q") == 0  # an option without text


def test_the_sum_is_not_normalised_by_length() -> None:
    losses = total_loss([[-1.0, -1.0, -1.0], [-2.5]])
    assert losses == [3.0, 2.5]
    assert smallest(losses) == 1


def test_a_prefix_equal_for_all_options_does_not_count() -> None:
    # A mean over all would choose the second: (9 + 1)/2 = 5 against (9 + 2 + 2)/3 = 4.3.
    assert mean_loss_past_prefix([[-9.0, -1.0], [-9.0, -2.0, -2.0]]) == [1.0, 2.0]
    # Only leading tokens are a prefix.
    assert mean_loss_past_prefix([[-1.0, -3.0, -1.0], [-1.0, -2.0, -1.0]]) == [2.0, 1.5]


def test_an_option_without_a_loss_is_never_chosen_and_the_first_of_equals_is() -> None:
    for loss in (total_loss, mean_loss_past_prefix):
        losses = loss([[math.nan, -1.0], [-9.0, -9.0]])
        assert losses[0] == math.inf
        assert smallest(losses) == 1
    assert mean_loss_past_prefix([[-1.0], [-1.0, -50.0]]) == [math.inf, 50.0]
    assert smallest([2.0, 1.0, 1.0]) == 1


@given(st.lists(st.lists(st.floats(-50, 0), min_size=1, max_size=6), min_size=2, max_size=5))
def test_a_longer_common_prompt_changes_no_choice(options: list[list[float]]) -> None:
    longer = [[-0.25, -7.0, *option] for option in options]
    assert mean_loss_past_prefix(longer) == mean_loss_past_prefix(options)
    for more, plain in zip(total_loss(longer), total_loss(options), strict=True):
        assert more == pytest.approx(plain + 7.25)
