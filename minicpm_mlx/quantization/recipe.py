"""Recipes: every setting that decides the bytes of a quantized folder, and nothing else."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

from ..arguments import check_limits, limited, one_of, shown
from ..errors import InvalidArgumentError
from ..model.config_sections import PACKINGS, Quantization

METHODS = {
    "rtn": "round to the nearest",
    "awq": "columns with large inputs made larger first, weights clipped",
    "gptq": "errors made good by the columns still to come",
    "mixed": "gptq, with more bits for matrices that matter more",
    "dwq": "gptq, then scales and biases learned from the model's own predictions",
    "exact": "ternary weights packed into 2 bits, none of them changed",
}
"""Methods of finding codes, with a description."""

CHUNKS, LENGTH = 24, 512
"""Samples of the calibration text, and tokens in each."""

USUAL = Quantization(bits=4, group_size=64)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a model is quantized."""

    method: str = "mixed"
    """One of METHODS."""
    packing: Quantization = USUAL
    """Packing of every matrix; for `mixed` only its average bits per weight count, and `exact` has
    its own."""
    bits_per_weight: float | None = limited(None, least=2, most=16)
    """For `mixed`: average bits per weight, scales included; by default those of `packing`."""
    samples: int = limited(CHUNKS, whole=True, least=1)
    """Number of samples taken from the calibration text."""
    length: int = limited(LENGTH, whole=True, least=2)
    """Tokens in each sample."""
    seed: int = limited(0, whole=True, least=0)
    """Chooses the samples."""

    def __post_init__(self) -> None:
        one_of("method", self.method, METHODS)
        if self.packing.mode != "affine" and self.method != "rtn":
            raise InvalidArgumentError(
                f"{self.packing.mode} goes with method rtn; {self.method} is for affine",
                field="mode",
            )
        if self.method == "dwq" and self.packing.bits == 8:
            raise InvalidArgumentError(
                "dwq learns nothing in 8 bits; gptq does as well there", field="method"
            )
        if self.method == "exact" and self.packing != USUAL:
            raise InvalidArgumentError(
                "goes with other methods: exact takes 2 bits, in the largest groups that fit",
                field="packing",
            )
        if self.bits_per_weight is not None and self.method != "mixed":
            raise InvalidArgumentError(
                f"goes with method mixed, not with {self.method}", field="bits_per_weight"
            )
        check_limits(self)

    @property
    def calibrated(self) -> bool:
        """Whether the method needs a calibration text."""
        return self.method not in ("rtn", "exact")

    @property
    def target(self) -> float:
        """Average bits per weight."""
        stated = self.bits_per_weight
        return self.packing.bits_per_weight if stated is None else stated


def packing(bits: int | None, group_size: int | None, mode: str = "affine") -> Quantization:
    """A packing of `mode`, by default with its usual bits and group size."""
    one_of("mode", mode, PACKINGS)
    widths, groups = PACKINGS[mode]
    usual = (4, 64) if mode == "affine" else (widths[0], groups[0])
    bits = usual[0] if bits is None else bits
    group_size = usual[1] if group_size is None else group_size
    for name, value, choices in (("bits", bits, widths), ("group_size", group_size, groups)):
        if value not in choices:
            expected = ", ".join(map(str, choices))
            raise InvalidArgumentError(
                f"must be one of {expected} in mode {mode}, got {shown(value)}", field=name
            )
    return Quantization(bits=bits, group_size=group_size, mode=mode)


def split_text(
    ids: Sequence[int], recipe: Recipe, *, whole: bool = False
) -> tuple[list[list[int]], list[int]]:
    """The calibration samples that `recipe` takes from a text, and the remaining tokens.

    Samples are drawn by the recipe's seed from all over the text and do not overlap. At least a
    quarter of the text is left to measure on, unless `whole`. InvalidArgumentError if the text is
    too short.
    """
    length = recipe.length
    chunks = [list(ids[at : at + length]) for at in range(0, len(ids) - length + 1, length)]
    most = len(chunks) if whole else len(chunks) - -(-len(chunks) // 4)
    if most < 1:
        raise InvalidArgumentError(
            f"the calibration text has {len(ids)} tokens; expected {length * (1 if whole else 2)} "
            "or more: give a longer text, or a smaller length of samples"
        )
    draw = random.Random(recipe.seed)
    chosen = set(draw.sample(range(len(chunks)), min(recipe.samples, most)))
    rest = [chunk for number, chunk in enumerate(chunks) if number not in chosen]
    draw.shuffle(rest)  # so that a part of the rest has all kinds of text
    samples = [chunks[number] for number in sorted(chosen)]
    return samples, [token for chunk in rest for token in chunk]


def bundled_text() -> str:
    """The calibration text shipped with this library: English, Chinese, code and others."""
    return resources.files(__package__).joinpath("calibration.txt").read_text(encoding="utf-8")
