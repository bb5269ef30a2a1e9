"""Files that accompany a model's weights: tokenizer, template, end tokens, licence, README."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from ..errors import TemplateError
from ..model_cards import Card
from ..text.chat_template import BUILTIN, Template
from ..text.tokenizer import load_tokenizer
from ..text.tokenizer_files import TokenizerFiles
from .checkpoint import write_json
from .generation_config import FILE, SAMPLED

TOKENIZER_FILES = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json"),
    *("generation_config.json", "*.jinja"),
)
"""Files that readers of the weights need."""

DOCUMENTS = ("README*", "LICENSE*", "NOTICE*")
"""Files for people, copied if they are at most MAX_DOCUMENT bytes long."""

MAX_DOCUMENT = 1 << 20

REPORT_FILE = "receipt.json"
"""Report of a quantized folder, whose README.md is then about those weights and not copied."""

CODE = "*_minicpm.py"
"""The reference implementation, which the auto_map of a config.json names. Never run here."""


def copy_companion_files(
    source: Path,
    folder: Path,
    card: Card | None = None,
    *,
    code: bool = True,
    for_mlx_lm: bool = False,
) -> None:
    """Copy everything but the weights of the checkpoint in `source` to `folder`.

    The template, end tokens and sampling that this library would use are written where other
    programs look for them, even if only the card states them.
    """
    documents = [path for pattern in DOCUMENTS for path in source.glob(pattern)]
    if (source / REPORT_FILE).exists():
        documents = [path for path in documents if path.name != "README.md"]
    documents += source.glob(CODE) if code else []
    for path in (path for pattern in TOKENIZER_FILES for path in source.glob(pattern)):
        shutil.copyfile(path, folder / path.name)
    for path in documents:
        if path.is_file() and path.stat().st_size <= MAX_DOCUMENT:
            shutil.copyfile(path, folder / path.name)
    _write_template(source, folder, card, with_bos=for_mlx_lm)
    _write_eos(folder, card)
    _write_sampling(folder, card)
    if for_mlx_lm and (folder / "tokenizer.json").exists():
        # Under the name of LlamaTokenizer, transformers 5 builds another: " a" loses its space.
        _update(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})


def _write_template(source: Path, folder: Path, card: Card | None, *, with_bos: bool) -> None:
    """Write the template that this library would use to tokenizer_config.json.

    `with_bos` puts the bos token in front of it, since mlx-lm adds none to a chat.
    """
    if not any((source / name).exists() for name in ("tokenizer.json", "tokenizer.model")):
        return
    tokenizer = load_tokenizer(source)
    template = tokenizer.template
    if card and card.template:
        template = Template(BUILTIN[card.template], template.bos_token if template else "")
    if template is None:
        return
    text = template.source
    if with_bos and tokenizer.adds_bos and not _begins_with_bos(template):
        text = "{{ bos_token }}" + text
    if text == TokenizerFiles(source).chat_template:
        return
    (folder / "chat_template.jinja").unlink(missing_ok=True)  # which would be read first
    _update(folder / "tokenizer_config.json", {"chat_template": text})


def _begins_with_bos(template: Template) -> bool:
    try:
        text = template.render([{"role": "user", "content": "x"}])
    except TemplateError:
        return True  # a broken template is copied as it is
    return bool(template.bos_token) and text.startswith(template.bos_token)


def _write_eos(folder: Path, card: Card | None) -> None:
    if card is None or not card.eos:
        return
    eos = card.eos[0] if len(card.eos) == 1 else list(card.eos)
    for name in ("config.json", "generation_config.json"):
        if (folder / name).exists():
            _update(folder / name, {"eos_token_id": eos})


def _write_sampling(folder: Path, card: Card | None) -> None:
    values = {} if card is None else card.sampling
    if values:
        greedy = values.get("temperature") == 0  # transformers: do_sample false, no temperature
        stated = {name: value for name, value in values.items() if value or not greedy}
        raw = _read(folder / FILE)
        for name in ("repetition_penalty", *SAMPLED):  # a card's sampling replaces the file's
            raw.pop(name, None)
        write_json(folder / FILE, raw | {"do_sample": not greedy} | stated)


def _update(path: Path, values: dict[str, Any]) -> None:
    write_json(path, _read(path) | values)


def _read(path: Path) -> dict[str, Any]:
    raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return raw
