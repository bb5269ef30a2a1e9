"""Files of GGUF repositories, chosen by a tag."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import minicpm_mlx as mm
from minicpm_mlx.errors import ModelNotFoundError
from minicpm_mlx.loading import download, store
from minicpm_mlx.loading.download.gguf_files import choose_gguf
from minicpm_mlx.model_cards import resolve
from minicpm_mlx.weights.checkpoint import read_checkpoint
from minicpm_mlx.weights.gguf import write_gguf
from support.data import GOLDEN
from support.gguf_files import with_tokenizer
from support.hub import Hub

Out = pytest.CaptureFixture[str]
REPO = "openbmb/tiny-GGUF"
NAMES = [
    "M-Q4_K_M.gguf",
    "M-Q8_0.gguf",
    "M.fp16.gguf",
    "M-UD-IQ2_XXS.gguf",
    "M-TQ1_0.gguf",
    "M-F32-00001-of-00002.gguf",
    "M-F32-00002-of-00002.gguf",
    "M-imatrix.gguf",
    "mmproj-M-Q8_0.gguf",
    "README.md",
]
SIZES = {name: 10 * at for at, name in enumerate(NAMES, 1)}


@pytest.mark.parametrize(
    ("tag", "name"),
    [
        (None, "M-Q4_K_M.gguf"),
        ("Q4_K_M", "M-Q4_K_M.gguf"),
        ("q8_0", "M-Q8_0.gguf"),
        ("F16", "M.fp16.gguf"),
        ("fp16", "M.fp16.gguf"),
        ("IQ2_XXS", "M-UD-IQ2_XXS.gguf"),
        ("UD-IQ2_XXS", "M-UD-IQ2_XXS.gguf"),
        ("m-tq1_0.GGUF", "M-TQ1_0.gguf"),
        ("M-TQ1_0", "M-TQ1_0.gguf"),
    ],
)
def test_a_tag_chooses_a_file(tag: str | None, name: str) -> None:
    assert choose_gguf(REPO, SIZES, tag) == name


@pytest.mark.parametrize(
    ("names", "name"),
    [
        (["a-Q8_0", "a-Q5_K_M", "a-Q3_K_S"], "a-Q5_K_M"),  # the fewest bits from 4 on
        (["a-Q3_K_S", "a-Q2_K"], "a-Q3_K_S"),
        (["a-Q4_K_M", "b-Q4_K_M"], "b-Q4_K_M"),  # the smaller
        (["b-F16", "b-unknown"], "b-F16"),
    ],
)
def test_without_a_tag_it_is_q4_k_m_or_what_is_nearest(names: list[str], name: str) -> None:
    sizes = {f"{n}.gguf": 100 - at for at, n in enumerate(names)}
    assert choose_gguf(REPO, sizes, None) == f"{name}.gguf"


@pytest.mark.parametrize(
    ("tag", "said"),
    [
        ("Q5_K_M", "has no 'Q5_K_M'; it has .*Q4_K_M.*Q8_0.*F32 in parts"),
        ("F32", "one of 2 parts.*llama-gguf-split --merge"),
        ("imatrix", "has no 'imatrix'"),
        ("Q4", "has no 'Q4'"),
    ],
)
def test_a_tag_that_fits_no_file_lists_those_there_are(tag: str, said: str) -> None:
    with pytest.raises(ModelNotFoundError, match=said) as caught:
        choose_gguf(REPO, SIZES, tag)
    assert "\n" not in str(caught.value)


def test_a_tag_that_fits_two_files_asks_for_a_name() -> None:
    with pytest.raises(ModelNotFoundError, match=r"fits a-Q8_0\.gguf, b-Q8_0\.gguf; give"):
        choose_gguf(REPO, {"a-Q8_0.gguf": 1, "b-Q8_0.gguf": 1}, "Q8_0")


@pytest.fixture
def repository(hub_server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The hub with a repository of two files of a small model."""
    base = with_tokenizer(GOLDEN / "minicpm_2b_like", tmp_path / "base")
    hub_server.repos[REPO] = {"imatrix.gguf": b"none"}
    for kind in ("Q8_0", "F16"):
        write_gguf(read_checkpoint(base), base, tmp_path / "made.gguf", kind)
        hub_server.repos[REPO][f"tiny-{kind}.gguf"] = (tmp_path / "made.gguf").read_bytes()
    monkeypatch.setenv("MINICPM_MLX_HOME", str(tmp_path / "home"))
    return hub_server


def test_a_file_of_a_repository_is_downloaded_converted_listed_and_deleted(
    repository: Hub, command: Callable[..., int], capsys: Out, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = f"{REPO}:f16"
    assert mm.load(named, progress=False).generate("Hi", max_tokens=1).token_ids
    assert repository.got() == ["tiny-F16.gguf"]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repository.requests.clear()
    assert mm.load(f"{REPO}@main:F16", progress=False)
    assert store.is_kept(resolve(named))
    assert not store.is_kept(resolve(f"{REPO}:Q8_0"))
    assert repository.requests == []
    assert command("list") == 0
    assert f"{REPO}:F16" in capsys.readouterr().out
    assert command("show", named) == 0
    assert "F16" in capsys.readouterr().out
    assert command("rm", f"{REPO}:F16", "--yes") == 0
    assert not store.is_kept(resolve(named))
    assert store.kept_copies() == []
    assert download.cached_size(REPO) == 0


def test_without_a_tag_it_says_what_there_is_and_with_a_wrong_one_takes_nothing(
    repository: Hub, command: Callable[..., int], capsys: Out
) -> None:
    assert command("pull", f"{REPO}@main:Q5_K_M") == 1
    assert "has no 'Q5_K_M'; it has F16, Q8_0" in capsys.readouterr().err
    assert repository.got() == []
    assert command("pull", REPO) == 0
    assert f"{REPO} has F16, Q8_0; taking Q8_0, another is {REPO}:TAG" in capsys.readouterr().err
    assert repository.got() == ["tiny-Q8_0.gguf"]
