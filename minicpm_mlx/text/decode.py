"""Token ids to text: one decoder that works on bytes, for whole texts and for streams.

Invalid UTF-8 gives as many U+FFFD as Python's decoder does.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from ..errors import TokenizerError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend


class StreamDecoder:
    """Decodes ids one at a time; holds back an incomplete character until its rest has come."""

    def __init__(
        self,
        token_bytes: Callable[[int], bytes],
        drops_space: bool,
        marks: Mapping[int, str] | None = None,
    ) -> None:
        """`marks` are put in front of tokens."""
        self._token_bytes, self._marks = token_bytes, marks or {}
        self._drops_space = drops_space
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token_id: int) -> str:
        """The new complete characters; "" while a character is incomplete."""
        if mark := self._marks.get(token_id):
            return self.finish() + mark + self._utf8.decode(self._token_bytes(token_id))
        return self._text(self._utf8.decode(self._token_bytes(token_id)))

    def finish(self) -> str:
        """The end of the text: U+FFFD for bytes of an incomplete character."""
        return self._text(self._utf8.decode(b"", final=True))

    def _text(self, text: str) -> str:
        """`text` without the space before the first word of the whole text."""
        if text and self._drops_space:
            self._drops_space = False
            text = text.removeprefix(" ")
        return text


def piece_decoder(backend: Backend) -> tuple[Callable[[str], bytes], bool]:
    """The function from a piece to its bytes, and whether the first space of a text is dropped."""
    steps: list[dict[str, Any]] = [{"type": "none"}]
    if backend.decoder is not None:
        spec = json.loads(backend.decoder.__getstate__())
        steps = spec.get("decoders", [spec])
    if steps[:3] == _SENTENCEPIECE and steps[3:] in ([], [_STRIP]):
        return _sentencepiece_bytes, steps[3:] == [_STRIP]
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return partial(_byte_level_bytes, _byte_alphabet()), False
    raise TokenizerError(
        f"the tokenizer's decoder must be ByteLevel or SentencePiece's, found {', '.join(kinds)}; "
        "use a model with one of these tokenizers"
    )


_SENTENCEPIECE = [
    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
]
_STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}


def _sentencepiece_bytes(piece: str) -> bytes:
    if re.fullmatch("<0x[0-9A-Fa-f]{2}>", piece):
        return bytes.fromhex(piece[3:5])
    return piece.replace("▁", " ").encode()


def _byte_level_bytes(alphabet: dict[str, int], piece: str) -> bytes:
    if all(character in alphabet for character in piece):
        return bytes(alphabet[character] for character in piece)
    return piece.encode()


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: a printable character for each byte, itself or one from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + i): byte for i, byte in enumerate(others)
    }
