"""Normalises answers of MATH problems, so that they can be compared as text.

Applies two published normalisations in turn: Minerva's (Lewkowycz et al. 2022, arXiv:2206.14858,
appendix D.1) and MATH's (Hendrycks et al. 2021, arXiv:2103.03874). Both are written from their
descriptions, and the order of the steps matters. One deviation: MATH's renaming of commands comes
first, as Minerva removes words ("ft" for feet) from the middle of \\left.
"""

from __future__ import annotations

import re

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
_WORDS = (
    *("square", "ways", "integers", "dollars", "mph", "inches", "ft", "hours", "km", "units"),
    *("\\ldots", "sue", "points", "feet", "minutes", "digits", "cents", "degrees", "cm", "gm"),
    *("pounds", "meters", "meals", "edges", "students", "childrentickets", "multiples"),
)
_MARKS = (
    *(r"\text{s}", r"\text{.}", "\\text{\ns}", r"\text{}^2", r"\text{}^3", "\\text{\n}"),
    *(r"\text{}", r"\mathrm{th}", r"^\circ", r"^{\circ}", r"\;", r",\!", "{,}", '"', r"\dots"),
    *("\n", "\r", "\f"),
)
"""Removed in this order: removing one may produce the next."""

_WRAPPED = tuple(re.compile(rf"\\{name}\{{(.*?)\}}") for name in ("text", "textbf", "overline"))
_BOXED = re.compile(r"\\boxed\{(.*)\}")
_INNERMOST = (
    re.compile(r"finalansweris(.*)"),
    re.compile(r"oxed\{(.*?)\}"),
    re.compile(r"\$(.*?)\$"),
)


def final_answer(text: str) -> str:
    """The normal form of a solution's answer, or of the content of its box.

    Searches from the last line up for a sentence that concludes something; without one, takes the
    text before the first full stop. Every full stop ends a sentence, so 3.14 becomes 3, on both
    sides of a comparison.
    """
    answer = _minerva(_conclusion(text))
    try:
        return _hendrycks(answer)
    except ValueError:
        return answer


def boxed(solution: str) -> str | None:
    r"""The content of the last \boxed{…} or \fbox{…} of a solution; None where there is none."""
    for command in (r"\boxed", r"\fbox"):
        if command in solution:
            rest = solution.rpartition(command)[2]
            break
    else:
        return None
    if rest.startswith(" "):  # "\boxed 5", up to the end of the formula
        return re.split(r"[$\n]", rest, maxsplit=1)[0].strip()
    depth = 0
    for index, character in enumerate(rest):
        depth += (character == "{") - (character == "}")
        if not depth:
            return rest[1:index] if index else None
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
        if matches := inner.findall(answer):
            answer = matches[-1]
    answer = answer.strip()
    # A reply may have lost its backslashes, and "\f" became a form feed, removed above.
    if "rac" in answer and r"\frac" not in answer:
        answer = answer.replace("rac", r"\frac")
    answer = re.sub("frac([^{])([^{])", r"frac{\1}{\2}", answer)
    answer = re.sub("sqrt([^{])", r"sqrt{\1}", answer).replace("$", "")
    digits = answer.replace(",", "")
    return digits if digits.isdigit() else answer


def _hendrycks(answer: str) -> str:
    """Raises ValueError for more than one unit, or a fraction or root without numbers."""
    for removed in ("\n", r"\!"):
        answer = answer.replace(removed, "")
    answer = _commands(answer.replace("\\\\", "\\"))
    for removed in (r"^{\circ}", r"^\circ", r"\$"):
        answer = answer.replace(removed, "")
    if (units := answer.count(r"\text{ ")) > 1:
        raise ValueError(f"expected one unit, found {units}")
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
    r"""Writes every fraction as \frac, and brackets of every size as plain ones."""
    answer = answer.replace("tfrac", "frac").replace("dfrac", "frac")
    return answer.replace(r"\left", "").replace(r"\right", "")


def _roots(answer: str) -> str:
    r"""Writes \sqrt3 as \sqrt{3}."""
    first, *rest = answer.split(r"\sqrt")
    if not all(rest):
        raise ValueError(r"expected a number under \sqrt, found the end")
    braced = [root if root[0] == "{" else f"{{{root[0]}}}{root[1:]}" for root in rest]
    return r"\sqrt".join([first, *braced])


def _fractions(answer: str) -> str:
    r"""Writes \frac12 and \frac1{2} as \frac{1}{2}."""
    first, *rest = answer.split(r"\frac")
    if not all(rest):
        raise ValueError(r"expected two numbers after \frac, found the end")
    if any(len(fraction) < 2 for fraction in rest if fraction[0] != "{"):
        return answer
    return r"\frac".join([first, *map(_braced, rest)])


def _braced(fraction: str) -> str:
    over, under = fraction[0], fraction[1:2]
    if over == "{":
        return fraction
    if under == "{":
        return f"{{{over}}}{fraction[1:]}"
    return f"{{{over}}}{{{under}}}{fraction[2:]}"


def _slash(answer: str) -> str:
    r"""Writes 3/4 as \frac{3}{4}, for plain integers only."""
    if match := re.fullmatch(r"(0|-?[1-9][0-9]*)/(0|-?[1-9][0-9]*)", answer):
        return rf"\frac{{{match[1]}}}{{{match[2]}}}"
    return answer
