"""Data in its published layouts: read alike, refused with file and line, hashed."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import random
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minicpm_mlx.errors import DataError, DownloadError, MiniCPMError
from minicpm_mlx.evals.data import load as data
from minicpm_mlx.evals.data.load import EvalData, load
from minicpm_mlx.evals.examples import draw_examples
from minicpm_mlx.evals.question import Doc
from minicpm_mlx.evals.task import Task
from minicpm_mlx.evals.tasks import TASKS
from minicpm_mlx.loading import download
from support.hub import Hub

GSM8K, MMLU, CMMLU = TASKS["gsm8k"], TASKS["mmlu"], TASKS["cmmlu"]


def put(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def lines(*rows: object) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def parquet(folder: Path, name: str, *rows: dict[str, Any]) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    writer = pytest.importorskip("pyarrow.parquet")
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    writer.write_table(pyarrow.Table.from_pylist(list(rows)), path)


def fields(loaded: EvalData, subset: str = "") -> list[dict[str, Any]]:
    return [dict(item.fields) for item in loaded.docs[subset]]


SUM = {"question": "1 + 1?", "choices": ["1", "2", "3", "4"], "answer": 1}


def test_files_without_a_question_are_named(tmp_path: Path) -> None:
    path = put(tmp_path, "test/anatomy_test.csv", "")
    with pytest.raises(DataError, match=r"questions in test/anatomy_test.csv, found none; "):
        load(MMLU, tmp_path)
    path.write_text("1 + 1?,2,2,3,4,A\n")
    with pytest.raises(DataError, match=r"found none that can be asked \(1 dropped\)"):
        load(MMLU, tmp_path)


def test_a_solution_without_a_number_is_refused(tmp_path: Path) -> None:
    put(tmp_path, "test.jsonl", lines({"question": "1 + 1?", "answer": "It is two."}))
    with pytest.raises(DataError, match=r"test.jsonl:1: .* #### and its number, found 'It is two"):
        load(GSM8K, tmp_path)


def test_all_layouts_of_mmlu_read_alike(tmp_path: Path) -> None:
    subject = "abstract_algebra"
    put(tmp_path / "csv", f"test/{subject}_test.csv", "1 + 1?,1,2,3,4,B\n")
    put(tmp_path / "tar", f"data/test/{subject}_test.csv", "1 + 1?,1,2,3,4,B\r\n")
    put(tmp_path / "one", "mmlu.jsonl", lines({"subject": subject, **SUM, "answer": "B"}))
    parquet(tmp_path / "hub", f"{subject}/test-00000-of-00001.parquet", {"subject": subject, **SUM})
    parquet(tmp_path / "branch", f"{subject}/test/0000.parquet", {"subject": subject, **SUM})
    put(tmp_path / "own", f"mmlu/test/{subject}_test.csv", "1 + 1?,1,2,3,4,B\n")
    for layout in ("csv", "tar", "one", "hub", "branch", "own"):
        loaded = load(MMLU, tmp_path / layout)
        assert fields(loaded, subject) == [SUM], layout
        assert loaded.notes == (
            "1 of 57 subsets are there; missing: anatomy, astronomy, business_ethics, "
            "clinical_knowledge, college_biology, …",
        )


def test_both_layouts_of_cmmlu_read_alike(tmp_path: Path) -> None:
    put(tmp_path / "csv", "test/arts.csv", "\ufeff,Question,A,B,C,D,Answer\n0,1 + 1?,1,2,3,4,B\n")
    row = {"Question": "1 + 1?", "A": "1", "B": "2", "C": "3", "D": "4", "Answer": "B"}
    parquet(tmp_path / "hub", "arts/test/0000.parquet", row)
    for layout in ("csv", "hub"):
        assert fields(load(CMMLU, tmp_path / layout), "arts") == [SUM]


def test_a_cell_may_hold_commas_quotes_and_lines(tmp_path: Path) -> None:
    cells = ['He said:\n"No, why?"', "a,b", '"', "c", "d", "A"]
    text = io.StringIO()
    csv.writer(text).writerow(cells)
    put(tmp_path, "test/anatomy_test.csv", text.getvalue())
    [row] = fields(load(MMLU, tmp_path), "anatomy")
    assert [row["question"], *row["choices"]] == cells[:5]


def test_both_layouts_of_arc_read_alike(tmp_path: Path) -> None:
    choices = [{"text": "dust", "label": "A"}, {"text": "water", "label": "B"}]
    authors = {"id": "x", "question": {"stem": "Wet?", "choices": choices}, "answerKey": "B"}
    columns = {"text": ["dust", "water"], "label": ["A", "B"]}
    beside = {"id": "x", "question": "Wet?", "choices": columns, "answerKey": "B"}
    put(tmp_path / "authors", "ARC-Easy/ARC-Easy-Test.jsonl", lines(authors))
    put(tmp_path / "one", "arc_easy.jsonl", lines(beside))
    parquet(tmp_path / "hub", "ARC-Easy/test/0000.parquet", beside)
    for layout in ("authors", "one", "hub"):
        [item] = load(TASKS["arc_easy"], tmp_path / layout).docs[""]
        assert item.id == "x"
        assert item.fields == {"question": "Wet?", "choices": ["dust", "water"], "answer": 1}


def test_files_that_are_one_object_each_keep_their_numbers_order(tmp_path: Path) -> None:
    for number in (10, 9, 1):
        row = {"problem": str(number), "solution": rf"\boxed{{{number}}}"}
        put(tmp_path, f"MATH/test/geometry/{number}.json", json.dumps(row, indent=1))
    loaded = load(TASKS["math"], tmp_path)
    assert [row["answer"] for row in fields(loaded, "geometry")] == ["1", "9", "10"]


def test_subsets_have_the_names_people_write_and_the_official_order(tmp_path: Path) -> None:
    row = {"problem": "?", "answer": "1", "subject": "Counting & Probability"}
    put(tmp_path, "math500.jsonl", lines(row))
    assert list(load(TASKS["math"], tmp_path).docs) == ["counting_and_probability"]
    for subject in ("virology", "anatomy"):
        put(tmp_path, f"test/{subject}_test.csv", "1 + 1?,1,2,3,4,B\n")
    assert list(load(MMLU, tmp_path).docs) == ["anatomy", "virology"]


def test_rows_without_four_distinct_options_are_dropped_and_counted(tmp_path: Path) -> None:
    put(tmp_path, "test/anatomy_test.csv", "twice?,1,1,3,4,A\nonce?,1,2,3,4,B\n")
    loaded = load(MMLU, tmp_path)
    assert [row["question"] for row in fields(loaded, "anatomy")] == ["once?"]
    assert loaded.notes[0] == ("1 rows were dropped, as they cannot be asked with distinct options")


def test_every_file_read_is_hashed(tmp_path: Path) -> None:
    row = lines({"question": "?", "answer": "#### 1"})
    paths = [put(tmp_path, name, row) for name in ("test.jsonl", "train.jsonl")]
    put(tmp_path, "other.jsonl", "not read")
    expected = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    assert load(GSM8K, tmp_path).sha256 == expected


def test_ids_are_the_datas_and_unique(tmp_path: Path) -> None:
    row = {"activity_label": "x", "ctx": "y", "endings": ["a", "b", "c", "d"], "label": 0}
    put(tmp_path, "hellaswag.jsonl", lines({"ind": 7, **row}, {"ind": 7, **row}, {"ind": 9, **row}))
    items = load(TASKS["hellaswag"], tmp_path).docs[""]
    assert [item.id for item in items] == ["7", "7#1", "9"]


# Missing and malformed data


def test_malformed_files_are_named_with_their_lines(tmp_path: Path) -> None:
    sums, table, endings = "test.jsonl", "test/anatomy_test.csv", "hellaswag.jsonl"
    cookery = {"subject": "cookery", **SUM}
    negative = {"activity_label": "x", "ctx": "y", "endings": ["a", "b"], "label": -1}
    cases: list[tuple[Task, str, str | bytes, str]] = [
        (GSM8K, sums, '{"question": "?"}\n', r"test.jsonl:1: expected a field 'answer', found que"),
        (GSM8K, sums, '{"question": 1, "answer": []}\n', "expected text in 'answer', found a list"),
        (GSM8K, sums, "\n{broken\n", r"test.jsonl:2: not JSON at character 2"),
        (GSM8K, sums, "[1]", r"test.jsonl: item 1 .*expected an object"),
        (GSM8K, sums, "", "expected at least one sample"),
        (GSM8K, sums, b"\xff\xfe\x00", "expected UTF-8, found UTF-16"),
        (MMLU, table, "q,1,2,3,4\n", r"anatomy_test.csv:1: expected 6 cells .*, found 5"),
        (MMLU, table, "q,1,2,3,4,A\nq,1,2,3,4,E\n", r"csv:2: expected A to D, or 0 to 3, .* 'E'"),
        (MMLU, table, "q,1,2,3,4,\n", "found ''; a test split without answers cannot be scored"),
        (MMLU, table, 'q,1,2,3,4,A\n"q,1\n', r"csv:\d: "),
        (MMLU, table, b"q\xff,1,2,3,4,A\n", "expected UTF-8, found byte 0xff"),
        (MMLU, "mmlu.jsonl", lines(cookery), "mmlu.jsonl:1: expected one of .* found 'cookery'"),
        (TASKS["hellaswag"], endings, lines(negative), r"jsonl:1: expected A to B, or 0 to 1, in"),
    ]
    for index, (task, name, content, message) in enumerate(cases):
        put(tmp_path / str(index), name, content)
        with pytest.raises(DataError, match=message):
            load(task, tmp_path / str(index))


def test_an_archive_that_is_cut_or_swells_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = gzip.compress(lines(*({"task_id": str(n)} for n in range(999))).encode())
    put(tmp_path, "HumanEval.jsonl.gz", whole[:-40])
    with pytest.raises(DataError, match=r"HumanEval.jsonl.gz: .*; download it again"):
        load(TASKS["humaneval"], tmp_path)
    monkeypatch.setattr("minicpm_mlx.evals.data.layouts.LARGEST", 1000)
    put(tmp_path, "HumanEval.jsonl.gz", gzip.compress(bytes(10**6)))
    with pytest.raises(DataError, match="expected at most 1000 bytes, found more"):
        load(TASKS["humaneval"], tmp_path)


def test_a_folder_without_the_set_says_what_was_looked_for(tmp_path: Path) -> None:
    put(tmp_path, "notes.md", "")
    source = "huggingface.co/datasets/openai/gsm8k"
    for task, folder, message in (
        (GSM8K, tmp_path, rf"files \(.*test.jsonl\), found notes.md; download them from {source}"),
        (MMLU, tmp_path, r"expected MMLU's files \(test/SUBJECT_test.csv or"),
        (GSM8K, tmp_path / "absent", "expected a folder with GSM8K's files, found none"),
    ):
        with pytest.raises(DataError, match=message):
            load(task, folder)


def test_a_chain_of_thought_that_is_missing_is_named(tmp_path: Path) -> None:
    put(tmp_path, "bbh.jsonl", lines({"task": "navigate", "input": "?", "target": "Yes"}))
    with pytest.raises(DataError, match=r"for navigate.*github.com/suzgunmirac/BIG-Bench-Hard"):
        load(TASKS["bbh_cot"], tmp_path)
    with pytest.raises(DataError, match="files that are not on the hub"):
        load(TASKS["bbh_cot"])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(
    content=st.binary(max_size=80) | st.text(max_size=80).map(str.encode), number=st.integers(0, 3)
)
def test_no_bytes_are_a_traceback(content: bytes, number: int, tmp_path: Path) -> None:
    task, name = [
        (GSM8K, "test.jsonl"),
        (MMLU, "test/anatomy_test.csv"),
        (TASKS["bbh"], "navigate.json"),
        (TASKS["humaneval"], "HumanEval.jsonl.gz"),
    ][number]
    folder = tmp_path / str(number)
    put(folder, name, gzip.compress(content) if name.endswith("gz") else content)
    with suppress(MiniCPMError):
        load(task, folder)


# The hub


def keep(cache: Path, repo: str, commit: str, files: dict[str, dict[str, Any]]) -> None:
    """A data set as the hub's own cache holds it."""
    folder = cache / f"datasets--{repo.replace('/', '--')}"
    for name, row in files.items():
        parquet(folder / "snapshots" / commit, name, row)
    put(folder, f"refs/{data.PARQUET}", commit)


def test_what_the_hub_gave_before_needs_no_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    row = {"question": "1 + 1?", "answer": "#### 2"}
    keep(tmp_path, "openai/gsm8k", "0" * 40, {"main/test/0000.parquet": row})
    with pytest.raises(DownloadError, match=r"gsm8k is not kept.*HF_HUB_OFFLINE.* --data"):
        load(GSM8K, progress=False)  # a part is not taken for the whole
    keep(tmp_path, "openai/gsm8k", "0" * 40, dict.fromkeys(GSM8K.source.download, row))
    loaded = load(GSM8K, progress=False)
    assert fields(loaded) == [row]
    assert loaded.origin == f"openai/gsm8k@{'0' * 40}"
    assert set(loaded.sha256) == {"main/test/0000.parquet", "main/train/0000.parquet"}


def test_only_the_declared_files_are_downloaded_and_once(
    hub_server: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    handler: Any = hub_server.server.RequestHandlerClass
    answer = handler.do_GET

    def as_a_model(request: Any) -> None:
        path = request.path.replace("/api/datasets/", "/api/models/").replace("/datasets/", "/")
        request.path = path.replace("refs%2Fconvert%2Fparquet", "main")
        answer(request)

    monkeypatch.setattr(handler, "do_GET", as_a_model)
    names = list(GSM8K.source.download)
    hub_server.repos["openai/gsm8k"] = {**dict.fromkeys(names, b"x"), "README.md": b"", "a.py": b""}
    folder = download.fetch_data("openai/gsm8k", names, data.PARQUET, progress=False)
    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*.*")]
    assert sorted(files) == sorted(names)
    asked = len(hub_server.requests)
    assert download.fetch_data("openai/gsm8k", names, data.PARQUET, progress=False) == folder
    assert len(hub_server.requests) == asked
    with pytest.raises(DownloadError, match=r"openai/gsm8k has no file main/no.parquet"):
        download.fetch_data("openai/gsm8k", ["main/no.parquet"], data.PARQUET, progress=False)


@pytest.mark.parametrize("task", [task for task in TASKS.values() if not task.source.cot_prompts])
def test_what_is_downloaded_is_what_is_read(task: Task, tmp_path: Path) -> None:
    source = task.source
    for name in data._hub_files(source):
        put(tmp_path, name, "")
    reader = data._DataFolder(tmp_path, source)
    found = [reader.find(names) for names in (source.questions, source.examples)]
    read = {path for subsets in found for paths in subsets.values() for path in paths}
    assert read == {path for path in tmp_path.rglob("*") if path.is_file()}


# Examples


def loaded_of(count: int, shots: int = 0) -> EvalData:
    def made(name: str, number: int) -> tuple[Doc, ...]:
        return tuple(
            Doc(id=str(n), subset="", fields={"question": f"{name} {n}", "answer": "#### 1"})
            for n in range(number)
        )

    examples = {"": made("shot", shots)} if shots else {}
    return EvalData(docs={"": made("item", count)}, examples=examples, sha256={}, origin="here")


def test_examples_are_the_sets_own_where_it_has_some_else_other_questions() -> None:
    loaded = loaded_of(20, shots=9)
    examples = draw_examples(GSM8K, loaded.docs[""][0], loaded)
    assert len(examples) == 8
    assert all(example in loaded.examples[""] for example in examples)
    loaded = loaded_of(9)
    for doc in loaded.docs[""]:
        examples = draw_examples(GSM8K, doc, loaded)
        assert sorted(example.id for example in (*examples, doc)) == list("012345678")


def test_an_example_that_is_the_question_is_left_out_by_what_it_says() -> None:
    loaded = loaded_of(3, shots=3)
    same = Doc(id="other", subset="", fields=loaded.examples[""][1].fields)
    assert len({shot.id for shot in draw_examples(GSM8K, same, loaded, count=2)} & {"1"}) == 0


def test_examples_depend_on_the_seed_alone() -> None:
    loaded = loaded_of(50, shots=40)
    item, other = loaded.docs[""][:2]
    random.seed(1)
    shots = draw_examples(GSM8K, item, loaded, seed=3)
    random.seed(2)
    assert shots == draw_examples(GSM8K, item, loaded, seed=3)
    assert shots != draw_examples(GSM8K, item, loaded, seed=4)
    assert shots == draw_examples(GSM8K, other, loaded, seed=3)  # one beginning for all prompts
    loaded = loaded_of(1, shots=10)  # and on every machine
    shots = draw_examples(GSM8K, loaded.docs[""][0], loaded, seed=0, count=4)
    assert [shot.id for shot in shots] == list("0172")


def test_too_few_examples_are_an_error() -> None:
    loaded = loaded_of(4)
    with pytest.raises(DataError, match="expected 8 examples for GSM8K, found 3"):
        draw_examples(GSM8K, loaded.docs[""][0], loaded)
    assert draw_examples(GSM8K, loaded.docs[""][0], loaded, count=0) == []
