"""Strings that end a reply."""

from __future__ import annotations

from collections.abc import Sequence

from .arguments import listed


def stop_list(stop: object) -> list[str]:
    """Stop strings as a list: None is none of them, a lone string one."""
    stops = [] if stop is None else [stop] if isinstance(stop, str) else stop
    expected = "a string or a list of strings, none of them empty"
    return listed("stop", stops, expected, lambda item: isinstance(item, str) and item != "")


class StopStrings:
    """Lets text through until a stop string comes; holds back what may be the start of one."""

    def __init__(self, stops: Sequence[str]):
        self.stops = stops
        self.held = ""
        self.found: str | None = None
        """The one that came."""

    def add(self, text: str) -> str:
        """The part of the text so far that is certain and not given out yet."""
        self.held += text
        hits = [
            (at + len(stop), at, stop) for stop in self.stops if (at := self.held.find(stop)) >= 0
        ]
        if hits:
            # The one complete first, as if the text had come letter by letter.
            _, at, self.found = min(hits)
            certain, self.held = self.held[:at], ""
            return certain
        keep = max((overlap(self.held, stop) for stop in self.stops), default=0)
        at = len(self.held) - keep
        certain, self.held = self.held[:at], self.held[at:]
        return certain

    def finish(self) -> str:
        """What was held back, once no more text can come."""
        held, self.held = self.held, ""
        return held


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-size:]):
            return size
    return 0
