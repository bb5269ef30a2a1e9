"""Converts between GGUF's tensor types and MLX's.

Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0 blocks hold 32 weights, a float16 scale and (Q4_1, Q5_1) a float16
minimum: the same as MLX's affine groups of 32, in another order. Q4_K and Q5_K hold eight such
groups, whose scales and minimums are products of a float16 and a 6-bit number; here they are
rounded to float16, at most 2^-11 of each. All codes stay as they are. Q4_0, Q4_1 and Q8_0 are
written as well, and MLX's 2 bits go into them. The other packed kinds become float16: Q6_K, Q3_K
and Q2_K have groups of 16, which MLX does not have.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from ...errors import WeightsError
from ...model.config_sections import Quantization
from ..lazy_tensor import LazyTensor
from .header import Bytes, GgufTensor
from .package import library
from .tensor_names import Order

GROUP = 32
"""Weights a block, and a group."""

BITS = {"Q4_0": 4, "Q4_1": 4, "Q8_0": 8}
"""Packed types that are written."""
PACKED_BITS = BITS | {"Q5_0": 5, "Q5_1": 5, "Q4_K": 4, "Q5_K": 5}
"""Types that MLX can keep packed."""
PLAIN = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}
UNPACKED = (
    *("Q2_K", "Q3_K", "Q6_K", "IQ4_NL", "IQ4_XS"),
    *("TQ1_0", "TQ2_0"),
)
"""Types that are unpacked when read."""

SIZES = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34, "Q5_0": 22, "Q5_1": 24, "Q4_K": 144, "Q5_K": 176}
"""Bytes a block."""
HEAD = {"Q4_0": 2, "Q4_1": 4, "Q8_0": 2, "Q5_0": 2, "Q5_1": 4, "Q4_K": 4, "Q5_K": 4}
"""Those of scale and minimum, which come first."""
K_SCALES = 12
"""Bytes after them in Q4_K and Q5_K: eight scales and eight minimums of 6 bits."""

CHUNK = 1 << 22
"""Weights unpacked or packed at a time: intermediate arrays take eight times their size."""

Floats = npt.NDArray[np.floating[Any]]


# From GGUF


def parts_of(tensor: GgufTensor, module: str, part: str, order: Order) -> dict[str, LazyTensor]:
    """A tensor of a file under the checkpoint's names, its rows put in `order` when loaded.

    Raises WeightsError for a kind this library does not know.
    """
    kind, shape = tensor.kind, tensor.shape
    if kind in PACKED_BITS and len(shape) == 2 and part == "weight":
        rows, width = shape
        groups = (rows, width // GROUP)
        return {
            f"{module}.weight": LazyTensor(
                (rows, width * PACKED_BITS[kind] // 32), mx.uint32, partial(_codes, tensor, order)
            ),
            f"{module}.scales": LazyTensor(groups, mx.float16, partial(_scales, tensor, order)),
            f"{module}.biases": LazyTensor(groups, mx.float16, partial(_biases, tensor, order)),
        }
    known = [*PLAIN, *PACKED_BITS, *UNPACKED]
    if kind not in known:
        raise WeightsError(f"{tensor.name} is {kind}; expected one of {', '.join(known)}")
    load = partial(_plain if kind in PLAIN else _unpacked, tensor, order)
    return {f"{module}.{part}": LazyTensor(shape, PLAIN.get(kind, mx.float16), load)}


def _codes(tensor: GgufTensor, order: Order) -> mx.array:
    """A row's codes in a stream of 32-bit words, lowest bits first."""
    bits, (rows, width) = PACKED_BITS[tensor.kind], tensor.shape
    packed = np.empty((rows, width * bits // 8), np.uint8)
    for part in _chunks(rows, width):
        codes = _block_codes(tensor.kind, _blocks(tensor.kind, tensor.raw[part]))
        packed[part] = _bit_stream(codes.reshape(len(codes), width), bits)
    return mx.array(np.ascontiguousarray(order(packed)).view(np.uint32))


def _block_codes(kind: str, blocks: Bytes) -> Bytes:
    """Codes (rows, blocks, weights) from 0 on."""
    rest: Bytes = blocks[..., HEAD[kind] :]
    if kind == "Q8_0":
        return rest ^ np.uint8(128)  # signed there
    if kind in ("Q4_K", "Q5_K"):
        fifth, rest = np.split(rest[..., K_SCALES:], [-128], axis=-1)
        # Each 32 bytes hold two groups, one in the low halves and one in the high.
        pairs = rest.reshape(*rest.shape[:-1], 4, 1, GROUP)
        halves: Bytes = (pairs >> np.array([[0], [4]], np.uint8)) & np.uint8(15)
        codes = halves.reshape(*rest.shape[:-1], 8, GROUP)
        if kind == "Q5_K":  # bit g of byte j is the fifth of weight j in group g
            groups = np.arange(8, dtype=np.uint8)[:, None]
            codes |= ((fifth[..., None, :] >> groups) & np.uint8(1)) << np.uint8(4)
        return codes.reshape(*rest.shape[:-1], 2 * rest.shape[-1])
    fifth, rest = np.split(rest, [-16], axis=-1)
    # Byte j holds weight j low and weight j + 16 high.
    codes = np.concatenate([rest & np.uint8(15), rest >> np.uint8(4)], axis=-1)
    if fifth.shape[-1]:
        codes |= np.unpackbits(fifth, axis=-1, bitorder="little") << np.uint8(4)
    return codes


def _bit_stream(codes: Bytes, bits: int) -> Bytes:
    if bits == 8:
        return codes
    if bits == 4:
        pairs: Bytes = codes[:, ::2] | (codes[:, 1::2] << np.uint8(4))
        return pairs
    single = (codes[..., None] >> np.arange(bits, dtype=np.uint8)) & np.uint8(1)
    return np.packbits(single.reshape(len(codes), -1), axis=1, bitorder="little")


def _scales(tensor: GgufTensor, order: Order) -> mx.array:
    return _in_float16(tensor, order(_grid(tensor)[0]))


def _biases(tensor: GgufTensor, order: Order) -> mx.array:
    return _in_float16(tensor, order(_grid(tensor)[1]))


def _grid(tensor: GgufTensor) -> tuple[Floats, Floats]:
    """Scale and bias of each group, (rows, groups), exact in float32."""
    kind, blocks = tensor.kind, _blocks(tensor.kind, tensor.raw)
    heads = np.ascontiguousarray(blocks[..., : HEAD[kind]]).view("<f2").astype(np.float32)
    scales, last = heads[..., 0], heads[..., -1]
    with np.errstate(all="ignore"):  # a damaged file's scales are what they are
        if kind in ("Q4_K", "Q5_K"):
            six_bits = np.ascontiguousarray(blocks[..., HEAD[kind] :][..., :K_SCALES])
            steps, minimums = library().quants.Q4_K.get_scale_min(six_bits.reshape(-1, K_SCALES))
            rows = len(blocks)
            steps = scales.reshape(-1, 1) * steps.astype(np.float32)
            minimums = last.reshape(-1, 1) * minimums.astype(np.float32)
            return steps.reshape(rows, -1), -minimums.reshape(rows, -1)
        if HEAD[kind] == 4:
            return scales, last
        return scales, scales * -(1 << PACKED_BITS[kind] >> 1)


def _in_float16(tensor: GgufTensor, values: Floats) -> mx.array:
    with np.errstate(over="ignore"):
        rounded = values.astype(np.float16)
    if (np.isinf(rounded) & np.isfinite(values)).any():
        raise WeightsError(
            f"{tensor.name} has weights beyond float16, which this library keeps them in; is the "
            "file damaged?"
        )
    return mx.array(rounded)


def _blocks(kind: str, raw: Bytes) -> Bytes:
    """(rows, blocks, bytes)"""
    return raw.reshape(len(raw), -1, SIZES[kind])


def _plain(tensor: GgufTensor, order: Order) -> mx.array:
    as_numbers = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}[tensor.kind]
    rows = np.ascontiguousarray(tensor.raw).view(as_numbers).reshape(tensor.shape)
    array = mx.array(order(rows))
    return array.view(mx.bfloat16) if tensor.kind == "BF16" else array


def _unpacked(tensor: GgufTensor, order: Order) -> mx.array:
    constants = library()
    kind = constants.GGMLQuantizationType[tensor.kind]
    dense = np.empty((len(tensor.raw), tensor.shape[-1]), np.float16)
    with np.errstate(all="ignore"):  # a damaged file's scales are what they are
        for rows in _chunks(len(dense), dense.shape[1]):
            dense[rows] = constants.quants.dequantize(tensor.raw[rows], kind)
    return mx.array(order(dense.reshape(tensor.shape)))


# To GGUF


def in_four_bits(parts: Mapping[str, LazyTensor], packing: Quantization) -> dict[str, LazyTensor]:
    """An affine matrix of 2 bits as one of 4 bits in groups of 32, with the same values.

    Ternary groups, whose biases are -scales, take the codes and biases that Q4_0 has.
    """
    repeats = packing.group_size // GROUP
    scales, biases = (mx.repeat(parts[p].load(), repeats, axis=-1) for p in ("scales", "biases"))
    shift = 7 if mx.array_equal(biases, -scales).item() else 0
    biases = scales * -8 if shift else biases
    codes = parts["weight"]
    shape = (codes.shape[0], codes.shape[1] * 2)
    return {
        "weight": LazyTensor(shape, mx.uint32, partial(_four_bit_codes, codes, shift)),
        "scales": LazyTensor.of(scales),
        "biases": LazyTensor.of(biases),
    }


def _four_bit_codes(codes: LazyTensor, shift: int) -> mx.array:
    quarters = np.array(codes.load()).view(np.uint8)[..., None]
    wide = ((quarters >> np.array([0, 2, 4, 6], np.uint8)) & 3) + np.uint8(shift)
    packed = wide[..., ::2] | (wide[..., 1::2] << 4)
    return mx.array(packed.reshape(len(packed), -1).view(np.uint32))


def kept_kind(packing: Quantization, scales: mx.array, biases: mx.array) -> str | None:
    """The type whose blocks hold the codes of a packed matrix unchanged, or None."""
    if packing.mode != "affine" or packing.group_size != GROUP or packing.bits not in (4, 8):
        return None
    if mx.array_equal(biases, scales * -(1 << packing.bits >> 1)).item():
        return "Q4_0" if packing.bits == 4 else "Q8_0"
    return "Q4_1" if packing.bits == 4 else None


def blocks_of(kind: str, codes: mx.array, scales: mx.array, biases: mx.array) -> Bytes:
    """A packed matrix as blocks of `kind`, (rows, bytes); its scales are rounded to float16."""
    rows, groups = scales.shape
    bytes_of = np.array(codes).view(np.uint8).reshape(rows, groups, -1)
    if kind == "Q8_0":
        packed = bytes_of ^ 128
    else:
        spread = np.stack([bytes_of & 15, bytes_of >> 4], axis=-1).reshape(rows, groups, GROUP)
        packed = spread[..., :16] | (spread[..., 16:] << 4)
    heads = [scales, biases][: HEAD[kind] // 2]
    halves = [np.array(head.astype(mx.float16))[..., None].view(np.uint8) for head in heads]
    return np.concatenate([*halves, packed], axis=-1).reshape(rows, -1)


def rounded(kind: str, matrix: mx.array) -> Bytes:
    """Floats (rows, width) in `kind`, as bytes (rows, bytes): plain, or rounded to the nearest.

    What float16 cannot hold becomes infinite; see `finite`.
    """
    if kind in PLAIN:
        plain = matrix.astype(PLAIN[kind])
        # NumPy has no bfloat16.
        return np.array(plain.view(mx.uint16) if kind == "BF16" else plain).view(np.uint8)
    constants = library()
    rows, width = matrix.shape
    encoded = np.empty((rows, width // GROUP * SIZES[kind]), np.uint8)
    with np.errstate(all="ignore"):
        for part in _chunks(rows, width):
            dense = np.array(matrix[part].astype(mx.float32))
            encoded[part] = constants.quants.quantize(dense, constants.GGMLQuantizationType[kind])
    return encoded


def finite(kind: str, encoded: Bytes) -> bool:
    """Whether the numbers that a kind holds in float16 are all finite."""
    if kind == "F16":
        return bool(np.isfinite(encoded.view("<f2")).all())
    if kind not in BITS:
        return True
    blocks = encoded.reshape(len(encoded), -1, SIZES[kind])[..., : HEAD[kind]]
    return bool(np.isfinite(np.ascontiguousarray(blocks).view("<f2")).all())


def _chunks(rows: int, width: int) -> Iterator[slice]:
    """Slices of rows, of some `CHUNK` weights each."""
    step = max(1, CHUNK // max(width, 1))
    return (slice(start, start + step) for start in range(0, rows, step))
