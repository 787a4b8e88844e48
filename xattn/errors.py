"""Errors that a person is told about in a line, each with the exit code it leaves with."""

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of ``train.py`` and ``xattn``; a process killed by signal n leaves with 128 + n."""

    DONE = 0
    ERROR = 1
    BAD_INPUT = 2
    DIVERGED = 3
    IN_USE = 5


class XattnError(Exception):
    """An error with a message for a person and an exit code for a script."""

    exit_code = ExitCode.ERROR


class BadInput(XattnError):
    """Configuration or data that cannot be used: the message names what was given and what is allowed."""

    exit_code = ExitCode.BAD_INPUT


class FolderInUse(XattnError):
    """Another process holds the run folder."""

    exit_code = ExitCode.IN_USE
