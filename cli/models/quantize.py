"""`minicpm-mlx quantize`: a model in fewer bits, with a report of the loss."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minicpm_mlx.errors import InvalidArgumentError
from minicpm_mlx.files.atomic import make_whole, partial_of
from minicpm_mlx.loading.store import folder_of
from minicpm_mlx.model_cards import resolve

from .. import options, paths
from ..options import option
from ..render.theme import console
from ..streams import print_json, progress, read_text, resumable

if TYPE_CHECKING:
    from minicpm_mlx.quantization.recipe import Recipe
    from minicpm_mlx.quantization.write import Text


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class QuantizeOptions:
    """Arguments and options of `quantize`."""

    source: options.Source
    folder: options.NewFolder
    method: str = option(
        "mixed: gptq, with more bits where they count. gptq. awq. dwq: gptq, then distilled. "
        "rtn: round to nearest, fast. exact: ternary weights in 2 bits, unchanged.",
        default="mixed",
    )
    bits: int | None = option("2, 3, 4, 5, 6 or 8; of mixed about that many on average.")
    group_size: int | None = option("Weights in a group: 32, 64 or 128.")
    bits_per_weight: float | None = option(
        "Of mixed: average bits per packed weight, scales included.", "--bpw"
    )
    mode: str = option("affine, or with rtn mxfp4, mxfp8 or nvfp4.", default="affine")
    calibration: Path | None = option(
        "Text file, or folder of .txt and .md, to calibrate on.", check=paths.input_path
    )
    evaluation: Path | None = option(
        "Text to measure the report on.", "--evaluate", check=paths.input_path
    )
    samples: int | None = option("Calibration samples.")
    length: int | None = option("Tokens of each sample.")
    seed: int | None = option("Seed that draws the samples.")
    as_json: options.Json = False

    def recipe(self) -> Recipe:
        """The recipe; InvalidArgumentError for options that contradict each other."""
        from minicpm_mlx.quantization.recipe import Recipe, packing

        if self.bits_per_weight is not None and (
            self.bits is not None or self.group_size is not None
        ):
            raise InvalidArgumentError(
                "--bpw and --bits or --group-size both set the size; leave one out"
            )
        if self.method == "exact" and (self.bits is not None or self.group_size is not None):
            raise InvalidArgumentError(
                "--bits and --group-size go with other methods: exact takes 2 bits, in the largest "
                "groups that fit"
            )
        values = {"samples": self.samples, "length": self.length, "seed": self.seed}
        sampling = {name: value for name, value in values.items() if value is not None}
        recipe = Recipe(
            method=self.method,
            packing=packing(self.bits, self.group_size, self.mode),
            bits_per_weight=self.bits_per_weight,
            **sampling,
        )
        if not recipe.calibrated and (sampling or self.calibration is not None):
            name = next(iter(sampling), "calibration")
            raise InvalidArgumentError(
                f"--{name} is for methods that calibrate on a text; {self.method} does not"
            )
        return recipe


@options.command(QuantizeOptions)
def quantize(args: QuantizeOptions) -> None:
    """Write a model in fewer bits, for MLX and mlx-lm; the same command resumes a stopped run.

    By default it calibrates on a text that comes with the program, in English and Chinese.
    """
    from minicpm_mlx.quantization.report import summary

    recipe = args.recipe()
    report = _write(args, recipe)
    if args.as_json:
        print_json(report)
        return
    console().print(f"{args.folder}", style="good", highlight=False)
    for name, value in summary(report).items():
        console().print(f"  {name}: {value}", highlight=False)


def _write(args: QuantizeOptions, recipe: Recipe) -> dict[str, Any]:
    from minicpm_mlx.quantization.write import write_quantized

    calibration, evaluation = _read_text(args.calibration), _read_text(args.evaluation)
    options.Compute().select()
    card = replace(resolve(args.source), bits=None, group_size=None)
    source = folder_of(card)
    show, report = progress(), dict[str, Any]()

    def write(partial: Path) -> None:
        report.update(
            write_quantized(
                source,
                partial,
                recipe,
                card,
                calibration=calibration,
                evaluation=evaluation,
                progress=show,
            )
        )

    with resumable(lambda: partial_of(args.folder)):
        make_whole(args.folder, write, "give another folder", resume=recipe.method != "exact")
    show("")
    return report


def _read_text(path: Path | None) -> Text | None:
    """The text of a file, or of all .txt and .md files in a folder."""
    from minicpm_mlx.quantization.write import Text

    if path is None:
        return None
    if not path.is_dir():
        return Text(path.name, read_text(path))
    files = sorted(file for kind in ("*.txt", "*.md") for file in path.rglob(kind))
    if not files:
        raise InvalidArgumentError(f"{path}: expected .txt or .md files in it, found none")
    return Text(path.name, "\n\n".join(read_text(file) for file in files))
