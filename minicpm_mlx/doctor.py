"""Reports the device, formats and memory of this machine, with hints for more speed."""

from __future__ import annotations

import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

import mlx.core as mx

from . import device
from .errors import MiniCPMError
from .loading.plan import kept_config
from .memory import MemoryEstimate, estimate
from .model.kernels import qmv_rule
from .model_cards import cache_dir, cards, data_dir
from .weights.lazy_tensor import dtype_name


def examine() -> dict[str, str | int | None]:
    """Versions, device, BLAS, number format and memory in use by default."""
    device.select()
    stored = mx.bfloat16  # as MiniCPM is published
    return {
        "minicpm-mlx": _version("minicpm-mlx"),
        "mlx": _version("mlx"),
        "mlx-lm": _version("mlx-lm"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "chip": device.chip(),
        "device": "cpu" if device.on_cpu() else "gpu",
        "blas": (device.blas or "MLX's own") if device.on_cpu() else None,
        "command_buffers": device.command_buffers,
        "dtype": dtype_name(device.choose_dtype(stored)),
        "memory_bytes": device.total_memory(),
        "available_bytes": device.available_memory(),
        "cache": str(cache_dir()),
        "data": str(data_dir()),
    }


def kept_plans() -> dict[str, MemoryEstimate]:
    """Memory that each model on this disk would take, at its longest context."""
    device.select()
    plans = {}
    for card in cards().values():
        with suppress(MiniCPMError):
            if (config := kept_config(card)) is not None:
                plans[card.name] = estimate(config, context=card.context)
    return plans


def advice(facts: dict[str, str | int | None]) -> list[str]:
    """Hints for more speed, a line each."""
    hints: list[str] = []
    if facts["device"] == "gpu" and platform.system() == "Darwin":
        hints += filter(None, [qmv_rule.warning(str(facts["mlx"] or ""))])
    if facts["device"] == "cpu" and platform.system() == "Darwin":
        hints.append("MLX sees no Metal GPU here; a Mac with Apple silicon has one.")
    if facts["device"] == "cpu" and platform.system() == "Linux":
        if device.blas is None:
            hints.append(
                "MLX's own BLAS is 35 to 70 times slower than OpenBLAS: "
                "apt install libopenblas0 (or your system's package of it)."
            )
        elif "mkl" not in device.blas and platform.machine() == "x86_64":
            hints.append(
                "Intel's MKL decodes about a quarter faster than this OpenBLAS, for 1 GB of disk: "
                "pip install mkl."
            )
    return hints


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
