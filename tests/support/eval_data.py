"""Small evaluation sets of the tests' own, one file a set, as the real samples lie."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

WORDS = ("stone", "river", "apple", "cloud", "horse", "lamp", "bread", "snow")


def four(number: int) -> dict[str, Any]:
    choices = [WORDS[(number + k) % len(WORDS)] for k in range(4)]
    question = f"Which of these is number {number}?"
    return {"question": question, "choices": choices, "answer": "ABCD"[number % 4]}


def arc(number: int) -> dict[str, Any]:
    row = four(number)
    choices = {"text": row["choices"], "label": list("ABCD")}
    return {**row, "id": f"q{number}", "choices": choices, "answerKey": row["answer"]}


def hellaswag(number: int) -> dict[str, Any]:
    endings = [f"takes the {WORDS[(number + k) % len(WORDS)]} away." for k in range(4)]
    context = {"activity_label": "Cooking", "ctx": f"Cook {number} comes in and"}
    return {"ind": number, **context, "endings": endings, "label": number % 4}


def humaneval(number: int) -> dict[str, Any]:
    return {
        "task_id": f"HumanEval/{number}",
        "prompt": f'def add(x):\n    """ Add {number}.\n    """\n',
        "entry_point": "add",
        "canonical_solution": f"    return x + {number}\n",
        "test": f"def check(candidate):\n    assert candidate(2) == {number + 2}\n",
    }


def mbpp(number: int) -> dict[str, Any]:
    return {
        "task_id": number,
        "text": f"Write a function to add {number}.",
        "code": f"def add(x):\n    return x + {number}",
        "test_list": [f"assert add(1) == {number + 1}"],
    }


def gsm8k(number: int) -> dict[str, Any]:
    return {"question": f"What is {number} + 1?", "answer": f"It is more. #### {number + 1}"}


def math(number: int) -> dict[str, Any]:
    return {"problem": f"Find ${number}+1$.", "answer": str(number + 1)}


def bbh(number: int, task: str) -> dict[str, Any]:
    target = str(number) if task == "object_counting" else ("Yes" if number % 2 else "No")
    return {"task": task, "index": number, "input": f"Is it {number}?", "target": target}


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")


def write_all(folder: Path, count: int = 6) -> Path:
    """A folder with `count` questions of each set, or of each of its two subsets."""
    numbers = range(count)
    for name, subjects in (("mmlu", ("anatomy", "virology")), ("cmmlu", ("agronomy", "anatomy"))):
        rows = [{"subject": subject, **four(n)} for subject in subjects for n in numbers]
        write(folder / f"{name}.jsonl", rows)
        rows = [{"subject": subject, **four(n + 50)} for subject in subjects for n in range(5)]
        write(folder / f"{name}_dev_fewshot.jsonl", rows)
    header = "id,question,A,B,C,D,answer\n"
    for part, start in (("val", 0), ("dev", 90)):
        lines = []
        for n in range(start, start + 6):
            row = four(n)
            lines.append(",".join([str(n), row["question"], *row["choices"], row["answer"]]))
        path = folder / "ceval" / part / f"logic_{part}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(header + "\n".join(lines[:count] if start == 0 else lines) + "\n", "utf-8")
    write(folder / "arc_easy.jsonl", [arc(n) for n in numbers])
    write(folder / "arc_challenge.jsonl", [arc(n + 100) for n in numbers])
    write(folder / "hellaswag.jsonl", [hellaswag(n) for n in numbers])
    write(folder / "humaneval.jsonl", [humaneval(n) for n in numbers])
    write(folder / "mbpp.jsonl", [mbpp(n + 20) for n in numbers])
    write(folder / "mbpp_fewshot.jsonl", [mbpp(n) for n in range(2, 8)])
    write(folder / "gsm8k.jsonl", [gsm8k(n) for n in numbers])
    write(folder / "gsm8k_train.jsonl", [gsm8k(n + 100) for n in range(9)])
    write(folder / "math500.jsonl", [math(n) for n in range(max(count, 6))])
    tasks = ("navigate", "object_counting")
    write(folder / "bbh.jsonl", [bbh(n, task) for task in tasks for n in range(max(count, 5))])
    cot = [
        {"task": task, "cot_prompt": "Answer.\n\nQ: Is it?\nA: So the answer is Yes."}
        for task in tasks
    ]
    write(folder / "bbh_cot_prompts.jsonl", cot)
    return folder
