"""Older compilers: the C++ kernels compile with every compiler that is installed, and fp16 is right without a type for it."""

import ctypes
import re
import shutil
import subprocess

import pytest
import torch

from .environment import ROOT, import_backend

flowseg_ninja = import_backend("flowseg_ninja")

#: The flags of the build that decide what compiles, and the instruction sets with the most different code.
FLAGS = "-std=c++20 -O2 -fPIC -fno-math-errno -fno-trapping-math -Wall -Wextra -Werror -Wno-psabi -Wno-ignored-attributes".split()
INCLUDES = [f"-I{ROOT / 'csrc'}"]
COMPILERS = ("g++", "g++-11", "clang++", "clang++-14", "clang++-16")


def compiler(name):
    if not shutil.which(name):
        pytest.skip(f"{name} is not installed")
    macros = subprocess.run([name, "-dM", "-E", "-x", "c++", "/dev/null"], capture_output=True, text=True).stdout
    if "__x86_64__" not in macros:
        pytest.skip(f"{name} compiles for another processor")
    return name, ["-Wno-for-loop-analysis"] if "__clang__" in macros else ["-Wno-maybe-uninitialized"]


@pytest.mark.parametrize("source, isa", [("pixel/all", "avx2"), ("field/kernels", "avx512bf16")])
@pytest.mark.parametrize("name", COMPILERS)
def test_the_kernels_compile_without_a_warning(name, source, isa):
    """Checks syntax and types only, in seconds. `python -m tests.packaging.routes compiler-g++-11` builds and runs the kernels."""
    program, quiet = compiler(name)
    # g++ checks the code for compilers without an fp16 type.
    bits = ["-DFLOWSEG_HALF_BITS"] if name == "g++" else []
    flags = flowseg_ninja.CPU_KERNELS[source][isa].split()
    command = [
        program,
        *FLAGS,
        *quiet,
        *bits,
        *INCLUDES,
        *flags,
        "-fsyntax-only",
        ROOT / "csrc" / "cpu" / f"{source}.cpp",
    ]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


CONVERSIONS = """
#include "shared/types.h"
#ifdef FLOWSEG_FLOAT16
#error this tests the conversions for compilers without the type
#endif
extern "C" {
void to_float(const uint16_t* in, float* out, long n) { for (long i = 0; i < n; ++i) out[i] = flowseg::float_of_half(in[i]); }
void of_float(const float* in, uint16_t* out, long n) { for (long i = 0; i < n; ++i) out[i] = flowseg::half_of_float(in[i]); }
void of_double(const double* in, uint16_t* out, long n) { for (long i = 0; i < n; ++i) out[i] = flowseg::half_of_double(in[i]); }
}
"""


@pytest.fixture(scope="module", params=["g++", "g++-11", "clang++-14"])
def converted(request, tmp_path_factory):
    """converted(function, tensor, dtype) applies one of the functions above to a tensor."""
    program, _ = compiler(request.param)
    folder = tmp_path_factory.mktemp("half")
    (folder / "half.cpp").write_text(CONVERSIONS)
    # The library's flags: its floating-point optimisations must not break the conversions.
    command = [program, *FLAGS, "-O3", "-DFLOWSEG_HALF_BITS", *INCLUDES, "-shared", "half.cpp", "-o", "half.so"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    library = ctypes.CDLL(str(folder / "half.so"))

    def convert(function, tensor, dtype):
        out = torch.empty_like(tensor, dtype=dtype)
        getattr(library, function)(
            *(ctypes.c_void_p(t.data_ptr()) for t in (tensor, out)), ctypes.c_long(tensor.numel())
        )
        return out

    return convert


def same_bits(found, expected):
    """Assert that both are NaN in the same places, and equal bit for bit elsewhere."""
    integer = {2: torch.int16, 4: torch.int32}[found.element_size()]
    nan = torch.isnan(expected)
    assert torch.equal(torch.isnan(found), nan)
    assert torch.equal(found.view(integer)[~nan], expected.view(integer)[~nan])


def test_every_half_becomes_its_float(converted):
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    same_bits(converted("to_float", halves, torch.float32), halves.view(torch.float16).float())


def test_floats_become_the_nearest_half(converted):
    """Every half, every midpoint of two halves and its neighbours, limits, and random bits."""
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    ordered = halves[torch.isfinite(halves)].sort().values
    between = (ordered[1:] + ordered[:-1]) / 2
    near = [torch.nextafter(between, torch.full_like(between, v)) for v in (torch.inf, -torch.inf)]
    bits = (
        torch.randint(-(2**31), 2**31, (2**18,), generator=torch.Generator().manual_seed(0)).int().view(torch.float32)
    )
    limits = torch.tensor([0.0, -0.0, 65504.0, 65519.99, 65520.0, -65520.0, 1e-45, torch.inf, -torch.inf, torch.nan])
    floats = torch.cat([halves, between, *near, bits, limits])
    same_bits(converted("of_float", floats, torch.int16).view(torch.float16), floats.half())


def test_doubles_are_rounded_once(converted):
    """A double next to the midpoint of two halves becomes the midpoint in fp32: rounding twice would give the wrong half."""
    halves = torch.arange(0, 0x7C00, dtype=torch.int32).to(torch.int16).view(torch.float16).double()
    low, high = halves[:-1], halves[1:]
    middle = (low + high) / 2
    above, below = middle * (1 + 2**-40), middle * (1 - 2**-40)
    assert torch.equal(above.float(), middle.float())
    for sign in (1, -1):
        for doubles, expected in ((above, high), (below, low), (high, high)):
            found = converted("of_double", sign * doubles, torch.int16).view(torch.float16)
            assert torch.equal(found.double(), sign * expected)
    edge = torch.tensor([1e300, -1e300, 65520 * (1 - 2**-40), 65520.0, 1e-320, torch.nan], dtype=torch.float64)
    found = converted("of_double", edge, torch.int16).view(torch.float16).double()
    assert (
        torch.equal(found[:5], torch.tensor([torch.inf, -torch.inf, 65504, torch.inf, 0]).double()) and found[5].isnan()
    )


def test_every_cpu_feature_that_the_compiler_may_use_is_checked_at_run_time():
    """A virtual machine may hide a single feature; without the check the library would crash with an illegal instruction."""
    source = (ROOT / "csrc" / "cpu" / "isa.cpp").read_text()
    checked = set(re.findall(r'__builtin_cpu_supports\("(\w+)"\)', source)) | set(
        re.findall(r"\bhas_(\w+)\(\)", source)
    )
    flags = [flowseg_ninja.ISA_FLAGS[isa] for isa in ("avx2", "avx512")]
    used = {flag.removeprefix("-m") for text in flags for flag in text.split()}
    assert used and used <= checked
