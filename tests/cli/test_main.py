"""The command line as a user meets it: what it prints, where, and with which status."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

import minicpm_mlx
from minicpm_mlx.cli import options
from minicpm_mlx.cli.main import app, main
from minicpm_mlx.cli.render import theme
from minicpm_mlx.model_cards import GENERATIONS, cards

CAPITAL = ("--prompt", "What is the capital of France?", "--temp", "0", "--max-tokens", "24")
HEAVY = ("mlx.core", "mlx_lm", "transformers", "torch", "fastapi", "uvicorn", "gradio")

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """The command in this process: status, stdout, stderr."""
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    theme.console.cache_clear()

    def call(*arguments: str, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["minicpm-mlx", *arguments])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return call


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch, demo: minicpm_mlx.LM) -> None:
    """Commands get the demo that the session has loaded already."""
    monkeypatch.setattr(options, "load_model", lambda name, compute, **_: demo)


def command(*arguments: str) -> list[str]:
    code = "from minicpm_mlx.cli.main import main; main()"
    return [sys.executable, "-c", code, *arguments]


def modules_after(*calls: list[str]) -> tuple[list[str], str]:
    """Heavy modules in a process that ran these commands, and all it printed."""
    code = """
import json, sys
from minicpm_mlx.cli.main import main
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["minicpm-mlx", *arguments]
    try:
        main()
    except SystemExit:
        pass
print("\\n" + json.dumps([name for name in json.loads(HEAVY) if name in sys.modules]))
""".replace("HEAVY", repr(json.dumps(HEAVY)))
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(calls)], capture_output=True, text=True, check=True
    )
    *printed, found = done.stdout.splitlines()
    return json.loads(found), "\n".join(printed) + done.stderr


# Without a model


def test_each_command_has_help_and_shows_where_it_is_listed(cli: Cli) -> None:
    assert cli("--version") == (0, f"{minicpm_mlx.__version__}\n", "")
    status, out, err = cli()
    assert status == 2
    assert "Usage" in out + err
    _, overview, _ = cli("--help")
    group: Any = typer.main.get_command(app)
    for name in group.commands:
        assert name in overview
        status, out, err = cli(name, "--help")
        assert (status, err) == (0, "")
        assert f"minicpm-mlx {name}" in out


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["bogus"], "bogus"),
        (["generate"], "--prompt"),
        (["generate", "--prompt", "x", "--frobnicate"], "--frobnicate"),
        (["generate", "--prompt", "x", "--max-tokens", "many"], "--max-tokens"),
        (["show"], "model"),
    ],
)
def test_usage_errors_name_the_culprit_and_exit_2(
    cli: Cli, arguments: list[str], word: str
) -> None:
    status, out, err = cli(*arguments)
    assert (status, out) == (2, "")
    assert word in err
    assert "Traceback" not in err


def test_help_lists_and_usage_errors_import_nothing_heavy() -> None:
    found, printed = modules_after(
        ["--help"],
        ["chat", "--help"],
        ["generate", "--help"],
        ["serve", "--help"],
        ["--version"],
        ["list"],
        ["generate", "--frobnicate"],
        ["chat", "--max-tokens", "many"],
    )
    assert found == []
    assert "--frobnicate" in printed


def test_list_has_every_card_as_json_and_as_plain_rows(cli: Cli) -> None:
    status, out, err = cli("list", "--json")
    rows = json.loads(out)
    assert (status, err) == (0, "")
    known = [row["name"] for row in rows if row["kind"] == "card"]
    assert sorted(known) == list(cards())
    assert list(rows[0])[:4] == ["name", "kind", "download_bytes", "kept_bytes"]
    newest = rows[known.index("minicpm5-1b")]
    assert (newest["generation"], newest["languages"]) == ("MiniCPM5", ["en", "zh"])
    assert newest["thinking"] == {"temperature": 0.9, "top_p": 0.95}
    generations = [row["generation"] for row in rows if row["kind"] == "card"]
    assert list(dict.fromkeys(generations)) == list(GENERATIONS)
    assert rows[known.index("minicpm-2b-dpo")]["download_bytes"] == 5_450_000_000
    _, out, _ = cli("list")
    header, *lines = out.splitlines()
    assert header.split()[:2] == ["name", "download"]
    assert [line.split()[0] for line in lines][: len(known)] == known
    assert "\x1b" not in out


def test_list_here_has_what_is_on_this_disk_and_its_memory(cli: Cli, demo_folder: Path) -> None:
    _, out, _ = cli("list", "--here", "--json")
    rows = json.loads(out)
    assert "demo" in [row["name"] for row in rows]
    assert all(row["kept_bytes"] for row in rows)
    assert all(row["memory_bytes"] > 1e8 for row in rows if row["name"] == "demo")
    _, out, _ = cli("list", "--here")
    assert "memory" in out.splitlines()[0]
    assert "minicpm-2b-128k" not in out


def test_list_here_says_in_a_line_that_nothing_is_here(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MINICPM_MLX_HOME", str(tmp_path))
    status, out, err = cli("list", "--here")
    assert (status, out) == (0, "")
    assert err.startswith("no model is on this disk")
    assert len(err.splitlines()) == 1


def test_show_of_a_card_that_is_not_here_prints_its_facts(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("minicpm-2b-sft", cards()["minicpm-2b-sft"].repo):
        status, out, err = cli("show", str(name))
        assert (status, err) == (0, "")
        assert "licence" in out
        assert "not downloaded" in out
    monkeypatch.setenv("MINICPM_MLX_HOME", str(tmp_path))
    assert "not converted yet" in cli("show", "demo")[1]  # its package brings it
    _, out, _ = cli("show", "minicpm5-1b")
    shown = [line.split()[0] for line in out.splitlines()]
    assert not {"offer", "shape", "width", "note_zh"} & {*shown}
    assert shown.count("note") == 1


def test_show_of_a_kept_model_adds_its_config(cli: Cli, demo_folder: Path) -> None:
    status, out, err = cli("show", "demo", "--json")
    facts = json.loads(out)
    assert (status, err) == (0, "")
    assert facts["folder"] == str(demo_folder)
    assert (facts["num_hidden_layers"], facts["vocab_size"]) == (30, 49152)
    assert facts["context_length"] == 8192


def test_show_prints_a_path_with_brackets_and_colons_as_it_is(cli: Cli, tmp_path: Path) -> None:
    folder = tmp_path / "[bold]x[" / ":smile:"
    folder.mkdir(parents=True)
    golden = Path(__file__).parents[1] / "golden" / "minicpm_2b_like" / "config.json"
    (folder / "config.json").write_text(golden.read_text())
    status, out, _ = cli("show", str(folder))
    assert status == 0
    assert str(folder) in out


def test_doctor_names_the_device_in_both_forms(cli: Cli) -> None:
    status, out, _ = cli("doctor", "--json")
    facts = json.loads(out)
    assert status == 0
    assert facts["device"] in ("gpu", "cpu")
    assert isinstance(facts["advice"], list)
    status, out, _ = cli("doctor")
    assert status == 0
    wanted = [name.removesuffix("_bytes") for name in facts if name not in ("models", "advice")]
    wanted += facts["models"]
    assert [line.split()[0] for line in out.splitlines()][: len(wanted)] == wanted


# With the demo


def test_generate_json_keeps_its_contract_without_mlx_lm(demo_folder: Path) -> None:
    found, printed = modules_after(["generate", "--model", "demo", *CAPITAL, "--json"])
    record = json.loads(printed)
    assert record["text"] == "The capital of France is Paris."
    assert list(record) == [
        "text",
        "thinking",
        "token_ids",
        "prompt_tokens",
        "completion_tokens",
        "thinking_tokens",
        "finish_reason",
        "ttft_s",
        "prompt_tps",
        "decode_tps",
        "peak_memory_bytes",
    ]
    assert record["finish_reason"] == "stop"
    assert len(record["token_ids"]) == record["completion_tokens"] == 7
    assert record["prompt_tokens"] == 37
    assert all(record[key] > 0 for key in ("ttft_s", "prompt_tps", "decode_tps"))
    assert found == ["mlx.core"]


@pytest.mark.usefixtures("loaded")
def test_generate_prints_the_text_alone(cli: Cli) -> None:
    expected = (0, "The capital of France is Paris.\n", "")
    assert cli("generate", *CAPITAL) == expected
    _, question, *rest = CAPITAL
    assert cli("generate", "--prompt", "-", *rest, stdin=question + "\n") == expected


@pytest.mark.usefixtures("loaded")
def test_raw_continues_the_text_without_the_template(cli: Cli, demo: minicpm_mlx.LM) -> None:
    text = "The capital of France is"
    rest = ("--temp", "0", "--max-tokens", "4", "--json")
    status, out, _ = cli("generate", "--prompt", text, "--raw", *rest)
    record = json.loads(out)
    assert status == 0
    assert record["prompt_tokens"] == len(demo.encode(text)) == 5
    assert "Paris" in record["text"]


@pytest.mark.usefixtures("loaded")
def test_stop_and_max_tokens_end_the_text(cli: Cli) -> None:
    record = json.loads(cli("generate", *CAPITAL, "--stop", "zebra", "--stop", " is", "--json")[1])
    assert (record["text"], record["finish_reason"]) == ("The capital of France", "stop")
    record = json.loads(cli("generate", *CAPITAL[:-1], "3", "--json")[1])
    assert (record["text"], record["finish_reason"]) == ("The capital of", "length")
    arguments = ("generate", "--prompt", "1\n2\n3\n", "--raw", "--temp", "0", "--max-tokens", "8")
    whole = cli(*arguments)[1]
    assert "\n" in whole.rstrip("\n")
    assert cli(*arguments, "--stop", "\\n")[1] == whole.split("\n")[0] + "\n"


@pytest.mark.usefixtures("loaded")
def test_a_seed_decides_the_text(cli: Cli) -> None:
    def drawn(seed: str) -> str:
        arguments = ("--prompt", "Once", "--raw", "--temp", "1", "--max-tokens", "6")
        return cli("generate", *arguments, "--top-p", "1", "--seed", seed)[1]

    first = drawn("1")
    assert drawn("1") == first
    assert drawn("2") != first


@pytest.mark.usefixtures("loaded")
def test_system_text_reaches_the_template_and_contradicts_raw(cli: Cli) -> None:
    plain = json.loads(cli("generate", *CAPITAL, "--json")[1])
    arguments = ("generate", *CAPITAL, "--system", "You only say one word.")
    record = json.loads(cli(*arguments, "--json")[1])
    assert record["prompt_tokens"] != plain["prompt_tokens"]
    status, out, err = cli(*arguments, "--raw")
    assert (status, out) == (1, "")
    assert err.startswith("minicpm-mlx: --system")


# Processes and pipes


def test_a_reader_that_leaves_or_ctrl_c_ends_without_a_traceback(demo_folder: Path) -> None:
    arguments = ("generate", "--model", "demo", "--prompt", "Tell a long story", "--temp", "0")
    for status, message in ((1, b""), (130, b"minicpm-mlx: interrupted")):
        with subprocess.Popen(
            command(*arguments),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as process:
            assert process.stdout
            assert process.stderr
            assert process.stdout.read(1)  # it is under way
            if status == 1:
                process.stdout.close()
            else:
                process.send_signal(signal.SIGINT)
            assert process.stderr.read().strip() == message
            assert process.wait(60) == status


def test_ctrl_c_during_the_imports_is_one_line() -> None:
    code = """
import sys
class Finder:
    def find_spec(name, *_):
        if name == "minicpm_mlx.cli.bench":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Finder)
from minicpm_mlx.cli.start import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "minicpm-mlx: interrupted\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_that_cannot_be_written_is_one_line() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            command("list", "--json"), stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 1
    assert done.stderr == "minicpm-mlx: input/output: No space left on device\n"
