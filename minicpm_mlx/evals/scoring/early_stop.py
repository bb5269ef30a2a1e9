"""When a reply can be left: nothing that follows could change its score.

UltraEval had every reply made to its 300 tokens, as it knew no end; of most sets the first few
decide. A predicate here may say no too long, and never yes too early.
"""

from __future__ import annotations

import re

from ..question import Question
from .parsing import next_definition, stated_number

__all__ = [
    "after_body",
    "after_name",
    "after_number",
    "after_paragraph",
    "as_long_as_gold",
]


def as_long_as_gold(reply: str, question: Question) -> bool:
    """prefix_match: as many characters as the answer has, leading space aside."""
    return len(reply.lstrip()) >= len(question.gold.strip())


def after_paragraph(reply: str, question: Question) -> bool:
    """What is read of the first paragraph alone: it has ended."""
    return "\n\n" in reply.lstrip()


def after_number(reply: str, question: Question) -> bool:
    """GSM8K: "#### 12" and something after it."""
    found = stated_number(reply)
    return found is not None and found.end() < len(reply)


def after_body(reply: str, question: Question) -> bool:
    """HumanEval: a line that leaves the function."""
    return next_definition(reply) is not None


def after_name(reply: str, question: Question, answer: str, asked: str) -> bool:
    """qa_match: its first word is the letter, or its beginning cannot be the `answer` as text, or
    is; a repetition of what was `asked` may come first."""
    text, answer, asked = reply.strip(), answer.strip(), asked.strip()
    word = re.match(r"[^ \n]*(?=[ \n])", text)
    if word is None:
        return False
    if word[0].rstrip(".") in (question.gold, question.gold.strip("()")):
        return True
    if asked.startswith(text):  # it may be a repetition
        return False
    rest = text.removeprefix(asked).lstrip()
    return len(rest) >= len(answer)
