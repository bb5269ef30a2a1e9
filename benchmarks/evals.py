"""Seconds a question of multiple choice takes, its options read over one prompt, against each
option read as a text of its own; and with examples before the questions, read once and read each
time.

python benchmarks/evals.py --data FOLDER [--questions 24] [--rounds 3] [--json results/NAME.json]

The folder holds ARC-Easy, HellaSwag and MMLU in a layout that `minicpm-mlx eval` reads.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import report


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    parser = report.options(__doc__, rounds=3)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--questions", type=int, default=24)
    options = parser.parse_args()

    import mlx.core as mx

    import minicpm_mlx as mm
    from minicpm_mlx.engine.scoring.loglikelihood import Alternatives, score, shared_prefix_length
    from minicpm_mlx.evals.data.load import load
    from minicpm_mlx.evals.examples import draw_examples
    from minicpm_mlx.evals.option_scores import encode_options
    from minicpm_mlx.evals.tasks import TASKS
    from minicpm_mlx.lm.batch import BatchRequest, replies

    lm = mm.load("demo")
    out = report.Report(model="demo", questions=options.questions)

    def one_by_one(lists: list[list[list[int]]]) -> None:
        for text in (text for texts in lists for text in texts):
            logits = lm.model(mx.array([text]))[0]
            wanted = mx.array(text[1:])[:, None]
            own = mx.take_along_axis(logits[:-1], wanted, axis=-1)[:, 0]
            mx.eval(own - mx.logsumexp(logits[:-1], axis=-1))

    def together(lists: list[list[list[int]]]) -> None:
        list(score(lm.model, [Alternatives(texts, shared_prefix_length(texts)) for texts in lists]))

    for name in ("arc_easy", "hellaswag"):
        task = TASKS[name]
        items = load(task, options.data).docs[""][: options.questions]
        asked = [task.question(item, mode="ppl") for item in items]
        lists = [encode_options(lm.tokenizer, one.prompt, one.options) for one in asked]
        for what, work in (("one by one", one_by_one), ("together", together)):
            work(lists[:2])
            rounds = range(options.rounds)
            taken = [seconds(lambda: work(lists)) / len(lists) for _ in rounds]  # noqa: B023
            out.add(f"{name}, {what}", taken)

    task, loaded = TASKS["mmlu"], load(TASKS["mmlu"], options.data)
    subset = max(loaded.docs, key=lambda name: len(loaded.docs[name]))
    prompts = [
        lm.tokenizer.encode(task.question(item, draw_examples(task, item, loaded)).prompt)
        for item in loaded.docs[subset]
    ]
    sampling = mm.Sampling()

    def reply(ids: list[int]) -> BatchRequest:
        return BatchRequest(ids=ids, max_tokens=4, sampling=sampling)

    def each() -> None:
        for ids in prompts:
            list(replies(lm.model, lm.tokenizer, [reply(ids)]))

    def many() -> None:
        list(replies(lm.model, lm.tokenizer, map(reply, prompts)))

    for what, work in (("examples read each time", each), ("examples read once", many)):
        taken = [seconds(work) / len(prompts) for _ in range(options.rounds)]
        out.add(f"mmlu, {what}", taken)
    out.save(options.json)


if __name__ == "__main__":
    main()
