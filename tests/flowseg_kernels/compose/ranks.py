"""Run one function in two processes, each with its rank."""

import os
import pathlib
import subprocess
import sys

import pytest
import torch.distributed as dist

ROOT = pathlib.Path(__file__).resolve().parents[3]

needs_gloo = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="torch has no gloo here"
)


def run_two(module: str, folder: pathlib.Path) -> None:
    """Call `run_rank(rank, meeting)` of a module in two processes. `meeting` is the file for init_process_group, in `folder`.

    Raises:
        AssertionError: if a process failed, with the end of both stderr.
    """
    # A process ends right after its work. On a busy machine, threads that torch leaves to the interpreter's end sometimes abort it.
    code = f"import os, sys; from {module} import run_rank; run_rank(int(sys.argv[1]), sys.argv[2]); os._exit(0)"
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank), str(folder / "meeting")],
            stderr=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        stderr = [rank.communicate(timeout=300)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], stderr[0][-3000:] + stderr[1][-3000:]
