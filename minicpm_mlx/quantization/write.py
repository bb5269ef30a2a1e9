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
from ..model_cards import Card
from ..text.tokenizer import tokenizer_of
from ..weights.checkpoint import read_checkpoint, write_checkpoint
from ..weights.companion_files import RECEIPT, copy_companions
from .job import Job
from .recipe import Recipe, bundled_text, pieces
from .report import (
    CONTEXT,
    model_card,
    quality,
    receipt,
    text_hash,
    weight_files,
)

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
    card: Card,
    *,
    calibration: Text | None = None,
    evaluation: Text | None = None,
    progress: Callable[[str], object] = lambda _: None,
) -> dict[str, Any]:
    """Write the checkpoint in `source`, made smaller by `recipe`, to `folder`, which exists.

    By default both texts are the one that comes with this library; it is evaluated on pieces that
    were not calibrated on. What an interrupted call left in `folder` is gone on from, if it was of
    the same job. `card` knows the source's tokenizer, file and name. Returns the receipt. Never is
    more in memory than a layer, or the result.
    """
    checkpoint = read_checkpoint(source, card.file if card.repo else None)
    tokenizer = tokenizer_of(card, source)
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
            "Give a longer text to measure on (--evaluate)"
        )
    job = [checkpoint.raw, sorted(checkpoint.tensors), repr(recipe), texts, _stamps(source)]
    work = _work(folder, job)
    smaller = Job(checkpoint, recipe, texts, work, progress).run()
    progress("writing")
    write_checkpoint(smaller, folder)
    copy_companions(source, folder, card)
    found = receipt(
        name=card.repo or card.name,
        source=source,
        folder=folder,
        recipe=recipe,
        smaller=smaller,
        weights=parameter_count(checkpoint.config),
        calibration={**_stated(calibration), "samples": len(texts)} if texts else None,
        evaluation=_stated(named) if evaluation else {"text": named.name},
        score=quality(checkpoint, smaller, rest[: WINDOWS * CONTEXT], progress=progress),
    )
    (folder / RECEIPT).write_text(json.dumps(found, indent=2, ensure_ascii=False), encoding="utf-8")
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
    same = note.is_file() and note.read_text(encoding="utf-8") == told
    for path in folder.iterdir():  # files beside the weights may have changed, or be another job's
        if path.is_dir() and not (same and path == work):
            shutil.rmtree(path)
        elif path != work:
            path.unlink()
    if not same:
        work.mkdir()
        note.write_text(told, encoding="utf-8")
    return work
