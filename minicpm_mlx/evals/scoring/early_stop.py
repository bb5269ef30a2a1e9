"""Predicates that end a reply once nothing that follows can change its score.

UltraEval generates all 300 tokens of every reply; in most sets the first few decide. A predicate
here may return False for too long, but never True too early.
"""

from __future__ import annotations

import re

from ..question import Question
from .parsing import next_definition, stated_number


def as_long_as_gold(reply: str, question: Question) -> bool:
    """For prefix_match: the reply is as long as the answer, leading space aside."""
    return len(reply.lstrip()) >= len(question.gold.strip())


def after_paragraph(reply: str, question: Question) -> bool:
    """For answers read from the first paragraph alone: it has ended."""
    return "\n\n" in reply.lstrip()


def after_number(reply: str, question: Question) -> bool:
    """GSM8K: "#### 12" and something after it."""
    match = stated_number(reply)
    return match is not None and match.end() < len(reply)


def after_body(reply: str, question: Question) -> bool:
    """HumanEval: a line outside the function."""
    return next_definition(reply) is not None


def after_option(reply: str, question: Question, option: str, context: str) -> bool:
    """For qa_match: the first word is the letter, or the reply is longer than the option's text.

    A repetition of the `context` may come first.
    """
    text, option, context = reply.strip(), option.strip(), context.strip()
    word = re.match(r"[^ \n]*(?=[ \n])", text)
    if word is None:
        return False
    if word[0].rstrip(".") in (question.gold, question.gold.strip("()")):
        return True
    if context.startswith(text):  # it may become a repetition
        return False
    return len(text.removeprefix(context).lstrip()) >= len(option)
