"""The one exception that users are meant to see."""


class UserError(Exception):
    """Reports what the user can put right: main prints it as one line and exits with status 1.

    The message names the file, row, key or id, and says what to change.
    """


class Diverged(UserError):
    """Ends a training whose loss or gradient is no longer finite."""


def line(error: BaseException) -> str:
    """Puts an error's message on one line, or its type where there is none."""
    return " ".join(str(error).split()) or type(error).__name__
