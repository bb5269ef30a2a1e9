"""What a grammar does not allow is never drawn: alone, with guesses, and beside others."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from minicpm_mlx import load_model
from minicpm_mlx.engine import Batch, PromptLookup, Sampling, Speculation, generate
from support.data import GOLDEN

PROMPT = [1, 5, 9, 200, 31, 7, 5, 9, 200, 31]
V = 512


class Stairs:
    """Each token leaves the same remainder as the one before, or one more, of three."""

    def __init__(self, text: list[int] | None = None):
        self.text = text or []
        self.calls = 0

    @property
    def ended(self) -> bool:
        return False

    def allowed(self) -> np.ndarray:
        self.calls += 1
        last = self.text[-1] if self.text else 0
        fits = np.isin(np.arange(V) % 3, [last % 3, (last + 1) % 3])
        return np.packbits(fits, bitorder="little").view(np.uint32)

    def accept(self, token: int) -> None:
        assert obeys([*self.text[-1:], token])
        self.text.append(token)

    def rollback(self, tokens: int) -> None:
        assert 0 <= tokens <= len(self.text)
        del self.text[len(self.text) - tokens :]

    def copy(self) -> Stairs:
        return Stairs(list(self.text))


def obeys(tokens: list[int]) -> bool:
    return all((b - a) % 3 in (0, 1) for a, b in pairwise(tokens))


@pytest.fixture(scope="module")
def model() -> Any:
    return load_model(GOLDEN / "minicpm_2b_like", fuse=True)


WAYS = [
    Sampling(),
    Sampling(temperature=1.3, seed=5),
    Sampling(repetition_penalty=1.3, frequency_penalty=0.4),
]


@pytest.mark.parametrize("how", WAYS)
def test_only_what_is_allowed_is_drawn(model: Any, how: Sampling) -> None:
    free = list(generate(model, PROMPT, max_tokens=60, sampling=how))
    bound = list(generate(model, PROMPT, max_tokens=60, sampling=how, grammar=Stairs()))
    assert not obeys([0, *free])
    assert obeys([0, *bound])


@pytest.mark.parametrize("how", WAYS)
def test_drafts_change_nothing(model: Any, how: Sampling) -> None:
    plain = list(generate(model, PROMPT, max_tokens=80, sampling=how, grammar=Stairs()))

    class Mixed(PromptLookup):
        """Proposes tokens that are right, wrong and forbidden in turn."""

        def confidence(self, text: Any) -> int:
            return 8

        def propose(self, text: Any, count: int) -> list[int]:
            at = len(text) - len(PROMPT)
            right = plain[at : at + min(count, 4)]
            return [*right[: at % 5], (at * 7) % V][:count] if right else []

    speculation = Speculation(Mixed())
    grammar = Stairs()
    told = generate(
        model, PROMPT, max_tokens=80, sampling=how, grammar=grammar, speculation=speculation
    )
    assert list(told) == plain
    assert speculation.passes < 79
    assert plain[: len(grammar.text)] == grammar.text


def test_a_stream_with_a_grammar_beside_free_ones_is_as_alone(model: Any) -> None:
    batch = Batch(model)
    made = {}
    for place, how in enumerate([*WAYS, *WAYS]):
        grammar = Stairs() if place < len(WAYS) else None
        stream = batch.add(PROMPT, max_tokens=30, sampling=how, grammar=grammar)
        made[stream] = (how, grammar is not None, list[int]())
    for drawn in batch.tokens():
        made[drawn.stream][2].append(drawn.token)
    batch.close()
    for how, bound, got in made.values():
        grammar = Stairs() if bound else None
        assert got == list(generate(model, PROMPT, max_tokens=30, sampling=how, grammar=grammar))


def test_the_end_of_text_is_not_told_to_the_grammar(model: Any) -> None:
    plain = list(generate(model, PROMPT, max_tokens=20, grammar=Stairs()))
    grammar = Stairs()
    eos = {plain[9]}
    told = list(generate(model, PROMPT, max_tokens=20, grammar=grammar, eos=eos))
    assert told == plain[: plain.index(plain[9]) + 1]
    assert not set(grammar.text) & eos


class Fails(Stairs):
    """Gives up after five tokens."""

    def allowed(self) -> np.ndarray:
        if len(self.text) == 5:
            raise ValueError("too hard")
        return super().allowed()


def test_a_grammar_that_fails_ends_its_own_stream_alone(model: Any) -> None:
    batch = Batch(model)
    free = batch.add(PROMPT, max_tokens=12, sampling=Sampling())
    bound = batch.add(PROMPT, max_tokens=12, sampling=Sampling(), grammar=Fails())
    got: dict[int, list[int]] = {free: [], bound: []}
    errors = []
    while batch.samplers:
        for drawn in batch.step():
            if drawn.error:
                errors.append(drawn)
                batch.remove(drawn.stream)
            else:
                got[drawn.stream].append(drawn.token)
    batch.close()
    assert [str(one.error) for one in errors] == ["too hard"]
    assert got[free] == list(generate(model, PROMPT, max_tokens=12))
    assert got[bound] == list(generate(model, PROMPT, max_tokens=5, grammar=Stairs()))
    with pytest.raises(ValueError, match="too hard"):
        list(generate(model, PROMPT, max_tokens=12, grammar=Fails()))
