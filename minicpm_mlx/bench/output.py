"""Measurements as people and programs read them, and two of them compared."""

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

Row = Mapping[str, Any]
"""One measurement with its environment, flat."""

KEYS = ("model", "test", "type_kv")
"""What two rows must share to be compared."""


def markdown(rows: Sequence[Row]) -> str:
    """A table like llama-bench's."""
    head = ["model", "size", "params", "device", "test", "t/s", "roofline", "memory"]
    lines = [head, ["---"] * 3 + ["---"] + ["---"] + ["---:"] * 3]
    for row in rows:
        lines.append(
            [
                str(row["model"]),
                f"{row['model_size'] / 2**30:.2f} GiB",
                f"{row['model_n_params'] / 1e9:.2f} B",
                str(row["device"]),
                str(row["test"]),
                result(row),
                "" if row["roofline"] is None else f"{100 * row['roofline']:.0f} %",
                f"{row['peak_memory'] / 2**30:.2f} GiB",
            ]
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def result(row: Row, unit: str = "") -> str:
    """What was measured: seconds to a first token, else tokens/s, which `unit` may name."""
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
    """A table and its rows, as SQLite reads them."""
    if not rows:
        return ""
    kinds = {int: "INTEGER", float: "REAL", bool: "INTEGER"}
    found = {key: _kind([row[key] for row in rows], kinds) for key in rows[0]}
    columns = ",\n".join(f'  "{key}" {kind}' for key, kind in found.items())
    lines = [f"CREATE TABLE IF NOT EXISTS minicpm_mlx_bench (\n{columns}\n);"]
    for row in rows:
        values = ", ".join(_literal(row[key]) for key in rows[0])
        lines.append(f"INSERT INTO minicpm_mlx_bench VALUES ({values});")
    return "\n".join(lines)


FORMATS = {
    "md": markdown,
    "csv": as_csv,
    "json": as_json,
    "jsonl": as_jsonl,
    "sql": as_sql,
}


def _flat(value: Any) -> Any:
    return " ".join(map(str, value)) if isinstance(value, list) else value


def _kind(values: Sequence[Any], kinds: Mapping[type, str]) -> str:
    types = {type(value) for value in values if value is not None}
    if types == {int, float}:
        return "REAL"
    return kinds.get(next(iter(types)), "TEXT") if len(types) == 1 else "TEXT"


def _literal(value: Any) -> str:
    if value is None:
        return "NULL"
    if isinstance(value, int | float):
        return repr(value)
    return "'" + str(_flat(value)).replace("'", "''") + "'"


def read(path: Path) -> list[dict[str, Any]]:
    """Rows that `as_json` or `as_jsonl` wrote; InvalidArgumentError for anything else."""
    try:
        text = path.read_text(encoding="utf-8")
        rows = json.loads(text) if text.lstrip().startswith("[") else _lines(text)
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidArgumentError(f"{path}: cannot be read ({error})") from None
    sound = isinstance(rows, list) and all(_is_row(row) for row in rows)
    if not sound or not rows:
        raise InvalidArgumentError(f"{path}: expected what `minicpm-mlx bench --json` prints")
    return rows


def _lines(text: str) -> list[Any]:
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def _is_row(row: Any) -> bool:
    """Whether it has what `compare` needs."""
    if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in KEYS):
        return False
    average, deviation = (_number(row.get(key)) for key in ("avg_ns", "stddev_ns"))
    return 0 < average < math.inf and 0 <= deviation < math.inf


def _number(value: Any) -> float:
    """A JSON number as a float; NaN for what is none."""
    try:
        return number("", value)
    except InvalidArgumentError:
        return math.nan


def compare(before: Sequence[Row], after: Sequence[Row]) -> list[dict[str, Any]]:
    """How much faster `after` is at each test that both have, with the ratio's deviation."""
    known = {tuple(row[key] for key in KEYS): row for row in before}
    found = []
    for row in after:
        old = known.get(tuple(row[key] for key in KEYS))
        if old is None:
            continue
        ratio = old["avg_ns"] / row["avg_ns"]
        spread = math.hypot(old["stddev_ns"] / old["avg_ns"], row["stddev_ns"] / row["avg_ns"])
        found.append(
            {
                **{key: row[key] for key in KEYS},
                "before_s": old["avg_ns"] / 1e9,
                "after_s": row["avg_ns"] / 1e9,
                "ratio": round(ratio, 4),
                "stddev": round(ratio * spread, 4),
            }
        )
    if not found:
        raise InvalidArgumentError("the two files have no test of the same model in common")
    return found
