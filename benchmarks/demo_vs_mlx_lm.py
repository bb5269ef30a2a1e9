"""Decode and prefill of the demo model, ours against mlx-lm's Llama on the same 4-bit weights.

    python benchmarks/demo_vs_mlx_lm.py [--rounds 5] [--json results/NAME.json]

mlx-lm reads the weights in llama format (its own MiniCPM is wrong for this family): the codes are
the same, the muP scales are folded into the quantization scales. Each round runs both contenders,
each in a process of its own, one after the other.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import report

PROMPT = "Tell me, step by step, how bread is made, and why each step matters. " * 16
TOKENS = 64

OURS = """
import json, sys, minicpm_mlx as mm
lm = mm.load(sys.argv[1])
ids = json.loads(sys.argv[2])
lm.generate(ids[:8], max_tokens=2, sampling=mm.Sampling())
stats = lm.generate(ids, max_tokens=int(sys.argv[3]), sampling=mm.Sampling()).stats
print(json.dumps([stats.prompt_tps, stats.decode_tps]))
"""

THEIRS = """
import ctypes, json, sys
from pathlib import Path
from minicpm_mlx import device  # the same BLAS for both
from mlx_lm import stream_generate
from mlx_lm.tokenizer_utils import load as load_tokenizer
from mlx_lm.utils import load_model
folder = Path(sys.argv[1])
model, _ = load_model(folder)
tokenizer = load_tokenizer(folder)
ids = json.loads(sys.argv[2])
for last in stream_generate(model, tokenizer, ids[:8], max_tokens=2): pass
tokenizer.eos_token_ids = set()
for last in stream_generate(model, tokenizer, ids, max_tokens=int(sys.argv[3])): pass
print(json.dumps([last.prompt_tps, last.generation_tps]))
"""


def llama_format(source: Path, folder: Path) -> None:
    """The demo's checkpoint as a Llama: the same codes, muP folded into the scales."""
    import mlx.core as mx

    config = json.loads((source / "config.json").read_text())
    arrays = dict(mx.load(str(source / "model.safetensors")))
    branch = config["scale_depth"] / math.sqrt(config["num_hidden_layers"])
    for name in arrays:
        module, kind = name.rsplit(".", 1)
        if module == "model.norm":
            divisor = config["hidden_size"] / config["dim_model_base"]
            arrays[name] = arrays[name] / divisor / config["scale_emb"]
        elif kind in ("scales", "biases") and module == "model.embed_tokens":
            arrays[name] = arrays[name] * config["scale_emb"]
        elif kind in ("scales", "biases") and module.endswith(("o_proj", "down_proj")):
            arrays[name] = arrays[name] * branch
    mx.save_safetensors(str(folder / "model.safetensors"), arrays, {"format": "mlx"})
    for key in ("scale_emb", "scale_depth", "dim_model_base"):
        del config[key]
    config |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    (folder / "config.json").write_text(json.dumps(config))
    for path in source.glob("tokenizer*"):
        shutil.copy(path, folder / path.name)


def run(script: str, folder: Path, ids: list[int]) -> list[float]:
    command = [sys.executable, "-c", script, str(folder), json.dumps(ids), str(TOKENS)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return list(map(float, json.loads(done.stdout.splitlines()[-1])))


def main() -> None:
    options = report.options(__doc__, rounds=5).parse_args()

    from minicpm_mlx import load_tokenizer
    from minicpm_mlx.local import folder_of
    from minicpm_mlx.registry import resolve

    ours = folder_of(resolve("demo"))
    ids = load_tokenizer(ours).encode(PROMPT)
    times: dict[str, list[list[float]]] = {"minicpm-mlx": [], "mlx-lm": []}
    with tempfile.TemporaryDirectory() as name:
        theirs = Path(name)
        llama_format(ours, theirs)
        for _ in range(options.rounds):
            times["minicpm-mlx"].append(run(OURS, ours, ids))
            times["mlx-lm"].append(run(THEIRS, theirs, ids))

    found = report.Report(rounds=options.rounds, prompt_tokens=len(ids), new_tokens=TOKENS)
    for index, phase in enumerate(("prefill", "decode")):
        for name, rounds in times.items():
            found.add(f"{name} {phase}", [values[index] for values in rounds], "tok/s")
        pairs = zip(*times.values(), strict=True)
        found.add(f"{phase} ratio", [a[index] / b[index] for a, b in pairs], "")
    found.save(options.json)


if __name__ == "__main__":
    main()
