"""Threads, forked and spawned processes, and objects that are copied between them."""

import concurrent.futures
import copy
import pickle

import pytest
import torch

import flowseg_kernels as fk
from flowseg_kernels.runtime.backend import requested_backend

from .steps import EveryOp, batch


class Decoded(torch.utils.data.Dataset):
    """A data set that calls ops in the worker process: it encodes and decodes labels."""

    def __init__(self, codes):
        self.codes = codes

    def __len__(self):
        return 8

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        labels = torch.randint(0, self.codes.num_classes, (1, 96, 64), generator=generator)
        x = self.codes.encode(labels) + 0.01
        loss = fk.flow_loss(x.requires_grad_(), torch.zeros_like(x), labels, torch.zeros(1), self.codes)
        loss.backward()
        return labels[0], self.codes.decode(x.detach())[0], x.grad[0]


@pytest.mark.parametrize("method, workers", [("fork", 2), ("spawn", 1)])
def test_workers_of_a_data_loader_call_ops(codes19, method, workers):
    data, threads, seen = Decoded(codes19), torch.get_num_threads(), 0
    torch.set_num_threads(2)
    try:
        wanted = [
            data[i] for i in range(8)
        ]  # large enough for two threads: the parent's thread pool runs before it forks
        loader = torch.utils.data.DataLoader(
            data, batch_size=4, num_workers=workers, multiprocessing_context=method, timeout=120
        )
        for labels, decoded, grads in loader:
            assert torch.equal(decoded, labels)
            for grad in grads:
                assert torch.equal(grad, wanted[seen][2])
                seen += 1
    finally:
        torch.set_num_threads(threads)
    assert seen == 8


def test_each_thread_has_its_own_backend_and_the_same_results(codes19, patch_chunk):
    """A use_backend block applies to its own thread only, and concurrent steps do not disturb each other."""
    source, labels, t = batch(codes19, 2, 32, 48)
    step = EveryOp(codes19, patch_chunk=patch_chunk and 24)
    names = fk.available_backends("flow_loss")

    def work(index):
        assert requested_backend() == ""
        name = names[index % len(names)]
        with fk.use_backend(name):
            for _ in range(3):
                outs = step(source, labels, t)
                grads = torch.autograd.grad(outs[0], list(step.parameters()))
                assert requested_backend() == name
        return name, [*outs, *grads]

    with concurrent.futures.ThreadPoolExecutor(6) as pool, fk.use_backend("reference"):
        results = list(pool.map(work, range(12)))
        assert requested_backend() == "reference"
    for name in names:
        first, *others = [outs for chosen, outs in results if chosen == name]
        for other in others:
            assert all(torch.equal(a, b) for a, b in zip(first, other))


@pytest.mark.parametrize("sequence, ignore", [("sqrt_primes", 255), ("r_sequence", -1)])
def test_codebooks_and_modules_survive_pickle_copies_and_state_dicts(sequence, ignore):
    """Codes, decode grid and ignored label after pickle, deepcopy and load_state_dict."""
    book = fk.Codebook(fk.kronecker_centroids(40, sequence=sequence), ignore_index=ignore)
    loaded = fk.Codebook(fk.kronecker_centroids(3))
    loaded.load_state_dict(book.state_dict())
    x = torch.randn(1, 3, 20, 20)
    x[..., 0, 0] = torch.nan
    for other in (pickle.loads(pickle.dumps(book)), copy.deepcopy(book), loaded):
        assert torch.equal(other.centroids, book.centroids) and other.ignore_index == ignore
        assert (other.num_classes, other.default_eps) == (40, book.default_eps)
        assert torch.equal(other.decode(x), book.decode(x)) and book.decode(x)[0, 0, 0] == ignore
    module = fk.CentroidDecoder(book, return_margin=True)
    for other in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
        assert all(torch.equal(a, b) for a, b in zip(other(x), module(x)) if a.dtype == torch.int64)
    decoder = fk.NeuralFieldDecoder(6, hidden=8, depth=1, patch_size=4, max_freqs=2)
    torch.nn.init.normal_(decoder.final_layer.linear.weight)
    s = torch.randn(1, 25, 6)
    for other in (pickle.loads(pickle.dumps(decoder)), copy.deepcopy(decoder)):
        assert torch.equal(other(x.nan_to_num(), s), decoder(x.nan_to_num(), s))
