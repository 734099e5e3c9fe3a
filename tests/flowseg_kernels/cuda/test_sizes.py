"""Sizes that would overflow 32-bit arithmetic or a histogram in shared memory, in the CUDA kernels on the host.

The huge tensors take memory only for the pages that are written. In the largest image only the last blocks of a launch run.
"""

import mmap

import pytest
import torch

import flowseg_kernels as fk

from ...host_cuda import kernels as host_kernels
from ...support.samples import decode_tables, image_batch

NO_RESERVE = 0x4000  # MAP_NORESERVE of Linux: a page takes memory only once it is written
BEYOND = 2**31 + 8


def unfilled(count, dtype):
    """Return `count` zeros; only the pages that are written take memory."""
    pages = mmap.mmap(-1, count * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE)
    return torch.frombuffer(pages, dtype=dtype)


def far_apart(x, axis):
    """Copy x to a view whose stride along one axis is beyond 32 bits."""
    order = [axis, *(i for i in range(x.dim()) if i != axis)]
    small = x.permute(order).contiguous()
    store = unfilled(BEYOND * (small.shape[0] - 1) + small[0].numel(), x.dtype)
    view = store.as_strided(small.shape, (BEYOND, *small.stride()[1:]))
    view.copy_(small)
    return view.permute([order.index(i) for i in range(x.dim())])


@pytest.mark.parametrize("axis", [1, 2])
def test_channels_and_rows_beyond_32_bits(backend, axis):
    book = fk.Codebook(fk.kronecker_centroids(19, 3))
    x, source, labels, t = image_batch(book.centroids, 2, 3, 11, dtype=torch.float16)
    labels = labels.to(torch.uint8)
    label_axis = {1: 0, 2: 1}[axis]  # labels have no channels: their batch goes with the channels of x
    far = [far_apart(x, axis), far_apart(source, axis), far_apart(labels, label_axis)]
    assert all(v.stride(a) == BEYOND for v, a in zip(far, (axis, axis, label_axis)))
    for got, want in zip(everything(*far, t, book), everything(x, source, labels, t, book)):
        assert torch.equal(got, want)


def everything(x, source, labels, t, book):
    """The results of the ops."""
    loss, decoded = fk.flow_loss(x, source, labels, t, book), fk.nearest_centroid(x, book, return_margin=True)
    return loss, fk.distance_correction(x, labels, book), *decoded, fk.decode_confusion(x, labels, book)


@pytest.fixture
def last_blocks(kernels):
    """Run only the last three blocks of each launch."""
    host_kernels.call("run_last_blocks", 3)
    yield
    host_kernels.call("run_last_blocks", 2**62)


def test_an_image_of_more_than_two_to_the_32_pixels(last_blocks):
    """Positions of pixels, planes and results need 64 bits at the end of the last plane."""
    rows, columns, end = 2**16 + 1, 2**16, 100
    pixels = rows * columns
    book = fk.Codebook(fk.kronecker_centroids(19, 3))
    near, _, labels_near, _ = image_batch(book.centroids, 1, 1, end, dtype=torch.float16, ignored=0)
    x, labels = unfilled(3 * pixels, torch.float16), unfilled(pixels, torch.uint8)
    x.view(3, pixels)[:, -end:] = near[0, :, 0]
    labels[-end:] = labels_near[0, 0]
    x, labels = x.view(1, 3, rows, columns), labels.view(1, rows, columns)
    with fk.use_backend("reference"):
        want = fk.nearest_centroid(near, book, out_dtype=torch.uint8)[0, 0]
        corrected = fk.distance_correction(near.float(), labels_near, book, eps=1e-3)[0, :, 0]
    for grid in (decode_tables(book.centroids), ([], 0.0, 1.0)):
        found = unfilled(pixels, torch.uint8)
        host_kernels.nearest_centroid(x, book.centroids, *grid, found.view(1, rows, columns), None, None, 255)
        assert torch.equal(found[-end:], want)
    out = unfilled(3 * pixels, torch.float16)
    options = (1.0, 1e-3, 0, float("inf"), 255)
    host_kernels.call("distance_correction", x, labels, book.centroids, *options, out.view(x.shape))
    torch.testing.assert_close(out.view(3, pixels)[:, -end:].float(), corrected, rtol=2e-3, atol=2e-3)
    assert not out[:end].any()  # the first blocks did not run


@pytest.mark.parametrize("channels, classes", [(2, 128), (2, 129), (3, 152), (3, 153), (4, 127), (4, 128)])
def test_the_histogram_moves_to_global_memory(backend, channels, classes):
    """The largest number of classes at which the histogram and the decoding fit into the 48 KiB of shared memory that the host
    build reports, and one class more."""
    book = fk.Codebook(fk.kronecker_centroids(classes, channels))
    x, _, target, _ = image_batch(book.centroids, 1, 20, 33)
    decoded, valid = fk.nearest_centroid(x, book), target != 255
    want = torch.bincount((target * classes + decoded)[valid], minlength=classes**2).view(classes, classes)
    assert torch.equal(fk.decode_confusion(x, target, book), want)


def test_a_block_full_of_one_class_does_not_overflow_its_counts(backend):
    """Two 16-bit counts share a word."""
    book = fk.Codebook(fk.kronecker_centroids(4, 3))
    target = torch.full((1, 150, 223), 1)  # the pixels of one full block and a part of another
    target[0, -1, -5:] = 0
    prediction = torch.where(target == 0, 0, 2)
    counts = fk.decode_confusion(book.encode(prediction), target, book)
    assert counts[1, 2] == target.numel() - 5 and counts[0, 0] == 5 and counts.sum() == target.numel()
