"""`minicpm-mlx fuse`: an adapter merged into a model's weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from minicpm_mlx.errors import InvalidArgumentError

from .. import options, paths
from ..options import REQUIRED, argument, flag, option
from ..render.theme import console
from ..streams import print_json, progress, read_text


def _places(found: list[str]) -> None:
    """A new folder, before it perhaps a model."""
    *source, folder = found
    if len(source) > 1:
        raise InvalidArgumentError(f"expected [SOURCE] FOLDER, got {len(found)} arguments")
    for name in source:
        paths.model_name(name)
    paths.new_folder(Path(folder))


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class FuseOptions:
    """Arguments and options of `fuse`."""

    places: list[str] = argument(
        "The model, as for --model (default: the adapter's base), and the folder to write, which "
        "must not exist.",
        check=_places,
        several="[SOURCE] FOLDER",
    )
    adapter: Path = option(
        "Folder of a LoRA or DoRA adapter.", default=REQUIRED, check=paths.adapter_folder
    )
    text: Path | None = option(
        "Text in UTF-8 to check on; default: a few lines.", check=paths.input_file
    )
    dequantize: bool = flag("Write the changed matrices dense.")
    force: bool = flag("Write even where rounding lost the change.")
    as_json: options.Json = False


@options.command(FuseOptions)
def fuse(args: FuseOptions) -> None:
    """Merge an adapter into a model's weights, in the model's own bits, and check the change."""
    from minicpm_mlx.convert.merge_adapter import fuse_adapter

    *source, target = args.places
    folder, text = Path(target), None if args.text is None else read_text(args.text)
    model = options.choose_model(source[0] if source else None, [args.adapter])
    options.Compute().select()
    show = progress()
    report = fuse_adapter(
        model,
        folder,
        args.adapter,
        text=text,
        dequantize=args.dequantize,
        force=args.force,
        progress=show,
    )
    show("")
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    if args.as_json:
        print_json({"folder": str(folder), "size_bytes": size} | asdict(report))
        return
    out = console()
    out.print(f"{folder}: {size / 1e9:.2f} GB", style="good", highlight=False)
    out.print(
        f"against the adapter on the base, {report.tokens} tokens: KL {report.kl:.2g}; "
        f"of the base without it {report.kl_base:.2g}",
        highlight=False,
    )
    if report.unknown:
        console(stderr=True).print(
            "the adapter changes so little that what survived cannot be measured", style="warning"
        )
