"""A conversation's cache never changes an answer, and its turns never vanish unasked."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import minicpm_mlx as mm
from minicpm_mlx.errors import ContextLengthError, InvalidArgumentError
from minicpm_mlx.lm import session_cache, sessions
from minicpm_mlx.lm.attachments import with_files, without_files
from minicpm_mlx.lm.outputs import collect
from minicpm_mlx.text.chat_prompt import ChatPrompt

GREEDY = mm.Sampling(temperature=0)
TOKENS = 4
SYSTEM = "Be brief."
QUESTIONS = [
    *("What is the capital of France?", "And of Italy?", "How many legs has a cat?"),
    *("Why is the sky blue?", "法国的首都在哪里?", "Name three colours. 🐟"),
    *('Say "hello"\ntwice.', "Two plus two?"),
]

Fresh = Callable[[mm.Chat], tuple[int, ...]]


def new_chat(lm: mm.LM, **options: Any) -> mm.Chat:
    return mm.Chat(lm, **{"system": SYSTEM, "sampling": GREEDY, "max_tokens": TOKENS} | options)


def ask(chat: mm.Chat, question: str) -> mm.lm.Completion:
    return collect(chat.reply(question))


def shown(chat: mm.Chat) -> list[dict[str, str]]:
    """What the last answer was an answer to."""
    system = [{"role": "system", "content": chat.system}] if chat.system else []
    return system + chat.messages[chat.forgotten : -1]


@pytest.fixture(scope="module")
def fresh(demo: mm.LM) -> Fresh:
    """The last answer, as a new session that reads the whole conversation gives it."""
    known: dict[str, tuple[int, ...]] = {}

    def answer(chat: mm.Chat) -> tuple[int, ...]:
        key = repr(shown(chat))
        if key not in known:
            made = demo.generate(shown(chat), max_tokens=chat.max_tokens, sampling=GREEDY)
            known[key] = made.token_ids
        return known[key]

    return answer


@pytest.mark.parametrize("name", ["<|im_start|>", "<|im_end|>"])
def test_turns_with_names_of_special_tokens_read_only_what_is_new(
    demo: mm.LM, fresh: Fresh, name: str
) -> None:
    chat = new_chat(demo)
    first = ask(chat, f"What does {name} mean?")
    known = first.stats.prompt_tokens + first.stats.completion_tokens
    chat.messages[-1]["content"] += name  # as a model may write it, in pieces
    second = ask(chat, f"{name}\n{name}system")
    assert second.token_ids == fresh(chat)
    assert first.stats.prompt_tokens <= second.stats.cached_tokens <= known
    special = demo.tokenizer.special_tokens[name]
    ids = demo.encode(shown(chat))
    plain = [{**m, "content": m["content"].replace(name, "x")} for m in shown(chat)]
    assert ids.count(special) == demo.encode(plain).count(special)


@dataclass
class Conversation:
    """Six turns, the conversation saved after three."""

    chat: mm.Chat
    replies: list[mm.lm.Completion]
    saved: sessions.SavedSession


@pytest.fixture(scope="module")
def six(demo: mm.LM) -> Conversation:
    chat = new_chat(demo)
    replies = [ask(chat, question) for question in QUESTIONS[:3]]
    sessions.save(chat, "six")
    session_cache.save_cache(chat, "six")
    replies += [ask(chat, question) for question in QUESTIONS[3:6]]
    return Conversation(chat, replies, sessions.load("six"))


# The cache


def test_turns_with_the_cache_are_the_turns_without(
    demo: mm.LM, six: Conversation, fresh: Fresh
) -> None:
    assert [m["content"] for m in six.chat.messages[::2]] == QUESTIONS[:6]
    for turn, reply in enumerate(six.replies):
        then = new_chat(demo, messages=six.chat.messages[: 2 * turn + 2])
        assert reply.token_ids == fresh(then), QUESTIONS[turn]


def test_each_turn_reads_only_what_is_new(demo: mm.LM, six: Conversation) -> None:
    stats = [reply.stats for reply in six.replies]
    assert stats[0].cached_tokens == 0
    for before, now, question in zip(stats[:-1], stats[1:], QUESTIONS[1:6], strict=True):
        # The last token of a reply was never fed; the template's marks are some six.
        assert now.cached_tokens >= before.prompt_tokens + before.completion_tokens - 1
        question_tokens = len(demo.tokenizer.encode(question))
        assert now.prompt_tokens - now.cached_tokens <= question_tokens + 12


@pytest.mark.parametrize("with_cache", [True, False])
def test_restored_half_way_it_says_the_same(
    demo: mm.LM, six: Conversation, with_cache: bool
) -> None:
    chat = sessions.restore(six.saved, demo)
    assert chat.messages == six.chat.messages[:6]
    if with_cache:
        assert session_cache.restore_cache(chat, "six") is None
    for turn, question in enumerate(QUESTIONS[3:6], start=3):
        reply = ask(chat, question)
        assert reply.token_ids == six.replies[turn].token_ids
        if turn == 3:
            cached = six.replies[3].stats.cached_tokens if with_cache else 0
            assert reply.stats.cached_tokens == cached
    assert chat.messages == six.chat.messages


def test_undo_and_retry_in_between_change_no_answer(
    demo: mm.LM, six: Conversation, fresh: Fresh
) -> None:
    chat = new_chat(demo)
    first = ask(chat, QUESTIONS[0])
    assert collect(chat.retry()).token_ids == first.token_ids == six.replies[0].token_ids
    ask(chat, "Tell me about fish.")
    assert chat.undo() == "Tell me about fish."
    second = ask(chat, QUESTIONS[1])
    assert second.token_ids == six.replies[1].token_ids
    assert second.stats.cached_tokens >= first.stats.prompt_tokens
    again = collect(chat.retry())
    assert again.token_ids == second.token_ids
    assert again.stats.cached_tokens == again.stats.prompt_tokens - 1
    assert chat.undo() == QUESTIONS[1]
    assert chat.undo() == QUESTIONS[0]
    assert chat.messages == []
    other = ask(chat, QUESTIONS[7])
    assert other.token_ids == fresh(chat)
    assert other.stats.cached_tokens > 5  # the system text


def test_after_a_broken_reply_the_next_is_right_and_clear_leaves_the_system_text(
    demo: mm.LM, fresh: Fresh
) -> None:
    chat = new_chat(demo)
    reply = chat.reply(QUESTIONS[0])
    for _ in range(3):
        next(reply)
    reply.close()
    assert ask(chat, QUESTIONS[1]).token_ids == fresh(chat)
    chat.clear()
    assert (chat.messages, chat.forgotten, chat.system) == ([], 0, SYSTEM)
    ask(chat, QUESTIONS[0])
    assert collect(chat.retry()).token_ids == fresh(chat)


# Retry and undo


def test_retry_draws_another_answer_reproducibly(demo: mm.LM) -> None:
    def drawn() -> list[str]:
        how = mm.Sampling(temperature=1.3, seed=2**64 - 1)
        chat = new_chat(demo, sampling=how, max_tokens=6)
        texts = [ask(chat, "Tell me a story.").text]
        texts += [collect(chat.retry()).text for _ in range(2)]
        assert [m["content"] for m in chat.messages] == ["Tell me a story.", texts[-1]]
        return texts

    texts = drawn()
    assert len(set(texts)) == 3
    assert drawn() == texts
    chat = new_chat(demo, sampling=mm.Sampling(temperature=1.5), max_tokens=8)  # without a seed
    assert ask(chat, "Tell me a story.").text != collect(chat.retry()).text


@pytest.mark.parametrize("broken", [KeyboardInterrupt, mm.MiniCPMError, GeneratorExit])
def test_retry_broken_off_before_its_first_word_keeps_the_old_answer(
    demo: mm.LM, monkeypatch: pytest.MonkeyPatch, broken: type[BaseException]
) -> None:
    turn = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    chat = new_chat(demo, messages=list(turn))

    def stream(*_: Any, **__: Any) -> Iterator[mm.Piece]:
        yield mm.Piece(text="")
        raise broken

    monkeypatch.setattr(mm.LM, "stream", stream)
    pieces = chat.retry()
    next(pieces)
    if broken is GeneratorExit:
        pieces.close()
    else:
        with pytest.raises(broken):
            next(pieces)
    assert chat.messages == turn
    chat.retry()  # never begun
    assert chat.messages == turn


def test_retry_and_undo_need_something_to_work_on(demo: mm.LM) -> None:
    chat = new_chat(demo)
    for _ in range(2):
        with pytest.raises(InvalidArgumentError, match="no answer yet to try again"):
            chat.retry()
        with pytest.raises(InvalidArgumentError, match="no turn to take back"):
            chat.undo()
        chat.messages.append({"role": "assistant", "content": "Welcome!"})
    assert len(chat.messages) == 2
    with pytest.raises(InvalidArgumentError, match="no turn to take back"):
        chat.edit("x")
    chat.messages = [{"role": "user", "content": "Hi"}]  # without an answer
    assert chat.undo() == "Hi"
    assert chat.messages == []


def test_edit_asks_in_the_last_questions_place(demo: mm.LM, fresh: Fresh) -> None:
    chat = new_chat(demo)
    ask(chat, QUESTIONS[0])
    with pytest.raises(ContextLengthError):
        collect(chat.edit("word " * 9000))
    assert [m["content"] for m in chat.messages[::2]] == [QUESTIONS[0]]
    reply = collect(chat.edit(QUESTIONS[1]))
    assert [m["content"] for m in chat.messages] == [QUESTIONS[1], reply.text]
    assert reply.token_ids == fresh(chat)


# Overflow


@pytest.mark.parametrize("on_overflow", ["stop", "slide"])
def test_a_question_longer_than_the_context_is_refused_and_changes_nothing(
    demo: mm.LM, on_overflow: str
) -> None:
    chat = new_chat(demo, context=90, on_overflow=on_overflow)
    ask(chat, QUESTIONS[0])
    before, long = [dict(message) for message in chat.messages], "word " * 90
    message = "tokens and the context is 90"
    if on_overflow == "slide":
        message = f"this message alone has {chat.alone(long, system=False)} {message}; shorten it"
    with pytest.raises(ContextLengthError, match=message):
        ask(chat, long)
    assert (chat.messages, chat.forgotten) == (before, 0)
    assert ask(chat, "And?").text  # what fits is still answered


def test_reply_ends_where_the_context_does(demo: mm.LM) -> None:
    chat = new_chat(demo, max_tokens=None)
    chat.context = len(demo.encode([*shown(chat), {"role": "user", "content": "Hi"}])) + 2
    reply = ask(chat, "Hi")
    assert (len(reply.token_ids), reply.finish_reason) == (2, "length")


def test_slide_lets_the_oldest_turns_out_and_answers_as_if_they_had_not_been(
    demo: mm.LM, fresh: Fresh
) -> None:
    chat = new_chat(demo, context=90, on_overflow="slide")
    slid = []
    for question in QUESTIONS[:7]:
        reply = ask(chat, question)
        slid.append(chat.forgotten)
        assert reply.stats.prompt_tokens + reply.stats.completion_tokens <= 90
        assert reply.stats.prompt_tokens == len(demo.encode(shown(chat)))
        assert shown(chat)[0] == {"role": "system", "content": SYSTEM}
        assert chat.messages[chat.forgotten]["role"] == "user"
        assert reply.token_ids == fresh(chat)
    assert slid[0] == 0
    assert slid == sorted(slid)
    assert 0 < slid[-1] < len(chat.messages)
    assert len(set(slid)) < len(slid) - 1  # not with every turn, since the rest is then read anew
    assert [m["content"] for m in chat.messages[::2]] == QUESTIONS[:7]  # none is lost


def test_undo_of_a_question_that_pushed_the_others_out_brings_them_back(demo: mm.LM) -> None:
    chat = new_chat(demo, context=90, on_overflow="slide", max_tokens=3)
    ask(chat, QUESTIONS[0])
    ask(chat, "word " * 50)
    assert chat.forgotten == 2
    chat.undo()
    assert chat.forgotten == 0
    collect(chat.retry())
    assert shown(chat)[1] == {"role": "user", "content": QUESTIONS[0]}


def test_context_is_bounded_by_the_models(demo: mm.LM) -> None:
    small = replace(demo, card=replace(demo.card, context=50))
    for lm, context, length in (demo, 10**9, demo.context_length), (demo, 64, 64), (small, 64, 50):
        assert new_chat(lm, context=context).context_length == length


def test_tokens_counts_what_would_be_shown(demo: mm.LM) -> None:
    chat = new_chat(demo, system=None)
    assert chat.tokens() == 0
    chat.messages += [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    assert chat.tokens() == len(demo.encode(chat.messages))
    chat.forgotten = 2
    assert chat.tokens() == 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"on_overflow": "drop"}, "on_overflow must be one of stop, slide, got 'drop'"),
        ({"on_overflow": None}, "on_overflow must be"),
        ({"on_overflow": ["stop"]}, "on_overflow must be"),
        ({"context": 0}, "context must be 1 or more, got 0"),
        ({"context": -5}, "context must be 1 or more"),
        ({"context": "90"}, "context must be a whole number, got '90'"),
        ({"context": 90.0}, "context must be a whole number"),
        ({"context": True}, "context must be a whole number"),
        ({"max_tokens": 0}, "max_tokens must be 1 or more"),
        ({"max_tokens": "9"}, "max_tokens must be a whole number"),
        ({"kv_bits": 8.0}, "kv_bits must be"),
        ({"kv_bits": 5}, "kv_bits must be 8 or 4"),
        ({"stop": [""]}, "stop must be"),
        ({"stop": 5}, "stop must be"),
    ],
)
def test_wrong_settings_are_refused_where_they_are_made(
    demo: mm.LM, wrong: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        mm.Chat(demo, **wrong)


# Files


@given(
    files=st.lists(st.tuples(st.sampled_from(["a.txt", "b:\ufffd", "c d"]), st.text("`\nab:"))),
    text=st.text("`\nab "),
)
def test_files_of_a_message_come_out_as_they_went_in(
    files: list[tuple[str, str]], text: str
) -> None:
    assert without_files(with_files(files, "?" + text)) == (files, "?" + text)


def test_fence_is_longer_than_those_within() -> None:
    assert with_files([("a", "x")], "?") == "a:\n```\nx\n```\n\n?"
    assert with_files([("a", "````md\n```")], "") == "a:\n`````\n````md\n```\n`````\n\n"


# Any order of turns


class Parrot:
    """A model that says the last word of what it was shown; a letter is a token."""

    context_length = 60
    sampling = GREEDY
    tokenizer = SimpleNamespace(template=None, encode=lambda text, add_bos: list(text))

    def __init__(self) -> None:
        self.fail = False
        self.read: list[list[dict[str, str]]] = []

    def session(self, kv_bits: int | None) -> object:
        return object()

    def encode(self, messages: list[dict[str, str]]) -> list[int]:
        self.read.append(messages)
        return [0] * sum(1 + len(message["content"]) for message in messages)

    def chat_prompt(
        self, messages: list[dict[str, str]], think: bool | None, tools: None = None
    ) -> ChatPrompt:
        return ChatPrompt(ids=self.encode(messages))

    def default_sampling(self, prompt: ChatPrompt) -> mm.Sampling:
        return self.sampling

    def stream(
        self, prompt: ChatPrompt, max_tokens: int, **_: Any
    ) -> Generator[mm.Piece, None, None]:
        assert 0 < max_tokens <= self.context_length - len(prompt.ids)
        if self.fail:
            raise mm.MiniCPMError("broken")
        for letter in self.read[-1][-1]["content"][:max_tokens]:
            yield mm.Piece(text=letter)


STEPS = st.tuples(st.sampled_from(["ask", "edit"]), st.integers(1, 70)) | st.sampled_from(
    [("retry", 0), ("undo", 0), ("clear", 0), ("break", 5), ("fail", 5)]
)


@settings(max_examples=300, deadline=None)
@given(steps=st.lists(STEPS, max_size=25), slide=st.booleans())
def test_no_order_of_turns_loses_one_or_shows_half_of_one(
    steps: list[tuple[str, int]], slide: bool
) -> None:
    lm = Parrot()
    overflow: Any = "slide" if slide else "stop"
    chat = mm.Chat(lm, system="be", on_overflow=overflow, max_tokens=9)  # type: ignore[arg-type]
    for step, size in steps:
        before, slid = list(chat.messages), chat.forgotten
        question = "x" * size
        lm.fail = step == "fail"
        try:
            if step == "undo":
                assert chat.undo() == before[-2]["content"]
                assert chat.messages == before[:-2]
            elif step == "clear":
                chat.clear()
            elif step == "break":
                pieces = chat.reply(question)
                assert next(pieces).text == "x"
                pieces.close()
                assert chat.messages[-1]["content"] == "x"
            else:
                turns = {"retry": chat.retry, "edit": lambda: chat.edit(question)}  # noqa: B023
                list(turns.get(step, lambda: chat.reply(question))())  # noqa: B023
                kept = len(before) - 2 * (step in turns)
                assert chat.messages[:-2] == before[:kept]
                asked, said = (message["content"] for message in chat.messages[-2:])
                assert said
                assert asked.startswith(said)
                assert lm.read[-1][1:] == chat.messages[chat.forgotten : -1]
        except mm.MiniCPMError:
            assert (chat.messages, chat.forgotten) == (before, slid)
        roles = [message["role"] for message in chat.messages]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert chat.forgotten % 2 == 0
        assert chat.forgotten < max(1, len(chat.messages))
        assert slide or not chat.forgotten
