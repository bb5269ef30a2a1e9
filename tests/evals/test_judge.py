"""The judge: its requests byte for byte, retries, recorded judgements."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minicpm_mlx.errors import DataError, DownloadError, InvalidArgumentError
from minicpm_mlx.evals.mt_bench.judge import UNRATED, judge_answers, judge_messages, parse_rating
from minicpm_mlx.evals.mt_bench.judge_client import Endpoint, key_from
from minicpm_mlx.evals.mt_bench.questions import Bench, load_bench
from support.data import need_shared
from support.little_bench import ANSWERS, LocalJudge, Reply, local_judge, write_bench, write_lines

ASK = [{"role": "user", "content": "é"}]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return load_bench(write_bench(tmp_path / "data"))


@pytest.fixture
def judge() -> Iterator[LocalJudge]:
    with local_judge() as found:
        yield found


def endpoint(judge: LocalJudge, **more: Any) -> Endpoint:
    return Endpoint(judge.url, "strict", **{"wait": 0.001, **more})


# ---- ratings ----


def test_the_first_rating_in_double_brackets_counts_else_in_single_ones() -> None:
    ratings = {
        **{"Rating: [[5]]": 5, "Rating: [[7.5]]": 7.5, "Rating: [[10]] and not [[1]]": 10},
        **{"As [1] says, so: [[8]]": 8, "Rating: [6]": 6, "Rating: [6.]": 6, "[[08]]": 8},
        "[[1]]": 1,
    }
    unrated = ("[[ 6 ]]", "Rating: [[rating]]", "Rating: 9", "[[-3]]", "[[5/10]]", "", "[[0]]")
    unrated += ("[[0.9]]", "[[10.5]]", "[[11]]", "Rating: [95]", f"[[{'9' * 400}]]")
    for judgment, score in {**ratings, **dict.fromkeys(unrated, UNRATED)}.items():
        assert parse_rating(judgment) == score, judgment


@given(st.text("[]0123456789. ab", max_size=40))
def test_whatever_a_judge_says_has_a_score(judgment: str) -> None:
    score = parse_rating(judgment)
    assert score == UNRATED or 1 <= score <= 10
    assert "[[" in judgment or parse_rating(f"{judgment} [[4]]") == 4


@given(st.integers(0, 100), st.text(st.characters(exclude_characters="[]"), max_size=20))
def test_a_rating_is_found_between_any_words(score: int, words: str) -> None:
    expected = score if 1 <= score <= 10 else UNRATED
    assert parse_rating(f"{words}[[{score}]]{words}") == expected
    assert parse_rating(f"{words}[{score}]{words}") == expected


# ---- requests ----


EXPECTED = {
    (1, 1): b'{"model": "strict", "messages": [{"role": "system", "content": "You help."}, '
    b'{"role": "user", "content": "[Question]\\nWrite {a} poem.\\n\\n[Answer]\\nA poem {of} one '
    b'line.\\n[End]"}], "n": 1, "temperature": 0, "max_tokens": 2048}',
    (1, 2): b'{"model": "strict", "messages": [{"role": "system", "content": "You rate the '
    b'second.\\n\\n"}, {"role": "user", "content": "Write {a} poem.\\nA poem {of} one line.\\n'
    b'Make it shorter: \xc3\xa9.\\nA \\\\n line \xc3\xa9."}], "n": 1, "temperature": 0, '
    b'"max_tokens": 2048}',
    (2, 1): b'{"model": "strict", "messages": [{"role": "system", "content": "You help."}, '
    b'{"role": "user", "content": "[Question]\\nWhat is 6 x 7?\\n[Reference]\\nIt is 42.\\n'
    b'[Answer]\\n42"}], "n": 1, "temperature": 0, "max_tokens": 2048}',
    (2, 2): b'{"model": "strict", "messages": [{"role": "system", "content": "You rate the '
    b'second.\\n\\n"}, {"role": "user", "content": "What is 6 x 7?\\nIt is 42.\\nAnd half of it?\\n'
    b'That is 21.\\nWhat is 6 x 7?\\n42\\nAnd half of it?\\n21"}], "n": 1, "temperature": 0, '
    b'"max_tokens": 2048}',
}


def test_requests_are_these_bytes(bench: Bench, judge: LocalJudge, tmp_path: Path) -> None:
    judge_answers(bench, ANSWERS, endpoint(judge), tmp_path / "j.jsonl", model="m", workers=1)
    bodies = [seen.body for seen in judge.seen]
    assert bodies[:4] == [EXPECTED[1, 1], EXPECTED[1, 2], EXPECTED[2, 1], EXPECTED[2, 2]]
    assert len(bodies) == 6
    assert {seen.path for seen in judge.seen} == {"/v1/chat/completions"}
    assert judge.seen[0].headers["Content-Type"] == "application/json"
    assert "Authorization" not in judge.seen[0].headers


def test_the_official_prompts_are_filled_in_as_published() -> None:
    bench = load_bench(need_shared("evals"))
    writing, math = (next(q for q in bench.questions if q.id == n) for n in (81, 111))
    assert (writing.category, math.category) == ("writing", "math")
    general = judge_messages(bench, writing, ("First.", "Second."), 1)
    assert general[0] == {"role": "system", "content": "You are a helpful assistant."}
    assert general[1]["content"].startswith("[Instruction]\nPlease act as an impartial judge")
    assert general[1]["content"].endswith(
        f"[Question]\n{writing.turns[0]}\n\n[The Start of Assistant's Answer]\nFirst.\n"
        "[The End of Assistant's Answer]"
    )
    assert math.reference
    both = judge_messages(bench, math, ("First.", "Second."), 2)
    assert both[0]["content"].endswith('for example: "Rating: [[5]]".\n\n')
    assert both[1]["content"] == (
        "<|The Start of Reference Answer|>\n\n"
        f"### User:\n{math.turns[0]}\n\n### Reference answer:\n{math.reference[0]}\n\n"
        f"### User:\n{math.turns[1]}\n\n### Reference answer:\n{math.reference[1]}\n\n"
        "<|The End of Reference Answer|>\n\n\n"
        "<|The Start of Assistant A's Conversation with User|>\n\n"
        f"### User:\n{math.turns[0]}\n\n### Assistant A:\nFirst.\n\n"
        f"### User:\n{math.turns[1]}\n\n### Assistant A:\nSecond.\n\n"
        "<|The End of Assistant A's Conversation with User|>"
    )


def test_a_key_goes_along_and_is_shown_to_nobody(judge: LocalJudge) -> None:
    asked = endpoint(judge, key="sk-secret")
    asked.chat(ASK)
    assert judge.seen[0].headers["Authorization"] == "Bearer sk-secret"
    assert "secret" not in repr(asked)
    judge.reply = lambda n, body: Reply(401, b"Incorrect API key provided: sk-secret.")
    with pytest.raises(DownloadError, match="401") as error:
        asked.chat(ASK)
    assert "secret" not in str(error.value)


def test_a_key_comes_from_the_environment_or_a_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert key_from() is None
    monkeypatch.setenv("OPENAI_API_KEY", " sk-1\n")
    monkeypatch.setenv("OTHER", "sk-2")
    assert (key_from(), key_from("OTHER")) == ("sk-1", "sk-2")
    file = tmp_path / "key"
    file.write_text("sk-3\n")
    assert key_from(file=file) == "sk-3"
    for content in (b"", b"two words", b"\xff\xfe"):
        file.write_bytes(content)
        with pytest.raises(InvalidArgumentError, match="key"):
            key_from(file=file)
    with pytest.raises(InvalidArgumentError, match="No such file"):
        key_from(file=tmp_path / "none")


def test_an_invalid_endpoint_is_refused() -> None:
    urls = ["api.openai.com/v1", "ftp://host/v1", "file:///etc/passwd", "http://"]
    urls += ["http://host:port/v1", "http://[::1/v1", "https://user:word@host/v1"]
    endpoints: list[tuple[str, dict[str, Any]]] = [(url, {}) for url in urls]
    endpoints += [("https://host/v1?key=1", {}), ("http://host/v1", {"key": "sk"})]
    wrong = [{"key": "a\r\nX-Evil: 1"}, {"key": "ключ"}, {"attempts": 0}, {"timeout": 0}]
    endpoints += [("https://host/v1", options) for options in [*wrong, {"wait": float("nan")}]]
    for url, options in endpoints:
        with pytest.raises(InvalidArgumentError):
            Endpoint(url, "m", **options)


# ---- retries ----


@pytest.mark.parametrize(
    "trouble",
    [
        Reply(429, b"slow down"),
        Reply(429, b"", headers={"Retry-After": "0"}),
        Reply(500),
        Reply(503, b"<html>", headers={"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}),
        Reply(529, headers={"Retry-After": "soon"}),
        Reply(cut=True),
        Reply(body=b'{"choices": []}'),
        Reply(body=b"not json"),
        Reply(body=b"[" * 100_000),
        Reply(body=b'{"choices": [{"message": {"content": 5}}]}'),
        Reply(200, b"{}", headers={"Content-Length": "5"}),
    ],
    ids=str,
)
def test_trouble_that_may_pass_is_waited_for(judge: LocalJudge, trouble: Reply) -> None:
    judge.reply = lambda n, body: trouble if n < 3 else Reply(says="[[3]]" if n == 3 else None)
    assert endpoint(judge, timeout=1).chat(ASK) == "[[3]]"
    assert len(judge.seen) == 3
    assert len({seen.body for seen in judge.seen}) == 1
    assert endpoint(judge).chat(ASK) == ""  # of a model that says nothing


def test_an_answer_that_does_not_come_in_time_is_asked_for_again(judge: LocalJudge) -> None:
    def slow(number: int, body: dict[str, Any]) -> Reply:
        time.sleep(0.4 if number == 1 else 0)
        return Reply(says="at last")

    judge.reply = slow
    assert endpoint(judge, timeout=0.2, attempts=5, wait=0.3).chat(ASK) == "at last"
    assert len(judge.seen) >= 2


def test_waits_grow_unless_the_endpoint_names_one(judge: LocalJudge) -> None:
    moments: list[float] = []

    def busy(number: int, body: dict[str, Any]) -> Reply:
        moments.append(time.monotonic())
        return Reply(503) if number < 5 else Reply()

    judge.reply = busy
    endpoint(judge, wait=0.05).chat(ASK)
    waits = [b - a for a, b in pairwise(moments)]
    judge.reply = lambda n, b: Reply(429, headers={"Retry-After": "0.3"}) if n == 6 else Reply()
    start = time.monotonic()
    endpoint(judge).chat(ASK)
    assert time.monotonic() - start >= 0.3
    assert all(wait >= 0.75 * 0.05 * 2**n for n, wait in enumerate(waits))


def test_patience_ends(judge: LocalJudge) -> None:
    judge.reply = lambda n, body: Reply(500, b"out of order")
    with pytest.raises(DownloadError, match=r"4 tries \(500 .*out of order"):
        endpoint(judge, attempts=4).chat(ASK)
    assert len(judge.seen) == 4
    said: list[str] = []
    with pytest.raises(DownloadError, match="2 tries"):
        Endpoint("http://127.0.0.1:9/v1", "m", attempts=2, wait=0.001, on_retry=said.append).chat(
            ASK
        )
    assert said == ["connection refused, trying again in 0 s"]


@pytest.mark.parametrize("host", ["127.0.0.1:9", "nobody.invalid"])
def test_where_nobody_answers_patience_is_short_and_what_to_do_is_said(
    host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(*_arguments: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    if host == "nobody.invalid":
        monkeypatch.setattr(socket, "getaddrinfo", unknown)  # no name server need be asked
    said: list[str] = []
    nobody = Endpoint(f"http://{host}/v1", "m", wait=0.001, on_retry=said.append)
    with pytest.raises(
        DownloadError, match=r"after 5 tries \(.*\); .* check that the url is right"
    ):
        nobody.chat(ASK)
    assert len(said) == 4


def test_who_listens_is_told_why_and_when_there_is_another_try(judge: LocalJudge) -> None:
    replies = [Reply(500, b"word " * 50), Reply(429, b"", headers={"Retry-After": "0.001"})]
    judge.reply = lambda n, body: [*replies, Reply()][n - 1]
    said: list[str] = []
    endpoint(judge, on_retry=said.append).chat(ASK)
    assert said[1] == "429 Too Many Requests, trying again in 0 s"
    assert said[0].startswith("500 Internal Server Error: word word")
    assert said[0].endswith("…, trying again in 0 s")
    assert len(said[0]) < 90


@pytest.mark.parametrize(
    "refusal",
    [
        Reply(400, b"bad"),
        Reply(401),
        Reply(404, b"no such model"),
        Reply(302, headers={"Location": "http://127.0.0.1:9/"}),
        Reply(307, headers={"Location": "/v1/other"}),
        Reply(429, b'{"error": {"code": "insufficient_quota"}}'),
    ],
    ids=str,
)
def test_a_refusal_is_not_asked_again_nor_a_redirect_followed(
    judge: LocalJudge, refusal: Reply
) -> None:
    judge.reply = lambda n, body: refusal
    with pytest.raises(DownloadError, match=f"{refusal.status} .*check the url") as error:
        endpoint(judge, key="sk").chat(ASK)
    assert len(judge.seen) == 1
    assert "\n" not in str(error.value)


# ---- judgements ----


def test_judgements_come_in_order_and_are_kept_as_fastchat_keeps_them(
    bench: Bench, judge: LocalJudge, tmp_path: Path
) -> None:
    path = tmp_path / "j.jsonl"
    judge.reply = lambda n, body: Reply(
        says="[[9]]" if "42" in body["messages"][1]["content"] else "I would say [4.5]"
    )
    steps: list[tuple[int, ...]] = []
    options: Any = {"model": "mine", "progress": lambda *step: steps.append(step)}
    found = judge_answers(bench, ANSWERS, endpoint(judge), path, **options)
    assert [(j.question, j.turn, j.score) for j in found] == [
        (1, 1, 4.5), (1, 2, 4.5), (2, 1, 9), (2, 2, 9), (3, 1, 4.5), (3, 2, 4.5)
    ]  # fmt: skip
    assert steps == [(n, 6) for n in range(7)]
    records = map(json.loads, path.read_text().splitlines())
    (record,) = [r for r in records if (r["question_id"], r["turn"]) == (2, 1)]
    assert abs(record.pop("tstamp") - time.time()) < 60
    assert record == {
        "question_id": 2,
        "model": "mine",
        "judge": ["strict", "single-math-v1"],
        "user_prompt": "[Question]\nWhat is 6 x 7?\n[Reference]\nIt is 42.\n[Answer]\n42",
        "judgment": "[[9]]",
        "score": 9,
        "turn": 1,
    }


def test_a_broken_run_goes_on_where_it_was(bench: Bench, judge: LocalJudge, tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    judge.reply = lambda n, body: Reply() if n <= 4 else Reply(401)
    with pytest.raises(DownloadError):
        judge_answers(bench, ANSWERS, endpoint(judge), path, model="m", workers=1)
    assert len(path.read_text().splitlines()) == 4
    with path.open("a") as file:
        file.write('{"question_id": 3, "mod')  # killed while it wrote
    judge.reply = lambda n, body: Reply()
    found = judge_answers(bench, ANSWERS, endpoint(judge), path, model="m")
    assert len(judge.seen) == 5 + 2
    assert [j.score for j in found] == [7] * 6
    assert len([json.loads(line) for line in path.read_text().splitlines()]) == 6
    judge_answers(bench, ANSWERS, endpoint(judge), path, model="m")
    assert len(judge.seen) == 7


@pytest.mark.parametrize("kept", [{}, {"score": 11}, {"score": 0}])
def test_what_has_no_rating_is_asked_for_anew(
    bench: Bench, judge: LocalJudge, tmp_path: Path, kept: dict[str, int]
) -> None:
    path = tmp_path / "j.jsonl"
    judge.reply = lambda n, body: Reply(says="None." if n == 2 else "[[8]]")
    found = judge_answers(bench, ANSWERS, endpoint(judge), path, model="m", workers=1)
    assert [j.score for j in found] == [8, UNRATED, 8, 8, 8, 8]
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[1] |= kept  # as files that were written before have them
    write_lines(path, rows)
    for _ in range(2):
        found = judge_answers(bench, ANSWERS, endpoint(judge), path, model="m")
        assert [j.score for j in found] == [8] * 6
        assert len(judge.seen) == 7


def test_other_answers_models_and_judges_are_judged_anew(
    bench: Bench, judge: LocalJudge, tmp_path: Path
) -> None:
    path = tmp_path / "j.jsonl"

    def asked(answers: dict[int, tuple[str, str]], model: str, name: str) -> int:
        before = len(judge.seen)
        judge_answers(bench, answers, Endpoint(judge.url, name), path, model=model)
        return len(judge.seen) - before

    assert asked(ANSWERS, "m", "strict") == 6
    assert asked({**ANSWERS, 3: ("Light scatters.", "No idea.")}, "m", "strict") == 1
    assert asked(ANSWERS, "other", "strict") == 6
    assert asked(ANSWERS, "m", "mild") == 6
    assert asked(ANSWERS, "m", "strict") == 0


@pytest.mark.parametrize(
    "line",
    [
        "no json",
        "[1]",
        '{"judge": "strict", "score": 1}',
        '{"judge": ["strict", "p"], "score": "5", "judgment": "", "user_prompt": "", "model": ""}',
        '{"judge": ["strict", "p"], "score": 5, "user_prompt": "", "model": ""}',
    ],
)
def test_a_damaged_file_of_judgements_is_named_with_its_line(
    bench: Bench, judge: LocalJudge, tmp_path: Path, line: str
) -> None:
    path = tmp_path / "j.jsonl"
    path.write_text(f"\n{line}\n")
    with pytest.raises(DataError, match=r"j\.jsonl:2: expected|j\.jsonl:2: not JSON"):
        judge_answers(bench, ANSWERS, endpoint(judge), path, model="m")
    assert path.read_text() == f"\n{line}\n"


def test_requests_are_out_at_once_unless_an_answer_is_missing(
    bench: Bench, judge: LocalJudge, tmp_path: Path
) -> None:
    options: Any = {"path": tmp_path / "j.jsonl", "model": "m", "workers": 6}
    answers = {n: a for n, a in ANSWERS.items() if n != 2}
    with pytest.raises(DataError, match="none to 2"):
        judge_answers(bench, answers, endpoint(judge), **options)
    assert not judge.seen
    judge.reply = lambda n, body: Reply(says=f"[[{n}]]")
    found = judge_answers(bench, ANSWERS, endpoint(judge), **options)
    assert sorted(j.score for j in found) == [1, 2, 3, 4, 5, 6]
