"""torch.save's zip files (`pytorch_model.bin`), read without torch and without unpickling.

Such a file holds uncompressed entries: `<prefix>/data.pkl`, a pickle of {name: tensor}, and one
`<prefix>/data/<key>` a storage, which the pickle's tensors view by key, offset, sizes and strides.

A pickle is a program. Even an Unpickler that refuses every global takes 64 GB for one memo index,
or overflows the C stack hashing nested tuples. So `_interpret` runs the few opcodes torch.save
writes, on inert values: what a file names is compared with a list, never imported or called.
"""

import math
import pickletools
import struct
import zipfile
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from ..arguments import printable
from ..errors import WeightsError
from .lazy_tensor import LazyTensor, first_bytes

_STORAGES = {
    "torch.FloatStorage": mx.float32,
    "torch.HalfStorage": mx.float16,
    "torch.BFloat16Storage": mx.bfloat16,
    "torch.LongStorage": mx.int64,
    "torch.IntStorage": mx.int32,
    "torch.ShortStorage": mx.int16,
    "torch.CharStorage": mx.int8,
    "torch.ByteStorage": mx.uint8,
    "torch.BoolStorage": mx.bool_,
}
_CALLABLES = {
    "collections.OrderedDict",
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_tensor_v2",
}
_MAX_PICKLE = 4 << 20  # about 40,000 tensors; hostile bytes can grow a hundredfold in memory
_MAX_DIMS = 32  # numpy 1's limit
_MAX_SIZE = 2**31 - 1  # MLX counts a dimension in 32 bits
_RESAVE = "load it with torch and save it again with safetensors.torch.save_file"

_Entries = dict[str, tuple[int, int]]
"""Name -> first byte in the file, length in bytes."""


class _Refused(ValueError):
    """A fault of the file; `read` adds its path."""


class _Global(str):
    """`module.name`, as a pickle named it."""


class _Storage(NamedTuple):
    kind: str
    key: str
    numel: Any


class _Tensor(NamedTuple):
    """A tensor as the pickle states it; the fields may hold anything until `_checked`."""

    storage: _Storage
    offset: Any
    shape: Any
    stride: Any


def read(path: Path) -> dict[str, LazyTensor]:
    """The tensors of a torch.save'd state dict by name, none of them read yet.

    Raises WeightsError for anything but plain tensors whose every element lies in the file.
    """
    head = first_bytes(path)
    try:
        entries = _entries(path)
        prefix = _prefix(entries)
        pickle = _pickle(path, entries, prefix)
        return {
            name: _checked(path, name, view, entries, prefix)
            for name, view in _state_dict(_interpret(pickle)).items()
        }
    except _Refused as error:
        raise WeightsError(f"{path}: {error}") from error
    except Exception as error:  # zipfile and pickletools promise no particular type
        if head.startswith(b"\x80"):
            raise WeightsError(
                f"{path}: expected torch's zip format, found its legacy format; {_RESAVE}"
            ) from error
        raise WeightsError(
            f"{path}: expected a file of torch.save, found damage "
            f"({type(error).__name__}: {printable(error)}); download it again"
        ) from error


def _entries(path: Path) -> _Entries:
    """Where each entry's bytes are."""
    length = path.stat().st_size
    entries = {}
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        if any(name.endswith("/constants.pkl") for name in archive.namelist()):
            raise _Refused(f"expected a state dict, found a TorchScript program; {_RESAVE}")
        for info in archive.infolist():
            file.seek(info.header_offset)
            header = file.read(30)
            start = info.header_offset + 30 + sum(struct.unpack("<HH", header[26:]))
            plain = info.compress_type == zipfile.ZIP_STORED and not info.flag_bits & 1
            if not plain or header[:4] != b"PK\3\4" or start + info.file_size > length:
                raise _Refused(
                    f"entry '{printable(info.filename)}': expected uncompressed bytes inside the "
                    f"file, found compressed, encrypted or missing ones; {_RESAVE}"
                )
            entries[info.filename] = start, info.file_size
    return entries


def _prefix(entries: _Entries) -> str:
    found = [name.split("/")[0] for name in entries if name.split("/")[1:] == ["data.pkl"]]
    if len(found) != 1:
        raise _Refused(f"expected one <prefix>/data.pkl inside, found {len(found)}; {_RESAVE}")
    return found[0]


def _pickle(path: Path, entries: _Entries, prefix: str) -> bytes:
    start, length = entries[f"{prefix}/data.pkl"]
    order, order_length = entries.get(f"{prefix}/byteorder", (0, 0))
    if length > _MAX_PICKLE:
        raise _Refused(f"expected a data.pkl of at most {_MAX_PICKLE} bytes, found {length}")
    with path.open("rb") as file:
        file.seek(order)
        if file.read(min(order_length, 16)) not in (b"", b"little"):
            raise _Refused(f"expected little-endian bytes, found another order; {_RESAVE}")
        file.seek(start)
        return file.read(length)


def _interpret(pickle: bytes) -> object:
    """Interpret a pickle of str, int, float, bool, None, tuple, dict, _Storage and _Tensor."""
    arg: Any
    stack: list[Any] = []
    outer: list[list[Any]] = []  # the stacks below each open mark
    memo: dict[int, Any] = {}
    for opcode, arg, _ in pickletools.genops(pickle):
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode.name == "NEWTRUE")
            case "BINUNICODE" | "SHORT_BINUNICODE" | "BINFLOAT":
                stack.append(arg)
            case "BININT" | "BININT1" | "BININT2" | "LONG1":
                stack.append(arg)
            case "BINPUT" | "LONG_BINPUT":
                memo[arg] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[arg])
            case "MARK":
                outer.append(stack)
                stack = []
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(opcode.name[-1])
                stack[-count:] = [tuple(stack[-count:])]
            case "TUPLE":
                items, stack = tuple(stack), outer.pop()
                stack.append(items)
            case "EMPTY_DICT":
                stack.append({})
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                _update(stack[-1], [key, value])
            case "SETITEMS":
                pairs, stack = stack, outer.pop()
                _update(stack[-1], pairs)
            case "GLOBAL":
                stack.append(_allowed(arg.replace(" ", ".")))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                _require_names(module, name)
                stack.append(_allowed(f"{module}.{name}"))
            case "BINPERSID":
                stack.append(_storage(stack.pop()))
            case "REDUCE":
                args, function = stack.pop(), stack.pop()
                stack.append(_reduce(function, args))
            case "BUILD":  # OrderedDict's attributes: a state dict's _metadata
                stack.pop()
                _update(stack[-1], [])
            case "STOP":
                return stack.pop()
            case other:
                raise _Refused(
                    f"expected a dict of tensors, found the pickle opcode {other}; {_RESAVE}"
                )
    raise AssertionError("genops raises where STOP is missing")


def _update(target: object, pairs: list[Any]) -> None:
    _require_names(*pairs[::2])
    if not isinstance(target, dict):
        raise _Refused(f"expected a dict, found {type(target).__name__}; {_RESAVE}")
    target.update(zip(pairs[::2], pairs[1::2], strict=True))


def _require_names(*values: object) -> None:
    # Nothing but str is hashed or formatted: a tuple may be too deep for either.
    for value in values:
        if type(value) is not str:
            raise _Refused(f"expected a name, found {type(value).__name__}; {_RESAVE}")


def _allowed(name: str) -> _Global:
    if name in _CALLABLES or (name.startswith("torch.") and name.endswith("Storage")):
        return _Global(name)
    raise _Refused(
        f"expected tensors alone, found a reference to {printable(name)}, which was not run; "
        "do not trust this file, or save its state dict again as safetensors"
    )


def _storage(pid: object) -> _Storage:
    match pid:
        case ("storage", _Global() as kind, str() as key, str(), numel):
            return _Storage(kind, key, numel)
    raise _Refused(f"expected storages, found another persistent object; {_RESAVE}")


def _reduce(function: object, args: object) -> object:
    """The result of torch's function, for the listed ones, by name, with arguments that fit."""
    match function, args:
        case _Global("collections.OrderedDict"), ():
            return {}
        case _Global("torch._utils._rebuild_parameter"), (_Tensor() as view, _, _):
            return view
        case (
            _Global("torch._utils._rebuild_tensor_v2"),
            (_Storage() as storage, offset, shape, stride, _, _, *_),
        ):
            return _Tensor(storage, offset, shape, stride)
    raise _Refused(f"expected tensors as torch.save writes them, found another call; {_RESAVE}")


def _state_dict(value: object) -> dict[str, object]:
    if isinstance(value, dict) and isinstance(value.get("state_dict"), dict):
        value = value["state_dict"]  # a training checkpoint
    if not isinstance(value, dict):
        raise _Refused(
            f"expected a dict of tensors, found {type(value).__name__.strip('_')}; {_RESAVE}"
        )
    return value


def _checked(path: Path, name: str, view: object, entries: _Entries, prefix: str) -> LazyTensor:
    """The tensor, once every element is known to lie in its storage and the storage in the file."""
    try:
        if not isinstance(view, _Tensor):
            raise _Refused(f"expected a tensor, found {type(view).__name__}")
        (kind, key, numel), offset, shape, stride = view
        if kind not in _STORAGES:
            raise _Refused(
                f"expected 16 or 32-bit floats, integers or bools, found {printable(kind)}; cast it"
            )
        if not isinstance(shape, tuple) or not isinstance(stride, tuple):
            raise _Refused("expected tuples for its sizes and strides")
        if len(shape) != len(stride) or len(shape) > _MAX_DIMS:
            raise _Refused(f"expected as many sizes as strides, at most {_MAX_DIMS}")
        if not all(type(n) is int and n >= 0 for n in (numel, offset, *shape, *stride)):
            raise _Refused("expected whole sizes, strides and offset of 0 or more")
        dtype = _STORAGES[kind]
        start, length = entries.get(f"{prefix}/data/{key}", (0, -1))
        if numel * dtype.size > length:
            found = "none" if length < 0 else f"{length} bytes"
            raise _Refused(f"expected a storage of {printable(numel)} elements, found {found}")
        if offset + _span(shape, stride) > numel or math.prod(shape) > numel:
            raise _Refused(f"expected a view of its {numel} elements, found {printable(shape)}")
        if max(shape, default=0) > _MAX_SIZE:
            raise _Refused(f"expected sizes of at most {_MAX_SIZE}, found {printable(shape)}")
    except _Refused as error:
        raise _Refused(f"tensor '{printable(name)}': {error}; {_RESAVE}") from error
    first = start + offset * dtype.size
    return LazyTensor(shape, dtype, partial(_load, path, name, dtype, first, shape, stride))


def _span(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Elements from a view's first to its last, both included."""
    steps = zip(shape, stride, strict=True)
    return 0 if 0 in shape else 1 + sum((size - 1) * step for size, step in steps)


def _load(
    path: Path,
    name: str,
    dtype: mx.Dtype,
    first: int,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
) -> mx.array:
    if 0 in shape:
        return mx.zeros(shape, dtype)
    # Mapped, not read: one copy, into MLX's memory. As unsigned integers: numpy has no bfloat16.
    raw = np.dtype(f"<u{dtype.size}")
    try:
        flat = np.memmap(path, raw, "r", offset=first, shape=(_span(shape, stride),))
    except (OSError, ValueError) as error:
        raise WeightsError(
            f"{path}: tensor '{printable(name)}': expected the file unchanged since it was opened, "
            f"found: {printable(error)}; download it again"
        ) from error
    view = np.lib.stride_tricks.as_strided(flat, shape, [step * dtype.size for step in stride])
    bits = mx.array(np.require(view, requirements=["C", "A"]))
    return bits.astype(dtype) if dtype == mx.bool_ else bits.view(dtype)
