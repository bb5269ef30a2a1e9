"""The scores that MiniCPM's README publishes.

Joins its three tables; each model appears once. The README scores multiple choice in two ways and
gives the higher; a star marks perplexity (our "ppl"). The scores of Gemini Nano-3B are from its own
report ("r").
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from ...model_cards import cards

TASKS = (
    *("ceval", "cmmlu", "mmlu", "humaneval", "mbpp", "gsm8k"),
    *("math", "bbh", "arc_easy", "arc_challenge", "hellaswag"),
)
"""The columns of the scores."""

SCORES = """
Llama2-7B                32.42  31.11  44.32   12.2  27.17  13.57    1.8  33.23  75.25  42.75 75.62*
Qwen-7B                  58.96  60.35  57.65  17.07  42.15  41.24   5.34  37.75  83.42  64.76 75.32*
Deepseek-7B              42.82  44.45  47.82  20.12  41.45  15.85   1.53  33.38 74.58* 42.15* 75.45*
Mistral-7B               46.12  42.96  62.69  27.44   45.2  33.13    5.0  41.06  83.92  70.73 80.43*
Llama2-13B               37.32  37.06  54.71  17.07  32.55  21.15   2.25  37.92 78.87*  58.19 79.23*
MPT-30B                  29.34  32.09  46.56  21.95  35.36  10.31   1.56  38.22 78.66* 46.08* 79.72*
Falcon-40B               40.29  41.57  53.53  24.39  36.53  22.44   1.92  36.24 81.94*  57.68 83.26*
MiniCPM-2B               51.13  51.07  53.46  50.00  47.31  53.83  10.24  36.87  85.44  68.00  68.25
TinyLlama-1.1B           25.02  24.03   24.3   6.71  19.91   2.27   0.74  28.78 60.77* 28.15* 58.33*
Qwen-1.8B                49.81  45.32  43.37   7.93  17.80  19.26   2.42  29.07 63.97*  43.69 59.28*
Gemini Nano-3B               -      -      -      -  27.2r  22.8r      -  42.4r      -      -      -
StableLM-Zephyr-3B       30.34  30.89   45.9  35.37  31.85  52.54  12.49  37.68  73.78  55.38 71.87*
Phi-2-2B                 23.37  24.18  52.66  47.56  55.04  57.16    3.5  43.39  86.11  71.25 73.07*
ChatGLM2-6B              52.05  49.21  45.77  10.37   9.38  22.74   5.96   32.6  74.45  56.82 58.48*
Mistral-7B-Instruct-v0.1 38.06  36.96  53.56  29.27  39.34  28.73   3.48  39.52  81.61  63.99 73.47*
Mistral-7B-Instruct-v0.2 42.55  41.92  60.51  36.59  48.95  40.49   4.95  39.81  86.28  73.38 84.55*
Qwen-7B-Chat             58.57  57.23  56.03  15.85  40.52  42.23    8.3  37.34 64.44* 39.25* 74.52*
Yi-6B-Chat               70.88  71.11  62.95  14.02  28.34  36.54   3.88  37.43  84.89  70.39  74.6*
Baichuan2-7B-Chat        53.28   53.5     53  21.34  32.32  25.25   6.32  37.46  79.63  60.15 69.23*
Deepseek-7B-chat         46.95  49.72  51.67  40.85  48.48  48.52   4.26   35.7  76.85  63.05 76.68*
Llama2-7B-Chat           34.54  32.64  47.64  14.02   27.4  21.15   2.08  35.54  74.28  54.78 75.65*
"""
"""Model, then the columns above; "-": the README has none."""

MEANS = """
Llama2-7B                35.40  36.21 31.765
Qwen-7B                  49.46  47.19 59.655
Deepseek-7B              39.96  39.15  43.64
Mistral-7B               48.97  49.96  44.54
Llama2-13B               41.48  42.44  37.19
MPT-30B                  38.17  39.82  30.72
Falcon-40B               43.62  44.21  40.93
MiniCPM-2B               52.33   52.6   51.1
TinyLlama-1.1B           25.36  25.55 24.525
Qwen-1.8B                34.72  31.87  47.57
Gemini Nano-3B               -      -      -
StableLM-Zephyr-3B       43.46  46.31  30.62
Phi-2-2B                 48.84  54.41  23.78
ChatGLM2-6B              37.98  35.17  50.63
Mistral-7B-Instruct-v0.1 44.36  45.89  37.51
Mistral-7B-Instruct-v0.2 50.91  52.83 42.235
Qwen-7B-Chat             44.93  42.05   57.9
Yi-6B-Chat               50.46  45.89 70.995
Baichuan2-7B-Chat        44.68  42.74  53.39
Deepseek-7B-chat         49.34  49.56 48.335
Llama2-7B-Chat           38.16  39.17  33.59
"""
"""Model, then the README's means of all, of English, of Chinese."""


@dataclass(frozen=True)
class Figure:
    """One score, in percent."""

    value: float
    mode: str
    """"gen" or "ppl", or "report" where it is from the model's own report."""


@dataclass(frozen=True, kw_only=True)
class PublishedRow:
    """The scores of one model."""

    average: float | None
    """Over all eleven columns; None: the README has no mean."""
    english: float | None
    chinese: float | None
    figures: Mapping[str, Figure]
    """By task name, without empty columns."""


def _row(means: list[str], cells: list[str]) -> PublishedRow:
    average, english, chinese = (None if cell == "-" else float(cell) for cell in means)
    figures = {
        task: Figure(float(cell.rstrip("*r")), {"*": "ppl", "r": "report"}.get(cell[-1], "gen"))
        for task, cell in zip(TASKS, cells, strict=True)
        if cell != "-"
    }
    return PublishedRow(
        average=average, english=english, chinese=chinese, figures=MappingProxyType(figures)
    )


def _parse_tables() -> dict[str, PublishedRow]:
    scores = [line.rsplit(None, len(TASKS)) for line in SCORES.strip().split("\n")]
    means = [line.rsplit(None, 3) for line in MEANS.strip().split("\n")]
    return {
        model: _row(mean, cells) for (model, *cells), (_, *mean) in zip(scores, means, strict=True)
    }


PUBLISHED: Mapping[str, PublishedRow] = MappingProxyType(_parse_tables())
"""By the README's model name, in its order."""

SFT = ("openbmb/MiniCPM-2B-sft-",)
DPO = ("openbmb/MiniCPM-2B-dpo-",)
MINICPM_2B = "MiniCPM-2B"
"""The README's name of both, whose repositories begin with these."""


def published_model(model: Mapping[str, Any]) -> str | None:
    """The README's model that a run's `model` is, as published; None if it is none of them.

    A folder may hold anything, whatever its name, and so may an adapter.
    """
    repo = _repository(model)
    if repo.startswith((*SFT, *DPO)):
        return MINICPM_2B
    name = repo.rpartition("/")[2]
    return next((known for known in PUBLISHED if _plain(known) == _plain(name)), None)


def mt_bench_score(model: Mapping[str, Any]) -> float | None:
    """The README's score of a run's `model` in MT-Bench, for which MiniCPM-2B is its DPO model."""
    return MT_BENCH[MINICPM_2B] if _repository(model).startswith(DPO) else None


def _repository(model: Mapping[str, Any]) -> str:
    """The hub repository of the weights alone, or ""."""
    if model.get("adapter") is not None:
        return ""
    name = str(model.get("name"))
    card = cards().get(name) if "repo" not in model else None  # older runs record no repository
    return str(model.get("repo") or (card and card.repo) or (name if "/" in name else ""))


def _plain(name: str) -> str:
    """A name without case and punctuation."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


MT_BENCH: Mapping[str, float] = MappingProxyType(
    {
        "GPT-4-turbo": 9.32,
        "GPT-3.5-turbo": 8.39,
        "Mistral-8*7b-Instruct-v0.1": 8.30,
        "Claude-2.1": 8.18,
        "Zephyr-7B-beta": 7.34,
        "MiniCPM-2B": 7.25,
        "Vicuna-33B": 7.12,
        "Zephyr-7B-alpha": 6.88,
        "LLaMA-2-70B-chat": 6.86,
        "Mistral-7B-Instruct-v0.1": 6.84,
        "MPT-34B-instruct": 6.39,
    }
)
"""MT-Bench, from 1 to 10; MiniCPM-2B is its DPO model."""
