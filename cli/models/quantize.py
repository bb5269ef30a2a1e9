"""`minicpm-mlx quantize`: a model in fewer bits, with a receipt of what that cost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import options
from ..render.theme import console

if TYPE_CHECKING:
    from minicpm_mlx.quantization.recipe import Recipe
    from minicpm_mlx.quantization.write import Text


def quantize(
    source: Annotated[str, typer.Argument(help="Card, folder, repository or .gguf file.")],
    folder: Annotated[Path, typer.Argument(help="Folder to write; it must not exist.")],
    method: Annotated[
        str,
        typer.Option(
            "--method",
            help="mixed: gptq, with more bits where they count. gptq. awq. "
            "dwq: gptq, then learned. rtn: to the nearest, fast.",
        ),
    ] = "mixed",
    bits: Annotated[
        int | None, typer.Option("--bits", help="2, 3, 4, 5, 6 or 8; of mixed about so many.")
    ] = None,
    group_size: Annotated[
        int | None, typer.Option("--group-size", help="Weights a scale: 32, 64 or 128.")
    ] = None,
    bpw: Annotated[
        float | None,
        typer.Option("--bpw", help="Of mixed: bits per weight on average, scales included."),
    ] = None,
    mode: Annotated[
        str, typer.Option("--mode", help="affine, or with rtn mxfp4, mxfp8 or nvfp4.")
    ] = "affine",
    calibration: Annotated[
        Path | None,
        typer.Option("--calibration", help="Text file, or folder of .txt and .md, to look at."),
    ] = None,
    evaluation: Annotated[
        Path | None, typer.Option("--evaluate", help="Text to measure the receipt on.")
    ] = None,
    samples: Annotated[int | None, typer.Option("--samples", help="Pieces to look at.")] = None,
    length: Annotated[int | None, typer.Option("--length", help="Tokens a piece.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Which pieces.")] = None,
    as_json: options.Json = False,
) -> None:
    """Write a model in fewer bits, as MLX and mlx-lm read it; interrupted, it can be gone on with.

    Without a text it looks at one that comes with the program, in English and Chinese.
    """
    from minicpm_mlx.errors import InvalidArgumentError
    from minicpm_mlx.quantization.recipe import Recipe, packing
    from minicpm_mlx.quantization.report import summary

    if bpw is not None and (bits is not None or group_size is not None):
        raise InvalidArgumentError("--bpw and --bits or --group-size both say how small; leave one")
    looked_at = {"samples": samples, "length": length, "seed": seed}
    given = {name: value for name, value in looked_at.items() if value is not None}
    recipe = Recipe(
        method=method, packing=packing(bits, group_size, mode), bits_per_weight=bpw, **given
    )
    if not recipe.calibrated and (given or calibration is not None):
        name = next(iter(given), "calibration")
        raise InvalidArgumentError(f"--{name} is for methods that look at a text; rtn does not")
    options.new_folder(folder)
    found = _made(source, folder, recipe, _text(calibration), _text(evaluation))
    if as_json:
        print(json.dumps(found, ensure_ascii=False))
    else:
        console().print(f"{folder}", style="good", highlight=False)
        for name, value in summary(found).items():
            console().print(f"  {name}: {value}", highlight=False)


def _made(
    source: str, folder: Path, recipe: Recipe, calibration: Text | None, evaluation: Text | None
) -> dict[str, Any]:
    from dataclasses import replace

    from minicpm_mlx.errors import StorageError
    from minicpm_mlx.files.atomic import make_whole, partial_of
    from minicpm_mlx.loading.store import folder_of
    from minicpm_mlx.model_cards import resolve
    from minicpm_mlx.quantization.write import write_quantized

    options.select(None, None)
    card = replace(resolve(source), bits=None, group_size=None)
    origin = folder_of(card)
    tell, found = options.progress(), dict[str, Any]()

    def make(partial: Path) -> None:
        found.update(
            write_quantized(
                origin,
                partial,
                recipe,
                card,
                calibration=calibration,
                evaluation=evaluation,
                progress=tell,
            )
        )

    try:
        make_whole(folder, make, "give another folder", resume=True)
    except (KeyboardInterrupt, StorageError):
        tell("")
        if (kept := partial_of(folder)).is_dir():
            what = f"what is done is kept in {kept}; the same command goes on with it"
            console(stderr=True).print(what, style="quiet", highlight=False)
        raise
    tell("")
    return found


def _text(path: Path | None) -> Text | None:
    """A file's text, or that of all .txt and .md files in a folder."""
    from minicpm_mlx.errors import InvalidArgumentError
    from minicpm_mlx.quantization.write import Text

    if path is None:
        return None
    if not path.is_dir():
        return Text(path.name, options.text_of(path))
    files = sorted(file for kind in ("*.txt", "*.md") for file in path.rglob(kind))
    if not files:
        raise InvalidArgumentError(f"{path}: expected .txt or .md files in it, found none")
    return Text(path.name, "\n\n".join(options.text_of(file) for file in files))
