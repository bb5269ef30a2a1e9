"""Processes of this machine."""

from __future__ import annotations

import subprocess
import time


def expect_end(*pids: int) -> None:
    """Fails unless these processes end within 10 seconds; one that nobody waits for has ended."""
    line = ["ps", "-o", "stat=", "-p", ",".join(map(str, pids))]
    deadline = time.monotonic() + 10
    while True:
        states = subprocess.run(line, capture_output=True, text=True).stdout.split()
        if all(state.startswith("Z") for state in states):
            return
        assert time.monotonic() < deadline, states
        time.sleep(0.1)
