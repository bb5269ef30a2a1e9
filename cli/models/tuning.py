"""Tuning of a model for this chip: `bench --tune`, and once after a model is made."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minicpm_mlx import device
from minicpm_mlx.distributed import collectives
from minicpm_mlx.errors import InvalidArgumentError
from minicpm_mlx.files.tables import markdown_table
from minicpm_mlx.loading.store import folder_of, kept_folder
from minicpm_mlx.loading.tuning import VARIABLE, keep_tuning, load_tuning, model_key
from minicpm_mlx.model_cards import resolve

from ..render.texts import Texts
from ..streams import progress, shows_progress

if TYPE_CHECKING:
    from minicpm_mlx.bench.tuning import Trial
    from minicpm_mlx.loading.tuning import Tuning

ON_A_CPU = "Nothing to tune: on a CPU all settings are as fast as they can be; they are for GPUs."


def tune(model: str, format: str) -> str:
    """Tune a model, keep the result, and return it as a table or JSON."""
    from minicpm_mlx.bench.contender import ContenderError
    from minicpm_mlx.bench.tuning import BUDGET, tune_model

    if device.on_cpu():
        return _shown({}, [], ON_A_CPU, format)
    if os.environ.get(VARIABLE, "").strip():
        raise InvalidArgumentError(
            f"{VARIABLE} is set and would replace what is found; unset it to tune"
        )
    key, show = _key(model), progress()
    try:
        found, trials = tune_model(model, BUDGET, show)
    except ContenderError as error:
        raise InvalidArgumentError(f"{model} could not be run to be measured: {error}") from None
    finally:
        show("")
    keep_tuning(device.chip(), key, device.mlx_version(), found)
    return _shown(found.changed(), trials, _outcome(found, trials), format)


def tune_new(model: str) -> None:
    """Tune a model that is not on this disk yet once it is, for a few seconds, on a Mac's GPU.

    Nothing is done unless a person sees it, nor where the environment states the settings; Ctrl-C
    skips it.
    """
    card = resolve(model)
    if os.environ.get(VARIABLE, "").strip() or not shows_progress() or kept_folder(card):
        return
    if not device.on_metal() or collectives.size() > 1:
        return
    from minicpm_mlx.bench.contender import ContenderError
    from minicpm_mlx.bench.tuning import UNASKED, tune_model

    folder_of(card)
    key, texts, show = _key(model), Texts(), progress()
    if load_tuning(device.chip(), key, device.mlx_version()) is not None:
        return
    print(texts("tuning", seconds=UNASKED, variable=VARIABLE), file=sys.stderr)
    try:
        found, trials = tune_model(model, UNASKED, show)
        keep_tuning(device.chip(), key, device.mlx_version(), found)
    except KeyboardInterrupt:
        show("")
        print(texts("tuning_skipped", model=model), file=sys.stderr)
    except (ContenderError, OSError) as error:  # the model itself works without
        show("")
        print(texts("tuning_failed", problem=error), file=sys.stderr)
    else:
        show("")
        print(_table(trials), file=sys.stderr)
        print(_outcome(found, trials), file=sys.stderr)


def _key(model: str) -> str:
    """The `model_key` of a shape or of a model, which is downloaded if it is not here."""
    from minicpm_mlx.bench.shapes import SHAPES, packed_config
    from minicpm_mlx.model.config import Config

    if model in SHAPES:
        return model_key(packed_config(model), None)
    folder: Path = folder_of(resolve(model))
    return model_key(Config.load(folder), folder)


def _outcome(found: Tuning, trials: list[Trial]) -> str:
    kept = [trial.name for trial in trials if trial.kept]
    if not kept:
        return "Kept: the defaults; nothing was clearly faster."
    later = " Command buffers change when the program is started next." * bool(found.buffers)
    return f"Kept: {'; '.join(kept)}. {VARIABLE}=off runs without.{later}"


def _shown(settings: dict[str, Any], trials: list[Trial], outcome: str, format: str) -> str:
    rows = [trial.row() for trial in trials]
    if format == "json":
        facts = {"chip": device.chip(), "mlx": device.mlx_version()}
        return json.dumps(
            {**facts, "settings": settings, "trials": rows, "outcome": outcome}, indent=2
        )
    return f"{_table(trials)}\n\n{outcome}" if trials else outcome


def _table(trials: list[Trial]) -> str:
    """Speeds are those of the setting, as multiples of the best before it."""
    cells = []
    for row in (trial.row() for trial in trials):
        speed = row["problem"] or f"{row['speed']:.3f} ({row['least']:.3f}–{row['most']:.3f})"
        cells.append([row["setting"], speed, str(row["rounds"] or ""), "yes" * row["kept"]])
    return markdown_table(["setting", "times as fast", "rounds", "kept"], cells, text_columns=2)
