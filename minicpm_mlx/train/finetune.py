"""A whole run: a model and data to a folder with an adapter, or with a model."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..arguments import whole
from ..distributed import collectives
from ..errors import InvalidArgumentError
from ..files.atomic import alone, make_whole, named_errors, write_whole
from ..lm.fingerprint import identity
from ..lm.lm import LM, Message
from ..model.transformer import Model
from ..weights import safetensors
from ..weights.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from ..weights.companion_files import copy_companions
from ..weights.lazy_tensor import LazyTensor
from ..weights.load import parameters
from . import checkpoint, lora
from .cpu_kernels import use_fast_kernels
from .data.batches import digest
from .data.dataset import Data
from .gradients import set_parameters
from .lora import LoRAConfig
from .objectives import Objective, PreferenceLoss
from .planning import TrainingPlan, objective_for
from .tracking.events import Listener, Sampled
from .trainer import Trainer, evaluate

CHECKPOINTS = "checkpoints"
"""Inside the run's folder."""

MODEL = "model"
"""Likewise, where all of the model was trained."""

REPLY = 64
"""Tokens of the replies before and after."""


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """How a run ended."""

    complete: bool
    """Not interrupted."""
    steps: int
    best: float | None
    """Lowest validation loss; None: there was no validation."""
    best_step: int
    """After which it was, and what was kept; 0: no step lowered it, and the last one was kept."""
    test: dict[str, float] | None
    """Loss on the test set of what was kept, and what else is told of it, if that was asked for."""
    whole: bool
    """Whether it is a model, not an adapter."""
    folder: Path
    """Of the adapter, or of the model."""


def finetune(
    lm: LM,
    data: Data,
    folder: str | Path,
    *,
    plan: TrainingPlan,
    method: LoRAConfig | None = None,
    objective: Objective | None = None,
    resume: bool = False,
    replies: int = 0,
    test: bool = False,
    listener: Listener = lambda _: None,
) -> TrainingResult:
    """Train `lm`, loaded with `fuse=False`, on `data`; what is best on the validation set is kept.

    `folder` gets an adapter in mlx-lm's layout, or with the method `full` a model; a README, a card
    of what it was made of, and checkpoints, from which `resume` goes on. The objective follows from
    the kind of data. `replies` validation prompts are answered before and after; with `test` what
    was kept is measured on the test set.

    InvalidArgumentError: the folder has a run already, or none to resume, or the data are of
    another kind than the objective. NumericsError, StorageError: see `Trainer.run`.

        lm = mm.load("demo", fuse=False)
        data = mm.load_data("train.jsonl", lm.tokenizer)
        mm.finetune(lm, data, "adapters", plan=Plan(steps=100))  # of minicpm_mlx.train.trainer
    """
    folder, method = Path(folder).expanduser(), method or LoRAConfig()
    objective = objective or objective_for(data.kind)
    check(data, objective, method, plan, test=test)
    if whole("replies", replies) < 0:
        raise InvalidArgumentError(f"replies must be 0 or more, got {replies}")
    claim(folder, resume)
    model = lm.model
    if not isinstance(model, Model):
        raise InvalidArgumentError("expected a model loaded with fuse=False, got the fused form")
    card = _card(lm, data, method, plan, objective)
    mx.random.seed(plan.seed)  # of the adapters' first values
    lora.prepare_model(model, method)
    if plan.checkpointing:
        use_fast_kernels(model)
    trainer = Trainer(
        model,
        objective,
        plan,
        data.train,
        data.valid,
        folder / CHECKPOINTS,
        identity={
            "base": card["base"]["identity"],
            "data": digest([*data.train, *data.valid]),
            "loss": card["loss"],
            "method": card["method"],
        },
        keep=lambda: _keep(lm, method, folder, card),
        listener=listener,
    )
    collectives.same_everywhere(json.dumps(trainer.fingerprint, sort_keys=True), "run")
    with ExitStack() as stack:
        if collectives.rank() == 0:
            with named_errors(folder, checkpoint.ADVICE):
                folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(alone(folder, folder))
            checkpoint.delete_partial(folder / CHECKPOINTS)
        if resume:
            trainer.resume()
        prompts = data.prompts[:replies]
        if not resume:
            _answer(lm, prompts, 0, listener)
        complete = trainer.run()
        tested = None
        if complete:
            _take_kept(trainer, method, folder)
            _answer(lm, prompts, trainer.progress.step, listener)
            tested = _tested(model, objective, data, plan) if test else None
    return TrainingResult(
        complete=complete,
        steps=trainer.progress.step,
        best=trainer.progress.best,
        best_step=trainer.progress.best_step,
        test=tested,
        whole=method.kind == "full",
        folder=folder / MODEL if method.kind == "full" else folder,
    )


def check(
    data: Data, objective: Objective, method: LoRAConfig, plan: TrainingPlan, *, test: bool = False
) -> None:
    """InvalidArgumentError unless these go together."""
    wanted = "sft"
    if isinstance(objective, PreferenceLoss):
        wanted = "kto" if objective.loss == "kto" else "preference"
        if method.kind == "full" and objective.loss != "orpo":
            raise InvalidArgumentError(
                f"{objective.loss} compares with the model as it was, which full training leaves "
                "nowhere; train an adapter (lora or dora), or take orpo"
            )
        if wanted == "kto" and plan.batch_size < 2:
            raise InvalidArgumentError("kto compares with other replies: batch-size 2 or more")
    if data.kind != wanted:
        kinds = {"sft": "texts or conversations", "preference": "preference pairs"}
        raise InvalidArgumentError(
            f"expected {kinds.get(wanted, 'labelled replies')}, got {data.format}"
        )
    if test and not data.test:
        raise InvalidArgumentError("--test: expected a test set, such as test.jsonl in a folder")


WRITTEN = ("adapters.safetensors", "adapter_config.json", "README.md", "training.json", MODEL)
"""In the run's folder."""

OTHERS = ("adapter_model.safetensors", "adapter_model.bin", "config.json")
"""What makes a folder another's."""


def claim(folder: Path, resume: bool) -> None:
    """InvalidArgumentError where `folder` holds another run, or anything that would be lost."""
    if folder.exists() and not folder.is_dir():
        raise InvalidArgumentError(f"--adapter-path: {folder} is a file; give a folder")
    begun = checkpoint.checkpoints(folder / CHECKPOINTS)
    if resume and not begun:
        raise InvalidArgumentError(f"--resume: {folder} has no checkpoint to go on from")
    if begun and not resume:
        raise InvalidArgumentError(
            f"{folder} has a run already, up to {begun[-1].name}; --resume goes on with it, "
            "another --adapter-path begins a new one"
        )
    there = [name for name in (*WRITTEN, *OTHERS) if (folder / name).exists()]
    if there and not begun:
        raise InvalidArgumentError(
            f"{folder} holds {there[0]} already; give another --adapter-path"
        )


def _take_kept(trainer: Trainer, method: LoRAConfig, folder: Path) -> None:
    """Put what was kept on the model in the place of what it ended with, for all processes: only
    the first need have the folder."""
    kept = {name: mx.zeros_like(array) for name, array in trainer.parameters.items()}
    if collectives.rank() == 0:
        full = method.kind == "full"
        tensors = (
            read_checkpoint(folder / MODEL).tensors
            if full
            else safetensors.read(folder / "adapters.safetensors")
        )
        kept = {name: tensors[name].load() for name in kept}
    set_parameters(trainer.model, collectives.sum_of(kept))
    mx.eval(trainer.model.parameters())


def _tested(model: Model, objective: Objective, data: Data, plan: TrainingPlan) -> dict[str, float]:
    found = evaluate(model, objective, data.test, plan.batch_size)
    return found | ({"perplexity": math.exp(found["loss"])} if data.kind == "sft" else {})


def _answer(lm: LM, prompts: Sequence[Any], step: int, listener: Listener) -> None:
    if collectives.rank() != 0:
        return
    lm.model.eval()
    for prompt in prompts:
        reply = lm.generate(prompt, max_tokens=REPLY, speculate=False).text
        listener(Sampled(step=step, prompt=_shown(prompt), reply=reply.strip()))
    lm.model.train()


def _shown(prompt: str | Sequence[Message]) -> str:
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


# What is written


def _keep(lm: LM, method: LoRAConfig, folder: Path, card: dict[str, Any]) -> None:
    with named_errors(folder, checkpoint.ADVICE):
        _write(lm, method, folder, card)


def _write(lm: LM, method: LoRAConfig, folder: Path, card: dict[str, Any]) -> None:
    model = lm.model
    assert isinstance(model, Model)
    folder.mkdir(parents=True, exist_ok=True)
    if method.kind == "full":
        _write_model(lm, folder / MODEL)
    else:
        tensors, config = lora.adapter_weights(model, method)
        _write_text(folder / "adapter_config.json", json.dumps(config, indent=2))
        write_whole(
            folder / "adapters.safetensors",
            lambda path: mx.save_safetensors(str(path), tensors, {"format": "mlx"}),
        )
    _write_text(folder / "training.json", json.dumps(card, indent=2, ensure_ascii=False))
    _write_text(folder / "README.md", _readme(card, method))


def _write_text(path: Path, text: str) -> None:
    write_whole(path, lambda part: part.write_text(text, encoding="utf-8"))


def _write_model(lm: LM, folder: Path) -> None:
    source = lm.folder
    assert source is not None
    raw = dict(read_checkpoint(source, lm.card.file if lm.card.repo else None).raw)
    tensors = {name: LazyTensor.of(array) for name, array in parameters(lm.model).items()}
    for key in ("quantization", "quantization_config"):
        raw.pop(key, None)  # a CPU unpacks what it loads
    raw["torch_dtype"] = str(next(iter(tensors.values())).dtype).rpartition(".")[2]

    def make(partial: Path) -> None:
        write_checkpoint(Checkpoint(raw=raw, tensors=tensors), partial)
        copy_companions(source, partial, lm.card)

    new, old = (folder.with_name(f"{folder.name}-{age}") for age in ("new", "old"))
    for left in (new, old):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    make_whole(new, make, checkpoint.ADVICE)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _card(
    lm: LM, data: Data, method: LoRAConfig, plan: TrainingPlan, objective: Objective
) -> dict[str, Any]:
    """What a run is made of."""
    template = lm.tokenizer.template
    source = "" if template is None else template.source
    loss: dict[str, Any] = {"name": "cross-entropy"}
    if isinstance(objective, PreferenceLoss):
        loss = _plain(objective)
    return {
        "version": version("minicpm-mlx"),
        "base": {"name": lm.card.name, "repo": lm.card.repo, "identity": identity(lm)},
        "template_sha256": hashlib.sha256(source.encode()).hexdigest(),
        "data": {"format": data.format, "files": data.sha256, "samples": len(data.train)},
        "method": _plain(method),
        "loss": loss,
        "plan": plan.fingerprint,
    }


def _plain(value: Any) -> dict[str, Any]:
    """A dataclass as JSON gives it back."""
    found: dict[str, Any] = json.loads(json.dumps(asdict(value)))
    return found


def _readme(card: dict[str, Any], method: LoRAConfig) -> str:
    base = card["base"]["name"]
    kind = "model" if method.kind == "full" else f"{method.kind} adapter of rank {method.rank}"
    how = f"--model {MODEL}" if method.kind == "full" else f"--model {base} --adapter ."
    repo = card["base"]["repo"]
    front = f"base_model: {repo}\n" if repo else ""
    return f"""---
library_name: mlx
pipeline_tag: text-generation
{front}tags:
- mlx
- minicpm-mlx
---

# A {kind} for {base}

Trained by minicpm-mlx {card["version"]} on {card["data"]["samples"]} samples
({card["data"]["format"]}). `training.json` has the rest: settings, hashes, versions.

```sh
minicpm-mlx chat {how}
```
"""
