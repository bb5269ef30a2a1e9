"""Formats a report as tables: Markdown for people, CSV for programs."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator

from ...files.tables import markdown_table
from ..settings import sentence
from .statistics import Interval
from .summary import MEANS, PartReport, Report, TaskReport


def as_markdown(report: Report) -> str:
    parts = [titled_scores(report), _notes(report), _method(report)]
    parts += [table for task in report.tasks for table in _subset_tables(task)]
    return "\n\n".join(part for part in parts if part) + "\n"


def titled_scores(report: Report) -> str:
    """The table of scores under the model's name."""
    return f"# {_plain(report.title)}\n\n{scores_table(report)}"


def scores_table(report: Report) -> str:
    """Scores and means in percent, beside the model's published scores if there are any."""
    rows = []
    for task in report.tasks:
        part, figure = task.part, task.published
        rows.append(
            [
                task.title,
                f"{part.score.mean:.2f}{_star(task.counted)}",
                _ends(part.score),
                f"{figure.value:.2f}{_star(figure.mode)}" if figure else "",
                _difference(part.score.mean, figure.value if figure else None),
                _count(part),
            ]
        )
    for name, mean in report.means.items():
        published = "" if mean.published is None else f"{mean.published:.2f}"
        difference = _difference(mean.score.mean, mean.published)
        cells = [f"{mean.score.mean:.2f}", _ends(mean.score), published, difference]
        rows.append([MEANS[name], *cells, f"{mean.sets} set{'s' * (mean.sets != 1)}"])
    head = ["set", "score", "95 %", f"{report.beside}, README", "difference", "questions"]
    if report.beside is None:
        head, *rows = ([*cells[:3], cells[-1]] for cells in (head, *rows))
    return markdown_table(head, rows)


def _notes(report: Report) -> str:
    lines = [
        "\\* ppl: scored by comparing the options' probabilities, the others by their replies; the "
        "higher of both counts. A set's score is the mean over its subsets."
    ]
    why = report.why_alone or "the published means are those of the same sets"
    lines.append(f"{why[0].upper()}{_plain(why[1:])}.")
    unfinished = [task.title for task in report.tasks if task.part.done < task.part.of]
    if unfinished:
        lines.append(f"Not finished: {', '.join(unfinished)}.")
    return "\n".join(lines)


def _method(report: Report) -> str:
    lines = [
        "## Method",
        "",
        f"- model: {_plain(report.model['name'])}, identity {report.model['identity']}",
        f"- program: {', '.join(f'{name} {number}' for name, number in report.program.items())}",
    ]
    for task in report.tasks:
        for part in task.parts.values():
            lines.append(
                f"- {task.title}: {part.score.mean:.2f} ({_ends(part.score)}) of {_count(part)} "
                f"questions; {_plain(sentence(part.settings))}"
            )
            lines += [f"  - {_plain(note)}" for note in _part_notes(part)]
            lines += [
                f"  - data: {_plain(name)}, SHA-256 {digest}"
                for name, digest in part.settings["sha256"].items()
            ]
    return "\n".join(lines)


def _part_notes(part: PartReport) -> Iterator[str]:
    yield from part.settings["notes"]
    if "sandbox" in part.settings:
        yield f"sandbox of the programs: {part.settings['sandbox']}"
    if part.cut:
        yield f"replies cut at the longest length: {part.cut}"
    if part.fewer_shots:
        yield f"questions with fewer examples, to fit the context: {part.fewer_shots}"
    if part.unasked:
        yield f"questions longer than the context, counted as wrong: {part.unasked}"


def _subset_tables(task: TaskReport) -> Iterator[str]:
    for part in task.parts.values():
        if part.subsets:
            subsets = part.subsets.items()
            rows = [[name, f"{score.mean:.2f}", _ends(score)] for name, score in subsets]
            yield f"## {task.title}, {part.mode}"
            yield markdown_table(["subset", "score", "95 %"], rows)


def as_csv(report: Report) -> str:
    """A row for each task, subset and mean; scores in percent."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    head = "task mode subset score low high questions of counted published published_mode"
    writer.writerow(head.split())
    for task in report.tasks:
        figure = task.published
        for mode, part in task.parts.items():
            begin, counted = [task.name, mode], int(mode == task.counted)
            published = [figure.value, figure.mode] if figure else ["", ""]
            writer.writerow(
                [*begin, "", *_numbers(part.score), part.done, part.of, counted, *published]
            )
            for name, score in part.subsets.items():
                writer.writerow([*begin, name, *_numbers(score), "", "", counted, "", ""])
    for name, mean in report.means.items():
        value = "" if mean.published is None else f"{mean.published:.4f}"
        writer.writerow([name, "", "", *_numbers(mean.score), "", "", "", value, ""])
    return out.getvalue()


def _numbers(score: Interval) -> list[str]:
    return [f"{value:.4f}" for value in (score.mean, score.low, score.high)]


def _ends(score: Interval) -> str:
    return f"{score.low:.1f} to {score.high:.1f}"


def _difference(mine: float, published: float | None) -> str:
    return "" if published is None else f"{mine - published:+.2f}"


def _count(part: PartReport) -> str:
    return str(part.done) if part.done == part.of else f"{part.done} of {part.of}"


def _star(mode: str) -> str:
    return "*" if mode == "ppl" else ""


def _plain(text: str) -> str:
    """A folder's name on one line, without Markdown of its own."""
    return " ".join(text.split()).replace("|", "/").replace("<", "&lt;")
