"""Builds the object of the tokenizers library from a folder's files.

A folder's tokenizer.json is used as it is. A lone tokenizer.model is converted to the same object:
SentencePiece itself would split this family's text differently (no leading `▁`, user-defined pieces
before any merge) from tokenizer.json, with which the models are run.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import TokenizerError
from .tokenizer_files import BOM, TokenizerFiles, refusing, short

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend


def load_backend(files: TokenizerFiles) -> Backend:
    fast, slow = files.folder / "tokenizer.json", files.folder / "tokenizer.model"
    if fast.exists():
        with refusing(fast, "is not a tokenizer"):
            backend = _from_json(fast.read_bytes().removeprefix(BOM.encode()))
    elif slow.exists():
        with refusing(slow, "is not a SentencePiece model of this family"):
            backend = _from_sentencepiece(slow.read_bytes())
    else:
        names = ", ".join(sorted(path.name for path in files.folder.iterdir()))
        raise TokenizerError(
            f"{files.folder} must hold tokenizer.json or tokenizer.model, "
            f"found {short(names) if names else 'nothing'}; download the model again"
        )
    added = files.added_tokens
    with refusing(files.folder, "states added tokens that do not fit its tokenizer"):
        _add_tokens(backend, added)
        # Pieces that a config calls special are tokens wherever they stand, as in transformers.
        known = {token.content for token in backend.get_added_tokens_decoder().values()}
        special = filter(looks_special, files.special_tokens)
        pieces = [token for token in special if backend.token_to_id(token) is not None]
        backend.add_special_tokens([token for token in pieces if token not in known])
    return backend


def looks_special(token: str) -> bool:
    """Whether a token is a mark such as `<s>` or `[SEP]`, and not the "!" or "..." of a config."""
    return re.fullmatch(r"<.+>|\[.+\]", token, re.S) is not None


def _from_json(data: bytes) -> Backend:
    from tokenizers import Tokenizer

    backend = Tokenizer.from_buffer(data)
    # Left over from training, these would silently cut or pad every prompt.
    backend.no_truncation()
    backend.no_padding()
    return backend


def _from_sentencepiece(data: bytes) -> Backend:
    """The tokenizer.json that transformers writes for a byte-pair tokenizer.model."""
    from sentencepiece import SentencePieceProcessor

    source = SentencePieceProcessor(model_proto=data)
    ids = list(range(len(source)))
    pieces, scores = source.id_to_piece(ids), source.get_score(ids)
    if not all(score.is_integer() for score in scores):
        raise ValueError("its type is not BPE")  # whose scores are ranks
    if source.normalize(_PROBE).removeprefix("▁") != _PROBE.replace(" ", "▁"):
        raise ValueError("it normalises text")

    return sentencepiece_backend(
        pieces,
        scores,
        unknown=source.unk_id(),
        bos_id=source.bos_id() if source.bos_id() >= 0 else None,
        special=[i for i in ids if source.is_control(i)],
    )


def sentencepiece_backend(
    pieces: Sequence[str],
    scores: Sequence[float],
    *,
    unknown: int,
    bos_id: int | None,
    special: Iterable[int],
    prefix: bool = True,
) -> Backend:
    """A byte-pair tokenizer of SentencePiece's pieces, ranked by their scores.

    `prefix` puts a space before the first word. Raises whatever the tokenizers library does.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, processors

    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = _merges(vocab, scores)
    backend = Tokenizer(
        models.BPE(vocab, merges, unk_token=pieces[unknown], fuse_unk=True, byte_fallback=True)
    )
    spaces: list[Any] = [normalizers.Replace(" ", "▁")]
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        spaces.insert(0, normalizers.Prepend("▁"))
        steps.append(decoders.Strip(" ", 1, 0))
    backend.normalizer = normalizers.Sequence(spaces)
    backend.decoder = decoders.Sequence(steps)
    if bos_id is not None:
        backend.post_processor = processors.TemplateProcessing(
            single=[pieces[bos_id], "$A"], special_tokens=[(pieces[bos_id], bos_id)]
        )
    backend.add_special_tokens([pieces[unknown], *(pieces[i] for i in special)])
    return backend


# Full width, a ligature, two spaces: what NFKC and SentencePiece's own rules change.
_PROBE = "Ａ ﬁ  ①"


def _merges(vocab: dict[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """All pairs that make a piece, sorted by the piece's score, its id, then the pair's ids."""
    ranked = sorted(
        (-scores[whole], whole, vocab[piece[:cut]], vocab[piece[cut:]], piece[:cut], piece[cut:])
        for piece, whole in vocab.items()
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    )
    return [(left, right) for *_, left, right in ranked]


def _add_tokens(backend: Backend, tokens: dict[int, dict[str, Any]]) -> None:
    """Add the tokens that `backend` lacks, such as ChatML's, which no tokenizer.model holds."""
    from tokenizers import AddedToken

    known = backend.get_added_tokens_decoder()
    for token_id, fields in tokens.items():
        if token_id in known:
            continue
        options = {key: fields[key] for key in _TOKEN_FIELDS if key in fields}
        backend.add_tokens([AddedToken(**options)])
        if (actual_id := backend.token_to_id(fields["content"])) != token_id:
            raise ValueError(f"{fields['content']!r} is {token_id} there and {actual_id} here")


_TOKEN_FIELDS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
