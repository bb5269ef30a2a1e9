"""Seconds for a multiple-choice question, with its options read after one prompt and each as a text
of its own; and with few-shot examples, read once and read each time.

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
            targets = mx.array(text[1:])[:, None]
            own = mx.take_along_axis(logits[:-1], targets, axis=-1)[:, 0]
            mx.eval(own - mx.logsumexp(logits[:-1], axis=-1))

    def together(lists: list[list[list[int]]]) -> None:
        list(score(lm.model, [Alternatives(texts, shared_prefix_length(texts)) for texts in lists]))

    for name in ("arc_easy", "hellaswag"):
        task = TASKS[name]
        docs = load(task, options.data).docs[""][: options.questions]
        questions = [task.question(doc, mode="ppl") for doc in docs]
        lists = [encode_options(lm.tokenizer, q.prompt, q.options) for q in questions]
        for label, work in (("one by one", one_by_one), ("together", together)):
            work(lists[:2])
            rounds = range(options.rounds)
            taken = [seconds(lambda: work(lists)) / len(lists) for _ in rounds]  # noqa: B023
            out.add(f"{name}, {label}", taken)

    task, data = TASKS["mmlu"], load(TASKS["mmlu"], options.data)
    subset = max(data.docs, key=lambda name: len(data.docs[name]))
    prompts = [
        lm.tokenizer.encode(task.question(doc, draw_examples(task, doc, data)).prompt)
        for doc in data.docs[subset]
    ]
    sampling = mm.Sampling()

    def reply(ids: list[int]) -> BatchRequest:
        return BatchRequest(ids=ids, max_tokens=4, sampling=sampling)

    def each() -> None:
        for ids in prompts:
            list(replies(lm.model, lm.tokenizer, [reply(ids)]))

    def many() -> None:
        list(replies(lm.model, lm.tokenizer, map(reply, prompts)))

    for label, work in (("examples read each time", each), ("examples read once", many)):
        taken = [seconds(work) / len(prompts) for _ in range(options.rounds)]
        out.add(f"mmlu, {label}", taken)
    out.save(options.json)


if __name__ == "__main__":
    main()
