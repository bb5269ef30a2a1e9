"""Number formats, memory and BLAS, as each machine would have them."""

import json
import os
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

import minicpm_mlx as mm
from minicpm_mlx import device, memory
from minicpm_mlx.bench.shapes import random_model
from minicpm_mlx.convert.checkpoint import convert
from minicpm_mlx.errors import InvalidArgumentError
from support.data import GOLDEN
from support.tiny_model import write_model

GIB = 2**30


def on(monkeypatch: pytest.MonkeyPatch, machine: str) -> None:
    """Pretend to be a "cpu", an "m1" (bfloat16 emulated) or an "m4"."""
    monkeypatch.setattr(device, "on_cpu", lambda: machine == "cpu")
    monkeypatch.setattr(device, "emulates_bfloat16", lambda: machine == "m1")


@pytest.mark.parametrize(
    ("machine", "fused", "stored", "chosen"),
    [
        ("cpu", True, mx.float32, mx.float32),
        ("cpu", True, mx.float16, mx.float32),
        ("cpu", True, mx.bfloat16, mx.float32),
        ("cpu", False, mx.bfloat16, mx.float32),
        ("m1", True, mx.float32, mx.float16),
        ("m1", True, mx.float16, mx.float16),
        ("m1", True, mx.bfloat16, mx.float16),
        ("m1", False, mx.bfloat16, mx.bfloat16),  # float16 could overflow in muP form
        ("m4", True, mx.float32, mx.bfloat16),
        ("m4", True, mx.float16, mx.float16),
        ("m4", True, mx.bfloat16, mx.bfloat16),
        ("m4", False, mx.float32, mx.float32),
    ],
)
def test_each_machine_gets_the_format_it_is_good_at(
    monkeypatch: pytest.MonkeyPatch, machine: str, fused: bool, stored: mx.Dtype, chosen: mx.Dtype
) -> None:
    on(monkeypatch, machine)
    assert device.choose_dtype(stored, fused=fused) == chosen


@pytest.mark.parametrize("machine", ["cpu", "m1", "m4"])
@pytest.mark.parametrize("name", device.DTYPES)
def test_a_format_asked_for_is_kept(
    monkeypatch: pytest.MonkeyPatch, machine: str, name: str
) -> None:
    on(monkeypatch, machine)
    assert device.choose_dtype(mx.float32, name) == getattr(mx, name)


@pytest.mark.parametrize("name", ["float64", "fp16", "int8", "", mx.int32, 32, ["float32"]])
def test_an_unknown_format_is_an_error_that_lists_the_known(name: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="float32, bfloat16, float16") as caught:
        device.choose_dtype(mx.float32, name)
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize("name", device.DTYPES)
def test_every_function_takes_mlx_s_own_formats(name: str, tmp_path: Path) -> None:
    own, case = getattr(mx, name), GOLDEN / "minicpm_2b_like"
    folder = write_model(tmp_path / "model")
    for model in (
        mm.load_model(case, own),
        mm.load(folder, dtype=own).model,
        random_model(mm.Config.load(case), own),
    ):
        found = {array.dtype for _, array in tree_flatten(model.parameters())}
        assert found - {mx.uint32} == {own}
    mm.AutoModelForCausalLM.from_pretrained(folder, torch_dtype=own)  # float32 on a CPU
    convert(case, tmp_path / "out", dtype=own)
    stored = json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"]
    assert stored == name
    by_name, by_format = (
        # The free memory changes between two calls.
        replace(memory.estimate(mm.Config.load(case), dtype=dtype, context=64), available=0)
        for dtype in (name, own)
    )
    assert by_format == by_name


def test_an_unknown_device_is_an_error_that_lists_the_known() -> None:
    with pytest.raises(InvalidArgumentError, match="gpu, cpu, got 'tpu'"):
        device.select("tpu")


def test_a_gpu_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_has_gpu", lambda: False)
    before = mx.default_device()
    with pytest.raises(InvalidArgumentError, match="has none"):
        device.select("gpu")
    assert mx.default_device() == before


def test_the_cpu_can_always_be_chosen() -> None:
    before = mx.default_device()
    try:
        device.select("cpu")
        assert device.on_cpu()
        assert not device.emulates_bfloat16()
    finally:
        mx.set_default_device(before)


@pytest.mark.parametrize(
    ("machine", "dtype", "free", "dense"),
    [
        ("cpu", mx.float32, 6.1, True),
        ("cpu", mx.float32, 5.9, False),  # 1 Gi of weights, 4 bytes each, is above two thirds
        ("cpu", mx.bfloat16, 100, False),  # asked for; unpacked it would be no faster
        ("m4", mx.float32, 100, False),
    ],
)
def test_weights_are_unpacked_on_a_cpu_with_room(
    monkeypatch: pytest.MonkeyPatch, machine: str, dtype: mx.Dtype, free: float, dense: bool
) -> None:
    on(monkeypatch, machine)
    monkeypatch.setattr(device, "available_memory", lambda: int(free * GIB))
    assert device.unpack_to(dtype, GIB) == (mx.float32 if dense else None)


def test_memory_is_told_in_bytes() -> None:
    assert 2**27 < device.available_memory() <= device.total_memory()


IMPORT = """
    import ctypes, os
    from minicpm_mlx import device
    print(device.blas, os.environ.get("OPENBLAS_CORETYPE"))
    try:
        kernels = ctypes.CDLL("libopenblas.so.0").openblas_get_corename
        kernels.restype = ctypes.c_char_p
        print(kernels().decode())
    except (OSError, AttributeError):
        print("none")
"""


def imported(**environment: str) -> tuple[str, str, str]:
    """What a fresh process finds: device.blas, OPENBLAS_CORETYPE, and OpenBLAS's kernels."""
    clean = {key: value for key, value in os.environ.items() if key != "OPENBLAS_CORETYPE"}
    command = [sys.executable, "-c", textwrap.dedent(IMPORT)]
    run = subprocess.run(
        command, env=clean | environment, capture_output=True, text=True, check=True
    )
    blas, coretype, kernels = run.stdout.split()
    return blas, coretype, kernels


needs_openblas = pytest.mark.skipif(
    sys.platform != "linux"
    or subprocess.run(
        [sys.executable, "-c", "import ctypes; ctypes.CDLL('libopenblas.so.0')"],
        capture_output=True,
        check=False,
    ).returncode
    != 0,
    reason="no system OpenBLAS here",
)


@needs_openblas
def test_importing_the_package_loads_a_fast_blas() -> None:
    blas, coretype, kernels = imported()
    assert blas != "None"
    assert coretype == "None"  # set while it was loaded, then taken back
    wanted = device._openblas_kernels() if "OPENBLAS_CORETYPE" not in os.environ else None
    if wanted and "openblas" in blas:
        assert kernels == wanted


@needs_openblas
def test_the_users_choice_of_kernels_stands() -> None:
    _, coretype, kernels = imported(OPENBLAS_CORETYPE="Nehalem")
    assert coretype == "Nehalem"
    assert kernels in ("Nehalem", "none")


@pytest.mark.parametrize(
    ("flags", "kernels"),
    [
        ("fpu avx avx2 fma avx512f avx512dq avx512bw avx512vl", "SkylakeX"),
        ("fpu avx avx2 fma avx512f", "Haswell"),
        ("fpu avx avx2 fma", "Haswell"),
        ("fpu avx avx2", None),
    ],
)
def test_kernels_follow_the_processors_instruction_sets(
    monkeypatch: pytest.MonkeyPatch, flags: str, kernels: str | None
) -> None:
    import io

    cpuinfo = f"model name\t: Some CPU\nflags\t\t: {flags}\n"
    monkeypatch.delenv("OPENBLAS_CORETYPE", raising=False)
    monkeypatch.setattr(device.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(device.Path, "open", lambda *_, **__: io.StringIO(cpuinfo))
    assert device._openblas_kernels() == kernels


def test_a_blas_is_not_loaded_once_mlx_is_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "blas", None)
    device.preload_blas()  # this process has mlx.core
    assert device.blas is None
