"""nearest_centroid against faiss, scipy's k-d tree, KeOps, torch.cdist, and Pillow's inexact table."""

import numpy as np
import pytest
import torch

import flowseg_kernels as fk

from . import plain
from .conftest import NAMES, OURS, backend_of, peer, skip_unless_it_runs


def rows_of(inputs):
    return inputs["x"].movedim(1, -1).reshape(-1, inputs["x"].shape[1]).contiguous()


def faiss_search(mu):
    faiss = peer("faiss")
    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatL2(mu.shape[1])
    index.add(mu.numpy())
    return lambda i: torch.from_numpy(index.search(i["rows"].numpy(), 1)[1][:, 0])


def faiss_gpu_search(mu):
    faiss = peer("faiss")
    if not hasattr(faiss, "StandardGpuResources"):
        pytest.skip("this faiss has no GPU support (StandardGpuResources is missing)")
    if mu.device.type != "cuda":
        pytest.skip("runs on a GPU only")
    peer("faiss.contrib.torch_utils")  # lets an index take tensors
    resources = faiss.StandardGpuResources()
    index = faiss.GpuIndexFlatL2(resources, mu.shape[1])
    index.add(mu)
    return lambda i: index.search(i["rows"], 1)[1][:, 0]


def tree_search(mu):
    tree = peer("scipy.spatial").cKDTree(mu.numpy())
    return lambda i: torch.from_numpy(tree.query(i["rows"].numpy(), workers=torch.get_num_threads())[1])


def keops_search(mu):
    lazy = peer("pykeops.torch").LazyTensor
    codes = lazy(mu[None].contiguous())
    return lambda i: ((lazy(i["rows"][:, None]) - codes) ** 2).sum(-1).argmin(1).flatten()


def flash_kmeans_search(mu):
    """The assignment of points to centroids, with the norms that it wants: they are the caller's work."""
    if mu.device.type != "cuda":
        pytest.skip("runs on a GPU only")
    assign = peer("flash_kmeans.assign_euclid_triton").euclid_assign_triton

    def run(i):
        rows = i["rows"][None]
        return assign(rows, mu[None].contiguous(), rows.square().sum(-1))[0].long()

    return run


def pillow_search(mu):
    image = peer("PIL.Image")
    palette = image.new("P", (1, 1))
    colours = ((mu + 1) * 127.5).round().clamp(0, 255).byte().numpy()
    palette.putpalette(np.resize(colours, (256, 3)).tobytes())

    def run(i):
        if "rgb" not in i:
            rgb = ((i["x"][0] + 1) * 127.5).round().clamp(0, 255).byte().movedim(0, -1).contiguous().numpy()
            i["rgb"] = image.fromarray(rgb, "RGB")
        return torch.from_numpy(np.array(i["rgb"].quantize(palette=palette, dither=image.Dither.NONE))).long().flatten()

    return run


ENTRIES = (
    *OURS,
    *(f"{o} bf16" for o in OURS),
    "ours without grid",
    "faiss IndexFlatL2",
    "faiss-gpu IndexFlatL2",
    "scipy cKDTree",
    "KeOps",
    "flash-kmeans",
    "cdist+argmin",
    "cdist+argmin compiled",
    "Pillow quantize",
)


def search_entry(entry, work):
    """The function of the inputs that an entry times."""
    mu, out = work.codebook.centroids, work.label_dtype
    if entry in OURS:
        return lambda i: fk.nearest_centroid(i["x"], work.codebook, out_dtype=out)
    if entry.endswith("bf16"):
        return lambda i: fk.nearest_centroid(i["bf16"], work.codebook, out_dtype=out)
    if entry == "ours without grid":
        return lambda i: fk.nearest_centroid(i["x"], mu, out_dtype=out)
    if entry == "cdist+argmin compiled":
        compiled = torch.compile(plain.nearest, dynamic=False)
        return lambda i: compiled(i["x"], mu)
    if entry == "cdist+argmin":
        return lambda i: plain.nearest(i["x"], mu)
    peers = {"faiss": faiss_search, "faiss-gpu": faiss_gpu_search, "scipy": tree_search, "KeOps": keops_search}
    peers |= {"flash-kmeans": flash_kmeans_search, "Pillow": pillow_search}
    return peers[entry.split()[0]](mu)


def assert_finds(run, entry, work):
    """Our labels are those of the nearest centroids, every one; returns how many pixels a peer gets wrong."""
    for inputs in work.sets:
        inputs.setdefault("rows", rows_of(inputs))
        inputs.setdefault("bf16", inputs["x"].bfloat16())
    inputs = work.sets[0]
    rows = inputs["rows"]
    if "bf16" in entry:
        rows = inputs["bf16"].float().movedim(1, -1).reshape(rows.shape)
    name = "bf16 smallest" if "bf16" in entry else "smallest"
    if name not in inputs:
        inputs[name] = smallest_distances(rows, work.codebook.centroids)
    with backend_of(entry):
        wrong = wrong_pixels(run(inputs), rows, work.codebook.centroids, inputs[name])
    if entry.startswith("ours"):
        assert wrong == 0
    elif entry != "Pillow quantize":
        # Expanded squares and 8-bit tables are inexact; the table says by how much.
        assert wrong < max(30, 1e-4 * len(rows))
    return wrong


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("spread", [0.05, 0.1, 0.3])
@pytest.mark.parametrize("workload", NAMES)
def test_nearest_centroid(workloads, measure, workload, entry, spread):
    skip_unless_it_runs(entry, "nearest_centroid")
    if entry == "Pillow quantize" and workload == "many":
        pytest.skip("a palette holds 256 colours")
    if workload in ("coco512", "ade512 random") and (entry not in OURS or (workload == "coco512" and spread != 0.3)):
        pytest.skip("ade512 and many bracket it")
    if entry == "cdist+argmin compiled" and (workload, spread) != ("ade512", 0.3):
        pytest.skip("does not depend on the spread, and takes long to compile")
    work = workloads(workload, spread)
    run = search_entry(entry, work)
    wrong = assert_finds(run, entry, work)
    moved = (
        work.pixels * (3 * (2 if "bf16" in entry else 4) + work.label_dtype.itemsize) if entry.startswith("ours") else 0
    )
    measure(run, work, "nearest_centroid", entry, spread=True, moved=moved, wrong_pixels=wrong)


def assert_counts(run, entry, work):
    i = work.sets[0]
    with backend_of(entry):
        got = run(i)
    with fk.use_backend("reference"):
        want = fk.decode_confusion(i["x"], i["labels"], work.codebook)
    assert (got - want).abs().sum() <= (0 if entry in OURS else 60)


@pytest.mark.parametrize("entry", [*OURS, "eager"])
@pytest.mark.parametrize("workload", NAMES)
def test_decode_confusion(workloads, measure, workload, entry):
    """Decoding and counting; the plain form decodes with cdist, which may take a near pixel for another."""
    skip_unless_it_runs(entry, "decode_confusion")
    work = workloads(workload, 0.1)
    mu = work.codebook.centroids

    def run(i):
        if entry in OURS:
            return fk.decode_confusion(i["x"], i["labels"], work.codebook)
        return plain.confusion(i["x"], i["labels"].long(), mu)

    assert_counts(run, entry, work)
    moved = work.pixels * (12 + work.label_dtype.itemsize) if entry in OURS else 0
    measure(run, work, "decode_confusion", entry, spread=True, moved=moved)


#: Pixels that are judged.
JUDGED = 1 << 18


def smallest_distances(rows, mu):
    """Squared distances to the nearest centroids, in fp64 and without expanded squares."""
    parts = rows[:JUDGED].double().split(max(1, (1 << 24) // len(mu)))
    exact = "donot_use_mm_for_euclid_dist"
    return torch.cat([torch.cdist(part, mu.double(), compute_mode=exact).min(1).values.square() for part in parts])


def wrong_pixels(labels, rows, mu, best):
    """Pixels whose label is farther than the nearest by more than fp32 rounding."""
    rows, labels = rows[:JUDGED], labels.flatten()[:JUDGED]
    mine = (rows.double() - mu[labels.to(mu.device).long()].double()).square().sum(1)
    return int((mine - best > 1e-6 * best + 1e-12).sum())
