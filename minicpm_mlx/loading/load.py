"""A model by name: found, fetched, and loaded with its tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import device as devices
from ..distributed import collectives
from ..engine import Sampling
from ..errors import ConfigError, InvalidArgumentError, TokenizerError, WeightsError
from ..lm.lm import LM
from ..model.adapters import locate_deltas
from ..model.config import Config
from ..model.fused import FusedModel
from ..model.layout import Layout
from ..model.modules import Pace
from ..model.transformer import Model
from ..model_cards import Card, resolve
from ..text.tokenizer import tokenizer_of
from ..weights import load_model
from ..weights.adapters import find_adapter
from ..weights.generation_config import FILE, read_sampling
from . import download
from .adapters import load_adapter
from .store import folder_of, kept_folder, text_folder_of
from .tuning import model_key, own_kernels, tuning_for

if TYPE_CHECKING:
    import mlx.core as mx


def load(
    name: str | Path,
    *,
    dtype: str | mx.Dtype | None = None,
    device: str | None = None,
    fuse: bool = True,
    adapter: str | Path | None = None,
    draft: str | Path | None = None,
    progress: bool = True,
    shard: bool = False,
    source: str | None = None,
) -> LM:
    """Load a model by card name, folder, .gguf file or hub repository (`org/name`, or
    `org/name:Q4_K_M` for a file of a GGUF repository).

    What is not here is downloaded, and what is in another format converted, once.
    `source` is where from: `hub`, `modelscope` or `auto`, which takes ModelScope where the hub
    cannot be reached; None: the environment's MINICPM_MLX_SOURCE, or `auto`.

    `dtype` (a name, or MLX's own) and `device` override what this machine computes fastest on (see
    `doctor`). `fuse=False` keeps the form that is trained. `adapter` is a folder for
    `LM.use_adapter`, `draft` a smaller model of the same vocabulary that guesses ahead. With
    `shard` the processes of a launch compute one model together. Raises ModelNotFoundError,
    DownloadError, StorageError, ConfigError, WeightsError or TokenizerError.

        lm = load("demo")
    """
    card = resolve(str(name))
    _check_options(dtype, adapter, draft)
    if adapter is not None and shard and collectives.size() > 1:
        raise InvalidArgumentError(
            "--adapter: not on a model that several processes share; fuse it first "
            "(minicpm-mlx fuse)"
        )
    devices.select(device)
    with download.using(source):
        _check_fit(card, adapter, draft, progress)
        folder = folder_of(card, progress=progress)
    try:
        lm = _load_folder(card, folder, dtype, fuse, shard)
    except (ConfigError, WeightsError, TokenizerError) as error:
        if card.path is not None:
            raise
        raise type(error)(
            f"{error}. If its files are damaged: `minicpm-mlx rm {card.name}`, then "
            f"`minicpm-mlx pull {card.name}`"
        ) from None
    if adapter is not None:
        lm.use_adapter(adapter)
    if draft is not None:
        lm.draft = load(draft, dtype=dtype, device=device, progress=progress, source=source)
    return lm


def _check_options(
    dtype: str | mx.Dtype | None, adapter: str | Path | None, draft: str | Path | None
) -> None:
    """Raises what can be known before anything is downloaded or loaded."""
    if dtype is not None:
        devices.as_dtype(dtype)
    if adapter is not None:
        find_adapter(Path(adapter).expanduser())
    if draft is not None and (kept := kept_folder(resolve(str(draft)))):
        Config.load(kept)


def _check_fit(
    card: Card, adapter: str | Path | None, draft: str | Path | None, progress: bool
) -> None:
    """Refuses an adapter or a draft of another kind of model before weights are downloaded."""
    if adapter is not None:
        config = Config.load(text_folder_of(card, progress=progress))
        locate_deltas(Model(config), load_adapter(adapter, config, card))  # makes no weights
    if draft is not None:
        other = resolve(str(draft))
        probe = "The quick brown fox, 12345.\n敏捷的棕色狐狸。"
        mine, its = (tokenizer_of(c, text_folder_of(c, progress=progress)) for c in (card, other))
        if mine.vocab_size != its.vocab_size or mine.encode(probe) != its.encode(probe):
            raise InvalidArgumentError(
                f"draft {other.name} has another vocabulary than {card.name}; expected a smaller "
                "model of the same family"
            )


def _load_folder(
    card: Card, folder: Path, dtype: str | mx.Dtype | None, fuse: bool, shard: bool = False
) -> LM:
    # The config first: a model that cannot be should not wait for its tokenizer.
    config = Config.load(folder)
    tokenizer = tokenizer_of(card, folder, config.vocab_size)
    weights = card.file if card.repo else None
    tuning = tuning_for(devices.chip(), model_key(config, folder), devices.mlx_version())
    layout = Layout(wide=tuning.wide, group_size=tuning.group_size)
    with own_kernels(tuning):
        model = load_model(folder, dtype, fuse, weights=weights, shard=shard, layout=layout)
    if isinstance(model, FusedModel):
        model.pace = Pace(most_prefill=tuning.prefill_chunk, draft_costs=tuning.draft_costs)
    stated, shared = card.sampling or read_sampling(folder), shard and collectives.size() > 1
    sampling = _default_sampling(folder, stated)
    thinking = _default_sampling(folder, {**stated, **card.thinking}) if card.thinking else None
    return LM(
        model,
        tokenizer,
        card,
        sampling,
        thinking,
        folder,
        sharded=shared,
        read_adapter=partial(load_adapter, config=config, card=card),
    )


def _default_sampling(folder: Path, stated: Mapping[str, Any]) -> Sampling:
    try:
        return Sampling(**stated)
    except InvalidArgumentError as error:
        raise ConfigError(f"{folder / FILE}: {error}") from None
