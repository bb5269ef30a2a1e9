"""Memory estimates of training."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from mlx.utils import tree_flatten

from minicpm_mlx import device
from minicpm_mlx.errors import InvalidArgumentError
from minicpm_mlx.model.config import Config
from minicpm_mlx.train import memory
from minicpm_mlx.train.lora import LoRAConfig, prepare_model
from minicpm_mlx.train.memory import TrainingMemory, estimate_memory, fit_to_memory, trained_count
from support.random_models import MLA, MOE, TINY, random_model

CONFIG = Config.from_dict(TINY)


@pytest.mark.parametrize(
    "changes", [{}, MOE, MLA, {"attention_bias": True}, {"tie_word_embeddings": False}]
)
@pytest.mark.parametrize(
    "method",
    [
        LoRAConfig(rank=4),
        LoRAConfig(kind="dora", layers=1),
        LoRAConfig(modules=("o_proj",)),
        LoRAConfig(kind="full"),
        LoRAConfig(kind="full", layers=1),
    ],
)
def test_trained_parameters_are_counted(method: LoRAConfig, changes: dict[str, Any]) -> None:
    model = random_model(**changes)
    prepare_model(model, method)
    parameters: Any = tree_flatten(model.trainable_parameters())
    assert trained_count(model.config, method) == sum(array.size for _, array in parameters)


def estimate(**changes: Any) -> TrainingMemory:
    settings: dict[str, Any] = {"batch_size": 4, "length": 512, "checkpointing": False}
    return estimate_memory(CONFIG, LoRAConfig(), **settings | changes)


def test_memory_grows_with_what_is_trained_and_falls_with_checkpointing() -> None:
    assert estimate(length=1024).total > estimate().total > estimate(batch_size=1).total
    assert estimate(kind="preference").activations == 2 * estimate().activations
    assert estimate(checkpointing=True).activations < estimate().activations
    assert estimate(optimizer="adamw").trained > estimate(optimizer="sgd").trained


@pytest.mark.parametrize("slow", [False, True])
def test_the_fastest_settings_that_fit_are_chosen(
    slow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "slow_exponentials", lambda: slow)

    def fit(available: int, **rest: Any) -> tuple[int, bool]:
        monkeypatch.setattr(device, "available_memory", lambda: available)
        found = fit_to_memory(CONFIG, LoRAConfig(), samples=4, length=512, **rest)
        return found.batch_size, found.checkpointing

    assert fit(10**12) == (4, slow)
    if not slow:
        assert fit(estimate(batch_size=2).total) == (2, False)
        assert fit(estimate(batch_size=1).total - 1)[1] is True
    assert fit(0) == (1, True)  # the smallest, which does not fit either
    assert fit(0, kind="kto")[0] == 2
    assert fit(0, batch_size=3, checkpointing=False) == (3, False)


def test_what_does_not_fit_is_refused_with_advice() -> None:
    fitting = replace(estimate(), available=10**12)
    memory.check(fitting)
    with pytest.raises(
        InvalidArgumentError,
        match=r"not enough memory: about .* MB of .*--grad-checkpoint, --batch-size 1, "
        r"--max-seq-length 256, a model in fewer bits",
    ):
        memory.check(replace(fitting, available=0))
