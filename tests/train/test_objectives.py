"""Losses and their gradients against the plain way to compute them, with all logits at once."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from minicpm_mlx.errors import InvalidArgumentError
from minicpm_mlx.model.adapters import apply_adapter, dense
from minicpm_mlx.model.config_sections import Quantization
from minicpm_mlx.model.fused import fuse
from minicpm_mlx.model.kernels import cpu_softmax
from minicpm_mlx.model.packing import quantize
from minicpm_mlx.model.transformer import Model
from minicpm_mlx.train import cpu_kernels, cross_entropy, lora
from minicpm_mlx.train.data.batches import batch_of
from minicpm_mlx.train.data.samples import Item, Labelled, Pair, Sample
from minicpm_mlx.train.gradients import (
    batch_losses,
    full_gradients,
    layerwise_gradients,
    set_parameters,
)
from minicpm_mlx.train.lora import LoRAConfig, LoRALinear
from minicpm_mlx.train.objectives import CrossEntropy, PreferenceLoss, dpo, ipo, kto, orpo
from minicpm_mlx.train.trainer import add_reference
from minicpm_mlx.weights.adapters import read_adapter
from support.random_models import MLA, MOE, random_model

RANDOM = np.random.default_rng(0)


def sample(length: int, prompt: int = 3) -> Sample:
    ids: list[int] = RANDOM.integers(0, 512, length).tolist()
    return Sample(ids, [place >= prompt for place in range(length)])


PACKINGS = [
    Quantization(bits=8, group_size=32),
    Quantization(bits=4, group_size=32, mode="mxfp4"),
    Quantization(bits=4, group_size=16, mode="nvfp4"),
]


def trained(kind: str = "lora", packing: Quantization | None = None, **changes: Any) -> Model:
    """A model whose adapters have effect; new ones have none."""
    model = random_model(**changes)
    if packing is not None:
        quantize(model, packing)
    lora.prepare_model(
        model, LoRAConfig(kind=kind) if kind == "full" else LoRAConfig(kind=kind, rank=4)
    )
    mx.random.seed(3)
    for name, array in flat(model.trainable_parameters()).items():
        if "lora_b" in name or name.endswith(".m"):
            change = 0.1 * mx.random.normal(array.shape)
            model.load_weights([(name, array + change)], strict=False)
    return model


def flat(tree: Any) -> dict[str, mx.array]:
    found: Any = tree_flatten(tree)
    return dict(found)


def apart(found: Any, wanted: Any) -> float:
    """The largest difference of two trees of gradients, in parts of the largest gradient."""
    ours, theirs = flat(found), flat(wanted)
    assert ours.keys() == theirs.keys()
    assert ours
    largest = max(float(np.abs(np.array(array)).max()) for array in theirs.values())
    return max(float(np.abs(np.array(ours[name] - theirs[name])).max()) for name in ours) / largest


def plain_loss(model: Model, samples: list[Sample]) -> mx.array:
    """Every logit of every text, one text after the other."""
    total = mx.array(0.0)
    for text in samples:
        logits = model(mx.array([text.ids]))[0, :-1]
        each = nn.losses.cross_entropy(logits, mx.array(text.ids[1:]))
        total = total + (each * mx.array(text.mask[1:])).sum()
    return total


# Cross-entropy


@pytest.mark.parametrize("compute", [full_gradients, layerwise_gradients])
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("lora", {}),
        ("dora", {}),
        ("dora", {"attention_bias": True}),
        ("full", {}),
        ("full", {"tie_word_embeddings": False}),
        ("lora", {"tie_word_embeddings": False}),
        ("lora", MOE),
        ("full", MOE),
        ("dora", MLA),
        ("full", MLA),
        *(("dora", {"packing": packing}) for packing in PACKINGS),
    ],
)
def test_gradients_are_those_of_all_logits_at_once(
    kind: str, changes: dict[str, Any], compute: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK", 512 * 20)
    monkeypatch.setattr(cpu_softmax, "FEW", 0)
    model = trained(kind, **changes)
    parameters = flat(model.trainable_parameters())
    samples = [sample(60), sample(33), sample(8)]
    expected, expected_gradients = nn.value_and_grad(model, plain_loss)(model, samples)
    set_parameters(model, parameters)
    if compute is layerwise_gradients:
        cpu_kernels.use_fast_kernels(model)
    objective, batch = CrossEntropy(), batch_of(samples)
    reduction = partial(objective.sums, batch=batch)
    sums, gradients = compute(model, parameters, batch, reduction, mx.array(2.0))
    assert sums["loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    tolerance = 1e-4 if "packing" in changes else 1e-5
    assert apart({n: 2 * array for n, array in gradients.items()}, expected_gradients) < tolerance
    loss = objective.sums(batch_losses(model, batch), batch)["loss"]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_packed_head_gives_the_gradients_of_its_matrix() -> None:
    model = trained(packing=PACKINGS[0])
    hidden, targets = mx.random.normal((50, 64)), mx.random.randint(0, 512, (50,))

    def plain(hidden: mx.array) -> mx.array:
        return nn.losses.cross_entropy(model.logits(hidden), targets).sum()

    def ours(hidden: mx.array) -> mx.array:
        return cross_entropy.token_losses(model, hidden, targets).sum()

    wanted, found = mx.grad(plain)(hidden), mx.grad(ours)(hidden)
    assert apart({"hidden": found}, {"hidden": wanted}) < 1e-5


@pytest.mark.parametrize("count", [1, 20, 21, 60])
def test_losses_are_the_same_in_chunks_of_any_size(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_model()
    model.freeze()
    hidden, targets = mx.random.normal((count, 64)), mx.random.randint(0, 512, (count,))
    wanted = nn.losses.cross_entropy(model.logits(hidden), targets)
    monkeypatch.setattr(cross_entropy, "CHUNK", 512 * 20)
    for gradients, eager in product((True, False), (True, False)):
        found = cross_entropy.token_losses(model, hidden, targets, gradients=gradients, eager=eager)
        assert mx.allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_padding_changes_nothing() -> None:
    model = random_model()
    model.freeze()
    short, long = sample(9), sample(90)
    alone = [batch_losses(model, batch_of([text])) for text in (short, long)]
    batch = batch_of([short, long])
    sums = batch.by_text(batch_losses(model, batch))
    for number, (text, each) in enumerate(zip((short, long), alone, strict=True)):
        assert sums[number].item() == pytest.approx(each[: text.targets].sum().item(), rel=1e-5)


# Kernels


@pytest.mark.parametrize("mask", ["causal", None, "padding"])
def test_attention_has_the_gradients_of_mlx(mask: str | None) -> None:
    B, H, K, T, D = 2, 4, 2, 60, 16
    q, k, v = (mx.random.normal((B, heads, T, D)) for heads in (H, K, K))
    weights = mx.random.normal((B, H, T, D))
    seen: Any = mask
    if mask == "padding":
        seen = mx.random.uniform(shape=(B, 1, T, T)) < 0.7

    def through(attention: Callable[..., mx.array]) -> Callable[..., mx.array]:
        return lambda q, k, v: (attention(q, k, v, scale=0.25, mask=seen) * weights).sum()

    wanted = mx.grad(through(mx.fast.scaled_dot_product_attention), (0, 1, 2))(q, k, v)
    found = mx.grad(through(cpu_kernels.attention), (0, 1, 2))(q, k, v)
    for ours, theirs in zip(found, wanted, strict=True):
        assert mx.abs(ours - theirs).max().item() < 2e-5


def test_silu_has_the_gradients_of_mlx() -> None:
    shape = (3, 80, 100)
    gate, up, weights = (mx.random.normal(shape) * scale for scale in (9, 1, 1))
    gate = mx.where(mx.random.uniform(shape=shape) < 0.05, mx.sign(gate) * 100, gate)

    def plain(gate: mx.array, up: mx.array) -> mx.array:
        return (gate * mx.sigmoid(gate) * up * weights).sum()

    def ours(gate: mx.array, up: mx.array) -> mx.array:
        return (cpu_kernels.silu_times(gate, up) * weights).sum()

    assert ours(gate, up).item() == pytest.approx(plain(gate, up).item(), rel=1e-4)
    for found, wanted in zip(
        mx.grad(ours, (0, 1))(gate, up), mx.grad(plain, (0, 1))(gate, up), strict=True
    ):
        assert mx.allclose(found, wanted, rtol=1e-4, atol=1e-5)


# Adapters


def test_an_adapter_begins_as_nothing() -> None:
    ids = mx.array([sample(20).ids])
    for kind in ("lora", "dora"):
        model = random_model(attention_bias=True)
        before = model(ids)
        lora.prepare_model(model, LoRAConfig(kind=kind))
        assert mx.allclose(model(ids), before, atol=1e-5)


@pytest.mark.parametrize("packing", PACKINGS, ids=lambda packing: packing.mode)
def test_rows_of_a_packed_layer_are_as_long_as_those_of_its_matrix(packing: Quantization) -> None:
    model = random_model()
    quantize(model, packing)
    mx.random.seed(3)
    layer = model.layers[0].mlp.down_proj
    found = LoRALinear(layer, LoRAConfig(kind="dora", rank=4))
    found.lora_b = 0.1 * mx.random.normal(found.lora_b.shape)
    whole = dense(layer) + found.scale * (found.lora_a @ found.lora_b).T  # (out, in)
    wanted = mx.linalg.norm(whole, axis=1)
    assert mx.allclose(found._row_lengths(mx.float32), wanted, rtol=1e-4)
    x = mx.random.normal((5, whole.shape[1]))
    plain = x @ (whole * (found.m / wanted)[:, None]).T
    assert mx.allclose(found(x), plain, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("packing", [None, PACKINGS[0]])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_saved_adapter_is_the_trained_one(
    kind: str, packing: Quantization | None, tmp_path: Path
) -> None:
    def base() -> Model:
        model = random_model()
        if packing is not None:
            quantize(model, packing)
        return model

    model = trained(kind, packing)
    tensors, config = lora.adapter_weights(model, LoRAConfig(kind=kind, rank=4))
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), tensors)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    ids = mx.array([sample(20).ids])
    expected = model(ids)
    with lora.without_adapters(model):
        assert mx.array_equal(model(ids), base()(ids))
    for plain in (base(), fuse(base())):
        apply_adapter(plain, read_adapter(tmp_path))
        assert mx.abs(plain(ids) - expected).max().item() < 1e-3


def test_dropout_is_drawn_anew_by_key_and_off_outside_training() -> None:
    model = random_model()
    lora.prepare_model(model, LoRAConfig(dropout=0.5))
    for _, module in lora.adapters(model):
        module.lora_b = 0.1 * mx.random.normal(module.lora_b.shape)
    ids, seen = mx.array([sample(20).ids]), []
    model.train()
    for key in (1, 1, 2):
        lora.seed_dropout(model, mx.random.key(key))
        seen.append(model(ids))
    assert mx.array_equal(seen[0], seen[1])
    assert not mx.array_equal(seen[0], seen[2])
    model.eval()
    assert mx.array_equal(model(ids), model(ids))


@pytest.mark.parametrize(
    ("create", "message"),
    [
        (lambda: LoRAConfig(kind="magic"), "kind must be one of lora, dora, full, got 'magic'"),
        (lambda: LoRAConfig(rank=0), "rank must be 1 or more"),
        (lambda: LoRAConfig(dropout=1.0), "dropout must be 0 or more and below 1"),
        (lambda: LoRAConfig(kind="full", rank=16), "rank is for adapters"),
        (lambda: PreferenceLoss(loss="ppo"), "loss must be one of dpo"),
        (lambda: PreferenceLoss(beta=0.0), "beta must be above 0, got 0"),
        (
            lambda: PreferenceLoss(label_smoothing=0.5),
            "label_smoothing must be 0 or more and below 0.5",
        ),
        (lambda: PreferenceLoss(loss="ipo", label_smoothing=0.1), "for dpo, not for ipo"),
        (lambda: PreferenceLoss(loss="kto", length_normalized=True), "for dpo and ipo, not kto"),
        (
            lambda: lora.prepare_model(random_model(), LoRAConfig(layers=3)),
            "layers must be at most 2, the model's layers, got 3",
        ),
        (
            lambda: lora.prepare_model(random_model(), LoRAConfig(modules=("w1",))),
            r"modules must be some of .*q_proj.*, got 'w1'",
        ),
        (lambda: trained("full", PACKINGS[0]), "full training needs unpacked weights"),
    ],
)
def test_options_that_cannot_be_are_refused(create: Callable[[], object], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        create()


def test_only_the_chosen_layers_and_modules_are_trained() -> None:
    for method, layers in (
        (LoRAConfig(layers=1), {"1"}),
        (LoRAConfig(kind="full", layers=1), {"1"}),
        (LoRAConfig(modules=("q_proj", "down_proj")), {"0", "1"}),
    ):
        model = random_model()
        lora.prepare_model(model, method)
        paths = [name.split(".") for name in flat(model.trainable_parameters())]
        assert {path[2] for path in paths} == layers
        assert method.modules is None or {path[4] for path in paths} == set(method.modules)


# Preferences, against NumPy in float64

LOGS = [RANDOM.normal(-20, 5, 6) for _ in range(4)]


def log_sigmoid(x: Any) -> Any:
    return -np.logaddexp(0, -x)


def both(
    ours: Callable[[mx.array, mx.array], dict[str, mx.array]],
    theirs: Callable[[Any, Any], Any],
    first: Any,
    second: Any,
) -> None:
    """Compare a loss, and its gradient by finite differences of the other."""
    arrays = [mx.array(array.astype(np.float32)) for array in (first, second)]
    assert ours(*arrays)["loss"].item() == pytest.approx(theirs(first, second).sum(), rel=1e-4)
    found = mx.grad(lambda a, b: ours(a, b)["loss"], (0, 1))(*arrays)
    for number, gradient in enumerate(found):
        for place in range(len(first)):
            up, down = ([first.copy(), second.copy()] for _ in range(2))
            up[number][place] += 1e-5
            down[number][place] -= 1e-5
            slope = (theirs(*up).sum() - theirs(*down).sum()) / 2e-5
            assert gradient[place].item() == pytest.approx(slope, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_dpo_is_the_papers(smoothing: float) -> None:
    def theirs(chosen: Any, rejected: Any) -> Any:
        margin = 0.3 * (chosen - rejected)
        return -(1 - smoothing) * log_sigmoid(margin) - smoothing * log_sigmoid(-margin)

    both(lambda a, b: dpo(a, b, 0.3, smoothing), theirs, LOGS[0] / 4, LOGS[1] / 4)


def test_ipo_is_the_papers() -> None:
    both(lambda a, b: ipo(a, b, 0.3), lambda a, b: (a - b - 1 / 0.6) ** 2, LOGS[0] / 4, LOGS[1] / 4)


def test_orpo_is_the_papers() -> None:
    tokens, others = np.array([3, 5, 9, 4, 4, 7]), np.array([2, 8, 8, 5, 3, 6])

    def theirs(chosen: Any, rejected: Any) -> Any:
        p, q = np.exp(chosen / tokens), np.exp(rejected / others)
        return -chosen / tokens - 0.3 * log_sigmoid(np.log(p / (1 - p)) - np.log(q / (1 - q)))

    both(lambda a, b: orpo(a, b, mx.array(tokens), mx.array(others), 0.3), theirs, LOGS[0], LOGS[1])
    certain = orpo(*(mx.array([x]) for x in (0.0, -1e-9, 1.0, 1.0)), 0.1)
    assert mx.isfinite(certain["loss"]).item()


def test_a_negative_estimate_of_the_divergence_is_told_as_it_is() -> None:
    logs = [mx.array(values) for values in ([1.0, 2.0], [-0.5, -0.25])]
    sums = kto(*logs, mx.array([True, False]), 0.3)
    assert sums["kl"].item() / 2 == pytest.approx(-0.375)
    assert sums["loss"].item() == pytest.approx(2 - 1 / (1 + np.exp(-0.3)) - 1 / (1 + np.exp(0.6)))


def test_kto_is_the_papers() -> None:
    good = np.array([True, False, True, True, False, False])
    gain, mismatched = LOGS[2] / 5 + 4, LOGS[3] / 5 + 5
    far = max(mismatched.mean(), 0)

    def theirs(gain: Any, _: Any) -> Any:
        sign = np.where(good, 1, -1)
        return 1 - np.exp(log_sigmoid(0.3 * sign * (gain - far)))

    both(lambda a, b: kto(a, b, mx.array(good), 0.3), theirs, gain, mismatched)


@pytest.mark.parametrize(
    ("loss", "normalized"),
    [("dpo", False), ("ipo", False), ("orpo", False), ("kto", False), ("dpo", True), ("ipo", True)],
)
def test_preferences_are_over_the_replies_log_probabilities(loss: str, normalized: bool) -> None:
    """Of model and reference, each text computed alone."""
    model, reference = trained(), random_model()
    pairs = [Pair(sample(20, 5), sample(31, 5)), Pair(sample(9, 4), sample(12, 4))]
    items: list[Item] = [*pairs]
    if loss == "kto":
        items = [Labelled(pair.chosen, number == 0) for number, pair in enumerate(pairs)]
    objective = PreferenceLoss(loss=loss, beta=0.3, length_normalized=normalized)

    def log_of(model: Model, text: Sample) -> float:
        log = -float(np.array(plain_loss(model, [text])))
        return log / text.targets if normalized else log

    def gain(text: Sample) -> mx.array:
        return mx.array([log_of(model, text) - log_of(reference, text)])

    batch = add_reference(model, objective, objective.batch(items))
    found = objective.sums(batch_losses(model, batch), batch)["loss"].item()
    wanted = mx.array(0.0)
    if loss == "kto":
        a, b = (pair.chosen for pair in pairs)
        swapped = [
            Sample(a.ids[:5] + b.ids[4:], a.mask[:5] + b.mask[4:]),
            Sample(b.ids[:4] + a.ids[5:], b.mask[:4] + a.mask[5:]),
        ]
        gains, others = (mx.concatenate([gain(t) for t in each]) for each in ((a, b), swapped))
        wanted = kto(gains, others, mx.array([True, False]), 0.3)["loss"]
    for pair in pairs if loss != "kto" else ():
        if loss == "orpo":
            logs = [mx.array([log_of(model, text)]) for text in (pair.chosen, pair.rejected)]
            counts = [mx.array([t.targets]) for t in (pair.chosen, pair.rejected)]
            wanted = wanted + orpo(*logs, *counts, 0.3)["loss"]
        else:
            each = {"dpo": dpo, "ipo": ipo}[loss]
            wanted = wanted + each(gain(pair.chosen), gain(pair.rejected), 0.3)["loss"]
    assert found == pytest.approx(wanted.item(), rel=1e-3)
