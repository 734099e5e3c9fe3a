"""Exceptions for errors that a user can correct, and a warning about data."""


class UserError(Exception):
    """A wrong argument, file or setting.

    The message is one line: what was wanted, what was given, what to do. The command line prints it without a traceback
    and exits with status 2.
    """


class PeerError(UserError):
    """Another process of the same run has failed. The command line exits with status 2 and prints nothing."""


class DataWarning(UserWarning):
    """Files or labels that are probably a mistake; the message is one line.

    The command line prints only the message. A program can turn the warning into an error with :mod:`warnings`.
    """


class CompilerWarning(UserWarning):
    """A network that should be compiled runs uncompiled, because there is no compiler; the message is one line.

    The command line prints only the message.
    """
