"""`minicpm-mlx generate`: one prompt, one reply."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options

if TYPE_CHECKING:
    from minicpm_mlx import Completion


def generate(
    prompt: Annotated[
        str, typer.Option("--prompt", "-p", help="What to answer; - reads standard input.")
    ],
    model: options.Model = options.DEFAULT_MODEL,
    system: options.System = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the text as it is, without the chat template.")
    ] = False,
    max_tokens: Annotated[int, typer.Option("--max-tokens", help="Longest reply.")] = 512,
    temp: options.Temp = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    seed: options.Seed = None,
    stop: options.Stop = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    adapter: options.Adapter = None,
    draft: options.Draft = None,
    as_json: options.Json = False,
) -> None:
    """Answer one prompt."""
    from minicpm_mlx.arguments import at_least_one
    from minicpm_mlx.distributed import collectives
    from minicpm_mlx.errors import InvalidArgumentError
    from minicpm_mlx.lm.outputs import collect

    if raw and system is not None:
        raise InvalidArgumentError("--system has no place in --raw text; leave one of them out")
    text = "".join(options.stdin_lines()) if prompt == "-" else prompt
    if not (raw or text.strip()):
        raise InvalidArgumentError("the prompt is empty; expected some text to answer")
    at_least_one("max_tokens", max_tokens)
    how = {
        "temperature": temp,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
    }
    options.check_sampling(**how)
    lm = options.load(model, dtype, device, adapter=adapter, draft=draft, shard=True)
    alone = collectives.size() == 1
    if seed is None and not alone:  # all draw the same
        how["seed"] = int.from_bytes(collectives.broadcast(os.urandom(4)), "big")
    messages = [{"role": "system", "content": system}] if system else []
    pieces = lm.stream(
        text if raw else [*messages, {"role": "user", "content": text}],
        max_tokens=max_tokens,
        sampling=options.sampling(lm, **how),
        stop=options.unescaped(stop),
        speculate=alone,  # whether that pays is found by the clock, which differs
    )
    if as_json:
        print(json.dumps(record(collect(pieces)), ensure_ascii=False))
        return
    for piece in pieces:
        print(piece.text, end="", flush=True)
    print()


def record(completion: Completion) -> dict[str, Any]:
    """A reply as the object that --json prints."""
    stats = completion.stats
    return {
        "text": completion.text,
        "token_ids": list(completion.token_ids),
        "prompt_tokens": stats.prompt_tokens,
        "completion_tokens": stats.completion_tokens,
        "finish_reason": completion.finish_reason,
        "ttft_ms": round(stats.ttft * 1000, 1),
        "prompt_tps": round(stats.prompt_tps, 2),
        "decode_tps": round(stats.decode_tps, 2),
        "peak_memory_gb": round(stats.peak_memory / 1e9, 3),
    }
