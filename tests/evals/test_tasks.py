"""Prompts written out in full, and replies scored, of made-up items in the official layouts."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from minicpm_mlx.errors import DataError, InvalidArgumentError
from minicpm_mlx.evals.data.load import load
from minicpm_mlx.evals.examples import draw_examples
from minicpm_mlx.evals.question import Question
from minicpm_mlx.evals.report.published import MEANS, MT_BENCH, PUBLISHED
from minicpm_mlx.evals.tasks import TASKS
from minicpm_mlx.evals.tasks.exams import SUBJECTS
from support.data import need_shared

REQUIREMENT = (
    "Requirement:\n"
    "Choose and respond with the letter of the correct answer, including the parentheses.\n"
)
CHINESE_REQUIREMENT = "要求：\n从以下选项中选择并回答正确答案的选项字母，包括左右括号。\n"
MMLU_TEST = 'What is 2 + 2?,3,4,5,6,B\n"Which, of these?",a,b,c,d,D\n'
MMLU_DEV = "What is 1 + 1?,1,2,3,4,B\n"


def write(folder: Path, name: str, content: str | object) -> None:
    """A file of text, or of JSON; a list becomes lines of it."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(content, str):
        rows = content if isinstance(content, list) else [content]
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    data = content.encode()
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)


def asked(name: str, folder: Path, subset: str = "", shots: int = 0, mode: str = "gen") -> Question:
    """The first question of a subset, with its examples."""
    task, loaded = TASKS[name], load(TASKS[name], folder)
    item = loaded.docs[subset][0]
    return task.question(item, draw_examples(task, item, loaded, count=shots), mode)


def score(question: Question, name: str, reply: str) -> float:
    task = TASKS[name]
    return task.score(task.parse(reply, question), question)


def test_mmlu(tmp_path: Path) -> None:
    write(tmp_path, "test/us_foreign_policy_test.csv", MMLU_TEST)
    write(tmp_path, "dev/us_foreign_policy_dev.csv", MMLU_DEV)
    question = asked("mmlu", tmp_path, "us_foreign_policy", shots=1)
    assert question.prompt == (
        "The following are multiple choice questions (with answers) about us_foreign_policy."
        "\n\n\n\n"
        "Question:\nWhat is 1 + 1?\n"
        f"{REQUIREMENT}Options:\n(A) 1\n(B) 2\n(C) 3\n(D) 4\nAnswer:\n(B)"
        "\n\n"
        "Question:\nWhat is 2 + 2?\n"
        f"{REQUIREMENT}Options:\n(A) 3\n(B) 4\n(C) 5\n(D) 6\nAnswer:\n"
    )
    assert [score(question, "mmlu", reply) for reply in ("(B) 4", "(A)", "")] == [1, 0, 0]


def test_ceval(tmp_path: Path) -> None:
    header = "id,question,A,B,C,D,answer"
    write(tmp_path, "val/logic_val.csv", f"{header}\n0,一加一等于____。,一,二,三,四,B\n")
    write(
        tmp_path, "dev/logic_dev.csv", f"{header},explanation\n0,一是____。,一,二,三,四,A,显然。\n"
    )
    question = asked("ceval", tmp_path, "logic", shots=1)
    assert question.prompt == (
        "以下是中国关于逻辑学考试的单项选择题，请选出其中的正确答案。\n\n"
        "问题：\n一是____。\n"
        f"{CHINESE_REQUIREMENT}选项：\n(A) 一\n(B) 二\n(C) 三\n(D) 四\n答案：\n(A)\n\n"
        "问题：\n一加一等于____。\n"
        f"{CHINESE_REQUIREMENT}选项：\n(A) 一\n(B) 二\n(C) 三\n(D) 四\n答案：\n"
    )
    assert [score(question, "ceval", reply) for reply in ("(B)", "（B）")] == [1, 0]


def test_cmmlu(tmp_path: Path) -> None:
    write(tmp_path, "test/agronomy.csv", ",Question,A,B,C,D,Answer\n0,稻是什么？,草,树,鸟,鱼,A\n")
    write(tmp_path, "dev/agronomy.csv", ",Question,A,B,C,D,Answer\n0,松是什么？,草,树,鸟,鱼,B\n")
    question = asked("cmmlu", tmp_path, "agronomy", shots=1)
    assert question.prompt == (
        "以下是关于农学的单项选择题，请直接给出正确答案的选项。\n\n"
        "问题：\n松是什么？\n"
        f"{CHINESE_REQUIREMENT}选项：\n(A) 草\n(B) 树\n(C) 鸟\n(D) 鱼\n答案：\n(B)\n\n"
        "问题：\n稻是什么？\n"
        f"{CHINESE_REQUIREMENT}选项：\n(A) 草\n(B) 树\n(C) 鸟\n(D) 鱼\n答案：\n"
    )
    assert score(question, "cmmlu", "(A)") == 1


HUMANEVAL = {
    "task_id": "HumanEval/0",
    "prompt": '\ndef twice(x):\n    """ Twice x.\n    """\n',
    "entry_point": "twice",
    "canonical_solution": "    return 2 * x\n",
    "test": "def check(candidate):\n    assert candidate(2) == 4\n",
}


def test_humaneval(tmp_path: Path) -> None:
    write(tmp_path, "HumanEval.jsonl.gz", [HUMANEVAL])
    question = asked("humaneval", tmp_path)
    assert question.prompt == 'def twice(x):\n    """ Twice x.\n    """'
    reply = "\n    return 2 * x\n\ndef thrice(x):\n    return 3 * x"
    assert TASKS["humaneval"].parse(reply, question) == (
        '\ndef twice(x):\n    """ Twice x.\n    """\n\n    return 2 * x\n\n'
        "def check(candidate):\n    assert candidate(2) == 4\n\ncheck(twice)"
    )


def mbpp(number: int, **more: object) -> dict[str, object]:
    name = f"f{number}"
    return {
        "source_file": "made up",
        "task_id": number,
        "prompt": f"Write {name}.",
        "code": f"def {name}(x):\n    return x + {number}",
        "test_imports": [],
        "test_list": [f"assert {name}(1) == {1 + number}", f"assert {name}(0) == {number}"],
        **more,
    }


def test_mbpp(tmp_path: Path) -> None:
    setup = mbpp(11, test_imports=["import math"], test_list=["assert math.isclose(f11(1), 12)"])
    (tmp_path / "sanitized-mbpp.json").write_text(json.dumps([mbpp(20), mbpp(2), setup]))
    task, loaded = TASKS["mbpp"], load(TASKS["mbpp"], tmp_path)
    assert [item.id for item in loaded.examples[""]] == ["2"]
    question = asked("mbpp", tmp_path, shots=1)
    assert question.prompt == (
        '"""Write f2.\nassert f2(1) == 3\nassert f2(0) == 2"""def f2(x):\n    return x + 2\n\n'
        '"""Write f20.\nassert f20(1) == 21\nassert f20(0) == 20"""'
    )
    assert task.parse('\ndef f20(x):\n    return x\n"""Next', question) == (
        '"""Write f20.\nassert f20(1) == 21\nassert f20(0) == 20"""\n'
        "def f20(x):\n    return x\nassert f20(1) == 21\nassert f20(0) == 20"
    )
    needs = task.question(loaded.docs[""][2])
    assert task.parse("def f11(x): ...", needs) == (
        '"""Write f11.\nassert math.isclose(f11(1), 12)"""\ndef f11(x): ...\n'
        "import math\nassert math.isclose(f11(1), 12)"
    )


def test_a_docstring_that_is_no_python_is_left_out_of_the_program(tmp_path: Path) -> None:
    write(tmp_path, "mbpp.jsonl", [mbpp(20, test_list=['assert f20("a") == "b"'])])
    question = asked("mbpp", tmp_path)
    assert question.prompt == '"""Write f20.\nassert f20("a") == "b""""'
    program = TASKS["mbpp"].parse("def f20(x): return 'b'", question)
    assert program == 'def f20(x): return \'b\'\nassert f20("a") == "b"'
    assert run(program)


@pytest.mark.parametrize("name", ["humaneval", "mbpp"])
def test_a_program_has_no_score_before_it_is_run(name: str, tmp_path: Path) -> None:
    write(tmp_path, "HumanEval.jsonl.gz", [HUMANEVAL])
    write(tmp_path, "mbpp.jsonl", [mbpp(20)])
    question = asked(name, tmp_path)
    assert TASKS[name].needs_code
    with pytest.raises(InvalidArgumentError, match=f"{name}.*run"):
        score(question, name, "x")


def test_gsm8k(tmp_path: Path) -> None:
    row = {"question": "Two and two?", "answer": "2+2=<<2+2=4>>4\n#### 4"}
    write(tmp_path, "test.jsonl", [row])
    shot = {"question": "One thousand twice?", "answer": "2*1000=<<2*1000=2000>>2000\n#### 2,000"}
    write(tmp_path, "train.jsonl", [shot])
    question = asked("gsm8k", tmp_path, shots=1)
    assert question.prompt == (
        "Question: One thousand twice?\nAnswer: 2*1000=<<2*1000=2000>>2000\n#### 2,000\n\n"
        "Question: Two and two?\nAnswer: "
    )
    assert question.gold == "4"
    assert score(question, "gsm8k", "It is 2+2=<<2+2=4>>4.\n#### 4\n\nQuestion: #### 5") == 1
    assert score(question, "gsm8k", "#### 5") == score(question, "gsm8k", "") == 0


def test_math(tmp_path: Path) -> None:
    more = {"level": "Level 1", "type": "Algebra"}
    problem = {"problem": "Halve $x=1$.", "solution": r"We get $\boxed{\frac12}$.", **more}
    shot = {"problem": "What is $2+2$?", "solution": r"It is $\boxed{4}$.", **more}
    write(tmp_path, "test/algebra/7.json", json.dumps(problem, indent=4))
    write(tmp_path, "train/algebra/1.json", shot)
    question = asked("math", tmp_path, "algebra", shots=1)
    assert question.prompt == (
        "Problem: What is $2+2$?\nSolution: It is $\\boxed{4}$.\n"
        "Final Answer: The final answer is $4$. I hope it is correct.\n\n"
        "Problem: Halve $x=1$.\nSolution: "
    )
    assert question.gold == r"\frac{1}{2}"
    right = r"So.\nFinal Answer: The final answer is $\dfrac{1}{2}$. I hope it is correct."
    replies = (right, right.replace("{2}", "{3}"), "")
    assert [score(question, "math", reply) for reply in replies] == [1, 0, 0]


def test_a_copy_of_math_without_solutions_shows_answers(tmp_path: Path) -> None:
    write(tmp_path, "math500.jsonl", [{"problem": f"{n}?", "answer": f"{n}"} for n in (1, 2)])
    question = asked("math", tmp_path, shots=1)
    assert question.prompt == (
        "Problem: 2?\nSolution: Final Answer: The final answer is $2$. I hope it is correct.\n\n"
        "Problem: 1?\nSolution: "
    )


BBH_OPTIONS = "Which is a day?\nOptions:\n(A) Mist\n(B) Monday"
BBH = {
    "bbh/date_understanding.json": [
        (BBH_OPTIONS, "(B)"),
        (BBH_OPTIONS.replace("day", "mis"), "(A)"),
    ],
    "bbh/sports_understanding.json": [("Is it plausible?", "no"), ("Is this plausible?", "yes")],
    "bbh/object_counting.json": [("I have an ox. How many animals?", "1"), ("And two?", "2")],
}


def write_bbh(folder: Path) -> None:
    for name, pairs in BBH.items():
        examples = [{"input": asked, "target": target} for asked, target in pairs]
        write(folder, name, {"canary": "not to be trained on", "examples": examples})


def test_bbh_with_options_two_answers_and_none(tmp_path: Path) -> None:
    write_bbh(tmp_path)
    question = asked("bbh", tmp_path, "date_understanding", shots=1)
    assert question.prompt == (
        "Question:\nWhich is a mis?\nOptions:\n(A) Mist\n(B) Monmis\n"
        f"{REQUIREMENT}Options:\n(A) Mist\n(B) Monmis\nAnswer:\n(A)\n\n"
        "Question:\nWhich is a day?\nOptions:\n(A) Mist\n(B) Monday\n"
        f"{REQUIREMENT}Options:\n(A) Mist\n(B) Monday\nAnswer:\n"
    )
    assert score(question, "bbh", "(B) Monday") == 1
    assert score(question, "bbh", "So the answer is (B)") == 0
    question = asked("bbh", tmp_path, "sports_understanding")
    assert question.prompt == (
        f"Question:\nIs it plausible?\n{REQUIREMENT}Options:\n(A) Yes\n(B) No\nAnswer:\n"
    )
    assert question.gold == "(B)"
    question = asked("bbh", tmp_path, "object_counting", shots=1)
    assert question.prompt == (
        "Question:\nAnd two?\nAnswer:\n2\n\nQuestion:\nI have an ox. How many animals?\nAnswer:\n"
    )
    assert score(question, "bbh", "One ox. So the answer is 1.\n\nQuestion:\n5") == 1
    assert score(question, "bbh", "11") == 0


def test_the_mistaken_rows_of_bbh(tmp_path: Path) -> None:
    films = "Find a film.\nOptions:\n(A) Monsters, Inc\n(B) Up"
    rows = [
        {"task": "movie_recommendation", "input": films, "target": "Monsters, Inc"},
        {"task": "ruin_names", "input": "A name?", "target": "dearth, wind, & fire"},
        {"task": "ruin_names", "input": "A name?\nOptions:\n(A) a\n(B) b", "target": "(B)"},
    ]
    write(tmp_path, "bbh.jsonl", rows)
    loaded = load(TASKS["bbh"], tmp_path)
    assert asked("bbh", tmp_path, "movie_recommendation").gold == "(A)"
    assert [item.fields["target"] for item in loaded.docs["ruin_names"]] == ["(B)"]
    assert loaded.notes[0].startswith("1 rows were dropped")
    row = {"task": "snarks", "input": "?\nOptions:\n(A) a", "target": "(B)"}
    write(tmp_path, "bbh.jsonl", [row])
    with pytest.raises(DataError, match="snarks 0: expected one of"):
        asked("bbh", tmp_path, "snarks")


def test_bbh_with_a_chain_of_thought(tmp_path: Path) -> None:
    write_bbh(tmp_path)
    text = "canary line\n-----\nCount things.\n\nQ: One?\nA: Let's think. So the answer is 1. \n"
    for name in BBH:
        write(tmp_path, f"cot-prompts/{Path(name).stem}.txt", text)
    question = asked("bbh_cot", tmp_path, "date_understanding")
    assert question.prompt == (
        "Count things.\n\nQ: One?\nA: Let's think. So the answer is 1.\n\n"
        "Q: Which is a day?\nOptions:\n(A) Mist\n(B) Monday\nA: Let's think step by step."
    )
    for reply in ("Mist is none. So the answer is (B).", "So the answer is b."):
        assert score(question, "bbh_cot", reply) == 1
    for reply in ("So the answer is (A).", "I say (B)", ""):
        assert score(question, "bbh_cot", reply) == 0


CHOICES = [{"text": w, "label": n} for w, n in (("dust", "1"), ("water", "2"), ("sand", "3"))]
ARC = {"question": {"stem": "What is wet?", "choices": CHOICES}, "id": "x", "answerKey": "2"}


def test_arc(tmp_path: Path) -> None:
    write(tmp_path, "ARC-Easy/ARC-Easy-Test.jsonl", [ARC])
    question = asked("arc_easy", tmp_path)
    assert question.prompt == (
        f"Question:\nWhat is wet?\n{REQUIREMENT}Options:\n(A) dust\n(B) water\n(C) sand\nAnswer:\n"
    )
    for reply in ("(B)", "B.", "water", "What is wet? water"):
        assert score(question, "arc_easy", reply) == 1
    for reply in ("(A)", "2", "The answer is (B)."):
        assert score(question, "arc_easy", reply) == 0


def test_arc_by_probability(tmp_path: Path) -> None:
    columns = {name: [choice[name] for choice in CHOICES] for name in ("text", "label")}
    beside = {**ARC, "question": "What is wet?", "choices": columns}
    write(tmp_path, "arc_challenge.jsonl", [beside])
    question = asked("arc_challenge", tmp_path, mode="ppl")
    assert question.prompt == "Question: What is wet?\nAnswer: "
    assert (question.options, question.right) == (("dust", "water", "sand"), 1)
    task = TASKS["arc_challenge"]
    assert task.choose([[-9.0, -3.0], [-9.0, -1.0, -1.0], [-9.0, -4.0]], question) == 1
    with pytest.raises(InvalidArgumentError, match="3 options, got 2"):
        task.choose([[-1.0], [-1.0]], question)


HELLASWAG = {
    "ind": 5,
    "activity_label": "Cooking",
    "ctx": "A man boils water. he",
    "endings": ["adds salt.", "flies.", "melts.", "sings to it."],
    "label": 0,
}


def test_hellaswag(tmp_path: Path) -> None:
    write(tmp_path, "hellaswag_val.jsonl", [HELLASWAG])
    question = asked("hellaswag", tmp_path)
    assert question.prompt == (
        "Context:\n Cooking: A man boils water. he\n"
        "Question:\nWhich ending makes the most sense?\n"
        f"{REQUIREMENT}Options:\n"
        "(A) adds salt.\n(B) flies.\n(C) melts.\n(D) sings to it.\nAnswer:\n"
    )
    assert score(question, "hellaswag", "Cooking: A man boils water. he adds salt.") == 1
    assert score(question, "hellaswag", "(B)") == 0


def test_hellaswag_by_probability(tmp_path: Path) -> None:
    write(tmp_path, "hellaswag.jsonl", [{**HELLASWAG, "label": "3"}])
    question = asked("hellaswag", tmp_path, mode="ppl")
    assert question.prompt == "Cooking: A man boils water. he "
    assert question.options == ("adds salt.", "flies.", "melts.", "sings to it.")
    assert question.right == 3
    # By the sum the second would win; by the mean past the common prefix the last.
    logprobs = [[-5.0, -4.0], [-5.0, -1.0], [-5.0, -9.0], [-5.0, -0.5, -0.6, -0.7]]
    assert TASKS["hellaswag"].choose(logprobs, question) == 3


def test_a_mode_that_a_task_does_not_have_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "test.jsonl", [{"question": "?", "answer": "#### 1"}])
    with pytest.raises(InvalidArgumentError, match="mode must be gen for gsm8k, got 'ppl'"):
        asked("gsm8k", tmp_path, mode="ppl")


def test_settings_are_those_of_the_published_run() -> None:
    default, code = (0.3, 0.8), (0.1, 0.95)
    expected = {
        **dict.fromkeys(("ceval", "cmmlu", "mmlu"), (5, default, 300)),
        "humaneval": (0, code, 300),
        "mbpp": (3, code, 300),
        "gsm8k": (8, code, 300),
        "math": (4, code, 300),
        "bbh": (3, default, 300),
        "bbh_cot": (0, default, 1024),
        **dict.fromkeys(("arc_easy", "arc_challenge", "hellaswag"), (0, default, 300)),
    }
    for name, task in TASKS.items():
        sampling = (task.sampling.temperature, task.sampling.top_p)
        assert expected.pop(name) == (task.few_shot["gen"], sampling, task.max_tokens)
    assert not expected


def test_every_set_has_all_its_subsets() -> None:
    sizes = {"ceval": 52, "cmmlu": 67, "mmlu": 57, "math": 7, "bbh": 27, "bbh_cot": 27}
    for name, task in TASKS.items():
        assert len([subset for subset in task.source.subsets if subset]) == sizes.get(name, 0)
    for subjects in (SUBJECTS["ceval"], SUBJECTS["cmmlu"]):
        assert all(re.fullmatch("[\u4e00-\u9fff]+", chinese) for chinese in subjects.values())
        assert len(set(subjects.values())) == len(subjects)


def run(program: str) -> bool:
    """Whether a program ends well. A canonical solution is no stranger's code: no sandbox."""
    command = [sys.executable, "-I", "-c", program]
    return subprocess.run(command, capture_output=True, timeout=60, check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "solution", "indent"),
    [("humaneval", "canonical_solution", "    "), ("mbpp", "code", "")],
)
def test_canonical_solutions_pass_and_corrupted_ones_fail(
    name: str, solution: str, indent: str
) -> None:
    task, loaded = TASKS[name], load(TASKS[name], need_shared("evals"))
    questions = [task.question(item) for item in loaded.docs[""]]
    right = [task.parse(q.doc.fields[solution], q) for q in questions]
    wrong = [task.parse(f"{indent}raise ValueError\n", q) for q in questions]
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(run, right)) == [True] * len(questions)
        assert list(pool.map(run, wrong)) == [False] * len(questions)


def test_solutions_of_gsm8k_are_right_and_corrupted_ones_wrong() -> None:
    task, loaded = TASKS["gsm8k"], load(TASKS["gsm8k"], need_shared("evals"))
    right: list[float] = []  # without the last line
    for item in loaded.docs[""]:
        question = task.question(item)
        solution = item.fields["answer"]
        assert score(question, "gsm8k", solution) == 1
        assert score(question, "gsm8k", solution + "\n\nQuestion: next\nAnswer: #### 123456") == 1
        assert score(question, "gsm8k", solution.replace("#### ", "#### 7")) == 0
        right.append(score(question, "gsm8k", solution.split("\n####")[0]))
    assert 0.85 < sum(right) / len(right) < 1


def test_answers_of_the_samples_are_right() -> None:
    folder = need_shared("evals")
    for name in TASKS.keys() - {"ceval", "humaneval", "mbpp", "gsm8k"}:
        task, loaded = TASKS[name], load(TASKS[name], folder)
        for item in (item for items in loaded.docs.values() for item in items):
            question = task.question(item)
            if question.gold:  # .35625 ends where it begins
                assert score(question, name, task.format_doc(item).output) == 1, (name, item)
            assert score(question, name, "") == score(question, name, "something else") == 0


def test_the_published_table_is_the_readmes() -> None:
    text = need_shared("minicpm-1.0-README.md").read_text(encoding="utf-8")
    seen = set()
    for line in text.split("\n"):
        name, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 14 and name in PUBLISHED:
            seen.add(name)
            row = PUBLISHED[name]
            means = [None if cell == "-" else float(cell) for cell in cells[:3]]
            assert [row.average, row.english, row.chinese] == means
            marks = {"gen": "", "ppl": "*", "report": "(report)"}
            figures = [row.figures.get(task) for task in PUBLISHED["MiniCPM-2B"].figures]
            for figure, cell in zip(figures, cells[3:], strict=True):
                number = cell.removesuffix(marks[figure.mode]) if figure else cell
                assert number == "-" if figure is None else float(number) == figure.value
    assert seen == set(PUBLISHED)
    assert len(seen) == len(MEANS.strip().split("\n")) == 21
    for name, figure in MT_BENCH.items():
        assert f"{name}|{figure:.2f}" in text.replace("**", "")


def test_means_of_the_published_table_are_those_of_its_columns() -> None:
    row = PUBLISHED["MiniCPM-2B"]
    by_language: dict[str, list[float]] = {"en": [], "zh": []}
    for name, figure in row.figures.items():
        by_language[TASKS[name].language].append(figure.value)
    means = {language: sum(values) / len(values) for language, values in by_language.items()}
    assert means["en"] == pytest.approx(row.english, abs=0.01)
    assert means["zh"] == pytest.approx(row.chinese, abs=0.01)
    assert set(row.figures) == set(TASKS) - {"bbh_cot"}
