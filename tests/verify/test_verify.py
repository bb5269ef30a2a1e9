"""`doctor --verify`: passes here, and names what is wrong where something is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from minicpm_mlx.engine import KVCache
from minicpm_mlx.model import kernels
from minicpm_mlx.model.kernels import own
from minicpm_mlx.model.rope import Rope
from minicpm_mlx.verify import cases, formats, golden, operations, run, sampling, texts
from minicpm_mlx.verify.report import Verification
from minicpm_mlx.verify.results import CheckResult
from support import numpy_model
from support.data import CASES, GOLDEN
from support.source import ROOT


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32 and one case alone."""
    few = [case for case in cases.CASES if case.name == "minicpm-2b-128k"]
    for module in (golden, operations, texts):
        monkeypatch.setattr(module, "CASES", few)
    monkeypatch.setattr(golden, "FORMATS", ("float32",))
    monkeypatch.setattr(operations, "DTYPES", ("float32",))
    monkeypatch.setattr(sampling, "DRAWS", 4)


@pytest.fixture
def quicker(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `quick`, without the operation that takes longest."""
    monkeypatch.delitem(operations.OPERATIONS, "products")


def failures() -> dict[str, CheckResult]:
    """The failed checks by name: of operations, and of golden cases."""
    checks = [*operations.check_operations(), *golden.check_logits()]
    return {check.name: check for check in checks if check.outcome == "fail"}


@pytest.mark.usefixtures("quick")
def test_all_checks_pass_here() -> None:
    report = run.verify(bench=False)
    assert report.passed, report.markdown()
    skipped = [check for check in report.checks if check.outcome == "not checked"]
    if formats.device.on_cpu():
        assert [check.name for check in skipped] == [
            "own kernel add_norm = reference",
            "wired memory limit",
        ]
        assert "no GPU" in skipped[0].got


@pytest.mark.slow
def test_all_formats_and_cases_pass_here() -> None:
    report = run.verify(bench=False)
    assert report.passed, report.markdown()
    made = {check.title for check in report.checks}
    for format in formats.FORMATS:
        assert f"logits, {format}" in made


@pytest.mark.usefixtures("quicker")
def test_a_wrong_kernel_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "silu_mul", lambda: lambda gate, up: mx.maximum(gate, 0) * up)
    failed = failures()
    assert set(failed) == {"activation", "logits", "inference form = reference form"}
    assert "silu" in failed["activation"].got
    assert "minicpm-2b-128k" in failed["logits"].got
    assert "reference form" not in failed["logits"].got  # only the inference form is wrong


@pytest.mark.usefixtures("quicker")
def test_a_wrong_norm_kernel_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    right = own.add_norm

    def wrong(width: int, dtype: mx.Dtype, eps: float) -> own.AddNorm:
        def run(x: mx.array, delta: mx.array, weight: mx.array) -> tuple[mx.array, mx.array]:
            y, normed = right(width, dtype, eps)(x, delta, weight)
            return y, mx.where(mx.arange(width) == width - 1, 0, normed)  # the last lane

        return run

    monkeypatch.setattr(own, "add_norm", wrong)
    assert "residual sum and norm" in failures()


@pytest.mark.usefixtures("quicker")
def test_a_wrong_rope_base_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    init = Rope.__init__

    def wrong(self: Rope, config: Any) -> None:
        init(self, config)
        self.theta *= 10

    monkeypatch.setattr(Rope, "__init__", wrong)
    failed = failures()
    assert set(failed) == {"rotation", "logits"}  # both forms agree with each other
    assert "minicpm-2b-128k" in failed["rotation"].got


@pytest.mark.usefixtures("quicker")
def test_a_cache_that_writes_at_a_wrong_offset_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    write = KVCache._write

    def wrong(self: KVCache, buffers: Any, new: Any, start: int) -> Any:
        return write(self, buffers, new, start - 1 if start > 2 else start)

    monkeypatch.setattr(KVCache, "_write", wrong)
    assert set(failures()) == {"key-value cache", "cached = uncached"}


def test_a_check_that_raises_fails_without_a_path(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Iterator[CheckResult]:
        raise RuntimeError("cannot compile /Users/someone/x.metal\nat length")

    monkeypatch.setattr(run, "CHECKS", {"own kernels": broken})
    report = run.verify(bench=False)
    assert report.failed == ["own kernels"]
    assert "cannot compile …" in report.markdown()
    assert "someone" not in json.dumps(report.record())


def test_a_kernel_that_is_not_chosen_on_a_gpu_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "differed by 0.5 from its reference in float16, 576 wide"
    monkeypatch.setattr(own, "unavailable", lambda: None)
    monkeypatch.setattr(own, "checks", lambda: [own.KernelCheck("add_norm", False, reason)])
    (check,) = operations.check_own_kernels()
    assert check.outcome == "fail"
    assert reason in check.got


@pytest.mark.usefixtures("quicker")
def test_an_operation_that_raises_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(*_: Any, **__: Any) -> mx.array:
        raise RuntimeError("Unable to load kernel /Users/someone/mlx.metallib: not found")

    monkeypatch.setattr(kernels, "attention", lambda: raises)
    failed = failures()
    assert set(failed) == {"attention", "logits", *golden.CHECKS}
    assert "Unable to load kernel …: not found (attention)" in failed["attention"].got
    assert "minicpm-2b-128k" in failed["logits"].got


def test_nan_is_a_failure() -> None:
    errors = operations.Errors("logits", "float32", 1.0)
    errors.add("minicpm3", float("nan"))
    assert errors.result().outcome == "fail"


# ---- golden cases


@pytest.mark.parametrize("case", [case for case in CASES if "llama_format" not in case])
def test_the_program_behind_the_stored_logits_equals_the_published_code(case: str) -> None:
    raw = json.loads((GOLDEN / case / "config.json").read_text())
    weights = mx.load(str(GOLDEN / case / "model.safetensors"))
    expected = mx.load(str(GOLDEN / case / "golden.safetensors"))
    for ids, name in (("input_ids", "logits"), ("long_input_ids", "long_logits")):
        if name in expected:
            found = numpy_model.logits(raw, weights, expected[ids][0].tolist())  # type: ignore[arg-type]
            assert np.abs(found - np.array(expected[name])[0]).max() < 1e-4


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
def test_stored_logits_are_those_of_the_program(case: cases.GoldenCase) -> None:
    weights = {name: parts["weight"] for name, parts in case.arrays().items()}
    expected = numpy_model.logits(case.raw, weights, case.ids)[list(cases.POSITIONS)]
    np.testing.assert_allclose(case.logits, expected, rtol=0, atol=1e-5)
    assert case.config.rope_theta == case.theta


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
def test_weights_are_exact_in_every_format(case: cases.GoldenCase) -> None:
    for parts in case.arrays().values():
        weight = parts["weight"]
        for dtype in (mx.bfloat16, mx.float16):
            rounded = np.array(mx.array(weight.astype(np.float32)).astype(dtype).astype(mx.float32))
            assert (rounded == weight).all()


def test_the_stored_logits_are_small() -> None:
    folder = Path(cases.__file__).parent
    assert (folder / cases.LOGITS).stat().st_size < 400_000


# ---- the report


@pytest.mark.parametrize("page", ["verify.md", "verify_zh.md"])
def test_the_guide_lists_every_check(page: str) -> None:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    names = [*operations.OPERATIONS, *golden.CHECKS, *texts.CHECKS, *sampling.CHECKS]
    names += ["wired memory limit", "memory given back"]
    for name in names:
        assert f"`{name}`" in text, name


def report(**changes: Any) -> Verification:
    checks = [CheckResult(name="logits", format="float32", outcome="fail", expected="1", got="2")]
    machine = {"chip": "Apple M4", "memory_bytes": 16e9, "power": "battery", "blas": None}
    return Verification(**{"machine": machine, "checks": checks, **changes})


def test_the_report_names_what_failed() -> None:
    assert report().failed == ["logits, float32"]
    assert "1 of 1 failed: logits, float32" in report().markdown()
    assert "chip Apple M4, memory 16.0 GB, power battery" in report().markdown()


def test_a_bar_in_an_error_does_not_end_its_cell() -> None:
    check = CheckResult(name="speed", outcome="fail", expected="", got="a | b")
    assert "| a \\| b |" in report(checks=[check]).markdown()


def test_no_part_of_a_machine_row_holds_a_path_or_a_name() -> None:
    import getpass
    import platform

    from minicpm_mlx.verify.report import describe_machine

    text = json.dumps(describe_machine())
    assert "/" not in text
    assert platform.node() not in text or not platform.node()
    assert getpass.getuser() not in text.split()
