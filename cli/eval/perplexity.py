"""`minicpm-mlx ppl`: how well a model predicts a text."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from .. import options
from ..render.theme import console


def ppl(
    text: Annotated[Path, typer.Option("--text", help="A text file in UTF-8.")],
    model: options.Model = options.DEFAULT_MODEL,
    reference: Annotated[
        str | None, typer.Option("--reference", help="Also the divergence from this model.")
    ] = None,
    context: Annotated[int, typer.Option("--context", help="Tokens a prediction sees.")] = 2048,
    stride: Annotated[
        int | None, typer.Option("--stride", help="New tokens a window; default: the context.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", help="Only the first so many tokens.")
    ] = None,
    no_bos: Annotated[bool, typer.Option("--no-bos", help="No start token before it.")] = False,
    dtype: options.Dtype = None,
    device: options.Device = None,
    adapter: options.Adapter = None,
    as_json: options.Json = False,
) -> None:
    """Perplexity of a text, and how far a model is from the one it was made from."""
    from minicpm_mlx.arguments import at_least_one
    from minicpm_mlx.engine.scoring.perplexity import check_windows, score
    from minicpm_mlx.errors import InvalidArgumentError

    check_windows(context, stride)
    if limit is not None:
        at_least_one("limit", limit)
    words = options.text_of(text)
    lm = options.load(model, dtype, device, adapter=adapter)
    ids = lm.tokenizer.encode(words, add_bos=not no_bos)[:limit]
    other = None if reference is None else options.load(reference, dtype, device)
    if other and other.tokenizer.encode(words, add_bos=not no_bos)[: len(ids)] != ids:
        raise InvalidArgumentError(
            f"{reference} reads the text as other tokens than {model}; expected the same vocabulary"
        )
    err = console(stderr=True)
    found = score(
        lm.model,
        ids,
        context=context,
        stride=stride,
        reference=other.model if other else None,
        progress=lambda done: (
            err.print(f"{done} of {len(ids) - 1}", style="quiet", end="\r")
            if err.is_terminal
            else None
        ),
    )
    record = {"model": lm.card.name, "text": str(text), "perplexity": found.perplexity}
    record |= asdict(found)
    if as_json:
        print(json.dumps(record, ensure_ascii=False))
        return
    out = console()
    out.print(f"perplexity {found.perplexity:.4f}", style="title")
    out.print(f"{found.tokens} tokens, context {found.context}, stride {found.stride}")
    if found.kl is not None:
        out.print(
            f"against {reference}: KL {found.kl:.5f}, 99 % below {found.kl_99:.4f}, "
            f"same likeliest token {found.top_1:.2%}"
        )
