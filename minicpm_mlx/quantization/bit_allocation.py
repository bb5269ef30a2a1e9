"""Which bits each matrix gets: all the same, or more where they count, under a size."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import asdict
from itertools import pairwise
from math import prod
from typing import Any, NamedTuple

from ..errors import InvalidArgumentError
from ..model.config_sections import Quantization
from ..weights.checkpoint import Checkpoint

Plan = Mapping[str, Quantization]
"""By the path of a matrix how it is packed; those that are not in it stay as they are."""

Costs = Mapping[str, Mapping[Quantization, float]]
"""By the path of a matrix what each packing adds to the divergence, in nats a token."""

CHOICES = tuple(
    Quantization(bits=bits, group_size=group) for bits in (3, 4, 5, 6, 8) for group in (32, 64, 128)
)
"""Packings to choose from."""

_ALIKE = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up"}
_ALIKE |= {"up_proj": "gate_up", "w1": "w13", "w3": "w13"}


def sizes(checkpoint: Checkpoint) -> dict[str, tuple[int, int]]:
    """Every matrix that can be packed, by its path: (rows, columns).

    Routers stay as they are: they are small, and a token sent elsewhere is a large error.
    """
    config, found = checkpoint.config, {}
    packed = dict(config.layer_quantization)
    for name, tensor in checkpoint.tensors.items():
        module = name.removesuffix(".weight")
        if module == name or len(tensor.shape) != 2 or module.endswith("mlp.gate"):
            continue
        rows, columns = tensor.shape
        if f"{module}.scales" in checkpoint.tensors:
            how = packed.get(module, config.quantization)
            assert how is not None  # or reading it had failed
            columns = columns * 32 // how.bits
        found[module] = (rows, columns)
    return found


def uniform(checkpoint: Checkpoint, packing: Quantization) -> dict[str, Quantization]:
    """`packing` for every matrix whose rows divide into its groups.

    InvalidArgumentError: they hold less than half of the weights.
    """
    matrices = sizes(checkpoint)
    plan = dict.fromkeys(
        (path for path, (_, width) in matrices.items() if width % packing.group_size == 0), packing
    )
    total = sum(map(prod, matrices.values()))
    share = sum(prod(matrices[path]) for path in plan) / total
    if share < 0.5:
        raise InvalidArgumentError(
            f"groups of {packing.group_size} weights divide the rows of {share:.0%} of this model; "
            "choose a smaller group size"
        )
    return plan


def unit(path: str) -> str:
    """What must be packed alike to become one matrix in the inference form (see fuse.py)."""
    parent, _, name = path.rpartition(".")
    return f"{re.sub(r'experts[.][0-9]+', 'experts', parent)}.{_ALIKE.get(name, name)}"


class _Step(NamedTuple):
    """One more packing of a unit, dearer and better than the one before."""

    bits: float
    cost: float
    packing: Quantization


def allocate(
    costs: Costs, shapes: Mapping[str, tuple[int, int]], bits_per_weight: float
) -> dict[str, Quantization]:
    """The plan of least cost of which the matrices take `bits_per_weight` on average.

    Units begin with their smallest packing, and the step that saves most a bit is taken, until no
    other fits. InvalidArgumentError: even the smallest packings take more.
    """
    weights = sum(rows * columns for rows, columns in shapes.values())
    paths = _by_unit(costs)
    steps = {name: _steps(members, costs, shapes) for name, members in paths.items()}
    chosen = {name: found[0] for name, found in steps.items()}
    used = sum(step.bits for step in chosen.values())
    if used > bits_per_weight * weights:
        raise InvalidArgumentError(
            f"expected {used / weights:.2f} bits per weight or more, got {bits_per_weight:g}"
        )
    upgrades = [
        ((before.cost - after.cost) / (after.bits - before.bits), name, before, after)
        for name, found in steps.items()
        for before, after in pairwise(found)
    ]
    for _, name, before, after in sorted(upgrades, key=lambda u: -u[0]):
        fits = used + after.bits - before.bits <= bits_per_weight * weights
        if chosen[name] is before and fits:
            chosen[name] = after
            used += after.bits - before.bits
    return {path: chosen[name].packing for name, members in paths.items() for path in members}


def _by_unit(costs: Costs) -> dict[str, list[str]]:
    found = defaultdict(list)
    for path in costs:
        found[unit(path)].append(path)
    return found


def _steps(members: list[str], costs: Costs, shapes: Mapping[str, tuple[int, int]]) -> list[_Step]:
    """The packings worth choosing, on the lower convex hull of cost over bits."""
    size = sum(shapes[path][0] * shapes[path][1] for path in members)
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


def stated(plan: Plan) -> dict[str, Any]:
    """`quantization` of config.json: the commonest packing, and under its path what differs."""
    usual = Counter(plan.values()).most_common(1)[0][0]
    special = {path: asdict(packing) for path, packing in plan.items() if packing != usual}
    return asdict(usual) | special
