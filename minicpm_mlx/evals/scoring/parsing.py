"""From a reply to what is scored, for code, GSM8K and BBH; UltraEval's rules, in our words.

Without stop strings a model often goes on after its answer, so the rules cut first.
"""

from __future__ import annotations

import re

__all__ = [
    "bbh_answer",
    "grade_school_number",
    "humaneval_body",
    "mbpp_code",
    "next_definition",
    "stated_number",
]

_NEXT_DEFINITION = re.compile(r"\n(?:class|def|#|@|print|if)|<\|endoftext\|>")
_STATED_NUMBER = re.compile(r"#### (-?[0-9.,]+)")


def next_definition(reply: str) -> re.Match[str] | None:
    """Where a reply first leaves the function it was to complete."""
    return _NEXT_DEFINITION.search(reply)


def stated_number(reply: str) -> re.Match[str] | None:
    """The first "#### 12" of a reply."""
    return _STATED_NUMBER.search(reply)


def humaneval_body(reply: str) -> str:
    """The reply up to the first line that leaves the function it was to complete."""
    found = next_definition(reply)
    return reply[: found.start()] if found else reply


def mbpp_code(reply: str) -> str:
    """The reply without the next problem, whose docstring the model makes up.

    With an odd number of triple quotes: all before the first. With an even number they are pairs,
    and all before the first pair that a `def` follows is kept; where none follows, everything.
    """
    quotes = [match.start() for match in re.finditer('"""', reply)]
    if len(quotes) % 2:
        return reply[: quotes[0]].strip()
    for start, end in zip(quotes[::2], quotes[1::2], strict=True):
        if "def" in reply[end:]:
            return reply[:start].strip()
    return reply.strip()


def grade_school_number(reply: str) -> str:
    """The number that a solution in GSM8K's manner arrives at.

    That after "#### ", else the first word after the last ">>" (of "<<3*4=12>>12"), else that after
    the last "=", else the last word of digits alone, else the reply as it is.
    """
    if stated := stated_number(reply):
        return stated[1].replace(",", "")
    for mark in (">>", "="):
        _, found, rest = reply.rpartition(mark)
        if found and (words := rest.split()):
            return words[0].strip("$").replace(",", "").rstrip(".").strip()
    return next((word for word in reversed(reply.split()) if word.isdigit()), reply.strip())


def bbh_answer(reply: str) -> str:
    """Of the first paragraph, what follows the last words that announce an answer."""
    text = reply.strip().split("\n\n")[0].strip()
    for announcement in ("So the answer is", "answer is", "答案是"):
        _, found, rest = text.rpartition(announcement)
        if found:
            text = rest.strip()
            if announcement.startswith("So"):  # the sentence that the examples end with
                text = text.rstrip(".").strip()
    return text
