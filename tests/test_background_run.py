"""The tests may run in the background of a script, where signals are ignored from the start."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SHOW = (
    f"import signal; print([signal.getsignal(n) == signal.SIG_IGN for n in {[*map(int, NUMBERS)]}])"
)


def ignore_signals() -> None:
    for number in NUMBERS:
        signal.signal(number, signal.SIG_IGN)


def test_a_process_that_a_test_starts_ignores_no_signal() -> None:
    shown = subprocess.run([sys.executable, "-c", SHOW], capture_output=True, text=True, check=True)
    assert shown.stdout == "[False, False, False]\n"


@pytest.mark.slow
def test_nor_does_it_where_the_tests_were_started_with_signals_ignored() -> None:
    inner = f"{__file__}::{test_a_process_that_a_test_starts_ignores_no_signal.__name__}"
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", inner],
        preexec_fn=ignore_signals,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout
