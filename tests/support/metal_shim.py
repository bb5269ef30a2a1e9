"""Runs kernels written for Metal on a CPU, through the system's C++ compiler."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

COMPILER = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
HEADER = Path(__file__).with_name("metal_shim.h")
NAMES = {mx.float32: "float", mx.float16: "half", mx.bfloat16: "bfloat16_t"}
GUARD = 4096
"""Bytes of NaN before and after each array: read, they spoil the result; written, they show."""


def metal_kernel(
    *, name: str, input_names: Sequence[str], output_names: Sequence[str], source: str
) -> Callable[..., list[mx.array]]:
    """As mx.fast.metal_kernel, for rows of threadgroups; evaluates at once.

    RuntimeError if the source does not compile, if lanes wait at different places, if it writes
    outside its outputs, or if the result depends on the order of the lanes.
    """

    def run(
        *,
        inputs: Sequence[mx.array],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        output_shapes: Sequence[tuple[int, ...]],
        output_dtypes: Sequence[mx.Dtype],
    ) -> list[mx.array]:
        dtypes = [*(array.dtype for array in inputs), *output_dtypes]
        parameters = [
            f"const {NAMES[array.dtype]}* {n}" for array, n in zip(inputs, input_names, strict=True)
        ]
        parameters += [
            f"{NAMES[dtype]}* {n}" for dtype, n in zip(output_dtypes, output_names, strict=True)
        ]
        casts = [f"({NAMES[dtype]}*)arrays[{i}]" for i, dtype in enumerate(dtypes)]
        library = _compile(
            f'#include "{HEADER}"\nstatic void {name}({", ".join(parameters)}) {{\n{source}\n}}\n'
            f"static void body() {{ {name}({', '.join(casts)}); }}\n"
        )
        buffers = [_guarded(_bytes(array)) for array in inputs]
        orders = []
        for backwards in (False, True):
            outputs = [
                _guarded(np.full(int(np.prod(shape)) * dtype.size, 0xFF, np.uint8))
                for shape, dtype in zip(output_shapes, output_dtypes, strict=True)
            ]
            pointers = (ctypes.c_void_p * len(dtypes))(
                *(buffer[GUARD:].ctypes.data for buffer in (*buffers, *outputs))
            )
            groups, lanes = grid[0] // threadgroup[0], threadgroup[0]
            if not library.run(pointers, groups, lanes, backwards):
                raise RuntimeError(f"{name}: lanes of one threadgroup wait at different places")
            if any((b[:GUARD] != 0xFF).any() or (b[-GUARD:] != 0xFF).any() for b in outputs):
                raise RuntimeError(f"{name}: writes outside its outputs")
            orders.append([buffer[GUARD:-GUARD] for buffer in outputs])
        if any((a != b).any() for a, b in zip(*orders, strict=True)):
            raise RuntimeError(f"{name}: the result depends on the order of the lanes")
        return [
            mx.array(data).view(dtype).reshape(shape)
            for data, dtype, shape in zip(orders[0], output_dtypes, output_shapes, strict=True)
        ]

    return run


def _bytes(array: mx.array) -> Any:
    return np.array(array.flatten().view(mx.uint8))


def _guarded(data: Any) -> Any:
    return np.pad(data, GUARD, constant_values=0xFF)


@cache
def _compile(source: str) -> ctypes.CDLL:
    assert COMPILER
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.so")
        options = ["-std=c++17", "-O0", "-fPIC", "-shared", "-w", "-x", "c++", "-", "-o", str(path)]
        run = subprocess.run([COMPILER, *options], input=source, text=True, capture_output=True)
        if run.returncode:
            raise RuntimeError(run.stderr)
        library = ctypes.CDLL(str(path))
    library.run.restype = ctypes.c_bool
    library.run.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_bool]
    return library
