"""Processes for tests, forked from this one: a fork needs no import of torch, which takes seconds."""

import contextlib
import multiprocessing
import os
import socket
import subprocess
import sys
import time

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

from flowseg import cli


def forked(target, world=1, timeout=120):
    """Exit codes of ``target(rank)`` in ``world`` forked processes that form one process group."""
    processes = [start(target, rank, world, port) for port in [free_port()] for rank in range(world)]
    for process in processes:
        process.join(timeout)
        if process.is_alive():
            process.kill()
    return [process.exitcode for process in processes]


def start_command(output, *arguments):
    """Start ``flowseg ARGUMENTS`` in a forked process that writes its messages to the file ``output``."""

    def command(_rank):
        # In a session of its own: a signal of the terminal does not reach it.
        os.setsid()
        sys.stdout = sys.stderr = output.open("w")
        sys.argv = ["flowseg", *map(str, arguments)]
        cli.main()

    return start(command, 0, 1, free_port())


def start(target, rank, world, port):
    """Start ``target(rank)`` in a forked process with the environment of ``accelerate launch``."""

    def run():
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        forget_accelerate()
        target(rank)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


def forget_accelerate():
    """Drop what Accelerate keeps about this process: a forked process has a place of its own among the others."""
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()


def wait_until(condition, *processes, seconds=120):
    """Wait until ``condition()`` is true. Fail if a process ends before, with what it said if it has a function ``said``."""
    deadline = time.monotonic() + seconds
    while not condition():
        codes = [one.poll() if isinstance(one, subprocess.Popen) else one.exitcode for one in processes]
        waits = time.monotonic() < deadline and all(code is None for code in codes)
        assert waits, f"exit codes {codes}\n" + "\n".join(one.said() for one in processes if hasattr(one, "said"))
        time.sleep(0.02)


def free_port(ports=(0,)):
    """The first of these ports that is free; 0 stands for any port."""
    for port in ports:
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", port))
            return free.getsockname()[1]
    raise AssertionError("no port is free")
