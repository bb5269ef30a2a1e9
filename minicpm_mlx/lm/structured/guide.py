"""Texts of a form: a JSON schema, a regular expression or a grammar, by way of llguidance.

A `Guide` follows the bytes of a reply; the text of them is what the form is about. Where the
tokenizer drops the space before the first word, there are two ways to begin: with a space that will
be dropped, or without one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from threading import Lock, Thread, stack_size
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

import numpy as np

from ...arguments import shown
from ...engine.grammar import Grammar
from ...errors import InvalidArgumentError, MissingPackageError, TokenizerError
from ...text.tokenizer import Tokenizer
from .json_schema import written
from .lark import lark_of

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer


T = TypeVar("T")

SIZE = 64 * 1024
"""Bytes of a form, at most."""

STACK = 64 * 2**20
"""Bytes for the library to recurse in while it reads a form: the deepest that schema.py and lark.py
let through takes 4 MB, and the end of the stack is the end of the process."""

LIMITS = {"initial_lexer_fuel": 300_000, "max_lexer_states": 30_000, "verbose_errors": False}
"""A form that takes more is refused: about 0.3 s and 50 MB. The library's other limits (15 ms a
token) are as they are."""

# Forced text would otherwise be split as the library's own tokenizer does, if it had one; so the
# model chooses among all tokens that fit.
OPTIONS = '%llguidance {"no_forcing": true}'


def grammar_of(
    tokenizer: Tokenizer,
    *,
    json_schema: Mapping[str, Any] | None = None,
    json_object: bool = False,
    regex: str | None = None,
    ebnf: str | None = None,
) -> Grammar:
    """What holds a reply to a form; give exactly one.

    `json_schema` is of draft 2020-12; properties come in its order. `json_object` takes any
    object. `regex` is matched by the whole text; its syntax is Rust's, but that a digit is one from
    0 to 9. `ebnf` is a grammar in Lark's form as llguidance has it (its rule `start`), or in GBNF
    (its rule `root`).

    It takes up to a second. Raises InvalidArgumentError for a form that is malformed, not
    supported, larger than 64 KB or too costly, and MissingPackageError without llguidance.
    """
    forms = {"json_schema": json_schema, "regex": regex, "ebnf": ebnf}
    given = [name for name, value in forms.items() if value is not None]
    given += ["json_object"] if json_object else []
    if len(given) != 1:
        found = " and ".join(given) or "none"
        raise InvalidArgumentError(
            f"give exactly one of json_schema, json_object, regex and ebnf, got {found}"
        )
    (name,) = given
    source = {"type": "object"} if json_object else forms[name]
    start, parts = _MAKERS[name](source)
    return _with_room(lambda: _guide(tokenizer, start, parts))


def library() -> ModuleType:
    """llguidance, which is an extra; MissingPackageError names the pip command."""
    try:
        import llguidance
    except ImportError:
        raise MissingPackageError(
            'structured output needs the llguidance package: pip install "minicpm-mlx[serve]"'
        ) from None
    module: ModuleType = llguidance
    return module


# From a form to llguidance's own: an expression for the text, and the grammar it refers to

Form = tuple[str, list[dict[str, Any]]]


def _of_schema(schema: object) -> Form:
    if not isinstance(schema, Mapping):
        raise InvalidArgumentError(f"json_schema must be a JSON schema, got {shown(schema)}")
    text = written(dict(schema))
    _check_size("json_schema", text)
    return "@text", [{"name": "text", "json_schema": json.loads(text)}]


def _of_regex(regex: object) -> Form:
    text = _check_size("regex", regex)
    if (len(text) - len(text.rstrip("\\"))) % 2:  # would take the closing mark as its own
        raise InvalidArgumentError("regex must not end with a backslash that escapes nothing")
    return f"/{library().regex_to_lark(text, 'd')}/" if text else '""', []


def _of_grammar(grammar: object) -> Form:
    library()
    from llguidance.gbnf_to_lark import gbnf_to_lark

    text = lark_of(_check_size("ebnf", grammar), gbnf_to_lark)
    return "@text", [{"name": "text", "lark_grammar": text}]


_MAKERS: dict[str, Callable[[object], Form]] = {
    "json_schema": _of_schema,
    "json_object": _of_schema,
    "regex": _of_regex,
    "ebnf": _of_grammar,
}


def _check_size(name: str, text: object) -> str:
    if not isinstance(text, str):
        raise InvalidArgumentError(f"{name} must be text, got {shown(text)}")
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        raise InvalidArgumentError(
            f"{name} must be valid Unicode, found half a surrogate pair at {error.start}"
        ) from None
    if size > SIZE:
        raise InvalidArgumentError(f"{name} must be at most {SIZE} bytes, got {size}")
    return text


def _guide(tokenizer: Tokenizer, start: str, parts: list[dict[str, Any]]) -> Guide:
    vocabulary = _vocabulary(tokenizer)
    starts = [start] if vocabulary.spaced is None else [start, f'" " {start}']
    guide = Guide(vocabulary, [_matcher(vocabulary, one, parts) for one in starts])
    guide.allowed()  # finds out what nothing fits, and prepares the first token
    return guide


def _with_room(work: Callable[[], T]) -> T:
    """What `work` comes to on a thread with a stack of STACK bytes."""
    done: list[T] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            done.append(work())
        except BaseException as error:
            failed.append(error)

    with _sizing:  # the size holds for every thread that starts meanwhile
        usual = stack_size(STACK)
        try:
            thread = Thread(target=run, daemon=True)
            thread.start()
        finally:
            stack_size(usual)
    thread.join()
    if failed:
        raise failed[0]
    return done[0]


_sizing = Lock()


def _matcher(vocabulary: Vocabulary, start: str, parts: list[dict[str, Any]]) -> LLMatcher:
    guidance = library()
    top = {"lark_grammar": f"start: {start}\n{OPTIONS}"}
    matcher: LLMatcher = guidance.LLMatcher(
        vocabulary.tokens,
        json.dumps({"grammars": [top, *parts]}),
        log_level=0,
        limits=guidance.LLParserLimits(**LIMITS),
    )
    _check(matcher, "cannot follow this form")
    return matcher


def _check(matcher: LLMatcher, trouble: str) -> None:
    """InvalidArgumentError with the library's reason, if it has one."""
    if matcher.is_error():
        raise InvalidArgumentError(f"{trouble}: {_reason(matcher.get_error())}")


def _reason(said: str) -> str:
    """What is wrong, without the lines that draw where: some are of what is put around a form."""
    if said.startswith("NoExtension"):
        return "no text fits that these tokens can write"
    lines = said.strip().splitlines() or ["it does not say why"]
    wrong = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    reason = " ".join((wrong[-1] if wrong else lines[0]).replace("<non-verbose/>", "").split())
    # What was given may be in it, which may be long.
    return reason if len(reason) <= 300 else f"{reason[:100]} ... {reason[-180:]}"


# Tokens as bytes


class Vocabulary:
    """What llguidance knows of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer):
        guidance = library()
        if not tokenizer.eos_ids:
            raise InvalidArgumentError(
                "the tokenizer names no end of text, so that no text of a form could end; name "
                "eos_token in its tokenizer_config.json"
            )
        size = max([tokenizer.vocab_size, *(token + 1 for token in tokenizer.eos_ids)])
        words = [_bytes(tokenizer, token) for token in range(size)]
        added = tokenizer.backend.get_added_tokens_decoder()
        special = {token for token, about in added.items() if about.special}
        self.eos = frozenset(tokenizer.eos_ids)
        self.ends = _packed(self.eos, size)
        spaced = [token for token, word in enumerate(words) if word.startswith(b" ")]
        drops = any(tokenizer.decode([token]) == "" for token in spaced if words[token] == b" ")
        self.spaced = _packed(spaced, size) if drops else None
        """Tokens that begin with a space; None where the first of a text is not dropped."""
        words_of = _TokenTable(words, min(self.eos), sorted(special | self.eos))
        self.tokens: LLTokenizer = guidance.LLTokenizer(
            guidance.TokenizerWrapper(words_of), eos_token=sorted(self.eos)
        )


class _TokenTable:
    """Tokens as llguidance asks for them. Special ones cannot be written, only be named."""

    bos_token_id = None

    def __init__(self, tokens: list[bytes], end: int, special: list[int]):
        self.tokens, self.eos_token_id, self.special_token_ids = tokens, end, special

    def __call__(self, text: str | bytes) -> list[int]:
        """Would split text, but for OPTIONS."""
        return []


def _bytes(tokenizer: Tokenizer, token: int) -> bytes:
    """What a token stands for; nothing where the tokenizer has none of that number."""
    try:
        return tokenizer.bytes_of(token)
    except TokenizerError:
        return b""


def _packed(tokens: Iterable[int], size: int) -> np.ndarray:
    """A bit for each token, as `Grammar.allowed` has them."""
    bits = np.zeros(-(-size // 32) * 32, np.uint8)
    bits[list(tokens)] = 1
    return np.packbits(bits, bitorder="little").view("<u4")


_vocabularies: WeakKeyDictionary[Tokenizer, Vocabulary] = WeakKeyDictionary()
_making = Lock()


def _vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    """Made once for each tokenizer: it takes half a second."""
    with _making:
        if tokenizer not in _vocabularies:
            _vocabularies[tokenizer] = Vocabulary(tokenizer)
        return _vocabularies[tokenizer]


# Following a text


class Guide:
    """A Grammar that llguidance follows.

    `starts` are the ways to begin: without a dropped space, and with one.
    """

    def __init__(self, vocabulary: Vocabulary, starts: Sequence[LLMatcher]):
        self.vocabulary, self.starts = vocabulary, tuple(starts)
        self.count = 0
        """Tokens followed, end of text not counted."""
        self.way = 0
        """Which of `starts` the text took, once there is one."""
        self.closed = False
        """The end of text has come."""

    @property
    def ended(self) -> bool:
        """Only end of text may follow."""
        return self.closed or all(one.is_stopped() for one in self._open())

    def _open(self) -> tuple[LLMatcher, ...]:
        return (self.starts[self.way],) if self.count else self.starts

    def allowed(self) -> np.ndarray:
        """The tokens that may come next: uint32 words, token t at bit t % 32 of word t // 32."""
        if self.closed:
            return self.vocabulary.ends.copy()
        # The library's last word may be one of padding.
        size = self.vocabulary.ends.size
        bits, *others = (_allowed(one)[:size] for one in self._open())
        if others and self.vocabulary.spaced is not None:
            bits = bits & ~self.vocabulary.spaced | others[0]
        if not bits.any():
            raise InvalidArgumentError(
                "cannot follow this form: no text fits that these tokens can write"
            )
        return bits

    def accept(self, token: int) -> None:
        """Append a token; InvalidArgumentError where it is not allowed."""
        if self.closed:
            raise InvalidArgumentError(f"the text has ended; token {token} cannot follow")
        if token in self.vocabulary.eos and any(one.is_accepting() for one in self._open()):
            self.closed = True
            return
        if self.count == 0:
            self.way = int(self._is_spaced(token))
        matcher = self.starts[self.way]
        matcher.consume_token(token)
        _check(matcher, f"token {token} cannot follow")
        self.count += 1

    def _is_spaced(self, token: int) -> bool:
        spaced = self.vocabulary.spaced
        return spaced is not None and bool(spaced[token // 32] >> (token % 32) & 1)

    def rollback(self, tokens: int) -> None:
        """Take the last `tokens` back, an end of text among them."""
        if not 0 <= tokens <= self.count + self.closed:
            raise InvalidArgumentError(
                f"only {self.count + self.closed} tokens can be taken back, got {tokens}"
            )
        if tokens and self.closed:
            self.closed = False
            tokens -= 1
        matcher = self.starts[self.way]
        if tokens:
            matcher.rollback(tokens)
            _check(matcher, "cannot take tokens back")
        self.count -= tokens

    def copy(self) -> Guide:
        """One that goes on from here by itself."""
        twin = Guide(self.vocabulary, [one.deep_copy() for one in self.starts])
        twin.count, twin.way, twin.closed = self.count, self.way, self.closed
        return twin


def _allowed(matcher: LLMatcher) -> np.ndarray:
    bits = np.frombuffer(matcher.compute_bitmask(), "<u4")
    _check(matcher, "cannot follow this form")
    return bits
