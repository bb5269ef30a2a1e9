"""GPU kernels of our own, each beside its reference in plain MLX.

A kernel is chosen only if it compiled on this machine and agreed there with its reference;
MINICPM_MLX_OWN_KERNELS=0 switches all of them off. A body is written with Metal's names and is
compiled for CUDA with a header that defines those names.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import mlx.core as mx

from ... import device

SWITCH = "MINICPM_MLX_OWN_KERNELS"
"""Environment variable; 0 switches all kernels off."""

AddNorm = Callable[[mx.array, mx.array, mx.array], tuple[mx.array, mx.array]]
"""(x, delta, weight) to x + delta and its RMSNorm; x and delta (..., width), weight (width,)."""

TYPES = {
    mx.float32: ("float", "float"),
    mx.float16: ("half", "__half"),
    mx.bfloat16: ("bfloat16_t", "__nv_bfloat16"),
}
"""Number types in Metal and in CUDA."""

TOLERANCES = {mx.float32: 1e-5, mx.float16: 2.0**-9, mx.bfloat16: 2.0**-6}
"""Relative: two units in the last place of 16 bits. Sums may be added up in another order."""

SMALL = 1e-2
"""Smaller numbers are compared as if they were this large: float16 has no more digits for them."""

WIDTHS = (576, 1024, 1536, 2048, 2304, 2560, 4096)
"""Hidden sizes of the published models and of the demo."""

CUDA_NAMES = """
#define threadgroup __shared__
#define thread_position_in_threadgroup threadIdx
#define threadgroup_position_in_grid blockIdx
#define threadgroup_barrier(memory) __syncthreads()
__device__ inline float simd_sum(float value) {
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffff, value, step);
  return value;
}
"""


@dataclass(frozen=True)
class OwnKernel:
    """A kernel's body and its reference in plain MLX, which take and return the same arrays."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    reference: Callable[..., tuple[mx.array, ...]]
    body: str
    """Uses T, the number type, and the constants it is compiled with."""

    def compile(self, dtype: mx.Dtype, constants: dict[str, int | float]) -> Any:
        """Return MLX's kernel, which a GPU's compiler sees once it is first evaluated."""
        on_metal = mx.metal.is_available()
        # Constants are part of the source, since MLX takes longer to launch a template.
        lines = [f"using T = {TYPES[dtype][0 if on_metal else 1]};"]
        lines += [
            f"constexpr int {name} = {value};"
            if isinstance(value, int)
            else f"constexpr float {name} = {value!r}f;"
            for name, value in constants.items()
        ]
        values = [value if isinstance(value, int) else value.hex() for value in constants.values()]
        label = "_".join(map(str, [self.name, TYPES[dtype][0], *values]))
        options: dict[str, Any] = {
            "name": "".join(c if c.isalnum() else "_" for c in label),
            "input_names": self.inputs,
            "output_names": self.outputs,
            "source": "\n".join([*lines, self.body]),
        }
        if on_metal:
            return mx.fast.metal_kernel(**options)
        return mx.fast.cuda_kernel(**options, header=CUDA_NAMES)


def add_norm_reference(
    x: mx.array, delta: mx.array, weight: mx.array, eps: float
) -> tuple[mx.array, mx.array]:
    y = x + delta
    return y, mx.fast.rms_norm(y, weight, eps)


ADD_NORM = OwnKernel(
    name="add_norm",
    inputs=("x", "delta", "weight"),
    outputs=("y", "normed"),
    reference=add_norm_reference,
    body="""
  // One threadgroup a row; a lane keeps its PER neighbouring columns in registers.
  threadgroup float sums[32];
  const int lane = thread_position_in_threadgroup.x;
  const size_t row = size_t(threadgroup_position_in_grid.x) * WIDTH;
  float values[PER];
  float total = 0;
  for (int i = 0; i < PER; i++) {
    const int column = lane * PER + i;
    if (column < WIDTH) {
      const T sum = T(float(x[row + column]) + float(delta[row + column]));
      y[row + column] = sum;
      values[i] = float(sum);  // of the rounded sum, as the reference
      total += values[i] * values[i];
    }
  }
  total = simd_sum(total);
  if (lane % 32 == 0) sums[lane / 32] = total;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  total = simd_sum(lane % 32 < LANES / 32 ? sums[lane % 32] : 0.0f);
  const float scale = 1.0f / sqrt(total / WIDTH + EPS);
  for (int i = 0; i < PER; i++) {
    const int column = lane * PER + i;
    if (column < WIDTH) normed[row + column] = T(float(weight[column]) * (values[i] * scale));
  }
""",
)


@dataclass(frozen=True)
class KernelCheck:
    """Whether a kernel of our own is used on this device."""

    name: str
    chosen: bool
    reason: str | None = None
    """Why it is not, in one line."""


def checks() -> list[KernelCheck]:
    """Check each kernel on this device, in every dtype and at the published models' widths."""
    faults = (add_norm_fault(width, dtype, 1e-5) for dtype in TYPES for width in WIDTHS)
    reason = unavailable() or next(filter(None, faults), None)
    return [KernelCheck(ADD_NORM.name, reason is None, reason)]


def add_norm(width: int, dtype: mx.Dtype, eps: float) -> AddNorm:
    """Return the fastest residual sum and norm of rows of `width`; it may have no gradient."""
    if unavailable() or dtype not in TYPES or add_norm_fault(width, dtype, eps):
        return partial(add_norm_reference, eps=eps)
    return add_norm_kernel(width, dtype, eps)


def add_norm_kernel(width: int, dtype: mx.Dtype, eps: float) -> AddNorm:
    """Return the kernel, unchecked; arrays of another dtype than `dtype` take the reference."""
    # As many lanes as MLX's own norm has: 4 columns each, up to the largest threadgroup.
    lanes = min(-(-width // 128) * 32, 1024)
    constants = {"WIDTH": width, "LANES": lanes, "PER": -(-width // lanes), "EPS": float(eps)}
    kernel = ADD_NORM.compile(dtype, constants)
    dtypes, threadgroup = [dtype, dtype], (lanes, 1, 1)

    def run(x: mx.array, delta: mx.array, weight: mx.array) -> tuple[mx.array, mx.array]:
        if not x.dtype == delta.dtype == weight.dtype == dtype:
            return add_norm_reference(x, delta, weight, eps)
        shape = x.shape
        y, normed = kernel(
            inputs=[x, delta, weight],
            grid=(x.size // width * lanes, 1, 1),
            threadgroup=threadgroup,
            output_shapes=[shape, shape],
            output_dtypes=dtypes,
        )
        return y, normed

    return run


def unavailable() -> str | None:
    """Why no kernel can be used here; None where they can."""
    if os.environ.get(SWITCH) == "0":
        return f"switched off by {SWITCH}=0"
    return "no GPU" if device.on_cpu() else None


@cache
def add_norm_fault(width: int, dtype: mx.Dtype, eps: float) -> str | None:
    """How the kernel fails on this device, in one line; None where it agrees with its reference."""
    where = f"in {str(dtype).removeprefix('mlx.core.')}, {width} wide"
    keys = mx.random.split(mx.random.key(width), 3)
    weight = 1 + 0.1 * mx.random.normal((width,), key=keys[0])
    for rows in (1, 37):
        wide = [4 * mx.random.normal((1, rows, width), key=key) for key in keys[1:]]
        x, delta, scales = (array.astype(dtype) for array in (*wide, weight))
        expected = add_norm_reference(x, delta, scales, eps)
        try:
            found = add_norm_kernel(width, dtype, eps)(x, delta, scales)
            mx.eval(found)
        except (RuntimeError, ValueError) as error:
            return f"did not compile {where}: {' '.join(str(error).split())[:200]}"
        for one, other in zip(found, expected, strict=True):
            one, other = one.astype(mx.float32), other.astype(mx.float32)
            gap, size = mx.abs(one - other), mx.maximum(mx.abs(other), SMALL)
            if not (gap <= TOLERANCES[dtype] * size).all().item():  # NaN is no agreement
                return f"differed by {gap.max().item():.3g} from its reference {where}"
    return None
