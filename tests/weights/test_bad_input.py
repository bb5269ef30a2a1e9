"""What users get wrong, and what files may hold: one line, exit 1, and nothing left behind."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from minicpm_mlx.cli.main import main
from support.data import GOLDEN, write_tokenizer

Fails = Callable[..., str]


@pytest.fixture
def fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Fails:
    """Runs a command that must fail as every command does; its message."""
    cache, downloads = tmp_path / "cache", tmp_path / "hub"
    monkeypatch.setenv("MINICPM_MLX_HOME", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(downloads))

    def call(*arguments: str, stdin: str = "") -> str:
        monkeypatch.setattr(sys, "argv", ["minicpm-mlx", *arguments])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        assert (ended.value.code, out) == (1, "")
        assert not list(cache.glob("*"))
        assert not downloads.exists()
        return one_line(err)

    return call


def one_line(err: str) -> str:
    assert err.startswith("minicpm-mlx: ")
    assert err.endswith("\n")
    assert len(err.splitlines()) == 1, err
    return err.removeprefix("minicpm-mlx: ").rstrip("\n")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A whole small model, to be damaged."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(GOLDEN / "minicpm_2b_like" / name, folder / name)
    write_tokenizer(folder)
    return folder


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def generate(folder: str | Path, *rest: str) -> tuple[str, ...]:
    return ("generate", "--model", str(folder), "--prompt", "Hi", "--max-tokens", "4", *rest)


def test_the_undamaged_folder_generates(
    folder: Path, command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(*generate(folder, "--json")) == 0
    out, err = capsys.readouterr()
    assert (json.loads(out)["completion_tokens"], err) == (4, "")


# Names


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            generate("minicpm-2b-dop"),
            "no model named 'minicpm-2b-dop'; did you mean minicpm-2b-dpo",
        ),
        (generate("zzzz"), "no model named 'zzzz'"),
        (generate("zzzz"), "minicpm-mlx list"),
        (generate("./nowhere/model"), "no folder or file ./nowhere/m"),
        (("show", "./nowhere/m"), "no folder or file ./nowhere/m"),
        (("pull", "./nowhere/m"), "no folder or file ./nowhere/m"),
        (generate(__file__), "expected a model folder, found the file"),
        (generate("openbmb/unheard-of"), "openbmb/unheard-of is not kept on this machine"),
        (generate("openbmb/unheard-of"), "HF_HUB_OFFLINE"),
        (("show", "openbmb/Nope", "--json"), "openbmb/Nope is not downloaded"),
        (("show", "openbmb/Nope", "--json"), "`minicpm-mlx pull openbmb/Nope`"),
        (("generate", "--prompt", "Hi"), "--model demo"),
        (("chat",), "--model demo"),
        (("rm", "minicpm-2b-dpo", "--yes"), "nothing to delete"),
        (("rm", str(GOLDEN), "--yes"), "your own"),
        (("rm", "/", "--yes"), "your own"),
    ],
)
def test_a_model_that_is_not_here_is_named_with_what_to_do(
    fails: Fails, arguments: tuple[str, ...], words: str
) -> None:
    assert words in fails(*arguments)


def test_a_network_that_is_down_is_one_line(tmp_path: Path) -> None:
    env = {
        **os.environ,
        "HF_HUB_OFFLINE": "0",
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "MINICPM_MLX_HOME": str(tmp_path / "home"),
    }
    code = "from minicpm_mlx.cli.main import main; main()"
    arguments = ["generate", "--prompt", "Hi"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=env
    )
    assert (done.returncode, done.stdout) == (1, "")
    message = one_line(done.stderr)
    assert "http://127.0.0.1:9 could not be reached" in message
    assert "--model demo" in message
    assert not list(tmp_path.iterdir())


# Options


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("generate", "-p", "Hi", "--max-tokens", "0"), "--max-tokens must be 1 or more, got 0"),
        (("chat", "--max-tokens", "0"), "max-tokens must be 1 or more"),
        (("generate", "-p", "Hi", "--top-p", "2"), "must be above 0 and at most 1, got 2"),
        (("generate", "-p", "Hi", "--dtype", "int8"), "dtype must be one of float32"),
        (("generate", "-p", "Hi", "--device", "tpu"), "--device must be gpu or cpu, got 'tpu'"),
        (("generate", "-p", ""), "the prompt is empty"),
        (("generate", "-p", " \n"), "the prompt is empty"),
        (("generate", "-p", "-"), "the prompt is empty"),
        (("generate", "-p", "", "--raw"), "the prompt is empty"),  # no bos leads
    ],
)
def test_an_option_out_of_range_is_named(
    fails: Fails, folder: Path, arguments: tuple[str, ...], words: str
) -> None:
    assert words in fails(*arguments, "--model", str(folder))


def test_a_prompt_beyond_the_context_gives_both_numbers(fails: Fails, folder: Path) -> None:
    change_config(folder, max_position_embeddings=32)
    for tokens in (32, 40):
        message = fails(*generate(folder, "--raw", "--prompt", "x" * tokens))
        assert f"the prompt has {tokens} tokens" in message
        assert "32" in message.replace(f"{tokens} tokens", "")
    message = fails("chat", "--model", str(folder), stdin="x" * 40 + "\n")
    assert "tokens and the context is 32" in message


# Damaged folders: the readers' own tests have every kind of damage; one of each is tried here


def resave(folder: Path, change: Callable[[dict[str, mx.array]], object]) -> None:
    path = folder / "model.safetensors"
    arrays = dict(mx.load(str(path)))
    mx.eval(arrays)
    change(arrays)
    path.unlink()
    mx.save_safetensors(str(path), arrays)


def cut(path: Path, length: int) -> None:
    path.write_bytes(path.read_bytes()[:length])


NORM = "model.norm.weight"
SHARD = "model-00001-of-00002.safetensors"
INDEX = json.dumps({"weight_map": {NORM: SHARD}})

DAMAGE: dict[str, Callable[[Path], object]] = {
    "a model folder needs a config.json": lambda f: (f / "config.json").unlink(),
    "config.json: not valid JSON": lambda f: (f / "config.json").write_text("{"),
    "config.json: hidden_size (128) must be a multiple": lambda f: change_config(
        f, num_attention_heads=5
    ),
    "must hold tokenizer.json or tokenizer.model": lambda f: (f / "tokenizer.json").unlink(),
    "tokenizer.json is not a tokenizer": lambda f: (f / "tokenizer.json").write_text("{}"),
    "the tokenizer has 600 tokens and the model 512": lambda f: write_tokenizer(f, size=600),
    "model.safetensors: expected a sound safetensors file": lambda f: cut(
        f / "model.safetensors", -1000
    ),
    "surprise is not part of this architecture": lambda f: resave(
        f, lambda arrays: arrays.update(surprise=mx.ones(3))
    ),
    "no weights; expected model.safetensors": lambda f: (f / "model.safetensors").unlink(),
    f"{SHARD}: missing": lambda f: (
        (f / "model.safetensors").rename(f / "model.safetensors.index.json").write_text(INDEX)
    ),
}


@pytest.mark.parametrize("words", DAMAGE)
def test_a_damaged_folder_is_one_line(fails: Fails, folder: Path, words: str) -> None:
    DAMAGE[words](folder)
    assert words in fails(*generate(folder))


def test_weights_of_nan_are_an_error_and_no_text(fails: Fails, folder: Path) -> None:
    resave(folder, lambda a: a.update({NORM: a[NORM] * float("nan")}))
    for more in ([], ["--json"], ["--temp", "1"]):
        assert "the model produced NaN" in fails(*generate(folder, *more))


@pytest.fixture
def bin_folder(folder: Path) -> Path:
    (folder / "model.safetensors").unlink()
    for name in ("config.json", "pytorch_model.bin"):
        shutil.copyfile(GOLDEN / "minicpm_2b_like_bin" / name, folder / name)
    return folder


def test_a_truncated_bin_is_refused(fails: Fails, bin_folder: Path) -> None:
    cut(bin_folder / "pytorch_model.bin", -1000)
    assert "pytorch_model.bin: expected a file of torch.save" in fails(*generate(bin_folder))


class Hostile:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


@pytest.mark.parametrize(("protocol", "zipped"), [(0, False), (2, True), (4, True)])
def test_a_bin_that_would_run_a_command_does_not(
    fails: Fails, bin_folder: Path, tmp_path: Path, protocol: int, zipped: bool
) -> None:
    proof = tmp_path / "it-ran"
    program = pickle.dumps({"model.norm.weight": Hostile(f"touch {proof}")}, protocol)
    path = bin_folder / "pytorch_model.bin"
    if zipped:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", program)
            archive.writestr("archive/version", "3\n")
    else:
        path.write_bytes(program)
    assert str(path) in fails(*generate(bin_folder))
    assert not proof.exists()
    pickle.loads(program)  # the program works where it is trusted
    assert proof.exists()
