"""Seconds to the first token of a growing conversation, and of a resumed one; and the speed that
the chat says under a reply, against what `bench` measures for as much in as long a context.

python benchmarks/chat_turns.py [--rounds 3] [--json results/NAME.json]
"""

from __future__ import annotations

import os
import tempfile

import report

QUESTION = "Name one more animal, and say in a sentence where it lives."
"""Every turn the same, so that the new text of each is of equal length."""
LONG = "Bread is made of flour, water, salt and yeast, and patience. " * 110
"""About 1,500 tokens."""


def main() -> None:
    options = report.options(__doc__, rounds=3).parse_args()

    import minicpm_mlx as mm
    from minicpm_mlx.bench.measure import MeasuredModel, Work, measure
    from minicpm_mlx.lm import session_cache, sessions

    lm = mm.load("demo")
    greedy = mm.Sampling()

    def ask(chat: mm.Chat, text: str) -> mm.Stats:
        last = list(chat.reply(text))[-1].stats
        assert last is not None
        return last

    def benched(gen: int, depth: int) -> float:
        work = Work(gen=gen, depth=depth)
        (record,) = measure(
            MeasuredModel(name="demo", model=lm.model), [work], repetitions=1, warmup=False
        )
        return record.rates[0]

    stats_line = []
    for _ in range(options.rounds):
        told = ask(mm.Chat(lm, sampling=greedy, max_tokens=65), "Tell me about bread.")
        rate = benched(told.completion_tokens - 1, told.prompt_tokens)
        stats_line.append(told.decode_tps / rate)
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
            session_cache.save_cache(chat, "bread")
            again = sessions.restore(sessions.load("bread"), lm)
            assert session_cache.restore_cache(again, "bread") is None
            resumed.append(ask(again, "And what else?").ttft)
    found = report.Report(rounds=options.rounds, prompt_tokens=stats.prompt_tokens)
    found.add("stats line over bench", stats_line, "")
    for name, values in (
        ("turn 2", turns[2]),
        ("turn 10", turns[10]),
        ("full prefill", full),
        ("after resuming", resumed),
    ):
        found.add(name, values)
    found.save(options.json)


if __name__ == "__main__":
    main()
