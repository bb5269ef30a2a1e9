"""One model over several processes gives what it gives alone."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import mlx.core as mx
import pytest

from minicpm_mlx.distributed import collectives
from minicpm_mlx.errors import InvalidArgumentError
from minicpm_mlx.model import tensor_parallel
from minicpm_mlx.model.fused import fuse
from minicpm_mlx.model.packing import quantize
from minicpm_mlx.quantization.recipe import packing
from minicpm_mlx.weights.checkpoint import write_checkpoint
from support.data import GOLDEN, write_tokenizer
from support.random_models import MLA, MOE, checkpoint_of, random_model

IDS = mx.array([[1, 7, 300, 45, 6, 7, 511, 0]])
COMMAND = [sys.executable, "-c", "from minicpm_mlx.cli.main import main; main()"]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    "changes", [{}, MOE, MLA, {"attention_bias": True}, {"num_key_value_heads": 2}, {"bits": 8}]
)
def test_the_shares_add_up_to_the_model(
    changes: dict[str, Any], fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both shares in this process, where the first waits for what the second makes."""
    changes = dict(changes)
    bits = changes.pop("bits", None)

    def whole() -> Any:
        model = random_model(**changes, intermediate_size=128)
        if bits is not None:
            quantize(model, packing(bits, 32))
        return model

    monkeypatch.setattr(collectives, "size", lambda: 2)
    shares = []
    for rank in range(2):
        monkeypatch.setattr(collectives, "rank", lambda rank=rank: rank)
        model = whole()
        tensor_parallel.shard(model)
        shares.append(fuse(model) if fused else model)
    model = whole()
    wanted = model(IDS)
    together = fuse(model) if fused else model
    for number, block in enumerate(together.layers):
        parts: list[Any] = [share.layers[number] for share in shares]
        layer: Any = block
        for name in ("self_attn", "mlp"):
            each = [part[name] for part in parts]
            layer[name] = lambda *given, each=each: sum(part(*given) for part in each)
    assert mx.abs(together(IDS) - wanted).max().item() < 1e-4


def test_what_cannot_be_divided_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collectives, "size", lambda: 3)
    monkeypatch.setattr(collectives, "rank", lambda: 0)
    with pytest.raises(InvalidArgumentError, match="4 attention heads cannot be divided among 3"):
        tensor_parallel.shard(random_model())


@pytest.fixture
def divisible(tmp_path: Path) -> Path:
    """A folder of a model as a Llama is, that four can share; the demo has nine heads."""
    model = random_model(num_attention_heads=8, num_key_value_heads=4, intermediate_size=128)
    raw = json.loads((GOLDEN / "minicpm_2b_like" / "config.json").read_text())
    raw |= {key: getattr(model.config, key) for key in raw if hasattr(model.config, key)}
    folder = tmp_path / "model"
    folder.mkdir()
    write_checkpoint(checkpoint_of(model, raw), folder)
    write_tokenizer(folder)
    return folder


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_launched_it_says_the_same(
    ranks: int, divisible: Path, command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    how = ["generate", "-m", str(divisible), "--raw", "-p", "Hello", "--max-tokens", "12", "--json"]
    assert command(*how, "--temp", "0") == 0
    alone = json.loads(capsys.readouterr().out)
    launch = ["launch", "-n", str(ranks), "--", *how, "--temp", "0"]
    done = subprocess.run([*COMMAND, *launch], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["token_ids"] == alone["token_ids"]


ASKED: list[dict[str, Any]] = [
    {"prompt": "Hello", "temperature": 0},
    {"prompt": "A longer text " * 20, "temperature": 1.0, "seed": 4},
    {"prompt": ["One", "Two", "Three"], "temperature": 0, "frequency_penalty": 1.0},
    {"prompt": "Scored", "temperature": 0, "echo": True, "logprobs": 2},
    {"prompt": "Digits: ", "temperature": 0, "guided_regex": "[0-9]{3,12}"},
]


def texts_of(url: str) -> tuple[list[Any], list[Any]]:
    """A server's answers to ASKED: one at a time, then at once, beside a client that leaves."""

    def post(body: dict[str, Any], timeout: float = 60) -> Any:
        data = json.dumps({"max_tokens": 10} | body).encode()
        kind = {"Content-Type": "application/json"}
        with urlopen(Request(f"{url}/v1/completions", data, kind), timeout=timeout) as answer:
            return [choice["text"] for choice in json.loads(answer.read())["choices"]]

    in_turn = [post(body) for body in ASKED]
    with ThreadPoolExecutor(len(ASKED) + 1) as pool:
        leaving = pool.submit(post, {"prompt": "x", "max_tokens": 4000, "ignore_eos": True}, 1.0)
        at_once = list(pool.map(post, ASKED))
        assert isinstance(leaving.exception(), OSError)  # a TimeoutError, or an URLError of one
    return in_turn, at_once


@pytest.mark.slow
def test_launched_it_serves_the_same(divisible: Path) -> None:
    pytest.importorskip("fastapi", reason="the server's packages are not installed: [serve]")
    serve = ["serve", "--model", str(divisible), "--port", "0"]
    found = []
    for before in ([], ["launch", "-n", "2", "--"]):
        process = subprocess.Popen(
            [*COMMAND, *before, *serve], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
        )
        try:
            assert process.stderr
            line = process.stderr.readline().decode()
            address = re.search(r"http://[0-9.:]+", line)
            assert address, line
            found.append(texts_of(address[0]))
            process.terminate()
            assert process.wait(30) == 0, process.stderr.read()
        finally:
            process.kill()
            process.communicate()
    (alone, alone_at_once), (launched, launched_at_once) = found
    assert launched == alone == alone_at_once
    assert re.fullmatch("Digits: [0-9]{3,12}|[0-9]{3,12}", alone[4][0])
    for reply in (0, 3, 4):  # greedy
        assert launched_at_once[reply] == alone[reply]
    if launched_at_once != alone:
        pytest.xfail("drawn and penalised replies vary among other requests of a launched server")
