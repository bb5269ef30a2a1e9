"""Options that several commands share, declared once."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from minicpm_mlx import LM, Sampling

DEFAULT_MODEL = "minicpm-2b-dpo"

Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="Card (see `list`), folder or hub repository; `demo` needs no network.",
    ),
]
Temp = Annotated[
    float | None, typer.Option("--temp", help="Temperature; 0 takes the likeliest token.")
]
TopP = Annotated[float | None, typer.Option("--top-p", help="Keep the likeliest of this total.")]
TopK = Annotated[int | None, typer.Option("--top-k", help="Keep this many; 0 keeps all.")]
MinP = Annotated[
    float | None, typer.Option("--min-p", help="Drop those below this share of the likeliest.")
]
RepetitionPenalty = Annotated[
    float | None, typer.Option("--repetition-penalty", help="Above 1 discourages repeating.")
]
Seed = Annotated[int | None, typer.Option("--seed", help="Same seed, same text.")]
Stop = Annotated[list[str] | None, typer.Option("--stop", help="End the reply before this text.")]
System = Annotated[str | None, typer.Option("--system", help="What the model is told first.")]
Dtype = Annotated[
    str | None, typer.Option("--dtype", help="float32, bfloat16 or float16; by default by chip.")
]
Device = Annotated[str | None, typer.Option("--device", help="gpu or cpu.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def load(model: str, dtype: str | None, device: str | None) -> LM:
    """Load a model for a command."""
    import minicpm_mlx as mm

    with _notice(f"loading {model} …"):
        return mm.load(model, dtype=dtype, device=device)


@contextmanager
def _notice(text: str) -> Iterator[None]:
    """Shows a line at the terminal while something takes its time, then takes it away."""
    shown = sys.stderr.isatty()
    if shown:
        print(f"\x1b[2m{text}\x1b[0m", end="\r", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        if shown:
            print("\x1b[K", end="", file=sys.stderr, flush=True)


def sampling(lm: LM, **given: Any) -> Sampling:
    """The model's own sampling with what the user gave in its place."""
    from minicpm_mlx.lm import sampled

    return sampled(lm.sampling, **given)


def unescaped(stops: Sequence[str] | None) -> list[str]:
    """Stop strings as typed in a shell, where \\n is two characters."""
    return [stop.replace("\\n", "\n").replace("\\t", "\t") for stop in stops or ()]
