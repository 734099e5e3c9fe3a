"""Ways to install this project: python -m tests.packaging.routes [--list] [--full] [NAME ...]

Each route makes a fresh environment in a temporary folder, installs a copy of this tree into it, and asks its Python which backend
runs an op. Without names, every route runs if its tools are installed. Most routes test the installation, not the code, and compile
with -O0; --full compiles all of them as users do. The package index must be reachable. After each route the result is stored in
tests/packaging/routes.json and the table in docs/results/routes.md. The exit code is 1 if a route gave unexpected kernels.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

from ..mutation.__main__ import copy_tree
from ..sources import last_change
from .environment import ONE_OP, ROOT, link_packages, no_compiler

#: Outside this tree: otherwise every route would find the tree's .venv.
FOLDER = pathlib.Path(tempfile.gettempdir()) / "flowseg-routes"
RECORD = pathlib.Path(__file__).with_name("routes.json")
PAGE = ROOT / "docs" / "results" / "routes.md"
SOURCES = ("build_backend", "setup.py", "pyproject.toml", "csrc", "flowseg_kernels")
HEAD = """# Ways to install

`python -m tests.packaging.routes` makes a fresh environment for each row.
It runs the commands there, with a copy of this tree as the current folder.
Then it asks `python` of the environment which backend runs `flow_loss` on CPU tensors, and whether a gradient comes out.
`TARGET` is the environment. It held a torch before, where the row does not say otherwise.

"""
TAIL = """
Rows with "-O0" try where torch is found and what is installed; their kernels are compiled without optimisation.
"What was said" is the last line about missing kernels that the build or the first import printed.
The command at its end is left out.
"""
FLAGS = "FLOWSEG_CXXFLAGS"


class Failed(Exception):
    """A command of a route failed; the message is the end of its output."""


class Place:
    """The folder of one route: a copy of the tree in src/, the target environment in target/, the output of the commands in log."""

    def __init__(self, name: str, quick: bool):
        self.folder = FOLDER / name
        shutil.rmtree(self.folder, ignore_errors=True)
        self.source, self.target = self.folder / "src", self.folder / "target"
        copy_tree(self.source)
        hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "CONDA_PREFIX", "PWD", "CXX")
        kept = {k: v for k, v in os.environ.items() if k not in hidden and not k.startswith("FLOWSEG_")}
        # PATH keeps the folders of tools, but not the environment that this process was started from.
        path = [p for p in os.environ["PATH"].split(os.pathsep) if p and not (pathlib.Path(p) / "activate").exists()]
        for tool in ("uv", "pyproject-build"):
            if shutil.which(tool):
                (self.folder / "installers").mkdir(exist_ok=True)
                (self.folder / "installers" / tool).symlink_to(shutil.which(tool))
        path.append(str(self.folder / "installers"))
        self.variables = {**kept, "PATH": os.pathsep.join(path), "UV_CACHE_DIR": str(FOLDER / "uv-cache")}
        if quick:
            self.variables[FLAGS] = "-O0"
        self.quick, self.seconds = quick, 0
        self.log = self.folder / "log"

    @property
    def python(self) -> str:
        return str(self.target / "bin" / "python")

    def run(self, *command: str | os.PathLike, **variables: str) -> str:
        """Run a command in src/ and return its output. Raises Failed."""
        begin = time.monotonic()
        program = shutil.which(command[0], path=variables.get("PATH", self.variables["PATH"])) or command[0]
        done = subprocess.run(
            [str(word) for word in (program, *command[1:])], cwd=self.source, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, stdin=subprocess.DEVNULL,
            env={**self.variables, "PWD": str(self.source), **variables},
        )  # fmt: skip
        self.seconds += time.monotonic() - begin
        with self.log.open("a") as log:
            log.write(f"$ {' '.join(map(str, command))}\n{done.stdout}\n")
        if done.returncode:
            raise Failed(f"{' '.join(map(str, command))}: {' | '.join(done.stdout.strip().splitlines()[-4:])}")
        return done.stdout

    def make(self, *, torch: bool = True, options: tuple[str, ...] = (), python: str = sys.executable) -> None:
        """Make the target environment, with the pip of its Python and a link to this process's torch."""
        self.run(python, "-m", "venv", *options, self.target)
        if torch:
            link_packages(self.target, ("torch",))
        self.seconds = 0

    def newest_pip(self) -> None:
        self.run(self.python, "-m", "pip", "install", "--quiet", "--upgrade", "pip")
        self.seconds = 0

    def pip(self, *arguments: str, **variables: str) -> str:
        return self.run(self.python, "-m", "pip", "install", "-v", *arguments, **variables)

    def command(self) -> str:
        """The command for compiling the kernels that the installed package prints."""
        code = "from flowseg_kernels.info import report; print(report())"
        info = self.run(self.python, "-c", f"import sys; sys.path.remove(''); {code}")
        return re.search(r"C\+\+ kernels: not loaded: .* compile them with: (.*)", info)[1]

    def activated(self) -> dict[str, str]:
        path = f"{self.target / 'bin'}{os.pathsep}{self.variables['PATH']}"
        return {"VIRTUAL_ENV": str(self.target), "PATH": path}

    def base(self) -> str:
        """A separate Python that is not a virtual environment: links to the files of this one, and to this process's torch."""
        base = self.folder / "base"
        shutil.copytree(
            sys.base_prefix, base, copy_function=linked, symlinks=True, ignore=shutil.ignore_patterns("test")
        )
        link_packages(base, ("torch",))
        return str(base / "bin" / "python3")


def linked(source: str, to: str) -> None:
    """A hard link, or a copy on another file system."""
    try:
        os.link(source, to)
    except OSError:
        shutil.copy2(source, to)


@dataclasses.dataclass(frozen=True)
class Route:
    """One way to install.

    name:  on the command line
    shown: the commands, for the table
    gives: the backend that must run the op afterwards
    tools: programs that must be installed
    quick: compile with -O0
    """

    name: str
    shown: str
    gives: str
    install: Callable[[Place], None]
    tools: tuple[str, ...] = ()
    quick: bool = True


ROUTES: list[Route] = []


def route(name: str, shown: str, gives: str = "cpu", tools: tuple[str, ...] = (), quick: bool = True):
    def add(install: Callable[[Place], None]):
        ROUTES.append(Route(name, shown, gives, install, tools, quick))
        return install

    return add


@route("pip", "`TARGET/bin/pip install .`, the newest pip")
def _(place: Place) -> None:
    place.make()
    place.newest_pip()
    place.pip("--no-deps", ".")


@route("pip-of-python", "`TARGET/bin/pip install .`, the pip that came with Python")
def _(place: Place) -> None:
    place.make()
    place.pip("--no-deps", ".")


@route("pip-no-isolation", "`pip install 'setuptools>=77' ninja && pip install --no-build-isolation .`")
def _(place: Place) -> None:
    place.make()
    place.pip("setuptools>=77", "ninja")
    place.pip("--no-deps", "--no-build-isolation", ".")


@route("pip-editable", "`pip install -e .`")
def _(place: Place) -> None:
    place.make()
    place.newest_pip()
    place.pip("--no-deps", "-e", ".")


@route("uv-activated", "TARGET activated, `uv pip install .`", tools=("uv",))
def _(place: Place) -> None:
    place.make()
    place.run("uv", "pip", "install", "-v", "--no-deps", ".", **place.activated())


@route("uv-python", "`uv pip install --python TARGET .`", tools=("uv",))
def _(place: Place) -> None:
    place.make()
    place.run("uv", "pip", "install", "-v", "--python", place.target, "--no-deps", ".")


@route("uv-sync", "`uv sync --no-install-project && uv sync`; torch from the index", tools=("uv",))
def _(place: Place) -> None:
    place.run("uv", "sync", "--no-install-project")
    place.run("uv", "sync", "-v")
    place.target = place.source / ".venv"


@route(
    "build", "TARGET activated, `python -m build --wheel`, then `pip install` of the wheel", tools=("pyproject-build",)
)
def _(place: Place) -> None:
    place.make()
    place.run("pyproject-build", "-v", "--wheel", "--outdir", place.folder / "wheels", ".", **place.activated())
    place.pip("--no-deps", *map(str, (place.folder / "wheels").glob("*.whl")))


@route("build-sdist", "`TARGET/bin/python -m build`: an archive, and a wheel from it")
def _(place: Place) -> None:
    place.make()
    place.pip("build")
    place.run(place.python, "-m", "build", "--outdir", place.folder / "wheels", ".")
    place.pip("--no-deps", *map(str, (place.folder / "wheels").glob("*.whl")))


@route(
    "system-site",
    "torch in the Python that TARGET was made from, `python -m venv --system-site-packages`, `pip install .`",
)
def _(place: Place) -> None:
    place.make(torch=False, options=("--system-site-packages",), python=place.base())
    place.newest_pip()
    place.pip("--no-deps", ".")


@route("uv-system-site", "the same with `uv pip install --python TARGET .`", tools=("uv",))
def _(place: Place) -> None:
    place.make(torch=False, options=("--system-site-packages",), python=place.base())
    place.run("uv", "pip", "install", "-v", "--python", place.target, "--no-deps", ".")


@route("user-site", "torch in the user's site-packages, `python -m pip install --user .` without an environment")
def _(place: Place) -> None:
    base = place.base()
    place.target = place.folder / "base"
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    home = place.folder / "home"
    for name in sorted((place.target / "lib" / version / "site-packages").glob("*")):
        if name.is_symlink():
            name.unlink()
    link_packages(home, ("torch",))
    place.variables["PYTHONUSERBASE"] = str(home)
    place.seconds = 0
    place.run(base, "-m", "pip", "install", "-v", "--user", "--no-deps", ".")


def _with_compiler(compiler: str) -> None:
    @route(f"compiler-{compiler}", f"`CXX={compiler} pip install .`", tools=(compiler,), quick=False)
    def _(place: Place) -> None:
        place.make()
        place.newest_pip()
        place.pip("--no-deps", ".", CXX=compiler, FLOWSEG_BUILD="cpu")


for _name in ("g++-11", "clang++-14", "clang++-16", "g++"):
    _with_compiler(_name)


@route("no-compiler", "`pip install .` without a C++ compiler", gives="reference")
def _(place: Place) -> None:
    place.make()
    place.pip("--no-deps", ".", **no_compiler(place.folder))


@route("no-torch", "`pip install --no-deps .` with no torch anywhere, torch afterwards", gives="reference")
def _(place: Place) -> None:
    place.make(torch=False)
    place.pip("--no-deps", ".", PATH=os.pathsep.join(("/usr/bin", "/bin")))
    link_packages(place.target, ("torch",))


@route("command", "without a compiler first; then, with one, the command that `python -m flowseg_kernels.info` gives")
def _(place: Place) -> None:
    place.make()
    place.pip("--no-deps", ".", **no_compiler(place.folder))
    place.run("sh", "-c", place.command())


@route("uv-command", "the same where uv installed it", tools=("uv",))
def _(place: Place) -> None:
    place.make()
    bare = no_compiler(place.folder)
    bare["PATH"] += f"{os.pathsep}{place.folder / 'installers'}"
    place.run("uv", "pip", "install", "--python", place.target, "--no-deps", ".", **bare)
    place.run("sh", "-c", place.command())


@route("torch-2.10", "`pip install torch==2.10.0`, then `pip install .`")
def _(place: Place) -> None:
    place.make(torch=False)
    place.run(place.python, "-m", "pip", "install", "--quiet", "torch==2.10.0")
    place.pip("--no-deps", ".", FLOWSEG_BUILD="cpu")


@route("torch-newest", "`pip install torch`, then `pip install .`")
def _(place: Place) -> None:
    place.make(torch=False)
    place.run(place.python, "-m", "pip", "install", "--quiet", "torch")
    place.pip("--no-deps", ".", FLOWSEG_BUILD="cpu")


def _with_mode(mode: str, gives: str) -> None:
    @route(f"mode-{mode}", f"`FLOWSEG_BUILD={mode} pip install .`", gives=gives)
    def _(place: Place) -> None:
        place.make()
        place.pip("--no-deps", ".", FLOWSEG_BUILD=mode)


for _name, _gives in (("auto", "cpu"), ("cpu", "cpu"), ("none", "reference")):
    _with_mode(_name, _gives)


@route("mode-cuda", "`FLOWSEG_BUILD=cuda TORCH_CUDA_ARCH_LIST=9.0 pip install .`, three channels only", tools=("nvcc",))
def _(place: Place) -> None:
    place.make()
    flags = {"FLOWSEG_NVCCFLAGS": "-DFLOWSEG_ONLY_3 -Xptxas=-O1"}
    place.pip("--no-deps", ".", FLOWSEG_BUILD="cuda", TORCH_CUDA_ARCH_LIST="9.0", **flags)


@route("mode-none-again", "`pip install -e .`, then `FLOWSEG_BUILD=none pip install -e .`", gives="reference")
def _(place: Place) -> None:
    place.make()
    place.pip("--no-deps", "-e", ".", FLOWSEG_BUILD="cpu")
    place.pip("--no-deps", "-e", ".", FLOWSEG_BUILD="none")


def outcome(place: Place) -> dict:
    """Facts about the installation, printed by its own Python."""
    show = (
        "import json, flowseg_kernels.runtime.extension as e; "
        "print(json.dumps([e.CPU.facts(), e.CUDA.facts(), e.CPU.build_record()]))"
    )
    environment = {**place.variables, "FLOWSEG_NOTICE": "1"}
    run = lambda code: subprocess.run(  # noqa: E731
        [place.python, "-c", code], cwd=place.folder, env=environment, capture_output=True, text=True
    )
    op = run(ONE_OP)
    backend = re.fullmatch(r"(\w+) tensor\(True\)\n", op.stdout)
    if not backend:
        raise Failed(f"the op does not run: {op.stderr.strip().splitlines()[-1:]}")
    cpu, cuda, record = json.loads(run(show).stdout)
    built = [line for line in place.log.read_text().splitlines() if "kernels left out: " in line]
    said = [line for line in op.stderr.splitlines() if line.startswith("flowseg-kernels: ")]
    owner = re.search(r"C\+\+ kernels: compiling with .*, against torch \S+ of (.*)", place.log.read_text())
    text = (
        re.sub(r";? ?(with a C.. compiler, )?compile them with: .*", "", said[-1]) if said else (built[-1:] or [""])[0]
    )
    result = {
        "backend": backend[1],
        "compiler": cpu.get("compiler", ""),
        "torch": f"{cpu['torch']} of {owner[1] if owner else '?'}" if cpu else "",
        "cuda": cuda.get("architectures", ""),
        "build": record.get("build", ""),
        # The list of Pythons depends on this machine.
        "said": re.sub(r"asked: [^)]*", "asked: …", text.partition("flowseg-kernels: ")[2]),
    }
    for path, name in {place.target: "TARGET", place.folder: "…", FOLDER: "…"}.items():
        result = {k: v.replace(str(path), name) for k, v in result.items()}
    return result


def page(records: dict) -> str:
    head = ["route", "backend", "compiled by", "against torch", "what was said", "seconds", "date", "commit"]
    rows = []
    for known in ROUTES:
        r = records.get(known.name)
        if r:
            got = r["backend"] if r["backend"] == known.gives else f"**{r['backend'] or 'failed'}**"
            got += f", CUDA kernels for {r['cuda']}" if r.get("cuda") else ""
            flags = ", -O0" if r["quick"] and r.get("compiler") else ""
            cells = [
                known.shown,
                got,
                r.get("compiler", "") + flags,
                r.get("torch", ""),
                r.get("said", "").replace("|", "/"),
            ]
            rows.append([*cells, str(r["seconds"]), r["date"], r["commit"]])
    lines = [head, ["---"] * len(head), *rows]
    return HEAD + "".join(f"| {' | '.join(line)} |\n" for line in lines) + TAIL


def run(known: Route, full: bool) -> dict:
    place = Place(known.name, quick=known.quick and not full)
    try:
        known.install(place)
        result = outcome(place)
    except Failed as failure:
        result = {"backend": "", "said": str(failure).replace(str(FOLDER), "…")[-400:]}
    result |= {"seconds": round(place.seconds), "quick": place.quick, "date": datetime.date.today().isoformat()}
    result["commit"] = last_change(*SOURCES)
    if result["backend"] == known.gives:
        for part in (
            place.target,
            place.source,
            place.folder / "base",
        ):  # keeps the log, and everything of a failed route
            shutil.rmtree(part, ignore_errors=True)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.packaging.routes", description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="such as pip or uv-sync; without any, all")
    parser.add_argument("--list", action="store_true", help="print the routes and end")
    parser.add_argument("--full", action="store_true", help="compile every route as users do, not with -O0")
    options = parser.parse_args()
    known = {r.name: r for r in ROUTES}
    unknown = [name for name in options.names if name not in known]
    if unknown:
        parser.error(f"NAME: wanted one of {', '.join(known)}; got {unknown[0]!r}")
    if options.list:
        print("\n".join(f"{r.name:20} {r.shown}" for r in ROUTES))
        return 0
    good = True
    for r in (known[name] for name in options.names or known):
        missing = [tool for tool in r.tools if not shutil.which(tool)]
        if missing:
            print(f"{r.name}: not run: {missing[0]} is not installed", flush=True)
            continue
        result = run(r, options.full)
        records = json.loads(RECORD.read_text()) if RECORD.exists() else {}
        records[r.name] = result
        RECORD.write_text(json.dumps({k: records[k] for k in known if k in records}, indent=1) + "\n")
        PAGE.write_text(page(records))
        right = result["backend"] == r.gives
        good &= right
        print(
            f"{r.name}: {result['backend'] or 'failed'}{'' if right else f', wanted {r.gives}'}; {result['seconds']} s",
            flush=True,
        )
        if not right:
            print(f"    {result['said']}\n    {FOLDER / r.name / 'log'}", flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
