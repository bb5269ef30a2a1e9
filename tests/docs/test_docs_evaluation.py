"""The evaluation guides' commands parse, their options exist, and their tables are right."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import typer

import minicpm_mlx as mm
from minicpm_mlx.cli.main import app
from minicpm_mlx.evals.settings import ALL
from minicpm_mlx.evals.tasks import TASKS
from support.guides import commands, rows, text

GUIDES = ["evaluation.md", "evaluation_zh.md"]


def evaluation() -> Any:
    group: Any = typer.main.get_command(app)
    return group.commands["eval"]


def parsed(arguments: list[str]) -> dict[str, Any]:
    """What `minicpm-mlx eval` makes of them, or a command below it; nothing runs."""
    name, *rest = arguments
    assert name == "eval"
    command = evaluation()
    if rest and rest[0] in command.commands:
        command, rest = command.commands[rest[0]], rest[1:]
    found: dict[str, Any] = command.make_context(name, rest).params
    return found


def options() -> set[str]:
    group = evaluation()
    return {
        option
        for command in (group, *group.commands.values())
        for parameter in command.params
        for option in (*parameter.opts, *parameter.secondary_opts)
    }


@pytest.mark.parametrize("name", GUIDES)
def test_every_command_of_the_guide_parses(name: str) -> None:
    given = commands(name)
    assert len(given) > 10
    for arguments in given:
        found = parsed(arguments)
        if "tasks" in found and not found.get("harness"):
            assert {*found["tasks"].split(",")} <= {*TASKS, "all"}


def test_an_option_that_does_not_exist_would_be_noticed() -> None:
    for line in (["eval", "--taks", "mmlu"], ["eval", "compare", "a"], ["eval", "mt-bench"]):
        with pytest.raises(Exception, match=r"taks|second|data"):
            parsed(line)


@pytest.mark.parametrize("name", GUIDES)
def test_every_option_named_in_the_guide_exists(name: str) -> None:
    spans = re.findall(r"`([^`\n]+)`", text(name))
    named = {word for span in spans for word in re.findall(r"(?<!\S)--[a-z-]+", span)}
    assert len(named) > 12
    assert named <= options()


@pytest.mark.parametrize("name", GUIDES)
def test_the_table_of_sets_is_the_librarys(name: str) -> None:
    shown = {row[0].strip("`"): (row[2], row[3]) for row in rows(name, r"`\w+`")}
    have = {
        task.name: (", ".join(task.modes), str(task.few_shot["gen"])) for task in TASKS.values()
    }
    assert shown == have
    assert {*TASKS} - {*ALL} == {"bbh_cot"}


@pytest.mark.parametrize("name", GUIDES)
def test_the_files_shown_are_looked_for(name: str) -> None:
    patterns = {
        re.sub(r"\{subset\}|TASK", "SUBJECT", pattern)
        for task in TASKS.values()
        for pattern in (*task.source.questions, *task.source.examples, *task.source.cot_prompts)
    }
    names = {task.title: task for task in TASKS.values()} | {"ARC": TASKS["arc_easy"]}
    shown = [row for row in rows(name, r"[A-Z][\w-]*") if row[0] in names and len(row) == 2]
    assert len(shown) == 10
    for _, cell in shown:
        files = [f for f in re.findall(r"`([^`]+)`", cell) if f not in TASKS]
        for file in files:
            looked = re.sub("TASK", "SUBJECT", file)
            assert any(one.endswith(looked) for one in patterns), file


@pytest.mark.parametrize("name", GUIDES)
def test_models_named_are_cards(name: str) -> None:
    named = {found["model"] for one in commands(name) if "model" in (found := parsed(one))}
    assert named <= {*mm.cards()}


def test_both_guides_give_the_same_examples() -> None:
    assert commands(GUIDES[0]) == commands(GUIDES[1])
    blocks = [re.findall(r"^```python\n.*?^```$", text(n), re.DOTALL | re.M) for n in GUIDES]
    assert blocks[0] == blocks[1]
    assert len(blocks[0]) == 2
    shapes = [
        [line.count(" | ") for line in text(n).splitlines() if line[:2] == "| "] for n in GUIDES
    ]
    assert shapes[0] == shapes[1]


def test_python_shown_names_what_there_is() -> None:
    for block in re.findall(r"^```python\n(.*?)^```$", text(GUIDES[0]), re.DOTALL | re.M):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module == "minicpm_mlx.evals.harness.run":
                from minicpm_mlx.evals.harness import run

                assert all(hasattr(run, alias.name) for alias in node.names)


@pytest.mark.parametrize("name", GUIDES)
def test_links_within_the_guides_lead_somewhere(name: str) -> None:
    for heading in re.findall(r"\]\(#([^)]+)\)", text(name)):
        found = re.findall(r"^#+ (.*)$", text(name), re.MULTILINE)
        assert heading in {one.lower().replace(" ", "-") for one in found}
    for file in re.findall(r"\]\(([\w./]+\.md)\)", text(name)):
        assert (Path(__file__).parents[2] / "docs" / file).exists()
