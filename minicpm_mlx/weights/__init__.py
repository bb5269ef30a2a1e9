"""Reading checkpoints; the only place that renames tensors."""

from .load import load_model

__all__ = ["load_model"]
