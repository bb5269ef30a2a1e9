"""Size and decode speed of ternary weights in 2 bits, beside the same in 4 bits.

    python benchmarks/ternary.py [--rounds 5] [--layers 52] [--new 32] [--json results/NAME.json]

A model of MiniCPM-1B's shape, whose layers are random numbers of -s, 0 and s in groups of 128, is
written in bfloat16 to a temporary folder (2.7 GB), then quantized by `exact` and by `rtn` in 4
bits, groups of 64: all matrices, and all but the embedding, which `exact` leaves as it is. Each
round runs every contender, one after the other, each in a process of its own, which makes tokens
one by one in an empty context. "packed" keeps the codes and multiplies with MLX's own kernels, as
on a GPU; on a CPU "as loaded" is what the program does there, which is to unpack them to float32.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import report

GROUP = 128
HALF = "4 bits g64 but the embedding"

DECODE = """
import json, sys, time
from pathlib import Path
import minicpm_mlx, mlx.core as mx
from minicpm_mlx import device
from minicpm_mlx.engine import generate
from minicpm_mlx.weights import load_model
folder, new, packed = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "packed"
if packed:
    device.unpack_to = lambda *_: None
model = load_model(folder, fuse=True)
weights = mx.get_active_memory()
stream = generate(model, [7], max_tokens=new + 1)
next(stream)
start = time.perf_counter()
for _ in stream: pass
print(json.dumps([new / (time.perf_counter() - start), weights]))
"""


def main() -> None:
    parser = report.options(__doc__, rounds=5)
    parser.add_argument("--layers", type=int, default=52)
    parser.add_argument("--new", type=int, default=32)
    options = parser.parse_args()

    from minicpm_mlx.device import on_cpu

    found = report.Report(layers=options.layers, new=options.new)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        folders = quantized(folder, options.layers)
        for name, made in folders.items():
            size = sum(file.stat().st_size for file in made.glob("*.safetensors"))
            found.add(f"{name}: file", [size / 1e9], "GB")
        ways = ["packed", "as loaded"] if on_cpu() else ["packed"]
        packed = [name for name in folders if name != "bfloat16"]
        contenders = [(name, way) for way in ways for name in packed]
        speeds: dict[str, list[float]] = {f"{name}, {way}": [] for name, way in contenders}
        memory = dict[str, float]()
        for _ in range(options.rounds):
            for name, way in contenders:
                speed, weights = decode(folders[name], options.new, way)
                speeds[f"{name}, {way}"].append(speed)
                memory[f"{name}, {way}"] = weights / 1e9
    for name, values in speeds.items():
        found.add(f"{name}: decode", values, "tok/s")
        found.add(f"{name}: weights", [memory[name]], "GB")
    found.save(options.json)


def decode(folder: Path, new: int, way: str) -> tuple[float, float]:
    """Tokens a second, and bytes of the weights in memory."""
    command = [sys.executable, "-c", DECODE, str(folder), str(new), way]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    speed, weights = json.loads(done.stdout)
    return speed, weights


def quantized(folder: Path, layers: int) -> dict[str, Path]:
    """The model in bfloat16 and in each packing, written under `folder`."""
    from minicpm_mlx.model.config_sections import Quantization
    from minicpm_mlx.quantization.job import Job
    from minicpm_mlx.quantization.recipe import Recipe
    from minicpm_mlx.quantization.ternary import check_equal, pack_ternary
    from minicpm_mlx.weights.checkpoint import Checkpoint, read_checkpoint, write_checkpoint

    names = ("bfloat16", "2 bits exact", "4 bits g64", HALF)
    made = {name: folder / name.replace(" ", "-") for name in names}
    for path in (*made.values(), folder / "work"):
        path.mkdir()
    write(made["bfloat16"], layers)
    source = read_checkpoint(made["bfloat16"])
    write_checkpoint(pack_ternary(source), made["2 bits exact"])
    check_equal(source, read_checkpoint(made["2 bits exact"]))
    recipe = Recipe(method="rtn", packing=Quantization(bits=4, group_size=64))
    smaller = Job(source, recipe, [], folder / "work").run()
    write_checkpoint(smaller, made["4 bits g64"])
    kept = {name: t for name, t in source.tensors.items() if "embed_tokens" in name}
    inside = {name: t for name, t in smaller.tensors.items() if "embed_tokens" not in name}
    write_checkpoint(Checkpoint(raw=smaller.raw, tensors=inside | kept), made[HALF])
    return made


def write(folder: Path, layers: int) -> None:
    """A checkpoint whose layers are ternary."""
    import mlx.core as mx

    from minicpm_mlx import Config
    from minicpm_mlx.bench.shapes import SHAPES
    from minicpm_mlx.model.transformer import Model
    from minicpm_mlx.weights.checkpoint import Checkpoint, write_checkpoint
    from minicpm_mlx.weights.lazy_tensor import LazyTensor
    from minicpm_mlx.weights.load import parameters

    raw = {**SHAPES["1b-shape"], "num_hidden_layers": layers, "model_type": "minicpm"}

    def lazy(name: str, shape: tuple[int, ...]) -> LazyTensor:
        def load() -> mx.array:
            if len(shape) == 1:
                return mx.ones(shape, mx.bfloat16)
            if "layers." not in name:
                return (mx.random.normal(shape) * 0.05).astype(mx.bfloat16)
            signs = mx.random.randint(-1, 2, (shape[0], shape[1] // GROUP, GROUP))
            scales = mx.random.uniform(0.02, 0.06, (shape[0], shape[1] // GROUP, 1))
            return (signs * scales).reshape(shape).astype(mx.bfloat16)

        return LazyTensor(shape, mx.bfloat16, load)

    expected = parameters(Model(Config.from_dict(raw)))
    tensors = {name: lazy(name, array.shape) for name, array in expected.items()}
    write_checkpoint(Checkpoint(raw=raw, tensors=tensors), folder)


if __name__ == "__main__":
    main()
