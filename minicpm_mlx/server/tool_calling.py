"""Functions that a model may call, as requests describe them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from ..engine import Grammar
from ..errors import InvalidArgumentError, TemplateError
from ..lm.tools.tool_set import ToolSet, answer_grammar
from .http.api_error import ApiError, unsupported
from .http.schema import Body
from .parameters import compile_only_grammar, run_in_thread
from .service import Service

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:/-]{1,128}$")]


class Function(Body):
    """A function as OpenAI's chat API describes it."""

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """The JSON schema of its arguments, an object."""
    strict: bool | None = None
    """True: all calls follow their schemas, as those that must come do in any case."""


class Tool(Body):
    type: Literal["function"]
    function: Function


class NamedFunction(Body):
    name: Name


class NamedChoice(Body):
    """The one function that must be called."""

    type: Literal["function"]
    function: NamedFunction


def template_call(call_id: str, name: str, arguments: Mapping[str, Any] | None) -> dict[str, Any]:
    """A call of an earlier message, as chat templates take it."""
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


class RequestTools(ToolSet):
    """The functions of one request.

    Raises ApiError if there are functions and the model's chat template does not take them or
    writes calls in an unknown format.
    """

    def __init__(
        self,
        service: Service,
        tools: Sequence[Function],
        choice: str = "auto",
        parallel: bool = True,
    ):
        self.service = service
        functions = [tool.model_dump(exclude_none=True) for tool in tools]
        try:
            super().__init__(service.lm.tokenizer, functions, choice, parallel)
        except TemplateError as error:
            raise unsupported("tools", str(error)) from None
        except InvalidArgumentError as error:
            raise ApiError(str(error), field=error.field) from None

    async def grammar(self, guides: Mapping[str, Mapping[str, Any]]) -> Grammar | None:
        """The grammar of the reply: calls that must come, or the form that `guides` give by field,
        in whose place calls may come.

        ApiError if there are several guides.
        """
        guides = {name: guide for name, guide in guides.items() if guide}
        form = await compile_only_grammar(self.service, guides)
        return await run_in_thread(lambda: answer_grammar(self, form), "tools")
