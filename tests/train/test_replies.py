"""What is learned of thoughts and calls: as the model would generate them, by its own template."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

import minicpm_mlx as mm
from minicpm_mlx.errors import DataError, InvalidArgumentError, TemplateError
from minicpm_mlx.lm.outputs import Piece, Stats, Transcript, collect, with_calls
from minicpm_mlx.lm.tools.argument_check import argument_problem
from minicpm_mlx.lm.tools.tool_set import ToolSet
from minicpm_mlx.lm.tools.xml_format import XmlToolFormat
from minicpm_mlx.text.chat_prompt import ChatPrompt, chat_prompt
from minicpm_mlx.text.chat_template import CHATML, MINICPM
from minicpm_mlx.text.tokenizer import Tokenizer, load_tokenizer
from minicpm_mlx.train.data.dataset import Data, DataOptions, load_data
from minicpm_mlx.train.data.encoding import Encoder
from minicpm_mlx.train.data.examples import Conversation, Document, Preference, TemplateOptions
from minicpm_mlx.train.data.preview import spans
from minicpm_mlx.train.data.samples import Pair, Sample
from support.apis import TOOL_TEMPLATE
from support.data import need_shared, write_tokenizer
from support.scripted_model import SPECIAL, TEMPLATE

SCHEMAS: dict[str, dict[str, Any]] = {
    "weather": {"properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
    "time": {},
}
TOOLS = tuple(
    {"type": "function", "function": {"name": name, "parameters": {"type": "object", **schema}}}
    for name, schema in SCHEMAS.items()
)


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def reply(text: str, thought: str = "") -> dict[str, Any]:
    return {"role": "assistant", "content": text} | (
        {"reasoning_content": thought} if thought else {}
    )


def call(name: str, thought: str = "", **arguments: Any) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return reply("", thought) | {"tool_calls": [{"type": "function", "function": function}]}


def result(text: str) -> dict[str, Any]:
    return {"role": "tool", "content": text}


TALK = [
    user("Rain in Oslo?"),
    call("weather", "I look it up.", city="Oslo", days=2),
    result("rain"),
    reply("Yes.", "It rains."),
    user("Thanks"),
    reply("Gladly.", "Be kind."),
]
LOOP, LATER = TALK[:4], TALK[4:]


@functools.cache
def tokenizer(template: str, special: tuple[str, ...] = SPECIAL) -> Tokenizer:
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder), special=special)
        settings = {"chat_template": template, "bos_token": "<s>"}
        end = "<|im_end|>" if "<|im_end|>" in special else "</s>"
        (Path(folder) / "tokenizer_config.json").write_text(
            json.dumps(settings | {"eos_token": end})
        )
        return load_tokenizer(folder)


def minicpm5() -> Tokenizer:
    return tokenizer(need_shared("templates", "minicpm5-1b.jinja").read_text())


def made(
    tokenizer: Tokenizer,
    messages: list[dict[str, Any]],
    *,
    tools: tuple[dict[str, Any], ...] = TOOLS,
    variables: dict[str, Any] | None = None,
    **options: Any,
) -> list[Sample]:
    conversation = Conversation(messages, options=TemplateOptions(tools, variables or {}))
    items = Encoder(tokenizer, **options).encode(conversation).items
    return [item for item in items if isinstance(item, Sample)]


def learned(samples: list[Sample], tokenizer: Tokenizer) -> list[list[str]]:
    return [[text for text, counts in spans(each, tokenizer) if counts] for each in samples]


def test_each_turn_is_learned_as_minicpm5_generates_it() -> None:
    """A thought is in the prompt until the next question; then the turn is another sample."""
    model = minicpm5()
    found = made(model, TALK)
    weather = '<function name="weather"><param name="city">Oslo</param><param name="days">2</param>'
    assert learned(found, model) == [
        [
            f"<think>\nI look it up.\n</think>\n\n{weather}</function><|im_end|>",
            "<think>\nIt rains.\n</think>\n\nYes.<|im_end|>",
        ],
        ["<think>\nBe kind.\n</think>\n\nGladly.<|im_end|>"],
    ]
    assert "It rains" not in model.decode(found[1].ids)
    ends = {0: (1, 3), 1: (5,)}
    for number, sample in enumerate(found):
        for end in ends[number]:
            prompt = chat_prompt(model, TALK[:end], tools=TOOLS).ids
            assert sample.ids[: len(prompt)] == prompt
            assert sample.mask[len(prompt) - 1 : len(prompt) + 1] == [False, True]


def test_a_call_that_is_learned_reads_back() -> None:
    """Also one whose arguments look like marks."""
    model, form = minicpm5(), XmlToolFormat()
    for city in ("Oslo", "a < b & c", "</param>", "<|im_end|>", "two\nlines"):
        [sample] = made(model, [user("q"), call("weather", city=city, days=3)])
        [[text]] = learned([sample], model)
        read = form.read(text.removesuffix("<|im_end|>"), SCHEMAS)
        assert read == [("weather", {"city": city, "days": 3})]
        ends = [i for i in sample.ids if i in model.eos_ids]
        assert len(ends) == 3  # of the tools, the question and the reply: none of the argument


FORMS = {
    "python": (CHATML, (*SPECIAL[:2], "<|tool_call|>")),
    "json": (TOOL_TEMPLATE, SPECIAL[:2]),
    "xml": (TEMPLATE, SPECIAL),
}
"""A template and special tokens for each way of writing calls."""
OPTIONS = {"fine": True, "opt": {"unit": None}, "list": [1, 2.5]}
FORECAST = {
    "type": "function",
    "function": {
        "strict": True,
        "name": "get-weather",
        "description": "The weather",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "fine": {"type": "boolean"},
                "opt": {"type": "object"},
                "list": {"type": "array"},
            },
            "required": ["city"],
        },
    },
}
NOW = {"name": "now"}


def taught(model: Tokenizer, talk: list[dict[str, Any]]) -> tuple[ChatPrompt, mm.Completion]:
    """The prompt of inference and the taught reply to it, as inference reads it."""
    tools = (FORECAST, NOW)
    [sample] = made(model, talk, tools=tools, mask="last")
    prompt = chat_prompt(model, talk[:-1], tools=ToolSet(model, tools).for_template)
    assert sample.ids[: len(prompt.ids)] == prompt.ids
    assert sample.mask == [i >= len(prompt.ids) for i in range(len(sample.ids))]
    tool_set = ToolSet(model, tools)
    transcript = Transcript(
        model,
        prompt.stops,
        skip_special=not tool_set.keep_special,
        token_marks=tool_set.token_marks,
        thinking=prompt.thinking,
        in_thought=prompt.in_thought,
    )

    def pieces() -> Generator[Piece, None, None]:
        for token in sample.ids[len(prompt.ids) :]:
            yield transcript.add(token)
        stats = Stats.measure(
            prompt_tokens=0, cached_tokens=0, completion_tokens=0, start=0, first=0
        )
        yield transcript.finish(stats)

    return prompt, collect(with_calls(pieces(), tool_set.reader()))


@pytest.mark.parametrize("form", [*FORMS, "minicpm3-4b", "minicpm4", "minicpm5"])
def test_a_row_of_tools_is_the_prompt_of_inference_and_what_is_read_there(form: str) -> None:
    if form == "minicpm5":
        model = minicpm5()
    elif form in FORMS:
        model = tokenizer(*FORMS[form])
    else:
        model = load_tokenizer(need_shared("tokenizers", form))
    first = call("get-weather", city='O"s\n</x>' if form != "xml" else "Oslo", **OPTIONS)
    first["tool_calls"] += call("now")["tool_calls"]
    thought = {} if form == "json" else {"reasoning_content": "I look."}
    prompt, reply = taught(model, [user("q"), first | thought])
    read = [(each.name, json.loads(each.arguments)) for each in reply.tool_calls]
    functions = [each["function"] for each in first["tool_calls"]]
    assert read == [(each["name"], each["arguments"]) for each in functions]
    assert (reply.text.strip(), reply.thinking) == ("", thought.get("reasoning_content", ""))
    assert "get-weather" in prompt.text.text or "get_weather" in prompt.text.text
    assert "strict" not in prompt.text.text
    results = [result("rain"), result("noon")]
    _, answer = taught(model, [user("q"), first, *results, reply_of("It rains.", thought)])
    assert (answer.text, answer.tool_calls) == ("It rains.", ())


def reply_of(text: str, thought: dict[str, str]) -> dict[str, Any]:
    return reply(text) | thought


WRITTEN = {
    "python": "<|tool_call_start|>\n```python\nnow()\n```\n<|tool_call_end|>",
    "json": '<tool_call>{"name": "now", "arguments": {}}</tool_call>',
    "xml": '<function name="now"></function>',
}


@pytest.mark.parametrize("form", FORMS)
def test_a_call_written_into_the_content_is_refused_and_a_question_s_is_text(form: str) -> None:
    model = tokenizer(*FORMS[form])
    with pytest.raises(DataError, match=r"content: expected calls .* write calls into tool_calls"):
        made(model, [user("q"), reply(WRITTEN[form])], tools=(NOW,))
    [sample] = made(model, [user(WRITTEN[form]), reply("no")], tools=(NOW,))
    assert learned([sample], model) == [["no<|im_end|>"]]


@pytest.mark.parametrize("special", [SPECIAL, SPECIAL[:2]], ids=["by token", "by text"])
def test_a_thought_that_the_content_begins_with_is_one(special: tuple[str, ...]) -> None:
    model = tokenizer(TEMPLATE, special)
    written = made(model, [user("q"), reply("<think>T</think>A")])
    assert written == made(model, [user("q"), reply("A", "T")])
    assert written == made(model, [user("q"), reply("<think>T</think>A", "T")])
    with pytest.raises(DataError, match=r"the thought that the content begins with, found another"):
        made(model, [user("q"), reply("<think>T</think>A", "U")])
    with pytest.raises(DataError, match=r"content: expected text that is read as it is written"):
        made(minicpm5(), [user("q"), reply("A <think>T</think> B")])


def test_a_rejected_reply_and_one_that_is_not_learned_may_be_a_wrong_call(tmp_path: Path) -> None:
    wrong, right = call("weather", town="Oslo"), call("weather", city="Oslo")
    rows: list[dict[str, Any]] = [
        {"prompt": "q", "chosen": right, "rejected": wrong},
        {"messages": [user("q"), wrong], "label": False},
        {"messages": [user("q"), wrong | {"loss": False}, result("no town"), right]},
    ]
    for row in rows:
        assert loaded(tmp_path, [row | {"tools": list(TOOLS)}]).train
    for row in ({**rows[0], "chosen": wrong, "rejected": right}, {**rows[1], "label": True}):
        with pytest.raises(DataError, match=r"expected its parameters alone \(city, days\)"):
            loaded(tmp_path, [row | {"tools": list(TOOLS)}])


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({}, "get-weather: expected city, which is required, found nothing"),
        ({"city": 1}, "get-weather.city: expected string, found 1"),
        ({"city": "a", "fine": 1}, "get-weather.fine: expected boolean, found 1"),
        ({"city": "a", "opt": []}, "get-weather.opt: expected object"),
        ({"city": "a", "town": "b"}, r"get-weather: expected its parameters alone \(city, fine"),
    ],
)
def test_arguments_that_the_schema_does_not_allow_are_named(
    arguments: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    row = {"messages": [user("q"), call("get-weather", **arguments)], "tools": [FORECAST]}
    with pytest.raises(DataError, match=f"train.jsonl:1: message 2: {problem}"):
        loaded(tmp_path, [row])


def test_schemas_that_refer_to_themselves_or_are_malformed_check_what_they_say() -> None:
    twice = [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/a"}]
    parameters = {
        "properties": {"a": {"anyOf": twice}, "b": {"type": [{}, []]}, "c": {"$ref": "#"}},
        "$defs": {"a": {"anyOf": [*map(dict, twice)], "type": "string"}},
    }
    assert argument_problem({"a": "x", "b": 1, "c": {"b": True}}, parameters) is None
    assert argument_problem({"a": 1}, parameters) == ".a: expected string, found 1"
    assert argument_problem({"c": {"a": 1}}, parameters) == ".c.a: expected string, found 1"


@pytest.mark.parametrize("special", [SPECIAL, SPECIAL[:2]], ids=["by token", "by text"])
def test_answers_alone_leave_the_thought_in_the_prompt(special: tuple[str, ...]) -> None:
    model = tokenizer(TEMPLATE, special)
    [sample, last] = made(model, TALK, train_on="answers")
    marked, [gladly] = learned([sample, last], model)
    assert [text.strip() for text in marked] == [
        '<function name="weather"><param name="city">Oslo</param>'
        '<param name="days">2</param></function><|im_end|>',
        "Yes.<|im_end|>",
    ]
    assert gladly.strip() == "Gladly.<|im_end|>"
    assert "I look it up." in model.decode(sample.ids)
    plain = made(model, [user("q"), reply("  a <think> b")], train_on="answers")
    assert plain == made(model, [user("q"), reply("  a <think> b")])


@pytest.mark.parametrize(
    ("switch", "thought", "texts"),
    [
        (True, "T", ["T\n</think>\n\nA<|im_end|>"]),
        (True, "", ["\n</think>\n\nA<|im_end|>"]),
        (False, "", ["A<|im_end|>"]),
    ],
)
def test_a_row_s_switch_is_that_of_its_prompt(switch: bool, thought: str, texts: list[str]) -> None:
    model, variables = minicpm5(), {"enable_thinking": switch}
    messages = [user("q"), reply("A", thought)]
    [sample] = made(model, messages, variables=variables)
    prompt = chat_prompt(model, messages[:1], tools=TOOLS, think=switch).ids
    assert sample.ids[: len(prompt)] == prompt
    assert learned([sample], model) == [texts]


def test_a_thought_is_written_where_the_template_knows_the_marks_alone() -> None:
    template = CHATML + "{{ '<think>\n\n</think>\n\n' if enable_thinking is false else '' }}"
    model = tokenizer(template)
    [sample] = made(model, [user("q"), reply("A", "T")], tools=())
    assert learned([sample], model) == [["<think>\nT\n</think>\n\nA<|im_end|>"]]
    always = tokenizer(CHATML + "{{ '<think>\n' if add_generation_prompt else '' }}{# </think> #}")
    samples = [made(always, [user("q"), reply("A", thought)], tools=()) for thought in ("T", "")]
    assert [learned(each, always) for each in samples] == [
        [["T\n</think>\n\nA<|im_end|>"]],
        [["\n</think>\n\nA<|im_end|>"]],
    ]


DEAF = TEMPLATE.replace("message.tool_calls or []", "[]")
NO_TEXT = TEMPLATE.replace(
    "{{ message.content }}", "{{ message.content if not message.tool_calls }}"
)
ASKED = [user("q"), reply("A", "T")]


@pytest.mark.parametrize(
    ("template", "messages", "options", "message"),
    [
        (CHATML, [user("q"), reply("A")], {}, "has no place for tools"),
        (CHATML, ASKED, {"tools": ()}, "reasoning_content: expected a chat template with a place"),
        (TOOL_TEMPLATE, ASKED, {}, "reasoning_content: expected a chat template with a place"),
        (MINICPM, LOOP, {"tools": ()}, "tool_calls: expected a chat template with a place"),
        (DEAF, LOOP, {}, "tool_calls: expected a chat template with a place for calls"),
        (DEAF, LOOP, {"mask": "last"}, "tool_calls: expected a chat template with a place"),
        (NO_TEXT, [user("q"), call("time") | {"content": "So"}], {}, "content: expected none"),
        (TEMPLATE, ASKED, {"variables": {"enable_thinking": False}}, "expected no thought, as the"),
        (TEMPLATE, ASKED, {"variables": {"thinking": True}}, "has no variable 'thinking' to set"),
    ],
)
def test_what_the_template_would_leave_out_is_refused(
    template: str, messages: list[dict[str, Any]], options: dict[str, Any], message: str
) -> None:
    with pytest.raises((DataError, TemplateError), match=message) as caught:
        made(tokenizer(template), messages, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("example", "options"), [(Conversation(ASKED), {"mask": "all"}), (Document("text"), {})]
)
def test_answers_alone_are_of_conversations(example: Any, options: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError, match="answers"):
        Encoder(tokenizer(TEMPLATE), train_on="answers", **options).encode(example)


def test_pieces_of_a_long_conversation_keep_calls_with_their_results() -> None:
    model = tokenizer(TEMPLATE)
    talk = [*LOOP, *LATER, *LOOP]
    whole = made(model, LOOP)[0]
    found = made(model, talk, overlong="split", max_seq_length=len(whole.ids))
    assert [learned([each], model) for each in found] == [
        learned([each], model) for each in (whole, made(model, LATER)[0], whole)
    ]


def test_a_preference_between_calls_and_between_thoughts() -> None:
    model = minicpm5()
    pairs = {
        "thoughts": (reply("A", "good"), reply("A", "bad")),
        "calls": (call("weather", city="Oslo"), call("time")),
    }
    for name, (chosen, rejected) in pairs.items():
        example = Preference([user("q")], chosen, rejected, TemplateOptions(TOOLS))
        [pair] = Encoder(model).encode(example).items
        assert isinstance(pair, Pair)
        texts = [learned([each], model)[0][0] for each in (pair.chosen, pair.rejected)]
        expected = ("<think>\ngood", "<think>\nbad")
        if name == "calls":
            expected = ('<function name="weather">', '<function name="time">')
        assert all(text.startswith(start) for text, start in zip(texts, expected, strict=True))


def loaded(folder: Path, rows: list[dict[str, Any]], **options: Any) -> Data:
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_data(path, tokenizer(TEMPLATE), DataOptions(**options))


def test_a_data_set_counts_calls_and_thoughts_and_says_what_is_learned(tmp_path: Path) -> None:
    row = {"messages": TALK, "tools": list(TOOLS)}
    notes = loaded(tmp_path, [row, row]).notes
    assert "2 calls of tools in replies, which are learned" in notes
    assert "6 thoughts in replies, which are learned" in notes
    notes = loaded(tmp_path, [row], train_on="answers").notes
    assert "3 thoughts in replies, which are read and not learned (train_on answers)" in notes
    assert not any("not read" in note for note in notes if "thoughts" not in note)


def test_a_fault_in_a_call_has_file_line_and_field(tmp_path: Path) -> None:
    wrong = call("weather") | {"tool_calls": [{"name": "weather", "args": {}}]}
    rows = [{"messages": TALK, "tools": list(TOOLS)}, {"messages": [user("q"), wrong]}]
    with pytest.raises(DataError, match=r"train.jsonl:2: messages\[1\].tool_calls\[0\].args"):
        loaded(tmp_path, rows)
    deep: Any = "x"
    for _ in range(900):
        deep = [deep]
    tool = {"name": "weather", "parameters": {"properties": {"city": {}}}}
    rows[1] = {"messages": [user("q"), call("weather", city=deep)], "tools": [tool]}
    with pytest.raises(DataError, match=r"train.jsonl:2: .*(deep|levels)"):
        loaded(tmp_path, rows)
