"""`MarkdownStream`: each element, in pieces cut anywhere, and nothing a terminal would obey."""

from __future__ import annotations

import io
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console
from rich.theme import Theme

from minicpm_mlx.cli.render.markdown import MarkdownStream
from minicpm_mlx.cli.render.theme import STYLES

SGR = re.compile(r"\x1b\[[0-9;]*m")
CONTROLS = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")


def screen(width: int = 40, *, colour: bool = False) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(
        file=file,
        force_terminal=True,
        width=width,
        color_system="truecolor" if colour else None,
        theme=Theme(STYLES),
        _environ={},  # no NO_COLOR or TERM of the machine
    ), file


def shown(*pieces: str, width: int = 40, colour: bool = False) -> str:
    out, file = screen(width, colour=colour)
    stream = MarkdownStream(out)
    for piece in pieces:
        stream.feed(piece)
    stream.close()
    return file.getvalue()


PARTS = [
    *"ab1 *_`~$[]()!|-#>+.:\\\n\t中，“\ufe0f",
    "**",
    "***",
    "```",
    "\n```\n",
    "```py\nx = 'a'\n",
]
PARTS += ["\n| a | b |\n|---|:-:|\n| 1 | 2 |\n", "\n- ", "\n1. ", "\n> ", "$$", "\\(", "\\[", "\\]"]
PARTS += ["word ", "[a](b)", "❤\ufe0f", "    ", "\n\n"]
MARKED = st.lists(st.sampled_from(PARTS), max_size=40).map("".join)
ANYTHING = st.text(st.characters(exclude_categories=()), max_size=60)  # surrogates too
WORDS = st.lists(st.text(st.sampled_from("abcxyzéß中文字符한글"), min_size=1, max_size=60))

REPLY = """\
# Title

Some **bold text**, *italics*, `code`, [text](http://a.b/c_d) and $x_1 * y_1$ in a long paragraph.

1. one
   - nested 中文内容，很长很长很长很长很长很长很长很长。
     ```python
     def f():
         \"\"\"of two
         lines\"\"\"
     ```
> quote

| a | b |
|---|--:|
| 1 | **2** |
"""


@given(st.one_of(MARKED, ANYTHING), st.data())
@example(REPLY, None)
def test_how_the_text_is_cut_changes_no_byte(text: str, data: st.DataObject | None) -> None:
    whole = shown(text, width=20, colour=True)
    assert shown(*text, width=20, colour=True) == whole
    if data is not None:
        at = data.draw(st.integers(0, len(text)))
        assert shown(text[:at], "", text[at:], width=20, colour=True) == whole


@given(st.one_of(MARKED, ANYTHING))
@example("\x1b]0;title\x07\x1b[2J\r\x08\x9b31m\x7f\u202e")
@example("```\n\x1b[2J\n```\n| \x1b[2J |\n|---|\n`\x1b[2J`")
def test_nothing_but_styles_reaches_the_terminal(text: str) -> None:
    output = shown(text, colour=True)
    assert not CONTROLS.search(SGR.sub("", output).replace("\t", ""))
    assert not output or output.endswith("\n")
    output.encode()


@given(st.one_of(MARKED, ANYTHING))
def test_without_colour_the_text_is_the_same(text: str) -> None:
    assert SGR.sub("", shown(text, colour=True)) == shown(text)


@given(WORDS, st.integers(8, 50))
def test_plain_words_stay_in_order_and_inside_the_width(words: list[str], width: int) -> None:
    output = shown(" ".join(words), width=width)
    assert "".join(output.split()) == "".join(words)
    assert all(cell_len(line) <= width for line in output.split("\n"))


@given(st.lists(st.text("abcdefgh", min_size=1, max_size=8)), st.integers(8, 30))
def test_short_words_are_never_broken(words: list[str], width: int) -> None:
    assert shown(" ".join(words), width=width).split() == words


@given(st.one_of(MARKED, ANYTHING), st.integers(8, 40))
def test_lines_fit_unless_they_are_code(text: str, width: int) -> None:
    text = text.replace("```", "").replace("~~~", "")
    while "```" in text or "~~~" in text:
        text = text.replace("```", "").replace("~~~", "")
    assert all(cell_len(line) <= width for line in shown(text, width=width).split("\n"))


@given(st.lists(st.lists(st.text("ab 中文*`", max_size=12), min_size=1, max_size=6), max_size=5))
def test_a_table_loses_no_character(body: list[list[str]]) -> None:
    rows = [["x", "y", "z"], ["-"] * 3, *body]
    output = shown("\n".join(f"|{'|'.join(row)}|" for row in rows))
    for char in "ab中文":
        assert output.count(char) == sum(cell.count(char) for row in body for cell in row)


def styles(text: str) -> str:
    """A line with its styles as <bold>, so that examples can be read."""
    names = {"1": "b", "2": "dim", "3": "i", "9": "s", "4": "u", "36": "code", "1;3": "b i"}
    coloured = shown(text, width=80, colour=True).removesuffix("\n")
    return SGR.sub(lambda m: f"<{names.get(m[0][2:-1], '/')}>", coloured)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("**bold**", "<b>bold</>"),
        ("*it*, _it_", "<i>it</>, <i>it</>"),
        ("__bold__", "<b>bold</>"),
        ("***both***", "<b i>both</>"),
        ("~~gone~~", "<s>gone</>"),
        ("`a*b*c`", "<code>a*b*c</>"),
        ("`` a`b ``", "<code>a`b</>"),
        ("**b *c***", "<b>b</><b> </><b i>c</>"),
        ("这**重点**的", "这<b>重</><b>点</>的"),
        ("**“引”**后", "<b>“引”</>后"),
        ("[text](http://x.y)", "<u>text</><dim> (http://x.y)</>"),
        ("[http://x.y](http://x.y)", "<u>http://x.y</>"),
        ("# Title", "<b>Title</>"),
        ("###### 标题", "<b>标</><b>题</>"),
    ],
)
def test_markers_become_styles(source: str, expected: str) -> None:
    assert styles(source) == expected


@pytest.mark.parametrize(
    "text",
    [
        "2 * 3 * 4 and 2*3*4",
        "snake_case_name and a_b_.py",
        "an **unclosed bold",
        "an `unclosed code",
        "a[0], [1] and [x] (y)",
        "$a_1 * b_1 * c$ and $5 or $6",
        r"\(a_1 * b * c_1\) and \[x_1 * y * z_1\]",
        "$$\n\\frac{a_1}{b_1} * *\n- b_1\n# c\n$$",
        "[red]x[/red] :smile: [bold]",
        "<b>html</b> &amp; <br>",
        "-1 is no item, 3.14 no number",
        "#tag",
        "| no table",
        "| no table\nbut | text",
        "~5 ~ 6",
    ],
)
def test_what_is_no_markup_stays_as_it_is(text: str) -> None:
    assert shown(text) == text + "\n"
    assert "\x1b" not in shown(text, colour=True)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (r"\*a\* \# \_", "*a* # _\n"),
        ("a\n\n\n\nb\n\n", "a\n\nb\n"),
        ("a\n# T\nb", "a\n\nT\nb\n"),
        ("- a\n* b\n+ c", "• a\n• b\n• c\n"),
        ("- a\n  - b\n    - c", "• a\n  • b\n    • c\n"),
        ("3. a\n7) b", "3. a\n7) b\n"),
        ("- [x] done", "• [x] done\n"),
        ("> a\n> b\n>\n> > c", "│ a\n│ b\n│ \n│ │ c\n"),
        ("> - a", "│ • a\n"),
        ("a\n---\nb", "a\n" + "─" * 40 + "\nb\n"),
        ("* * *", "─" * 40 + "\n"),
        ("", ""),
        ("\n\n", ""),
    ],
)
def test_blocks(source: str, expected: str) -> None:
    assert shown(source) == expected


def test_items_and_quotes_hang() -> None:
    assert shown("- aaaa bbbb cccc dddd", width=12) == "• aaaa bbbb\n  cccc dddd\n"
    assert shown("10. aaaa bbbb cccc", width=12) == "10. aaaa\n    bbbb\n    cccc\n"
    assert shown("> aaaa bbbb cccc dddd", width=12) == "│ aaaa bbbb\n│ cccc dddd\n"
    assert shown("- 中文内容很长", width=10) == "• 中文内容\n  很长\n"


def test_chinese_wraps_between_characters_but_not_before_a_comma() -> None:
    assert shown("一二三四五六七八", width=8) == "一二三四\n五六七八\n"
    assert shown("一二三四，五六", width=8) == "一二三\n四，五六\n"
    assert shown("一二三（四）", width=8) == "一二三\n（四）\n"


def test_a_word_longer_than_the_line_is_broken() -> None:
    assert shown("ab " + "x" * 20, width=8) == "ab\nxxxxxxxx\nxxxxxxxx\nxxxx\n"


CODE = "\n\ndef f(a_b, *c):\n\treturn  a_b  # **no** " + "long " * 20 + "\n\n  [x](y)"


@pytest.mark.parametrize("fence", ["```", "~~~", "`````"])
@pytest.mark.parametrize("info", ["", "python", "nonsense", " {.py}"])
def test_code_is_verbatim(fence: str, info: str) -> None:
    assert shown(f"{fence}{info}\n{CODE}\n{fence}\nend") == f"{CODE}\n\nend\n"
    coloured = shown(f"{fence}{info}\n{CODE}\n{fence}\nend", colour=True)
    assert SGR.sub("", coloured) == f"{CODE}\n\nend\n"


def test_code_is_coloured_with_what_came_before_in_mind() -> None:
    plain, coloured = (
        shown(f'```py\n{start}\nreturn 1\n"""\n```', colour=True).splitlines()[1]
        for start in ("pass", '"""')
    )
    assert SGR.sub("", plain) == SGR.sub("", coloured) == "return 1"
    assert len(SGR.findall(plain)) > len(SGR.findall(coloured)) == 2


def test_a_fence_may_stand_in_a_list_or_quote() -> None:
    source = "1. a\n   ```python\n   if x:\n       y\n   ```\n2. b"
    assert shown(source) == "1. a\n\n   if x:\n       y\n\n2. b\n"
    assert shown("- ```\n  x\n  ```") == "  x\n"
    assert shown("> ```\n> - x\n> ```\n> y") == "│ - x\n\n│ y\n"


def test_a_fence_holds_shorter_fences() -> None:
    assert shown("````md\n```py\nx\n```\n````") == "```py\nx\n```\n"


TABLE = "| 名称 | n |\n|:--|--:|\n| **a** | 1 |\n| b \\| c | 22 |\n"


def test_a_table_is_drawn_once_it_is_complete() -> None:
    out, file = screen()
    stream = MarkdownStream(out)
    stream.feed("x\n" + TABLE)
    assert file.getvalue() == "x\n"
    stream.feed("then")
    drawn = file.getvalue().splitlines()
    assert drawn[:1] + drawn[-1:] == ["x", ""]
    assert [line.rstrip() for line in drawn[2:-1]] == [
        "╭───────┬────╮",
        "│ 名称  │  n │",
        "├───────┼────┤",
        "│ a     │  1 │",
        "│ b | c │ 22 │",
        "╰───────┴────╯",
    ]


def test_a_wide_table_is_fitted_and_one_of_too_many_columns_is_text() -> None:
    output = shown("| a | b |\n|---|---|\n| " + "word " * 12 + "| " + "中" * 30 + " |")
    assert all(cell_len(line) <= 40 for line in output.splitlines())
    assert (output.count("word"), output.count("中")) == (12, 30)
    many = "|a" * 20 + "|\n" + "|-" * 20 + "|\n"
    assert re.sub(r"\s", "", shown(many)) == re.sub(r"\s", "", many)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("a **bold", "a **bold\n"),
        ("a [link](http://x", "a [link](http://x\n"),
        ("```py\nx = 1", "x = 1\n"),
        ("| a | b |", "| a | b |\n"),
        ("| a | b |\n|--", "a"),
        ("$$ x_1", "$$ x_1\n"),
        ("- ", "• \n"),
        ("**", "**\n"),
    ],
)
def test_a_reply_broken_off_is_shown_as_far_as_it_came(source: str, expected: str) -> None:
    output = shown(source)
    assert output == expected if expected.endswith("\n") else expected in output
    assert output.endswith("\n")
    assert not output.endswith("\n\n")


def test_words_appear_as_soon_as_they_are_certain() -> None:
    out, file = screen()
    stream = MarkdownStream(out)
    for piece, expected in [
        ("Hello wor", "Hello"),
        ("ld, **bo", "Hello world,"),
        ("ld** mo", "Hello world, bold"),
        ("re. 中文字", "Hello world, bold more. 中文"),
        ("\n- it", "Hello world, bold more. 中文字\n• "),
        ("em $5 for", "Hello world, bold more. 中文字\n• item $5"),
    ]:
        stream.feed(piece)
        assert file.getvalue() == expected


def test_a_new_width_counts_from_the_next_line() -> None:
    out, file = screen(20)
    stream = MarkdownStream(out)
    stream.feed("aaaa ")
    out.width = 10
    stream.feed("bbbb cccc dddd eeee ffff gggg")
    stream.close()
    assert file.getvalue() == "aaaa bbbb cccc dddd\neeee ffff\ngggg\n"


@pytest.mark.parametrize("part", ["*a ", "[a](", "`` ` ", "$a ", "\\", "x", "| ", ">", "中", "_a"])
def test_a_model_in_a_loop_does_not_slow_down(part: str) -> None:
    shown(part * 3_000)
