"""`minicpm-mlx lora` and `dpo` as they are used: every format, stopped anywhere, and afterwards."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import minicpm_mlx as mm
from minicpm_mlx.files.atomic import alone
from minicpm_mlx.train.tracking.events import Event, Trained, Validated
from minicpm_mlx.train.tracking.jsonl_log import read_log
from support.data import need_shared
from support.tiny_model import write_model

FORMATS = {
    "alpaca_zh_array/train.json": "lora",
    "kto_messages_label/train.json": "dpo",
    "messages_jsonl/train.jsonl": "lora",
    "plain_text/train.txt": "lora",
    "preference_strings_jsonl/train.jsonl": "dpo",
}
"""One of each kind; tests of the data read all of them."""

Command = Callable[..., int]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    rows = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}."} for n in range(40)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def words(model: Path, data: Path, folder: Path, *more: str, verb: str = "lora") -> list[str]:
    begin = ["--data", str(data), "--model", str(model), "--adapter-path", str(folder)]
    return [verb, *begin, "--replies", "0", *more]


SHORT = ("--iters", "6", "--batch-size", "4", "--learning-rate", "0.01", "--steps-per-eval", "3")
LONG = (*SHORT[2:], "--iters", "20", "--save-every", "2", "--dropout", "0.1")


@pytest.fixture
def without_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where matplotlib is not installed: a chart takes longer than a short run."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)


def adapter_of(folder: Path) -> dict[str, mx.array]:
    found: Any = mx.load(str(folder / "adapters.safetensors"))
    return found


def events_of(folder: Path) -> list[Event]:
    return [record.event for record in read_log(folder / "log.jsonl")]


def validations(folder: Path) -> list[Validated]:
    return [event for event in events_of(folder) if isinstance(event, Validated)]


def losses_of(folder: Path) -> list[float]:
    return [event.loss for event in events_of(folder) if isinstance(event, Trained | Validated)]


# Formats


@pytest.mark.usefixtures("without_charts")
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_trains_from_its_file_alone(
    name: str, model: Path, tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    path, folder = need_shared("finetune", *name.split("/")), tmp_path / "out"
    how = ("--iters", "1", "--max-seq-length", "384", "--batch-size", "2")
    small = ("--grad-accumulation-steps", "1", "--val-fraction", "0.005")
    assert command(*words(model, path, folder, *how, *small, verb=FORMATS[name])) == 0, (
        capsys.readouterr().err
    )
    losses = losses_of(folder)
    assert losses
    assert np.isfinite(losses).all()
    changed = adapter_of(folder)
    assert any(mx.abs(array).max().item() > 0 for n, array in changed.items() if "lora_b" in n)


def test_a_run_from_start_to_chat(
    model: Path, data: Path, tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    more = ("--replies", "1", "--iters", "20", "--batch-size", "4", "--learning-rate", "0.02")
    assert command(*words(model, data, folder), *more) == 0
    said = capsys.readouterr()
    assert "36 samples, 4 to validate on" in said.err
    assert "20 steps, 2.2 epochs: 4 samples a batch" in said.err
    assert "memory: about" in said.err
    assert f"minicpm-mlx chat --model {model} --adapter {folder}" in said.out
    validated = validations(folder)
    best = min(validated, key=lambda event: event.loss)
    assert f"best validation loss {best.loss:.4f}, at step {best.step}\n" in said.out
    assert validated[-1].loss < 0.7 * validated[0].loss
    files = "README.md adapter_config.json adapters.safetensors checkpoints curve.png log.jsonl"
    assert {path.name for path in folder.iterdir()} == {*files.split(), "training.json"}
    card = json.loads((folder / "training.json").read_text())
    assert card["base"]["name"] == "model"
    stated = json.loads((folder / "adapter_config.json").read_text())
    assert (stated["model"], stated["base_form"]["format"]) == (str(model), "mup")
    assert "The base is in muP form" in (folder / "README.md").read_text()
    assert list(card["data"]["files"]) == ["train.jsonl"]
    lm = mm.load(model)
    plain = lm.generate("3 + 1 =", max_tokens=6).token_ids
    lm.use_adapter(folder)
    changed = lm.generate("3 + 1 =", max_tokens=6).token_ids
    lm.use_adapter(None)
    assert lm.generate("3 + 1 =", max_tokens=6).token_ids == plain
    assert changed != plain
    assert command("fuse", str(model), str(tmp_path / "fused"), "--adapter", str(folder)) == 0
    fused = mm.load(tmp_path / "fused").generate("3 + 1 =", max_tokens=6).token_ids
    assert fused == changed
    for layout in ("peft", "mlx"):
        where = tmp_path / layout
        export = ("export-adapter", str(folder), str(where), "--model", str(model))
        assert command(*export, "--format", layout) == 0
        lm.use_adapter(where)
        assert lm.generate("3 + 1 =", max_tokens=6).token_ids == changed


@pytest.mark.usefixtures("without_charts")
def test_full_training_makes_a_model_that_is_measured(
    model: Path, data: Path, tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    source, folder = tmp_path / "data", tmp_path / "out"
    source.mkdir()
    rows = data.read_text().splitlines()
    for name, part in (("train", rows[:30]), ("valid", rows[30:35]), ("test", rows[35:])):
        (source / f"{name}.jsonl").write_text("\n".join(part))
    options = (*SHORT, "--test", "--json", "--fine-tune-type", "full")
    assert command(*words(model, source, folder, *options)) == 0
    started, first, *_, ended = map(json.loads, capsys.readouterr().out.splitlines())
    assert (started["event"], ended["event"], ended["complete"]) == ("started", "ended", True)
    assert 0 < ended["test"]["loss"] < first["loss"]
    assert ended["test"]["perplexity"] == pytest.approx(np.exp(ended["test"]["loss"]))
    before, after = mm.load_model(model, "float32"), mm.load_model(folder / "model", "float32")
    ids = mx.array([[1, 50, 60, 70]])
    assert mx.abs(before(ids) - after(ids)).max().item() > 0.1
    assert mm.load(folder / "model").generate(
        [{"role": "user", "content": "1 + 1 ="}], max_tokens=2
    )


# Stopped and gone on with


def started(*arguments: str) -> subprocess.Popen[str]:
    line = "import sys; sys.modules['matplotlib'] = None\n"  # as `without_charts`
    line += "from minicpm_mlx.cli.main import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", line, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def when_saved(folder: Path, process: subprocess.Popen[str], step: int) -> None:
    """Wait until a run has got so far."""
    limit = time.monotonic() + 60
    while not (folder / "checkpoints" / f"step-{step:07d}").exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < limit
        time.sleep(0.005)


@pytest.fixture(scope="module")
def whole(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    process = started(*words(model, data, folder, *LONG))
    assert process.wait() == 0, process.communicate()[1]
    process.communicate()
    return folder


@pytest.mark.usefixtures("without_charts")
@pytest.mark.parametrize(
    "number", [signal.SIGKILL, signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_a_run_that_was_stopped_goes_on_and_ends_alike(
    number: signal.Signals, model: Path, data: Path, whole: Path, tmp_path: Path, command: Command
) -> None:
    part = tmp_path / "part"
    process = started(*words(model, data, part, *LONG))
    when_saved(part, process, 6)
    os.kill(process.pid, number)
    said = process.communicate()
    assert process.returncode == {signal.SIGKILL: -9}.get(number, 130)
    if number != signal.SIGKILL:
        assert "--resume" in said[0]
        assert "Traceback" not in said[1]
    assert command(*words(model, data, part, *LONG, "--resume")) == 0
    weights, expected = (path / "adapters.safetensors" for path in (part, whole))
    assert weights.read_bytes() == expected.read_bytes()
    resumed, straight = (
        [(type(e), e.step) for e in events_of(folder) if isinstance(e, Trained | Validated)]
        for folder in (part, whole)
    )
    assert resumed == straight


@pytest.mark.usefixtures("without_charts")
def test_two_processes_are_one_with_twice_the_batch(
    model: Path, data: Path, tmp_path: Path, command: Command
) -> None:
    alone, together = tmp_path / "alone", tmp_path / "together"
    how = ("--iters", "4", "--learning-rate", "0.01", "--steps-per-report", "1")
    assert command(*words(model, data, alone, *how, "--batch-size", "4")) == 0
    rest = words(model, data, together, *how, "--batch-size", "2")
    second = started("launch", "-n", "2", "--", *rest)
    said = second.communicate()
    assert second.returncode == 0, said[1]
    assert said[0].count("to chat with the result") == 1
    one, two = adapter_of(alone), adapter_of(together)
    assert one.keys() == two.keys()
    for name in one:
        np.testing.assert_allclose(np.array(one[name]), np.array(two[name]), rtol=0, atol=1e-4)
    np.testing.assert_allclose(losses_of(alone), losses_of(together), atol=1e-4)


# Before anything is computed


def test_a_dry_run_shows_and_writes_nothing(
    model: Path, data: Path, tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    assert command(*words(model, data, folder, "--dry-run")) == 0
    shown = capsys.readouterr().out
    assert "36 samples" in shown
    assert "⟦ 1.<|im_end|>\n</s>⟧" in shown
    assert "memory: about" in shown
    planned = "validation: 6 times, every 6 steps, on 4 of 4 samples, about 10% of the time; "
    assert f"{planned}checkpoints every 3 steps, in at most a tenth of the time" in shown
    given = ("--steps-per-eval", "9", "--save-every", "9")
    assert command(*words(model, data, folder, "--dry-run", *given)) == 0
    assert "4 times, every 9 steps, on 4 of 4 samples, about 7% of" in capsys.readouterr().out
    assert command(*words(model, data, folder, "--dry-run", "--json")) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["validation"]["times"] == 6
    assert 0.09 < found["validation"]["share"] <= 0.1
    assert found["plan"]["steps"] == 27
    assert found["memory"]["weights"] > 0
    assert not folder.exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--iters", "3", "--epochs", "1"), "--iters and --epochs both set the length"),
        (("--rank", "0"), "--rank must be 1 or more"),
        (
            ("--fine-tune-type", "qlora"),
            "--fine-tune-type must be one of lora, dora, full, got 'qlora'",
        ),
        (("--fine-tune-type", "full", "--rank", "4"), "--rank is for adapters"),
        (("--modules", "w1"), "--modules must be some of"),
        (("--loss", "dpo"), "--loss is for preferences"),
        (("--beta", "-1"), "--beta is for preferences"),
        (("--label-smoothing", "0.1"), "--label-smoothing is for preferences"),
        (("--length-normalized",), "--length-normalized is for preferences"),
        (("--batch-size", "0"), "--batch-size must be 1 or more"),
        (("--iters", "-5"), "--iters must be 1 or more"),
        (("--steps-per-eval", "0"), "--steps-per-eval must be 1 or more"),
        (("--seed", str(2**64)), "--seed must be between 0 and"),
        (("--alpha", "inf"), "--alpha must be above 0"),
        (("--iters", "3", "--warmup", "3"), "--warmup must be less than the 3 steps"),
        (("--replies", "-1"), "--replies must be 0 or more"),
        (("--resume",), "has no checkpoint to resume from"),
        (("--report", "mlflow"), "--report must be one of"),
        (("--optimizer", "adam"), "--optimizer must be one of"),
        (("--lr-schedule", "step"), "--lr-schedule must be one of"),
        (("--val-fraction", "0", "--patience", "2"), "--patience needs a validation set"),
        (("--test",), "--test needs a test set"),
        (("--weight-decay", "1"), "--weight-decay must be 0 or more and below 1"),
        (("--max-seq-length", "1"), "--max-seq-length must be 2 or more"),
        (("--mask", "last", "--overlong", "split"), "--overlong split contradicts mask"),
        (("--dtype", "int8"), "--dtype must be one of"),
        (("--device", "tpu"), "--device must be gpu or cpu"),
        (("--num-layers", "99"), "--num-layers must be at most 3"),
        (("--mask", "some"), "--mask must be one of"),
    ],
)
def test_what_cannot_be_is_one_line_and_leaves_nothing(
    more: tuple[str, ...],
    message: str,
    model: Path,
    data: Path,
    tmp_path: Path,
    command: Command,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert command(*words(model, data, tmp_path / "out", *more)) == 1
    assert message in " ".join(capsys.readouterr().err.splitlines()[-1:])
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("without_charts")
def test_a_run_is_not_written_over(
    model: Path, data: Path, tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    assert command(*words(model, data, folder, *SHORT)) == 0
    before = (folder / "adapters.safetensors").read_bytes()
    assert command(*words(model, data, folder, *SHORT)) == 1
    assert "--resume continues it" in capsys.readouterr().err
    assert command(*words(model, data, folder, *SHORT, "--seed", "1", "--resume")) == 1
    assert "started with another --seed: it was 0, and is 1" in capsys.readouterr().err
    assert (folder / "adapters.safetensors").read_bytes() == before
    shutil.rmtree(folder / "checkpoints")
    assert command(*words(model, data, folder, *SHORT)) == 1
    assert "already holds adapters.safetensors" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["model", "config.json", "adapter_model.safetensors", "README.md"])
def test_a_folder_that_holds_something_is_left_alone(
    name: str, model: Path, data: Path, tmp_path: Path, command: Command, capsys: Any
) -> None:
    (tmp_path / name).write_text("mine")
    for kind in ("lora", "full"):
        how = (*SHORT, "--fine-tune-type", kind)
        assert command(*words(model, data, tmp_path, *how)) == 1
        assert f"already holds {name}" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "mine"


def test_two_runs_do_not_share_a_folder(
    model: Path, data: Path, tmp_path: Path, command: Command, capsys: Any
) -> None:
    with alone(tmp_path, tmp_path):
        assert command(*words(model, data, tmp_path, *SHORT)) == 1
    assert "another process is making it" in capsys.readouterr().err


@pytest.mark.usefixtures("without_charts")
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_what_gets_no_better_is_kept_and_said(
    kind: str, model: Path, data: Path, tmp_path: Path, command: Command, capsys: Any
) -> None:
    nothing = "1e-20"  # which added to a weight, or to what a layer gives, is lost in rounding
    how = ("--iters", "2", "--batch-size", "4", "--learning-rate", nothing)
    how = (*how, "--steps-per-eval", "1")
    folder = tmp_path / "out"
    for left in ("new", "old"):  # by a process that was killed
        (folder / f"model-{left}").mkdir(parents=True)
        (folder / f"model-{left}" / "config.json").write_text("{}")
    assert command(*words(model, data, folder, *how, "--fine-tune-type", kind)) == 0
    said = capsys.readouterr()
    before, *after = (event.loss for event in validations(folder))
    assert after == [before, before]
    assert "never improved" in said.err
    assert f"no validation loss fell below that before training, {before:.4f}: the last" in said.out
    assert "best validation" not in said.out
    assert "to chat with the result" in said.out
    if kind == "lora":
        assert adapter_of(folder)["model.layers.0.mlp.up_proj.lora_b"].any().item()
    else:
        assert [path.name for path in folder.glob("model*")] == ["model"]
        assert mm.load(folder / "model")


def test_what_is_not_finite_is_no_result(
    model: Path, data: Path, tmp_path: Path, command: Command, capsys: Any
) -> None:
    how = (*SHORT[:4], "--learning-rate", "1e30")
    assert command(*words(model, data, tmp_path / "out", *how)) == 1
    assert "lower the learning rate" in capsys.readouterr().err


@pytest.mark.usefixtures("without_charts")
def test_bfloat16_trains_on_a_cpu_too(
    model: Path, data: Path, tmp_path: Path, command: Command
) -> None:
    how = ("--iters", "1", "--batch-size", "1", "--dtype", "bfloat16")
    assert command(*words(model, data, tmp_path / "out", *how)) == 0
    assert all(mx.isfinite(array).all().item() for array in adapter_of(tmp_path / "out").values())


@pytest.mark.usefixtures("without_charts")
@pytest.mark.parametrize("loss", ["dpo", "orpo"])
def test_preferences_are_learned_and_measured_alike(
    loss: str, model: Path, tmp_path: Path, command: Command, capsys: Any
) -> None:
    folder, out = tmp_path / "pairs", tmp_path / "out"
    folder.mkdir()
    rows = [{"prompt": f"{n}", "chosen": "yes", "rejected": "no"} for n in range(8)]
    for name in ("train", "valid", "test"):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    how = ("--iters", "6", "--batch-size", "4", "--learning-rate", "0.001", "--steps-per-eval", "3")
    more = ("--loss", loss, "--beta", "0.2", "--test", "--json")
    assert command(*words(model, folder, out, *how, *more)) == 0
    ended = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert ended["test"]["loss"] == pytest.approx(ended["best"], rel=1e-4)
    assert ended["test"]["accuracy"] == 1.0
    validated = validations(out)
    assert validated[-1].extra["accuracy"] == 1.0
    assert validated[-1].loss < validated[0].loss


def test_dpo_wants_preferences_and_each_loss_its_data(
    model: Path, data: Path, tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(*words(model, data, tmp_path / "out", *SHORT, verb="dpo")) == 1
    assert "expected preferences" in capsys.readouterr().err
    pairs = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"{n}", "chosen": "yes", "rejected": "no"} for n in range(20)]
    pairs.write_text("\n".join(map(json.dumps, rows)))
    assert command(*words(model, pairs, tmp_path / "kto", "--loss", "kto")) == 1
    assert "expected labelled replies" in capsys.readouterr().err


@pytest.mark.long
def test_the_demo_learns_from_160_samples(
    demo_folder: Path, tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = json.loads(need_shared("finetune", "alpaca_array", "train.json").read_text())[:160]
    data = tmp_path / "train.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    folder = tmp_path / "adapters"
    how = ("--iters", "30", "--max-seq-length", "256", "--replies", "0", "--steps-per-eval", "15")
    given = ("--data", str(data), "--model", "demo", "--adapter-path", str(folder))
    assert command("lora", *given, *how) == 0, capsys.readouterr().err
    losses = [event.loss for event in validations(folder)]
    assert losses[-1] < losses[0] - 0.02  # 0.033 after 30 steps at half the rate
    lm = mm.load("demo")
    prompt = [{"role": "user", "content": "Give three tips for staying healthy."}]
    plain = lm.generate(prompt, max_tokens=40).text
    lm.use_adapter(folder)
    assert lm.generate(prompt, max_tokens=40).text != plain
    lm.use_adapter(None)
    assert lm.generate(prompt, max_tokens=40).text == plain
