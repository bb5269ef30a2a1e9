"""Our model as lm-evaluation-harness asks one: log likelihoods, whole texts, and replies.

What decides a number (where a context is cut, what stands before an empty one, the windows of a
long text) is as in lm-eval's own `hf` model, so that figures may be compared. Importing this
imports lm-eval: see `harness.check_package`.
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
from ...errors import (
    ContextLengthError,
    InvalidArgumentError,
    TemplateError,
    TokenizerError,
)
from ...lm.batch import BatchRequest, replies
from ...lm.fingerprint import identity
from ...lm.lm import LM
from ...lm.outputs import stop_list
from ...weights.load import parameters

__all__ = ["MiniCPM"]

LOG = logging.getLogger("lm_eval.minicpm_mlx")
"""Below lm-eval's own, so that its level holds for this too."""

REPLY = 256
"""Tokens of a reply where the task does not say; as in lm-eval."""

END = "\ue000end\ue000"
"""Marks a place in a message: private characters, which no task's text has."""

Pair = tuple[Any, list[int], list[int]]
"""A request's texts (None: a window of a longer one), its context and its continuation."""

Answer = tuple[float, bool]
"""Log likelihood of a continuation, and whether each token of it is the likeliest."""

Progress = Callable[[str, int, int], object]
"""Told what is being done, how many of it are, and of how many."""


class MiniCPM(TemplateLM):  # type: ignore[misc]  # lm-eval has no types
    """A loaded model for `lm_eval.simple_evaluate(model=...)`.

    `width` texts are read or written at a time. `max_length` is lm-eval's: the longest context and
    continuation together, by default the model's. `seed` is that of tasks that draw replies.

        lm_eval.simple_evaluate(model=MiniCPM(mm.load("demo")), tasks=["arc_easy"])
    """

    def __init__(
        self,
        lm: LM,
        *,
        width: int = WIDTH,
        max_length: int | None = None,
        seed: int = 0,
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

    # What lm-eval asks of the tokenizer.

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        if not self.lm.tokenizer.eos_ids:
            raise TokenizerError("the model has no end token; expected one in its tokenizer files")
        return self.lm.tokenizer.eos_ids[0]

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context."""
        bos = self.lm.tokenizer.bos_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """Whose requests lm-eval may keep for another run."""
        return self.lm.card.name.replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Token ids of a text; one bos leads where the model expects it, unless told not to."""
        return self.lm.tokenizer.encode(string, add_bos=add_special_tokens is not False)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The source of the model's template, for the record; it has one, so a name is refused."""
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
        """The conversation as the model's template writes it.

        Without `add_generation_prompt` the last message is one to go on with. A template that
        refuses a system message is given the others, and that is said.
        """
        try:
            return self._templated(chat_history, add_generation_prompt)
        except TemplateError:
            others = [message for message in chat_history if message["role"] != "system"]
            if len(others) == len(chat_history) or self.lm.tokenizer.template is None:
                raise
            LOG.warning("the chat template takes no system message: it is left out")
            return self._templated(others, add_generation_prompt)

    def _templated(self, messages: Sequence[Mapping[str, str]], is_answered_next: bool) -> str:
        if is_answered_next:
            return self.lm.tokenizer.chat_text(messages)
        *before, last = messages
        # The space tells whether the template strips messages: it would be gone.
        marked = {**last, "content": f"{last['content']}{END} "}
        text = self.lm.tokenizer.chat_text([*before, marked], add_generation_prompt=False)
        begun, _, after = text.rpartition(END)
        return begun if after.startswith(" ") else begun.rstrip()

    # Log likelihoods.

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Answer]:
        """Of each continuation after its context."""
        if empty := next((one.args for one in requests if not one.args[1]), None):
            raise InvalidArgumentError(
                f"a task asks for the log likelihood of an empty text after {shown(empty[0])}; "
                "expected a continuation: is a choice of the task empty?"
            )
        found: list[Answer] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def _loglikelihood_tokens(self, requests: Sequence[Pair], **_: Any) -> list[Answer]:
        """Those of continuations as ids; contexts that several have are read once."""
        contexts = [self._cut(context, continuation) for _, context, continuation in requests]
        kept = zip(contexts, requests, strict=True)
        self._say_cut(sum(len(context) < len(pair[1]) for context, pair in kept), len(requests))
        places: dict[tuple[int, ...], list[int]] = {}
        for place, context in enumerate(contexts):
            places.setdefault(tuple(context), []).append(place)
        groups = [
            Alternatives([[*context, *requests[place][2]] for place in group], start=len(context))
            for context, group in places.items()
        ]
        members = list(places.values())
        answers: dict[int, Answer] = {}
        # A text's last token is not read, so that there is room for one more.
        for number, scores in score(self.lm.model, groups, context=self.max_length + 1):
            for place, one in zip(members[number], scores, strict=True):
                answers[place] = float(np.sum(one.logprobs)), all(one.greedy)
                if texts := requests[place][0]:
                    self.cache_hook.add_partial("loglikelihood", texts, answers[place])
            self.progress("log likelihoods", len(answers), len(requests))
        return [answers[place] for place in range(len(requests))]

    def _cut(self, context: list[int], continuation: list[int]) -> list[int]:
        """The end of a context that there is room for beside the whole continuation."""
        if not continuation:
            raise InvalidArgumentError(
                "a continuation adds no token to its context; expected one: a word that is cut in "
                "two there has to be whole in one of them"
            )
        room = self.max_length + 1 - len(continuation)
        if room < 1:
            raise ContextLengthError(
                f"a continuation has {len(continuation)} tokens and the context is "
                f"{self.max_length}; expected it to fit"
            )
        return context[-room:]

    def _say_cut(self, count: int, total: int) -> None:
        if count:
            LOG.warning(
                "%d of %d contexts are longer than the model's %d tokens have room for: their "
                "beginnings are left out",
                count,
                total,
                self.max_length,
            )

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, each after the model's first token; long ones in windows."""
        pairs: list[Pair] = []
        owners: list[int] = []
        for place, request in enumerate(requests):
            # As in lm-eval's `hf`, the text has its own bos besides the one that it follows.
            ids = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(
                ids, self.prefix_token_id, self.max_length, context_len=1
            ):
                pairs.append((None, *make_disjoint_window(window)))
                owners.append(place)
        totals = [0.0] * len(requests)
        for place, (logprob, _) in zip(owners, self._loglikelihood_tokens(pairs), strict=True):
            totals[place] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    # Replies.

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """A reply to each context, up to the first of the task's stop strings."""
        asked = [self._asked(place, *one.args) for place, one in enumerate(requests)]
        self._say_cut(sum(is_cut for _, is_cut in asked), len(asked))
        texts: dict[int, str] = {}
        prompts = (one for one, _ in asked)
        for place, reply in replies(self.lm.model, self.lm.tokenizer, prompts, self.width):
            texts[place] = reply.text
            self.cache_hook.add_partial("generate_until", requests[place].args, reply.text)
            self.progress("replies", len(texts), len(requests))
        return [texts[place] for place in range(len(requests))]

    def _asked(
        self, place: int, context: str, options: Mapping[str, Any]
    ) -> tuple[BatchRequest, bool]:
        """A prompt, and whether its beginning is left out; its place decides what is drawn."""
        stops, max_tokens, sampling = _wanted(options, self.seed + place)
        room = self.max_length - max_tokens
        if room < 1 or max_tokens < 1:
            raise ContextLengthError(
                f"a task asks for replies of {max_tokens} tokens and the context is "
                f"{self.max_length}; expected one or more, and room for a prompt"
            )
        ids = self.tok_encode(context) or [self.prefix_token_id]
        asked = BatchRequest(ids=ids[-room:], max_tokens=max_tokens, sampling=sampling, stops=stops)
        return asked, len(ids) > room

    # The record.

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes beside the results."""
        arrays = parameters(self.lm.model).values()
        return {
            "model": self.lm.card.name,
            "model_identity": identity(self.lm),
            "model_dtype": sorted({str(array.dtype).rpartition(".")[2] for array in arrays}),
            "adapter": self.lm.adapter and str(self.lm.adapter),
            "max_length": self.max_length,
            "minicpm_mlx_version": __version__,
        }


DRAWN = ("temperature", "top_p", "top_k", "min_p", "seed")
"""Of a task's generation_kwargs, what matters where a reply is drawn."""
ALWAYS = ("repetition_penalty", "frequency_penalty", "presence_penalty")
"""And where it is not, as well."""


def _wanted(options: Mapping[str, Any], seed: int) -> tuple[list[str], int, Sampling]:
    """A task's generation_kwargs as stop strings, tokens and sampling.

    They say what transformers' do. What they leave out is off, whatever the model's card says:
    tasks compare models.
    """
    given = dict(normalize_gen_kwargs(dict(options), REPLY))
    stops = stop_list([stop for stop in given.pop("until") if stop])
    max_tokens, is_drawn = int(given.pop("max_gen_toks")), given.pop("do_sample")
    if given.pop("num_beams", 1) != 1:
        raise InvalidArgumentError("a task asks for beam search, which there is none of here")
    if unknown := sorted(given.keys() - {*DRAWN, *ALWAYS}):
        raise InvalidArgumentError(
            f"a task's generation_kwargs have {', '.join(unknown)}; expected until, max_gen_toks, "
            f"do_sample, {', '.join((*DRAWN, *ALWAYS))}"
        )
    how = {name: given[name] for name in ALWAYS if name in given}
    if is_drawn:
        drawn = {name: given[name] for name in DRAWN if name in given}
        how |= {"temperature": 1.0, "seed": seed, **drawn}
    return stops, max_tokens, Sampling(**how)
