"""Guessing ahead by what the text said before: tokens a pass, and seconds with it and without.

    python benchmarks/speculation.py [--rounds 3] [--json results/NAME.json]

Three texts that copy, one that does not, on the demo, greedily. The first token is left out of the
seconds. The texts are the same with guesses and without, which is checked.
"""

from __future__ import annotations

import report

CODE = """def area(radius):
    return 3.14159 * radius ** 2


def volume(radius, height):
    return area(radius) * height


def mean(values):
    total = sum(values)
    return total / len(values)
"""

PEOPLE = (
    '{"name": "Ada Lovelace", "born": 1815, "field": "mathematics"} '
    '{"name": "Alan Turing", "born": 1912, "field": "computing"} '
    '{"name": "Grace Hopper", "born": 1906, "field": "compilers"}'
)


def tasks() -> dict[str, object]:
    from minicpm_mlx.bench.measure import PASSAGE

    def asked(text: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": text}]

    edit = "Add a docstring to each function of this code and give me all of it"
    return {
        "edit code": asked(f"{edit}:\n\n```python\n{CODE}```"),
        "quote": asked(f"Quote this text word for word:\n\n{PASSAGE}"),
        "fix JSON": f"Broken:\n\n[{PEOPLE}]\n\nFixed:\n\n[",
        "no repetition": asked("Tell me about the history of bread."),
    }


def main() -> None:
    options = report.options(__doc__, rounds=3).parse_args()

    import minicpm_mlx as mm

    lm = mm.load("demo")
    greedy = mm.Sampling()
    found = report.Report(rounds=options.rounds)
    for name, prompt in tasks().items():
        seconds: dict[bool, list[float]] = {False: [], True: []}
        texts = set()
        for _ in range(options.rounds):
            for guess in (False, True):
                reply = lm.generate(prompt, max_tokens=100, sampling=greedy, speculate=guess)
                seconds[guess].append(reply.stats.seconds - reply.stats.ttft)
                texts.add(reply.text)
        assert len(texts) == 1, f"{name}: guessing changed the text"
        made = reply.stats.completion_tokens
        found.add(f"{name}: tokens a pass", [(made - 1) / reply.stats.passes], "")
        ratios = [a / b for a, b in zip(seconds[False], seconds[True], strict=True)]
        found.add(f"{name}: times as fast", ratios, "")
    found.save(options.json)


if __name__ == "__main__":
    main()
