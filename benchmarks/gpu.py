"""pp512 and tg128 of a shape in 4 bits on a GPU: ours against mlx-lm's model of that kind.

    python benchmarks/gpu.py [--rounds 5] [--shape 2b-shape] [--json results/NAME.json]
    python benchmarks/gpu.py --all [--minutes 8] --folder results/gpu

Random weights, since none are needed to be fast: no download. mlx-lm runs MiniCPM3's shape by its
minicpm3, all others by its Llama, which is the faster of its two for MiniCPM. Both models are in
one process and take turns, at 1 and at 8 streams. Runs wherever MLX does (Metal, CUDA, and,
slowly, a CPU).

`--all` does everything that a GPU is to be asked, within the minutes given: whether it computes
right (`doctor --verify`), three shapes as above, sampled against greedy, and a LoRA step against
mlx-lm's. Each runs in a process of its own and writes to the folder as it goes, so that what was
finished in time is kept.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import report

PROMPT, NEW = 512, 128

HERE = Path(__file__).parent
PART = [str(HERE / "gpu.py"), "--rounds", "2", "--shape"]
PARTS = {
    "verify": ["-c", "from minicpm_mlx.cli.start import main; main()", "doctor", "--verify"],
    "2b": [*PART, "2b-shape"],
    "sampling": [str(HERE / "sampling.py"), "--rounds", "3", "--layers", "40", "--new", "64"],
    "lora": [str(HERE / "finetune.py"), "--only", "wide", "--rounds", "1"],
    "3-4b": [*PART, "3-4b-shape"],
    "5-2b": [*PART, "5-2b-shape"],
}
"""What --all runs, the most telling first."""


def theirs(model: Any, batch: int) -> tuple[float, float]:
    """Tokens a second, reading and making, by mlx-lm's own loops."""
    import mlx.core as mx
    from mlx_lm.generate import BatchGenerator, generate_step

    ids = mx.random.randint(0, 1000, (PROMPT,), key=mx.random.key(1))
    if batch == 1:
        start = time.perf_counter()
        next(generate_step(ids, model, max_tokens=1))
        read = time.perf_counter() - start
        stream = generate_step(ids[:1], model, max_tokens=NEW + 1)
        next(stream)
        start = time.perf_counter()
        for _ in stream:
            pass
        return PROMPT / read, NEW / (time.perf_counter() - start)

    def run(prompt: list[int], new: int, untimed: int) -> float:
        generator = BatchGenerator(model, max_tokens=new, stop_tokens=[])
        generator.insert([prompt] * batch)
        for _ in range(untimed):
            generator.next_generated()
        start = time.perf_counter()
        while generator.next_generated():
            pass
        seconds = time.perf_counter() - start
        generator.close()
        return seconds

    prompt: list[int] = ids.tolist()  # type: ignore[assignment]
    return batch * PROMPT / run(prompt, 1, 0), batch * NEW / run(prompt[:1], NEW + 1, 1)


def ours(model: Any, batch: int) -> tuple[float, float]:
    from minicpm_mlx.bench.measure import MeasuredModel, Work, measure

    todo = [Work(prompt=PROMPT, batch=batch), Work(gen=NEW, batch=batch)]
    subject = MeasuredModel(name="ours", model=model)
    read, made = measure(subject, todo, repetitions=1, warmup=False)
    return read.rates[0], made.rates[0]


def run_all(folder: Path, seconds: float) -> None:
    """Run the parts one after the other, each until the time for all of them is up."""
    folder.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + seconds
    for name, command in PARTS.items():
        left, start = end - time.monotonic(), time.monotonic()
        if left < 5:
            print(f"{name}: no time left", flush=True)
            continue
        with (folder / f"{name}.txt").open("w", encoding="utf-8") as file:
            streams: Any = {"stdout": file, "stderr": subprocess.STDOUT}
            try:
                status = subprocess.run([sys.executable, *command], timeout=left, **streams)
                done = "done" if status.returncode == 0 else f"status {status.returncode}"
            except subprocess.TimeoutExpired:
                done = "not finished in time"
        print(f"{name}: {done}, {time.monotonic() - start:.0f} s", flush=True)
        print((folder / f"{name}.txt").read_text(encoding="utf-8"), flush=True)


def main() -> None:
    parser = report.options(__doc__, rounds=5)
    parser.add_argument("--shape", default="2b-shape")
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--folder", type=Path, default=HERE / "results" / "gpu")
    options = parser.parse_args()
    if options.all:
        run_all(options.folder, options.minutes * 60)
        return

    import mlx.core as mx
    from mlx_lm_models import mlx_lm_model

    from minicpm_mlx import Config, device
    from minicpm_mlx.bench.shapes import SHAPES, random_model

    mine = random_model(options.shape)
    config = Config.from_dict(SHAPES[options.shape])
    dtype = device.choose_dtype(mx.bfloat16)
    other = mlx_lm_model(config, dtype, "minicpm3" if config.mla else "llama")
    found = report.Report(rounds=options.rounds, shape=options.shape)
    for batch in (1, 8):
        pairs = []
        for number in range(options.rounds + 1):
            pair = (ours(mine, batch), theirs(other, batch))
            if number:  # the first warms up
                pairs.append(pair)
        for phase, name in enumerate((f"pp{PROMPT}", f"tg{NEW}")):
            found.add(f"minicpm-mlx {name} x{batch}", [a[phase] for a, _ in pairs], "tok/s")
            found.add(f"mlx-lm {name} x{batch}", [b[phase] for _, b in pairs], "tok/s")
            found.add(f"{name} x{batch} ratio", [a[phase] / b[phase] for a, b in pairs], "")
    found.save(options.json)


if __name__ == "__main__":
    main()
