"""A checkpoint's folder to another that holds it in few bits, with a receipt."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InvalidArgumentError
from ..memory import parameter_count
from ..tokenizer import Tokenizer
from ..weights.checkpoint import copy_beside, read_checkpoint, write_checkpoint
from .job import Job
from .quality import CONTEXT, quality
from .receipt import FILE, model_card, receipt, text_hash, weight_files
from .recipe import Recipe, bundled_text, pieces

WINDOWS = 8
"""Windows of the evaluation text that are read, where it is long enough."""


@dataclass(frozen=True)
class Text:
    """A text and what to call it."""

    name: str
    text: str


def write_quantized(
    source: Path,
    folder: Path,
    recipe: Recipe,
    tokenizer: Tokenizer,
    *,
    name: str,
    weights: str | None = None,
    calibration: Text | None = None,
    evaluation: Text | None = None,
    progress: Callable[[str], object] = lambda _: None,
) -> dict[str, Any]:
    """Write the checkpoint in `source`, made smaller by `recipe`, to `folder`, which exists.

    By default both texts are the one that comes with this library; it is evaluated on pieces that
    were not calibrated on. What an interrupted call left in `folder` is gone on from, if it was of
    the same job. `weights` names a torch file that has no usual name, `name` the source in the
    receipt, which is returned. Never is more in memory than a layer, or the result.
    """
    checkpoint = read_checkpoint(source, weights)
    calibration = calibration or Text("the bundled text", bundled_text())
    ids = tokenizer.encode(calibration.text, add_bos=False)
    texts, rest = (
        pieces(ids, recipe, whole=evaluation is not None) if recipe.calibrated else ([], ids)
    )
    named = evaluation or Text(f"{calibration.name}, other pieces than calibrated on", "")
    if evaluation is not None:
        rest = tokenizer.encode(evaluation.text, add_bos=False)
    if len(rest) < 2:
        raise InvalidArgumentError(
            f"{named.name}: {len(rest)} tokens are left to measure on; expected two or more. "
            "Name a text to measure on, or calibrate on fewer samples"
        )
    job = [checkpoint.raw, sorted(checkpoint.tensors), repr(recipe), texts, _stamps(source)]
    work = _work(folder, job)
    smaller = Job(checkpoint, recipe, texts, work, progress).run()
    progress("writing")
    write_checkpoint(smaller, folder)
    copy_beside(source, folder)
    progress("measuring")
    found = receipt(
        name=name,
        source=source,
        folder=folder,
        recipe=recipe,
        smaller=smaller,
        weights=parameter_count(checkpoint.config),
        calibration=_stated(calibration) if recipe.calibrated else None,
        evaluation=_stated(named) if evaluation else {"text": named.name},
        score=quality(checkpoint, smaller, rest[: WINDOWS * CONTEXT]),
    )
    (folder / FILE).write_text(json.dumps(found, indent=2, ensure_ascii=False), encoding="utf-8")
    (folder / "README.md").write_text(model_card(found), encoding="utf-8")
    shutil.rmtree(work)
    return found


def _stated(text: Text) -> dict[str, Any]:
    return {"text": text.name, "sha256": text_hash(text.text)}


def _stamps(folder: Path) -> list[tuple[str, int, int]]:
    stats = ((path.name, path.stat()) for path in weight_files(folder))
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]


def _work(folder: Path, job: object) -> Path:
    """Where the job keeps what it has done: what another job left there is deleted."""
    work, note = folder / "work", folder / "work" / "job.json"
    told = json.dumps(job)
    if not note.is_file() or note.read_text(encoding="utf-8") != told:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        note.write_text(told, encoding="utf-8")
    return work
