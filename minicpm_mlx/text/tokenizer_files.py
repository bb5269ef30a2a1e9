"""The small files beside a tokenizer, all optional; each value is checked as it is read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from ..arguments import json_number
from ..errors import TokenizerError
from ..files.lfs import FOUND, is_pointer

T = TypeVar("T")


NAMED = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
"""Keys by which configs name tokens."""

BOM = "\ufeff"
"""Some editors write it at the beginning of a file."""


class TokenizerFiles:
    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise TokenizerError(f"{folder} must be a model folder, found no folder there")
        self.folder = folder
        self._tokenizer = self._json("tokenizer_config.json")
        self._special = self._json("special_tokens_map.json")
        self._older = self._json("added_tokens.json")
        self._generation = self._json("generation_config.json")
        self._model = self._json("config.json")

    def token(self, key: str) -> str | None:
        """A token of NAMED, stated as text or as an object with content."""
        for config in (self._tokenizer, self._special):
            if token := self._token(key, config.get(key)):
                return token
        return None

    @property
    def additional_tokens(self) -> list[str]:
        """Further tokens that the configs call special."""
        key = "additional_special_tokens"
        for config in (self._tokenizer, self._special):
            values = self._checked(key, config.get(key), list) or []
            if tokens := [token for value in values if (token := self._token(key, value))]:
                return tokens
        return []

    @property
    def special_tokens(self) -> list[str]:
        """All tokens that the configs call special."""
        return [*filter(None, map(self.token, NAMED)), *self.additional_tokens]

    def ids(self, key: str) -> list[int]:
        """`bos_token_id` or `eos_token_id`, one id or several, of both model configs."""
        ids: list[int] = []
        for config in (self._generation, self._model):
            value = config.get(key)
            several = value if isinstance(value, list) else [] if value is None else [value]
            several = [json_number(i) for i in several]
            if not all(map(_is_id, several)):
                raise self.wrong(key, "a token id or a list of them", value)
            ids += several
        return ids

    @property
    def adds_bos(self) -> bool | None:
        """Whether bos leads every text; None if only the tokenizer itself can tell."""
        return self._checked("add_bos_token", self._tokenizer.get("add_bos_token"), bool)

    @property
    def added_tokens(self) -> dict[int, dict[str, Any]]:
        """Tokens that the tokenizer file may lack, by ascending id.

        Older folders have them in added_tokens.json, which states no more than their ids.
        """
        special = self.special_tokens
        ids = {token: json_number(i) for token, i in self._older.items()}
        if not all(map(_is_id, ids.values())):
            raise self.wrong("added_tokens.json", "an object of ids by token", self._older)
        older = {
            i: {"content": token, "normalized": False, "special": token in special}
            for token, i in ids.items()
            if token
        }
        key = "added_tokens_decoder"
        tokens = self._checked(key, self._tokenizer.get(key), dict) or {}
        for i, token in tokens.items():
            content = token.get("content") if isinstance(token, dict) else None
            if not (i.isdecimal() and isinstance(content, str)):
                raise self.wrong(key, "an object of tokens by id", {i: token})
        return dict(sorted((older | {int(i): token for i, token in tokens.items()}).items()))

    @property
    def chat_template(self) -> str | None:
        """The template's source; of several in a list, the one named default."""
        path = self.folder / "chat_template.jinja"
        if path.exists():
            if is_pointer(path):
                raise TokenizerError(f"{path} is {FOUND}")
            with refusing(path, "is not text"):
                return path.read_text(encoding="utf-8").removeprefix(BOM)
        key, value = "chat_template", self._tokenizer.get("chat_template")
        if isinstance(value, list):
            if not all(isinstance(entry, dict) for entry in value):
                raise self.wrong(key, "a str, or a list of objects with name and template", value)
            default = [entry.get("template") for entry in value if entry.get("name") == "default"]
            value = default[0] if default else None
        source = self._checked(key, value, str)
        return None if source is None else source.removeprefix(BOM)

    @property
    def is_minicpm(self) -> bool | None:
        """Whether config.json names the family; None without a config.json."""
        names = f"{self._model.get('model_type')} {self._model.get('architectures')}"
        return "minicpm" in names.lower() if self._model else None

    def wrong(self, key: str, expected: str, value: object) -> TokenizerError:
        return TokenizerError(
            f"{self.folder}: {key} must be {expected}, found {short(value)}; "
            "correct the folder's JSON files or download them again"
        )

    def _token(self, key: str, value: object) -> str | None:
        return self._checked(key, value.get("content") if isinstance(value, dict) else value, str)

    def _checked(self, key: str, value: object, kind: type[T]) -> T | None:
        if value is None or isinstance(value, kind):
            return value
        raise self.wrong(key, f"of type {kind.__name__}", value)

    def _json(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        if not path.exists():
            return {}
        with refusing(path, "is not a JSON object"):
            value = json.loads(path.read_text(encoding="utf-8").removeprefix(BOM))
            if not isinstance(value, dict):
                raise ValueError(f"found {short(value)}")
        return value


def _is_id(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**32


@contextmanager
def refusing(what: object, problem: str) -> Iterator[None]:
    """Turn any exception inside into a TokenizerError of one line."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # a panic in Rust is no Exception
        if isinstance(what, Path) and is_pointer(what):
            raise TokenizerError(f"{what} is {FOUND}") from None
        raise TokenizerError(
            f"{what} {problem} ({short(error)}); download the model again"
        ) from error


def short(value: object) -> str:
    text = " ".join(str(value).encode(errors="replace").decode().split()) or type(value).__name__
    return text if len(text) <= 120 else f"{text[:119]}…"
