"""What Ollama's /api/generate and /api/chat are sent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from ...engine import Sampling
from ..http.api_error import ApiError, unsupported
from ..http.streaming import Body
from ..parameters import MAX_STOPS, StopString
from ..tool_calling import Tool

if TYPE_CHECKING:
    from ..service import Service


class CommonRequest(Body):
    """What both routes take."""

    model: str
    stream: bool | None = None
    """True unless it is said to be false."""
    format: str | dict[str, Any] | None = None
    """"json", or a JSON schema that the reply follows."""
    options: OllamaOptions | None = None
    think: bool | str | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    keep_alive: float | str | None = None
    """Accepted without effect: the model stays."""
    truncate: bool | None = None
    """Accepted without effect: a prompt that is too long is refused, not cut."""
    shift: bool | None = None
    """Accepted without effect: a reply ends where the context does."""

    def check(self) -> None:
        """Refuse what would change the reply and cannot be honoured."""
        if self.think:
            raise unsupported("think", "this model has no thinking apart from its reply")
        if isinstance(self.format, str) and self.format not in ("", "json"):
            raise ApiError(400, 'format must be "json" or a JSON schema, got text', field="format")
        if self.top_logprobs and not self.logprobs:
            raise ApiError(
                400, "top_logprobs goes with logprobs: true; set that too", field="top_logprobs"
            )

    def guide(self) -> dict[str, Any]:
        """`format` as an argument of `grammar_of`."""
        if self.format is None or self.format == "":
            return {}
        return {"json_object": True} if self.format == "json" else {"json_schema": self.format}


class GenerateBody(CommonRequest):
    prompt: str | None = None
    """None or empty: only see that the model is there."""
    system: str | None = None
    raw: bool | None = None
    """The prompt goes to the model as it is."""
    context: list[int] | None = None
    """Token ids of what was said before: that of an earlier answer."""
    suffix: str | None = None
    template: str | None = None
    images: list[str] | None = None
    width: int | None = None
    height: int | None = None
    steps: int | None = None

    def check(self) -> None:
        super().check()
        for name, why in (
            ("suffix", "this model does not fill gaps"),
            ("template", "the model's own is used; raw: true sends the prompt as it is"),
            ("images", "this model reads text alone"),
            ("width", "this model writes text alone"),
            ("height", "this model writes text alone"),
            ("steps", "this model writes text alone"),
        ):
            if getattr(self, name):
                raise unsupported(name, why)
        for name in ("system", "context"):
            if self.raw and getattr(self, name):
                raise unsupported(name, "raw: true leaves nothing but the prompt")
        if self.system and self.context:
            raise unsupported("system", "what was said before (context) has its own")


class OllamaFunction(Body):
    name: str
    arguments: dict[str, Any]
    index: int | None = None
    """Accepted without effect."""


class OllamaToolCall(Body):
    id: str | None = None
    type: Literal["function"] | None = None
    function: OllamaFunction


class OllamaMessage(Body):
    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    tool_calls: list[OllamaToolCall] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None
    thinking: str | None = None
    images: list[str] | None = None


class ChatBody(CommonRequest):
    messages: list[OllamaMessage] | None = None
    """None or empty: only see that the model is there."""
    tools: list[Tool] | None = None


def templated(messages: Sequence[OllamaMessage]) -> list[dict[str, Any]]:
    """Messages for a chat template."""
    return [_templated(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _templated(message: OllamaMessage, field: str) -> dict[str, Any]:
    if message.images:
        raise unsupported(f"{field}.images", "this model reads text alone")
    if message.thinking:
        raise unsupported(f"{field}.thinking", "this model has no thinking apart from its reply")
    found: dict[str, Any] = {"role": message.role, "content": message.content or ""}
    if message.tool_calls:
        found["tool_calls"] = [
            {
                "id": call.id or f"call_{number}",
                "type": "function",
                "function": {"name": call.function.name, "arguments": call.function.arguments},
            }
            for number, call in enumerate(message.tool_calls)
        ]
    if message.tool_name:
        found["name"] = message.tool_name
    if message.tool_call_id:
        found["tool_call_id"] = message.tool_call_id
    return found


Whole = Annotated[int, Field(ge=-(2**63), lt=2**64)]


class OllamaOptions(Body):
    """None is the model's default."""

    num_predict: Whole | None = None
    """Tokens of the reply; -1, -2 and 0 leave it to the model and the context."""
    num_ctx: Annotated[int, Field(ge=1)] | None = None
    """Tokens of prompt and reply together, at most the model's context."""
    temperature: float | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    """-1 and 0 keep all tokens."""
    top_p: float | None = None
    min_p: float | None = None
    seed: Whole | None = None
    """Below 0: another one each time."""
    stop: Annotated[list[StopString], Field(max_length=MAX_STOPS)] | None = None
    repeat_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repeat_last_n: Whole | None = None
    """Tokens that the penalties look back on: here -1, all of them, or 0, none."""

    # Ways of drawing that are not built here: accepted where they are off.
    mirostat: Whole | None = None
    mirostat_tau: float | None = None
    mirostat_eta: float | None = None
    tfs_z: float | None = None
    typical_p: float | None = None
    penalize_newline: bool | None = None

    # Accepted without effect: how Ollama spreads a model over its machine.
    num_keep: Whole | None = None
    """What stays when a text outgrows the context; here it ends there."""
    num_batch: Whole | None = None
    num_gpu: Whole | None = None
    main_gpu: Whole | None = None
    num_thread: Whole | None = None
    numa: bool | None = None
    low_vram: bool | None = None
    f16_kv: bool | None = None
    logits_all: bool | None = None
    vocab_only: bool | None = None
    embedding_only: bool | None = None
    use_mmap: bool | None = None
    use_mlock: bool | None = None

    def check(self) -> None:
        """Refuse what would change the reply and cannot be honoured."""
        if self.mirostat:
            raise unsupported("options.mirostat", "use temperature, top_k, top_p or min_p")
        for name in ("tfs_z", "typical_p"):
            if getattr(self, name) not in (None, 1.0):
                raise unsupported(f"options.{name}", "1 (off) is; use top_p or min_p instead")
        if self.penalize_newline is False:
            raise unsupported("options.penalize_newline", "penalties treat all tokens alike")

    def sampling(self, service: Service) -> Sampling:
        """How tokens are drawn."""
        self.check()
        sampling = service.sampling(
            temperature=self.temperature,
            top_k=None if self.top_k is None else max(self.top_k, 0),
            top_p=self.top_p,
            min_p=self.min_p,
            seed=None if self.seed is None or self.seed < 0 else self.seed,
            **self._penalties(),
        )
        penalised = sampling.repetition_penalty != 1.0 or (
            sampling.presence_penalty or sampling.frequency_penalty
        )
        if penalised and self.repeat_last_n not in (None, -1, 0):
            raise unsupported(
                "options.repeat_last_n", "penalties look back on the whole text (-1) or not at all"
            )
        return sampling

    def _penalties(self) -> dict[str, float | None]:
        if self.repeat_last_n == 0:
            return {
                "repetition_penalty": 1.0,
                "presence_penalty": 0.0,
                "frequency_penalty": 0.0,
            }
        return {
            "repetition_penalty": self.repeat_penalty,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
        }

    def max_tokens(self, service: Service, prompt: Sequence[int]) -> int | None:
        """Tokens the reply to `prompt` may have; None is as far as the context goes.

        ApiError 400 where num_ctx is more than the model has, or leaves no room.
        """
        limit = self.num_predict if self.num_predict and self.num_predict > 0 else None
        if self.num_ctx is None:
            return limit
        if self.num_ctx > service.context_length:
            raise ApiError(
                400,
                f"options.num_ctx must be at most the model's context, {service.context_length}, "
                f"got {self.num_ctx}",
                field="options.num_ctx",
            )
        room = self.num_ctx - len(prompt)
        if room < 1:
            raise ApiError(
                400,
                f"the prompt has {len(prompt)} tokens and options.num_ctx is {self.num_ctx}; "
                f"shorten it, or raise num_ctx, which may be {service.context_length}",
                field="options.num_ctx",
                code="context_length_exceeded",
            )
        return room if limit is None else min(limit, room)
