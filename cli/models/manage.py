"""`minicpm-mlx pull`, `list`, `show` and `rm`: models on this disk."""

from __future__ import annotations

import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from minicpm_mlx.errors import InvalidArgumentError, ModelNotFoundError
from minicpm_mlx.loading import download as hub
from minicpm_mlx.loading.store import folder_of, kept_folder, made_folders
from minicpm_mlx.model_cards import cards, resolve

from .. import options
from ..render.theme import console
from ..streams import confirm, print_json

Name = Annotated[str, typer.Argument(help="Card, folder or hub repository.")]


def pull(model: Annotated[str, typer.Argument(help="Card or hub repository.")]) -> None:
    """Download a model for use offline; quantize it if its card says so."""
    card = resolve(model)
    print(folder_of(card))
    if card.bits is not None and (size := hub.cached_size(str(card.repo))):
        print(
            f"the original download is kept ({size / 1e9:.1f} GB); "
            f"`minicpm-mlx rm --download {card.name}` deletes only that",
            file=sys.stderr,
        )


def list_models(as_json: options.Json = False) -> None:
    """List the cards and the models on this disk."""
    rows = [
        {
            "name": card.name,
            "download_gb": card.size_gb,
            "kept_gb": _gigabytes(kept_folder(card)),
            "note": card.note,
            "note_zh": card.note_zh,
        }
        for card in cards().values()
    ]
    if as_json:
        print_json(rows)
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="title")
    table.add_column("name", no_wrap=True)
    table.add_column("download", justify="right", no_wrap=True)
    table.add_column("here", justify="right", no_wrap=True)
    table.add_column("what it is", style="quiet")
    for row in rows:
        here = f"{row['kept_gb']:.1f} GB" if row["kept_gb"] is not None else ""
        size = f"{row['download_gb']} GB" if row["download_gb"] else ""
        table.add_row(str(row["name"]), size, here, str(row["note"]))
    console().print(table)


def show(model: Name, as_json: options.Json = False) -> None:
    """Show a model's card and, if it is on this disk, its configuration."""
    from minicpm_mlx.model.config import Config
    from minicpm_mlx.quantization.report import read_report, summary

    card = resolve(model)
    folder = kept_folder(card)
    if folder is None and all(card.repo != known.repo for known in cards().values()):
        raise ModelNotFoundError(
            f"{card.name} is not downloaded, and no card describes it; "
            f"`minicpm-mlx pull {model}` gets it"
        )
    facts: dict[str, Any] = {key: value for key, value in asdict(card).items() if value}
    facts["folder"], receipt = folder, None
    if folder is not None and folder.is_dir():
        config = Config.load(folder)
        facts["kept_gb"] = _gigabytes(folder)
        facts |= {
            key: value for key, value in asdict(config).items() if value not in (None, (), 0, "")
        }
        if not config.num_experts:
            del facts["num_experts_per_tok"]
        facts["context_length"] = config.context_length
        if config.quantization and not as_json:  # most of them; the receipt has the rest
            packing = config.quantization
            facts["quantization"] = (
                f"{packing.bits} bits, groups of {packing.group_size}, {packing.mode}"
            )
        receipt = read_report(folder)
    if as_json:
        facts |= {} if receipt is None else {"receipt": receipt}
        print_json(facts)
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="title", no_wrap=True)
    table.add_column()
    for key, value in {**facts, **({} if receipt is None else summary(receipt))}.items():
        if not isinstance(value, (dict, tuple, list)) or key in ("eos", "eos_token_ids"):
            missing = "not converted yet" if card.path else "not downloaded"
            table.add_row(key, missing if value is None else str(value))
    console().print(table)


def remove(
    model: Annotated[str, typer.Argument(help="Card or hub repository.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    download: Annotated[bool, typer.Option("--download", help="Delete only the download.")] = False,
) -> None:
    """Delete a model from this disk: the download and everything converted from it."""
    card = resolve(model)
    converted = [] if download else made_folders(card)
    if card.path is not None and not converted:  # of a .gguf file there may be a converted copy
        raise InvalidArgumentError(f"{card.path} is your own; delete it yourself")
    size = sum(map(_bytes, converted)) + (hub.cached_size(card.repo) if card.repo else 0)
    if not size and not converted:
        what = "the download of " if download else ""
        raise ModelNotFoundError(f"{what}{card.name} is not on this disk; nothing to delete")
    if not yes and not confirm(f"Delete {card.name} ({size / 1e9:.1f} GB)?"):
        print("nothing deleted", file=sys.stderr)
        raise typer.Exit(1)
    for path in converted:
        shutil.rmtree(path)
    if card.repo:
        hub.remove(card.repo)
    print(f"{card.name}: {size / 1e9:.1f} GB freed")


def _gigabytes(path: Path | None) -> float | None:
    return None if path is None else round(_bytes(path) / 1e9, 2)


def _bytes(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())
