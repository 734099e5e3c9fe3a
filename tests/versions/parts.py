"""What is run in each environment, and what came of it."""

from __future__ import annotations

import dataclasses
import pathlib
import re
import time

from ..native import ROOT
from .environments import Environment, libraries

TESTS = "tests/flowseg_kernels"
PYTEST = ("-m", "pytest", "-o", "addopts=", "-q", "--strict-markers", "-rf", "--tb=short", "-p", "no:cacheprovider")
#: Loads a CUDA library, on a machine without a GPU too: its symbols are found, and every op has its kernel.
LOAD_CUDA = """
import dataclasses, pathlib, sys
import flowseg_kernels
from flowseg_kernels.runtime import extension
reason = dataclasses.replace(extension.CUDA, path=pathlib.Path(sys.argv[1])).load()
sys.exit(reason)
"""
VERSIONS = """
import platform, torch
try:
    import triton
except ImportError:
    triton = None
print(platform.python_version(), torch.__version__, getattr(triton, "__version__", "none"))
"""


@dataclasses.dataclass(frozen=True)
class Part:
    """One run. arguments: of Python, in the copy of the tree."""

    name: str
    arguments: tuple[str, ...]
    variables: tuple[tuple[str, str], ...] = ()
    #: Words that the output must hold.
    words: str = ""


def tests(name: str, *arguments: str, **variables: str) -> Part:
    return Part(name, (*PYTEST, *arguments), tuple(variables.items()))


CPU = {"FLOWSEG_REQUIRE_BACKENDS": "reference,cpu"}
PARTS = (
    Part("info", ("-m", "flowseg_kernels.info"), words="C++ kernels: loaded"),
    tests("ops", f"{TESTS}/ops", "--few-forms", "-k", "cpu or reference", **CPU),
    tests("contract", f"{TESTS}/test_contract.py", "--few-forms", **CPU),
    tests("calls", *(f"{TESTS}/test_{name}.py" for name in ("codes", "runtime", "bad_input"))),
    tests("compose", f"{TESTS}/compose"),
    tests(
        "interpreted",
        *(f"{TESTS}/ops/test_{op}.py" for op in ("flow_loss", "nearest_centroid")),
        TRITON_INTERPRET="1",
        FLOWSEG_REQUIRE_BACKENDS="triton",
    ),
    tests("launches", f"{TESTS}/static/test_triton_launch.py"),
)


def foreign(environment: Environment, commit: str) -> list[Part]:
    """Loading of the libraries that other environments compiled; the ops' tests go through those of C++ kernels."""
    arguments = ("-p", "tests.native", f"{TESTS}/ops", "--few-forms", "-k", "cpu and not ten_million")
    found = [
        tests(f"cpu library of {torch}", *arguments, FLOWSEG_TEST_LIBRARY=str(path), **CPU)
        for torch, path in libraries(commit, "cpu").items()
        if torch != environment.torch
    ]
    cuda = libraries(commit, "cuda").items()
    return found + [Part(f"cuda library of {torch}", ("-c", LOAD_CUDA, str(path))) for torch, path in cuda]


def run(part: Part, environment: Environment) -> dict:
    """passed, failed, skipped: numbers of tests, or of the one thing that was tried; seconds; last: lines, where it failed."""
    log = environment.folder / "logs" / f"{part.name.replace(' ', '_')}.log"
    log.unlink(missing_ok=True)
    begin = time.monotonic()
    code = environment.run(log, *part.arguments, OMP_NUM_THREADS="1", **dict(part.variables))
    output = log.read_text()
    result = counts(output) if "pytest" in part.arguments else {"passed": int(code == 0 and part.words in output)}
    result["seconds"] = round(time.monotonic() - begin)
    if code or not result["passed"] or result.get("failed"):
        result["failed"] = max(result.get("failed", 0), 1)
        result["last"] = last_lines(output, environment)
    return result


def last_lines(output: str, environment: Environment) -> list[str]:
    """Without the folders that this machine keeps things in, and without what pip says of its indexes."""
    for folder in (environment.tree, environment.folder, ROOT, pathlib.Path.home()):
        output = output.replace(f"{folder}/", "")
    lines = [line for line in output.strip().splitlines() if not line.startswith("WARNING: Location")]
    return [line[:200] for line in lines[-12:]]


def counts(output: str) -> dict:
    """Numbers of pytest's last line; an error of a fixture or while tests are collected is a failure."""
    last = (output.strip().splitlines() or [""])[-1]
    found = {word.rstrip("s"): int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)", last)}
    return {
        "passed": found.get("passed", 0),
        "failed": found.get("failed", 0) + found.get("error", 0),
        "skipped": found.get("skipped", 0),
    }


def versions(environment: Environment) -> dict:
    log = environment.folder / "logs" / "versions.log"
    log.unlink(missing_ok=True)
    environment.run(log, "-c", VERSIONS)
    words = log.read_text().strip().splitlines()[-1].split()
    return dict(zip(("python", "torch", "triton"), words))
