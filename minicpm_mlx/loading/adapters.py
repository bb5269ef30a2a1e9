"""Adapters for a model, whatever form of the model they were trained on."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..arguments import printable
from ..errors import (
    ConfigError,
    InvalidArgumentError,
    MissingPackageError,
    ModelNotFoundError,
    WeightsError,
)
from ..model.adapters import Adapter, rescaled
from ..model.base_form import BaseForm
from ..model.config import Config
from ..model_cards import Card, cards, resolve
from ..weights.adapters import FORM, bases_of, read_adapter
from .store import kept_folder

LLAMA_FORMAT = "-llama-format"
"""Ending of the names under which OpenBMB publishes its Llamas, whose configs record no muP."""


def load_adapter(folder: str | Path, config: Config, card: Card) -> Adapter:
    """Read the adapter in `folder` for the model of `config` and `card`; see `fit_adapter`."""
    return fit_adapter(read_adapter(Path(folder).expanduser()), config, card)


def fit_adapter(adapter: Adapter, config: Config, card: Card) -> Adapter:
    """Make an adapter fit the model of `config` and `card`, a form of the one it was trained on.

    Its deltas are rescaled where it was trained on another form of the model: the form that its
    files record, or else that of the base which they name. One that says neither is taken to be of
    the muP form, which is what this library trained before it recorded any. Raises ConfigError and
    WeightsError, naming both forms where it cannot be rescaled.
    """
    target = _target_form(config, card)
    source = adapter.form or _trained_form(adapter, target, config, card)
    return rescaled(adapter, source, target)


def base_model(folder: str | Path) -> str | None:
    """The model that the adapter in `folder` was trained on, as `load` takes it; None: none named.

    InvalidArgumentError if it is a folder that is not here. Nothing is downloaded.
    """
    names = bases_of(Path(folder).expanduser())
    for name in names:
        with suppress(ModelNotFoundError):
            resolve(name)
            return name
    if names:
        raise InvalidArgumentError(
            f"{folder}: was trained on {printable(names[0])}, which is not here; say where that "
            "model is with --model"
        )
    return None


def _trained_form(adapter: Adapter, target: BaseForm, config: Config, card: Card) -> BaseForm:
    """The form of the base that an adapter's files name, for those that record no form."""
    for name in adapter.bases:
        if form := _form_of_base(name, target, config, card):
            return form
    if not adapter.bases and target.has_constants:
        return target.unfolded
    if target.format == "mup" or not (target.has_constants or target.was_divided):
        return target
    base = f"trained on {printable(adapter.bases[0])}, which is not here" if adapter.bases else ""
    raise WeightsError(
        f"{adapter.folder}: {base or 'names no base'}, so the form of its base is unknown, and "
        f"this model is in {target}; expected {FORM} in its adapter_config.json, or as model there "
        "a base that is on this disk"
    )


def _form_of_base(name: str, target: BaseForm, config: Config, card: Card) -> BaseForm | None:
    """The form of the model of a name; None if it is not here and was published elsewhere."""
    try:
        base = resolve(name)
    except ModelNotFoundError:
        base = None
    if base is None and name == card.name:  # trainings here recorded the end of a folder's path
        return target
    if base and (base.repo, base.package, base.path) == (card.repo, card.package, card.path):
        return target
    if base and (kept := _kept_config(base)):
        return BaseForm.of(kept)
    if name.partition("@")[0].lower().endswith(LLAMA_FORMAT):
        return replace(_published(target, config), format="llama")
    if base and base.path is None and base.repo in {known.repo for known in cards().values()}:
        return _published(target, config)
    return None


def _kept_config(card: Card) -> Config | None:
    """The config of a model that is on this disk."""
    with suppress(ConfigError, WeightsError, MissingPackageError):
        if (folder := kept_folder(card)) is not None:
            return Config.load(folder)
        if card.path is not None:  # a .gguf file that was not converted yet
            from ..weights.gguf import read_gguf

            return read_gguf(card.path).config
    return None


def _target_form(config: Config, card: Card) -> BaseForm:
    form = BaseForm.of(config)
    if card.repo and card.repo.endswith(LLAMA_FORMAT):
        return form.recognised(_published(form, config))
    return form


def _published(target: BaseForm, config: Config) -> BaseForm:
    """The muP form that a model has, or had if it is one of those published."""
    if target.has_constants:
        return target.unfolded
    from ..weights.gguf.architecture import MUP

    scale = MUP["scale_emb"] if target.was_divided else 1.0
    constants: dict[str, Any] = {**MUP, "rms_norm_eps": config.rms_norm_eps * scale**2}
    return BaseForm.of(replace(config, **constants))
