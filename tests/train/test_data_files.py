"""Files of every kind, whole and broken, to rows with their places."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minicpm_mlx.errors import DataError, MissingPackageError
from minicpm_mlx.files import rows as rows_module
from minicpm_mlx.files.atomic import sha256
from minicpm_mlx.files.rows import Row, read_rows
from minicpm_mlx.files.strict_json import StrictJson
from minicpm_mlx.train.data.splits import split_files

TWO = [{"text": "one"}, {"text": "二"}]


def written(folder: Path, name: str, data: bytes | str) -> Path:
    path = folder / name
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def values(path: Path) -> list[dict[str, Any]]:
    rows = list(read_rows(path))
    assert all(isinstance(row, Row) for row in rows)
    return [row.value for row in rows if isinstance(row, Row)]


def lines(items: list[Any], end: str = "\n") -> str:
    return "".join(json.dumps(item, ensure_ascii=False) + end for item in items)


# Kinds


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n  \n"])
def test_lines_are_read_with_any_line_end_and_mark(tmp_path: Path, end: str, mark: bytes) -> None:
    assert values(written(tmp_path, "a.jsonl", mark + lines(TWO, end).encode())) == TWO


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.JSON"])
def test_a_list_is_known_by_its_bracket(
    tmp_path: Path, name: str, indent: int | None, mark: bytes
) -> None:
    text = "\n " + json.dumps(TWO, ensure_ascii=False, indent=indent) + "\r\n"
    assert values(written(tmp_path, name, mark + text.encode())) == TWO


def test_lines_are_read_in_a_json_file_too_and_ended_by_no_separator(tmp_path: Path) -> None:
    rows = [*TWO, {"text": "a\u2028b\u2029c\x85d\x0be"}]
    for name in ("a.json", "a.jsonl"):
        assert values(written(tmp_path, name, lines(rows).rstrip())) == rows


def test_a_txt_is_one_document(tmp_path: Path) -> None:
    path = written(tmp_path, "a.txt", b"\xef\xbb\xbfone\r\n\r\ntwo\n")
    assert values(path) == [{"text": "one\n\ntwo\n"}]


def test_a_csv_has_names_then_cells(tmp_path: Path) -> None:
    data = '\ufeffprompt,completion\r\n"a, ""b""","c\nd"\r\n\r\ne,\r\n'
    path = written(tmp_path, "a.csv", data)
    assert values(path) == [
        {"prompt": 'a, "b"', "completion": "c\nd"},
        {"prompt": "e", "completion": ""},
    ]
    places = [row.place for row in read_rows(path) if isinstance(row, Row)]
    assert places == [f"{path}:2", f"{path}:5"]


def test_a_csv_writes_labels_as_words(tmp_path: Path) -> None:
    path = written(tmp_path, "a.csv", "prompt,completion,label\na,b,True\na,c,false\na,true,x\n")
    assert [row["label"] for row in values(path)] == [True, False, "x"]
    assert values(path)[2]["completion"] == "true"


def test_long_cells_are_read_and_the_limit_of_csv_put_back(tmp_path: Path) -> None:
    import csv

    before = csv.field_size_limit()
    path = written(tmp_path, "a.csv", "text\n" + "x" * 200_000 + "\n")
    assert len(values(path)[0]["text"]) == 200_000
    assert csv.field_size_limit() == before


def test_parquet_needs_pyarrow_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(rows_module.importlib, "import_module", missing)
    with pytest.raises(MissingPackageError, match="pip install pyarrow"):
        list(read_rows(written(tmp_path, "a.parquet", b"PAR1")))


def test_parquet_is_read_where_pyarrow_is(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    messages = [{"messages": [{"role": "user", "content": "a"}]}] * 2
    parquet.write_table(pyarrow.Table.from_pylist(messages), tmp_path / "a.parquet")
    assert values(tmp_path / "a.parquet") == messages
    with pytest.raises(DataError, match=r"expected a \.parquet file"):
        list(read_rows(written(tmp_path, "b.parquet", b"no parquet at all")))


# Places and faults


def test_a_bad_line_does_not_hide_those_after_it(tmp_path: Path) -> None:
    path = written(tmp_path, "a.jsonl", '{"text": "a"}\n{"text"\n[1]\n{"text": "b"}\n')
    found = list(read_rows(path))
    assert [type(row) for row in found] == [Row, DataError, DataError, Row]
    assert str(found[1]) == (
        f"{path}:2: not JSON at character 9: expecting ':' delimiter, found the end; correct it"
    )
    assert str(found[2]) == f"{path}:3: expected an object {{…}}, found a list; make it one"
    assert isinstance(found[3], Row)
    assert found[3].place == f"{path}:4"


def test_a_bad_item_does_not_hide_those_after_it(tmp_path: Path) -> None:
    path = written(tmp_path, "a.json", '[{"text": "a"},\n {"a": 1, "a": 2},\n 3, {"b": NaN}\n, {}]')
    found = list(read_rows(path))
    assert [str(row).removeprefix(f"{path}: ") for row in found if isinstance(row, DataError)] == [
        "item 2 (line 2): expected each field once, found 'a' twice; remove one",
        "item 3 (line 3): expected an object {…}, found a number; make it one",
        "item 4 (line 3): expected JSON, which has no NaN; write null or leave the field out",
    ]
    assert isinstance(found[-1], Row)
    assert found[-1].place == f"{path}: item 5 (line 4)"


def test_a_line_past_the_limit_is_refused_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows_module, "LINE_BYTES", 50)
    long = '{"text": "' + "x" * 3_000_000 + '"}\n'
    path = written(tmp_path, "a.jsonl", '{"text": "a"}\n' + long + '{"text": "b"}\n')
    found = list(read_rows(path))
    assert [row.value["text"] for row in found if isinstance(row, Row)] == ["a", "b"]
    assert len(found) == 3
    assert "a.jsonl:2: expected a line of at most 50 bytes" in str(found[1])
    line = '{"text": "a"}\n'
    monkeypatch.setattr(rows_module, "LINE_BYTES", len(line))
    assert len(values(written(tmp_path, "a.jsonl", line * 2))) == 2


@settings(deadline=None, max_examples=50)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=4),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
        max_leaves=8,
    )
)
def test_strict_json_reads_what_json_writes(value: Any) -> None:
    text = json.dumps(value)
    assert StrictJson().whole(f" {text}\n") == value
    items = list(StrictJson().items(f"[{text} ,\n{text}]"))
    assert [item.value for item in items] == [value, value]
    assert items[1].line == 2


class DoubleKey(Exception):
    """What alone StrictJson has against JSON that Python reads."""


def strictly(text: str) -> Any:
    try:
        return StrictJson().whole(text)
    except ValueError as error:
        raise DoubleKey if "twice" in str(error) else error from None


@given(st.text(alphabet='[]{}",:0a\\ \nN', max_size=12))
def test_strict_json_takes_no_more_than_json(text: str) -> None:
    try:
        expected = json.loads(text, parse_constant=lambda name: 1 / 0)
    except (ValueError, ZeroDivisionError):
        with pytest.raises(ValueError, match=r"expected|not JSON"):
            StrictJson().whole(text)
        return
    with suppress(DoubleKey):
        assert strictly(text) == expected


# Folders


@pytest.mark.parametrize("valid", ["valid", "validation", "val", "dev"])
def test_a_folder_holds_a_file_for_each_part(tmp_path: Path, valid: str) -> None:
    for name in ("train.json", "test.csv", "README.md", ".train.txt", "other.txt"):
        written(tmp_path, name, "x")
    written(tmp_path, f"{valid}.jsonl", "x")
    assert split_files(tmp_path) == {
        "train": tmp_path / "train.json",
        "valid": tmp_path / f"{valid}.jsonl",
        "test": tmp_path / "test.csv",
    }


def test_a_file_is_training_data_whatever_its_name(tmp_path: Path) -> None:
    path = written(tmp_path, "test.jsonl", "")
    assert split_files(path) == {"train": path}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train.json", "train.jsonl"], "for train, found train.json and train.jsonl; remove one"),
        (["train.json", "dev.json", "valid.csv"], "for valid, found dev.json and valid.csv"),
        (["valid.json"], "expected a file train.jsonl or train.json .*, found valid.json; rename"),
        ([], "found no file; rename it, or give the file itself"),
        (["train.md"], "found train.md"),
    ],
)
def test_a_folder_that_does_not_tell_is_refused(
    tmp_path: Path, names: list[str], message: str
) -> None:
    for name in names:
        written(tmp_path, name, "x")
    with pytest.raises(DataError, match=message):
        split_files(tmp_path)


def test_sha256_is_of_the_bytes(tmp_path: Path) -> None:
    path = written(tmp_path, "a.txt", b"abc")
    assert sha256(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    with pytest.raises(DataError, match="No such file"):
        sha256(tmp_path / "none")
