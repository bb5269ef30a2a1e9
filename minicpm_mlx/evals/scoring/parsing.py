"""Extracts code, numbers and answers from replies, by UltraEval's rules.

Without stop strings a model often continues after its answer, so each rule cuts the reply first.
"""

from __future__ import annotations

import re

_NEXT_DEFINITION = re.compile(r"\n(?:class|def|#|@|print|if)|<\|endoftext\|>")
_STATED_NUMBER = re.compile(r"#### (-?[0-9.,]+)")


def next_definition(reply: str) -> re.Match[str] | None:
    """The first line outside the function that the reply completes."""
    return _NEXT_DEFINITION.search(reply)


def stated_number(reply: str) -> re.Match[str] | None:
    """The first "#### 12" of a reply."""
    return _STATED_NUMBER.search(reply)


def humaneval_body(reply: str) -> str:
    """The reply up to the first line outside the function that it completes."""
    match = next_definition(reply)
    return reply[: match.start()] if match else reply


def mbpp_code(reply: str) -> str:
    """The reply without the next problem, whose docstring the model invents.

    With an odd number of triple quotes, keeps all text before the first. With an even number, keeps
    all text before the first pair with a `def` after it; without such a pair, everything.
    """
    quotes = [match.start() for match in re.finditer('"""', reply)]
    if len(quotes) % 2:
        return reply[: quotes[0]].strip()
    for start, end in zip(quotes[::2], quotes[1::2], strict=True):
        if "def" in reply[end:]:
            return reply[:start].strip()
    return reply.strip()


def grade_school_number(reply: str) -> str:
    """The result of a solution in GSM8K's format.

    Takes the number after "#### ", else the first word after the last ">>" (of "<<3*4=12>>12"),
    else the first word after the last "=", else the last word of digits, else the whole reply.
    """
    if stated := stated_number(reply):
        return stated[1].replace(",", "")
    for mark in (">>", "="):
        _, separator, rest = reply.rpartition(mark)
        if separator and (words := rest.split()):
            return words[0].strip("$").replace(",", "").rstrip(".").strip()
    return next((word for word in reversed(reply.split()) if word.isdigit()), reply.strip())


def bbh_answer(reply: str) -> str:
    """The text after the last announcement of an answer in the first paragraph."""
    text = reply.strip().split("\n\n")[0].strip()
    for announcement in ("So the answer is", "answer is", "答案是"):
        _, separator, rest = text.rpartition(announcement)
        if separator:
            text = rest.strip()
            if announcement.startswith("So"):  # the last sentence of the examples
                text = text.rstrip(".").strip()
    return text
