"""What the programs of this folder share: questions, a tool, and a report as one line of JSON.

Each asks the server at the address in its first argument, and gives for each check what it found:
`thinking` and `thinking streamed` a thought and an answer, `tools` and `tools streamed` the city
that the tool was called with and the answer, `structure` the object.
"""

from __future__ import annotations

import inspect
import json
import sys
import traceback
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

URL = sys.argv[1]
SKY, WEATHER = "Why is the sky blue?", "What is the weather in Paris?"
JSON, PERSON = "Who is Ada, as JSON?", "Who is Ada, as Person?"
QUESTION = [{"role": "user", "content": SKY}]
ASKED = [{"role": "user", "content": WEATHER}]
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
}
TOOL = {"name": "get_weather", "description": "Looks up the weather.", "parameters": PARAMETERS}


RESULTS = {"Paris": "sunny, 21 degrees", "Rome": "rain, 9 degrees", "Oslo": "snow"}


class Calls(list[str]):
    """The cities asked for."""

    def get_weather(self, city: str) -> str:
        """Looks up the weather.

        Args:
            city: The name of the city.
        """
        self.append(city)
        return RESULTS[city]


def report(package: str, **checks: Callable[[], Any]) -> None:
    """Runs the checks; one that fails gives its error."""
    found: dict[str, Any] = {"version": version(package)}
    for name, check in checks.items():
        try:
            result = check()
            if inspect.iscoroutine(result):
                import asyncio

                result = asyncio.run(result)
        except Exception as error:
            traceback.print_exc()
            result = f"{type(error).__name__}: {error}"
        found[name.replace("_", " ")] = result
    print(json.dumps(found))
