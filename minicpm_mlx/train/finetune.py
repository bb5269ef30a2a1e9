"""Fine-tunes a model on data, and writes an adapter or a model to a folder."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..arguments import Limit, expect
from ..distributed import collectives
from ..errors import InvalidArgumentError
from ..files.atomic import alone, check_writable, make_whole, named_errors, write_whole
from ..lm.fingerprint import fingerprint
from ..lm.lm import LM
from ..model.base_form import BaseForm
from ..model.transformer import Model
from ..weights import safetensors
from ..weights.adapters import recorded_base
from ..weights.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from ..weights.companion_files import copy_companion_files
from ..weights.lazy_tensor import LazyTensor
from ..weights.load import parameters
from . import checkpoint, lora
from .cpu_kernels import use_fast_kernels
from .data.batches import digest
from .data.counts import note_context
from .data.dataset import Data, DataOutline
from .gradients import set_parameters
from .lora import LoRAConfig
from .objectives import Objective, PreferenceLoss
from .planning import TrainingPlan, objective_for
from .sample_replies import sample_replies
from .tracking.events import Listener, Noted
from .trainer import Trainer, evaluate

CHECKPOINTS = "checkpoints"
"""Folder of checkpoints, inside the run's folder."""

MODEL = "model"
"""Folder of the model after full training, inside the run's folder."""


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """The outcome of a run."""

    complete: bool
    """False if it was interrupted."""
    steps: int
    best: float | None
    """Lowest validation loss; None without validation."""
    best_step: int
    """The step of the lowest loss, which was kept; 0: no step lowered it, the last was kept."""
    validated: bool
    """Whether the validation loss was measured after a step."""
    test: dict[str, float] | None
    """Loss and other metrics on the test set, if requested."""
    whole: bool
    """Whether the result is a model instead of an adapter."""
    folder: Path
    """The folder of the adapter or the model."""


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
    """Trains `lm`, loaded with `fuse=False`, on `data`, and keeps the best step by validation loss.

    `folder` receives an adapter in mlx-lm's layout, or a model if the method is `full`; a README; a
    record of all settings; and checkpoints that `resume` continues from. The objective defaults to
    that of the kind of data. `replies` validation prompts are answered before and after; `test`
    evaluates the kept step on the test set.

    InvalidArgumentError: the folder already holds a run, or none to resume, or the objective does
    not match the data. NumericsError, StorageError: see `Trainer.run`.

        lm = mm.load("demo", fuse=False)
        data = mm.load_data("train.jsonl", lm.tokenizer)
        plan = TrainingPlan(steps=100)  # of minicpm_mlx.train.planning
        mm.finetune(lm, data, "adapters", plan=plan)
    """
    expect("data", data, Data, "what load_data returns")
    folder, method = Path(folder).expanduser(), method or LoRAConfig()
    objective = objective or objective_for(data.kind)
    check(data, objective, method, plan, test=test)
    Limit(least=0, whole=True).check("replies", replies)
    lora.check(method, lm.config)
    claim(folder, resume)
    if resume:
        plan = resumed_plan(folder, plan)
        check_resumed(folder, data, objective, method, plan)
    items = [*data.train, *data.valid, *data.test]
    for note in note_context(items, lm.config.context_length, lm.card.context):
        if note not in data.notes:
            listener(Noted(step=0, text=note))
    trainer = _trainer(lm, data, folder, plan, method, objective, listener)
    prompts = data.prompts[:replies]
    is_full, test_metrics = method.kind == "full", None
    with ExitStack() as stack:
        if collectives.rank() == 0:
            with named_errors(folder, checkpoint.ADVICE):
                folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(alone(folder, folder))
            checkpoint.delete_partial(folder / CHECKPOINTS)
        if resume:
            trainer.resume()
        else:
            sample_replies(lm, prompts, 0, listener)
        complete = trainer.run()
        if complete:
            _load_kept(trainer, method, folder)
            sample_replies(lm, prompts, trainer.progress.step, listener)
            test_metrics = _test(trainer, data) if test else None
    return TrainingResult(
        complete=complete,
        steps=trainer.progress.step,
        best=trainer.progress.best,
        best_step=trainer.progress.best_step,
        validated=trainer.progress.is_validated,
        test=test_metrics,
        whole=is_full,
        folder=folder / MODEL if is_full else folder,
    )


def _trainer(
    lm: LM,
    data: Data,
    folder: Path,
    plan: TrainingPlan,
    method: LoRAConfig,
    objective: Objective,
    listener: Listener,
) -> Trainer:
    """Prepares the model; InvalidArgumentError if processes of the run disagree."""
    model = lm.model
    if not isinstance(model, Model):
        raise InvalidArgumentError("expected a model loaded with fuse=False, got the fused form")
    record = _record(lm, data, method, plan, objective)
    mx.random.seed(plan.seed)  # of the adapters' initial values
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
            "base": record["base"]["identity"],
            **_settings(data, method, objective),
        },
        keep=lambda: _write(lm, method, folder, record),
        listener=listener,
    )
    collectives.same_everywhere(json.dumps(trainer.fingerprint, sort_keys=True), "run")
    return trainer


def check(
    data: Data, objective: Objective, method: LoRAConfig, plan: TrainingPlan, *, test: bool = False
) -> None:
    """Raises InvalidArgumentError if data, objective, method and plan do not match."""
    splits = {name for name in ("train", "valid", "test") if getattr(data, name)}
    outline = DataOutline(data.format, data.kind, frozenset(splits))
    check_outline(outline, objective, method, batch_size=plan.batch_size, test=test)


def check_outline(
    data: DataOutline,
    objective: Objective,
    method: LoRAConfig,
    *,
    batch_size: int | None = None,
    test: bool = False,
) -> None:
    """Raises InvalidArgumentError if data, objective and method do not match."""
    expected = "sft"
    if isinstance(objective, PreferenceLoss):
        expected = "kto" if objective.loss == "kto" else "preference"
        if method.kind == "full" and objective.needs_reference:
            raise InvalidArgumentError(
                f"{objective.loss} compares with the original model, which full training "
                "overwrites; train an adapter (lora or dora), or take orpo"
            )
        if expected == "kto" and batch_size == 1:
            raise InvalidArgumentError(
                "must be 2 or more for kto, which compares with other replies, got 1",
                field="batch_size",
            )
    if data.kind != expected:
        kinds = {"sft": "texts or conversations", "preference": "preference pairs"}
        raise InvalidArgumentError(
            f"expected {kinds.get(expected, 'labelled replies')}, got {data.format}"
        )
    if test and "test" not in data.splits:
        raise InvalidArgumentError("needs a test set, such as test.jsonl in a folder", field="test")


OUTPUTS = ("adapters.safetensors", "adapter_config.json", "README.md", "training.json", MODEL)
"""Files and folders that a run writes."""

FOREIGN = ("adapter_model.safetensors", "adapter_model.bin", "config.json")
"""Files that mark a folder as that of another program."""


def claim(folder: Path, resume: bool) -> None:
    """Raises InvalidArgumentError if `folder` holds another run, or files that would be lost."""
    if folder.exists() and not folder.is_dir():
        raise InvalidArgumentError(f"--adapter-path: {folder} is a file; give a folder")
    saved = checkpoint.checkpoints(folder / CHECKPOINTS)
    if resume and not saved:
        raise InvalidArgumentError(f"--resume: {folder} has no checkpoint to resume from")
    if saved and not resume:
        raise InvalidArgumentError(
            f"{folder} already has a run, up to {saved[-1].name}; --resume continues it, another "
            "--adapter-path starts a new one"
        )
    existing = [name for name in (*OUTPUTS, *FOREIGN) if (folder / name).exists()]
    if existing and not saved:
        raise InvalidArgumentError(
            f"{folder} already holds {existing[0]}; give another --adapter-path"
        )
    check_writable(folder / CHECKPOINTS / "new", checkpoint.ADVICE)


def resumed_plan(folder: Path, plan: TrainingPlan) -> TrainingPlan:
    """The plan with which to resume the run in `folder`: if the validations of `plan` were left to
    the planner, they are those that the run began with."""
    if plan.validation_samples is None:
        return plan
    schedule: dict[str, Any] = checkpoint.recorded_schedule(folder / CHECKPOINTS, plan.steps)
    return replace(plan, **schedule)


def check_resumed(
    folder: Path, data: Data, objective: Objective, method: LoRAConfig, plan: TrainingPlan
) -> None:
    """Raises InvalidArgumentError if the run in `folder` has other settings, before a model is
    loaded."""
    expected = plan.fingerprint | _settings(data, method, objective)
    checkpoint.check(folder / CHECKPOINTS, expected)


def _settings(data: Data, method: LoRAConfig, objective: Objective) -> dict[str, Any]:
    """What decides a run beside its plan and its base."""
    loss: dict[str, Any] = {"name": "cross-entropy"}
    if isinstance(objective, PreferenceLoss):
        loss = _as_json(objective)
    items = [*data.train, *data.valid]
    return {"data": digest(items), "loss": loss, "method": _as_json(method)}


def _load_kept(trainer: Trainer, method: LoRAConfig, folder: Path) -> None:
    """Loads the step that was kept; the first process sends it to those without the folder."""
    kept = {name: mx.zeros_like(array) for name, array in trainer.parameters.items()}
    if collectives.rank() == 0:
        if method.kind == "full":
            tensors = read_checkpoint(folder / MODEL).tensors
        else:
            tensors = safetensors.read(folder / "adapters.safetensors")
        kept = {name: tensors[name].load() for name in kept}
    set_parameters(trainer.model, collectives.sum_of(kept))
    mx.eval(trainer.model.parameters())


def _test(trainer: Trainer, data: Data) -> dict[str, float]:
    metrics = evaluate(trainer.model, trainer.objective, data.test, trainer.plan.batch_size)
    return metrics | ({"perplexity": math.exp(metrics["loss"])} if data.kind == "sft" else {})


# Output files


def _write(lm: LM, method: LoRAConfig, folder: Path, record: dict[str, Any]) -> None:
    model = lm.model
    assert isinstance(model, Model)
    with named_errors(folder, checkpoint.ADVICE):
        folder.mkdir(parents=True, exist_ok=True)
        if method.kind == "full":
            _write_model(lm, folder / MODEL)
        else:
            tensors, config = lora.adapter_weights(model, method)
            config |= recorded_base(lm.card, BaseForm.of(lm.config))
            _write_text(folder / "adapter_config.json", json.dumps(config, indent=2))
            write_whole(
                folder / "adapters.safetensors",
                lambda path: mx.save_safetensors(str(path), tensors, {"format": "mlx"}),
            )
        _write_text(folder / "training.json", json.dumps(record, indent=2, ensure_ascii=False))
        _write_text(folder / "README.md", _readme(record, method))


def _write_text(path: Path, text: str) -> None:
    write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def _write_model(lm: LM, folder: Path) -> None:
    source = lm.folder
    assert source is not None
    raw = dict(read_checkpoint(source, lm.card.file if lm.card.repo else None).raw)
    tensors = {name: LazyTensor.of(array) for name, array in parameters(lm.model).items()}
    for key in ("quantization", "quantization_config"):
        raw.pop(key, None)  # a CPU unpacks the weights it loads
    raw["torch_dtype"] = str(next(iter(tensors.values())).dtype).rpartition(".")[2]

    def write(partial: Path) -> None:
        write_checkpoint(Checkpoint(raw=raw, tensors=tensors), partial)
        copy_companion_files(source, partial, lm.card)

    # The old model is replaced only once the new one is complete.
    new, old = (folder.with_name(f"{folder.name}-{age}") for age in ("new", "old"))
    for leftover in (new, old):  # of a process that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    make_whole(new, write, checkpoint.ADVICE)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _record(
    lm: LM, data: Data, method: LoRAConfig, plan: TrainingPlan, objective: Objective
) -> dict[str, Any]:
    """The contents of training.json."""
    template = lm.tokenizer.template
    source = "" if template is None else template.source
    settings = _settings(data, method, objective)
    return {
        "version": version("minicpm-mlx"),
        "base": {
            "name": lm.card.name,
            "repo": lm.card.repo,
            "form": str(BaseForm.of(lm.config)),
            "identity": fingerprint(lm),
        },
        "template_sha256": hashlib.sha256(source.encode()).hexdigest(),
        "data": {"format": data.format, "files": data.sha256, "samples": len(data.train)},
        "method": settings["method"],
        "loss": settings["loss"],
        "plan": plan.fingerprint,
    }


def _as_json(options: Any) -> dict[str, Any]:
    """A dataclass as it reads back from JSON, for comparison with a saved one."""
    values: dict[str, Any] = json.loads(json.dumps(asdict(options)))
    return values


def _readme(record: dict[str, Any], method: LoRAConfig) -> str:
    base, repo = record["base"]["name"], record["base"]["repo"]
    title, options = f"{method.kind} adapter of rank {method.rank}", f"--model {base} --adapter ."
    if method.kind == "full":
        title, options = "model", f"--model {MODEL}"
    front = f"base_model: {repo}\n" if repo else ""
    form = f"""
The base is in {record["base"]["form"]}. On another form of it (see `minicpm-mlx convert`) other
programs need an export of this adapter: `minicpm-mlx export-adapter . OUT --format peft|mlx|gguf`
with `--base-format` or the `--model` that they run.
"""
    return f"""---
library_name: mlx
pipeline_tag: text-generation
{front}tags:
- mlx
- minicpm-mlx
---

# A {title} for {base}

Trained by minicpm-mlx {record["version"]} on {record["data"]["samples"]} samples
({record["data"]["format"]}). `training.json` has the rest: settings, hashes, versions.

```sh
minicpm-mlx chat {options}
```
{"" if method.kind == "full" else form}"""
