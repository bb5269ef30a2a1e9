"""What a model is trained on, as token ids."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Sample:
    """One text."""

    ids: list[int]
    """Its tokens, with the start token where the model expects one."""
    mask: list[bool]
    """For each token whether predicting it counts; never for the first, which nothing predicts."""

    @property
    def targets(self) -> int:
        """How many tokens count."""
        return sum(self.mask)


@dataclass(frozen=True, slots=True)
class Pair:
    """Two replies to one prompt, of which one is preferred; masks are on the replies."""

    chosen: Sample
    rejected: Sample


@dataclass(frozen=True, slots=True)
class Labelled:
    """A reply that someone found good, or bad; the mask is on the reply."""

    sample: Sample
    good: bool


Item = Sample | Pair | Labelled
