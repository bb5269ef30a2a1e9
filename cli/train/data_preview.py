"""What `--dry-run` shows of training data: what was recognised, how long it is, what is learned."""

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
"""Characters shown of a long part of a sample."""

LISTED = 5
"""How many bad rows are shown."""


def show(data: Data, tokenizer: Tokenizer) -> None:
    """Print an account of `data`, and its first sample with what counts in it marked."""
    from minicpm_mlx.train.data.preview import overview

    found = overview(data, tokenizer)
    out = console()
    out.print(f"{data.format} ({_KINDS[data.kind]})", style="title")
    for split, counts in found["counts"].items():
        _counts(split, counts)
    for note in data.notes:
        out.print(f"note: {note}", style="warning")
    _listed("too long", data.overlong)
    _listed("bad", data.bad)
    out.print("\ntokens a training sample", style="title")
    _bars(found["histogram"])
    for number, sample in enumerate(found["sample"]):
        what = ("chosen", "rejected")[number] if len(found["sample"]) > 1 else "first sample"
        _sample(what, sample)


_KINDS = {"sft": "examples to imitate", "preference": "preferences", "kto": "judged replies"}


def _counts(split: str, counts: dict[str, int]) -> None:
    share = counts["targets"] / counts["tokens"] if counts["tokens"] else 0.0
    console().print(
        f"{split}: {counts['samples']} samples of {counts['rows']} rows, {counts['tokens']} "
        f"tokens, {counts['targets']} of them counted ({share:.0%})"
    )
    left = {name: counts[name] for name in ("truncated", "dropped", "split", "bad")}
    if any(left.values()):
        text = ", ".join(f"{count} {name}" for name, count in left.items() if count)
        console().print(f"  {text}", style="warning")


def _listed(what: str, lines: tuple[str, ...]) -> None:
    for line in lines[:LISTED]:
        console().print(f"{what}: {_visible(line)}", style="quiet")
    if len(lines) > LISTED:
        console().print(f"{what}: {len(lines) - LISTED} more", style="quiet")


def _bars(bins: list[Bin]) -> None:
    most = max(count for _, _, count in bins)
    wide = len(f"{bins[-1][0]}–{bins[-1][1]}")
    for low, high, count in bins:
        name = f"{low}–{high}" if low < high else f"{low}"
        bar = "█" * max(round(count / most * BAR), bool(count))
        console().print(f"  {name:>{wide}}  {bar}{' ' if bar else ''}{count}")


def _sample(title: str, sample: list[Span]) -> None:
    """A sample, with what counts in a colour, or between ⟦ and ⟧ where there are no colours."""
    out = console()
    coloured = out.is_terminal and not out.no_color
    how = "what counts is green" if coloured else "what counts is in ⟦⟧"
    out.print(f"\n{title} ({how})", style="title")
    text: Any = out.render_str("", markup=False, highlight=False, emoji=False)
    for part, counts in sample:
        shown = _visible(_short(part))
        if counts and not coloured:
            shown = f"⟦{shown}⟧"
        text.append(shown, style="good" if counts else "quiet")
    out.print(text)


def _short(text: str) -> str:
    left = len(text) - HEAD - TAIL
    return text if left <= 40 else f"{text[:HEAD]} … {left} characters … {text[-TAIL:]}"


def _visible(text: str) -> str:
    """Control characters as Python writes them: a terminal would obey those in somebody's data."""
    return "".join(
        c if c.isprintable() or c in _HARMLESS else c.encode("unicode_escape").decode()
        for c in text
    )


_HARMLESS = "\n\t\u3000\u00a0\u200d"
"""Not printable to Python, but part of texts: blanks, and what joins emoji."""
