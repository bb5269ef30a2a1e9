"""A list at the terminal, of which one entry is chosen with the keys."""

from __future__ import annotations

import signal
from collections.abc import Callable

from prompt_toolkit import Application
from prompt_toolkit.data_structures import Point
from prompt_toolkit.formatted_text import ANSI
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.layout import FormattedTextControl, Layout, ScrollOffsets, Window

from .line_editor import defer, end_when

Render = Callable[[int], tuple[str, int]]
"""Draws the list with an entry selected: the lines, with ANSI styles, and the entry's first."""


def choose(render: Render, count: int, selected: int = 0) -> int | None:
    """The entry that Enter takes, of `count`; None if the user leaves.

    The list is drawn below what is on the screen, and erased afterwards. Ctrl-C raises
    KeyboardInterrupt.
    """
    at = selected

    def move(index: int) -> None:
        nonlocal at
        at = max(0, min(index, count - 1))

    control = FormattedTextControl(
        lambda: ANSI(render(at)[0]),
        focusable=True,
        show_cursor=False,
        get_cursor_position=lambda: Point(0, render(at)[1]),
    )
    around = ScrollOffsets(top=2, bottom=2)
    window = Window(control, always_hide_cursor=True, scroll_offsets=around)
    application: Application[int | None] = Application(
        Layout(window), key_bindings=_keys(lambda: at, move), erase_when_done=True
    )

    def start() -> None:
        application.create_background_task(end_when(application, lambda: bool(pending)))

    with defer(signal.SIGTERM) as pending:
        try:
            return application.run(pre_run=start)
        except EOFError:
            return None


def _keys(at: Callable[[], int], move: Callable[[int], None]) -> KeyBindings:
    keys = KeyBindings()

    def on(*names: str, to: Callable[[int], int]) -> None:
        for name in names:
            keys.add(name)(lambda event: move(to(at())))

    on("up", "k", "c-p", to=lambda index: index - 1)
    on("down", "j", "c-n", to=lambda index: index + 1)
    on("home", "pageup", to=lambda index: 0)
    on("end", "pagedown", to=lambda index: 10**6)
    for digit in "123456789":
        on(digit, to=lambda index, number=int(digit): number - 1)  # type: ignore[misc]

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        event.app.exit(result=at())

    @keys.add("q")
    @keys.add("escape")
    @keys.add("c-d")
    def _(event: KeyPressEvent) -> None:
        event.app.exit(result=None)

    @keys.add("c-c")
    def _(event: KeyPressEvent) -> None:
        event.app.exit(exception=KeyboardInterrupt)

    @keys.add("c-z")
    def _(event: KeyPressEvent) -> None:
        event.app.suspend_to_background()

    return keys
