"""Answers validation prompts, to show what a training changes."""

from __future__ import annotations

from collections.abc import Sequence

from ..distributed import collectives
from ..lm.lm import LM
from .data.counts import Prompt
from .tracking.events import Listener, Sampled

REPLY_TOKENS = 64
"""Length of the replies."""


def sample_replies(lm: LM, prompts: Sequence[Prompt], step: int, listener: Listener) -> None:
    """Sends the model's reply to each prompt, with the marks of thoughts and calls."""
    if collectives.rank() != 0:
        return
    lm.model.eval()
    for prompt in prompts:
        if isinstance(prompt, str):
            asked, text, tools = lm.chat_prompt(prompt), prompt, None
        else:
            tools, variables = prompt.options.tools or None, prompt.options.variables
            asked = lm.chat_prompt(prompt.messages, tools=tools, variables=variables)
            text = prompt.messages[-1]["content"]
        reply = lm.generate(asked, max_tokens=REPLY_TOKENS, speculate=False)
        shown = reply.text
        if tools or reply.thinking:  # the marks of MiniCPM5 are special tokens, which text lacks
            ids = [token for token in reply.token_ids if token not in lm.tokenizer.eos_ids]
            shown = lm.tokenizer.decode(ids, skip_special=False)
        listener(Sampled(step=step, prompt=text, reply=shown.strip()))
    lm.model.train()
