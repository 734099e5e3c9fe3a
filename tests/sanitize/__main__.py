"""The C++ kernels under a sanitizer: python -m tests.sanitize address | undefined | thread | all

Builds the library with the sanitizer, checks that the sanitizer finds a fault planted for it, runs the tests of the ops, and writes
a line of docs/results/sanitizers.md. The exit code is 1 for a finding, or if the planted fault was not found.
"""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import subprocess
import sys
import time

import torch

from ..native import ROOT, build
from ..sources import commit

FOLDER = ROOT / "build" / "sanitize"
RESULTS = ROOT / "docs" / "results" / "sanitizers.md"
HEAD = """# Sanitizers

`python -m tests.sanitize all` compiles the C++ kernels with each sanitizer, and runs the tests of the ops and a short run of random
calls. Before that, each sanitizer must find a fault that was planted for it, and must find nothing in a run without a fault.

| sanitizer | planted fault, found | tests passed | findings | commit | g++ |
|---|---|---|---|---|---|
"""
FLAGS = {
    "address": "-fsanitize=address",
    "undefined": "-fsanitize=undefined,float-cast-overflow -fno-sanitize-recover=all",
    "thread": "-fsanitize=thread -DFLOWSEG_OWN_THREADS",
}
#: The words in each one's message about the fault planted for it.
WORDS = {"address": "heap-buffer-overflow", "undefined": "misaligned address", "thread": "data race"}
PRELOADED = {"address": "libasan.so", "thread": "libtsan.so"}
OPTIONS = {
    # No check for leaks: Python does not free everything at exit.
    "ASAN_OPTIONS": "detect_leaks=0:exitcode=66:detect_stack_use_after_return=0",
    "UBSAN_OPTIONS": "print_stacktrace=1:exitcode=66",
    # Only the kernels are instrumented: accesses by other libraries are ignored.
    "TSAN_OPTIONS": "exitcode=66:ignore_noninstrumented_modules=1:halt_on_error=1:report_signal_unsafe=0",
}
TESTS = ["tests/flowseg_kernels/ops", "tests/fuzz", "-k", "cpu and not ten_million and not vanish"]
PLANT = "import ctypes, sys, torch; ctypes.CDLL(sys.argv[1]).flowseg_planted_fault(sys.argv[2].encode())"


def compiled(name: str) -> pathlib.Path:
    folder = FOLDER / name
    folder.mkdir(parents=True, exist_ok=True)
    flags = f"-O1 -g1 -fno-omit-frame-pointer {FLAGS[name]}"
    extra = folder / "faults.o"
    include = f"-I{ROOT}/csrc -isystem {pathlib.Path(torch.__file__).parent}/include"
    target = "-DTORCH_TARGET_VERSION=0x020a000000000000"
    source = pathlib.Path(__file__).with_name("faults.cpp")
    command = f"g++ -std=c++20 -fPIC -fvisibility=hidden {flags} {include} {target} -c {source} -o {extra}"
    subprocess.run(command.split(), check=True)
    return build(folder, flags, f"{FLAGS[name]} -Wl,-Bsymbolic {extra}")


def library_path(name: str) -> str:
    found = subprocess.run(
        ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()
    return str(pathlib.Path(found).resolve())


def prepared(name: str, *arguments: str) -> tuple[list[str], dict[str, str]]:
    """The command and the environment for this Python with the sanitizer's runtime.

    Without address randomisation: older runtimes do not support newer memory layouts.
    """
    environment = {**os.environ, **OPTIONS, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment["FLOWSEG_TEST_LIBRARY"] = str(FOLDER / name / "libflowseg_cpu.so")
    if name in PRELOADED:
        # libstdc++ is preloaded too. Python does not load it, and a runtime that does not find __cxa_throw at its start ends the
        # process at the first exception that an extension module throws.
        environment["LD_PRELOAD"] = " ".join(map(library_path, (PRELOADED[name], "libstdc++.so.6")))
    no_random = ["setarch", "-R"] if shutil.which("setarch") else []
    return [*no_random, sys.executable, *arguments], environment


def run(name: str, *arguments: str) -> subprocess.CompletedProcess:
    command, environment = prepared(name, *arguments)
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)


def check(name: str) -> bool:
    start = time.monotonic()
    library = compiled(name)
    built = time.monotonic() - start
    planted = run(name, "-c", PLANT, str(library), name)
    if planted.returncode == 0 or WORDS[name] not in planted.stderr:
        print(f"{name}: the planted fault was not found\n{planted.stdout[-1000:]}{planted.stderr[-3000:]}")
        store(name, f"| {name} | **not found** | | | {described()} |")
        return False
    harmless = run(name, "-c", PLANT, str(library), "none")
    if harmless.returncode:
        print(f"{name}: it finds a fault in a run without one\n{harmless.stderr[-3000:]}")
        return False
    print(f"{name}: built in {built:.0f} s; the planted fault was found ({WORDS[name]})", flush=True)
    # --capture=sys: pytest's default capture would lose the message of a sanitizer that ends the process.
    tested = run(name, "-m", "pytest", "-x", "--capture=sys", "-p", "tests.native", "-p", "no:cacheprovider", *TESTS)
    summary = (tested.stdout.strip().splitlines() or ["no output"])[-1].strip("= ")
    print(f"{name}: {summary}; {time.monotonic() - start:.0f} s in all", flush=True)
    if tested.returncode:
        print(tested.stdout[-6000:] + tested.stderr[-6000:])
    passed = re.search(r"(\d+) passed", summary)
    # Both a finding and a failing test end the run.
    found = f"**stopped: {summary}**" if tested.returncode else "0"
    store(name, f"| {name} | {WORDS[name]} | {passed[1] if passed else 0} | {found} | {described()} |")
    return tested.returncode == 0


def described() -> str:
    compiler = subprocess.run(["g++", "-dumpfullversion"], capture_output=True, text=True).stdout.strip()
    return f"{commit(RESULTS)} | {compiler}"


def store(name: str, row: str) -> None:
    """Replace the row of one sanitizer in the page."""
    old = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    rows = {kind: line for kind in FLAGS for line in old if line.startswith(f"| {kind} |")} | {name: row}
    RESULTS.write_text(HEAD + "".join(f"{rows[kind]}\n" for kind in FLAGS if kind in rows))


def main() -> int:
    names = sys.argv[1:]
    if not names or any(name not in (*FLAGS, "all") for name in names):
        print(__doc__, file=sys.stderr)
        return 2
    results = [check(name) for name in (FLAGS if "all" in names else names)]
    return 0 if all(results) else 1


if __name__ == "__main__":
    raise SystemExit(main())
