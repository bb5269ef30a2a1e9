"""What Tab offers after a slash command."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress

from minicpm_mlx import model_cards
from minicpm_mlx.errors import SessionError

from .settings import CHAT_SETTINGS
from .thinking import THINK


def completions(command: str) -> Iterable[str] | None:
    """Completions for a command's argument; None: a path."""
    from minicpm_mlx.lm import sessions

    if command in ("/attach", "/save", "/adapter"):
        return None
    if command in ("/load", "/resume"):
        with suppress(SessionError):
            return [saved.name for saved in sessions.listed()]
        return []
    if command == "/sessions":
        with suppress(SessionError):
            return [f"delete {saved.name}" for saved in sessions.listed()]
        return []
    if command == "/model":
        return model_cards.cards()
    if command == "/set":
        from minicpm_mlx import Sampling

        return [*Sampling.__dataclass_fields__, *CHAT_SETTINGS, "think"]
    return {"/system": ["off"], "/think": [*THINK], "/thoughts": ["all"]}.get(command, [])
