"""The parts that run in each environment, and their results."""

from __future__ import annotations

import dataclasses
import pathlib
import re
import time

from ..native import ROOT
from .environments import Environment, libraries

TESTS = "tests/flowseg_kernels"
PYTEST = ("-m", "pytest", "-o", "addopts=", "-q", "--strict-markers", "-rf", "--tb=short", "-p", "no:cacheprovider")
#: Loads a CUDA library, also without a GPU: checks that its symbols resolve and that every op has its kernel.
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
    """One run of Python with `arguments` and `variables` in the copy of the tree."""

    name: str
    arguments: tuple[str, ...]
    variables: tuple[tuple[str, str], ...] = ()
    #: Words that the output must contain.
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
    """Parts that load libraries of other environments; C++ libraries also run the tests of the ops."""
    arguments = ("-p", "tests.native", f"{TESTS}/ops", "--few-forms", "-k", "cpu and not ten_million")
    found = [
        tests(f"cpu library of {torch}", *arguments, FLOWSEG_TEST_LIBRARY=str(path), **CPU)
        for torch, path in libraries(commit, "cpu").items()
        if torch != environment.torch
    ]
    cuda = libraries(commit, "cuda").items()
    return found + [Part(f"cuda library of {torch}", ("-c", LOAD_CUDA, str(path))) for torch, path in cuda]


def run(part: Part, environment: Environment) -> dict:
    """Numbers of tests passed, failed and skipped (or 1 for a single check), seconds, and the last lines of a failure."""
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
    """The last lines of the output, without folders of this machine and without pip's notes on its indexes."""
    for folder in (environment.tree, environment.folder, ROOT, pathlib.Path.home()):
        output = output.replace(f"{folder}/", "")
    lines = [line for line in output.strip().splitlines() if not line.startswith("WARNING: Location")]
    return [line[:200] for line in lines[-12:]]


def counts(output: str) -> dict:
    """Numbers in pytest's last line. Errors of fixtures and of collection count as failures."""
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
