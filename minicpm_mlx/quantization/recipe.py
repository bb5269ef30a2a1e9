"""Recipes: every setting that decides the bytes of a quantized folder, and nothing else."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

from ..arguments import at_least_one, number, whole
from ..errors import InvalidArgumentError
from ..model.config_sections import PACKINGS, Quantization

METHODS = {
    "rtn": "round to the nearest",
    "awq": "columns with large inputs made larger first, weights clipped",
    "gptq": "errors made good by the columns still to come",
    "mixed": "gptq, with more bits for matrices that matter more",
    "dwq": "gptq, then scales and biases learned from the model's own predictions",
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
    """Packing of every matrix; for `mixed` only its average bits per weight count."""
    bits_per_weight: float | None = None
    """For `mixed`: average bits per weight, scales included; by default those of `packing`."""
    samples: int = CHUNKS
    """Number of samples taken from the calibration text."""
    length: int = LENGTH
    """Tokens in each sample."""
    seed: int = 0
    """Chooses the samples."""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise InvalidArgumentError(
                f"method must be one of {', '.join(METHODS)}, got {self.method!r}"
            )
        if self.packing.mode != "affine" and self.method != "rtn":
            raise InvalidArgumentError(
                f"{self.method} is for the affine mode; mode {self.packing.mode} goes with rtn"
            )
        if self.method == "dwq" and self.packing.bits == 8:
            raise InvalidArgumentError("dwq learns nothing in 8 bits; gptq does as well there")
        if self.bits_per_weight is not None and self.method != "mixed":
            raise InvalidArgumentError(
                f"a number of bits per weight goes with mixed, not with {self.method}"
            )
        if not 2 <= number("bits per weight", self.target) <= 16:
            raise InvalidArgumentError(
                f"bits per weight must be between 2 and 16, got {self.bits_per_weight:g}"
            )
        at_least_one("samples", self.samples)
        if at_least_one("length", self.length) < 2:
            raise InvalidArgumentError("length must be 2 or more, got 1")
        if whole("seed", self.seed) < 0:
            raise InvalidArgumentError(f"seed must be 0 or more, got {self.seed}")

    @property
    def calibrated(self) -> bool:
        """Whether the method needs a calibration text."""
        return self.method != "rtn"

    @property
    def target(self) -> float:
        """Average bits per weight."""
        stated = self.bits_per_weight
        return self.packing.bits_per_weight if stated is None else stated


def packing(bits: int | None, group_size: int | None, mode: str = "affine") -> Quantization:
    """A packing of `mode`, by default with its usual bits and group size."""
    if mode not in PACKINGS:
        raise InvalidArgumentError(f"mode must be one of {', '.join(PACKINGS)}, got {mode!r}")
    widths, groups = PACKINGS[mode]
    usual = (4, 64) if mode == "affine" else (widths[0], groups[0])
    bits = usual[0] if bits is None else bits
    group_size = usual[1] if group_size is None else group_size
    if bits not in widths or group_size not in groups:
        raise InvalidArgumentError(
            f"{mode} packs into {_any(widths)} bits in groups of {_any(groups)}, got {bits} bits "
            f"in groups of {group_size}"
        )
    return Quantization(bits=bits, group_size=group_size, mode=mode)


def _any(choices: Sequence[int]) -> str:
    return ", ".join(map(str, choices))


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
