"""Sizes at which 32-bit arithmetic, or a histogram in shared memory, would go wrong: the emulated CUDA kernels on memory that is
never filled, in the last blocks of an image alone."""

import mmap

import numpy as np
import pytest
import torch

import flowseg_kernels as fk

from ...support.samples import decode_tables, image_batch
from . import emulated

NO_RESERVE = 0x4000  # of Linux: pages are taken when they are first written
BEYOND = 2**31 + 8


def unfilled(count, dtype):
    """`count` zeros, of which only those that are written take memory."""
    size = count * np.dtype(dtype).itemsize
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE)
    return np.frombuffer(pages, dtype)


def far_apart(x, axis):
    """x with the stride of one axis beyond 32 bits."""
    order = [axis, *(i for i in range(x.dim()) if i != axis)]
    small = x.permute(order).contiguous()
    store = torch.from_numpy(unfilled(BEYOND * (small.shape[0] - 1) + small[0].numel(), x.numpy().dtype))
    view = store.as_strided(small.shape, (BEYOND, *small.stride()[1:]))
    view.copy_(small)
    return view.permute([order.index(i) for i in range(x.dim())])


@pytest.mark.parametrize("axis", [1, 2])
def test_channels_and_rows_beyond_32_bits(backend, axis):
    book = fk.Codebook(fk.kronecker_centroids(19, 3))
    x, source, labels, t = image_batch(book.centroids, 2, 3, 11, dtype=torch.float16)
    labels = labels.to(torch.uint8)
    far = [far_apart(x, axis), far_apart(source, axis), far_apart(labels, (None, 0, 1)[axis])]
    assert all(v.stride(a) == BEYOND for v, a in zip(far, (axis, axis, (None, 0, 1)[axis])))
    for got, want in zip(everything(*far, t, book), everything(x, source, labels, t, book)):
        assert torch.equal(got, want)


def everything(x, source, labels, t, book):
    loss, decoded = fk.flow_loss(x, source, labels, t, book), fk.nearest_centroid(x, book, return_margin=True)
    return loss, fk.distance_correction(x, labels, book), *decoded, fk.decode_confusion(x, labels, book)


@pytest.fixture
def last_blocks(kernels):
    emulated.module().run_last_blocks(3)
    yield
    emulated.module().run_last_blocks(2**62)


def test_an_image_of_more_than_two_to_the_32_pixels(last_blocks):
    """Positions of pixels, planes and results that only 64 bits hold, seen at the end of the last plane."""
    rows, columns, end = 2**16 + 1, 2**16, 100
    pixels = rows * columns
    book = fk.Codebook(fk.kronecker_centroids(19, 3))
    near, _, labels_near, _ = image_batch(book.centroids, 1, 1, end, dtype=torch.float16, ignored=0)
    x, labels = unfilled(3 * pixels, np.float16), unfilled(pixels, np.uint8)
    for c in range(3):
        x[(c + 1) * pixels - end : (c + 1) * pixels] = near[0, c, 0].numpy()
    labels[-end:] = labels_near[0, 0].numpy()
    image, plane = (1, 3, rows, columns), (1, rows, columns)
    mu, module = book.centroids.numpy(), emulated.module()
    grid = [v if v is None or isinstance(v, float) else v.numpy() for v in decode_tables(book.centroids)]
    with fk.use_backend("reference"):
        want = fk.nearest_centroid(near, book)[0, 0].numpy()
        corrected = fk.distance_correction(near.float(), labels_near, book, eps=1e-3)[0, :, 0].numpy()
    for lists in (grid, [None, None, None, 0.0, 1.0]):
        found = unfilled(pixels, np.uint8)
        module.nearest_centroid(x.reshape(image), mu, *lists, found.reshape(plane), None, None, 255)
        assert (found[-end:] == want).all()
    out = unfilled(3 * pixels, np.float16)
    module.distance_correction(
        x.reshape(image), labels.reshape(plane), mu, 1.0, 1e-3, 0, float("inf"), 255, out.reshape(image)
    )
    for c in range(3):
        got = out[(c + 1) * pixels - end : (c + 1) * pixels].astype(np.float32)
        assert np.allclose(got, corrected[c], rtol=2e-3, atol=2e-3)
    assert not out[:end].any()  # of the first blocks, which did not run


@pytest.mark.parametrize("channels, classes", [(3, 152), (3, 153), (4, 128), (4, 129)])
def test_the_histogram_moves_to_global_memory(backend, channels, classes):
    """The most classes whose counts fit into 48 KiB of shared memory, which the shim has, beside what decoding needs there,
    and one more."""
    book = fk.Codebook(fk.kronecker_centroids(classes, channels))
    x, _, target, _ = image_batch(book.centroids, 1, 20, 33)
    decoded, valid = fk.nearest_centroid(x, book), target != 255
    want = torch.bincount((target * classes + decoded)[valid], minlength=classes**2).view(classes, classes)
    assert torch.equal(fk.decode_confusion(x, target, book), want)


def test_a_block_full_of_one_class_does_not_overflow_its_counts(backend):
    """Two counts of 16 bits share a word."""
    book = fk.Codebook(fk.kronecker_centroids(4, 3))
    target = torch.full((1, 150, 223), 1)  # a full block and a part of another
    target[0, -1, -5:] = 0
    prediction = torch.where(target == 0, 0, 2)
    counts = fk.decode_confusion(book.encode(prediction), target, book)
    assert counts[1, 2] == target.numel() - 5 and counts[0, 0] == 5 and counts.sum() == target.numel()
