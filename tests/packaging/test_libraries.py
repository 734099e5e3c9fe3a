"""The compiled libraries as files: the symbols that they need, and the message for a library that cannot be used."""

import json
import os
import pathlib
import re
import shutil
import struct
import subprocess
from unittest import mock

import pytest

from .environment import ONE_OP, ROOT, import_backend

#: The functions that the shim headers of torch 2.10.0, the oldest supported torch, declare and its libraries export.
SHIM = frozenset(pathlib.Path(__file__).with_name("torch_2_10_shim.txt").read_text().split())
SYSTEM = {"libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6", "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}


def undefined(library):
    """The undefined dynamic symbols, with their versions."""
    done = subprocess.run(["nm", "-D", "--undefined-only", str(library)], capture_output=True, text=True, check=True)
    return [line.split()[-1] for line in done.stdout.splitlines()]


def needed(library):
    done = subprocess.run(["readelf", "-d", str(library)], capture_output=True, text=True, check=True)
    return {line.split("[")[1].rstrip("]") for line in done.stdout.splitlines() if "(NEEDED)" in line}


def assert_only_the_stable_abi_is_used(library):
    symbols = undefined(library)
    of_torch = {s for s in symbols if s.startswith(("aoti_torch_", "torch_"))}
    assert of_torch and not of_torch - SHIM
    cxx = [s for s in symbols if s.startswith("_Z")]
    # A C++ symbol without a version comes from a library of torch: another torch may not have it.
    assert cxx and not [s for s in cxx if "@GLIBCXX_" not in s and "@CXXABI_" not in s]
    assert not [s for s in symbols if s.startswith(("Py", "_Py"))], "the library needs Python"


def test_the_cpu_library_uses_only_functions_of_torch_2_10(compiled):
    _, fresh = compiled
    # The optimised library of the checkout too, which an optimiser may have given other symbols.
    for library in (
        fresh.site / "flowseg_kernels/lib/libflowseg_cpu.so",
        ROOT / "flowseg_kernels/lib/libflowseg_cpu.so",
    ):
        if library.exists():
            assert_only_the_stable_abi_is_used(library)
            assert needed(library) <= SYSTEM | {"libtorch_cpu.so"}


def code_in(library):
    """The architectures of the GPU code in a library, named as in its record: "sm_90" for machine code, "compute_90" for PTX."""
    data = library.read_bytes()
    found = set()
    at = data.find(struct.pack("<IH", 0xBA55ED50, 1))
    while at >= 0:
        _, _, header, size = struct.unpack_from("<IHHQ", data, at)
        entry, end = at + header, at + header + size
        while entry < end:
            kind, _, entry_header, entry_size = struct.unpack_from("<HHIQ", data, entry)
            found.add(f"{'sm' if kind == 2 else 'compute'}_{struct.unpack_from('<I', data, entry + 28)[0]}")
            entry += entry_header + entry_size
        at = data.find(struct.pack("<IH", 0xBA55ED50, 1), end)
    return found


@pytest.fixture(scope="module")
def cuda_library(tmp_path_factory):
    """A CUDA library with one op for one architecture, three channels, and fp32, fp16 and bf16, made by build_backend."""
    if not shutil.which("nvcc"):
        pytest.skip("no nvcc")
    folder = tmp_path_factory.mktemp("cuda")
    variables = {"TORCH_CUDA_ARCH_LIST": "9.0+PTX", "FLOWSEG_NVCCFLAGS": "-DFLOWSEG_ONLY_FP32_C3 -Xptxas=-O1"}
    with mock.patch.dict(os.environ, variables):
        import_backend("flowseg_libraries").build_cuda(folder, folder / "work", True, ops=("flow_interpolate",))
    return folder / "libflowseg_cuda.so"


def test_the_cuda_library_contains_its_runtime_and_the_code_that_its_record_names(cuda_library):
    assert_only_the_stable_abi_is_used(cuda_library)
    assert needed(cuda_library) <= SYSTEM | {"libtorch.so", "libtorch_cpu.so"}
    assert "libtorch.so" in needed(cuda_library), "it loads torch's CUDA libraries"
    assert not [s for s in undefined(cuda_library) if s.startswith(("cuda", "__cuda", "cu"))]
    facts = json.loads(cuda_library.with_suffix(".json").read_text())
    named = set(facts["architectures"].split(", "))
    # The runtime that is linked in contains code for older GPUs too.
    assert named == {"sm_90", "compute_90"} and named <= code_in(cuda_library)


LOAD = """
import dataclasses, json, pathlib, sys
import flowseg_kernels
from flowseg_kernels.runtime import extension
print(json.dumps([dataclasses.replace(kind, path=pathlib.Path(path)).load() for path in sys.argv[1:]
                  for kind in (extension.CPU, extension.CUDA)]))
"""


def unusable(library, folder):
    """Yield (unusable library, words that its message must contain)."""
    whole = library.read_bytes()
    files = {
        "short": (whole[: len(whole) // 2], "is truncated or is not an ELF shared library"),
        "text": (b"not a library", "is truncated or is not an ELF shared library"),
        "arm": (whole[:18] + b"\xb7\0" + whole[20:], "does not load into torch"),
    }
    for name, (data, words) in files.items():
        (folder / f"{name}.so").write_bytes(data)
        yield folder / f"{name}.so", words
    source = folder / "later.c"
    source.write_text("int torch_of_a_later_version(void); int call(void) { return torch_of_a_later_version(); }")
    subprocess.run(["gcc", "-shared", "-fPIC", str(source), "-o", str(folder / "later.so")], check=True)
    yield folder / "later.so", "undefined symbol: torch_of_a_later_version"
    source.write_text("int unrelated(void) { return 0; }")
    subprocess.run(["gcc", "-shared", "-fPIC", str(source), "-o", str(folder / "other.so")], check=True)
    yield folder / "other.so", "of another version: it has no kernel for flowseg_"


def test_an_unusable_library_is_named_with_the_command_that_compiles_it_again(compiled, tmp_path):
    """Loading a truncated library would kill the process; one without our kernels would fail at the first op."""
    _, fresh = compiled
    cases = list(unusable(fresh.site / "flowseg_kernels/lib/libflowseg_cpu.so", tmp_path))
    reasons = iter(json.loads(fresh.run("-c", LOAD, *(str(path) for path, _ in cases))))
    for path, words in cases:
        for build in ("cpu", "cuda"):
            reason = next(reasons)
            command = rf"FLOWSEG_BUILD={build} \S+/python -m pip install --no-build-isolation"
            assert words in reason and re.search(command, reason) and path.name in reason, reason


def test_a_cuda_library_in_a_torch_without_cuda_is_named(compiled, cuda_library):
    _, fresh = compiled
    _, reason = json.loads(fresh.run("-c", LOAD, str(cuda_library)))
    assert "does not load into torch" in reason and "undefined symbol" in reason and "FLOWSEG_BUILD=cuda" in reason


def test_ops_run_without_an_unusable_library(compiled, tmp_path):
    _, fresh = compiled
    site = tmp_path / "site"
    shutil.copytree(fresh.site / "flowseg_kernels", site / "flowseg_kernels")
    library = site / "flowseg_kernels/lib/libflowseg_cpu.so"
    library.write_bytes(library.read_bytes()[:5000])
    (site / "flowseg_kernels/lib/libflowseg_cuda.so").write_bytes(b"foreign")
    first = f"import sys; sys.path.insert(0, {str(site)!r})\n"
    assert fresh.run("-c", first + ONE_OP) == "reference tensor(True)\n"
    info = fresh.run("-c", first + "from flowseg_kernels.info import report; print(report())")
    assert "C++ kernels: not loaded: libflowseg_cpu.so is truncated or is not an ELF shared library" in info


@pytest.mark.parametrize(
    "target, words", [("99.0", "the library needs torch 99.0 or newer"), ("2.10", None)], ids=["downgraded", "upgraded"]
)
def test_another_torch_than_it_was_built_with(compiled, tmp_path, target, words):
    """After a change of torch the library works if torch has its ABI; otherwise one sentence says what to do."""
    _, fresh = compiled
    library = tmp_path / "libflowseg_cpu.so"
    shutil.copy(fresh.site / "flowseg_kernels/lib/libflowseg_cpu.so", library)
    library.with_suffix(".json").write_text(json.dumps({"torch": "2.10.0", "torch_target": target}))
    reason = json.loads(fresh.run("-c", LOAD, str(library)))[0]
    assert reason is None if words is None else words in reason and "upgrade torch" in reason
