"""Reads a GGUF file as a checkpoint, and converts it to a folder that loads like any other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ...errors import ConfigError, WeightsError
from ..checkpoint import Checkpoint, write_checkpoint
from ..lazy_tensor import LazyTensor
from ..load import checked
from .architecture import config_of
from .header import GgufFile, read_header
from .quant_blocks import GROUP, parts_of
from .tensor_names import ROPE_FACTORS, checkpoint_name, from_gguf
from .tokenizer import write_tokenizer

SHARD = 1 << 30
"""Bytes of tensors in memory at once while a file is converted."""


def read_gguf(path: Path) -> Checkpoint:
    """The checkpoint in a GGUF file of a MiniCPM or a Llama; no tensor is read before it is loaded.

    Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K and Q5_K matrices stay packed, their codes unchanged, in
    MLX's groups of 32 with float16 scales; F32, F16 and BF16 stay what they are; Q6_K and the like
    become float16.
    Raises WeightsError for a file that is damaged, does not fit its own metadata or is packed
    otherwise, ConfigError for a model this library does not run, and MissingPackageError.
    """
    return _checkpoint(read_header(Path(path)))


def convert_gguf(
    path: Path,
    folder: Path,
    change: Callable[[Checkpoint], Checkpoint] = lambda checkpoint: checkpoint,
) -> None:
    """Write the checkpoint of a GGUF file, after a `change`, and its tokenizer to `folder`.

    The folder exists. Raises as `read_gguf`, and TokenizerError.
    """
    file = read_header(path)
    checkpoint = change(_checkpoint(file))
    write_tokenizer(file, folder)  # first, since it is refused sooner than gigabytes are written
    write_checkpoint(checkpoint, folder, shard=SHARD)


def _checkpoint(file: GgufFile) -> Checkpoint:
    raw = config_of(file)
    try:
        config = Checkpoint(raw=raw, tensors={}).config
        tensors: dict[str, LazyTensor] = {}
        for name, tensor in file.tensors.items():
            if name in ROPE_FACTORS:
                continue
            module, part = checkpoint_name(name)
            tensors |= parts_of(tensor, module, part, from_gguf(module, config))
        _check_layers(tensors, config.num_hidden_layers)
        raw |= _packing(tensors)
        config = Checkpoint(raw=raw, tensors={}).config
        return Checkpoint(raw=raw, tensors=checked(tensors, config, file.path))
    except (ConfigError, WeightsError) as error:
        raise error.at(file.path) from None


def _check_layers(tensors: Mapping[str, LazyTensor], layers: int) -> None:
    """Refuse a wrong layer count before a model of so many layers is built."""
    numbers = {name.split(".")[2] for name in tensors if name.startswith("model.layers.")}
    if len(numbers) != layers:
        raise WeightsError(
            f"it holds tensors of {len(numbers)} layers, and its metadata calls for {layers}"
        )


def _packing(tensors: Mapping[str, LazyTensor]) -> dict[str, Any]:
    """config.json's `quantization`: the commonest number of bits, and what is packed otherwise."""
    bits = {
        name.removesuffix(".scales"): tensors[name.replace("scales", "weight")].shape[1]
        * 32
        // (tensor.shape[1] * GROUP)
        for name, tensor in tensors.items()
        if name.endswith(".scales")
    }
    if not bits:
        return {}
    usual = Counter(bits.values()).most_common(1)[0][0]
    others = {m: {"group_size": GROUP, "bits": b} for m, b in bits.items() if b != usual}
    return {"quantization": {"group_size": GROUP, "bits": usual, **others}}
