"""Decode of MiniCPM3's shape in 4 bits at 2,000 tokens of context: ours, and mlx-lm's minicpm3.

    python benchmarks/latent_attention.py [--rounds 5] [--layers 62] [--context 2000] [--json FILE]

Both have the same random weights (mlx-lm where MLX runs on a CPU also unpacked to float32, which is
faster there and what ours makes of them), fill their caches with random numbers for the context,
and make 32 tokens. Each round runs all, one after the other, each in a process of its own. Fewer
layers take in proportion less of everything but the head.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import report

NEW = 32
"""Tokens made."""

OURS = """
import json, sys, time
from pathlib import Path
from minicpm_mlx import Config
from minicpm_mlx.bench.shapes import random_model
import mlx.core as mx
from minicpm_mlx.engine import generate
from minicpm_mlx.engine.session import Session
folder, context, new = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
raw = json.loads((folder / "config.json").read_text())
del raw["quantization"]
model = random_model(Config.from_dict(raw))
mx.reset_peak_memory()
weights = mx.get_active_memory()
session = Session(model.config)
heads, *widths = model.config.cache_shape
dtype = model.norm.weight.dtype
for layer in session.cache:
    layer.append(*(mx.random.normal((1, heads, context, width), dtype) for width in widths))
mx.eval([layer.keys + layer.values for layer in session.cache])
ids = [i % 1000 for i in range(context)]
session.ids, session.model, session.length = ids, model, context
cache = sum(array.nbytes for layer in session.cache for array in layer.keys + layer.values)
stream = generate(model, ids + [7], max_tokens=new + 1, session=session)
next(stream)
start = time.perf_counter()
for _ in stream: pass
speed = new / (time.perf_counter() - start)
print(json.dumps([speed, cache, mx.get_peak_memory() - weights, weights]))
"""

THEIRS = """
import json, sys, time
from pathlib import Path
from minicpm_mlx import device  # the same BLAS for both
import mlx.core as mx
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model
folder, context, new = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
model, config = load_model(folder)
mx.eval(model.parameters())
weights = mx.get_active_memory()
mx.reset_peak_memory()
layers = make_prompt_cache(model)
heads = config["num_attention_heads"]
key = config["qk_nope_head_dim"] + config["qk_rope_head_dim"]
value = config["hidden_size"] // heads
dtype = model.model.norm.weight.dtype
for layer in layers:
    layer.update_and_fetch(
        *(mx.random.normal((1, heads, context, width), dtype) for width in (key, value))
    )
mx.eval([[layer.keys, layer.values] for layer in layers])
cache = sum(array.nbytes for layer in layers for array in (layer.keys, layer.values))
stream = generate_step(mx.array([7]), model, max_tokens=new + 1, prompt_cache=layers)
next(stream)
start = time.perf_counter()
for _ in stream: pass
speed = new / (time.perf_counter() - start)
print(json.dumps([speed, cache, mx.get_peak_memory() - weights, weights]))
"""


def write(folder: Path, layers: int, *, packed: bool = True) -> None:
    """Write the shape's random weights; unpacked to float32 unless `packed`."""
    import mlx.core as mx
    from compare import unpacked

    from minicpm_mlx import Config, device
    from minicpm_mlx.bench.shapes import SHAPES, random_arrays

    rope = {  # the published kind, with other factors
        **{"type": "longrope", "long_factor": [1.0] * 16, "short_factor": [1.0] * 16},
        "original_max_position_embeddings": 32768,
    }
    raw = {
        **{"num_key_value_heads": 40, "rope_scaling": rope},
        **{"rope_theta": 10000.0, "tie_word_embeddings": True, "model_type": "minicpm3"},
        **SHAPES["3-4b-shape"],
        **{"num_hidden_layers": layers, "quantization": {"bits": 4, "group_size": 64}},
    }
    config = Config.from_dict({key: raw[key] for key in raw if key != "quantization"})
    arrays = random_arrays(config, device.choose_dtype(mx.bfloat16))
    if not packed:
        arrays = dict(unpacked(arrays, raw))
        del raw["quantization"]
    mx.save_safetensors(str(folder / "model.safetensors"), arrays, {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(raw))


def main() -> None:
    parser = report.options(__doc__, rounds=5)
    parser.add_argument("--layers", type=int, default=62)
    parser.add_argument("--context", type=int, default=2000)
    options = parser.parse_args()
    import mlx.core as mx

    result = report.Report(layers=options.layers, context=options.context)
    with tempfile.TemporaryDirectory() as place:
        contenders = {
            "ours": (OURS, Path(place, "packed")),
            "mlx-lm": (THEIRS, Path(place, "packed")),
        }
        if not mx.metal.is_available():
            contenders["mlx-lm, unpacked"] = THEIRS, Path(place, "dense")
        for folder in {folder for _, folder in contenders.values()}:
            folder.mkdir()
            write(folder, options.layers, packed=folder.name == "packed")
        found: dict[str, list[list[float]]] = {name: [] for name in contenders}
        for _ in range(options.rounds):
            for name, (code, folder) in contenders.items():
                command = [sys.executable, "-c", code, folder, str(options.context), str(NEW)]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    sys.exit(f"{name}: {done.stderr.strip()}")
                found[name].append(json.loads(done.stdout))
        for name, rows in found.items():
            speeds, caches, peaks, weights = zip(*rows, strict=True)
            result.add(name, speeds, "tok/s")
            result.add(
                f"{name}, cache", [size / options.context / 1024 for size in caches], "KiB/token"
            )
            result.add(f"{name}, cache and work", [size / 1e6 for size in peaks], "MB")
            result.add(f"{name}, weights", [size / 1e6 for size in weights], "MB")
            if name != "ours":
                ratios = [ours[0] / row[0] for ours, row in zip(found["ours"], rows, strict=True)]
                result.add(f"ours against {name}", ratios, "times")
    result.save(options.json)


if __name__ == "__main__":
    main()
