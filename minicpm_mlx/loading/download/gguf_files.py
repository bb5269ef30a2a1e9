"""Chooses a file of a GGUF repository by a tag: its type, such as Q4_K_M, or its name."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from ...arguments import printable
from ...errors import ModelNotFoundError

DEFAULT = "Q4_K_M"
"""The type that is taken without a tag, as by llama.cpp."""

_TYPE = re.compile(
    r"(?<![a-z0-9])(?:ud-)?(?:i?q\d_[a-z0-9_]+|tq\d_\d|mxfp4(?:_moe)?|nvfp4|b?f16|fp?(?:16|32))$",
    re.IGNORECASE | re.ASCII,
)
_PART = re.compile(r"-\d{5}-of-(\d{5})$")
_NO_MODEL = re.compile(r"imatrix|mmproj|ggml-vocab", re.IGNORECASE)


def choose_gguf(repo: str, sizes: Mapping[str, int], tag: str | None) -> str:
    """The name of the file of `repo` that `tag` chooses, of those with these bytes by name.

    None takes Q4_K_M; where there is none, the type of the fewest bits from 4 on, and of several
    files the smallest. Capitals do not matter in a tag. Raises ModelNotFoundError, which lists the
    tags there are, for one that fits no file or several, and for a file in parts.
    """
    names = gguf_models(sizes)
    if not names:
        raise ModelNotFoundError(f"{repo} has no .gguf file of a model at its top")
    fitting = [name for name in names if tag is None or fits(tag, name)]
    if not fitting:
        raise ModelNotFoundError(f"{repo} has no {tag!r}; it has {listed_tags(names)}")
    found = [name for name in fitting if not _parts(name)]
    if not found:
        raise ModelNotFoundError(
            f"{repo}: {printable(fitting[0])} is one of {_parts(fitting[0])} parts, which are not "
            "read; choose another file, or join them with llama-gguf-split --merge and give the "
            "file's path"
        )
    if tag is not None and len(found) > 1:
        raise ModelNotFoundError(
            f"{repo}: {tag!r} fits {', '.join(map(printable, found[:8]))}; give one's whole name "
            "as the tag"
        )
    return min(found, key=lambda name: (*_distance(name), sizes[name], name))


def gguf_models(names: Collection[str]) -> list[str]:
    """Those of files that hold a model, in the order of names."""
    gguf = sorted(name for name in names if name.lower().endswith(".gguf"))
    return [name for name in gguf if not _NO_MODEL.search(name)]


def fits(tag: str, name: str) -> bool:
    """Whether a tag, in capitals or not, chooses a file."""
    tag, name, stem = _same(tag), name.lower(), _stem(name).lower()
    named = (name, name.removesuffix(".gguf"), stem, _same(_type(name)))
    return tag in named or stem.endswith((f"-{tag}", f".{tag}"))


def tag_of(name: str, names: Collection[str]) -> str:
    """The shortest tag that chooses a file among others."""
    kind = _type(name).upper()
    return kind if kind and sum(fits(kind, other) for other in names) == 1 else name


def listed_tags(names: Collection[str]) -> str:
    """The tags of files, for a message."""
    tags = {printable(tag_of(name, names)): None for name in names if not _parts(name)}
    parts = {
        f"{_type(name).upper() or _stem(name)} in parts": None for name in names if _parts(name)
    }
    shown = [*tags, *map(printable, parts)]
    return ", ".join(shown[:24]) + f" and {len(shown) - 24} more" * (len(shown) > 24)


def _stem(name: str) -> str:
    """A file's name without its ending and the number of its part."""
    return _PART.sub("", re.sub(r"\.gguf$", "", name, flags=re.IGNORECASE))


def _parts(name: str) -> int:
    """How many parts the file is one of; 0 for a whole one."""
    match = _PART.search(re.sub(r"\.gguf$", "", name, flags=re.IGNORECASE))
    return int(match[1]) if match and int(match[1]) > 1 else 0


def _type(name: str) -> str:
    match = _TYPE.search(_stem(name))
    return match[0] if match else ""


def _same(tag: str) -> str:
    """Small letters, and F16 for what some call FP16."""
    return re.sub(r"^fp(?=16$|32$)", "f", tag.lower())


def _distance(name: str) -> tuple[bool, bool, int]:
    """How far a file is from the one to take, in the order that matters."""
    kind = _type(name).upper()
    match = re.search(r"\d+", kind)
    bits = int(match[0]) if match else 99
    return kind != DEFAULT, bits < 4, abs(bits - 4)
