"""The values of the page's controls."""

from __future__ import annotations

from collections.abc import Mapping
from math import isclose
from typing import Any

from ...engine import Sampling
from ..service import Service
from .conversation import PageSettings, message, wanted
from .texts import say

DEFAULT_MAX_TOKENS = 2048
"""Tokens of a reply until the user moves the slider, as on MiniCPM's own page."""

THINK = ("auto", "on", "off")
"""Whether the model thinks; the first leaves it to the model."""


def think_choices(language: str) -> list[tuple[str, str]]:
    """Labels and values of the switch."""
    return [(say(f"think_{value}", language), value) for value in THINK]


def read_controls(
    service: Service,
    served: str,
    system: str | None,
    top_p: Any,
    temperature: Any,
    max_tokens: Any,
    think: Any,
    think_tokens: Any,
) -> PageSettings:
    """The values of the controls; an empty one is None, and so is the longest of all thoughts."""
    bounded = think_tokens is not None and int(think_tokens) < service.context_length
    return PageSettings(
        served=served,
        system=system or "",
        top_p=top_p,
        temperature=temperature,
        max_tokens=None if max_tokens is None else int(max_tokens),
        think=think if think in THINK else THINK[0],
        think_tokens=int(think_tokens) if bounded else None,
    )


def own_sampling(service: Service, think: str) -> Sampling:
    """The model's own sampling for a value of the switch."""
    if service.lm.thinking_sampling is None or service.lm.tokenizer.thinking is None:
        return service.lm.sampling
    prompt = service.chat_prompt([message("user", "?")], thinking=wanted(think))
    return service.lm.default_sampling(prompt)


def follow_thinking(
    service: Service, think: str, sliders: Mapping[str, float | None]
) -> dict[str, float | None]:
    """The sliders of the sampling after the switch was set to `think`.

    One that stands where the model's own sampling has it in any mode goes to where it is in this
    one; any other is the user's and stays.
    """
    modes = [own_sampling(service, mode) for mode in THINK]
    follows = {
        name: value is None or any(isclose(value, getattr(own, name)) for own in modes)
        for name, value in sliders.items()
    }
    own = own_sampling(service, think)
    return {name: getattr(own, name) if follows[name] else value for name, value in sliders.items()}
