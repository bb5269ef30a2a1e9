"""C-Eval, CMMLU and MMLU: exams with four lettered options, asked with five examples.

C-Eval (Huang et al. 2023, arXiv:2305.08322) is asked on its validation split, as the answers of
its test split are not published. CMMLU: Li et al. 2023, arXiv:2306.09212. MMLU: Hendrycks et al.
2021, arXiv:2009.03300. The prompts here serve other sets with lettered options too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from typing import Any

from ...files.rows import Row
from ..data.fields import LETTERS, answer_index, four_options, text
from ..question import Doc, Question
from ..scoring.early_stop import after_option, as_long_as_gold
from ..scoring.metrics import prefix_match, qa_match
from ..task import DocText, Source, Task, parquet_files

REQUIREMENT = (
    "Requirement:\n"
    "Choose and respond with the letter of the correct answer, including the parentheses.\n"
)

SUBJECTS: Mapping[str, Any] = json.loads(
    files(__package__).joinpath("subjects.json").read_text(encoding="utf-8")
)
"""By task: names of the subsets in the official order. Those of C-Eval and CMMLU map to their
Chinese names (C-Eval's subject_mapping.json, CMMLU's categories.py)."""


def lettered(options: Sequence[str]) -> str:
    """One option a line, "(A) …", each line with its newline."""
    pairs = zip(LETTERS, options, strict=False)
    return "".join(f"({letter}) {option}\n" for letter, option in pairs)


def format_english(doc: Doc) -> DocText:
    """The template of MMLU and ARC."""
    prompt = (
        f"Question:\n{doc.fields['question']}\n{REQUIREMENT}"
        f"Options:\n{lettered(doc.fields['choices'])}Answer:\n"
    )
    return with_letter(prompt, doc)


def _format_chinese(doc: Doc) -> DocText:
    prompt = (
        f"问题：\n{doc.fields['question']}\n"
        "要求：\n从以下选项中选择并回答正确答案的选项字母，包括左右括号。\n"
        f"选项：\n{lettered(doc.fields['choices'])}答案：\n"
    )
    return with_letter(prompt, doc)


def with_letter(prompt: str, doc: Doc) -> DocText:
    gold = f"({LETTERS[doc.fields['answer']]})"
    return DocText(input=prompt, output=gold, gold=gold)


def by_letter_or_text(repeated: str) -> dict[str, Any]:
    """Metric and early stop of a Task whose replies name an option's letter, or repeat its text.

    A reply may repeat the field `repeated` first.
    """

    def option_and_repeated(question: Question) -> tuple[str, str]:
        fields = question.doc.fields
        return fields["choices"][fields["answer"]], fields[repeated]

    return {
        "metric": lambda parsed, question: qa_match(
            parsed, question.gold, *option_and_repeated(question)
        ),
        "early_stop": lambda reply, question: after_option(
            reply, question, *option_and_repeated(question)
        ),
    }


def _parse_row(row: Row) -> Mapping[str, Any] | None:
    """Question, four distinct options and the index of the correct one; None without those four."""
    options = four_options(row)
    if len(set(options)) != 4:
        return None
    return {
        "question": text(row, "question"),
        "choices": options,
        "answer": answer_index(row, "answer", 4),
    }


def _exam(
    name: str,
    title: str,
    repo: str,
    splits: tuple[str, str],
    files: tuple[tuple[str, ...], tuple[str, ...]],
    description: Callable[[str], str],
    **source: Any,
) -> Task:
    """A task of which `splits` are the questions' and the examples' split on the hub.

    `files` are patterns of the two in the layouts other than the hub's.
    """
    hub = [parquet_files(f"{{subset}}/{split}") for split in splits]
    is_chinese = name != "mmlu"
    return Task(
        name=name,
        title=title,
        language="zh" if is_chinese else "en",
        few_shot={"gen": 5},
        source=Source(
            repo=repo,
            download=tuple(f"{{subset}}/{split}/0000.parquet" for split in splits),
            questions=(*files[0], *hub[0], f"{name}.jsonl"),
            examples=(*files[1], *hub[1], f"{name}_dev*.jsonl"),
            parse_row=_parse_row,
            subsets=tuple(SUBJECTS[name]),
            subset_field="subject",
            **source,
        ),
        format_doc=_format_chinese if is_chinese else format_english,
        description=description,
        metric=lambda parsed, question: prefix_match(parsed, question.gold),
        early_stop=as_long_as_gold,
    )


CEVAL = _exam(
    "ceval",
    "C-Eval",
    "ceval/ceval-exam",
    ("val", "dev"),
    (("val/{subset}_val.csv",), ("dev/{subset}_dev.csv",)),
    lambda subject: (
        f"以下是中国关于{SUBJECTS['ceval'][subject]}考试的单项选择题，请选出其中的正确答案。"
    ),
    id_field="id",
)
CMMLU = _exam(
    "cmmlu",
    "CMMLU",
    "haonan-li/cmmlu",
    ("test", "dev"),
    (
        ("test/{subset}.csv", "data/test/{subset}.csv"),
        ("dev/{subset}.csv", "data/dev/{subset}.csv"),
    ),
    lambda subject: (
        f"以下是关于{SUBJECTS['cmmlu'][subject]}的单项选择题，请直接给出正确答案的选项。"
    ),
)
MMLU = _exam(
    "mmlu",
    "MMLU",
    "cais/mmlu",
    ("test", "dev"),
    (
        ("test/{subset}_test.csv", "data/test/{subset}_test.csv"),
        ("dev/{subset}_dev.csv", "data/dev/{subset}_dev.csv"),
    ),
    # UltraEval writes the subject as its file is named, and ends the line with two newlines of
    # its own; the published figure was measured so.
    lambda subject: (
        f"The following are multiple choice questions (with answers) about {subject}.\n\n"
    ),
    columns=("question", "A", "B", "C", "D", "answer"),
)
