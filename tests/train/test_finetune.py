"""A whole run from Python: what it leaves in its folder, also where the disk is full."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import minicpm_mlx as mm
from minicpm_mlx.convert.export_adapter import export_adapter
from minicpm_mlx.convert.merge_adapter import fuse_adapter
from minicpm_mlx.errors import StorageError
from minicpm_mlx.model_cards import Card
from minicpm_mlx.train import finetune as runs
from minicpm_mlx.train import lora
from minicpm_mlx.train.data.dataset import Data, load_data
from minicpm_mlx.train.lora import LoRAConfig
from minicpm_mlx.train.optimizer import Schedule
from minicpm_mlx.train.planning import TrainingPlan
from minicpm_mlx.train.tracking.events import Event, Validated
from minicpm_mlx.weights.adapters import read_adapter
from minicpm_mlx.weights.checkpoint import read_checkpoint
from minicpm_mlx.weights.gguf.header import read_header
from support.data import GOLDEN
from support.tiny_model import write_model

PLAN = TrainingPlan(
    steps=4, batch_size=2, schedule=Schedule(peak=0.01), evaluate_every=2, save_every=2, seed=1
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("tiny") / "model")


def base(model: Path) -> mm.LM:
    """To be trained once: adapters stay on it."""
    return mm.load(model, fuse=False, dtype="float32")


@pytest.fixture(scope="module")
def data(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Data:
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    rows = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}."} for n in range(20)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return load_data(path, mm.load_tokenizer(model))


def fill_the_disk(patch: pytest.MonkeyPatch, before: int) -> None:
    """Have room for so many adapters, and for a part of the next; checkpoints always find some."""
    save: Callable[..., None] = mx.save_safetensors
    written: list[str] = []

    def full(path: str, *rest: object) -> None:
        if path.endswith("adapters.safetensors"):
            written.append(path)
        if len(written) <= before:
            save(path, *rest)
            return
        Path(path).write_bytes(bytes(100))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    patch.setattr(runs.mx, "save_safetensors", full)


@pytest.mark.parametrize("before", [0, 1])
def test_a_disk_that_is_full_when_the_adapter_is_kept_loses_nothing(
    before: int, model: Path, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part, whole = tmp_path / "part", tmp_path / "whole"
    fill_the_disk(monkeypatch, before)
    plan = replace(PLAN, save_every=1)
    with pytest.raises(StorageError) as caught:
        runs.finetune(base(model), data, part, plan=plan)
    assert str(caught.value) == (
        f"{part}: cannot be written (No space left on device); free some space, or give another "
        "folder (--adapter-path)"
    )
    monkeypatch.undo()
    assert not list(part.glob("part-*"))
    assert bool(before) == (part / "adapters.safetensors").exists()
    if before:
        mm.load(model).use_adapter(part)
    assert runs.finetune(base(model), data, part, plan=plan, resume=True).complete
    assert runs.finetune(base(model), data, whole, plan=plan).complete
    adapters = [(folder / "adapters.safetensors").read_bytes() for folder in (part, whole)]
    assert adapters[0] == adapters[1]


def test_full_training_of_weights_with_an_unusual_name_keeps_a_model(
    model: Path, data: Data, tmp_path: Path
) -> None:
    source = write_model(tmp_path / "source")
    (source / "model.safetensors").unlink()
    torch = GOLDEN / "minicpm_2b_like_bin" / "pytorch_model.bin"
    (source / "odd.bin").write_bytes(torch.read_bytes())
    card = Card(name="odd", repo="someone/odd", file="odd.bin")
    weights = mm.load_model(source, "float32", weights=card.file)
    lm = replace(base(model), model=weights, card=card, folder=source)
    result = runs.finetune(
        lm, data, tmp_path / "out", plan=replace(PLAN, steps=2), method=LoRAConfig(kind="full")
    )
    assert result.folder == tmp_path / "out" / "model"
    assert read_checkpoint(result.folder).tensors
    ids = mx.array([[1, 50, 60, 70]])
    kept = mm.load_model(result.folder, "float32")
    assert mx.abs(kept(ids) - lm.model(ids)).max().item() < 1e-4


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_an_adapter_of_latent_attention_is_trained_merged_and_exported_alike(
    kind: str, data: Data, tmp_path: Path
) -> None:
    model = write_model(tmp_path / "model", case="minicpm3_like")
    made = tmp_path / "adapter"
    ids = mx.array([[1, 50, 60, 70, 80, 90]])
    runs.finetune(base(model), data, made, plan=PLAN, method=LoRAConfig(kind=kind))
    trained = {name.split(".")[4] for name in read_adapter(made).deltas if "attn" in name}
    assert trained == {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}

    def logits(folder: Path, adapter: Path | None = None, *, fuse: bool = False) -> mx.array:
        lm = mm.load(folder, fuse=fuse, dtype="float32", adapter=adapter)
        return lm.model(ids)

    expected = logits(model, made)
    assert mx.abs(expected - logits(model)).max().item() > 0.01
    merged = tmp_path / "merged"
    fuse_adapter(model, merged, made, force=True)
    found = [logits(merged), logits(merged, fuse=True), logits(model, made, fuse=True)]
    for layout in ("mlx", "peft"):
        export_adapter(made, tmp_path / layout, layout, model=model)
        found.append(logits(model, tmp_path / layout))
    for one in found:
        assert mx.abs(one - expected).max().item() < 1e-3
    if kind == "lora":
        export_adapter(made, tmp_path / "lora.gguf", "gguf", model=model)
        names = {
            n.split(".")[2] for n in read_header(tmp_path / "lora.gguf").tensors if ".attn" in n
        }
        assert names == {"attn_q_a", "attn_q_b", "attn_kv_a_mqa", "attn_kv_b", "attn_output"}


def test_a_result_says_what_was_kept(model: Path, data: Data, tmp_path: Path) -> None:
    for rate, better in ((0.01, True), (1e-20, False)):
        told: list[Event] = []
        plan = replace(PLAN, schedule=Schedule(peak=rate))
        folder = tmp_path / f"{rate}"
        result = runs.finetune(base(model), data, folder, plan=plan, listener=told.append)
        losses = {event.step: event.loss for event in told if isinstance(event, Validated)}
        assert result.best == min(losses.values()) == losses[result.best_step]
        assert bool(result.best_step) is better


def test_a_mistake_is_named_before_the_model_is_changed(
    model: Path, data: Data, tmp_path: Path
) -> None:
    lm, out = base(model), tmp_path / "out"
    (tmp_path / "file").write_text("x")
    runs.finetune(base(model), data, out, plan=PLAN)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"data": "train.jsonl"}, "data must be what load_data returns, got 'train.jsonl'"),
        ({"folder": tmp_path / "file"}, "is a file; give a folder"),
        ({"folder": tmp_path / "file" / "new"}, "cannot be written"),
        ({"method": LoRAConfig(layers=9)}, "layers must be at most 3"),
        ({"replies": -1}, "replies must be 0 or more"),
        ({"test": True}, "test needs a test set"),
        ({"folder": out, "resume": True, "plan": replace(PLAN, seed=9)}, "another --seed"),
        ({"folder": out, "resume": True, "method": LoRAConfig(rank=2)}, "another --rank"),
    ]
    for change, message in wrong:
        arguments = {"data": data, "folder": tmp_path / "new", "plan": PLAN} | change
        with pytest.raises(mm.MiniCPMError, match=message):
            runs.finetune(lm, **arguments)
        assert not list(lora.adapters(lm.model))  # type: ignore[arg-type]
        assert not (tmp_path / "new").exists()
