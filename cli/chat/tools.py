"""Tools in the chat: each call is shown, and runs only if the user says so."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from typing import TYPE_CHECKING, Any

from minicpm_mlx.arguments import printable

from ..render.spinner import SpinnerStream
from ..render.texts import Texts
from ..render.theme import console
from ..render.wrap import wrap
from ..streams import ask_key

if TYPE_CHECKING:
    from minicpm_mlx.lm.tools.calls import ToolCall

    from .mcp.servers import McpResult, McpServers

ARGUMENT = 200
"""Characters of an argument that are shown unasked."""
REFUSED = "Error: the user did not allow this call."


class TerminalTools:
    """Runs the tools of MCP servers for a conversation.

    `allowed` run without a question, by name. Where nobody can be asked, as the chat is not
    `interactive`, other calls are refused.
    """

    def __init__(
        self,
        servers: McpServers,
        texts: Texts,
        *,
        interactive: bool,
        allowed: Collection[str] = (),
    ):
        self.servers, self.allowed = servers, {*allowed}
        self._texts, self._interactive = texts, interactive
        self._out = console(stderr=not interactive)

    @property
    def described(self) -> Sequence[Mapping[str, Any]]:
        """The functions, in OpenAI's form."""
        return self.servers.tools

    def lines(self, text: str = "") -> Iterator[str]:
        """Each tool whose name has `text` in it, with its server and what it is for."""
        for tool in self.described:
            function = tool["function"]
            name = function["name"]
            if text.lower() in name.lower():
                mark = "✓" if name in self.allowed else " "
                about = function["description"].strip().partition("\n")[0]
                yield printable(f"{mark} {name} ({self.servers.server_of(name)})  {about}")

    def run(self, call: ToolCall) -> str:
        """Ask and call; the result as the model reads it."""
        arguments = json.loads(call.arguments)
        whole = self._show_call(call.name, arguments)
        if not self._may_run(call.name, arguments, whole):
            key = "not_allowed" if self._interactive else "nobody_asked"
            self._print(self._texts(key, name=call.name), "warning")
            return REFUSED
        with closing(self._spinner()) if self._interactive else nullcontext():
            result = self.servers.call(call.name, arguments)
        self._show_result(result)
        return result.text

    def _may_run(self, name: str, arguments: Mapping[str, Any], whole: bool) -> bool:
        if name in self.allowed or not self._interactive:
            return name in self.allowed
        while True:
            question = self._texts("allow" if whole else "allow_or_view")
            answer = self._ask(question, "yan" if whole else "yavn")
            if answer != "v":
                break
            self._show_whole(arguments)
            whole = True
        if answer == "a":
            self.allowed.add(name)
        return answer != "n"

    def _ask(self, question: str, choices: str) -> str:
        """The key pressed, which stands behind the question."""
        lines = "\n".join(wrap(question, self._out.width - 3))
        key = ""
        try:
            key = ask_key(lambda: self._out.print(lines, style="title", end=" "), choices)
        finally:
            self._out.print(key)
        return key

    def _spinner(self) -> SpinnerStream:
        return SpinnerStream(lambda seconds: self._texts("waiting", seconds=seconds))

    def _show_call(self, name: str, arguments: Mapping[str, Any]) -> bool:
        """Shows a call: `name(place="Paris")`, or a line for each argument. False if a value is
        shown in part."""
        values = {key: json.dumps(value, ensure_ascii=False) for key, value in arguments.items()}
        server = self.servers.server_of(name)
        inner = ", ".join(f"{key}={value}" for key, value in values.items())
        line = printable(f"▸ {name}({inner}) · {server}", None)
        if _cells(line) < self._out.width and len(inner) <= ARGUMENT:
            self._print(line, "")
            return True
        self._print(printable(f"▸ {name} · {server}"), "")
        for key, value in values.items():
            shown = printable(value, ARGUMENT)
            if len(value) > ARGUMENT:
                shown = self._texts("argument_cut", start=shown, count=len(value))
            self._print(f"{printable(key)} = {shown}", "", indent=2)
        return all(len(value) <= ARGUMENT for value in values.values())

    def _show_whole(self, arguments: Mapping[str, Any]) -> None:
        for key, value in arguments.items():
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            self._print(f"{printable(key)} =", "", indent=2)
            for line in text.splitlines():
                self._print(printable(line, None), "", indent=4)

    def _show_result(self, result: McpResult) -> None:
        """Shows the first line of a result, and how many more there are."""
        first, *more = result.text.strip().splitlines() or [""]
        if result.failed:
            self._print(printable(first), "warning", indent=2)
            return
        rest = self._texts("more_lines", lines=self._texts.count("line", len(more))) if more else ""
        room = max(self._out.width - 3 - _cells(rest), 8)
        first = printable(first, 4 * room)
        if _cells(first) > room:
            first = _cells_of(first, room - 1) + "…"
        self._out.print(f"  {first}{rest}", style="quiet", no_wrap=True)

    def _print(self, text: str, style: str, indent: int = 0) -> None:
        """Prints a line, and further ones for what does not fit, under its first word."""
        for number, row in enumerate(wrap(text, max(self._out.width - indent - 3, 8))):
            start = " " * (indent if indent or not number else 2)
            self._out.print(start + row, style=style or None)


def _cells(text: str) -> int:
    from rich.cells import cell_len

    return cell_len(text)


def _cells_of(text: str, width: int) -> str:
    from rich.cells import chop_cells

    return chop_cells(text, width)[0]
