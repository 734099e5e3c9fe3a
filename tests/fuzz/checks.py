"""Run a case on a backend and compare all results and gradients with fp64."""

from __future__ import annotations

import collections
import contextlib

import torch

import flowseg_kernels as fk
from flowseg_kernels.runtime.checks import compute_dtype

from ..support.neural_field import pixnerd_field
from . import exact
from .cases import INVALID, Field, Pixels
from .exact import Answer
from .inputs import changed, laid_out, tensors

#: Counts of "numbers" that were checked and of "free" numbers without a bound.
seen: collections.Counter[str] = collections.Counter()


class Wrong(AssertionError):
    """A result outside its bound."""


def agree(name: str, got: torch.Tensor, want: Answer) -> None:
    """Raise Wrong unless got is want.value within want.bound plus one rounding to its dtype; NaN and infinities must match."""
    dtype = torch.finfo(got.dtype)
    value = got.detach().double()
    off = (value - want.value).abs()
    half = 0.501 * dtype.eps * want.value.abs() + 0.51 * dtype.tiny * dtype.eps
    near = off <= want.bound + half
    same = (value == want.value) | (value.isnan() & want.value.isnan())
    # A true value beyond the range of the dtype must come out as inf.
    too_large = want.value.abs() + want.bound >= dtype.max * (1 + dtype.eps / 4) * (1 - dtype.eps / 2)
    over = value.isinf() & too_large & (value.sign() == want.value.sign())
    right = near | same | over | want.free
    seen["numbers"] += got.numel()
    seen["free"] += int(want.free.sum())
    if not bool(right.all()):
        at = tuple((~right).nonzero()[0].tolist())
        raise Wrong(
            f"{name} at {at}: got {value[at].item():.9g}, wanted {want.value[at].item():.9g} within "
            f"{want.bound[at].item():.3g}; {int((~right).sum())} of {right.numel()} are wrong"
        )


@contextlib.contextmanager
def poisoned():
    """Fill uninitialised memory with NaN, so numbers that a kernel does not write are found."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def unchanged(inputs, before) -> None:
    for tensor, kept in zip(inputs, before):
        if not torch.equal(tensor.detach().nan_to_num(), kept.nan_to_num()):
            raise Wrong("an input was changed")


def check(op: str, case: Pixels | Field, backend: str) -> None:
    """Raise Wrong if a result or gradient of the op on `backend` breaks the contract.

    Any other exception of the call is a failure too, except the error for a bad label on the CPU.
    """
    with poisoned(), fk.use_backend(backend):
        if isinstance(case, Field):
            return check_field(case, backend)
        globals()[f"check_{op}"](case, backend)


class _Call:
    """Inputs of a per-pixel op, as given and in fp64."""

    def __init__(self, case: Pixels, backend: str, leader: str):
        self.case, self.backend = case, backend
        self.book, self.x, self.source, self.labels, self.t, self.grad = tensors(case)
        known = self.book.centroids
        self.book = changed(case, self.book)
        dtype = compute_dtype((self.x if leader == "x" else self.source).dtype)
        self.u = torch.finfo(dtype).eps
        self.codes = self.book.centroids if case.bare else self.book
        # Expected values use the codes from before a cast; an invalid codebook has no expected values.
        mu = known if case.change in (*INVALID, "bfloat16", "float16") else self.book.centroids
        self.mu = mu.to(dtype).double()
        self.time = self.t.to(dtype).double()
        self.before = [v.clone() for v in (self.x, self.source, self.labels, self.t)]

    @property
    def eps(self):
        eps = self.case.options.get("eps")
        return self.book.default_eps if eps is None else eps

    def given(self):
        """The options of the public function."""
        options = {**self.case.options, "ignore_index": self.case.ignore}
        if self.case.bare and "eps" in options:
            options["eps"] = self.eps
        return options

    def has_bad_label(self) -> bool:
        y = self.labels.long()
        return bool((((y < 0) | (y >= self.case.classes)) & (y != self.case.ignore)).any())

    def is_refused(self, call) -> bool:
        """Whether the codebook is invalid; call() must then raise an error about it."""
        if self.case.change not in INVALID:
            return False
        try:
            call()
        except (TypeError, ValueError) as error:
            if str(error).startswith(("centroids: wanted", "codebook: wanted")):
                return True
            raise
        raise Wrong("an invalid codebook raised no error")

    def run(self, call):
        """The result of call(), or None if it raised the expected error for a bad label on the CPU or for an invalid codebook."""
        if self.is_refused(call):
            return None
        if self.backend in ("cpu", "reference") and self.has_bad_label():
            try:
                call()
            except ValueError as error:
                if "wanted values in [0, " not in str(error):
                    raise
                return None
            raise Wrong("a label that is no class raised no error")
        result = call()
        unchanged((self.x, self.source, self.labels, self.t), self.before)
        return result


def check_flow_interpolate(case: Pixels, backend: str) -> None:
    c = _Call(case, backend, "source")
    source, t = c.source.requires_grad_(), c.t.requires_grad_()
    out = c.run(lambda: fk.flow_interpolate(source, c.labels, t, c.codes, ignore_index=case.ignore))
    if out is None:
        return
    x0 = source.detach().double()
    agree("x_t", out, exact.interpolate(x0, c.labels, c.time, c.mu, case.ignore, c.u))
    by_source, by_time = torch.autograd.grad(out, (source, t), c.grad)
    want_source, want_time = exact.interpolate_backward(c.grad.double(), x0, c.labels, c.time, c.mu, case.ignore, c.u)
    agree("grad_source", by_source, want_source)
    agree("grad_t", by_time, want_time)


def _correction_options(c: _Call) -> dict:
    options = c.case.options
    return {
        "temperature": options["temperature"], "eps": c.eps, "transform": options["transform"], "max_norm": options["max_norm"],
    }  # fmt: skip


def check_distance_correction(case: Pixels, backend: str) -> None:
    c = _Call(case, backend, "x")
    got = c.run(lambda: fk.distance_correction(c.x, c.labels, c.codes, **c.given()))
    if got is None:
        return
    if got.dtype != c.x.dtype or not got.is_contiguous() or got.requires_grad:
        raise Wrong("dtype, layout or requires_grad of the correction")
    agree(
        "correction",
        got,
        exact.correction(c.x.double(), c.labels, c.mu, ignore=case.ignore, u=c.u, **_correction_options(c)),
    )


def check_flow_loss(case: Pixels, backend: str) -> None:
    c = _Call(case, backend, "x")
    x, options = c.x.requires_grad_(), case.options
    got = c.run(lambda: fk.flow_loss(x, c.source, c.labels, c.t, c.codes, **c.given()))
    if got is None:
        return
    each, residual, valid = exact.loss(
        x.detach().double(), c.source.double().to(compute_dtype(x.dtype)).double(), c.labels, c.time, c.mu,
        predicts=options["predicts"], space=options["loss_space"] or options["predicts"], weight=options["correction_weight"],
        schedule=options["schedule"], t_min=options["t_min"], ignore=case.ignore, u=c.u, **_correction_options(c),
    )  # fmt: skip
    count = max(int(valid.sum()), 1)
    reduction = options["reduction"]
    share = 1 / count if reduction == "mean" else 1.0
    if reduction == "none":
        agree("loss", got, each)
        arrives = laid_out(torch.randn(got.shape, generator=torch.Generator().manual_seed(case.seed)), case.layouts[3])
        arrives = arrives.to(got.dtype)
        factor = arrives.double()[:, None]
    else:
        total = each.value.sum() * share
        off = each.bound.sum() * share + (4 * c.u + each.value.numel() * exact.ROUNDING) * total.abs()
        agree("loss", got, Answer(total, off.nan_to_num(), each.free.any()))
        arrives = torch.tensor(0.7, dtype=got.dtype)
        factor = arrives.double() * share
    (grad,) = torch.autograd.grad(got, x, arrives)
    # The residual is stored in the dtype of the prediction, which adds one rounding and limits its range.
    stored = torch.finfo(x.dtype)
    rounding = 0.501 * stored.eps * residual.value.abs() + 0.51 * stored.tiny * stored.eps
    free = residual.free | ((residual.value.abs() + residual.bound > stored.max * 0.99) & residual.value.isfinite())
    want = Answer(
        residual.value * factor,
        ((residual.bound + rounding) * factor.abs() + 4 * c.u * (residual.value * factor).abs()).nan_to_num(posinf=0),
        free,
    )
    agree("grad_prediction", grad, want)


def _allowed(c: _Call, d: torch.Tensor) -> torch.Tensor:
    """(B, K, H, W): the classes that are an allowed answer, because their distance is the smallest within rounding.

    Where every operation is exact, only the lowest index among equal distances is allowed.
    """
    small = c.u > 1e-10
    finite = d.nan_to_num(nan=torch.inf)
    if small:
        finite = torch.where(finite > exact.HUGE, torch.inf, finite)
    nearest = finite.amin(1, keepdim=True)
    first = torch.zeros_like(d, dtype=torch.bool).scatter_(1, (finite == nearest).int().argmax(1, keepdim=True), True)
    off = 2 * (c.case.channels + 3) * c.u
    close = finite <= nearest * (1 + off) + (8 * c.case.channels * exact.SMALLEST if small else 0)
    # Multiples of 2^-6 up to 32 have exact squares and sums.
    x, mu = c.x.double(), c.mu
    whole = ((x * 64).round() == x * 64).all(1, keepdim=True) & (x.abs() <= 32).all(1, keepdim=True)
    whole = whole & bool(((mu * 64).round() == mu * 64).all() and (mu.abs() <= 32).all())
    # Equal codes have equal distances in any arithmetic, so only the first of them is allowed.
    same = (mu[:, None] == mu[None]).all(-1)
    is_first = (same.int().argmax(1) == torch.arange(len(mu)))[None, :, None, None]
    overflow = nearest.isinf() & ~(d.isinf().all(1, keepdim=True)) & small
    return torch.where(whole | (nearest.isinf() & ~overflow), first, close & is_first | first)


def check_nearest_centroid(case: Pixels, backend: str) -> None:
    c = _Call(case, backend, "x")
    dtype = getattr(torch, case.options["out_dtype"])
    wants = [case.options["return_distance"], case.options["return_margin"]]
    options = {"out_dtype": dtype, "return_distance": wants[0], "return_margin": wants[1], "ignore_index": case.ignore}
    if c.is_refused(lambda: fk.nearest_centroid(c.x, c.codes, **options)):
        return
    found = fk.nearest_centroid(c.x, c.codes, **options)
    unchanged((c.x,), c.before)
    labels, *more = found if any(wants) else (found,)
    x = c.x.double()
    if labels.dtype != dtype or labels.shape != (x.shape[0], *x.shape[2:]):
        raise Wrong("dtype or shape of the labels")
    _, d = exact.distances(x, c.mu)
    unknown = x.isnan().any(1)
    y = labels.long()
    inside = (y >= 0) & (y < case.classes)
    right = torch.where(
        unknown, y == case.ignore, inside & _allowed(c, d).gather(1, torch.where(inside, y, 0)[:, None])[:, 0]
    )
    seen["numbers"] += y.numel()
    if not bool(right.all()):
        at = tuple((~right).nonzero()[0].tolist())
        raise Wrong(f"label at {at}: got {y[at].item()}; distances {d[at[0], :, at[1], at[2]].tolist()[:20]}")
    smallest = d.topk(min(2, case.classes), dim=1, largest=False).values
    root = smallest.sqrt()
    off = (case.channels + 4) * c.u * root + (2e-22 * case.channels if c.u > 1e-10 else 0)
    # Near the largest fp32 number the square may or may not overflow.
    free = (
        (smallest > exact.HUGE * 0.9) & smallest.isfinite()
        if c.u > 1e-10
        else torch.zeros_like(smallest, dtype=torch.bool)
    )
    if wants[0]:
        value = root[:, 0].masked_fill(unknown, torch.nan)
        agree("distance", more[0], Answer(value, off[:, 0].nan_to_num(posinf=0), free[:, 0] & ~unknown))
    if wants[1]:
        if case.classes == 1:
            value, bound = torch.full_like(root[:, 0], torch.inf), torch.zeros_like(root[:, 0])
            value = value.masked_fill(root[:, 0].isinf(), torch.nan)
        else:
            value, bound = root[:, 1] - root[:, 0], (off[:, 0] + off[:, 1]).nan_to_num(posinf=0)
        value = value.masked_fill(unknown, torch.nan)
        agree("margin", more[-1], Answer(value, bound, free.any(1) & ~unknown))


def check_class_probabilities(case: Pixels, backend: str) -> None:
    c = _Call(case, backend, "x")
    options = {**case.options, "eps": c.eps if case.bare else case.options["eps"]}
    if c.is_refused(lambda: fk.class_probabilities(c.x, c.codes, **options)):
        return
    got = fk.class_probabilities(c.x, c.codes, **options)
    unchanged((c.x,), c.before)
    if got.dtype != compute_dtype(c.x.dtype) or not got.is_contiguous():
        raise Wrong("dtype or layout of the probabilities")
    agree("probabilities", got, exact.probabilities(c.x.double(), c.mu, u=c.u, **{**options, "eps": c.eps}))


def check_top_classes(case: Pixels, backend: str) -> None:
    c = _Call(case, backend, "x")
    options = {**case.options, "eps": c.eps if case.bare else case.options["eps"]}
    k = min(options.pop("k"), case.classes)
    call = lambda: fk.top_classes(c.x, c.codes, k, ignore_index=case.ignore, **options)  # noqa: E731
    if c.is_refused(call):
        return
    labels, got = call()
    unchanged((c.x,), c.before)
    x = c.x.double()
    wanted = exact.probabilities(x, c.mu, u=c.u, form="probabilities", **{**options, "eps": c.eps})
    unknown = x.isnan().any(1)
    _, d = exact.distances(x, c.mu)
    # The first class is that of nearest_centroid, and all are different.
    first = torch.where(unknown, 0, labels[:, 0])
    right = torch.where(unknown, (labels == case.ignore).all(1), _allowed(c, d).gather(1, first[:, None])[:, 0])
    known = labels.masked_fill(unknown[:, None], 0)
    different = (known.sort(1).values.diff(dim=1) > 0).all(1) | unknown
    inside = ((known >= 0) & (known < case.classes)).all(1)
    seen["numbers"] += labels.numel()
    if not bool((right & different & inside).all()):
        at = tuple((~(right & different & inside)).nonzero()[0].tolist())
        raise Wrong(f"classes at {at}: got {labels[at[0], :, at[1], at[2]].tolist()}")
    agree("probabilities", got, Answer(*(v.gather(1, known) for v in (wanted.value, wanted.bound, wanted.free))))
    # The j-th class is not farther than the j-th smallest distance, beyond rounding.
    nearest = d.nan_to_num(nan=torch.inf).sort(1).values[:, :k]
    chosen = d.gather(1, known)
    off = 2 * (case.channels + 3) * c.u * nearest + 16 * case.channels * exact.SMALLEST
    late = (chosen > nearest + off) & ~unknown[:, None] & (nearest < exact.HUGE * 0.9)
    if bool(late.any()):
        raise Wrong(f"classes at {tuple(late.nonzero()[0].tolist())}: one that is farther than another is kept")


def check_decode_confusion(case: Pixels, backend: str) -> None:
    c = _Call(case, backend, "x")
    counts = c.run(lambda: fk.decode_confusion(c.x, c.labels, c.codes, ignore_index=case.ignore))
    if counts is None:
        return
    k = case.classes
    valid, truth = exact.split_labels(c.labels, k, case.ignore)
    x = c.x.double()
    _, d = exact.distances(x, c.mu)
    counted = valid & ~x.isnan().any(1)
    allowed = _allowed(c, d).movedim(1, -1)[counted]  # (pixels, K)
    truth = truth[counted]
    sure = allowed.sum(1) == 1
    least = torch.zeros(k, k, dtype=torch.int64)
    least.index_put_((truth[sure], allowed[sure].int().argmax(1)), torch.tensor(1), accumulate=True)
    most = torch.zeros(k, k, dtype=torch.int64)
    rows, columns = allowed.nonzero(as_tuple=True)
    most.index_put_((truth[rows], columns), torch.tensor(1), accumulate=True)
    seen["numbers"] += counts.numel()
    by_truth = torch.bincount(truth, minlength=k)
    if counts.shape != (k, k) or not bool(((counts >= least) & (counts <= most)).all()):
        raise Wrong(
            f"counts {counts.tolist() if k < 9 else counts.sum()}; at least {least.tolist() if k < 9 else least.sum()}"
        )
    if not torch.equal(counts.sum(1), by_truth):
        raise Wrong(f"{counts.sum(1).tolist()} pixels counted by class; there are {by_truth.tolist()}")


def _field_inputs(case: Field) -> list[torch.Tensor | None]:
    make = torch.Generator().manual_seed(case.seed)
    normal = lambda *shape: torch.randn(*shape, generator=make, dtype=torch.float64)  # noqa: E731
    hidden, channels, depth = case.hidden, case.channels, case.depth
    patches = case.down * case.across
    image = (case.batch, channels, case.down * case.patch, case.across * case.patch)
    x, weights = normal(*image), normal(case.batch, patches, depth, 2 * case.ratio * hidden**2) * case.scale
    shared = [normal(hidden, channels + case.freqs**2) * 0.3, normal(hidden) * 0.3]
    if case.form == "residual":
        shared += [normal(depth, hidden), normal(hidden)]
    else:
        shared += [None, None]
    shared += [normal(channels, hidden) * 0.3, normal(channels) * 0.3]
    dtypes = [getattr(torch, name) for name in case.dtypes]
    x = laid_out(x.to(dtypes[0]), case.layouts[0])
    weights = laid_out(weights.to(dtypes[1]), case.layouts[1])
    return [x, weights, *(v if v is None else v.to(dtypes[2]) for v in shared)]


def _field_run(case: Field, inputs, weighting, call) -> list[torch.Tensor]:
    """The output, then the gradients of the inputs that require one."""
    leaves = [v if v is None else v.detach().requires_grad_(bool(case.needs >> i & 1)) for i, v in enumerate(inputs)]
    out = call(*leaves)
    wanted = [v for v in leaves if v is not None and v.requires_grad]
    grads = torch.autograd.grad(out, wanted, weighting.to(out.dtype)) if wanted else ()
    return [out.detach(), *grads]


def _with_approximate_tanh(run):
    """run() with a SiLU whose tanh has the error that PTX allows tanh.approx.f32, of either sign."""

    def silu(z):
        return z / 2 * (1 + (z / 2).tanh() * (1 + 2.0**-11 * torch.sign(torch.sin(1e4 * z.detach()))))

    exact, torch.nn.functional.silu = torch.nn.functional.silu, silu
    try:
        return run()
    finally:
        torch.nn.functional.silu = exact


def check_field(case: Field, backend: str) -> None:
    """Compare the norms of output and gradients; the tolerance is 40 times the effect of rounding every input."""
    inputs = _field_inputs(case)
    weighting = torch.randn(
        inputs[0].shape, generator=torch.Generator().manual_seed(case.seed + 1), dtype=torch.float64
    )
    weighting = laid_out(weighting.to(inputs[0].dtype), case.layouts[2])
    options = {"patch_size": case.patch, "mlp_ratio": case.ratio, "normalise": case.normalise, "form": case.form}
    before = [v.clone() for v in inputs if v is not None]
    got = _field_run(case, inputs, weighting, lambda *v: fk.neural_field(*v, **options))
    unchanged([v for v in inputs if v is not None], before)
    lowest = max((v.dtype for v in inputs if v is not None), key=lambda d: torch.finfo(d).eps)
    u = max(torch.finfo(lowest).eps, torch.finfo(compute_dtype(inputs[0].dtype)).eps)
    doubles = [v if v is None else v.double() for v in inputs]

    def by_reference(values):
        with fk.use_backend("reference"):
            return _field_run(case, values, weighting, lambda *v: fk.neural_field(*v, **options))

    want = by_reference(doubles)
    make = torch.Generator().manual_seed(case.seed + 2)
    off = [torch.zeros((), dtype=torch.float64) for _ in want]
    for _ in range(2):
        moved = [
            v if v is None else v * (1 + u * (2 * torch.rand(v.shape, generator=make, dtype=torch.float64) - 1))
            for v in doubles
        ]
        off = [torch.maximum(a, (b - c).norm()) for a, b, c in zip(off, by_reference(moved), want)]
    # Add the error of the reference itself. Rounding the inputs does not reveal cancellation inside, as in the gradient of a norm.
    off = [a + (b.double() - c).norm() / 4 for a, b, c in zip(off, by_reference(inputs), want)]
    if lowest.itemsize == 2 and inputs[0].numel() and case.depth and case.scale:
        # Some kernels multiply 16-bit values, so they may lose as much inside as plain PyTorch in 16 bits. Beyond the range of fp16
        # there is no bound.
        low = [v if v is None else v.to(lowest) for v in inputs]
        variant = (case.normalise, case.form)
        plain = _field_run(case, low, weighting, lambda *v: pixnerd_field(*v, case.patch, case.ratio, variant))
        off = [a + (b.double() - c).norm().nan_to_num(nan=torch.inf) / 10 for a, b, c in zip(off, plain, want)]
        if backend in ("triton", "cuda") and lowest == torch.bfloat16 and case.form == "residual":
            # The negative tail of the approximate SiLU is inexact; see docs/ops/neural_field.md.
            def formula(*v):
                return pixnerd_field(*v, case.patch, case.ratio, variant)

            rough = _with_approximate_tanh(lambda: _field_run(case, doubles, weighting, formula))
            off = [a + (b - c).norm() / 10 for a, b, c in zip(off, rough, want)]
    names = ["out", *(f"gradient {i}" for i in range(8) if inputs[i] is not None and case.needs >> i & 1)]
    for name, a, b, sensitivity in zip(names, got, want, off):
        dtype = torch.finfo(a.dtype)
        seen["numbers"] += a.numel()
        error, norm = (a.double() - b).norm(), b.norm()
        allowed = 40 * sensitivity + 40 * max(u, dtype.eps) * norm + dtype.tiny * dtype.eps * a.numel()
        if bool((b.abs() > dtype.max * 0.5).any()) or bool(allowed.isinf()):
            seen["free"] += a.numel()
            continue
        if a.shape != b.shape or not bool(error <= allowed):
            raise Wrong(f"{name}: |error| {error.item():.3g} of {norm.item():.3g}, allowed {allowed.item():.3g}")
