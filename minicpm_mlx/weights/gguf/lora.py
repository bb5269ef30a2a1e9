"""A LoRA for llama.cpp's --lora: a GGUF file of pairs of matrices for tensors of the base's file.

The rows of q and k are in the base file's order. llama.cpp multiplies a pair by alpha over its
rank; alpha is one number for all, so that of a pair of smaller rank is made good in its b.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ...errors import InvalidArgumentError
from ...model.adapters import Adapter
from ...model.config import Config
from .architecture import architecture_of, keys_of
from .package import library
from .tensor_names import gguf_name, to_gguf


def write_lora(path: Path, adapter: Adapter, config: Config) -> None:
    """Write `adapter`, which fits the model of `config`, to the file `path`, in float32.

    InvalidArgumentError for what llama.cpp has no LoRA of: DoRA, the head, or a model that it does
    not run.
    """
    keys_of(config)  # refuses such a model
    _check(adapter)
    gguf = library()
    alpha = max(len(delta.b) for delta in adapter.deltas.values())
    writer = gguf.GGUFWriter(path, architecture_of(config))
    try:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        for module, delta in adapter.deltas.items():
            name, rank = gguf_name(module, "weight"), len(delta.b)
            a, b = np.array(delta.a.T), np.array(delta.b.T) * np.float32(rank / alpha)
            writer.add_tensor(f"{name}.lora_a", np.ascontiguousarray(a))  # (rank, in)
            b = to_gguf(module, config)(b)
            writer.add_tensor(f"{name}.lora_b", np.ascontiguousarray(b))  # (out, rank)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _check(adapter: Adapter) -> None:
    for module, delta in adapter.deltas.items():
        if delta.magnitude is not None:
            found = f"{module} has a magnitude (DoRA), which a GGUF adapter cannot say"
        elif not module.startswith("model.layers."):
            found = f"it changes {module}, and a GGUF adapter matrices inside layers only"
        else:
            continue
        raise InvalidArgumentError(
            f"{adapter.folder}: {found}; merge it with `minicpm-mlx fuse` and convert the result"
        )
