"""Test other versions of Python and torch: python -m tests.versions [3.11:2.10.0 3.13:newest ...]

Makes one environment per version under build/versions/, with pip's default torch and its Triton; compiles and installs this
project there; runs the tests that a version can break, on the CPU. Without arguments: this Python with torch 2.10.0, 2.11.0 and the
newest, and every other Python on PATH with its newest torch. Each part is stored in tests/versions/record.json and
docs/results/versions.md as it ends. An interrupted run continues where it stopped. The exit code is 1 if something fails.
"""

from __future__ import annotations

import argparse
import datetime
import json
import pathlib
import time

from ..sources import is_known, last_change
from . import parts
from .environments import SOURCES, Environment, wanted

RECORD = pathlib.Path(__file__).with_name("record.json")
RESULTS = pathlib.Path(__file__).resolve().parents[2] / "docs" / "results" / "versions.md"
HEAD = """# Versions

`python -m tests.versions` makes one environment per row, with torch as pip chooses it from the package index (a CUDA build, which
also runs on a CPU) and the Triton that comes with it. It compiles the C++ kernels there and runs on the CPU:

| part | what |
|---|---|
| info | `python -m flowseg_kernels.info` says that the C++ kernels are loaded |
| ops | every op on the backends `cpu` and `reference`; tests with many variants run some of them |
| contract | opcheck, compiled graphs with fixed and dynamic shapes, autocast, derivatives |
| calls | codes, choice of the backend, settings, messages for bad arguments |
| compose | export, AOTInductor, torch.func, DDP, FSDP2, checkpointing, workers, threads |
| interpreted | the Triton kernels of `flow_loss` and `nearest_centroid` in Triton's interpreter |
| launches | the launches of every op's Triton kernels, compiled for sm_90, against a mock driver |

A cell is the number of tests that passed, or "yes" if a single check passed; failed and skipped tests are counted too (tests of
Triton kernels skip the other backends). The commit is the last one that changed the tested sources.

"""
LIBRARIES = """
One library works with every torch: each was compiled in the environment of one torch and loaded in the others. The C++ kernels
passed the tests of the ops there; the CUDA kernels, compiled for sm_90, were loaded without a GPU.

"""


def cell(result: dict | None) -> str:
    if result is None:
        return "not run"
    if "skipped" not in result and not result.get("failed"):
        return "yes"
    words = [str(result["passed"])] if result["passed"] else []
    words += [f"**{result['failed']} failed**"] if result.get("failed") else []
    words += [f"{result['skipped']} skipped"] if result.get("skipped") else []
    return ", ".join(words)


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def report(records: dict) -> str:
    """The page of these records."""
    names = [part.name for part in parts.PARTS]
    rows, loaded = [], []
    for r in records.values():
        versions = [r.get("python", "?"), r.get("torch", "?"), r.get("triton", "?")]
        commits = ", ".join(dict.fromkeys(part["commit"] for part in r["parts"].values()))
        rows.append([*versions, *(cell(r["parts"].get(name)) for name in names), r["date"], commits])
        for name, result in r["parts"].items():
            device, _, torch = name.partition(" library of ")
            if torch:
                loaded.append([{"cpu": "C++", "cuda": "CUDA"}[device], torch, *versions[:2], cell(result)])
    text = HEAD + table(["Python", "torch", "Triton", *names, "date", "commit"], rows)
    if loaded:
        text += LIBRARIES + table(
            ["kernels", "compiled against torch", "Python", "loaded in torch", "result"], sorted(loaded)
        )
    failures = [
        f"\n`{part}` of Python {r.get('python')} with torch {r.get('torch')}:\n\n```text\n{chr(10).join(result['last'])}\n```\n"
        for r in records.values()
        for part, result in r["parts"].items()
        if result.get("failed")
    ]
    return text + "".join(["\n## What failed\n", *failures] if failures else [])


def order(name: str) -> list[int]:
    return [int(n) for n in name.replace(" ", ".").split(".")]


def stored() -> dict:
    return json.loads(RECORD.read_text()) if RECORD.exists() else {}


def store(name: str, record: dict) -> None:
    # Read the file again: a run of other environments may write it at the same time.
    every = stored()
    every[name] = record | {"date": datetime.date.today().isoformat()}
    every = {k: every[k] for k in sorted(every, key=order)}
    RECORD.write_text(json.dumps(every, indent=1) + "\n")
    RESULTS.write_text(report(every))


def left(environment: Environment, commit: str, only: list[str] | None, again: bool) -> list[parts.Part]:
    """The parts without a result at this commit."""
    known = stored().get(environment.name, {}).get("parts", {}) if is_known(commit) and not again else {}
    every = (*parts.PARTS, *parts.foreign(environment, commit))
    every = [part for part in every if not only or any(word in part.name for word in only)]
    return [part for part in every if known.get(part.name, {}).get("commit") != commit]


def check(environment: Environment, todo: list[parts.Part], commit: str) -> bool:
    """Run parts in an installed environment, and store each as it ends."""
    passed = True
    for part in todo:
        result = parts.run(part, environment) | {"commit": commit}
        record = stored().get(environment.name, {"parts": {}}) | parts.versions(environment)
        record["parts"] = {k: v for k, v in record["parts"].items() if k != "install"} | {part.name: result}
        store(environment.name, record)
        print(f"{environment.name}: {part.name}: {cell(result)}; {result['seconds']} s", flush=True)
        if result.get("failed"):
            passed = False
            print("\n".join(f"    {line}" for line in result["last"]), flush=True)
    return passed


def install(environment: Environment, commit: str) -> bool:
    begin = time.monotonic()
    failed = environment.make(commit)
    seconds = round(time.monotonic() - begin)
    print(f"{environment.name}: {failed + ' failed' if failed else 'installed'} in {seconds} s", flush=True)
    if failed:
        last = parts.last_lines(environment.log.read_text(), environment)
        print("\n".join(f"    {line}" for line in last), flush=True)
        result = {"passed": 0, "failed": 1, "seconds": seconds, "commit": commit, "last": [failed, *last]}
        python, torch = environment.name.split()
        store(environment.name, {"python": python, "torch": torch, "parts": {"install": result}})
    return not failed


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.versions", description=__doc__.partition("\n")[0])
    parser.add_argument("environments", nargs="*", metavar="PYTHON:TORCH", help="such as 3.11:2.10.0 or 3.13:newest")
    parser.add_argument(
        "--only", action="append", metavar="WORD", help="run parts with one of these words in their name"
    )
    parser.add_argument("--keep", action="store_true", help="keep the environments of 5 GB each")
    parser.add_argument("--again", action="store_true", help="also run parts that are recorded at this commit")
    options = parser.parse_args()
    commit = last_change(*SOURCES)
    chosen, ready, passed = wanted(options.environments), [], True
    # Install all environments first: each loads the libraries of all others.
    for environment in chosen:
        if left(environment, commit, options.only, options.again):
            ok = install(environment, commit)
            passed &= ok
            ready += [environment] if ok else []
        else:
            bad = [k for k, part in stored()[environment.name]["parts"].items() if part.get("failed")]
            passed &= not bad
            print(
                f"{environment.name}: done at {commit}{', failed: ' + ', '.join(bad) if bad else ''}; --again runs it again"
            )
    for environment in ready:
        ok = check(environment, left(environment, commit, options.only, options.again), commit)
        passed &= ok
        # Keep an environment with failures for inspection.
        if ok and not options.keep and not options.only:
            environment.remove()
    return 0 if passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
