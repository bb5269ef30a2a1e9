"""Constrains replies to a JSON schema, a regular expression or a grammar, with llguidance.

A `Guide` follows the bytes of a reply. Where the tokenizer drops the space before the first word,
the reply can begin in two ways: with a space that will be dropped, or without one.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Lock, stack_size
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

import numpy as np

from ...arguments import shown
from ...errors import InvalidArgumentError, MissingPackageError, TokenizerError
from ...text.tokenizer import Tokenizer
from .closed_schema import closed
from .lark import lark_of
from .schema_check import written

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer


T = TypeVar("T")

SIZE = 64 * 1024
"""Most bytes of a schema, expression or grammar."""

STACK = 64 * 2**20
"""Bytes of stack for llguidance, which recurses while it reads a form. The deepest form that
schema_check.py and lark.py accept takes 4 MB, and a stack overflow ends the process."""

KEPT = 16
"""Compiled grammars that are kept of a tokenizer: programs send the same tools again and again."""

LIMITS = {"initial_lexer_fuel": 300_000, "max_lexer_states": 30_000, "verbose_errors": False}
"""llguidance refuses a form that takes more: about 0.3 s and 50 MB. Its other limits (15 ms a
token) keep their defaults."""

# Without this, llguidance tokenizes forced text itself, for which it has no tokenizer here; with
# it, the model chooses among all tokens that fit.
OPTIONS = '%llguidance {"no_forcing": true}'


def grammar_of(
    tokenizer: Tokenizer,
    *,
    json_schema: Mapping[str, Any] | None = None,
    closed_schema: Mapping[str, Any] | None = None,
    json_object: bool = False,
    regex: str | None = None,
    ebnf: str | None = None,
    continues: bool = False,
) -> Guide:
    """A grammar that constrains a reply; give exactly one form.

    `json_schema` is of draft 2020-12; properties come in its order. Objects of a `closed_schema`
    have only the properties that it names, unless `additionalProperties` says otherwise.
    `json_object` takes any object. `regex` is matched by the whole text; its syntax is Rust's, but
    that a digit is one from 0 to 9. `ebnf` is a grammar in Lark's form as llguidance has it (its
    rule `start`), or in GBNF (its rule `root`).

    With `continues` other text comes before it in the reply.

    It takes up to a second; the last KEPT grammars of a tokenizer are kept. Raises
    InvalidArgumentError for a form that is malformed, not supported, larger than 64 KB or too
    costly, and MissingPackageError without llguidance.
    """
    forms = {
        "json_schema": json_schema,
        "closed_schema": closed_schema,
        "regex": regex,
        "ebnf": ebnf,
    }
    names = [name for name, value in forms.items() if value is not None]
    names += ["json_object"] if json_object else []
    if len(names) != 1:
        raise InvalidArgumentError(
            f"give exactly one of json_schema, json_object, regex and ebnf, got "
            f"{' and '.join(names) or 'none'}"
        )
    (name,) = names
    source = {"type": "object"} if json_object else forms[name]
    start, parts = _MAKERS[name](source)
    vocabulary = vocabulary_of(tokenizer)
    spaces = [""] if vocabulary.spaced is None or continues else ["", '" " ']
    grammars = [_written(space + start, parts) for space in spaces]
    return vocabulary.guide("\n".join(grammars), lambda: _guide(vocabulary, grammars))


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


# Forms in llguidance's terms: an expression for the text, and the grammars it refers to

Form = tuple[str, list[dict[str, Any]]]


def _from_schema(schema: object) -> Form:
    if not isinstance(schema, Mapping):
        raise InvalidArgumentError(f"json_schema must be a JSON schema, got {shown(schema)}")
    text = written(dict(schema))
    _check_size("json_schema", text)
    return "@text", [{"name": "text", "json_schema": json.loads(text)}]


def _from_closed_schema(schema: object) -> Form:
    return _from_schema(closed(schema) if isinstance(schema, Mapping) else schema)


def _from_regex(regex: object) -> Form:
    text = _check_size("regex", regex)
    if (len(text) - len(text.rstrip("\\"))) % 2:  # would take the closing mark as its own
        raise InvalidArgumentError("regex must not end with a backslash that escapes nothing")
    return f"/{library().regex_to_lark(text, 'd')}/" if text else '""', []


def _from_grammar(grammar: object) -> Form:
    library()
    from llguidance.gbnf_to_lark import gbnf_to_lark

    text = lark_of(_check_size("ebnf", grammar), gbnf_to_lark)
    return "@text", [{"name": "text", "lark_grammar": text}]


_MAKERS: dict[str, Callable[[object], Form]] = {
    "json_schema": _from_schema,
    "closed_schema": _from_closed_schema,
    "json_object": _from_schema,
    "regex": _from_regex,
    "ebnf": _from_grammar,
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


def _written(start: str, parts: list[dict[str, Any]]) -> str:
    """A grammar as llguidance reads it."""
    return json.dumps({"grammars": [{"lark_grammar": f"start: {start}\n{OPTIONS}"}, *parts]})


def _guide(vocabulary: Vocabulary, grammars: Sequence[str]) -> Guide:
    def compiled() -> Guide:
        guide = Guide(vocabulary, [_matcher(vocabulary, grammar) for grammar in grammars])
        guide.allowed()  # refuses a form that no text fits, and prepares the first token
        return guide

    return _with_large_stack(compiled)


def _with_large_stack(work: Callable[[], T]) -> T:
    """The result of `work` on a thread with a stack of STACK bytes."""
    with ThreadPoolExecutor(1) as pool:
        with _sizing:  # the size holds for every thread that starts meanwhile
            usual = stack_size(STACK)
            try:
                result = pool.submit(work)
            finally:
                stack_size(usual)
        return result.result()


_sizing = Lock()


def _matcher(vocabulary: Vocabulary, grammar: str) -> LLMatcher:
    guidance = library()
    matcher: LLMatcher = guidance.LLMatcher(
        vocabulary.tokens,
        grammar,
        log_level=0,
        limits=guidance.LLParserLimits(**LIMITS),
    )
    _check(matcher, "cannot follow this form")
    return matcher


def _check(matcher: LLMatcher, trouble: str) -> None:
    """InvalidArgumentError with the library's reason, if it has one."""
    if matcher.is_error():
        raise InvalidArgumentError(f"{trouble}: {_reason(matcher.get_error())}")


def _reason(message: str) -> str:
    """llguidance's reason, without its drawing of the place, which may show text we put around."""
    if message.startswith("NoExtension"):
        return "no text fits that these tokens can write"
    lines = message.strip().splitlines() or ["it does not say why"]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    reason = " ".join((errors[-1] if errors else lines[0]).replace("<non-verbose/>", "").split())
    # It may quote the form, which may be long.
    return reason if len(reason) <= 300 else f"{reason[:100]} ... {reason[-180:]}"


# Tokens as bytes


class Vocabulary:
    """A tokenizer's tokens, prepared for llguidance, and the last grammars made of them."""

    def __init__(self, tokenizer: Tokenizer):
        guidance = library()
        if not tokenizer.eos_ids:
            raise InvalidArgumentError(
                "the tokenizer names no end of text, so that no text of a form could end; name "
                "eos_token in its tokenizer_config.json"
            )
        size = max([tokenizer.vocab_size, *(token + 1 for token in tokenizer.eos_ids)])
        pieces = [_bytes(tokenizer, token) for token in range(size)]
        added = tokenizer.backend.get_added_tokens_decoder()
        special = {token for token, about in added.items() if about.special}
        self.eos = frozenset(tokenizer.eos_ids)
        self.ends = _packed(self.eos, size)
        spaced = [token for token, piece in enumerate(pieces) if piece.startswith(b" ")]
        drops = any(tokenizer.decode([token]) == "" for token in spaced if pieces[token] == b" ")
        self.spaced = _packed(spaced, size) if drops else None
        """Tokens that begin with a space; None if a first space is not dropped."""
        self.every = np.full_like(self.ends, 0xFFFFFFFF)
        self.solid = _packed([i for i, piece in enumerate(pieces) if piece[:1].strip()], size)
        """Tokens that do not begin with white space."""
        table = _TokenTable(pieces, min(self.eos), sorted(special | self.eos))
        self.tokens: LLTokenizer = guidance.LLTokenizer(
            guidance.TokenizerWrapper(table), eos_token=sorted(self.eos)
        )
        self.guides: OrderedDict[str, Guide | str] = OrderedDict()
        """Or why there is none, by what they were made of; the last that was asked for last."""
        self.lock = Lock()

    def guide(self, source: str, make: Callable[[], Guide]) -> Guide:
        """A copy of the guide that `make` makes of `source`, or made of it before."""
        with self.lock:
            found = self.guides.get(source)
        if found is None:
            try:
                found = make()
            except InvalidArgumentError as error:
                found = str(error)
        with self.lock:
            self.guides[source] = found
            self.guides.move_to_end(source)
            if len(self.guides) > KEPT:
                self.guides.popitem(last=False)
            if isinstance(found, Guide):
                return found.copy()
        raise InvalidArgumentError(found)


class _TokenTable:
    """The interface that llguidance expects of a tokenizer; special tokens never match text."""

    bos_token_id = None

    def __init__(self, tokens: list[bytes], end: int, special: list[int]):
        self.tokens, self.eos_token_id, self.special_token_ids = tokens, end, special

    def __call__(self, text: str | bytes) -> list[int]:
        """Would tokenize text; never called, by OPTIONS."""
        return []


def _bytes(tokenizer: Tokenizer, token: int) -> bytes:
    """The bytes of a token; none for an id that the tokenizer lacks."""
    try:
        return tokenizer.bytes_of(token)
    except TokenizerError:
        return b""


def _packed(tokens: Iterable[int], size: int) -> np.ndarray:
    """A bit mask of tokens, in the layout of `Guide.allowed`."""
    bits = np.zeros(-(-size // 32) * 32, np.uint8)
    bits[list(tokens)] = 1
    return np.packbits(bits, bitorder="little").view("<u4")


_vocabularies: WeakKeyDictionary[Tokenizer, Vocabulary] = WeakKeyDictionary()
_making = Lock()


def vocabulary_of(tokenizer: Tokenizer) -> Vocabulary:
    """Cached by tokenizer, since building it takes half a second."""
    with _making:
        if tokenizer not in _vocabularies:
            _vocabularies[tokenizer] = Vocabulary(tokenizer)
        return _vocabularies[tokenizer]


# Following a text


class Guide:
    """A Grammar backed by llguidance.

    `starts` are the ways to begin: without a dropped space and, where there can be one, with it.
    """

    def __init__(self, vocabulary: Vocabulary, starts: Sequence[LLMatcher]):
        self.vocabulary, self.starts = vocabulary, tuple(starts)
        self.count = 0
        """Tokens followed, end of text not counted."""
        self.way = 0
        """Index in `starts` of the way that the text began."""
        self.closed = False
        """The end of text has come."""

    @property
    def ended(self) -> bool:
        """Only end of text may follow."""
        return self.closed or all(matcher.is_stopped() for matcher in self._open())

    def _open(self) -> tuple[LLMatcher, ...]:
        return (self.starts[self.way],) if self.count else self.starts

    def allowed(self) -> np.ndarray:
        """The tokens that may come next: uint32 words, token t at bit t % 32 of word t // 32."""
        if self.closed:
            return self.vocabulary.ends.copy()
        # llguidance's mask may have a word of padding at the end.
        size = self.vocabulary.ends.size
        bits, *others = (_allowed(matcher)[:size] for matcher in self._open())
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
        if token in self.vocabulary.eos and any(matcher.is_accepting() for matcher in self._open()):
            self.closed = True
            return
        spaced = self.vocabulary.spaced
        if self.count == 0 and spaced is not None and len(self.starts) > 1:
            self.way = int(spaced[token // 32] >> (token % 32) & 1)
        matcher = self.starts[self.way]
        matcher.consume_token(token)
        _check(matcher, f"token {token} cannot follow")
        self.count += 1

    def rollback(self, tokens: int) -> None:
        """Remove the last `tokens`, which may include an end of text."""
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
        """An independent copy."""
        copy = Guide(self.vocabulary, [matcher.deep_copy() for matcher in self.starts])
        copy.count, copy.way, copy.closed = self.count, self.way, self.closed
        return copy


def _allowed(matcher: LLMatcher) -> np.ndarray:
    bits = np.frombuffer(matcher.compute_bitmask(), "<u4")
    _check(matcher, "cannot follow this form")
    return bits
