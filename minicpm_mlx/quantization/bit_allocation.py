"""Bit allocation: the packing of each matrix, uniform or by sensitivity under a size limit.

`allocate` minimizes the total cost for a number of bits: each unit starts with its smallest packing
and the upgrade that saves most cost per bit is taken first. On convex costs, which the lower hull
of each unit's choices guarantees, this greedy order is optimal up to the last step that fits.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import asdict
from itertools import pairwise
from math import prod
from typing import Any, NamedTuple

from ..errors import InvalidArgumentError
from ..model.config_sections import PACKINGS, Quantization
from ..weights.checkpoint import Checkpoint

Plan = Mapping[str, Quantization]
"""Packing of each matrix, by path; matrices not in it stay as they are."""

Costs = Mapping[str, Mapping[Quantization, float]]
"""Divergence that each packing of a matrix adds, in nats a token, by the matrix's path."""

CHOICES = tuple(
    Quantization(bits=bits, group_size=group) for bits in (3, 4, 5, 6, 8) for group in (32, 64, 128)
)
"""Packings to choose from."""

_ALIKE = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up"}
_ALIKE |= {"up_proj": "gate_up", "w1": "w13", "w3": "w13"}
_ALIKE |= {"q_a_proj": "qkv_a", "kv_a_proj_with_mqa": "qkv_a"}


def sizes(checkpoint: Checkpoint) -> dict[str, tuple[int, int]]:
    """Every matrix that can be packed, by its path: (rows, columns).

    Routers stay as they are: they are small, and a token sent elsewhere is a large error.
    """
    config, shapes = checkpoint.config, {}
    packed = dict(config.layer_quantization)
    for name, tensor in checkpoint.tensors.items():
        module = name.removesuffix(".weight")
        if module == name or len(tensor.shape) != 2 or module.endswith("mlp.gate"):
            continue
        rows, columns = tensor.shape
        if f"{module}.scales" in checkpoint.tensors:
            packing = packed.get(module, config.quantization)
            assert packing is not None, "read_checkpoint refuses scales without a packing"
            columns = columns * 32 // packing.bits
        shapes[module] = (rows, columns)
    return shapes


def uniform(checkpoint: Checkpoint, packing: Quantization) -> dict[str, Quantization]:
    """`packing` for every matrix whose rows divide into its groups; the others stay dense.

    InvalidArgumentError if there are none, or if these hold less than half of the weights and a
    smaller group size would pack more.
    """
    shapes = sizes(checkpoint)
    total = sum(map(prod, shapes.values()))

    def share(group_size: int) -> float:
        return sum(prod(shape) for shape in shapes.values() if not shape[1] % group_size) / total

    size, found = packing.group_size, share(packing.group_size)
    smaller = [s for s in PACKINGS[packing.mode][1] if s < size and share(s) > found]
    if found < 0.5 and smaller:
        raise InvalidArgumentError(
            f"groups of {size} weights divide the rows of {found:.0%} of this model; choose a "
            f"smaller group size: groups of {smaller[0]} divide those of {share(smaller[0]):.0%}"
        )
    if not found:
        raise nothing_to_pack(shapes)
    return {path: packing for path, (_, width) in shapes.items() if width % size == 0}


def nothing_to_pack(shapes: Mapping[str, tuple[int, int]]) -> InvalidArgumentError:
    """The error for a model whose matrices divide into no groups."""
    widths = ", ".join(str(width) for width in sorted({width for _, width in shapes.values()}))
    return InvalidArgumentError(
        f"the rows of this model's matrices are {widths} weights long, which divide into no groups "
        "that MLX packs; use it as it is"
    )


def unit(path: str) -> str:
    """Key of the matrices that fused.py joins into one, and that must be packed alike for that."""
    parent, _, name = path.rpartition(".")
    return f"{re.sub(r'experts[.][0-9]+', 'experts', parent)}.{_ALIKE.get(name, name)}"


class _Step(NamedTuple):
    """A packing of a unit, with more bits and less cost than the step before."""

    bits: float
    cost: float
    packing: Quantization


def allocate(
    costs: Costs, shapes: Mapping[str, tuple[int, int]], bits_per_weight: float
) -> dict[str, Quantization]:
    """The plan of least cost within `bits_per_weight` on average, scales included.

    Matrices without a cost divide into no groups; they stay dense and do not count. Raises
    InvalidArgumentError if even the smallest packings take more.
    """
    costs = {path: by_packing for path, by_packing in costs.items() if by_packing}
    if not costs:
        raise nothing_to_pack(shapes)
    weights = sum(prod(shapes[path]) for path in costs)
    paths = _by_unit(costs)
    steps = {name: _steps(members, costs, shapes) for name, members in paths.items()}
    chosen = {name: options[0] for name, options in steps.items()}
    used = sum(step.bits for step in chosen.values())
    if used > bits_per_weight * weights:
        raise InvalidArgumentError(
            f"expected {used / weights:.2f} bits per weight or more, got {bits_per_weight:g}"
        )
    upgrades = [
        ((before.cost - after.cost) / (after.bits - before.bits), name, before, after)
        for name, options in steps.items()
        for before, after in pairwise(options)
    ]
    for _, name, before, after in sorted(upgrades, key=lambda u: -u[0]):
        fits = used + after.bits - before.bits <= bits_per_weight * weights
        if chosen[name] is before and fits:
            chosen[name] = after
            used += after.bits - before.bits
    return {path: chosen[name].packing for name, members in paths.items() for path in members}


def _by_unit(costs: Costs) -> dict[str, list[str]]:
    units = defaultdict(list)
    for path in costs:
        units[unit(path)].append(path)
    return units


def _steps(members: list[str], costs: Costs, shapes: Mapping[str, tuple[int, int]]) -> list[_Step]:
    """The packings worth choosing, on the lower convex hull of cost over bits."""
    size = sum(prod(shapes[path]) for path in members)
    options = [
        _Step(
            size * packing.bits_per_weight, sum(costs[path][packing] for path in members), packing
        )
        for packing in costs[members[0]]
    ]
    hull: list[_Step] = []
    for option in sorted(options, key=lambda step: step.bits):
        if hull and option.cost >= hull[-1].cost:
            continue
        while len(hull) > 1 and _slope(hull[-2], option) <= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(option)
    return hull


def _slope(a: _Step, b: _Step) -> float:
    return (b.cost - a.cost) / (b.bits - a.bits)


def quantization_section(plan: Plan) -> dict[str, Any]:
    """config.json's `quantization`: the commonest packing, and the exceptions by path."""
    usual = Counter(plan.values()).most_common(1)[0][0]
    special = {path: asdict(packing) for path, packing in plan.items() if packing != usual}
    return asdict(usual) | special
