"""A training run as a person sees it: in a terminal of any width, in a pipe, and as JSON."""

from __future__ import annotations

import json
import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rich.cells import cell_len

from minicpm_mlx.cli.train.progress import JsonLines, Screen
from minicpm_mlx.train.tracking.events import Noted, Sampled, Saved, Started, Validated
from support import terminal
from support.fake_events import trained
from support.terminal import CTRL_C, PATIENCE, Terminal

RUN = """
import sys, time
from pathlib import Path
from minicpm_mlx.cli.train.progress import Screen
from minicpm_mlx.train.tracking.events import Noted, Sampled, Saved, Started, Trained, Validated

def trained(step, loss):
    return Trained(step=step, loss=loss, learning_rate=1e-4, gradient_norm=1.0, tokens=step,
        tokens_per_second=312.4, epoch=step / 20, peak_memory=2_100_000_000)

with Screen() as screen:
    screen(Sampled(step=0, prompt="What is 2 + 2?", reply="A number."))
    screen(Started(step=0, steps=20))
    screen(trained(5, 2.5))
    screen(Saved(step=5, folder=Path("adapters/山东")))
    screen(Validated(step=5, loss=1.9, best=True))
    for line in open(sys.argv[1]) if sys.argv[1:] else ():
        screen(trained(6 + len(line.strip()), 2.25))
        print("heard", line.strip())
        if line.strip() == "fail":
            raise RuntimeError("it broke")
    screen(Noted(step=20, text="stopped early"))
    screen(trained(20, 1.5))
    screen(Validated(step=20, loss=2.0, best=False))
    screen(Sampled(step=20, prompt="What is 2 + 2?", reply="4\\x1b[2J"))
print("end")
"""

TOKEN = re.compile(r"\x1b\[(\?25[hl]|[0-9;]*[mAK])|([\r\n])|([^\x1b\r\n])", re.S)


class Display:
    """A terminal's screen, which folds lines that are too long, anew when its width changes."""

    def __init__(self, width: int) -> None:
        self.rows = [""]
        self.folds = [False]  # whether the row goes on in the next
        self.width, self.row, self.column = width, 0, 0
        self.cursor = True

    def feed(self, text: str) -> None:
        at = 0
        while at < len(text):
            token = TOKEN.match(text, at)
            assert token, f"an escape that is not known: {text[at : at + 10]!r}"
            at = token.end()
            code, control, char = token.groups()
            if code:
                self._escape(code)
            elif char:
                self._put(char)
            else:
                self._move(control)

    def resize(self, width: int) -> None:
        """What stands in it is folded anew, with the cursor at its end."""
        assert not any(self.rows[self.row + 1 :])
        lines = [""]
        for row, text in enumerate(self.rows[: self.row + 1]):
            lines[-1] += text
            if not self.folds[row] and row < self.row:
                lines.append("")
        self.rows, self.folds, self.width = [], [], width
        for line in lines:
            pieces = [line[i : i + width] for i in range(0, len(line), width)] or [""]
            self.rows += pieces
            self.folds += [True] * (len(pieces) - 1) + [False]
        self.row, self.column = len(self.rows) - 1, len(self.rows[-1])

    def _escape(self, code: str) -> None:
        if code.startswith("?25"):
            self.cursor = code.endswith("h")
        elif code.endswith("A"):
            self.row = max(0, self.row - int(code[:-1] or 1))
        elif code.endswith("K"):
            assert code == "2K"
            self.rows[self.row] = ""
            self.folds[self.row] = False

    def _put(self, char: str) -> None:
        if cell_len(self.rows[self.row][: self.column]) + cell_len(char) > self.width:
            self.folds[self.row] = True
            self._move("\n")
            self.column = 0
        text = self.rows[self.row].ljust(self.column)
        self.rows[self.row] = text[: self.column] + char + text[self.column + 1 :]
        self.column += 1

    def _move(self, control: str) -> None:
        if control == "\r":
            self.column = 0
            return
        self.row += 1
        if self.row == len(self.rows):
            self.rows.append("")
            self.folds.append(False)


class Training(Terminal):
    """A training of no model; it waits for a file's lines, each an event, where there is one."""

    def __init__(self, width: int, lines: Path | None, **environment: str) -> None:
        self.display, self._fed = Display(width), 0
        if lines is not None:
            os.mkfifo(lines)
        plain = {"LC_ALL": "C.UTF-8", "PYTHONUTF8": "1", "COLUMNS": "", "LINES": ""}
        super().__init__(*([str(lines)] if lines else []), **{**plain, **environment})
        self.resize(24, width)
        self._lines = lines.open("w", buffering=1) if lines else None

    def say(self, line: str) -> None:
        """Has the run print a line, after a step of as many more as it has letters."""
        assert self._lines
        self._lines.write(f"{line}\n")

    def hear(self, line: str) -> None:
        """The same, until the line is there."""
        self.say(line)
        self.wait(f"heard {line}")

    def end(self) -> list[str]:
        """Reads to the end, which is one without errors; the rows of the screen."""
        if self._lines:
            self._lines.close()
        assert self.status() == 0
        return self.look()

    def look(self) -> list[str]:
        """The rows of the screen when it has stood still for a moment."""
        while select.select([self.master], [], [], 0.2)[0] and self._read(
            PATIENCE + time.monotonic(), ""
        ):
            pass
        self.display.feed(self.raw.decode()[self._fed :])
        self._fed = len(self.raw.decode())
        return [row.rstrip() for row in self.display.rows]

    def close(self) -> None:
        super().close()
        if self._lines:
            self._lines.close()


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., Training]]:
    """Starts a run of 20 steps; with `waits` it tells of five and waits to hear more."""
    monkeypatch.setattr(terminal, "CODE", RUN)
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    opened: list[Training] = []

    def run(width: int = 80, *, waits: bool = False, **environment: str) -> Training:
        lines = tmp_path / f"lines-{len(opened)}" if waits else None
        opened.append(Training(width, lines, **environment))
        if waits:
            opened[-1].wait("valid loss")
        return opened[-1]

    yield run
    for one in opened:
        one.close()


@pytest.mark.parametrize("width", [40, 120])
def test_the_block_fits_terminals_of_any_width(start: Callable[..., Training], width: int) -> None:
    one = start(width, waits=True)
    one.hear("a")
    rows = one.end()
    assert not any(one.display.folds)
    assert rows[:3] == ["step 5/20  saved adapters/山东", "heard a", "step 20/20  stopped early"]
    progress, losses, facts, *replies = rows[3:]
    assert re.fullmatch(r"step 20/20 .*  100%  0:00:0\d", progress)
    assert "  ━━━━━━━━" in progress
    valid = "valid loss 2.000" if width == 40 else "valid loss 2.000 (best 1.900)"
    assert losses == f"loss 1.500  {valid}  █▇▁"
    assert facts.startswith("lr 1.0e-04  312 tok/s  2.1 GB")
    assert ("  epoch 1.00" in facts) == (width > 40)
    assert replies[-2:] == ["end", ""]
    assert one.display.cursor
    assert one.echoes


def test_replies_before_and_after_stand_below_or_side_by_side(
    start: Callable[..., Training],
) -> None:
    narrow = ["prompt  What is 2 + 2?", "before  A number.", "after   4[2J", "end", ""]
    assert start(60).end()[-5:] == narrow
    wide = "\n".join(start(120).end())
    assert re.search(r"What is 2 \+ 2\?\n.*before +. after .*\n.*A number\. +. 4\[2J", wide, re.S)


def test_the_block_speaks_chinese(start: Callable[..., Training]) -> None:
    one = start(LC_ALL="zh_CN.UTF-8")
    text = "\n".join(one.end())
    for words in ("步 20/20", "验证损失 2.000（最佳 1.900）", "学习率 1.0e-04", "已保存", "训练后"):
        assert words in text
    assert not any(one.display.folds)


@pytest.mark.parametrize("widths", [[50, 44, 120], [60, 200, 48]])
def test_a_terminal_made_narrower_keeps_one_block(
    start: Callable[..., Training], widths: list[int]
) -> None:
    one = start(80, waits=True)
    for width in widths:
        one.look()
        one.display.resize(width)
        one.resize(24, width)
        one.hear(f"{width}")
    rows = one.end()
    heard = [f"heard {width}" for width in widths]
    assert rows[: len(widths) + 2] == [rows[0], *heard, "step 20/20  stopped early"]
    assert sum(row.startswith("loss") for row in rows) == 1, "\n".join(rows)


@pytest.mark.parametrize("error", ["it broke", "KeyboardInterrupt"])
def test_the_terminal_is_restored_when_the_run_is_broken_off(
    start: Callable[..., Training], error: str
) -> None:
    one = start(waits=True)
    if error == "it broke":
        one.hear("fail")
    else:
        one.send(CTRL_C)
    one.wait(error)
    assert one.status() != 0
    rows = one.look()
    assert one.display.cursor
    assert one.echoes
    told = next(number for number, row in enumerate(rows) if row.startswith("lr 1.0e-04"))
    assert rows[told + 1].startswith("Traceback")
    assert sum("━" in row for row in rows) == 1


def test_a_killed_run_leaves_the_terminal_as_it_was(start: Callable[..., Training]) -> None:
    one = start(waits=True)
    one.look()
    one.process.kill()
    one.process.wait()
    one.look()
    assert one.display.cursor
    assert one.echoes


def test_results_stay_on_standard_output(
    start: Callable[..., Training], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out"
    redirect = f"import os; os.dup2(os.open({str(path)!r}, os.O_CREAT | os.O_WRONLY), 1)\n"
    monkeypatch.setattr(terminal, "CODE", redirect + RUN)
    one = start(waits=True)
    one.say("hello")
    rows = one.end()
    assert path.read_text() == "heard hello\nend\n"
    assert "step 20/20  stopped early" in rows


def test_in_a_pipe_each_event_is_a_line() -> None:
    environment = {**os.environ, "LC_ALL": "zh_CN.UTF-8", "PYTHONUTF8": "1", "FORCE_COLOR": "1"}
    done = subprocess.run(
        [sys.executable, "-c", RUN], capture_output=True, text=True, env=environment, check=True
    )
    plain = re.sub(r"\x1b\[[0-9;]*m", "", done.stderr)
    assert [line.rstrip() for line in plain.splitlines()] == [
        "step 5/20  loss 2.500  lr 1.0e-04  312 tok/s  2.1 GB  epoch 0.25",
        "step 5/20  saved adapters/山东",
        "step 5/20  valid loss 1.900 (best)",
        "step 20/20  stopped early",
        "step 20/20  loss 1.500  lr 1.0e-04  312 tok/s  2.1 GB  epoch 1.00",
        "step 20/20  valid loss 2.000 (best 1.900)",
        "prompt: What is 2 + 2?",
        "before: A number.",
        "after: 4[2J",
    ]
    assert done.stdout == "end\n"


def test_measures_of_preferences_and_long_paths_stay_on_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = Path("a b " * 500 + "c")
    with Screen() as screen:
        screen(Started(step=40, steps=100))
        screen(Validated(step=41, loss=float("nan"), best=False, extra={"accuracy": 0.75}))
        screen(Saved(step=41, folder=folder))
        screen(Noted(step=42, text="two\nlines\x1b[2J"))
        screen(Sampled(step=0, prompt="alone", reply="is not compared"))
    assert capsys.readouterr().err.splitlines() == [
        "step 41/100  valid loss nan  accuracy 0.750",
        f"step 41/100  saved {folder}",
        "step 42/100  two lines[2J",
    ]


def test_little_memory_is_not_none(capsys: pytest.CaptureFixture[str]) -> None:
    with Screen() as screen:
        for memory in (12_340_000, 99_900_000, 100_000_000, 2_100_000_000):
            screen(trained(1, peak_memory=memory))
    told = re.findall(r"tok/s  (.*?)  epoch", capsys.readouterr().err)
    assert told == ["12.3 MB", "99.9 MB", "0.1 GB", "2.1 GB"]


def test_json_lines_are_what_a_log_holds(capsys: pytest.CaptureFixture[str]) -> None:
    listener = JsonLines()
    listener(Started(step=0, steps=5))
    listener(Sampled(step=0, prompt="山？", reply="泰山\n"))
    listener(trained(1, float("inf"), extra={"margin": float("nan")}))
    out, err = capsys.readouterr()
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["event"] for row in rows] == ["started", "sampled", "trained"]
    assert "山？" in out
    assert rows[2]["loss"] is rows[2]["extra"]["margin"] is None
    assert not err
