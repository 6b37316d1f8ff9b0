"""Defines the exceptions that users are meant to see."""


class UserError(Exception):
    """An error that the user can fix: commands print it as one line and exit with status 1.

    The message names the file, row, key or id, and says what to change.
    """


class Diverged(UserError):
    """The error that ends a training whose loss or gradient is no longer finite."""


def line(error: BaseException) -> str:
    """Returns an error's message on one line, or its type's name if it has no message."""
    return " ".join(str(error).split()) or type(error).__name__
