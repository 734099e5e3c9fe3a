"""One piece of the long run, in any process."""

from __future__ import annotations

import dataclasses
import time
import traceback


@dataclasses.dataclass
class Piece:
    """A number of cases of one op, and their results."""

    op: str
    backend: str
    cases: int
    seed: int
    changed: bool = False
    ran: int = 0
    failed: str | None = None
    seconds: float = 0.0
    seen: dict = dataclasses.field(default_factory=dict)


def run_piece(piece: Piece) -> Piece:
    """Run a piece and fill in its results; `failed` is the smallest failing case and its reason."""
    from hypothesis import HealthCheck, Phase, given, seed, settings

    from .cases import cases, with_changed_codebook
    from .checks import check, seen

    @seed(piece.seed)
    @settings(
        max_examples=piece.cases,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
        phases=(Phase.generate, Phase.shrink),
    )
    @given(cases(piece.op, slow=piece.backend == "triton", cuda=piece.backend == "cuda"))
    def every_case(case):
        piece.ran += 1
        check(piece.op, with_changed_codebook(case) if piece.changed else case, piece.backend)

    seen.clear()
    start = time.process_time()
    try:
        every_case()
    except Exception as error:
        piece.failed = "".join(traceback.format_exception_only(error)).strip()[-2000:]
    piece.seconds, piece.seen = time.process_time() - start, dict(seen)
    return piece
