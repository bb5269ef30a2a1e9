"""The folder of an MT-Bench run, which may have several models in it.

    settings.json                        how each model's answers were made
    model_answer/MODEL.jsonl             as FastChat has them
    model_judgment/JUDGE_single.jsonl

Answers that were made otherwise are not gone on with.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...errors import DataError, InvalidArgumentError
from ...files.atomic import alone, named_errors
from ..record import (
    ADVICE,
    SETTINGS,
    check_same,
    write_json,
)

__all__ = ["answers_path", "judgements_path", "opened"]

FORMAT = 1


@contextmanager
def opened(folder: Path, model: str, settings: Mapping[str, Any]) -> Iterator[None]:
    """The folder, made if need be, for one process at a time, to answer as `model` with `settings`.

    InvalidArgumentError where it has answers of the model that were made otherwise, or nobody knows
    how; DataError where its settings are no such; StorageError where it cannot be made or another
    process has it.
    """
    now = json.loads(json.dumps(settings))  # as they are once they have been written and read
    _made(folder)
    with alone(folder, folder):
        models = _read(folder / SETTINGS)
        if model in models:
            check_same(folder, f"{model}'s", models[model], now)
        elif (path := answers_path(folder, model)).exists():
            raise InvalidArgumentError(
                f"{path}: expected {SETTINGS} to say how these answers were made, found nothing of "
                f"{model} in it; {ADVICE}"
            )
        write_json(folder / SETTINGS, {"format": FORMAT, "models": {**models, model: now}})
        yield


def answers_path(folder: Path, model: str) -> Path:
    """The file of a model's answers; its folder is made."""
    return _made(folder / "model_answer") / f"{_plain(model)}.jsonl"


def judgements_path(folder: Path, judge: str) -> Path:
    """The file of a judge's judgements, of all models; its folder is made."""
    return _made(folder / "model_judgment") / f"{_plain(judge)}_single.jsonl"


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """Settings by model; none where nothing was begun."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: expected settings of MT-Bench ({error}); {ADVICE}") from None
    models = found.get("models") if isinstance(found, dict) else None
    if not isinstance(models, dict) or not all(isinstance(one, dict) for one in models.values()):
        raise DataError(f"{path}: expected settings of MT-Bench, found another file; {ADVICE}")
    if found.get("format") != FORMAT:
        raise DataError(f"{path}: was written by another version of minicpm-mlx; {ADVICE}")
    return models


def _made(folder: Path) -> Path:
    with named_errors(folder, ADVICE):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def _plain(name: str) -> str:
    """A model's name as a file's: no part of it is a folder, or hidden."""
    return re.sub(r"[^\w.+@-]+", "_", name).lstrip(".") or "model"
