"""Pack the archive of a GPU report, and import it at home.

The import stores the results of an archive in bench/results/, writes the backend preferences that follow from them, and renders
README, docs/results/bench.md and the pictures.
"""

import argparse
import json
import pathlib
import re
import sys
import tarfile
import tempfile

from flowseg.runs.files import replacing, write_whole

from . import preferences, report
from .results import RESULTS, ROOT, store

#: Largest archive, and largest log in it, in bytes. A longer log keeps its beginning and its end.
LARGEST, LONGEST_LOG = 16 * 2**20, 4 * 2**20


def file_name(step):
    return re.sub(r"[^a-z0-9]+", "-", step.lower()).strip("-")


def read_state(folder):
    """{step: {"ended", "seconds", ...}} of earlier runs into a folder; {} if there is no readable state."""
    try:
        return json.loads((folder / "state.json").read_text())
    except (OSError, ValueError):
        return {}


def write_state(folder, state):
    write_whole(folder / "state.json", json.dumps(state, indent=1) + "\n")


def next_files(folder, step):
    """(results, log) of the next attempt at a step; files of earlier attempts stay."""
    name, attempt = file_name(step), 1
    while (folder / f"{name}.log").exists():
        attempt += 1
        name = f"{file_name(step)}.{attempt}"
    return folder / f"{name}.json", folder / f"{name}.log"


def slim(path):
    """Drop the single times, which are most of a pytest-benchmark file. Returns its number of entries, 0 if it is unreadable."""
    try:
        result = json.loads(path.read_text())
    except (OSError, ValueError):
        return 0
    for item in result["benchmarks"]:
        item["stats"].pop("data", None)
    path.write_text(json.dumps(result))
    return len(result["benchmarks"])


def results_in(folder):
    """The pytest-benchmark results in a folder, oldest first."""
    found = []
    for path in sorted(folder.glob("*.json")):
        if path.name == "state.json" or not path.stat().st_size:
            continue
        try:
            result = json.loads(path.read_text())
            found += [result] if result["benchmarks"] and result["datetime"] and result["machine_info"] else []
        except (ValueError, KeyError, TypeError):
            print(f"{path.name}: left out; it is truncated or holds no results of a step")
    return sorted(found, key=lambda result: result["datetime"])


def _shortened(path):
    text = path.read_bytes()
    if len(text) > LONGEST_LOG and path.suffix != ".json":
        half = LONGEST_LOG // 2
        text = text[:half] + b"\n[... the middle was left out ...]\n" + text[-half:]
    return text


def pack(folder, archive):
    """Write the files of a folder to a .tar.gz of at most LARGEST bytes; replace an older archive only once it is complete."""
    with replacing(archive) as part:
        with tempfile.TemporaryDirectory() as scratch, tarfile.open(part, "w:gz") as tar:
            for path in sorted(path for path in folder.iterdir() if path.is_file()):
                copy = pathlib.Path(scratch) / path.name
                copy.write_bytes(_shortened(path))
                tar.add(copy, path.name)
        if part.stat().st_size > LARGEST:
            raise OSError(f"{archive}: wanted at most {LARGEST >> 20} MiB; the logs in {folder} are too long")


def unpack(archive, folder):
    try:
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
    except FileNotFoundError:
        sys.exit(f"archive: wanted gpu-report.tar.gz or its folder; {archive} does not exist")
    except (OSError, EOFError, tarfile.TarError):
        sys.exit(
            f"archive: wanted an archive of `python -m bench gpu`; {archive} is another file or truncated; copy it again"
        )


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m bench gpu-import", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("archive", type=pathlib.Path, help="gpu-report.tar.gz, or the folder that it was packed from")
    readme = ROOT.parent / "README.md"
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS, help="folder to store the results in")
    parser.add_argument("--readme", type=pathlib.Path, default=readme, help="file to render, next to docs/")
    parser.add_argument(
        "--preferences", type=pathlib.Path, default=preferences.FILE, help="file of backend preferences"
    )
    parser.add_argument("--rehearsal", action="store_true", help="also import results of a dry run, which mean nothing")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.archive
        if not folder.is_dir():
            folder = pathlib.Path(scratch)
            unpack(given.archive, folder)
        results = results_in(folder)
        if not results:
            print(f"archive: wanted results; {given.archive} has none; run a step that measures, such as own pixel ops")
            return 1
        if not given.rehearsal and not all("gpu" in result["machine_info"] for result in results):
            print(
                f"archive: wanted results of a GPU; {given.archive} has those of a dry run; measure without --dry-run"
            )
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
