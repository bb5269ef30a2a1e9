"""Request fields of OpenAI's chat and completions API, with those that vLLM adds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field

from ...engine import Grammar
from ...text.chat_prompt import ChatPrompt
from ..http.api_error import ApiError
from ..http.schema import Body, Ignored
from ..parameters import CompletionFields, SignedSeed, repeat
from ..reply_stream import GenerationRequest
from ..service import Service
from .common import StreamUsage
from .reply_forms import FormFields


class StreamOptions(Body):
    include_obfuscation: bool | None = None
    """Accepted without effect: padding against eavesdroppers, which a local server has none of."""


class UsageStreamOptions(StreamOptions):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    """vLLM's: with include_usage, every chunk has the usage of its reply so far."""


class OpenAIFields(CompletionFields, FormFields):
    """Sampling, stops and streaming; None is the model's default."""

    model: str | None = None
    """A name that /v1/models lists; None is the first of them."""
    seed: SignedSeed | None = None
    stream: bool | None = None
    stream_options: UsageStreamOptions | None = None
    user: Ignored[str] = None
    metadata: Ignored[dict[str, str]] = None

    min_tokens: Annotated[int, Field(ge=0)] | None = None

    def check(self) -> None:
        if self.stream_options is not None and not self.stream:
            raise ApiError(
                "stream_options goes with stream: true; set that, or leave stream_options out",
                field="stream_options",
            )

    def stream_usage(self, prompt_tokens: Sequence[int]) -> StreamUsage:
        """For a stream of replies to prompts of so many tokens."""
        options = self.stream_options or UsageStreamOptions()
        return StreamUsage(
            prompt_tokens,
            self.n or 1,
            total=bool(options.include_usage),
            running=bool(options.continuous_usage_stats),
        )

    def generations(
        self,
        service: Service,
        prompts: Sequence[ChatPrompt],
        grammar: Grammar | None,
        **fields: Any,
    ) -> list[GenerationRequest]:
        """`n` requests for each prompt, in order; `fields` are those of GenerationRequest."""
        requests = [
            self.generation(
                service,
                prompt=prompt,
                seed=None if self.seed is None else self.seed % 2**64,
                served=service.find_model(self.model),
                min_tokens=self.min_tokens or 0,
                **fields,
            )
            for prompt in prompts
        ]
        return [copy for request in requests for copy in repeat(request, self.n or 1, grammar)]
