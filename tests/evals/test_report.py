"""Reports: scores, means and intervals from records; tables; two runs compared."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from minicpm_mlx.errors import DataError
from minicpm_mlx.evals.record import RunRecord
from minicpm_mlx.evals.report.compare import compare_runs
from minicpm_mlx.evals.report.published import PUBLISHED, mt_bench_score
from minicpm_mlx.evals.report.statistics import bootstrap, compare, wilson
from minicpm_mlx.evals.report.summary import Report, report_of
from minicpm_mlx.evals.report.tables import as_csv, as_markdown, scores_table
from minicpm_mlx.evals.report.write import write_report
from minicpm_mlx.evals.settings import ALL, EvalSettings, TaskPart
from minicpm_mlx.evals.tasks import TASKS
from minicpm_mlx.model_cards import cards

REPO = "openbmb/MiniCPM-2B-dpo-bf16"
Scores = Mapping[str, Mapping[str, Sequence[float]]]
"""By part and subset."""


SFT = "minicpm-2b-sft"
"""A model whose scores are published."""


def begin(
    folder: Path, scores: Scores, name: str = SFT, model: Mapping[str, Any] = {}, **more: Any
) -> RunRecord:
    """A run's folder with a record for each of the scores."""
    folder.mkdir(parents=True, exist_ok=True)
    run, parts = RunRecord(folder), {}
    for part, subsets in scores.items():
        task, mode = part.split(".")
        asked = EvalSettings(tasks=(task,), mode=mode, allow_code=True).of(
            TaskPart(TASKS[task], mode)
        )
        asked |= {"origin": "data", "sha256": {"file": "0" * 64}, "notes": []}
        asked["questions"] = {subset: len(found) for subset, found in subsets.items()}
        parts[part] = {**asked, **more}
    run.begin(
        {"name": name, "adapter": None, "identity": name, **model},
        {"minicpm-mlx": "1.0", "mlx": "0.1", "mlx-lm": "0.1"},
        parts,
    )
    for part, subsets in scores.items():
        lines = run.open_part(part)
        for subset, found in subsets.items():
            for number, score in enumerate(found):
                lines.add({"subset": subset, "id": f"q{number}", "gold": "x", "score": score})
    return run


def rows(report: Report) -> dict[str, list[str]]:
    """The cells of the table of scores by their first."""
    lines = scores_table(report).splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {first: rest for first, *rest in cells}


def test_a_set_is_the_mean_over_its_subsets(tmp_path: Path) -> None:
    subsets = {"anatomy": [1, 1, 1, 0], "virology": [0, 1]}
    report = report_of(begin(tmp_path, {"mmlu.gen": subsets}))
    part = report.tasks[0].part
    found = bootstrap(subsets)
    assert part.score.mean == pytest.approx(62.5)
    assert (part.score.low, part.score.high) == pytest.approx((100 * found.low, 100 * found.high))
    low = wilson(3, 4)
    assert part.subsets["anatomy"].low == pytest.approx(100 * low.low)
    assert (part.done, part.of) == (6, 6)


def test_one_subset_has_wilsons_interval(tmp_path: Path) -> None:
    report = report_of(begin(tmp_path, {"gsm8k.gen": {"": [1, 0, 0, 1, 1]}}))
    expected = wilson(3, 5)
    score = report.tasks[0].part.score
    assert (score.low, score.high) == pytest.approx((100 * expected.low, 100 * expected.high))
    assert report.tasks[0].part.subsets == {}


def test_subsets_without_a_difference_are_not_taken_for_sure(tmp_path: Path) -> None:
    report = report_of(begin(tmp_path, {"mmlu.gen": {"anatomy": [0, 0], "virology": [1, 1]}}))
    score = report.tasks[0].part.score
    assert score.mean == 50
    assert score.low < 40
    assert score.high > 60


def test_of_both_modes_the_higher_counts_and_ppl_is_marked(tmp_path: Path) -> None:
    scores: Scores = {
        "arc_easy.gen": {"": [1, 0, 0, 0]},
        "arc_easy.ppl": {"": [1, 1, 1, 0]},
        "arc_challenge.gen": {"": [1, 1]},
        "arc_challenge.ppl": {"": [1, 0]},
        "hellaswag.gen": {"": [1, 0]},
        "hellaswag.ppl": {"": [0, 1]},
    }
    report = report_of(begin(tmp_path, scores))
    assert [task.counted for task in report.tasks] == ["ppl", "gen", "gen"]
    table = rows(report)
    assert [table[name][0] for name in ("ARC-E", "ARC-C", "HellaSwag")] == [
        "75.00*",
        "100.00",
        "50.00",
    ]
    assert table["ARC-E"][2:4] == ["85.44", "-10.44"]
    assert table["English mean"][0] == "75.00"


def everything() -> Scores:
    names = [f"{name}.gen" for name in ALL]
    return {name: {"": [1.0] * place + [0.0] * (11 - place)} for place, name in enumerate(names)}


def test_the_whole_table_has_the_readmes_means(tmp_path: Path) -> None:
    report = report_of(begin(tmp_path, everything()))
    by_name = {task.name: task.part.score.mean for task in report.tasks}
    assert list(by_name) == list(PUBLISHED["MiniCPM-2B"].figures)
    chinese = [by_name["ceval"], by_name["cmmlu"]]
    means = report.means
    assert means["chinese"].score.mean == pytest.approx(sum(chinese) / 2)
    assert means["english"].score.mean == pytest.approx((sum(by_name.values()) - sum(chinese)) / 9)
    assert means["average"].score.mean == pytest.approx(sum(by_name.values()) / 11)
    row = PUBLISHED["MiniCPM-2B"]
    published = {name: mean.published for name, mean in means.items()}
    assert published == {"english": row.english, "chinese": row.chinese, "average": row.average}
    for mean in means.values():
        assert mean.score.low < mean.score.mean < mean.score.high
    widths = [t.part.score.high - t.part.score.low for t in report.tasks]
    whole = means["average"].score
    assert whole.high - whole.low < min(widths)


def test_means_of_some_sets_stand_beside_those_of_the_same_sets(tmp_path: Path) -> None:
    scores: Scores = {"gsm8k.gen": {"": [1, 0]}, "math.gen": {"": [0, 0]}, "bbh_cot.gen": {"": [1]}}
    report = report_of(begin(tmp_path, scores))
    assert set(report.means) == {"english", "average"}
    assert report.means["average"].sets == 2  # BBH-CoT is no column
    assert report.means["average"].published == pytest.approx((53.83 + 10.24) / 2)
    assert report.means["average"].score.mean == 25


@pytest.mark.parametrize(
    ("name", "model", "published"),
    [
        ("minicpm-2b-dpo", {"repo": REPO}, "53.83"),
        ("openbmb/MiniCPM-2B-sft-fp32", {"repo": "openbmb/MiniCPM-2B-sft-fp32"}, "53.83"),
        ("openbmb/MiniCPM-2B-sft-bf16", {"repo": None}, "53.83"),  # the hub's own folder
        ("minicpm-2b-sft-llama-format", {}, "53.83"),  # of a version that recorded no repository
        ("x", {"repo": "Qwen/Qwen-7B-Chat"}, "42.23"),
        ("minicpm-2b-sft", {"repo": None}, None),  # a folder of that name
        ("minicpm-2b-dpo", {"repo": REPO, "adapter": "runs/adapters"}, None),
        ("minicpm-2b-128k", {"repo": "openbmb/MiniCPM-2B-128k"}, None),
        ("minicpm5-1b", {"repo": "openbmb/MiniCPM5-1B-MLX"}, None),
        ("demo", {"repo": None}, None),
        ("mine", {}, None),
    ],
)
def test_published_scores_stand_beside_the_models_they_are_of(
    tmp_path: Path, name: str, model: dict[str, Any], published: str | None
) -> None:
    report = report_of(begin(tmp_path, {"gsm8k.gen": {"": [1]}}, name=name, model=model))
    text = as_markdown(report)
    if published is not None:
        assert rows(report)["GSM8K"][2] == published
        assert report.why_alone is None
        return
    assert rows(report)["GSM8K"] == ["100.00", "20.7 to 100.0", "1"]
    assert report.means["average"].published is None
    assert "No published scores beside: the README's are of" in text
    assert text.count("README") == 1
    assert name in text.splitlines()[0]
    assert next(csv.DictReader(io.StringIO(as_csv(report))))["published"] == ""
    if find_spec("matplotlib"):
        assert tmp_path / "report.png" in write_report(report, tmp_path)


def test_mt_bench_is_published_of_the_dpo_model_alone() -> None:
    assert mt_bench_score({"name": "minicpm-2b-dpo", "repo": REPO}) == 7.25
    assert mt_bench_score({"name": "minicpm-2b-dpo", "repo": REPO, "adapter": "mine"}) is None
    assert mt_bench_score({"name": "minicpm-2b-sft", "repo": cards()[SFT].repo}) is None
    assert mt_bench_score({"name": "minicpm-2b-dpo", "repo": None}) is None


def test_an_unfinished_part_says_so(tmp_path: Path) -> None:
    run = begin(tmp_path, {"gsm8k.gen": {"": [1, 0]}, "math.gen": {}}, questions={"": 5})
    report = report_of(run)
    assert rows(report)["GSM8K"][-1] == "2 of 5"
    assert "Not finished: GSM8K." in as_markdown(report)
    assert [task.name for task in report.tasks] == ["gsm8k"]  # of MATH nothing is done


def test_files_are_written_in_three_forms(tmp_path: Path) -> None:
    scores = {**everything(), "mmlu.gen": {"anatomy": [1, 0], "virology": [1, 1]}}
    run = begin(tmp_path, scores, name="a|b <c> $d$ 模型", model={"repo": REPO})
    report = report_of(run)
    paths = write_report(report, tmp_path)
    assert {path.suffix for path in paths} >= {".json", ".md", ".csv"}
    assert json.loads((tmp_path / "report.json").read_text("utf-8")) == json.loads(
        json.dumps(report.to_json())
    )
    table = list(csv.DictReader(io.StringIO(as_csv(report))))
    assert [row["task"] for row in table if not row["subset"]] == [*ALL, *report.means]
    anatomy = next(row for row in table if row["subset"] == "anatomy")
    assert (anatomy["task"], float(anatomy["score"])) == ("mmlu", 50)
    gsm8k = next(row for row in table if row["task"] == "gsm8k")
    assert (gsm8k["published"], gsm8k["questions"], gsm8k["of"]) == ("53.83", "11", "11")
    text = (tmp_path / "report.md").read_text("utf-8")
    for said in ("seed 0", "5 examples", "greedy", "no chat template", "SHA-256", "mlx 0."):
        assert said in text
    assert "# a/b &lt;c> $d$ 模型" in text
    if find_spec("matplotlib"):
        assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_records_that_are_none_are_named(tmp_path: Path) -> None:
    run = begin(tmp_path, {"gsm8k.gen": {"": [1]}})
    path = tmp_path / "records" / "gsm8k.gen.jsonl"
    path.write_text('{"subset": "", "id": "q0"}\n')
    with pytest.raises(DataError, match=r"gsm8k.gen.jsonl:1: expected a record with a score"):
        report_of(run)
    run.settings["parts"] = {"chess.gen": {}}
    with pytest.raises(DataError, match=r"'chess.gen', a task that this version lacks"):
        report_of(run)


def test_runs_are_compared_question_by_question(tmp_path: Path) -> None:
    before, after = [1, 0, 0, 0, 0, 0, 0, 1], [0, 1, 1, 1, 1, 1, 0, 1]
    begin(tmp_path / "a", {"gsm8k.gen": {"": before}, "math.gen": {"": [1]}})
    begin(tmp_path / "b", {"gsm8k.gen": {"": after}}, name="other")
    found = compare_runs(tmp_path / "a", tmp_path / "b")
    part = found.parts["gsm8k.gen"]
    assert found.models == (f"{SFT} ({tmp_path / 'a'})", f"other ({tmp_path / 'b'})")
    assert (part.questions, part.first, part.second) == (8, 25, 75)
    assert part.comparison == compare(before, after)
    assert part.comparison.low < 0.5 < part.comparison.high
    assert part.comparison.p == pytest.approx(2 * 7 / 2**6)  # 5 up, 1 down
    assert part.gained == tuple(("", f"q{n}") for n in (1, 2, 3, 4, 5))
    assert part.lost == (("", "q0"),)
    assert found.notes == ("in only one of the runs: math.gen",)
    written = json.loads(json.dumps(found.to_json()))["parts"]["gsm8k.gen"]
    assert written["lost"] == [["", "q0"]]
    difference = written["comparison"]["difference"]
    assert (written["first"], written["second"], difference) == (25, 75, 50)  # all in per cent
    assert written["comparison"]["low"] < 50 < written["comparison"]["high"]


def test_a_comparison_says_what_was_asked_otherwise(tmp_path: Path) -> None:
    begin(tmp_path / "a", {"gsm8k.gen": {"": [1, 0]}})
    begin(tmp_path / "b", {"gsm8k.gen": {"": [1, 0, 1]}}, shots=2)
    found = compare_runs(tmp_path / "a", tmp_path / "b")
    assert found.parts["gsm8k.gen"].questions == 2
    assert found.notes == (
        "both are runs of the same model",
        "gsm8k.gen ran with other settings: shots 8 and 2",
        "gsm8k.gen: questions scored in only one of the runs: 1",
    )


def test_runs_are_compared_by_the_scores_that_their_reports_have(tmp_path: Path) -> None:
    runs = {
        "a": {"anatomy": [0, 0, 0], "virology": [1]},
        "b": {"anatomy": [0, 1, 0], "virology": [1]},
    }
    for name, scores in runs.items():
        begin(tmp_path / name, {"mmlu.gen": scores}, name=name)
    part = compare_runs(tmp_path / "a", tmp_path / "b").parts["mmlu.gen"]
    for name, score in (("a", part.first), ("b", part.second)):
        assert score == pytest.approx(report_of(tmp_path / name).tasks[0].part.score.mean)
    assert 100 * part.comparison.difference == pytest.approx(part.second - part.first)
    assert part.comparison.low <= part.comparison.difference <= part.comparison.high


def test_runs_of_other_questions_are_not_compared(tmp_path: Path) -> None:
    begin(tmp_path / "a", {"gsm8k.gen": {"": [1]}})
    other = begin(tmp_path / "b", {"gsm8k.gen": {}})
    with pytest.raises(DataError, match="found none"):
        compare_runs(tmp_path / "a", tmp_path / "b")
    other.open_part("gsm8k.gen").add({"subset": "", "id": "q0", "gold": "y", "score": 1.0})
    with pytest.raises(DataError, match="question q0 differs between the runs"):
        compare_runs(tmp_path / "a", tmp_path / "b")
    with pytest.raises(DataError, match="expected the settings of a run"):
        compare_runs(tmp_path / "a", tmp_path / "c")
