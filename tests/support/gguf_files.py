"""Small GGUF files and small tokenizers for tests, and llama.cpp where it is installed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

gguf = pytest.importorskip("gguf")
from gguf import GGMLQuantizationType as Type  # noqa: E402
from gguf import quants  # noqa: E402

from minicpm_mlx.weights.gguf.tokenizer import tokenizer_keys  # noqa: E402

TEXTS = [
    "Hello world",
    "  two spaces  and\n\nlines\t1234567",
    "你好，世界！敏捷的棕色狐狸。",
    "🙂 emoji 👩‍👩‍👧 𠮷",
    "<用户>山东省最高的山是哪座山？<AI>",
    "<|im_start|>user\nHi 你好<|im_end|>\n",
    "I'll don't WE'RE naïve café x=3.14;",
    "",
    "ａｂｃ ① ﬁ",
    " ",
    "\n",
    "<s>你好</s> and <unk>",
    "...。。。 ---   ```python\nprint('hi')\n```",
    "０１２３ ¥￥ ‼ <td>x</td> <reserved_12>",
    "\x00\x01 é",
    "aaaaaaaaaaaaaaaa      bbbb",
]
"""Of all kinds, for tokenizers."""

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INNER, VOCAB = 64, 4, 2, 16, 96, 270
SHAPES = {
    "token_embd": (VOCAB, HIDDEN),
    "output_norm": (HIDDEN,),
    "blk.0.attn_norm": (HIDDEN,),
    "blk.0.attn_q": (HEADS * HEAD_DIM, HIDDEN),
    "blk.0.attn_k": (KV_HEADS * HEAD_DIM, HIDDEN),
    "blk.0.attn_v": (KV_HEADS * HEAD_DIM, HIDDEN),
    "blk.0.attn_output": (HIDDEN, HEADS * HEAD_DIM),
    "blk.0.ffn_norm": (HIDDEN,),
    "blk.0.ffn_gate": (INNER, HIDDEN),
    "blk.0.ffn_up": (INNER, HIDDEN),
    "blk.0.ffn_down": (HIDDEN, INNER),
}
MODULES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "blk.0.attn_norm": "model.layers.0.input_layernorm",
    "blk.0.attn_q": "model.layers.0.self_attn.q_proj",
    "blk.0.attn_k": "model.layers.0.self_attn.k_proj",
    "blk.0.attn_v": "model.layers.0.self_attn.v_proj",
    "blk.0.attn_output": "model.layers.0.self_attn.o_proj",
    "blk.0.ffn_norm": "model.layers.0.post_attention_layernorm",
    "blk.0.ffn_gate": "model.layers.0.mlp.gate_proj",
    "blk.0.ffn_up": "model.layers.0.mlp.up_proj",
    "blk.0.ffn_down": "model.layers.0.mlp.down_proj",
}
SIZES = {
    "block_count": 1,
    "context_length": 256,
    "embedding_length": HIDDEN,
    "feed_forward_length": INNER,
    "attention.head_count": HEADS,
    "attention.head_count_kv": KV_HEADS,
    "attention.layer_norm_rms_epsilon": 1e-5,
}
Tensors = dict[str, np.ndarray]


def byte_tokenizer() -> Tokenizer:
    """Three special tokens, every byte, and one merge."""
    letters = [*pre_tokenizers.ByteLevel.alphabet()]
    vocab = {t: i for i, t in enumerate(["<unk>", "<s>", "</s>", *sorted(letters), "th"])}
    tokenizer = Tokenizer(models.BPE(vocab, [("t", "h")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def with_tokenizer(source: Path, folder: Path) -> Path:
    """A copy of the model folder `source` with the tokenizer of bytes."""
    shutil.copytree(source, folder)
    (folder / "tokenizer.json").write_text(byte_tokenizer().to_str())
    settings = {"add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def byte_vocabulary() -> dict[str, Any]:
    """The same tokenizer as metadata."""
    found = byte_tokenizer().get_vocab()
    tokens = sorted(found, key=lambda token: found[token])
    pads = [f"[PAD{i}]" for i in range(len(tokens), VOCAB)]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [*tokens, *pads],
        "tokenizer.ggml.token_type": [3] * 3 + [1] * (len(tokens) - 3) + [5] * len(pads),
        "tokenizer.ggml.merges": ["t h"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": True,
    }


def permuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to the rows of q and k (LlamaModel.permute)."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def tensors() -> Tensors:
    """A checkpoint's tensors under GGUF's names, in the checkpoint's order of rows."""
    random = np.random.default_rng(7)
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


def converted(content: Tensors) -> Tensors:
    """`content` with the rows of q and k in llama.cpp's order."""
    heads = {"blk.0.attn_q": HEADS, "blk.0.attn_k": KV_HEADS}
    return {n: permuted(a, heads[n]) if n in heads else a for n, a in content.items()}


def write(
    path: Path,
    content: Tensors,
    kind: Type = Type.F32,
    *,
    architecture: str = "llama",
    keys: Mapping[str, Any] | None = None,
) -> Path:
    """A GGUF file: matrices as `kind`, vectors as F32, names without a dot get ".weight".

    `keys` are added to what a small model has; None takes one away.
    """
    writer = gguf.GGUFWriter(path, architecture)
    sizes = {f"{architecture}.{key}": value for key, value in SIZES.items()}
    for key, value in (sizes | byte_vocabulary() | dict(keys or {})).items():
        if value is not None:
            add(writer, key, value)
    for name, array in content.items():
        name = name if name.endswith(".bias") else f"{name}.weight"
        if array.dtype == np.uint8:  # raw blocks
            writer.add_tensor(name, array, raw_dtype=kind)
        elif array.ndim == 2 and kind != Type.F32:
            writer.add_tensor(name, quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add(writer: Any, key: str, value: Any) -> None:
    names = {bool: "bool", int: "uint32", float: "float32", str: "string", list: "array"}
    getattr(writer, f"add_{names[type(value)]}")(key, value)


# llama.cpp

PROGRAM = """
import {readFileSync} from "node:fs";
import {pathToFileURL} from "node:url";
const [home, path, requests] = process.argv.slice(-3);
const {getLlama, LlamaLogLevel} =
  await import(pathToFileURL(`${home}/node_modules/node-llama-cpp/dist/index.js`));
const llama = await getLlama({gpu: false, logLevel: LlamaLogLevel.error, build: "never"});
const model = await llama.loadModel({modelPath: path});
const {prompts, fresh, texts} = JSON.parse(readFileSync(requests, "utf8"));
const replies = [];
if (prompts.length) {
  // One thread: two that wait for each other take minutes where other programs run.
  const context = await model.createContext({contextSize: 512, batchSize: 512, threads: 1});
  const sequence = context.getSequence();
  for (const tokens of prompts) {
    await sequence.clearHistory();
    const ids = [];
    for await (const id of sequence.evaluate(tokens, {temperature: 0, yieldEogToken: true})) {
      ids.push(id);
      if (ids.length == fresh) break;
    }
    replies.push(ids);
  }
}
const tokens = texts.map((text) => Array.from(model.tokenize(text, true)));
console.log(JSON.stringify({replies, tokens}));
process.exit(0);
"""


def need_llama_cpp() -> Path:
    """The folder in which node-llama-cpp is installed; skips the test where there is none."""
    home = os.environ.get("MINICPM_LLAMA_CPP")
    if not home or not shutil.which("node"):
        pytest.skip("needs Node and $MINICPM_LLAMA_CPP, a folder with node-llama-cpp installed")
    return Path(home).resolve()


def llama_cpp(
    model: Path,
    *,
    prompts: Sequence[Sequence[int]] = (),
    fresh: int = 1,
    texts: Sequence[str] = (),
    folder: Path,
) -> dict[str, Any]:
    """Greedy replies to prompts, and the ids of texts, as llama.cpp has them."""
    home = need_llama_cpp()
    program, requests = folder / "run.mjs", folder / "requests.json"
    program.write_text(PROGRAM)
    wanted = {"prompts": list(map(list, prompts)), "fresh": fresh, "texts": list(texts)}
    requests.write_text(json.dumps(wanted))
    command = ["node", str(program), str(home), str(model), str(requests)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


VOCABULARIES = {
    "minicpm-2b": 122753,
    "minicpm-1b": 73440,
    "minicpm3-4b": 73448,
    "minicpm4": 73448,
}


def written(source: Path, tmp_path: Path) -> Path:
    """A tiny MiniCPM in GGUF with the tokenizer in `source`."""
    folder = tmp_path / "source"
    shutil.copytree(source, folder)
    vocabulary = VOCABULARIES[source.name]
    content = tensors() | {"token_embd": np.zeros((vocabulary, 64), np.float16)}
    keys = tokenizer_keys(folder, vocabulary)
    return write(tmp_path / "model.gguf", content, architecture="minicpm", keys=keys)
