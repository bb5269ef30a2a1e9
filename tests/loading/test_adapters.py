"""An adapter changes every form of its base alike, or is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st

import minicpm_mlx as mm
from minicpm_mlx.convert.checkpoint import convert
from minicpm_mlx.convert.export_adapter import export_adapter
from minicpm_mlx.convert.merge_adapter import fuse_adapter
from minicpm_mlx.errors import ConfigError, WeightsError
from minicpm_mlx.loading import demo as demo_model
from minicpm_mlx.loading.adapters import base_model, load_adapter
from minicpm_mlx.model.adapters import Adapter, LoRADelta, find_projections, rescaled
from minicpm_mlx.model.base_form import BaseForm, config_in
from minicpm_mlx.model.config import Config
from minicpm_mlx.model.config_sections import FOLDED
from minicpm_mlx.model_cards import Card, resolve
from minicpm_mlx.weights.load import parameters
from support.adapters import CAN_DORA, random_adapter, saved
from support.gguf_files import byte_tokenizer
from support.random_models import IDS, TINY, random_model

UNTIED = {**TINY, "tie_word_embeddings": False, "rms_norm_eps": 1e-5, "num_key_value_heads": 2}
FORMS = ("mup", "llama", "mlx", "mup.gguf", "llama.gguf", "mlx.gguf")
FIRST = "model.layers.0.self_attn."


@pytest.fixture(scope="module")
def models(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model in all forms, with a head of its own."""
    pytest.importorskip("gguf")
    folder = tmp_path_factory.mktemp("forms")
    (folder / "mup").mkdir()
    arrays = parameters(random_model(**UNTIED))
    mx.save_safetensors(str(folder / "mup" / "model.safetensors"), arrays)
    (folder / "mup" / "config.json").write_text(json.dumps(UNTIED))
    byte_tokenizer().save(str(folder / "mup" / "tokenizer.json"))
    for format in ("llama", "mlx"):
        convert(folder / "mup", folder / format, format=format)
    for format in ("mup", "llama", "mlx"):
        convert(folder / format, folder / f"{format}.gguf", format="gguf", gguf_type="F32")
    return folder


def all_matrices(*, dora: bool = False) -> Any:
    model = random_model(**UNTIED)
    adapter = random_adapter(model, dora=dora)
    assert {name.rpartition(".")[2] for name in adapter.deltas} >= {"o_proj", "down_proj"}
    assert adapter.deltas.keys() <= find_projections(model).keys()
    return adapter


def log_probabilities(lm: mm.LM, adapter: Path | None = None) -> mx.array:
    lm.use_adapter(adapter)
    logits = lm.model(IDS)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def distance(one: mx.array, other: mx.array) -> float:
    return float(mx.abs(one - other).max().item())


def record_of(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return record


@CAN_DORA
@pytest.mark.parametrize("form", FORMS[1:])
def test_an_adapter_changes_every_form_of_its_base_alike(
    form: str, dora: bool, models: Path, tmp_path: Path
) -> None:
    adapter = saved(tmp_path / "adapter", all_matrices(dora=dora), "mlx", model=str(models / "mup"))
    native = mm.load(models / "mup")
    plain, expected = log_probabilities(native), log_probabilities(native, adapter)
    assert distance(plain, expected) > 0.5
    for fuse in (True, False):
        assert distance(log_probabilities(mm.load(models / form, fuse=fuse), adapter), expected) < (
            2e-3
        )


@pytest.mark.parametrize("source", FORMS)
@pytest.mark.parametrize("target", FORMS)
def test_any_form_to_any_other_and_into_its_weights(
    source: str, target: str, models: Path, tmp_path: Path
) -> None:
    on_source, on_target = mm.load(models / source), mm.load(models / target)
    adapter = saved(
        tmp_path / "adapter",
        all_matrices(),
        "mlx",
        base_form=asdict(BaseForm.of(on_source.config)),
    )
    expected = log_probabilities(on_source, adapter)
    assert distance(log_probabilities(on_target, adapter), expected) < 2e-3
    if source == "mup":
        fuse_adapter(models / target, tmp_path / "fused", adapter, text="some words to check on")
        assert distance(log_probabilities(mm.load(tmp_path / "fused")), expected) < 2e-3


@CAN_DORA
@pytest.mark.parametrize("layout", ["mlx", "peft"])
@pytest.mark.parametrize("form", ["llama", "mlx"])
def test_an_export_for_a_converted_base_is_used_there_as_it_is(
    form: str, layout: str, dora: bool, models: Path, tmp_path: Path
) -> None:
    """By `base_format`, or by naming the converted folder: the same numbers, recorded as such."""
    adapter = saved(tmp_path / "adapter", all_matrices(dora=dora), "peft")
    expected = log_probabilities(mm.load(models / "mup"), adapter)
    how: dict[str, dict[str, Any]] = {
        "named": {"model": models / form},
        "chosen": {"model": models / "mup", "base_format": form},
    }
    for name, options in how.items():
        written = export_adapter(adapter, tmp_path / name, layout, **options)
        assert written.format == form
        lm = mm.load(models / form)
        assert lm.read_adapter(tmp_path / name).form == written
        assert distance(log_probabilities(lm, tmp_path / name), expected) < 2e-3
        assert distance(log_probabilities(mm.load(models / "mup"), tmp_path / name), expected) < (
            2e-3
        )
        stated = record_of(tmp_path / name)
        assert ("base_form" in stated) == (layout == "mlx")  # PEFT warns of keys it does not know
        base = stated.get("model") or stated.get("base_model_name_or_path")
        assert base == (str(models / form) if name == "named" else None)
    factor = 1.4 / 2**0.5 / (12 if form == "mlx" else 1)
    deltas = [
        load_adapter(
            tmp_path / name, Config.load(models / form), resolve(str(models / form))
        ).deltas
        for name in how
    ]
    source = all_matrices(dora=dora).deltas
    for name, scale in {f"{FIRST}o_proj": factor, f"{FIRST}q_proj": 1.0}.items():
        for delta in (d[name] for d in deltas):
            assert mx.allclose(
                delta.a @ delta.b, source[name].a @ source[name].b * scale, atol=1e-5
            )


@pytest.mark.parametrize("form", ["llama", "mlx"])
def test_mlx_lm_computes_the_same_with_the_export_and_trains_for_the_original(
    form: str, models: Path, tmp_path: Path
) -> None:
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model

    adapter = saved(tmp_path / "adapter", all_matrices(), "mlx")
    export_adapter(adapter, tmp_path / "out", "mlx", model=models / form)
    theirs: Any = load_model(models / form)[0]
    theirs = load_adapters(theirs, str(tmp_path / "out"))
    theirs.eval()
    logits = theirs(IDS)
    found = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    expected = log_probabilities(mm.load(models / "mup"), adapter)
    assert distance(found, expected) < 2e-3
    # mlx-lm's own trainer names its base, and nothing of its form.
    back = saved(
        tmp_path / "back",
        mm.load(models / form).read_adapter(adapter),
        "mlx",
        model=str(models / form),
    )
    assert distance(log_probabilities(mm.load(models / "mup"), back), expected) < 2e-3


# What an adapter's files say of its base


@pytest.mark.parametrize(
    ("says", "form"),
    [
        ({}, "mup"),  # as this library wrote them before it recorded the form
        ({"model": "{models}/mup"}, "mup"),
        ({"model": "{models}/mlx"}, "mlx"),
        ({"base_model_name_or_path": "{models}/llama"}, "llama"),
        ({"base_model_name_or_path": "openbmb/MiniCPM-2B-sft-bf16"}, "mup"),
        ({"base_model_name_or_path": "openbmb/MiniCPM-2B-sft-bf16-llama-format"}, "llama"),
        ({"base_model_name_or_path": "/models/MiniCPM-2B-dpo-bf16-llama-format"}, "llama"),
        ({"model": "{models}/gone"}, None),
        ({"base_model_name_or_path": "someone/else"}, None),
    ],
)
@pytest.mark.parametrize("recorded", [True, False], ids=["recorded", "converted before"])
def test_the_form_follows_from_the_base_that_is_named(
    says: dict[str, str], form: str | None, recorded: bool, models: Path, tmp_path: Path
) -> None:
    says = {key: value.replace("{models}", str(models)) for key, value in says.items()}
    adapter = saved(tmp_path / "adapter", all_matrices(), "mlx", **says)
    target = Config.load(models / "mlx")
    if not recorded:
        target = Config.from_dict(
            {k: v for k, v in config_json(models / "mlx").items() if k != FOLDED}
        )
    card = Card(name="elsewhere", path=tmp_path / "elsewhere")
    if form is None or (not recorded and not says):
        with pytest.raises(WeightsError, match="the form of its base is unknown, and this model"):
            load_adapter(adapter, target, card)
        return
    branch = {"mup": 1.4 / 2**0.5 / 12, "llama": 1 / 12, "mlx": 1.0}[form]
    found = load_adapter(adapter, target, card).deltas[f"{FIRST}o_proj"]
    source = all_matrices().deltas[f"{FIRST}o_proj"]
    assert mx.allclose(found.b, source.b * branch, rtol=1e-4, atol=1e-7)


def config_json(folder: Path) -> dict[str, Any]:
    raw: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return raw


@pytest.mark.parametrize("name", ["minicpm-2b-sft", "demo"])
def test_a_training_here_named_its_base_in_its_record(
    name: str, models: Path, tmp_path: Path
) -> None:
    adapter = saved(tmp_path / "adapter", all_matrices(), "mlx")
    repo = resolve(name).repo
    record = {"base": {"name": name, "repo": repo, "identity": "0"}}
    (adapter / "training.json").write_text(json.dumps(record))
    assert base_model(adapter) == name
    if repo:
        card = Card(name="elsewhere", path=tmp_path / "elsewhere")
        found = load_adapter(adapter, Config.load(models / "llama"), card)
        source = all_matrices().deltas[f"{FIRST}o_proj"].b
        assert mx.allclose(found.deltas[f"{FIRST}o_proj"].b, source * 1.4 / 2**0.5, rtol=1e-4)


def test_a_folder_named_like_a_card_is_not_taken_for_it(models: Path, tmp_path: Path) -> None:
    """`convert CARD CARD` makes a folder whose name is the one that an adapter's record has."""
    name = "minicpm-2b-sft"
    adapter = saved(tmp_path / "adapter", all_matrices(), "mlx", model=name)
    card = Card(name=name, path=tmp_path / name)
    found = load_adapter(adapter, Config.load(models / "mlx"), card).deltas[f"{FIRST}o_proj"]
    source = all_matrices().deltas[f"{FIRST}o_proj"]
    assert mx.allclose(found.b, source.b * 1.4 / 2**0.5 / 12, rtol=1e-4, atol=1e-7)


def test_a_base_may_be_a_gguf_file_that_was_never_loaded(models: Path, tmp_path: Path) -> None:
    shutil.copyfile(models / "llama.gguf", tmp_path / "new.gguf")
    base = str(tmp_path / "new.gguf")
    adapter = saved(tmp_path / "adapter", all_matrices(), "mlx", model=base)
    card = Card(name="elsewhere", path=tmp_path / "elsewhere")
    found = load_adapter(adapter, Config.load(models / "mlx"), card).deltas[f"{FIRST}o_proj"]
    assert mx.allclose(found.b, all_matrices().deltas[f"{FIRST}o_proj"].b / 12, rtol=1e-4)


def test_another_model_is_refused_naming_both_forms(models: Path, tmp_path: Path) -> None:
    """Two Llamas whose norms differ are no two forms of one model."""
    form = BaseForm(format="llama", rms_norm_eps=1e-6)
    adapter = saved(tmp_path / "adapter", all_matrices(), "mlx", base_form=asdict(form))
    with pytest.raises(WeightsError, match=r"in plain llama form, rms_norm_eps 1e-06.*mlx form"):
        mm.load(models / "mlx", adapter=adapter)


@pytest.mark.parametrize(
    "stated",
    [3, [], {}, {"format": "mup"}, {"format": "gguf", "rms_norm_eps": 1e-5}]
    + [{"format": "mup", "rms_norm_eps": value} for value in (0, -1, "x", None, True, 10**400)],
)
def test_a_form_that_is_none_is_refused(stated: object, tmp_path: Path) -> None:
    adapter = saved(tmp_path / "adapter", all_matrices(), "mlx", base_form=stated)
    with pytest.raises(ConfigError, match="base_form must state format"):
        load_adapter(adapter, Config.from_dict(UNTIED), Card(name="x", path=tmp_path))


@pytest.mark.parametrize(
    "stated",
    [3, [], {}, {"format": "gguf", "scale_emb": 1, "scale_depth": 1, "dim_model_base": 1}]
    + [
        {"format": "mlx", "scale_emb": value, "scale_depth": 1, "dim_model_base": 1}
        for value in (0, -1, "x", None, float("nan"), 10**400)
    ],
)
def test_a_record_of_folding_that_is_none_is_refused(stated: object) -> None:
    raw = UNTIED | {"architectures": ["LlamaForCausalLM"], FOLDED: stated}
    with pytest.raises(ConfigError, match=FOLDED):
        Config.from_dict(raw)


POSITIVE = st.floats(0.01, 100)


@given(st.data(), POSITIVE, POSITIVE, st.integers(1, 512))
def test_rescaling_there_and_back_changes_nothing(
    data: st.DataObject, scale_emb: float, scale_depth: float, dim_model_base: int
) -> None:
    constants = {"scale_emb": scale_emb, "scale_depth": scale_depth}
    native = Config.from_dict(UNTIED | constants | {"dim_model_base": dim_model_base})
    adapter = all_matrices(dora=True)
    forms = st.sampled_from(["mup", "llama", "mlx"])
    way = [native, *(config_in(native, data.draw(forms)) for _ in range(3)), native]
    found = adapter
    for one, other in pairwise(way):
        assert config_in(other, "mup").scale_depth == scale_depth
        found = rescaled(found, BaseForm.of(one), BaseForm.of(other))
    for name, delta in adapter.deltas.items():
        assert mx.allclose(found.deltas[name].b, delta.b, rtol=1e-4)
        assert mx.allclose(found.deltas[name].magnitude, delta.magnitude, rtol=1e-4)


def test_a_server_rescales_the_adapters_it_is_started_with(models: Path, tmp_path: Path) -> None:
    from minicpm_mlx.server.service import _load_adapters

    adapter = saved(tmp_path / "adapter", all_matrices(), "mlx", model=str(models / "mup"))
    expected = mm.load(models / "mup", adapter=adapter).model(IDS)
    lm = mm.load(models / "mlx")
    served = _load_adapters(lm, {"mine": adapter})["mine"]
    assert distance(served(IDS), expected) < 2e-3  # type: ignore[operator]


def test_caches_of_a_rescaled_adapter_are_its_own(models: Path, tmp_path: Path) -> None:
    adapter = saved(tmp_path / "adapter", all_matrices(), "mlx")
    digests = {mm.load(models / form).read_adapter(adapter).digest for form in FORMS}
    assert len(digests) == 3


@pytest.mark.parametrize("form", ["llama", "mlx"])
def test_a_gguf_adapter_is_for_the_base_it_was_exported_for(
    form: str, models: Path, tmp_path: Path
) -> None:
    gguf = pytest.importorskip("gguf")
    deltas = {n: d for n, d in all_matrices().deltas.items() if n != "lm_head"}
    source = Adapter(folder=tmp_path, deltas=deltas, digest="")
    adapter = saved(tmp_path / "adapter", source, "mlx", model=str(models / "mup"))
    ways: dict[str, dict[str, Any]] = {
        "chosen": {"model": models / "mup", "base_format": form},
        "folder": {"model": models / form},
        "file": {"model": models / f"{form}.gguf"},
    }
    for name, options in ways.items():
        export_adapter(adapter, tmp_path / f"{name}.gguf", "gguf", **options)
        reader = gguf.GGUFReader(tmp_path / f"{name}.gguf")
        assert reader.fields["general.architecture"].contents() == "llama"
        found = {tensor.name: mx.array(tensor.data) for tensor in reader.tensors}
        for gguf_name, module, factor in (
            ("attn_output", f"{FIRST}o_proj", 1.4 / 2**0.5 / (12 if form == "mlx" else 1)),
            ("attn_v", f"{FIRST}v_proj", 1.0),
        ):
            a, b = (found[f"blk.0.{gguf_name}.weight.lora_{part}"] for part in "ab")
            expected = deltas[module].a @ deltas[module].b * factor
            assert mx.allclose((b @ a).T, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_the_demo_and_its_conversions_say_the_same_and_so_does_mlx_lm(
    demo: mm.LM, tmp_path: Path
) -> None:
    """Greedy text and log probabilities; the package's own file is the demo in the llama form."""
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.utils import load as mlx_lm_load

    source = demo.folder
    assert source is not None
    ids = demo.encode([{"role": "user", "content": "Count from one to twenty."}])
    mx.random.seed(3)
    deltas = {}
    for name, place in find_projections(demo.model).items():
        out, strong = place.rows.stop - place.rows.start, name.endswith(("o_proj", "down_proj"))
        a = mx.random.normal((place.inputs, 4)) / place.inputs**0.5
        deltas[name] = LoRADelta(a=a, b=mx.random.normal((4, out)) * (1.0 if strong else 0.25))
    made = Adapter(folder=tmp_path, deltas=deltas, digest="")
    adapter = saved(tmp_path / "adapter", made, "mlx", model="demo")

    def answers(lm: mm.LM) -> tuple[tuple[int, ...], mx.array]:
        logits = lm.model(mx.array([ids]))
        greedy = lm.generate(ids, max_tokens=16, sampling=mm.Sampling(temperature=0))
        return greedy.token_ids, logits - mx.logsumexp(logits, axis=-1, keepdims=True)

    plain = answers(demo)
    demo.use_adapter(adapter)
    said, expected = answers(demo)
    demo.use_adapter(None)
    assert said != plain[0]
    for format in ("mlx", "llama"):
        convert(source, tmp_path / format, format=format)
    convert(tmp_path / "mlx", tmp_path / "mlx.gguf", format="gguf", gguf_type="F32")
    own_file = demo_model.source(resolve("demo"))
    for place in (tmp_path / "mlx", tmp_path / "llama", tmp_path / "mlx.gguf", own_file):
        found, logits = answers(mm.load(place, adapter=adapter))
        assert found == said
        assert distance(logits, expected) < 0.02
    export_adapter(adapter, tmp_path / "out", "mlx", model="demo", base_format="mlx")
    theirs, *_ = mlx_lm_load(str(tmp_path / "mlx"), adapter_path=str(tmp_path / "out"))
    cache, text = make_prompt_cache(theirs), []
    logits = theirs(mx.array([ids]), cache=cache)
    assert distance(logits - mx.logsumexp(logits, axis=-1, keepdims=True), expected) < 0.02
    for _ in said:
        text.append(int(mx.argmax(logits[0, -1]).item()))
        logits = theirs(mx.array([[text[-1]]]), cache=cache)
    assert tuple(text) == said
