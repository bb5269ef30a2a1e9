"""Rotary positions: the table and MLX's kernel agree, row by row and far out."""

import math
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from minicpm_mlx import device
from minicpm_mlx.model.config import Config
from minicpm_mlx.model.rope import Rope

DIM = 32
TRAINED = 64
LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "short_factor": [1 + 0.3 * i for i in range(DIM // 2)],
    "long_factor": [1.1 * 1.3**i for i in range(DIM // 2)],
    "original_max_position_embeddings": TRAINED,
}
SCALINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "linear": {"rope_scaling": {"type": "linear", "factor": 2.5}},
    "dynamic": {"rope_scaling": {"type": "dynamic", "factor": 4.0}},
    "longrope": {"rope_scaling": LONGROPE},
    "amplified": {"rope_scaling": LONGROPE, "max_position_embeddings": 4 * TRAINED},
}


def rope(kind: str, **changes: Any) -> Rope:
    raw = {
        "architectures": ["MiniCPMForCausalLM"],
        "hidden_size": 2 * DIM,
        "intermediate_size": 8,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "vocab_size": 8,
        "max_position_embeddings": TRAINED,
    }
    return Rope(Config.from_dict({**raw, **SCALINGS[kind], **changes}))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the way of a GPU, through mx.fast.rope."""
    monkeypatch.setattr(device, "on_cpu", lambda: False)


def by_table(rope: Rope, x: mx.array, offset: Any, length: Any) -> mx.array:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "on_cpu", lambda: True)
        return rope.at(offset, x.shape[2], length)(x)


def expected(
    x: mx.array, offset: int, inverse: np.ndarray, scale: float = 1.0, amplitude: float = 1.0
) -> np.ndarray:
    """Rotation of (B, H, T, D) in float64, by frequencies `inverse` (D/2)."""
    positions = (offset + np.arange(x.shape[2])) * scale
    angles = positions[:, None] * inverse
    cos, sin = np.cos(angles) * amplitude, np.sin(angles) * amplitude
    left, right = np.split(np.array(x).astype(np.float64), 2, axis=-1)
    return np.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)


def inverse(theta: float = 10000.0) -> np.ndarray:
    return theta ** -(np.arange(0, DIM, 2) / DIM)


def random(*shape: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(3)).astype(dtype)


def close(a: Any, b: Any, tolerance: float = 2e-5) -> bool:
    return np.abs(np.array(a) - np.array(b)).max() <= tolerance


@pytest.mark.parametrize("kind", SCALINGS)
@pytest.mark.parametrize(("offset", "length"), [(0, 9), (17, 26), (55, TRAINED), (56, TRAINED + 1)])
def test_table_and_kernel_agree(gpu: None, kind: str, offset: int, length: int) -> None:
    x = random(2, 3, 9, DIM)
    kernel = rope(kind).at(offset, 9, length)(x)
    assert close(kernel, by_table(rope(kind), x, offset, length))


def test_linear_divides_positions() -> None:
    x = random(1, 2, 7, DIM)
    found = by_table(rope("linear"), x, 5, 12)
    assert close(found, expected(x, 5, inverse(), scale=1 / 2.5))


@pytest.mark.parametrize("length", [TRAINED, TRAINED + 1, 200])
def test_dynamic_ntk_raises_the_base_past_the_trained_context(length: int) -> None:
    x = random(1, 2, 7, DIM)
    stretch = max(4.0 * length / TRAINED - 3.0, 1.0)
    base = 10000.0 * stretch ** (DIM / (DIM - 2))
    found = by_table(rope("dynamic"), x, length - 7, length)
    assert close(found, expected(x, length - 7, inverse(base)))


@pytest.mark.parametrize(
    ("kind", "length", "factors", "amplitude"),
    [
        ("longrope", TRAINED, "short_factor", 1.0),
        ("longrope", TRAINED + 1, "long_factor", 1.0),
        ("amplified", 7, "long_factor", math.sqrt(1 + math.log(4) / math.log(TRAINED))),
    ],
)
def test_longrope_picks_its_factors_and_amplitude(
    kind: str, length: int, factors: str, amplitude: float
) -> None:
    x = random(1, 2, 7, DIM)
    found = by_table(rope(kind), x, length - 7, length)
    frequencies = inverse() / np.array(LONGROPE[factors])
    assert close(found, expected(x, length - 7, frequencies, amplitude=amplitude))


@pytest.mark.parametrize("kind", SCALINGS)
@pytest.mark.parametrize("on_cpu", [True, False], ids=["table", "kernel"])
def test_a_row_is_rotated_as_if_alone(
    monkeypatch: pytest.MonkeyPatch, kind: str, on_cpu: bool
) -> None:
    monkeypatch.setattr(device, "on_cpu", lambda: on_cpu)
    x, steps = random(4, 2, 4, DIM), 4
    offsets = [0, 60, 61, 90]  # the last two past the trained context
    together = rope(kind).at(mx.array(offsets), steps, mx.array(offsets) + steps)(x)
    for row, offset in enumerate(offsets):
        alone = rope(kind).at(offset, steps, offset + steps)(x[row : row + 1])
        assert close(together[row : row + 1], alone)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize("kind", SCALINGS)
@pytest.mark.parametrize("on_cpu", [True, False], ids=["table", "kernel"])
def test_16_bit_inputs_keep_their_type(
    monkeypatch: pytest.MonkeyPatch, kind: str, dtype: mx.Dtype, on_cpu: bool
) -> None:
    monkeypatch.setattr(device, "on_cpu", lambda: on_cpu)
    x = random(1, 2, 4, DIM, dtype=dtype)
    found = rope(kind).at(80, 4, 84)(x)
    assert found.dtype == dtype
    wide = rope(kind).at(80, 4, 84)(x.astype(mx.float32))
    assert close(found.astype(mx.float32), wide, 0.06 if dtype == mx.bfloat16 else 0.008)


def test_far_positions_are_as_exact_as_float32_angles_allow() -> None:
    x = random(1, 2, 8, DIM)
    far = 60_000
    found = by_table(rope("plain", max_position_embeddings=2**17), x, far, far + 8)
    # An angle of 60,000 radians has steps of 0.004 in float32.
    assert close(found, expected(x, far, inverse()), 0.03)


def test_rotation_depends_on_distance_alone() -> None:
    q, k = random(1, 1, 1, DIM), random(1, 1, 2, DIM)[:, :, 1:]

    def score(at: int, distance: int) -> float:
        table = rope("plain")
        rotated = by_table(table, q, at + distance, 1), by_table(table, k, at, 1)
        return float((rotated[0] * rotated[1]).sum().item())

    assert score(0, 5) == pytest.approx(score(40, 5), abs=1e-4)
    assert score(0, 5) != pytest.approx(score(0, 6), abs=1e-2)
