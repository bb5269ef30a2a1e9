"""Memory plans: counted parameters, measured bytes, and refusal before loading."""

from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest

import minicpm_mlx as mm
from minicpm_mlx import device, memory
from minicpm_mlx.bench import shapes
from minicpm_mlx.cli.chat.conversation import Loading, TerminalChat
from minicpm_mlx.cli.render.texts import Texts
from minicpm_mlx.engine import Session, generate
from minicpm_mlx.errors import InvalidArgumentError
from minicpm_mlx.loading.plan import kept_config
from minicpm_mlx.model.config import Config
from minicpm_mlx.model.transformer import Model
from minicpm_mlx.model_cards import Card
from minicpm_mlx.weights.checkpoint import read_checkpoint, write_checkpoint
from minicpm_mlx.weights.lazy_ops import dense
from minicpm_mlx.weights.load import load_model, parameters
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
    # A cache that has just grown is there twice.
    assert 0.2 * found.working < worked < 1.5 * found.working + kept


NARROW = {"hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 2}
NARROW |= {"vocab_size": 1024, "num_attention_heads": 8}


@pytest.mark.parametrize("shape", ["2b-shape", "2b-untied-shape", "5-1b-shape", "3-4b-shape"])
def test_what_is_planned_of_a_kind_of_model_is_what_it_takes(shape: str) -> None:
    config = Config.from_dict({**shapes.SHAPES[shape], **NARROW})
    model = shapes.random_model(config)
    found = memory.estimate(config, context=1000)
    assert found.weights == sum(array.nbytes for array in parameters(model).values())
    session = Session(config)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    list(generate(model, [5] * 1000, max_tokens=1, session=session))
    kept = sum(layer.nbytes for layer in session.cache)
    assert found.cache * 1024 / 1000 == kept
    worked = mx.get_peak_memory() - before - kept
    assert found.working == pytest.approx(worked, rel=0.25)


def test_latent_attention_reads_long_prompts_in_smaller_chunks_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(device, "on_cpu", lambda: False)
    monkeypatch.setattr(device, "available_memory", lambda: 10_000_000_000)
    latent, plain = (Config.from_dict(shapes.SHAPES[n]) for n in ("3-4b-shape", "4-8b-shape"))
    assert memory.prefill_chunk(plain, 30_000) == memory.prefill_chunk(plain, 500) == 1024
    assert memory.prefill_chunk(latent, 500) == 2048  # its scores are held, those of others not
    assert memory.prefill_chunk(latent, 30_000) == 128


def test_matrices_left_dense_and_in_other_bits_are_planned_as_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(device, "unpack_to", lambda *_: None)
    raw = {**shapes.SHAPES["5-1b-shape"], **NARROW}
    packing = {"group_size": 64, "bits": 4, "lm_head": {"group_size": 64, "bits": 8}}
    config = Config.from_dict({**raw, "quantization": packing})
    config = replace(config, unpacked=("model.embed_tokens",))
    outer, all_of_it = 256 * 1024, memory.parameter_count(config)
    vectors = 256 * 5
    inner = all_of_it - 2 * outer - vectors
    expected = outer * 2 + outer * 8.5 / 8 + inner * 4.5 / 8 + vectors * 2
    assert memory.weight_bytes(config, mx.float16) == int(expected)


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


def test_packed_weights_are_planned_as_they_are_loaded(
    demo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "unpack_to", lambda *_: None)
    checkpoint = read_checkpoint(demo_folder)
    whole = dense(checkpoint).tensors["model.embed_tokens.weight"]
    tensors = {n: t for n, t in checkpoint.tensors.items() if "embed_tokens" not in n}
    tensors["model.embed_tokens.weight"] = whole
    write_checkpoint(replace(checkpoint, tensors=tensors), tmp_path)
    for folder in (demo_folder, tmp_path):  # the embedding in 8 bits, or not packed
        config = kept_config(Card(name="demo", path=folder))
        assert config is not None
        held = parameters(load_model(folder, "float16")).values()
        planned = memory.weight_bytes(config, mx.float16)
        assert planned == pytest.approx(sum(array.nbytes for array in held), rel=0.001)


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
