"""The report of a quantized folder (receipt.json, README.md): how it was made, what it lost."""

from __future__ import annotations

import json
import platform
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version as version_of
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..engine.scoring.perplexity import PerplexityScore, score
from ..errors import ConfigError
from ..files.atomic import sha256
from ..files.weight_files import files_in
from ..model.config import Config
from ..weights.checkpoint import Checkpoint
from ..weights.companion_files import REPORT_FILE
from .bit_allocation import CHOICES, sizes
from .layerwise import LayerReader
from .recipe import METHODS, Recipe
from .ternary import BITS


def make_report(
    *,
    name: str,
    source: Path,
    file: str | None,
    folder: Path,
    recipe: Recipe,
    smaller: Checkpoint,
    weights: int,
    equal: Mapping[str, int] | None,
    calibration: Mapping[str, Any] | None,
    evaluation: Mapping[str, Any],
    score: PerplexityScore,
) -> dict[str, Any]:
    """The report on `folder`, quantized from the `weights` parameters in `source`.

    `file` is the source's weight file, where it has a name of its own; `equal` counts what was
    found equal to the source, after method exact.
    """
    size = sum(path.stat().st_size for path in weight_files(folder))
    quantization = smaller.raw["quantization"]
    method: dict[str, Any] = {"method": recipe.method, "mode": recipe.packing.mode}
    if recipe.method == "mixed":
        method["target_bits_per_weight"] = recipe.target
    elif equal is not None:
        method |= {"bits": BITS, "equal": dict(equal)}
    else:
        method |= {"bits": recipe.packing.bits, "group_size": recipe.packing.group_size}
    if calibration is not None:
        method["calibration"] = {**calibration, "length": recipe.length, "seed": recipe.seed}
    return {
        **method,
        "bits_per_weight": round(size * 8 / weights, 4),
        "size_bytes": size,
        "packings": _packings(quantization),
        **_left_dense(smaller, recipe),
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
        "source": {"name": name, "files": hashes(source, file)},
        "files": hashes(folder),
        "versions": {
            **{package: version_of(package) for package in ("minicpm-mlx", "mlx", "numpy")},
            "python": platform.python_version(),
        },
    }


def read_report(folder: Path) -> dict[str, Any] | None:
    """The report in `folder`, if there is one; ConfigError if it is damaged."""
    path = folder / REPORT_FILE
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: expected a report, found: {error}") from None
    if not isinstance(report, dict):
        raise ConfigError(f"{path}: expected a JSON object")
    return report


def hashes(folder: Path, weights: str | None = None) -> dict[str, str]:
    """SHA-256 of each weight file in `folder`, by name."""
    return {path.name: sha256(path) for path in weight_files(folder, weights)}


def weight_files(folder: Path, weights: str | None = None) -> list[Path]:
    """The files in `folder` that its weights are read from; `weights` is one with its own name."""
    found = None if weights else files_in(folder)
    names = [weights] if weights else found.files if found else ()
    return [folder / name for name in names]


def _packings(quantization: Mapping[str, Any]) -> dict[str, Any]:
    """The commonest packing, and the number of matrices with each other one."""

    def name(packing: Mapping[str, Any]) -> str:
        return f"{packing['bits']} bits, groups of {packing['group_size']}"

    others = Counter(name(value) for value in quantization.values() if isinstance(value, Mapping))
    return {"most": name(quantization), "others": dict(sorted(others.items()))}


NUMBERED = r"^model[.]layers[.][0-9]+[.]|(?<=experts)[.][0-9]+"
"""The numbers of layers and experts, with which a matrix's path is its own."""


def _left_dense(smaller: Checkpoint, recipe: Recipe) -> dict[str, Any]:
    """The matrices that were not packed, by their names in a layer, if there are any."""
    packed, shapes = smaller.packings, sizes(smaller)
    dense = [path for path in shapes if path not in packed]
    if not dense:
        return {}
    groups = {recipe.packing.group_size}
    if recipe.method in ("mixed", "exact"):
        groups = {how.group_size for how in CHOICES}
    weights = sum(map(prod, shapes.values()))

    def named(paths: list[str]) -> dict[str, Any]:
        return {
            "matrices": dict(Counter(re.sub(NUMBERED, "", p) for p in paths)),
            "widths": sorted({shapes[path][1] for path in paths}),
            "group_sizes": sorted(groups),
            "share": round(sum(prod(shapes[p]) for p in paths) / weights, 4),
        }

    divided = [path for path in dense if shapes[path][1] % min(groups) == 0]
    undivided = [path for path in dense if path not in divided]
    found = {"dense": undivided, "not_ternary": divided}
    return {key: named(paths) for key, paths in found.items() if paths}


def _dense_in_words(report: Mapping[str, Any]) -> str:
    """What was left dense, and why; "" if nothing was."""
    parts = []
    for key in ("dense", "not_ternary"):
        if not (dense := report.get(key)):
            continue
        names = ", ".join(f"{count} {name}" for name, count in dense["matrices"].items())
        widths, groups = (" or ".join(map(str, dense[k])) for k in ("widths", "group_sizes"))
        why = f"rows of {widths} divide into no groups of {groups}"
        why = why if key == "dense" else "not ternary"
        parts.append(f"{names}, {dense['share']:.1%} of the weights: {why}")
    return "; ".join(parts)


def _equal_in_words(equal: Mapping[str, int]) -> str:
    return (
        f"{equal['matrices']} matrices, {equal['weights']} weights, unpack to the source's, each "
        "compared"
    )


def summary(report: Mapping[str, Any]) -> dict[str, str]:
    """The main figures of a report, for people; empty if it lacks them."""
    with suppress(KeyError, TypeError, ValueError, ZeroDivisionError):  # edited, or not ours
        return _summary(report)
    return {}


def _summary(report: Mapping[str, Any]) -> dict[str, str]:
    quality = report["quality"]
    ratio = quality["perplexity"] / quality["source_perplexity"]
    dense = _dense_in_words(report)
    return {
        "size": f"{report['size_bytes'] / 1e9:.2f} GB, {report['bits_per_weight']:.2f} bits per "
        f"weight ({report['method']})",
        **({"exact": _equal_in_words(equal)} if (equal := report.get("equal")) else {}),
        **({"left dense": dense} if dense else {}),
        "perplexity": f"{quality['perplexity']:.3f}, {ratio:.4f} times that of "
        f"{report['source']['name']}",
        "divergence": f"{quality['kl_mean']:.4f} nats a token, 99 % below {quality['kl_99']:.3f}",
        "same likeliest token": f"{quality['top_1_agreement']:.2%}",
        "measured on": f"{quality['tokens']} tokens of {quality['text']}",
    }


def model_card(report: Mapping[str, Any]) -> str:
    """README.md of a quantized folder."""
    quality, name = report["quality"], report["source"]["name"]
    excess = quality["perplexity"] / quality["source_perplexity"]
    base = f"base_model: {name}\n" if name.count("/") == 1 else ""
    method, version = METHODS[report["method"]], report["versions"]["minicpm-mlx"]
    dense = f" Left dense: {words}." if (words := _dense_in_words(report)) else ""
    return f"""---
library_name: mlx
pipeline_tag: text-generation
{base}tags:
- mlx
- minicpm-mlx
---

# {name}, {report["bits_per_weight"]:.2f} bits per weight

Made of {name} by minicpm-mlx {version}, method {report["method"]}: {method}.{dense}

| | this model | its source |
|---|---:|---:|
| perplexity | {quality["perplexity"]:.3f} | {quality["source_perplexity"]:.3f} |
| ratio | {excess:.4f} | 1 |
| mean KL divergence, nats a token | {quality["kl_mean"]:.4f} | 0 |
| 99 % of tokens diverge less than | {quality["kl_99"]:.3f} | 0 |
| same likeliest token | {quality["top_1_agreement"]:.2%} | 100 % |
| size of the weights | {report["size_bytes"] / 1e9:.2f} GB | |

Measured on {quality["tokens"]} tokens of {quality["text"]}, each predicted from up to
{quality["context"]} before it. `{REPORT_FILE}` holds the rest: hashes, versions, seeds.

```sh
minicpm-mlx chat --model .
```
"""


Progress = Callable[[str], object]


CONTEXT = 512
"""Most tokens in a window of the evaluation text."""


class WindowStates:
    """A model whose last states for all windows of a text were computed layer by layer."""

    def __init__(
        self, checkpoint: Checkpoint, windows: Sequence[Sequence[int]], progress: Progress
    ):
        reader = LayerReader(checkpoint)
        self.config: Config = reader.config
        xs = reader.start(windows)
        run = reader.runner(len(windows[0]))
        for number in range(self.config.num_hidden_layers):
            block = reader.layer(number)
            xs = [run(block, x) for x in xs]
            mx.eval(xs)
            mx.clear_cache()
            progress(f"layer {number + 1} of {self.config.num_hidden_layers}")
        self._states = iter([reader.finish(x) for x in xs])
        self._head = reader[reader.head_name]

    def hidden(self, ids: mx.array) -> mx.array:
        """The last states of the next window, which must be `ids`."""
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
    """Perplexity of `smaller` on a text and its divergence from `source`, in float32.

    Reads the whole windows of `context` tokens in `ids`; a shorter text is one window.
    """
    context = min(context, len(ids))
    windows = [list(ids[at : at + context]) for at in range(0, len(ids) - context + 1, context)]
    whole = [token for window in windows for token in window]
    model = WindowStates(smaller, windows, lambda what: progress(f"measuring the result, {what}"))
    reference = WindowStates(
        source, windows, lambda what: progress(f"measuring the source, {what}")
    )
    return score(model, whole, context=context, reference=reference)
