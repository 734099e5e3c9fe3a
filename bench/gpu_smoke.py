"""Short checks that the kernels are correct on this GPU.

load    show this machine, and load the compiled library; build it in place if it does not load
ops     every op and gradient on one backend against fp64, in fp32, bf16 and fp16, for 3, 8 and 16 channels
guesses decoding by guesses of up to 20,000 classes against a search of all codes, bit for bit, and counts by class
field   the neural field at PixNerd's sizes against fp64, output and all eight gradients
calls   call every op once, for a memory checker; with --large at the size of the benchmarks, for a profiler

`ops` and `field` print one line per check: our error, plain PyTorch's error in the same dtype, and whether ours is at most twice
as large. `guesses` prints the number of pixels that differ. All checks run; the exit status is 1 if one failed. On a GPU the cases
run in several processes, because they spend their time importing torch and compiling Triton kernels.
"""

import argparse
import concurrent.futures
import multiprocessing
import os
import shutil
import subprocess
import sys
import traceback

import torch

import flowseg_kernels as fk
from flowseg_kernels import info
from flowseg_kernels.ops.neural_field import cuda
from flowseg_kernels.runtime import extension

from . import field_plain
from .results import ROOT

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
#: Error allowed in addition to twice plain PyTorch's, which may be zero by chance.
FLOOR = {"fp32": 2e-6, "bf16": 4e-3, "fp16": 5e-4}


def relative_error(got, want):
    """|got - want| / |want| over the whole tensor; NaN if either tensor has a NaN."""
    want = want.double()
    return float((got.double() - want).norm() / want.norm().clamp_min(1e-30))


class Checks:
    """The output lines of one case, and its number of failed checks."""

    def __init__(self):
        self.failed, self.lines = 0, []

    def say(self, good, line):
        self.failed += not good
        self.lines.append(f"{'ok    ' if good else 'WRONG '} {line}")

    def close(self, name, dtype, got, plain, want):
        ours, theirs = relative_error(got, want), relative_error(plain, want)
        good = ours <= 2 * theirs + FLOOR[dtype]
        self.say(good, f"{name} {dtype}: error {ours:.2e}, plain PyTorch {theirs:.2e}")

    def equal(self, name, dtype, got, want):
        wrong = int((got.long() != want.long()).sum())
        self.say(wrong == 0, f"{name} {dtype}: {wrong} of {want.numel()} differ")


def run_case(name, arguments):
    """(number of failed checks, lines) of one case. An exception counts as a failed check."""
    checks = Checks()
    try:
        CHECKS[name](checks, *arguments)
    except Exception as error:
        shown = " ".join(map(str, arguments))
        checks.say(False, f"{name} {shown}: {type(error).__name__}: {str(error)[:300]}")
        checks.lines += traceback.format_exc(limit=4).splitlines()
    return checks.failed, checks.lines


def run_cases(cases, processes):
    """Print the lines of each case as it ends. Returns the number of failed checks."""
    failed = 0
    if processes == 1:
        ended = (run_case(*case) for case in cases)
    else:
        spawn = multiprocessing.get_context("spawn")
        pool = concurrent.futures.ProcessPoolExecutor(min(processes, len(cases)), mp_context=spawn)
        started = [pool.submit(run_case, *case) for case in cases]
        ended = (future.result() for future in concurrent.futures.as_completed(started))
    for wrong, lines in ended:
        failed += wrong
        print("\n".join(lines), flush=True)
    print(f"{failed} checks failed")
    return failed


def load(device):
    """Show the machine; build the library in place if it does not load on this GPU."""
    if device == "cuda":
        if not torch.cuda.is_available():
            sys.exit("torch sees no GPU here")
        if extension.why_no_cuda_kernels():
            print(f"building: {extension.why_no_cuda_kernels()}", flush=True)
            architecture = "{}.{}".format(*torch.cuda.get_device_capability())
            command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
            environment = {**os.environ, "FLOWSEG_BUILD": "cuda", "TORCH_CUDA_ARCH_LIST": architecture}
            subprocess.run(command, cwd=ROOT.parent, env=environment, check=True)
            # Use a new process: this one has cached that the library does not load.
            ask = "from flowseg_kernels.runtime import extension; raise SystemExit(extension.why_no_cuda_kernels())"
            subprocess.run([sys.executable, "-c", ask], cwd=ROOT.parent, check=True)
        print(torch.cuda.get_device_properties())
        if shutil.which("nvidia-smi"):
            subprocess.run(["nvidia-smi"], check=False)
    print(info.report())


def pixel_inputs(classes, channels, device, dtype, shape=(2, 67, 45)):
    """(codebook, x, source, labels, t): x near its codes, with ignored pixels; odd height and width by default."""
    generator = torch.Generator(device).manual_seed(channels)
    codebook = fk.Codebook(fk.kronecker_centroids(classes, channels), ignore_index=-1).to(device)
    labels = torch.randint(0, classes, shape, generator=generator, device=device)
    x = codebook.encode(labels)
    x = (x + 0.1 * torch.randn(x.shape, generator=generator, device=device)).to(dtype)
    source = (torch.rand(x.shape, generator=generator, device=device) * 2 - 1).to(dtype)
    labels[:, :3, :5] = -1
    return codebook, x, source, labels, torch.rand(shape[0], generator=generator, device=device)


def pixel_results(codebook, x, source, labels, t):
    """{name: tensor} of every per-pixel op and the loss's gradient."""
    leaf = x.detach().requires_grad_()
    loss = fk.flow_loss(leaf, source, labels, t, codebook)
    # Not 1: for 1 the backward has nothing to compute.
    (gradient,) = torch.autograd.grad(loss, leaf, torch.full_like(loss, 3.0))
    with torch.no_grad():
        label, distance, margin = fk.nearest_centroid(x, codebook, return_distance=True, return_margin=True)
        return {
            "flow_interpolate": fk.flow_interpolate(source, labels, t, codebook),
            "distance_correction": fk.distance_correction(x, labels, codebook),
            "flow_loss": loss.detach(),
            "flow_loss gradient": gradient,
            "nearest_centroid distance": distance,
            "nearest_centroid margin": margin,
            "nearest_centroid": fk.nearest_centroid(x, codebook),
            "nearest_centroid without grid": fk.nearest_centroid(x, codebook.centroids),
            "nearest_centroid with margin": label,
            "decode_confusion": fk.decode_confusion(x, labels, codebook),
            "class_probabilities": fk.class_probabilities(x, codebook),
            "class_probabilities of neg_sq": fk.class_probabilities(
                x, codebook, transform="neg_sq", form="log_probabilities"
            ),
            "top_classes probabilities": fk.top_classes(x, codebook, min(5, codebook.num_classes))[1],
            "top_classes at temperature 0.5": fk.top_classes(
                x, codebook, min(16, codebook.num_classes), temperature=0.5
            )[1],
        }


def check_pixels(checks, backend, device, dtype, classes, channels):
    inputs = pixel_inputs(classes, channels, device, DTYPES[dtype])
    with fk.use_backend("reference"):
        plain = pixel_results(*inputs)
        codebook, x, source, labels, t = inputs
        want = pixel_results(codebook, x.double(), source.double(), labels, t.double())
    with fk.use_backend(backend):
        got = pixel_results(*inputs)
    for name, value in got.items():
        title = f"{name} K={classes} C={channels}"
        if value.is_floating_point():
            checks.close(title, dtype, value, plain[name], want[name])
        else:
            checks.equal(title, dtype, value, want[name])


def check_guesses(checks, backend, device, dtype, classes, channels):
    """Decoding by guesses equals the same backend's search of all codes bit for bit: near codes, in noise, and for duplicates.

    Squares of 32 pixels, then a random class per pixel. Counts by class equal counts of the labels.
    """
    generator = torch.Generator(device).manual_seed(classes)
    mu = fk.kronecker_centroids(classes, channels)
    codebook = fk.Codebook(torch.cat((mu[:-5], mu[:5])), ignore_index=-1).to(device)
    for square, spread in ((32, 0.05), (1, 0.05), (1, 0.3)):
        few = torch.randint(0, classes, (2, 128 // square, 160 // square), generator=generator, device=device)
        labels = few.repeat_interleave(square, 1).repeat_interleave(square, 2).contiguous()
        x = codebook.encode(labels)
        x = (x + spread * torch.randn(x.shape, generator=generator, device=device)).to(DTYPES[dtype])
        x[0, 0, 0, :3] = torch.tensor([torch.nan, torch.inf, 1e4], device=device)
        title = f"K={classes} C={channels} squares of {square}, spread {spread}"
        with fk.use_backend(backend):
            search = fk.nearest_centroid(
                x, codebook.centroids, return_distance=True, return_margin=True, ignore_index=codebook.ignore_index
            )
            found = fk.nearest_centroid(x, codebook, return_distance=True, return_margin=True)
            counts = fk.decode_confusion(x, labels, codebook, by_class=True)
            checks.equal(f"guesses {title}", dtype, fk.nearest_centroid(x, codebook), search[0])
        for name, got, want in zip(("labels", "distance", "margin"), found, search):
            checks.say(torch.equal(got[got == got], want[want == want]), f"guesses {title} {dtype}: {name} as searched")
        decoded = search[0].long()
        rows = [v[decoded >= 0].bincount(minlength=classes) for v in (labels, decoded)]
        hits = labels[labels == decoded].bincount(minlength=classes)
        checks.equal(f"counts by class {title}", dtype, counts, torch.stack((hits, *rows)))


FIELD_NAMES = (
    "output", "of x", "of weights", "of embed_weight", "of embed_bias", "of norm_weight", "of out_norm_weight",
    "of out_weight", "of out_bias",
)  # fmt: skip


def field_results(inputs, grad, options):
    """The output and the gradient of every input; None for the gains if the form is "plain", which has none."""
    leaves = [v.detach().requires_grad_() for v in inputs]
    if options.get("form") == "plain":
        leaves[4] = leaves[5] = None
    out = fk.neural_field(*leaves, **options)
    found = iter(torch.autograd.grad(out, [v for v in leaves if v is not None], grad.to(out.dtype)))
    return [out.detach(), *(v if v is None else next(found) for v in leaves)]


def check_field(checks, backend, device, dtype, patches, depth, options, hidden=64):
    """Compare with fp64 and with plain PyTorch in the same dtype: PixNerd's own form, or our reference if `options` are set."""
    inputs = field_plain.inputs(patches=patches, depth=depth, hidden=hidden, dtype=DTYPES[dtype], device=device)
    grad = torch.randn(inputs[0].shape, device=device)
    with fk.use_backend("reference"):
        want = field_results([v.double() for v in inputs], grad.double(), options)
        plain = field_results(inputs, grad, options) if options else plain_field_results(inputs, grad)
    with fk.use_backend(backend):
        got = field_results(inputs, grad, options)
        again = field_results(inputs, grad, options)
    shown = " ".join((f"Hx={hidden}", *options.values()))
    if backend == "cuda":
        checks.say(
            cuda.takes(16, *inputs),
            f"neural_field {patches} patches L={depth} {shown} {dtype}: the CUDA kernels take it",
        )
    for name, *values in zip(FIELD_NAMES, got, plain, want, again):
        if values[0] is None:
            continue
        title = f"neural_field {patches} patches L={depth} {shown} {name}"
        checks.close(title, dtype, *values[:3])
        checks.say(torch.equal(values[0], values[3]), f"{title} {dtype}: repeats bit for bit")


def plain_field_results(inputs, grad):
    """The results of field_results by PixNerd's own form in plain PyTorch."""
    leaves = [v.detach().requires_grad_() for v in inputs]
    out = field_plain.field(*leaves, field_plain.features(inputs[0].dtype).to(grad.device))
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


CHECKS = {"pixels": check_pixels, "guesses": check_guesses, "field": check_field}


def op_cases(backend, device):
    """The cases of `ops`: (name in CHECKS, arguments)."""
    if device == "cpu":
        return [("pixels", (backend, device, dtype, 20, 3)) for dtype in DTYPES]
    sizes = {"fp32": ((150, 3), (1000, 3), (150, 8), (150, 16)), "bf16": ((150, 3), (150, 16)), "fp16": ((150, 3),)}
    cases = [("pixels", (backend, device, dtype, *size)) for dtype, found in sizes.items() for size in found]
    if backend == "triton":  # the step `field cuda` checks the other one
        cases.append(("field", (backend, device, "bf16", 4, 2, {})))
    return cases


def guess_cases(backend, device):
    """The cases of `guesses`."""
    if device == "cpu":
        return [("guesses", (backend, device, "bf16", 150, 8))]
    sizes = {"fp32": ((20_000, 8), (1000, 16)), "bf16": ((150, 8), (20_000, 16)), "fp16": ((1000, 5),)}
    return [("guesses", (backend, device, dtype, *size)) for dtype, found in sizes.items() for size in found]


def field_cases(backend, device):
    """The cases of `field`: PixNerd's sizes, and each option once.

    CUDA C++ begins with two patches per SM of an H100, and Hx = 128 has kernels of its own.
    """
    sizes = ((256, 2), (1024, 4)) if device == "cuda" else ((4, 2),)
    dtypes = DTYPES
    if backend == "cuda":
        sizes, dtypes = ((264, 4), (1024, 2)), ("bf16", "fp16")
    cases = [("field", (backend, device, dtype, *size, {})) for dtype in dtypes for size in sizes]
    options = ({"form": "plain"}, {"normalise": "first"})
    cases += [("field", (backend, device, "bf16", 16, 2, chosen)) for chosen in options]
    if backend == "cuda":
        cases += [("field", (backend, device, dtype, 264, 2, {}, 128)) for dtype in dtypes]
    return cases


def call_all(backend, device, dtype, shape, patches):
    """A function that calls every op once; the inputs are created before."""
    pixels = pixel_inputs(150, 3, device, dtype, shape)
    field = field_plain.inputs(patches=patches, depth=2, dtype=dtype, device=device)
    grad = torch.ones(field[0].shape, device=device)
    runs = backend in fk.available_backends("neural_field", device) and (backend != "cuda" or cuda.takes(16, *field))

    def run():
        with fk.use_backend(backend):
            pixel_results(*pixels)
            if runs:
                field_results(field, grad, {})

    return run


def calls(backend, device, large):
    """Call every op once at odd sizes. `large`: at the size of the benchmarks, after a warm-up, between profiler start and stop."""
    shape, patches = ((16, 512, 512), 4096) if large else ((2, 67, 45), 4)
    for dtype in (torch.float32, torch.bfloat16):
        run = call_all(backend, device, dtype, shape, patches)
        if large:
            run()
            torch.cuda.synchronize()
            with torch.cuda.profiler.profile():
                run()
                torch.cuda.synchronize()
        else:
            run()
    if device == "cuda":
        torch.cuda.synchronize()
    print("every op was called")


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m bench gpu-smoke", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("load", "ops", "guesses", "field", "calls"))
    parser.add_argument("--backend", default="triton")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--large", action="store_true", help="calls: at the size of the benchmarks")
    given = parser.parse_args(arguments)
    if given.what == "load":
        return load(given.device)
    if given.what == "calls":
        return calls(given.backend, given.device, given.large)
    cases = {"ops": op_cases, "guesses": guess_cases, "field": field_cases}[given.what](given.backend, given.device)
    processes = min(8, os.cpu_count() or 1) if given.device == "cuda" and given.backend == "triton" else 1
    return 1 if run_cases(cases, processes) else 0
