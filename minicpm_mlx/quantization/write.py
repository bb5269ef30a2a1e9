"""Quantizes a checkpoint's folder into another, with a report."""

from __future__ import annotations

import hashlib
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
from ..weights.checkpoint import read_checkpoint, write_checkpoint, write_json
from ..weights.companion_files import REPORT_FILE, copy_companion_files
from ..weights.llama_format import fold_logits
from .job import Job
from .recipe import Recipe, bundled_text, split_text
from .report import CONTEXT, make_report, model_card, quality, weight_files
from .ternary import check_equal, pack_ternary

WINDOWS = 8
"""Most windows of the evaluation text to read."""


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
    """Quantize the checkpoint in `source` by `recipe` into `folder`, which exists.

    By default both texts are the one shipped with this library, evaluated on parts that were not
    used for calibration. Continues what an interrupted call of the same job left in `folder`.
    `card` states the source's tokenizer, file and name. Returns the report. Memory holds at most a
    layer, or the result.
    """
    file = card.file if card.repo else None
    checkpoint = read_checkpoint(source, file)
    tokenizer = tokenizer_of(card, source, checkpoint.config.vocab_size)
    calibration = calibration or Text("the bundled text", bundled_text())
    ids = tokenizer.encode(calibration.text, add_bos=False)
    texts, rest = (
        split_text(ids, recipe, whole=evaluation is not None) if recipe.calibrated else ([], ids)
    )
    measured = evaluation or Text(f"{calibration.name}, other pieces than calibrated on", "")
    if evaluation is not None:
        rest = tokenizer.encode(evaluation.text, add_bos=False)
    if len(rest) < 2:
        raise InvalidArgumentError(
            f"{measured.name}: {len(rest)} tokens are left to measure on; expected two or more. "
            "Give a longer text to measure on (--evaluate)"
        )
    # Identifies the job: finished parts of another one must not be reused.
    job = [checkpoint.raw, sorted(checkpoint.tensors), repr(recipe), texts, _stamps(source, file)]
    work = _work(folder, job)
    exact = recipe.method == "exact"
    smaller = fold_logits(
        pack_ternary(checkpoint, progress)
        if exact
        else Job(checkpoint, recipe, texts, work, progress).run()
    )
    progress("writing")
    write_checkpoint(smaller, folder)
    equal = check_equal(checkpoint, read_checkpoint(folder)) if exact else None
    copy_companion_files(source, folder, card, for_mlx_lm=True)
    report = make_report(
        name=card.repo or card.name,
        source=source,
        file=file,
        folder=folder,
        recipe=recipe,
        smaller=smaller,
        weights=parameter_count(checkpoint.config),
        equal=equal,
        calibration={**_text_facts(calibration), "samples": len(texts)} if texts else None,
        evaluation=_text_facts(measured) if evaluation else {"text": measured.name},
        score=quality(checkpoint, smaller, rest[: WINDOWS * CONTEXT], progress=progress),
    )
    write_json(folder / REPORT_FILE, report)
    (folder / "README.md").write_text(model_card(report), encoding="utf-8")
    shutil.rmtree(work)
    return report


def _text_facts(text: Text) -> dict[str, Any]:
    return {"text": text.name, "sha256": hashlib.sha256(text.text.encode()).hexdigest()}


def _stamps(folder: Path, file: str | None) -> list[tuple[str, int, int]]:
    """Name, size and time of each weight file, to notice that the source has changed."""
    stats = ((path.name, path.stat()) for path in weight_files(folder, file))
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]


def _work(folder: Path, job: object) -> Path:
    """The job's folder for finished parts; leftovers of another job are deleted."""
    work, record = folder / "work", folder / "work" / "job.json"
    text = json.dumps(job)
    same = record.is_file() and record.read_text(encoding="utf-8") == text
    for path in folder.iterdir():  # files beside the weights may have changed, or be another job's
        if path.is_dir() and not (same and path == work):
            shutil.rmtree(path)
        elif path != work:
            path.unlink()
    if not same:
        work.mkdir()
        record.write_text(text, encoding="utf-8")
    return work
