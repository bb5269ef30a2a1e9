"""Benchmarks: measurements, their formats, comparisons and predictions."""

from __future__ import annotations

import csv
import io
import json
import runpy
import sqlite3
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minicpm_mlx import Config, device, load_model, memory
from minicpm_mlx.bench import chart, chips, output, shapes
from minicpm_mlx.bench.footprint import footprint
from minicpm_mlx.bench.kernel_count import count, decode_step
from minicpm_mlx.bench.measure import (
    WARM_TOKENS,
    MeasuredModel,
    Measurement,
    Work,
    environment,
    measure,
    works,
)
from minicpm_mlx.engine import Session
from minicpm_mlx.errors import InvalidArgumentError
from minicpm_mlx.model_cards import cards
from support.data import GOLDEN
from support.tiny_model import write_model

SMALL = Config.from_dict(
    {**shapes.SHAPES["2b-shape"], "hidden_size": 128, "intermediate_size": 192,
     "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 512}
)  # fmt: skip


MIXTURE = {
    **{**shapes.SHAPES["2b-shape"], "hidden_size": 128, "intermediate_size": 128},
    **{"num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 512},
    **{"num_experts": 8, "num_experts_per_tok": 2},
}


@pytest.fixture(scope="module")
def subject() -> MeasuredModel:
    model: Any = load_model(GOLDEN / "minicpm_2b_like", fuse=True)
    return MeasuredModel(
        name="tiny", model=model, load_s=0.5, bandwidth=10.0, quote=[1, 2, 3, 1, 2, 3]
    )


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny model in the current folder."""
    write_model(tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def rows(subject: MeasuredModel) -> list[dict[str, Any]]:
    todo = works(prompts=[12], gens=[4], pairs=[(6, 3)], depths=[0, 9], batches=[1, 3], guess=True)
    facts = environment(subject)
    return [{**facts, **record.row()} for record in measure(subject, todo, repetitions=2)]


def test_work_is_named_as_llama_bench_names_it() -> None:
    todo = works(prompts=[512, 0], gens=[128], pairs=[(64, 8)], depths=[0, 4096], batches=[1, 8])
    assert ", ".join(work.name for work in todo) == (
        "pp512, tg128, pp64+tg8, pp512 x8, tg128 x8, pp64+tg8 x8, "
        "pp512 @ d4096, tg128 @ d4096, pp64+tg8 @ d4096, tg128 @ d4096 x8"
    )
    firsts = [work.name for work in works(prompts=[64], gens=[], first=True)]
    assert firsts == ["pp64", "first token cold, pp64", "first token warm, pp64"]


class Spy:
    """Notes how many tokens each pass of a model reads."""

    def __init__(self, model: Any):
        self.model, self.config, self.adapter = model, model.config, None
        self.reads: list[tuple[int, int]] = []

    def hidden(self, ids: mx.array, cache: Any = None, length: int | None = None) -> mx.array:
        self.reads.append((cache[0].offset if cache else 0, ids.shape[1]))
        hidden: mx.array = self.model.hidden(ids, cache, length)
        return hidden

    def logits(self, hidden: mx.array) -> mx.array:
        logits: mx.array = self.model.logits(hidden)
        return logits


@pytest.mark.parametrize(
    ("work", "timed"),
    [
        (Work(prompt=12), [(0, 12)]),
        (Work(prompt=12, depth=20), [(20, 12)]),
        (Work(gen=4), [(1, 1), (2, 1), (3, 1), (4, 1)]),
        (Work(gen=2, depth=20), [(21, 1), (22, 1)]),
        (Work(prompt=5, gen=2), [(0, 5), (5, 1), (6, 1)]),
        (Work(prompt=40, first="cold"), [(0, 40)]),
        (Work(prompt=40, first="warm"), [(40 - WARM_TOKENS, WARM_TOKENS)]),
    ],
    ids=lambda value: value.name if isinstance(value, Work) else "",
)
def test_what_is_timed_is_the_work_and_nothing_else(
    subject: MeasuredModel,
    work: Work,
    timed: list[tuple[int, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spy = Spy(subject.model)
    began: list[int] = []
    monkeypatch.setattr(mx, "synchronize", lambda *_: began.append(len(spy.reads)))
    measured = MeasuredModel(name="spy", model=spy)
    monkeypatch.setattr(MeasuredModel, "read", lambda *_: 0)
    monkeypatch.setattr("minicpm_mlx.bench.measure._cache_bytes", lambda _: 0.0)
    list(measure(measured, [work], repetitions=1, warmup=False))
    assert spy.reads[began[0] :] == timed


def test_a_record_says_what_its_seconds_mean() -> None:
    work = Work(gen=10, batch=2)
    record = Measurement(
        work=work, seconds=[1.0, 2.0], peak_memory=7, bytes_per_token=2e9, bandwidth=100.0
    )
    row = record.row()
    assert (row["avg_ts"], row["stddev_ts"]) == (15.0, 7.071)
    assert row["samples_ts"] == [20.0, 10.0]
    assert row["avg_ns"] == 1_500_000_000
    assert record.roofline == pytest.approx(7.5 * 2e9 / 100e9)  # 7.5 passes a second


def test_bytes_a_token_are_weights_and_half_the_new_cache(subject: MeasuredModel) -> None:
    (record,) = measure(subject, [Work(gen=4, depth=10)], repetitions=1)
    config = subject.model.config
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    weights = memory.parameter_count(config) * 4
    assert record.bytes_per_token == pytest.approx(weights + 12 * cache)
    assert subject.size == weights


def test_a_token_reads_the_experts_it_is_sent_to() -> None:
    def read(changes: dict[str, Any], batch: int) -> float:
        config = Config.from_dict({**MIXTURE, **changes})
        return MeasuredModel(name="mixture", model=shapes.random_model(config)).read(batch)

    plain = read({"num_experts": 0}, 1)  # as wide as one expert
    one, two, all_of_8 = (read({"num_experts_per_tok": k}, 1) for k in (1, 2, 8))
    router = one - plain
    expert = two - one
    assert 0 < router < expert
    assert all_of_8 == pytest.approx(one + 7 * expert)
    assert read({"num_experts_per_tok": 8}, 5) == all_of_8
    # Of two tokens sent to one expert each, the second meets another one in 7 of 8 cases.
    assert read({"num_experts_per_tok": 1}, 2) == pytest.approx(one + 7 / 8 * expert)
    assert read({"num_experts_per_tok": 1}, 1000) == pytest.approx(all_of_8)


def test_a_whole_mixture_is_read_where_every_expert_sees_every_token() -> None:
    model: Any = load_model(GOLDEN / "minicpm_moe_like")  # the reference model
    subject = MeasuredModel(name="reference", model=model)
    assert subject.read() == subject.size


def test_every_kind_of_work_gives_a_row(rows: list[dict[str, Any]]) -> None:
    names = [row["test"] for row in rows]
    assert names == [
        *("pp12", "tg4", "pp6+tg3", "pp12 x3", "tg4 x3", "pp6+tg3 x3"),
        *("pp12 @ d9", "tg4 @ d9", "pp6+tg3 @ d9", "tg4 @ d9 x3", "copy4", "copy4 guessing ahead"),
    ]
    for row in rows:
        assert len(row["samples_ts"]) == 2
        assert row["avg_ts"] > 0
        assert (row["model"], row["type_kv"], row["load_s"]) == ("tiny", "full", 0.5)
        assert row["power"] in ("mains", "battery", "unknown")
        assert row["thermal"]
        assert row["mlx"] == mx.__version__


def test_all_formats_hold_the_same(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    path = tmp_path / "rows"
    path.write_text(output.as_json(rows))
    assert output.read(path) == rows
    path.write_text(output.as_jsonl(rows))
    assert output.read(path) == rows
    table = list(csv.DictReader(io.StringIO(output.as_csv(rows))))
    assert [float(line["avg_ts"]) for line in table] == [row["avg_ts"] for row in rows]
    assert table[0]["samples_ts"].split() == [str(rate) for rate in rows[0]["samples_ts"]]
    database = sqlite3.connect(":memory:")
    database.executescript(output.as_sql([{**row, "chip": "Intel's; '"} for row in rows]))
    found = database.execute("SELECT test, avg_ts, chip FROM minicpm_mlx_bench").fetchall()
    assert found == [(row["test"], row["avg_ts"], "Intel's; '") for row in rows]
    lines = output.markdown(rows).splitlines()
    assert len(lines) == 2 + len(rows)
    assert f"{rows[0]['avg_ts']:.2f} ± {rows[0]['stddev_ts']:.2f}" in lines[2]
    assert all(line.count("|") == lines[0].count("|") for line in lines)


def test_two_files_are_compared_test_by_test(rows: list[dict[str, Any]]) -> None:
    faster = [{**row, "avg_ns": row["avg_ns"] / 2, "stddev_ns": 0} for row in rows[:3]]
    found = output.compare([{**row, "stddev_ns": 0} for row in rows], faster)
    assert [row["test"] for row in found] == [row["test"] for row in rows[:3]]
    assert all((row["ratio"], row["stddev"]) == (2.0, 0.0) for row in found)
    with pytest.raises(InvalidArgumentError, match="in common"):
        output.compare(rows, [{**row, "model": "another"} for row in rows])


ROW = '{"model": "a", "test": "pp1", "type_kv": "full", "avg_ns": %s, "stddev_ns": %s}'
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)
SOUND = json.loads(ROW % (5, 0))


def test_a_file_that_is_no_measurement_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    numbers = [("0", "0"), ("NaN", "0"), ("1e999", "0"), ("1" + "0" * 400, "0"), ("5", "-1")]
    numbers += [("5", "null"), ("true", "0"), ('"5"', "0")]
    for text in (
        *("", "[", "[]", "{}", '[{"test": 1}]', "[1]", '{"a": 1}\n{', "[" * 100_000, "[\0]"),
        *(ROW % pair for pair in numbers),
        *(json.dumps(SOUND | {key: []}) for key in output.KEYS),
    ):
        path.write_text(text)
        with pytest.raises(InvalidArgumentError, match=r"a\.json"):
            output.read(path)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.fixed_dictionaries({k: st.just(v) | JSON for k, v in SOUND.items()}) | JSON))
def test_whatever_is_read_can_be_compared(found: list[Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.json"
        path.write_text(json.dumps([SOUND, *found]))
        with suppress(InvalidArgumentError):
            rows = output.read(path)
            assert len(output.compare(rows, rows)) == len(rows)


def drawn_lines(rows: list[dict[str, Any]], path: Path, monkeypatch: Any) -> dict[str, int]:
    """Names of the lines of a chart of `rows`, with how many points they have."""
    axes = pytest.importorskip("matplotlib.axes")
    found: dict[str, int] = {}
    plain = axes.Axes.errorbar

    def errorbar(self: Any, x: Any, *args: Any, label: str, **options: Any) -> Any:
        found[label] = found.get(label, 0) + len(x)
        return plain(self, x, *args, label=label, **options)

    monkeypatch.setattr(axes.Axes, "errorbar", errorbar)
    chart.draw(rows, path)
    return found


def test_a_chart_is_drawn_of_what_can_be_compared(
    rows: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "chart.png"
    first = {**rows[0], "first_token": "cold"}  # seconds, among tokens a second
    found = drawn_lines([*rows, first], path, monkeypatch)
    assert found == {"pp12": 4, "tg4": 4, "pp6+tg3": 4}  # two depths, and two numbers of streams
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_chart_takes_any_name_and_needs_throughput(
    rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    chart.draw([{**rows[0], "model": "$x^{$ 中文"}], tmp_path / "chart.png")
    with pytest.raises(InvalidArgumentError, match=r"chart\.png: not drawn; a chart needs"):
        chart.draw([row for row in rows if row["copy"]], tmp_path / "chart.png")


def test_seconds_to_a_first_token_are_told_as_seconds(rows: list[dict[str, Any]]) -> None:
    row = {**rows[0], "avg_ns": 1_500_000_000, "stddev_ns": 250_000_000, "first_token": "warm"}
    assert output.result(row, "tok/s") == "1.500 ± 0.250 s"
    assert output.result({**rows[0], "avg_ts": 2.5, "stddev_ts": 0}, "tok/s") == "2.50 ± 0.00 tok/s"


def test_the_published_figures_are_what_the_prediction_rests_on() -> None:
    theirs = chips.Footprint(
        weights=chips.MINICPM_2B.weights, cache=chips.MINICPM_2B.cache, kernels=chips.LLAMA_KERNELS
    )
    for chip, speed in chips.PUBLISHED.items():
        found = chips.expected(chip, theirs, chips.PUBLISHED_DEPTH)
        assert found == pytest.approx(speed)
        assert chips.expected(chip, chips.MINICPM_2B, chips.PUBLISHED_DEPTH) > speed
    for chip in chips.BANDWIDTHS:
        rates = [chips.expected(chip, chips.MINICPM_2B, depth) for depth in (0, 2048, 4096)]
        assert rates == sorted(rates, reverse=True)
    assert chips.bandwidth("Apple M3 Max") == 400
    assert chips.bandwidth("Intel(R) Xeon(R)") is None


def test_the_footprint_of_2b_is_that_of_its_shape() -> None:
    found = footprint(shapes.packed_config("2b-shape"))
    assert found.weights == pytest.approx(chips.MINICPM_2B.weights, rel=0.005)
    assert (found.cache, found.kernels) == (chips.MINICPM_2B.cache, chips.MINICPM_2B.kernels)


def small(shape: str) -> dict[str, Any]:
    """A shape of the same kind with few and narrow layers."""
    raw = shapes.SHAPES[shape]
    small = {"hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 3}
    small |= {"vocab_size": 1024, "num_attention_heads": 4}
    if "num_key_value_heads" in raw:
        small["num_key_value_heads"] = 2
    if "q_lora_rank" in raw:
        small |= {"q_lora_rank": 192, "kv_lora_rank": 128}
    return {**raw, **small}


@pytest.mark.parametrize("shape", shapes.SHAPES)
def test_what_is_predicted_of_a_token_is_what_a_built_model_reads_caches_and_runs(
    shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "unpack_to", lambda *_: None)  # packed, as on a GPU
    config = Config.from_dict(small(shape))
    found = footprint(replace(config, quantization=shapes.PACKING))
    built = MeasuredModel(name=shape, model=shapes.random_model(config, "float16"))
    assert found.weights == pytest.approx(built.read(), rel=0.005)
    session = Session(config)
    next(session.prefill(built.model, [1], length=1, chunk=1))
    used = [array for layer in session.cache for array in layer.state]
    assert found.cache == sum(array[..., :1, :].nbytes for array in used)
    assert found.kernels == sum(decode_step(small(shape)).values())


@pytest.mark.slow
def test_kernels_are_fewer_than_mlx_lm_s() -> None:
    folder = Path(__file__).parents[2] / "benchmarks"
    sys.path.insert(0, str(folder))
    try:
        script = runpy.run_path(str(folder / "kernels.py"))
    finally:
        sys.path.remove(str(folder))
    ours = sum(script["ours"]().values())
    assert ours <= 0.66 * sum(script["theirs"]("llama").values())
    assert ours <= 0.6 * sum(script["theirs"]("minicpm").values())
    assert sum(script["ours"](sampling=script["CARD"]).values()) <= ours + 20


def test_kernels_are_counted_as_a_gpu_runs_them() -> None:
    x, w = mx.ones((1, 4, 64)), mx.ones((64,))
    packed = mx.quantize(mx.ones((64, 64)), group_size=64, bits=4)
    mx.eval(x, w, packed)

    def step() -> list[mx.array]:
        y = mx.fast.rms_norm(x, w, 1e-5).reshape(4, 64)[:2].T  # views
        return [mx.quantized_matmul(y.T, *packed, group_size=64, bits=4) + 1.0]

    assert count(step) == {"RMSNorm": 1, "QuantizedMatmul": 1, "Add": 1}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_shape_s_random_model_computes(dtype: str) -> None:
    model = shapes.random_model(SMALL, dtype)
    logits = model(mx.array([[1, 2, 3]]))
    assert logits.shape == (1, 3, 512)
    assert mx.isfinite(logits.astype(mx.float32)).all().item()
    assert logits.astype(mx.float32).max().item() < 1e4


def test_a_shape_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minicpm_mlx.device.available_memory", lambda: 1_000_000_000)
    with pytest.raises(InvalidArgumentError, match="not enough memory"):
        shapes.random_model("2b-shape")


def test_shapes_are_those_of_the_family() -> None:
    assert memory.parameter_count(Config.from_dict(shapes.SHAPES["2b-shape"])) == pytest.approx(
        2.72e9, rel=0.01
    )
    with pytest.raises(InvalidArgumentError, match="2b-shape"):
        shapes.random_model("3b-shape")


def test_the_command_measures_compares_and_draws(
    tiny: None, tmp_path: Path, command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    chart = tmp_path / "chart.png"
    short = ["--model", "tiny", "-p", "4", "-n", "2", "-r", "1", "--no-warmup"]
    assert command("bench", *short, "--json", "--plot", str(chart), "--bandwidth", "20") == 0
    out, err = capsys.readouterr()
    rows = json.loads(out)
    assert [row["test"] for row in rows] == ["pp4", "tg2"]
    assert 0 < rows[1]["roofline"] < 2
    assert rows[1]["load_s"] > 0
    assert "tg2" in err
    assert chart.stat().st_size > 1000
    saved = tmp_path / "a.json"
    saved.write_text(out)
    assert command("bench", "--compare", str(saved), str(saved)) == 0
    assert "1.00 ±" in capsys.readouterr().out
    assert command("bench", "--predict", "--json") == 0
    assert {row["chip"] for row in json.loads(capsys.readouterr().out)} == chips.BANDWIDTHS.keys()
    assert command("bench", "--predict") == 0
    assert "not measured" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("model", "words", "published"),
    [
        ("minicpm3-4b", ("minicpm3-4b in 4 bits", "2.29 GB", "35 KiB", "1253 kernels"), False),
        ("minicpm5-1b-bf16", ("in 16 bits", "1.76 GB", "24 KiB", "277 kernels"), False),
        ("bitcpm4-1b", ("in 2 bits", "0.58 GB"), False),
        ("minicpm-2b-sft", ("in 4 bits", "1.53 GB", "360 KiB", "453 kernels"), True),
        ("2b-untied-shape", ("in 4 bits", "1.53 GB"), True),
    ],
)
def test_the_command_predicts_a_card_as_it_runs_and_a_shape_in_4_bits(
    model: str,
    words: tuple[str, ...],
    published: bool,
    command: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert command("bench", "--predict", "--model", model) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in words)
    assert ("published" in out) == published


def test_nothing_is_predicted_of_a_model_of_unknown_shape(
    command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("bench", "--predict", "--model", "someone/something") == 1
    assert "no card tells its shape" in capsys.readouterr().err


MEASURED = ["--model", "tiny", "-p", "4", "-n", "0", "-r", "1"]
IMPOSSIBLE = {
    "-p many": "--n-prompt must be whole numbers from 0",
    f"-p {'9' * 5000}": "--n-prompt must be whole numbers from 0 to 999999999",
    "-d 999999999": "not enough memory: 1000000003 tokens of context",
    "-p 0": "nothing is to be measured",
    "-d 5 -b 2": "nothing is to be measured",
    "-p 512,16 --first": "expected prompts of more, got 512, 16",
    "-b 0": "--batch must be whole numbers from 1",
    "--pg 5": "--pg takes two numbers",
    "-o yaml": "--output must be one of md, csv, json, jsonl, sql, got 'yaml'",
    "-o sql --json": "--json contradicts --output sql",
    "-r 0": "repetitions",
    "--kv-bits 8 -b 2": "--kv-bits is for one stream",
    "--kv-bits 5": "--kv-bits must be 8 or 4, got 5",
    "--bandwidth nan": "--bandwidth must be above 0, got nan",
    "--plot /nowhere/a.png": "/nowhere/a.png: no chart can be written there",
}
MEANINGLESS = {
    "--predict -o csv": "--output must be one of md, json with --predict, got 'csv'",
    "--compare a b -o sql": "md, json with --compare, got 'sql'",
    "--predict --plot a.png": "--predict measures nothing, so --plot has no meaning",
    "--predict --compare a b": "so --compare has no meaning",
    "--compare a b -n 128": "so --n-gen has no meaning",
    "--compare /nowhere /nowhere": "cannot be read",
}


def test_options_that_cannot_be_honoured_are_one_line_of_error(
    tiny: None, command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    for options, messages in ((MEASURED, IMPOSSIBLE), ([], MEANINGLESS)):
        for words, message in messages.items():
            assert command("bench", *options, *words.split()) == 1
            out, err = capsys.readouterr()
            assert message in err
            assert (out, err.count("\n")) == ("", 1)


def test_what_was_measured_is_told_when_the_rest_is_broken_off(
    tiny: None,
    command: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from minicpm_mlx.bench import measure as module

    def interrupted(subject: MeasuredModel, todo: list[Work], **how: Any) -> Any:
        yield from measure(subject, todo[:1], **how)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "measure", interrupted)
    assert command("bench", *MEASURED, "-p", "4,5", "--json") == 130
    out, err = capsys.readouterr()
    assert [row["test"] for row in json.loads(out)] == ["pp4"]
    assert "pp4: " in err
    assert err.endswith("minicpm-mlx: interrupted\n")


def test_every_card_s_shape_is_one_and_takes_what_its_download_says() -> None:
    for card in cards().values():
        if card.shape is None:
            continue
        config = Config.from_dict(shapes.SHAPES[card.shape])
        if card.bits is None and card.width in (None, 2) and card.name.startswith("minicpm5"):
            size = 2 * memory.parameter_count(config) / 1e9
            assert card.size_gb == pytest.approx(size, rel=0.01), card.name
