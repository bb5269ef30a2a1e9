"""Token ids in, token ids out."""

from .batch import WIDTH, Batch
from .cache import KVCache, group_of
from .draft import Draft
from .generate import CHUNK, LanguageModel, Session, generate, working_memory
from .grammar import Grammar
from .prefix import PrefixCache
from .request import Event, Failed, Read, Request, Token
from .sampling import Sampler, Sampling
from .scheduler import ClosedError, QueueFullError, Scheduler
from .scores import Scored
from .speculative import Lookup, Speculation

__all__ = [
    "CHUNK",
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
    "group_of",
    "working_memory",
]
