"""Comments and docstrings of the sources, and those that open badly. `python -m tests.house.prose [PATH ...]` lists the latter."""

from __future__ import annotations

import ast
import io
import pathlib
import re
import sys
import tokenize

ROOT = pathlib.Path(__file__).parents[2]
FOLDERS = ("flowseg", "flowseg_kernels", "csrc", "build_backend", "bench", "tests")
#: Words that put the subject of a sentence last.
OPENERS = re.compile(r"(Of|What|With|Where|Whose)\b")


def python_prose(text: str) -> list[tuple[int, str]]:
    """(line, text) of each comment block and each docstring of Python code."""
    found = []
    previous = None
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            line = token.string.lstrip("#: ").strip()
            # A comment line below another one goes on with its sentence.
            if previous != (token.start[0] - 1, token.start[1]):
                found.append((token.start[0], line))
            previous = token.start
    for node in ast.walk(ast.parse(text)):
        for inner in ast.iter_child_nodes(node):
            if (
                isinstance(inner, ast.Expr)
                and isinstance(inner.value, ast.Constant)
                and isinstance(inner.value.value, str)
            ):
                found.append((inner.lineno, inner.value.value.strip()))
    return sorted(found)


def cpp_prose(text: str) -> list[tuple[int, str]]:
    """(line, text) of each comment of C++ or CUDA code; line comments below each other are one."""
    found = []
    previous = None
    for number, line in enumerate(text.splitlines(), 1):
        comment = re.search(r"(?<![:\"])//+\s*(.*)", line)
        if not comment:
            continue
        if previous != (number - 1, comment.start()):
            found.append((number, comment.group(1)))
        previous = (number, comment.start())
    return found


def sources(paths: list[str]) -> list[pathlib.Path]:
    """Source files below the paths."""
    files = []
    for path in paths:
        root = ROOT / path
        files += [root] if root.is_file() else [f for f in sorted(root.rglob("*")) if f.is_file()]
    return [f for f in files if f.suffix in (".py", ".cpp", ".h", ".cu", ".cuh")]


def prose(paths: list[str]) -> list[tuple[str, int, str]]:
    """(file, line, text) of every comment and docstring below the paths."""
    found = []
    for file in sources(paths):
        read = python_prose if file.suffix == ".py" else cpp_prose
        found += [(str(file.relative_to(ROOT)), line, text) for line, text in read(file.read_text())]
    return found


def bad_openings(paths: list[str]) -> list[tuple[str, int, str]]:
    """Those comments and docstrings that open with a word of OPENERS."""
    return [entry for entry in prose(paths) if OPENERS.match(entry[2])]


if __name__ == "__main__":
    chosen = sys.argv[1:] or list(FOLDERS)
    bad = bad_openings(chosen)
    for file, line, text in bad:
        print(f"{file}:{line}: {text.splitlines()[0]}")
    print(f"{len(bad)} of {len(prose(chosen))} comments and docstrings open badly")
