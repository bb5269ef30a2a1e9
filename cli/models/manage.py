"""`minicpm-mlx pull`, `list`, `show` and `rm`: models on this disk."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import typer

from minicpm_mlx.errors import InvalidArgumentError, MiniCPMError, ModelNotFoundError
from minicpm_mlx.loading import download as hub
from minicpm_mlx.loading.store import folder_of, kept_copies, kept_folder, made_folders
from minicpm_mlx.model_cards import GENERATIONS, Card, cards, resolve

from .. import options, paths
from ..render.texts import Texts, size_text
from ..render.theme import console
from ..render.wrap import Wrapped
from ..streams import confirm, print_json
from .tuning import tune_new

GB = 1e9
SIZES = ("download_bytes", "kept_bytes")
"""Columns of `list`."""
HEADERS = {
    "download_bytes": ("download", "下载"),
    "kept_bytes": ("here", "本机"),
    "memory_bytes": ("memory", "内存"),
}
"""Their names in English and Chinese."""
INTERNAL = ("offer", "shape", "width", "note_zh")
"""What `show` prints in JSON alone."""
Name = Annotated[str, typer.Argument(help="Card, folder or hub repository.")]


def pull(
    model: Annotated[
        str,
        typer.Argument(help="Card or hub repository.", callback=paths.checked(paths.model_name)),
    ],
) -> None:
    """Download a model for use offline; quantize it if its card says so."""
    card = resolve(model)
    tune_new(model)
    print(folder_of(card))
    if card.bits is not None and (size := hub.cached_size(str(card.repo))):
        print(
            f"the original download is kept ({size / GB:.1f} GB); "
            f"`minicpm-mlx rm --download {card.name}` deletes only that",
            file=sys.stderr,
        )


def list_models(
    here: Annotated[
        bool, typer.Option("--here", help="Only what is on this disk, with the memory it takes.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON array.")] = False,
) -> None:
    """List the cards by generation, and the models on this disk."""
    rows = [*_card_rows(), *_copy_rows()]
    if here:
        rows = [row for row in rows if row["kept_bytes"] is not None]
        for row in rows:
            card = Card(name=row["name"], path=row["folder"], context=row.get("context"))
            row["memory_bytes"] = _memory(card)
    if as_json:
        print_json(rows)
        return
    _print_table(rows, (*SIZES, "memory_bytes") if here else SIZES)


def _print_table(rows: list[dict[str, Any]], sizes: tuple[str, ...]) -> None:
    """Print rows under the name of their generation; at a terminal in the user's language."""
    from rich.table import Table

    texts = Texts(None if sys.stdout.isatty() else "en")
    if not rows:
        console(stderr=True).print(texts("none_here"), style="quiet")
        return
    table = Table(box=None, pad_edge=False, header_style="title")
    table.add_column(texts.pick("name", "名称"), overflow="fold")
    for key in sizes:
        table.add_column(texts.pick(*HEADERS[key]), justify="right", no_wrap=True, min_width=7)
    table.add_column(texts.pick("what it is", "说明"), style="quiet")
    for generation, group in groupby(rows, lambda row: row["generation"]):
        if console().is_terminal:  # in a pipe each line is a model
            others = texts.pick("others on this disk", "本机的其他模型")
            title = texts.pick("other", "其他") if generation == "other" else generation
            table.add_row(title or others, style="title")
        for row in group:
            shown = ("" if row[key] is None else _shown(row[key]) for key in sizes)
            note = Wrapped(texts.pick(row["note"], row["note_zh"]))
            table.add_row(row["name"], *shown, note)
    console().print(table)


def _memory(card: Card) -> int | None:
    """Bytes of memory for a conversation; None where they cannot be told."""
    from minicpm_mlx.bench.forecast import memory_needed

    with suppress(MiniCPMError):
        if needed := memory_needed(card):
            return needed.total
    return None


def _card_rows() -> Iterator[dict[str, Any]]:
    for card in sorted(cards().values(), key=lambda card: GENERATIONS.index(card.generation)):
        folder = kept_folder(card)
        yield {
            "name": card.name,
            "kind": "card",
            "download_bytes": None if card.size_gb is None else round(card.size_gb * GB),
            "kept_bytes": None if folder is None else _bytes(folder),
            "folder": folder,
            "repo": card.repo,
            "generation": card.generation,
            "languages": card.languages,
            "context": card.context,
            "licence": card.licence,
            "template": card.template,
            "shape": card.shape,
            "sampling": card.sampling,
            "thinking": card.thinking,
            "note": card.note,
            "note_zh": card.note_zh,
        }


def _copy_rows() -> Iterator[dict[str, Any]]:
    """Rows of no card: repositories, copies of .gguf files, of earlier versions, unfinished."""
    shown = [kept_folder(card) for card in cards().values()]
    for repo, folder in hub.kept_repositories():
        if folder not in shown and _is_model(folder):
            yield _row(repo, "repository", folder)
    for copy in kept_copies():
        if copy.folder in shown:
            continue
        gone = copy.source is not None and not copy.source.exists()
        row = _row(copy.name, copy.kind, copy.folder)
        if gone:
            row["note"] += ", which is gone"
            row["note_zh"] += "，原文件已不在"
        yield row


def _row(name: str, kind: str, folder: Path) -> dict[str, Any]:
    return {
        "name": name,
        "kind": kind,
        "download_bytes": None,
        "kept_bytes": _bytes(folder),
        "folder": folder,
        "generation": "",
        "note": NOTES[kind][0],
        "note_zh": NOTES[kind][1],
    }


def _is_model(folder: Path) -> bool:
    """Whether a folder of the hub's cache, which other programs fill too, can be loaded."""
    from minicpm_mlx.model.config import Config

    with suppress(MiniCPMError):
        Config.load(folder)
        return True
    return False


NOTES = {
    "repository": ("a downloaded repository", "下载的仓库"),
    "converted": ("a copy converted from a GGUF file", "由 GGUF 文件转换的副本"),
    "quantized": ("a quantized copy", "量化的副本"),
    "unfinished": ("an unfinished copy", "未完成的副本"),
}
"""By kind, in English and Chinese."""


def show(model: Name, as_json: options.Json = False) -> None:
    """Show a model's card and, if it is on this disk, its configuration."""
    from minicpm_mlx import memory
    from minicpm_mlx.model.config import Config
    from minicpm_mlx.quantization.report import read_report, summary

    card = resolve(model)
    folder = kept_folder(card)
    if folder is None and all(card.repo != known.repo for known in cards().values()):
        raise ModelNotFoundError(
            f"{card.name} is not downloaded, and no card describes it; "
            f"`minicpm-mlx pull {model}` gets it"
        )
    facts = _given(asdict(card))
    if size := facts.pop("size_gb", None):
        facts["download_bytes"] = round(size * GB)
    if needed := _memory(card):
        facts["memory_bytes"] = needed
    facts["folder"], receipt = folder, None
    if folder is not None and folder.is_dir():
        config = Config.load(folder)
        facts["kept_bytes"] = _bytes(folder)
        facts |= _given(asdict(config))
        if not config.num_experts:
            del facts["num_experts"], facts["num_experts_per_tok"]
        facts["context_length"] = config.context_length
        if cost := memory.dense_attention(config):
            facts["dense_attention"] = cost if as_json else Texts()("dense", **cost)
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

    if card.note:
        texts = Texts(None if sys.stdout.isatty() else "en")
        facts["note"] = texts.pick(card.note, card.note_zh)
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="title", no_wrap=True)
    table.add_column()
    for key, value in {**facts, **({} if receipt is None else summary(receipt))}.items():
        if key in INTERNAL:
            continue
        if key in ("thinking", "languages"):
            pairs = [f"{k} {v}" for k, v in value.items()] if isinstance(value, dict) else value
            table.add_row(key, ", ".join(pairs))
        elif not isinstance(value, (dict, tuple, list)) or key in ("eos", "eos_token_ids"):
            missing = "not downloaded" if card.repo else "not converted yet"
            shown = _shown(value) if key.endswith("_bytes") else str(value)
            shown = missing if value is None else shown
            table.add_row(key.removesuffix("_bytes"), Wrapped(shown) if key == "note" else shown)
    console().print(table)


def remove(
    model: Annotated[str, typer.Argument(help="Card, hub repository, or a copy's name in `list`.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    download: Annotated[bool, typer.Option("--download", help="Delete only the download.")] = False,
) -> None:
    """Delete a model from this disk: the download and everything converted from it."""
    named = [
        copy.folder
        for copy in kept_copies()
        if model == copy.folder.name or (copy.model is None and model == copy.name)
    ]
    card = _card_of_copy(model, named) or resolve(model)
    made = [] if download else named or made_folders(card)
    if card.path is not None and not made:  # of a .gguf file there may be a converted copy
        raise InvalidArgumentError(f"{card.path} is your own; delete it yourself")
    size = sum(map(_bytes, made)) + (hub.cached_size(card.repo, card.tag) if card.repo else 0)
    if not size and not made:
        what = "the download of " if download else ""
        raise ModelNotFoundError(f"{what}{card.name} is not on this disk; nothing to delete")
    if not yes and not confirm(f"Delete {card.name} ({_shown(size)})?"):
        print("nothing deleted", file=sys.stderr)
        raise typer.Exit(1)
    for path in made:
        shutil.rmtree(path)
    if card.repo:
        hub.remove(card.repo, card.tag)
    print(f"{card.name}: {_shown(size)} freed")


def _card_of_copy(model: str, named: list[Path]) -> Card | None:
    """A card for a copy in `named`, or for one of a .gguf file that is gone."""
    path = Path(model).expanduser().absolute()
    if named:
        return Card(name=model, path=path)
    if path.suffix.lower() != ".gguf" or path.exists():
        return None
    gone = Card(name=path.stem, path=path)
    return gone if made_folders(gone) else None


def _given(values: dict[str, Any]) -> dict[str, Any]:
    """Those that say something; 0 and false do."""
    return {key: value for key, value in values.items() if value not in (None, (), "", {})}


def _shown(size: int) -> str:
    return f"{size / GB:.1f} GB" if size >= 5e7 else size_text(size)


def _bytes(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())
