"""Token ids in, token ids out."""

from .batching.batch import WIDTH, Batch
from .batching.prefix_cache import PrefixCache
from .batching.requests import (
    Event,
    Failed,
    Read,
    Request,
    Token,
)
from .batching.scheduler import ClosedError, QueueFullError, Scheduler
from .draft_model import Draft
from .generate import generate
from .grammar import Grammar
from .kv_cache import KVCache
from .logprobs import Scored
from .sampling import Sampler, Sampling
from .session import LanguageModel, Session
from .speculative import Lookup, Speculation

__all__ = [
    "WIDTH",
    "Batch",
    "ClosedError",
    "Draft",
    "Event",
    "Failed",
    "Grammar",
    "KVCache",
    "LanguageModel",
    "Lookup",
    "PrefixCache",
    "QueueFullError",
    "Read",
    "Request",
    "Sampler",
    "Sampling",
    "Scheduler",
    "Scored",
    "Session",
    "Speculation",
    "Token",
    "generate",
]
