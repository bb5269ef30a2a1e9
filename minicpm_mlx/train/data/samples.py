"""Training samples as token ids."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Sample:
    """One text."""

    ids: list[int]
    """Its tokens, starting with BOS where the model expects one."""
    mask: list[bool]
    """Whether each token counts in the loss; the first never does, as nothing predicts it."""

    @property
    def targets(self) -> int:
        """The number of tokens that count."""
        return sum(self.mask)


@dataclass(frozen=True, slots=True)
class Pair:
    """Two replies to one prompt, the first preferred; masks cover the replies."""

    chosen: Sample
    rejected: Sample


@dataclass(frozen=True, slots=True)
class Labelled:
    """A reply judged good or bad; the mask covers the reply."""

    sample: Sample
    good: bool


Item = Sample | Pair | Labelled
