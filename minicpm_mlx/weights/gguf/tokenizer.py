"""A tokenizer in GGUF's metadata, to the files a model folder has and back.

Two kinds: "gpt2", byte-level with its merges in order, and "llama", SentencePiece's pieces with
scores instead of merges, from which both sides derive the same ones.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...arguments import printable
from ...errors import TokenizerError
from ...text.backend import sentencepiece_backend
from ...text.tokenizer import Tokenizer, load_tokenizer
from ...text.tokenizer_files import refusing
from .header import GgufFile
from .pre_tokenizers import (
    ALIASES,
    BEGINS_WITH_BOS,
    COMPOSED,
    WHOLE_WORDS,
    split_name,
    splitter,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""GGUF's token types."""

LONGEST = 1024
"""Characters of a piece: all ways to cut it in two are looked at."""

NO_SCORE = -1e9
"""Of pieces that nothing is merged into."""


# From GGUF


def write_tokenizer(file: GgufFile, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json for the vocabulary of a GGUF file.

    Raises TokenizerError for a kind this library does not know, and for a damaged one.
    """
    found = _Vocabulary(file)
    settings: dict[str, Any] = {"add_bos_token": found.adds_bos}
    settings |= {f"{name}_token": text for name in _NAMES if (text := found.named(name))}
    if template := found.get("chat_template", str, prefix="tokenizer."):
        settings["chat_template"] = template
    backend = _MAKERS[found.model](found)
    # Not save(): of a full disk it raises no OSError.
    (folder / "tokenizer.json").write_text(backend.to_str(), encoding="utf-8")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False), encoding="utf-8")


_NAMES = {"bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding"}
"""GGUF's names, misspelt as there, by those of tokenizer_config.json."""


class _Vocabulary:
    """The tokenizer's keys of a file, each checked as it is read."""

    def __init__(self, file: GgufFile) -> None:
        self.file = file
        self.model = self.get("model", str)
        if self.model not in _MAKERS:
            raise self.wrong("model", " or ".join(_MAKERS), self.model)
        self.pre = self.get("pre", str) or "default"
        self.pre = ALIASES.get(self.pre, self.pre)
        self.tokens: list[str] = self.listed("tokens", str)
        if len(set(self.tokens)) != len(self.tokens):
            raise self.wrong("tokens", "all different", "some token twice")
        self.kinds: list[int] = self.listed("token_type", int) or [NORMAL] * len(self.tokens)
        if len(self.kinds) != len(self.tokens):
            raise self.wrong("token_type", f"{len(self.tokens)} numbers", len(self.kinds))
        # Converters fill the vocabulary up to the embedding's rows.
        while self.kinds and self.kinds[-1] == UNUSED:
            self.kinds.pop()
            self.tokens.pop()

    @property
    def adds_bos(self) -> bool:
        stated = self.get("add_bos_token", bool)
        return self.model == "llama" or self.pre in BEGINS_WITH_BOS if stated is None else stated

    def named(self, name: str) -> str | None:
        """The text of one of _NAMES."""
        token_id = self.get(f"{_NAMES[name]}_token_id", int)
        if token_id is None:
            return None
        if not 0 <= token_id < len(self.tokens):
            if name not in ("bos", "eos"):
                return None
            raise self.wrong(f"{_NAMES[name]}_token_id", f"below {len(self.tokens)}", token_id)
        return self.tokens[token_id]

    def of_kind(self, *kinds: int) -> list[int]:
        return [i for i, kind in enumerate(self.kinds) if kind in kinds]

    def get(self, key: str, kind: type, prefix: str = "tokenizer.ggml.") -> Any:
        value = self.file.metadata.get(f"{prefix}{key}")
        if value is not None and type(value) is not kind:
            raise self.wrong(key, f"of type {kind.__name__}", value)
        return value

    def listed(self, key: str, kind: type) -> list[Any]:
        values = self.get(key, list) or []
        if values and type(values[0]) is not kind:  # an array holds values of one type
            raise self.wrong(key, f"a list of {kind.__name__}", values[0])
        return list(values)

    def refusing_damage(self) -> AbstractContextManager[None]:
        return refusing(self.file.path, "has a damaged vocabulary")

    def wrong(self, key: str, expected: str, value: object) -> TokenizerError:
        return TokenizerError(
            f"{self.file.path}: tokenizer.ggml.{key} must be {expected}, got {printable(value)}"
        )


def _byte_level(found: _Vocabulary) -> Backend:
    from tokenizers import Tokenizer, decoders, models, normalizers

    try:
        cut = splitter(found.pre)
    except TokenizerError as error:
        raise TokenizerError(f"{found.file.path}: {error}") from None
    merges = [tuple(merge.split(" ", 1)) for merge in found.listed("merges", str)]
    if not merges:
        raise found.wrong("merges", "a list of texts", None)
    vocab = {token: i for i, token in enumerate(found.tokens)}
    with found.refusing_damage():
        backend = Tokenizer(
            models.BPE(vocab=vocab, merges=merges, ignore_merges=found.pre in WHOLE_WORDS)
        )
        if found.pre in COMPOSED:
            backend.normalizer = normalizers.NFC()
        backend.pre_tokenizer = cut
        backend.decoder = decoders.ByteLevel()
        _add_tokens(backend, found)
    return backend


def _sentencepiece(found: _Vocabulary) -> Backend:
    scores = found.listed("scores", float)[: len(found.tokens)]
    if len(scores) != len(found.tokens):
        raise found.wrong("scores", f"{len(found.tokens)} numbers", len(scores))
    if (longest := max(map(len, found.tokens), default=0)) > LONGEST:
        raise found.wrong("tokens", f"at most {LONGEST} characters each", longest)
    unknown = found.of_kind(UNKNOWN)[:1] or [found.get("unknown_token_id", int) or 0]
    bos_id = found.get("bos_token_id", int) if found.adds_bos else None
    prefix = found.get("add_space_prefix", bool) is not False
    with found.refusing_damage():
        backend = sentencepiece_backend(
            found.tokens,
            scores,
            unknown=unknown[0],
            bos_id=bos_id,
            special=found.of_kind(CONTROL),
            prefix=prefix,
        )
        if found.file.metadata["general.architecture"] != "minicpm":
            # A MiniCPM's tokenizer.json, which it is run with, merges these like all others.
            _add_tokens(backend, found)
    return backend


def _add_tokens(backend: Backend, found: _Vocabulary) -> None:
    from tokenizers import AddedToken

    for kind, special in ((CONTROL, True), (USER_DEFINED, False)):
        tokens = [found.tokens[i] for i in found.of_kind(kind)]
        added = [AddedToken(token, normalized=False, special=special) for token in tokens]
        (backend.add_special_tokens if special else backend.add_tokens)(added)


_MAKERS = {"gpt2": _byte_level, "llama": _sentencepiece}


# To GGUF


def tokenizer_keys(folder: Path, vocabulary: int) -> dict[str, Any]:
    """GGUF's keys for the tokenizer in a model folder, filled up to `vocabulary` tokens.

    Raises TokenizerError for one that GGUF cannot express.
    """
    tokenizer = load_tokenizer(folder)
    tokenizer.limit_to(vocabulary)
    spec = json.loads(tokenizer.backend.to_str())
    tokens = _tokens(tokenizer, vocabulary)
    keys: dict[str, Any] = {
        **(_llama_keys if spec["model"].get("byte_fallback") else _gpt2_keys)(tokenizer, spec),
        "tokens": tokens,
        "token_type": _kinds(tokenizer, tokens, spec["model"].get("unk_token")),
        "add_bos_token": tokenizer.adds_bos,
    }
    if "ranks" in keys:
        ranks = keys.pop("ranks")
        keys["scores"] = [float(ranks.get(token, NO_SCORE)) for token in tokens]
    ids = {"bos": tokenizer.bos_id} | dict(
        zip(("eos", "eot", "eom"), tokenizer.eos_ids, strict=False)
    )
    keys |= {f"{name}_token_id": i for name, i in ids.items() if i is not None}
    for name in ("unk", "sep", "pad"):
        token = tokenizer.template and tokenizer.template.others.get(f"{name}_token")
        if isinstance(token, str) and token in tokens:
            keys[f"{_NAMES[name]}_token_id"] = tokens.index(token)
    named = {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
    if tokenizer.template is not None:
        named["tokenizer.chat_template"] = tokenizer.template.source
    return named


def _tokens(tokenizer: Tokenizer, vocabulary: int) -> list[str]:
    """Every token by id; llama.cpp's name for ids that have none."""
    found = tokenizer.backend.get_vocab(with_added_tokens=True)
    tokens = [f"[PAD{i}]" for i in range(vocabulary)]
    for token, token_id in found.items():
        if token_id < vocabulary:  # the model does not know those that were added beyond
            tokens[token_id] = token
    return tokens


def _kinds(tokenizer: Tokenizer, tokens: Sequence[str], unknown: str | None) -> list[int]:
    found = tokenizer.backend.get_vocab(with_added_tokens=True)
    added = tokenizer.backend.get_added_tokens_decoder()

    def kind(token_id: int, token: str) -> int:
        if token not in found:
            return UNUSED
        if token == unknown:
            return UNKNOWN
        if token_id in added:
            return CONTROL if added[token_id].special else USER_DEFINED
        return BYTE if _is_byte(token) and unknown is not None else NORMAL

    return [kind(token_id, token) for token_id, token in enumerate(tokens)]


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _gpt2_keys(tokenizer: Tokenizer, spec: Mapping[str, Any]) -> dict[str, Any]:
    whole_words = bool(spec["model"].get("ignore_merges"))
    name = split_name(tokenizer.backend.pre_tokenizer, whole_words)
    normalizer = (spec.get("normalizer") or {}).get("type")
    if normalizer != ("NFC" if name in COMPOSED else None):
        raise _inexpressible(f"it normalises texts by {normalizer} and cuts them as {name} does")
    if not (merges := [" ".join(pair) for pair in _pairs(spec)]):
        raise _inexpressible("it has no merges, and readers of GGUF expect some")
    return {"model": "gpt2", "pre": name, "merges": merges}


def _llama_keys(tokenizer: Tokenizer, spec: Mapping[str, Any]) -> dict[str, Any]:
    normalizer = spec.get("normalizer") or {}
    steps = [step["type"] for step in normalizer.get("normalizers", [normalizer]) if step]
    if steps not in (["Prepend", "Replace"], ["Replace"]) or spec.get("pre_tokenizer") is not None:
        raise _inexpressible("it is none of SentencePiece's byte pairs")
    ranks: dict[str, int] = {}
    last = None
    for left, right in _pairs(spec):
        whole = left + right
        if whole != last and whole in ranks:
            raise _inexpressible(f"its merges into {whole} come at two places")
        last = whole
        ranks.setdefault(whole, -len(ranks))
    prefix = steps[0] == "Prepend"
    return {"model": "llama", "pre": "default", "add_space_prefix": prefix, "ranks": ranks}


def _pairs(spec: Mapping[str, Any]) -> list[Sequence[str]]:
    """Merges, which older files write as one text."""
    merges = spec["model"]["merges"]
    return [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in merges]


def _inexpressible(reason: str) -> TokenizerError:
    return TokenizerError(f"GGUF cannot express this tokenizer: {reason}")
