"""A model that thinks, calls functions and answers as a script has it, in every kind of run."""

from __future__ import annotations

import json
import shutil
from array import array
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import mlx.core as mx

import minicpm_mlx as mm
from minicpm_mlx.model.fused import FusedModel
from support.data import GOLDEN, write_tokenizer

SPECIAL = (
    *("<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tools>", "</tools>"),
    *("<function", "</function>", "<param", "</param>", "/think", "/no_think"),
)
"""MiniCPM5's."""

TEMPLATE = """{%- if tools %}<|im_start|>system
<tools>{% for tool in tools %}
{{ tool | tojson }}{% endfor %}
</tools>
Call with <function name="..."><param name="...">...</param></function><|im_end|>
{% endif %}
{%- set ns = namespace(last=-1) %}
{%- for message in messages %}
{%- if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}
{%- endfor %}
{%- for message in messages %}<|im_start|>{{ 'user' if message.role == 'tool' else message.role }}
{% if message.reasoning_content and loop.index0 > ns.last %}<think>
{{ message.reasoning_content }}
</think>

{% endif %}{{ message.content }}
{%- for call in message.tool_calls or [] %}<function name="{{ call.function.name }}">
{%- for name, value in call.function.arguments.items() -%}
<param name="{{ name }}">{{ value }}</param>{% endfor %}</function>{% endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined %}<think>
{% if not enable_thinking %}
</think>

{% endif %}{% endif %}{% endif %}"""
"""A chat template as MiniCPM5's: a switch, thoughts after the last question alone, XML calls."""

HEAD = "<|im_start|>assistant\n"
SPOKEN = 64
"""Longer passes read a prompt: a next token is found for their last position alone."""


class ScriptedModel(FusedModel):
    """Its keys are the ids themselves, so that each pass knows the text whatever the cache."""

    following: Callable[[list[int]], int]

    def hidden(self, ids: mx.array, cache: Any = None, length: int | None = None) -> mx.array:
        rows, count = ids.shape
        heads, *widths = self.config.cache_shape
        keys, values = (
            mx.broadcast_to(ids[:, None, :, None].astype(mx.float32), (rows, heads, count, width))
            for width in widths
        )
        text = ids
        for layer in cache or ():
            text = layer.update_and_fetch(keys, values)[0][:, 0, :, 0]
        padding = getattr(cache[0], "left_padding", None) if cache else None
        starts = [0] * rows if padding is None else padding.tolist()
        hidden = []
        for row, start in zip(text.tolist(), starts, strict=True):  # type: ignore[arg-type]
            tokens = [int(token) for token in row[int(start) :]]
            first = len(tokens) - count + 1 if count <= SPOKEN else len(tokens)
            ends = range(first, len(tokens) + 1)
            hidden.append([0.0] * (count - len(ends)))
            hidden[-1] += [float(self.following(tokens[: max(end, 0)])) for end in ends]
        last = mx.array(hidden)[..., None]
        return mx.broadcast_to(last, (*last.shape[:2], self.config.hidden_size))

    def logits(self, hidden: mx.array) -> mx.array:
        return 50.0 * (mx.arange(self.config.vocab_size) == hidden[..., :1])


def scripted_lm(
    folder: Path,
    script: Mapping[str, str],
    template: str = TEMPLATE,
    special: Sequence[str] = SPECIAL,
    positions: int | None = None,
    words: Sequence[str] = (),
) -> mm.LM:
    """A model that answers the last message whose text is a key of `script` with its text, in
    which the names of special tokens are these tokens.

    A thought that was closed by force, or that the prompt has closed, is skipped. `positions` is
    the length of its context, where the golden case's is short. All else than `words` is a token a
    byte.
    """
    write_scripted(folder, template, special, positions, words)
    return follow_script(mm.load(folder), script)


def write_scripted(
    folder: Path,
    template: str = TEMPLATE,
    special: Sequence[str] = SPECIAL,
    positions: int | None = None,
    words: Sequence[str] = (),
) -> None:
    """The folder of a model for `follow_script`."""
    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(GOLDEN / "minicpm_2b_like" / name, folder / name)
    if positions is not None:
        config = json.loads((folder / "config.json").read_text())
        config["max_position_embeddings"] = positions
        (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder, special=special, words=words)
    settings = {"chat_template": template, "bos_token": "<s>", "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def follow_script(lm: mm.LM, script: Mapping[str, str]) -> mm.LM:
    """Has a model that `write_scripted` wrote follow a script, as of `scripted_lm`."""
    tokenizer = lm.tokenizer
    start = tokenizer.encode(HEAD, add_bos=False)
    opening, closing = (tokenizer.special_tokens.get(n) for n in ("<think>", "</think>"))
    end = tokenizer.eos_ids[0]
    begun = tokenizer.encode("<think>\n", add_bos=False)

    def begin_of_reply(tokens: Sequence[int]) -> int | None:
        data, wanted = array("i", tokens).tobytes(), array("i", start).tobytes()
        at = data.rfind(wanted)
        while at > 0 and at % 4:
            at = data.rfind(wanted, 0, at + len(wanted) - 1)
        return None if at < 0 else at // 4 + len(start)

    @lru_cache(maxsize=64)
    def decoded(ids: tuple[int, ...]) -> str:
        return tokenizer.decode(ids, skip_special=False)

    def following(tokens: Sequence[int]) -> int:
        at = begin_of_reply(tokens)
        if at is None:
            return end
        asked = decoded(tuple(tokens[:at]))
        keys = [key for key in script if key in asked]
        if not keys:
            return end
        reply = script[max(keys, key=asked.rindex)]
        said = list(tokens[at:])
        wanted = tokenizer.encode(reply, add_bos=False)
        if closing in said and closing in wanted:
            wanted = wanted[wanted.index(closing) + 1 :]
            said = said[said.index(closing) + 1 :]
            gap = tokenizer.encode("\n\n", add_bos=False)
            if said[: len(gap)] == gap and wanted[: len(gap)] != gap:
                said = said[len(gap) :]
        elif said[: len(begun)] == begun and wanted[: len(begun)] != begun:
            wanted = begun + wanted
        elif said[:1] == [opening] and wanted[:1] != [opening]:
            wanted = [opening, *wanted]
        return wanted[len(said)] if len(said) < len(wanted) else end

    model: Any = lm.model
    model.__class__ = ScriptedModel
    model.following = following
    return lm
