"""Client libraries as they are: thoughts, calls and typed answers arrive through each of them.

tests/support/client_libraries.py has the list, tests/server/clients/ a program for each and the
versions that are installed, once, into the tests' cache.
"""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from support import node
from support.client_libraries import LIBRARIES, NPM, PROGRAMS, Library, python_of
from support.scripted_model import scripted_lm

pytest.importorskip("fastapi")

from support.serving import Live, serving

pytestmark = [pytest.mark.long, pytest.mark.timeout(2000)]

SKY = ["Light scatters.", "Blue light **scatters** most."]
WEATHER = ["Paris", "It is sunny in Paris."]
EXPECTED = {"thinking": SKY, "thinking streamed": SKY, "tools": WEATHER, "tools streamed": WEATHER}
EXPECTED |= {"tool runner": WEATHER, "code": ["Oslo", "snow"]}
ADA = {"name": "Ada", "age": 36}
"""Of checks of structure, whose names begin so."""
BY_CALL = ["Rome", "It rains in Rome."]
"""Of smolagents, which ends with a call."""


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    script = runpy.run_path(str(PROGRAMS / "script.py"))["SCRIPT"]
    folder = tmp_path_factory.mktemp("scripted") / "scripted"
    with serving(scripted_lm(folder, script, positions=100_000)) as served:
        yield served


def found_by(library: Library, live: Live, cache: pytest.Cache) -> dict[str, Any]:
    """The report of a library's program."""
    program = PROGRAMS / library.program
    if program.suffix == ".mjs":
        folder = node.installed(cache, *NPM)
        shutil.copyfile(PROGRAMS / "report.mjs", folder / "report.mjs")
        return dict(node.run(folder, program.read_text("utf-8"), live.url, library.api))
    done = subprocess.run(
        [str(python_of(cache, library.requirements)), str(program), live.url, library.api],
        env={
            **{name: text for name, text in os.environ.items() if "PYTHONPATH" not in name},
            "PYTHONDONTWRITEBYTECODE": "1",
            "NO_PROXY": "*",
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # it would ask the network
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda library: library.name)
def test_thoughts_calls_and_typed_answers_arrive(
    live: Live, library: Library, pytestconfig: pytest.Config
) -> None:
    found = found_by(library, live, pytestconfig.cache)
    version = found.pop("version")
    assert {*library.checks, *library.cannot} <= found.keys()
    expected = {name: ADA if name.startswith("structure") else EXPECTED[name] for name in found}
    if library.name == "smolagents":
        expected |= dict.fromkeys(("tools", "tools streamed"), BY_CALL)
    failed = {name for name in found if found[name] != expected[name]}
    # What a library could not and now can is news for the list too.
    assert failed == set(library.cannot), (version, {name: found[name] for name in failed})
