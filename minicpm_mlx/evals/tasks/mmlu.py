"""MMLU: 57 subjects from school to profession (Hendrycks et al. 2021, arXiv:2009.03300)."""

from __future__ import annotations

from ..scoring.early_stop import as_long_as_gold
from ..task import Source, Task
from .exams import ask_english, begins_with_gold, read_four

__all__ = ["MMLU", "SUBJECTS"]

SUBJECTS = (
    "abstract_algebra",
    "anatomy",
    "astronomy",
    "business_ethics",
    "clinical_knowledge",
    "college_biology",
    "college_chemistry",
    "college_computer_science",
    "college_mathematics",
    "college_medicine",
    "college_physics",
    "computer_security",
    "conceptual_physics",
    "econometrics",
    "electrical_engineering",
    "elementary_mathematics",
    "formal_logic",
    "global_facts",
    "high_school_biology",
    "high_school_chemistry",
    "high_school_computer_science",
    "high_school_european_history",
    "high_school_geography",
    "high_school_government_and_politics",
    "high_school_macroeconomics",
    "high_school_mathematics",
    "high_school_microeconomics",
    "high_school_physics",
    "high_school_psychology",
    "high_school_statistics",
    "high_school_us_history",
    "high_school_world_history",
    "human_aging",
    "human_sexuality",
    "international_law",
    "jurisprudence",
    "logical_fallacies",
    "machine_learning",
    "management",
    "marketing",
    "medical_genetics",
    "miscellaneous",
    "moral_disputes",
    "moral_scenarios",
    "nutrition",
    "philosophy",
    "prehistory",
    "professional_accounting",
    "professional_law",
    "professional_medicine",
    "professional_psychology",
    "public_relations",
    "security_studies",
    "sociology",
    "us_foreign_policy",
    "virology",
    "world_religions",
)


def describe(subject: str) -> str:
    """The line before the examples, which ends in two newlines of its own; UltraEval's has the
    subject's name as its file has it, and so the published figure."""
    return f"The following are multiple choice questions (with answers) about {subject}.\n\n"


MMLU = Task(
    name="mmlu",
    title="MMLU",
    language="en",
    shots={"gen": 5},
    source=Source(
        repo="cais/mmlu",
        download=("{subset}/test/0000.parquet", "{subset}/dev/0000.parquet"),
        items=(
            "test/{subset}_test.csv",
            "data/test/{subset}_test.csv",
            "{subset}/test*.parquet",
            "{subset}/test/*.parquet",
            "mmlu.jsonl",
        ),
        shots=(
            "dev/{subset}_dev.csv",
            "data/dev/{subset}_dev.csv",
            "{subset}/dev*.parquet",
            "{subset}/dev/*.parquet",
            "mmlu_dev*.jsonl",
        ),
        read=read_four,
        subsets=SUBJECTS,
        subset_of="subject",
        columns=("question", "A", "B", "C", "D", "answer"),
    ),
    ask=ask_english,
    describe=describe,
    match=begins_with_gold,
    enough=as_long_as_gold,
)
