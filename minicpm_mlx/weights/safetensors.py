"""safetensors files: checked by the `safetensors` library, read by MLX, which trusts them."""

from functools import partial
from pathlib import Path

import mlx.core as mx
from safetensors import safe_open

from ..arguments import printable
from ..errors import WeightsError
from .lazy_tensor import LazyTensor, first_bytes

_DTYPES = {
    "BOOL": mx.bool_,
    "U8": mx.uint8,
    "I8": mx.int8,
    "U16": mx.uint16,
    "I16": mx.int16,
    "U32": mx.uint32,
    "I32": mx.int32,
    "U64": mx.uint64,
    "I64": mx.int64,
    "F16": mx.float16,
    "BF16": mx.bfloat16,
    "F32": mx.float32,
}


def read(path: Path) -> dict[str, LazyTensor]:
    """The tensors of a safetensors file by name, none of them read yet.

    Raises WeightsError for anything but a sound file of types MLX computes on everywhere.
    """
    stated = _stated(path)
    for name, (_, kind) in stated.items():
        if kind not in _DTYPES:  # MLX would hand out float8 as uint8
            raise WeightsError(
                f"{path}: tensor '{printable(name)}': expected one of {', '.join(_DTYPES)}, "
                f"found {kind}; convert it to BF16"
            )
    arrays = _arrays(path)
    tensors = {}
    for name, (shape, kind) in stated.items():
        found = arrays.get(name)
        if found is None or (found.shape, found.dtype) != (shape, _DTYPES[kind]):
            raise WeightsError(
                f"{path}: tensor '{printable(name)}': expected {kind} {shape} as the header says, "
                f"found {'nothing' if found is None else f'{found.dtype} {found.shape}'} "
                "in MLX; save the file again"
            )
        tensors[name] = LazyTensor(shape, found.dtype, partial(_take, arrays, name, path))
    return tensors


def metadata(path: Path) -> dict[str, str]:
    """The words in the header of a sound safetensors file."""
    with safe_open(path, framework="numpy") as file:
        return dict(file.metadata() or {})


def _stated(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of each tensor, after the library has checked header, sizes and offsets."""
    first_bytes(path)
    try:
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {k: (tuple(s.get_shape()), s.get_dtype()) for k, s in slices.items()}
    except Exception as error:  # SafetensorError, OSError, and what else its Rust code may raise
        raise _unsound(path, error) from error


def _arrays(path: Path) -> dict[str, mx.array]:
    """MLX's own lazy arrays: each reads its bytes when first evaluated."""
    try:
        arrays = mx.load(str(path), format="safetensors")
    except Exception as error:
        raise _unsound(path, error) from error
    assert isinstance(arrays, dict)
    return arrays


def _take(arrays: dict[str, mx.array], name: str, path: Path) -> mx.array:
    # Popped, since MLX would keep the bytes as long as the array lives; a second call opens anew.
    return arrays.pop(name) if name in arrays else read(path)[name].load()


def _unsound(path: Path, error: Exception) -> WeightsError:
    return WeightsError(
        f"{path}: expected a sound safetensors file, found: {printable(error)}; download it again"
    )
