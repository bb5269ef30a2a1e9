"""Text to token ids where the names of some special tokens are ordinary text."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from threading import Lock
from typing import TYPE_CHECKING, Any

from ..errors import TokenizerError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend


class TypedTextEncoder:
    """A copy of a tokenizer that can read the names of special tokens as ordinary text.

    A character of such a name is replaced by a private one while special tokens are looked for, and
    put back before the text is split into words, so that all else is encoded as ever.
    """

    def __init__(self, backend: Backend, special: Mapping[str, int]) -> None:
        self._restore, self._lock = _Restore(), Lock()
        spec = json.loads(backend.to_str())
        self._backend = self._copy(spec)
        if any(token in self.encode(name, [0]) for name, token in special.items()):
            # Some files have merges that spell a special token out of ordinary pieces.
            merges = spec["model"]["merges"]
            spec["model"]["merges"] = [pair for pair in merges if _whole(pair) not in special]
            self._backend = self._copy(spec)

    def encode(self, text: str, typed: Iterable[int]) -> list[int]:
        """The ids of `text`; at the positions `typed` are characters of names to read as text."""
        positions = list(typed)
        characters = list(text)
        present = set(text)
        private = (char for char in map(chr, _PRIVATE_USE) if char not in present)
        hidden = dict(zip(sorted({text[at] for at in positions}), private, strict=False))
        for at in positions:
            if text[at] not in hidden:
                raise TokenizerError("text must leave a private-use character free, found them all")
            characters[at] = hidden[text[at]]
        with self._lock:
            self._restore.characters = [(private, char) for char, private in hidden.items()]
            encoding = self._backend.encode("".join(characters), add_special_tokens=False)
        ids: list[int] = encoding.ids
        return ids

    def _copy(self, spec: Mapping[str, Any]) -> Backend:
        from tokenizers import Tokenizer, pre_tokenizers

        backend = Tokenizer.from_str(json.dumps(spec))
        restore = pre_tokenizers.PreTokenizer.custom(self._restore)
        words = backend.pre_tokenizer
        backend.pre_tokenizer = (
            restore if words is None else pre_tokenizers.Sequence([restore, words])
        )
        return backend


_PRIVATE_USE = (*range(0xE000, 0xF900), *range(0xF0000, 0xFFFFE), *range(0x100000, 0x10FFFE))


class _Restore:
    """A step before the split into words that puts characters back."""

    def __init__(self) -> None:
        self.characters: Sequence[tuple[str, str]] = ()

    def pre_tokenize(self, text: Any) -> None:
        text.normalize(self._put_back)

    def _put_back(self, piece: Any) -> None:
        for private, character in self.characters:
            piece.replace(private, character)


def _whole(pair: str | Sequence[str]) -> str:
    """What a merge makes; older files write the pair as one text."""
    return "".join(pair.split(" ", 1) if isinstance(pair, str) else pair)
