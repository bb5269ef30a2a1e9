"""The web page in a real browser, with the real demo model behind it."""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from support.browser import Browser, Page, browser, chromium

if TYPE_CHECKING:
    from support.serving import Live

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("gradio") is None, reason="the web page needs the package gradio"
    ),
    pytest.mark.skipif(
        chromium() is None, reason="no Chromium: apt-get install chromium, or Chrome on a Mac"
    ),
]

BOX = "#box textarea"
BOT = "#chat .bot .message-content"
USER = "#chat .user .message-content"


@pytest.fixture(scope="module")
def chat(
    serving: Callable[..., AbstractContextManager[Live]], demo_adapter: Path
) -> Iterator[Live]:
    from minicpm_mlx.server.web.mount import mount

    with serving(adapters={"pirate": demo_adapter}, mount=mount) as live:
        yield live


@pytest.fixture(scope="module")
def chrome(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture
def opened(chrome: Browser, chat: Live) -> Iterator[Callable[..., Page]]:
    """Opens the page; afterwards it must have said nothing wrong and asked nobody else."""
    pages: list[Page] = []

    def open_page(**how: Any) -> Page:
        page = chrome.page(f"{chat.url}/chat/", **how)
        pages.append(page)
        page.see(BOX)
        set_number(page, "max_tokens", 8)
        return page

    yield open_page
    for page in pages:
        assert page.problems() == []
        assert {url for url in page.requested() if not url.startswith(chat.url)} == set()
        page.close()


def set_number(page: Page, name: str, value: float) -> None:
    """A slider, by its number."""
    page.see(f"#{name} input[type=number]")
    page.value(f"document.querySelector('#{name} input[type=number]').select()")
    page.write(str(value))
    page.press("Tab")


def ask(page: Page, text: str) -> None:
    """Type a message and send it, but do not wait for the answer."""
    page.click(BOX)
    page.write(text)
    page.press("Enter")


def answered(page: Page, count: int = 1) -> str:
    """The last of so many answers, once it is whole."""
    page.wait(
        f"document.querySelectorAll('{BOT}').length >= {count} "
        "&& document.querySelector('#submit')?.offsetWidth "
        "&& document.querySelector('#status').innerText.length > 12"
    )
    return said(page, BOT)[-1]


def said(page: Page, selector: str) -> list[str]:
    script = f"[...document.querySelectorAll('{selector}')].map(found => found.innerText)"
    return [text.strip() for text in page.value(script)]


def box(page: Page) -> str:
    return str(page.value(f"document.querySelector('{BOX}').value"))


def status(page: Page) -> str:
    return str(page.value("document.querySelector('#status').innerText")).strip()


def idle(chat: Live) -> bool:
    """Whether the service is soon without work."""
    for _ in range(100):
        if not chat.service.state()["running"] and not chat.service.state()["waiting"]:
            return True
        time.sleep(0.05)
    return False


def test_a_reply_grows_and_its_cost_is_told(
    opened: Callable[..., Page], tmp_path: Path, chat: Live
) -> None:
    page = opened()
    set_number(page, "max_tokens", 16)
    ask(page, "Count from one to twenty.")
    page.see("#stop")
    lengths: set[int] = set()
    while not page.value("!!document.querySelector('#submit')?.offsetWidth"):
        lengths |= {len(text) for text in said(page, BOT)}
    reply = answered(page)
    assert len(lengths) >= 3
    assert said(page, USER) == ["Count from one to twenty."]
    assert len(reply) > 20
    assert box(page) == ""
    cost = status(page)
    assert "16 tokens · first after" in cost
    assert "prompt tokens cached" in cost
    assert "cut off" in cost
    page.screenshot(tmp_path / "english.png")


@pytest.mark.slow
def test_the_next_question_finds_the_conversation_in_the_cache(opened: Callable[..., Page]) -> None:
    page = opened()
    ask(page, "My name is Ada.")
    answered(page)
    ask(page, "What is my name?")
    answered(page, 2)
    cached, prompt = (int(part) for part in status(page).split(" · ")[3].split()[:3:2])
    assert 30 < cached < prompt


def test_stop_keeps_what_was_said_and_ends_the_work(
    opened: Callable[..., Page], chat: Live
) -> None:
    page = opened()
    set_number(page, "max_tokens", 2000)
    ask(page, "Write a very long story about the sea.")
    page.wait(f"document.querySelector('{BOT}')?.innerText.length > 20")
    page.click("#stop")
    page.see("#submit")
    assert "stopped" in status(page)
    assert idle(chat)
    before = said(page, BOT)
    assert len(before[0]) > 20
    set_number(page, "max_tokens", 12)
    ask(page, "Thanks.")
    answered(page, 2)
    assert said(page, BOT)[0] == before[0]


def test_turns_are_answered_anew_taken_back_and_cleared(opened: Callable[..., Page]) -> None:
    page = opened()
    ask(page, "First.")
    first = answered(page)
    page.click("#regenerate")
    page.see("#stop")
    assert answered(page) == first  # the demo takes the likeliest token
    set_number(page, "temperature", 2)
    page.click("#regenerate")
    page.see("#stop")
    assert answered(page) != first
    assert len(said(page, USER)) == len(said(page, BOT)) == 1
    ask(page, "Second.")
    answered(page, 2)
    page.click("#undo")
    page.wait(f"document.querySelector('{BOX}').value == 'Second.'")
    assert said(page, USER) == ["First."]
    page.click("#submit")
    answered(page, 2)
    page.click("#clear")
    page.wait(f"!document.querySelector('{USER}')")
    assert status(page) == ""
    page.click("#regenerate")
    page.click("#undo")
    page.value("new Promise(done => setTimeout(done, 300))")
    assert said(page, BOT) == []


def test_keys_the_system_text_and_the_adapter_are_heeded(
    opened: Callable[..., Page], chat: Live
) -> None:
    page = opened()
    page.click("#system textarea")
    page.write("You are a parrot.")
    page.click(BOX)
    page.press("Enter")  # an empty message is not sent
    page.write("one")
    page.press("Enter", shift=True)
    page.write("two")
    assert box(page) == "one\ntwo"
    page.press("Enter")
    plain = answered(page)
    assert said(page, USER) == ["one\ntwo"]
    messages = [
        {"role": "system", "content": "You are a parrot."},
        {"role": "user", "content": "one\ntwo"},
    ]
    ids = chat.service.chat_prompt(messages).ids
    assert f"of {len(ids)} prompt tokens" in status(page)
    page.click("#adapter input")
    page.click("#adapter [role=option][aria-label='demo:pirate'], [aria-label='demo:pirate']")
    page.click("#regenerate")
    page.see("#stop")
    assert answered(page) != plain


def test_the_page_speaks_the_browsers_language_takes_its_input_method_and_can_change(
    opened: Callable[..., Page], tmp_path: Path
) -> None:
    page = opened(language="zh-CN,zh;q=0.9")
    page.wait("document.body.innerText.includes('系统提示')")
    page.wait("document.querySelector('#language input[value=zh]').checked")
    assert page.value("document.documentElement.lang").startswith("zh")
    for text in ("发送", "重新生成", "撤回", "清空", "温度", "适配器"):
        assert text in page.text()
    page.click(BOX)
    page.compose("shan dong")
    page.press("Enter")  # of the input method: it does not send
    page.press("Enter", code=229)
    page.compose("")
    page.write("山东省最高的山是哪座山？")
    page.press("Enter", code=229)
    page.value("new Promise(done => setTimeout(done, 300))")
    assert said(page, USER) == []
    page.press("Enter")
    answered(page)
    assert said(page, USER) == ["山东省最高的山是哪座山？"]
    assert "个词元 · 首个" in status(page)
    page.screenshot(tmp_path / "chinese.png")
    page.click("#language label:first-of-type")
    page.wait("document.querySelector('#submit').innerText == 'Submit'")
    assert "tokens · first after" in status(page)
    assert page.value(f"document.querySelector('{BOX}').placeholder").startswith("Ask")
    assert page.value("document.documentElement.lang") == "en"
    assert said(page, USER) == ["山东省最高的山是哪座山？"]
    assert "发送" not in page.text()


@pytest.mark.slow
def test_a_message_that_is_too_long_is_told_and_given_back(opened: Callable[..., Page]) -> None:
    page = opened()
    ask(page, "word " * 9000)
    page.wait("document.querySelector('#status').innerText.includes('⚠')")
    assert "are longer than" in status(page)
    assert box(page).startswith("word word")
    assert said(page, USER) == []


HOSTILE = (
    "<img src=x onerror='window.ran=1'><script>window.ran=2</script> "
    "![x](http://example.com/x.png) <a href='javascript:window.ran=3'>y</a>"
)


@pytest.mark.slow
def test_html_of_a_reply_is_shown_and_not_run(
    opened: Callable[..., Page], chat: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("llguidance")
    import re

    from minicpm_mlx.lm.structured.grammar import grammar_of
    from minicpm_mlx.server.web import conversation

    form = grammar_of(chat.service.lm.tokenizer, regex=re.escape(HOSTILE).replace("\\ ", " "))
    build = conversation.build_request
    monkeypatch.setattr(
        conversation, "build_request", lambda *given: replace(build(*given), grammar=form)
    )
    page = opened()
    set_number(page, "max_tokens", 200)
    ask(page, "Write HTML.")
    reply = answered(page)
    assert "<img src=x onerror='window.ran=1'>" in reply
    assert page.value("[...document.querySelectorAll('#chat .bot img')].length") == 0
    assert page.value("window.ran") is None


def test_the_browser_itself_runs_no_script_of_a_reply(chrome: Browser, chat: Live) -> None:
    page = chrome.page(f"{chat.url}/chat/")
    page.see(BOX)
    page.value(
        "document.body.insertAdjacentHTML('beforeend', "
        f"{json.dumps(HOSTILE + '<img src=http://example.com/y.png>')})"
    )
    page.value("new Promise(done => setTimeout(done, 300))")
    assert page.value("window.ran") is None
    assert len(page.problems()) >= 2  # what the browser refused
    page.close()


def test_closing_the_tab_gives_the_reply_up(chrome: Browser, chat: Live) -> None:
    page = chrome.page(f"{chat.url}/chat/")
    page.see(BOX)
    set_number(page, "max_tokens", 4000)
    ask(page, "Write a very long story about the sea.")
    page.wait(f"document.querySelector('{BOT}')?.innerText.length > 20")
    assert chat.service.state()["running"] == 1
    page.close()
    assert idle(chat)


@pytest.mark.slow
def test_two_tabs_do_not_see_each_other(opened: Callable[..., Page]) -> None:
    one, other = opened(), opened()
    ask(one, "One.")
    ask(other, "Other.")
    answered(one)
    answered(other)
    assert said(one, USER) == ["One."]
    assert said(other, USER) == ["Other."]


@pytest.mark.slow
def test_dark_and_light_follow_the_system_and_the_button(
    chrome: Browser, chat: Live, tmp_path: Path
) -> None:
    page = chrome.page(f"{chat.url}/chat/")
    page.see(BOX)
    dark = "document.body.classList.contains('dark')"
    assert not page.value(dark)
    page.click("#theme")
    assert page.value(dark)
    page.screenshot(tmp_path / "dark.png")
    page.reload()
    page.wait(f"document.querySelector('{BOX}')?.offsetWidth && {dark}")
    page.click("#theme")
    page.prefer("dark")
    page.value("localStorage.clear()")
    page.reload()
    page.wait(f"document.querySelector('{BOX}')?.offsetWidth && {dark}")
    page.close()


# What the browser keeps


def seen(page: Page, *questions: str) -> bool:
    """Waits until these questions, and no other, are on the page."""
    asked = f"[...document.querySelectorAll('{USER}')].map(found => found.innerText.trim())"
    return bool(page.wait(f"{asked}.join('|') === {json.dumps('|'.join(questions))}"))


def test_a_reload_keeps_the_conversation_until_it_is_cleared(opened: Callable[..., Page]) -> None:
    page = opened()
    set_number(page, "temperature", 0)
    page.click("#system textarea")
    page.write("You are a parrot.")
    ask(page, "My name is <b>Ada</b>.\n`二`")
    first = answered(page)
    page.reload()
    page.see(BOT)
    assert said(page, BOT) == [first]
    assert said(page, USER) == ["My name is <b>Ada</b>.\n二"]
    page.wait("document.querySelector('#system textarea').value === 'You are a parrot.'")
    assert page.value("document.querySelector('#max_tokens input[type=number]').value") == "8"
    ask(page, "And yours?")
    second = answered(page, 2)
    page.reload()
    page.see(BOT, 2)
    assert said(page, BOT) == [first, second]
    page.click("#clear")
    page.wait(f"!document.querySelector('{USER}')")
    page.reload()
    page.see(BOX)
    page.value("new Promise(done => setTimeout(done, 600))")
    assert said(page, USER) == []
    assert page.value("Object.keys(localStorage).length") == 0


@pytest.mark.slow
def test_a_reload_during_a_reply_keeps_what_came_of_it(chrome: Browser, chat: Live) -> None:
    page = chrome.page(f"{chat.url}/chat/")
    page.see(BOX)
    set_number(page, "max_tokens", 2000)
    ask(page, "Write a very long story about the sea.")
    page.wait("(document.querySelector('#kept textarea, #kept input')?.value ?? '').length > 400")
    page.reload()
    page.see(BOT)
    assert len(said(page, BOT)[0]) > 50
    assert idle(chat)
    page.see("#submit")
    page.close()


@pytest.mark.slow
def test_a_conversation_outlives_the_server(
    serving: Callable[..., AbstractContextManager[Live]], chrome: Browser
) -> None:
    from minicpm_mlx.server.web.mount import mount

    with serving(mount=mount) as live:
        page = chrome.page(f"{live.url}/chat/")
        page.see(BOX)
        set_number(page, "max_tokens", 8)
        ask(page, "One.")
        first = answered(page)
        port = live.place[1]
    with serving(mount=mount, port=port):
        ask(page, "Two.")
        second = answered(page, 2)
        assert said(page, USER) == ["One.", "Two."]
        page.reload()
        page.see(BOT, 2)
        assert said(page, BOT) == [first, second]
    page.close()


@pytest.mark.slow
def test_a_new_tab_goes_on_where_a_closed_one_was_and_shares_with_no_open_one(
    opened: Callable[..., Page], chrome: Browser, chat: Live
) -> None:
    one = opened()
    ask(one, "One.")
    answered(one)
    other = chrome.page(f"{chat.url}/chat/", beside=one)
    other.see(BOX)
    set_number(other, "max_tokens", 8)
    ask(other, "Other.")
    answered(other)
    for page, question in ((one, "One."), (other, "Other.")):
        page.reload()
        assert seen(page, question)
    last = opened(beside=one)
    assert said(last, USER) == []
    other.close()
    third = chrome.page(f"{chat.url}/chat/", beside=one)
    assert seen(third, "Other.")
    third.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    "kept",
    ['{"messages": [{"role": "x", "content": 1}]}', "{", "[]", '{"messages": 5}', "x" * 50],
)
def test_what_no_page_has_kept_harms_none(opened: Callable[..., Page], kept: str) -> None:
    page = opened()
    page.value("new Promise(done => setTimeout(done, 600))")  # the page has begun
    page.value(f"localStorage.setItem(sessionStorage.getItem('minicpm-tab'), {json.dumps(kept)})")
    page.reload()
    page.see(BOX)
    set_number(page, "max_tokens", 8)
    ask(page, "Hello")
    answered(page)
    assert said(page, USER) == ["Hello"]


@pytest.mark.slow
def test_a_narrow_screen_needs_no_scrolling_sideways(
    opened: Callable[..., Page], tmp_path: Path
) -> None:
    page = opened(width=390, language="zh-CN")
    ask(page, "word" * 60)
    answered(page)
    assert page.value("document.documentElement.scrollWidth") <= 390
    for name in ("#submit", "#regenerate", "#undo", "#clear", "#theme", BOX):
        left, right = page.value(
            f"(box => [box.left, box.right])(document.querySelector('{name}')"
            ".getBoundingClientRect())"
        )
        assert 0 <= left < right <= 390, name
    page.screenshot(tmp_path / "narrow.png")


CONTROLS = (
    "#language label:first-of-type",
    "#language label:last-of-type",
    "#theme",
    BOX,
    "#submit",
    "#regenerate",
    "#undo",
    "#clear",
    "#adapter input",
    "#system textarea",
    *(f"#{name} input[type={kind}]" for name in ("top_p", "temperature", "max_tokens")
      for kind in ("number", "range")),
)  # fmt: skip
REACHED = """(() => {
    const box = document.querySelector(SELECTOR).getBoundingClientRect();
    const [x, y] = [box.x + box.width / 2, box.y + box.height / 2];
    const inside = box.left >= 0 && box.right <= innerWidth && y > 0 && y < innerHeight;
    const top = document.elementFromPoint(x, y);
    return inside && !!top?.closest(SELECTOR + ", label");
})()"""


@pytest.mark.parametrize(
    ("width", "height"),
    [
        (320, 480),
        *(
            pytest.param(*size, marks=pytest.mark.slow)
            for size in ((360, 740), (480, 320), (1024, 400), (767, 900), (768, 600), (1280, 300))
        ),
    ],
)
def test_all_controls_can_be_reached_with_the_wheel(
    opened: Callable[..., Page], width: int, height: int
) -> None:
    page = opened()
    page.resize(width, height)
    page.value("new Promise(done => setTimeout(done, 300))")
    assert page.value("document.documentElement.scrollWidth") <= width
    left = list(CONTROLS)
    for place in ((width // 2, 30), (width - 60, height // 2)):  # the page; the settings' column
        for delta in (-3000, *[height // 3] * 15):
            page.wheel(*place, delta)
            left = [
                name
                for name in left
                if not page.value(REACHED.replace("SELECTOR", json.dumps(name)))
            ]
    assert left == []


@pytest.mark.slow
def test_the_keyboard_alone_is_enough(opened: Callable[..., Page]) -> None:
    page = opened()
    page.click(BOX)
    page.write("Hello")
    page.press("Tab")
    assert page.value("document.activeElement.id") == "submit"
    page.press("Enter")
    answered(page)
    page.see("#submit")
    page.value("document.querySelector('#undo').focus()")
    page.press("Enter")
    page.wait(f"document.querySelector('{BOX}').value == 'Hello'")
