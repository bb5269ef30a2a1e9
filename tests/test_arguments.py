"""Arguments of a wrong kind: one named error that says what was got; good ones in disguise work."""

from __future__ import annotations

import gc
import json
import re
from dataclasses import is_dataclass, replace
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import minicpm_mlx as mm
from minicpm_mlx.arguments import limits, shown
from minicpm_mlx.engine import Sampler, Sampling, generate
from minicpm_mlx.errors import ConfigError, InvalidArgumentError, TemplateError
from minicpm_mlx.lm.sampling import sampling_with
from minicpm_mlx.weights.gguf.modelfile import write_modelfile
from support.data import GOLDEN
from support.source import modules
from support.tiny_model import write_model

GREEDY = mm.Sampling()
QUESTION = {"role": "user", "content": "Hi"}


def refused(message: str) -> Any:
    return pytest.raises(InvalidArgumentError, match=re.escape(message))


@pytest.mark.parametrize(
    ("wrong", "got"),
    [
        (None, "None"),
        (5, "5"),
        (b"bytes", "b'bytes'"),
        (bytearray(b"x"), "bytearray(b'x')"),
        (QUESTION, "{'content': 'Hi', 'role': 'user'}"),
        pytest.param((i for i in [1]), "<generator", id="generator"),
        ({1, 2}, "{1, 2}"),
        (list, "<class 'list'>"),
        ([True], "a list with True in it"),
        ([np.True_], "a list with np.True_ in it"),
        ([1, 1.5], "a list with 1.5 in it"),
        ([1, "a"], "a list with 'a' in it"),
        ([[1, 2]], "a list with [1, 2] in it"),
        ([[QUESTION]], "a list with [{'content'"),
        (np.array(3), "array(3)"),
        (np.array([[1, 2], [3, 4]]), "array([[1, 2], [3, 4]])"),
        (np.array([0.5]), "a ndarray with np.float64(0.5) in it"),
    ],
    ids=repr,
)
def test_prompt_of_another_kind_is_refused(demo: mm.LM, wrong: Any, got: str) -> None:
    message = f"a prompt must be text, a list of token ids or a list of messages, got {got}"
    for call in (demo.encode, demo.stream, demo.generate):
        with refused(message):
            call(wrong)


@pytest.mark.parametrize(
    "ids",
    [(1, 2), range(1, 3), np.array([1, 2]), [np.int64(1), np.uint8(2)], mx.array([1, 2])],
    ids=repr,
)
def test_any_flat_list_of_integers_is_a_prompt(demo: mm.LM, ids: Any) -> None:
    assert demo.encode(ids) == [1, 2]
    assert {type(token) for token in demo.encode(ids)} == {int}
    assert demo.generate(ids, max_tokens=2, sampling=GREEDY).stats.prompt_tokens == 2


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ([{"role": "user"}], "messages[0] must have a text content, found no content"),
        ([{"content": "Hi"}], "messages[0] must have a text role, found no role"),
        ([{"role": "user", "content": 5}], "messages[0] must have a text content, found int"),
        ([QUESTION, 1], "messages[1] must be a dict with a role and content, found int"),
    ],
)
def test_malformed_message_is_named(demo: mm.LM, wrong: Any, message: str) -> None:
    with pytest.raises(TemplateError, match=re.escape(message)):
        demo.stream(wrong)


@pytest.mark.parametrize(
    ("wrong", "got"),
    [
        ("x", "'x'"),
        (5, "5"),
        (QUESTION, "{'content': 'Hi', 'role': 'user'}"),
        (["x"], "a list with 'x' in it"),
        ([("x", "y")], "a list with ('x', 'y') in it"),
    ],
)
def test_history_of_another_kind_is_refused(demo: mm.LM, wrong: Any, got: str) -> None:
    with refused(f"history must be a list of messages, as chat returns, got {got}"):
        demo.chat("Hi", history=wrong)


@pytest.mark.parametrize("wrong", [5, None, b"x", ["Hi"], [QUESTION]])
def test_query_that_is_no_text_is_refused(demo: mm.LM, wrong: Any) -> None:
    with refused("chat takes one text to answer, chat(query) or chat(tokenizer, query, history)"):
        demo.chat(wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (2.5, "must be a whole number, got 2.5"),
        ("3", "must be a whole number, got '3'"),
        (True, "must be a whole number, got True"),
        ([3], "must be a whole number, got [3]"),
        (0, "must be 1 or more, got 0"),
        (-2, "must be 1 or more, got -2"),
    ],
)
def test_max_tokens_counts_tokens(demo: mm.LM, wrong: Any, message: str) -> None:
    for call in (
        lambda: demo.stream("Hi", max_tokens=wrong),
        lambda: demo.chat("Hi", max_tokens=wrong),
        lambda: demo.chat("Hi", max_tokens=wrong, max_length=60),
        lambda: list(mm.Chat(demo, max_tokens=wrong).reply("Hi")),
    ):
        with refused(f"max_tokens {message}"):
            call()


@pytest.mark.parametrize("wrong", ["9", 2.5, True, [9]])
def test_max_length_counts_tokens(demo: mm.LM, wrong: Any) -> None:
    with refused(f"max_length must be a whole number, got {wrong!r}"):
        demo.chat("Hi", max_length=wrong)


def test_numpy_integer_is_a_limit(demo: mm.LM) -> None:
    limited = demo.generate("Hi", max_tokens=np.int64(2), sampling=GREEDY)  # type: ignore[arg-type]
    assert len(limited.token_ids) == 2


@pytest.mark.parametrize(
    ("wrong", "got"),
    [
        ([3], "a list with 3 in it"),
        (b"x", "b'x'"),
        ([b"x"], "a list with b'x' in it"),
        ([""], "a list with '' in it"),
        ("", "a list with '' in it"),
        ({"x": 1}, "{'x': 1}"),
        (5, "5"),
    ],
)
def test_stop_that_is_no_text_is_refused(demo: mm.LM, wrong: Any, got: str) -> None:
    message = f"stop must be a string or a list of strings, none of them empty, got {got}"
    for call in (
        lambda: demo.stream("Hi", stop=wrong),
        lambda: demo.chat("Hi", stop=wrong),
        lambda: list(mm.Chat(demo, stop=wrong).reply("Hi")),
    ):
        with refused(message):
            call()


def test_no_stop_may_be_written_as_none(demo: mm.LM) -> None:
    none, empty = (
        demo.generate("Hi", max_tokens=3, sampling=GREEDY, stop=stop)  # type: ignore[arg-type]
        for stop in (None, ())
    )
    assert none.text == empty.text


@cache
def options_with_limits() -> dict[str, Any]:
    """Every dataclass of the library that declares limits, by name."""
    for name in modules():
        if not name.startswith(
            ("minicpm_mlx.cli", "minicpm_mlx.server", "minicpm_mlx.evals.sandbox")
        ):
            import_module(name)
    classes = [found for found in gc.get_objects() if isinstance(found, type)]
    return {c.__name__: c for c in classes if is_dataclass(c) and limits(c)}


@settings(deadline=None)
@given(data=st.data())
def test_declared_limits_are_kept(data: st.DataObject) -> None:
    """Inside a limit a value is kept as a Python number; outside, the error names the field."""
    options = data.draw(st.sampled_from(sorted(options_with_limits().items())))[1]
    name, limit = data.draw(st.sampled_from(sorted(limits(options).items())))
    numbers = st.integers() if limit.whole else st.floats() | st.integers()
    value = data.draw(
        numbers | st.sampled_from([limit.least, limit.most, limit.above, limit.below])
    )
    if value in limit and not (limit.whole and isinstance(value, float)):
        assert limit.check(name, value) == value
        return
    with pytest.raises(InvalidArgumentError) as refusal:
        limit.check(name, value)
    assert refusal.value.field == name


@pytest.mark.parametrize("wrong", ["1", None, True, [1], 1j, float("nan")], ids=shown)
def test_a_limited_option_must_be_a_number(wrong: Any) -> None:
    for name, limit in limits(mm.Sampling).items():
        if wrong is None and name == "seed":
            continue
        with refused(f"{name} must be ") as refusal:
            limit.check(name, wrong)
        assert refusal.value.field == name


def test_number_too_long_to_write_out_is_refused_in_few_words() -> None:
    with refused("seed must be between 0 and 2^64 - 1, got a very large int"):
        mm.Sampling(seed=10**5000)


def test_numpy_scalars_become_plain_numbers() -> None:
    how = mm.Sampling(temperature=np.float32(0.5), top_k=np.int8(3), seed=np.uint64(2**64 - 1))  # type: ignore[arg-type]
    assert how == mm.Sampling(temperature=0.5, top_k=3, seed=2**64 - 1)
    assert [type(value) for value in (how.temperature, how.top_k, how.seed)] == [float, int, int]


@pytest.mark.parametrize("penalty", [0.0101, 100.0])
def test_repetition_penalty_keeps_large_logits_finite(penalty: float) -> None:
    """1e-300, say, would make them infinite, and their softmax NaN."""
    for logit in (3e36, -3e36):
        logits = mx.array([[logit, 0.0]])
        sampler = Sampler(mm.Sampling(repetition_penalty=penalty), [0], 2)
        assert int(sampler(logits).item()) == (0 if logit > 0 else 1)
    with refused("repetition_penalty must be above 0.01 and at most 100, got 1e-300"):
        mm.Sampling(repetition_penalty=1e-300)


@pytest.mark.parametrize("wrong", [{}, {"temperature": 1}, 0.5, "greedy", mm.Sampling], ids=repr)
def test_sampling_of_another_kind_is_refused(demo: mm.LM, wrong: Any) -> None:
    changed = replace(demo, sampling=wrong)
    for call in (
        lambda: demo.stream("Hi", sampling=wrong),
        lambda: changed.stream("Hi"),
        lambda: changed.chat("Hi"),
        lambda: sampling_with(wrong),
    ):
        with refused("sampling must be a Sampling, such as Sampling(temperature=0.7), got"):
            call()


@pytest.mark.parametrize("wrong", [{}, [], 5, mm.Session], ids=repr)
def test_session_of_another_kind_is_refused(demo: mm.LM, wrong: Any) -> None:
    with refused("session must be a Session, as a model's session() gives, got"):
        demo.stream("Hi", session=wrong)


def test_session_of_another_model_is_refused(demo: mm.LM) -> None:
    """Also where it would fit, since what it holds was computed from other weights."""
    folder = GOLDEN / "minicpm_2b_like"
    one, other = (mm.load_model(folder, fuse=True) for _ in range(2))
    session = mm.Session(one.config)
    list(generate(one, [1, 2], max_tokens=2, session=session))
    for call in (
        lambda: next(generate(other, [1, 2], max_tokens=2, session=session)),
        lambda: demo.generate("Hi", session=mm.Session(one.config)),
    ):
        with refused("this session holds what another model read"):
            call()
    list(generate(one, [1, 2, 3], max_tokens=2, session=session))


@pytest.mark.parametrize("wrong", [{"": 0}, 0, "tpu"])
def test_device_map_of_another_kind_is_refused(wrong: Any) -> None:
    with refused(f"device_map must be one of auto, cuda, mps, gpu or cpu, got {wrong!r}"):
        mm.AutoModelForCausalLM.from_pretrained("demo", device_map=wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ('"top_k": 2.5', "top_k must be a whole number, got 2.5"),
        ('"temperature": "hot"', "temperature must be a number, got 'hot'"),
        ('"min_p": 2', "min_p must be between 0 and 1, got 2"),
        ('"do_sample": "false"', "do_sample must be true or false, got 'false'"),
    ],
)
def test_wrong_sampling_in_a_folder_names_its_file(
    wrong: str, message: str, tmp_path: Path
) -> None:
    folder = write_model(tmp_path / "model")
    path = folder / "generation_config.json"
    path.write_text(f'{{"do_sample": true, {wrong}}}', encoding="utf-8")
    with pytest.raises(ConfigError, match=re.escape(f"{path}: {message}")):
        mm.load(folder)


@pytest.mark.parametrize(
    ("stated", "meant"),
    [
        ({"do_sample": True}, {"temperature": 1.0}),
        (
            {"do_sample": True, "temperature": None, "top_p": 0.9},
            {"temperature": 1.0, "top_p": 0.9},
        ),
        ({"do_sample": True, "min_p": 0.05}, {"temperature": 1.0, "min_p": 0.05}),
        ({"do_sample": True, "temperature": 1, "top_k": 20.0}, {"temperature": 1.0, "top_k": 20}),
        ({"do_sample": True, "eos_token_id": [2.0, 3]}, {"temperature": 1.0}),
        ({"do_sample": False, "temperature": 0.7, "min_p": 0.1}, {}),
        ({"do_sample": None, "temperature": 0.7}, {}),
        ({"temperature": 0.7, "repetition_penalty": 1.1}, {"repetition_penalty": 1.1}),
        ({}, {}),
        ([], {}),
    ],
)
def test_a_folder_s_sampling_is_read_as_transformers_does(
    stated: Any, meant: dict[str, float], tmp_path: Path
) -> None:
    folder = write_model(tmp_path / "model")
    bom = "\ufeff"  # as some editors begin a file
    (folder / "generation_config.json").write_text(bom + json.dumps(stated), encoding="utf-8")
    if isinstance(stated, list):
        with pytest.raises(mm.MiniCPMError, match="is not a JSON object"):
            mm.load(folder)
        return
    lm = mm.load(folder)
    assert lm.sampling == Sampling(**meant)
    assert not stated.get("eos_token_id") or lm.tokenizer.eos_ids == (2, 3)
    lines = write_modelfile(tmp_path / "m.gguf", lm.tokenizer, folder).read_text(encoding="utf-8")
    found = dict(re.findall(r"PARAMETER (?!stop)(\w+) (.+)", lines))
    if "repetition_penalty" in meant:
        meant = {"repeat_penalty": meant["repetition_penalty"]}
    assert {name: float(value) for name, value in found.items()} == meant
