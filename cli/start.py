"""Starts the command line: a Ctrl-C while its modules are imported is one line too."""

from __future__ import annotations

import sys


def main() -> None:
    try:
        from .main import main as run
    except KeyboardInterrupt:
        print("minicpm-mlx: interrupted", file=sys.stderr)
        sys.exit(130)
    run()
