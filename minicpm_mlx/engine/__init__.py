"""Token ids in, token ids out."""

from .batch import WIDTH, Batch
from .cache import KVCache, group_of
from .draft import Draft
from .generate import CHUNK, LanguageModel, Session, generate, working_memory
from .sampling import Sampler, Sampling
from .speculative import Lookup, Speculation

__all__ = [
    "CHUNK",
    "WIDTH",
    "Batch",
    "Draft",
    "KVCache",
    "LanguageModel",
    "Lookup",
    "Sampler",
    "Sampling",
    "Session",
    "Speculation",
    "generate",
    "group_of",
    "working_memory",
]
