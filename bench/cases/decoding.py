"""Entries of `nearest_centroid` and the count of wrong pixels: ours, faiss, scipy's k-d tree, KeOps, torch.cdist, Pillow."""

import numpy as np
import pytest
import torch

import flowseg_kernels as fk

from .. import plain
from ..settings import OURS, backend_of
from .availability import peer

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
#: Pixels that the check looks at, fewer among many classes: at most so many pairs of a pixel and a class.
CHECKED, CHECKED_PAIRS = 1 << 18, 1 << 30


def point_rows(inputs):
    """x as (pixels, C)."""
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
    """The assignment step of k-means; it includes the squared norms, which the caller must compute."""
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


def checked_pixels(classes):
    return min(CHECKED, CHECKED_PAIRS // classes)


def smallest_distances(rows, mu):
    """Squared distances to the nearest centroids, in fp64 and without expanding the squares."""
    parts = rows[: checked_pixels(len(mu))].double().split(max(1, (1 << 24) // len(mu)))
    exact = "donot_use_mm_for_euclid_dist"
    return torch.cat([torch.cdist(part, mu.double(), compute_mode=exact).min(1).values.square() for part in parts])


def wrong_pixels(labels, rows, mu, smallest):
    """The number of pixels with a label farther than the nearest centroid by more than fp32 rounding."""
    rows, labels = rows[: len(smallest)], labels.flatten()[: len(smallest)]
    found = (rows.double() - mu[labels.to(mu.device).long()].double()).square().sum(1)
    return int((found - smallest > 1e-6 * smallest + 1e-12).sum())


def assert_finds(run, entry, work):
    """Every label of ours names a nearest centroid. Returns how many pixels a peer gets wrong."""
    for inputs in work.sets:
        inputs.setdefault("rows", point_rows(inputs))
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
        # Peers that expand the squares, or use 8-bit tables, are inexact; the rendered table says by how many pixels.
        assert wrong < max(30, 1e-4 * len(rows))
    return wrong


def assert_counts(run, entry, work):
    """The confusion counts of the entry equal the reference's; cdist may differ by 60 counts."""
    i = work.sets[0]
    with backend_of(entry):
        got = run(i)
    with fk.use_backend("reference"):
        want = fk.decode_confusion(i["x"], i["labels"], work.codebook)
    assert (got - want).abs().sum() <= (0 if entry in OURS else 60)
