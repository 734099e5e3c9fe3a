"""The failure of ``torch.compile`` on a machine without a compiler."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from flowseg.errors import UserError

# Names of torch._inductor.exc, which is private.
_ERRORS = ("InvalidCxxCompiler", "TritonMissing", "GPUTooOldForTriton")
# Triton builds its launchers with a C compiler, and raises a RuntimeError without one.
_TRITON_WORDS = "Failed to find C compiler"


def missing_compiler(error: BaseException) -> str | None:
    """Why ``torch.compile`` cannot work on this machine; ``None`` if the error has another reason."""
    cause: BaseException | None = error
    while cause is not None:
        if type(cause).__name__ in _ERRORS or _TRITON_WORDS in str(cause):
            return str(cause).strip().splitlines()[0]
        cause = getattr(cause, "inner_exception", None) or cause.__cause__
    return None


@contextlib.contextmanager
def compiler_needed() -> Iterator[None]:
    """Name the setting where a block fails because there is no compiler.

    Raises:
        UserError: there is no compiler.
    """
    try:
        yield
    except Exception as error:
        reason = missing_compiler(error)
        if reason is None:
            raise
        raise UserError(
            f"model.compile: torch.compile needs a compiler, but: {reason}. Install one, or train uncompiled with "
            "--set model.compile=false"
        ) from None
