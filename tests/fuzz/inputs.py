"""Make the tensors of a case."""

from __future__ import annotations

import copy
import functools
import warnings

import torch

import flowseg_kernels as fk
from flowseg_kernels.decode_tables import decode_tables
from flowseg_kernels.derived import derived_from

from .cases import Pixels


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """x in a memory layout. "expanded" layouts repeat the first entry of a dimension, so their values differ from x."""
    family, _, number = layout.partition("_")
    if family == "expanded":
        dims = range(x.ndim) if number == "all" else [min(int(number), x.ndim - 1)]
        part = x.clone()
        for dim in dims:
            if x.shape[dim]:
                part = part.narrow(dim, 0, 1)
        return part.expand(x.shape)
    if family == "offset":
        flat = torch.zeros(x.numel() + int(number), dtype=x.dtype)
        flat[int(number) :] = x.flatten()
        return flat[int(number) :].view(x.shape)
    if layout == "channels_last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "transposed":
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "every_second":
        padded = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 1), 99, dtype=x.dtype)
        padded[..., 1::2] = x
        return padded[..., 1::2]
    if layout == "reversed_dims":
        order = tuple(reversed(range(x.ndim)))
        return x.permute(order).contiguous().permute(order)
    return x.contiguous()


@functools.lru_cache(maxsize=512)
def _codebook(codes: str, classes: int, channels: int) -> fk.Codebook:
    if codes == "lattice":
        # Multiples of 1/4: distances between lattice points are exact in fp32, so ties are exact too.
        side = torch.Generator().manual_seed(classes * 31 + channels)
        mu = torch.randint(-4, 5, (classes, channels), generator=side).float() / 4
    elif codes == "doubled":
        mu = fk.kronecker_centroids((classes + 1) // 2, channels).repeat(2, 1)[:classes]
    elif codes == "grid":
        mu = fk.grid_centroids(classes, channels)
    elif codes == "r_sequence":
        mu = fk.kronecker_centroids(classes, channels, sequence="r_sequence")
    else:
        mu = fk.kronecker_centroids(classes, channels, dtype=torch.float64 if codes == "fp64" else torch.float32)
    if codes in ("large", "small", "shifted"):
        mu = mu * {"large": 1e3, "small": 1e-3}.get(codes, 1) + (5.0 if codes == "shifted" else 0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fk.Codebook(mu)


def codebook(case: Pixels) -> fk.Codebook:
    book = copy.copy(_codebook(case.codes, case.classes, case.channels))
    book.ignore_index = case.ignore
    return book


def changed(case: Pixels, book: fk.Codebook) -> fk.Codebook:
    """The codebook with its tensors changed by `case.change`."""
    if case.change is None:
        return book
    book = copy.deepcopy(book)
    codes, make = book.centroids, torch.Generator().manual_seed(case.seed)
    if case.change == "moved":
        codes.data.mul_(0.9).add_(0.01)
    elif case.change == "shuffled":
        codes.copy_(codes[torch.randperm(len(codes), generator=make)].clone())
    elif case.change == "filled":
        codes.numpy()[...] = 0.25
    elif case.change == "replaced":
        book.centroids = torch.rand(codes.shape, generator=make, dtype=codes.dtype) * 200 - 100
    elif case.change == "averaged":
        codes.lerp_(torch.randn(codes.shape, generator=make, dtype=codes.dtype), 1e-3)
    elif case.change in ("bfloat16", "float16"):
        codes.data = codes.to(getattr(torch, case.change))
    elif case.change == "grid":
        for table in (book._cells, book._records, book._groups):
            if table is not None:
                table.fill_(2**30)
    elif case.change in ("nan", "inf"):
        codes.view(-1)[case.seed % codes.numel()] = float(case.change)
    elif case.change == "integers":
        codes.data = codes.long()
    elif case.change == "flat":
        codes.data = codes.flatten()
    elif case.change == "none":
        codes.data = codes[:0]
    else:
        book.centroids = codes.to("meta")
    return book


def _with_specials(case: Pixels, name: str, x: torch.Tensor, book: fk.Codebook) -> torch.Tensor:
    """x (B, C, H, W), fp64, with the special values of the case."""
    mu = book.centroids.double()
    points = x.movedim(1, -1).clone(memory_format=torch.contiguous_format).view(-1, case.channels)
    for tensor, place, special in case.specials:
        if tensor != name or not len(points):
            continue
        at, channel = place % len(points), place % case.channels
        a, b = mu[place % len(mu)], mu[(place // 7) % len(mu)]
        if special == "code":
            points[at] = a
        elif special == "between":
            points[at] = (a + b) / 2
        elif special == "near_code":
            points[at] = a + 1e-6
        elif special == "border":
            tables = decode_tables(derived_from(book.centroids), torch.device("cpu")) if case.grid else (0.0,) * 3
            low, scale = tables[1:]
            scale = scale or 16.0
            edge = torch.tensor(low + (place % 65) / scale, dtype=torch.float32)
            points[at, channel] = torch.nextafter(edge, edge + (place % 3 - 1)).double()
        else:
            points[at, channel] = float(special)
    return points.view(x.shape[0], *x.shape[2:], case.channels).movedim(-1, 1)


def tensors(case: Pixels):
    """(codebook, image, source, labels, t, gradient of an image) of a case."""
    make = torch.Generator().manual_seed(case.seed)
    book = codebook(case)
    mu = book.centroids.double()
    shape = (case.batch, case.channels, case.height, case.width)
    plane = (case.batch, case.height, case.width)
    normal = lambda *s: torch.randn(*s, generator=make, dtype=torch.float64)  # noqa: E731
    labels = torch.randint(0, case.classes, plane, generator=make)
    x = mu[labels].movedim(-1, 1) + case.spread * normal(*shape) * float(mu.abs().max().clamp_min(1e-3))
    x = x * case.magnitude
    source = (2 * torch.rand(*shape, generator=make, dtype=torch.float64) - 1) * case.magnitude
    if case.exact:
        x, source = ((v * 8).round() / 8 for v in (x, source))
    x, source = _with_specials(case, "image", x, book), _with_specials(case, "source", source, book)
    if (
        torch.iinfo(getattr(torch, case.label_dtype)).min
        <= case.ignore
        <= torch.iinfo(getattr(torch, case.label_dtype)).max
    ):
        labels = torch.where(torch.rand(plane, generator=make) < case.ignored, case.ignore, labels)
    bad = case.bad_label
    if bad is not None and labels.numel() and not (case.label_dtype == "uint8" and not 0 <= bad <= 255):
        labels.view(-1)[case.seed % labels.numel()] = bad
    t = torch.rand(case.batch, generator=make, dtype=torch.float64)
    if case.times == "ends":
        t = t.round()
    elif case.times == "near_one":
        t = 1 - t * 1e-3
    x, source = x.to(getattr(torch, case.dtype)), source.to(getattr(torch, case.source_dtype))
    labels, t = labels.to(getattr(torch, case.label_dtype)), t.to(getattr(torch, case.time_dtype))
    grad = normal(*shape).to(source.dtype)
    x, source, labels, grad = (laid_out(v, how) for v, how in zip((x, source, labels, grad), case.layouts))
    return book, x, source, labels, t, grad
