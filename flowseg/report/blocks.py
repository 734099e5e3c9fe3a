"""Blocks that both reports contain: the speed of the kernels, and the machine on which it was measured."""

from __future__ import annotations

import platform

import accelerate
import torch

from flowseg import __version__
from flowseg.report import figures
from flowseg.report.page import paragraph, picture, table
from flowseg.runs.machine import cpu_model


def speed_blocks(speed: list[dict], size: int) -> list[str]:
    """Show the result of :func:`measure_kernels` as a picture and a table.

    Args:
        speed: rows of :func:`measure_kernels`.
        size: side of the image that they were measured on.
    """
    if not speed:
        return [
            paragraph(
                "No compiled kernels are available here: every operation ran as plain PyTorch, so there is nothing to "
                "compare. `python -m flowseg_kernels.info` shows the reason."
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
            f"One {size}x{size} image, 150 classes, 3 code channels, float32. Each result was compared with that of plain "
            f"PyTorch before it was timed. Both were timed alternately; the times are medians."
        ),
        picture(figures.speed_figure(speed), "times of the kernels"),
        table(["operation", "kernels, ms", "eager PyTorch, ms", "ratio", "difference"], rows),
        paragraph(
            "Difference: the largest difference relative to the largest value; for labels the share of pixels that differ."
        ),
    ]


def environment() -> dict[str, str]:
    """The machine and the versions of the software, for the end of a report."""
    return {
        "flowseg": __version__,
        "torch": torch.__version__,
        "accelerate": accelerate.__version__,
        "Python": platform.python_version(),
        "processor": cpu_model() or platform.processor() or platform.machine(),
        "threads": str(torch.get_num_threads()),
        "system": platform.platform(terse=True),
    }
