"""Decode speed with a card's sampling against greedy: layers of MiniCPM-2B's shape, and the demo.

    python benchmarks/sampling.py [--rounds 7] [--new 32] [--layers 4] [--json results/NAME.json]

The two alternate on the same model in one process. Tokens are counted after the first.
"""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import replace
from typing import Any

import report

import minicpm_mlx as mm
from minicpm_mlx.bench.shapes import packed_config, random_model
from minicpm_mlx.engine import Sampling, generate
from minicpm_mlx.errors import MiniCPMError

WAYS = {
    "greedy": Sampling(),
    "card's": Sampling(temperature=0.5, top_p=0.8, repetition_penalty=1.02, seed=1),
    "top_p 0.95": Sampling(temperature=0.9, top_p=0.95, seed=1),
    "unfiltered": Sampling(temperature=1.0, seed=1),
}
"""MiniCPM-2B's settings, MiniCPM5's while it thinks, and the plain distribution."""


def tokens_per_second(model: Any, prompt: list[int], sampling: Sampling, new: int) -> float:
    stream = generate(model, prompt, max_tokens=new + 1, sampling=sampling)
    next(stream)
    start = time.perf_counter()
    made = sum(1 for _ in stream)
    return made / (time.perf_counter() - start)


def main() -> None:
    parser = report.options(__doc__, rounds=7)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--layers", type=int, default=4)
    options = parser.parse_args()
    record = report.Report(rounds=options.rounds, new=options.new)
    config = replace(packed_config("2b-shape"), num_hidden_layers=options.layers)
    models = {f"{options.layers} layers of 2b": (random_model(config), [1, 5, 9, 200])}
    with suppress(MiniCPMError):
        demo = mm.load("demo")
        text = "<|im_start|>user\nTell a story.<|im_end|>\n<|im_start|>assistant\n"
        models["demo"] = (demo.model, demo.tokenizer.encode(text))
    for name, (model, prompt) in models.items():
        speeds: dict[str, list[float]] = {way: [] for way in WAYS}
        for _ in range(options.rounds):
            for way, sampling in WAYS.items():
                speeds[way].append(tokens_per_second(model, prompt, sampling, options.new))
        greedy = record.add(f"{name}, greedy", speeds.pop("greedy"), "tok/s")
        for way, values in speeds.items():
            median = record.add(f"{name}, {way}", values, "tok/s")
            record.add(f"{name}, {way} / greedy", [median / greedy], "")
    record.save(options.json)


if __name__ == "__main__":
    main()
