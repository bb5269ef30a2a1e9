"""`minicpm-mlx lora` and `dpo`: fine-tuning on one's own data."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import typer

from .. import options
from . import options as given


def lora(
    context: typer.Context,
    data: given.Data,
    model: options.Model = options.DEFAULT_MODEL,
    adapter_path: given.AdapterPath = Path("adapters"),
    resume: given.Resume = False,
    dry_run: given.DryRun = False,
    max_seq_length: given.MaxSeqLength = 2048,
    overlong: given.Overlong = None,
    mask: given.Mask = "assistant",
    skip_bad: given.SkipBad = 0,
    val_fraction: given.ValFraction = 0.1,
    fine_tune_type: given.FineTuneType = "lora",
    rank: given.Rank = 8,
    alpha: given.Alpha = None,
    rslora: given.RsLora = False,
    dropout: given.Dropout = 0.0,
    num_layers: given.NumLayers = None,
    modules: given.Modules = None,
    loss: given.Loss = None,
    beta: given.Beta = None,
    label_smoothing: given.LabelSmoothing = 0.0,
    length_normalized: given.LengthNormalized = False,
    iters: given.Iters = None,
    epochs: given.Epochs = None,
    batch_size: given.BatchSize = None,
    grad_accumulation_steps: given.GradAccumulationSteps = None,
    grad_checkpoint: given.GradCheckpoint = None,
    learning_rate: given.LearningRate = None,
    lr_schedule: given.LrSchedule = "cosine",
    warmup: given.Warmup = None,
    optimizer: given.Optimizer = "adamw",
    weight_decay: given.WeightDecay = 0.0,
    clip: given.Clip = 1.0,
    seed: given.Seed = 0,
    patience: given.Patience = None,
    steps_per_eval: given.StepsPerEval = None,
    save_every: given.SaveEvery = None,
    test: given.Test = False,
    steps_per_report: given.StepsPerReport = None,
    replies: given.Replies = 2,
    report: given.Report = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    as_json: given.Json = False,
) -> None:
    """Fine-tune on your own conversations, instructions, texts or preferences.

    They are recognised by what is in them: see --dry-run. Of a quantized model an adapter is
    trained (QLoRA). What is best on the validation set is kept; Ctrl-C saves, --resume goes on.
    """
    from minicpm_mlx.errors import InvalidArgumentError
    from minicpm_mlx.train import finetune as runs
    from minicpm_mlx.train import memory, planning
    from minicpm_mlx.train.data.dataset import DataOptions, load_data
    from minicpm_mlx.train.lora import LoRAConfig

    from . import report as tuning

    method = LoRAConfig(
        kind=fine_tune_type,
        rank=rank,
        alpha=alpha,
        rank_stabilized=rslora,
        dropout=dropout,
        layers=num_layers,
        modules=None if modules is None else tuple(modules.replace(" ", "").split(",")),
    )
    reading = DataOptions(
        max_seq_length=max_seq_length,
        mask=mask,
        overlong=overlong,
        skip_bad=skip_bad,
        valid_fraction=val_fraction,
        seed=seed,
    )
    wishes = planning.TrainingOptions(
        iters=iters,
        epochs=epochs,
        batch_size=batch_size,
        accumulate=grad_accumulation_steps,
        checkpointing=grad_checkpoint,
        learning_rate=learning_rate,
        schedule=lr_schedule,
        warmup=warmup,
        optimizer=optimizer,
        weight_decay=weight_decay,
        clip=clip,
        report_every=steps_per_report,
        evaluate_every=steps_per_eval,
        save_every=save_every,
        patience=patience,
        seed=seed,
    )
    adapter_path = adapter_path.expanduser()
    if not dry_run:
        runs.claim(adapter_path, resume)
    tuning.check(report, replies)
    tokenizer, config = options.tokenizer_and_config(model)
    found = load_data(data, tokenizer, reading)
    if context.info_name == "dpo" and found.kind == "sft":
        raise InvalidArgumentError(
            f"{data}: expected preferences (chosen and rejected, or a label), got {found.format}; "
            "`minicpm-mlx lora` is for those"
        )
    objective = planning.objective_for(
        found.kind,
        loss=loss,
        beta=beta,
        label_smoothing=label_smoothing,
        length_normalized=length_normalized,
    )
    dtype = dtype or ("float32" if method.kind == "full" else None)
    options.select(dtype, device)
    plan, needed = planning.plan_for(found, wishes, config, method, dtype=dtype)
    runs.check(found, objective, method, plan, test=test)
    if dry_run:
        tuning.preview(found, tokenizer, plan, needed, as_json)
        return
    tuning.announce(found, plan, needed)
    memory.check(needed)
    lm = options.load(model, dtype, device, fuse=False)
    with ExitStack() as stack:
        result = runs.finetune(
            lm,
            found,
            adapter_path,
            plan=plan,
            method=method,
            objective=objective,
            resume=resume,
            replies=replies,
            test=test,
            listener=tuning.listener(stack, adapter_path, report, as_json, plan),
        )
    tuning.close(model, adapter_path, result, as_json)
    if not result.complete:
        raise KeyboardInterrupt
