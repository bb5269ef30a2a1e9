"""The folder of an MT-Bench run, which may hold several models.

    settings.json                        how each model's answers were generated
    model_answer/MODEL.jsonl             in FastChat's format
    model_judgment/JUDGE_single.jsonl

A run resumes only with the settings of the answers that are there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...errors import InvalidArgumentError
from ...files.atomic import named_errors
from ..record import ADVICE, FORMAT, SETTINGS, check_same, open_folder, read_settings, write_json


@contextmanager
def open_bench(folder: Path, model: str, settings: Mapping[str, Any]) -> Iterator[None]:
    """The folder, created if need be, for one process that answers as `model` with `settings`.

    InvalidArgumentError where it has answers of the model with other or unknown settings;
    DataError where its settings file is damaged; StorageError where it cannot be created or
    another process has it.
    """
    now = json.loads(json.dumps(settings))  # as they are after writing and reading
    path = folder / SETTINGS
    with open_folder(folder):
        models = read_settings(path, "models", "MT-Bench")["models"] if path.exists() else {}
        if model in models:
            check_same(folder, f"{model}'s", models[model], now)
        elif (answers := answers_path(folder, model)).exists():
            raise InvalidArgumentError(
                f"{answers}: expected {SETTINGS} to say how these answers were generated, found "
                f"nothing of {model} in it; {ADVICE}"
            )
        write_json(path, {"format": FORMAT, "models": {**models, model: now}})
        yield


def answers_path(folder: Path, model: str) -> Path:
    """The file of a model's answers; creates its folder."""
    return _subfolder(folder, "model_answer") / f"{_file_name(model)}.jsonl"


def judgements_path(folder: Path, judge: str) -> Path:
    """The file of a judge's judgements of all models; creates its folder."""
    return _subfolder(folder, "model_judgment") / f"{_file_name(judge)}_single.jsonl"


def _subfolder(folder: Path, name: str) -> Path:
    with named_errors(folder, ADVICE):
        (folder / name).mkdir(exist_ok=True)
    return folder / name


def _file_name(name: str) -> str:
    """A model's name as a file name that is no path and not hidden."""
    return re.sub(r"[^\w.+@-]+", "_", name).lstrip(".") or "model"
