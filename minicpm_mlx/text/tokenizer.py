"""Tokenizers: text to token ids and back.

A folder's tokenizer.json is used as it is. A lone tokenizer.model is converted to the same object:
SentencePiece itself would split this family's text differently (no leading `▁`, user-defined pieces
before any merge) from tokenizer.json, with which the models are run.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import MissingTemplateError, TokenizerError
from .chat_template import BUILTIN, Template
from .decode import StreamDecoder, piece_decoder
from .encode import TypedTextEncoder
from .message_text import MessageText, PromptText
from .tokenizer_files import TokenizerFiles, refusing, short

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

    from ..model_cards import Card


T = TypeVar("T")
Messages = Sequence[Mapping[str, Any]]


class Tokenizer:
    """A model's tokenizer; made by `load_tokenizer`.

    `backend` is the `tokenizers.Tokenizer` that encodes. `bos_id` is None where there is no such
    token, and `adds_bos` says whether the model expects it in front; generation ends at any of
    `eos_ids`. `template` is None where the folder has no chat template.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        bos_id: int | None = None,
        adds_bos: bool = False,
        eos_ids: Iterable[int] = (),
        template: Template | None = None,
    ) -> None:
        self.backend = backend
        self.bos_id = bos_id
        self.adds_bos = adds_bos
        self.eos_ids = tuple(dict.fromkeys(eos_ids))
        self.template = template
        self._piece_bytes, self._drops_space = piece_decoder(backend)
        self._added = backend.get_added_tokens_decoder()
        self._bytes: dict[int, bytes] = {}
        self._message_texts: dict[str, MessageText] = {}

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """Names and ids of the tokens that text leaves out or that end a reply."""
        ids = {token_id for token_id, token in self._added.items() if token.special}
        ids.update(self.eos_ids, [] if self.bos_id is None else [self.bos_id])
        names = {token_id: _text_of(self.backend, [token_id]) for token_id in sorted(ids)}
        return {name: token_id for token_id, name in names.items() if name}

    @cached_property
    def vocab_size(self) -> int:
        """The highest id + 1, added tokens included; a model's own may be padded further."""
        return max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def encode(self, text: str | PromptText, add_bos: bool = True) -> list[int]:
        """The token ids of `text`, in which special tokens are recognized where not `typed`.

        If the model expects bos, exactly one leads: none is added to text that begins with it.
        """
        prompt = PromptText(text) if isinstance(text, str) else text
        try:
            prompt.text.encode()
        except UnicodeEncodeError as error:
            raise TokenizerError(
                f"text must be valid Unicode, found half a surrogate pair at {error.start}; "
                "decode the bytes it came from as UTF-8"
            ) from None
        with refusing("the tokenizer", "cannot encode this text"):
            if prompt.typed:
                ids = self._typed_text_encoder.encode(prompt.text, [at for at, _ in prompt.typed])
            else:
                ids = self.backend.encode(prompt.text, add_special_tokens=False).ids
        if add_bos and self.adds_bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids.insert(0, self.bos_id)
        return ids

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        stream = self.stream(skip_special)
        text = "".join([stream.add(token_id) for token_id in ids])
        return text + stream.finish()

    def stream(self, skip_special: bool = True, continues: bool = False) -> StreamDecoder:
        """A decoder for one id at a time; its pieces joined equal `decode` of all ids.

        With `continues`, other text comes before them, so that a space may come first.
        """
        drops_space = self._drops_space and not continues
        return StreamDecoder(partial(self._token_bytes, skip_special), drops_space)

    def render(
        self,
        messages: Messages,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> PromptText:
        """The conversation, and the tools it may call, formatted by the model's template.

        The names of special tokens in messages stay ordinary text when it is encoded.
        """
        template = self.template
        if template is None:
            raise MissingTemplateError(
                "the model's folder has no chat template; add a chat_template.jinja to it"
            )
        return self._message_text.render(
            lambda messages, tools: template.render(messages, add_generation_prompt, tools),
            messages,
            tools,
        )

    def chat_text(
        self,
        messages: Messages,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The text of `render`."""
        return self.render(messages, add_generation_prompt, tools).text

    def chat_ids(
        self,
        messages: Messages,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]:
        """The conversation as token ids: what `render` gives, encoded with one bos."""
        return self.encode(self.render(messages, add_generation_prompt, tools))

    def typed(self, text: str) -> PromptText:
        """The beginning or the whole of a reply, in which special tokens are not recognized."""
        return self._message_text.typed(text)

    @property
    def _message_text(self) -> MessageText:
        source = self.template.source if self.template else ""
        if source not in self._message_texts:
            others = [token.content for token in self._added.values() if not token.special]
            marks = [name for name in others if name in source and re.fullmatch(_MARK, name)]
            self._message_texts = {source: MessageText(self.special_tokens, marks)}
        return self._message_texts[source]

    @cached_property
    def _typed_text_encoder(self) -> TypedTextEncoder:
        return TypedTextEncoder(self.backend, self.special_tokens)

    def bytes_of(self, token_id: int) -> bytes:
        """The bytes of one token; for a special token, its name."""
        return self._token_bytes(False, token_id)

    def _token_bytes(self, skip_special: bool, token_id: int) -> bytes:
        added = self._added.get(token_id)
        if added is not None:
            return b"" if skip_special and added.special else added.content.encode()
        if token_id not in self._bytes:
            self._bytes[token_id] = self._piece_bytes(self._piece(token_id))
        return self._bytes[token_id]

    def _piece(self, token_id: int) -> str:
        try:
            piece = self.backend.id_to_token(token_id)
        except (OverflowError, TypeError):  # not a 32-bit unsigned number
            piece = None
        if piece is None:
            raise TokenizerError(
                f"token ids must be in the vocabulary, 0 to {self.vocab_size - 1}, "
                f"found {token_id!r}; is this tokenizer the model's own?"
            )
        return piece


_MARK = r"<.+>|\[.+\]"
"""Unlike the "..." or "```" that some vocabularies add."""


def load_tokenizer(folder: str | Path, *, eos: Sequence[int] | None = None) -> Tokenizer:
    """The tokenizer of a model folder, from tokenizer.json, else tokenizer.model.

    `eos` replaces the end tokens that the folder's files name. Raises TokenizerError for files
    that are missing, corrupt or contradict each other.

        >>> load_tokenizer("MiniCPM-2B-dpo-bf16").encode("<用户>")
        [1, 1786, 4194, 95388]
    """
    files = TokenizerFiles(Path(folder))
    backend = _load_backend(files)
    bos_token, eos_token = files.token("bos_token"), files.token("eos_token")
    leading = _leading_special(backend)
    bos_ids = _ids_of(backend, bos_token) + leading + files.ids("bos_token_id")
    eos_ids = files.ids("eos_token_id") + _ids_of(backend, eos_token)
    if not eos_ids:  # a bare tokenizer file; without an end token generation would never stop
        eos_ids = [i for i in map(backend.token_to_id, _USUAL_EOS) if i is not None]

    bos_id = bos_ids[0] if bos_ids else None
    adds_bos = leading == [bos_id] if files.adds_bos is None else files.adds_bos
    if adds_bos and bos_id is None:
        raise files.wrong("bos_token", "named, as add_bos_token is true", None)
    source = files.chat_template or _builtin_template(files, backend)
    bos_text = bos_token or _text_of(backend, bos_ids)
    eos_text = eos_token or _text_of(backend, eos_ids)
    return Tokenizer(
        backend,
        bos_id=bos_id,
        adds_bos=adds_bos,
        eos_ids=eos_ids if eos is None else eos,
        template=Template(source, bos_text, eos_text) if source else None,
    )


_USUAL_EOS = ("</s>", "<|im_end|>")


# The encoder


def _load_backend(files: TokenizerFiles) -> Backend:
    fast, slow = files.folder / "tokenizer.json", files.folder / "tokenizer.model"
    if fast.exists():
        with refusing(fast, "is not a tokenizer"):
            backend = _from_json(fast.read_bytes())
    elif slow.exists():
        with refusing(slow, "is not a SentencePiece model of this family"):
            backend = _from_sentencepiece(slow.read_bytes())
    else:
        names = ", ".join(sorted(path.name for path in files.folder.iterdir()))
        raise TokenizerError(
            f"{files.folder} must hold tokenizer.json or tokenizer.model, "
            f"found {short(names) if names else 'nothing'}; download the model again"
        )
    with refusing(files.folder, "has an added_tokens_decoder that does not fit its tokenizer"):
        _add_tokens(backend, files.added_tokens)
    return backend


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


def _leading_special(backend: Backend) -> list[int]:
    """The special token that the tokenizer's own post-processor puts in front, if any."""
    with refusing("the tokenizer", "cannot encode"):
        encoding = backend.encode("a")
    return encoding.ids[:1] if encoding.special_tokens_mask[:1] == [1] else []


def _ids_of(backend: Backend, token: str | None) -> list[int]:
    """The id of a token that a config names, as a list of at most one."""
    if token is None:
        return []
    with refusing("the tokenizer", "cannot look up bos_token and eos_token"):
        token_id = backend.token_to_id(token)
    if token_id is None:
        raise TokenizerError(
            f"bos_token and eos_token must be in the tokenizer's vocabulary, found {token!r}; "
            "download the model's tokenizer files again"
        )
    return [token_id]


def _text_of(backend: Backend, ids: Sequence[int]) -> str:
    """The first id's token; "" if there is none."""
    added = backend.get_added_tokens_decoder()
    if ids and ids[0] in added:  # id_to_token normalizes them
        return added[ids[0]].content
    return (backend.id_to_token(ids[0]) if ids else None) or ""


def _builtin_template(files: TokenizerFiles, backend: Backend) -> str | None:
    """The family's own template for a folder without one, chosen by its vocabulary."""
    in_family = files.is_minicpm
    if in_family is None:
        user = backend.encode("<用户>", add_special_tokens=False).tokens
        in_family = user == ["▁<", "用户", ">"]
    if not in_family:
        return None
    return BUILTIN["minicpm" if backend.token_to_id("<|im_start|>") is None else "chatml"]


def tokenizer_of(card: Card, folder: Path) -> Tokenizer:
    """The tokenizer in `folder`, with the card's end tokens and template, if it has them."""
    tokenizer = load_tokenizer(folder, eos=card.eos or None)
    if card.template is not None:
        tokenizer.template = Template(BUILTIN[card.template])
    return tokenizer
