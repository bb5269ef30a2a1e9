"""Replies to questions, told as they are finished."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from .. import memory
from ..lm.batch import BatchRequest, replies
from ..lm.outputs import Completion
from ..model.config import Config
from .data.load import Loaded
from .examples import shots_for
from .question import Item, Question
from .settings import EvalSettings
from .task import Task

if TYPE_CHECKING:
    from ..lm.lm import LM

__all__ = ["GeneratedReply", "replies_to"]


@dataclass(frozen=True, kw_only=True)
class GeneratedReply:
    """What the model said to a question."""

    question: Question
    prompt: str
    """All that it read, the template's words among it."""
    shots: int
    """Examples in it; fewer than asked for where the context is too short."""
    text: str
    tokens: int
    finish: str
    """"stop" (it ended, or its score was decided), "length" or "no room": the context is too short
    for the question, which then has no reply."""


@dataclass(frozen=True, kw_only=True)
class _Prompt:
    question: Question
    text: str
    ids: list[int]
    shots: int


def replies_to(
    lm: LM, task: Task, items: Sequence[Item], loaded: Loaded, settings: EvalSettings
) -> Iterator[GeneratedReply]:
    """The replies to `items`, each as soon as it is finished.

    Where a prompt and the longest reply do not fit the model's context, its last examples are left
    out. DataError where there are too few examples, TemplateError where the model has no chat
    template and one is asked for.
    """
    prompts: dict[int, _Prompt] = {}
    unasked: list[_Prompt] = []

    def asked() -> Iterator[BatchRequest]:
        for item in items:
            prompt = _prompt(lm, task, item, loaded, settings)
            if len(prompt.ids) >= lm.context_length:
                unasked.append(prompt)
                continue
            prompts[len(prompts)] = prompt
            yield _asked(lm, task, prompt, settings)

    found = replies(
        lm.model, lm.tokenizer, asked(), settings.width, positions=_positions(lm.config)
    )
    for place, completion in found:
        said = completion.text
        if not settings.chat_template:
            said = _space(lm, completion) + said
        tokens = completion.stats.completion_tokens
        yield _reply(prompts[place], said, tokens, completion.finish_reason)
    yield from (_reply(prompt, "", 0, "no room") for prompt in unasked)


def _positions(config: Config) -> int:
    """Positions of cache for which a model that is loaded leaves room, half of them to spare: a
    batch that grows is copied."""
    found = memory.plan(config)
    left = max(found.available - found.working, 0) // 2
    return left * found.context // max(found.cache, 1)


def _reply(prompt: _Prompt, text: str, tokens: int, finish: str) -> GeneratedReply:
    return GeneratedReply(
        question=prompt.question,
        prompt=prompt.text,
        shots=prompt.shots,
        text=text,
        tokens=tokens,
        finish=finish,
    )


def _prompt(lm: LM, task: Task, item: Item, loaded: Loaded, settings: EvalSettings) -> _Prompt:
    wanted = task.shots["gen"] if settings.shots is None else settings.shots
    shots = shots_for(task, item, loaded, settings.seed, wanted)
    while True:
        question = task.question(item, shots)
        text = question.prompt
        if settings.chat_template:
            text = lm.tokenizer.chat_text([{"role": "user", "content": text}])
        ids = lm.tokenizer.encode(text)
        if len(ids) + task.max_tokens <= lm.context_length or not shots:
            return _Prompt(question=question, text=text, ids=ids, shots=len(shots))
        shots = shots[:-1]


def _asked(lm: LM, task: Task, prompt: _Prompt, settings: EvalSettings) -> BatchRequest:
    item, room = prompt.question.item, lm.context_length - len(prompt.ids)
    stops = list(prompt.question.stop)
    if settings.chat_template and lm.tokenizer.template:
        stops.extend(lm.tokenizer.template.stop_strings)
    early = task.enough is not None and not settings.whole_replies
    return BatchRequest(
        ids=prompt.ids,
        max_tokens=min(task.max_tokens, room),
        sampling=replace(settings.sampling_of(task), seed=_seed(settings.seed, task, item)),
        stops=stops,
        enough=partial(_enough, task, prompt.question) if early else None,
    )


def _enough(task: Task, question: Question, text: str) -> bool:
    return task.enough is not None and task.enough(text, question)


def _seed(seed: int, task: Task, item: Item) -> int:
    """An item's own, so that its reply is the same whatever else is asked, or was before."""
    name = f"{seed}/{task.name}/{item.subset}/{item.id}"
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")


def _space(lm: LM, completion: Completion) -> str:
    """The space that a reply begins with, which a text of its own loses: what goes on with a
    program needs it."""
    ids = completion.token_ids
    before = lm.tokenizer.encode("a", add_bos=False)
    after = lm.tokenizer.decode([*before, *ids])[len(lm.tokenizer.decode(before)) :]
    return after[: len(after) - len(lm.tokenizer.decode(ids))]
