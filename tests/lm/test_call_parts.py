"""Calls in parts, while the model still writes them: a JSON text that only grows."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from minicpm_mlx.lm.tools.calls import CallDelta, CallReader, Part, ToolCall
from minicpm_mlx.lm.tools.formats import JsonToolFormat, ToolFormat
from minicpm_mlx.lm.tools.growing_json import GrowingJson, sound_json, whole_members
from minicpm_mlx.lm.tools.python_format import PythonToolFormat
from minicpm_mlx.lm.tools.xml_format import XmlToolFormat
from support.calls import as_json, as_python, as_xml

FORMS: list[tuple[ToolFormat, Any]] = [
    (JsonToolFormat(), as_json),
    (XmlToolFormat(), as_xml),
    (PythonToolFormat(), as_python),
]
PROPERTIES = {
    "text": {"type": "string"},
    "count": {"type": "integer"},
    "maybe": {"type": ["string", "null"]},
    "place-of": {"type": "object"},
    "list": {"type": "array"},
    "any": {},
}
FUNCTIONS = {
    "write-file": {"type": "object", "properties": PROPERTIES},
    "now": {"type": "object", "properties": {}},
}
TEXTS = [
    "",
    "Rome",
    "a\nb\tc",
    "<b> & c &amp; &lt",
    "'\"\\",
    "f(a=1), ) }",
    "]] > ]",
    "é🙂",
    "x" * 40,
    "</tool_call> </function> <|tool_call_end|>",
    '{"a": [1, ',
    "5",
]
VALUES: dict[str, list[Any]] = {
    "text": TEXTS,
    "count": [0, -7, 10**20],
    "maybe": [*TEXTS[:4], None],
    "place-of": [{}, {"a": {"b": [1.5, True, None]}, "é\n": "}"}],
    "list": [[], [1, [2, ["x", {}]]], ["a,b", "c)"]],
    "any": ["plain", "a b"],
}


def drawn(draw: random.Random) -> list[tuple[str, dict[str, Any]]]:
    calls = []
    for _ in range(draw.randrange(1, 4)):
        keys = draw.sample(list(VALUES), draw.randrange(len(VALUES)))
        given = {key: draw.choice(VALUES[key]) for key in keys}
        calls.append(("write-file", given) if given else ("now", {}))
    return calls


def parts_of(form: ToolFormat, pieces: list[str], **options: Any) -> tuple[list[Part], CallReader]:
    reader = CallReader(form, FUNCTIONS, **{"streams": True, **options})
    parts = [part for piece in pieces for part in reader.add(piece)]
    return [*parts, *reader.finish()], reader


def check_parts(parts: list[Part]) -> list[ToolCall]:
    """The calls, each the sum of its parts, which come one after the other."""
    calls, open_text = list[ToolCall](), None
    for part in parts:
        if isinstance(part, CallDelta):
            assert part.begins == (open_text is None)
            open_text = (open_text or "") + part.arguments
        elif isinstance(part, ToolCall):
            assert part.arguments == open_text
            calls.append(part)
            open_text = None
    return calls


def cuts(text: str, draw: random.Random) -> list[list[str]]:
    sizes = [draw.randrange(1, 9) for _ in text]
    varied, at = [], 0
    for size in sizes:
        varied.append(text[at : at + size])
        at += size
    return [[text], list(text), varied]


@pytest.mark.parametrize(("form", "write"), FORMS, ids=["json", "xml", "python"])
def test_parts_add_up_to_the_call_wherever_replies_are_cut(form: ToolFormat, write: Any) -> None:
    draw = random.Random(4)
    for _ in range(100):
        calls = drawn(draw)
        for pieces in cuts(f"I look.\n{write(calls)}", draw):
            parts, reader = parts_of(form, pieces)
            expected = [(name, json.dumps(given, ensure_ascii=False)) for name, given in calls]
            assert [(one.name, one.arguments) for one in check_parts(parts)] == expected, pieces
            assert "".join(part for part in parts if isinstance(part, str)) == "I look.\n"
            assert reader.open is None
            late, _ = parts_of(form, pieces, streams=False)
            assert [(one.name, one.arguments) for one in check_parts(late)] == expected, pieces


@pytest.mark.parametrize(("form", "write"), FORMS, ids=["json", "xml", "python"])
def test_a_call_that_is_cut_off_has_its_beginning(form: ToolFormat, write: Any) -> None:
    given = {"text": "a\nb", "count": 12, "list": [1, [2]]}
    text, whole = write([("write-file", given)]), json.dumps(given)
    for end in range(len(text)):
        parts, reader = parts_of(form, list(text[:end]))
        so_far = "".join(part.arguments for part in parts if isinstance(part, CallDelta))
        assert whole.startswith(so_far)
        if reader.open:
            assert reader.open.arguments == so_far
            members = whole_members(so_far)
            assert members == {key: given[key] for key in list(given)[: len(members)]}
        one, _ = parts_of(form, [text[:end]])
        assert so_far == "".join(part.arguments for part in one if isinstance(part, CallDelta))


@pytest.mark.parametrize(("form", "write"), FORMS, ids=["json", "xml", "python"])
def test_parts_come_before_the_call_is_complete(form: ToolFormat, write: Any) -> None:
    text = write([("write-file", {"count": 1, "text": "x" * 99, "list": [1]})])
    parts, _ = parts_of(form, list(text))
    assert sum(isinstance(part, CallDelta) for part in parts) >= 4
    first, _ = parts_of(form, list(text), parallel=False)
    assert len(check_parts(first)) == 1


@pytest.mark.parametrize(("form", "write"), FORMS, ids=["json", "xml", "python"])
def test_another_layout_is_read_when_it_is_complete(form: ToolFormat, write: Any) -> None:
    for text in (
        '<tool_call>{"arguments": {"count": 1}, "name": "write-file"}</tool_call>',
        '<tool_call>{"name": "write-file", "arguments": "{\\"count\\": 1}"}</tool_call>',
        "<function\nname='write-file'><param name='count'>1</param></function>",
        "<|tool_call_start|>\nwrite_file(1)<|tool_call_end|>",
    ):
        if text.startswith(form.opening):
            for pieces in ([text], list(text)):
                assert len(check_parts(parts_of(form, pieces)[0])) == 1
    two = write([("now", {})]) + write([("nope", {})])
    parts, _ = parts_of(form, list(two))
    assert [call.name for call in check_parts(parts)] == ["now"]
    assert "nope" in "".join(part for part in parts if isinstance(part, str))


def test_a_broken_call_does_not_hide_the_next() -> None:
    for broken in ('{"name": "x}', "[", '{"a": "</tool_call>" x', '{"name": 5}'):
        text = f"<tool_call>\n{broken}\n</tool_call>\n{as_json([('now', {})])}"
        for pieces in ([text], list(text)):
            parts, _ = parts_of(JsonToolFormat(), pieces, streams=False)
            assert [call.name for call in check_parts(parts)] == ["now"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r'["\ud83d\ude42\u00e9\n"] ', '["🙂é\\n"]'),
        (r'["\ud83d", "\ude42\ud83d\ud83d\ude42"] ', '["\ufffd", "\ufffd\ufffd🙂"]'),
        ("[1E5,-1e999, 1e-999]", "[100000.0, -1.7976931348623157e+308, 0.0]"),
        ("[" + "9" * 5000 + "]", "[1.7976931348623157e+308]"),
        ('{ "a"\n:{ }, "b" : [ ] }', '{"a": {}, "b": []}'),
        ("-5 ", "-5"),
        ('"x"', '"x"'),
    ],
)
def test_json_is_written_as_a_text_that_grows(text: str, expected: str) -> None:
    whole, split = GrowingJson(), GrowingJson()
    assert whole.add(text) == expected == "".join(map(split.add, text))
    assert whole.ended
    assert split.ended


def test_values_that_json_does_not_have_are_made_sound() -> None:
    assert sound_json({"a": float("inf"), "b": "\ud83d"}) == (
        '{"a": 1.7976931348623157e+308, "b": "\ufffd"}'
    )
