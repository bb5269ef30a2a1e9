"""`minicpm-mlx generate`: one prompt, one reply."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from minicpm_mlx.distributed import collectives
from minicpm_mlx.errors import InvalidArgumentError

from . import options
from .options import REQUIRED, flag, option
from .render.reply_display import PlainStream, ReplyDisplay
from .render.texts import Texts
from .render.theme import console
from .render.thoughts import ThoughtStream
from .streams import print_json, prompt_text, shows_progress
from .thinking_options import ThinkingOptions

if TYPE_CHECKING:
    from collections.abc import Iterable

    from minicpm_mlx import Completion, Piece


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class GenerateOptions:
    """Options of `generate`."""

    prompt: str = option(
        "Text to answer; - reads standard input.", "--prompt", "-p", default=REQUIRED
    )
    model: options.BaseModel = None
    system: options.System = None
    raw: bool = flag("Continue the text as it is, without the chat template.")
    max_tokens: int = option("Longest reply, in tokens.", default=512, limit=options.COUNT)
    thinking: ThinkingOptions
    sampling: options.SamplingOptions
    stop: options.Stop = None
    compute: options.Compute
    adapter: options.Adapter = None
    draft: options.Draft = None
    as_json: options.Json = False


@options.command(GenerateOptions)
def generate(args: GenerateOptions) -> None:
    """Answer one prompt."""
    from minicpm_mlx.lm.outputs import collect

    if args.raw and args.system is not None:
        raise InvalidArgumentError("--system does not apply to --raw text; leave one of them out")
    think, think_tokens = args.thinking.think, args.thinking.think_tokens
    if args.raw and (think is not None or think_tokens is not None):
        raise InvalidArgumentError("--think and --think-tokens do not apply to --raw text")
    text = prompt_text(args.prompt, empty=args.raw)
    sampling = args.sampling
    sampling.check()
    model = options.choose_model(args.model, [args.adapter])
    args.thinking.check(model)
    lm = options.load_model(model, args.compute, adapter=args.adapter, draft=args.draft, shard=True)
    alone = collectives.size() == 1
    if sampling.seed is None and not alone:  # all ranks draw the same
        seed = int.from_bytes(collectives.broadcast(os.urandom(4)), "big")
        sampling = replace(sampling, seed=seed)
    messages = [{"role": "system", "content": args.system}] if args.system else []
    with options.advise_without_template("continue the text as it is: --raw"):
        pieces = lm.stream(
            text if args.raw else [*messages, {"role": "user", "content": text}],
            max_tokens=args.max_tokens,
            sampling=sampling.apply(lm, False if args.raw else think),
            stop=options.unescape(args.stop),
            speculate=alone,  # each rank would decide by its own clock whether that pays
            think=think,
            think_tokens=think_tokens,
        )
    if args.as_json:
        print_json(_record(collect(pieces)))
        return
    _show(pieces)


def _show(pieces: Iterable[Piece]) -> None:
    """Prints the answer; the thought beside it where both go to a terminal."""
    texts, errors = Texts(), console(stderr=True)
    display = ReplyDisplay(
        lambda: PlainStream(safe=False),
        (lambda: ThoughtStream(errors, lasting=True)) if shows_progress() else None,
        lambda seconds, tokens: errors.print(texts.thought(seconds, tokens), style="quiet"),
    )
    answered = False
    for piece in pieces:
        display.feed(piece)
        answered = answered or bool(piece.text)
    display.close()
    if not answered:
        print()
    if piece.in_thought:
        errors.print(texts("no_answer"), style="warning")


def _record(completion: Completion) -> dict[str, Any]:
    """A reply as the object that --json prints."""
    stats = completion.stats
    return {
        "text": completion.text,
        "thinking": completion.thinking,
        "token_ids": list(completion.token_ids),
        "prompt_tokens": stats.prompt_tokens,
        "completion_tokens": stats.completion_tokens,
        "thinking_tokens": stats.thinking_tokens,
        "finish_reason": completion.finish_reason,
        "ttft_s": round(stats.ttft, 4),
        "prompt_tps": round(stats.prompt_tps, 2),
        "decode_tps": round(stats.decode_tps, 2),
        "peak_memory_bytes": stats.peak_memory,
    }
