"""What a quantized folder says of itself: how it was made, and how much it lost."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..engine.scoring.perplexity import PerplexityScore, score
from ..errors import ConfigError
from ..model.config import Config
from ..weights.checkpoint import Checkpoint
from ..weights.companion_files import RECEIPT
from .layerwise import Pieces
from .recipe import METHODS, Recipe


def receipt(
    *,
    name: str,
    source: Path,
    folder: Path,
    recipe: Recipe,
    smaller: Checkpoint,
    weights: int,
    calibration: Mapping[str, Any] | None,
    evaluation: Mapping[str, Any],
    score: PerplexityScore,
) -> dict[str, Any]:
    """The receipt of what is in `folder`, made of the `weights` parameters in `source`."""
    size = sum(path.stat().st_size for path in weight_files(folder))
    quantization = smaller.raw["quantization"]
    made: dict[str, Any] = {"method": recipe.method, "mode": recipe.packing.mode}
    if recipe.method == "mixed":
        made["target_bits_per_weight"] = recipe.target
    else:
        made |= {"bits": recipe.packing.bits, "group_size": recipe.packing.group_size}
    if calibration is not None:
        made["calibration"] = {
            **calibration,
            "length": recipe.length,
            "seed": recipe.seed,
        }
    return {
        **made,
        "bits_per_weight": round(size * 8 / weights, 4),
        "size_bytes": size,
        "packings": _packings(quantization),
        "quality": {
            **evaluation,
            "tokens": score.tokens,
            "context": score.context,
            "stride": score.stride,
            "perplexity": score.perplexity,
            "source_perplexity": score.reference_perplexity,
            "kl_mean": score.kl,
            "kl_99": score.kl_99,
            "top_1_agreement": score.top_1,
        },
        "source": {"name": name, "files": hashes(source)},
        "files": hashes(folder),
        "versions": {
            "minicpm-mlx": version("minicpm-mlx"),
            "mlx": version("mlx"),
            "numpy": version("numpy"),
            "python": platform.python_version(),
        },
    }


def read_receipt(folder: Path) -> dict[str, Any] | None:
    """The receipt in `folder`, if there is one; ConfigError where it is damaged."""
    path = folder / RECEIPT
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: expected a receipt, found: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: expected a JSON object")
    return found


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of each weight file in `folder`, by name."""
    found = {}
    for path in weight_files(folder):
        with path.open("rb") as file:
            digest = hashlib.sha256()
            while block := file.read(1 << 24):
                digest.update(block)
        found[path.name] = digest.hexdigest()
    return found


def weight_files(folder: Path) -> list[Path]:
    """The files in `folder` that hold weights."""
    return sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])


def text_hash(text: str) -> str:
    """SHA-256 of a text, in UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()


def _packings(quantization: Mapping[str, Any]) -> dict[str, Any]:
    """How many matrices are packed otherwise than most, by bits and group."""
    special = [how for how in quantization.values() if isinstance(how, Mapping)]
    counts: dict[str, int] = {}
    for how in special:
        key = f"{how['bits']} bits, groups of {how['group_size']}"
        counts[key] = counts.get(key, 0) + 1
    usual = f"{quantization['bits']} bits, groups of {quantization['group_size']}"
    return {"most": usual, "others": dict(sorted(counts.items()))}


def summary(found: Mapping[str, Any]) -> dict[str, str]:
    """What people want to know of a receipt; nothing of one that lacks it."""
    try:
        return _summary(found)
    except (KeyError, TypeError, ValueError, ZeroDivisionError):  # another program's, or edited
        return {}


def _summary(found: Mapping[str, Any]) -> dict[str, str]:
    quality = found["quality"]
    ratio = quality["perplexity"] / quality["source_perplexity"]
    return {
        "size": f"{found['size_bytes'] / 1e9:.2f} GB, {found['bits_per_weight']:.2f} bits per "
        f"weight ({found['method']})",
        "perplexity": f"{quality['perplexity']:.3f}, {ratio:.4f} times that of "
        f"{found['source']['name']}",
        "divergence": f"{quality['kl_mean']:.4f} nats a token, 99 % below {quality['kl_99']:.3f}",
        "same likeliest token": f"{quality['top_1_agreement']:.2%}",
        "measured on": f"{quality['tokens']} tokens of {quality['text']}",
    }


def model_card(found: Mapping[str, Any]) -> str:
    """README.md of a quantized folder, of its receipt."""
    quality, name = found["quality"], found["source"]["name"]
    excess = quality["perplexity"] / quality["source_perplexity"]
    base = f"base_model: {name}\n" if name.count("/") == 1 else ""
    how = METHODS[found["method"]]
    return f"""---
library_name: mlx
pipeline_tag: text-generation
{base}tags:
- mlx
- minicpm-mlx
---

# {name}, {found["bits_per_weight"]:.2f} bits per weight

Made of {name} by minicpm-mlx {found["versions"]["minicpm-mlx"]}, method {found["method"]}: {how}.

| | this model | its source |
|---|---:|---:|
| perplexity | {quality["perplexity"]:.3f} | {quality["source_perplexity"]:.3f} |
| ratio | {excess:.4f} | 1 |
| mean KL divergence, nats a token | {quality["kl_mean"]:.4f} | 0 |
| 99 % of tokens diverge less than | {quality["kl_99"]:.3f} | 0 |
| same likeliest token | {quality["top_1_agreement"]:.2%} | 100 % |
| size of the weights | {found["size_bytes"] / 1e9:.2f} GB | |

Measured on {quality["tokens"]} tokens of {quality["text"]}, each predicted from up to
{quality["context"]} before it. `{RECEIPT}` holds the rest: hashes, versions, seeds.

```sh
minicpm-mlx chat --model .
```
"""


Progress = Callable[[str], object]


CONTEXT = 512
"""Tokens that a prediction sees at most."""


class Walked:
    """A model that has read its windows of a text already, all of them layer by layer."""

    def __init__(
        self, checkpoint: Checkpoint, windows: Sequence[Sequence[int]], progress: Progress
    ):
        pieces = Pieces(checkpoint)
        self.config: Config = pieces.config
        xs = pieces.start(windows)
        run = pieces.runner(len(windows[0]))
        for number in range(self.config.num_hidden_layers):
            block = pieces.layer(number)
            xs = [run(block, x) for x in xs]
            mx.eval(xs)
            mx.clear_cache()
            progress(f"layer {number + 1} of {self.config.num_hidden_layers}")
        self._states = iter([pieces.finish(x) for x in xs])
        self._head = pieces[pieces.head_name]

    def hidden(self, ids: mx.array) -> mx.array:
        """The last states of the next window, which `ids` must be."""
        return next(self._states)

    def logits(self, hidden: mx.array) -> mx.array:
        return hidden @ self._head.T


def quality(
    source: Checkpoint,
    smaller: Checkpoint,
    ids: Sequence[int],
    context: int = CONTEXT,
    *,
    progress: Progress = lambda _: None,
) -> PerplexityScore:
    """What `smaller` makes of a text, with its divergence from `source`; computed in float32.

    Of `ids` as many windows of `context` tokens are read as are whole: one at least, so that a
    text that is shorter is the window.
    """
    context = min(context, len(ids))
    windows = [list(ids[at : at + context]) for at in range(0, len(ids) - context + 1, context)]
    whole = [token for window in windows for token in window]
    model = Walked(smaller, windows, lambda what: progress(f"measuring the result, {what}"))
    reference = Walked(source, windows, lambda what: progress(f"measuring the source, {what}"))
    return score(model, whole, context=context, reference=reference)
