"""Facts that a measurement depends on: power supply, heat, and the commit measured."""

from __future__ import annotations

import platform
import subprocess
from contextlib import suppress
from pathlib import Path


def power() -> str:
    """ "mains", "battery" or "unknown"."""
    if platform.system() == "Darwin":
        status = _output("pmset", "-g", "batt")
        kinds = {"AC Power": "mains", "Battery Power": "battery"}
        return next((kind for words, kind in kinds.items() if words in status), "unknown")
    with suppress(OSError):
        for online in Path("/sys/class/power_supply").glob("*/online"):
            return "mains" if online.read_text(encoding="utf-8").strip() == "1" else "battery"
    return "unknown"


def thermal() -> str:
    """The system's thermal throttling or temperature; "unknown" where it reports none."""
    if platform.system() == "Darwin":
        for line in _output("pmset", "-g", "therm").splitlines():
            if "CPU_Speed_Limit" in line:
                return f"speed limit {line.split('=')[-1].strip()} %"
        return "no limit"
    with suppress(OSError, ValueError):
        zones = Path("/sys/class/thermal").glob("thermal_zone*/temp")
        heat = [int(zone.read_text(encoding="utf-8")) / 1000 for zone in zones]
        if heat:
            return f"{max(heat):.0f} °C"
    return "unknown"


def commit() -> str | None:
    """The commit of the clone that this package runs from; None outside one."""
    here = Path(__file__).parents[2]
    if not (here / ".git").exists():
        return None
    return _output("git", "-C", str(here), "rev-parse", "--short", "HEAD").strip() or None


def _output(*command: str) -> str:
    with suppress(OSError, subprocess.TimeoutExpired):
        return subprocess.run(
            command, capture_output=True, text=True, timeout=5, check=False
        ).stdout
    return ""
