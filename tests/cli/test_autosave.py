"""What a chat keeps on disk and carries to the next prompt, turn by turn with a fake model."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import minicpm_mlx as mm
from minicpm_mlx.cli.chat import command
from minicpm_mlx.cli.chat.conversation import Loading, TerminalChat
from minicpm_mlx.cli.render import theme
from minicpm_mlx.cli.render.texts import Texts
from minicpm_mlx.errors import NumericsError, SessionError
from minicpm_mlx.lm import fingerprint, sessions
from support.fake_model import FakeLM


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty sessions folder, not made yet; a terminal of no width."""
    monkeypatch.setenv("MINICPM_MLX_HOME", str(tmp_path / "home"))
    for module in (sessions, fingerprint):
        monkeypatch.setattr(module, "fingerprint", lambda lm: "x")
    for name in ("FORCE_COLOR", "COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)
    theme.console.cache_clear()
    return sessions.directory()


def talk(lm: FakeLM, name: str | None = "now", **options: Any) -> TerminalChat:
    made: Any = lambda lm: mm.Chat(lm)  # noqa: E731
    loading: Any = Loading(lambda: lm, background=False)  # type: ignore[arg-type, return-value]
    return TerminalChat(made, loading, Texts("en"), markdown=False, name=name, **options)


def resumed(lm: FakeLM, name: str, **options: Any) -> TerminalChat:
    return talk(lm, name, saved=sessions.load(name), **options)


def say(conversation: TerminalChat, *lines: str) -> None:
    command.converse(conversation, iter([*lines, None]).__next__)


def on_disk(folder: Path) -> dict[str, list[str]]:
    """What was said in each session."""
    return {
        path.stem: [m["content"] for m in json.loads(path.read_text())["messages"]]
        for path in sorted(folder.glob("*"))
    }


class Watched:
    """A reply during which the disk is looked at, or the turn ends otherwise."""

    def __init__(self, look: Callable[[], object], *then: object) -> None:
        self.look, self.then = look, then

    def __iter__(self) -> Iterator[object]:
        self.seen = self.look()
        return iter(self.then)

    def __len__(self) -> int:
        return len(self.then)


def seen_during(lm: FakeLM, folder: Path, *then: object) -> Watched:
    watched = Watched(lambda: on_disk(folder), *then)
    lm.replies.append(watched)  # type: ignore[arg-type]
    return watched


# Names


def test_two_chats_of_one_name_take_two(folder: Path) -> None:
    for word in ("a", "b", "c"):
        say(talk(FakeLM([word])), "Hi")
    assert on_disk(folder) == {"now": ["Hi", "a"], "now-2": ["Hi", "b"], "now-3": ["Hi", "c"]}


def test_a_chat_without_turns_leaves_nothing(folder: Path) -> None:
    for line in ("/system Be brief.", "/set top_k 3", "/new", "/clear", ""):
        say(talk(FakeLM()), line)
    assert on_disk(folder) == {}


def test_two_chats_that_go_on_with_one_session_lose_no_turn(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    say(talk(FakeLM(["one"]), "both"), "1")
    first, second = (resumed(FakeLM([word], [word]), "both") for word in ("two", "deux"))
    say(first, "2")
    assert "changed by" not in capsys.readouterr().out
    say(second, "2", "3")
    assert capsys.readouterr().out.count("both was changed by another program") == 1
    first.save()  # as at its end: nothing is new
    first.save_cache()
    assert on_disk(folder) == {
        "both": ["1", "one", "2", "two"],
        "both-2": ["1", "one", "2", "deux", "3", "deux"],
    }
    assert second.name == "both-2"


def test_a_session_deleted_meanwhile_is_written_again(folder: Path) -> None:
    going = talk(FakeLM(["a"], ["b"]))
    say(going, "1")
    (folder / "now.json").unlink()
    say(going, "2")
    assert on_disk(folder) == {"now": ["1", "a", "2", "b"]}


def test_only_looking_at_a_session_writes_nothing(folder: Path) -> None:
    say(talk(FakeLM(["a"])), "1")
    before = sessions.version("now")
    looking = resumed(FakeLM(), "now")
    say(looking, "/show", "/tokens")
    looking.save()
    assert sessions.version("now") == before


# Before the reply


def test_a_question_is_on_disk_before_its_answer(folder: Path) -> None:
    lm = FakeLM(["a"])
    going = talk(lm)
    say(going, "1")
    watched = seen_during(lm, folder, "b")
    say(going, "2")
    assert watched.seen == {"now": ["1", "a", "2"]}
    assert on_disk(folder) == {"now": ["1", "a", "2", "b"]}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), NumericsError("NaN")])
def test_a_turn_without_a_trace_leaves_none_on_disk(folder: Path, error: BaseException) -> None:
    lm = FakeLM()
    going = talk(lm)
    watched = seen_during(lm, folder, error)
    say(going, "1")
    assert watched.seen == {"now": ["1"]}
    assert on_disk(folder) == {}
    lm.replies.append(["a"])
    say(going, "2")
    seen_during(lm, folder, error)
    say(going, "3")
    assert on_disk(folder) == {"now": ["2", "a"]}


def test_an_unanswered_question_is_the_draft_of_the_first_prompt(
    folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "notes").write_text("swordfish")
    lm = FakeLM(["a"])
    going = talk(lm)
    say(going, "1", f"/attach {tmp_path}/notes")
    killed: dict[str, bytes] = {}
    lm.replies.append(Watched(lambda: killed.update(at=(folder / "now.json").read_bytes()), "b"))  # type: ignore[arg-type]
    say(going, "2")
    (folder / "now.json").write_bytes(killed["at"])

    again = resumed(FakeLM(["b"]), "now")
    assert (again.draft, again.attached) == ("2", [("notes", "swordfish")])
    again.save()  # left without a word: it waits for the next time
    assert (folder / "now.json").read_bytes() == killed["at"]
    say(again, again.draft)
    assert [text[-1] for text in on_disk(folder)["now"]] == ["1", "a", "2", "b"]
    assert "swordfish" in on_disk(folder)["now"][2]
    assert resumed(FakeLM(), "now").draft == ""


def test_a_piped_chat_drops_an_unanswered_question(folder: Path) -> None:
    say(talk(FakeLM(["a"])), "1")
    raw = json.loads((folder / "now.json").read_text())
    raw["messages"].append({"role": "user", "content": "2"})
    (folder / "now.json").write_text(json.dumps(raw))
    piped = resumed(FakeLM(["b"]), "now", interactive=False)
    piped.ask("3")
    assert on_disk(folder) == {"now": ["1", "a", "3", "b"]}


# What the next prompt begins with


def test_an_edited_question_takes_the_place_only_once_it_is_sent(folder: Path) -> None:
    lm = FakeLM(["a"], ["b"], ["c"])
    going = talk(lm)
    say(going, "1", "/edit")
    assert going.draft == "1"
    for instead in ("", "/tokens", "/clear now"):  # Ctrl-C is read as an empty line
        say(going, "/edit", instead, "/tokens")
        assert on_disk(folder) == {"now": ["1", "a"]}
    assert going.editing is None
    say(going, "/edit", "one")
    assert on_disk(folder) == {"now": ["one", "b"]}
    say(going, "two")
    assert on_disk(folder) == {"now": ["one", "b", "two", "c"]}


def test_an_edit_that_is_not_answered_leaves_the_turn(folder: Path) -> None:
    lm = FakeLM(["a"], [NumericsError("NaN")], [KeyboardInterrupt()], ["b"])
    going = talk(lm)
    say(going, "1", "/edit", "one")
    assert on_disk(folder) == {"now": ["1", "a"]}
    say(going, "/edit", "uno")
    assert on_disk(folder) == {"now": ["1", "a"]}
    assert (going.draft, going.editing) == ("uno", [])  # and still an edit
    say(going, going.draft)
    assert on_disk(folder) == {"now": ["uno", "b"]}


def test_an_edited_question_keeps_its_files(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("swordfish")
    going = talk(FakeLM(["a"], ["b"]))
    say(going, f"/attach {tmp_path}/notes", "1", "/edit")
    assert going.draft == "1"
    say(going, "/edit", "2")
    assert going.chat.messages[0]["content"] == "notes:\n```\nswordfish\n```\n\n2"


def test_what_is_stopped_before_its_first_word_is_asked_again_with_its_files(
    tmp_path: Path,
) -> None:
    (tmp_path / "notes").write_text("swordfish")
    going = talk(FakeLM([KeyboardInterrupt()], ["a"]))
    say(going, f"/attach {tmp_path}/notes", "1")
    assert (going.draft, going.attached) == ("1", [("notes", "swordfish")])
    say(going, "1")
    assert (going.draft, going.attached) == ("", [])


def test_what_is_stopped_while_the_model_loads_is_the_draft(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    going = talk(FakeLM())
    monkeypatch.setattr(Loading, "wait", interrupted)
    say(going, "1")
    assert going.draft == "1"


# Files


@pytest.fixture
def out(capsys: pytest.CaptureFixture[str]) -> Callable[[], list[str]]:
    return lambda: [line for line in capsys.readouterr().out.splitlines() if line]


Out = Callable[[], list[str]]


def test_files_that_wait_are_listed_and_dropped(tmp_path: Path, out: Out) -> None:
    (tmp_path / "a").write_text("1")
    going = talk(FakeLM())
    say(going, "/attach", f"/attach {tmp_path}/a", "/attach", "/attach off", "/attach")
    waiting = "a: 14 tokens, sent with your next message"
    none = "no file is attached; use /attach FILE"
    assert out() == [none, waiting, waiting, "no file is attached any more", none]


@pytest.mark.parametrize("line", ["/new", "/clear", "/load now", "/resume now"])
def test_files_do_not_wait_for_another_conversation(tmp_path: Path, line: str) -> None:
    (tmp_path / "a").write_text("1")
    going = talk(FakeLM(["x"]))
    say(going, "Hi", f"/attach {tmp_path}/a", line)
    assert going.attached == []


def test_a_file_is_refused_for_what_would_be_sent(tmp_path: Path, out: Out) -> None:
    for name, text in (("a", "x" * 42), ("b", "x" * 51), ("empty", ""), ("blank", " \n")):
        (tmp_path / name).write_text(text)
    going = talk(FakeLM())  # a letter is a token, and there is room for 64
    say(going, *(f"/attach {tmp_path}/{name}" for name in ("b", "a", "a", "empty", "blank")))
    refused, attached, again, *empty = out()
    assert "about 64 tokens, but there is room for 64; not attached" in refused
    assert attached.startswith("a: 55 tokens")
    assert again == "a is attached already"
    assert all("the file is empty; not attached" in line for line in empty)
    assert going.attached == [("a", "x" * 42)]


def test_a_name_that_is_no_text_is_sent_with_replacement_characters(
    tmp_path: Path, out: Out
) -> None:
    path = os.fsencode(tmp_path) + b"/caf\xe9"
    Path(os.fsdecode(path)).write_text("1")
    going = talk(FakeLM(["a"]))
    say(going, f"/attach {os.fsdecode(path)}", "Hi", "/attach /nowhere/\udce9")
    assert out()[0].startswith("caf\ufffd: ")
    assert going.chat.messages[0]["content"].startswith("caf\ufffd:\n")


# Saving by name


def test_save_replaces_nothing_unasked(folder: Path, tmp_path: Path, out: Out) -> None:
    say(talk(FakeLM(["a"]), "other"), "1")
    document = tmp_path / "a talk.MD"
    document.write_text("mine")
    going = talk(FakeLM(["b"]))
    say(going, "2")
    out()
    say(going, "/save other", f"/save '{document}'")
    assert out() == [
        "other exists already; /save -f other replaces it",
        f"{document} exists already; /save -f '{document}' replaces it",
    ]
    assert going.name == "now"
    assert on_disk(folder)["other"] == ["1", "a"]
    say(going, f"/save -f '{document}'", "/save now", "/save -f other", "/save -f")
    assert document.read_text().startswith("# a talk")
    assert on_disk(folder)["other"] == ["2", "b"]
    assert out()[1:] == ["saved as now", "saved as other", "saved as other"]


@pytest.mark.parametrize("typed", ["'my talk'", '"my talk"', r"my\ talk", "my talk"])
def test_a_sessions_name_may_be_quoted(folder: Path, typed: str) -> None:
    say(talk(FakeLM(["a"])), "1", f"/save {typed}")
    assert set(on_disk(folder)) == {"now", "my talk"}


@pytest.mark.parametrize("name", ["a.txt", "a.JSON", "a.html", "a.pdf", "a.docx", ".md", "x/.MD"])
def test_a_document_of_another_kind_is_refused(folder: Path, out: Out, name: str) -> None:
    say(talk(FakeLM(["a"])), "1", f"/save {name}")
    assert out()[-1].startswith(f"{name}: a document must be FILE.md")
    assert set(on_disk(folder)) == {"now"}


def test_a_dot_in_a_sessions_name_is_no_suffix(folder: Path) -> None:
    say(talk(FakeLM(["a"])), "1", "/save v1.5", "/save 2026-11-23 00.13.06")
    assert set(on_disk(folder)) == {"now", "v1.5", "2026-11-23 00.13.06"}


# Where nothing can be kept


def test_a_folder_that_cannot_be_used_is_told_once_and_the_chat_goes_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch, out: Out
) -> None:
    def denied(path: Path, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "mkdir", denied)
    monkeypatch.setattr(Path, "stat", denied)
    monkeypatch.setattr(Path, "iterdir", denied)
    going = talk(FakeLM(["a"], ["b"]), sessions.new_name())
    say(going, "1", "2", "/sessions")
    shown = "\n".join(out())
    assert shown.count("not saved: ") == 1
    assert shown.count("Permission denied") == 2
    assert len(going.chat.messages) == 4
    with pytest.raises(SessionError, match=r"cannot be read \(Permission denied\)"):
        command._saved_session(SimpleNamespace(resume=None, go_on=True))


# What is shown


def test_nothing_listed_ends_the_chat(folder: Path, out: Out) -> None:
    say(talk(FakeLM(["a"])), "1")
    raw = json.loads((folder / "now.json").read_text())
    raw["messages"][0]["content"] = "half \ud83d a pair \x1b[2J"
    raw["system"] = "\udc00"
    (folder / "now.json").write_text(json.dumps(raw))
    going = talk(FakeLM(["b"]), "later")
    say(going, "/sessions", "/load now", "/system", "2", "/undo", "/undo", "/sessions \udc00")
    shown = "\n".join(out())
    assert "half \ufffd a pair [2J" in shown
    assert "system prompt: \ufffd" in shown
    assert "\x1b" not in shown


def test_sessions_are_listed_by_the_time_of_their_files(folder: Path, out: Out) -> None:
    for number in range(33):
        say(talk(FakeLM(["a"]), f"s{number}"), "1")
        os.utime(folder / f"s{number}.json", (10**9 + number, 10**9 + number))
    os.utime(folder / "s0.json", (2 * 10**9, 2 * 10**9))  # whatever its text says
    assert command._saved_session(SimpleNamespace(resume=None, go_on=True)).name == "s0"
    out()
    say(talk(FakeLM()), "/sessions")
    rows = out()
    size = f"{(folder / 's0.json').stat().st_size} B"
    assert re.fullmatch(rf"2033-05-18 \d\d:\d\d +s0 +2 messages +{size} +1", rows[0])
    assert [row.split()[2] for row in rows[1:3]] == ["s32", "s31"]
    assert (len(rows), rows[30]) == (32, "… and 3 more")


def test_titles_and_undo_show_the_question_itself(tmp_path: Path, out: Out) -> None:
    (tmp_path / "a").write_text("```\ncode\n```\n")
    going = talk(FakeLM(["a"]))
    say(going, f"/attach {tmp_path}/a", "What is it?\nTell.")
    assert sessions.listed()[0].title == "What is it?"
    out()
    say(going, "/undo")
    assert out() == ["taken back: What is it?"]


def test_rows_are_cut_to_the_terminal(monkeypatch: pytest.MonkeyPatch, out: Out) -> None:
    from rich.cells import cell_len

    say(talk(FakeLM(["a"])), "山" * 60)
    out()
    monkeypatch.setattr(theme.console(stderr=False), "width", 70)
    say(talk(FakeLM()), "/sessions")
    row, _ = out()
    assert "山山" in row
    assert cell_len(row) <= 70


# What is a command


@pytest.mark.parametrize(
    ("line", "usage"),
    [
        ("/clear the air, please", "/clear"),
        ("/undo the last change", "/undo"),
        ("/exit now", "/exit"),
    ],
)
def test_a_command_that_takes_nothing_is_not_run_with_more(
    folder: Path, out: Out, line: str, usage: str
) -> None:
    lm = FakeLM(["a"], ["b"])
    say(talk(lm), "1", line, "2")
    assert f"usage: {usage}" in out()
    assert on_disk(folder) == {"now": ["1", "a", "2", "b"]}


@pytest.mark.parametrize(
    "text", ["/clear\nthe air", "/load of this\nthing", "/wat\nis that", "/exit\n1"]
)
def test_a_text_of_several_lines_is_a_message(text: str) -> None:
    going = talk(FakeLM(["a"]))
    say(going, text)
    assert going.chat.messages[0]["content"] == text


def test_a_system_text_may_have_several_lines() -> None:
    going = talk(FakeLM())
    say(going, "/system Be brief.\nBe kind.")
    assert going.chat.system == "Be brief.\nBe kind."


def test_settings_are_named_as_one_likes(out: Out) -> None:
    going = talk(FakeLM())
    lines = [
        "/set TOP_K=4",
        "/set top_k = 5",
        "/set Max_Tokens 7",
        "/set max_tokens off",
        "/set top_p=",
    ]
    say(going, *lines)
    assert out() == ["top_k = 4", "top_k = 5", "max_tokens = 7", "max_tokens = -", "top_p = 1.0"]


# A context that is full


class Letters(FakeLM):
    """A letter is a token."""

    def encode(self, messages: Iterable[dict[str, str]]) -> list[int]:
        self.shown = [dict(message) for message in messages]
        return [0] * sum(len(message["content"]) for message in self.shown)


def test_a_message_that_never_fits_is_told_so(tmp_path: Path, out: Out) -> None:
    (tmp_path / "a").write_text("x" * 30)
    going = talk(Letters(["a"]))
    say(going, "1", f"/attach {tmp_path}/a")
    out()
    say(going, "y" * 60)
    assert out() == [
        "this message alone has 103 tokens, but there is room for 63",
        "/attach off removes the attached files",
    ]
    say(going, "/attach off")
    out()
    say(going, "/set on_overflow slide", "y" * 64)
    assert out()[1:] == ["this message alone has 64 tokens, but there is room for 63"]


def test_a_full_conversation_is_told_what_helps(out: Out) -> None:
    going = talk(Letters(["a"]))
    say(going, "y" * 40)
    out()
    say(going, "y" * 40)
    first, second = out()
    assert first.startswith("the conversation has 81 tokens and the context is 64")
    assert second == "the context is full: /undo, /new or /set on_overflow slide"
