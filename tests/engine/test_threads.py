"""MLX computes what is lazy only on the thread that made it; here work moves between threads."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import pytest

import minicpm_mlx as mm
from minicpm_mlx.engine import Session, generate
from support.data import CASES, GOLDEN

T = TypeVar("T")
GREEDY = mm.Sampling()
DRAWN = mm.Sampling(temperature=0.9, top_p=0.9, repetition_penalty=1.1, seed=5)
PROMPT = [1, 5, 9, 200, 31, 7]


def elsewhere(function: Callable[[], T]) -> T:
    """What `function` returns on a thread of its own, which has ended by then."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def reply(lm: mm.LM, prompt: str, **options: Any) -> str:
    return lm.generate(prompt, **{"max_tokens": 8, "sampling": GREEDY, **options}).text


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_model_gives_the_same_on_another_thread(case: str, fuse: bool) -> None:
    """Each kind of rotation, matrix and mixture; the first use is on the thread that did not load,
    lest the other has computed by then what was lazy."""
    here, there = (mm.load_model(GOLDEN / case, fuse=fuse) for _ in range(2))

    def ids(model: Any) -> list[int]:
        return list(generate(model, PROMPT, max_tokens=6, sampling=DRAWN))

    assert elsewhere(lambda: ids(there)) == ids(here)


def test_model_loaded_here_answers_elsewhere(tiny: mm.LM) -> None:
    lm = mm.load(str(tiny.folder))  # not the fixture, whose arrays other tests have computed
    there = elsewhere(lambda: reply(lm, "Once upon a time", sampling=DRAWN))
    assert there == reply(lm, "Once upon a time", sampling=DRAWN)


def test_model_loaded_elsewhere_answers_here(tiny: mm.LM) -> None:
    lm = elsewhere(lambda: mm.load(str(tiny.folder)))
    assert reply(lm, "Once upon a time") == reply(tiny, "Once upon a time")


@pytest.mark.parametrize(("sampling", "finished"), [(GREEDY, False), (DRAWN, True)])
def test_session_moves_between_threads(tiny: mm.LM, sampling: mm.Sampling, finished: bool) -> None:
    session, ids = elsewhere(tiny.session), tiny.encode("Once upon a time")

    def turn() -> list[int]:
        pieces = tiny.stream(ids, max_tokens=8, sampling=sampling, session=session)
        made = [
            token
            for _, piece in zip(range(8 if finished else 4), pieces, strict=False)
            for token in piece.token_ids
        ]
        pieces.close()
        return made

    for run in (elsewhere, lambda turn: turn(), elsewhere, elsewhere):
        alone = tiny.generate(ids, max_tokens=8, sampling=sampling).token_ids
        made = run(turn)
        assert made == list(alone[: len(made)])
        assert len(made) == (8 if finished else 4)
        ids = [*ids, *made, 28]
        assert session.common(ids) > 3


def test_each_piece_of_a_stream_may_be_asked_for_on_another_thread(tiny: mm.LM) -> None:
    """As a web server's thread pool does."""
    pieces = tiny.stream("Once upon a time", max_tokens=6, sampling=DRAWN)
    texts = [elsewhere(lambda: next(pieces, None)) for _ in range(8)]
    assert texts[-1] is None
    alone = tiny.generate("Once upon a time", max_tokens=6, sampling=DRAWN).text
    assert "".join(piece.text for piece in texts if piece) == alone


def test_chats_at_once_do_not_share_a_cache(tiny: mm.LM) -> None:
    queries = ["Name a colour.", "What is the capital of France?"]

    def answer(query: str) -> str:
        return tiny.chat(query, max_tokens=6, do_sample=False)[0]

    alone = [answer(query) for query in queries]
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(answer, queries * 2)) == alone * 2


def test_one_session_serves_one_of_many_threads() -> None:
    model = mm.load_model(GOLDEN / "minicpm_2b_like", fuse=True)
    session = Session(model.config)
    stream = generate(model, PROMPT, max_tokens=4, session=session)
    next(stream)
    other = generate(model, PROMPT, max_tokens=4, session=session)
    with pytest.raises(mm.MiniCPMError, match="in the middle of another stream"):
        elsewhere(lambda: next(other))
    elsewhere(stream.close)
    assert list(generate(model, PROMPT, max_tokens=4, session=session))
