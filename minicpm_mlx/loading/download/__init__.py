"""Downloads of repositories and data sets into the hub's cache; this package alone imports
huggingface_hub, and looking at what is kept imports none of its network code."""

from .cache import cached, cached_size, kept_repositories, remove
from .fetch import fetch, fetch_texts, remote_size
from .gguf_files import fits, tag_of
from .hub import fetch_data
from .sources import VARIABLE, check_source, using

__all__ = [
    "VARIABLE",
    "cached",
    "cached_size",
    "check_source",
    "fetch",
    "fetch_data",
    "fetch_texts",
    "fits",
    "kept_repositories",
    "remote_size",
    "remove",
    "tag_of",
    "using",
]
