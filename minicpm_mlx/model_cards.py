"""Model cards: resolves `--model` to a card of models/*.toml, a folder or a hub repository."""

import difflib
import importlib
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any

from .arguments import printable
from .errors import ConfigError, ModelNotFoundError

_TEMPLATES = ("minicpm", "chatml")
_SAMPLING = ("temperature", "top_p", "top_k", "repetition_penalty")
_FORM = re.compile("-(MLX|GPTQ|AWQ|AutoAWQ|GGUF)$", re.IGNORECASE)
"""How the name of a repository ends that holds a published model quantized."""
GENERATIONS = ("MiniCPM5", "MiniCPM4.1", "MiniCPM4", "MiniCPM3", "MiniCPM", "other")
"""In the order that lists show them; "MiniCPM" is 1.0."""
_REPO = re.compile(
    r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?(:(?P<tag>[\w.-]+))?", re.ASCII
)


@dataclass(frozen=True, kw_only=True)
class Card:
    """One checkpoint: where it lies and how it wants to be talked to.

    Exactly one of `repo`, `package` and `path` is set. A value that is None or empty is read from
    the checkpoint's own files.
    """

    name: str
    """The card's name, which is its file's; for a folder, file or repository, that."""
    repo: str | None = None
    """Hub repository, `org/name`."""
    revision: str = "main"
    """Branch, tag or commit of `repo`."""
    package: str | None = None
    """Installed pip package that carries the weights."""
    file: str | None = None
    """The weights inside `package`, or in `repo` where they have no standard name."""
    tag: str | None = None
    """File of `repo` that is taken, if it holds .gguf files: its type, such as Q4_K_M, or name."""
    bits: int | None = None
    """Quantize to this many bits once after the download and keep that; None: use as it is."""
    group_size: int | None = None
    """Weights that share a scale; goes with `bits`."""
    method: str | None = None
    """`exact`: those bits hold ternary weights, 2 each, unchanged; None: method mixed."""
    template: str | None = None
    """`minicpm` or `chatml`; None: the checkpoint's own."""
    eos: tuple[int, ...] = ()
    """Token ids that end a reply; empty: the checkpoint's own."""
    context: int | None = None
    """Longest prompt and reply together, in tokens."""
    temperature: float | None = None
    """Default sampling temperature."""
    top_p: float | None = None
    """Default nucleus, in (0, 1]."""
    top_k: int | None = None
    """Default number of candidates."""
    repetition_penalty: float | None = None
    """Default penalty on tokens already seen; 1 is none."""
    thinking: dict[str, float] = field(default_factory=dict, hash=False)
    """Sampling when the model thinks before it answers, under the same names; empty: no other."""
    licence: str = ""
    """Licence of the weights, as published."""
    size_gb: float | None = None
    """Download, in 10⁹ bytes, computed from parameters and their width."""
    width: float | None = None
    """Bytes of a weight in the download, 0.5625 for 4 bits in groups of 64, 0.625 in groups of 32;
    None: 2, or unknown."""
    generation: str = "other"
    """One of GENERATIONS."""
    languages: tuple[str, ...] = ()
    """Codes of the languages it was trained for: "en", "zh"."""
    shape: str | None = None
    """The shape in `bench/shapes.py` that tells its memory and speed before the download."""
    offer: int | None = None
    """Place in the list that `chat` shows where no model is on this disk; None: not in it."""
    note: str = ""
    """Description in one line."""
    note_zh: str = ""
    """The same in Chinese."""
    path: Path | None = None
    """Local folder or .gguf file, where this is no card."""

    @property
    def sampling(self) -> dict[str, float]:
        """The sampling it states, under generation_config.json's names."""
        return {name: value for name in _SAMPLING if (value := getattr(self, name)) is not None}

    def __post_init__(self) -> None:
        for key, rule in _RULES.items():
            _check(key, getattr(self, key), rule)
        for key, value in self.thinking.items():
            if key not in _SAMPLING:
                raise ConfigError(
                    f"unknown key thinking.{key}; expected some of {', '.join(_SAMPLING)}"
                )
            _check(f"thinking.{key}", value, _RULES[key])
        if sum(source is not None for source in (self.repo, self.package, self.path)) != 1:
            raise ConfigError("expected one of repo, package and path")
        if self.package and not self.file:
            raise ConfigError("package needs file, the weights inside it")
        if (self.bits is None) != (self.group_size is None):
            raise ConfigError("bits and group_size go together")
        if self.method == "exact" and self.bits not in (2, None):
            raise ConfigError("method exact takes 2 bits")


_Rule = tuple[type | tuple[type, ...], str, Any]
_TEXT: _Rule = (str, "text", lambda v: True)
_COUNT: _Rule = (int, "a positive whole number", lambda v: v > 0)
_RULES: dict[str, _Rule] = {
    "name": (str, "a name", bool),
    "repo": (str, "org/name", lambda v: _REPO.fullmatch(v) and not {"@", ":"} & set(v)),
    "revision": (str, "a branch, tag or commit", bool),
    "package": (str, "a pip package", bool),
    "file": (str, "a relative path", lambda v: v and not {"", ".."} & set(v.split("/"))),
    "tag": (str, "a type such as Q4_K_M, or a file's name", lambda v: v and "/" not in v),
    "bits": (int, "2, 3, 4, 5, 6 or 8", lambda v: v in (2, 3, 4, 5, 6, 8)),
    "group_size": (int, "32, 64 or 128", lambda v: v in (32, 64, 128)),
    "method": (str, "exact", lambda v: v == "exact"),
    "template": (str, " or ".join(_TEMPLATES), lambda v: v in _TEMPLATES),
    "eos": (tuple, "a list of token ids", lambda v: all(type(i) is int and i >= 0 for i in v)),
    "context": _COUNT,
    "temperature": ((int, float), "between 0 and 100", lambda v: 0 <= v <= 100),
    "top_p": ((int, float), "more than 0 and at most 1", lambda v: 0 < v <= 1),
    "top_k": _COUNT,
    "repetition_penalty": ((int, float), "over 0.01, to 100", lambda v: 0.01 < v <= 100),
    "thinking": (dict, "a table of sampling settings", lambda v: True),
    "licence": _TEXT,
    "size_gb": ((int, float), "more than 0", lambda v: v > 0),
    "width": ((int, float), "4, 2, 0.625 or 0.5625", lambda v: v in (4, 2, 0.625, 0.5625)),
    "generation": (str, " or ".join(GENERATIONS), lambda v: v in GENERATIONS),
    "languages": (tuple, "a list of codes, such as en", lambda v: all(map(_is_language, v))),
    "shape": (str, "a shape of the benchmarks", bool),
    "offer": _COUNT,
    "note": _TEXT,
    "note_zh": _TEXT,
    "path": (Path, "a path", lambda v: True),
}
_REQUIRED = {each.name for each in fields(Card) if each.default is not None}


def _is_language(code: object) -> bool:
    return isinstance(code, str) and re.fullmatch("[a-z]{2,3}", code) is not None


def _check(key: str, value: object, rule: _Rule) -> None:
    kind, expected, valid = rule
    if value is None and key not in _REQUIRED:
        return
    if not isinstance(value, kind) or isinstance(value, bool) or not valid(value):
        raise ConfigError(f"expected {expected} for {key}, found {value!r}")


@cache
def cards() -> Mapping[str, Card]:
    """Every card, by name and in the order of names; ConfigError names a faulty file and key."""
    found = [
        _parse(file.name.removesuffix(".toml"), file.read_text(encoding="utf-8"))
        for file in resources.files("minicpm_mlx.models").iterdir()
        if file.name.endswith(".toml")
    ]
    return MappingProxyType({card.name: card for card in sorted(found, key=lambda c: c.name)})


def _parse(name: str, text: str) -> Card:
    toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    try:
        values = toml.loads(text)
    except toml.TOMLDecodeError as error:
        raise ConfigError(f"models/{name}.toml: expected TOML, found: {error}") from error
    # A card's name is its file's, and a path belongs to no card.
    if unknown := sorted(values.keys() - _RULES.keys() | values.keys() & {"name", "path"}):
        known = ", ".join(sorted(_RULES.keys() - {"name", "path"}))
        raise ConfigError(f"models/{name}.toml: unknown key {unknown[0]}; expected some of {known}")
    for key in ("eos", "languages"):
        if isinstance(values.get(key), list):
            values[key] = tuple(values[key])
    try:
        return Card(name=name, **values)
    except ConfigError as error:
        raise ConfigError(f"models/{name}.toml: {error}") from error


def resolve(name_or_path: str) -> Card:
    """The card of what a user typed: a card's name, else a path, else
    `org/name[@revision][:tag]`.

    A card wins over a folder of its name (write `./name` for the folder), and an existing path
    wins over a repository. A repository that has a card keeps its template and sampling, without
    the quantization. Nothing is downloaded. Raises ModelNotFoundError.

        >>> resolve("MiniCPM_2B_dpo").bits
        4
    """
    wanted = name_or_path.strip()
    name = wanted.lower().replace("_", "-")
    if name in cards():
        return cards()[name]
    if local := _local(wanted):
        return local
    if match := _REPO.fullmatch(wanted):
        return _repository(match["repo"], match["revision"], match["tag"])
    near = difflib.get_close_matches(name, cards(), n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise ModelNotFoundError(
        f"no model named {wanted!r}; {hint}`minicpm-mlx list` shows the names, "
        "and a folder or a hub repository (org/name) will do"
    )


def _local(wanted: str) -> Card | None:
    """The card of an existing path; None if this is no path at all."""
    try:
        path = Path(wanted).expanduser()
        if wanted and path.is_dir():
            return _folder_card(path.resolve())
        if path.is_file():
            if path.suffix.lower() != ".gguf":
                raise ModelNotFoundError(
                    f"expected a model folder, found the file {path}; give the folder that holds it"
                )
            # Not resolve(): the hub's cache links x.gguf to a blob whose name has no suffix.
            return Card(name=path.stem, path=path.absolute())
    except (OSError, RuntimeError, ValueError):  # too long a name, no such ~user, a null byte
        pass
    deep = wanted.partition("@")[0].count("/") > 1  # a revision may hold slashes
    is_file = wanted.endswith(".gguf") and ":" not in wanted  # or the tag of a repository
    if deep or wanted.startswith((".", "/", "~")) or is_file:
        raise ModelNotFoundError(
            f"no folder or file {wanted}; check the path, or see `minicpm-mlx list` for names"
        )
    return None


def _folder_card(folder: Path) -> Card:
    """The card of a folder: of the model in it, or of the one .gguf file or snapshot it holds."""
    if (hub := _hub_repository(folder)) is not None:
        card = _repository(hub.name.removeprefix("models--").replace("--", "/", 1))
        inside = _folder_card(_snapshot(hub, card.name))
        is_file = inside.path is not None and inside.path.is_file()
        return inside if is_file else replace(card, repo=None, path=inside.path)
    names = sorted(path.name for path in folder.iterdir())
    adapters = [name for name in names if name in _ADAPTER_FILES]
    weights = (".safetensors", ".bin", ".index.json")
    if any(name.endswith(weights) and name not in adapters for name in names):
        return Card(name=folder.name or str(folder), path=folder)
    if gguf := [name for name in names if name.lower().endswith(".gguf")]:
        if len(gguf) > 1:
            raise ModelNotFoundError(
                f"{folder} holds {len(gguf)} .gguf files; give one of them: "
                f"{', '.join(map(printable, gguf[:8]))}"
            )
        return Card(name=Path(gguf[0]).stem, path=folder / gguf[0])
    if adapters:
        raise ModelNotFoundError(
            f"{folder} is an adapter, not a model; give it as --adapter, and as --model the model "
            "that it was trained on"
        )
    models = [name for name in names if (folder / name / "config.json").is_file()]
    if models and "config.json" not in names:
        raise ModelNotFoundError(
            f"{folder} is no model folder; give the one inside it: "
            f"{', '.join(map(printable, models[:8]))}"
        )
    return Card(name=folder.name or str(folder), path=folder)


_ADAPTER_FILES = (
    "adapter_config.json",
    "adapter_model.bin",
    "adapter_model.safetensors",
    "adapters.safetensors",
)


def _hub_repository(folder: Path) -> Path | None:
    """The folder of a repository in the hub's cache, if this is one or its snapshots."""
    root = folder.parent if folder.name == "snapshots" else folder
    is_repository = root.name.startswith("models--") and (root / "snapshots").is_dir()
    return root if is_repository else None


def _snapshot(root: Path, name: str) -> Path:
    """The snapshot that `main` names, or else the latest of a repository in the hub's cache."""
    snapshots = [path for path in (root / "snapshots").iterdir() if path.is_dir()]
    if (ref := root / "refs" / "main").is_file():
        main = ref.read_text(encoding="utf-8").strip()
        snapshots = [path for path in snapshots if path.name == main] or snapshots
    if not snapshots:
        raise ModelNotFoundError(
            f"{root} holds no snapshot of {name}; its download broke off: `minicpm-mlx pull {name}`"
        )
    return max(snapshots, key=lambda path: path.stat().st_mtime)


def _repository(repo: str, revision: str | None = None, tag: str | None = None) -> Card:
    known = _cards_of(repo)
    if known:
        card = min(known, key=lambda c: c.bits is not None)  # the unquantized card, if there is one
        revision = revision or card.revision
        card = replace(
            card, name=str(card.repo), revision=revision, bits=None, group_size=None, tag=None
        )
    else:
        card = Card(name=repo, repo=repo, revision=revision or "main")
        siblings = _cards_of(_FORM.sub("", repo))
        card = _as_sibling(card, siblings[0]) if siblings else card
    if tag is None:
        return card
    at = "" if card.revision == "main" else f"@{card.revision}"
    return replace(card, name=f"{card.repo}{at}:{tag}", tag=tag)


def _cards_of(repo: str) -> list[Card]:
    return [card for card in cards().values() if card.repo and card.repo.lower() == repo.lower()]


def _as_sibling(card: Card, sibling: Card) -> Card:
    """`card` as the same model in other numbers; its size and form are its own."""
    kept = ("template", "eos", "context", "licence", "generation", "languages", "shape", "thinking")
    return replace(card, **{name: getattr(sibling, name) for name in (*kept, *_SAMPLING)})


def cache_dir() -> Path:
    """Where this library keeps what it can make again: $MINICPM_MLX_HOME, else the system's cache
    folder.

    Downloads are in the hub's own cache (`loading/download/`), quantized copies and the KV caches
    of sessions here. The folder may not exist yet.
    """
    return _folder("Caches", "XDG_CACHE_HOME", ".cache")


def data_dir() -> Path:
    """Where conversations and input history are kept: $MINICPM_MLX_HOME, else the system's folder
    of the user's data. The folder may not exist yet."""
    return _folder("Application Support", "XDG_DATA_HOME", ".local/share")


def _folder(mac: str, variable: str, default: str) -> Path:
    if home := os.environ.get("MINICPM_MLX_HOME"):
        return Path(home).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / mac / "minicpm-mlx"
    base = Path(os.environ.get(variable) or "").expanduser()
    # The specification of these variables has relative paths ignored.
    return (base if base.is_absolute() else Path.home() / default) / "minicpm-mlx"
