"""What several commands share: their options, and how they read standard input."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minicpm_mlx.errors import InvalidArgumentError

if TYPE_CHECKING:
    from minicpm_mlx import LM, Sampling
    from minicpm_mlx.model.config import Config
    from minicpm_mlx.text.tokenizer import Tokenizer

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
Adapter = Annotated[
    str | None, typer.Option("--adapter", help="Folder of a LoRA or DoRA adapter to put on.")
]
Draft = Annotated[
    str | None, typer.Option("--draft", help="A smaller model that guesses ahead; same text.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def load(
    model: str,
    dtype: str | None,
    device: str | None,
    *,
    quiet: bool = False,
    context: int | None = None,
    kv_bits: int | None = None,
    **how: Any,
) -> LM:
    """Load a model for a command, if it fits in memory with a cache of `context` tokens (None: a
    short one); `quiet` where the terminal is in use meanwhile; `how` as of mm.load."""
    import minicpm_mlx as mm
    from minicpm_mlx import memory
    from minicpm_mlx.loading.store import folder_of
    from minicpm_mlx.model_cards import resolve

    select(dtype, device, quiet=quiet)
    config = mm.Config.load(folder_of(resolve(model)))
    memory.check_fits(memory.estimate(config, dtype=dtype, context=context or 256, kv_bits=kv_bits))
    with nullcontext() if quiet else _notice(f"loading {model} …"):
        return mm.load(model, dtype=dtype, device=device, **how)


def tokenizer_and_config(model: str) -> tuple[Tokenizer, Config]:
    """What of a model can be had in no time."""
    from minicpm_mlx.loading.store import folder_of
    from minicpm_mlx.model.config import Config
    from minicpm_mlx.model_cards import resolve
    from minicpm_mlx.text.tokenizer import tokenizer_of

    card = resolve(model)
    folder = folder_of(card)
    return tokenizer_of(card, folder), Config.load(folder)


def select(dtype: str | None, device: str | None, *, quiet: bool = False) -> None:
    """Compute on `device`; say what a 16-bit `dtype` costs there."""
    from minicpm_mlx import device as devices

    devices.select(device)
    if dtype in ("float16", "bfloat16") and devices.on_cpu() and not quiet:
        print(f"{dtype} on a CPU is 100 times slower than float32, or more", file=sys.stderr)


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
    from minicpm_mlx.lm.lm import sampled

    return sampled(lm.sampling, **given)


def check_sampling(**given: Any) -> None:
    """Refuse what no model could be sampled with, before one is loaded."""
    if values := {name: value for name, value in given.items() if value is not None}:
        from minicpm_mlx import Sampling

        Sampling(**values)


def unescaped(stops: Sequence[str] | None) -> list[str]:
    """Stop strings as typed in a shell, where \\n is two characters."""
    return [stop.replace("\\n", "\n").replace("\\t", "\t") for stop in stops or ()]


def at_terminal() -> bool:
    """Whether a person types and reads; either stream may be closed."""
    return all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout))


def stdin_lines() -> Iterator[str]:
    """Standard input's lines: UTF-8 whatever the locale, with no byte order mark or CR LF."""
    if sys.stdin is None:
        raise InvalidArgumentError("standard input is closed; expected text from it")
    # Where a Python caller has put a StringIO in its place, there are no bytes below the text.
    return _decoded(getattr(sys.stdin, "buffer", None) or io.BytesIO(sys.stdin.read().encode()))


def _decoded(lines: Iterable[bytes]) -> Iterator[str]:
    offset = 0
    for line in lines:
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            raise InvalidArgumentError(not_text("standard input", error, offset)) from None
        yield (text if offset else text.removeprefix("\ufeff")).replace("\r\n", "\n")
        offset += len(line)


def text_of(path: Path) -> str:
    """What a file says, in UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InvalidArgumentError(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise InvalidArgumentError(not_text(str(path), error)) from None


def not_text(what: str, error: UnicodeDecodeError, offset: int = 0) -> str:
    """The message for bytes that did not decode, `offset` bytes into `what`."""
    at, byte = offset + error.start, error.object[error.start]
    return f"{what} is not {error.encoding} (byte {at}, {byte:#04x}); convert it first"


def new_folder(folder: Path) -> None:
    """InvalidArgumentError unless `folder` is yet to be made, in a folder that is there."""
    if folder.exists() or folder.is_symlink():
        raise InvalidArgumentError(f"'{folder}' exists; give a folder that does not")
    if not folder.parent.is_dir():
        raise InvalidArgumentError(f"'{folder.parent}' is no folder; make it first")


def progress() -> Callable[[str], None]:
    """A line on the terminal that says what is being done, each time anew; "" takes it away."""
    from .render.theme import console

    err = console(stderr=True)

    def tell(what: str) -> None:
        if err.is_terminal:
            err.file.write(f"\r\x1b[2K{what[: err.width - 1]}")
            err.file.flush()

    return tell
