"""One grammar of several: any text that one of them allows, also after tokens are taken back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minicpm_mlx.errors import InvalidArgumentError
from minicpm_mlx.lm.structured.either_grammar import EitherGrammar

END = 31


class Words:
    """A grammar of a few texts, each of a few tokens; END may follow a whole one."""

    def __init__(self, texts: list[list[int]], said: tuple[int, ...] = ()):
        self.texts, self.said = texts, list(said)

    def following(self) -> set[int]:
        at = len(self.said)
        if END in self.said:
            return {END}
        fitting = [text for text in self.texts if text[:at] == self.said]
        return {text[at] if len(text) > at else END for text in fitting}

    @property
    def ended(self) -> bool:
        return self.following() == {END}

    def allowed(self) -> np.ndarray:
        return np.array([sum(1 << token for token in self.following())], np.uint32)

    def accept(self, token: int) -> None:
        assert token in self.following()
        self.said.append(token)

    def rollback(self, tokens: int) -> None:
        del self.said[len(self.said) - tokens :]

    def copy(self) -> Words:
        return Words(self.texts, tuple(self.said))


TEXTS = st.lists(st.lists(st.integers(0, 2), max_size=4), min_size=1, max_size=4)


@given(TEXTS, TEXTS, st.data())
def test_it_allows_what_one_of_them_does(first, second, data):
    either, plain = EitherGrammar([Words(first), Words(second)]), Words(first + second)
    for _ in range(12):
        assert either.allowed().tolist() == plain.allowed().tolist()
        assert either.ended == plain.ended
        copy = either.copy()
        if plain.said and data.draw(st.booleans()):
            count = data.draw(st.integers(0, len(plain.said)))
            either.rollback(count)
            plain.rollback(count)
            continue
        token = data.draw(st.sampled_from(sorted(plain.following())))
        either.accept(token)
        plain.accept(token)
        assert copy.count == either.count - 1
        copy.accept(token)
        assert copy.allowed().tolist() == either.allowed().tolist()


def test_what_none_of_them_allows_is_refused_and_changes_nothing():
    either = EitherGrammar([Words([[0, 1]]), Words([[0, 2]])])
    either.accept(0)
    with pytest.raises(InvalidArgumentError, match="5"):
        either.accept(5)
    assert either.count == 1
    with pytest.raises(InvalidArgumentError, match="taken back"):
        either.rollback(2)
    either.accept(2)
    assert either.ended
