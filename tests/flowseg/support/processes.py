"""Processes for tests, forked from this one: a fork needs no import of torch, which takes seconds."""

import multiprocessing
import os
import socket
import sys
import time

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

from flowseg import cli


def forked(target, world=1, timeout=120):
    """Exit codes of ``target(rank)`` in ``world`` forked processes that form one process group."""
    processes = [start(target, rank, world, port) for port in [_free_port()] for rank in range(world)]
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

    return start(command, 0, 1, _free_port())


def start(target, rank, world, port):
    """Start ``target(rank)`` in a forked process with the environment of ``accelerate launch``."""

    def run():
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        for state in (AcceleratorState, PartialState, GradientState):
            state._reset_state()
        target(rank)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


def wait_until(condition, process, seconds=60):
    """Wait until ``condition()`` is true, and fail if the process ends before."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline and process.is_alive(), f"exit code {process.exitcode}"
        time.sleep(0.02)


def _free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
