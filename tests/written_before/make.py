"""Writes what lies beside it; only for the version that README.md names, whose insides it uses.

python tests/written_before/make.py
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
os.chdir(HERE)  # all paths are relative, so that none of this machine's is written
sys.path.insert(0, str(HERE.parent))

import pytest  # noqa: E402
from conftest import write_tokenizer  # noqa: E402
from eval_data import arc, write  # noqa: E402
from little_bench import local_judge, write_bench  # noqa: E402
from test_written_before import (  # noqa: E402
    BENCH,
    CPU,
    EVAL,
    KEPT_CARD,
    LORA,
    QUANTIZE,
    SESSIONS,
    greedy_ids,
    old_chat,
    stamp,
    write_model,
)

import minicpm_mlx as mm  # noqa: E402
from minicpm_mlx import demo, sessions  # noqa: E402
from minicpm_mlx.cli.main import main  # noqa: E402
from minicpm_mlx.evals import run as evals  # noqa: E402
from minicpm_mlx.quantization import job  # noqa: E402
from minicpm_mlx.registry import resolve  # noqa: E402
from minicpm_mlx.template import CHATML  # noqa: E402
from minicpm_mlx.train import loop  # noqa: E402

MODEL = Path("tmp/tiny")
TEXT = "The quick brown fox jumps over the lazy dog. 敏捷的棕色狐狸跳过了懒狗。 x = [1, 2, 3]\n"


def program(*words: str, status: int = 0) -> None:
    sys.argv = ["minicpm-mlx", *map(str, words)]
    with pytest.raises(SystemExit) as left:
        main()
    assert int(left.value.code or 0) == status


def interrupted(module: Any, name: str, at: int, run: Callable[[], None]) -> None:
    """Ctrl-C comes before the call number `at` of a function."""
    function, calls = getattr(module, name), [0]

    def failing(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == at:
            signal.raise_signal(signal.SIGINT)
        return function(*arguments, **options)

    setattr(module, name, failing)
    run()
    setattr(module, name, function)


def inputs() -> None:
    Path("model").mkdir()
    write_tokenizer(Path("model"))
    found = json.loads((path := Path("model/tokenizer.json")).read_text("utf-8"))
    found["pre_tokenizer"]["use_regex"] = True  # as gpt-2's, and with a merge: GGUF wants both
    found["model"]["vocab"] = {
        "th" if k == "¤0" else k: v for k, v in found["model"]["vocab"].items()
    }
    found["model"]["merges"] = [["t", "h"]]
    path.write_text(json.dumps(found, ensure_ascii=False), "utf-8")
    Path("model/tokenizer_config.json").write_text(json.dumps({"chat_template": CHATML}))
    write(Path("data/arc_easy.jsonl"), [arc(n) for n in range(6)])
    rows = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}."} for n in range(12)]
    write(Path("data/train.jsonl"), rows)
    Path("data/calibration.txt").write_text(TEXT * 8, encoding="utf-8")
    write_bench(Path("data"))
    write_model(MODEL)


def conversations() -> None:
    for name, bits, adapter in SESSIONS:
        chat = old_chat(mm.load(MODEL, adapter=adapter, **CPU), kv_bits=bits)
        list(chat.reply("Hello"))
        path = sessions.save(chat, name)
        sessions.save_cache(chat, name)
        chat = sessions.restore(sessions.load(name), chat.lm)
        assert sessions.restore_cache(chat, name) is None
        list(chat.reply("And now?"))
        EXPECTED[name] = chat.messages[-1]["content"]
        text = path.read_text("utf-8").replace(str(MODEL.resolve()), "MODEL")
        path.write_text(text.replace(str(Path("lora").resolve()), "ADAPTER"), "utf-8")


def kept_models() -> None:
    hub = Path("tmp/hub/models--" + str(resolve(KEPT_CARD).repo).replace("/", "--"))
    (hub / "refs").mkdir(parents=True)
    (hub / "refs/main").write_text("abc")
    shutil.copytree(MODEL, hub / "snapshots/abc")
    program("pull", KEPT_CARD)
    EXPECTED["kept"] = greedy_ids(mm.load(KEPT_CARD, **CPU))
    program("convert", str(MODEL), "tmp/tiny.gguf", "--type", "Q4_0")
    stamp(file := Path("tmp/tiny.gguf"))
    lm = mm.load(file, **CPU)
    EXPECTED["gguf"] = greedy_ids(lm)
    EXPECTED["gguf_size"] = file.stat().st_size
    assert lm.folder
    lm.folder.rename(lm.folder.with_name("tiny-gguf-PATH-" + lm.folder.name[-8:]))
    EXPECTED["demo"] = demo.stamp(resolve("demo"))


def adapters() -> None:
    lora = ["lora", "--data", "data/train.jsonl", "--model", str(MODEL), *LORA]
    program(*lora, "--adapter-path", "tmp/whole")
    lines = Path("tmp/whole/log.jsonl").read_text("utf-8").splitlines()
    EXPECTED["losses"] = [row["loss"] for line in lines if "loss" in (row := json.loads(line))]
    interrupted(
        loop.checkpoint, "save", 1, lambda: program(*lora, "--adapter-path", "lora", status=130)
    )
    program(*lora, "--adapter-path", "dora", "--fine-tune-type", "dora")
    for kind in ("lora", "dora"):
        EXPECTED[kind] = greedy_ids(mm.load(MODEL, adapter=kind, **CPU))


def quantized() -> None:
    program("quantize", str(MODEL), "quantized", *QUANTIZE)
    EXPECTED["quantized"] = greedy_ids(mm.load("quantized", **CPU))
    interrupted(
        job,
        "write_whole",
        8,
        lambda: program("quantize", str(MODEL), "half", *QUANTIZE, status=130),
    )


def evaluation() -> None:
    words = [*EVAL, "--data", "data", "--model", str(MODEL), "--output"]
    program(*words, "tmp/eval")
    report = json.loads(Path("tmp/eval/report.json").read_text("utf-8"))
    EXPECTED["report"] = report
    interrupted(evals._Told, "add", 7, lambda: program(*words, "eval", status=130))
    with local_judge() as judge:
        words = [*BENCH, "--model", str(MODEL), "--output", "bench", "--judge-url", judge.url]
        program(*words)


EXPECTED: dict[str, Any] = {}
for old in HERE.iterdir():
    if old.is_dir():
        shutil.rmtree(old)
os.environ |= {"MINICPM_MLX_HOME": "home", "HF_HUB_CACHE": "tmp/hub", "HF_HUB_OFFLINE": "1"}
sys.modules["matplotlib"] = None  # type: ignore[assignment]
for step in (inputs, adapters, conversations, kept_models, quantized, evaluation):
    step()
shutil.rmtree("tmp")
lines = (f" {json.dumps(key)}: {json.dumps(EXPECTED[key])}" for key in EXPECTED)
Path("expected.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", "utf-8")
