"""Packages that the server needs besides those of the library."""

from __future__ import annotations

from importlib.util import find_spec

from ..errors import MissingPackageError

PACKAGES = ("fastapi", "uvicorn", "prometheus_client", "llguidance")


def check_packages() -> None:
    """MissingPackageError unless all are installed. Call it before importing the server."""
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise MissingPackageError(
            f'the server needs {", ".join(missing)}; install with: pip install "minicpm-mlx[serve]"'
        )
