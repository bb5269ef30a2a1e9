"""Runs: every task in its modes, interrupted and resumed, with other settings refused."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import minicpm_mlx as mm
from minicpm_mlx.errors import DataError, InvalidArgumentError, StorageError
from minicpm_mlx.evals.data.load import load
from minicpm_mlx.evals.record import RunRecord
from minicpm_mlx.evals.run import EvalPlan, EvalProgress, prepare, run
from minicpm_mlx.evals.sandbox.jail import landlock
from minicpm_mlx.evals.settings import ALL, THOUGHT, EvalSettings, sentence
from minicpm_mlx.evals.tasks import TASKS
from minicpm_mlx.files.jsonl import JsonlFile
from minicpm_mlx.lm.batch import BatchRequest, replies
from minicpm_mlx.text.chat_prompt import chat_prompt
from minicpm_mlx.text.chat_template import CHATML
from support.data import need_shared
from support.eval_data import arc, write, write_all
from support.tiny_model import write_model

DECIDED = ("cmmlu", "gsm8k", "bbh", "arc_easy", "hellaswag")
CONTAINED = pytest.mark.skipif(
    sys.platform == "linux" and not landlock.version(), reason="this kernel has no Landlock"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def lm(folder: Path) -> mm.LM:
    return mm.load(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_all(tmp_path_factory.mktemp("data"))


MAX_TOKENS = 20


@pytest.fixture(scope="module", autouse=True)
def short_replies() -> Iterator[None]:
    """Tasks with short replies, which scoring treats like long ones."""
    known = {name: task.max_tokens for name, task in TASKS.items()}
    for task in TASKS.values():
        object.__setattr__(task, "max_tokens", MAX_TOKENS)
    yield
    for name, task in TASKS.items():
        object.__setattr__(task, "max_tokens", known[name])


class InterruptError(Exception):
    """Raised where a test interrupts a run."""


def stop_after(count: int) -> Callable[[EvalProgress], None]:
    left = count

    def listener(now: EvalProgress) -> None:
        nonlocal left
        if now.seconds_left is not None:  # a question was done by this run
            left -= 1
            if not left:
                raise InterruptError

    return listener


def written(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("report.*")}


def records(folder: Path, part: str) -> list[dict[str, Any]]:
    return [dict(row.value) for row in JsonlFile(folder / "records" / f"{part}.jsonl").rows]


@CONTAINED
def test_every_task_runs_in_its_modes(lm: mm.LM, data: Path, tmp_path: Path) -> None:
    how = EvalSettings(tasks=tuple(TASKS), mode="both", limit=1, allow_code=True, shots=1)
    told: list[EvalProgress] = []
    report = run(lm, prepare(how, data), tmp_path / "out", progress=told.append)
    assert [task.name for task in report.tasks] == list(TASKS)
    for task in report.tasks:
        assert set(task.parts) == set(TASKS[task.name].modes)
        for part in task.parts.values():
            subsets = max(len(part.subsets), 1)
            assert part.done == part.of == subsets
            assert part.settings["sha256"]
            assert 0 <= part.score.low <= part.score.mean <= part.score.high <= 100
    assert {(p.part.name, p.done) for p in told} >= {(part.name, 1) for part in how.parts}
    assert {one["outcome"] for one in records(tmp_path / "out", "mbpp.gen")}
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"settings.json", "report.json", "report.md", "report.csv"} <= names


@CONTAINED
def test_right_programs_pass(lm: mm.LM, data: Path, tmp_path: Path) -> None:
    from minicpm_mlx.evals import run as runs
    from minicpm_mlx.evals.generation import GeneratedReply

    loaded = load(TASKS["humaneval"], data)
    questions = [TASKS["humaneval"].question(item) for item in loaded.docs[""]]
    said = [question.doc.fields["canonical_solution"] for question in questions]
    said[1] = said[1].replace("+", "-")
    many = [
        GeneratedReply(question=question, prompt="", few_shot=0, text=text, tokens=1, finish="stop")
        for question, text in zip(questions, said, strict=True)
    ]
    found = list(runs._run_replies(TASKS["humaneval"], iter(many)))
    assert [one["score"] for one in found] == [1, 0, 1, 1, 1, 1]
    assert found[1]["outcome"] == "failed: AssertionError"


def test_code_is_not_run_unless_it_is_allowed() -> None:
    with pytest.raises(InvalidArgumentError, match=r"humaneval and mbpp: .* --allow-code"):
        EvalSettings()
    assert [part.task.name for part in EvalSettings(allow_code=True).parts] == list(ALL)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"tasks": ("nothing",)}, "tasks must be of ceval"),
        ({"tasks": ()}, "tasks must name some"),
        ({"tasks": ("mbpp",)}, "--allow-code"),
        ({"mode": "both of them"}, "mode must be one of gen, ppl, both"),
        ({"tasks": ("mmlu",), "mode": "ppl"}, "mode ppl is for arc_easy.* mmlu has no options"),
        ({"sampling": "beam"}, "sampling must be one of"),
        ({"limit": 0}, "limit must be 1 or more"),
        ({"shots": -1}, "shots must be 0 or more"),
        ({"tasks": ("arc_easy",), "mode": "ppl", "shots": 1}, "shots is for mode gen"),
    ],
)
def test_settings_that_cannot_be_are_refused(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        EvalSettings(**{"tasks": ("arc_easy",), **asked})


def test_only_the_subjects_asked_for_are_done(data: Path) -> None:
    how = EvalSettings(tasks=("mmlu", "cmmlu", "arc_easy"), subjects=("anatomy", "agronomy"))
    mmlu, cmmlu, arc = map(how.of, how.parts)
    assert (mmlu["subjects"], cmmlu["subjects"]) == (["anatomy"], ["anatomy", "agronomy"])
    assert "subjects" not in arc
    how = replace(how, subjects=("anatomy",))
    found = prepare(how, data)
    assert {item.subset for name in ("mmlu", "cmmlu") for item in found.docs[name]} == {"anatomy"}
    assert len(found.docs["arc_easy"]) == 6
    messages = {"astrology": "none of the tasks has astrology"}
    for subject, message in {**messages, "agronomy": "mmlu has none of agronomy"}.items():
        with pytest.raises(InvalidArgumentError, match=message):
            prepare(replace(how, subjects=(subject,)), data)


def test_questions_of_a_lower_limit_are_among_those_of_a_higher(data: Path) -> None:
    def chosen(limit: int | None, seed: int = 0) -> list[str]:
        how = EvalSettings(tasks=("arc_easy",), limit=limit, seed=seed)
        return [item.id for item in prepare(how, data).docs["arc_easy"]]

    assert set(chosen(2)) < set(chosen(4)) < set(chosen(None))
    assert chosen(4) == sorted(chosen(4))  # in the data's order
    assert any(chosen(2) != chosen(2, seed) for seed in range(1, 9))


def some_parts(data: Path, **changes: Any) -> EvalPlan:
    tasks = ("mmlu", "gsm8k", "arc_easy", "hellaswag")
    return prepare(EvalSettings(**{"tasks": tasks, "mode": "both", "shots": 2, **changes}), data)


def test_a_run_broken_off_anywhere_ends_with_the_same_report(
    lm: mm.LM, data: Path, tmp_path: Path
) -> None:
    tasks = ("mmlu", "arc_easy", "hellaswag")
    prepared = some_parts(data, tasks=tasks, limit=3, sampling="ultraeval")
    run(lm, prepared, tmp_path / "whole")
    expected, count = written(tmp_path / "whole"), 0
    rng = random.Random(0)
    while True:
        count += 1
        try:
            run(lm, prepared, tmp_path / "parts", progress=stop_after(rng.randrange(2, 6)))
            break
        except InterruptError:
            files = sorted((tmp_path / "parts" / "records").iterdir())
            last = max(files, key=lambda path: path.stat().st_mtime_ns)
            if count % 2:  # as if killed while it wrote a line
                with last.open("ab") as file:
                    file.write(b'{"subset": "", "id": "q3", "score": 0.')
    assert count > 4
    assert written(tmp_path / "parts") == expected
    for part in prepared.settings.parts:
        both = [
            sorted(records(tmp_path / name, part.name), key=lambda one: (one["subset"], one["id"]))
            for name in ("whole", "parts")
        ]
        for one in (*both[0], *both[1]):
            one.pop("losses", None)  # computed beside others, they are rounded otherwise
        assert both[0] == both[1]


def test_a_run_that_is_done_asks_the_model_nothing(lm: mm.LM, data: Path, tmp_path: Path) -> None:
    prepared = some_parts(data, limit=1)
    first = run(lm, prepared, tmp_path / "out")
    broken = replace(lm, model=None)  # type: ignore[arg-type]
    broken.model = type("Model", (), {"config": lm.config, "adapter": None})()  # type: ignore[assignment]
    told: list[EvalProgress] = []
    from minicpm_mlx.evals import run as runs

    record = RunRecord.read(tmp_path / "out")
    for part in prepared.settings.parts:
        runs._run_part(broken, part, prepared, record, told.append)
    assert all(now.done == now.total and now.seconds_left is None for now in told)
    assert run(lm, prepared, tmp_path / "out") == first


def test_another_setting_is_refused(lm: mm.LM, data: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"tasks": ("mmlu",), "mode": "gen", "limit": 1}
    with pytest.raises(InterruptError):
        run(lm, some_parts(data, **settings), tmp_path / "out", progress=stop_after(1))
    before = (tmp_path / "out" / "settings.json").read_bytes()
    for change, difference in (
        ({"seed": 1}, "seed is 0, not 1"),
        ({"shots": 1}, "shots is 2, not 1"),
        ({"limit": 2}, "limit is 1, not 2"),
        ({"chat_template": True}, "chat_template is false, not true"),
        ({"sampling": "ultraeval"}, 'sampling is "greedy", not "ultraeval"'),
        ({"whole_replies": True}, "whole_replies is false, not true"),
        ({"subjects": ("anatomy",)}, "subjects is"),
    ):
        with pytest.raises(InvalidArgumentError, match=difference):
            run(lm, some_parts(data, **{**settings, **change}), tmp_path / "out")
    assert (tmp_path / "out" / "settings.json").read_bytes() == before


def test_other_data_and_another_model_are_refused(lm: mm.LM, tmp_path: Path) -> None:
    other = write_model(tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "scale_emb": 3}))
    demo = mm.load(other)
    how = EvalSettings(tasks=("arc_easy",), mode="ppl", limit=2)
    write(tmp_path / "data" / "arc_easy.jsonl", [arc(n) for n in range(4)])
    run(lm, prepare(how, tmp_path / "data"), tmp_path / "out")
    with pytest.raises(InvalidArgumentError, match='name is "model", not "other"'):
        run(demo, prepare(how, tmp_path / "data"), tmp_path / "out")
    changed = replace(lm, adapter=Path("/of/pirate/adapters"), model=demo.model)
    with pytest.raises(InvalidArgumentError, match='adapter is null, not "pirate/adapters"'):
        run(changed, prepare(how, tmp_path / "data"), tmp_path / "out")
    write(tmp_path / "data" / "arc_easy.jsonl", [arc(n) for n in range(5)])
    with pytest.raises(InvalidArgumentError, match=r"sha256 of arc_easy.jsonl is .*, not"):
        run(lm, prepare(how, tmp_path / "data"), tmp_path / "out")


def test_tasks_may_be_added_to_a_folder(lm: mm.LM, data: Path, tmp_path: Path) -> None:
    for name in ("arc_easy", "hellaswag"):
        report = run(lm, prepare(EvalSettings(tasks=(name,), mode="ppl"), data), tmp_path / "out")
    assert [task.name for task in report.tasks] == ["arc_easy", "hellaswag"]


def test_a_folder_of_something_else_is_left_alone(lm: mm.LM, data: Path, tmp_path: Path) -> None:
    prepared = prepare(EvalSettings(tasks=("arc_easy",), mode="ppl"), data)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InvalidArgumentError, match=r"notes.txt and no run"):
        run(lm, prepared, tmp_path)
    with pytest.raises(InvalidArgumentError, match="is a file"):
        run(lm, prepared, tmp_path / "notes.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_one_process_at_a_time(lm: mm.LM, data: Path, tmp_path: Path) -> None:
    from minicpm_mlx.evals.record import open_run

    prepared = prepare(EvalSettings(tasks=("arc_easy",), mode="ppl"), data)
    with open_run(tmp_path / "out"), pytest.raises(StorageError, match="another process"):
        run(lm, prepared, tmp_path / "out")
    run(lm, prepared, tmp_path / "out")


def test_damaged_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected the settings of a run"):
        RunRecord.read(tmp_path)
    for content in ("{", "[]", '{"format": 1}', '{"format": 9, "parts": {}}'):
        (tmp_path / "settings.json").write_text(content)
        with pytest.raises(DataError, match=r"settings.json"):
            RunRecord.read(tmp_path)


def test_decided_replies_score_as_whole_ones(lm: mm.LM, data: Path, tmp_path: Path) -> None:
    found = []
    for whole in (False, True):
        how = EvalSettings(tasks=DECIDED, mode="gen", limit=1, shots=0, whole_replies=whole)
        run(lm, prepare(how, data), tmp_path / str(whole))
        rows = {part.name: records(tmp_path / str(whole), part.name) for part in how.parts}
        scores = {
            (name, row["subset"], row["id"]): row["score"] for name in rows for row in rows[name]
        }
        found.append((scores, sum(row["tokens"] for part in rows.values() for row in part)))
    assert found[0][0] == found[1][0]
    assert found[0][1] < found[1][1]


PARTS = st.sampled_from(
    (
        *("(B)", "\n\n", "####", "12", "answer is", "def", "\nif", "<|endoftext|>", "takes the"),
        *("stone", "river", "Which of these is number 1?", "Cooking: Cook 1 comes in and"),
        *"ABCD()# .\n\t",
    )
)


@pytest.fixture(scope="module")
def questions(data: Path) -> list[tuple[str, Any]]:
    found = []
    for name in TASKS:
        for items in load(TASKS[name], data).docs.values():
            found += [(name, TASKS[name].question(item)) for item in items[:4]]
    return found


@settings(max_examples=300, deadline=None)
@given(st.lists(PARTS, max_size=12), st.lists(PARTS, max_size=6))
def test_what_follows_a_decided_reply_changes_nothing(
    questions: list[tuple[str, Any]], begun: list[str], more: list[str]
) -> None:
    reply, rest = "".join(begun), "".join(more)
    for name, question in questions:
        task = TASKS[name]
        if task.early_stop is None or not task.early_stop(reply, question):
            continue
        before, after = (task.parse(text, question) for text in (reply, reply + rest))
        if task.needs_code:
            assert before == after
        else:
            assert task.score(before, question) == task.score(after, question)


def test_decisions_are_soon(questions: list[tuple[str, Any]]) -> None:
    replies = {
        "mmlu": "(A)",
        "bbh": "(A)",
        "gsm8k": "So it is 3 #### 4 ",
        "arc_easy": "(A) stone and ",
        "humaneval": "\n    return x\n\ndef",
        "bbh_cot": "So the answer is No.\n\nQ",
    }
    for name, question in questions:
        if name in replies and question.doc.subset != "object_counting":
            assert TASKS[name].early_stop is not None
            assert TASKS[name].early_stop(replies[name] + " stone", question), name
            assert not TASKS[name].early_stop("", question)


def test_replies_are_the_same_whatever_else_is_asked(lm: mm.LM, data: Path, tmp_path: Path) -> None:
    how: dict[str, Any] = {"tasks": ("gsm8k",), "mode": "gen", "sampling": "ultraeval"}
    run(lm, some_parts(data, **how, width=1, limit=1), tmp_path / "few")
    run(lm, some_parts(data, **how, width=5), tmp_path / "many")
    few = {one["id"]: one["reply"] for one in records(tmp_path / "few", "gsm8k.gen")}
    many = {one["id"]: one["reply"] for one in records(tmp_path / "many", "gsm8k.gen")}
    assert few.items() <= many.items()
    assert len(set(many.values())) == len(many) == 6


def test_examples_that_do_not_fit_are_left_out(lm: mm.LM, data: Path, tmp_path: Path) -> None:
    one_task: dict[str, Any] = {"tasks": ("mmlu",), "subjects": ("anatomy",), "mode": "gen"}
    prepared = some_parts(data, **one_task, limit=1, shots=5)
    run(lm, prepared, tmp_path / "all")
    (whole,) = records(tmp_path / "all", "mmlu.gen")
    short = replace(lm, room=len(lm.encode(whole["prompt"])) + MAX_TOKENS - 1)
    report = run(short, prepared, tmp_path / "short")
    (one,) = records(tmp_path / "short", "mmlu.gen")
    assert (whole["shots"], one["shots"]) == (5, 4)
    assert report.tasks[0].part.fewer_shots == 1
    report = run(replace(lm, room=20), prepared, tmp_path / "none")
    (one,) = records(tmp_path / "none", "mmlu.gen")
    assert (one["finish"], one["score"], one["reply"]) == ("no room", 0, "")
    assert report.tasks[0].part.unasked == 1
    prepared = some_parts(data, tasks=("arc_easy",), mode="ppl", shots=None)
    part = run(replace(lm, room=20), prepared, tmp_path / "options").tasks[0].part
    assert (part.unasked, part.score.mean) == (6, 0)


def test_the_template_is_used_where_it_is_asked_for(lm: mm.LM, data: Path, tmp_path: Path) -> None:
    prepared = some_parts(data, tasks=("mmlu",), mode="gen", limit=1, chat_template=True)
    run(lm, prepared, tmp_path / "out")
    for one in records(tmp_path / "out", "mmlu.gen"):
        assert one["prompt"].startswith("<|im_start|>user\nThe following are multiple choice")
        assert one["prompt"].endswith("Answer:\n<|im_end|>\n<|im_start|>assistant\n")


def test_what_prompts_share_is_read_once_and_changes_no_reply(lm: mm.LM) -> None:
    head = [9 + k % 50 for k in range(80)]
    prompts = [[*head, n] for n in (1, 2, 3)] + [[4, 5, 6], [*head, 7]]
    asked = [BatchRequest(ids=ids, max_tokens=4, sampling=mm.Sampling()) for ids in prompts]
    completions = dict(replies(lm.model, lm.tokenizer, asked, width=2))
    for index, ids in enumerate(prompts):
        alone = lm.generate(ids, max_tokens=4, sampling=mm.Sampling())
        assert completions[index].token_ids == alone.token_ids
    cached = [completions[index].stats.cached_tokens for index in range(5)]
    assert cached.pop(3) == 0
    assert min(cached) > 64


def test_replies_share_the_room_there_is(lm: mm.LM) -> None:
    asked = [
        BatchRequest(ids=[5 + k] * length, max_tokens=8, sampling=mm.Sampling())
        for k, length in enumerate((4, 90, 7, 8, 60, 5))
    ]
    free = dict(replies(lm.model, lm.tokenizer, asked))
    for positions in (1, 40, 200):
        found = dict(replies(lm.model, lm.tokenizer, asked, positions=positions))
        assert [found[k].token_ids for k in range(6)] == [free[k].token_ids for k in range(6)]
    order = [place for place, _ in replies(lm.model, lm.tokenizer, asked, positions=1)]
    assert order == sorted(order)  # one after the other


def test_a_reply_goes_on_with_the_space_it_began_with() -> None:
    from minicpm_mlx.evals.generation import _leading_space
    from support.tiny_tokenizer import tiny

    tokenizer = tiny()
    for text, space in (("▁▁a", " "), ("a", ""), ("\n▁a", "")):
        ids = tuple(tokenizer.backend.token_to_id(piece) for piece in text)
        completion = type("Completion", (), {"token_ids": ids})()
        lm = type("LM", (), {"tokenizer": tokenizer})()
        assert _leading_space(lm, completion) == space


@pytest.mark.parametrize("chat", [True, False])
def test_names_of_special_tokens_stay_text_in_questions_asked_in_chat(chat: bool) -> None:
    from minicpm_mlx.evals import generation
    from support.tiny_tokenizer import tiny

    lm: Any = SimpleNamespace(tokenizer=tiny(CHATML), context_length=999)
    task: Any = SimpleNamespace(
        max_tokens=1, question=lambda doc, examples: SimpleNamespace(prompt="Is it </s>?")
    )
    how: Any = SimpleNamespace(chat_template=chat, seed=0, shots=0, think=None, think_tokens=None)
    nothing: Any = None
    prompt, read = generation._fit_prompt(lm, task, nothing, nothing, how)
    assert read.ids.count(2) == (not chat)
    assert read.ids.count(3) == chat
    assert "Is it </s>?" in prompt.prompt


def test_the_answer_alone_is_scored_of_a_model_that_thinks(tmp_path: Path) -> None:
    from minicpm_mlx.evals import generation
    from support.scripted_model import scripted_lm

    lm = scripted_lm(tmp_path / "model", {"Which?": "<think>\nNot B.\n</think>\n\nA"})
    task = replace(
        TASKS["arc_easy"],
        max_tokens=40,
        early_stop=None,
    )
    how = EvalSettings(tasks=("arc_easy",), chat_template=True)
    chat = chat_prompt(lm.tokenizer, [{"role": "user", "content": "Which?"}])
    question: Any = SimpleNamespace(stop=["Not"], doc=SimpleNamespace(subset="", id="0"))
    asked = generation._request(lm, task, question, chat, how)
    [(_, completion)] = replies(lm.model, lm.tokenizer, [asked])
    assert (completion.text, completion.thinking) == ("A", "Not B.")


@pytest.mark.parametrize("think", [True, False])
def test_a_run_thinks_as_it_is_asked_to_and_says_so(think: bool, tmp_path: Path) -> None:
    """A thought is cut at its limit, and the answer has its room."""
    from support.scripted_model import scripted_lm

    reply = f"<think>\n{'Not B. ' * 9}\n</think>\n\nA"
    lm = scripted_lm(tmp_path / "model", {"Answer": reply}, positions=4096)
    write(tmp_path / "data" / "arc_easy.jsonl", [arc(n) for n in range(2)])
    limit = 16 if think else None
    how = EvalSettings(
        tasks=("arc_easy",), limit=1, shots=0, chat_template=True, think=think, think_tokens=limit
    )
    report = run(lm, prepare(how, tmp_path / "data"), tmp_path / "out")
    [one] = records(tmp_path / "out", "arc_easy.gen")
    assert one["reply"].strip() == "A"
    assert one["prompt"].endswith("<think>\n" if think else "</think>\n\n")
    assert ("Not B." in one.get("thinking", "")) == think
    assert one["tokens"] < 16 + MAX_TOKENS
    settings = report.tasks[0].part.settings
    assert (settings["think"], settings.get("think_tokens")) == (think, limit)
    words = sentence(settings)
    assert ("thinking, thoughts of at most 16 tokens" if think else "not thinking") in words


def test_thinking_goes_with_the_chat_template_and_has_a_limit(lm: mm.LM, data: Path) -> None:
    how = EvalSettings(tasks=("arc_easy",), chat_template=True, think=True)
    assert how.think_tokens == THOUGHT
    with pytest.raises(InvalidArgumentError, match="think this model does not think"):
        run(lm, prepare(how, data), data / "out")
    for wrong, problem in (
        ({"think": True}, "think goes with the chat template"),
        ({"think_tokens": 4}, "think_tokens goes with the chat template"),
        ({"think": False, "think_tokens": 4, "chat_template": True}, "think_tokens contradicts"),
        ({"think_tokens": -1, "chat_template": True}, "think_tokens must be"),
    ):
        with pytest.raises(InvalidArgumentError, match=problem):
            EvalSettings(tasks=("arc_easy",), **wrong)  # type: ignore[arg-type]


def command(*arguments: str) -> list[str]:
    code = "from minicpm_mlx.cli.main import main; main()"
    return [sys.executable, "-c", code, *arguments]


@pytest.mark.slow
@CONTAINED
@pytest.mark.parametrize("name", [name for name in TASKS if name != "ceval"])
def test_the_samples_run_in_all_modes(name: str, demo: mm.LM, tmp_path: Path) -> None:
    subjects = {
        "mmlu": ("anatomy", "virology"),
        "cmmlu": ("agronomy", "anatomy"),
        "bbh": ("navigate", "object_counting", "dyck_languages"),
        "bbh_cot": ("navigate",),
    }.get(name, ())
    how = EvalSettings(tasks=(name,), mode="both", limit=2, allow_code=True, subjects=subjects)
    prepared = prepare(how, need_shared("evals"))
    report = run(demo, prepared, tmp_path / "out")
    for part in report.tasks[0].parts.values():
        assert part.done == part.of == 2 * max(len(subjects), 1)


@pytest.mark.slow
def test_an_interrupt_keeps_what_is_done(folder: Path, data: Path, tmp_path: Path) -> None:
    words = ["eval", "--tasks", "gsm8k,mmlu", "--data", str(data), "--model", str(folder)]
    words += ["--whole-replies", "--shots", "2", "--output", str(tmp_path / "out")]
    process = subprocess.Popen(command(*words), stderr=subprocess.PIPE, text=True)
    path = tmp_path / "out" / "records" / "gsm8k.gen.jsonl"
    end = time.monotonic() + 60
    while not (path.exists() and path.stat().st_size) and time.monotonic() < end:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"kept in {tmp_path / 'out'}; the same command resumes it" in err
    assert "Traceback" not in err
    done = path.read_bytes()
    subprocess.run(command(*words), check=True, capture_output=True)
    assert path.read_bytes().startswith(done)
