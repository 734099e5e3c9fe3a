"""The error class for mistakes that a user can mend, and its form in the processes that have made none."""


class UserError(Exception):
    """A wrong argument, file or setting; its message is one line: what was wanted, what came, what to do.

    The command line prints the message without a traceback and leaves with status 2.
    """


class PeerError(UserError):
    """Another process of the same run has failed. The command line leaves with status 2 and prints nothing."""
