"""Why a request is not answered; each API writes it in its own form."""

from __future__ import annotations


class ApiError(Exception):
    """A request that is refused, or could not be finished."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
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
        """The field of the body that it is about."""
        self.code = code
        """A word for programs, such as "model_not_found"."""
        self.retry_after = retry_after
        """Seconds after which it may be tried again."""


def unsupported(field: str, why: str) -> ApiError:
    """For a field that would change the answer and cannot be honoured."""
    return ApiError(400, f"{field} is not supported: {why}", field=field, code="unsupported")
