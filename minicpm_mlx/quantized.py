"""A checkpoint's folder to another that holds it in few bits, as MLX and mlx-lm read it."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import mlx.core as mx

from .arguments import at_least_one
from .calibrated import quantize_gptq
from .config import Config
from .config_parts import Quantization
from .errors import InvalidArgumentError
from .quantize import dequantize, quantize
from .weights.load import assemble, parameters, read_checked

METHODS = ("rtn", "gptq")
"""Rounding to the nearest, and rounding by what each matrix reads."""

KEPT = ("tokenizer*", "special_tokens_map.json", "generation_config.json", "*.jinja")
"""Files that go along with the weights."""


def write_quantized(
    source: Path,
    folder: Path,
    packing: Quantization,
    *,
    texts: Sequence[Sequence[int]] = (),
    weights: str | None = None,
    progress: Callable[[str], object] = lambda _: None,
) -> None:
    """Write the checkpoint in `source`, in the bits of `packing`, to `folder`, which exists.

    With `texts` to calibrate on (see `samples`) by GPTQ, else to the nearest. A source that is not
    quantized itself is never in memory whole. `weights` names a torch file that has no usual name.
    """
    config = Config.load(source)
    model = assemble(config, read_checked(source, config, weights), None)
    if config.quantization is not None:  # from other bits; it is then in memory whole
        dequantize(model, mx.float32)
    if texts:
        quantize_gptq(model, packing, texts, progress)
    else:
        quantize(model, packing)
        for layer in model.layers:  # layer by layer, so that the source is never in memory whole
            mx.eval(layer.parameters())
    mx.save_safetensors(str(folder / "model.safetensors"), parameters(model), {"format": "mlx"})
    raw = json.loads((source / "config.json").read_text(encoding="utf-8"))
    raw["quantization"] = asdict(packing)
    raw.pop("quantization_config", None)  # mlx-lm's second copy
    (folder / "config.json").write_text(json.dumps(raw, indent=2), encoding="utf-8")
    for pattern in KEPT:
        for path in source.glob(pattern):
            shutil.copyfile(path, folder / path.name)


def samples(ids: Sequence[int], count: int, length: int, seed: int = 0) -> list[list[int]]:
    """`count` pieces of `length` tokens, from all over a text; the same for the same seed."""
    count, length = at_least_one("samples", count), at_least_one("length", length)
    if len(ids) < length:
        raise InvalidArgumentError(
            f"the calibration text has {len(ids)} tokens; expected {length} or more"
        )
    starts = range(len(ids) - length + 1)
    draw = random.Random(seed)
    chosen = sorted(draw.sample(starts, min(count, len(starts))))
    return [list(ids[start : start + length]) for start in chosen]
