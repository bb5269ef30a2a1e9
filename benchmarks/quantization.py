"""Quality, time and memory of each way to quantize the demo.

    python benchmarks/quantization.py CALIBRATION EVALUATION [--only NAME ...] [--json NAME.json]

CALIBRATION is a text that methods look at, EVALUATION another that receipts are measured on: its
first 4,096 tokens, in windows of 512. Each row is one run of `minicpm-mlx quantize demo` in a
process of its own; its time includes starting, and measuring the receipt; memory is the process's
largest resident size.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import report

WAYS = {
    "rtn 4 bits g64": "--method rtn --bits 4",
    "rtn 4 bits g32": "--method rtn --bits 4 --group-size 32",
    "rtn 6 bits g64": "--method rtn --bits 6",
    "rtn 8 bits g64": "--method rtn --bits 8",
    "mxfp4": "--method rtn --mode mxfp4",
    "nvfp4": "--method rtn --mode nvfp4",
    "mxfp8": "--method rtn --mode mxfp8",
    "gptq 4 bits g64": "--method gptq --bits 4",
    "mixed 4.5 bits": "--method mixed --bpw 4.5",
    "mixed 5.1 bits": "--method mixed --bpw 5.09",
    "dwq 4 bits g64": "--method dwq --bits 4",
    "awq 4 bits g64, 4 samples": "--method awq --bits 4 --samples 4",
}
"""Options of `quantize` by name."""

HEAD = "| | bits per weight | perplexity | mean KL | 99 % | same token | s | CPU s | peak GB |"


def main() -> None:
    parser = report.options(__doc__, rounds=1)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("evaluation", type=Path)
    parser.add_argument("--only", nargs="+", choices=WAYS, default=list(WAYS))
    options = parser.parse_args()
    found = report.Report(calibration=options.calibration.name, evaluation=options.evaluation.name)
    rows = found.record["rows"] = dict[str, object]()
    print(HEAD, "|---|" + "---:|" * (HEAD.count("|") - 2), sep="\n")
    for name in options.only:
        row = rows[name] = measured(WAYS[name].split(), options.calibration, options.evaluation)
        print(rendered(name, row), flush=True)
        found.save(options.json)


def measured(how: list[str], calibration: Path, evaluation: Path) -> dict[str, float]:
    folder = Path(tempfile.mkdtemp())
    command = [str(Path(sys.executable).with_name("minicpm-mlx")), "quantize", "demo"]
    command += [str(folder / "made"), "--json", "--evaluate", str(evaluation), *how]
    if "rtn" not in how:
        command += ["--calibration", str(calibration)]
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        told = process.stdout.read()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - start
    shutil.rmtree(folder)
    if process.returncode:
        sys.exit(process.returncode)
    receipt = json.loads(told)
    quality = receipt["quality"]
    return {
        "bits_per_weight": receipt["bits_per_weight"],
        "perplexity": quality["perplexity"] / quality["source_perplexity"],
        "kl": quality["kl_mean"],
        "kl_99": quality["kl_99"],
        "top_1": quality["top_1_agreement"],
        "seconds": seconds,
        "cpu_seconds": used.ru_utime + used.ru_stime,
        "peak_gb": used.ru_maxrss / (1e6 if sys.platform == "linux" else 1e9),
    }


def rendered(name: str, row: dict[str, float]) -> str:
    return (
        f"| {name} | {row['bits_per_weight']:.3f} | ×{row['perplexity']:.4f} | {row['kl']:.4f} "
        f"| {row['kl_99']:.3f} | {row['top_1']:.1%} | {row['seconds']:.0f} "
        f"| {row['cpu_seconds']:.0f} | {row['peak_gb']:.2f} |"
    )


if __name__ == "__main__":
    main()
