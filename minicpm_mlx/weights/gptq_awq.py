"""GPTQ's and AWQ's 4-bit matrices in MLX's affine form, without changing a value.

Both hold a matrix transposed, (in, out), in 32-bit words of eight codes, and a scale and a zero
point for each group of consecutive inputs: weight = scale (code - zero). MLX's is scale code +
bias, so bias = -zero scale; both are kept in float32, which the product fits.
- GPTQ packs codes along the inputs, the lowest bits first: MLX's order, once transposed. Zero
  points lie along the outputs; the first format ("gptq") stores them less one, "gptq_v2" as they
  are. `g_idx` names each input's group: MLX knows only consecutive ones, so a matrix in another
  order (desc_act, or act-order) is unpacked, each product rounded once to the scales' type.
- AWQ (its "gemm" version) packs both along the outputs, in the order `AWQ_ORDER`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..arguments import printable
from ..errors import WeightsError
from .lazy_tensor import LazyTensor, dtype_name

PER_WORD = 8
"""Codes in 32 bits."""

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight consecutive outputs lies in a word's lowest four bits, the next, and so on."""


def in_mlx_form(tensors: Mapping[str, LazyTensor], folder: Path) -> dict[str, LazyTensor]:
    """`tensors` with every packed matrix as MLX has it; `folder`'s config.json says which form.

    Nothing but the groups' order (`g_idx`) is read yet. Raises WeightsError for parts that do not
    fit each other.
    """
    if not any(name.endswith(".qweight") for name in tensors):
        return dict(tensors)
    stated = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    packing = stated.get("quantization_config")
    if not isinstance(packing, dict):
        raise WeightsError(
            f"{folder}: the weights are packed by GPTQ or AWQ but config.json has no "
            "quantization_config; older exports keep it in a file of its own: copy it there, with "
            '"quant_method": "gptq" or "awq"'
        )
    found = dict(tensors)
    for name in tensors:
        module, _, part = name.rpartition(".")
        if part == "qweight":
            parts = {p: found.pop(f"{module}.{p}", None) for p in PARTS}
            bias = found.get(f"{module}.bias")
            if bias and not bias.load().any().item():  # early exporters gave all modules one
                del found[f"{module}.bias"]
            found |= _matrix(f"{folder}: {printable(module)}", module, parts, packing)
    return found


PARTS = ("qweight", "qzeros", "scales", "g_idx")


def _matrix(
    where: str, module: str, parts: Mapping[str, LazyTensor | None], packing: Mapping[str, Any]
) -> dict[str, LazyTensor]:
    awq = packing.get("quant_method") == "awq"
    codes, zeros, scales = (parts[part] for part in PARTS[:3])
    if codes is None or zeros is None or scales is None:
        missing = next(part for part in PARTS if parts[part] is None)
        raise WeightsError(f"{where}.{missing} is missing; a packed matrix needs {PARTS[:3]}")
    if any(len(tensor.shape) != 2 for tensor in (codes, zeros, scales)):
        raise WeightsError(f"{where}: qweight, qzeros and scales must be matrices")
    rows, columns = codes.shape
    inputs, outputs = (rows, columns * PER_WORD) if awq else (rows * PER_WORD, columns)
    size = int(packing.get("group_size", packing.get("q_group_size", 0)))
    groups = inputs // size
    for part, shape in (("scales", (groups, outputs)), ("qzeros", (groups, outputs // PER_WORD))):
        tensor = parts[part]
        if tensor is None or tensor.shape != shape:
            raise WeightsError(
                f"{where}.{part} has shape {tensor and tensor.shape}; expected {shape} beside a "
                f"qweight of {codes.shape} in groups of {size}"
            )
    for part, tensor in (("qweight", codes), ("qzeros", zeros)):
        if tensor.dtype not in (mx.int32, mx.uint32):
            raise WeightsError(
                f"{where}.{part} is {printable(tensor.dtype).removeprefix('mlx.core.')}; expected "
                "32-bit words"
            )
    order = _order(where, parts["g_idx"], inputs, groups)
    first = packing.get("checkpoint_format", packing.get("format", "gptq")) == "gptq" and not awq
    if order is not None:
        load = partial(_ordered, codes, zeros, scales, order, first=first)
        return {f"{module}.weight": LazyTensor((outputs, inputs), scales.dtype, load)}
    grid = (outputs, groups)
    load_codes = partial(_awq_codes if awq else _gptq_codes, codes)
    load_biases = partial(_biases, zeros, scales, awq=awq, first=first)
    return {
        f"{module}.weight": LazyTensor((outputs, inputs // PER_WORD), mx.uint32, load_codes),
        f"{module}.scales": LazyTensor(grid, mx.float32, partial(_scales, scales)),
        f"{module}.biases": LazyTensor(grid, mx.float32, load_biases),
    }


def _order(where: str, order: LazyTensor | None, inputs: int, groups: int) -> mx.array | None:
    """Each input's group; None where they are consecutive."""
    if order is None:
        return None
    if order.shape != (inputs,) or not mx.issubdtype(order.dtype, mx.integer):
        raise WeightsError(
            f"{where}.g_idx: expected {inputs} whole numbers, one an input, got shape "
            f"{order.shape} of {dtype_name(order.dtype)}; get the file again"
        )
    found = np.array(order.load())
    if found.min() < 0 or found.max() >= groups:
        raise WeightsError(
            f"{where}.g_idx: expected groups from 0 to {groups - 1}, got {found.min()} to "
            f"{found.max()}; get the file again"
        )
    usual = np.arange(inputs) // (inputs // groups)
    return None if np.array_equal(found, usual) else mx.array(found)


def _ordered(
    codes: LazyTensor, zeros: LazyTensor, scales: LazyTensor, order: mx.array, *, first: bool
) -> mx.array:
    """The matrix (out, in) whose inputs are in groups of any order."""
    words = codes.load().view(mx.uint32)  # (in / 8, out)
    values = ((words[:, None] >> _shifts()[:, None]) & 15).reshape(-1, words.shape[1])
    starts = _zeros(zeros, _shifts(), first)[order]
    steps = scales.load()
    exact = (values.astype(mx.float32) - starts) * steps.astype(mx.float32)[order]
    return mx.contiguous(exact.astype(steps.dtype).T)


def _gptq_codes(codes: LazyTensor) -> mx.array:
    return mx.contiguous(codes.load().view(mx.uint32).T)


def _awq_codes(codes: LazyTensor) -> mx.array:
    rows = _unpacked(codes, _awq_shifts()).T  # (out, in)
    words = rows.reshape(rows.shape[0], -1, PER_WORD) << _shifts()
    return words.sum(axis=-1)


def _scales(scales: LazyTensor) -> mx.array:
    return mx.contiguous(scales.load().astype(mx.float32).T)


def _biases(zeros: LazyTensor, scales: LazyTensor, *, awq: bool, first: bool) -> mx.array:
    found = _zeros(zeros, _awq_shifts() if awq else _shifts(), first)
    return mx.contiguous((found * -scales.load().astype(mx.float32)).T)


def _zeros(zeros: LazyTensor, shifts: mx.array, first: bool) -> mx.array:
    """Zero points (groups, out)."""
    found = _unpacked(zeros, shifts)
    return ((found + 1) & 15 if first else found).astype(mx.float32)


def _unpacked(words: LazyTensor, shifts: mx.array) -> mx.array:
    """Words (rows, n) to codes (rows, 8 n)."""
    array = words.load().view(mx.uint32)
    return ((array[..., None] >> shifts) & 15).reshape(array.shape[0], -1)


def _shifts() -> mx.array:
    return mx.arange(PER_WORD, dtype=mx.uint32) * 4


def _awq_shifts() -> mx.array:
    """Where each of eight outputs lies in its word."""
    return mx.array([4 * AWQ_ORDER.index(i) for i in range(PER_WORD)], dtype=mx.uint32)
