"""Generates replies to a task's questions, in batches."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from .. import memory
from ..lm.batch import BatchRequest, replies
from ..lm.outputs import Completion
from ..lm.thinking_grammar import thinking_grammar
from ..model.config import Config
from ..text.chat_prompt import ChatPrompt, chat_prompt
from .data.load import EvalData
from .examples import draw_examples
from .question import Doc, Question
from .settings import EvalSettings
from .task import Task

if TYPE_CHECKING:
    from ..lm.lm import LM


@dataclass(frozen=True, kw_only=True)
class GeneratedReply:
    """The model's reply to a question."""

    question: Question
    prompt: str
    """The whole text the model read, the chat template's parts included."""
    few_shot: int
    """Examples in the prompt; fewer than asked for where the context is too short."""
    text: str = ""
    """The answer."""
    thinking: str = ""
    """The thought before it, which is not scored."""
    tokens: int = 0
    """Those of the thought among them."""
    finish: str = "no room"
    """"stop" (it ended, or its score was decided), "length", or "no room": the question is longer
    than the context and has no reply."""


def generate_replies(
    lm: LM, task: Task, docs: Sequence[Doc], data: EvalData, settings: EvalSettings
) -> Iterator[GeneratedReply]:
    """The replies to `docs`, each as soon as it is finished.

    Where a prompt and the longest reply exceed the model's context, its last examples are left
    out. DataError where there are too few examples, TemplateError where the settings ask for a
    chat template and the model has none, InvalidArgumentError where they ask it to think and it
    does not.
    """
    asked: list[GeneratedReply] = []
    too_long: list[GeneratedReply] = []

    def requests() -> Iterator[BatchRequest]:
        for doc in docs:
            prompt, chat = _fit_prompt(lm, task, doc, data, settings)
            if len(chat.ids) >= lm.context_length:
                too_long.append(prompt)
            else:
                asked.append(prompt)
                yield _request(lm, task, prompt.question, chat, settings)

    completions = replies(
        lm.model, lm.tokenizer, requests(), settings.width, positions=_cache_positions(lm.config)
    )
    for index, completion in completions:
        space = "" if settings.chat_template else _leading_space(lm, completion)
        yield replace(
            asked[index],
            text=space + completion.text,
            thinking=completion.thinking,
            tokens=completion.stats.completion_tokens,
            finish=completion.finish_reason,
        )
    yield from too_long


def _cache_positions(config: Config) -> int:
    """Cache positions for which a loaded model leaves memory.

    Halved, since a batch that grows is copied.
    """
    estimate = memory.estimate(config)
    free = max(estimate.available - estimate.working, 0) // 2
    return free * estimate.context // max(estimate.cache, 1)


def _fit_prompt(
    lm: LM, task: Task, doc: Doc, data: EvalData, settings: EvalSettings
) -> tuple[GeneratedReply, ChatPrompt]:
    """The question with as many examples as fit, without its reply yet, and the prompt of it."""
    examples = draw_examples(task, doc, data, settings.seed, settings.shots)
    while True:
        question = task.question(doc, examples)
        text = question.prompt
        if settings.chat_template:
            asked = [{"role": "user", "content": text}]
            chat = chat_prompt(lm.tokenizer, asked, think=settings.think)
            text = chat.text.text
        else:
            chat = ChatPrompt(ids=lm.tokenizer.encode(text))
        if len(chat.ids) + _longest_reply(task, settings) <= lm.context_length or not examples:
            return GeneratedReply(question=question, prompt=text, few_shot=len(examples)), chat
        examples = examples[:-1]


def _request(
    lm: LM, task: Task, question: Question, chat: ChatPrompt, settings: EvalSettings
) -> BatchRequest:
    early_stop = None if settings.whole_replies else task.early_stop
    return BatchRequest(
        ids=chat.ids,
        max_tokens=min(_longest_reply(task, settings), lm.context_length - len(chat.ids)),
        sampling=replace(settings.sampling_of(task), seed=_seed(settings.seed, task, question.doc)),
        stops=[*question.stop, *chat.stops],
        thinking=chat.thinking,  # so that the answer alone is scored
        in_thought=chat.in_thought,
        grammar=thinking_grammar(lm.tokenizer, chat, settings.think_tokens),
        early_stop=early_stop and (lambda text: early_stop(text, question)),
    )


def _longest_reply(task: Task, settings: EvalSettings) -> int:
    """Tokens of a reply: a thought takes none of the room for the answer."""
    return task.max_tokens + (settings.think_tokens or 0)


def _seed(seed: int, task: Task, doc: Doc) -> int:
    """A seed of its own for each document: its reply is the same whatever else is asked."""
    name = f"{seed}/{task.name}/{doc.subset}/{doc.id}"
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")


def _leading_space(lm: LM, completion: Completion) -> str:
    """The reply's leading space, which decoding it alone strips; continued programs need it."""
    ids = completion.token_ids
    before = lm.tokenizer.encode("a", add_bos=False)
    after = lm.tokenizer.decode([*before, *ids])[len(lm.tokenizer.decode(before)) :]
    return after[: len(after) - len(lm.tokenizer.decode(ids))]
