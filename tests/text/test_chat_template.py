"""Chat templates: the family's own byte for byte, what templates may do, and messages refused."""

import functools
import itertools
import json
from datetime import datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as Backend

from minicpm_mlx.errors import TemplateError
from minicpm_mlx.text.chat_template import BUILTIN, CHATML, MINICPM, Template
from minicpm_mlx.text.tokenizer import load_tokenizer
from minicpm_mlx.weights.gguf.pre_tokenizers import splitter
from support.data import need_shared
from support.gguf_files import byte_tokenizer

HELLO = [{"role": "user", "content": "Hello"}]


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


def calls(*arguments):
    return [
        {"id": f"{i}", "type": "function", "function": {"name": f"f{i}", "arguments": each}}
        for i, each in enumerate(arguments)
    ]


MARKUP = {"city": "a<b & c\n</s>", "days": 2, "deep": {"ok": True, "no": None, "to": ["é", 0.5]}}
RESULTS = [{"role": "tool", "content": "42"}, {"role": "tool", "content": " {\n} "}]
CONVERSATIONS = {
    "one turn": HELLO,
    "two turns": [
        {"role": "user", "content": " 山东省最高的山是哪座山？\n"},
        assistant("泰山 🏔\t"),
        {"role": "user", "content": "多高？"},
    ],
    "system": [{"role": "system", "content": "Be brief.\n"}, *HELLO],
    "many turns": [
        {"role": ("user", "assistant")[i % 2], "content": f"  line {i}\n\n{{{{ x }}}} <b>&'\""}
        for i in range(41)
    ],
    "a result first": [{"role": "tool", "content": "42"}, *HELLO],
    "thoughts": [
        *HELLO,
        assistant("<think>\nold\n</think>\n\nHi"),
        *HELLO,
        assistant("Hi again", reasoning_content="\nnew\n"),
    ],
    "calls": [*HELLO, assistant("", tool_calls=calls(MARKUP)), RESULTS[0]],
    "calls after words": [
        {"role": "system", "content": "S<tool_def_sep>T"},
        *HELLO,
        assistant("a<tool_sep>b", reasoning_content="r", tool_calls=calls({}, MARKUP)),
        *RESULTS,
        assistant("done"),
        *HELLO,
    ],
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": f"f{i}",
            "description": "d <&> 你's",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
    for i in range(2)
]

SWITCH = """{%- macro turn(role, text) %}
    {{- '<|im_start|>' ~ role ~ '\n' ~ text ~ '<|im_end|>\n' }}
{%- endmacro %}
{%- for message in messages %}
    {%- if message.role == 'tool' %}{% continue %}{% endif %}
    {{- turn(message.role, message.content.split('</think>')[-1].lstrip('\n')) }}
    {%- for call in message.tool_calls or [] %}
        {{- call.function.arguments | tojson(indent=1, sort_keys=true) }}
    {%- endfor %}
{%- endfor %}
{%- if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n{% endif %}
{{ strftime_now('%Y') }}"""
"""With a switch for thinking, as 4.1's own template has one, and all that transformers adds."""

MEMBERS = {
    "1.0": "tokenizers/minicpm-2b/tokenizer_config.json",
    "3": "tokenizers/minicpm3-4b/tokenizer_config.json",
    "4": "tokenizers/minicpm4/tokenizer_config.json",
    "5": "templates/minicpm5-1b.jinja",
    "128k, 4.1": BUILTIN["chatml"],
    "a switch": SWITCH,
}


def source_of(member):
    """The chat template of a member's checkpoint; MiniCPM 1.0's is one for SFT, DPO and llama
    format."""
    if "{%" in MEMBERS[member]:
        return MEMBERS[member]
    path = need_shared(*MEMBERS[member].split("/"))
    text = path.read_text(encoding="utf-8")
    return json.loads(text)["chat_template"] if path.suffix == ".json" else text


@functools.cache
def jinja_template(source):
    """The template in a sandbox set up as transformers does it."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, ensure_ascii=False, **form: json.dumps(
        value, ensure_ascii=ensure_ascii, **form
    )
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(source)


def rendered_by_jinja(source, messages, prompt, **names):
    return jinja_template(source).render(
        messages=messages,
        add_generation_prompt=prompt,
        bos_token="<s>",
        eos_token="</s>",
        **names,
    )


@pytest.mark.parametrize("member", MEMBERS)
def test_templates_of_the_family_are_byte_equal_to_an_independent_sandbox(member):
    source = source_of(member)
    for thinking in ({}, {"enable_thinking": True}, {"enable_thinking": False}):
        template = Template(source, "<s>", "</s>", thinking)
        offers = (None, TOOLS) if template.takes_tools else (None,)
        for messages, *how in itertools.product(CONVERSATIONS.values(), (True, False), offers):
            expected = rendered_by_jinja(source, messages, how[0], tools=how[1], **thinking)
            assert template.render(messages, *how) == expected


@pytest.mark.parametrize(("name", "member"), [("minicpm", "1.0"), ("chatml", "3"), ("chatml", "4")])
def test_builtin_templates_are_byte_equal_to_the_checkpoints(name, member):
    source = source_of(member)

    @settings(max_examples=40, deadline=None)
    @given(
        st.lists(
            st.fixed_dictionaries({"role": st.sampled_from([*ROLES, "x"]), "content": st.text()}),
            min_size=1,
            max_size=4,
        ),
        st.booleans(),
    )
    def equal(messages, prompt):
        expected = rendered_by_jinja(source, messages, prompt)
        assert Template(BUILTIN[name]).render(messages, prompt) == expected

    for messages in CONVERSATIONS.values():
        for prompt in (True, False):
            expected = rendered_by_jinja(source, messages, prompt)
            assert Template(BUILTIN[name]).render(messages, prompt) == expected
    equal()


ROLES = ("user", "assistant", "system")


def byte_level(folder):
    """MiniCPM5's template, special tokens and splits, over a vocabulary of bytes."""
    backend = byte_tokenizer()
    backend.pre_tokenizer = splitter("minicpm5")
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tools>"])
    backend.add_special_tokens(["</tools>", "<function", "</function>", "<param", "</param>"])
    (folder / "tokenizer.json").write_text(backend.to_str())
    config = {"add_bos_token": False, "bos_token": "<s>", "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(source_of("5"), encoding="utf-8")
    return folder


@pytest.mark.parametrize("member", ["1.0", "3", "4", "5"])
def test_chat_ids_are_those_of_the_rendered_text(member, tmp_path):
    own = MEMBERS[member].split("/")[:2]
    folder = byte_level(tmp_path) if member == "5" else need_shared(*own)
    tokenizer = load_tokenizer(folder)
    plain = Backend.from_file(str(folder / "tokenizer.json"))
    # The templates of 3 and 4 leave calls out, and the tokenizer writes them as text.
    calls = () if member in ("3", "4") else ("calls",)
    for name in ("two turns", "system", "many turns", *calls):
        messages = json.loads(json.dumps(CONVERSATIONS[name]).replace("</s>", "</t>"))
        tools = TOOLS if member == "5" else None
        text = rendered_by_jinja(source_of(member), messages, True, tools=tools)
        ids = plain.encode(text, add_special_tokens=False).ids
        assert tokenizer.chat_ids(messages, tools=tools) == [1] * (ids[0] != 1) + ids


# Calls


@pytest.mark.parametrize("wrap", [lambda call: call, lambda call: call["function"]])
def test_arguments_as_json_text_are_those_of_a_mapping(wrap):
    template = Template(
        "{% for call in messages[1].tool_calls %}{% set f = call.function or call %}"
        "{% for key, value in f.arguments.items() %}{{ key }}={{ value }};{% endfor %}|{% endfor %}"
    )
    texts = (json.dumps(MARKUP), "{}", " null ", "", None)
    given = assistant(None, tool_calls=[wrap(call) for call in calls(*texts)])
    wanted = assistant("", tool_calls=[wrap(call) for call in calls(MARKUP, {}, {}, {}, {})])
    assert template.render([*HELLO, given]) == template.render([*HELLO, wanted])
    assert given["tool_calls"][0] == wrap(calls(texts[0])[0])


def test_names_in_arguments_as_json_text_are_ordinary_text(tmp_path):
    """The text may hide them by JSON's escapes."""
    tokenizer = load_tokenizer(byte_level(tmp_path))
    for text in (json.dumps(MARKUP), json.dumps(MARKUP).replace("<", "\\u003c")):
        asked, wanted = (
            [*HELLO, assistant("", tool_calls=calls(arguments)), *RESULTS]
            for arguments in (text, MARKUP)
        )
        assert tokenizer.chat_ids(asked) == tokenizer.chat_ids(wanted)
        assert tokenizer.chat_ids(asked).count(2) == 0


@pytest.mark.parametrize("text", ["[1]", "{", "1", '"x"', "[" * 9999, "not json", "\ud800"])
def test_arguments_that_are_no_object_are_named_in_a_line(text):
    complaint = r"messages\[1\].tool_calls\[0\].function.arguments must be a JSON object as text"
    with pytest.raises(TemplateError, match=complaint) as caught:
        Template(CHATML).render([*HELLO, assistant("", tool_calls=calls(text))])
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("odd", ["x", {"a": 1}, [1, None], [{}], [{"function": 1}], [[]]])
def test_calls_in_another_form_are_the_template_s(odd):
    messages = [assistant("x", tool_calls=odd)]
    assert Template("{{ messages[0].tool_calls | tojson }}").render(messages) == json.dumps(odd)


def test_minicpm_marks_user_turns_and_pastes_the_others():
    messages = [{"role": "system", "content": " S "}, *HELLO, {"role": "assistant", "content": "B"}]
    assert Template(MINICPM).render(messages) == "S<用户>Hello<AI>B"


def test_chatml_ends_with_the_generation_prompt_only_when_asked():
    template = Template(CHATML)
    turn = "<|im_start|>user\nHello<|im_end|>\n"
    assert template.render(HELLO) == turn + "<|im_start|>assistant\n"
    assert template.render(HELLO, add_generation_prompt=False) == turn


def test_a_reply_is_cut_at_markers_that_are_plain_text():
    assert Template(MINICPM).stop_strings == ("<用户>", "<AI>")
    assert Template(CHATML).stop_strings == ()


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ bos_token }}|{{ eos_token }}", "<s>|</s>"),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{{ messages | tojson }}", '[{"role": "user", "content": "Hello"}]'),
        ("{{ '<用户>' | tojson }}", '"<用户>"'),
        ("{{ strftime_now('%%') }}", "%"),
        ("{% if tools is none and documents is none %}plain{% endif %}", "plain"),
        ("{{ '-' * 3 }}{{ 2 * 3 }}", "---6"),
        ("  {% if true %}\nx\n  {% endif %}\ny", "x\ny"),
        ("a{% generation %}\n{{ messages[0].content }}{% endgeneration %}b", "aHellob"),
        ("{% for i in [1, 2] %}{%- generation -%} {{ i }} {%- endgeneration %}{% endfor %}", "12"),
    ],
)
def test_templates_find_what_transformers_gives_them(source, expected):
    assert Template(source, "<s>", "</s>").render(HELLO) == expected


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{% import 'os' as os %}",
        "{% for i in range(10000000) %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}0123456789{% endfor %}{% endfor %}",
        "{{ 'a' * 1000000000000 }}",
        "{{ 9 ** 9 ** 9 }}",
        "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
        "{% for message in messages %}",
        "{{ nothing.at_all }}",
        "{{ 1 / 0 }}",
        "{{ 5 * none }}",
        "{{ strftime_now(5) }}",
        "{{ raise_exception('two\nlines') }}",
        "{{ raise_exception('\udc00') }}",
    ],
)
def test_whatever_a_template_does_wrong_is_one_line(source):
    with pytest.raises(TemplateError) as caught:
        Template(source).render(HELLO)
    assert "chat template" in str(caught.value)
    assert str(caught.value).encode().count(b"\n") == 0


@settings(max_examples=150, deadline=None)
@given(st.text() | st.text("{}%#'\"()[]|.-+* \nabmessages01", max_size=40).map("{{{{{}}}}}".format))
def test_any_source_renders_or_is_refused(source):
    complaint = ""
    try:
        assert isinstance(Template(source).render(HELLO), str)
    except TemplateError as error:
        complaint = str(error)
    assert complaint.encode().count(b"\n") == 0


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([], "empty"),
        ("Hello", "found str"),
        (None, "found null"),
        ({"role": "user", "content": "x"}, "found dict"),
        ([*HELLO, "x"], r"messages\[1\] must be a dict"),
        ([{"content": "x"}], r"messages\[0\] must have a text role, found no role"),
        ([{"role": 1, "content": "x"}], r"messages\[0\] must have a text role, found int"),
        ([*HELLO, {"role": "user"}], r"messages\[1\] must have a text content, found no content"),
        ([{"role": "user", "content": None}], "text content, found null"),
        ([{"role": "user", "content": [{"type": "text"}]}], "text content, found list"),
    ],
)
def test_messages_must_be_dicts_of_text(messages, complaint):
    with pytest.raises(TemplateError, match=complaint):
        Template(CHATML).render(messages)


def test_rendering_leaves_the_messages_alone():
    messages = [{"role": "user", "content": " x ", "name": "n"}]
    assert Template("{{ messages[0].name }}").render(messages) == "n"
    assert messages == [{"role": "user", "content": " x ", "name": "n"}]
