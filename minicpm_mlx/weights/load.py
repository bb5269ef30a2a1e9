"""Builds a model from a folder's files, after checking that every parameter has its tensor."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from .. import device
from ..arguments import printable
from ..distributed import collectives
from ..errors import WeightsError
from ..model import fused as fusing
from ..model import tensor_parallel
from ..model.config import Config
from ..model.config_sections import Quantization
from ..model.fused import FusedModel
from ..model.kernels.cpu_gemv import split_matrices
from ..model.layout import Layout, apply_layout
from ..model.packing import apply_packing, dequantize
from ..model.transformer import Model
from . import gptq_awq, shards
from .lazy_tensor import LazyTensor, dtype_name, is_float


def load_model(
    folder: str | Path,
    dtype: str | mx.Dtype | None = None,
    fuse: bool = False,
    *,
    weights: str | None = None,
    shard: bool = False,
    layout: Layout | None = None,
) -> Model | FusedModel:
    """Load the model in `folder`: `model(ids (B, T)) -> logits (B, T, V)`.

    `dtype` is "float32", "bfloat16" or "float16", or MLX's own; by default what this machine
    computes fastest.
    `fuse` gives the inference form (see fused.py) instead of the one that reads like the paper and
    is trained. `weights` names a torch file that has no standard name. With `shard` the processes
    of a launch share the work (see tensor_parallel.py). `layout` is of the inference form of packed
    weights that one process computes. Memory stays near the size of the result,
    since tensors are read layer by layer.

    Raises ConfigError or WeightsError for a folder that does not hold a whole, fitting model.
    """
    folder = Path(folder)
    device.select()
    config = Config.load(folder)
    tensors = read_checked(folder, config, weights)
    chosen = device.choose_dtype(_stored_dtype(tensors), dtype, fused=fuse)
    dense = None
    if any(name.endswith(".scales") for name in tensors):
        dense = device.unpack_to(chosen, sum(a.size for a in parameters(Model(config)).values()))
    plain = assemble(config, tensors, chosen)
    shard = shard and collectives.size() > 1
    if shard:
        tensor_parallel.shard(plain)
    model = fusing.fuse(plain) if fuse else plain
    for layer in model.layers:
        mx.eval(layer.parameters())
    mx.eval(model.parameters())
    if dense is not None:
        dequantize(model, dense)
        mx.eval(model.parameters())  # lazy arrays could be computed by this thread alone
    elif isinstance(model, FusedModel) and not shard:
        apply_layout(model, layout or Layout())
    if fuse:
        split_matrices(model)
    if shard:
        tensor_parallel.add_all_reduce(model)
    return model


def read_checked(folder: Path, config: Config, weights: str | None = None) -> dict[str, LazyTensor]:
    """The tensors in `folder` that make the model of `config`: all of them, in the right shapes."""
    tensors = gptq_awq.in_mlx_form(shards.read(folder, weights), folder)
    return checked(tensors, config, folder)


def checked(tensors: Mapping[str, LazyTensor], config: Config, path: Path) -> dict[str, LazyTensor]:
    """The tensors that make the model of `config`; WeightsError unless they are all there.

    Messages name `path`, the folder or file that holds them.
    """
    tensors = {name: tensor for name, tensor in tensors.items() if not _is_redundant(name, config)}
    _check(parameters(_empty(config, tensors)), tensors, path)
    return tensors


def assemble(config: Config, tensors: dict[str, LazyTensor], dtype: mx.Dtype | None) -> Model:
    """The model of `tensors`, which is emptied, with floats cast to `dtype` (None: as stored).

    MLX reads a safetensors file only when an array is evaluated.
    """
    model = _empty(config, tensors)
    model.load_weights([(name, _cast(tensors.pop(name).load(), dtype)) for name in list(tensors)])
    return model


def _empty(config: Config, tensors: dict[str, LazyTensor]) -> Model:
    """A model whose modules are packed as the tensors are; its values are never computed."""
    model = Model(config)
    apply_packing(model, packings(tensors, config))
    return model


def parameters(model: nn.Module) -> dict[str, mx.array]:
    """Every parameter by its name in the checkpoint."""
    items: list[tuple[str, mx.array]] = tree_flatten(model.parameters())  # type: ignore[assignment]
    return dict(items)


def _is_redundant(name: str, config: Config) -> bool:
    """Whether an old exporter wrote a tensor that follows from others."""
    return name.endswith("rotary_emb.inv_freq") or (
        config.tie_word_embeddings and name.startswith("lm_head.")
    )


def packings(tensors: Mapping[str, LazyTensor], config: Config) -> dict[str, Quantization]:
    """The packing of each module that has scales."""
    exceptions = dict(config.layer_quantization)
    modules = [name.removesuffix(".scales") for name in tensors if name.endswith(".scales")]
    if modules and config.quantization is None:
        raise WeightsError(
            f"{printable(modules[0])}.scales: the weights are quantized but the config has no "
            "`quantization`"
        )
    return {
        module: packing
        for module in modules
        if (packing := exceptions.get(module, config.quantization)) is not None
    }


def _check(expected: dict[str, mx.array], tensors: dict[str, LazyTensor], path: Path) -> None:
    for name, array in expected.items():
        if name not in tensors:
            raise WeightsError(
                f"{name} is missing; the config calls for {array.shape}", source=path
            )
        shape, dtype = tensors[name].shape, tensors[name].dtype
        if shape != array.shape:
            raise WeightsError(
                f"{name} has shape {shape}; the config calls for {array.shape}", source=path
            )
        if is_float(array.dtype):
            needed, fits = "a float type", is_float(dtype)
        else:  # codes, and scales of float modes
            needed, fits = f"{dtype_name(array.dtype)}, packed", dtype == array.dtype
        if not fits:
            raise WeightsError(f"{name} is {dtype_name(dtype)}; expected {needed}", source=path)
    if surplus := sorted(set(tensors) - set(expected)):
        raise WeightsError(
            f"{printable(surplus[0])} is not part of this architecture"
            + (f", nor are {len(surplus) - 1} more tensors" if len(surplus) > 1 else "")
            + "; is the config that of another model?",
            source=path,
        )


def _stored_dtype(tensors: dict[str, LazyTensor]) -> mx.Dtype:
    """The checkpoint's float format: the widest of its weights, norms aside, or of its scales."""
    weights = {name: tensor.dtype for name, tensor in tensors.items() if "norm" not in name}
    scales = {name for name in weights if name.endswith((".scales", ".biases"))}
    for names in (weights.keys() - scales, scales):
        kinds = {weights[name] for name in names}
        for dtype in (mx.float32, mx.float16, mx.bfloat16):
            if dtype in kinds:
                return dtype
    return mx.float32


def _cast(array: mx.array, dtype: mx.Dtype | None) -> mx.array:
    """`array` in `dtype` if it holds floats, evaluated at once so that the source can be freed."""
    if dtype is None or array.dtype == dtype or not is_float(array.dtype):
        return array
    array = array.astype(dtype)
    mx.eval(array)
    return array
