"""GGUF, llama.cpp's format, read and written."""

from .read import convert_gguf, read_gguf
from .write import KINDS, GgufReport, write_gguf

__all__ = ["KINDS", "GgufReport", "convert_gguf", "read_gguf", "write_gguf"]
