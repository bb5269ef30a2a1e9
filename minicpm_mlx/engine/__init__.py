"""Token ids in, token ids out."""

from .cache import KVCache
from .generate import LanguageModel, Session, generate
from .sampling import Sampler, Sampling

__all__ = ["KVCache", "LanguageModel", "Sampler", "Sampling", "Session", "generate"]
