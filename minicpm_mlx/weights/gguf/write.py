"""A checkpoint to a GGUF file for llama.cpp, tensor by tensor, and a Modelfile for Ollama."""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from glob import escape
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ...arguments import printable
from ...errors import InvalidArgumentError, StorageError, WeightsError
from ...model.config import Config
from ...model.config_sections import Quantization
from ...model.packing import PACKED_NAMES, unpack
from ...text.tokenizer import load_tokenizer
from ..checkpoint import Checkpoint
from ..lazy_tensor import LazyTensor
from ..llama_format import EMBEDDING, HEAD
from .architecture import architecture_of, keys_of
from .header import Bytes
from .modelfile import write_modelfile
from .package import library
from .quant_blocks import (
    BITS,
    GROUP,
    PLAIN,
    blocks_of,
    finite,
    kept_kind,
    rounded,
)
from .tensor_names import (
    ROPE_FACTORS,
    Order,
    gguf_name,
    to_gguf,
)
from .tokenizer import tokenizer_keys

KINDS = (*PLAIN, "Q8_0", "Q4_0", "Q4_1")
"""What matrices can be written as."""

ENDS = (EMBEDDING, HEAD)
"""Matrices that rounding to 4 bits hurts most; they become Q8_0 instead, if not 4-bit already."""


@dataclass(frozen=True, kw_only=True)
class Written:
    """What became of a checkpoint's tensors."""

    kinds: dict[str, int]
    """How many tensors of each kind the file holds."""
    kept: int
    """Packed matrices whose codes went over as they were."""
    scale_error: float
    """Of those, the largest change of a scale or bias, relative to the largest in its matrix:
    blocks hold them in float16. 0: none changed."""
    modelfile: Path
    """For `ollama create NAME -f` it."""


@dataclass(frozen=True, kw_only=True)
class _Planned:
    """A tensor of the file to be."""

    name: str
    kind: str
    shape: tuple[int, ...]
    load: Any
    """Its bytes, (rows, bytes)."""
    error: float | None = None
    """Of its scales, where its codes are kept."""


def write_gguf(
    checkpoint: Checkpoint,
    source: Path,
    path: Path,
    kind: str = "F16",
    *,
    progress: Callable[[str], object] = lambda _: None,
) -> Written:
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
    planned = [*_rotation(config), *_tensors(checkpoint, config, kind)]
    with _made_whole(path) as partial_file:
        _write(partial_file, architecture_of(config), keys, planned, progress)
        modelfile = write_modelfile(path, load_tokenizer(source), source)
    errors = [tensor.error for tensor in planned if tensor.error is not None]
    return Written(
        kinds=dict(Counter(tensor.kind for tensor in planned)),
        kept=len(errors),
        scale_error=max(errors, default=0.0),
        modelfile=modelfile,
    )


def _keys(checkpoint: Checkpoint, config: Config, source: Path, kind: str) -> dict[str, Any]:
    """Every key of the file but its architecture."""
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


# What is to be written


def _rotation(config: Config) -> Iterator[_Planned]:
    """longrope's factors."""
    scaling = config.rope_scaling
    if scaling is None or scaling.kind != "longrope":
        return
    for name, key in ROPE_FACTORS.items():
        factors = np.array(getattr(scaling, key), np.float32)
        yield _Planned(
            name=name, kind="F32", shape=factors.shape, load=partial(factors.view, np.uint8)
        )


def _tensors(checkpoint: Checkpoint, config: Config, kind: str) -> Iterator[_Planned]:
    how = checkpoint.packings
    for name, tensor in checkpoint.tensors.items():
        module, _, part = name.rpartition(".")
        order = to_gguf(module, config)
        if module not in how or part == "bias":
            yield _rounded(name, tensor, kind, order)
        elif part == "weight":
            kept = _kept(checkpoint, module, how[module], kind, order)
            yield kept or _rounded(name, _unpacked(checkpoint, module, how[module]), kind, order)


def _unpacked(checkpoint: Checkpoint, module: str, packing: Quantization) -> LazyTensor:
    """A packed matrix in float32, so that it is rounded once alone."""
    parts = {p: t for p in PACKED_NAMES if (t := checkpoint.tensors.get(f"{module}.{p}"))}
    rows, width = parts["weight"].shape
    shape = (rows, width * 32 // packing.bits)
    return LazyTensor(
        shape, mx.float32, lambda: unpack({p: t.load() for p, t in parts.items()}, packing)
    )


def _kept(
    checkpoint: Checkpoint, module: str, packing: Quantization, kind: str, order: Order
) -> _Planned | None:
    """A packed matrix that a kind holds as it is, if that is the kind wanted there."""
    codes, scales, biases = (checkpoint.tensors.get(f"{module}.{part}") for part in PACKED_NAMES)
    if kind in PLAIN or codes is None or scales is None or biases is None:
        return None
    grid = (scales.load(), biases.load())
    found = kept_kind(packing, *grid)
    if found == "Q4_0" and kind != "Q4_0":
        found = "Q4_1"  # which can say the same
    if found != kind and not (found == "Q8_0" and module in ENDS):
        return None
    error = max(map(_float16_error, grid))
    if not error <= 2**-10:  # infinite, or too small for float16: rounding anew serves it no worse
        return None

    def load() -> Bytes:
        return order(blocks_of(found, *(part.load() for part in (codes, scales, biases))))

    rows, width = scales.shape[0], scales.shape[1] * GROUP
    return _Planned(
        name=gguf_name(module, "weight"), kind=found, shape=(rows, width), load=load, error=error
    )


def _float16_error(values: mx.array) -> float:
    """The largest change when rounded to float16, relative to the largest value."""
    exact = np.array(values.astype(mx.float32))
    with np.errstate(all="ignore"):
        change = np.abs(exact - exact.astype(np.float16).astype(np.float32)).max()
        return float(change / np.abs(exact).max()) if change else 0.0


def _rounded(name: str, tensor: LazyTensor, kind: str, order: Order) -> _Planned:
    """A tensor as `kind`, or as what it should be instead."""
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

    return _Planned(name=gguf_name(module, part), kind=kind, shape=tensor.shape, load=load)


# The file


def _write(
    path: Path,
    architecture: str,
    keys: dict[str, Any],
    planned: list[_Planned],
    progress: Callable[[str], object],
) -> None:
    constants = library()
    writer = constants.GGUFWriter(path, architecture)
    try:
        for key, value in keys.items():
            _add(writer, key, value)
        for tensor in planned:
            kind = constants.GGMLQuantizationType[tensor.kind]
            per_block, block = constants.GGML_QUANT_SIZES[kind]
            size = int(np.prod(tensor.shape)) // per_block * block
            # A type other than uint8, by which the writer would take the shape for one of bytes.
            writer.add_tensor_info(tensor.name, tensor.shape, np.float32, size, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for number, tensor in enumerate(planned, 1):
            writer.write_tensor_data(np.ascontiguousarray(tensor.load()))
            progress(f"tensor {number} of {len(planned)}")
    finally:
        writer.close()


def _add(writer: Any, key: str, value: Any) -> None:
    types = library().GGUFValueType
    if isinstance(value, bool):
        kind = types.BOOL
    elif isinstance(value, int):
        kind = types.UINT32
    elif isinstance(value, float):
        kind = types.FLOAT32
    elif isinstance(value, list):
        kind = types.ARRAY
    else:
        kind = types.STRING
    if value != []:  # the writer knows no type for these
        writer.add_key_value(key, value, kind)


@contextmanager
def _made_whole(path: Path) -> Iterator[Path]:
    """A file beside `path` that takes its place once it is written; nothing is left otherwise."""
    partial_file: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path)
        partial_file = path.with_name(f".{path.name}-{os.getpid()}")
        yield partial_file
        partial_file.replace(path)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, None)
        raise StorageError(
            f"{path}: cannot be written ({error.strerror or printable(error)}); "
            f"{'free some space, or ' if full else ''}choose another folder"
        ) from None
    finally:
        if partial_file is not None:
            with suppress(OSError):
                partial_file.unlink(missing_ok=True)


def _sweep(path: Path) -> None:
    """Delete what processes that were killed left half written of `path`."""
    for half in path.parent.glob(f".{escape(path.name)}-*"):
        process = half.name.rpartition("-")[2]
        if process.isdecimal():
            try:
                os.kill(int(process), 0)
            except ProcessLookupError:
                half.unlink(missing_ok=True)
            except OSError:
                continue  # another user's: it lives
