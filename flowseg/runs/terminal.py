"""Printing that never fails, whatever the text, the locale or the state of the terminal."""

from __future__ import annotations

import contextlib
import io
import sys
import unicodedata
from typing import Any, TextIO

from rich.console import Console
from rich.text import Text


def make_console(*, stderr: bool = True, quiet: bool = False) -> Console:
    """Make a console that prints every text literally and never raises an error of its stream."""
    stream = (sys.stderr if stderr else sys.stdout) or io.StringIO()
    return Console(file=SturdyStream(stream), quiet=quiet, markup=False, emoji=False, highlight=False)


def say(console: Console | None, text: str, style: str = "") -> None:
    """Print a line literally: brackets are not markup, and long lines are not wrapped."""
    if console:
        console.print(Text(printable(text), style=style), soft_wrap=True)


def printable(text: str) -> str:
    """Escape control characters and undecodable bytes; keep line breaks and tabs."""
    return "".join(c.encode("unicode_escape").decode() if _is_control(c) else c for c in decoded(text))


def decoded(text: str) -> str:
    """Decode a UTF-8 name that Python has read in another locale (surrogate escapes); return any other text unchanged."""
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeError:
        return text


def _is_control(character: str) -> bool:
    return character not in "\n\t" and unicodedata.category(character) in ("Cc", "Cs")


def speak_any_text() -> None:
    """Make standard output and error escape characters that their encoding lacks, instead of raising."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError, OSError):
            stream.reconfigure(errors="backslashreplace")


class SturdyStream(io.TextIOBase):
    """A text stream on which writing never fails.

    Characters that the encoding lacks are escaped. After an error of the operating system, such as a closed terminal, all
    output is dropped, and the run continues.
    """

    def __init__(self, stream: TextIO):
        # Rich replaces sys.stderr by a proxy while it draws; write to the stream behind the proxy.
        self._stream = getattr(stream, "rich_proxied_file", stream)
        self._broken = False

    @property
    def encoding(self) -> str:
        """Encoding of the underlying stream."""
        return getattr(self._stream, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        """Whether the underlying stream is a terminal that still works."""
        return not self._broken and self._stream.isatty()

    def fileno(self) -> int:
        """File descriptor of the underlying stream."""
        return self._stream.fileno()

    def writable(self) -> bool:
        """True."""
        return True

    def write(self, text: str) -> int:
        """Write, or drop the text if the underlying stream has failed."""
        if not self._broken:
            try:
                self._stream.write(text.encode(self.encoding, "backslashreplace").decode(self.encoding))
            except OSError:
                self._broken = True
        return len(text)

    def flush(self) -> None:
        """Flush, unless the underlying stream has failed."""
        # TextIOBase flushes in its destructor, which may run before __init__ has.
        if not self.__dict__.get("_broken", True):
            try:
                self._stream.flush()
            except OSError:
                self._broken = True

    def close(self) -> None:
        """Do nothing: the underlying stream stays open."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_stream"], name)
