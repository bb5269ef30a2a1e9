"""The error of all APIs; each API writes it in its own form."""

from __future__ import annotations

ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
}
"""By status, in the APIs of OpenAI and Anthropic."""


class ApiError(Exception):
    """A request that is refused or could not be finished."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        field: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.status = status
        """The HTTP status."""
        self.message = message
        """What was expected, what was got, what to do."""
        self.field = field
        """The field of the body in question."""
        self.code = code
        """A word for programs, such as "model_not_found"."""
        self.retry_after = retry_after
        """Seconds after which the client may try again."""


def unsupported(field: str, reason: str) -> ApiError:
    """The error for a field that would change the reply and cannot be honoured."""
    return ApiError(f"{field} is not supported: {reason}", field=field, code="unsupported")
