"""Everything this library raises on purpose.

    MiniCPMError
    ├── ConfigError         config.json is missing, malformed or asks for something unsupported
    ├── WeightsError        a weight file is missing, corrupt, unsafe or does not fit the config
    ├── TokenizerError      tokenizer files are missing, corrupt or do not fit the model
    ├── TemplateError       a chat template is missing or cannot render these messages
    ├── ModelNotFoundError  no card, folder, file or repository of that name
    ├── DownloadError       the hub could not be reached, refused, or the disk is too small
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

__all__ = [
    "ConfigError",
    "ContextLengthError",
    "DataError",
    "DistributedError",
    "DownloadError",
    "InvalidArgumentError",
    "MiniCPMError",
    "MissingPackageError",
    "ModelNotFoundError",
    "NumericsError",
    "SessionError",
    "TemplateError",
    "TokenizerError",
    "WeightsError",
]


class MiniCPMError(Exception):
    """Base of every error a user can cause or mend."""


class ConfigError(MiniCPMError):
    """config.json is missing, malformed or asks for something unsupported."""


class WeightsError(MiniCPMError):
    """A weight file is missing, corrupt, unsafe or does not fit the config."""


class TokenizerError(MiniCPMError):
    """Tokenizer files are missing, corrupt or do not fit the model."""


class TemplateError(MiniCPMError):
    """A chat template is missing or cannot render these messages."""


class ModelNotFoundError(MiniCPMError):
    """No card, folder, file or repository of that name."""


class DownloadError(MiniCPMError):
    """The hub or a judge's endpoint could not be reached, or refused, or the disk is too small."""


class MissingPackageError(MiniCPMError):
    """An optional package is needed; the message names the pip command."""


class DataError(MiniCPMError):
    """Training data is missing, malformed or of several kinds; the message names the place."""


class SessionError(MiniCPMError):
    """A saved conversation is missing, damaged or of another kind."""


class InvalidArgumentError(MiniCPMError):
    """An argument is out of range or contradicts another."""


class ContextLengthError(MiniCPMError):
    """The prompt does not fit the model's context."""


class DistributedError(MiniCPMError):
    """Processes working together disagree, or one of them was lost."""


class NumericsError(MiniCPMError):
    """The model produced NaN."""
