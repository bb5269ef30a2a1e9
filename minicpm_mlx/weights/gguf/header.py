"""Reads the header of a GGUF file: its metadata and the place of each tensor.

The `gguf` package's GGUFReader trusts the lengths in a file (a few wrong bytes cost hours or all
memory) and takes four seconds for the demo's vocabulary. Here a length is checked against the rest
of the file before it is used, so time and memory stay in proportion to the file's size.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...arguments import printable
from ...errors import WeightsError
from ..lazy_tensor import first_bytes
from .package import library

VERSIONS = (2, 3)
"""Of the format; 1 had shorter lengths and is long gone."""

SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
"""struct's letter for each value type."""
STRING, ARRAY = 8, 9

DIMENSIONS = 4
"""Most that a tensor has."""

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class GgufTensor:
    """A tensor of the file."""

    name: str
    """Its name in the file."""
    kind: str
    """GGML type: F32, Q8_0, …"""
    shape: tuple[int, ...]
    """Sizes, rows first; the file states them the other way round."""
    raw: Bytes
    """(rows, bytes), a view of the file."""


@dataclass(frozen=True, kw_only=True)
class GgufFile:
    """A GGUF file, checked to be whole."""

    path: Path
    metadata: dict[str, Any]
    """Its keys and values: numbers, truths, texts and lists of one of them."""
    tensors: dict[str, GgufTensor]
    """By their names in the file."""


def read_header(path: Path) -> GgufFile:
    """The metadata and the tensors of a GGUF file; nothing of the tensors' data is read.

    Raises WeightsError for what is damaged, cut short, split into several files or of another
    format, and MissingPackageError without the `gguf` package.
    """
    first_bytes(path)
    try:
        data = np.memmap(path, dtype=np.uint8, mode="r")
        file = _read(path, data)
    except (struct.error, ValueError, OverflowError, OSError) as error:
        reason = "it ends too early" if isinstance(error, struct.error) else printable(error)
        raise WeightsError(f"{path}: not a readable GGUF file ({reason}); get it again") from None
    parts = file.metadata.get("split.count", 1)
    if parts != 1:
        raise WeightsError(
            f"{path}: one of {printable(parts)} parts of a GGUF file; join them with llama.cpp's "
            "llama-gguf-split --merge"
        )
    return file


def _read(path: Path, data: npt.NDArray[np.uint8]) -> GgufFile:
    cursor = _Cursor(data)
    if cursor.bytes(4) != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    version = cursor.number("I")
    if version not in VERSIONS:
        order = ", of a big-endian machine" if version & 0xFFFF == 0 else ""
        raise ValueError(f"version {version}{order}; expected {VERSIONS[0]} or {VERSIONS[1]}")
    tensors, keys = cursor.number("Q"), cursor.number("Q")
    metadata: dict[str, Any] = {}
    for _ in range(keys):
        key = cursor.text()
        if key in metadata:
            raise ValueError(f"{key} is there twice")
        metadata[key] = cursor.value(cursor.number("I"))
    stated = [cursor.tensor() for _ in range(tensors)]
    return GgufFile(
        path=path, metadata=metadata, tensors=_placed(stated, metadata, data, cursor.at)
    )


class _Cursor:
    """Reads a file from its start; beyond its end is a struct.error."""

    def __init__(self, data: npt.NDArray[np.uint8]) -> None:
        self.data = data.data
        self.at = 0
        constants = library()
        self.kinds = {kind.value: kind.name for kind in constants.GGMLQuantizationType}

    def bytes(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise struct.error
        found = self.data[self.at : self.at + count].tobytes()
        self.at += count
        return found

    def number(self, letter: str) -> Any:
        (found,) = struct.unpack_from(f"<{letter}", self.data, self.at)
        self.at += struct.calcsize(f"<{letter}")
        return found

    def text(self) -> str:
        return self.bytes(self.number("Q")).decode()

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            item, count = self.number("I"), self.number("Q")
            if item == STRING:
                return self._texts(count)
            letter = _letter(item)
            size = struct.calcsize(f"<{letter}")
            return np.frombuffer(self.bytes(count * size), f"<{letter}").tolist()
        return self.number(_letter(kind))

    def _texts(self, count: int) -> list[str]:
        if count * 8 > len(self.data) - self.at:  # each states its length
            raise struct.error
        return [self.text() for _ in range(count)]

    def tensor(self) -> tuple[str, str, tuple[int, ...], int]:
        """Name, kind, shape and offset."""
        name, count = self.text(), self.number("I")
        if not 1 <= count <= DIMENSIONS:
            raise ValueError(f"{name} has {count} dimensions; expected 1 to {DIMENSIONS}")
        shape = tuple(self.number("Q") for _ in range(count))[::-1]
        kind = self.number("I")
        if kind not in self.kinds:
            raise ValueError(f"{name} is of the unknown type {kind}")
        return name, self.kinds[kind], shape, self.number("Q")


def _letter(kind: int) -> str:
    if kind not in SCALARS:
        raise ValueError(f"a value of the type {kind}, which cannot be there")
    return SCALARS[kind]


def _placed(
    stated: list[tuple[str, str, tuple[int, ...], int]],
    metadata: dict[str, Any],
    data: npt.NDArray[np.uint8],
    end: int,
) -> dict[str, GgufTensor]:
    """The tensors with their bytes; refuses tensors outside the file or inside one another."""
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment is {alignment}; expected a power of two")
    start = end + -end % alignment
    constants = library()
    sizes = {kind.name: size for kind, size in constants.GGML_QUANT_SIZES.items()}
    places = []
    tensors: dict[str, GgufTensor] = {}
    for name, kind, shape, offset in stated:
        if name in tensors:
            raise ValueError(f"{name} is there twice")
        per_block, block = sizes[kind]
        if not all(shape) or shape[-1] % per_block:
            raise ValueError(f"{name} is {shape} of {kind}; expected whole blocks of {per_block}")
        if offset % alignment:
            raise ValueError(f"{name} begins at {offset}; expected a multiple of {alignment}")
        size = prod(shape) // per_block * block
        if start + offset + size > len(data):
            raise ValueError(f"{name} ends beyond the end of the file")
        places.append((offset, offset + size, name))
        raw = data[start + offset :][:size].reshape(-1, shape[-1] // per_block * block)
        tensors[name] = GgufTensor(name=name, kind=kind, shape=shape, raw=raw)
    for (_, last, first), (begin, _, second) in pairwise(sorted(places)):
        if begin < last:
            raise ValueError(f"{first} and {second} overlap")
    return tensors
