"""Tools in the chat: each call is shown, and runs only if the user says so."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from minicpm_mlx.arguments import printable

if TYPE_CHECKING:
    from minicpm_mlx.lm.tools.calls import ToolCall

    from .mcp.servers import McpServers

ARGUMENTS = 400
"""Characters of a call's arguments that are shown."""
REFUSED = "Error: the user did not allow this call."


class TerminalTools:
    """Runs the tools of MCP servers for a conversation.

    `allowed` run without a question, by name. `ask` shows a question and returns "y", "a" (yes,
    and always) or "n"; None: nobody can be asked, and other calls are refused.
    """

    def __init__(
        self,
        servers: McpServers,
        say: Callable[..., None],
        ask: Callable[[str], str] | None,
        allowed: Collection[str] = (),
    ):
        self.servers, self.allowed = servers, {*allowed}
        self._say, self._ask = say, ask

    @property
    def described(self) -> Sequence[Mapping[str, Any]]:
        """The functions, in OpenAI's form."""
        return self.servers.tools

    def lines(self) -> Iterator[str]:
        """Each tool with its server and the first line of its description."""
        for tool in self.described:
            function = tool["function"]
            name = function["name"]
            mark = "✓" if name in self.allowed else " "
            text = function.get("description", "").strip().partition("\n")[0]
            yield f"{mark} {name} ({self.servers.server_of(name)})  {text}"

    def run(self, call: ToolCall) -> str:
        """Ask and call; the result as the model reads it."""
        self._say("call", call=shown_call(call), server=self.servers.server_of(call.name))
        if call.name not in self.allowed:
            answer = self._ask("allow") if self._ask else "n"
            if answer == "a":
                self.allowed.add(call.name)
            elif answer != "y":
                key = "not_allowed" if self._ask else "nobody_asked"
                self._say(key, style="warning", name=call.name)
                return REFUSED
        result = self.servers.call(call.name, json.loads(call.arguments))
        style = "warning" if result.failed else "quiet"
        self._say("result", style=style, text=_first_line(result.text))
        return result.text


def shown_call(call: ToolCall) -> str:
    """A call on one line, as `name(place="Paris")`."""
    arguments = json.loads(call.arguments).items()
    inner = ", ".join(f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in arguments)
    text = printable(f"{call.name}({inner})").replace("\n", " ")
    return text if len(text) <= ARGUMENTS else f"{text[:ARGUMENTS]} …"


def _first_line(text: str) -> str:
    lines = printable(text).strip().splitlines() or [""]
    return lines[0][:200] + (" …" if len(lines) > 1 or len(lines[0]) > 200 else "")
