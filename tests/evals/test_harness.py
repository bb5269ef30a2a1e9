"""lm-evaluation-harness over our model: tasks, files, the command, and its own `hf` model."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import minicpm_mlx as mm
from minicpm_mlx.convert.checkpoint import convert
from minicpm_mlx.errors import DownloadError, InvalidArgumentError, MissingPackageError
from minicpm_mlx.evals.harness import run
from minicpm_mlx.evals.harness.run import choose, figures, run_harness
from support.data import need_shared
from support.harness import passed, prefixed
from support.tiny_model import write_model

ROWS = [
    {"question": "The capital of France is", "choices": [" Paris", " a banana"], "answer": 0},
    {"question": "Two plus two is", "choices": [" a banana", " four"], "answer": 1},
    {"question": "The sky is", "choices": [" blue", " a banana"], "answer": 0},
]
CHOICE = """
output_type: multiple_choice
fewshot_split: test
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
REPLIES = """
output_type: generate_until
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 4}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
WHOLE = """
output_type: loglikelihood_rolling
doc_to_target: question
metric_list: [{metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}]
"""


@pytest.fixture(autouse=True)
def lm_eval() -> None:
    """Skips a test without lm-eval, which is not imported before a test runs."""
    pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> mm.LM:
    return mm.load(write_model(tmp_path_factory.mktemp("tiny") / "model"))


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with tasks of one's own, each on local data."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for name, text in (("own_choice", CHOICE), ("own_replies", REPLIES), ("own_whole", WHOLE)):
        write_task(folder, name, data, text)
    return folder


def write_task(folder: Path, name: str, data: Path, text: str) -> None:
    source = json.dumps({"data_files": {"test": str(data)}})
    (folder / f"{name}.yaml").write_text(
        f"task: {name}\ndataset_path: json\ndataset_kwargs: {source}\ntest_split: test\n"
        + ("" if "doc_to_text" in text else 'doc_to_text: "{{question}}"\n')
        + text.strip()
        + "\nmetadata: {version: 1.0}\n"
    )


def test_tasks_of_ones_own_are_scored_and_written_down(
    lm: mm.LM, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told: list[tuple[str, int, int]] = []
    names = ["own_choice", "own_replies", "own_whole"]
    results = run_harness(
        lm,
        names,
        include_path=tasks,
        limit=2,
        output=tmp_path / "out",
        progress=lambda *step: told.append(step),
    )
    texts = [lm.generate(row["question"], max_tokens=4, stop=["\n"]).text for row in ROWS[:2]]
    right = [
        text == row["choices"][row["answer"]] for text, row in zip(texts, ROWS[:2], strict=True)
    ]
    likelihoods = [
        [
            passed(lm, ids := lm.encode(row["question"] + choice), len(ids) - len(head))[0]
            for choice in row["choices"]
        ]
        for row in ROWS[:2]
        for head in [lm.encode(row["question"])]
    ]
    chosen = [
        np.argmax(values) == row["answer"] for values, row in zip(likelihoods, ROWS, strict=False)
    ]
    total = sum(
        passed(lm, [prefixed(lm), *ids], len(ids))[0]
        for row in ROWS[:2]
        if (ids := lm.tokenizer.encode(row["question"]))
    )
    words = sum(len(row["question"].split()) for row in ROWS[:2])
    assert [(one.task, one.metric) for one in figures(results)] == [
        ("own_choice", "acc"),
        ("own_replies", "exact_match"),
        ("own_whole", "word_perplexity"),
    ]
    assert [one.value for one in figures(results)] == pytest.approx(
        [np.mean(chosen), np.mean(right), np.exp(-total / words)], rel=1e-3
    )
    assert ("log likelihoods", 4, 4) in told
    assert ("replies", 2, 2) in told
    assert capsys.readouterr().out == ""

    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert written["results"]["own_choice"]["acc,none"] == np.mean(chosen)
    assert written["config"]["model"] == "model"
    assert len(written["config"]["model_identity"]) == 32
    for name in names:
        lines = (tmp_path / "out" / f"samples_{name}.jsonl").read_text().splitlines()
        assert [json.loads(line)["doc_id"] for line in lines] == [0, 1]
    with pytest.raises(InvalidArgumentError, match="results of lm-eval already"):
        run_harness(lm, names, output=tmp_path / "out")


def prompts(results: dict[str, Any], name: str) -> list[str]:
    return [sample["arguments"][0][0] for sample in results["samples"][name]]


def test_examples_and_template_are_as_asked(lm: mm.LM, tasks: Path) -> None:
    chosen = choose(["own_choice"], tasks)
    plain = run_harness(lm, chosen, num_fewshot=1, limit=1)
    [prompt] = prompts(plain, "own_choice")
    examples = {row["question"] + row["choices"][row["answer"]] for row in ROWS}
    assert prompt.split("\n\n")[0] in examples
    assert prompt.endswith("\n\nThe capital of France is")

    chosen = choose(["own_choice"], tasks)
    turns = run_harness(
        lm, chosen, num_fewshot=1, limit=1, apply_chat_template=True, system_instruction="Be brief."
    )
    [prompt] = prompts(turns, "own_choice")
    question, _, answer = prompt.partition("<|im_start|>user\n")[2].partition("<|im_end|>\n")
    said = answer.removeprefix("<|im_start|>assistant\n").partition("<|im_end|>")[0]
    assert any((question, said) == (r["question"], r["choices"][r["answer"]]) for r in ROWS)
    assert prompt == lm.tokenizer.chat_text(
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": question},
            {"role": "assistant", "content": said},
            {"role": "user", "content": "The capital of France is"},
        ]
    )


def test_a_task_file_can_be_named_itself(tasks: Path) -> None:
    file = str(tasks / "own_whole.yaml")
    assert choose([file]).names == (file,)


def test_what_cannot_be_run_is_refused_before_the_model_is_asked(
    lm: mm.LM, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InvalidArgumentError, match="expected a folder of task files"):
        choose(["own_choice"], tmp_path / "nowhere")
    with pytest.raises(InvalidArgumentError, match="got none"):
        choose([])
    with pytest.raises(InvalidArgumentError, match="limit must be 1 or more"):
        run_harness(lm, choose(["own_choice"], tasks), limit=0)
    write_task(tasks, "own_code", tasks / "rows.jsonl", REPLIES + "unsafe_code: true")
    with pytest.raises(
        InvalidArgumentError, match=r"own_code .*without a sandbox; allow it with --allow-"
    ):
        run_harness(lm, choose(["own_code"], tasks))
    write_task(tasks, "own_lost", tasks / "gone.jsonl", CHOICE)
    with pytest.raises(DownloadError, match=r"gone\.jsonl"):
        run_harness(lm, choose(["own_lost"], tasks))
    monkeypatch.setattr(run, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=r'pip install "minicpm-mlx\[lm-eval\]"'):
        choose(["own_choice"], tasks)


def test_the_command_prints_the_figures_and_keeps_the_rest(
    tasks: Path, tmp_path: Path, command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["eval", "--harness", "lm-eval", "--tasks", "own_choice", "--include-path", str(tasks)]
    line += ["--limit", "1", "--num-fewshot", "1", "--model", str(write_model(tmp_path / "tiny"))]
    line += ["--device", "cpu"]
    assert command(*line, "--output", str(tmp_path / "out")) == 0
    assert re.search(r"\| own_choice \| acc \| [01]\.0000 \|  \| 1 \|", capsys.readouterr().out)
    assert (tmp_path / "out" / "samples_own_choice.jsonl").exists()
    assert command(*line, "--output", str(tmp_path / "out")) == 1
    assert "has results of lm-eval already" in capsys.readouterr().err
    assert command(*line, "--json", "--output", str(tmp_path / "other")) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown == json.loads((tmp_path / "other" / "results.json").read_text())


def test_options_that_cannot_be_honoured_are_refused(
    command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    messages = {
        "--harness lm-eval --mode gen": "--mode is for the tasks of this program",
        "--harness lm-eval --whole-replies": "--whole-replies is for the tasks of",
        "--harness helm": "--harness must be lm-eval, got 'helm'",
        "--include-path .": "--include-path is for --harness lm-eval",
    }
    for options, message in messages.items():
        line = ["eval", "--tasks", "own_choice", "--model", "demo", *options.split()]
        assert command(*line) == 1
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_lm_evals_own_tasks_are_found_by_name_and_pattern() -> None:
    assert choose(["arc_eas?", "mmlu"]).names == ("arc_easy", "mmlu")
    with pytest.raises(InvalidArgumentError, match=r"no task 'arc_esay'; did you mean .*arc_easy"):
        choose(["arc_esay"])


# Against lm-eval's own model, on torch.

ARC = """
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: "{{choices.label.index(answerKey)}}"
doc_to_choice: "{{choices.text}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
ARC_REPLIES = """
output_type: generate_until
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: "{{choices.text[choices.label.index(answerKey)]}}"
generation_kwargs: {until: ["\\n\\n", "Question:"], max_gen_toks: 24, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture(scope="module")
def llama(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo as transformers reads it."""
    pytest.importorskip("torch", reason="lm-eval's hf model runs on torch")
    pytest.importorskip("accelerate", reason="lm-eval's hf model needs accelerate")
    folder = tmp_path_factory.mktemp("llama") / "demo"
    convert(demo_folder, folder, format="llama", dtype="float32", dequantize=True)
    return folder


def both(
    llama: Path, folder: Path, name: str, limit: int, **options: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Results of our model and of lm-eval's `hf` on the same folder."""
    import lm_eval
    import torch
    from lm_eval.models.huggingface import HFLM

    # torch's log_softmax is wrong by 9e-6 a token in float32, always the same way.
    theirs = HFLM(str(llama), dtype="float32", softmax_dtype="float64", device="cpu", batch_size=4)
    assert theirs.model.dtype == torch.float32
    ours = mm.load(llama, dtype="float32")
    found = run_harness(ours, choose([name], folder), limit=limit, **options)
    if options:
        options["fewshot_as_multiturn"] = True
    expected = lm_eval.simple_evaluate(
        model=theirs,
        tasks=[name],
        task_manager=choose([name], folder).manager,
        limit=limit,
        bootstrap_iters=0,
        fewshot_random_seed=0,
        **options,
    )
    return found, expected


def answers(results: dict[str, Any], name: str) -> list[Any]:
    samples = results["samples"][name]
    assert samples
    return [response for sample in samples for [response] in sample["resps"]]


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"num_fewshot": 2, "apply_chat_template": True}], ids=str)
@pytest.mark.filterwarnings("ignore")  # torch's and transformers' own
def test_log_likelihoods_are_those_of_lm_evals_own_model(
    llama: Path, tasks: Path, options: dict[str, Any]
) -> None:
    data = need_shared("evals", "arc_easy.jsonl")
    write_task(tasks, "arc", data, ARC + "fewshot_split: test\n")
    ours, theirs = both(llama, tasks, "arc", 8 if options else 40, **options)
    assert prompts(ours, "arc") == prompts(theirs, "arc")
    found, expected = answers(ours, "arc"), answers(theirs, "arc")
    apart = np.array([one[0] for one in found]) - [one[0] for one in expected]
    print("largest difference", abs(apart).max(), "over", len(apart))
    assert abs(apart).max() < 1e-3
    assert [one[1] for one in found] == [one[1] for one in expected]
    assert figures(ours)[0].value == figures(theirs)[0].value


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_replies_are_those_of_lm_evals_own_model(llama: Path, tasks: Path) -> None:
    write_task(tasks, "arc", need_shared("evals", "arc_easy.jsonl"), ARC_REPLIES)
    ours, theirs = both(llama, tasks, "arc", 20)
    assert answers(ours, "arc") == answers(theirs, "arc")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_whole_texts_are_scored_as_by_lm_evals_own_model(llama: Path, tasks: Path) -> None:
    data = need_shared("evals", "gsm8k.jsonl")
    write_task(tasks, "sums", data, WHOLE.replace("question", '"{{question}} {{answer}}"'))
    ours, theirs = both(llama, tasks, "sums", 12)
    apart = np.array(answers(ours, "sums")) - answers(theirs, "sums")
    print("largest difference", abs(apart).max(), "of", np.array(answers(theirs, "sums")).min())
    assert abs(apart).max() < 1e-3
