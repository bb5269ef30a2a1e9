"""`minicpm-mlx connect`: settings of other programs that use a running server."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minicpm_mlx.errors import InvalidArgumentError

from . import options
from .options import flag, option
from .render.texts import Texts, printable
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
        print_json(_record(client, at, Texts("en")))
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
    out, texts = console(), _texts()
    width = max(len(c.name) for c in CLIENTS) + 2
    titles = max(len(c.title) for c in CLIENTS) + 2
    for client, row in zip(CLIENTS, rows, strict=True):
        how = row["file"] or texts.pick("printed only", "只打印")
        out.print(f"{client.name:{width}}{client.title:{titles}}{how}", soft_wrap=True)


def _texts() -> Texts:
    """Of results: in the user's language at a terminal, in English in a pipe."""
    return Texts(None if sys.stdout.isatty() else "en")


def _record(client: Client, at: ServerAddress, texts: Texts) -> dict[str, Any]:
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
        "install": client.install or None,
        "note": texts.pick(*client.note(at)) or None,
    }


def _show(client: Client, at: ServerAddress) -> None:
    out, texts = console(), _texts()
    record = _record(client, at, texts)
    blocks = []
    if record["file"]:
        heading = texts.pick("in {}", "写在 {} 里")
        blocks.append((heading.format(record["file"]), record["text"]))
    if variables := record["environment"]:
        lines = (f"export {name}={_quoted(value)}" for name, value in variables.items())
        blocks.append((texts.pick("in the shell", "在 shell 里"), "\n".join(lines)))
    if record["example"]:
        heading = (
            texts.pick("then", "然后") if variables else texts.pick("its form", "填入它的设置")
        )
        blocks.append((heading, record["example"]))
    if record["start"]:
        blocks.append((texts.pick("start it so", "启动命令"), record["start"]))
    for number, (heading, text) in enumerate(blocks):
        out.print(("\n" if number else "") + f"# {heading}", style="quiet", soft_wrap=True)
        out.print(text, soft_wrap=True)
    if record["note"]:
        out.print(f"\n# {record['note']}", style="quiet", soft_wrap=True)
    if record["file"]:
        command = f"`minicpm-mlx connect {client.name} --write`"
        console(stderr=True).print(
            Texts().pick(f"{command} merges it into the file", f"{command} 会合并到该文件"),
            style="quiet",
        )
    _warn(client, at)


def _warn(client: Client, at: ServerAddress) -> None:
    """Says what would keep the client from working."""
    from minicpm_mlx.clients.notes import short_context

    texts, warnings = Texts(), []
    program = shlex.split(client.start(at))[0] if client.start and client.install else ""
    if program and shutil.which(program) is None:
        warnings.append(texts("connect.install", program=program, command=client.install))
    if not at.answered:
        warnings.append(texts("connect.unanswered", url=at.url, model=at.model, context=at.window))
    if at.goes_to_proxy:
        warnings.append(texts("connect.proxy", host=at.host))
    if client.agent:
        warnings.append(texts.pick(*short_context(at)))
    for line in filter(None, warnings):
        console(stderr=True).print(line, style="warning", soft_wrap=True)


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
    stderr, asked, difference = console(stderr=True), Texts(), change.difference
    copy = None
    if difference:
        stderr.print(printable(difference), soft_wrap=True)
        question = asked.pick(f"Write {path}?", f"写入 {path}？")
        if ask and not confirm(
            question, "nobody to ask, nothing written; --yes writes without asking"
        ):
            print(asked.pick("nothing written", "没有写入"), file=sys.stderr)
            raise typer.Exit(1)
        copy = change.write(private=at.key is not None)
    texts = Texts("en") if as_json else _texts()
    record = _record(client, at, texts) | {
        "changed": bool(difference),
        "backup": copy and str(copy),
    }
    if as_json:
        print_json(record)
        return
    out = console()
    if difference:
        out.print(texts.pick(f"{path} written", f"已写入 {path}"), soft_wrap=True)
        place = os.path.realpath(path)  # of the file that a link leads to
        before = ["mv", str(copy), place] if copy else ["rm", place]
        out.print(texts.pick("undo: ", "撤销：") + shlex.join(before), soft_wrap=True)
    else:
        out.print(texts.pick(f"{path}: nothing to change", f"{path}：无需改动"), soft_wrap=True)
    if record["start"]:
        out.print(texts.pick("start: ", "启动：") + record["start"], soft_wrap=True)
    if record["note"]:
        out.print(record["note"], style="quiet", soft_wrap=True)
    _warn(client, at)
