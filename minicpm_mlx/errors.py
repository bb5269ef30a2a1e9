"""Everything this library raises on purpose.

    MiniCPMError
    ├── ConfigError         config.json is missing, malformed or asks for something unsupported
    ├── WeightsError        a weight file is missing, corrupt, unsafe or does not fit the config
    ├── TokenizerError      tokenizer files are missing, corrupt or do not fit the model
    ├── TemplateError       a chat template cannot render these messages
    │   └── MissingTemplateError the model has no chat template
    ├── ModelNotFoundError  no card, folder, file or repository of that name
    ├── DownloadError       the hub, or a judge's endpoint, could not be reached or refused
    ├── StorageError        the disk is full, may not be written to, or another process is writing
    ├── MissingPackageError an optional package is needed; the message names the pip command
    ├── DataError           training data is missing, malformed or of several kinds
    ├── SessionError        a saved conversation is missing, damaged or of another kind
    ├── InvalidArgumentError an argument is out of range or contradicts another
    ├── ContextLengthError  the prompt does not fit the model's context
    ├── DistributedError    processes working together disagree, or one of them was lost
    └── NumericsError       the model produced NaN

Each message is one line that says what was expected, what was found and what to do; the command
line prints it as it is and exits with 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Self


class MiniCPMError(Exception):
    """Base of every error a user can cause or mend."""


class FileError(MiniCPMError):
    """A problem with the content of a file; the message begins with `source`, where one is given.

    A reader that works on parsed content raises it with a general source such as "config.json";
    the caller who knows the path re-raises `error.at(path)`.
    """

    def __init__(self, problem: str, *, source: object = None) -> None:
        super().__init__(problem if source is None else f"{source}: {problem}")
        self.problem = problem

    def at(self, source: object) -> Self:
        """The same problem, in the file or folder `source`."""
        return type(self)(self.problem, source=source)


class ConfigError(FileError):
    """config.json is missing, malformed or asks for something unsupported."""


class WeightsError(FileError):
    """A weight file is missing, corrupt, unsafe or does not fit the config."""


class TokenizerError(MiniCPMError):
    """Tokenizer files are missing, corrupt or do not fit the model."""


class TemplateError(MiniCPMError):
    """A chat template cannot render these messages."""


class MissingTemplateError(TemplateError):
    """The model has no chat template; the message says how it gets one.

    A caller that can do without one re-raises `error.or_else("…")`.
    """

    def or_else(self, advice: str) -> Self:
        """The same with another thing to do."""
        return type(self)(f"{self}, or {advice}")


class ModelNotFoundError(MiniCPMError):
    """No card, folder, file or repository of that name."""


class DownloadError(MiniCPMError):
    """The hub, or a judge's endpoint, could not be reached or refused."""


class StorageError(MiniCPMError):
    """A file or folder cannot be written: disk full, no permission, or locked by a process."""


class MissingPackageError(MiniCPMError):
    """An optional package is needed; the message names the pip command."""


class DataError(MiniCPMError):
    """Training data is missing, malformed or of several kinds; the message names the place."""


class SessionError(MiniCPMError):
    """A saved conversation is missing, damaged or of another kind."""


class InvalidArgumentError(MiniCPMError):
    """An argument is out of range or contradicts another.

    With `field`, the name of the argument, the message is the name and the problem:
    "top_p must be above 0 and at most 1, got 2".
    """

    def __init__(self, problem: str, *, field: str | None = None) -> None:
        super().__init__(problem if field is None else f"{field} {problem}")
        self.problem, self.field = problem, field

    def called(self, name: str) -> Self:
        """The same problem of an argument that the caller's user knows by another name."""
        return type(self)(self.problem, field=name)


class ContextLengthError(MiniCPMError):
    """The prompt does not fit the model's context."""


class DistributedError(MiniCPMError):
    """Processes working together disagree, or one of them was lost."""


class NumericsError(MiniCPMError):
    """The model produced NaN."""
