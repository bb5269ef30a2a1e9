"""Generation and scoring of token ids: streams, batches, the scheduler, caches, sampling.

Text exists only above this package: in `lm`, `server` and `cli`.
"""

from .batching.batch import WIDTH, Batch
from .batching.prefix_cache import PrefixCache
from .batching.requests import NewToken, PrefillDone, Request, RequestEvent, RequestFailed
from .batching.scheduler import ClosedError, QueueFullError, Scheduler
from .draft_model import DraftModel
from .generate import generate
from .kv_cache import KVCache
from .logprobs import TokenLogprob
from .sampling import Sampler, Sampling
from .session import LanguageModel, Session
from .speculative import PromptLookup, Speculation
from .token_mask import Grammar

__all__ = [
    "WIDTH",
    "Batch",
    "ClosedError",
    "DraftModel",
    "Grammar",
    "KVCache",
    "LanguageModel",
    "NewToken",
    "PrefillDone",
    "PrefixCache",
    "PromptLookup",
    "QueueFullError",
    "Request",
    "RequestEvent",
    "RequestFailed",
    "Sampler",
    "Sampling",
    "Scheduler",
    "Session",
    "Speculation",
    "TokenLogprob",
    "generate",
]
