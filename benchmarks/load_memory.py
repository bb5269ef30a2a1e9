"""Memory after loading a model of MiniCPM-2B's shape in 4 bits, ours and mlx-lm's.

    python benchmarks/load_memory.py [--json results/NAME.json]

Writes 1.5 GB of random codes to a temporary folder, in MLX's format with the embedding tied, and
once more as mlx-lm's MiniCPM wants it, which cannot tie: with a head of its own. Both are loaded in
float16, so that the codes stay packed also on a CPU; reported is what MLX holds once evaluated.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import report

OURS = """
import sys, minicpm_mlx as mm, mlx.core as mx
model = mm.load_model(sys.argv[1], "float16", fuse=True)
print(mx.get_active_memory())
"""

THEIRS = """
import sys
from pathlib import Path
from mlx_lm.utils import load_model
import mlx.core as mx
model, _ = load_model(Path(sys.argv[1]))
mx.eval(model.parameters())
print(mx.get_active_memory())
"""


def write(folder: Path, *, tied: bool) -> int:
    """A random checkpoint; the bytes of its tensors."""
    import mlx.core as mx

    from minicpm_mlx import Config
    from minicpm_mlx.bench.shapes import SHAPES, random_arrays
    from minicpm_mlx.model.config_sections import Quantization

    raw = {**SHAPES["2b-shape"], "tie_word_embeddings": tied, "model_type": "minicpm"}
    raw |= {"rms_norm_eps": 1e-5, "num_key_value_heads": raw["num_attention_heads"]}
    arrays = random_arrays(Config.from_dict(raw), mx.float16)
    folder.mkdir()
    mx.save_safetensors(str(folder / "model.safetensors"), arrays, {"format": "mlx"})
    raw["quantization"] = asdict(Quantization(bits=4, group_size=64))
    (folder / "config.json").write_text(json.dumps(raw))
    return sum(array.nbytes for array in arrays.values())


def held(script: str, folder: Path) -> float:
    command = [sys.executable, "-c", script, str(folder)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def main() -> None:
    options = report.options(__doc__, rounds=1).parse_args()
    found = report.Report(shape="2b-shape", bits=4)
    with tempfile.TemporaryDirectory() as name:
        tensors = write(Path(name) / "tied", tied=True)
        ours = held(OURS, Path(name) / "tied")
        write(Path(name) / "untied", tied=False)
        theirs = held(THEIRS, Path(name) / "untied")
    found.add("tensors", [tensors / 1e6], "MB")
    found.add("minicpm-mlx", [ours / 1e6], "MB")
    found.add("minicpm-mlx over its tensors", [ours / tensors], "")
    found.add("mlx-lm", [theirs / 1e6], "MB")
    found.add("less than mlx-lm", [(theirs - ours) / 1e6], "MB")
    found.save(options.json)


if __name__ == "__main__":
    main()
