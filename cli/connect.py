"""`minicpm-mlx connect`: settings of other programs that use a running server."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minicpm_mlx.errors import InvalidArgumentError

from . import options
from .options import flag, option
from .render.theme import console
from .streams import confirm, print_json

if TYPE_CHECKING:
    from minicpm_mlx.clients.catalogue import Client
    from minicpm_mlx.clients.server_address import ServerAddress


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class ConnectOptions:
    """Options of `connect`."""

    client: Annotated[str | None, typer.Argument(help="Client; none: list them.")] = None
    url: str = option("Address of the server.", default="http://127.0.0.1:8080")
    model: str | None = option("Model that it serves; default: its first.", "--model", "-m")
    api_key_env: str | None = option("Environment variable that holds the server's key.")
    api_key: str | None = option("The key itself, to be written into the settings.")
    write: bool = flag("Merge into the client's settings file, after asking.")
    yes: bool = flag("With --write: do not ask.", "--yes", "-y")
    as_json: options.Json = False


@options.command(ConnectOptions)
def connect(args: ConnectOptions) -> None:
    """Show, or write, the settings with which another program uses a running server."""
    if args.client is None:
        if args.write or args.yes:
            raise InvalidArgumentError("--write needs the name of a client")
        _list(args.as_json)
        return
    from minicpm_mlx.clients.catalogue import find_client
    from minicpm_mlx.clients.server_address import find_server

    client = find_client(args.client)
    if args.yes and not args.write:
        raise InvalidArgumentError("--yes answers the question of --write; give both")
    if args.write and client.path is None:
        raise InvalidArgumentError(f"--write: {client.title}: {client.not_written}")
    if args.api_key and args.api_key_env:
        raise InvalidArgumentError("--api-key and --api-key-env contradict each other; give one")
    for name, value in (("--api-key", args.api_key), ("--model", args.model)):
        if value is not None and (not value.strip() or not value.isprintable()):
            raise InvalidArgumentError("must be printable and not empty", field=name)
    at = find_server(args.url, model=args.model, key=args.api_key, variable=args.api_key_env)
    if args.write:
        _write(client, at, ask=not args.yes, as_json=args.as_json)
    elif args.as_json:
        print_json(_record(client, at))
    else:
        _show(client, at)


def _list(as_json: bool) -> None:
    from minicpm_mlx.clients.catalogue import CLIENTS

    rows = [
        {"name": c.name, "title": c.title, "file": str(c.path()) if c.path else None}
        for c in CLIENTS
    ]
    if as_json:
        print_json({"clients": rows})
        return
    out = console()
    width = max(len(c.name) for c in CLIENTS) + 2
    titles = max(len(c.title) for c in CLIENTS) + 2
    for client, row in zip(CLIENTS, rows, strict=True):
        how = row["file"] or "printed only"
        out.print(f"{client.name:{width}}{client.title:{titles}}{how}", soft_wrap=True)


def _record(client: Client, at: ServerAddress) -> dict[str, Any]:
    from minicpm_mlx.clients.settings_file import snippet

    path = client.path() if client.path else None
    settings: Any = client.settings(at) if client.settings else None
    return {
        "client": client.name,
        "url": at.url,
        "model": at.model,
        "context": at.context,
        "file": str(path) if path else None,
        "settings": settings,
        "text": snippet(path, {**client.defaults, **settings} if client.defaults else settings)
        if path
        else None,
        "environment": dict(client.variables(at)) if client.variables else {},
        "example": client.example(at) if client.example else None,
        "start": client.start(at) if client.start else None,
        "note": (client.note(at) if client.note else "") or None,
    }


def _show(client: Client, at: ServerAddress) -> None:
    out, record = console(), _record(client, at)
    blocks = []
    if record["file"]:
        blocks.append((f"in {record['file']}", record["text"]))
    if variables := record["environment"]:
        lines = (f"export {name}={_quoted(value)}" for name, value in variables.items())
        blocks.append(("in the shell", "\n".join(lines)))
    if record["example"]:
        blocks.append(("then" if variables else "in its settings", record["example"]))
    if record["start"]:
        blocks.append(("start it so", record["start"]))
    for number, (heading, text) in enumerate(blocks):
        out.print(("\n" if number else "") + f"# {heading}", style="quiet", soft_wrap=True)
        out.print(text, soft_wrap=True)
    if record["note"]:
        out.print(f"\n# {record['note']}", style="quiet", soft_wrap=True)
    if record["file"]:
        console(stderr=True).print(
            f"`minicpm-mlx connect {client.name} --write` merges it into the file", style="quiet"
        )


def _quoted(value: str) -> str:
    """A value for the shell; one that names a variable is left to be filled in."""
    return (
        f'"{value}"' if value.startswith("$") and value[1:].isidentifier() else shlex.quote(value)
    )


def _write(client: Client, at: ServerAddress, *, ask: bool, as_json: bool) -> None:
    from minicpm_mlx.clients.settings_file import plan_change

    assert client.path is not None
    assert client.settings is not None
    path = client.path()
    change = plan_change(path, client.settings(at), client.defaults)
    stderr, difference = console(stderr=True), change.difference
    copy = None
    if difference:
        stderr.print(difference, soft_wrap=True)
        if ask and not confirm(
            f"Write {path}?", "nobody to ask, nothing written; --yes writes without asking"
        ):
            print("nothing written", file=sys.stderr)
            raise typer.Exit(1)
        copy = change.write(private=at.key is not None)
    record = _record(client, at) | {"changed": bool(difference), "backup": copy and str(copy)}
    if as_json:
        print_json(record)
        return
    out = console()
    kept = f" (before: {copy})" if copy else ""
    out.print(
        f"{path} written{kept}" if difference else f"{path}: nothing to change", soft_wrap=True
    )
    for line in (record["start"], record["note"]):
        if line:
            out.print(line, soft_wrap=True)
