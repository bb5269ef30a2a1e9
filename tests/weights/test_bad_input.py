"""What users get wrong, and what files may hold: one line, exit 1, and nothing left behind."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from minicpm_mlx.cli.main import main
from minicpm_mlx.loading import download
from support.data import write_tokenizer

GOLDEN = Path(__file__).parents[1] / "golden"

Fails = Callable[..., str]


@pytest.fixture
def fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Fails:
    """Runs a command that must fail as every command does; its message."""
    cache, downloads = tmp_path / "cache", tmp_path / "hub"
    monkeypatch.setenv("MINICPM_MLX_HOME", str(cache))
    monkeypatch.setattr(download, "_cache", lambda: downloads)

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
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["minicpm-mlx", *generate(folder, "--json")])
    with pytest.raises(SystemExit) as ended:
        main()
    out, err = capsys.readouterr()
    assert (ended.value.code, err) == (0, "")
    assert json.loads(out)["completion_tokens"] == 4


# Names


def test_a_near_miss_is_suggested(fails: Fails) -> None:
    message = fails(*generate("minicpm-2b-dop"))
    assert "no model named 'minicpm-2b-dop'" in message
    assert "did you mean minicpm-2b-dpo" in message


def test_an_unknown_name_says_where_the_names_are(fails: Fails) -> None:
    message = fails(*generate("zzzz"))
    assert "no model named 'zzzz'" in message
    assert "did you mean" not in message
    assert "minicpm-mlx list" in message


@pytest.mark.parametrize("command", ["generate", "show", "pull"])
def test_a_path_that_does_not_exist_is_named(fails: Fails, command: str) -> None:
    arguments = generate("./nowhere/model") if command == "generate" else (command, "./nowhere/m")
    assert "no folder or file ./nowhere/m" in fails(*arguments)


def test_a_file_is_no_folder(fails: Fails, folder: Path) -> None:
    message = fails(*generate(folder / "config.json"))
    assert "expected a model folder, found the file" in message


def test_a_repository_offline_says_how_to_go_on(fails: Fails) -> None:
    message = fails(*generate("openbmb/unheard-of"))
    assert message.startswith("openbmb/unheard-of is not kept on this machine")
    assert "HF_HUB_OFFLINE" in message


def test_the_default_model_offline_names_the_demo(fails: Fails) -> None:
    assert "--model demo" in fails("generate", "--prompt", "Hi")
    assert "--model demo" in fails("chat")


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


def test_rm_of_what_is_not_here_says_so(fails: Fails) -> None:
    assert "nothing to delete" in fails("rm", "minicpm-2b-dpo", "--yes")


# Options


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--max-tokens", "0", "max_tokens must be 1 or more, got 0"),
        ("--max-tokens", "-1", "max_tokens must be 1 or more, got -1"),
        ("--temp", "-1", "temperature must be between 0 and 100, got -1"),
        ("--temp", "nan", "temperature must be between 0 and 100, got nan"),
        ("--top-p", "0", "top_p must be above 0 and at most 1, got 0"),
        ("--top-p", "2", "top_p must be above 0 and at most 1, got 2"),
        ("--top-k", "-1", "top_k must be 0 or more, got -1"),
        ("--min-p", "2", "min_p must be between 0 and 1, got 2"),
        ("--repetition-penalty", "0", "repetition_penalty must be above 0"),
        ("--seed", "-1", "seed must be between 0"),
        ("--dtype", "int8", "dtype must be one of float32"),
        ("--device", "tpu", "device must be one of gpu, cpu, got 'tpu'"),
    ],
)
def test_an_option_out_of_range_is_named(
    fails: Fails, folder: Path, option: str, value: str, words: str
) -> None:
    assert words in fails(*generate(folder), option, value)


def test_chat_refuses_a_reply_of_no_tokens(fails: Fails, folder: Path) -> None:
    assert "max-tokens must be 1 or more" in fails(
        "chat", "--model", str(folder), "--max-tokens", "0"
    )


@pytest.mark.parametrize("arguments", [["--prompt", ""], ["--prompt", " \n"], ["--prompt", "-"]])
def test_an_empty_prompt_is_refused(fails: Fails, folder: Path, arguments: list[str]) -> None:
    assert "the prompt is empty" in fails("generate", "--model", str(folder), *arguments)


def test_an_empty_raw_prompt_is_refused_where_no_bos_leads(fails: Fails, folder: Path) -> None:
    message = fails("generate", "--model", str(folder), "--prompt", "", "--raw")
    assert "the prompt is empty" in message


def test_a_prompt_beyond_the_context_gives_both_numbers(fails: Fails, folder: Path) -> None:
    change_config(folder, max_position_embeddings=16)
    message = fails("generate", "--model", str(folder), "--raw", "--prompt", "x" * 40)
    assert "the prompt has 40 tokens" in message
    assert "16" in message


def test_a_prompt_that_just_fills_the_context_is_refused(fails: Fails, folder: Path) -> None:
    change_config(folder, max_position_embeddings=16)
    assert "context" in fails("generate", "--model", str(folder), "--raw", "--prompt", "x" * 16)


def test_chat_in_a_pipe_ends_at_a_turn_that_does_not_fit(fails: Fails, folder: Path) -> None:
    change_config(folder, max_position_embeddings=32)
    message = fails("chat", "--model", str(folder), stdin="x" * 40 + "\n")
    assert "tokens and the context is 32" in message


# config.json and the tokenizer


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "a model folder needs a config.json"),
        ("{", "not valid JSON"),
        ("[]", "expected an object"),
        ("\ufeff", "not valid JSON"),
        ("[" * 100_000, "config.json"),
    ],
)
def test_a_config_that_is_no_json_object(
    fails: Fails, folder: Path, text: str | None, words: str
) -> None:
    path = folder / "config.json"
    path.unlink() if text is None else path.write_text(text, encoding="utf-8")
    message = fails(*generate(folder))
    assert words in message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": "128"}, "hidden_size"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"num_hidden_layers": 3.5}, "num_hidden_layers"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"num_key_value_heads": 0}, "num_key_value_heads must be above 0"),
        ({"num_attention_heads": 5}, "hidden_size (128) must be a multiple"),
        ({"num_key_value_heads": 3}, "must be a multiple of num_key_value_heads (3)"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "'yarn'"),
        ({"rope_scaling": {"type": ["linear"]}}, "rope_scaling"),
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ({"architectures": None, "model_type": "bert"}, "'bert'"),
        ({"hidden_act": "gelu"}, "'gelu'"),
        ({"vocab_size": -1}, "vocab_size"),
        ({"vocab_size": None}, "vocab_size is missing"),
        ({"quantization": {"bits": 7, "group_size": 64}}, "7 bits"),
        ({"hidden_size": 1 << 62}, "hidden_size"),
        ({"eos_token_id": "two"}, "eos_token_id"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_config_that_asks_for_the_impossible(
    fails: Fails, folder: Path, changes: dict[str, Any], words: str
) -> None:
    change_config(folder, **changes)
    assert words in fails(*generate(folder))


def test_a_missing_tokenizer_is_named(fails: Fails, folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    assert "must hold tokenizer.json or tokenizer.model" in fails(*generate(folder))


def test_a_broken_tokenizer_is_named(fails: Fails, folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    assert "tokenizer.json is not a tokenizer" in fails(*generate(folder))


def test_a_tokenizer_of_a_larger_model_is_named(fails: Fails, folder: Path) -> None:
    write_tokenizer(folder, size=600)
    message = fails(*generate(folder))
    assert "the tokenizer has 600 tokens and the model 512" in message


# Weights


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_safetensors(path: Path, header: dict[str, Any], data: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def header_beyond_the_file(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(struct.pack("<Q", len(data) * 2) + data[8:])


def header_of_exabytes(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 2**63) + path.read_bytes()[8:])


def overlapping(path: Path) -> None:
    header, data = header_of(path)
    first, second = [name for name in header if name != "__metadata__"][:2]
    begin, end = header[first]["data_offsets"]
    size = header[second]["data_offsets"][1] - header[second]["data_offsets"][0]
    header[second]["data_offsets"] = [begin + (end - begin) // 2, begin + (end - begin) // 2 + size]
    write_safetensors(path, header, data)


def beyond_the_end(path: Path) -> None:
    header, data = header_of(path)
    last = max((n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"])
    header[last]["data_offsets"][1] += 1 << 30
    write_safetensors(path, header, data)


@pytest.mark.parametrize(
    "damage",
    [truncated, empty, header_beyond_the_file, header_of_exabytes, overlapping, beyond_the_end],
)
def test_a_damaged_safetensors_file_is_refused(
    fails: Fails, folder: Path, damage: Callable[[Path], None]
) -> None:
    path = folder / "model.safetensors"
    damage(path)
    message = fails(*generate(folder))
    assert f"{path}: expected a sound safetensors file" in message
    assert "download it again" in message


def resave(folder: Path, change: Callable[[dict[str, mx.array]], object]) -> None:
    path = folder / "model.safetensors"
    arrays = dict(mx.load(str(path)))
    mx.eval(arrays)
    change(arrays)
    path.unlink()
    mx.save_safetensors(str(path), arrays)


NORM, Q = "model.norm.weight", "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda a: a.update({Q: a[Q].astype(mx.int32)}), f"{Q} is int32; expected a float type"),
        (lambda a: a.update({Q: a[Q][:-1]}), f"{Q} has shape (127, 128)"),
        (lambda a: a.pop(NORM), f"{NORM} is missing"),
        (lambda a: a.update(surprise=mx.ones(3)), "surprise is not part of this architecture"),
        (lambda a: a.update({Q.replace("weight", "scales"): a[Q]}), "no `quantization`"),
    ],
    ids=["dtype", "shape", "missing", "surplus", "scales"],
)
def test_weights_that_do_not_fit_the_config_are_named(
    fails: Fails, folder: Path, change: Callable[[dict[str, mx.array]], object], words: str
) -> None:
    resave(folder, change)
    assert words in fails(*generate(folder))


def test_weights_of_nan_are_an_error_and_no_text(fails: Fails, folder: Path) -> None:
    resave(folder, lambda a: a.update({NORM: a[NORM] * float("nan")}))
    for more in ([], ["--json"], ["--temp", "1"]):
        assert "the model produced NaN" in fails(*generate(folder, *more))


def test_no_weights_at_all_says_what_is_expected(fails: Fails, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "no weights; expected model.safetensors" in fails(*generate(folder))


def test_an_index_that_names_a_missing_shard(fails: Fails, folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {NORM: "model-00001-of-00002.safetensors"}}))
    assert "model-00001-of-00002.safetensors: missing" in fails(*generate(folder))


@pytest.fixture
def bin_folder(folder: Path) -> Path:
    (folder / "model.safetensors").unlink()
    for name in ("config.json", "pytorch_model.bin"):
        shutil.copyfile(GOLDEN / "minicpm_2b_like_bin" / name, folder / name)
    return folder


@pytest.mark.parametrize("left", [0, 10, 1000, -1000])
def test_a_truncated_bin_is_refused(fails: Fails, bin_folder: Path, left: int) -> None:
    path = bin_folder / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:left])
    assert f"{path}: expected a file of torch.save" in fails(*generate(bin_folder))


class Hostile:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("zipped", [True, False])
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
