"""Sizes, device and entry names of this run, from the environment."""

import contextlib
import os

import torch

import flowseg_kernels as fk

#: Tiny sizes, one round, no peers that compile: checks that every entry runs and is correct. The times mean nothing.
QUICK = os.environ.get("FLOWSEG_BENCH_QUICK", "0") not in ("", "0")
SIZE = int(os.environ.get("FLOWSEG_BENCH_SIZE", "32" if QUICK else "512"))
DEVICE = os.environ.get("FLOWSEG_BENCH_DEVICE", "cuda" if torch.cuda.is_available() else "cpu")
BATCH = 16 if DEVICE == "cuda" else 1
#: Input sets that the calls rotate through, so that no cache holds the inputs of the next call.
SETS = 4
#: Rounds of the loops that measure the throughput of the arithmetic units.
THROUGHPUT_ROUNDS = 20_000 if QUICK else 2_000_000
#: Entries of our own kernels; on a GPU one per backend.
OURS = ("ours (cuda)", "ours (triton)") if DEVICE == "cuda" else ("ours",)


def backend_name(entry):
    """The backend in the name of an entry, "triton" for "ours (triton)"; "" if it names none."""
    return entry.partition("(")[2].partition(")")[0]


@contextlib.contextmanager
def backend_of(entry):
    """Select the backend that an entry of OURS names; other entries get the automatic choice."""
    name = backend_name(entry)
    with fk.use_backend(name) if name else contextlib.nullcontext():
        yield
