"""One model over several processes gives what it gives alone."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from conftest import GOLDEN, write_tokenizer
from test_fuse import MOE, random_model
from test_quantization import checkpoint_of

from minicpm_mlx import distributed, sharding
from minicpm_mlx.errors import InvalidArgumentError
from minicpm_mlx.fuse import fuse
from minicpm_mlx.quantization.recipe import packing
from minicpm_mlx.quantize import quantize
from minicpm_mlx.weights.checkpoint import write_checkpoint

IDS = mx.array([[1, 7, 300, 45, 6, 7, 511, 0]])
COMMAND = [sys.executable, "-c", "from minicpm_mlx.cli.main import main; main()"]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    "changes", [{}, MOE, {"attention_bias": True}, {"num_key_value_heads": 2}, {"bits": 8}]
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

    monkeypatch.setattr(distributed, "size", lambda: 2)
    shares = []
    for rank in range(2):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        model = whole()
        sharding.shard(model)
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
    monkeypatch.setattr(distributed, "size", lambda: 3)
    monkeypatch.setattr(distributed, "rank", lambda: 0)
    with pytest.raises(InvalidArgumentError, match="4 attention heads cannot be divided among 3"):
        sharding.shard(random_model())


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_launched_it_says_the_same(
    ranks: int, tmp_path: Path, command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a model as a Llama is that four can share; the demo has nine heads."""
    model = random_model(num_attention_heads=8, num_key_value_heads=4, intermediate_size=128)
    raw = json.loads((GOLDEN / "minicpm_2b_like" / "config.json").read_text())
    raw |= {key: getattr(model.config, key) for key in raw if hasattr(model.config, key)}
    folder = tmp_path / "model"
    folder.mkdir()
    write_checkpoint(checkpoint_of(model, raw), folder)
    write_tokenizer(folder)
    how = ["generate", "-m", str(folder), "--raw", "-p", "Hello", "--max-tokens", "12", "--json"]
    assert command(*how, "--temp", "0") == 0
    alone = json.loads(capsys.readouterr().out)
    found = []
    for temperature in ("0", "1"):
        launch = ["launch", "-n", str(ranks), "--", *how, "--temp", temperature]
        done = subprocess.run([*COMMAND, *launch], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout))
    assert found[0]["token_ids"] == alone["token_ids"]
    assert len(found[1]["token_ids"]) == 12
