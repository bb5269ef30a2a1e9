"""Processes of this machine."""

from __future__ import annotations

import subprocess


def is_running(pid: int) -> bool:
    """Whether a process has not ended; one that nobody has waited for has."""
    line = ["ps", "-o", "stat=", "-p", str(pid)]
    state = subprocess.run(line, capture_output=True, text=True).stdout
    return bool(state.strip()) and not state.startswith("Z")
