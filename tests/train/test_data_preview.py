"""What a dry run shows."""

from __future__ import annotations

import json
import re
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console
from rich.theme import Theme

from minicpm_mlx.cli.render import theme
from minicpm_mlx.cli.train import data_preview
from minicpm_mlx.train.data.dataset import Data, DataOptions, load_data
from minicpm_mlx.train.data.preview import BINS, histogram, overview, spans
from minicpm_mlx.train.data.samples import Sample
from support.tiny_tokenizer import tiny


def prepared(folder: Path, *rows: Any, **options: Any) -> Data:
    path = folder / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return load_data(path, tiny(), DataOptions(**options))


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=40))
def test_a_histogram_has_each_length_once(lengths: list[int]) -> None:
    bins = histogram(lengths)
    assert len(bins) <= BINS
    for low, high, count in bins:
        assert count == sum(low <= length <= high for length in lengths)
    assert sum(count for *_, count in bins) == len(lengths)
    assert all(high + 1 == low for (_, high, _), (low, _, _) in pairwise(bins))
    assert bins[0][2] > 0
    assert bins[-1][2] > 0


def test_a_histogram_of_nothing_is_empty() -> None:
    assert histogram([]) == []


@given(st.text(alphabet="ab山😀 ", min_size=1), st.data())
def test_spans_are_the_text_in_order(text: str, draw: st.DataObject) -> None:
    tokenizer = tiny()
    ids = tokenizer.encode(text)
    ids = ids[: draw.draw(st.integers(1, len(ids)))]  # perhaps within a character
    mask = draw.draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
    found = spans(Sample(ids, mask), tokenizer)
    assert "".join(part for part, _ in found) == tokenizer.decode(ids, skip_special=False)
    assert all(a[1] != b[1] for a, b in pairwise(found))


def test_an_overview_is_plain_json(tmp_path: Path) -> None:
    data = prepared(tmp_path, {"prompt": "a", "chosen": "b", "rejected": "c"})
    found = overview(data, tiny())
    assert json.loads(json.dumps(found))["kind"] == "preference"
    assert found["sample"] == [
        [("<s> <用户>a<AI>", False), ("b</s>", True)],
        [("<s> <用户>a<AI>", False), ("c</s>", True)],
    ]
    assert sum(count for *_, count in found["histogram"]) == 2
    assert found["counts"]["train"]["samples"] == 1


def test_what_counts_is_marked_where_there_are_no_colours(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": "[bold]a[/bold] :smile:", "completion": "b"}, {}]
    data_preview.show(prepared(tmp_path, *rows, skip_bad=1), tiny())
    out = capsys.readouterr().out
    assert "prompt and completion (examples to imitate)" in out
    assert "train: 1 samples of 1 rows, " in out
    assert "<s> <用户>[bold]a[/bold] :smile:<AI>⟦b</s>⟧" in out
    assert "1 bad" in out
    assert "a.jsonl:2: expected the fields" in out
    assert "\x1b" not in out


def test_both_replies_of_a_pair_are_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data_preview.show(prepared(tmp_path, {"prompt": "a", "chosen": "b", "rejected": "c"}), tiny())
    out = capsys.readouterr().out
    assert out.index("⟦b</s>⟧") < out.index("⟦c</s>⟧")
    assert "chosen (learned tokens" in out
    assert "rejected (learned tokens" in out


def test_escapes_in_the_data_do_not_reach_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data_preview.show(prepared(tmp_path, {"prompt": "a\x1b[2J\x07", "completion": "b\nc"}), tiny())
    out = capsys.readouterr().out
    assert r"a\x1b[2J\x07" in out
    assert "⟦b\nc</s>⟧" in out


def test_a_long_sample_is_shortened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"prompt": "a", "completion": "b" * 1000 + "c"}
    data_preview.show(prepared(tmp_path, row), tiny())
    out = capsys.readouterr().out
    assert " characters … " in out
    assert "bc</s>⟧" in out
    assert len(out) < 1200


def test_sixty_columns_are_kept_with_chinese_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = dict.fromkeys(("highlight", "markup", "emoji"), False)
    colours = {"force_terminal": True, "color_system": "standard", "theme": Theme(theme.STYLES)}
    screen = Console(file=StringIO(), width=60, **plain, **colours)
    monkeypatch.setattr(data_preview, "console", lambda: screen)
    rows = [{"prompt": "山" * 70, "completion": "泰山" * n} for n in (30, 3, 90)]
    data_preview.show(prepared(tmp_path, *rows, max_seq_length=500), tiny())
    assert isinstance(screen.file, StringIO)
    text = screen.file.getvalue()
    assert "⟦" not in text
    assert "\x1b[32m" in text
    written = re.sub(r"\x1b\[[0-9;]*m", "", text)
    assert max(cell_len(line) for line in written.splitlines()) <= 60
    assert "learned tokens are green" in written
