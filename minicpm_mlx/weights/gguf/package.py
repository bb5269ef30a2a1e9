"""The door to the `gguf` package: its tables, its slow unpacking, its writer."""

from __future__ import annotations

from types import ModuleType

from ...errors import MissingPackageError


def library() -> ModuleType:
    """The package, which is an extra; MissingPackageError names the pip command."""
    try:
        import gguf
        import gguf.quants
    except ImportError:
        raise MissingPackageError(
            'GGUF files need the gguf package: pip install "minicpm-mlx[gguf]"'
        ) from None
    module: ModuleType = gguf
    return module
