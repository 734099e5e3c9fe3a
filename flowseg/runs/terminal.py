"""Output for people that no name, locale or closed terminal can make fail."""

from __future__ import annotations

import contextlib
import io
import sys
import unicodedata
from typing import Any, TextIO

from rich.console import Console
from rich.text import Text


def make_console(*, stderr: bool = True, quiet: bool = False) -> Console:
    """A console that prints every text literally and never raises because of the stream behind it."""
    stream = (sys.stderr if stderr else sys.stdout) or io.StringIO()
    return Console(file=SturdyStream(stream), quiet=quiet, markup=False, emoji=False, highlight=False)


def say(console: Console | None, text: str, style: str = "") -> None:
    """Print a line as it is: brackets are no markup, and a long line is not broken."""
    if console:
        console.print(Text(printable(text), style=style), soft_wrap=True)


def printable(text: str) -> str:
    """``text`` with control characters and undecodable bytes as escapes; line breaks stay."""
    return "".join(c.encode("unicode_escape").decode() if _is_control(c) else c for c in decoded(text))


def decoded(text: str) -> str:
    """A name that Python has read in a locale without UTF-8, as the text that it is; any other text as it was."""
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeError:
        return text


def _is_control(character: str) -> bool:
    return character not in "\n\t" and unicodedata.category(character) in ("Cc", "Cs")


def speak_any_text() -> None:
    """Let standard output and error escape the characters that their encoding lacks, instead of raising."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError, OSError):
            stream.reconfigure(errors="backslashreplace")


class SturdyStream(io.TextIOBase):
    """A text stream on which writing never fails.

    Characters that the encoding lacks are escaped. After an error of the system, such as that of a closed terminal,
    everything is dropped: a run that cannot be watched goes on.
    """

    def __init__(self, stream: TextIO):
        # Rich replaces sys.stderr while it draws; this is the stream behind that replacement.
        self._stream = getattr(stream, "rich_proxied_file", stream)
        self._broken = False

    @property
    def encoding(self) -> str:
        """Encoding of the stream behind this one."""
        return getattr(self._stream, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        """Whether a terminal is behind this stream."""
        return not self._broken and self._stream.isatty()

    def fileno(self) -> int:
        """File descriptor of the stream behind this one."""
        return self._stream.fileno()

    def writable(self) -> bool:
        """True."""
        return True

    def write(self, text: str) -> int:
        """Write what can be written."""
        if not self._broken:
            try:
                self._stream.write(text.encode(self.encoding, "backslashreplace").decode(self.encoding))
            except OSError:
                self._broken = True
        return len(text)

    def flush(self) -> None:
        """Flush, if that is still possible."""
        # TextIOBase flushes when it is collected, which may be before __init__ has run.
        if not self.__dict__.get("_broken", True):
            try:
                self._stream.flush()
            except OSError:
                self._broken = True

    def close(self) -> None:
        """Leave the stream behind this one open."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_stream"], name)
