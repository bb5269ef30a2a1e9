"""A tokenizer of bytes and a few pieces, some of which reach over the end of a prompt."""

from __future__ import annotations

from minicpm_mlx.text.backend import sentencepiece_backend
from minicpm_mlx.text.chat_template import CHATML, MINICPM, Template
from minicpm_mlx.text.tokenizer import Tokenizer

PIECES = ["▁", "<", ">", "(", ")", "=", "a", "b", "c", "\n", "><", ">=", "(<", "▁a", "ab", "\n\n"]


def tiny(template: str | None = MINICPM, *, adds_bos: bool = True) -> Tokenizer:
    """Its tokens: 0 <unk>, 1 <s>, 2 </s>, 3 <|im_end|>, then bytes, then PIECES."""
    pieces = ["<unk>", "<s>", "</s>", "<|im_end|>", *(f"<0x{i:02X}>" for i in range(256)), *PIECES]
    backend = sentencepiece_backend(
        pieces,
        [-float(i) for i in range(len(pieces))],
        unknown=0,
        bos_id=1 if adds_bos else None,
        special=[1, 2, 3],
    )
    return Tokenizer(
        backend,
        bos_id=1,
        adds_bos=adds_bos,
        eos_ids=(2, 3) if template == CHATML else (2,),
        template=Template(template) if template else None,
    )
