"""Seconds from process start to `--help` and to the first word of a reply, as a user waits.

python benchmarks/first_token.py [--rounds 9] [--json results/NAME.json]
"""

from __future__ import annotations

import shutil
import subprocess
import time

import report

PROMPT = "What is the capital of France?"


def seconds_to_output(*arguments: str) -> float:
    """Until the command's first byte on standard output; it is then run to its end."""
    command = [shutil.which("minicpm-mlx") or "minicpm-mlx", *arguments]
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, bufsize=0) as process:
        assert process.stdout is not None
        if not process.stdout.read(1):
            raise SystemExit(f"{' '.join(command)} printed nothing")
        waited = time.perf_counter() - start
        process.stdout.read()
    return waited


def main() -> None:
    options = report.options(__doc__, rounds=9).parse_args()
    reply = ("generate", "--model", "demo", "--prompt", PROMPT, "--max-tokens", "24")
    seconds_to_output(*reply)  # converts the demo if need be, and warms the disk's cache
    times: dict[str, list[float]] = {"--help": [], "first token": []}
    for _ in range(options.rounds):
        times["--help"].append(seconds_to_output("--help"))
        times["first token"].append(seconds_to_output(*reply))
    found = report.Report(rounds=options.rounds)
    for name, values in times.items():
        found.add(name, values)
    found.save(options.json)


if __name__ == "__main__":
    main()
