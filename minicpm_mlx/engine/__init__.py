"""Token ids in, token ids out."""

from .cache import KVCache, group_of
from .generate import CHUNK, LanguageModel, Session, generate
from .sampling import Sampler, Sampling

__all__ = [
    "CHUNK",
    "KVCache",
    "LanguageModel",
    "Sampler",
    "Sampling",
    "Session",
    "generate",
    "group_of",
]
