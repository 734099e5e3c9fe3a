"""The archive of a GPU report: how it is packed there and imported at home.

`python -m bench.gpu_archive FILE` stores the figures of an archive in bench/results/, writes the backend preferences that follow
from them, and renders README, docs/results/bench.md and the pictures.
"""

import argparse
import json
import os
import pathlib
import re
import sys
import tarfile
import tempfile

from . import preferences, report
from .results import RESULTS, ROOT, store

#: Bytes of an archive, and of one log in it; a longer log keeps its beginning and its end.
LARGEST, LONGEST_LOG = 16 * 2**20, 4 * 2**20


def file_name(step):
    return re.sub(r"[^a-z0-9]+", "-", step.lower()).strip("-")


def read_state(folder):
    """{step: {"ended", "seconds", ...}} of earlier runs into a folder; {} if there was none."""
    try:
        return json.loads((folder / "state.json").read_text())
    except (OSError, ValueError):
        return {}


def write_state(folder, state):
    part = folder / "state.json.part"
    part.write_text(json.dumps(state, indent=1) + "\n")
    os.replace(part, folder / "state.json")


def slim(path):
    """Drop the single times from a pytest-benchmark file, most of it; returns its number of entries."""
    if not path.exists() or not path.stat().st_size:
        return 0
    result = json.loads(path.read_text())
    for item in result["benchmarks"]:
        item["stats"].pop("data", None)
    path.write_text(json.dumps(result))
    return len(result["benchmarks"])


def results_in(folder):
    """The pytest-benchmark results in a folder, oldest first."""
    found = []
    for path in folder.glob("*.json"):
        if path.name != "state.json" and path.stat().st_size:
            result = json.loads(path.read_text())
            found += [result] if result.get("benchmarks") else []
    return sorted(found, key=lambda result: result["datetime"])


def _shortened(path):
    text = path.read_bytes()
    if len(text) > LONGEST_LOG:
        half = LONGEST_LOG // 2
        text = text[:half] + b"\n[... the middle was left out ...]\n" + text[-half:]
    return text


def pack(folder, archive):
    """Write everything in a folder to a .tar.gz of at most LARGEST bytes, in one move."""
    part = archive.with_name(archive.name + ".part")
    with tempfile.TemporaryDirectory() as scratch, tarfile.open(part, "w:gz") as tar:
        for path in sorted(folder.iterdir()):
            copy = pathlib.Path(scratch) / path.name
            copy.write_bytes(_shortened(path))
            tar.add(copy, path.name)
    if part.stat().st_size > LARGEST:
        part.unlink()
        raise OSError(f"{archive}: wanted at most {LARGEST >> 20} MiB; the logs in {folder} are too long")
    os.replace(part, archive)


def unpack(archive, folder):
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_archive", description=__doc__.splitlines()[0])
    parser.add_argument("archive", type=pathlib.Path, help="gpu-report.tar.gz, or the folder it was made of")
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--readme", type=pathlib.Path, default=ROOT.parent / "README.md")
    parser.add_argument("--preferences", type=pathlib.Path, default=preferences.FILE)
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.archive
        if not folder.is_dir():
            folder = pathlib.Path(scratch)
            unpack(given.archive, folder)
        results = results_in(folder)
        if not results:
            print(f"{given.archive}: no figure was measured")
            return 1
        for result in results:
            stored = store(result, given.results)
            print(f"{len(result['benchmarks'])} entries of {result['datetime'][:16]} stored in {stored}")
    given.preferences.write_text(json.dumps(preferences.preferences(given.results), indent=1) + "\n")
    images = given.readme.parent / "docs" / "images"
    images.mkdir(parents=True, exist_ok=True)
    report.write(given.readme, given.results, images)
    print(f"rendered {given.readme}; wrote {given.preferences}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
