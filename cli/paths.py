"""Checks of paths and models named on the command line, made while it is parsed.

So a mistake is known before anything is downloaded or loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from minicpm_mlx.errors import FileError, InvalidArgumentError, MiniCPMError
from minicpm_mlx.files.atomic import check_writable

Check = Callable[[Any], object]
"""Raises a MiniCPMError or an OSError for a value that no run can use."""


def checked(check: Check, *, together: bool = False) -> Callable[..., Any]:
    """A typer callback that applies `check` to each value given, or to all `together`.

    Its errors name the option.
    """

    def callback(param: typer.CallbackParam, value: Any) -> Any:
        for one in value if isinstance(value, (list, tuple)) and not together else [value]:
            if one is not None:
                apply(check, one, param)
        return value

    return callback


def apply(check: Check, value: Any, param: typer.CallbackParam) -> None:
    """Calls `check`; whatever it raises becomes an InvalidArgumentError that names the option."""
    name = param.opts[0] if param.param_type_name == "option" else None
    try:
        check(value)
    except InvalidArgumentError as error:
        raise error.called(name) if name else error from None
    except OSError as error:
        raise InvalidArgumentError(f"{value}: {error.strerror or error}", field=name) from None
    except FileError as error:  # begins with the path
        raise InvalidArgumentError(str(error), field=name) from None
    except MiniCPMError as error:
        raise InvalidArgumentError(f"{name}: {error}" if name else str(error)) from None


def input_file(path: Path) -> None:
    """A file that can be read; or a pipe, which is left unread."""
    if path.is_dir():
        raise InvalidArgumentError(f"{path}: expected a file, found a folder")
    if not path.exists():
        path.stat()  # raises why
    if path.is_file():
        path.open("rb").close()


def input_text(path: Path) -> None:
    """A file, or - for standard input."""
    if str(path) != "-":
        input_file(path)


def input_folder(path: Path) -> None:
    """A folder that can be listed."""
    if not path.is_dir():
        found = "a file" if path.exists() else "none"
        raise InvalidArgumentError(f"{path}: expected a folder, found {found}")
    next(path.iterdir(), None)


def input_path(path: Path) -> None:
    """A file or a folder."""
    (input_folder if path.is_dir() else input_file)(path)


def new_path(path: Path) -> None:
    """A file or folder that does not exist, in a folder that does and may be written to."""
    if path.exists() or path.is_symlink():
        raise InvalidArgumentError(f"'{path}' exists; give a name that does not")
    if not path.parent.is_dir():
        raise InvalidArgumentError(f"'{path.parent}' is no folder; make it first")
    check_writable(path, "give another place")


def new_folder(path: Path) -> None:
    """A folder that does not exist, under a name that is not a file's."""
    if path.suffix.lower() == ".gguf":
        raise InvalidArgumentError(
            f"{path}: a folder is written, not a GGUF file; give another name (`convert` writes "
            ".gguf files)"
        )
    new_path(path)


def output_folder(path: Path) -> None:
    """A folder to write to; it is made if it does not exist."""
    if path.exists() and not path.is_dir():
        raise InvalidArgumentError(f"{path} is a file; give a folder")
    check_writable(path / "new" if path.is_dir() else path, "give another folder")


def some_text(text: str) -> None:
    if not text:
        raise InvalidArgumentError("must not be empty")


def adapter_folder(path: str | Path) -> None:
    """A folder with the files of an adapter."""
    from minicpm_mlx.weights.adapters import find_adapter

    find_adapter(Path(path).expanduser())


def model_name(name: str) -> None:
    """A card, a repository, or a folder or file that exists; its config if it is on this disk."""
    from minicpm_mlx.loading.store import kept_folder
    from minicpm_mlx.model.config import Config
    from minicpm_mlx.model_cards import resolve

    if (folder := kept_folder(resolve(name))) is not None:
        Config.load(folder)
