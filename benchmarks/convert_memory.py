"""Memory while a model of MiniCPM-2B's shape is converted and quantized, above an idle process.

    python benchmarks/convert_memory.py [--layers 40] [--only NAME ...] [--json results/NAME.json]

Writes a checkpoint of that shape in bfloat16 to a temporary folder (5.5 GB), in files of 2 GB, and
runs each job in a process of its own. With `--layers 4` the methods that look at a text end in
minutes on a CPU: memory is a layer's and the embedding's, however many there are.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import report

SHARD = 2 << 30

JOBS = {
    "convert to llama": "convert(source, target, format='llama')",
    "convert to mlx": "convert(source, target, format='mlx')",
    "quantize rtn": "quantized('rtn')",
    "quantize mixed": "quantized('mixed')",
}

CODE = """
import resource, sys
from pathlib import Path
import minicpm_mlx, mlx.core as mx
from minicpm_mlx.convert.checkpoint import convert
from minicpm_mlx.quantization.job import Job
from minicpm_mlx.quantization.recipe import Recipe
from minicpm_mlx.weights.checkpoint import read_checkpoint, write_checkpoint

source, target = map(Path, sys.argv[1:])
mx.set_cache_limit(0)

def peak():
    if sys.platform == "linux":  # where getrusage also counts what the parent had before exec
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

def quantized(method):
    target.mkdir()
    work = target / "work"
    work.mkdir()
    texts = [[7 * n % 1000 for n in range(64)]] if method == "mixed" else []
    checkpoint = read_checkpoint(source)
    write_checkpoint(Job(checkpoint, Recipe(method=method, length=64), texts, work).run(), target)

idle = peak()
"""


def write(folder: Path, layers: int) -> int:
    """A checkpoint of random numbers; the bytes of its largest file."""
    import mlx.core as mx

    from minicpm_mlx import Config
    from minicpm_mlx.bench.shapes import SHAPES
    from minicpm_mlx.model.transformer import Model
    from minicpm_mlx.weights.checkpoint import Checkpoint, write_checkpoint
    from minicpm_mlx.weights.lazy_tensor import LazyTensor
    from minicpm_mlx.weights.load import parameters

    raw = {**SHAPES["2b-shape"], "num_hidden_layers": layers, "model_type": "minicpm"}
    raw |= {"rms_norm_eps": 1e-5, "num_key_value_heads": raw["num_attention_heads"]}

    def lazy(shape: tuple[int, ...]) -> LazyTensor:
        def load() -> mx.array:  # a block over and over: fast, and as large
            block = mx.random.normal((min(shape[0], 97), *shape[1:])) * 0.05
            whole = mx.concatenate([block] * -(-shape[0] // len(block)))[: shape[0]]
            return whole.astype(mx.bfloat16)

        return LazyTensor(shape, mx.bfloat16, load)

    expected = parameters(Model(Config.from_dict(raw)))
    tensors = {name: lazy(array.shape) for name, array in expected.items()}
    folder.mkdir()
    write_checkpoint(Checkpoint(raw=raw, tensors=tensors), folder, shard=SHARD)
    return max(path.stat().st_size for path in folder.glob("*.safetensors"))


def main() -> None:
    parser = report.options(__doc__, rounds=1)
    parser.add_argument("--layers", type=int, default=40)
    parser.add_argument("--only", nargs="+", choices=JOBS, default=list(JOBS))
    options = parser.parse_args()
    found = report.Report(shape="2b-shape", layers=options.layers)
    with tempfile.TemporaryDirectory() as name:
        source = Path(name) / "source"
        found.add("largest file", [write(source, options.layers) / 1e6], "MB")
        for job in options.only:
            target = Path(name) / job.replace(" ", "-")
            code = f"{CODE}{JOBS[job]}\nprint(peak() - idle)"
            command = [sys.executable, "-c", code, str(source), str(target)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            made = sum(path.stat().st_size for path in target.glob("*.safetensors"))
            found.add(f"{job}: peak", [float(done.stdout) / 1e6], "MB")
            found.add(f"{job}: result", [made / 1e6], "MB")
    found.save(options.json)


if __name__ == "__main__":
    main()
