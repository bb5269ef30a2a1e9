"""Memory plans: counted parameters, measured bytes, and refusal before loading."""

from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest

import minicpm_mlx as mm
from minicpm_mlx import device, memory
from minicpm_mlx.cli.chat.conversation import Loading, TerminalChat
from minicpm_mlx.cli.render.texts import Texts
from minicpm_mlx.errors import InvalidArgumentError
from minicpm_mlx.model.config import Config
from minicpm_mlx.model.transformer import Model
from minicpm_mlx.weights.load import parameters
from support.data import CASES, GOLDEN


@pytest.mark.parametrize("case", CASES)
def test_parameters_are_counted_as_they_are(case: str) -> None:
    config = Config.load(GOLDEN / case)
    counted = sum(array.size for array in parameters(Model(config)).values())
    assert memory.parameter_count(config) == counted


def test_the_demo_takes_what_was_planned(demo: mm.LM) -> None:
    found = memory.estimate(demo.config, context=1000)
    held = sum(array.nbytes for array in parameters(demo.model).values())
    assert found.weights == pytest.approx(held, rel=0.01)
    session = demo.session()
    ids = [5] * 1000
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    list(demo.stream(ids, max_tokens=1, session=session))
    kept = sum(layer.nbytes for layer in session.cache)
    assert found.cache == pytest.approx(kept, rel=0.03)  # which has room for 1024
    worked = mx.get_peak_memory() - before - kept
    assert 0.2 * found.working < worked < 1.5 * found.working


def test_a_cache_in_few_bits_is_planned_smaller(demo: mm.LM) -> None:
    full, eight, four = (
        memory.estimate(demo.config, context=512, kv_bits=bits) for bits in (None, 8, 4)
    )
    for bits, found in ((8, eight), (4, four)):
        session = demo.session(kv_bits=bits)
        list(demo.stream([5] * 511, max_tokens=1, session=session))
        assert found.cache == sum(layer.nbytes for layer in session.cache)
    assert four.cache < eight.cache < full.cache


def test_what_cannot_fit_is_refused_with_what_can(
    demo: mm.LM, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = memory.estimate(demo.config, context=8000)
    memory.check_fits(found)
    tight = replace(found, available=found.total - found.cache // 2)
    with pytest.raises(InvalidArgumentError, match=r"--context 39\d\d fits; --kv-bits 8"):
        memory.check_fits(tight)
    with pytest.raises(InvalidArgumentError, match="take a smaller"):
        memory.check_fits(replace(found, available=found.weights))


def test_packed_weights_are_planned_as_their_files(
    demo_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "unpack_to", lambda *_: None)
    config = Config.load(demo_folder)
    # The demo keeps scales in 32 bits and its embedding in 8: the plan is of the usual 16 and 4.
    assert (
        0.5
        < memory.estimate(config).weights / (demo_folder / "model.safetensors").stat().st_size
        < 1
    )


def test_a_context_is_bounded_by_the_memory_left(
    demo: mm.LM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert memory.fitting_context(demo.config) == demo.config.context_length
    full = memory.estimate(demo.config)
    monkeypatch.setattr(device, "available_memory", lambda: full.working + full.cache // 4)
    assert memory.fitting_context(demo.config) == pytest.approx(full.context / 4, rel=0.01)
    small = memory.fitting_context(demo.config)
    talk = TerminalChat(
        lambda lm: mm.Chat(lm),
        Loading(lambda: demo, background=False),
        Texts("en"),
        interactive=False,
    )
    assert talk.chat.context_length == small
    assert talk.chat.context is None  # what is saved is what was asked for
    assert "by the free memory" in capsys.readouterr().err
    talk.use(mm.Chat(demo, context=small - 1))
    assert talk.chat.context_length == small - 1
    assert not capsys.readouterr().err
    monkeypatch.setattr(device, "available_memory", lambda: 10 * full.total)
    talk.use(mm.Chat(demo))
    assert talk.chat.context_length == demo.config.context_length
