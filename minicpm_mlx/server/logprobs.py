"""Log probabilities as OpenAI's two APIs write them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from ..engine.logprobs import Scored

if TYPE_CHECKING:
    from .service import Service


def token_name(service: Service, token: int) -> str:
    """A token's text; where it is no whole character, its bytes: "bytes:\\xe4\\xbd"."""
    data = service.bytes_of(token)
    try:
        data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
    return service.text_of(token)


def chat_logprobs(service: Service, tokens: Iterable[Scored]) -> list[dict[str, Any]]:
    """The chat API's `logprobs.content`, and what the responses API calls `logprobs`."""

    def entry(token: int, logprob: float | None) -> dict[str, Any]:
        return {
            "token": token_name(service, token),
            "logprob": logprob,
            "bytes": list(service.bytes_of(token)),
        }

    return [
        entry(one.token, one.logprob) | {"top_logprobs": [entry(*other) for other in one.top]}
        for one in tokens
    ]


class CompletionLogprobs:
    """The older API's `logprobs` of one text, a part at a time; it keeps count of the offsets."""

    def __init__(self, service: Service, skip_special: bool):
        self.service = service
        self.decoder = service.lm.tokenizer.stream(skip_special)
        self.offset = 0
        """Characters of the text so far."""

    def of(self, tokens: Sequence[Scored]) -> dict[str, Any]:
        """The next tokens' names, log probabilities and places, as four lists of one length."""
        return {
            "tokens": [token_name(self.service, one.token) for one in tokens],
            "token_logprobs": [one.logprob for one in tokens],
            "top_logprobs": [self._top(one) for one in tokens],
            "text_offset": [self._advance(one.token) for one in tokens],
        }

    def _top(self, one: Scored) -> dict[str, float] | None:
        """The likeliest by name, and the token itself, which need not be among them."""
        if one.logprob is None:
            return None
        named: dict[str, float] = {}
        for token, logprob in (*one.top, (one.token, one.logprob)):
            named.setdefault(token_name(self.service, token), logprob)
        return named

    def _advance(self, token: int) -> int:
        """Where `token` begins in the text."""
        start = self.offset
        self.offset += len(self.decoder.add(token))
        return start
