"""Shows training data for `--dry-run`: its format, lengths, and the tokens that are learned."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..render.theme import console

if TYPE_CHECKING:
    from minicpm_mlx.text.tokenizer import Tokenizer
    from minicpm_mlx.train.data.dataset import Data
    from minicpm_mlx.train.data.preview import Bin, Span

BAR = 24
"""Characters of the longest bar."""

HEAD, TAIL = 400, 120
"""Characters shown of a long span."""

LISTED = 5
"""Bad rows that are shown."""


def show(data: Data, tokenizer: Tokenizer) -> None:
    """Prints statistics of `data`, and its first sample with the learned tokens marked."""
    from minicpm_mlx.train.data.preview import overview

    summary = overview(data, tokenizer)
    out = console()
    out.print(f"{data.format} ({_KINDS[data.kind]})", style="title")
    for split, counts in summary["counts"].items():
        _counts(split, counts)
    for note in data.notes:
        out.print(f"note: {note}", style="warning")
    _list("too long", data.overlong)
    _list("bad", data.bad)
    out.print("\ntokens a training sample", style="title")
    _bars(summary["histogram"])
    for number, sample in enumerate(summary["sample"]):
        title = ("chosen", "rejected")[number] if len(summary["sample"]) > 1 else "first sample"
        _sample(title, sample)


_KINDS = {"sft": "examples to imitate", "preference": "preferences", "kto": "judged replies"}


def _counts(split: str, counts: dict[str, int]) -> None:
    share = counts["targets"] / counts["tokens"] if counts["tokens"] else 0.0
    console().print(
        f"{split}: {counts['samples']} samples of {counts['rows']} rows, {counts['tokens']} "
        f"tokens, {counts['targets']} of them learned ({share:.0%})"
    )
    problems = {name: counts[name] for name in ("truncated", "dropped", "split", "bad")}
    if any(problems.values()):
        text = ", ".join(f"{count} {name}" for name, count in problems.items() if count)
        console().print(f"  {text}", style="warning")


def _list(label: str, lines: tuple[str, ...]) -> None:
    for line in lines[:LISTED]:
        console().print(f"{label}: {_visible(line)}", style="quiet")
    if len(lines) > LISTED:
        console().print(f"{label}: {len(lines) - LISTED} more", style="quiet")


def _bars(bins: list[Bin]) -> None:
    most = max(count for _, _, count in bins)
    width = len(f"{bins[-1][0]}–{bins[-1][1]}")
    for low, high, count in bins:
        name = f"{low}–{high}" if low < high else f"{low}"
        bar = "█" * max(round(count / most * BAR), bool(count))
        console().print(f"  {name:>{width}}  {bar}{' ' if bar else ''}{count}")


def _sample(title: str, sample: list[Span]) -> None:
    """Prints a sample, its learned tokens in colour, or between ⟦ and ⟧ without colours."""
    out = console()
    coloured = out.is_terminal and not out.no_color
    mark = "green" if coloured else "in ⟦⟧"
    out.print(f"\n{title} (learned tokens are {mark})", style="title")
    text: Any = out.render_str("", markup=False, highlight=False, emoji=False)
    for span, is_learned in sample:
        shown = _visible(_short(span))
        if is_learned and not coloured:
            shown = f"⟦{shown}⟧"
        text.append(shown, style="good" if is_learned else "quiet")
    out.print(text)


def _short(text: str) -> str:
    omitted = len(text) - HEAD - TAIL
    return text if omitted <= 40 else f"{text[:HEAD]} … {omitted} characters … {text[-TAIL:]}"


def _visible(text: str) -> str:
    """Escapes control characters as Python does, since a terminal would obey them."""
    return "".join(
        c if c.isprintable() or c in _HARMLESS else c.encode("unicode_escape").decode()
        for c in text
    )


_HARMLESS = "\n\t\u3000\u00a0\u200d"
"""Not printable to Python, but common in texts: spaces, and the joiner of emoji."""
