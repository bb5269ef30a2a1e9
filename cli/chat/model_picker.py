"""Chooses the model of a chat that names none: one that is on this disk, or from a short list."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from minicpm_mlx.errors import MiniCPMError, MissingPackageError, SessionError
from minicpm_mlx.loading.store import folder_of
from minicpm_mlx.model_cards import Card, cards

from ..models.tuning import tune_new
from ..options import DEFAULT_MODEL
from ..render.texts import Texts, gigabytes
from ..render.theme import console
from ..render.wrap import wrap
from ..streams import ask
from .conversation import is_here

if TYPE_CHECKING:
    from rich.text import Text

    from minicpm_mlx.bench.forecast import Forecast

INDENT = 4
GAP = 2


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A model in the list."""

    card: Card
    here: bool
    """It needs no download."""
    forecast: Forecast

    @property
    def usable(self) -> bool:
        return self.here or self.forecast.fits


def find_or_pick(texts: Texts) -> str | None:
    """The default model if it is on this disk, else the one there that was talked with last, else
    the only one; else the one that is picked from a list and downloaded. None: nothing is picked.

    The demo is on every disk and does not count. A download that fails is reported, and the list
    shown again.
    """
    kept = _kept()
    if (found := _talked_with(kept)) is not None:
        return found
    choices = _choices(kept)
    selected = next((i for i, choice in enumerate(choices) if choice.usable), len(choices) - 1)
    while (picked := _pick(choices, selected, texts)) is not None:
        selected, choice = picked, choices[picked]
        if choice.here or not choice.forecast.fits:  # the chat asks before such a download
            return choice.card.name
        try:
            if choice.card.repo is not None:
                size = gigabytes(choice.forecast.download)
                print(texts("absent", model=choice.card.name, gb=size), flush=True)
            tune_new(choice.card.name)
            folder_of(choice.card)
        except MiniCPMError as error:
            console().print(str(error), style="error")
            continue
        return choice.card.name
    return None


def _kept() -> dict[str, Card]:
    """Cards whose models are on this disk, by repository; the one that it is offered as."""
    kept: dict[str, Card] = {}
    for card in sorted(cards().values(), key=lambda card: (_rank(card), card.bits is None)):
        if card.repo is not None and is_here(card):
            kept.setdefault(card.repo, card)
    return kept


def _talked_with(kept: dict[str, Card]) -> str | None:
    """The model on this disk that an earlier chat, or its absence, leaves no doubt about."""
    from minicpm_mlx.lm import sessions

    default = cards()[DEFAULT_MODEL]
    if str(default.repo) in kept and is_here(default):
        return default.name
    if len(kept) == 1:
        return next(iter(kept.values())).name
    with suppress(SessionError):
        for saved in sessions.listed() if kept else ():
            card = cards().get(saved.model)
            if card is not None and card.repo in kept and is_here(card):
                return card.name
    return None


def _rank(card: Card) -> float:
    return float("inf") if card.offer is None else card.offer


def _choices(kept: dict[str, Card]) -> list[Choice]:
    """Those on this disk first, then what the cards offer, the demo last."""
    from minicpm_mlx.bench.forecast import forecast

    offered = [card for card in cards().values() if card.offer is not None]
    new = [card for card in offered if card.repo is not None and card.repo not in kept]
    demo = [card for card in offered if card.repo is None]
    listed = [*kept.values(), *sorted(new, key=_rank), *demo]
    return [
        Choice(
            card=card,
            here=card.repo in kept if card.repo is not None else _is_installed(card),
            forecast=forecast(card),
        )
        for card in listed
    ]


def _is_installed(card: Card) -> bool:
    from minicpm_mlx.loading.demo import source

    try:
        source(card)
    except MissingPackageError:
        return False
    return True


def _pick(choices: list[Choice], selected: int, texts: Texts) -> int | None:
    """Shows the list at the terminal; on a dumb one, asks for a number."""
    if not console().is_dumb_terminal:
        from .input.menu import choose

        return choose(lambda at: _drawn(choices, at, texts), len(choices), selected)
    for line in _lines(choices, None, texts)[0]:
        console().print(line)
    question = texts("pick.number", count=len(choices), default=selected + 1)
    while (answer := ask(question, file=sys.stdout)) is not None:
        if answer.lower()[:1] == "q":
            return None
        if not answer:
            return selected
        if answer.isdecimal() and 1 <= int(answer) <= len(choices):
            return int(answer) - 1
    return None


def _drawn(choices: list[Choice], selected: int, texts: Texts) -> tuple[str, int]:
    """The list with its escape sequences, and the line on which the selected entry begins."""
    from rich.text import Text

    lines, at = _lines(choices, selected, texts)
    lines.append(Text(texts("pick.keys"), style="quiet"))
    for line in lines:
        line.truncate(_width(), overflow="ellipsis")
    with console().capture() as captured:
        console().print(Text("\n").join(lines), no_wrap=True, overflow="ignore", end="")
    return captured.get(), at


def _width() -> int:
    return max(console().width - 1, 1)


def _lines(choices: list[Choice], selected: int | None, texts: Texts) -> tuple[list[Text], int]:
    """The lines of the list; all of the selected entry's text is shown, and of all without one."""
    from rich.cells import cell_len, set_cell_size
    from rich.text import Text

    names = ("model", "download", "memory", "speed", "languages")
    columns = list(zip(*(_cells(choice, texts) for choice in choices), strict=True))
    columns = [
        (texts(f"pick.{name}"), *cells)
        for name, cells in zip(names, columns, strict=True)
        if any(cells)  # the speed is known for Apple's chips alone
    ]
    widths = [max(map(cell_len, column)) + GAP for column in columns]
    rows = list(zip(*columns, strict=True))
    shown = len(columns)  # where the terminal is narrow, the others are in the lines below
    while shown > 1 and INDENT + sum(widths[:shown]) - GAP > _width():
        shown -= 1

    def row(cells: tuple[str, ...]) -> str:
        return "".join(map(set_cell_size, cells[:shown], widths)).rstrip()

    lines = [Text(texts("pick.title")), Text(" " * INDENT + row(rows[0]), style="quiet")]
    first = 0
    for index, (choice, cells) in enumerate(zip(choices, rows[1:], strict=True)):
        chosen = index == selected
        if chosen:
            first = len(lines)
        style = "title" if chosen else "" if choice.usable else "quiet"
        lines.append(Text(f"{'>' if chosen else ' '} {index + 1} {row(cells)}", style=style))
        about = texts.pick(choice.card.note, choice.card.note_zh)
        body = " · ".join(filter(None, [*cells[shown:], about]))
        room = max(_width() - INDENT, 2)
        wrapped = wrap(body, room) if chosen or selected is None else [body]
        lines += [Text(" " * INDENT + line, style="quiet") for line in wrapped]
    return lines, first


def _cells(choice: Choice, texts: Texts) -> Iterator[str]:
    """Name, download, memory, speed and languages; empty what is not known."""
    found = choice.forecast
    yield choice.card.name
    yield texts("pick.here") if choice.here else f"{gigabytes(found.download)} GB"
    yield texts("pick.fits" if found.fits else "pick.too_big", memory=f"{found.memory / 1e9:.1f}")
    speed = found.expected_speed
    yield "" if speed is None else texts("pick.tps", speed=f"{speed:.0f}")
    yield texts.pick(", ", "、").join(texts.language_name(code) for code in choice.card.languages)
