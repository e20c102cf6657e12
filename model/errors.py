"""The one error that is meant for people."""


class UserError(ValueError):
    """Something given to the program was wrong: the message says what, with which file or value, and what to do.

    Commands print it as one paragraph and exit with code 2; it never stands for a mistake in the program itself.
    """
