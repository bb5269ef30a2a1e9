"""What a measurement depends on besides the program: power, heat, and the commit measured."""

from __future__ import annotations

import platform
import subprocess
from contextlib import suppress
from pathlib import Path


def power() -> str:
    """ "mains", "battery" or "unknown"."""
    if platform.system() == "Darwin":
        told = _output("pmset", "-g", "batt")
        kinds = {"AC Power": "mains", "Battery Power": "battery"}
        return next((kind for words, kind in kinds.items() if words in told), "unknown")
    with suppress(OSError):
        for online in Path("/sys/class/power_supply").glob("*/online"):
            return "mains" if online.read_text(encoding="utf-8").strip() == "1" else "battery"
    return "unknown"


def thermal() -> str:
    """How much the system slows itself for heat, as it says it; "unknown" where it does not."""
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
    """The commit this package is run from, where it is a clone."""
    here = Path(__file__).parents[2]
    if not (here / ".git").exists():
        return None
    return _output("git", "-C", str(here), "rev-parse", "--short", "HEAD").strip() or None


def _output(*command: str) -> str:
    with suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
        return done.stdout
    return ""
