"""Answers of MATH problems, made comparable as text.

Two published normalisations, one after the other: that of Minerva (Lewkowycz et al. 2022,
arXiv:2206.14858, appendix D.1) and that of MATH (Hendrycks et al. 2021, arXiv:2103.03874).
The order of their steps matters; each is written from its description. One liberty: MATH's renaming
of commands comes first, as Minerva removes words ("ft" for feet) from the middle of \\left.
"""

from __future__ import annotations

import re

__all__ = ["boxed", "final_answer"]

_CONCLUSIONS = ("final answer", "therefore", "thus", "hence")

_REPLACED = (
    ("an ", ""),
    ("a ", ""),
    (".$", "$"),
    (r"\$", ""),
    (r"\ ", ""),
    (" ", ""),
    ("mbox", "text"),
    (r",\text{and}", ","),
    (r"\text{and}", ","),
    (r"\text{m}", r"\text{}"),
    (r"\leq", "<"),
    (r"\le", "<"),
)
_WORDS = [
    "square",
    "ways",
    "integers",
    "dollars",
    "mph",
    "inches",
    "ft",
    "hours",
    "km",
    "units",
    "\\ldots",
    "sue",
    "points",
    "feet",
    "minutes",
    "digits",
    "cents",
    "degrees",
    "cm",
    "gm",
    "pounds",
    "meters",
    "meals",
    "edges",
    "students",
    "childrentickets",
    "multiples",
]
_MARKS = (
    *(r"\text{s}", r"\text{.}", "\\text{\ns}", r"\text{}^2", r"\text{}^3", "\\text{\n}"),
    *(r"\text{}", r"\mathrm{th}", r"^\circ", r"^{\circ}", r"\;", r",\!", "{,}", '"', r"\dots"),
    *("\n", "\r", "\f"),
)
"""Removed one after the other: what one leaves behind may be the next."""

_WRAPPED = tuple(re.compile(rf"\\{name}\{{(.*?)\}}") for name in ("text", "textbf", "overline"))
_BOXED = re.compile(r"\\boxed\{(.*)\}")
_INNERMOST = (
    re.compile(r"finalansweris(.*)"),
    re.compile(r"oxed\{(.*?)\}"),
    re.compile(r"\$(.*?)\$"),
)


def final_answer(text: str) -> str:
    """The answer of a solution, or of the inside of its box, in normal form.

    From the last line up, the first sentence that concludes something; else the text before the
    first full stop. As sentences end at every full stop, so do decimal numbers: 3.14 becomes 3, on
    both sides of a comparison.
    """
    answer = _minerva(_conclusion(text))
    try:
        return _hendrycks(answer)
    except ValueError:
        return answer


def boxed(solution: str) -> str | None:
    r"""What the last \boxed{…} or \fbox{…} of a worked solution holds; None where there is none."""
    for command in (r"\boxed", r"\fbox"):
        _, found, rest = solution.rpartition(command)
        if found:
            break
    else:
        return None
    if rest.startswith(" "):  # "\boxed 5", up to the end of the formula
        return re.split(r"[$\n]", rest, maxsplit=1)[0].strip()
    depth = 0
    for place, character in enumerate(rest):
        depth += (character == "{") - (character == "}")
        if not depth:
            return rest[1:place] if place else None
    return None


def _conclusion(text: str) -> str:
    for line in reversed(text.split("\n")):
        for sentence in line.split("."):
            if any(word in sentence.lower() for word in _CONCLUSIONS):
                return sentence
    return text.split(".")[0]


def _minerva(answer: str) -> str:
    answer = _commands(answer)
    for before, after in _REPLACED:
        answer = answer.replace(before, after)
    for removed in (*_WORDS, *_MARKS):
        answer = answer.replace(removed, "")
    for wrapper in (*_WRAPPED, _BOXED):
        answer = wrapper.sub(r"\1", answer)
    for inner in _INNERMOST:
        if found := inner.findall(answer):
            answer = found[-1]
    answer = answer.strip()
    # A reply may have lost its backslashes, and the f with them as a form feed.
    if "rac" in answer and r"\frac" not in answer:
        answer = answer.replace("rac", r"\frac")
    answer = re.sub("frac([^{])([^{])", r"frac{\1}{\2}", answer)
    answer = re.sub("sqrt([^{])", r"sqrt{\1}", answer).replace("$", "")
    digits = answer.replace(",", "")
    return digits if digits.isdigit() else answer


def _hendrycks(answer: str) -> str:
    """ValueError where units or a fraction make no sense."""
    for removed in ("\n", r"\!"):
        answer = answer.replace(removed, "")
    answer = _commands(answer.replace("\\\\", "\\"))
    for removed in (r"^{\circ}", r"^\circ", r"\$"):
        answer = answer.replace(removed, "")
    if (units := answer.count(r"\text{ ")) > 1:
        raise ValueError(f"expected units once, found them {units} times")
    answer = answer.split(r"\text{ ")[0].replace(r"\%", "")
    answer = answer.replace(" .", " 0.").replace("{.", "{0.")
    if answer.startswith("."):
        answer = "0" + answer
    name, equals, value = answer.partition("=")
    if equals and "=" not in value and len(name) <= 2:  # "x=5", "k =5"
        answer = value
    answer = _fractions(_roots(answer).replace(" ", ""))
    return _slash(r"\frac{1}{2}" if answer == "0.5" else answer)


def _commands(answer: str) -> str:
    r"""Every fraction as \frac, and brackets of every size as plain ones."""
    answer = answer.replace("tfrac", "frac").replace("dfrac", "frac")
    return answer.replace(r"\left", "").replace(r"\right", "")


def _roots(answer: str) -> str:
    r"""\sqrt3 as \sqrt{3}."""
    first, *rest = answer.split(r"\sqrt")
    if not all(rest):
        raise ValueError(r"expected a number under \sqrt, found the end")
    braced = [part if part[0] == "{" else f"{{{part[0]}}}{part[1:]}" for part in rest]
    return r"\sqrt".join([first, *braced])


def _fractions(answer: str) -> str:
    r"""\frac12 and \frac1{2} as \frac{1}{2}."""
    first, *rest = answer.split(r"\frac")
    if not all(rest):
        raise ValueError(r"expected two numbers after \frac, found the end")
    if any(len(part) < 2 for part in rest if part[0] != "{"):
        return answer
    return r"\frac".join([first, *map(_braced, rest)])


def _braced(part: str) -> str:
    over, under = part[0], part[1:2]
    if over == "{":
        return part
    return f"{{{over}}}{part[1:]}" if under == "{" else f"{{{over}}}{{{under}}}{part[2:]}"


def _slash(answer: str) -> str:
    r"""3/4 as \frac{3}{4}, of plain integers alone."""
    if plain := re.fullmatch(r"(0|-?[1-9][0-9]*)/(0|-?[1-9][0-9]*)", answer):
        return rf"\frac{{{plain[1]}}}{{{plain[2]}}}"
    return answer
