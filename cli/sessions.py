"""`minicpm-mlx sessions`: saved conversations, and the KV caches kept with them."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from minicpm_mlx.errors import InvalidArgumentError

from . import options
from .render.texts import printable, size_text
from .render.theme import console
from .streams import confirm, print_json

if TYPE_CHECKING:
    from minicpm_mlx.lm.session_list import SessionSummary

app = typer.Typer(invoke_without_command=True)

Name = Annotated[str, typer.Argument(help="Name of a session, as the list shows it.")]
Thoughts = Annotated[
    bool, typer.Option("--thoughts", help="With the thoughts before answers; JSON always has them.")
]


@app.callback()
def list_sessions(
    context: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON array.")] = False,
) -> None:
    """List saved conversations; see also `sessions show`, `export` and `delete`."""
    if context.invoked_subcommand is not None:
        return
    from minicpm_mlx.lm import sessions
    from minicpm_mlx.lm.session_list import summaries

    rows = summaries()
    if as_json:
        print_json([asdict(row) for row in rows])
        return
    if rows:
        _print_table(rows)
    used, limit = sum(sessions.cache_sizes().values()), sessions.CACHE_LIMIT
    console(stderr=True).print(
        f"{len(rows)} in {sessions.directory()}\n"
        f"KV caches: {size_text(used)} of at most {size_text(limit)}, where those used longest ago "
        f"make room, in {sessions.cache_directory()}",
        style="quiet",
    )


def _print_table(rows: list[SessionSummary]) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="title")
    table.add_column("name", no_wrap=True)
    for column in ("saved", "messages", "size", "cache"):
        table.add_column(column, no_wrap=True, justify="right")
    table.add_column("first question", no_wrap=True, overflow="ellipsis", style="quiet")
    for row in rows:
        table.add_row(
            row.name,
            row.saved[:16].replace("T", " "),
            "" if row.problem else str(row.messages),
            size_text(row.bytes),
            size_text(row.cache_bytes) if row.cache_bytes else "",
            printable(row.problem or row.title),
        )
    console().print(table)


@app.command("show")
def show(name: Name, as_json: options.Json = False, thoughts: Thoughts = False) -> None:
    """Print a conversation as Markdown, or the JSON it is saved as."""
    from minicpm_mlx.lm import sessions

    saved = sessions.load(name)
    if as_json:
        print_json(saved.to_json())
    else:
        print(printable(saved.to_markdown(name, thoughts=thoughts)), end="")


@app.command("export")
def export(
    name: Name,
    file: Annotated[Path, typer.Argument(help="FILE.md or FILE.json to write.")],
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace the file.")] = False,
    thoughts: Thoughts = False,
) -> None:
    """Write a conversation to a file, as Markdown or as JSON."""
    from minicpm_mlx.lm import sessions

    saved = sessions.load(name)
    suffix = file.suffix.lower()
    if suffix not in (".md", ".json"):
        raise InvalidArgumentError(f"'{file}': expected a name that ends in .md or .json")
    if suffix == ".md":
        text = saved.to_markdown(file.stem, thoughts=thoughts)
    else:
        text = sessions.json_text(saved.to_json())
    try:
        with file.open("w" if force else "x", encoding="utf-8", errors="replace") as out:
            out.write(text)
    except FileExistsError:
        raise InvalidArgumentError(f"'{file}' exists; --force replaces it") from None
    print(file)


@app.command("delete")
def delete(
    names: Annotated[list[str] | None, typer.Argument(help="Names of sessions.")] = None,
    cache: Annotated[
        bool, typer.Option("--cache", help="Delete only KV caches; without names, all of them.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Delete saved conversations and their KV caches."""
    from minicpm_mlx.lm import sessions

    if not names and not cache:
        raise InvalidArgumentError("expected names of sessions; `minicpm-mlx sessions` lists them")
    for name in names or ():
        if not (sessions.path_of(name).exists() or sessions.cache_path(name).exists()):
            sessions.load(name)  # raises, and names the nearest
    what = ", ".join(names) if names else "all sessions"
    if cache:
        what = f"the KV caches of {what}"
    if not yes and not confirm(f"Delete {what}?"):
        print("nothing deleted", file=sys.stderr)
        raise typer.Exit(1)
    if names:
        freed = sum(sessions.remove(name, conversation=not cache) for name in names)
    else:
        freed = sessions.make_room()
    print(f"{size_text(freed)} freed")
