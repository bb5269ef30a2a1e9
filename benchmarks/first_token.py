"""Seconds from process start to `--help` and to the first word of a reply, as a user waits.

python benchmarks/first_token.py [--rounds 9] [--json results/NAME.json]
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import subprocess
import time
from pathlib import Path

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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    from minicpm_mlx import device

    reply = ("generate", "--model", "demo", "--prompt", PROMPT, "--max-tokens", "24")
    seconds_to_output(*reply)  # converts the demo if need be, and warms the disk's cache
    times: dict[str, list[float]] = {"--help": [], "first token": []}
    for _ in range(options.rounds):
        times["--help"].append(seconds_to_output("--help"))
        times["first token"].append(seconds_to_output(*reply))
    machine = f"{device.chip()}, {platform.system()}, BLAS {device.blas}"
    print(f"{machine}; {options.rounds} rounds")
    record: dict[str, object] = {"machine": machine, "rounds": options.rounds}
    for name, values in times.items():
        spread = [min(values), statistics.median(values), max(values)]
        record[f"{name} s"] = [round(value, 3) for value in spread]
        print(f"{name:12} {spread[1]:.2f} s ({spread[0]:.2f} to {spread[2]:.2f})")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
