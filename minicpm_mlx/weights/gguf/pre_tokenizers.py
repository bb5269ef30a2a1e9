"""Pre-tokenizers of byte-level vocabularies, by llama.cpp's names."""

from __future__ import annotations

import json
from typing import Any

from ...arguments import printable
from ...errors import TokenizerError

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"

PATTERNS: dict[str, list[str]] = {
    "llama-bpe": [rf"{_WORDS}|\p{{N}}{{1,3}}|{_REST}"],
    "qwen2": [rf"{_WORDS}|\p{{N}}|{_REST}"],
    "minicpm5": [r"\p{N}{1,3}", rf"{_WORDS}|\p{{N}}+|{_REST}"],
    "default": [r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"],
}
"""Regular expressions; each splits what the one before left whole."""

ALIASES = {"llama3": "llama-bpe", "llama-v3": "llama-bpe"}
WHOLE_WORDS = ("llama-bpe", "minicpm5")
"""Where a word that is a token is not merged from its letters."""

BEGINS_WITH_BOS = ("llama-bpe",)
"""Where bos leads, in a file that does not say."""

COMPOSED = ("qwen2",)
"""Where characters are composed (NFC) before anything else."""


def splitter(name: str) -> Any:
    """The pre-tokenizer of a `tokenizer.ggml.pre`; TokenizerError for one that is unknown."""
    from tokenizers import pre_tokenizers

    name = ALIASES.get(name, name)
    if name == "gpt-2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if name == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, splitter("gpt-2")])
    if name not in PATTERNS:
        raise TokenizerError(
            f"tokenizer.ggml.pre is {printable(name)}; expected gpt-2, smollm, "
            f"{', '.join(PATTERNS)}: convert the model from its own folder instead"
        )
    from tokenizers import Regex

    cuts: list[Any] = [
        pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PATTERNS[name]
    ]
    return pre_tokenizers.Sequence(
        [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


def split_name(pre_tokenizer: Any, whole_words: bool) -> str:
    """llama.cpp's name for how a tokenizer cuts; TokenizerError where it has none."""
    spec = _spec(pre_tokenizer)
    for name in ("gpt-2", "smollm", *PATTERNS):
        if spec == _spec(splitter(name)) and whole_words == (name in WHOLE_WORDS):
            return name
    raise TokenizerError(
        "the tokenizer cuts texts in a way that has no name in GGUF (its pre_tokenizer is "
        f"{printable(spec)}); expected that of {', '.join(['gpt-2', 'smollm', *PATTERNS])}"
    )


def _spec(pre_tokenizer: Any) -> Any:
    """A pre-tokenizer's settings, without those that only concern offsets."""
    spec = json.loads(pre_tokenizer.__getstate__()) if pre_tokenizer is not None else None
    return _without_offsets(spec)


def _without_offsets(spec: Any) -> Any:
    if isinstance(spec, dict):
        return {k: _without_offsets(v) for k, v in spec.items() if k != "trim_offsets"}
    return [_without_offsets(item) for item in spec] if isinstance(spec, list) else spec
