"""Options that several commands share, and commands that take their options as one object."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_type_hints

import typer

from minicpm_mlx import device
from minicpm_mlx.arguments import Limit
from minicpm_mlx.errors import InvalidArgumentError, MissingTemplateError
from minicpm_mlx.loading import download
from minicpm_mlx.loading.store import text_folder_of
from minicpm_mlx.model_cards import resolve

from . import paths
from .models.tuning import tune_new
from .render.texts import Texts
from .render.theme import console
from .streams import notice

if TYPE_CHECKING:
    from minicpm_mlx import LM, Sampling
    from minicpm_mlx.model.config import Config
    from minicpm_mlx.model_cards import Card
    from minicpm_mlx.text.tokenizer import Tokenizer

DEFAULT_MODEL = "minicpm-2b-dpo"

Options = TypeVar("Options")


COUNT = Limit(least=1, whole=True)

REQUIRED = MISSING
"""Default of an option that must be given."""


def option(
    help: str,
    *names: str,
    default: Any = None,
    panel: str | None = None,
    limit: Limit | None = None,
    choices: Sequence[object] = (),
    check: paths.Check | None = None,
) -> Any:
    """A dataclass field that is an option, `--` and its own name unless `names` are given.

    A value outside `limit` or `choices` is an InvalidArgumentError, as is one that `check` (of
    `paths`) refuses; None is never checked.
    """
    callback = paths.checked(check) if check else None
    info = typer.Option(*names, help=help, rich_help_panel=panel, callback=callback)
    return field(
        default=default, metadata={"typer": info, "option_limit": limit, "choices": choices}
    )


def flag(help: str, *names: str, panel: str | None = None) -> Any:
    """A dataclass field that is an option without a value."""
    return option(help, *names, default=False, panel=panel)


def argument(help: str, *, check: paths.Check, several: str | None = None) -> Any:
    """A dataclass field that is a positional argument; `check` is one of `paths`.

    `several` are the names in the help of arguments that are one list, checked as a whole.
    """
    callback = paths.checked(check, together=several is not None)
    return field(metadata={"typer": typer.Argument(help=help, metavar=several, callback=callback)})


def command(kind: type[Options]) -> Callable[[Callable[[Options], None]], Callable[..., None]]:
    """Makes a typer command of a function that takes its options as one dataclass.

    The fields are the options; a field whose type is a dataclass stands for that one's fields.
    """

    def decorate(run: Callable[[Options], None]) -> Callable[..., None]:
        def call(**values: Any) -> None:
            try:
                run(_build(kind, values))
            except InvalidArgumentError as error:
                if (name := _option_names(kind).get(error.field or "")) is None:
                    raise
                raise error.called(name) from None

        call.__name__, call.__doc__ = run.__name__, run.__doc__
        call.__signature__ = inspect.Signature(list(_parameters(kind)))  # type: ignore[attr-defined]
        return call

    return decorate


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _parameters(kind: Any) -> Iterator[inspect.Parameter]:
    for member in fields(kind):
        hint = _hints(kind)[member.name]
        if is_dataclass(hint):
            yield from _parameters(hint)
            continue
        if info := member.metadata.get("typer"):
            if member.default is False and info.default is ...:  # no names given
                info.default = "--" + member.name.replace("_", "-")  # or typer adds --no-…
            hint = Annotated[hint, info]
        default = inspect.Parameter.empty if member.default is MISSING else member.default
        keyword = inspect.Parameter.KEYWORD_ONLY
        yield inspect.Parameter(member.name, keyword, default=default, annotation=hint)


def _build(kind: Any, values: dict[str, Any]) -> Any:
    built = {}
    for member in fields(kind):
        hint = _hints(kind)[member.name]
        if is_dataclass(hint):
            built[member.name] = _build(hint, values)
        else:
            built[member.name] = values[member.name]
            _check(member, values[member.name])
    return kind(**built)


def _option_name(member: Field[Any]) -> str:
    info = member.metadata.get("typer")
    first = info.default if info else None  # typer keeps the first name here
    if isinstance(first, str):
        return first.partition("/")[0]  # --this/--no-this
    return "--" + member.name.replace("_", "-")


def _option_names(kind: Any) -> dict[str, str]:
    """Names on the command line by field, of nested dataclasses too."""
    names: dict[str, str] = {}
    for member in fields(kind):
        hint = _hints(kind)[member.name]
        names |= _option_names(hint) if is_dataclass(hint) else {member.name: _option_name(member)}
    return names


def _check(member: Field[Any], value: Any) -> None:
    if value is None or "typer" not in member.metadata:
        return
    name = _option_name(member)
    if limit := member.metadata.get("option_limit"):
        limit.check(name, value)
    choices = member.metadata.get("choices")
    if choices and value not in choices:
        several = len(choices) > 2
        expected = (", " if several else " or ").join(map(str, choices))
        raise InvalidArgumentError(
            f"must be {'one of ' * several}{expected}, got {value!r}", field=name
        )


Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="Card (see `list`), folder or hub repository; `demo` needs no network.",
        callback=paths.checked(paths.model_name),
    ),
]
BaseModel = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="Card (see `list`), folder or hub repository; default: the adapter's base, or "
        f"{DEFAULT_MODEL}.",
        callback=paths.checked(paths.model_name),
    ),
]
System = Annotated[str | None, typer.Option(help="System prompt.")]
Stop = Annotated[
    list[str] | None,
    typer.Option(
        help="End the reply before this text. Repeatable.", callback=paths.checked(paths.some_text)
    ),
]
Adapter = Annotated[
    str | None,
    typer.Option(
        help="Folder of a LoRA or DoRA adapter to apply.",
        callback=paths.checked(paths.adapter_folder),
    ),
]
Draft = Annotated[
    str | None,
    typer.Option(
        help="Smaller model that drafts tokens ahead; same text.",
        callback=paths.checked(paths.model_name),
    ),
]
Source = Annotated[
    str,
    typer.Argument(
        help="Card, folder, repository or .gguf file.", callback=paths.checked(paths.model_name)
    ),
]
NewFolder = Annotated[
    Path,
    typer.Argument(
        help="Folder to write; it must not exist.", callback=paths.checked(paths.new_folder)
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


DownloadSource = Annotated[
    str | None,
    typer.Option(
        "--source",
        help="Download from: hub, modelscope or auto, the hub if it answers in 2 seconds "
        f"(or ${download.VARIABLE}).",
    ),
]


def may_download(run: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the option --source, which holds while it runs."""

    def call(*, download_source: str | None, **values: Any) -> None:
        if download_source is None:
            run(**values)
            return
        download.check_source(download_source, "--source")
        before = os.environ.get(download.VARIABLE)
        os.environ[download.VARIABLE] = download_source  # other threads download as well
        try:
            run(**values)
        finally:
            del os.environ[download.VARIABLE]
            os.environ.update({} if before is None else {download.VARIABLE: before})

    signature, hints = inspect.signature(run), get_type_hints(run, include_extras=True)
    parameters = [
        p.replace(kind=p.KEYWORD_ONLY, annotation=hints.get(p.name, p.annotation))
        for p in signature.parameters.values()
    ]
    source = inspect.Parameter(
        "download_source", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=DownloadSource
    )
    call.__name__, call.__doc__ = run.__name__, run.__doc__
    call.__signature__ = inspect.Signature([*parameters, source])  # type: ignore[attr-defined]
    return call


def kv_bits() -> Any:
    return option("Keep the KV cache in 8 or 4 bits.", choices=(8, 4))


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class Compute:
    """Number format and device."""

    dtype: str | None = option(
        "float32, bfloat16 or float16; default: by chip.", choices=device.DTYPES
    )
    device: str | None = option("gpu or cpu.", choices=device.DEVICES)

    def select(self, *, quiet: bool = False) -> None:
        """Computes on the device; warns of a 16-bit dtype that is slow there."""
        device.select(self.device)
        if self.dtype in ("float16", "bfloat16") and device.on_cpu() and not quiet:
            print(
                f"{self.dtype} on a CPU is 100 times slower than float32, or more", file=sys.stderr
            )


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class SamplingOptions:
    """Sampling parameters; None keeps the model's own."""

    temperature: float | None = option("Temperature; 0 takes the likeliest token.", "--temp")
    top_p: float | None = option("Keep the likeliest tokens up to this total probability.")
    top_k: int | None = option("Keep this many tokens; 0 keeps all.")
    min_p: float | None = option("Drop tokens below this share of the likeliest one's probability.")
    repetition_penalty: float | None = option("Above 1 discourages repetition.")
    seed: int | None = option("Same seed, same text.")

    def check(self) -> None:
        """InvalidArgumentError for values no model can be sampled with, before one is loaded."""
        if values := {name: value for name, value in asdict(self).items() if value is not None}:
            from minicpm_mlx import Sampling

            Sampling(**values)

    def apply(self, lm: LM, think: bool | None = None) -> Sampling | None:
        """The model's own sampling for this way to think, with these values in place of its own;
        None if none is given."""
        from minicpm_mlx.lm.sampling import sampling_with

        values = {name: value for name, value in asdict(self).items() if value is not None}
        if not values:
            return None
        base = lm.sampling
        if lm.thinking_sampling is not None and think is not False:
            base = lm.default_sampling(lm.chat_prompt([{"role": "user", "content": "?"}], think))
        return sampling_with(base, **values)


def choose_model(
    model: str | None, adapters: Iterable[str | Path | None], texts: Texts | None = None
) -> str:
    """The model that was asked for, else the one that the adapters were trained on, else the
    default; says so on standard error where an adapter decides.

    InvalidArgumentError if their base is not here, or not one.
    """
    if model is not None:
        return model
    from minicpm_mlx.loading.adapters import base_model

    bases = {str(folder): base_model(folder) for folder in adapters if folder is not None}
    named = {name for name in bases.values() if name is not None}
    if len(named) > 1:
        found = ", ".join(f"{folder}: {name}" for folder, name in bases.items() if name)
        raise InvalidArgumentError(
            f"the adapters were trained on different models ({found}); choose one with --model"
        )
    for name in named:
        print((texts or Texts())("base", model=name, adapter=", ".join(bases)), file=sys.stderr)
        return name
    return DEFAULT_MODEL


def load_model(
    model: str | None,
    compute: Compute,
    *,
    quiet: bool = False,
    context: int | None = None,
    kv_bits: int | None = None,
    **options: Any,
) -> LM:
    """Loads a model if it fits in memory with a KV cache of `context` tokens (None: a short one).

    None stands for the base of the adapter, or the default model. `quiet` where the terminal is in
    use meanwhile; `options` as of mm.load.
    """
    import minicpm_mlx as mm
    from minicpm_mlx import memory

    model = choose_model(model, [options.get("adapter")])
    compute.select(quiet=quiet)
    config = _config(resolve(model))  # before the weights are downloaded
    needed = memory.estimate(config, dtype=compute.dtype, context=context or 256, kv_bits=kv_bits)
    memory.check_fits(needed)
    if not quiet:
        tune_new(model)
    with nullcontext() if quiet else notice(f"loading {model} …"):
        lm = mm.load(model, dtype=compute.dtype, device=compute.device, **options)
    if cost := memory.dense_attention(lm.config, compute.dtype):
        text = Texts()("dense", **cost)
        lm.on_dense = lambda: console(stderr=True).print(text, style="warning")
    return lm


@contextmanager
def advise_without_template(advice: str) -> Iterator[None]:
    """Adds what the command can do with a model that has no chat template."""
    try:
        yield
    except MissingTemplateError as error:
        raise error.or_else(advice) from None


def tokenizer_and_config(model: str) -> tuple[Tokenizer, Config]:
    """The parts of a model that load without its weights, which are not downloaded either.

    The config is that of the model which would be loaded: quantized where its card says so.
    """
    from minicpm_mlx.text.tokenizer import tokenizer_of

    card = resolve(model)
    config = _config(card)
    return tokenizer_of(card, text_folder_of(card), config.vocab_size), config


def _config(card: Card) -> Config:
    from minicpm_mlx.loading.plan import kept_config, with_packing
    from minicpm_mlx.model.config import Config

    return kept_config(card) or with_packing(Config.load(text_folder_of(card)), card)


def unescape(stops: Sequence[str] | None) -> list[str]:
    r"""Stop strings as typed in a shell, where \n is two characters."""
    return [stop.replace("\\n", "\n").replace("\\t", "\t") for stop in stops or ()]
