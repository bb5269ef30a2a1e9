"""An Ollama Modelfile: where the GGUF file is, how turns are written, where a reply ends."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from ...errors import TemplateError, WeightsError
from ...text.chat_template import BUILTIN, Template
from ...text.tokenizer import Tokenizer
from ..generation_config import read_sampling

MARK = "# Written by minicpm-mlx."
"""Begins the files that may be overwritten."""

GO = {
    "minicpm": (
        '{{ range .Messages }}{{ if eq .Role "user" }}<用户>{{ .Content }}<AI>'
        "{{ else }}{{ .Content }}{{ end }}{{ end }}"
    ),
    "chatml": (
        "{{ range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}"
        "<|im_start|>assistant\n"
    ),
}
"""The family's own templates as Go's text/template, the system message among the messages."""

STOPS = {"minicpm": ("<用户>", "<AI>"), "chatml": ("<|im_end|>", "<|im_start|>")}

PARAMETERS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}
"""generation_config.json's names and Ollama's."""

PROBES = [
    [{"role": role, "content": content} for role, content in turns]
    for turns in (
        [("system", "S"), ("user", "U"), ("assistant", "A"), ("user", "V")],
        [("user", "U")],  # where some templates add a system message of their own
    )
]


def write_modelfile(gguf: Path, tokenizer: Tokenizer, source: Path) -> Path:
    """Write a Modelfile beside a GGUF file: for `ollama create NAME -f` it.

    A Modelfile of another file, or that someone else wrote, stays: this one takes the GGUF file's
    name then. WeightsError where that is taken too.
    """
    begin = f"{MARK}\nFROM ./{gguf.name}\n"
    candidates = (gguf.with_name("Modelfile"), gguf.with_suffix(".Modelfile"))
    path = next((path for path in candidates if _is_free(path, begin)), None)
    if path is None:
        raise WeightsError(f"{candidates[1]}: exists; move it, or choose another name for {gguf}")
    lines = [MARK, f"FROM ./{gguf.name}", *_template(tokenizer), *_parameters(source)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _is_free(path: Path, begin: str) -> bool:
    """Whether a file may be written there: none is, or one for the same GGUF file."""
    if not path.exists():
        return True
    return path.is_file() and path.read_text(encoding="utf-8", errors="replace").startswith(begin)


def _template(tokenizer: Tokenizer) -> list[str]:
    name = builtin_of(tokenizer.template)
    if name is None:
        return ["# No TEMPLATE: Ollama looks for one that fits the GGUF file's own."]
    stops = [f'PARAMETER stop "{stop}"' for stop in STOPS[name]]
    return [f'TEMPLATE """{GO[name]}"""', *stops]


def builtin_of(template: Template | None) -> str | None:
    """The name of the family's template that writes the same as this one."""
    if template is None:
        return None
    with suppress(TemplateError):
        for name, source in BUILTIN.items():
            if all(template.render(probe) == Template(source).render(probe) for probe in PROBES):
                return name
    return None


def _parameters(source: Path) -> list[str]:
    """Sampling as the model's generation_config.json has it."""
    found = read_sampling(source)
    return [
        f"PARAMETER {ollama} {value}"
        for name, ollama in PARAMETERS.items()
        if isinstance(value := found.get(name), int | float) and not isinstance(value, bool)
    ]
