"""Bodies of Ollama's /api/generate and /api/chat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from ...engine import Sampling
from ...text.chat_prompt import ChatPrompt
from ..http.api_error import ApiError, unsupported
from ..http.schema import (
    TEXT_ONLY_INPUT,
    TEXT_ONLY_OUTPUT,
    Body,
    Echo,
    Ignored,
    refused,
)
from ..parameters import LocalSamplingFields, LogprobFields, SignedSeed, StopStrings
from ..service import Service, Thinking, by_effort
from ..tool_calling import Tool, template_call

Int64 = SignedSeed
OnlyOne = Annotated[float | None, refused("only 1 (off) is; use top_p or min_p", (1.0,))]


class CommonRequest(LogprobFields):
    """Fields of both routes."""

    model: str
    stream: bool | None = None
    """True by default."""
    format: str | dict[str, Any] | None = None
    """"json", or a JSON schema that the reply follows. Objects have only the properties that it
    names, unless additionalProperties says otherwise."""
    options: OllamaOptions | None = None
    think: bool | Literal["low", "medium", "high"] | None = None
    """A word bounds the thought, as reasoning_effort does in OpenAI's API."""
    keep_alive: float | str | None = None
    """Accepted without effect: the model stays in memory."""
    truncate: bool | None = None
    """Accepted without effect: a prompt that is too long is refused, not cut."""
    shift: bool | None = None
    """Accepted without effect: a reply ends where the context does."""

    def check(self) -> None:
        super().check()
        if isinstance(self.format, str) and self.format not in ("", "json"):
            raise ApiError('format must be "json" or a JSON schema, got text', field="format")

    def thinking(self) -> Thinking:
        if isinstance(self.think, str):
            return by_effort(self.think, "think")
        return Thinking(wanted=self.think)

    def guide(self) -> dict[str, Any]:
        """`format` as arguments of `compile_grammar`."""
        if self.format is None or self.format == "":
            return {}
        return {"json_object": True} if self.format == "json" else {"closed_schema": self.format}


class GenerateBody(CommonRequest):
    prompt: str | None = None
    """None or empty: only check that the model is loaded."""
    system: str | None = None
    raw: bool | None = None
    """The prompt goes to the model without a template."""
    context: list[int] | None = None
    """Token ids of the conversation so far, from an earlier response."""
    suffix: Annotated[str | None, refused("this model does not fill gaps")] = None
    template: Annotated[
        str | None, refused("the model's own is used; raw: true sends the prompt without one")
    ] = None
    images: Annotated[list[str] | None, refused(TEXT_ONLY_INPUT)] = None
    width: Annotated[int | None, refused(TEXT_ONLY_OUTPUT)] = None
    height: Annotated[int | None, refused(TEXT_ONLY_OUTPUT)] = None
    steps: Annotated[int | None, refused(TEXT_ONLY_OUTPUT)] = None

    def check(self) -> None:
        super().check()
        for name in ("system", "context"):
            if self.raw and getattr(self, name):
                raise unsupported(name, "with raw: true only the prompt is used")
        if self.system and self.context:
            raise unsupported("system", "the context has its own")


class OllamaFunction(Echo):
    name: str
    arguments: dict[str, Any] | None = None


class OllamaToolCall(Echo):
    id: str | None = None
    type: Literal["function"] | None = None
    function: OllamaFunction


class OllamaMessage(Body):
    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    thinking: str | None = None
    """The thought of an earlier reply."""
    tool_calls: list[OllamaToolCall] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None
    images: Annotated[list[str] | None, refused(TEXT_ONLY_INPUT)] = None

    @classmethod
    def is_echo(cls, values: Mapping[str, Any]) -> bool:
        return values.get("role") in ("assistant", "tool")

    def for_template(self) -> dict[str, Any]:
        """The message for a chat template."""
        message: dict[str, Any] = {"role": self.role, "content": self.content or ""}
        if self.thinking and self.role == "assistant":
            message["reasoning_content"] = self.thinking
        if self.tool_calls:
            calls = [(call.id, call.function) for call in self.tool_calls]
            message["tool_calls"] = [
                template_call(call_id or f"call_{number}", function.name, function.arguments)
                for number, (call_id, function) in enumerate(calls)
            ]
        if self.tool_name:
            message["name"] = self.tool_name
        if self.tool_call_id:
            message["tool_call_id"] = self.tool_call_id
        return message


class ChatBody(CommonRequest):
    messages: list[OllamaMessage] | None = None
    """None or empty: only check that the model is loaded. The reply continues a last message of the
    assistant."""
    tools: list[Tool] | None = None

    @property
    def continues_reply(self) -> bool:
        """Whether the last message is the beginning of the reply."""
        last = self.messages[-1] if self.messages else None
        return last is not None and last.role == "assistant" and not last.tool_calls


class OllamaOptions(LocalSamplingFields):
    """None is the model's default."""

    own_names: ClassVar[Mapping[str, str]] = {
        **{name: f"options.{name}" for name in Sampling.__dataclass_fields__},
        "repetition_penalty": "options.repeat_penalty",
    }

    num_predict: Int64 | None = None
    """Tokens of the reply, at most; -1, -2 and 0 leave it to the model and the context."""
    num_ctx: Annotated[int, Field(ge=1)] | None = None
    """Tokens of prompt and reply together, at most. Never more than the model's context."""
    seed: Int64 | None = None
    """Below 0: a new one for each request."""
    stop: StopStrings | None = None
    repeat_penalty: float | None = None
    repeat_last_n: Int64 | None = None
    """Tokens that the penalties look back on: here -1, all of them, or 0, none."""

    # Other ways of sampling: accepted if they are off.
    mirostat: Annotated[Int64 | None, refused("use temperature, top_k, top_p or min_p")] = None
    mirostat_tau: Ignored[float] = None
    mirostat_eta: Ignored[float] = None
    tfs_z: OnlyOne = None
    typical_p: OnlyOne = None
    penalize_newline: Annotated[
        bool | None, refused("penalties treat all tokens alike", (True,))
    ] = None

    # How Ollama places a model on its machine.
    num_keep: Int64 | None = None
    """Accepted without effect: a text that fills the context ends there."""
    num_batch: Ignored[Int64] = None
    num_gpu: Ignored[Int64] = None
    main_gpu: Ignored[Int64] = None
    num_thread: Ignored[Int64] = None
    numa: Ignored[bool] = None
    low_vram: Ignored[bool] = None
    f16_kv: Ignored[bool] = None
    logits_all: Ignored[bool] = None
    vocab_only: Ignored[bool] = None
    embedding_only: Ignored[bool] = None
    use_mmap: Ignored[bool] = None
    use_mlock: Ignored[bool] = None

    def sampling(self, service: Service, prompt: ChatPrompt, **changes: Any) -> Sampling:
        seed = None if self.seed is None or self.seed < 0 else self.seed
        penalties: dict[str, float | None] = {"repetition_penalty": self.repeat_penalty}
        if self.repeat_last_n == 0:
            penalties = {"repetition_penalty": 1.0, "presence_penalty": 0, "frequency_penalty": 0}
        sampling = super().sampling(service, prompt, seed=seed, **penalties, **changes)
        penalised = sampling.repetition_penalty != 1.0 or (
            sampling.presence_penalty or sampling.frequency_penalty
        )
        if penalised and self.repeat_last_n not in (None, -1, 0):
            raise unsupported(
                "options.repeat_last_n", "penalties look back on the whole text (-1) or not at all"
            )
        return sampling

    def max_tokens(self, service: Service, prompt: Sequence[int]) -> int | None:
        """Tokens of the reply to `prompt`, at most; None is as far as the context goes.

        ApiError if num_ctx leaves no room.
        """
        limit = self.num_predict if self.num_predict and self.num_predict > 0 else None
        if self.num_ctx is None or self.num_ctx >= service.context_length:
            return limit
        room = self.num_ctx - len(prompt)
        if room < 1:
            raise ApiError(
                f"the prompt has {len(prompt)} tokens and options.num_ctx is {self.num_ctx}; "
                f"shorten it, or raise num_ctx to up to {service.context_length}",
                field="options.num_ctx",
                code="context_length_exceeded",
            )
        return room if limit is None else min(limit, room)
