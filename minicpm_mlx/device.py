"""The machine's device, BLAS, number formats and memory."""

from __future__ import annotations

import ctypes
import math
import os
import platform
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import InvalidArgumentError

if TYPE_CHECKING:
    import mlx.core as mx

DTYPES = ("float32", "bfloat16", "float16")
DEVICES = ("gpu", "cpu")

BUFFER_VARIABLES = ("MLX_MAX_OPS_PER_BUFFER", "MLX_MAX_MB_PER_BUFFER")
"""Kernels, and MB of distinct inputs, after which MLX ends a command buffer; its own limits are 20
to 50 kernels and 40 or 50 MB, by the size of the chip."""
MAX_OPS, MAX_MB = 1000, 400
"""As measured by others: 11 to 13 % faster on an M1 Ultra, 5 to 8 % on an M3 Ultra, nothing on M5
(ml-explore/mlx 4521, lablup/mlxcel 353 and 360)."""
LAST_SLOW_GENERATION = 4
"""Of chips that gain by it."""
MEMORY_SHARE = 80
"""A command buffer reads at most this fraction of the memory: 102 MB of 8 GiB."""

command_buffers: str | None = None
"""The limits in use, for people; None off a Mac."""
buffers_given = False
"""Whether the user set them."""

blas: str | None = None
"""The BLAS loaded ahead of MLX's own; None where none was found or needed."""


def preload_blas() -> None:
    """On Linux, load a fast BLAS for MLX's CPU backend to use in place of the one it bundles.

    The bundled reference BLAS is 35 to 70 times slower. The dynamic linker takes the first
    definition of a symbol, so this must run before `mlx.core` is imported anywhere; importing
    this package does it.
    """
    global blas
    if platform.system() != "Linux" or blas is not None:
        return
    if "mlx.core" in sys.modules:
        return  # too late to change what MLX is bound to
    # MKL first: it multiplies by a single row, as decoding does, twice as fast as OpenBLAS 0.3.21.
    mkl = sorted(map(str, (Path(sys.prefix) / "lib").glob("libmkl_rt.so*")))  # as pip installs it
    kernels = _openblas_kernels()
    if kernels:
        os.environ["OPENBLAS_CORETYPE"] = kernels
    for name in (*mkl, "libopenblas.so.0", "libopenblas.so"):
        with suppress(OSError):
            ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
            blas = Path(name).name
            break
    if kernels:
        del os.environ["OPENBLAS_CORETYPE"]


def limit_command_buffers(find_tuned: Callable[[], tuple[int, int] | None] | None = None) -> None:
    """On a Mac, let MLX put more kernels into a command buffer, whose end costs some 20 µs.

    MLX reads its variables when it starts, so this must run before `mlx.core` is imported;
    importing this package does it. Nothing is changed where the user has set one of them.
    `find_tuned` returns kernels and MB in place of the chip's default; (0, 0) for MLX's own.
    """
    global command_buffers, buffers_given
    if platform.system() != "Darwin":
        return
    given = {name: os.environ[name] for name in BUFFER_VARIABLES if name in os.environ}
    tuned = find_tuned() if find_tuned else None
    chosen = buffer_limits(mac_chip(), total_memory()) if tuned is None else tuned
    limits = dict(zip(BUFFER_VARIABLES, map(str, chosen or ()), strict=False))
    if given and given != limits:
        command_buffers = " ".join(f"{name}={value}" for name, value in given.items())
        buffers_given = True
    elif "mlx.core" in sys.modules and not given:
        command_buffers = "MLX's own, since MLX was imported before minicpm_mlx"
    elif not chosen or chosen == (0, 0):
        command_buffers = f"MLX's own ({'measured' if tuned else 'enough for this chip'})"
    else:
        os.environ.update(limits)
        source = "measured" if tuned else "by chip and memory"
        command_buffers = f"{chosen[0]} kernels or {chosen[1]} MB ({source})"


def buffer_limits(chip: str, memory: int) -> tuple[int, int] | None:
    """Kernels and MB of a command buffer for a chip such as "Apple M3 Ultra" with so many bytes of
    memory; None where MLX's own limits are as fast.

    What a buffer reads stays allocated until it ends, so small machines get fewer MB.
    """
    generation = re.match(r"(?:Apple )?M(\d+)\b", chip)
    if generation is None or int(generation[1]) > LAST_SLOW_GENERATION:
        return None
    return MAX_OPS, min(MAX_MB, memory // MEMORY_SHARE // 2**20)


def mac_chip() -> str:
    """The chip's name as macOS has it, such as "Apple M3 Ultra", without MLX; "" elsewhere."""
    size, name = ctypes.c_size_t(128), ctypes.create_string_buffer(128)
    with suppress(AttributeError, OSError):  # no such function off a Mac
        call = ctypes.CDLL(None).sysctlbyname
        if call(b"machdep.cpu.brand_string", name, ctypes.byref(size), None, 0) == 0:
            return name.value.decode(errors="replace")
    return ""


def _openblas_kernels() -> str | None:
    """Return the kernels OpenBLAS should use; None to leave its own choice, or the user's.

    OpenBLAS chooses by the processor's model number and takes a newer one for a Pentium 4, at a
    third of the speed. So this chooses by the processor's instruction sets.
    """
    if "OPENBLAS_CORETYPE" in os.environ or platform.machine() != "x86_64":
        return None
    flags: set[str] = set()
    with suppress(OSError), Path("/proc/cpuinfo").open(encoding="utf-8") as file:
        flags = next((set(line.split()) for line in file if line.startswith("flags")), flags)
    if {"avx512f", "avx512dq", "avx512bw", "avx512vl"} <= flags:
        return "SkylakeX"
    return "Haswell" if {"avx2", "fma"} <= flags else None


def select(device: str | None = None) -> None:
    """Make `device` ("gpu", "cpu"; by default what MLX prefers) the one MLX computes on.

    On a CPU compiled functions are turned off: MLX builds them with the system's C++ compiler,
    which costs seconds where there is one and fails where there is none.
    """
    import mlx.core as mx

    if device is not None:
        if device not in DEVICES:
            raise InvalidArgumentError(
                f"must be one of {', '.join(DEVICES)}, got {device!r}", field="device"
            )
        if device == "gpu" and not _has_gpu():
            raise InvalidArgumentError(
                "gpu: this machine has none that MLX can use", field="device"
            )
        mx.set_default_device(mx.Device(mx.gpu if device == "gpu" else mx.cpu))
    if on_cpu():
        mx.disable_compile()
    elif mx.metal.is_available():
        # Keeps the weights resident; more than the recommended size can freeze the machine.
        recommended = mx.device_info().get("max_recommended_working_set_size")
        if recommended:
            mx.set_wired_limit(int(recommended))


def on_cpu() -> bool:
    import mlx.core as mx

    return bool(mx.default_device() == mx.Device(mx.cpu))


def slow_exponentials() -> bool:
    """Whether MLX computes exponentials one by one: its CPU backend has vectors on ARM alone."""
    return on_cpu() and platform.machine() in ("x86_64", "AMD64")


def _has_gpu() -> bool:
    import mlx.core as mx

    return mx.metal.is_available() or (hasattr(mx, "cuda") and mx.cuda.is_available())


def chip() -> str:
    """The chip's name, for people."""
    import mlx.core as mx

    if not on_cpu():
        return str(mx.device_info().get("device_name", "GPU"))
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def emulates_bfloat16() -> bool:
    """Whether this is an M1 or M2, whose GPUs have no bfloat16 arithmetic."""
    import mlx.core as mx

    if on_cpu() or not mx.metal.is_available():
        return False
    architecture = str(mx.device_info().get("architecture", ""))
    return architecture.startswith(("applegpu_g13", "applegpu_g14"))


def as_dtype(dtype: str | mx.Dtype) -> mx.Dtype:
    """MLX's dtype for a name in DTYPES; MLX's own and torch's objects will do as well."""
    import mlx.core as mx

    name = str(dtype).removeprefix("mlx.core.").removeprefix("torch.")
    if name not in DTYPES:
        raise InvalidArgumentError(
            f"must be one of {', '.join(DTYPES)}, got {dtype!r}", field="dtype"
        )
    return {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}[name]


def choose_dtype(
    stored: mx.Dtype, override: str | mx.Dtype | None = None, *, fused: bool = True
) -> mx.Dtype:
    """Return the dtype to compute in, for weights `stored` in a dtype.

    A CPU has no 16-bit arithmetic, so float32 there. A GPU keeps a 16-bit format, but for
    bfloat16 on chips that emulate it, which float16 replaces once the model is fused (in muP form
    training could overflow it); float32 weights become bfloat16, or float16 on those chips.
    """
    import mlx.core as mx

    if override is not None:
        return as_dtype(override)
    if on_cpu() or not fused:
        return mx.float32 if on_cpu() else stored
    if stored == mx.float16:
        return mx.float16
    return mx.float16 if emulates_bfloat16() else mx.bfloat16


def unpack_to(dtype: mx.Dtype, parameters: int) -> mx.Dtype | None:
    """Return the dtype in which to hold quantized weights densely, or None to leave them packed.

    Only on a CPU, whose quantized kernels are slower than a float32 matmul, and only where
    `parameters` of them leave a third of the free memory free.
    """
    import mlx.core as mx

    if not on_cpu() or dtype != mx.float32:
        return None
    return mx.float32 if parameters * 4 < available_memory() * 2 / 3 else None


def available_memory() -> int:
    """Bytes that can be allocated without swapping, as the system reports."""
    import mlx.core as mx

    free = max(total_memory() * 3 // 4 - mx.get_active_memory(), 0)
    with suppress(OSError):
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
    return int(min(free, _left_in_group()))


def _left_in_group(root: Path = Path("/sys/fs/cgroup")) -> float:
    """Bytes left below a container's limit; infinite without one."""
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        with suppress(OSError, ValueError):  # no such file, or "max"
            most, now = (int((root / name).read_text(encoding="utf-8")) for name in (limit, used))
            return max(most - now, 0)
    return math.inf


def mlx_version() -> str:
    """The installed version of MLX, which is not imported; "" where it is not known."""
    try:
        return version("mlx")
    except PackageNotFoundError:
        return ""


def on_metal() -> bool:
    import mlx.core as mx

    return not on_cpu() and mx.metal.is_available()


def total_memory() -> int:
    """Bytes of memory in this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
