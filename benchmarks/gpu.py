"""pp512 and tg128 of a shape in 4 bits on a GPU: ours against mlx-lm's model of that kind.

    python benchmarks/gpu.py [--rounds 5] [--shape 2b-shape] [--json results/NAME.json]

Random weights, since none are needed to be fast: no download. mlx-lm runs MiniCPM3's shape by its
minicpm3, all others by its Llama, which is the faster of its two for MiniCPM. Both models are in
one process and take turns, at 1 and at 8 streams. Runs wherever MLX does (Metal, CUDA, and,
slowly, a CPU).
"""

from __future__ import annotations

import time
from typing import Any

import report

PROMPT, NEW = 512, 128


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


def main() -> None:
    parser = report.options(__doc__, rounds=5)
    parser.add_argument("--shape", default="2b-shape")
    options = parser.parse_args()

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
