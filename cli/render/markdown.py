"""A model's reply as Markdown in the terminal while it streams: what is written stays as it is.

The price: an opening marker waits for its closing one (at most to the end of its line), a table for
its last row; headings are not told by a line under them, nor tables without a leading `|`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from itertools import groupby
from string import punctuation

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.segment import Segment, Segments
from rich.style import Style
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from .markdown_lines import DELIMITERS, FENCE, HEADING, Line, classify
from .theme import STYLES

UNSAFE = re.compile(r"[^\n\t -~\xa0-\u2027\u202f-\u2065\u206a-\ud7ff\ue000-\U0010ffff]")
"""They could move the cursor or reorder a line (bidi overrides), or have no encoding."""

PLAIN = re.compile(r"[^\\`*_~$\[\]!\n]+")
CODE = re.compile(r"(`+)(?=[^`])(.*?)(?<!`)\1(?=[^`])")
FORMULAS = {"$$": "$$", "\\(": "\\)", "\\[": "\\]"}
DOLLARS = re.compile(r"\$(?=\S)[^$\n]*[^$\s]\$(?=\D)")
PRICE = re.compile(r"\$(?:\d[\d.,]*)?\s")
LINK = re.compile(r"\]\( *(<[^<>\n]*>|(?:[^\s()]|\([^\s()]*\))*)(?: +\"[^\"\n]*\")? *\)")

OPENS = re.compile(r"\W_\S|(?!(?a:\w.\w)).[*~]\S", re.S)  # not 2*3*4, not snake_case
CLOSES = re.compile(r"\S_\W|\S[*~].", re.S)
LOOKS = {"*": "i", "**": "b", "***": "b i", "~~": "strike", "_": "i", "__": "b"}
CLOSING = frozenset("，。！？、；：）」』】》〉〕”’…％·,.!?;:)]}%\xa0\u202f")  # never begins a line
OPENING = frozenset("（「『【《〈〔“‘([{\u200d\xa0\u202f")  # never ends one


@cache
def look(name: str) -> Style:
    return Style.parse(STYLES.get(name, name))


def may_break(before: str, after: str) -> bool:
    """Whether a line may end between two characters of a word: beside wide ones."""
    wide = cell_len(after) and max(cell_len(before), cell_len(after)) > 1
    return bool(wide) and before not in OPENING and after not in CLOSING


class MarkdownPage:
    """Writes lines, wrapped between words."""

    def __init__(
        self, console: Console, width: int | None, before: Callable[[], object] | None
    ) -> None:
        self.console, self._width, self._before = console, width, before
        self._out: list[Segment] = []
        self.blank = self._started = False  # blank: the next line comes after an empty one
        self._hang = ""
        self._limit = self._left = self._column = self._cells = 0
        self._gap: list[tuple[str, Style]] = []
        self._word: list[tuple[str, Style]] = []

    @property
    def width(self) -> int:
        return max(self.console.width if self._width is None else self._width, 8)

    def begin(self, first: str, hang: str) -> None:
        self._out.append(Segment("\n" * (self.blank and self._started)))
        self._started, self.blank, self._hang = True, False, hang
        self._limit = self.width
        prefix = first[-(self._limit // 2) :]  # half of the line is for words
        self._left = self._column = len(prefix)
        self._out.append(Segment(prefix, look("quiet")))

    def put(self, text: str, style: Style) -> None:
        for char in text:
            if char.isspace() and char not in CLOSING:
                self._write()
                self._gap.append((" " if char == "\t" else char, style))
                continue
            size = cell_len(char) or int(char == "\ufe0f")  # which makes a wide emoji of a symbol
            full = self._left + self._cells + size > self._limit
            if self._word and (full or may_break(self._word[-1][0], char)):
                self._write()
            self._word.append((char, style))
            self._cells += size

    def _write(self) -> None:
        """Writes the word, on the next line if this one has no room for it."""
        if not self._word:
            return
        gap = sum(cell_len(char) for char, _ in self._gap)
        if self._column + gap + self._cells > self._limit:
            self._gap, gap = [], 0
            if self._column > self._left:
                self._out.append(Segment("\n"))
                self.begin(self._hang, self._hang)
        for style, group in groupby(self._gap + self._word, key=lambda pair: pair[1]):
            self._out.append(Segment("".join(char for char, _ in group), style))
        self._column += gap + self._cells
        self._gap, self._word, self._cells = [], [], 0

    def end(self) -> None:
        self._write()
        self._gap.clear()
        self._out.append(Segment("\n"))

    def verbatim(self, prefix: str, segments: list[Segment]) -> None:
        """A line that is left to the terminal to wrap."""
        self.begin(prefix, "")
        self._out += [*segments, Segment("\n")]

    def flush(self) -> None:
        if self._before and any(segment.text for segment in self._out):
            self._before()
        self.console.print(Segments(self._out), end="", soft_wrap=True)
        self._out.clear()


class Inline:
    """Emphasis, code, links and formulas of a line, handed on as soon as they are certain."""

    def __init__(self, emit: Callable[[str, Style], object]) -> None:
        self._emit = emit
        self.base = look("none")
        self.formula = ""  # what ends the formula we are in; of $$ and \[ on any later line
        self._buffer, self._last = "", " "
        self._held: list[tuple[str, Style]] = []
        self._open: list[tuple[str, int]] = []  # markers not closed yet, and where in _held

    def feed(self, text: str) -> None:
        """Takes text of one line; the newline that ends it settles whatever is open."""
        for char in text:
            self._buffer += char
            while self._buffer and (used := self._token()):
                self._last, self._buffer = self._buffer[used - 1], self._buffer[used:]
                if not self._open:
                    for part, style in self._held:
                        self._emit(part, self.base + style)
                    self._held.clear()

    def _text(self, text: str, name: str = "none", opens: bool = False) -> int:
        if opens:
            self._open.append((text, len(self._held)))
        self._held.append((text, look(name)))
        return len(text)

    def _token(self) -> int:
        """Handles what the buffer begins with; how much that was, 0 if more must be seen."""
        buffer, ended = self._buffer, self._buffer.endswith("\n")
        if buffer == "\n":
            self._open.clear()
            self.formula = self.formula.replace("\\)", "")
            return 1
        if self.formula:
            if buffer.startswith(self.formula):
                closing, self.formula = self.formula, ""
                return self._text(closing)
            return 0 if self.formula.startswith(buffer) else self._text(buffer[0])
        if plain := PLAIN.match(buffer):
            return self._text(plain[0])
        if len(buffer) == 1:
            return 0
        if buffer[:2] in FORMULAS:
            self.formula = FORMULAS[buffer[:2]]
            return self._text(buffer[:2])
        run = len(buffer) - len(buffer.lstrip(buffer[0]))
        match buffer[0]:
            case "\\" if buffer[1] in punctuation:
                return 1 + self._text(buffer[1])
            case "[":
                return self._text("[", opens=True)
            case "]":
                return self._link(buffer, ended)
            case "$":
                found = DOLLARS.match(buffer)
                settled = ended or PRICE.match(buffer) or "$" in buffer[1:-1]
                return self._text(found[0]) if found else self._text("$") if settled else 0
            case "`" if found := CODE.match(buffer):
                padded = found[2][0] == found[2][-1] == " " and found[2].strip()
                self._text(found[2][1:-1] if padded else found[2], "code")
                return found.end()
            case "`":
                return self._text(buffer[:run]) if ended else 0
            case "*" | "_" | "~":
                return self._emphasis(buffer, run)
        return self._text(buffer[0])

    def _places(self, marker: str) -> list[int]:
        return [i for i, (text, _) in enumerate(self._open) if text == marker]

    def _link(self, buffer: str, ended: bool) -> int:
        places = self._places("[")
        if places and (found := LINK.match(buffer)):
            url, shown = found[1].strip("<>"), self._close(places[-1], "link")
            if url and url != shown:
                self._text(f" ({url})" if shown else url, "quiet")
            return found.end()
        if places and buffer[1] == "(" and not ended:
            return 0
        for place in places[-1:]:
            del self._open[place]
        return self._text("]")

    def _emphasis(self, buffer: str, run: int) -> int:
        if run == len(buffer):
            return 0
        marker, around = buffer[:run], self._last + buffer[0] + buffer[run]
        inner = self._open[-1][0] if self._open else ""
        nested = marker == "***" and inner in ("*", "**")  # **bold *both***
        for part in (inner, marker[len(inner) :]) if nested else (marker,):
            places = self._places(part)
            if places and CLOSES.match(around):
                self._close(places[-1], LOOKS[part])
            else:
                self._text(part, opens=bool(part in LOOKS and OPENS.match(around)))
        return run

    def _close(self, at: int, name: str) -> str:
        """Drops the open marker `at`, styles what came after it, and returns that."""
        start = self._open[at][1]
        del self._open[at:]
        after = self._held[start + 1 :]
        self._held[start:] = [(text, style + look(name)) for text, style in after]
        return "".join(text for text, _ in after)


class Code:
    """A fenced block: where it ends, and its lines coloured as they come."""

    def __init__(self, line: Line) -> None:
        self.line, self._source = line, ""
        self._fence, name = FENCE.findall(line.rest)[0]
        self._theme = Syntax.get_theme("ansi_light")  # the sixteen colours of the terminal
        self._lexer = Syntax("", name, theme=self._theme).lexer

    def content(self, line: str) -> str | None:
        """A line less what the quotes and list items around it put there; None for the last."""
        around = rf"^(?: *> ?){{0,{self.line.quotes}}} {{0,{self.line.inside}}}"
        mark = (content := re.sub(around, "", line)).strip()
        ends = mark.startswith(self._fence) and not mark.strip(self._fence[0])
        return None if ends else content

    def coloured(self, line: str) -> list[Segment]:
        """Lexes what came before anew for each line: pygments cannot be asked to go on."""
        start = len(self._source)
        self._source += line + "\n"
        if self._lexer is None:
            return [Segment(line)]
        found, kind = [], ""
        for index, token, value in self._lexer.get_tokens_unprocessed(self._source):
            kind = str(token)
            style = look("none") if "Error" in kind else self._theme.get_style_for_token(token)
            found.append(Segment(value[max(start - index, 0) :].rstrip("\n"), style))
        if len(self._source) > 2000 and kind.startswith("Token.Text"):
            self._source = ""  # a fresh start, not inside a string or comment
        return found if "".join(part.text for part in found) == line else [Segment(line)]


def split_row(row: str) -> list[str]:
    row = re.sub(r"(?<!\\)\|$", "", row.strip()[1:])
    return [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", row)]


def table(rows: list[str]) -> Table:
    """A table from its source, whose second line says how the columns are aligned."""

    def styled(cell: str) -> Text:
        text = Text()
        Inline(text.append).feed(cell + "\n")
        return text

    head, marks, *body = [split_row(row) for row in rows]
    drawn = Table(box=box.ROUNDED, border_style=look("quiet"), header_style=look("bold"))
    for i, cell in enumerate(head):
        drawn.add_column(styled(cell), overflow="fold", min_width=2)
        if i < len(marks) and marks[i].endswith(":"):
            drawn.columns[i].justify = "center" if marks[i].startswith(":") else "right"
    for row in body:
        last = len(head) - 1
        drawn.add_row(*map(styled, [*row[:last], " | ".join(row[last:])]))
    return drawn


class MarkdownStream:
    """Writes Markdown while it arrives, `width` cells wide (None: as the console is by then);
    calls `before` each time that it is about to write."""

    def __init__(
        self, console: Console, width: int | None = None, before: Callable[[], object] | None = None
    ) -> None:
        self._page = MarkdownPage(console, width, before)
        self._inline = Inline(self._page.put)
        self._line = ""  # what has come of a line whose kind is not known yet
        self._flowing = False  # in a line whose words are written as they come
        self._code: Code | None = None
        self._rows: list[Line] = []

    @property
    def at_line_start(self) -> bool:
        """Whether the line that the next words will be written to is still empty."""
        return not self._flowing

    def feed(self, piece: str) -> None:
        """Takes any piece of the reply, cut anywhere."""
        for char in UNSAFE.sub("", piece):
            self._take(char)
        self._page.flush()

    def close(self) -> None:
        """Writes what is kept back; the reply may have been broken off anywhere."""
        if self._flowing or self._line:
            self._take("\n")
        self._end_table()
        self._page.flush()

    def _take(self, char: str) -> None:
        if self._flowing:
            self._inline.feed(char)
            if char == "\n":
                self._page.end()
                self._flowing = False
            return
        self._line += char
        if self._code and char == "\n":
            content, self._line = self._code.content(self._line[:-1]), ""
            if content is not None:
                self._page.verbatim(self._code.line.hang, self._code.coloured(content))
            else:
                self._code = None
                self._page.blank = True
        elif self._code is None and (line := classify(self._line, bool(self._inline.formula))):
            self._line = ""
            self._start(line)
            if char == "\n" and self._flowing:
                self._take("\n")

    def _start(self, line: Line) -> None:
        if line.kind != "row" or not DELIMITERS.fullmatch((self._rows[1:] or [line])[0].rest):
            self._end_table()
        if line.kind == "row":
            self._rows.append(line)
        elif line.kind == "blank":
            self._inline.formula = ""
            self._page.blank = True
        elif line.kind == "fence":
            self._page.blank = True
            self._code = Code(line)
        elif line.kind == "rule":
            bar = "─" * (self._page.width - len(line.hang))
            self._page.verbatim(line.first, [Segment(bar, look("quiet"))])
        else:
            self._flow(line)

    def _flow(self, line: Line) -> None:
        heading = line.kind == "heading"
        self._page.blank |= heading
        self._page.begin(line.first, line.hang)
        self._inline.base = look("title" if heading else "none")
        self._inline.feed(HEADING.sub(r"\1", line.rest) if heading else line.rest)
        self._flowing = True

    def _end_table(self) -> None:
        """Draws the rows so far, as text if they are no table or it has too many columns."""
        rows, self._rows = self._rows, []
        if not rows:
            return
        page, width = self._page, self._page.width - len(rows[0].hang)
        # A column takes at least a wide character, its padding and a border.
        if len(rows) == 1 or width < 5 * len(split_row(rows[0].rest)) + 1:
            for row in rows:
                self._flow(row)
                self._take("\n")
            return
        drawn, options = table([row.rest for row in rows]), page.console.options
        natural = page.console.measure(drawn, options=options.update(width=100_000)).maximum
        drawn.show_lines = natural > width
        page.blank = True
        for i, line in enumerate(page.console.render_lines(drawn, options.update(width=width))):
            page.verbatim(rows[0].hang if i else rows[0].first, line)
        page.blank = True
