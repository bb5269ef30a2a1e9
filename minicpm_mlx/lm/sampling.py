"""Sampling with some of its settings changed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..arguments import expect
from ..engine import Sampling
from ..errors import InvalidArgumentError


def sampling_with(base: Sampling, *, do_sample: bool = True, **changes: Any) -> Sampling:
    """`base` with `changes` applied; a value of None changes nothing."""
    expect("sampling", base, Sampling, "a Sampling, such as Sampling(temperature=0.7)")
    known = Sampling.__dataclass_fields__
    for name in changes:
        if name not in known:
            raise InvalidArgumentError(
                f"unknown option {name!r}; sampling has {', '.join(sorted(known))}"
            )
    values: dict[str, Any] = {name: value for name, value in changes.items() if value is not None}
    if not do_sample:
        values["temperature"] = 0.0
    return replace(base, **values)
