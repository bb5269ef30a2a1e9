"""Lists the Metal kernel that MLX takes for each product of a decode step, from a config alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from ..model.config import Config
from ..model.config_sections import Quantization
from ..model.kernels import qmv_rule
from ..model.layout import WIDE

DENSE, TRANSPOSED = "not packed", "qvm"
FAST = (qmv_rule.FAST, qmv_rule.GUARDED, qmv_rule.QUAD)


@dataclass(frozen=True, kw_only=True)
class DecodeProduct:
    """A matrix of the inference form that a decode step multiplies one row by."""

    name: str
    outputs: int
    inputs: int
    packing: Quantization | None
    stacked: int = 0
    """Experts in one array that a token is routed to; 0: it is no such array."""
    transposed: bool = False

    def kernel(self, mlx: str) -> str:
        if self.packing is None:
            return DENSE
        if self.transposed:
            return TRANSPOSED
        bits, stacked = self.packing.bits, bool(self.stacked)
        return qmv_rule.choose(self.outputs, self.inputs, bits, mlx, stacked=stacked)

    @property
    def size(self) -> float:
        """Bytes read; those of a matrix that is not packed in 16 bits a weight."""
        bits = self.packing.bits_per_weight if self.packing else 16
        return self.outputs * self.inputs * bits / 8 * (self.stacked or 1)


def products(config: Config, mlx: str, wide: str | None = None) -> Counter[DecodeProduct]:
    """How often a step multiplies by each matrix; `wide` as of model/layout.py."""
    layers, widths = range(config.num_hidden_layers), _widths(config, mlx, wide)
    found = Counter(product for number in layers for product in _of_layer(config, number, widths))
    head = "model.embed_tokens" if config.tie_word_embeddings else "lm_head"
    rows = config.vocab_size + (-config.vocab_size % qmv_rule.ROWS if wide == "all" else 0)
    packing = _packing(config, head)
    found[DecodeProduct(name="head", outputs=rows, inputs=widths[0], packing=packing)] += 1
    return found


def widens(config: Config, mlx: str, wide: str) -> bool:
    """Whether zero columns make a width of this config a multiple of the kernel's step."""
    possible = not config.num_experts and (wide == "inner" or not config.mla)
    which = 0 if wide == "all" else 1
    return possible and _widths(config, mlx, wide)[which] != _widths(config, mlx, None)[which]


def fast_share(counts: Counter[DecodeProduct], mlx: str) -> float:
    """The share of the bytes that go through a fast kernel."""
    fast = sum(p.size * n for p, n in counts.items() if p.kernel(mlx) in FAST)
    return fast / total_size(counts)


def total_size(counts: Counter[DecodeProduct]) -> float:
    """Bytes read by a step."""
    return sum(product.size * n for product, n in counts.items())


def rows(config: Config, mlx: str) -> list[dict[str, Any]]:
    """A row for each matrix, with its kernel and its share of the bytes of a step."""
    counts = products(config, mlx)
    total = total_size(counts)
    return [
        {
            "product": product.name,
            "outputs": product.outputs,
            "inputs": product.inputs,
            "bits": product.packing.bits if product.packing else 16,
            "kernel": product.kernel(mlx),
            "count": count,
            "share": round(product.size * count / total, 4),
        }
        for product, count in counts.items()
    ]


def summary(config: Config, mlx: str) -> str:
    """Lines about the share of the fast kernels, as the model is and with zero columns."""
    counts = products(config, mlx)
    lines = [
        f"On Metal, MLX {mlx} reads {fast_share(counts, mlx):.0%} of a token's weights with fast "
        "kernels."
    ]
    for wide in WIDE:
        if widens(config, mlx, wide):
            padded = products(config, mlx, wide)
            more = total_size(padded) / total_size(counts) - 1
            lines.append(
                f"With zero columns ({wide}) it would be {fast_share(padded, mlx):.0%}, of "
                f"{more:.1%} more bytes: `bench --tune` measures whether that is faster."
            )
    return "\n".join(lines)


def _of_layer(config: Config, number: int, widths: tuple[int, int]) -> Iterator[DecodeProduct]:
    layer, shapes = f"model.layers.{number}", config.projections

    def joined(name: str, parts: Iterable[str]) -> Iterator[DecodeProduct]:
        """Projections of one input: one product, or one each where their packings differ."""
        packings = {part: _packing(config, f"{layer}.{part}") for part in parts}
        padded = {part: _shape(part, shapes[part], config, widths) for part in packings}
        if len(set(packings.values())) > 1:
            for part, packing in packings.items():
                (inputs, outputs), own = padded[part], part.rpartition(".")[2]
                yield DecodeProduct(name=own, outputs=outputs, inputs=inputs, packing=packing)
            return
        inputs = next(iter(padded.values()))[0]
        outputs = sum(out for _, out in padded.values())
        packing = next(iter(packings.values()))
        yield DecodeProduct(name=name, outputs=outputs, inputs=inputs, packing=packing)

    if mla := config.mla:
        down = ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa")
        yield from joined("q_a_proj + kv_a_proj", down)
        yield from joined("q_b_proj", ["self_attn.q_b_proj"])
        packing, heads = (
            _packing(config, f"{layer}.self_attn.kv_b_proj"),
            config.num_attention_heads,
        )
        rank, nope, value = mla.kv_lora_rank, mla.qk_nope_head_dim, mla.v_head_dim
        for _ in range(heads):  # one kernel, a head's rows each
            yield DecodeProduct(
                name="kv_b_proj, queries", outputs=rank, inputs=nope, packing=packing,
                transposed=True,
            )  # fmt: skip
            yield DecodeProduct(
                name="kv_b_proj, values", outputs=value, inputs=rank, packing=packing
            )
    else:
        yield from joined("q + k + v_proj", [f"self_attn.{part}_proj" for part in "qkv"])
    yield from joined("o_proj", ["self_attn.o_proj"])
    if not config.num_experts:
        yield from joined("gate + up_proj", ["mlp.gate_proj", "mlp.up_proj"])
        yield from joined("down_proj", ["mlp.down_proj"])
        return
    used, packing = config.num_experts_per_tok, _packing(config, f"{layer}.mlp.experts.0.w1")
    H, F = config.hidden_size, config.intermediate_size
    yield DecodeProduct(name="router", outputs=config.num_experts, inputs=H, packing=None)
    yield DecodeProduct(
        name="experts' w1 + w3", outputs=2 * F, inputs=H, packing=packing, stacked=used
    )
    yield DecodeProduct(name="experts' w2", outputs=H, inputs=F, packing=packing, stacked=used)


def _shape(
    part: str, shape: tuple[int, int], config: Config, widths: tuple[int, int]
) -> tuple[int, int]:
    """Inputs and outputs with their zero columns and rows."""
    (inputs, outputs), (hidden, inner) = shape, widths
    if part.startswith("mlp."):
        return (inner, hidden) if part == "mlp.down_proj" else (hidden, inner)
    if part == "self_attn.o_proj":
        return inputs, hidden
    return (hidden if inputs == config.hidden_size else inputs), outputs


def _widths(config: Config, mlx: str, wide: str | None) -> tuple[int, int]:
    """Of the residual stream, and between the projections of a feed-forward layer."""
    packings = [config.quantization, *(packing for _, packing in config.layer_quantization)]
    step = max((qmv_rule.step(p.bits, mlx) for p in packings if p is not None), default=1)
    hidden, inner = config.hidden_size, config.intermediate_size
    return (
        hidden + (-hidden % step if wide == "all" else 0),
        inner + (-inner % step if wide is not None else 0),
    )


def _packing(config: Config, path: str) -> Quantization | None:
    if path in config.unpacked:
        return None
    return dict(config.layer_quantization).get(path, config.quantization)
