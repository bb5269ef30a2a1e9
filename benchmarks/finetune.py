"""LoRA training, ours against mlx-lm's, on the same weights, data, adapters and optimizer.

    python benchmarks/finetune.py [--rounds 3] [--steps 4] [--json results/NAME.json]

`demo`: the demo model, rank 8 in the last 16 layers, batches of 2 x 512 tokens. `wide`: random
weights with MiniCPM's vocabulary of 122,753, hidden 288, 4 layers, batches of 4 x 1,024. Both in
float32, every token counted. Contenders alternate, each in a process of its own; the first step of
each is not timed. Memory is the most that MLX held; the last lines compare losses step by step.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import report

import minicpm_mlx as mm

SHAPES = {"demo": (2, 512, 16), "wide": (4, 1024, 4)}
"""Samples, tokens in each, and layers with adapters."""

WIDE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 288,
    "intermediate_size": 768,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "num_hidden_layers": 4,
    "vocab_size": 122753,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "max_position_embeddings": 4096,
}

RATE = 1e-4


def main() -> None:
    parser = report.options(__doc__, rounds=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--only", choices=SHAPES)
    parser.add_argument("--child", nargs=4, metavar=("WHO", "WHAT", "FOLDER", "STEPS"))
    options = parser.parse_args()
    if options.child:
        who, what, folder, steps = options.child
        child = {"ours": ours, "mlx-lm": theirs}[who]
        print(json.dumps(child(what, Path(folder), int(steps))))
        return
    found = report.Report(rounds=options.rounds, steps=options.steps)
    for what in [options.only] if options.only else SHAPES:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            prepare(what, folder)
            compare(what, folder, options.rounds, options.steps, found)
    found.save(options.json)


def compare(what: str, folder: Path, rounds: int, steps: int, found: report.Report) -> None:
    results: dict[str, list[Any]] = {"ours": [], "mlx-lm": []}
    for _ in range(rounds):
        for who, those in results.items():
            command = [sys.executable, __file__, "--child", who, what, str(folder), str(steps)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            those.append(json.loads(done.stdout.splitlines()[-1]))
    speed, memory = {}, {}
    for who, those in results.items():
        speed[who] = found.add(f"{what}: {who}", [r["tokens_per_second"] for r in those], "tok/s")
        memory[who] = found.add(f"{what}: {who}, memory", [r["memory"] for r in those], "GB")
    print(f"{what}: {speed['ours'] / speed['mlx-lm']:.2f} times as fast", end=", ")
    print(f"{memory['ours'] / memory['mlx-lm']:.3f} of the memory")
    pairs = zip(results["ours"][0]["losses"], results["mlx-lm"][0]["losses"], strict=True)
    for step, (a, b) in enumerate(pairs, 1):
        print(f"  step {step}: loss {a:.5f}, mlx-lm {b:.5f}")


def prepare(what: str, folder: Path) -> None:
    """The model in llama format, and token ids."""
    import mlx.core as mx
    from compare import llama_format

    from minicpm_mlx.loading.store import folder_of
    from minicpm_mlx.model.config import Config
    from minicpm_mlx.model.transformer import Model
    from minicpm_mlx.model_cards import resolve
    from minicpm_mlx.weights.load import parameters

    samples, length, _ = SHAPES[what]
    draw = random.Random(0)
    if what == "demo":
        source = folder_of(resolve("demo"))
        llama_format(source, folder, dense=True)
        text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
        text += Path(__file__).with_name("README.md").read_text(encoding="utf-8")
        ids = mm.load_tokenizer(source).encode(text)
    else:
        mx.random.seed(0)
        model = Model(Config.from_dict(WIDE))
        mx.save_safetensors(str(folder / "model.safetensors"), parameters(model))
        (folder / "config.json").write_text(json.dumps(WIDE))
        ids = [draw.randrange(WIDE["vocab_size"]) for _ in range(100_000)]  # type: ignore[call-overload]
    starts = [draw.randrange(len(ids) - length) for _ in range(64 * samples)]
    (folder / "ids.json").write_text(json.dumps([ids[at : at + length] for at in starts]))


def batches(what: str, folder: Path, steps: int) -> list[list[list[int]]]:
    texts = json.loads((folder / "ids.json").read_text())
    size = SHAPES[what][0]
    return [texts[at * size : (at + 1) * size] for at in range(steps + 1)]


def ours(what: str, folder: Path, steps: int) -> dict[str, Any]:
    import mlx.core as mx

    from minicpm_mlx.train import cpu_kernels, lora
    from minicpm_mlx.train.data.samples import Sample
    from minicpm_mlx.train.objectives import CrossEntropy
    from minicpm_mlx.train.optimizer import Schedule
    from minicpm_mlx.train.planning import TrainingPlan
    from minicpm_mlx.train.trainer import Trainer

    size, length, count = SHAPES[what]
    model: Any = mm.load_model(folder, "float32")
    mx.random.seed(1)
    lora.prepare_model(model, lora.LoRAConfig(layers=count))
    tensors, _ = lora.adapter_weights(model, lora.LoRAConfig(layers=count))
    mx.save_safetensors(str(folder / "begin.safetensors"), tensors)
    cpu_kernels.use_fast_kernels(model)
    mask = [False] + [True] * (length - 1)
    items = [Sample(text, mask) for batch in batches(what, folder, steps) for text in batch]
    plan = TrainingPlan(
        steps=steps + 1,
        batch_size=size,
        schedule=Schedule(kind="constant", peak=RATE),
        clip=1e9,
        checkpointing=True,
    )
    trainer = Trainer(model, CrossEntropy(), plan, items, [], folder / "run")
    trainer.order.at = lambda step: list(range(step * size, (step + 1) * size))  # type: ignore
    losses: list[float] = []

    def step() -> None:
        trainer._step()
        losses.append(trainer._sums.pop("loss") / trainer._sums.pop("weight"))

    return measured(step, losses, size * length, steps)


def theirs(what: str, folder: Path, steps: int) -> dict[str, Any]:
    from functools import partial

    import mlx.core as mx
    import mlx.nn as nn
    from mlx.optimizers import AdamW
    from mlx_lm.tuner.trainer import default_loss
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load_model

    size, length, count = SHAPES[what]
    model, _ = load_model(folder)
    model.freeze()
    linear_to_lora_layers(model, count, {"rank": 8, "scale": 2.0, "dropout": 0.0})
    model.load_weights(str(folder / "begin.safetensors"), strict=False)
    how: Any = {"betas": [0.9, 0.95], "bias_correction": True, "weight_decay": 0.0}
    optimizer = AdamW(RATE, **how)
    differentiate = nn.value_and_grad(model, default_loss)
    state = [model.state, optimizer.state, mx.random.state]

    @partial(mx.compile, inputs=state, outputs=state)
    def update(ids: mx.array, lengths: mx.array) -> mx.array:
        (loss, _), gradients = differentiate(model, ids, lengths)
        optimizer.update(model, gradients)
        return loss

    model.train()
    texts = iter(batches(what, folder, steps))
    losses: list[float] = []

    def step() -> None:
        loss = update(mx.array(next(texts)), mx.array([[1, length]] * size))
        mx.eval(loss, state)
        losses.append(loss.item())

    return measured(step, losses, size * length, steps)


def measured(step: Any, losses: list[float], tokens: int, steps: int) -> dict[str, Any]:
    import mlx.core as mx

    step()
    mx.reset_peak_memory()
    begin = time.perf_counter()
    for _ in range(steps):
        step()
    seconds = time.perf_counter() - begin
    return {
        "tokens_per_second": steps * tokens / seconds,
        "memory": mx.get_peak_memory() / 1e9,
        "losses": losses,
    }


if __name__ == "__main__":
    main()
