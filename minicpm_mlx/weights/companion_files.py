"""What goes along with a model's weights: tokenizer, template, end tokens, licence, papers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import TemplateError
from ..model_cards import Card
from ..text.chat_template import BUILTIN, Template
from ..text.tokenizer import load_tokenizer
from ..text.tokenizer_files import TokenizerFiles

BESIDE = ("tokenizer*", "special_tokens_map.json", "generation_config.json", "*.jinja")
"""Files that readers of the weights need."""

PAPERS = ("README*", "LICENSE*", "NOTICE*")
"""Files for people; they go along if they are at most PAPER_SIZE bytes long."""

PAPER_SIZE = 1 << 20

RECEIPT = "receipt.json"
"""Beside which README.md is about those very weights (see quantization/receipt.py)."""

CODE = "*_minicpm.py"
"""The reference implementation, which the auto_map of a config.json names. Never run here."""


def copy_companions(
    source: Path,
    folder: Path,
    card: Card | None = None,
    *,
    code: bool = True,
    for_mlx_lm: bool = False,
) -> None:
    """Copy what belongs to the checkpoint in `source` besides its weights to `folder`.

    The template and the end tokens that this library would use are written down where other
    programs look for them, also where only the card knows them.
    """
    papers = [path for pattern in PAPERS for path in source.glob(pattern)]
    if (source / RECEIPT).exists():
        papers = [path for path in papers if path.name != "README.md"]
    papers += source.glob(CODE) if code else []
    for path in (path for pattern in BESIDE for path in source.glob(pattern)):
        shutil.copyfile(path, folder / path.name)
    for path in papers:
        if path.is_file() and path.stat().st_size <= PAPER_SIZE:
            shutil.copyfile(path, folder / path.name)
    _state_template(source, folder, card, with_bos=for_mlx_lm)
    _state_ends(folder, card)
    _state_sampling(folder, card)
    if for_mlx_lm and (folder / "tokenizer.json").exists():
        # Under the name of LlamaTokenizer, transformers 5 builds another: " a" loses its space.
        _update(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})


def _state_template(source: Path, folder: Path, card: Card | None, *, with_bos: bool) -> None:
    """Write down the template that this library would use, for readers that do not know it.

    `with_bos` lets it begin with the token that leads every text: mlx-lm adds none to a chat.
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
        return True  # not ours to mend
    return bool(template.bos_token) and text.startswith(template.bos_token)


def _state_ends(folder: Path, card: Card | None) -> None:
    """Write the card's end tokens where other programs look for them."""
    if card is None or not card.eos:
        return
    ends = card.eos[0] if len(card.eos) == 1 else list(card.eos)
    for name in ("config.json", "generation_config.json"):
        if (folder / name).exists():
            _update(folder / name, {"eos_token_id": ends})


def _state_sampling(folder: Path, card: Card | None) -> None:
    """Write the card's sampling where other programs look for it."""
    values = {} if card is None else card.sampling
    if values:
        greedy = values.get("temperature") == 0  # which transformers states so
        stated = {name: value for name, value in values.items() if value or not greedy}
        _update(folder / "generation_config.json", {"do_sample": not greedy} | stated)


def _update(path: Path, values: Mapping[str, Any]) -> None:
    raw: dict[str, Any] = {}
    if path.exists():
        raw = json.loads(path.read_text(encoding="utf-8"))
    raw.update(values)
    path.write_text(json.dumps(raw, indent=2, ensure_ascii=False), encoding="utf-8")
