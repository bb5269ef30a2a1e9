"""`minicpm-mlx ppl`: how well a model predicts a text."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from minicpm_mlx.errors import InvalidArgumentError

from .. import options, paths
from ..options import REQUIRED, flag, option
from ..render.theme import console
from ..streams import print_json, progress, prompt_text, read_text


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
    context: int = option("Context of each prediction, in tokens.", default=2048)
    stride: int | None = option("New tokens in each window; default: the context.")
    limit: int | None = option("Read only this many tokens.", limit=options.COUNT)
    no_bos: bool = flag("No start token before the text.")
    compute: options.Compute
    adapter: options.Adapter = None
    as_json: options.Json = False


@options.command(PerplexityOptions)
def ppl(args: PerplexityOptions) -> None:
    """Measure perplexity on a text, and a model's divergence from the one it was made from."""
    from minicpm_mlx.engine.scoring.perplexity import check_windows, score

    check_windows(args.context, args.stride)
    text = prompt_text("-", empty=True) if str(args.text) == "-" else read_text(args.text)
    lm = options.load_model(args.model, args.compute, adapter=args.adapter)
    ids = lm.tokenizer.encode(text, add_bos=not args.no_bos)[: args.limit]
    other = None if args.reference is None else options.load_model(args.reference, args.compute)
    if other and other.tokenizer.encode(text, add_bos=not args.no_bos)[: len(ids)] != ids:
        raise InvalidArgumentError(
            f"{args.reference} reads the text as other tokens than {lm.card.name}; expected the "
            "same vocabulary"
        )
    show = progress()
    result = score(
        lm.model,
        ids,
        context=args.context,
        stride=args.stride,
        reference=other.model if other else None,
        progress=lambda done: show(f"{done} of {len(ids) - 1}"),
    )
    show("")
    if args.as_json:
        record = {"model": lm.card.name, "text": str(args.text), "perplexity": result.perplexity}
        print_json(record | asdict(result))
        return
    out = console()
    out.print(f"perplexity {result.perplexity:.4f}", style="title")
    out.print(f"{result.tokens} tokens, context {result.context}, stride {result.stride}")
    if result.kl is not None:
        out.print(
            f"against {args.reference}: KL {result.kl:.5f}, 99 % below {result.kl_99:.4f}, "
            f"same likeliest token {result.top_1:.2%}"
        )
