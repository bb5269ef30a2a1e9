"""What is said of a model that is not here: size, memory and speed, before a byte is fetched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import minicpm_mlx as mm
from minicpm_mlx import device
from minicpm_mlx.bench.chips import MINICPM_2B, expected
from minicpm_mlx.bench.forecast import forecast, memory_needed
from minicpm_mlx.cli.chat.conversation import offer
from minicpm_mlx.cli.render.texts import Texts
from minicpm_mlx.errors import DownloadError
from minicpm_mlx.model_cards import cards, resolve
from support.hub import BASE, REPO, SAFE, Hub

CARD = cards()["minicpm-2b-dpo"]


@pytest.fixture
def m3_max(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "chip", lambda: "Apple M3 Max")
    monkeypatch.setattr(device, "on_cpu", lambda: False)
    monkeypatch.setattr(device, "available_memory", lambda: 20_000_000_000)


def test_on_a_mac_the_speed_is_that_of_bench_predict(m3_max: None) -> None:
    found = forecast(CARD)
    assert (found.download, found.fits) == (5_450_000_000, True)
    assert found.speed == pytest.approx(expected("M3 Max", MINICPM_2B, 0), rel=0.01)


@pytest.mark.parametrize(
    ("name", "weights", "read", "cache"),
    [
        ("minicpm-2b-dpo-fp32", 5.45, 5.45, 40 * 2 * 36 * 64 * 2),  # in 16 bits when it runs
        ("minicpm-2b-128k", 6.02, 5.45, 40 * 2 * 36 * 64 * 2),  # its head is not its embedding
        ("minicpm-moe-8x2b", 27.7, 8.64, 40 * 2 * 36 * 64 * 2),  # two experts of eight
        ("minicpm5-2b", 1.416, 1.266, 42 * 2 * 2 * 128 * 2),  # packed as it is published
        ("minicpm4-8b", 4.6, 4.43, 32 * 2 * 2 * 128 * 2),  # packed on this machine
        ("minicpm3-4b", 2.29, 2.29, 62 * (256 + 32) * 2),  # caches its latent
        ("bitcpm4-1b", 0.577, 0.577, 52 * 2 * 8 * 64 * 2),  # its embedding stays in 16 bits
    ],
)
def test_memory_and_what_a_token_reads_are_known_before_the_download(
    m3_max: None, name: str, weights: float, read: float, cache: int
) -> None:
    needed, found = memory_needed(cards()[name]), forecast(cards()[name])
    assert needed is not None
    assert needed.weights / 1e9 == pytest.approx(weights, rel=0.005)
    assert (needed.context, needed.cache) == (4096, 4096 * cache)
    assert found.memory == needed.total
    assert (found.cost.weights / 1e9, found.cost.cache) == (pytest.approx(read, rel=0.005), cache)


@pytest.mark.parametrize(
    ("form", "weights"),
    [
        *[("MLX", 1.42), ("GGUF", 1.42), ("GPTQ", 2.19), ("AWQ", 2.19)],
        *[("GGUF:Q4_K_M", 1.42), ("GGUF:Q8_0", 2.67), ("GGUF:F16", 5.03)],
    ],
)
def test_the_quantized_forms_of_a_published_model_are_planned_in_their_bits(
    m3_max: None, form: str, weights: float
) -> None:
    needed = memory_needed(resolve(f"openbmb/MiniCPM5-2B-{form}"))
    assert needed is not None
    assert needed.weights / 1e9 == pytest.approx(weights, rel=0.01)


def test_memory_of_the_demo_is_known_before_its_first_chat(
    demo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = memory_needed(replace(resolve("demo"), package=None, path=demo_folder))
    monkeypatch.setenv("MINICPM_MLX_HOME", str(tmp_path))
    needed = memory_needed(resolve("demo"))
    assert kept is not None
    assert needed is not None
    assert needed.total == pytest.approx(kept.total, rel=0.05)
    assert forecast(resolve("demo")).memory == needed.total


def test_memory_of_a_repository_without_a_card_is_not_guessed(m3_max: None) -> None:
    assert memory_needed(resolve("someone/something")) is None


def test_the_offer_says_size_memory_and_speed_in_both_languages(
    m3_max: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    speed = f"{expected('M3 Max', MINICPM_2B, 0):.0f}"
    first, second = offer(CARD, Texts("en"))
    assert "5.5 GB" in first
    assert second == (
        f"It fits: 3.1 GB of memory, 20.0 GB are free. To expect here: about {speed} tok/s."
    )
    assert "3.1 GB，空闲 20.0 GB" in list(offer(CARD, Texts("zh")))[1]
    assert "16.4 GB" in next(iter(offer(cards()["minicpm4-8b"], Texts("en"))))  # as `list` says
    monkeypatch.setattr(device, "available_memory", lambda: 1_000_000_000)
    assert "does not fit: it takes 3.1 GB" in list(offer(CARD, Texts("en")))[1]


def test_elsewhere_the_speed_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "chip", lambda: "another")
    assert 1e-3 < forecast(CARD).speed < 1e4


def test_a_size_that_no_card_states_is_asked_from_the_hub(
    hub_server: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = sum(map(len, (BASE | SAFE).values()))
    assert forecast(resolve(REPO)).download == size
    lines = list(offer(resolve(REPO), Texts("en")))
    assert f"{size / 1e9:.2g} GB" in lines[0]
    assert "?" not in "".join(lines)
    assert hub_server.got() == []
    hub_server.stop()
    with pytest.raises(DownloadError, match="could not be reached"):
        list(offer(resolve(REPO), Texts("en")))


def test_a_model_that_cannot_fit_is_not_downloaded(
    hub_server: Hub,
    command: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tiny: mm.LM,
) -> None:
    files = {path.name: path.read_bytes() for path in Path(str(tiny.folder)).iterdir()}
    hub_server.repos[REPO] = files
    monkeypatch.setattr(device, "available_memory", lambda: 1000)
    assert command("generate", "-m", REPO, "-p", "Hi") == 1
    assert "not enough memory" in capsys.readouterr().err
    assert "config.json" in hub_server.got()
    assert not [name for name in hub_server.got() if name.endswith(".safetensors")]
