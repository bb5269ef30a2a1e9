"""Paths, models and choices named on the command line are looked at before anything is fetched."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

import minicpm_mlx as mm
from minicpm_mlx.cli.main import app
from minicpm_mlx.convert.checkpoint import convert
from minicpm_mlx.convert.export_adapter import export_adapter
from minicpm_mlx.convert.merge_adapter import fuse_adapter
from minicpm_mlx.errors import InvalidArgumentError, MiniCPMError, StorageError
from minicpm_mlx.loading import download

NAMES = {"model", "adapter", "draft", "reference", "source"}
ELSEWHERE = {
    ("lora", "data"): "read before the model is fetched",
    ("lora", "adapter_path"): "claimed before the model is fetched",
    ("dpo", "data"): "as lora's",
    ("dpo", "adapter_path"): "as lora's",
    ("serve", "adapter"): "NAME=DIR, taken apart by the command",
    ("web", "adapter"): "as serve's",
    ("bench", "compare"): "read at once, and no model is",
    ("show", "model"): "nothing is fetched",
    ("rm", "model"): "nothing is fetched",
    ("connect", "model"): "a name that a server has",
    ("export", "file"): "nothing is fetched",
}
"""Parameters whose command checks them itself, at once."""
LARGE = "minicpm-2b-dpo"


@pytest.fixture(autouse=True)
def nothing_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(*_: object, **__: object) -> Path:
        pytest.fail("went for the model before its arguments were checked")

    monkeypatch.setattr(download, "fetch", fetch)


def parameters(group: Any, *names: str) -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        yield from ((name, parameter) for parameter in command.params)
        if hasattr(command, "commands"):
            yield from parameters(command, name)


def test_each_path_and_model_of_every_command_is_checked_when_parsed() -> None:
    unchecked = [
        (command, parameter.name)
        for command, parameter in parameters(typer.main.get_command(app))
        if (parameter.type.name == "path" or parameter.name in NAMES)
        and parameter.callback is None
        and (command, parameter.name) not in ELSEWHERE
    ]
    assert not unchecked


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("chat --adapter {none}", "--adapter {none}: expected an adapter's folder, found no such"),
        ("chat --draft nope", "--draft: no model named 'nope'"),
        ("chat --draft {empty}", "--draft {empty}/config.json: not found"),
        ("chat --prompt=", "the prompt is empty"),
        ("chat --stop=", "--stop must not be empty"),
        ("serve --grace nan", "--grace must be between 0 and 3600"),
        ("serve --port 99999", "--port must be 0 to 65535"),
        ("ppl --text {file} --stride 9999", "--stride must be at most the context"),
        ("chat --dtype int8", "--dtype must be one of float32"),
        ("generate -p x --adapter {file}", "--adapter {file}: expected an adapter's folder, found"),
        ("generate -p x --adapter {empty}", "--adapter {empty}: no adapter; expected"),
        ("generate -p x --device tpu", "--device must be gpu or cpu"),
        ("serve --adapter a={none}", "--adapter a: {none}: expected an adapter's folder"),
        ("serve --api-key-file {none}", "--api-key-file {none}: No such file"),
        ("serve --tls-cert {empty}", "--tls-cert {empty}: expected a file, found a folder"),
        ("web --tls-key {none}", "--tls-key {none}: No such file"),
        ("fuse {large} {new} --adapter {none}", "--adapter {none}: expected an adapter's folder"),
        ("fuse {large} {new} --adapter {adapter} --text {none}", "--text {none}: No such file"),
        ("fuse {large} {empty} --adapter {adapter}", "exists; give a name that does not"),
        ("export-adapter {none} {new} --format peft", "{none}: expected an adapter's folder"),
        ("export-adapter {adapter} {empty} --format peft", "exists; give a name that does not"),
        ("export-adapter {adapter} {new} --format onnx", "--format must be one of peft, mlx, gguf"),
        ("quantize {large} {none}/new", "is no folder; make it first"),
        ("quantize {large} {new} --calibration {none}", "--calibration {none}: No such file"),
        ("quantize {large} {new} --evaluate {none}", "--evaluate {none}: No such file"),
        ("convert {large} {file}", "exists; give a name that does not"),
        ("convert {large} {new} --format onnx", "--format must be one of mup, llama, mlx, gguf"),
        ("convert {large} {new} --dtype int8", "--dtype must be one of float32"),
        ("convert {large} {new} --format gguf --type Q9", "--type must be one of F32"),
        ("convert {large} {new}.gguf --format mlx", "expected format gguf, or another name"),
        ("ppl --text {none}", "--text {none}: No such file"),
        ("ppl --text {file} --reference nope", "--reference: no model named 'nope'"),
        ("eval --tasks gsm8k --data {none}", "--data {none}: expected a folder, found none"),
        ("eval --tasks gsm8k --output {file}", "--output {file} is a file; give a folder"),
        ("eval mt-bench --data {none}", "--data {none}: expected a folder, found none"),
        ("bench --plot {none}/chart.png", "--plot {none}/chart.png: no chart can be written"),
        ("bench --plot {new}.jpg", "--plot {new}.jpg: a chart is a PNG file"),
        ("ppl --text {empty_file}", "--text {empty_file}: it is empty"),
        ("pull {empty}", "{empty}/config.json: not found"),
        ("quantize {large} {new}.gguf", "{new}.gguf: a folder is written, not a GGUF file"),
        ("fuse {large} {new}.gguf --adapter {adapter}", "{new}.gguf: a folder is written"),
        ("launch --hostfile {none} -- serve", "--hostfile {none}: No such file"),
    ],
)
def test_a_mistake_is_named_before_a_model_is_fetched(
    command: Callable[..., int],
    capfd: pytest.CaptureFixture[str],
    demo_adapter: Path,
    tmp_path: Path,
    line: str,
    named: str,
) -> None:
    places = {name: tmp_path / name for name in ("none", "new", "empty", "file", "empty_file")}
    places["empty"].mkdir()
    places["file"].write_text("some text")
    places["empty_file"].touch()
    words = [word.format(**places, large=LARGE, adapter=demo_adapter) for word in line.split()]
    assert command(*words) == 1
    assert named.format(**places) in capfd.readouterr().err


def test_a_place_where_nothing_can_be_written_is_refused_first(
    command: Callable[..., int], capfd: pytest.CaptureFixture[str]
) -> None:
    assert command("convert", LARGE, "/proc/new") == 1
    err = capfd.readouterr().err
    assert "/proc/new: cannot be written" in err or "make it first" in err  # macOS has no /proc


@pytest.mark.parametrize("options", [{"adapter": "nope"}, {"draft": "nope"}, {"dtype": "int8"}])
def test_load_looks_at_its_arguments_first(options: dict[str, Any]) -> None:
    with pytest.raises(MiniCPMError, match=r"nope|dtype must be one of"):
        mm.load(LARGE, **options)


def test_the_library_writes_nothing_before_its_arguments_are_right(
    demo_adapter: Path, tmp_path: Path
) -> None:
    with pytest.raises(MiniCPMError, match=r"nope: expected an adapter's folder"):
        fuse_adapter(LARGE, tmp_path / "new", "nope")
    with pytest.raises(MiniCPMError, match=r"nope: expected an adapter's folder"):
        export_adapter("nope", tmp_path / "new", "peft", model=LARGE)
    with pytest.raises(StorageError, match="cannot be written"):
        fuse_adapter(LARGE, "/proc/new", demo_adapter)
    with pytest.raises(InvalidArgumentError, match="dtype must be one of"):
        convert(LARGE, tmp_path / "new", dtype="int8")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["adapter", "draft"])
def test_what_does_not_fit_the_model_is_refused_before_its_weights_are_read(
    tiny: mm.LM, demo_adapter: Path, demo_folder: Path, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    def load_model(*_: object, **__: object) -> None:
        pytest.fail("read the weights first")

    monkeypatch.setattr("minicpm_mlx.loading.load.load_model", load_model)
    other = {"adapter": demo_adapter, "draft": demo_folder}[option]
    with pytest.raises(MiniCPMError, match=r"v_proj|another vocabulary"):
        mm.load(str(tiny.folder), **{option: other})


def test_a_missing_adapter_is_named_once(tiny: mm.LM, demo: mm.LM) -> None:
    with pytest.raises(MiniCPMError) as error:
        tiny.use_adapter("nowhere")
    assert str(error.value).count("nowhere") == 1
