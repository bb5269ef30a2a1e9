"""Folders where clients keep their settings, as they look for them themselves."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def home(*names: str, variable: str | None = None) -> Path:
    """A path below the folder that a variable names, else below the home folder.

    With a variable, the first of `names` stands for the folder it replaces.
    """
    if variable and (named := os.environ.get(variable)):
        return Path(named).expanduser().joinpath(*names[1:])
    return Path.home().joinpath(*names)


def xdg_config(*names: str) -> Path:
    """A path below ~/.config, on a Mac too, or below $XDG_CONFIG_HOME."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config").joinpath(*names)


def application(*names: str) -> Path:
    """A path below the folder for the settings of applications of this system."""
    if sys.platform == "darwin":
        return Path.home().joinpath("Library", "Application Support", *names)
    return xdg_config(*names)
