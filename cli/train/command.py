"""`minicpm-mlx lora` and `dpo`: fine-tuning on the user's own data."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from minicpm_mlx.errors import InvalidArgumentError
from minicpm_mlx.model_cards import resolve

from .. import options
from . import report
from .options import LoraOptions

if TYPE_CHECKING:
    from minicpm_mlx.text.tokenizer import Tokenizer
    from minicpm_mlx.train.data.dataset import Data
    from minicpm_mlx.train.lora import LoRAConfig
    from minicpm_mlx.train.memory import TrainingMemory
    from minicpm_mlx.train.objectives import Objective
    from minicpm_mlx.train.planning import TrainingPlan


@dataclass(frozen=True)
class PreparedRun:
    """A run that has been checked as far as is possible without the weights."""

    tokenizer: Tokenizer
    data: Data
    method: LoRAConfig
    objective: Objective
    compute: options.Compute
    plan: TrainingPlan
    needed: TrainingMemory


@options.command(LoraOptions)
def lora(args: LoraOptions) -> None:
    """Fine-tune on your own conversations, instructions, texts or preferences.

    The format of the data is recognised: see --dry-run. On a quantized model it trains an adapter
    (QLoRA). It keeps the step that validates best; Ctrl-C saves, --resume continues.
    """
    from minicpm_mlx.train import memory

    run = _prepare(args)
    if args.dry_run:
        report.preview(run.data, run.tokenizer, run.plan, run.needed, args.as_json)
        return
    report.announce(run.data, run.plan, run.needed)
    memory.check(run.needed)
    _train(args, run)


def _prepare(args: LoraOptions) -> PreparedRun:
    from minicpm_mlx.train import finetune, planning
    from minicpm_mlx.train.data.counts import note_context
    from minicpm_mlx.train.data.dataset import check_data, load_data

    method, training = args.lora_config(), args.training_options()
    data_options = args.data_options()
    compute = args.compute
    if method.kind == "full" and compute.dtype is None:
        compute = replace(compute, dtype="float32")
    if not args.dry_run:
        finetune.claim(args.folder, args.resume)
    report.check(args.report, args.replies)
    # All of the data is looked at before the network or a model.
    outline = check_data(args.data, data_options)
    if args.context.info_name == "dpo" and outline.kind == "sft":
        raise InvalidArgumentError(
            f"{args.data}: expected preferences (chosen and rejected, or a label), got "
            f"{outline.format}; `minicpm-mlx lora` is for those"
        )
    objective = planning.objective_for(outline.kind, **vars(args.objective))
    size = training.batch_size
    finetune.check_outline(outline, objective, method, batch_size=size, test=args.test)
    compute.select()
    tokenizer, config = options.tokenizer_and_config(args.model)
    data = load_data(args.data, tokenizer, data_options)
    items = [*data.train, *data.valid, *data.test]
    notes = note_context(items, config.context_length, resolve(args.model).context)
    data = replace(data, notes=(*data.notes, *notes))
    plan, needed = planning.plan_for(data, training, config, method, dtype=compute.dtype)
    finetune.check(data, objective, method, plan, test=args.test)
    if args.resume and not args.dry_run:
        plan = finetune.resumed_plan(args.folder, plan)
        finetune.check_resumed(args.folder, data, objective, method, plan)
    return PreparedRun(tokenizer, data, method, objective, compute, plan, needed)


def _train(args: LoraOptions, run: PreparedRun) -> None:
    from minicpm_mlx.train.finetune import finetune

    lm = options.load_model(args.model, run.compute, fuse=False)
    with ExitStack() as stack:
        result = finetune(
            lm,
            run.data,
            args.folder,
            plan=run.plan,
            method=run.method,
            objective=run.objective,
            resume=args.resume,
            replies=args.replies,
            test=args.test,
            listener=report.listener(stack, args.folder, args.report, args.as_json, run.plan),
        )
    report.close(args.model, args.folder, result, args.as_json)
    if not result.complete:
        raise KeyboardInterrupt
