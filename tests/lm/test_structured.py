"""Texts of a form: whatever is drawn among what is allowed, the text is of it."""

from __future__ import annotations

import contextlib
import functools
import json
import random
import re
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

import minicpm_mlx as mm
from minicpm_mlx import load_tokenizer
from minicpm_mlx.engine import Batch, Sampling, generate
from minicpm_mlx.engine.token_mask import Grammar, masked
from minicpm_mlx.errors import InvalidArgumentError, MissingPackageError
from minicpm_mlx.text.tokenizer import Tokenizer
from support.data import need_shared, write_tokenizer

pytest.importorskip("llguidance")

from minicpm_mlx.lm.structured.grammar import Guide, Vocabulary, grammar_of

KINDS = ("bytes", "demo", "minicpm-1b", "minicpm4")
CLOSING = (b'"', b"]", b"}", b")", b"\n", b",")


@pytest.fixture
def tokenizer_of(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str], Tokenizer]:
    """A tokenizer by its name: single bytes, the demo's, or a real one of the family."""

    def find(name: str) -> Tokenizer:
        if name == "demo":
            return kept(str(request.getfixturevalue("demo_folder")))
        if name == "bytes":
            write_tokenizer(tmp_path, 300)
            return load_tokenizer(tmp_path)
        return kept(str(need_shared("tokenizers", name)))

    return find


@functools.cache
def kept(folder: str) -> Tokenizer:
    return load_tokenizer(folder)


def tokens_in(bits: np.ndarray) -> list[int]:
    unpacked = np.unpackbits(bits.view(np.uint8), bitorder="little")
    return [int(token) for token in np.flatnonzero(unpacked)]


def walk(tokenizer: Tokenizer, grammar: Grammar, seed: int, patience: int = 60) -> list[int]:
    """Tokens drawn evenly from those allowed; after `patience` of them, those that may end it."""
    draw, ids = random.Random(seed), list[int]()
    while True:
        options = tokens_in(grammar.allowed())
        ends = [token for token in options if token in tokenizer.eos_ids]
        if len(ids) >= patience and not (ends or draw.random() < 0.1):
            ends = [t for t in options if tokenizer.bytes_of(t).strip(b" ").startswith(CLOSING)]
        token = draw.choice((len(ids) >= patience and ends) or options)
        grammar.accept(token)
        if token in tokenizer.eos_ids:
            assert grammar.ended
            return ids
        ids.append(token)
        assert len(ids) < 5000


def text_of(tokenizer: Tokenizer, seed: int = 0, **form: Any) -> str:
    return tokenizer.decode(walk(tokenizer, grammar_of(tokenizer, **form), seed))


def refusal(tokenizer: Tokenizer, **form: Any) -> str:
    with pytest.raises(InvalidArgumentError) as caught:
        grammar_of(tokenizer, **form)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def plain(tmp_path: Path) -> Tokenizer:
    write_tokenizer(tmp_path, 300)
    return load_tokenizer(tmp_path)


# Tokens


@pytest.mark.parametrize("name", ["demo", "minicpm-1b", "minicpm4"])
def test_bytes_of_every_token_are_those_that_decode_gives(
    name: str, tokenizer_of: Callable[[str], Tokenizer]
) -> None:
    tokenizer = tokenizer_of(name)
    vocabulary = Vocabulary(tokenizer)
    added = tokenizer.backend.get_added_tokens_decoder()
    front = tokenizer.encode("x", add_bos=False)
    for token in range(tokenizer.vocab_size):
        own = tokenizer.bytes_of(token)
        special = token in added and added[token].special
        decoded = tokenizer.decode([*front, token])
        assert decoded == ("x" if special else "x" + own.decode("utf-8", "replace"))
        if own != b"\xff":  # a mark of the library's own; in no text
            assert vocabulary.tokens.decode_bytes([token]).removeprefix(b"\xff") == own


@pytest.mark.parametrize("name", KINDS)
def test_exactly_the_tokens_are_allowed_that_some_text_goes_on_with(
    name: str, tokenizer_of: Callable[[str], Tokenizer]
) -> None:
    tokenizer = tokenizer_of(name)
    texts = ["", "a", " a", "  a b", "ab", "山", "山东\n", "🏔", "é", '"', "/\\", "aé b", "<unk>"]
    grammar = grammar_of(tokenizer, regex="|".join(re.escape(text) for text in texts))
    special = {i for i, t in tokenizer.backend.get_added_tokens_decoder().items() if t.special}
    words = [tokenizer.bytes_of(token) for token in range(tokenizer.vocab_size)]
    drops = name.startswith("minicpm")
    spelled = [text.encode() for text in texts if not (drops and text.startswith(" "))]
    spelled += [b" " + text.encode() for text in texts] if drops else []

    def check(grammar: Grammar, said: bytes, depth: int) -> None:
        left = [text[len(said) :] for text in spelled if text.startswith(said)]
        begun = {text[:end] for text in left for end in range(1, len(text) + 1)}
        wanted = {i for i, word in enumerate(words) if word in begun and i not in special}
        ends = set(tokenizer.eos_ids) if b"" in left else set()
        assert set(tokens_in(grammar.allowed())) == wanted | ends
        for token in sorted(wanted) if depth else []:
            further = grammar.copy()
            further.accept(token)
            check(further, said + words[token], depth - 1)

    check(grammar, b"", 1)


@pytest.mark.parametrize("name", KINDS)
def test_a_space_in_front_is_in_the_text_if_and_only_if_the_form_has_it(
    name: str, tokenizer_of: Callable[[str], Tokenizer]
) -> None:
    tokenizer = tokenizer_of(name)
    for form in (" +a", " ?[ab]", "[^b]{1,2}"):
        for seed in range(12):
            assert re.fullmatch(form, text_of(tokenizer, seed, regex=form), re.DOTALL)
    assert {text_of(tokenizer, seed, regex=" ?a") for seed in range(40)} == {"a", " a"}


def test_every_end_of_text_of_the_model_ends_a_form() -> None:
    tokenizer = kept(str(need_shared("tokenizers", "minicpm4")))
    grammar = grammar_of(tokenizer, regex="a?")
    assert len(tokenizer.eos_ids) == 2
    assert set(tokenizer.eos_ids) <= set(tokens_in(grammar.allowed()))
    for end in tokenizer.eos_ids:
        ended = grammar.copy()
        ended.accept(end)
        assert ended.ended
        assert set(tokens_in(ended.allowed())) == set(tokenizer.eos_ids)
        with pytest.raises(InvalidArgumentError, match="has ended"):
            ended.accept(end)


@pytest.mark.parametrize("size", [300, 320])
def test_rows_that_pad_the_embedding_are_never_allowed(size: int, tmp_path: Path) -> None:
    write_tokenizer(tmp_path, size)
    plain = load_tokenizer(tmp_path)
    bits = grammar_of(plain, regex="(?s:.)*").allowed()
    assert bits.dtype == np.uint32
    assert bits.shape == (-(-plain.vocab_size // 32),)
    logits = mx.arange(1000, dtype=mx.float32)
    allowed = set(tokens_in(bits))
    found: list[float] = masked(logits, bits).tolist()  # type: ignore[assignment]
    assert found == [float(i) if i in allowed else -float("inf") for i in range(1000)]
    fewer: list[float] = masked(logits[:7], bits).tolist()  # type: ignore[assignment]
    assert fewer == found[:7]


def test_numbers_without_a_token_are_no_tokens() -> None:
    tokenizer = kept(str(need_shared("tokenizers", "minicpm-1b")))
    tokenizer.eos_ids = (2, 73500)
    try:
        grammar = grammar_of(Tokenizer(tokenizer.backend, eos_ids=(2, 73500)), regex="(?s:.)*")
    finally:
        tokenizer.eos_ids = (2,)
    allowed = tokens_in(grammar.allowed())
    assert max(allowed) == 73500
    assert not {*range(tokenizer.vocab_size, 73500)} & set(allowed)


def test_a_tokenizer_without_an_end_is_refused(plain: Tokenizer) -> None:
    endless = Tokenizer(plain.backend)
    assert "end of text" in refusal(endless, regex="a")


# JSON schemas

NAMES = st.sampled_from(["a", "b", "name", "山", 'q"', "x y"])
# No rare planes: the demo's vocabulary lacks bytes that their characters begin with.
WORDS = st.text(st.characters(max_codepoint=0xFFFF, exclude_categories=["Cs"]), max_size=5)
LEAVES = st.one_of(
    st.just({"type": "integer"}),
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.just({"type": "number", "minimum": -2.5, "maximum": 17}),
    st.just({"type": "integer", "multipleOf": 7, "exclusiveMinimum": 3}),
    st.just({"type": ["string", "null"], "maxLength": 3}),
    st.builds(lambda n: {"type": "string", "minLength": n, "maxLength": n + 4}, st.integers(0, 5)),
    st.sampled_from(
        ["^[a-z]{1,4}$", r"^\d{2}-\d{2}$", "^(山|水|é){1,3}$", r"^[^\s]{0,3}$", "^(|no|yes)$"]
    ).map(lambda pattern: {"type": "string", "pattern": pattern}),
    st.just({"type": "string", "pattern": "b", "maxLength": 5}),
    st.sampled_from(["uuid", "ipv4"]).map(lambda f: {"type": "string", "format": f}),
    st.lists(
        st.one_of(WORDS, st.integers(-99, 99), st.booleans(), st.none()), min_size=1, max_size=4
    ).map(lambda values: {"enum": values}),
    st.recursive(
        st.one_of(WORDS, st.integers(-9, 9)),
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(NAMES, inner, max_size=2),
        max_leaves=4,
    ).map(lambda value: {"const": value}),
    st.just({"$ref": "#/$defs/short"}),
)


@st.composite
def objects(draw: st.DrawFn, inner: st.SearchStrategy[dict[str, Any]]) -> dict[str, Any]:
    properties = draw(st.dictionaries(NAMES, inner, max_size=3))
    schema: dict[str, Any] = {"type": "object", "properties": properties}
    if properties:
        schema["required"] = draw(st.lists(st.sampled_from(sorted(properties)), unique=True))
    extra = st.sampled_from([False, False, {"type": "integer"}])
    return schema | {"additionalProperties": draw(extra)}


def composed(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    lists = st.builds(
        lambda items, n: {"type": "array", "items": items, "minItems": n, "maxItems": n + 2},
        inner,
        st.integers(0, 2),
    )
    tuples = st.lists(inner, min_size=1, max_size=2).map(
        lambda first: {"type": "array", "prefixItems": first, "items": False}
    )
    either = st.lists(inner, min_size=1, max_size=3).map(lambda options: {"anyOf": options})
    return st.one_of(objects(inner), objects(inner), lists, tuples, either)


DEFS = {
    "short": {"type": "string", "maxLength": 2},
    "tree": {
        "type": "object",
        "properties": {
            "value": {"type": "integer"},
            "children": {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 2},
        },
        "required": ["value"],
        "additionalProperties": False,
    },
}
SCHEMAS = st.recursive(LEAVES, composed, max_leaves=6).map(lambda schema: schema | {"$defs": DEFS})


def many(**options: Any) -> settings:
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(
        **{"deadline": None, "max_examples": 100, "suppress_health_check": checks} | options
    )


def check_schema(tokenizer: Tokenizer, schema: dict[str, Any], seed: int) -> None:
    validator = pytest.importorskip("jsonschema_rs")
    text = text_of(tokenizer, seed, json_schema=schema)
    value = json.loads(text)
    assert validator.Draft202012Validator(schema, validate_formats=True).is_valid(value), text


@pytest.mark.parametrize("name", ["demo", pytest.param("minicpm-1b", marks=pytest.mark.slow)])
@many(max_examples=20)
@given(schema=SCHEMAS, seed=st.integers(0, 2**30))
def test_what_is_drawn_is_valid_by_the_schema(
    name: str, tokenizer_of: Callable[[str], Tokenizer], schema: dict[str, Any], seed: int
) -> None:
    check_schema(tokenizer_of(name), schema, seed)


@pytest.mark.long
@pytest.mark.parametrize("name", KINDS)
@many(max_examples=300)
@given(schema=SCHEMAS, seed=st.integers(0, 2**30))
def test_what_is_drawn_is_valid_by_hundreds_of_schemas(
    name: str, tokenizer_of: Callable[[str], Tokenizer], schema: dict[str, Any], seed: int
) -> None:
    check_schema(tokenizer_of(name), schema, seed)


def test_a_schema_may_refer_to_itself(plain: Tokenizer) -> None:
    schema = {"$ref": "#/$defs/tree", "$defs": DEFS}
    for seed in range(20):
        value = json.loads(text_of(plain, seed, json_schema=schema))
        assert set(value) <= {"value", "children"}


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        ("date", r"\d{4}-\d\d-\d\d"),
        ("time", r"\d\d:\d\d:\d\d(\.\d+)?([zZ]|[+-]\d\d:\d\d)"),
        ("email", r"[^@\s]+@[^@\s]+"),
    ],
)
def test_dates_and_the_like_have_their_shape(kind: str, shape: str, plain: Tokenizer) -> None:
    schema = {"type": "string", "format": kind, "maxLength": 40}
    for seed in range(10):
        assert re.fullmatch(shape, json.loads(text_of(plain, seed, json_schema=schema)))


def test_any_object_is_an_object(plain: Tokenizer) -> None:
    for seed in range(10):
        assert isinstance(json.loads(text_of(plain, seed, json_object=True)), dict)


def test_properties_come_in_the_order_of_the_schema(plain: Tokenizer) -> None:
    names = ["zebra", "apple", "mango"]
    schema = {
        "type": "object",
        "properties": {name: {"type": "boolean"} for name in names},
        "required": names,
    }
    assert list(json.loads(text_of(plain, 3, json_schema=schema)))[:3] == names


def test_space_between_words_of_json_comes_to_an_end(
    tokenizer_of: Callable[[str], Tokenizer],
) -> None:
    tokenizer = tokenizer_of("demo")
    grammar = grammar_of(tokenizer, json_object=True)
    for token in tokenizer.encode('{"a":', add_bos=False):
        grammar.accept(token)
    said = b""
    for _ in range(100):
        blank = [t for t in tokens_in(grammar.allowed()) if not tokenizer.bytes_of(t).strip()]
        blank = [t for t in blank if t not in tokenizer.eos_ids]
        if not blank:
            break
        grammar.accept(min(blank, key=lambda token: len(tokenizer.bytes_of(token))))
        said += b"."
    assert 1 <= len(said) <= 36


@pytest.mark.parametrize("indent", [None, 2, 4, "\t"])
def test_json_may_be_laid_out_as_usual(
    indent: Any, tokenizer_of: Callable[[str], Tokenizer]
) -> None:
    tokenizer = tokenizer_of("demo")
    text = json.dumps({"a": [1, {"b": [True, {"c": "x"}]}], "d": {}}, indent=indent)
    grammar = grammar_of(tokenizer, json_object=True)
    for token in tokenizer.encode(text, add_bos=False):
        grammar.accept(token)
    assert grammar.ended


@pytest.mark.parametrize(
    "schema",
    [
        {"title": "t", "description": "d", "default": 1, "examples": [1], "type": "integer"},
        {"type": "array", "items": {"type": "null"}, "uniqueItems": False, "maxItems": 1},
        {"x-order": 1, "type": "boolean"},
        {"$schema": "http://json-schema.org/draft-07/schema#", "type": "null"},
        {"properties": {"x-guidance": {"const": 1}, "not": {"const": 2}}, "required": ["not"]},
    ],
)
def test_keywords_that_change_nothing_are_taken(schema: dict[str, Any], plain: Tokenizer) -> None:
    before = json.dumps(schema)
    json.loads(text_of(plain, 1, json_schema=schema))
    assert json.dumps(schema) == before


# Regular expressions

REGEXES = [
    "",
    "yes|no",
    r"[-+]?[0-9]+[ \n]*",
    r"\d{1,3}(\.\d{1,3}){3}",
    "[一-鿿]{2,4}[。！？]",
    "(?:春|夏|秋|冬)天(来|走)了?",
    r"[a-z]{1,9}@[a-z]{1,9}\.(com|org)",
    r"^(a|bc){2,5}$",
    r"/[/\\]\"'",
    r"\d{1,5}[ \t]\d",
    "[^a-y ]{2}",
    "x*y?z+?",
    "(?i)hello",
    "🏔{2}|é+",
    r"\n\t?\r\n",
]


@pytest.mark.parametrize("name", ["bytes", "minicpm-1b"])
def test_what_is_drawn_matches_the_regular_expression(
    name: str, tokenizer_of: Callable[[str], Tokenizer]
) -> None:
    tokenizer = tokenizer_of(name)
    for regex in REGEXES:
        grammar = grammar_of(tokenizer, regex=regex)
        for seed in range(3):
            text = tokenizer.decode(walk(tokenizer, grammar.copy(), seed, patience=12))
            assert re.fullmatch(regex, text), text


def test_digits_are_those_from_0_to_9_and_letters_those_of_any_script(plain: Tokenizer) -> None:
    digit, letter = grammar_of(plain, regex=r"\d"), grammar_of(plain, regex=r"\w")
    ascii_digits = plain.encode("0123456789", add_bos=False)
    assert tokens_in(digit.allowed()) == sorted(ascii_digits)
    for token in plain.encode("山", add_bos=False):
        letter.accept(token)
    assert letter.ended


LITERALS = st.text(max_size=3).map(re.escape) | st.sampled_from(["[a-c]", "[^b]", ".", r"\d"])
PATTERNS = st.recursive(
    LITERALS,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map("".join),
        st.lists(inner, min_size=1, max_size=3).map(lambda parts: f"({'|'.join(parts)})"),
        inner.map(lambda part: f"(?:{part})?"),
        inner.map(lambda part: f"(?:{part}){{1,3}}"),
    ),
    max_leaves=8,
)


@many(max_examples=30)
@given(regex=PATTERNS, seed=st.integers(0, 2**30))
def test_what_is_drawn_matches_any_regular_expression(
    tokenizer_of: Callable[[str], Tokenizer], regex: str, seed: int
) -> None:
    text = text_of(tokenizer_of("minicpm4"), seed, regex=regex)
    assert re.fullmatch(regex, text), text


# Grammars

SUM = """
root ::= term ("+" term)*   # a sum
term ::= number
   | "(" root ")"
number ::= [1-9] [0-9]{0,2}
"""
LIST = """
start: "[" (item ("," item)*)? "]"
item: NAME | start
NAME: /[a-z]{1,3}|山/
"""


def is_sum(text: str) -> bool:
    return not re.sub(r"[0-9+()]", "", text) and eval(text) > 0


def is_list(text: str) -> bool:
    quoted = re.sub("[a-z山]+", lambda name: f'"{name[0]}"', text)
    return isinstance(json.loads(quoted), list)


@pytest.mark.parametrize("name", ["bytes", "minicpm-1b"])
@pytest.mark.parametrize(("ebnf", "holds"), [(SUM, is_sum), (LIST, is_list)])
def test_what_is_drawn_is_of_the_grammar(
    ebnf: str, holds: Callable[[str], bool], name: str, tokenizer_of: Callable[[str], Tokenizer]
) -> None:
    tokenizer = tokenizer_of(name)
    grammar = grammar_of(tokenizer, ebnf=ebnf)
    for seed in range(8):
        assert holds(tokenizer.decode(walk(tokenizer, grammar.copy(), seed, patience=25)))


@pytest.mark.parametrize(
    ("ebnf", "texts"),
    [
        (r'root ::= "\u0041" | [\u5c71-\u5c71] | "\x42#"', {"A", "山", "B#"}),
        ('root ::= "a" # one | "c"\n  # two\n | "b"\n', {"a", "b"}),
        (r'root ::= "q\"|\n" | [#] | [\]]', {'q"|\n', "#", "]"}),
        ('root ::= one-two\none-two ::= "x" "y"?', {"x", "xy"}),
        ('start: "a" | "b" // c\n', {"a", "b"}),
        ('start: /[\\/]/ | "%json" | "stop = 1"', {"/", "%json", "stop = 1"}),
    ],
)
def test_both_ways_to_write_a_grammar_are_read(
    ebnf: str, texts: set[str], plain: Tokenizer
) -> None:
    grammar = grammar_of(plain, ebnf=ebnf)
    found = {plain.decode(walk(plain, grammar.copy(), seed)) for seed in range(60)}
    assert found == texts


def test_a_schema_in_a_grammar_is_kept_and_checked(plain: Tokenizer) -> None:
    ebnf = (
        'start: "<" call ">"\ncall: %json {"type": "array", "items": {"KEY": 4}, "maxItems": 3}\n'
    )
    text = text_of(plain, 2, ebnf=ebnf.replace("KEY", "const"))
    assert set(json.loads(text.removeprefix("<").removesuffix(">"))) <= {4}
    assert "'#/items': the keyword 'KEY'" in refusal(plain, ebnf=ebnf)
    assert "%json must be followed by JSON" in refusal(plain, ebnf="start: %json {")


# Following a text


@pytest.mark.parametrize("name", ["demo", pytest.param("minicpm4", marks=pytest.mark.slow)])
@many(max_examples=12)
@given(schema=SCHEMAS, seed=st.integers(0, 2**30), data=st.data())
def test_tokens_taken_back_leave_no_trace(
    name: str,
    tokenizer_of: Callable[[str], Tokenizer],
    schema: dict[str, Any],
    seed: int,
    data: st.DataObject,
) -> None:
    tokenizer = tokenizer_of(name)
    grammar = grammar_of(tokenizer, json_schema=schema)
    untouched = grammar.copy()
    ids = [*walk(tokenizer, grammar.copy(), seed), tokenizer.eos_ids[0]]
    states = []
    for token in ids:
        states.append((grammar.ended, grammar.allowed().tobytes()))
        grammar.accept(token)
    back = data.draw(st.integers(1, len(ids)))
    grammar.rollback(back)
    at = len(ids) - back
    assert (grammar.ended, grammar.allowed().tobytes()) == states[at]
    for state, token in zip(states[at:], ids[at:], strict=True):
        assert (grammar.ended, grammar.allowed().tobytes()) == state
        grammar.accept(token)
    grammar.rollback(len(ids))
    assert grammar.allowed().tobytes() == states[0][1] == untouched.allowed().tobytes()


def test_a_text_that_the_tokens_cannot_write_is_an_error_where_it_shows() -> None:
    words = {"a": 0, "b": 1, "</s>": 2}
    backend = Backend(models.BPE(words, []))
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["</s>"])
    few = Tokenizer(backend, eos_ids=[2])
    assert "no text fits" in refusal(few, regex="c")
    grammar = grammar_of(few, regex="abc|b")
    grammar.accept(0)
    grammar.accept(1)
    with pytest.raises(InvalidArgumentError, match="no text fits"):
        grammar.allowed()


def test_a_copy_goes_its_own_way(plain: Tokenizer) -> None:
    a, b, end = *plain.encode("ab"), plain.eos_ids[0]
    grammar = grammar_of(plain, regex="[ab]{2}")
    grammar.accept(a)
    copy = grammar.copy()
    copy.accept(b)
    copy.accept(end)
    assert copy.ended
    assert not grammar.ended
    assert set(tokens_in(grammar.allowed())) == {a, b}
    grammar.rollback(1)
    assert copy.ended


def test_tokens_not_allowed_and_steps_never_taken_are_refused(plain: Tokenizer) -> None:
    with pytest.raises(InvalidArgumentError, match="cannot follow"):
        grammar_of(plain, regex="ab").accept(plain.encode("b")[0])
    with pytest.raises(InvalidArgumentError, match="cannot follow"):
        grammar_of(plain, regex="ab").accept(plain.eos_ids[0])
    grammar = grammar_of(plain, regex="ab")
    grammar.accept(plain.encode("a")[0])
    with pytest.raises(InvalidArgumentError, match="only 1"):
        grammar.rollback(2)


def test_an_end_is_known_as_soon_as_nothing_else_may_follow(plain: Tokenizer) -> None:
    grammar = grammar_of(plain, regex="ab?")
    a, b = plain.encode("ab")
    assert not grammar.ended
    grammar.accept(a)
    assert not grammar.ended
    grammar.accept(b)
    assert grammar.ended
    assert tokens_in(grammar.allowed()) == list(plain.eos_ids)


# Arguments, and what is out to do harm


@pytest.mark.parametrize(
    ("kind", "form", "message"),
    [
        (
            "json_schema",
            {"properties": {"a": {"nullable": True}}},
            "'#/properties/a': the keyword 'nullable'",
        ),
        ("json_schema", {"items": {"not": {}}}, "'#/items': the keyword 'not'"),
        ("json_schema", {"type": "array", "uniqueItems": True}, "uniqueItems"),
        ("json_schema", {"x-guidance": {"lenient": True}}, "x-guidance"),
        ("json_schema", {"$defs": {"a": {"minLenght": 1}}}, "minLenght"),
        ("json_schema", {"type": "string", "format": "colour"}, "Unknown format: colour"),
        ("json_schema", {"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ("json_schema", {"type": "string", "minLength": 3, "maxLength": 2}, "minLength"),
        ("json_schema", {"oneOf": [{"type": "string"}, {"maxLength": 2}]}, "oneOf"),
        (
            "json_schema",
            {"$ref": "https://example.com/a.json"},
            "$ref must point into the schema itself",
        ),
        ("json_schema", {"$ref": "#/$defs/none"}, "does not exist"),
        ("json_schema", {"anyOf": [{}, {"$ref": f"#/anyOf/{'9' * 5000}"}]}, "array index"),
        ("json_schema", {"$ref": "#"}, "no text fits"),
        ("json_schema", {"properties": {"a": {"$id": "b"}}}, "$id"),
        ("json_schema", {"minProperties": 3}, "minProperties"),
        ("json_schema", {"properties": 5}, "properties must be an object"),
        ("json_schema", {"const": float("nan")}, "made of JSON"),
        ("regex", "(a", "unclosed group"),
        ("regex", r"(a)\1", "backreferences"),
        ("regex", "a(?!b)", "look-around"),
        ("regex", r"a\b", "not supported"),
        ("regex", "a\\", "backslash"),
        ("regex", r"[^\s\S]", "no text fits"),
        ("regex", "\ud800", "surrogate"),
        ("regex", "a" * 70000, "65536 bytes"),
        ("regex", 5, "must be text"),
        ("ebnf", "start: nothing", "nothing"),
        ("ebnf", 'root ::= "a', "not GBNF"),
        ("ebnf", "one ::= [a]", "root"),
        ("ebnf", "root ::= other", "other"),
        ("ebnf", 'start: x\nx[temperature=0.5]: "a"', "attribute temperature"),
        ("ebnf", 'start: x "b"\nx[max_tokens=3]: /a*/', "attribute max_tokens"),
        ("ebnf", 'start: x "b"\nx[stop="b"]: /a*/', "attribute stop"),
        ("ebnf", "start: start", "no text fits"),
        ("ebnf", "", "start"),
    ],
)
def test_a_form_that_cannot_be_kept_is_refused_by_name(
    kind: str, form: Any, message: str, plain: Tokenizer
) -> None:
    assert message in refusal(plain, **{kind: form})


def test_exactly_one_form_is_given(plain: Tokenizer) -> None:
    assert "got none" in refusal(plain)
    assert "got regex and json_object" in refusal(plain, regex="a", json_object=True)
    assert "must be a JSON schema" in refusal(plain, json_schema=True)


def test_without_the_library_the_pip_command_is_named(
    plain: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    for form in ({"regex": "a"}, {"ebnf": 'start: "a"'}, {"json_object": True}):
        with pytest.raises(MissingPackageError, match=r'pip install "minicpm-mlx\[serve\]"'):
            grammar_of(plain, **form)  # type: ignore[arg-type]


def chain(links: int, link: Callable[[str], Any]) -> dict[str, Any]:
    definitions = {f"a{i}": link(f"#/$defs/a{i + 1}") for i in range(links)}
    return {"$ref": "#/$defs/a0", "$defs": definitions | {f"a{links}": {"type": "null"}}}


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


def rules(count: int, rule: str) -> str:
    lines = [rule.format(i, i + 1) for i in range(count)]
    return "\n".join(["start: r0", *lines, f'r{count}: "a"'])


HARMFUL: dict[str, dict[str, Any]] = {
    "repetition in repetition": {"regex": r"(\w{1,500}\s?){1,500}"},
    "three of them": {"regex": "((a{1,100}){1,100}){1,100}"},
    "states without number": {"regex": "(.*a.{30}b.*)|(.*c.{40}d.*)"},
    "optional letters": {"regex": "a?" * 5000 + "a" * 5000},
    "brackets": {"regex": "(" * 30000 + "a" + ")" * 30000},
    "a deep schema": {"json_schema": nested(5000)},
    "references": {"json_schema": chain(1500, lambda name: {"$ref": name})},
    "nested references": {"json_schema": chain(800, lambda name: {"items": {"$ref": name}})},
    "properties": {"json_schema": {"properties": {f"p{i}": {} for i in range(4000)}}},
    "a large multiple": {"json_schema": {"type": "integer", "multipleOf": 1000003}},
    "multiples": {
        "json_schema": {"allOf": [{"type": "integer", "multipleOf": n} for n in (997, 991, 983)]}
    },
    "a tiny multiple": {"json_schema": {"type": "number", "multipleOf": 1e-300}},
    "a large schema": {"json_schema": {"enum": ["x" * 100] * 1000}},
    "rules": {"ebnf": rules(4000, "r{0}: r{1}")},
    "terms": {"ebnf": rules(2000, 'r{0}: "b" r{1}').replace("r", "R").replace("staRt", "start")},
    "brackets in rules": {"ebnf": rules(400, "r{0}: " + '("b" ' * 12 + " r{1} " + ")?" * 12)},
    "doubling terms": {
        "ebnf": rules(40, "r{0}: r{1} r{1}").replace("r", "R").replace("staRt", "start")
    },
    "rules of GBNF": {
        "ebnf": "root ::= r0\n"
        + "\n".join(f"r{i} ::= r{i + 1}" for i in range(3000))
        + "\nr3000 ::= [a]"
    },
    "brackets of GBNF": {"ebnf": "root ::= " + "(" * 20000 + "[a]" + ")" * 20000},
}


@pytest.mark.parametrize("name", HARMFUL)
def test_a_form_that_costs_much_is_refused_or_followed_soon(
    name: str, tokenizer_of: Callable[[str], Tokenizer]
) -> None:
    tokenizer = tokenizer_of("minicpm-1b")
    grammar_of(tokenizer, regex="a")  # reads the vocabulary
    start = time.perf_counter()
    with contextlib.suppress(InvalidArgumentError):
        grammar = grammar_of(tokenizer, **HARMFUL[name])
        for seed in range(3):
            draw, further = random.Random(seed), grammar.copy()
            for _ in range(25):
                token = draw.choice(tokens_in(further.allowed()))
                if token in tokenizer.eos_ids:
                    break
                further.accept(token)
    assert time.perf_counter() - start < 8


LARGEST: dict[str, dict[str, Any]] = {
    "references": {"json_schema": chain(480, lambda name: {"$ref": name})},
    "properties": {"json_schema": chain(235, lambda name: {"properties": {"x": {"$ref": name}}})},
    "items": {"json_schema": chain(320, lambda name: {"items": {"$ref": name}})},
    "depth": {"json_schema": nested(60)},
    "rules": {"ebnf": rules(990, 'r{0}: "x" r{1}')},
    "terms": {"ebnf": rules(450, 'r{0}: ("x" r{1})?').replace("r", "R").replace("staRt", "start")},
    "names": {"json_schema": {"properties": {f"p{i}": {} for i in range(400)}}},
}


@pytest.mark.parametrize("name", LARGEST)
def test_the_deepest_forms_that_are_taken_fit_a_small_stack(name: str, plain: Tokenizer) -> None:
    """Too small a stack would end this process."""
    found: list[Any] = []
    started = threading.Event()

    def follow() -> None:
        started.wait()
        try:
            grammar = grammar_of(plain, **LARGEST[name])
            walk(plain, grammar.copy(), 1, patience=5)
            found.append(grammar)
        except Exception as error:
            found.append(error)

    usual = threading.stack_size(512 * 1024)
    thread = threading.Thread(target=follow)
    thread.start()
    threading.stack_size(usual)
    started.set()
    thread.join()
    assert isinstance(found[0], Guide), found
    assert threading.stack_size() == usual


# With a model

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"enum": [3, 40]}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
ANSWER = r"(Yes|No), it is [a-z]{2,8}\."
POINTS = 'root ::= "- " [a-z]{1,9} ("\\n- " [a-z]{1,9}){1,2}'
FORMS: list[tuple[dict[str, Any], Callable[[str], bool]]] = [
    ({"regex": ANSWER}, lambda text: bool(re.fullmatch(ANSWER, text))),
    ({"json_schema": PERSON}, lambda text: set(json.loads(text)) == {"name", "age"}),
    ({"ebnf": POINTS}, lambda text: text.count("- ") in (2, 3)),
]
WAYS = [Sampling(), Sampling(temperature=1.5, seed=5)]


def prompt_of(demo: mm.LM) -> list[int]:
    return demo.encode([{"role": "user", "content": "Tell me about a cat."}])


@pytest.mark.slow
@pytest.mark.parametrize("beside", [False, True])
def test_a_model_keeps_to_the_form_and_free_streams_say_what_they_would_alone(
    demo: mm.LM, beside: bool
) -> None:
    tokenizer, prompt = demo.tokenizer, prompt_of(demo)
    size, eos = tokenizer.vocab_size, tokenizer.eos_ids
    batch = Batch(demo.model, vocab_size=size, width=12)
    held = {}
    for form, holds in FORMS:
        for how in WAYS:
            stream = batch.add(
                prompt, max_tokens=80, sampling=how, eos=eos, grammar=grammar_of(tokenizer, **form)
            )
            held[stream] = holds
    free = [batch.add(prompt, max_tokens=12, sampling=how, eos=eos) for how in WAYS if beside]
    told: dict[int, list[int]] = {}
    for drawn in batch.tokens():
        told.setdefault(drawn.stream, []).append(drawn.token)
    batch.close()
    for stream, holds in held.items():
        assert told[stream][-1] in eos
        text = tokenizer.decode(told[stream][:-1])
        assert holds(text), text
    for stream, how in zip(free, WAYS, strict=False):
        alone = generate(demo.model, prompt, max_tokens=12, sampling=how, eos=eos, vocab_size=size)
        assert told[stream] == list(alone)
