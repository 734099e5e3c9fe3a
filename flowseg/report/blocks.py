"""Parts that more than one report has: speed of the kernels, and the machine that numbers belong to."""

from __future__ import annotations

import platform
from pathlib import Path

import accelerate
import torch

from flowseg import __version__
from flowseg.report import figures
from flowseg.report.page import paragraph, picture, table


def speed_blocks(speed: list[dict], size: int) -> list[str]:
    """What :func:`measure_kernels` measured, as a picture and a table."""
    if not speed:
        return [
            paragraph(
                "No compiled kernels are available here, so every operation ran as plain PyTorch and there is nothing "
                "to compare. `python -m flowseg_kernels.info` says why."
            )
        ]
    rows = [
        [
            f"{row['name']} ({row['backend']})",
            f"{row['ours_ms']:.2f}",
            f"{row['eager_ms']:.2f}",
            f"{row['eager_ms'] / row['ours_ms']:.1f}x",
            f"{row['max_error']:.1e}",
        ]
        for row in speed
    ]
    return [
        paragraph(
            f"One {size}x{size} image, 150 classes, 3 code channels, float32. Each result was compared with the plain "
            f"PyTorch reference before it was timed; the two were timed in turn, median of the runs."
        ),
        picture(figures.speed_figure(speed), "times of the kernels"),
        table(["operation", "kernels, ms", "eager PyTorch, ms", "ratio", "difference"], rows),
        paragraph("Difference: largest, relative to the largest value; for labels the share of pixels that differ."),
    ]


def environment() -> dict[str, str]:
    """Machine and versions that numbers belong to."""
    return {
        "flowseg": __version__,
        "torch": torch.__version__,
        "accelerate": accelerate.__version__,
        "Python": platform.python_version(),
        "processor": _processor(),
        "threads": str(torch.get_num_threads()),
        "system": platform.platform(terse=True),
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
