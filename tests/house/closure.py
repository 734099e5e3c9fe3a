"""The files that one op takes on all backends: imports and includes, followed. `python -m tests.house.closure` lists them."""

from __future__ import annotations

import ast
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).parents[2]
CSRC = ROOT / "csrc"


def module_file(parts: tuple[str, ...]) -> pathlib.Path | None:
    """The file of a module of this repository, or None."""
    base = ROOT.joinpath(*parts)
    return next((f for f in (base.with_suffix(".py"), base / "__init__.py") if f.exists()), None)


def imports_of(file: pathlib.Path, *, at_import_only: bool = False) -> list[tuple[str, ...]]:
    """Modules of this repository that a file imports, inside functions too; imports for type checkers do not count."""
    package = file.relative_to(ROOT).parent.parts
    tree = ast.parse(file.read_text())
    hidden = set()
    for node in ast.walk(tree):
        is_typing = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if is_typing or (at_import_only and is_function):
            hidden |= {id(inner) for part in node.body for inner in ast.walk(part)}
    found = []
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            names = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            # `from package import name` takes the module `package.name` where there is one.
            names = [base + (a.name,) if module_file(base + (a.name,)) else base for a in node.names]
        else:
            continue
        found += [name for name in names if name and module_file(name)]
    return found


def python_closure(starts: list[pathlib.Path]) -> set[pathlib.Path]:
    """The files and all that they import, without the `__init__.py` that only name a package."""
    seen, waiting = set(), list(starts)
    while waiting:
        file = waiting.pop()
        if file not in seen:
            seen.add(file)
            waiting += [module_file(name) for name in imports_of(file)]
    return {file for file in seen if file.name != "__init__.py"}


def include_closure(starts: list[pathlib.Path]) -> set[pathlib.Path]:
    """The C++ and CUDA files and all of ours that they include."""
    folders = [folder for folder in (CSRC, *CSRC.rglob("*")) if folder.is_dir()]
    seen, waiting = set(), list(starts)
    while waiting:
        file = waiting.pop().resolve()
        if file not in seen:
            seen.add(file)
            for name in re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', file.read_text(), re.MULTILINE):
                places = [file.parent / name, *(folder / name for folder in folders)]
                waiting += [place for place in places if place.is_file()][:1]
    return seen


def files_of(op: str) -> list[pathlib.Path]:
    """The files behind an op: its registration, its Triton, C++ and CUDA kernels, and all that these import or include.

    Two files of the build do not count, as they contain no code of an op: csrc/cpu/isa.cpp chooses the instruction set, and
    csrc/cpu/pixel/all.cpp lists the kernels of one translation unit.
    """
    folder = ROOT / "flowseg_kernels" / "ops" / op
    python = python_closure([folder / "op.py", *folder.glob("triton_*.py")])
    compiled = [CSRC / "cpu" / f"{op}.cpp", CSRC / "cuda" / f"{op}.cu"]
    # No include leads from the launcher to the kernel, which is compiled once per instruction set.
    compiled.append(CSRC / "cpu" / "pixel" / f"{op}.cpp")
    return sorted(python | include_closure([file for file in compiled if file.exists()]))


if __name__ == "__main__":
    files = files_of(sys.argv[1] if len(sys.argv) > 1 else "flow_loss")
    for file in files:
        print(file.relative_to(ROOT))
    print(len(files), "files")
