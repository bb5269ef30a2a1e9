"""What a quantized folder says of itself: how it was made, and how much it lost."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..engine.scoring.perplexity import Score
from ..errors import ConfigError
from ..weights.checkpoint import Checkpoint
from ..weights.companion_files import RECEIPT
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
    score: Score,
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
