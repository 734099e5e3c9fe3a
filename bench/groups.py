"""Which groups of rows the tables and pictures show."""

import re

from .results import best_of_ours, groups_of

#: Entries that are not ours, in the order of the tables; the first three are plain PyTorch.
PEERS = (
    "reference",
    "eager",
    "torch.compile",
    "KeOps",
    "faiss IndexFlatL2",
    "faiss-gpu IndexFlatL2",
    "flash-kmeans",
    "scipy cKDTree",
    "cdist+argmin",
    "cdist+argmin compiled",
    "Pillow quantize",
    "in chunks",
    "in chunks bf16",
)
SCALING = re.compile(r"(.*) by (classes|channels|pixels)$")


def table_groups(rows):
    """The groups of the table of all workloads, without the scaling series.

    Each has an entry of ours and, on a CPU, a peer. On a GPU, which is available for minutes only, peers may be measured later.
    """
    chosen = {}
    for name, members in groups_of(rows).items():
        ours = best_of_ours(members)
        if ours and not SCALING.match(ours["op"]) and ("clock" in ours or has_peer(members)):
            chosen[name] = members
    return chosen


def has_peer(members):
    return any(peer in members for peer in PEERS)


#: Groups in README: the ops as the paper uses them to train and sample. docs/results/bench.md has all groups.
MAIN = re.compile(
    r"(distance_correction|flow_loss forward\+backward|flow_interpolate) ade512$|decode_confusion ade512 spread"
    r"|nearest_centroid ade512 spread [\d.]+$|neural_field .* XL (256 patches|4096 patches bfloat16)|training step|sampling"
)


def main_groups(rows):
    return {name: members for name, members in table_groups(rows).items() if MAIN.match(name)}
