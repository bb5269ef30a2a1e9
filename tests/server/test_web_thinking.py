"""Thoughts on the web page: kept apart from answers, folded, switched, in both languages."""

from __future__ import annotations

import asyncio
import importlib.util
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from support.browser import browser, chromium
from support.scripted_model import scripted_lm

pytest.importorskip("fastapi")

from minicpm_mlx.server.service import Service
from minicpm_mlx.server.web.bubbles import bubbles_of
from minicpm_mlx.server.web.controls import follow_thinking, own_sampling, read_controls
from minicpm_mlx.server.web.conversation import PageSettings, WebConversation, build_request
from minicpm_mlx.server.web.export import markdown_of
from minicpm_mlx.server.web.kept import Message, dump, parse
from minicpm_mlx.server.web.status import status

if TYPE_CHECKING:
    from minicpm_mlx import LM

THOUGHT = "Two <b>and</b> two."
SCRIPT = {
    "2 + 2": f"<think>\n{THOUGHT}\n</think>\n\nIt is four.",
    "Hello": "Hi!",
    "endless": "<think>\n" + "on and on " * 90,
}
SETTINGS = PageSettings(served="thinker", system="", top_p=None, temperature=0.0, max_tokens=None)


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> LM:
    return scripted_lm(tmp_path_factory.mktemp("scripted") / "thinker", SCRIPT)


@pytest.fixture
def service(lm: LM) -> Iterator[Service]:
    made = Service(lm)
    yield made
    asyncio.run(made.close(0))


def asked(service: Service, settings: PageSettings, *questions: str) -> WebConversation:
    async def run() -> WebConversation:
        conversation = WebConversation()
        for question in questions:
            async for _ in conversation.ask(service, settings, question):
                pass
        return conversation

    return asyncio.run(run())


def test_a_thought_is_kept_beside_its_answer_and_sent_back(service: Service) -> None:
    settings = replace(SETTINGS, served=service.models[0].name)
    conversation = asked(service, settings, "What is 2 + 2?", "Hello")
    thought, plain = conversation.messages[1::2]
    assert (thought["content"], thought["reasoning_content"]) == ("It is four.", THOUGHT)
    assert thought["thought_tokens"] > len(THOUGHT.split())
    assert plain == {"role": "assistant", "content": "Hi!"}
    assert parse(dump(conversation.messages, {"a": 1})).messages == conversation.messages
    sent = build_request(service, settings, conversation.messages[:2])
    said = {key: thought[key] for key in ("role", "content", "reasoning_content")}
    expected = service.chat_prompt([conversation.messages[0], said])
    assert sent.prompt.ids == expected.ids
    assert "two." in service.lm.tokenizer.decode(sent.prompt.ids)


def test_the_switch_turns_thinking_off_and_on(service: Service) -> None:
    settings = replace(SETTINGS, served=service.models[0].name)
    off = asked(service, replace(settings, think="off"), "What is 2 + 2?")
    assert off.messages[-1] == {"role": "assistant", "content": "It is four."}
    on = asked(service, replace(settings, think="on"), "What is 2 + 2?")
    assert on.messages[-1]["reasoning_content"] == THOUGHT


def test_the_sliders_follow_the_switch_until_the_user_moves_them(lm: LM) -> None:
    thinking = replace(lm.sampling, temperature=0.9, top_p=0.95)
    own = replace(lm.sampling, temperature=0.7, top_p=0.95)
    service = Service(replace(lm, sampling=own, thinking_sampling=thinking))
    try:
        assert own_sampling(service, "auto").temperature == 0.7  # the template opens no thought
        first = {"top_p": 0.95, "temperature": 0.7}
        on = follow_thinking(service, "on", first)
        assert on == {"top_p": 0.95, "temperature": 0.9}
        assert follow_thinking(service, "off", on) == first
        assert follow_thinking(service, "on", {"top_p": 0.5, "temperature": 0.0}) == {
            "top_p": 0.5,
            "temperature": 0.0,
        }
        shown = read_controls(service, service.models[0].name, "", *on.values(), 9, "on", 4)
        request = build_request(service, shown, [{"role": "user", "content": "2 + 2"}])
        assert request.sampling.temperature == 0.9
    finally:
        asyncio.run(service.close(0))


def test_the_longest_thought_is_bounded_and_the_answer_goes_on(service: Service) -> None:
    settings = replace(SETTINGS, served=service.models[0].name, think="on", think_tokens=3)
    reply = asked(service, settings, "What is 2 + 2?").messages[-1]
    assert (reply["reasoning_content"], reply["content"]) == (THOUGHT[:3], "It is four.")
    off = asked(service, replace(settings, think="off"), "What is 2 + 2?").messages[-1]
    assert off == {"role": "assistant", "content": "It is four."}
    longest = service.context_length
    for tokens, bound in ((longest, None), (None, None), (longest - 1, longest - 1), (0, 0)):
        read = read_controls(service, "thinker", None, 1.0, 0.0, None, "on", tokens)
        assert read.think_tokens == bound


@pytest.mark.parametrize(
    ("language", "you", "thought"), [("en", "You", "thought"), ("zh", "你", "思考")]
)
def test_an_exported_conversation_keeps_or_drops_its_thoughts(
    language: str, you: str, thought: str
) -> None:
    conversation = WebConversation([{"role": "user", "content": "2 + 2?"}, REPLY])
    conversation.settings = {"served": "thinker", "system": "Be brief."}
    stamp, _, text = markdown_of(conversation, language, thoughts=True).partition("\n")
    assert stamp.isdecimal()
    told = f"> *{thought}*\n> \n> {THOUGHT}\n\n"
    assert text.endswith(f"> Be brief.\n\n**{you}**\n\n2 + 2?\n\n**thinker**\n\n{told}Four.\n")
    dropped = markdown_of(conversation, language, thoughts=False)
    assert dropped.partition("\n")[2] == text.replace(told, "")
    assert markdown_of(WebConversation(), language, thoughts=True) == ""


def test_a_reply_that_ends_within_its_thought_says_what_to_do(service: Service) -> None:
    settings = replace(SETTINGS, served=service.models[0].name, max_tokens=9)
    conversation = asked(service, settings, "endless")
    assert conversation.messages[-1]["content"] == ""
    assert conversation.messages[-1]["reasoning_content"].startswith("on")
    assert "raise Max tokens" in status(conversation, "en", 4096)
    assert "思考" in status(conversation, "zh", 4096)


REPLY: Message = {
    "role": "assistant",
    "content": "Four.",
    "reasoning_content": THOUGHT,
    "thought_seconds": 4.2,
    "thought_tokens": 312,
}


def test_a_thought_is_a_folded_block_above_its_answer() -> None:
    block, answer = bubbles_of([REPLY], "en")
    assert block["metadata"] == {"title": "thought for 4.2 s, 312 tokens", "status": "done"}
    assert block["content"][0]["text"] == "Two &lt;b>and&lt;/b> two."
    assert answer["content"][0]["text"] == "Four."
    block, _ = bubbles_of([REPLY], "zh")
    assert block["metadata"]["title"] == "思考 4.2 秒，312 个词元"
    (block,) = bubbles_of([REPLY | {"content": ""}], "zh", growing=True)
    assert block["metadata"] == {"title": "思考中 …", "status": "pending"}


@pytest.mark.parametrize(
    "odd",
    [{"reasoning_content": 5}, {"reasoning_content": "x", "thought_seconds": "<b>"}, {"more": 1}],
)
def test_what_no_page_has_kept_of_a_thought_is_checked(odd: dict[str, object]) -> None:
    raw = {"messages": [{"role": "assistant", "content": "a"} | odd], "settings": {}}
    (message,) = parse(json.dumps(raw)).messages
    bubbles_of([message], "en")
    assert not {"more", "<b>"} & {*message, *map(str, message.values())}


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("gradio") is None or chromium() is None,
    reason="needs the package gradio and a Chromium",
)
def test_a_browser_folds_the_thought_and_has_the_switch(lm: LM, tmp_path: Path) -> None:
    from minicpm_mlx.server.web.mount import mount
    from support.serving import serving

    bots = "[...document.querySelectorAll('#chat .bot')].map(found => found.innerText).join(' ')"
    lm = replace(lm, thinking_sampling=replace(lm.sampling, temperature=0.9))
    with serving(lm, mount=mount) as live, browser(tmp_path / "profile") as chrome:
        page = chrome.page(f"{live.url}/chat/")
        page.see("#box textarea")
        page.see("#think input")
        page.click("#box textarea")
        page.write("What is 2 + 2?")
        page.press("Enter")
        page.wait(f"{bots}.includes('It is four.')")
        page.wait(f"/thought for [0-9.]+ s, [0-9]+ tokens/.test({bots})")
        page.wait(f"!{bots}.includes('two.')")  # it is folded
        page.value("[...document.querySelectorAll('#language input')][1].click()")
        page.wait(f"/思考 [0-9.]+ 秒，[0-9]+ 个词元/.test({bots})")
        labels = "document.querySelector('#think').innerText"
        page.wait(f"{labels}.includes('自动') && {labels}.includes('关')")
        page.value("document.querySelector('#chat .bot .title').click()")
        page.wait(f"{bots}.includes('Two <b>and</b> two.')")
        page.value(
            "const make = URL.createObjectURL; URL.createObjectURL = (blob) => "
            "(blob.text().then((text) => { window.saved = text; }), make.call(URL, blob)); 0"
        )
        page.click("#export")
        page.wait("window.saved?.endsWith('**thinker**\\n\\nIt is four.\\n')")
        page.click("#with_thoughts input")
        page.click("#export")
        page.wait("window.saved.includes('*思考*\\n> \\n> Two <b>and</b> two.')")
        temperature = "document.querySelector('#temperature input').value"
        for number, shown in ((1, "0.9"), (2, "0")):
            page.value(f"[...document.querySelectorAll('#think input')][{number}].click()")
            page.wait(f"{temperature} === '{shown}'")
        page.click("#regenerate")
        page.wait(f"{bots}.includes('It is four.') && !{bots}.includes('思考')")
        assert page.problems() == []
        page.close()
