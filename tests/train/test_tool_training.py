"""Sixty rows of calls teach a small real model, which makes none, to call the right tool."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import minicpm_mlx as mm
from minicpm_mlx.lm.tools.formats import JsonToolFormat
from minicpm_mlx.train.data.dataset import DataOptions, load_data
from minicpm_mlx.train.optimizer import Schedule
from minicpm_mlx.train.planning import TrainingPlan
from support.apis import TOOL_TEMPLATE

QUESTIONS = {
    "weather": ("What is the weather in {}?", "Is it raining in {}?", "How warm is it in {}?"),
    "time": ("What time is it in {}?", "Tell me the time in {}.", "How late is it in {} now?"),
}
CITIES = [
    "Oslo",
    "Paris",
    "Lima",
    "Cairo",
    "Delhi",
    "Tokyo",
    "Rome",
    "Quito",
    "Accra",
    "Dakar",
    "Berlin",
    "Madrid",
    "Vienna",
    "Prague",
    "Warsaw",
    "Athens",
    "Dublin",
    "Lisbon",
    "Havana",
    "Bogota",
    "Nairobi",
    "Tunis",
    "Amman",
    "Doha",
    "Manila",
    "Seoul",
    "Hanoi",
    "Riga",
    "Tallinn",
    "Helsinki",
]
HELD_OUT = ("London", "Sydney", "Kyoto")
CITY = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOLS = [{"type": "function", "function": {"name": n, "parameters": CITY}} for n in QUESTIONS]


def rows(cities: Sequence[str]) -> list[dict[str, Any]]:
    """A question for each tool in each city, and the call that answers it."""
    found = []
    for index, city in enumerate(cities):
        for name, questions in QUESTIONS.items():
            function = {"name": name, "arguments": json.dumps({"city": city})}
            call = {"role": "assistant", "tool_calls": [{"type": "function", "function": function}]}
            asked = {"role": "user", "content": questions[index % 3].format(city)}
            found.append({"tools": TOOLS, "messages": [asked, call]})
    return found


def right_calls(lm: mm.LM) -> int:
    """How many questions on cities that no row has are answered by the right call."""
    held = rows(HELD_OUT)
    prompts = [lm.chat_prompt(row["messages"][:1], tools=TOOLS) for row in held]
    right = 0
    for row, reply in zip(held, lm.generate_batch(prompts, max_tokens=32), strict=True):
        expected = row["messages"][1]["tool_calls"][0]["function"]
        try:
            calls = JsonToolFormat().read(reply.text.strip(), {key: {} for key in QUESTIONS})
        except ValueError:
            continue
        right += calls == [(expected["name"], json.loads(expected["arguments"]))]
    return right


@pytest.mark.slow
def test_sixty_rows_teach_the_demo_to_call_the_right_tool(tmp_path: Path) -> None:
    """One pass, 15 steps of 4 rows."""
    demo = tmp_path / "demo"
    source = mm.load("demo").folder
    assert source is not None
    shutil.copytree(source, demo)
    (demo / "chat_template.jinja").write_text(TOOL_TEMPLATE)
    data = tmp_path / "train.jsonl"
    taught = rows(CITIES)
    random.Random(0).shuffle(taught)
    data.write_text("\n".join(map(json.dumps, taught)))
    lm = mm.load(demo, fuse=False)
    loaded = load_data(data, lm.tokenizer, DataOptions(valid_fraction=0))
    assert (len(loaded.train), right_calls(lm)) == (60, 0)
    plan = TrainingPlan(steps=15, batch_size=4, schedule=Schedule(peak=1e-3), seed=0)
    mm.finetune(lm, loaded, tmp_path / "adapter", plan=plan)
    lm.model.eval()
    assert right_calls(lm) == 2 * len(HELD_OUT)
