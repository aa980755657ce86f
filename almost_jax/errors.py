"""The one exception that means "the input is wrong, and here is what would be right", and how a user is told."""

import sys


class InputError(ValueError):
    """Bad input from outside: a config key, a file, a shape, a checkpoint.

    The message is one line that names the key, file and line, or shape, and says what would be right. The command line
    prints it on standard error without a traceback and exits with code 2.
    """


class TrainingDiverged(RuntimeError):
    """A loss, a KL or a reward stopped being finite; the message names the step and the last good checkpoint."""


def complain(message: str) -> None:
    """Say what is wrong in one line on standard error."""
    print(f"almost-jax: {' '.join(message.split())}", file=sys.stderr)
