"""Measurements as people and programs read them; two compared; a chart."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import InvalidArgumentError, MissingPackageError

Row = Mapping[str, Any]
"""One measurement with its environment, flat."""

KEYS = ("model", "test", "type_kv")
"""What two rows must share to be compared."""


def markdown(rows: Sequence[Row]) -> str:
    """A table like llama-bench's."""
    head = ["model", "size", "params", "device", "test", "t/s", "roofline", "memory"]
    lines = [head, ["---"] * 3 + ["---"] + ["---"] + ["---:"] * 3]
    for row in rows:
        seconds = f"{row['avg_ns'] / 1e9:.3f} ± {row['stddev_ns'] / 1e9:.3f} s"
        rate = f"{row['avg_ts']:.2f} ± {row['stddev_ts']:.2f}"
        lines.append(
            [
                str(row["model"]),
                f"{row['model_size'] / 2**30:.2f} GiB",
                f"{row['model_n_params'] / 1e9:.2f} B",
                str(row["device"]),
                str(row["test"]),
                seconds if row["first_token"] else rate,
                "" if row["roofline"] is None else f"{100 * row['roofline']:.0f} %",
                f"{row['peak_memory'] / 2**30:.2f} GiB",
            ]
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


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
    numbers = ("avg_ns", "stddev_ns")
    return (
        isinstance(row, dict)
        and all(key in row for key in KEYS)
        and all(isinstance(row.get(key), int | float) for key in numbers)
        and row["avg_ns"] > 0
    )


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


def plot(rows: Sequence[Row], path: Path) -> None:
    """Throughput against context, and against streams at once, as a picture at `path`."""
    try:
        import matplotlib
    except ImportError:
        raise MissingPackageError(
            "a chart needs matplotlib: pip install 'minicpm-mlx[plot]'"
        ) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in rows if not row["first_token"]]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axes, key, fixed, label in (
        (left, "n_depth", "n_parallel", "tokens of context before"),
        (right, "n_parallel", "n_depth", "streams at once"),
    ):
        least = min(row[fixed] for row in rows)
        for kind in sorted({(row["n_prompt"], row["n_gen"]) for row in rows}):
            line = [r for r in rows if (r["n_prompt"], r["n_gen"]) == kind and r[fixed] == least]
            line.sort(key=lambda row: row[key])
            name = "+".join(f"{n}{c}" for n, c in zip(("pp", "tg"), kind, strict=True) if c)
            x, y = [row[key] for row in line], [row["avg_ts"] for row in line]
            axes.errorbar(x, y, [row["stddev_ts"] for row in line], marker="o", label=name)
        axes.set(xlabel=label, ylabel="tokens/s", ylim=(0, None))
        axes.legend()
    figure.suptitle(f"{rows[0]['model']} · {rows[0]['chip']}")
    figure.savefig(path, format="png", dpi=120)
    pyplot.close(figure)
