"""Lines of Chinese and English text."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

from minicpm_mlx.cli.render.wrap import wrap
from minicpm_mlx.model_cards import cards

NOTES = [note for card in cards().values() for note in (card.note, card.note_zh)]


@given(
    st.one_of(st.sampled_from(NOTES), st.text("ab ，（）中文。\n", max_size=40)), st.integers(2, 60)
)
@settings(deadline=None, max_examples=200)
def test_lines_fit_and_hold_all_of_the_text(text: str, width: int) -> None:
    lines = wrap(text, width)
    assert max(map(cell_len, lines)) <= width
    assert "".join("".join(lines).split()) == "".join(text.split())


def test_chinese_fills_a_line_and_marks_stay_beside_their_words() -> None:
    text = "MiniCPM5-2B 强化学习之前的指令微调版（bf16），适合再训练"
    assert wrap(text, 34) == ["MiniCPM5-2B 强化学习之前的指令微调", "版（bf16），适合再训练"]
    assert wrap("下载权重后打包（两比特）", 14) == ["下载权重后打包", "（两比特）"]
    assert wrap("the official 4 bits", 12) == ["the official", "4 bits"]
