"""The one error class for mistakes a user can mend."""


class UserError(Exception):
    """A wrong argument, file or setting; its message is one line: what was wanted, what came, what to do.

    The command line prints the message without a traceback and leaves with status 2.
    """
