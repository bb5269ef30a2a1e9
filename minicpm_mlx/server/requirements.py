"""Packages that the server and its page need besides those of the library.

Modules of the server import them, so check before importing any other.
"""

from __future__ import annotations

from importlib.util import find_spec

from ..errors import MissingPackageError

PACKAGES = ("fastapi", "uvicorn", "prometheus_client", "llguidance")
PAGE_PACKAGES = (*PACKAGES, "gradio")


def has_page() -> bool:
    """Whether the page's packages are installed; imports none."""
    return not _missing(PAGE_PACKAGES)


def check_packages(*, page: bool = False) -> None:
    """MissingPackageError unless all of the server are installed, and with `page` the page's."""
    if missing := _missing(PAGE_PACKAGES if page else PACKAGES):
        what, extra = ("web page", "web") if page else ("server", "serve")
        raise MissingPackageError(
            f"the {what} needs {', '.join(missing)}; "
            f'install with: pip install "minicpm-mlx[{extra}]"'
        )


def _missing(packages: tuple[str, ...]) -> list[str]:
    return [name for name in packages if find_spec(name) is None]
