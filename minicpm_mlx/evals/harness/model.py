"""A model class for lm-evaluation-harness: log likelihoods, rolling log likelihoods, replies.

Truncation of contexts, the prefix of an empty one and the windows of a long text follow lm-eval's
own `hf` model, so that results can be compared. Importing this module imports lm-eval.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from ... import __version__
from ...arguments import shown
from ...engine import WIDTH, Sampling
from ...engine.scoring.loglikelihood import Alternatives, score
from ...errors import ContextLengthError, InvalidArgumentError, TemplateError, TokenizerError
from ...lm.batch import BatchRequest, replies
from ...lm.fingerprint import fingerprint
from ...lm.lm import LM
from ...lm.outputs import stop_list
from ...lm.thinking_grammar import thinking_grammar
from ...text.chat_prompt import ChatPrompt, chat_prompt
from ...text.message_text import PromptText
from ...weights.load import parameters
from ..settings import THOUGHT

LOG = logging.getLogger("lm_eval.minicpm_mlx")
"""A child of lm-eval's logger, so that its level applies."""

MAX_REPLY = 256
"""Tokens of a reply where the task does not say; lm-eval's default."""

END_MARK = "\ue000end\ue000"
"""Marks a position in a message; private-use characters, which no task's text has."""

TYPED_MARK = "\ue000typed\ue000"
"""Marks, in a rendered conversation, the name of a special token that is ordinary text."""

Pair = tuple[Any, list[int], list[int]]
"""A request's texts (None: a window of a longer one), token ids of context and continuation."""

Likelihood = tuple[float, bool]
"""Log likelihood of a continuation, and whether greedy decoding would produce it."""

Progress = Callable[[str, int, int], object]
"""Called with a kind of work, the number done, and the total."""


class MiniCPM(TemplateLM):  # type: ignore[misc]  # lm-eval has no types
    """A loaded model for `lm_eval.simple_evaluate(model=...)`.

    `width` texts are computed at a time. `max_length` is the longest context and continuation
    together, by default the model's context. `seed` is for tasks that sample replies. `think` and
    `think_tokens` are for conversations, as of `EvalSettings`: a thought is no part of a reply.

        lm_eval.simple_evaluate(model=MiniCPM(mm.load("demo")), tasks=["arc_easy"])
    """

    def __init__(
        self,
        lm: LM,
        *,
        width: int = WIDTH,
        max_length: int | None = None,
        seed: int = 0,
        think: bool | None = None,
        think_tokens: int | None = None,
        progress: Progress = lambda what, done, total: None,
    ) -> None:
        super().__init__()
        self.lm, self.width, self.seed, self.progress = lm, width, seed, progress
        longest = lm.context_length
        if max_length is not None and not 2 <= max_length <= longest:
            raise InvalidArgumentError(
                f"max_length must be between 2 and the context, {longest}; got {max_length}"
            )
        self.max_length = max_length or longest
        self.think = think
        self.think_tokens = THOUGHT if think and think_tokens is None else think_tokens
        self._asks_messages = False
        """Whether the chat template is applied, so that replies may have thoughts."""

    # The tokenizer.

    @property
    def eot_token_id(self) -> int:
        if not self.lm.tokenizer.eos_ids:
            raise TokenizerError("the model has no end token; expected one in its tokenizer files")
        return self.lm.tokenizer.eos_ids[0]

    @property
    def prefix_token_id(self) -> int:
        """The first token of a text without context."""
        bos = self.lm.tokenizer.bos_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """The name under which lm-eval caches requests."""
        return self.lm.card.name.replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Token ids of a text, with a bos where the model expects one, unless refused."""
        text = _parse_typed_marks(string) if TYPED_MARK in string else string
        return self.lm.tokenizer.encode(text, add_bos=add_special_tokens is not False)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template's source, for the record; refuses a name, as there is only one template."""
        if isinstance(chat_template, str):
            raise InvalidArgumentError(
                f"the model has one chat template, without a name; expected True, got "
                f"{chat_template!r}"
            )
        template = self.lm.tokenizer.template
        return template.source if chat_template and template else None

    def apply_chat_template(
        self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation in the model's template.

        Without `add_generation_prompt` the last message is left open, to be continued. If the
        template refuses a system message, it is left out with a warning.
        """
        try:
            return self._render(chat_history, add_generation_prompt)
        except TemplateError:
            others = [message for message in chat_history if message["role"] != "system"]
            if len(others) == len(chat_history) or self.lm.tokenizer.template is None:
                raise
            LOG.warning("the chat template takes no system message: it is left out")
            return self._render(others, add_generation_prompt)

    def _render(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool) -> str:
        if add_generation_prompt:
            self._asks_messages = True
            return _with_typed_marks(
                chat_prompt(self.lm.tokenizer, messages, think=self.think).text
            )
        *before, last = messages
        # A template that strips messages would remove the space.
        marked = {**last, "content": f"{last['content']}{END_MARK} "}
        prompt = self.lm.tokenizer.render([*before, marked], add_generation_prompt=False)
        before_mark, _, after = prompt.text.rpartition(END_MARK)
        kept = before_mark if after.startswith(" ") else before_mark.rstrip()
        return _with_typed_marks(prompt.until(len(kept)))

    # Log likelihoods.

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Likelihood]:
        """The log likelihood of each continuation after its context."""
        if self.think and self._asks_messages and requests:
            raise InvalidArgumentError(
                "is for replies; a task compares likelihoods, which no thought comes before: leave "
                "it out",
                field="think",
            )
        if empty := next((r.args for r in requests if not r.args[1]), None):
            raise InvalidArgumentError(
                f"a task asks for the log likelihood of an empty text after {shown(empty[0])}; "
                "expected a continuation: is a choice of the task empty?"
            )
        likelihoods: list[Likelihood] = super().loglikelihood(requests, disable_tqdm=True)
        return likelihoods

    def _loglikelihood_tokens(self, requests: Sequence[Pair], **_: Any) -> list[Likelihood]:
        """Log likelihoods of continuations as ids; computes each distinct context once."""
        contexts = [self._truncate(context, ids) for _, context, ids in requests]
        pairs = zip(contexts, requests, strict=True)
        self._warn_truncated(
            sum(len(context) < len(request[1]) for context, request in pairs), len(requests)
        )
        indices: dict[tuple[int, ...], list[int]] = {}
        for index, context in enumerate(contexts):
            indices.setdefault(tuple(context), []).append(index)
        groups = [
            Alternatives([[*context, *requests[index][2]] for index in group], start=len(context))
            for context, group in indices.items()
        ]
        members = list(indices.values())
        likelihoods: dict[int, Likelihood] = {}
        # A text's last token is not read, so there is room for one more.
        for number, scores in score(self.lm.model, groups, context=self.max_length + 1):
            for index, text in zip(members[number], scores, strict=True):
                likelihoods[index] = float(np.sum(text.logprobs)), all(text.greedy)
                if texts := requests[index][0]:
                    self.cache_hook.add_partial("loglikelihood", texts, likelihoods[index])
            self.progress("log likelihoods", len(likelihoods), len(requests))
        return [likelihoods[index] for index in range(len(requests))]

    def _truncate(self, context: list[int], continuation: list[int]) -> list[int]:
        """The end of a context that fits beside the whole continuation."""
        if not continuation:
            raise InvalidArgumentError(
                "a continuation adds no token to its context; expected one: a word split between "
                "them must be whole in one of them"
            )
        room = self.max_length + 1 - len(continuation)
        if room < 1:
            raise ContextLengthError(
                f"a continuation has {len(continuation)} tokens and the context is "
                f"{self.max_length}; expected it to fit"
            )
        return context[-room:]

    def _warn_truncated(self, count: int, total: int) -> None:
        if count:
            LOG.warning(
                f"{count} of {total} contexts are longer than the model's {self.max_length} tokens "
                "have room for: their beginnings are left out"
            )

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log likelihood of whole texts after the first token; long texts in windows."""
        pairs: list[Pair] = []
        owners: list[int] = []
        for index, request in enumerate(requests):
            # As in lm-eval's `hf`, the text has a bos of its own after the first token.
            ids = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(
                ids, self.prefix_token_id, self.max_length, context_len=1
            ):
                pairs.append((None, *make_disjoint_window(window)))
                owners.append(index)
        totals = [0.0] * len(requests)
        for index, (logprob, _) in zip(owners, self._loglikelihood_tokens(pairs), strict=True):
            totals[index] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    # Replies.

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """A reply to each context, up to the first of the task's stop strings."""
        prompts = [self._request(index, *r.args) for index, r in enumerate(requests)]
        self._warn_truncated(sum(is_truncated for _, is_truncated in prompts), len(prompts))
        texts: dict[int, str] = {}
        batch = (prompt for prompt, _ in prompts)
        for index, reply in replies(self.lm.model, self.lm.tokenizer, batch, self.width):
            texts[index] = reply.text
            self.cache_hook.add_partial("generate_until", requests[index].args, reply.text)
            self.progress("replies", len(texts), len(requests))
        return [texts[index] for index in range(len(requests))]

    def _request(
        self, index: int, context: str, options: Mapping[str, Any]
    ) -> tuple[BatchRequest, bool]:
        """A prompt, whose index is part of its seed, and whether its beginning is left out."""
        stops, max_tokens, sampling = _parse_generation_kwargs(options, self.seed + index)
        max_tokens += self.think_tokens or 0
        room = self.max_length - max_tokens
        if room < 1 or max_tokens < 1:
            raise ContextLengthError(
                f"a task asks for replies of {max_tokens} tokens and the context is "
                f"{self.max_length}; expected one or more, and room for a prompt"
            )
        ids = self.tok_encode(context) or [self.prefix_token_id]
        tokenizer = self.lm.tokenizer
        form = tokenizer.thinking if self._asks_messages else None
        chat = ChatPrompt(
            ids=ids[-room:],
            thinking=form,
            in_thought=form is not None and form.is_open(ids, context),
            may_think=self.think is not False,
        )
        request = BatchRequest(
            ids=chat.ids,
            max_tokens=max_tokens,
            sampling=sampling,
            stops=stops,
            thinking=form,
            in_thought=chat.in_thought,
            grammar=thinking_grammar(tokenizer, chat, self.think_tokens),
        )
        return request, len(ids) > room

    # The record.

    def get_model_info(self) -> dict[str, Any]:
        """Facts about the model for lm-eval's results."""
        arrays = parameters(self.lm.model).values()
        return {
            "model": self.lm.card.name,
            "model_identity": fingerprint(self.lm),
            "model_dtype": sorted({str(array.dtype).rpartition(".")[2] for array in arrays}),
            "adapter": self.lm.adapter and str(self.lm.adapter),
            "max_length": self.max_length,
            "think": self.think,
            "think_tokens": self.think_tokens,
            "minicpm_mlx_version": __version__,
        }


def _with_typed_marks(prompt: PromptText) -> str:
    """The text as lm-eval passes it on, which knows strings alone."""
    starts = [at for at, _ in prompt.typed]
    cuts = zip([0, *starts], [*starts, len(prompt.text)], strict=True)
    return TYPED_MARK.join(prompt.text[start:end] for start, end in cuts)


def _parse_typed_marks(text: str) -> PromptText:
    first, *others = text.split(TYPED_MARK)
    prompt = PromptText(first)
    for part in others:
        prompt += PromptText(part, ((0, part[0]),) if part else ())
    return prompt


SAMPLING_OPTIONS = ("temperature", "top_p", "top_k", "min_p", "seed")
"""generation_kwargs that apply with do_sample only."""
PENALTIES = ("repetition_penalty", "frequency_penalty", "presence_penalty")
"""generation_kwargs that apply with and without do_sample."""


def _parse_generation_kwargs(
    options: Mapping[str, Any], seed: int
) -> tuple[list[str], int, Sampling]:
    """A task's generation_kwargs as stop strings, number of tokens and sampling.

    They mean what they mean to transformers. Missing ones are off, whatever the model's defaults:
    tasks compare models.
    """
    kwargs = dict(normalize_gen_kwargs(dict(options), MAX_REPLY))
    stops = stop_list([stop for stop in kwargs.pop("until") if stop])
    max_tokens, do_sample = int(kwargs.pop("max_gen_toks")), kwargs.pop("do_sample")
    if kwargs.pop("num_beams", 1) != 1:
        raise InvalidArgumentError("a task asks for beam search, which is not supported")
    if unknown := sorted(kwargs.keys() - {*SAMPLING_OPTIONS, *PENALTIES}):
        raise InvalidArgumentError(
            f"a task's generation_kwargs have {', '.join(unknown)}; expected until, max_gen_toks, "
            f"do_sample, {', '.join((*SAMPLING_OPTIONS, *PENALTIES))}"
        )
    sampling = {name: kwargs[name] for name in PENALTIES if name in kwargs}
    if do_sample:
        drawn = {name: kwargs[name] for name in SAMPLING_OPTIONS if name in kwargs}
        sampling |= {"temperature": 1.0, "seed": seed, **drawn}
    return stops, max_tokens, Sampling(**sampling)
