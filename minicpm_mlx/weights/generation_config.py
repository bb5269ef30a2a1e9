"""Sampling of a model's generation_config.json, which leaves out what transformers has as default.

transformers samples only where `do_sample` is true, then at a temperature of 1 unless one is
stated; a `repetition_penalty` applies to greedy decoding as well.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..arguments import json_number, shown
from ..errors import ConfigError

FILE = "generation_config.json"

SAMPLED = ("temperature", "top_p", "top_k", "min_p")
"""Settings that mean nothing to greedy decoding."""


def read_sampling(folder: Path) -> dict[str, Any]:
    """Settings by `Sampling`'s names, unchecked; a file that cannot be read states none.

    ConfigError where do_sample is not true, false or null.
    """
    raw: Any = {}
    with suppress(OSError, ValueError, RecursionError):
        raw = json.loads((folder / FILE).read_text(encoding="utf-8-sig"))
    if not isinstance(raw, dict):
        return {}
    samples = raw.get("do_sample")
    if samples not in (True, False, None):
        raise ConfigError(f"do_sample must be true or false, got {shown(samples)}").at(
            folder / FILE
        )
    names = ("repetition_penalty", *SAMPLED) if samples else ("repetition_penalty",)
    stated = {name: raw[name] for name in names if raw.get(name) is not None}
    return ({"temperature": 1.0} if samples else {}) | {
        n: json_number(v) for n, v in stated.items()
    }
