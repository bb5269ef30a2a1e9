"""pp512 and tg128 of the demo model: ours, mlx-lm's Llama and llama.cpp, on the same weights.

    python benchmarks/compare.py [--rounds 5] [--llama-cpp FOLDER] [--json results/NAME.json]

As llama-bench defines them: 512 tokens read, and 128 made one by one in an empty context. mlx-lm
reads the weights in llama format (its own MiniCPM is wrong for this family), once as the same 4-bit
codes, the muP scales folded into the quantization scales, and once unpacked to float32, which is
what ours makes of them on a CPU. llama.cpp runs the GGUF file that the demo is made from, if FOLDER
is one where `npm install node-llama-cpp@3.22.1 @node-llama-cpp/linux-x64@3.22.1` was run. Each
round runs all contenders, each in its own process, one after the other, on the same random tokens.
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import report

if TYPE_CHECKING:
    import mlx.core as mx

PROMPT, NEW = 512, 128
"""Tokens read, and tokens made."""

OURS = """
import json, sys, time, minicpm_mlx as mm
from minicpm_mlx.engine import generate
model = mm.load(sys.argv[1]).model
ids, new = json.loads(sys.argv[2]), int(sys.argv[3])
for _ in generate(model, ids[:8], max_tokens=2): pass
start = time.perf_counter()
next(generate(model, ids, max_tokens=1))
read = time.perf_counter() - start
stream = generate(model, ids[:1], max_tokens=new + 1)
next(stream)
start = time.perf_counter()
for _ in stream: pass
print(json.dumps([len(ids) / read, new / (time.perf_counter() - start)]))
"""

THEIRS = """
import json, sys, time
from pathlib import Path
from minicpm_mlx import device  # the same BLAS for both
import mlx.core as mx
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model
model, _ = load_model(Path(sys.argv[1]))
ids, new = json.loads(sys.argv[2]), int(sys.argv[3])
for _ in generate_step(mx.array(ids[:8]), model, max_tokens=2): pass
start = time.perf_counter()
next(generate_step(mx.array(ids), model, max_tokens=1))
read = time.perf_counter() - start
stream = generate_step(mx.array(ids[:1]), model, max_tokens=new + 1)
next(stream)
start = time.perf_counter()
for _ in stream: pass
print(json.dumps([len(ids) / read, new / (time.perf_counter() - start)]))
"""

LLAMA_CPP = """
import {getLlama, LlamaLogLevel} from "node-llama-cpp";
const [path, ids, fresh, threads] = process.argv.slice(-4);
const llama = await getLlama({gpu: false, logLevel: LlamaLogLevel.error, build: "never"});
const model = await llama.loadModel({modelPath: path});
const context = await model.createContext({contextSize: 2048, batchSize: 512, threads: +threads});
const sequence = context.getSequence();
const tokens = JSON.parse(ids);
for await (const _ of sequence.evaluate(tokens.slice(0, 8), {temperature: 0})) break;
await sequence.clearHistory();
let start = performance.now();
for await (const _ of sequence.evaluate(tokens, {temperature: 0})) break;
const read = performance.now() - start;
await sequence.clearHistory();
let made = 0;
for await (const _ of sequence.evaluate(tokens.slice(0, 1), {temperature: 0})) {
  if (made == 0) start = performance.now();
  if (made++ == +fresh) break;
}
const took = performance.now() - start;
console.log(JSON.stringify([1e3 * tokens.length / read, 1e3 * fresh / took]));
process.exit(0);
"""


def llama_format(source: Path, folder: Path, *, dense: bool) -> None:
    """The demo's checkpoint as a Llama: muP folded into the scales; `dense`: as float32."""
    import mlx.core as mx

    config = json.loads((source / "config.json").read_text())
    loaded: Any = mx.load(str(source / "model.safetensors"))
    arrays: dict[str, mx.array] = dict(loaded)
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
    if dense:
        arrays = dict(unpacked(arrays, config))
        del config["quantization"]
    mx.save_safetensors(str(folder / "model.safetensors"), arrays, {"format": "mlx"})
    for key in ("scale_emb", "scale_depth", "dim_model_base"):
        del config[key]
    config |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    (folder / "config.json").write_text(json.dumps(config))
    for path in source.glob("tokenizer*"):
        shutil.copy(path, folder / path.name)


def unpacked(arrays: dict[str, mx.array], config: dict[str, Any]) -> Iterator[tuple[str, mx.array]]:
    """The tensors of a quantized checkpoint by name, the packed matrices in float32."""
    import mlx.core as mx

    how = config["quantization"]
    for name, array in arrays.items():
        module, kind = name.rsplit(".", 1)
        if f"{module}.scales" not in arrays:
            yield name, array
        elif kind == "weight":
            special = how.get(module, how)
            packing = {"bits": special["bits"], "group_size": special["group_size"]}
            scales, biases = arrays[f"{module}.scales"], arrays[f"{module}.biases"]
            yield name, mx.dequantize(array, scales, biases, **packing).astype(mx.float32)


def python(script: str, folder: Path, ids: list[int]) -> list[float]:
    return run([sys.executable, "-c", script, str(folder), json.dumps(ids), str(NEW)])


def llama_cpp(folder: Path, model: Path, ids: list[int]) -> list[float]:
    program = folder / "minicpm-mlx-compare.mjs"
    program.write_text(LLAMA_CPP)
    threads = str(os.cpu_count())
    return run(["node", str(program), str(model), json.dumps(ids), str(NEW), threads])


def run(command: list[str]) -> list[float]:
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return list(map(float, json.loads(done.stdout.splitlines()[-1])))


def main() -> None:
    parser = report.options(__doc__, rounds=5)
    parser.add_argument("--llama-cpp", type=Path, help="folder with node_modules")
    options = parser.parse_args()

    from minicpm_mlx import Config
    from minicpm_mlx.loading import demo
    from minicpm_mlx.loading.store import folder_of
    from minicpm_mlx.model_cards import resolve

    card = resolve("demo")
    ours = folder_of(card)
    vocabulary = Config.load(ours).vocab_size
    ids = random.Random(0).choices(range(1000, vocabulary), k=PROMPT)
    found = report.Report(rounds=options.rounds, prompt=PROMPT, new=NEW)
    times: dict[str, list[list[float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        packed, dense = Path(name) / "packed", Path(name) / "dense"
        for folder in (packed, dense):
            folder.mkdir()
            llama_format(ours, folder, dense=folder is dense)
        contenders: dict[str, Callable[[list[int]], list[float]]] = {
            "minicpm-mlx": partial(python, OURS, ours),
            "mlx-lm 4-bit": partial(python, THEIRS, packed),
            "mlx-lm float32": partial(python, THEIRS, dense),
        }
        if options.llama_cpp:
            contenders["llama.cpp"] = partial(llama_cpp, options.llama_cpp, demo.source(card))
        for _ in range(options.rounds):
            for who, measure in contenders.items():
                times.setdefault(who, []).append(measure(ids))
    for index, phase in enumerate((f"pp{PROMPT}", f"tg{NEW}")):
        for who, rounds in times.items():
            found.add(f"{who} {phase}", [values[index] for values in rounds], "tok/s")
        for who in list(times)[1:]:
            pairs = zip(times["minicpm-mlx"], times[who], strict=True)
            found.add(f"{phase}, ours over {who}", [a[index] / b[index] for a, b in pairs], "")
    found.save(options.json)


if __name__ == "__main__":
    main()
