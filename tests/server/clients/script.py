"""The script of the model that the programs of this folder ask; report.py has the questions."""

from __future__ import annotations


def thought(text: str, answer: str) -> str:
    return f"<think>\n{text}\n</think>\n\n{answer}"


def call(name: str, /, **values: object) -> str:
    params = "".join(f'<param name="{key}">{value}</param>' for key, value in values.items())
    return f'<function name="{name}">{params}</function>'


def person(name: str) -> str:
    return thought("A call.", call(name, name="Ada", age=36))


SCRIPT = {
    "Why is the sky blue?": thought("Light scatters.", "Blue light **scatters** most."),
    "What is the weather in Paris?": thought("I look.", call("get_weather", city="Paris")),
    "sunny, 21 degrees": thought("It says so.", "It is sunny in Paris."),
    "Who is Ada, as JSON?": thought("An object.", '{"name": "Ada", "age": 36}'),
    "Who is Ada, as Person?": person("Person"),
    "Who is Ada, as PartialPerson?": person("PartialPerson"),
    "Who is Ada, as final_result?": person("final_result"),
    "Who is Ada, as json_tool_call?": person("json_tool_call"),
    # smolagents ends with a call, or has its calls in Python.
    "What is the weather in Rome?": thought("I look.", call("get_weather", city="Rome")),
    "rain, 9 degrees": thought("Wet.", call("final_answer", answer="It rains in Rome.")),
    "What is the weather in Oslo?": thought(
        "I look.", "Code:\n<code>\nfinal_answer(get_weather('Oslo'))\n</code>"
    ),
}
