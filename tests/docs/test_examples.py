"""Every example of the server's guide runs as it is: only the port is another here."""

from __future__ import annotations

import ast
import gc
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest

import minicpm_mlx as mm
from support import node
from support.data import need_shared
from support.guides import GUIDE, HERE, QUESTION, blocks, text

pytest.importorskip("fastapi")

if TYPE_CHECKING:
    from support.serving import Live

ANSWER = "The capital of France is Paris."

# The examples do not close their clients, whose sockets are noticed once they are collected.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning"
)


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    """Here, and not in a later test."""
    yield
    gc.collect()


def block(language: str, beginning: str, server: Live | None = None) -> str:
    """The one that has a line which begins so, with the address of the server that there is."""
    (found,) = (one for one in blocks(language) if re.search(rf"(?m)^{beginning}", one))
    return found.replace(HERE, server.url) if server else found


def printed(capsys: pytest.CaptureFixture[str], *programs: str) -> list[str]:
    """The lines that Python programs print, which follow each other in one namespace."""
    names: dict[str, Any] = {"__name__": "guide"}
    for program in programs:
        exec(compile(program, GUIDE, "exec"), names)
    return capsys.readouterr().out.splitlines()


def shell(program: str, folder: Path, **variables: str) -> str:
    """What a shell program prints, with this Python's own commands first."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euc", program],
        cwd=folder,
        env=os.environ | {"PATH": path, "HOME": str(folder)} | variables,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_answer_that_examples_are_held_to_is_the_models(demo: mm.LM) -> None:
    assert demo.generate(QUESTION, max_tokens=24).text == ANSWER


def test_openais_examples_run(server: Live, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("openai")
    basics, others = block("python", "from openai", server), block("python", "scored", server)
    whole, streamed, *scores, response, widths = printed(capsys, basics, others)
    assert whole == streamed == response == ANSWER
    for word, score in zip(("The", " capital", " of", " France"), scores, strict=True):
        assert re.match(rf"{word!r} -\d+\.\d+ \['", score)
        assert score.endswith("]")
    width = server.service.lm.config.hidden_size
    assert widths == str([width, width])


@pytest.mark.slow
def test_structured_output_keeps_to_its_forms(
    server: Live, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("openai")
    basics, forms = block("python", "from openai", server), block("python", "import json", server)
    city, choice, word, length = printed(capsys, basics, forms)[2:]
    assert ast.literal_eval(city).keys() == {"name", "inhabitants"}
    assert choice in ("yes", "no")
    assert re.fullmatch("[A-Z][a-z]{2,9}", word)
    assert re.fullmatch("[0-9]{1,3} (km|miles)", length)


def test_langchains_address_and_key_are_what_openais_client_needs(server: Live) -> None:
    openai = pytest.importorskip("openai")
    tree = ast.parse(block("python", "from langchain", server))
    (made,) = (
        one.value
        for one in tree.body
        if isinstance(one, ast.Assign) and isinstance(one.value, ast.Call)
    )
    given = {one.arg: ast.literal_eval(one.value) for one in made.keywords if one.arg}
    with openai.OpenAI(base_url=given["base_url"], api_key=given["api_key"]) as client:
        reply = client.chat.completions.create(
            model=given["model"], messages=QUESTION, max_completion_tokens=given["max_tokens"]
        )
    assert reply.choices[0].message.content == ANSWER


def test_anthropics_example_runs(server: Live, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("anthropic")
    assert printed(capsys, block("python", "from anthropic", server)) == [ANSWER, ANSWER]


@pytest.mark.slow
def test_ollamas_examples_run(
    server: Live, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("ollama")
    assert printed(capsys, block("python", "import ollama", server)) == [ANSWER, ANSWER]
    assert shell(block("sh", "export OLLAMA_HOST", server), tmp_path) == f"{ANSWER}\n"


@pytest.mark.slow
def test_llm_asks_a_model_of_its_file(server: Live, tmp_path: Path) -> None:
    pytest.importorskip("llm")
    file = tmp_path / "extra-openai-models.yaml"
    assert f"`{file.name}`" in text(GUIDE)
    file.write_text(block("yaml", "- model_id", server))
    # No plugins: the package that holds the demo is one, and needs llama-cpp.
    own = {"LLM_USER_PATH": str(tmp_path), "LLM_LOAD_PLUGINS": ""}
    assert shell(block("sh", "llm", server), tmp_path, **own) == f"{ANSWER}\n"


@pytest.mark.slow
def test_minicpms_own_example_of_sglang_runs_unchanged(
    server: Live, sglang: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    example = block("python", "from sglang import function")
    assert example in need_shared("minicpm-1.0-README.md").read_text(encoding="utf-8")
    # The demo knows no <AI> and would write on to the end: the length alone is another here.
    short = example.replace("http://localhost:30000", server.url).replace("=1024", "=12")
    assert short.count(server.url) == short.count("=12,") == 1
    assert "".join(printed(capsys, short)).strip()


@pytest.mark.slow
def test_sglangs_select_and_regex_run(
    server: Live, sglang: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    (line,) = printed(capsys, block("python", "from sglang import Runtime", server))
    assert re.fullmatch("(yes|no) [1-9]", line)


def test_curl_asks_every_api(server: Live, demo: mm.LM, tmp_path: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("needs curl")
    program = block("sh", "curl", server).replace("curl ", "curl -sS ")
    said, answers = shell(program, tmp_path), []
    while said:
        answer, end = json.JSONDecoder().raw_decode(said)
        answers.append(answer)
        said = said[end:]
    openai, anthropic, ollama, sglang = answers
    assert openai["choices"][0]["message"]["content"] == ANSWER
    assert anthropic["content"][0]["text"] == ollama["message"]["content"] == ANSWER
    assert sglang["text"] == demo.generate("The capital of France is", max_tokens=8).text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("package", "packages"),
    [
        ("openai", ["openai@6"]),
        ("@ai-sdk/openai-compatible", ["ai@6", "@ai-sdk/openai-compatible@2"]),
        ("ollama-ai-provider-v2", ["ai@6", "ollama-ai-provider-v2@3"]),
    ],
)
def test_examples_in_javascript_run(
    server: Live, pytestconfig: pytest.Config, package: str, packages: list[str]
) -> None:
    folder = node.installed(pytestconfig.cache, *packages)
    program = folder / "guide.mjs"
    program.write_text(block("js", rf'import .* from "{package}"', server), encoding="utf-8")
    assert shell(f"node {program.name}", folder).strip() == ANSWER


@pytest.mark.slow
def test_lm_eval_measures_a_task(server: Live, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    pytest.importorskip("tenacity")  # of lm-eval[api]
    (tmp_path / "rows.jsonl").write_text(
        '{"text": "The capital of France is", "choices": [" Paris", " a banana"], "answer": 0}\n'
        '{"text": "Two plus two is", "choices": [" a banana", " four"], "answer": 1}\n'
    )
    data_files = {"test": str(tmp_path / "rows.jsonl")}
    task = {
        **{"task": "tiny", "dataset_path": "json", "dataset_kwargs": {"data_files": data_files}},
        **{"test_split": "test", "output_type": "multiple_choice", "target_delimiter": ""},
        **{"doc_to_text": "text", "doc_to_choice": "choices", "doc_to_target": "answer"},
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "tiny.yaml").write_text(json.dumps(task))
    program = block("sh", "lm_eval", server)
    own = program.replace("arc_easy", f"tiny --include_path {tmp_path}")
    assert own != program
    said = shell(own, tmp_path, HF_DATASETS_OFFLINE="1", HF_HOME=str(tmp_path / "home"))
    assert re.search(r"\|tiny\b.*\|acc +\|↑ +\| +1\b", said), said
