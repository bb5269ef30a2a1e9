"""Standard streams that are closed, empty, or not in UTF-8, met by the command as a process."""

from __future__ import annotations

import io
import os
import pty
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import minicpm_mlx as mm
from minicpm_mlx.cli.streams import prompt_text, stdin_lines

CODE = "from minicpm_mlx.cli.main import main; main()"
SHORT = '--model "$TINY" --temp 0 --max-tokens 3'
NOT_UTF8 = "standard input is not utf-8 (byte {}, 0xe9); convert it first"

Done = subprocess.CompletedProcess[bytes]


def shell(line: str, stdin: bytes = b"", **env: str) -> Done:
    """Runs `line` after the command's name in a shell, which closes streams with `<&-`."""
    return subprocess.run(
        ["sh", "-c", f"exec {shlex.join([sys.executable, '-c', CODE])} {line}"],
        input=stdin,
        capture_output=True,
        timeout=120,
        env={**os.environ, **env},
    )


def failure(done: Done) -> str:
    """The one line of a command that failed."""
    err = done.stderr.decode()
    assert done.returncode == 1, err
    assert err.startswith("minicpm-mlx: ")
    assert err.count("\n") == 1, err
    return err.removeprefix("minicpm-mlx: ").rstrip("\n")


def result(done: Done) -> str:
    """What a command that succeeded printed."""
    assert (done.returncode, done.stderr) == (0, b"")
    return done.stdout.decode()


@pytest.fixture(scope="module", autouse=True)
def model(tiny: mm.LM) -> Iterator[None]:
    """The model of `SHORT`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINY", str(tiny.card.path))
        yield


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that holds something of a card's, to be deleted."""
    monkeypatch.setenv("MINICPM_MLX_HOME", str(tmp_path))
    folder = tmp_path / "minicpm-2b-dpo-4bit-g64"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"x")
    return folder


# Closed


@pytest.mark.parametrize(
    "line", ["--help <&- 2>&-", "list <&-", "doctor 2>&-", f"generate {SHORT} -p Hi <&- 2>&-"]
)
def test_a_closed_stream_that_is_not_needed_is_not_missed(line: str) -> None:
    assert result(shell(line))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--help >&-", "standard output is closed"),
        (f"chat {SHORT} >&-", "standard output is closed"),
        (f"generate {SHORT} -p - <&-", "standard input is closed"),
        (f"chat {SHORT} <&-", "standard input is closed"),
    ],
)
def test_a_closed_stream_that_is_needed_is_one_line(line: str, message: str) -> None:
    done = shell(line, b"Hi\n")
    assert failure(done).startswith(message)
    assert done.stdout == b""


@pytest.mark.parametrize("line", ["show nope 2>&-", "--help >&- 2>&-", f"chat {SHORT} >&- 2>&-"])
def test_an_error_without_a_place_to_go_stays_out_of_the_results(line: str) -> None:
    done = shell(line, b"Hi\n")
    assert (done.returncode, done.stdout) == (1, b"")


# The question of rm


@pytest.mark.parametrize(
    ("stdin", "answer", "message"),
    [
        ("<&-", b"", "--yes"),
        ("", b"", "--yes"),
        ("", b"n\r\n", "nothing deleted\n"),
        ("", b"Yes\r\n", ""),
    ],
)
def test_rm_takes_an_answer_from_a_pipe(
    kept: Path, stdin: str, answer: bytes, message: str
) -> None:
    done = shell(f"rm minicpm-2b-dpo {stdin}", answer)
    assert message in done.stderr.decode()
    assert done.stderr.count(b"\n") == bool(message)
    assert done.returncode == (1 if message else 0)
    assert kept.exists() is bool(message)


@pytest.mark.parametrize(
    ("keys", "says"), [(b"\x04", "--yes"), (b"\n", "nothing deleted")], ids=["ctrl-d", "enter"]
)
def test_rm_asks_in_a_terminal(kept: Path, keys: bytes, says: str) -> None:
    master, slave = pty.openpty()
    os.write(master, keys)
    done = subprocess.run(
        [sys.executable, "-c", CODE, "rm", "minicpm-2b-dpo"],
        stdin=slave,
        capture_output=True,
        timeout=60,
    )
    os.close(slave)
    os.close(master)
    err = done.stderr.decode()
    assert done.returncode == 1
    assert err.startswith("Delete minicpm-2b-dpo (1 B)? [y/N]: ")
    assert says in err
    assert kept.exists()


# Encodings

ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def test_input_is_utf8_whatever_the_locale(demo: mm.LM) -> None:
    question = [{"role": "user", "content": "说出一种动物。"}]
    *_, last = demo.stream(question, max_tokens=1)
    stdin = question[0]["content"].encode()
    done = shell(f"generate {SHORT} -p - --json", stdin, TINY="demo", **ASCII)
    assert f'"prompt_tokens": {last.stats.prompt_tokens},' in result(done)


@pytest.mark.parametrize(
    ("typed", "lines"),
    [
        (b"One\ntwo", ["One\n", "two"]),
        (b"\xef\xbb\xbfOne\r\ntwo", ["One\n", "two"]),
        (b"\xef\xbb\xbf/exit\r\n", ["/exit\n"]),
    ],
)
def test_a_byte_order_mark_and_carriage_returns_are_no_part_of_the_text(
    typed: bytes, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed), encoding="latin-1"))
    assert list(stdin_lines()) == lines


@pytest.mark.parametrize(
    ("typed", "text"), [(b"Hi", "Hi"), (b"Hi\n", "Hi"), (b"Hi\r\n", "Hi"), (b"a\nb\n\n", "a\nb\n")]
)
def test_one_newline_at_the_end_is_no_part_of_a_prompt(
    typed: bytes, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed)))
    assert prompt_text("-") == text
    assert prompt_text("Hi\n") == "Hi\n"


def test_input_in_another_encoding_names_the_byte_and_answers_the_turns_before_it() -> None:
    done = shell(f"generate {SHORT} -p -", b"caf\xe9")
    assert (failure(done), done.stdout) == (NOT_UTF8.format(3), b"")
    done = shell(f"chat {SHORT}", b"Hi\ncaf\xe9\n")
    assert (failure(done), done.stdout.count(b"\n")) == (NOT_UTF8.format(6), 1)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([b"generate", b"--prompt", b"caf\xe9"], "--prompt"),
        ([b"generate", b"--prompt=\xe9"], "--prompt"),
        ([b"show", b"caf\xe9"], "an argument"),
    ],
)
def test_an_argument_in_another_encoding_is_named(arguments: list[bytes], named: str) -> None:
    done = subprocess.run(
        [sys.executable.encode(), b"-c", CODE.encode(), *arguments],
        capture_output=True,
        env={**os.environ, "LC_ALL": "C.UTF-8"},
    )
    assert failure(done).startswith(f"{named} is not utf-8 (byte ")


@pytest.mark.parametrize(("line", "encoding"), [("list --json", "ascii"), ("--help", "latin-1")])
def test_output_in_another_encoding_is_one_line_that_says_what_to_set(
    line: str, encoding: str
) -> None:
    message = failure(shell(line, PYTHONIOENCODING=encoding))
    assert message == f"{encoding} cannot encode the output; set PYTHONIOENCODING=utf-8"
    assert result(shell(line, PYTHONIOENCODING="utf-8", LC_ALL="C"))
