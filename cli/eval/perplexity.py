"""`minicpm-mlx ppl`: how well a model predicts a text."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from minicpm_mlx.arguments import Limit
from minicpm_mlx.errors import InvalidArgumentError

from .. import options, paths
from ..options import REQUIRED, flag, option
from ..render.theme import console
from ..streams import print_json, progress, read_text, stdin_text

CONTEXT = 2048


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class PerplexityOptions:
    """Options of `ppl`."""

    text: Path = option(
        "Text file in UTF-8; - reads standard input.", default=REQUIRED, check=paths.input_text
    )
    model: options.BaseModel = None
    reference: str | None = option(
        "Also measure the divergence from this model.", check=paths.model_name
    )
    context: int | None = option(
        f"Tokens of a window; default: {CONTEXT}, or the model's context if that is shorter.",
        limit=Limit(least=2, whole=True),
    )
    stride: int | None = option("New tokens in each window; default: all it has room for.")
    limit: int | None = option("Read only this many tokens.", limit=options.COUNT)
    no_bos: bool = flag("No start token before each window.")
    compute: options.Compute
    adapter: options.Adapter = None
    as_json: options.Json = False


@options.command(PerplexityOptions)
def ppl(args: PerplexityOptions) -> None:
    """Measure perplexity on a text, and a model's divergence from the one it was made from."""
    from minicpm_mlx.engine.scoring.perplexity import check_text, check_windows, score

    check_windows(args.context or CONTEXT, args.stride)
    text = stdin_text() if str(args.text) == "-" else read_text(args.text)
    if not text:
        raise InvalidArgumentError(
            f"--text {args.text}: it is empty; expected a text to measure on"
        )
    model = options.choose_model(args.model, [args.adapter])
    tokenizer, config = options.tokenizer_and_config(model)
    bos = None if args.no_bos or not tokenizer.adds_bos else tokenizer.bos_id
    ids = tokenizer.encode(text, add_bos=False)[: args.limit]
    check_text(ids)
    context = args.context or min(CONTEXT, config.context_length)
    check_windows(context, args.stride, bos=bos is not None)
    if args.reference is not None:
        _check_vocabulary(args, text, ids)
    lm = options.load_model(model, args.compute, adapter=args.adapter)
    other = None if args.reference is None else options.load_model(args.reference, args.compute)
    show = progress()
    result = score(
        lm.model,
        ids,
        context=context,
        stride=args.stride,
        bos=bos,
        reference=other.model if other else None,
        progress=lambda done: show(f"{done} of {len(ids)}"),
    )
    show("")
    if args.as_json:
        record = {"model": lm.card.name, "text": str(args.text), "perplexity": result.perplexity}
        print_json(record | asdict(result))
        return
    out = console()
    out.print(f"perplexity {result.perplexity:.4f}", style="title")
    start = ", each window after the start token" if result.bos else ""
    out.print(f"{result.tokens} tokens, context {result.context}, stride {result.stride}{start}")
    if result.context > config.context_length:
        out.print(f"the model's own context is {config.context_length}", style="warning")
    if result.kl is not None:
        out.print(
            f"against {args.reference}: KL {result.kl:.5f}, 99 % below {result.kl_99:.4f}, "
            f"same likeliest token {result.top_1:.2%}"
        )


def _check_vocabulary(args: PerplexityOptions, text: str, ids: list[int]) -> None:
    """Refuses, before weights are loaded, a reference that reads the text as other tokens."""
    tokenizer, _ = options.tokenizer_and_config(str(args.reference))
    if tokenizer.encode(text, add_bos=False)[: len(ids)] != ids:
        raise InvalidArgumentError(
            f"{args.reference} reads the text as other tokens than the model; expected the same "
            "vocabulary"
        )
