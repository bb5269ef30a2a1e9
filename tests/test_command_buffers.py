"""Limits of MLX's command buffers, as each Mac would have them."""

import os
import platform
import subprocess
import sys

import pytest

from minicpm_mlx import device

GIB = 2**30
OPS, MB = device.BUFFER_VARIABLES


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An M1 Ultra of 64 GiB on which MLX is not imported yet and no variable is set."""
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(device, "mac_chip", lambda: "Apple M1 Ultra")
    monkeypatch.setattr(device, "total_memory", lambda: 64 * GIB)
    monkeypatch.setattr(device, "command_buffers", None)
    monkeypatch.setattr(device, "buffers_given", False)
    monkeypatch.delitem(sys.modules, "mlx.core")
    for name in device.BUFFER_VARIABLES:
        monkeypatch.setenv(name, "")  # so that it is as before after the test
        monkeypatch.delenv(name)
    return monkeypatch


@pytest.mark.parametrize(
    ("chip", "memory", "limits"),
    [
        ("Apple M1 Ultra", 128 * GIB, (1000, 400)),
        ("Apple M1", 8 * GIB, (1000, 102)),
        ("Apple M2 Pro", 16 * GIB, (1000, 204)),
        ("Apple M4 Max", 36 * GIB, (1000, 400)),
        ("Apple M5 Max", 128 * GIB, None),
        ("Apple M10", 128 * GIB, None),
        ("Apple A18 Pro", 8 * GIB, None),
        ("Intel(R) Core(TM) i7", 16 * GIB, None),
        ("", 16 * GIB, None),
    ],
)
def test_limits_follow_generation_and_memory(
    chip: str, memory: int, limits: tuple[int, int] | None
) -> None:
    assert device.buffer_limits(chip, memory) == limits


def test_an_old_chip_gets_larger_buffers(mac: pytest.MonkeyPatch) -> None:
    device.limit_command_buffers()
    assert (os.environ[OPS], os.environ[MB]) == ("1000", "400")
    assert device.command_buffers == "1000 kernels or 400 MB (by chip and memory)"
    device.limit_command_buffers()  # as in a child process, which inherits the variables
    assert device.command_buffers == "1000 kernels or 400 MB (by chip and memory)"


def test_a_new_chip_keeps_the_limits_of_mlx(mac: pytest.MonkeyPatch) -> None:
    mac.setattr(device, "mac_chip", lambda: "Apple M5 Max")
    device.limit_command_buffers()
    assert OPS not in os.environ
    assert device.command_buffers == "MLX's own (enough for this chip)"


def test_one_variable_of_the_user_is_enough_to_change_nothing(mac: pytest.MonkeyPatch) -> None:
    mac.setenv(MB, "70")
    device.limit_command_buffers(lambda: (500, 300))
    assert OPS not in os.environ
    assert os.environ[MB] == "70"
    assert device.command_buffers == f"{MB}=70"
    assert device.buffers_given


def test_tuned_limits_replace_the_default(mac: pytest.MonkeyPatch) -> None:
    device.limit_command_buffers(lambda: (200, 100))
    assert (os.environ[OPS], os.environ[MB]) == ("200", "100")
    assert device.command_buffers == "200 kernels or 100 MB (measured)"


def test_tuned_limits_may_be_those_of_mlx(mac: pytest.MonkeyPatch) -> None:
    device.limit_command_buffers(lambda: (0, 0))
    assert OPS not in os.environ
    assert device.command_buffers == "MLX's own (measured)"


def test_it_is_said_when_mlx_was_imported_before(mac: pytest.MonkeyPatch) -> None:
    mac.setitem(sys.modules, "mlx.core", device)
    device.limit_command_buffers()
    assert OPS not in os.environ
    assert "imported before" in str(device.command_buffers)


def test_off_a_mac_nothing_is_set() -> None:
    code = f"import minicpm_mlx, os; print({OPS!r} in os.environ, minicpm_mlx.device.mac_chip())"
    env = {name: value for name, value in os.environ.items() if name not in (OPS, MB)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True
    )
    if platform.system() != "Darwin":
        assert done.stdout == "False \n"
