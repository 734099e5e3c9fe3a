"""The error classes for mistakes that a user can mend, and the one warning about data."""


class UserError(Exception):
    """A wrong argument, file or setting; its message is one line: what was wanted, what came, what to do.

    The command line prints the message without a traceback and leaves with status 2.
    """


class PeerError(UserError):
    """Another process of the same run has failed. The command line leaves with status 2 and prints nothing."""


class DataWarning(UserWarning):
    """Something about files or labels that is probably not meant; its message is one line.

    The command line prints the message alone; a program can turn it into an error with :mod:`warnings`.
    """
