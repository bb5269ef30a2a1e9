"""MT-Bench: its files, its conversations of two turns, its scores."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import minicpm_mlx as mm
from minicpm_mlx.cli.render import theme
from minicpm_mlx.errors import DataError, InvalidArgumentError, StorageError
from minicpm_mlx.evals.mt_bench.judge import UNRATED, Judgement
from minicpm_mlx.evals.mt_bench.judge_client import Endpoint
from minicpm_mlx.evals.mt_bench.questions import CATEGORIES, Bench, load_bench
from minicpm_mlx.evals.mt_bench.radar_chart import draw_radar
from minicpm_mlx.evals.mt_bench.run import (
    QUESTIONS,
    TEMPERATURES,
    BenchModel,
    answer_questions,
    model_of,
    run,
    scores,
)
from minicpm_mlx.files.atomic import alone
from minicpm_mlx.files.jsonl import JsonlFile
from support.data import need_shared
from support.little_bench import PROMPTS, Reply, local_judge, write_bench, write_lines
from support.little_bench import QUESTIONS as LITTLE
from support.tiny_model import write_model

Asked = tuple[list[dict[str, str]], float, int]


class Echo:
    """A model that says how many messages it was shown, and keeps them."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.asked: list[Asked] = []
        self.fails_at = fails_at

    def __call__(
        self, messages: Sequence[Mapping[str, str]], temperature: float, max_tokens: int
    ) -> str:
        self.asked.append(([dict(m) for m in messages], temperature, max_tokens))
        if len(self.asked) == self.fails_at:
            raise KeyboardInterrupt
        return f" I saw {len(messages)}. \n"


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return load_bench(write_bench(tmp_path / "data"))


# ---- files ----


def test_fastchats_layout_is_read(bench: Bench) -> None:
    categories = [(question.id, question.category) for question in bench.questions]
    assert categories == [(1, "writing"), (2, "math"), (3, "stem")]
    assert bench.questions[1].turns == ("What is 6 x 7?", "And half of it?")
    assert bench.questions[1].reference == ("It is 42.", "That is 21.")
    assert bench.questions[0].reference is None
    assert bench.prompt(bench.questions[1], 2).name == "single-math-v1-multi-turn"
    assert bench.prompt(bench.questions[2], 1).name == "single-v1"
    assert set(bench.sha256) == {"question.jsonl", "gpt-4.jsonl", "judge_prompts.jsonl"}


def test_the_published_questions_are_read() -> None:
    bench = load_bench(need_shared("evals"))
    assert [question.id for question in bench.questions] == list(range(81, 161))
    assert Counter(question.category for question in bench.questions) == dict.fromkeys(
        CATEGORIES, 10
    )
    with_reference = [q.id for q in bench.questions if q.reference]
    assert with_reference == list(range(101, 131))
    assert set(TEMPERATURES) == set(CATEGORIES)


def change(folder: Path, file: str, /, **fields: object) -> None:
    """Change the second line of a file."""
    records = {"question.jsonl": LITTLE, "../judge_prompts.jsonl": PROMPTS}[file]
    changed = [dict(record) for record in records]
    changed[1].update(fields)
    write_lines(folder / file, [{k: v for k, v in r.items() if v != ()} for r in changed])


def test_missing_or_malformed_data_is_named_with_its_place(tmp_path: Path) -> None:
    question, prompt = "question.jsonl", "../judge_prompts.jsonl"
    reference = "reference_answer/gpt-4.jsonl"
    changes: list[tuple[str, dict[str, object], str]] = [
        (question, {"turns": ["one"]}, r"jsonl:2: expected two turns"),
        (question, {"turns": "one"}, r"jsonl:2: expected a list of texts"),
        (question, {"category": "art"}, "jsonl:2: expected one of writing"),
        (question, {"category": ()}, "jsonl:2: expected a field 'category'"),
        (question, {"question_id": "2"}, "jsonl:2: expected a whole number"),
        (question, {"question_id": True}, "jsonl:2: expected a whole number"),
        (question, {"question_id": 9}, "reference answer for question 9"),
        (question, {"required_temperature": "x"}, "jsonl:2: .*a number"),
        (prompt, {"name": "x"}, "expected a prompt 'single-math"),
        (prompt, {"prompt_template": "{x}"}, "jsonl:2: .*templ"),
        (prompt, {"prompt_template": "{"}, "jsonl:2: .*templ"),
    ]
    contents = [
        (question, "", "question.jsonl: expected at least"),
        (question, "{\n", "question.jsonl:1: "),
        (reference, '{"question_id": 2, "choices": []}', "gpt-4.jsonl:1: expected a list of obj"),
        (question, None, "expected question.jsonl or .*FastChat"),
        (prompt, None, "judge_prompts.jsonl or"),
        (reference, None, "gpt-4.jsonl or"),
    ]
    for file, content, message in [*changes, *contents]:
        folder = write_bench(tmp_path)
        if isinstance(content, dict):
            change(folder, file, **content)
        else:
            (folder / file).unlink() if content is None else (folder / file).write_text(content)
        with pytest.raises(DataError, match=message):
            load_bench(folder)


# ---- answers ----


def test_each_question_is_asked_in_two_turns_at_its_categorys_temperature(
    bench: Bench, tmp_path: Path
) -> None:
    echo, path = Echo(), tmp_path / "a.jsonl"
    answers = answer_questions(bench, echo, path, model="m")
    assert answers == dict.fromkeys((1, 2, 3), ("I saw 1.", "I saw 3."))
    records = [json.loads(line) for line in path.read_text().splitlines()]  # as FastChat's
    fields = {"question_id", "answer_id", "model_id", "choices", "tstamp"}
    assert [set(record) for record in records] == [fields] * 3
    assert records[0]["choices"] == [{"index": 0, "turns": ["I saw 1.", "I saw 3."]}]
    assert len({record["answer_id"] for record in records}) == 3
    assert [temperature for _, temperature, _ in echo.asked] == [0.7, 0.7, 0.0, 0.0, 0.1, 0.1]
    assert {max_tokens for *_, max_tokens in echo.asked} == {1024}
    assert echo.asked[3][0] == [
        {"role": "user", "content": "What is 6 x 7?"},
        {"role": "assistant", "content": "I saw 1."},
        {"role": "user", "content": "And half of it?"},
    ]


def test_a_temperature_that_the_file_demands_is_kept(tmp_path: Path) -> None:
    echo, folder = Echo(), write_bench(tmp_path)
    change(folder, "question.jsonl", required_temperature=0.5)
    answer_questions(load_bench(folder), echo, tmp_path / "a.jsonl", model="m")
    assert [temperature for _, temperature, _ in echo.asked[2:4]] == [0.5, 0.5]


def test_a_broken_run_asks_only_what_is_left(bench: Bench, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with pytest.raises(KeyboardInterrupt):
        answer_questions(bench, Echo(fails_at=4), path, model="m")
    assert len(path.read_text().splitlines()) == 1  # half a conversation is no answer
    with path.open("a") as file:
        file.write('{"question_id": 2, "cho')
    echo, steps = Echo(), list[tuple[int, ...]]()
    options: Any = {"model": "m", "progress": lambda *step: steps.append(step)}
    found = answer_questions(bench, echo, path, **options)
    assert len(echo.asked) == 4
    assert steps == [(1, 3), (2, 3), (3, 3)]
    assert sorted(found) == [1, 2, 3]
    assert [json.loads(line)["question_id"] for line in path.read_text().splitlines()] == [1, 2, 3]
    with pytest.raises(DataError, match=r"a\.jsonl:1: expected answers of two, found one of m"):
        answer_questions(bench, Echo(), path, model="two")


TEXT = st.text(st.characters())  # lone surrogates too


@given(st.lists(st.dictionaries(TEXT, TEXT | st.integers(0, 9)), max_size=5), st.data())
@settings(deadline=None)
def test_a_file_cut_anywhere_keeps_its_whole_lines_and_can_be_added_to(
    tmp_path_factory: pytest.TempPathFactory, records: list[dict[str, object]], data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("lines") / "x.jsonl"
    lines = JsonlFile(path)
    for record in records:
        lines.add(record)
    written = path.read_bytes() if records else b""
    cut = written[: data.draw(st.integers(0, len(written)))]
    path.write_bytes(cut)
    kept = [row.value for row in JsonlFile(path).rows]
    assert kept == records[: len(kept)]
    assert len(kept) - cut.count(b"\n") in (0, 1)  # a last line that lacks its end alone is whole
    JsonlFile(path).add({"more": 1})
    assert [row.value for row in JsonlFile(path).rows] == [*kept, {"more": 1}]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected a folder"):
        JsonlFile(tmp_path / "none" / "x.jsonl")
    with pytest.raises(DataError, match="expected a file"):
        JsonlFile(tmp_path)
    (tmp_path / "file").write_text("")
    bench = load_bench(write_bench(tmp_path / "data"))
    with pytest.raises(StorageError, match="cannot be written"):
        run(bench, BenchModel("m", Echo()), tmp_path / "file")


# ---- runs ----


def test_without_a_judge_a_run_stops_after_the_answers_and_says_so(
    bench: Bench, tmp_path: Path
) -> None:
    result = run(bench, BenchModel("org/../My Model", Echo()), tmp_path / "out")
    assert result.answers == tmp_path / "out" / "model_answer" / "org_.._My_Model.jsonl"
    assert result.answers.exists()
    assert (result.judgements, result.scores) == (None, None)
    assert "3 answers" in result.message
    assert "no judge" in result.message


def test_with_a_judge_a_run_comes_to_scores(bench: Bench, tmp_path: Path) -> None:
    run(bench, BenchModel("m", Echo()), tmp_path / "out")
    echo = Echo()
    with local_judge() as judge:
        judge.reply = lambda n, body: Reply(
            says="[[8]]" if "6 x 7" in body["messages"][1]["content"] else "[[5]]"
        )
        strict = Endpoint(judge.url, "org/strict")
        result = run(bench, BenchModel("m", echo), tmp_path / "out", judge=strict)
    assert not echo.asked  # they were kept
    assert result.judgements == tmp_path / "out" / "model_judgment" / "org_strict_single.jsonl"
    assert result.scores
    assert result.scores.mean == 6
    assert result.scores.categories["math"] == 8
    assert "6 of 6" in result.message


def test_answers_that_were_made_otherwise_are_not_gone_on_with(
    bench: Bench, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    made = {"sampling": {"top_p": 0.8, "top_k": 0}, "identity": "abc"}
    run(bench, BenchModel("m", Echo(), made), out)
    (path,) = (out / "model_answer").iterdir()
    before = path.read_bytes()

    def refused(bench: Bench, settings: dict[str, Any], difference: str, **more: int) -> None:
        echo = Echo()
        with pytest.raises(InvalidArgumentError, match=f"m's {difference}; .*another folder"):
            run(bench, BenchModel("m", echo, settings), out, **more)
        assert not echo.asked
        assert path.read_bytes() == before

    refused(bench, {**made, "identity": "def"}, 'identity is "abc", not "def"')
    top_p = {"top_p": 0.9, "top_k": 0}
    refused(bench, {**made, "sampling": top_p}, "sampling of top_p is 0.8, not 0.9")
    refused(bench, made, "max_tokens is 1024, not 8", max_tokens=8)
    write_lines(tmp_path / "data" / "mt_bench" / "question.jsonl", LITTLE[:2])
    fewer = load_bench(tmp_path / "data" / "mt_bench")
    hashes = f'"{bench.questions_sha256}", not "{fewer.questions_sha256}"'
    refused(fewer, made, f"sha256 of questions is {hashes}")
    echo = Echo()
    run(bench, BenchModel("m", echo, made), out)
    assert not echo.asked


def test_several_models_answer_in_one_folder_each_with_its_settings(
    bench: Bench, tmp_path: Path
) -> None:
    for name in ("one", "two"):
        run(bench, BenchModel(name, Echo(), {"identity": name}), tmp_path)
    kept = json.loads((tmp_path / "settings.json").read_text())["models"]
    assert [kept[name]["identity"] for name in ("one", "two")] == ["one", "two"]
    names = {path.name for path in (tmp_path / "model_answer").iterdir()}
    assert names == {"one.jsonl", "two.jsonl"}


def test_answers_of_which_nobody_knows_how_they_were_made_are_not_gone_on_with(
    bench: Bench, tmp_path: Path
) -> None:
    run(bench, BenchModel("m", Echo()), tmp_path)
    settings = tmp_path / "settings.json"
    settings.unlink()
    with pytest.raises(InvalidArgumentError, match=r"m\.jsonl: expected settings\.json to say how"):
        run(bench, BenchModel("m", Echo()), tmp_path)
    for content in ('{"format": 1, "parts": {}}', '{"format": 1, "models": {"m": 1}}', "{", "\xff"):
        settings.write_bytes(content.encode("latin-1"))
        with pytest.raises(DataError, match=r"settings\.json: expected the settings of MT-Bench"):
            run(bench, BenchModel("m", Echo()), tmp_path)
    settings.write_text('{"format": 0, "models": {}}')
    with pytest.raises(DataError, match="another version"):
        run(bench, BenchModel("m", Echo()), tmp_path)


def test_a_model_is_known_by_what_decides_its_answers(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "tiny")
    bench = load_bench(write_bench(tmp_path / "data"))
    run(bench, model_of(mm.load(str(folder))), tmp_path / "out", max_tokens=2)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "scale_emb": 3}))
    with pytest.raises(InvalidArgumentError, match="tiny's identity is"):
        run(bench, model_of(mm.load(str(folder))), tmp_path / "out", max_tokens=2)


def test_a_folder_is_for_one_process_at_a_time(bench: Bench, tmp_path: Path) -> None:
    echo = Echo()
    with alone(tmp_path, tmp_path), pytest.raises(StorageError, match="another process"):
        run(bench, BenchModel("m", echo), tmp_path)
    assert not echo.asked

    def another(*_arguments: object) -> str:
        with pytest.raises(StorageError, match="another process"):
            run(bench, BenchModel("m", Echo()), tmp_path)
        return "alone"

    answers = run(bench, BenchModel("m", another), tmp_path).answers
    assert answers.read_text().count("alone") == 6


def test_impossible_options_make_no_folder(bench: Bench, tmp_path: Path) -> None:
    for name, value in (("max_tokens", 0), ("workers", 0), ("workers", -1)):
        options: dict[str, Any] = {name: value}
        with pytest.raises(InvalidArgumentError, match=f"{name} must be 1 or more, got {value}"):
            run(bench, BenchModel("m", Echo()), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_run_says_what_is_not_rated_and_asks_for_it_anew(bench: Bench, tmp_path: Path) -> None:
    model = BenchModel("m", Echo())
    with local_judge() as judge:
        strict = Endpoint(judge.url, "strict")
        judge.reply = lambda n, body: Reply(says="I cannot say.")
        result = run(bench, model, tmp_path, judge=strict)
        assert "none of 6 judgements by strict has a rating, so there is no score" in result.message
        assert f"{result.judgements} has its replies: run again" in result.message
        judge.reply = lambda n, body: Reply(says="[[7]]" if n > 8 else "Still not.")
        result = run(bench, model, tmp_path, judge=strict, workers=1)
        assert result.message == (
            "4 of 6 judgements by strict have a rating; run again to ask for the others once more"
        )
        result = run(bench, model, tmp_path, judge=strict)
        assert result.message == "6 of 6 judgements by strict have a rating"
        assert len(judge.seen) == 6 + 6 + 2


def judged(*rows: tuple[int, str, int, float]) -> list[Judgement]:
    return [Judgement(number, category, turn, score, "") for number, category, turn, score in rows]


def test_scores_are_means_over_what_was_rated() -> None:
    rows = [(1, "writing", 1, 9), (1, "writing", 2, 7), (2, "math", 1, 4)]
    found = scores(judged(*rows, (2, "math", 2, UNRATED), (3, "stem", 1, UNRATED)))
    assert found.mean == pytest.approx(20 / 3)  # each rating counts once, as in show_result
    assert found.turns == (6.5, 7)
    assert [found.categories[name] for name in ("writing", "math", "stem")] == [8, 4, None]
    assert list(found.categories) == list(CATEGORIES)
    assert (found.questions, found.rated, found.unrated) == (3, 3, 2)
    assert found.interval
    assert (found.interval.low, found.interval.high) == (4, 8)
    found = scores(judged((1, "math", 1, UNRATED)))
    assert (found.mean, found.interval, found.turns) == (None, None, (None, None))
    assert found.unrated == 1


def test_the_chart_is_a_picture_of_any_models(tmp_path: Path) -> None:
    some = scores(judged((1, "writing", 1, 9), (2, "math", 1, 4)))
    path = tmp_path / "radar.png"
    draw_radar({"one $x_y$": some, "_two": some, "三": some, "none": scores([])}, path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in tmp_path.iterdir()] == ["radar.png"]
    with pytest.raises(InvalidArgumentError, match="no answer has a rating"):
        draw_radar({"none": scores([])}, path)
    with pytest.raises(InvalidArgumentError, match="folder that exists"):
        draw_radar({"one": some}, tmp_path / "none" / "radar.png")


def test_a_loaded_model_answers_with_its_own_sampling_but_for_the_temperature(
    tmp_path: Path,
) -> None:
    lm = mm.load(str(write_model(tmp_path / "tiny")))
    lm.sampling = replace(lm.sampling, temperature=0.0, top_k=1)
    answer, first = model_of(lm).answer, model_of(lm).settings
    messages = [{"role": "user", "content": "hello"}]
    greedy = answer(messages, 0.0, 12)
    assert greedy == lm.generate(messages, max_tokens=12, sampling=mm.Sampling()).text
    assert answer(messages, 5.0, 12) == greedy  # one token at a time to draw from
    lm.sampling = replace(lm.sampling, top_k=0)
    assert model_of(lm).settings != first
    warm = answer(messages, 5.0, 12)
    assert warm != greedy
    assert answer(messages, 5.0, 12) == warm  # the seed is fixed


# ---- the command ----


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command, of a tiny model, to tmp_path/out."""
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    theme.console.cache_clear()
    begin = ["eval", "mt-bench", "--data", str(write_bench(tmp_path / "data"))]
    begin += ["--model", str(write_model(tmp_path / "tiny"))]
    return [*begin, "--output", str(tmp_path / "out"), "--max-tokens", "4"]


Command = Callable[..., int]
Out = pytest.CaptureFixture[str]


def test_how_many_questions_were_asked_is_said(
    command: Command, capsys: Out, words: list[str], tmp_path: Path
) -> None:
    with local_judge() as judge:
        assert command(*words, "--judge-url", judge.url) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == "MT-Bench 7.00 (7.00 to 7.00), 3 of its 80 questions"
        assert lines[1].startswith("turn 1")  # no model of the README
        whole = [{**LITTLE[0], "question_id": number} for number in range(QUESTIONS)]
        write_lines(tmp_path / "data" / "mt_bench" / "question.jsonl", whole)
        words[words.index("--output") + 1] = str(tmp_path / "whole")
        assert command(*words, "--max-tokens", "1", "--judge-url", judge.url) == 0
        assert capsys.readouterr().out.splitlines()[0] == "MT-Bench 7.00 (7.00 to 7.00)"


def test_the_command_reports_retries_and_missing_ratings(
    command: Command, capsys: Out, words: list[str]
) -> None:
    with local_judge() as judge:
        busy = Reply(503, b"", headers={"Retry-After": "0"})
        judge.reply = lambda n, body: busy if n < 4 else Reply(says="[[11]]")
        assert command(*words, "--judge-url", judge.url, "--workers", "1") == 0
    out, err = capsys.readouterr()
    assert out == "MT-Bench: not rated\n"
    assert "none of 6 judgements by gpt-4 has a rating, so there is no score" in err
    message = "judge: 503 Service Unavailable, trying again in 0 s"
    assert err.splitlines().count(message) == 1
