"""Formats measurements as Markdown, CSV, JSON or SQL, and compares two files of them."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..arguments import number
from ..errors import InvalidArgumentError
from ..files.tables import markdown_table

Row = Mapping[str, Any]
"""One measurement with the facts of the machine, as flat fields."""

KEYS = ("model", "test", "type_kv")
"""Fields that two rows must share to be compared."""


def markdown(rows: Sequence[Row]) -> str:
    """A table like llama-bench's."""
    columns = ("model", "size", "params", "device", "test", "t/s", "roofline", "memory")
    cells = (
        (
            str(row["model"]),
            f"{row['model_size'] / 2**30:.2f} GiB",
            f"{row['model_n_params'] / 1e9:.2f} B",
            str(row["device"]),
            str(row["test"]),
            result(row),
            "" if row["roofline"] is None else f"{100 * row['roofline']:.0f} %",
            f"{row['peak_memory'] / 2**30:.2f} GiB",
        )
        for row in rows
    )
    return markdown_table(columns, cells, text_columns=5)


def result(row: Row, unit: str = "") -> str:
    """The result with its deviation: seconds to a first token, else tokens/s followed by `unit`."""
    if row["first_token"]:
        return f"{row['avg_ns'] / 1e9:.3f} ± {row['stddev_ns'] / 1e9:.3f} s"
    return f"{row['avg_ts']:.2f} ± {row['stddev_ts']:.2f} {unit}".rstrip()


def as_csv(rows: Sequence[Row]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: _flat(value) for key, value in row.items()})
    return out.getvalue().rstrip("\n")


def as_json(rows: Sequence[Row]) -> str:
    return json.dumps(list(rows), ensure_ascii=False, indent=2)


def as_jsonl(rows: Sequence[Row]) -> str:
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)


def as_sql(rows: Sequence[Row]) -> str:
    """SQL that creates a table and inserts the rows, for SQLite."""
    if not rows:
        return ""
    types = {key: _sql_type([row[key] for row in rows]) for key in rows[0]}
    columns = ",\n".join(f'  "{key}" {name}' for key, name in types.items())
    lines = [f"CREATE TABLE IF NOT EXISTS minicpm_mlx_bench (\n{columns}\n);"]
    for row in rows:
        values = ", ".join(_literal(row[key]) for key in rows[0])
        lines.append(f"INSERT INTO minicpm_mlx_bench VALUES ({values});")
    return "\n".join(lines)


FORMATS = {"md": markdown, "csv": as_csv, "json": as_json, "jsonl": as_jsonl, "sql": as_sql}


def _flat(value: Any) -> Any:
    return " ".join(map(str, value)) if isinstance(value, list) else value


def _sql_type(values: Sequence[Any]) -> str:
    types = {type(value) for value in values if value is not None}
    if types in ({float}, {int, float}):
        return "REAL"
    return "INTEGER" if types in ({int}, {bool}) else "TEXT"


def _literal(value: Any) -> str:
    if value is None:
        return "NULL"
    if isinstance(value, int | float):
        return repr(value)
    return "'" + str(_flat(value)).replace("'", "''") + "'"


def read(path: Path) -> list[dict[str, Any]]:
    """Reads rows that `as_json` or `as_jsonl` wrote, or that are in a report of `doctor --verify`.

    InvalidArgumentError for anything else.
    """
    try:
        text = path.read_text(encoding="utf-8")
        rows = json.loads(text) if text.lstrip().startswith("[") else _lines(text)
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidArgumentError(f"{path}: cannot be read ({error})") from None
    if isinstance(rows, list) and len(rows) == 1 and isinstance(rows[0], dict):
        rows = rows[0].get("bench", rows)
    if not isinstance(rows, list) or not rows or not all(map(_is_row, rows)):
        raise InvalidArgumentError(f"{path}: expected what `minicpm-mlx bench --json` prints")
    return rows


def _lines(text: str) -> list[Any]:
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def _is_row(row: Any) -> bool:
    """Whether it has the fields that `compare` needs."""
    if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in KEYS):
        return False
    average, deviation = (_number(row.get(key)) for key in ("avg_ns", "stddev_ns"))
    return 0 < average < math.inf and 0 <= deviation < math.inf


def _number(value: Any) -> float:
    """A JSON number as a float; NaN for anything else."""
    try:
        return number("", value)
    except InvalidArgumentError:
        return math.nan


def compare(before: Sequence[Row], after: Sequence[Row]) -> list[dict[str, Any]]:
    """The speedup of `after` at each test that both have, with the ratio's deviation."""
    earlier = {tuple(row[key] for key in KEYS): row for row in before}
    comparisons = []
    for row in after:
        old = earlier.get(tuple(row[key] for key in KEYS))
        if old is None:
            continue
        ratio = old["avg_ns"] / row["avg_ns"]
        spread = math.hypot(old["stddev_ns"] / old["avg_ns"], row["stddev_ns"] / row["avg_ns"])
        comparisons.append(
            {
                **{key: row[key] for key in KEYS},
                "before_s": old["avg_ns"] / 1e9,
                "after_s": row["avg_ns"] / 1e9,
                "ratio": round(ratio, 4),
                "stddev": round(ratio * spread, 4),
            }
        )
    if not comparisons:
        raise InvalidArgumentError("the two files have no test of the same model in common")
    return comparisons
