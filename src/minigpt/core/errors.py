"""Errors for users: each states the value, the rule and the remedy on one line.

Everything that a user can cause derives from `MinigptError`; the command line prints it
as one line and exits with `exit_code`, the server turns it into an HTTP status.
Broken invariants are plain `assert`s, never one of these.
"""

from __future__ import annotations


class MinigptError(Exception):
    """Base of every error that a user can cause and mend.

    Args:
        message: What was found and which rule it breaks, naming the value.
        remedy: What to do about it.
    """

    exit_code = 2

    def __init__(self, message: str, *, remedy: str = "") -> None:
        super().__init__(f"{message} ({remedy})" if remedy else message)
        self.message = message
        self.remedy = remedy


class ConfigError(MinigptError):
    """A configuration value, key or file that breaks a rule."""


class ArtifactError(MinigptError):
    """An artifact that is missing, corrupt, of another kind or from a newer version."""


class StorageError(MinigptError):
    """A path or URL that can't be read or written: full disk, no permission, no such place."""


class DataError(MinigptError):
    """Text or tokens that can't be used: empty corpus, unreadable file, unfit tokenizer."""


class ModelError(MinigptError):
    """Weights or a model configuration that can't be used."""


class TrainingError(MinigptError):
    """A training run that can't go on: a loss that is not finite, a directory in use."""


class GateError(MinigptError):
    """A gate whose verdict is not `pass`, or that could not be judged."""

    exit_code = 1


class RegistryError(MinigptError):
    """A model name, version or alias that the registry does not have or refuses."""


class JobError(MinigptError):
    """A job that the queue does not have or refuses, or a queue that can't be used."""


class RequestError(MinigptError):
    """A request that the service refuses; becomes an HTTP error in OpenAI's form.

    Args:
        message: What was found and which rule it breaks.
        param: The request field at fault, if one is.
        status: HTTP status, 4xx or 503.
        code: OpenAI's machine-readable code, for example `context_length_exceeded`.
    """

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        status: int = 400,
        code: str | None = None,
        remedy: str = "",
    ) -> None:
        super().__init__(message, remedy=remedy)
        self.param = param
        self.status = status
        self.code = code
