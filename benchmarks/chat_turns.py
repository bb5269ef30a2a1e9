"""Seconds to the first token of a growing conversation, and of a resumed one.

python benchmarks/chat_turns.py [--rounds 3] [--json results/NAME.json]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
from pathlib import Path

QUESTION = "Name one more animal, and say in a sentence where it lives."
"""Every turn the same, so that the new text of each is of equal length."""
LONG = "Bread is made of flour, water, salt and yeast, and patience. " * 110
"""About 1,500 tokens."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    import minicpm_mlx as mm
    from minicpm_mlx import device, sessions

    lm = mm.load("demo")
    greedy = mm.Sampling()

    def ask(chat: mm.Chat, text: str) -> mm.Stats:
        last = list(chat.reply(text))[-1].stats
        assert last is not None
        return last

    turns: dict[int, list[float]] = {2: [], 10: []}
    full, resumed = [], []
    for _ in range(options.rounds):
        chat = mm.Chat(lm, sampling=greedy, max_tokens=24)
        for turn in range(1, 11):
            stats = ask(chat, QUESTION)
            if turn in turns:
                turns[turn].append(stats.ttft)
        with tempfile.TemporaryDirectory() as home:
            os.environ["MINICPM_MLX_HOME"] = home
            chat = mm.Chat(lm, sampling=greedy, max_tokens=4)
            stats = ask(chat, LONG + "What is bread made of?")
            full.append(stats.ttft)
            sessions.save(chat, "bread")
            sessions.save_cache(chat, "bread")
            again = sessions.restore(sessions.load("bread"), lm)
            assert sessions.restore_cache(again, "bread") is None
            resumed.append(ask(again, "And what else?").ttft)
    machine = f"{device.chip()}, {platform.system()}, BLAS {device.blas}"
    print(f"{machine}; {options.rounds} rounds; full prefill of {stats.prompt_tokens} tokens")
    record: dict[str, object] = {"machine": machine, "prompt_tokens": stats.prompt_tokens}
    for name, values in (
        ("turn 2", turns[2]),
        ("turn 10", turns[10]),
        ("full prefill", full),
        ("after resuming", resumed),
    ):
        spread = [min(values), statistics.median(values), max(values)]
        record[f"{name} s"] = [round(value, 3) for value in spread]
        print(f"{name:16} {spread[1]:.3f} s ({spread[0]:.3f} to {spread[2]:.3f})")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
