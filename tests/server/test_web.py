"""The web page without a browser: what is let through, what is drawn, what is said."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import logging
import string
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

import minicpm_mlx as mm
from minicpm_mlx.lm.outputs import Stats
from minicpm_mlx.server.web.markdown import prepare
from minicpm_mlx.server.web.texts import TEXTS, preferred, say
from minicpm_mlx.text.chat_template import Template

pytest.importorskip("fastapi")

from minicpm_mlx.server.http.api_error import ApiError
from minicpm_mlx.server.web.conversation import PageSettings, WebConversation, takes_system, until
from minicpm_mlx.server.web.gate import check_event
from minicpm_mlx.server.web.kept import dump, parse
from minicpm_mlx.server.web.status import escape, status

if TYPE_CHECKING:
    from minicpm_mlx.server.service import Service
    from support.serving import Live

GRADIO = importlib.util.find_spec("gradio") is not None
needs_gradio = pytest.mark.skipif(not GRADIO, reason="the web page needs the package gradio")


# Texts


@pytest.mark.parametrize("key", sorted(TEXTS))
def test_both_languages_say_the_same_numbers(key: str) -> None:
    fields = [{name for _, name, _, _ in string.Formatter().parse(text)} for text in TEXTS[key]]
    assert fields[0] == fields[1]


def test_the_first_language_of_the_browser_decides() -> None:
    for header in ("zh-CN,zh;q=0.9,en;q=0.8", "zh-TW"):
        assert preferred(header) == "zh"
    for header in ("en-US,zh;q=0.5", ""):
        assert preferred(header) == "en"


def test_the_cost_of_a_reply_is_told_in_both_languages() -> None:
    conversation = WebConversation()
    tokens = {"prompt_tokens": 40, "cached_tokens": 30, "completion_tokens": 21, "passes": 20}
    conversation.stats = Stats(**tokens, ttft=0.5, seconds=2.5, peak_memory=0)
    conversation.finish_reason = "length"
    english = status(conversation, "en", 4096).replace("\\", "")
    assert english == (
        "21 tokens · first after 0.50 s · 10.0 tokens/s · 30 of 40 prompt tokens cached · "
        "cut off: see Max tokens"
    )
    chinese = status(conversation, "zh", 4096).replace("\\", "")
    assert chinese == (
        "21 个词元 · 首个 0.50 秒 · 10.0 词元/秒 · 提示 40 个词元，其中 30 个来自缓存 · "
        "已截断：见“最大词元数”"
    )


@pytest.mark.parametrize(
    ("refusal", "english", "chinese"),
    [
        (ApiError("x", code="context_length_exceeded"), "4096 tokens", "4096 个词元"),
        (ApiError("x", status=429, code="queue_full"), "queue is full", "队列已满"),
        (ApiError("x", status=408), "took longer", "超过"),
        (ApiError("x", status=503), "shutting down", "正在关闭"),
        (ApiError("x", status=500), "server failed", "出错"),
        (ApiError("odd: <b>"), "odd: <b>", "odd: <b>"),
    ],
)
def test_every_refusal_is_told_in_both_languages(
    refusal: ApiError, english: str, chinese: str
) -> None:
    conversation = WebConversation(error=refusal)
    assert english in status(conversation, "en", 4096).replace("\\", "")
    assert chinese in status(conversation, "zh", 4096).replace("\\", "")


def test_plain_text_holds_no_markdown() -> None:
    assert escape("*a* <b> 1.5") == r"\*a\* \<b\> 1\.5"


# Markdown


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a <b>bold</b> <!-- x -->", "a &lt;b>bold&lt;/b> &lt;!-- x -->"),
        ("1 < 2 and x <- y", "1 < 2 and x <- y"),
        ("`<b>` and ``<i>` ``", "`<b>` and ``<i>` ``"),
        ("```html\n<b>\n```\n<i>", "```html\n<b>\n```\n&lt;i>"),
        ("```html\n<b>", "```html\n<b>"),
        ("~~~\n<b>\n~~~", "~~~\n<b>\n~~~"),
        ("    <b>", "    <b>"),
        ("costs $5 and $6", "costs $5 and $6"),
        ("US$5 or $6.", "US$5 or $6."),
        ("where $a<b$ holds", r"where \(a<b\) holds"),
        ("$$a<b$$ \\[c<d\\] \\(e<f\\)", "$$a<b$$ \\[c<d\\] \\(e<f\\)"),
        ("`$a$`", "`$a$`"),
        ("![a picture](http://x.org/y.png)", "[a picture](http://x.org/y.png)"),
        ("![](http://x.org/y.png)", "[🖼](http://x.org/y.png)"),
        ("山东省 $x^2$ 是", r"山东省 \(x^2\) 是"),
    ],
)
def test_what_gradio_would_draw_wrongly_is_rewritten(text: str, expected: str) -> None:
    assert prepare(text) == expected


@given(st.text(alphabet="ab $`~<>![](\\)\n\t1", max_size=60))
def test_text_without_marks_of_code_or_mathematics_keeps_no_tag(text: str) -> None:
    bare = text.translate({ord(mark): None for mark in "`~$\\\t"}).replace("    ", " ")
    assert not any(f"<{letter}" in prepare(bare) for letter in "ab!")
    assert "![](" not in prepare(bare)


@given(st.text(alphabet="ab $`<\n", max_size=40))
def test_a_fence_is_left_as_it_is(text: str) -> None:
    fence = f"```\n{text.replace('`', '')}\n```"
    assert prepare(fence) == fence


# Events


@pytest.mark.parametrize(
    ("event", "field"),
    [
        ({"data": [{"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}]}, "data"),
        ({"data": [["nested"]], "fn_index": 1}, "data"),
        ({"data": {"0": "x"}}, "data"),
        ({"data": None}, "data"),
        ({"data": ["a"], "fn_index": 1}, "data"),
        ({"data": ["a", "b", "c"], "fn_index": 1}, "data"),
        ({"fn_index": 1}, "data"),
        ({"data": ["a", "b"], "fn_index": 2}, "fn_index"),
        ({"data": ["a", "b"], "fn_index": True}, "fn_index"),
        ({"data": ["a", "b"]}, "fn_index"),
        (["data"], None),
        ("data", None),
        (None, None),
        (b"", None),
        (b"{", None),
        (b"\xff", None),
        (b'{"data": [NaN]}', None),
        (b"[" * 10**5, None),
    ],
    ids=lambda value: str(value)[:40],
)
def test_an_event_that_the_page_does_not_have_is_refused(event: object, field: str | None) -> None:
    content = event if isinstance(event, bytes) else json.dumps(event).encode()
    with pytest.raises(ApiError) as refused:
        check_event(content, {1: 2})
    assert refused.value.status == 400
    assert field in (refused.value.field, None)


def test_an_event_of_texts_and_numbers_passes() -> None:
    for data, count in ((["a", 1, 0.5, True, None], 5), ([], 0)):
        check_event(json.dumps({"data": data, "fn_index": 1}).encode(), {1: count})


# Conversations


async def drain(stream: AsyncIterator[None]) -> None:
    async for _ in stream:
        pass


async def counted() -> AsyncIterator[int]:
    for number in range(100):
        await asyncio.sleep(0)
        yield number


def test_until_gives_items_and_errors_up_to_its_end_or_stop() -> None:
    async def collect(stop_at: int | None) -> list[int]:
        stopped, found = asyncio.Event(), []
        async for item in until(stopped, counted()):
            found.append(item)
            if item == stop_at:
                stopped.set()
        return found

    async def fail() -> None:
        async def broken() -> AsyncIterator[int]:
            yield 1
            raise ApiError("late", status=408)

        async for _ in until(asyncio.Event(), broken()):
            pass

    assert asyncio.run(collect(None)) == list(range(100))
    assert asyncio.run(collect(5)) == list(range(6))
    with pytest.raises(ApiError):
        asyncio.run(fail())


SETTINGS = PageSettings(served="tiny", system="", top_p=None, temperature=None, max_tokens=6)


@pytest.fixture(scope="module")
def service(tiny: mm.LM) -> Iterator[Service]:
    from minicpm_mlx.server.service import Service

    made = Service(tiny)
    yield made
    asyncio.run(made.close(0))


def test_a_conversation_says_what_the_model_alone_says(service: Service, tiny: mm.LM) -> None:
    async def run() -> list[dict[str, str]]:
        conversation = WebConversation()
        for question in ("Name a colour.", "Another one."):
            await drain(conversation.ask(service, SETTINGS, question))
        return conversation.messages

    messages = asyncio.run(run())
    history: list[dict[str, str]] = []
    for question in ("Name a colour.", "Another one."):
        history.append({"role": "user", "content": question})
        reply = tiny.generate(history, max_tokens=6).text
        history.append({"role": "assistant", "content": reply})
    assert messages == history


def test_a_refused_question_is_given_back_and_leaves_no_turn(service: Service) -> None:
    async def run() -> WebConversation:
        conversation = WebConversation()
        await drain(conversation.ask(service, SETTINGS, "word " * 9000))
        return conversation

    conversation = asyncio.run(run())
    assert conversation.error is not None
    assert conversation.error.code == "context_length_exceeded"
    assert conversation.draft.startswith("word")
    assert not conversation.messages


def test_an_unforeseen_error_is_told_and_the_next_question_answered(
    service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> WebConversation:
        conversation = WebConversation()
        wrong = replace(SETTINGS, temperature=0.0, max_tokens=-1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(service, "start", lambda asks: 1 / 0)
            await drain(conversation.ask(service, wrong, "Hello"))
        assert conversation.error is not None
        assert conversation.error.status == 500
        await drain(conversation.ask(service, SETTINGS, "Hello"))
        return conversation

    conversation = asyncio.run(run())
    assert conversation.error is None
    assert len(conversation.messages) == 2
    assert "ZeroDivisionError" in caplog.text


def test_regenerating_keeps_the_old_answer_where_no_new_one_comes(service: Service) -> None:
    async def run() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
        conversation = WebConversation()
        await drain(conversation.ask(service, SETTINGS, "Hello"))
        before = list(conversation.messages)
        wrong = replace(SETTINGS, served="none")
        await drain(conversation.regenerate(service, wrong))
        assert conversation.error is not None
        return before, conversation.messages

    before, after = asyncio.run(run())
    assert before == after


def test_a_reply_that_nobody_waits_for_is_given_up(service: Service) -> None:
    async def run() -> None:
        conversation = WebConversation()
        growing = conversation.ask(service, replace(SETTINGS, max_tokens=3000), "a")
        for _ in range(3):
            await anext(growing)
        assert service.state()["running"] == 1
        await growing.aclose()
        for _ in range(100):
            if not service.state()["running"]:
                return
            await asyncio.sleep(0.05)
        raise AssertionError("it is still running")

    asyncio.run(run())


def test_the_system_text_is_asked_for_where_the_template_has_a_place(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert takes_system(service)
    users = Template("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}")
    monkeypatch.setattr(service.lm.tokenizer, "template", users)
    assert not takes_system(service)


@given(
    st.lists(st.tuples(st.sampled_from(["user", "assistant"]), st.text(max_size=20)), max_size=4)
)
def test_what_the_browser_keeps_comes_back(turns: list[tuple[str, str]]) -> None:
    messages = [{"role": role, "content": text} for role, text in turns]
    kept = dump(messages, {"system": "Be brief."})
    assert parse(kept).messages == messages
    assert parse(kept).settings == ({"system": "Be brief."} if messages else {})


@given(
    st.text(max_size=30)
    | st.recursive(
        st.none() | st.integers() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["messages", "role", "content", "settings"]), inner)
        ),
        max_leaves=12,
    ).map(json.dumps)
)
def test_what_no_page_has_kept_is_checked(text: str) -> None:
    for message in parse(text).messages:
        assert message.keys() >= {"role", "content"}
        assert message["role"] in ("user", "assistant")
        message["content"].encode()


def test_half_a_surrogate_pair_is_kept_from_the_tokenizer() -> None:
    assert parse('{"messages": [{"role": "user", "content": "\\ud800"}], "settings": {}}')[0] == []
    assert parse("[" * 10**5).messages == []
    assert parse(None).messages == []


def test_a_conversation_goes_on_with_what_the_browser_kept(service: Service) -> None:
    async def run() -> tuple[WebConversation, WebConversation]:
        first, after_a_restart = WebConversation(), WebConversation()
        await drain(first.ask(service, SETTINGS, "Name a colour."))
        after_a_restart.resume(dump(first.messages, first.settings))
        for conversation in (first, after_a_restart):
            await drain(conversation.ask(service, SETTINGS, "Another one."))
        return first, after_a_restart

    first, other = asyncio.run(run())
    assert len(other.messages) == 4
    assert other.messages == first.messages


# The server


@pytest.fixture(scope="module")
def chat(tiny: mm.LM) -> Iterator[Live]:
    """A server with the page."""
    from minicpm_mlx.server.web.mount import mount
    from support.serving import serving

    with serving(tiny, mount=mount) as live:
        yield live


@needs_gradio
def test_the_page_names_its_own_scripts_and_no_other_host(chat: Live) -> None:
    answer = chat.ask("GET", "/chat/")
    policy = answer.headers["content-security-policy"]
    assert answer.status == 200
    assert "unsafe-eval" not in policy
    assert "script-src 'self' 'nonce-" in policy
    assert "http:" not in policy
    assert chat.ask("GET", "/chat/").headers["content-security-policy"] != policy


CLOSED = {
    "GET": [
        "gradio_api/file=/etc/passwd", "gradio_api/file/etc/passwd", "file=/etc/passwd",
        "gradio_api/upload_progress?upload_id=x", "gradio_api/proxy=https://x.hf.space/",
        "gradio_api/vibe-code", "gradio_api/runs", "gradio_api/info", "gradio_api/openapi.json",
        "gradio_api/deep_link", "gradio_api/custom_component/x/client/y/z", "gradio_api/token",
        "config", "dev/reload", "monitoring", "monitoring/summary", "pwa_icon", "manifest.json",
        "svelte/x.js", "static/../../../../../../etc/passwd",
        "static/..%2f..%2f..%2f..%2fetc/passwd", "assets/..%2f..%2findex.html",
        "assets//etc/passwd",
    ],
    "POST": [
        "gradio_api/upload", "gradio_api/component_server", "gradio_api/run/predict",
        "gradio_api/api/predict", "gradio_api/call/predict", "gradio_api/process_recording",
        "gradio_api/vibe-edit", "login", "",
    ],
    "PUT": [""],
}  # fmt: skip


@needs_gradio
def test_no_other_door_of_gradio_is_open(chat: Live) -> None:
    for method, paths in CLOSED.items():
        for path in paths:
            answer = chat.ask(method, f"/chat/{path}", {} if method == "POST" else None)
            assert answer.status == 404, (method, path)
            assert "there is no" in answer.json["error"]["message"]


@needs_gradio
def test_a_page_that_gradio_saved_is_not_looked_for(chat: Live) -> None:
    plain_page, with_query = chat.ask("GET", "/chat/"), chat.ask("GET", "/chat/?deep_link=abc")
    assert b'"deep_link_state":"none"' in with_query.body
    assert abs(len(plain_page.body) - len(with_query.body)) < 50


@needs_gradio
def test_an_event_that_names_a_file_does_not_reach_gradio(chat: Live) -> None:
    event = {"data": [{"path": "/etc/passwd"}], "fn_index": 0, "session_hash": "x"}
    answer = chat.ask("POST", "/chat/gradio_api/queue/join", event)
    assert answer.status == 400
    assert answer.json["error"]["param"] == "data"


@needs_gradio
def test_what_was_typed_is_never_printed(
    chat: Live,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A handler of an earlier test may write to a stream that was closed since.
    monkeypatch.setattr(logging, "raiseExceptions", False)
    secret = "MY PRIVATE TEXT"
    html = chat.ask("GET", "/chat/").body.decode()
    config, _ = json.JSONDecoder().raw_decode(html.partition("window.gradio_config = ")[2])
    (ask,) = (one["id"] for one in config["dependencies"] if len(one["inputs"]) == 11)
    # Too few values, an adapter that is none, a number of tokens that is none.
    for values in (
        [secret],
        ["Hi", None, "", "en", secret, "", 0.8, 0.5, 8, "auto", 9],
        ["Hi", None, "", "en", "tiny", "", 0.8, 0.5, secret, "auto", 9],
    ):
        event = {"data": values, "fn_index": ask, "session_hash": "s"}
        joined = chat.ask("POST", "/chat/gradio_api/queue/join", event)
        assert joined.status == (400 if len(values) == 1 else 200)
        if joined.status == 200:
            told = chat.ask("GET", "/chat/gradio_api/queue/data?session_hash=s")
            assert b'"success":false' in told.body
    printed = capfd.readouterr()
    said = printed.out + printed.err + caplog.text
    assert "the page failed" in said
    assert secret not in said


@needs_gradio
def test_an_event_that_is_too_large_is_refused(chat: Live) -> None:
    event = {"data": ["x" * 2**22], "fn_index": 0, "session_hash": "x"}
    assert chat.ask("POST", "/chat/gradio_api/queue/join", event).status == 413


@needs_gradio
def test_the_page_asks_for_the_servers_key(tiny: mm.LM) -> None:
    from minicpm_mlx.server.web.mount import mount
    from support.serving import serving

    with serving(tiny, mount=mount, settings={"api_key": "secret"}) as live:
        for path in ("/chat/", "/chat/page.js", "/chat/gradio_api/queue/data?session_hash=x"):
            assert live.ask("GET", path).status == 401
        answer = live.ask("GET", "/chat/page.js", headers={"Authorization": "Bearer secret"})
        assert answer.status == 200


# Packages and processes

QUIET = """
import sys
asked = []
sys.addaudithook(lambda event, details: asked.append((event, details)) if event in (
    "socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "subprocess.Popen") else None)
import asyncio
import minicpm_mlx as mm
from minicpm_mlx.server.service import Service
from minicpm_mlx.server.web.mount import mount
assert "gradio" not in sys.modules
from minicpm_mlx.server.web.page import application
async def main():
    service = Service(mm.load("demo"))
    application(service, "/chat")
    await asyncio.sleep(1)
    await service.close(0)
asyncio.run(main())
assert not asked, asked
"""


@needs_gradio
@pytest.mark.slow
def test_making_the_page_asks_no_other_host(demo_folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", QUIET], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


@needs_gradio
def test_a_server_does_not_import_gradio_before_the_page_is_asked_for() -> None:
    script = (
        "import sys, minicpm_mlx.server.web.mount; "
        "from minicpm_mlx.server.requirements import has_page; assert has_page(); "
        "print('gradio' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


def test_say_falls_back_to_english() -> None:
    assert say("stop", "fr") == "Stop"
