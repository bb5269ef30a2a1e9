import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment

from minicpm_mlx.errors import TemplateError
from minicpm_mlx.text.chat_template import BUILTIN, CHATML, MINICPM, Template

SHARED = Path(__file__).parents[3] / "shared" / "tokenizers"
REFERENCES = {"minicpm": "minicpm-2b", "chatml": "minicpm4"}
HELLO = [{"role": "user", "content": "Hello"}]
CONVERSATIONS = {
    "one turn": HELLO,
    "two turns": [
        {"role": "user", "content": " 山东省最高的山是哪座山？\n"},
        {"role": "assistant", "content": "泰山 🏔\t"},
        {"role": "user", "content": "多高？"},
    ],
    "system": [{"role": "system", "content": "Be brief.\n"}, *HELLO],
    "many turns": [
        {"role": ("user", "assistant")[i % 2], "content": f"  line {i}\n\n{{{{ x }}}} <b>&'\""}
        for i in range(41)
    ],
    "other role": [{"role": "tool", "content": "42"}, *HELLO],
}


def own_rendering(family: str, messages: list[dict[str, str]], prompt: bool) -> str:
    """What the checkpoint's own template makes of the messages, in plain Jinja."""
    path = SHARED / REFERENCES[family] / "tokenizer_config.json"
    if not path.exists():
        pytest.skip(f"needs the real files in {SHARED}")
    source = json.loads(path.read_text(encoding="utf-8"))["chat_template"]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(source).render(messages=messages, add_generation_prompt=prompt)


@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("family", BUILTIN)
def test_builtin_templates_are_byte_equal_to_the_checkpoints(family, conversation, prompt):
    messages = CONVERSATIONS[conversation]
    expected = own_rendering(family, messages, prompt)
    assert Template(BUILTIN[family]).render(messages, prompt) == expected


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.fixed_dictionaries(
            {"role": st.sampled_from(["user", "assistant", "system", "x"]), "content": st.text()}
        ),
        min_size=1,
        max_size=4,
    ),
    st.booleans(),
)
def test_builtin_templates_are_byte_equal_for_any_text(messages, prompt):
    for family, source in BUILTIN.items():
        expected = own_rendering(family, messages, prompt)
        assert Template(source).render(messages, prompt) == expected


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
