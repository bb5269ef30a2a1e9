"""Writes a checkpoint to a GGUF file for llama.cpp, and a Modelfile for Ollama beside it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ...errors import InvalidArgumentError, WeightsError
from ...files.atomic import named_errors, write_whole
from ...model.config import Config
from ...model.config_sections import Quantization
from ...model.packing import PACKED_NAMES
from ...text.tokenizer import load_tokenizer
from ..checkpoint import Checkpoint
from ..lazy_ops import packed_parts, unpacked
from ..lazy_tensor import LazyTensor
from ..llama_format import EMBEDDING, HEAD, multiplied
from .architecture import MUP, architecture_of, keys_of
from .header import Bytes
from .modelfile import write_modelfile
from .package import library
from .quant_blocks import BITS, GROUP, PLAIN, blocks_of, finite, in_four_bits, kept_kind, rounded
from .tensor_names import ROPE_FACTORS, Order, gguf_name, to_gguf
from .tokenizer import tokenizer_keys

KINDS = (*PLAIN, "Q8_0", "Q4_0", "Q4_1")
"""Types that matrices can be written as."""

ENDS = (EMBEDDING, HEAD)
"""Matrices that rounding to 4 bits hurts most: they become Q8_0 unless they are 4-bit already."""


@dataclass(frozen=True, kw_only=True)
class GgufReport:
    """How a checkpoint's tensors were written."""

    kinds: dict[str, int]
    """How many tensors of each kind the file holds."""
    kept: int
    """Packed matrices whose codes are unchanged, or hold the same values in more bits."""
    scale_error: float
    """Largest change of a scale or bias in those, relative to the largest of its matrix, since
    blocks hold them in float16; 0: none changed."""
    left_dense: int
    """Matrices in F16, since their rows divide into no blocks of 32."""
    modelfile: Path
    """For `ollama create NAME -f` it."""


@dataclass(frozen=True, kw_only=True)
class _TensorPlan:
    """A tensor to be written."""

    name: str
    kind: str
    shape: tuple[int, ...]
    load: Any
    """Returns its bytes, (rows, bytes)."""
    error: float | None = None
    """Relative change of its scales, if its codes are unchanged."""


def write_gguf(
    checkpoint: Checkpoint,
    source: Path,
    path: Path,
    kind: str = "F16",
    *,
    progress: Callable[[str], object] = lambda _: None,
) -> GgufReport:
    """Write a checkpoint to the file `path`, and an Ollama Modelfile beside it.

    Matrices become `kind`, one of `KINDS`; vectors are F32. A matrix that is packed as `kind`
    already keeps its codes; all others are unpacked and rounded. In 4 bits, the embedding and the
    head become Q8_0, and so does a matrix F16 whose rows are no multiple of 32. The tokenizer and
    its template are those of the folder `source`. One tensor is in memory at a time, and `path`
    appears when it is whole.

    Raises InvalidArgumentError for what llama.cpp does not run, TokenizerError, WeightsError for
    numbers that float16 cannot hold, MissingPackageError, and StorageError for a full disk.
    """
    if kind not in KINDS:
        raise InvalidArgumentError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    config = checkpoint.config
    keys = _keys(checkpoint, config, source, kind)
    tensors = [*_rotation(config), *_tensors(checkpoint, config, kind)]
    modelfile = path

    def write(partial_file: Path) -> None:
        nonlocal modelfile
        _write(partial_file, architecture_of(config), keys, tensors, progress)
        modelfile = write_modelfile(path, load_tokenizer(source), source)

    with named_errors(path, "choose another folder"):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, write)
    errors = [tensor.error for tensor in tensors if tensor.error is not None]
    kinds = Counter(tensor.kind for tensor in tensors)
    return GgufReport(
        kinds=dict(kinds),
        left_dense=0 if kind in PLAIN else kinds["F16"],
        kept=len(errors),
        scale_error=max(errors, default=0.0),
        modelfile=modelfile,
    )


def _keys(checkpoint: Checkpoint, config: Config, source: Path, kind: str) -> dict[str, Any]:
    architecture = architecture_of(config)
    types = library().LlamaFileType
    name = checkpoint.raw.get("_name_or_path")
    return {
        "general.name": name if isinstance(name, str) and name else source.resolve().name,
        "general.file_type": int(types["ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"]),
        "general.quantization_version": int(library().GGML_QUANT_VERSION),
        **{f"{architecture}.{key}": value for key, value in keys_of(config).items()},
        **tokenizer_keys(source, config.vocab_size),
    }


# Plan


def _rotation(config: Config) -> Iterator[_TensorPlan]:
    """longrope's factors, which GGUF holds as tensors."""
    scaling = config.rope_scaling
    if scaling is None or scaling.kind != "longrope":
        return
    for name, key in ROPE_FACTORS.items():
        factors = np.array(getattr(scaling, key), np.float32)
        yield _TensorPlan(
            name=name, kind="F32", shape=factors.shape, load=partial(factors.view, np.uint8)
        )


def _tensors(checkpoint: Checkpoint, config: Config, kind: str) -> Iterator[_TensorPlan]:
    packings, tensors = checkpoint.packings, checkpoint.tensors
    if config.mla and config.dim_model_base != MUP["dim_model_base"]:  # a constant in llama.cpp
        divisor = config.hidden_size / MUP["dim_model_base"]
        tensors = multiplied(checkpoint, tensors, {"model.norm": divisor / config.logit_divisor})
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        order = to_gguf(module, config)
        if module not in packings or part == "bias":
            yield _rounded(name, tensor, kind, order)
        elif part == "weight":
            packing, parts = packings[module], packed_parts(checkpoint.tensors, module)
            kept = _kept(parts, module, packing, kind, order)
            yield kept or _rounded(name, unpacked(parts, packing), kind, order)


def _kept(
    parts: dict[str, LazyTensor], module: str, packing: Quantization, kind: str, order: Order
) -> _TensorPlan | None:
    """A packed matrix written with its codes unchanged; None if `kind` cannot hold them."""
    if packing.bits == 2 and kind not in PLAIN:
        parts, packing = in_four_bits(parts, packing), Quantization(bits=4, group_size=GROUP)
    codes, scales, biases = (parts.get(part) for part in PACKED_NAMES)
    if kind in PLAIN or codes is None or scales is None or biases is None:
        return None
    grid = (scales.load(), biases.load())
    own_kind = kept_kind(packing, *grid)
    if own_kind == "Q4_0" and kind != "Q4_0":
        own_kind = "Q4_1"  # with explicit minimums, the same values
    if own_kind is None or (own_kind != kind and not (own_kind == "Q8_0" and module in ENDS)):
        return None
    error = max(map(_float16_error, grid))
    if not error <= 2**-10:  # infinite or subnormal in float16: rounding anew is no worse
        return None

    def load() -> Bytes:
        return order(blocks_of(own_kind, *(part.load() for part in (codes, scales, biases))))

    rows, width = scales.shape[0], scales.shape[1] * GROUP
    return _TensorPlan(
        name=gguf_name(module, "weight"), kind=own_kind, shape=(rows, width), load=load, error=error
    )


def _float16_error(values: mx.array) -> float:
    """The largest change when rounded to float16, relative to the largest value."""
    exact = np.array(values.astype(mx.float32))
    with np.errstate(all="ignore"):
        change = np.abs(exact - exact.astype(np.float16).astype(np.float32)).max()
        return float(change / np.abs(exact).max()) if change else 0.0


def _rounded(name: str, tensor: LazyTensor, kind: str, order: Order) -> _TensorPlan:
    """A tensor as `kind`; vectors as F32, and matrices as F16 or Q8_0 where `kind` does not fit."""
    module, _, part = name.rpartition(".")
    if len(tensor.shape) == 1:
        kind = "F32"
    elif kind in BITS and tensor.shape[-1] % GROUP:
        kind = "F16"
    elif kind in BITS and module in ENDS:
        kind = "Q8_0"

    def load() -> Bytes:
        array = tensor.load()
        encoded = rounded(kind, array.reshape(1, -1) if array.ndim == 1 else array)
        if not finite(kind, encoded):
            raise WeightsError(f"{name} has numbers that {kind} cannot hold; choose F32 or BF16")
        if array.ndim == 1:
            return order(encoded.reshape(-1).view(np.float32)).view(np.uint8)
        return order(encoded)

    return _TensorPlan(name=gguf_name(module, part), kind=kind, shape=tensor.shape, load=load)


# The file


def _write(
    path: Path,
    architecture: str,
    keys: dict[str, Any],
    tensors: list[_TensorPlan],
    progress: Callable[[str], object],
) -> None:
    constants = library()
    writer = constants.GGUFWriter(path, architecture)
    try:
        for key, value in keys.items():
            _add(writer, key, value)
        for tensor in tensors:
            kind = constants.GGMLQuantizationType[tensor.kind]
            per_block, block = constants.GGML_QUANT_SIZES[kind]
            size = int(np.prod(tensor.shape)) // per_block * block
            # Not uint8: for that type the writer takes the shape to count bytes.
            writer.add_tensor_info(tensor.name, tensor.shape, np.float32, size, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for number, tensor in enumerate(tensors, 1):
            writer.write_tensor_data(np.ascontiguousarray(tensor.load()))
            progress(f"tensor {number} of {len(tensors)}")
    finally:
        writer.close()


def _add(writer: Any, key: str, value: Any) -> None:
    types = library().GGUFValueType
    kinds = {bool: types.BOOL, int: types.UINT32, float: types.FLOAT32, list: types.ARRAY}
    if value != []:  # the writer cannot tell the type of an empty list
        writer.add_key_value(key, value, kinds.get(type(value), types.STRING))
