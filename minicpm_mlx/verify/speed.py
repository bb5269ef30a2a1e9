"""A short measurement of speed on a model of random weights, as large as this machine allows."""

from __future__ import annotations

import time
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .. import device
from ..bench.chips import GB, bandwidth, expected
from ..bench.footprint import footprint
from ..bench.measure import MeasuredModel, environment, measure, works
from ..bench.shapes import packed_config, random_model
from ..memory import estimate
from ..model.kernels.cpu_gemv import split_matrices

GPU_SHAPES = ("2b-shape", "1b-shape", "4-0.5b-shape", "demo-shape")
"""The largest that takes half of the free memory is measured."""
CPU_SHAPE = "demo-shape"
CONTEXT = 1024
"""Tokens."""
REPETITIONS = 3


def measure_speed() -> list[dict[str, Any]]:
    """Rows as of `minicpm-mlx bench --json`: 512 tokens read, and 128 (on a CPU 64) decoded.

    Each also has `expected_ts`, tokens/s predicted for Apple's chips, else null, and
    `bandwidth_measured`: whether the roofline is of a measured bandwidth.
    """
    shape = choose_shape()
    known = bandwidth(device.chip())  # None for a Mac's processor, named otherwise
    model = random_model(shape)
    rate = known or _measured_bandwidth() / GB
    subject = MeasuredModel(name=shape, model=model, bandwidth=rate)
    gen = 64 if device.on_cpu() else 128
    facts, rows = environment(subject), []
    for result in measure(subject, works(gens=(gen,)), repetitions=REPETITIONS):
        row = {**facts, **result.row(), "bandwidth_measured": known is None, "expected_ts": None}
        if known is not None and result.work.gen:
            chip = device.chip().removeprefix("Apple ").strip()
            speed = expected(chip, footprint(packed_config(shape)), gen / 2)
            row["expected_ts"] = round(speed, 1)
        rows.append(row)
    del subject, model
    mx.clear_cache()
    return rows


def choose_shape() -> str:
    """The shape to measure here."""
    if device.on_cpu():
        return CPU_SHAPE
    half = device.available_memory() / 2
    for shape in GPU_SHAPES[:-1]:
        if estimate(packed_config(shape), context=CONTEXT).total <= half:
            return shape
    return GPU_SHAPES[-1]


def _measured_bandwidth() -> float:
    """Bytes a second at which this device multiplies large matrices by one row, at its best."""
    model = nn.Module()
    model.layer = nn.Linear(8192, 4096, bias=False)
    size, rows = model.layer.weight.nbytes, [mx.full((1, 8192), i) for i in range(4)]
    mx.eval(model.parameters(), rows)
    split_matrices(model)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        mx.eval([model.layer(row) for row in rows])
        seconds.append(time.perf_counter() - start)
    return len(rows) * size / min(seconds)
